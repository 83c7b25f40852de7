"""Mixtures of experts: against a loop over tokens and experts, their checkpoints, and adapters on them."""

import dataclasses
import importlib
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jpeft
from jpeft_interop.models import FlaxAutoModelForCausalLM
from jpeft_interop.models._experts import Experts, MixtureOfExperts
from jpeft_interop.models._leaves import flatten
from jpeft_interop.models.mixtral import read_mixtral

pytest.importorskip("torch")
pytest.importorskip("transformers")
oracle = importlib.import_module("tests.interop.models.torch_oracle")
cases = importlib.import_module("tests.interop.models.cases_moe")
safetensors = pytest.importorskip("safetensors.torch")

EXPERTS, FEATURES, HIDDEN, TOKENS = 4, 6, 5, 9
IDS = np.random.default_rng(0).integers(3, 40, (2, 7))


def filled(module, seed=0):
    """The module with random float32 arrays."""
    graphdef, state = nnx.split(module)
    leaves, structure = jax.tree.flatten(state)
    draw = np.random.default_rng(seed).normal
    return nnx.merge(graphdef, structure.unflatten([jnp.asarray(draw(size=x.shape), jnp.float32) for x in leaves]))


def looped(tokens, chosen, weights, gate_up, down):
    """The same in float64, token by token and expert by expert."""
    tokens, weights, gate_up, down = (np.asarray(x, np.float64) for x in (tokens, weights, gate_up, down))
    result = np.zeros_like(tokens)
    for token, (picks, shares) in enumerate(zip(np.asarray(chosen), weights, strict=True)):
        for expert, share in zip(picks, shares, strict=True):
            gate, up = np.split(tokens[token] @ gate_up[expert], 2)
            result[token] += share * ((gate / (1 + np.exp(-gate)) * up) @ down[expert])
    return result


@pytest.mark.parametrize(
    "chosen",
    [
        np.stack([np.random.default_rng(1).permutation(EXPERTS)[:2] for _ in range(TOKENS)]),
        np.full((TOKENS, 1), 2),
        np.tile([[3, 0]], (TOKENS, 1)),
    ],
    ids=["two", "one for all", "two without tokens"],
)
def test_experts_equal_a_loop_over_tokens_and_experts(chosen):
    experts = filled(Experts(EXPERTS, FEATURES, HIDDEN, "silu", ("g", "u", "d")))
    random = np.random.default_rng(2)
    tokens, weights = random.normal(size=(TOKENS, FEATURES)), random.uniform(size=chosen.shape)
    tokens, weights = jnp.asarray(tokens, jnp.float32), jnp.asarray(weights, jnp.float32)
    with jax.numpy_dtype_promotion("strict"):
        actual = nnx.jit(Experts.__call__)(experts, tokens, jnp.asarray(chosen), weights)
    expected = looped(tokens, chosen, weights, experts.gate_up_proj[...], experts.down_proj[...])
    np.testing.assert_allclose(actual, expected, atol=1e-5 * np.abs(expected).max())


def test_gradients_of_experts_equal_those_of_a_dense_product():
    experts = filled(Experts(EXPERTS, FEATURES, HIDDEN, "silu", ("g", "u", "d")))
    graphdef, state = nnx.split(experts)
    random = np.random.default_rng(3)
    chosen = jnp.asarray(np.stack([random.permutation(EXPERTS)[:2] for _ in range(TOKENS)]))
    tokens = jnp.asarray(random.normal(size=(TOKENS, FEATURES)), jnp.float32)
    weights = jnp.asarray(random.uniform(size=chosen.shape), jnp.float32)

    def sorted_loss(state, tokens, weights):
        return jnp.square(nnx.merge(graphdef, state)(tokens, chosen, weights)).sum()

    def dense_loss(state, tokens, weights):
        module = nnx.merge(graphdef, state)
        gate, up = jnp.split(jnp.einsum("ti,eio->teo", tokens, module.gate_up_proj[...]), 2, axis=-1)
        every = jnp.einsum("teo,eof->tef", jax.nn.silu(gate) * up, module.down_proj[...])
        shares = (jax.nn.one_hot(chosen, EXPERTS) * weights[..., None]).sum(axis=1)
        return jnp.square(jnp.einsum("tef,te->tf", every, shares)).sum()

    actual, expected = (
        jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(state, tokens, weights) for loss in (sorted_loss, dense_loss)
    )
    for ours, reference in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, reference, atol=1e-5 * float(jnp.abs(reference).max()))


@pytest.mark.parametrize("normed", [False, True])
def test_router_weights(normed):
    config = dataclasses.replace(
        read_mixtral(
            {"hidden_size": FEATURES, "intermediate_size": HIDDEN, "num_local_experts": EXPERTS, "head_dim": 2}
        ),
        norm_topk_prob=normed,
    )
    block = filled(MixtureOfExperts(config, ("g", "u", "d")))
    x = np.random.default_rng(4).normal(size=(2, 3, FEATURES)).astype(np.float32)
    scores = x.reshape(-1, FEATURES).astype(np.float64) @ np.asarray(block.gate.kernel[...], np.float64)
    shares = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
    chosen = np.argsort(-shares, axis=-1)[:, :2]
    weights = np.take_along_axis(shares, chosen, axis=-1)
    weights = weights / weights.sum(axis=-1, keepdims=True) if normed else weights
    kernels = (block.experts.gate_up_proj[...], block.experts.down_proj[...])
    expected = looped(x.reshape(-1, FEATURES), chosen, weights, *kernels).reshape(x.shape)
    np.testing.assert_allclose(block(jnp.asarray(x)), expected, atol=1e-5 * np.abs(expected).max())


MODELS = {
    "mixtral": lambda: oracle.random_model("MixtralForCausalLM", cases.mixtral(num_hidden_layers=2)),
    "qwen3_moe": lambda: oracle.random_model("Qwen3MoeForCausalLM", cases.qwen(num_hidden_layers=2)),
}
each_model = pytest.mark.parametrize("family", MODELS)


@each_model
@pytest.mark.parametrize("scan_layers", [False, True])
def test_checkpoints_with_fused_experts(family, scan_layers, tmp_path):
    theirs = MODELS[family]()
    folder = oracle.saved(theirs, tmp_path)
    by_expert = FlaxAutoModelForCausalLM.from_pretrained(folder, scan_layers=scan_layers).params
    assert len(safetensors.load_file(folder / "model.safetensors")) > len(theirs.state_dict())
    fused = {name: tensor.contiguous() for name, tensor in theirs.state_dict().items()}
    safetensors.save_file(fused, folder / "model.safetensors", metadata={"format": "pt"})
    together = FlaxAutoModelForCausalLM.from_pretrained(folder, scan_layers=scan_layers).params
    jax.tree.map(np.testing.assert_array_equal, by_expert, together)


@each_model
def test_experts_are_written_one_by_one(family, tmp_path):
    ours = FlaxAutoModelForCausalLM.from_pretrained(oracle.saved(MODELS[family](), tmp_path / "theirs"))
    ours.save_pretrained(tmp_path / "ours")
    theirs, written = (safetensors.load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    theirs = {name.replace("block_sparse_moe", "mlp"): tensor for name, tensor in theirs.items()}
    assert {name: tensor.shape for name, tensor in written.items()} == {k: v.shape for k, v in theirs.items()}


def test_a_missing_expert_is_named(tmp_path):
    folder = oracle.saved(MODELS["mixtral"](), tmp_path)
    tensors = safetensors.load_file(folder / "model.safetensors")
    del tensors["model.layers.1.block_sparse_moe.experts.4.w2.weight"]
    safetensors.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing \(1\): model\.layers\.1\.mlp\.experts\.4\.w2\.weight"):
        FlaxAutoModelForCausalLM.from_pretrained(folder)


def test_layers_of_both_kinds_are_stacked_by_kind(tmp_path):
    theirs = oracle.random_model("Qwen3MoeForCausalLM", cases.qwen(decoder_sparse_step=2))
    folder = oracle.saved(theirs, tmp_path)
    stacked = FlaxAutoModelForCausalLM.from_pretrained(folder, scan_layers=True, remat="nothing_saveable")
    paths = stacked.blueprint.leaves
    assert "model.layers.1:4:2.mlp.experts.down_proj" in paths and "model.layers.0:4:2.mlp.down_proj.kernel" in paths
    oracle.assert_close(
        oracle.jax_output(stacked, "logits", input_ids=IDS), oracle.torch_output(theirs, "logits", input_ids=IDS)
    )


@each_model
@pytest.mark.parametrize("scan_layers", [False, True])
def test_adapters_on_experts_are_low_rank(family, scan_layers, tmp_path):
    folder = oracle.saved(MODELS[family](), tmp_path)
    ours = FlaxAutoModelForCausalLM.from_pretrained(folder, scan_layers=scan_layers)
    config = jpeft.LoraConfig(
        r=2, target_modules=["experts.gate_up_proj", "experts.down_proj"], init_lora_weights=False
    )
    wrapped = jpeft.wrap(ours.params, config, layouts=ours.layouts)
    shown = str(jpeft.explain(lambda params: ours.apply(params, IDS), wrapped))
    assert len(wrapped.adapters["default"].sites) == (2 if scan_layers else 4)
    assert "merged" not in shown and "experts.gate_up_proj" in shown and "ragged_dot" in shown
    lifted = np.asarray(jax.jit(jpeft.lift(lambda params: ours.apply(params, IDS).logits))(wrapped))
    oracle.assert_close(lifted, np.asarray(jax.jit(ours.apply)(jpeft.merge(wrapped), IDS).logits))
    assert np.abs(lifted - np.asarray(ours.apply(ours.params, IDS).logits)).max() > 1e-2


@each_model
@pytest.mark.parametrize("scan_layers", [False, True])
def test_all_linear_means_neither_router_nor_experts(family, scan_layers, tmp_path):
    folder = oracle.saved(MODELS[family](), tmp_path)
    ours = FlaxAutoModelForCausalLM.from_pretrained(folder, scan_layers=scan_layers)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrapped = jpeft.wrap(ours.params, jpeft.LoraConfig(target_modules="all-linear"), layouts=ours.layouts)
    names = {path.rpartition(".")[2] for path in wrapped.adapters["default"].sites}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj"}


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("key", ["num_experts", "num_local_experts"])
def test_both_names_of_the_number_of_experts(model_type, key):
    ours = FlaxAutoModelForCausalLM.from_config(
        {"model_type": model_type, "num_hidden_layers": 1, key: 3}, abstract=True
    )
    shapes = {path: leaf.shape for path, leaf in flatten(ours.params)}
    assert shapes["model.layers.0.mlp.gate.kernel"][1] == shapes["model.layers.0.mlp.experts.down_proj"][0] == 3


def test_no_experts_at_all():
    config = {"model_type": "qwen3_moe", "num_hidden_layers": 2, "num_experts": 0}
    ours = FlaxAutoModelForCausalLM.from_config(config, abstract=True)
    assert ours.config.mlp_types == ("dense", "dense")
    assert "model.layers.1.mlp.gate_proj.kernel" in dict(flatten(ours.params))


@pytest.mark.parametrize(
    "model_type, key, value",
    [
        ("mixtral", "attention_bias", True),
        ("mixtral", "mlp_bias", True),
        ("mixtral", "norm_topk_prob", False),
        ("mixtral", "shared_expert_intermediate_size", 4),
        ("qwen3_moe", "mlp_bias", True),
        ("qwen3_moe", "shared_expert_intermediate_size", 4),
    ],
)
def test_what_is_not_implemented_is_refused(model_type, key, value):
    with pytest.raises(ValueError, match=rf"{key}={json.dumps(value).capitalize()}"):
        FlaxAutoModelForCausalLM.from_config({"model_type": model_type, key: value}, abstract=True)
