"""Adapters of several methods on one model beside PEFT's `PeftMixedModel`; conversion to LoRA beside PEFT's."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft.tuners.mixed import COMPATIBLE_TUNER_TYPES  # noqa: E402

import jpeft  # noqa: E402
from jpeft._paths import leaves_by_path  # noqa: E402
from jpeft_interop import get_peft_model, save_pretrained  # noqa: E402
from jpeft_interop._files import read_tensors  # noqa: E402
from tests.harness import random_like, with_derived  # noqa: E402
from tests.interop.methods import parity, test_parity  # noqa: E402
from tests.interop.trajectories import quietly  # noqa: E402

TARGETS = {"target_modules": ["q_proj", "down_proj"]}
CONFIGS = {
    "lora": ("LoraConfig", {"r": 2, "lora_alpha": 3, **TARGETS}),
    "loha": ("LoHaConfig", {"r": 2, "alpha": 3, **TARGETS}),
    "lokr": ("LoKrConfig", {"r": 1, "decompose_both": True, **TARGETS}),
    "oft": ("OFTConfig", {"oft_block_size": 2, **TARGETS}),
    "shira": ("ShiraConfig", {"r": 1, "random_seed": 3, **TARGETS}),
    "adalora": ("AdaLoraConfig", {"init_r": 2, "target_r": 2, "lora_alpha": 3, "total_step": 10, **TARGETS}),
}
PAIRS = [
    ("lora", "oft"),
    ("oft", "lora"),
    ("loha", "lokr"),
    ("shira", "lora"),
    ("adalora", "lokr"),
]


def config(package, name):
    kind, settings = CONFIGS[name]
    return quietly(getattr(package, kind), **copy.deepcopy(settings))


def test_all_that_peft_mixes_is_here():
    assert {name.upper() for name in CONFIGS} == {kind.value for kind in COMPATIBLE_TUNER_TYPES}


def of_torch(wrapped, pair, names, folder):
    """PEFT's mixed model with the same arrays: it reads no files itself, and nests the layers."""
    save_pretrained(wrapped, folder, layouts=pair.layouts)
    model = copy.deepcopy(pair.torch_model)
    mixed = quietly(peft.get_peft_model, model, config(peft, names[0]), "first", mixed=True)
    quietly(mixed.add_adapter, "second", config(peft, names[1]))
    quietly(mixed.set_adapter, ["first", "second"])
    for name in ("first", "second"):
        tensors = read_tensors(folder / name / "adapter_model.safetensors")
        places = {**dict(mixed.named_parameters()), **dict(mixed.named_buffers())}
        for path, module in mixed.named_modules():
            places |= {f"{path}.shira_indices.{k}": array for k, array in getattr(module, "shira_indices", {}).items()}
        own = {
            place.replace(".base_layer", "").replace(f".{name}", ""): tensor
            for place, tensor in places.items()
            if f".{name}" in place
        }
        for key, tensor in tensors.items():
            with torch.no_grad():
                own[key].copy_(torch.tensor(np.asarray(tensor)))
    return mixed.eval()


@pytest.mark.parametrize("names", PAIRS, ids=" then ".join)
def test_mixed_models(names, tmp_path):
    pair = parity.twin("blocks")
    ours = get_peft_model((pair.apply, pair.params), config(jpeft, names[0]), "first", mixed=True)
    ours.add_adapter("second", config(jpeft, names[1]))
    ours.set_adapter(["first", "second"])
    wrapped = ours.params
    mask = jpeft.trainable_mask(wrapped).adapters
    drawn = random_like(wrapped.adapters, 100)
    adapters = jax.tree.map(lambda old, new, trains: new if trains else old, wrapped.adapters, drawn, mask)
    ours.params = with_derived(dataclasses.replace(wrapped, adapters=adapters))
    mixed = of_torch(ours.params, pair, names, tmp_path)
    expected = parity.torch_outputs(parity.Row("", "", {}, "blocks"), mixed)
    parity.assert_close(np.asarray(ours(jnp.asarray(pair.ids))), expected, "forward")
    alone = parity.torch_outputs(parity.Row("", "", {}, "blocks"), pair.torch_model)
    assert np.abs(alone - expected).max() > 1e-2 * np.abs(expected).max()
    parity.assert_close(np.asarray(pair.apply(jpeft.merge(ours.params), pair.ids)), expected, "merged")


CONVERTED = [row for row in test_parity.ROWS if row.name in ("vera", "c3a", "vblora")]


@pytest.mark.parametrize("rank", [2, 0.8])
@pytest.mark.parametrize("row", CONVERTED, ids=lambda row: row.name)
def test_converted_as_peft_does(row, rank, tmp_path):
    model, pair = parity.torch_adapter(row), parity.twin(row.twin)
    quietly(model.save_pretrained, tmp_path)
    wrapped = jpeft.convert_to_lora(parity.read(row, tmp_path), "default", rank, "less")
    _, state = quietly(peft.convert_to_lora, model, rank)
    merged, base = leaves_by_path(jpeft.merge(wrapped, adapter_names="less")), leaves_by_path(pair.params)
    own = wrapped.adapters["less"]
    assert len(state) == 2 * len(own.sites) > 0
    for path, site in own.sites.items():
        a, b = (state[f"base_model.model.{path}.lora_{side}.weight"].numpy() for side in "AB")
        assert own.weights[path]["lora_A"].shape == a.shape
        change = (b @ a).T
        np.testing.assert_allclose(merged[site.leaf] - base[site.leaf], change, atol=1e-5 * np.abs(change).max() + 1e-6)
