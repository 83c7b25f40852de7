"""Files of adapters whose arrays are spread over a mesh, and adapters read onto a base that is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import jpeft
from jpeft import LoraConfig
from jpeft_interop import get_peft_model_state_dict, load_pretrained, save_pretrained, set_peft_model_state_dict

DRAWS = np.random.default_rng(0)
BASE = {
    "model": {
        "embed_tokens": {"embedding": DRAWS.normal(size=(16, 8)).astype(np.float32)},
        "layers": {"0:2": {"q_proj": {"kernel": DRAWS.normal(size=(2, 8, 32)).astype(np.float32)}}},
    },
    "head": {"kernel": DRAWS.normal(size=(8, 4)).astype(np.float32), "bias": DRAWS.normal(size=4).astype(np.float32)},
}
SPECS = {
    "model": {
        "embed_tokens": {"embedding": P("tp", "fsdp")},
        "layers": {"0:2": {"q_proj": {"kernel": P(None, "fsdp", "tp")}}},
    },
    "head": {"kernel": P("fsdp", "tp"), "bias": P("tp")},
}
CONFIGS = {
    "factors": LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False),
    "a table and its base weights": LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], init_lora_weights=False),
    "copies": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["head"], init_lora_weights=False),
    "rows": jpeft.TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[1, 5]),
}


def on_mesh(tree, axis_type):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(axis_type,) * 2)
    return jax.tree.map(lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), tree, SPECS), mesh


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_files_and_arrays_are_those_of_one_device(tmp_path, name, axis_type):
    whole = jpeft.wrap(jax.tree.map(jnp.asarray, BASE), CONFIGS[name], rng=jax.random.key(0))
    save_pretrained(whole, tmp_path / "one")
    base, mesh = on_mesh(BASE, axis_type)
    spread = jax.device_put(whole, jpeft.shardings(whole, mesh, SPECS, tiny=0))
    save_pretrained(spread, tmp_path / "mesh")
    assert files(tmp_path / "mesh") == files(tmp_path / "one")

    loaded = load_pretrained(base, tmp_path / "mesh")
    found = jax.tree.leaves(loaded.adapters)
    for array, own in zip(found, jax.tree.leaves(jpeft.shardings(loaded, mesh).adapters), strict=True):
        assert array.sharding.is_equivalent_to(own, array.ndim)
    alone = load_pretrained(jax.tree.map(jnp.asarray, BASE), tmp_path / "one")
    jax.tree.map(np.testing.assert_array_equal, found, jax.tree.leaves(alone.adapters))
    filled = set_peft_model_state_dict(loaded, get_peft_model_state_dict(loaded))
    assert [leaf.sharding for leaf in jax.tree.leaves(filled)] == [leaf.sharding for leaf in jax.tree.leaves(loaded)]


def test_an_abstract_base_on_a_mesh_gets_an_abstract_adapter(tmp_path):
    save_pretrained(jpeft.wrap(BASE, CONFIGS["factors"]), tmp_path)
    base, _ = on_mesh(BASE, AxisType.Auto)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), base)
    loaded = load_pretrained(shapes, tmp_path)
    assert loaded.adapters["default"].weights["model.layers.0:2.q_proj"]["lora_A"].shape == (2, 4, 8)
