"""Mixed batches against PyTorch PEFT's `adapter_names`: the same logits, and the same tokens from `generate`."""

import jax
import numpy as np
import pytest

import jpeft
from jpeft_interop import load_adapter, load_pretrained
from jpeft_interop.models import FlaxAutoModelForCausalLM
from tests.interop.test_round_trip import quietly, randomise

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4
SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
ADAPTERS = {
    "a": {"r": 2, "lora_alpha": 9, "target_modules": ["q_proj", "v_proj"]},
    "b": {"r": 5, "target_modules": ["o_proj", "down_proj", "embed_tokens"], "use_rslora": True},
    "c": {"r": 3, "lora_alpha": 16, "target_modules": "all-linear"},
}
ROWS = ["c", "__base__", "a", "b", "a"]
IDS = np.random.default_rng(0).integers(3, 40, (5, 6))
MASK = np.ones_like(IDS)
MASK[2, :3] = 0


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """PyTorch's model with three random adapters, and the folder that it and they were saved to."""
    folder = tmp_path_factory.mktemp("mixed")
    config = transformers.LlamaConfig(
        **SIZES,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        eos_token_id=2,
        pad_token_id=0,
    )
    base = randomise(transformers.LlamaForCausalLM(config), 0)
    base.save_pretrained(folder / "base")
    first, *others = ADAPTERS
    model = quietly(peft.get_peft_model, base, peft.LoraConfig(**ADAPTERS[first]), adapter_name=first)
    for name in others:
        quietly(model.add_adapter, name, peft.LoraConfig(**ADAPTERS[name]))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    quietly(model.save_pretrained, folder)
    return model.eval(), folder


def mixed_from(pair, **options):
    folder = pair[1]
    model = FlaxAutoModelForCausalLM.from_pretrained(folder / "base", **options)
    first, *others = ADAPTERS
    wrapped = load_pretrained(model.params, folder / first, adapter_name=first)
    for name in others:
        wrapped = load_adapter(wrapped, folder / name, name)
    return model, jpeft.mixed_batch(wrapped)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_logits(pair, scan_layers):
    model, mixed = mixed_from(pair, scan_layers=scan_layers)
    with torch.no_grad():
        want = pair[0](
            input_ids=torch.tensor(IDS), attention_mask=torch.tensor(MASK), adapter_names=ROWS
        ).logits.numpy()
    apply = jax.jit(
        jpeft.lift(lambda params, ids, mask: model.apply(params, input_ids=ids, attention_mask=mask).logits)
    )
    got = np.asarray(apply(jpeft.with_context(mixed, adapter_indices=ROWS), IDS, MASK))
    seen = MASK != 0
    assert np.abs(got - want)[seen].max() <= TOLERANCE * np.abs(want).max()
    other = apply(jpeft.with_context(mixed, adapter_indices=ROWS[::-1]), IDS, MASK)
    assert apply._cache_size() == 1 and not np.allclose(got, other)


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("beams", [1, 3])
def test_generate(pair, scan_layers, beams):
    model, mixed = mixed_from(pair, scan_layers=scan_layers)
    # No `generation_config` of the models: what matters here is which adapter continues which row.
    settings = transformers.GenerationConfig(max_new_tokens=6, eos_token_id=2, pad_token_id=0)
    with torch.no_grad():
        want = pair[0].generate(
            input_ids=torch.tensor(IDS), attention_mask=torch.tensor(MASK), adapter_names=ROWS,
            generation_config=settings, num_beams=beams,  # PEFT repeats the names only for this argument
        ).numpy()  # fmt: skip
    got = model.generate(
        jpeft.with_context(mixed, adapter_indices=ROWS), IDS, attention_mask=MASK, max_new_tokens=6, num_beams=beams,
        eos_token_id=2, pad_token_id=0,
    ).sequences  # fmt: skip
    np.testing.assert_array_equal(np.asarray(got)[:, : want.shape[1]], want)


def test_several_sequences_for_a_row(pair):
    model, mixed = mixed_from(pair)
    rows = jpeft.with_context(mixed, adapter_indices=ROWS)
    drawn = model.generate(rows, IDS, max_new_tokens=4, do_sample=True, num_return_sequences=2, top_k=1).sequences
    greedy = model.generate(rows, IDS, max_new_tokens=4).sequences
    np.testing.assert_array_equal(drawn, np.repeat(np.asarray(greedy), 2, axis=0))


def test_what_peft_refuses_is_refused(pair):
    dora = quietly(peft.LoraConfig, target_modules=["q_proj"], use_dora=True)
    model = quietly(peft.get_peft_model, transformers.LlamaForCausalLM(pair[0].config), dora).eval()
    with pytest.raises(ValueError, match="Cannot pass `adapter_names` when DoRA is enabled"):
        model(input_ids=torch.tensor(IDS), adapter_names=["default"] * len(IDS))
    ours = mixed_from(pair)[0]
    config = jpeft.LoraConfig(target_modules=["q_proj"], use_dora=True)
    wrapped = jpeft.wrap(jax.eval_shape(lambda: ours.params), config)
    with pytest.raises(ValueError, match="not DoRA"):
        jpeft.mixed_batch(wrapped)
