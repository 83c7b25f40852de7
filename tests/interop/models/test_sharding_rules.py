"""Default rules of all families over the axes "data", "fsdp" and "tp", and what the networks say of activations."""

import dataclasses
import functools
import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec as P

from jpeft_interop.models import FAMILIES, FlaxAutoModelForCausalLM
from jpeft_interop.models._default_rules import WHOLE, default_rules, role_of
from jpeft_interop.models._leaves import flatten
from jpeft_interop.models._spread import spread
from jpeft_interop.models.auto import AutoModel

BARE = ("cls_token", "mask_token", "class_embedding", "relative_attention_bias.embedding")
"""Parameters of two axes or more that every device has whole: they are small in models of any size."""


def mesh_of(**sizes):
    shape = tuple(sizes.values())
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return Mesh(devices, tuple(sizes))


@functools.cache
def leaves_of_all_families():
    """{(family, path): (shape, config)} of every parameter of every class of every configuration that is tested."""
    pytest.importorskip("transformers")
    files = sorted(Path(__file__).parent.glob("cases_*.py"))
    cases = [case for file in files for case in importlib.import_module(f"tests.interop.models.{file.stem}").CASES]
    found = {}
    for case in cases:
        config = case.config().to_dict()
        for task in FAMILIES[config["model_type"]].architectures:
            model = AutoModel(task).from_config(config, abstract=True)
            found |= {(config["model_type"], path): (leaf.shape, model.config) for path, leaf in flatten(model.params)}
    return found


def test_every_parameter_of_every_family_has_a_role():
    leaves = leaves_of_all_families()
    assert {family for family, _ in leaves} == set(FAMILIES)
    assert [key for key in leaves if role_of(key[1]) is None] == []
    whole = [
        path for _, path in leaves if role_of(path) is WHOLE and path.rpartition(".")[2] in ("kernel", "embedding")
    ]
    assert [path for path in whole if not path.endswith(BARE)] == []


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"tp": 4}, {"fsdp": 4, "tp": 2}, {"data": 2, "fsdp": 3}, {"data": 8}])
def test_default_rules_fit_every_family(sizes):
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    split = {name: 0 for name in sizes}
    for (_, path), (shape, config) in leaves_of_all_families().items():
        spec = default_rules(mesh, config)(path, shape)
        sharding = NamedSharding(mesh, spec)
        sharding.shard_shape(shape)  # raises where a size does not divide
        for name in {name for name in spec if name}:
            split[name] += 1
    assert split.pop("data", 0) == 0 and all(split.values())


def llama(**fields):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return {"model_type": "llama", "max_position_embeddings": 64, "pad_token_id": 0, **sizes, **heads, **fields}


def specs_of(config, task="causal-lm", scan_layers=False, **sizes):
    model = AutoModel(task).from_config(config, abstract=True, mesh=mesh_of(**sizes), scan_layers=scan_layers)
    return {path: leaf.sharding.spec for path, leaf in flatten(model.params)}


def layer(specs, prefix):
    return {path.removeprefix(prefix): spec for path, spec in specs.items() if path.startswith(prefix)}


LLAMA_LAYER = {
    "self_attn.q_proj.kernel": P("fsdp", "tp"),
    "self_attn.k_proj.kernel": P("fsdp", "tp"),
    "self_attn.v_proj.kernel": P("fsdp", "tp"),
    "self_attn.o_proj.kernel": P("tp", "fsdp"),
    "mlp.gate_proj.kernel": P("fsdp", "tp"),
    "mlp.up_proj.kernel": P("fsdp", "tp"),
    "mlp.down_proj.kernel": P("tp", "fsdp"),
    "input_layernorm.scale": P(),
    "post_attention_layernorm.scale": P(),
}
AROUND = {
    "model.embed_tokens.embedding": P("tp", "fsdp"),
    "model.norm.scale": P(),
    "lm_head.kernel": P("fsdp", "tp"),
}


def test_a_decoder_is_split_by_what_its_layers_do():
    specs = specs_of(llama(), fsdp=4, tp=2)
    assert layer(specs, "model.layers.1.") == LLAMA_LAYER
    assert {path: specs[path] for path in AROUND} == AROUND
    stacked = layer(specs_of(llama(), scan_layers=True, fsdp=4, tp=2), "model.layers.0:2.")
    assert stacked == {path: P(None, *spec) if len(spec) else P() for path, spec in LLAMA_LAYER.items()}


@pytest.mark.parametrize("absent", ["fsdp", "tp", "both"])
def test_axes_that_a_mesh_lacks_split_nothing(absent):
    sizes = {"fsdp": {"tp": 2}, "tp": {"data": 2, "fsdp": 4}, "both": {"data": 8}}[absent]

    def without(spec):
        kept = [name if name in sizes else None for name in spec]
        while kept and kept[-1] is None:
            kept.pop()
        return P(*kept)

    expected = {path: without(spec) for path, spec in LLAMA_LAYER.items()}
    assert layer(specs_of(llama(), **sizes), "model.layers.0.") == expected


MIXTRAL = {**llama(num_hidden_layers=1), "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 64, "n_positions": 16}
T5 = {"model_type": "t5", "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "vocab_size": 64}


@pytest.mark.parametrize(
    "config, task, expected",
    [
        (
            {**llama(), "model_type": "qwen2", "vocab_size": 63}, "causal-lm",
            {"layers.0.self_attn.q_proj.bias": P("tp"), "layers.0.self_attn.k_proj.bias": P("tp"),
             "embed_tokens.embedding": P(None, "fsdp"), "lm_head.kernel": P("fsdp")},
        ),
        (
            GPT2, "causal-lm",
            {"h.0.attn.c_attn.kernel": P("fsdp", "tp"), "h.0.attn.c_attn.bias": P("tp"),
             "wpe.embedding": P(None, "fsdp"),
             "h.0.attn.c_proj.kernel": P("tp", "fsdp"), "h.0.attn.c_proj.bias": P(), "h.0.mlp.c_proj.bias": P(),
             "h.0.mlp.c_fc.bias": P("tp"), "wte.embedding": P("tp", "fsdp"), "ln_f.bias": P()},
        ),
        (
            MIXTRAL, "causal-lm",
            {"experts.gate_up_proj": P(None, "fsdp", "tp"), "experts.down_proj": P(None, "tp", "fsdp"),
             "mlp.gate.kernel": P("fsdp")},
        ),
        (
            {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
             "intermediate_size": 48, "vocab_size": 64}, "masked-lm",
            {"self.query.bias": P("tp"), "attention.output.dense.kernel": P("tp", "fsdp"),
             "attention.output.dense.bias": P(),
             "intermediate.dense.kernel": P("fsdp", "tp"), "0.output.dense.kernel": P("tp", "fsdp"),
             "transform.dense.kernel": P("fsdp"), "predictions.bias": P("tp"), "0.output.LayerNorm.bias": P(),
             "word_embeddings.embedding": P("tp", "fsdp"), "token_type_embeddings.embedding": P(None, "fsdp")},
        ),
        (
            T5, "seq2seq-lm",
            {"decoder.block.0.layer.1.EncDecAttention.k.kernel": P("fsdp", "tp"),
             "SelfAttention.o.kernel": P("tp", "fsdp"),
             "DenseReluDense.wi.kernel": P("fsdp", "tp"), "DenseReluDense.wo.kernel": P("tp", "fsdp"),
             "relative_attention_bias.embedding": P(), "shared.embedding": P("tp", "fsdp")},
        ),
    ],
    ids=["qwen2", "gpt2", "mixtral", "bert", "t5"],
)  # fmt: skip
def test_other_names_of_the_same_roles(config, task, expected):
    specs = specs_of(config, task, fsdp=4, tp=2)
    for end, spec in expected.items():
        own = [given for path, given in specs.items() if path.endswith(end)]
        assert own and set(own) == {spec}, end


def test_heads_are_not_cut():
    attention = layer(specs_of(llama(num_key_value_heads=1), fsdp=4, tp=2), "model.layers.0.self_attn.")
    assert attention["k_proj.kernel"] == attention["v_proj.kernel"] == P("fsdp")
    assert (attention["q_proj.kernel"], attention["o_proj.kernel"]) == (P("fsdp", "tp"), P("tp", "fsdp"))
    odd = layer(
        specs_of(llama(num_attention_heads=3, num_key_value_heads=3, head_dim=8), fsdp=4, tp=2), "model.layers.0."
    )
    assert odd["self_attn.q_proj.kernel"] == P("fsdp") and odd["self_attn.o_proj.kernel"] == P(None, "fsdp")
    assert odd["mlp.up_proj.kernel"] == P("fsdp", "tp")


def test_other_names_of_mesh_axes_and_rules_of_ones_own_stay_what_they_were():
    config = llama(hidden_size=64, intermediate_size=128)
    up = "model.layers.0.mlp.up_proj.kernel"
    assert specs_of(config, data=4, model=2)[up] == P(None, ("data", "model"))
    model = FlaxAutoModelForCausalLM.from_config(
        config, abstract=True, mesh=mesh_of(fsdp=4, tp=2), sharding_rules=[("up_proj", P("tp"))]
    )
    given = {path: leaf.sharding.spec for path, leaf in flatten(model.params)}
    assert given.pop(up) == given.pop(up.replace("0", "1")) == P("tp")
    assert set(given.values()) == {P()}


# ---- activations


def constraints(model, rows=4, mesh=None):
    """The specs that a trace of the model constrains arrays to, with how many axes they have."""

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "sharding_constraint":
                yield equation.params["sharding"].spec, equation.outvars[0].aval.ndim
            for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    yield from walk(inner)

    with jax.set_mesh(mesh) if mesh is not None else jax.enable_x64(False):
        return list(walk(jax.make_jaxpr(model.apply)(model.params, jnp.ones((rows, 6), jnp.int32)).jaxpr))


def named(**sizes):
    mesh = mesh_of(**sizes) if sizes else None
    return FlaxAutoModelForCausalLM.from_config(llama(), abstract=True, mesh=mesh, scan_layers=True)


ROWS = ("data", "fsdp")


def test_activations_are_split_by_rows_and_scores_by_vocabulary():
    rows = (P(ROWS, None, None), 3)
    expected = [(P("data"), 2), (P("data", None, "fsdp"), 3), *[rows] * 3, (P(ROWS, None, "tp"), 3)]
    assert constraints(named(data=2, fsdp=2, tp=2)) == expected
    assert constraints(named(tp=2)) == [*[(P(None, None, None), 3)] * 3, (P(None, None, "tp"), 3)]
    odd = FlaxAutoModelForCausalLM.from_config(llama(vocab_size=63), abstract=True, mesh=mesh_of(tp=2))
    assert constraints(odd)[-1] == (P(None, None, None), 3)


def test_nothing_is_said_of_activations_otherwise():
    model = named(data=2, fsdp=2)
    assert constraints(named()) == constraints(named(x=2, y=2)) == constraints(named(data=2, model=2)) == []
    assert constraints(model, rows=6) == []
    anywhere = dataclasses.replace(model, params=named().params)
    for names, axes in ((("data", "fsdp"), AxisType.Explicit), (("x", "y"), AxisType.Auto)):
        elsewhere = jax.make_mesh((2, 2), names, axis_types=(axes, axes), devices=jax.devices()[:4])
        assert constraints(anywhere, mesh=elsewhere) == []
    manual = jax.shard_map(
        lambda x: spread(x, model.blueprint.options.mesh),
        mesh=model.blueprint.options.mesh,
        in_specs=P("data"),
        out_specs=P("data"),
    )
    x = jnp.arange(8.0 * 3 * 2).reshape(8, 3, 2)
    np.testing.assert_array_equal(jax.jit(manual)(x), x)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_the_mesh_of_a_model_is_left_to_the_compiler(axis_type):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(axis_type,) * 2)
    model = FlaxAutoModelForCausalLM.from_config(llama(), abstract=True, mesh=mesh)
    meshes = {leaf.sharding.mesh for leaf in jax.tree.leaves(model.params)} | {model.blueprint.options.mesh}
    assert {kind for own in meshes for kind in own.axis_types} == {AxisType.Auto}


SAME = {
    "mixtral": (MIXTRAL, "causal-lm"),
    "t5": ({**T5, "decoder_start_token_id": 0}, "seq2seq-lm"),
}


@pytest.mark.parametrize("name", SAME)
def test_a_split_model_computes_the_same(name):
    config, task = SAME[name]
    alone = AutoModel(task).from_config(config)
    ids = jnp.arange(24).reshape(4, 6) * 5 % 64
    split = AutoModel(task).from_config(config, abstract=True, mesh=mesh_of(data=2, fsdp=2, tp=2))
    placed = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), alone.params, split.params)
    rows = NamedSharding(mesh_of(data=2, fsdp=2, tp=2), P(ROWS))
    want = jax.jit(lambda params, ids: alone.apply(params, ids, labels=ids))(alone.params, ids)
    got = jax.jit(lambda params, ids: split.apply(params, ids, labels=ids))(placed, jax.device_put(ids, rows))
    np.testing.assert_allclose(got.logits, want.logits, atol=1e-5)
    np.testing.assert_allclose(got.loss, want.loss, rtol=1e-5)
