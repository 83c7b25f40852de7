"""CPT against PyTorch PEFT: the projection, the loss, outputs and files both ways, training with and without decay."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
import jpeft_interop

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from types import SimpleNamespace  # noqa: E402

from jpeft.methods.cpt import prompt  # noqa: E402
from tests.interop.prompt_models import (  # noqa: E402
    assert_close,
    check_both_ways,
    check_generation,
    inputs,
    labels,
    loaded,
    loaded_by_peft,
    tensors,
    their_output,
    torch_inputs,
)
from tests.interop.prompt_steps import (  # noqa: E402
    assert_same_arrays,
    assert_same_way,
    encoder_of,
    our_steps,
    their_steps,
)
from tests.interop.test_round_trip import quietly  # noqa: E402

CONTEXT = [5, 6, 7, 8, 9, 10, 11, 12, 13]
TYPES = [0, 1, 2, 3, 4, 5, 6, 7, 8]
SETTINGS = {
    "cpt_token_ids": CONTEXT, "cpt_mask": [1] * 9, "cpt_tokens_type_mask": TYPES, "opt_projection_epsilon": 1.0,
    "opt_projection_format_epsilon": 0.6,
}  # fmt: skip
DECAY = {**SETTINGS, "opt_weighted_loss_type": "decay", "opt_loss_decay_factor": 0.6}


def test_the_projection_and_what_moves():
    """Rows inside and outside of their balls; the gradient is that of PEFT's hook."""
    theirs_config = peft.CPTConfig(task_type="CAUSAL_LM", **SETTINGS)
    theirs_config.token_dim = 8
    generator = torch.Generator().manual_seed(0)
    table = torch.nn.Embedding(20, 8)
    theirs = peft.tuners.cpt.CPTEmbedding(theirs_config, table)
    delta = torch.randn((9, 8), generator=generator) * torch.logspace(-3, 0, 9)[:, None].flip(0)
    theirs.delta_embedding.weight.data = delta.clone()
    factor = torch.randn((9, 8), generator=generator)
    want = theirs(torch.arange(9))
    (want * factor).sum().backward()

    params = {"embed_tokens": {"embedding": jnp.asarray(table.weight.detach().numpy())}}
    adapter = jpeft.wrap(params, jpeft.CPTConfig(**SETTINGS)).adapters["default"]
    np.testing.assert_array_equal(
        adapter.shared["embedding.weight"], params["embed_tokens"]["embedding"][np.array(CONTEXT)]
    )
    assert not adapter.shared["delta_embedding.weight"].any()
    p = {**adapter.shared, "delta_embedding.weight": jnp.asarray(delta.numpy())}

    def product(p):
        found = prompt(p, adapter.config, {})
        return (found * factor.numpy()).sum(), found

    gradients, found = jax.grad(product, has_aux=True)(p)
    np.testing.assert_allclose(found, want.detach().numpy(), atol=1e-6)
    np.testing.assert_allclose(
        gradients["delta_embedding.weight"], theirs.delta_embedding.weight.grad.numpy(), atol=1e-6
    )
    radii = np.linalg.norm(np.asarray(found - p["embedding.weight"]), axis=1)
    lengths = np.linalg.norm(delta.numpy(), axis=1)
    assert (radii < 0.99 * lengths).sum() >= 4 and (radii > 0.99 * lengths).sum() >= 2


@pytest.mark.parametrize("kind", ["none", "decay"])
def test_the_loss(kind):
    random = np.random.default_rng(0)
    logits = random.normal(size=(4, 12, 7)).astype(np.float32)
    types = np.sort(random.integers(0, 13, (4, 12)), axis=1)
    types[1] = random.permutation(types[1])
    targets = np.where(random.random((4, 12)) < 0.7, random.integers(0, 7, (4, 12)), -100)
    config = jpeft.CPTConfig(opt_weighted_loss_type=kind, opt_loss_decay_factor=0.7)
    want = peft.tuners.cpt.CPTEmbedding.calculate_loss(
        SimpleNamespace(logits=torch.tensor(logits)), torch.tensor(targets), torch.tensor(types), config
    ).loss.item()
    got = jax.jit(lambda *given: jpeft.cpt_loss(*given, config))(logits, targets, types)
    np.testing.assert_allclose(float(got), want, rtol=1e-6)
    for labels_, types_ in ((targets[:, :-1], types), (targets, types.astype(np.float32))):
        with pytest.raises(ValueError, match=r"expected logits \(rows, length, vocab\), and whole numbers"):
            jpeft.cpt_loss(logits, labels_, types_, config)
    with pytest.raises(ValueError, match=r"logits for logits \(12, 7\)"):
        jpeft.cpt_loss(logits[0], targets[0], types[0], config)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_files_and_outputs_both_ways(pair, name, tmp_path):
    own = pair(name)
    theirs, ours = check_both_ways(own, peft.CPTConfig(task_type="CAUSAL_LM", **SETTINGS), tmp_path)
    check_generation(own, theirs, ours)


@pytest.mark.parametrize(("name", "settings"), [("llama", DECAY), ("gpt2", SETTINGS)])
def test_ten_steps_of_training_and_the_file_to_train_on(pair, name, settings, tmp_path):
    own = pair(name)
    theirs = quietly(peft.get_peft_model, _copy(own), peft.CPTConfig(task_type="CAUSAL_LM", **settings)).eval()
    ours = jpeft_interop.get_peft_model(own.ours, jpeft.CPTConfig(**settings))
    for key, array in encoder_of(theirs).items():
        np.testing.assert_array_equal(ours.params.adapters["default"].shared[key], array)
    batch = {**inputs(own.kind), **labels(own.kind)}
    batch["input_type_mask"] = np.where(batch["attention_mask"] == 1, [[1, 2, 4, 5, 8, 8]], 0)
    want = their_steps(theirs, batch, 0.5)
    params, got = our_steps(own, ours.params, batch, 0.5, jpeft.cpt_projection())
    assert_same_way(got, want)
    # PEFT projects when it is called next.
    with torch.no_grad():
        final = quietly(theirs, **torch_inputs(batch)).loss.item()
    assert_same_arrays(params, theirs)
    moved = np.linalg.norm(np.asarray(params.adapters["default"].shared["delta_embedding.weight"]), axis=1)
    bounds = np.array([0, 0.6, 1, 0.6, 0, 0.6, 1, 0.6, 0]) * np.sqrt(16 / 2048)
    assert (moved <= bounds * 1.00001).all() and (np.abs(moved - bounds) < 1e-5).sum() >= 5

    ours.params = params
    np.testing.assert_allclose(float(ours(**batch).loss), final, atol=1e-3)
    ours.save_pretrained(tmp_path / "ours")
    quietly(theirs.save_pretrained, tmp_path / "theirs")
    one, other = tensors(tmp_path / "ours"), tensors(tmp_path / "theirs")
    assert one.keys() == other.keys() == {"prompt_embeddings"}
    np.testing.assert_allclose(one["prompt_embeddings"], other["prompt_embeddings"], atol=1e-3)
    configs = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs")]
    different = {key for key in configs[0].keys() | configs[1].keys() if configs[0].get(key) != configs[1].get(key)}
    assert different <= {"base_model_name_or_path", "auto_mapping"}
    again = loaded_by_peft(own, tmp_path / "ours")
    plain = inputs(own.kind)
    assert_close(np.asarray(ours(**plain).logits), their_output(again, plain), plain["attention_mask"])

    resumed = loaded(own, tmp_path / "ours", is_trainable=True).params
    for key, array in params.adapters["default"].shared.items():
        np.testing.assert_array_equal(resumed.adapters["default"].shared[key], array)


def _copy(own):
    import copy

    return copy.deepcopy(own.theirs)


def test_a_context_that_does_not_end_with_a_label(pair):
    """PEFT moves the types of a text by 6 then, so that its labels become templates, and there is no loss at all."""
    own = pair("llama")
    settings = {**DECAY, "cpt_token_ids": CONTEXT[:7], "cpt_mask": None, "cpt_tokens_type_mask": TYPES[:7]}
    theirs = quietly(peft.get_peft_model, _copy(own), peft.CPTConfig(task_type="CAUSAL_LM", **settings)).eval()
    ours = jpeft_interop.get_peft_model(own.ours, jpeft.CPTConfig(**settings))
    batch = {**inputs(own.kind), **labels(own.kind)}
    with torch.no_grad():
        outputs = quietly(theirs, **torch_inputs(batch))
    found = ours(**batch)
    assert_close(np.asarray(found.logits), outputs.logits.numpy(), batch["attention_mask"])
    # Of their labels one is left, that of the context.
    logs = np.asarray(jax.nn.log_softmax(np.asarray(found.logits)))
    np.testing.assert_allclose(outputs.loss.item(), -logs[:, 3, CONTEXT[4]].mean(), rtol=1e-4)
    counts = batch["labels"] != -100
    picked = np.take_along_axis(logs[:, 6:-1], np.where(counts, batch["labels"], 0)[..., None], -1)[..., 0]
    total = -(picked * counts).sum() - 0.6 * logs[:, 3, CONTEXT[4]].sum()
    np.testing.assert_allclose(float(found.loss), total / (counts.sum() + 3), rtol=1e-5)


def test_each_adapter_has_its_own_decay(pair):
    """PEFT takes that of the adapter "default", and fails if there is none."""
    own = pair("llama")
    params = own.ours.params
    for name, factor in (("default", 1.0), ("other", 0.5)):
        params = jpeft.wrap(params, jpeft.CPTConfig(**{**DECAY, "opt_loss_decay_factor": factor}), adapter_name=name)
    batch = {**inputs(own.kind), **labels(own.kind)}
    model, losses = None, {}
    for name in ("default", "other"):
        model = jpeft_interop.PeftModel(own.ours, params.adapters[name].config, adapter_name=name)
        losses[name] = float(model(**batch).loss)
        prepared, given = jpeft_interop.prepare_inputs(own.ours, jpeft.set_adapter(params, name), batch)
        types = given.pop("input_type_mask")
        logits = jpeft.lift(own.ours.apply)(prepared, **given).logits
        config = params.adapters[name].config
        np.testing.assert_allclose(
            float(jpeft.cpt_loss(logits, given["labels"], types, config)), losses[name], rtol=1e-5
        )
    assert abs(losses["default"] - losses["other"]) > 0.1
    model.add_adapter("default", params.adapters["default"].config)
    names = ["other", "default", "other"]
    found = model(**batch, adapter_names=names)
    given = jpeft.with_virtual_tokens(batch, jpeft.set_adapter(params, ["default", "other"]), adapter_names=names)
    counts = (np.asarray(given["labels"])[:, 1:] != -100).sum(1)
    arrays = (found.logits, given["labels"], given["input_type_mask"])
    of_rows = [
        float(jpeft.cpt_loss(*(array[row : row + 1] for array in arrays), params.adapters[name].config))
        for row, name in enumerate(names)
    ]
    np.testing.assert_allclose(float(found.loss), np.average(of_rows, weights=counts), rtol=1e-5)
    with pytest.raises(ValueError, match="logits of all 15 tokens, and the call gives none; expected no loss_chunk"):
        model(**batch, loss_chunk_size=5)

    both = jpeft.set_adapter(params, ["default", "other"])
    names = ["other", "default", "__base__"]
    given = jpeft.with_virtual_tokens(batch, both, adapter_names=names)
    assert given["labels"][0, :9].tolist() == [-100, -100, -100, -100, 9, -100, -100, -100, 13]
    assert given["labels"][2, 6:].tolist() == [-100] * 9 and given["input_type_mask"][2, :6].tolist() == [4] * 6
    assert given["input_type_mask"][0].tolist() == [*TYPES, *[12] * 6]


def test_types_that_do_not_fit(pair):
    own = pair("llama")
    wrapped = jpeft.wrap(own.ours.params, jpeft.CPTConfig(**SETTINGS))
    batch = {**inputs(own.kind), **labels(own.kind)}
    for mask in (np.ones((3, 5), int), np.ones((3, 6), np.float32)):
        with pytest.raises(
            ValueError, match=r"input_type_mask is .*expected integers of the shape of the labels, \(3, 6\)"
        ):
            jpeft.with_virtual_tokens({**batch, "input_type_mask": mask}, wrapped)
