"""Poly against PyTorch PEFT beyond the table of rows: its noise, training, whole models and what they generate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import jpeft  # noqa: E402
import jpeft_interop  # noqa: E402
from jpeft_interop import load_pretrained  # noqa: E402
from jpeft_interop.models import FlaxAutoModelForCausalLM, FlaxAutoModelForSeq2SeqLM  # noqa: E402
from jpeft_interop.models._losses import causal_lm_loss  # noqa: E402
from tests.interop.test_round_trip import quietly, randomise  # noqa: E402

SIZES = {"vocab_size": 40, "max_position_embeddings": 32, "eos_token_id": 2, "pad_token_id": 1}
POLY = {"r": 3, "n_tasks": 3, "n_skills": 2, "n_splits": 2}
TASKS = [2, 0, 1, 2]
IDS = np.random.default_rng(0).integers(3, 40, (4, 7))
MASK = np.ones_like(IDS)
IDS[2, :3], MASK[2, :3] = 1, 0
TOLERANCE = 1e-4


def llama():
    config = transformers.LlamaConfig(
        **SIZES, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
    )
    return transformers.LlamaForCausalLM(config)


def t5():
    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


KINDS = {
    "llama": (llama, "CAUSAL_LM", FlaxAutoModelForCausalLM),
    "t5": (t5, "SEQ_2_SEQ_LM", FlaxAutoModelForSeq2SeqLM),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{kind: folder} of random base models and PEFT's adapters of random values for the modules that PEFT chooses."""
    found = {}
    for kind, (make, task, _) in KINDS.items():
        found[kind] = tmp_path_factory.mktemp(kind)
        base = randomise(make(), 0)
        base.save_pretrained(found[kind] / "base")
        model = quietly(peft.get_peft_model, base, peft.PolyConfig(**POLY, task_type=task))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "poly_" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
        quietly(model.save_pretrained, found[kind])
    return found


def in_torch(folders, kind="llama", **options):
    make, _, _ = KINDS[kind]
    base = type(make()).from_pretrained(folders[kind] / "base")
    return quietly(peft.PeftModel.from_pretrained, base, folders[kind], **options).eval()


def in_jax(folders, kind="llama", **options):
    base = KINDS[kind][2].from_pretrained(folders[kind] / "base")
    return jpeft_interop.PeftModel.from_pretrained(base, folders[kind], **options)


def their_logits(model, tasks=TASKS):
    ids, mask = torch.tensor(IDS), torch.tensor(MASK)
    return model(input_ids=ids, attention_mask=mask, task_ids=torch.tensor(tasks)).logits


def assert_same(ours, theirs):
    theirs = theirs.detach().numpy()
    assert np.abs(np.asarray(ours) - theirs)[MASK != 0].max() <= TOLERANCE * np.abs(theirs).max()


def test_the_face_takes_the_tasks_of_a_call(folders):
    theirs, ours = in_torch(folders), in_jax(folders)
    for tasks in (TASKS, [0, 0, 0, 0]):
        assert_same(
            ours(input_ids=IDS, attention_mask=MASK, task_ids=tasks).logits, their_logits(theirs, tasks).detach()
        )
    with ours.disable_adapter():
        base = ours(input_ids=IDS, attention_mask=MASK, task_ids=TASKS).logits
    assert np.abs(base - ours(input_ids=IDS, attention_mask=MASK, task_ids=TASKS).logits).max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_search(folders, kind):
    theirs, ours = in_torch(folders, kind), in_jax(folders, kind)
    settings = transformers.GenerationConfig(
        max_new_tokens=6, eos_token_id=2, pad_token_id=1, decoder_start_token_id=0 if kind == "t5" else None
    )
    found = {}
    for tasks in (TASKS, [1, 1, 1, 1]):
        with torch.no_grad():
            want = theirs.generate(
                input_ids=torch.tensor(IDS),
                attention_mask=torch.tensor(MASK),
                task_ids=torch.tensor(tasks),
                generation_config=settings,
            ).numpy()
        own = ours.generate(
            IDS, attention_mask=MASK, task_ids=tasks, max_new_tokens=6, eos_token_id=2, pad_token_id=1
        ).sequences
        np.testing.assert_array_equal(np.asarray(own)[:, : want.shape[1]], want)
        found[tuple(tasks)] = np.asarray(own)
    assert not np.array_equal(*found.values())


def test_layers_in_stacks_and_beams(folders):
    base = FlaxAutoModelForCausalLM.from_pretrained(folders["llama"] / "base", scan_layers=True)
    wrapped = jpeft.with_context(load_pretrained(base.params, folders["llama"]), task_ids=TASKS)
    assert "model.layers.0:2.self_attn.q_proj" in wrapped.adapters["default"].sites
    apply = jax.jit(jpeft.lift(lambda params, ids, mask: base.apply(params, ids, attention_mask=mask).logits))
    theirs = in_torch(folders)
    assert_same(apply(wrapped, IDS, MASK), their_logits(theirs))
    settings = transformers.GenerationConfig(max_new_tokens=4, eos_token_id=2, pad_token_id=1, num_beams=2)
    with torch.no_grad():
        want = theirs.generate(
            input_ids=torch.tensor(IDS),
            attention_mask=torch.tensor(MASK),
            task_ids=torch.tensor(np.repeat(TASKS, 2)),
            generation_config=settings,
        ).numpy()
    own = base.generate(wrapped, IDS, attention_mask=MASK, max_new_tokens=4, num_beams=2).sequences
    np.testing.assert_array_equal(np.asarray(own)[:, : want.shape[1]], want)


# ---- training -------------------------------------------------------------------------------------------------------


def test_ten_steps_of_sgd_go_the_same_way_without_noise(folders):
    """PEFT's router is told not to draw; the rest of its model trains."""
    theirs, rate = in_torch(folders, is_trainable=True), 0.1
    ours = in_jax(folders, is_trainable=True)
    parameters = [p for p in theirs.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, rate)
    labels = np.where(MASK != 0, IDS, -100)
    labels[2, 3] = -100  # which is told from padding, whose outputs mean nothing

    @jax.jit
    def step(wrapped):
        def loss(wrapped):
            given = jpeft.with_context(wrapped, task_ids=jnp.asarray(TASKS))
            return causal_lm_loss(ours.apply(given, IDS, attention_mask=MASK).logits, labels)

        value, gradient = jpeft.value_and_grad(loss)(wrapped)
        mask = jpeft.trainable_mask(wrapped)
        return value, jax.tree.map(lambda t, p, g: p - rate * g if t else p, mask, wrapped, gradient)

    losses, wrapped = [], ours.params
    for _ in range(10):
        loss = theirs(
            input_ids=torch.tensor(IDS),
            attention_mask=torch.tensor(MASK),
            task_ids=torch.tensor(TASKS),
            labels=torch.tensor(labels),
        ).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        own, wrapped = step(wrapped)
        losses.append((loss.item(), float(own)))
    want, got = np.array(losses).T
    assert want[-1] < 0.95 * want[0]
    np.testing.assert_allclose(got, want, rtol=1e-3)
    state = quietly(peft.get_peft_model_state_dict, theirs)
    for path, arrays in wrapped.adapters["default"].weights.items():
        for name, array in arrays.items():
            np.testing.assert_allclose(
                array, state[f"base_model.model.{path}.{name}"].detach(), rtol=1e-3, atol=1e-3, err_msg=f"{path} {name}"
            )


def test_with_the_same_noise_it_computes_the_same(folders, monkeypatch):
    """PyTorch's uniform numbers in place of JAX's logistic ones, layer by layer."""
    theirs, ours = in_torch(folders).train(), in_jax(folders)
    modules = [path for path in ours.params.adapters["default"].sites]
    torch.manual_seed(5)
    want = their_logits(theirs)
    torch.manual_seed(5)
    drawn = iter([torch.rand(4, 2, 2).numpy() for _ in modules])

    def logistic(key, shape, dtype):
        uniform = next(drawn)
        assert uniform.shape == shape
        return jnp.asarray(np.log(uniform) - np.log1p(-uniform), dtype)

    monkeypatch.setattr(jax.random, "logistic", logistic)
    given = jpeft.with_context(ours.params, rng=jax.random.key(0), task_ids=TASKS)
    got = ours.apply(given, IDS, attention_mask=MASK).logits
    assert next(drawn, None) is None
    assert_same(got, want)
    assert np.abs(np.asarray(got) - their_logits(theirs.eval()).detach().numpy()).max() > 0.1


# ---- what is refused there as here ----------------------------------------------------------------------------------


def test_tasks_that_are_missing_or_unknown(folders):
    theirs, ours = in_torch(folders), in_jax(folders)
    with pytest.raises(ValueError, match="task_ids should not be None"):
        theirs(input_ids=torch.tensor(IDS))
    for call in (ours, ours.generate):
        with pytest.raises(ValueError, match="adapter 'default' needs task_ids for each row of the batch"):
            call(input_ids=IDS)
    with pytest.raises(ValueError, match="Only 3 tasks available. Found task id = 3"):
        their_logits(theirs, [0, 1, 2, 3])
    for call in (ours, ours.generate):
        with pytest.raises(ValueError, match=r"task_ids hold \[3\]; expected 0 to 2, as the adapter knows 3 tasks"):
            call(input_ids=IDS, task_ids=[0, 1, 2, 3])
        with pytest.raises(ValueError, match=r"task_ids are for 2 rows, "):
            call(input_ids=IDS, task_ids=[0, 1])


def test_it_cannot_be_merged(folders):
    with pytest.raises(NotImplementedError):
        in_torch(folders).merge_and_unload()
    with pytest.raises(ValueError, match="Poly at '.*' mixes its skills by the task of each row"):
        in_jax(folders).merge_and_unload()
