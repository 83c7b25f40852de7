"""`from_pretrained(quantize=...)`: the leaves of `jpeft.quantize`, made of one weight after another."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec as P

import jpeft
from jpeft_interop.models import FlaxAutoModelForCausalLM, _quantising, replicate_layers, resize_token_embeddings
from jpeft_interop.models._leaves import flatten

SIZES = {"vocab_size": 40, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3}
LLAMA = {"model_type": "llama", "num_attention_heads": 4, "max_position_embeddings": 16, **SIZES}
IDS = np.array([[1, 2, 3, 4]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    own = tmp_path_factory.mktemp("llama")
    FlaxAutoModelForCausalLM.from_config({**LLAMA, "initializer_range": 0.3}).save_pretrained(own)
    return own


def load(folder, **options):
    return FlaxAutoModelForCausalLM.from_pretrained(folder, **options)


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for (path, ours), theirs in zip(jax.tree_util.tree_leaves_with_path(left), jax.tree.leaves(right), strict=True):
        assert ours.dtype == theirs.dtype and ours.sharding == theirs.sharding
        np.testing.assert_array_equal(ours, theirs, err_msg=jax.tree_util.keystr(path))


BLOCKS = functools.partial(jpeft.quantize, format="int4", block=32, exclude=["o_proj"])
OPTIONS = {
    "nf4": ("nf4", {}),
    "int8, in bfloat16": ("int8", {"param_dtype": jnp.bfloat16}),
    "a function": (BLOCKS, {}),
    "nf4, a stack": ("nf4", {"scan_layers": True}),
    "a mesh": ("nf4", {"sharding_rules": [("mlp.*kernel", P("x")), ("kernel", P(None, "x"))]}),
    "a stack on a mesh": (
        "int8",
        {"scan_layers": True, "sharding_rules": [("down", P("z")), ("kernel", P(None, "x"))]},
    ),
    "a stack split over a mesh": (
        "fp8",
        {"scan_layers": True, "sharding_rules": lambda path, shape: P("z") if shape[0] == 3 else P()},
    ),
}


@pytest.mark.parametrize("quantize, options", OPTIONS.values(), ids=OPTIONS)
def test_the_leaves_are_those_of_quantize(folder, quantize, options):
    if "sharding_rules" in options:
        options = {**options, "mesh": Mesh(np.array(jax.devices()[:6]).reshape(2, 3), ("x", "z"))}
    function = functools.partial(jpeft.quantize, format=quantize) if isinstance(quantize, str) else quantize
    model = load(folder, quantize=quantize, **options)
    assert_same(model.params, function(load(folder, **options).params))
    assert sum(isinstance(leaf, jpeft.Quantized) for _, leaf in flatten(model.params)) >= 6


@pytest.mark.parametrize("scan_layers", [False, True], ids=["apart", "a stack"])
def test_one_weight_of_one_layer_is_dense_at_a_time(folder, scan_layers, monkeypatch):
    held, most = [], []

    def place(pieces, shape, *others):
        array = original(pieces, shape, *others)
        held.append(array)
        most.append(sum(one.size for one in held if not one.is_deleted() and one.ndim > 1 and one.size > 40 * 64))
        return array

    original = _quantising.place
    monkeypatch.setattr(_quantising, "place", place)
    load(folder, quantize="nf4", scan_layers=scan_layers)
    assert max(most) == 64 * 192 and len(most) == 21


def test_a_quantised_model_runs_without_adapters(folder):
    model = load(folder, quantize="nf4", scan_layers=True)
    dense = jpeft.dequantize(model.params)
    want = jax.jit(model.apply)(dense, IDS).logits
    np.testing.assert_allclose(jax.jit(model.apply)(model.params, IDS).logits, want, rtol=1e-5, atol=1e-5)


def test_it_is_resized_and_its_layers_are_repeated(folder):
    whole = functools.partial(jpeft.quantize, format="int8", include=["lm_head", "q_proj", "embed_tokens"])
    model = load(folder, quantize=whole)
    own = jpeft.dequantize(model.params)["lm_head"]["kernel"]
    for number in (44, 30):
        new = resize_token_embeddings(model, number, mean_resizing=False).params
        np.testing.assert_array_equal(new["lm_head"]["kernel"][:, :30], own[:, :30])
        assert new["lm_head"]["kernel"].shape == (64, number) == new["model"]["embed_tokens"]["embedding"].shape[::-1]
        assert isinstance(new["model"]["layers"]["0"]["self_attn"]["q_proj"]["kernel"], jpeft.Quantized)
    deeper = replicate_layers(model, [[0, 3], [1, 2]])
    query = [deeper.params["model"]["layers"][name]["self_attn"]["q_proj"]["kernel"] for name in "13"]
    assert query[0] is query[1] and isinstance(query[0], jpeft.Quantized)
    assert jax.eval_shape(deeper.apply, deeper.params, IDS).logits.shape == (1, 4, 40)


def test_what_quantize_may_not_be(folder):
    with pytest.raises(TypeError, match=r"quantize is 4; expected a format of jpeft\.quantize, such as \"nf4\", or"):
        load(folder, quantize=4)
    with pytest.raises(ValueError, match="format is 'int3'; expected one of"):
        load(folder, quantize="int3")
