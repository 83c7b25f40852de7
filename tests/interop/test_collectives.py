"""What devices exchange in a step with an adapter: what they exchange for the frozen model, and small arrays.

The compiled programs are compared, collective by collective. Sizes are chosen so that every part of a base weight that
is ever gathered is larger than any array of an adapter, and than any activation of an adapter's rank.
"""

import collections
import functools
import math

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import jpeft
from jpeft._paths import leaves_by_path
from jpeft_interop._hlo import collectives
from jpeft_interop.models import FlaxAutoModel, FlaxAutoModelForCausalLM

ROWS, LENGTH, WIDTH, HIDDEN, DEPTH = 8, 16, 128, 256, 3

LLAMA = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
RANK = 2
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

METHODS = {
    "lora": lambda targets: jpeft.LoraConfig(r=RANK, target_modules=targets),
    "ia3": lambda targets: jpeft.IA3Config(target_modules=targets, feedforward_modules=targets[-1:]),
    "dora": lambda targets: jpeft.LoraConfig(r=RANK, target_modules=targets, use_dora=True),
}


def mesh_of(**sizes):
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def batch_axes(mesh):
    return tuple(name for name in ("data", "fsdp") if name in mesh.axis_names) or None


def placed(tree, shardings):
    return jax.tree.map(lambda x, own: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=own), tree, shardings)


def counted(step, *args):
    """{(kind, shape of the result, how often): how many} of a compiled step."""
    text = jax.jit(step).lower(*args).compile().as_text()
    return collections.Counter((one.kind, one.shape, one.times, one.group) for one in collectives(text))


def llama(mesh):
    model = FlaxAutoModelForCausalLM.from_config(
        LLAMA, abstract=True, mesh=mesh, scan_layers=True, remat="nothing_saveable"
    )
    labels = jnp.arange(ROWS * LENGTH).reshape(ROWS, LENGTH) % 512

    def apply(params, x):
        return model.apply(params, inputs_embeds=x, labels=labels).loss

    return apply, model.params, PROJECTIONS


def mlp(mesh):
    """Blocks of a widening and a narrowing product, scanned and rematerialised, of a user's own."""
    rows = batch_axes(mesh)

    def pinned(x, *spec):
        return lax.with_sharding_constraint(x, NamedSharding(mesh, P(rows, None, *spec)))

    tensor = "tp" if "tp" in mesh.axis_names else None
    fsdp = "fsdp" if "fsdp" in mesh.axis_names else None

    @jax.checkpoint
    def block(x, layer):
        h = pinned(jnp.tanh(x @ layer["up"]["kernel"]), tensor)
        return pinned(x + h @ layer["down"]["kernel"]), None

    def apply(params, x):
        return jnp.square(lax.scan(block, pinned(x), params["layers"][f"0:{DEPTH}"])[0]).mean()

    def kernel(rows, columns, *spec):
        sharding = NamedSharding(mesh, P(None, *spec))
        return {"kernel": jax.ShapeDtypeStruct((DEPTH, rows, columns), jnp.float32, sharding=sharding)}

    layer = {"up": kernel(WIDTH, HIDDEN, fsdp, tensor), "down": kernel(HIDDEN, WIDTH, tensor, fsdp)}
    return apply, {"layers": {f"0:{DEPTH}": layer}}, ["up", "down"]


MESHES = {
    "fsdp": {"fsdp": 8},
    "tp": {"tp": 4},
    "both": {"fsdp": 4, "tp": 2},
    "replicas": {"data": 2, "fsdp": 2, "tp": 2},
}


def hidden(mesh):
    sharding = NamedSharding(mesh, P(batch_axes(mesh)))
    return jax.ShapeDtypeStruct((ROWS, LENGTH, WIDTH), jnp.float32, sharding=sharding)


@functools.cache
def of_the_frozen_model(model, sizes):
    """The collectives of a step with all weights frozen: the loss and its gradient by the hidden states."""
    mesh = mesh_of(**MESHES[sizes])
    apply, params, _ = model(mesh)
    return counted(lambda params, x: jax.value_and_grad(lambda x: apply(params, x))(x), params, hidden(mesh))


@pytest.mark.parametrize(
    "model, sizes, method",
    [
        (mlp, "fsdp", "lora"),
        (mlp, "tp", "lora"),
        (mlp, "both", "lora"),
        (mlp, "both", "ia3"),
        (mlp, "fsdp", "dora"),
        (llama, "fsdp", "lora"),
        (llama, "replicas", "lora"),
    ],
)
def test_an_adapter_adds_collectives_of_its_own_size_alone(model, sizes, method):
    mesh = mesh_of(**MESHES[sizes])
    apply, params, targets = model(mesh)
    wrapped = jpeft.wrap(params, METHODS[method](targets))
    wrapped = placed(wrapped, jpeft.shardings(wrapped, mesh, tiny=0))
    trainable, rest = jpeft.partition(wrapped)

    def step(trainable, rest, x):
        def loss(trainable, x):
            return jpeft.lift(apply)(jpeft.combine(trainable, rest), x)

        return jax.value_and_grad(loss, argnums=(0, 1))(trainable, x)

    frozen, adapted = of_the_frozen_model(model, sizes), counted(step, trainable, rest, hidden(mesh))
    largest = max(math.prod(leaf.shape[1:]) for leaf in jax.tree.leaves(trainable))
    largest = max(largest, ROWS * LENGTH * RANK)
    assert not frozen - adapted
    assert adapted - frozen  # at least the adapter's gradients are summed
    assert [one for one in adapted - frozen if math.prod(one[1]) > largest] == []
    kernels = [leaf for path, leaf in leaves_by_path(params).items() if path.endswith("kernel")]
    assert min(math.prod(leaf.shape[-2:]) // mesh.shape.get("tp", 1) for leaf in kernels) > largest


def test_the_frozen_model_gathers_weights_layer_by_layer_and_sums_no_activations_over_fsdp():
    found = of_the_frozen_model(llama, "fsdp")
    shapes = {"q": (WIDTH, WIDTH), "k": (WIDTH, WIDTH // 2), "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
    gathers = {(shape, times): count for (kind, shape, times, _), count in found.items() if kind == "all-gather"}
    # Once forwards and once backwards, of q and o, k and v, gate and up, and down; and the head.
    expected = {shapes["q"]: 4, shapes["k"]: 4, shapes["up"]: 4, shapes["down"]: 2}
    assert gathers == {**{(shape, DEPTH): count for shape, count in expected.items()}, ((WIDTH, 512), 1): 1}
    assert all(shape == () for kind, shape, *_ in found if kind != "all-gather")


def test_tokens_are_looked_up_without_the_table_and_the_whole_batch_in_one_place():
    mesh = mesh_of(**MESHES["replicas"])
    model = FlaxAutoModel.from_config({**LLAMA, "num_hidden_layers": 0}, abstract=True, mesh=mesh)
    ids = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32, sharding=NamedSharding(mesh, P(("data", "fsdp"))))
    found = counted(lambda params, ids: model.apply(params, ids).last_hidden_state, model.params, ids)
    assert {kind for kind, *_ in found} == {"all-gather", "all-reduce", "all-to-all"}
    # What a device has of the result.
    assert max(math.prod(shape) for _, shape, *_ in found) <= ROWS // 4 * LENGTH * WIDTH


@pytest.mark.parametrize("gather", [("fsdp",), ()], ids=["as codes", "by the compiler"])
@pytest.mark.parametrize("sizes", ["fsdp", "both"])
def test_quantised_weights_travel_as_codes(sizes, gather):
    mesh = mesh_of(**MESHES[sizes])
    apply, params, targets = llama(mesh)
    wrapped = jpeft.wrap(jpeft.quantize(params, "int8", gather=gather), METHODS["lora"](targets))
    wrapped = placed(wrapped, jpeft.shardings(wrapped, mesh, tiny=0))

    def step(wrapped, x):
        return jpeft.grad(lambda wrapped, x: jpeft.lift(apply)(wrapped, x))(wrapped, x).adapters

    text = jax.jit(step).lower(wrapped, hidden(mesh)).compile().as_text()
    tensor = MESHES[sizes].get("tp", 1)
    weights = {math.prod(leaf.shape[1:]) // tensor for path, leaf in leaves_by_path(params).items() if "proj" in path}
    gathered = {one.dtype for one in collectives(text) if one.kind == "all-gather" and math.prod(one.shape) in weights}
    assert ("s8" in gathered) == bool(gather) and ("f32" in gathered) != bool(gather)
