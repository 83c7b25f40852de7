"""Shardings of wrapped parameters: which axis of which array goes where, and that what is placed computes the same."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec as P

import jpeft
from jpeft._quantized import Quantized
from tests.cases import METHODS
from tests.harness import QUICKLY, Problem, adapted, assert_close, random_like, results

AXES = {
    "lora": "lora_A:.i lora_B:o.",
    "pissa": "initial_A:.i initial_B:o. lora_A:.i lora_B:o.",
    "olora": "initial_A:.i initial_B:o. lora_A:.i lora_B:o.",
    "pissa, iterated": "initial_A:.i initial_B:o. lora_A:.i lora_B:o.",
    "dora": "lora_A:.i lora_B:o. lora_base_norm:o lora_magnitude_vector:o",
    "lora_bias": "lora_A:.i lora_B:o. lora_B.bias:o",
    "mica": "lora_A:.i lora_B:o.",
    "bdlora": "lora_A:.i lora_B:o.",
    "kasa": "kasa_A:.i kasa_B:o. lora_A:.i lora_B:o. lora_diag:.",
    "velora": "lora_A:.i lora_B:o. lora_velora_embed:.",
    "monteclora": "lora_A:.i lora_B:o. lora_monteclora_sampler.expert_weights:. "
    "lora_monteclora_sampler.expert_weights_prior:. lora_monteclora_sampler.gaussian_var_prior:.. "
    "lora_monteclora_sampler.std_prior:.",
    "qalora": "lora_A:.i lora_B:o.",
    "alora": "lora_A:.i lora_B:o.",
    "vera": "vera_lambda_b:o vera_lambda_d:. vera_A:.i vera_B:o.",
    "pvera": "pvera_lambda_b:o pvera_lambda_d:. pvera_A:.i pvera_B:o.",
    "randlora": "randlora_gamma:.. randlora_lambda:.. randlora_A:... randlora_B:...",
    "vblora": "vblora_logits_A:.i. vblora_logits_B:o.. vblora_vector_bank:..",
    "poly": "poly_lora_A:..i. poly_lora_B:...o poly_router.module_logits:..",
    "poly, split": "poly_lora_A:.... poly_lora_B:.... poly_router.module_logits:..",
    "lily": "lily_router:.. lily_A.up:.i lily_B.up:.o",
    "unilora": "unilora_indices_A:.i unilora_indices_B:o. unilora_scales_A:.i unilora_scales_B:o. unilora_theta_d:.",
    "tinylora": "tinylora_A:.i tinylora_B:o. tinylora_P:... tinylora_v.0:.",
    "frod": "frod_U:oi frod_lambda_0:i frod_lambda_l:i frod_lambda_s_values:. "
    "frod_V.up:ii frod_s_indices.up:.. frod_s_size.up:.",
    "delora": "delora_A:.i delora_B:o. delora_lambda:. delora_w_norm:i",
    "shira": "shira_indices:.. shira_weight:.",
    "supertuning": "supertuning_indices:. supertuning_lora_A:.i supertuning_lora_B:o. supertuning_values:.",
    "supertuning, found again": "supertuning_indices:. supertuning_values:.",
    "fourierft": "fourierft_spectrum:.",
    "waveft": "waveft_spectrum:.",
    "waveft, in proportion": "waveft_spectrum:.",
    "beft": "beft_bias:.o",
    "ia3": "ia3_l:o.",
    "loha": "hada_w1_a:o. hada_w1_b:.i hada_w2_a:o. hada_w2_b:.i",
    "loha, dense": "hada_w1_a:o. hada_w1_b:.i hada_w2_a:o. hada_w2_b:.i",
    "lokr": "lokr_w1:.. lokr_w2_a:.. lokr_w2_b:..",
    "lokr, whole": "lokr_w1:.. lokr_w2:..",
    "hira": "hira_A:.i hira_B:o.",
    "glora": "glora_A.Xd:o. glora_A.Xu:.i "
    "glora_B.Xd:o. glora_B.Xu:.i glora_C.Xd:i. glora_C.Xu:.. glora_D.X:o glora_E.X:o",
    "glora, vectors": "glora_A.X:o. glora_B.X:o. glora_C.X:i. glora_D.X:. glora_E.X:.",
    "adalora": "lora_A:.i lora_B:o. lora_E:..",
    "road": "road_alpha:. road_theta:.",
    "hra": "hra_u:i.",
    "hra, orthogonal": "hra_u:i.",
    "oft": "oft_R:..",
    "oft, exact": "oft_R:..",
    "boft": "boft_R:..ii boft_s:o.",
    "miss": "miss_block:.o",
    "miss, mini": "miss_block:..",
    "miss, bat": "miss_block:o..",
    "c3a": "c3a_kernel:oi.",
    "gralora": "gralora_A:... gralora_B:...",
    "gralora, hybrid": "gralora_A:... gralora_A_general:.i gralora_B:... gralora_B_general:o.",
    "peanut": "peanut_A:.o peanut_B:o.",
    "peanut, deep": "peanut_A:.o peanut_B:o. peanut_decoders.0:.. peanut_decoders.1:.. "
    "peanut_encoders.0:.. peanut_encoders.1:..",
    "deft": "deft_P:o. deft_R:.i",
    "deft, orthogonal": "deft_P:o. deft_R:.i",
    "deft, para": "deft_P:o.",
    "osf": "osf_S_low_init:. osf_U_low_init:o. osf_V_low_init:.i "
    "osf_svd_params.S_low:. osf_svd_params.U_low:o. osf_svd_params.V_low:.i",
    "adamss": "adamss_A:... adamss_B:o. adamss_labels:o adamss_newB:.. adamss_ranks:.",
    "adamss, rank 2": "adamss_A:... adamss_B:o. adamss_labels:o adamss_newB:.. adamss_ranks:.",
    "psoft": "psoft_A:.i psoft_B:o. psoft_R.vector_a:. psoft_R.vector_b:. psoft_R.weight:.",
    "psoft, free": "psoft_A:.i psoft_B:o. psoft_R.vector_a:. psoft_R.vector_b:. psoft_R.weight:..",
    "psoft, series": "psoft_A:.i psoft_B:o. psoft_R.vector_a:. psoft_R.vector_b:. psoft_R.weight:.",
    "dense delta": "delta:io",
    "gain": "gain:o",
}
"""The arrays of each method for a module of 8 inputs and 8 outputs: axes of inputs (i), of outputs (o), others (.)."""

SIZES, NAMES = (4, 2), ("fsdp", "tp")
MESH = AbstractMesh(SIZES, NAMES)
RULES = [("kernel$", P("fsdp", "tp")), ("bias$", P("tp")), ("embedding$", P("tp", "fsdp"))]


def struct(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def lora(params, targets=".*", *, layouts=None, **fields):
    return jpeft.wrap(params, jpeft.LoraConfig(**{"r": 2, "target_modules": targets, **fields}), layouts=layouts)


def specs(tree):
    return jax.tree.map(lambda sharding: sharding.spec, tree)


def own(placed, path, adapter="default"):
    return specs(placed.adapters[adapter].weights[path])


def of_letters(letters):
    """The spec of an array by its letters: a mesh axis splits one axis, and entries of whole last axes are left out."""
    entries = []
    for letter in letters:
        entry = {"i": "fsdp", "o": "tp"}.get(letter)
        entries.append(None if entry in entries else entry)
    while entries and entries[-1] is None:
        entries.pop()
    return P(*entries)


@pytest.mark.parametrize("row", METHODS, ids=lambda row: row.name)
def test_the_arrays_of_every_method_follow_the_axes_of_the_weight(row):
    config = row.config(**{"target_modules": "up", **row.options})
    params = {"up": {"kernel": struct(8, 8), "bias": struct(8)}, "down": {"kernel": struct(8, 8)}}
    wrapped = jpeft.wrap(params, config)
    placed = jpeft.shardings(wrapped, MESH, RULES, tiny=0)
    assert jax.tree.structure(placed) == jax.tree.structure(wrapped)
    assert specs(placed.base) == {
        "up": {"kernel": P("fsdp", "tp"), "bias": P("tp")},
        "down": {"kernel": P("fsdp", "tp")},
    }
    adapter = placed.adapters["default"]
    expected = dict(entry.rsplit(":", 1) for entry in AXES[row.name].split())
    assert {**own(placed, "up"), **specs(adapter.shared)} == {n: of_letters(own) for n, own in expected.items()}
    assert specs(adapter.scaling) == {"up": P()}


LAYOUTS = {
    # layout: shape, spec, lora_A (r, in), lora_B (out, r)
    "io": ((8, 8), P("fsdp", "tp"), P(None, "fsdp"), P("tp")),
    "oi": ((8, 8), P("fsdp", "tp"), P(None, "tp"), P("fsdp")),
    "ioo": ((8, 4, 2), P("fsdp", "tp"), P(None, "fsdp"), P("tp")),
    "iio": ((2, 4, 8), P("tp", None, "fsdp"), P(None, "tp"), P("fsdp")),
    "oio": ((4, 8, 2), P("tp", "fsdp"), P(None, "fsdp"), P("tp")),
    "iboo": ((8, 3, 1, 8), P("fsdp", None, None, "tp"), P(None, None, "fsdp"), P(None, "tp")),
    "bio": ((4, 8, 8), P("fsdp", None, "tp"), P("fsdp"), P("fsdp", "tp")),
    "boio": ((2, 4, 8, 2), P("tp", ("fsdp",)), P("tp"), P("tp", ("fsdp",))),
    "vo": ((8, 8), P("tp", "fsdp"), P(None, "tp"), P("fsdp")),
    "ioo, the last alone": ((8, 2, 4), P(None, None, "fsdp"), P(), P()),
    "ioo, both": ((8, 2, 4), P(None, "tp", "fsdp"), P(), P()),
    "both mesh axes": ((8, 8), P(("fsdp", "tp")), P(None, ("fsdp", "tp")), P()),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_several_axes_of_a_weight_are_one_of_the_array(name):
    shape, spec, first, second = LAYOUTS[name]
    layout = {"both mesh axes": "io"}.get(name, name.partition(",")[0])
    leaf = "embedding" if "v" in layout else "kernel"
    wrapped = lora({"up": {leaf: struct(*shape)}}, layouts={f"up.{leaf}": layout})
    placed = jpeft.shardings(wrapped, MESH, [("", spec)], tiny=0)
    names = [f"lora_embedding_{end}" if "v" in layout else f"lora_{end}" for end in "AB"]
    assert own(placed, "up") == dict(zip(names, (first, second), strict=True))


def test_stacked_layers_and_tiny_arrays():
    params = {"layers": {"0:3": {"up": {"kernel": struct(3, 1024, 2048)}}}}
    wrapped = lora(params, ["up"], r=4)
    path = "layers.0:3.up"
    assert own(jpeft.shardings(wrapped, MESH, [(r"layers\.0\.up", P("fsdp", "tp"))]), path) == {
        "lora_A": P(None, None, "fsdp"), "lora_B": P(None, "tp")
    }  # fmt: skip
    assert own(jpeft.shardings(wrapped, MESH, RULES, tiny=4097), path) == {"lora_A": P(), "lora_B": P(None, "tp")}


def test_shared_arrays_follow_modules_that_agree():
    params = {"up": {"kernel": struct(8, 8)}, "down": {"kernel": struct(8, 8)}, "small": {"kernel": struct(8, 4)}}
    rules = [("up|small", P("fsdp", "tp")), ("down", P("fsdp"))]

    def shared(*targets):
        wrapped = jpeft.wrap(params, jpeft.VeraConfig(r=2, target_modules=list(targets)))
        return specs(jpeft.shardings(wrapped, MESH, rules, tiny=0).adapters["default"].shared)

    assert shared("up") == {"vera_A": P(None, "fsdp"), "vera_B": P("tp")}
    assert shared("up", "down") == {"vera_A": P(None, "fsdp"), "vera_B": P()}
    assert shared("up", "small") == {"vera_A": P(None, "fsdp"), "vera_B": P()}


def test_copies_rows_biases_and_context():
    params = {
        "embed": {"embedding": struct(16, 8)},
        "up": {"kernel": struct(8, 8), "bias": struct(8)},
        "head": {"kernel": struct(8, 4)},
    }
    fields = {"modules_to_save": ["head"], "bias": "all", "trainable_token_indices": {"embed": [1, 5]}}
    wrapped = jpeft.with_context(lora(params, ["up"], **fields), rng=jax.random.key(0))
    placed = jpeft.shardings(wrapped, MESH, RULES, tiny=0)
    adapter = placed.adapters["default"]
    assert specs(adapter.replaced) == {"head.kernel": P("fsdp", "tp"), "up.bias": P("tp")}
    assert adapter.rows["embed.embedding"].values.spec == P(None, "fsdp")
    assert [leaf.spec for leaf in jax.tree.leaves(placed.context)] == [P()]


def test_axes_of_members_and_of_mixtures_come_first():
    params = {"layers": {"0:3": {"up": {"kernel": jnp.ones((3, 8, 8))}}}, "head": {"kernel": jnp.ones((8, 8))}}
    config = jpeft.LoraConfig(r=2, target_modules=["up"], modules_to_save=["head"])
    both = jpeft.wrap(jpeft.wrap(params, config, adapter_name="a"), config, adapter_name="b")
    for wrapped, name in ((jpeft.stack_adapters([both, both]), "a"), (jpeft.mixed_batch(both), "mixed")):
        placed = jpeft.shardings(wrapped, MESH, [("kernel", P("fsdp", "tp"))], tiny=0)
        expected = {"lora_A": P(None, None, None, "fsdp"), "lora_B": P(None, None, "tp")}
        assert own(placed, "layers.0:3.up", name) == expected
        assert specs(placed.adapters[name].replaced) == {"head.kernel": P(None, "fsdp", "tp")}


# ---- how the base says it


def real_mesh(axes=AxisType.Auto):
    return jax.make_mesh(SIZES, NAMES, axis_types=(axes, axes))


KERNEL = (None, "tp")


class LinenModel(nn.Module):
    kind: str = "mesh"

    @nn.compact
    def __call__(self, x):
        partitioned = {"mesh": nn.with_partitioning, "logical": nn.with_logical_partitioning}[self.kind]
        names = {"mesh": KERNEL, "logical": ("embed", "mlp")}[self.kind]
        return nn.Dense(8, use_bias=False, name="up", kernel_init=partitioned(nn.initializers.normal(), names))(x)


def linen(kind):
    return jax.eval_shape(LinenModel(kind).init, jax.random.key(0), jnp.ones((2, 8)))


class NNXModel(nnx.Module):
    def __init__(self):
        init = nnx.with_partitioning(nnx.initializers.normal(), KERNEL)
        self.up = nnx.Linear(8, 8, use_bias=False, kernel_init=init, rngs=nnx.Rngs(0))


def nnx_state():
    with nnx.use_eager_sharding(False):
        return nnx.state(NNXModel(), nnx.Param)


PLAIN = {"up": {"kernel": struct(8, 8)}}


def placed_kernel(make=lambda leaf, sharding: jax.device_put(jnp.ones(leaf.shape), sharding), axes=AxisType.Auto):
    return {"up": {"kernel": make(struct(8, 8), NamedSharding(real_mesh(axes), P(*KERNEL)))}}


def told_struct(leaf, sharding):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


SAID = {
    "arrays themselves": lambda: (placed_kernel(), None),
    "shapes themselves": lambda: (placed_kernel(told_struct), None),
    "an array on another kind of mesh": lambda: (placed_kernel(axes=AxisType.Explicit), None),
    "specs": lambda: (PLAIN, {"up": {"kernel": P(*KERNEL)}}),
    "specs under another root": lambda: ({"params": PLAIN}, {"up": {"kernel": P(*KERNEL)}}),
    "shardings": lambda: (PLAIN, {"up": {"kernel": NamedSharding(real_mesh(), P(*KERNEL))}}),
    "arrays": lambda: (PLAIN, placed_kernel()),
    "shapes": lambda: (PLAIN, placed_kernel(told_struct)),
    "pairs": lambda: (PLAIN, [("bias", P("fsdp")), ("up.*", P(*KERNEL)), ("kernel", P())]),
    "a function": lambda: (PLAIN, lambda path, shape: P(*KERNEL) if (path, shape) == ("up.kernel", (8, 8)) else P()),
    "linen": lambda: (nn.unbox(linen("mesh")), linen("mesh")),
    "linen's specs": lambda: (nn.unbox(linen("mesh")), nn.get_partition_spec(linen("mesh"))),
    "linen's logical axes": lambda: (
        nn.unbox(linen("logical")),
        nn.logical_to_mesh_sharding(nn.get_partition_spec(linen("logical")), real_mesh(), [("mlp", "tp")]),
    ),
    "nnx": lambda: (nnx_state(), nnx_state()),
    "nnx, plain": lambda: (nnx.to_pure_dict(nnx_state()), nnx_state()),
    "nnx's specs": lambda: (nnx_state(), nnx.get_partition_spec(nnx_state())),
    "shardings as they come back": lambda: (
        PLAIN, jpeft.shardings(lora(PLAIN), real_mesh(), {"up": {"kernel": P(*KERNEL)}}).base
    ),
}  # fmt: skip


@pytest.mark.parametrize("axes", [AxisType.Auto, AxisType.Explicit], ids=lambda axes: axes.name)
@pytest.mark.parametrize("name", SAID)
def test_the_base_is_split_as_its_owner_says(name, axes):
    params, base = SAID[name]()
    mesh = real_mesh(axes)
    placed = jpeft.shardings(lora(params), mesh, base, tiny=0)
    (kernel,) = jax.tree.leaves(placed.base)
    assert kernel == NamedSharding(mesh, P(None, "tp"))
    assert own(placed, "up") == {"lora_A": P(), "lora_B": P("tp")}
    assert all(leaf.mesh == mesh for leaf in jax.tree.leaves(placed))


def test_what_says_nothing_is_whole():
    params = {"up": {"kernel": jnp.ones((8, 8)), "count": np.ones(3, np.int32), "rate": 0.5, "bias": struct(8)}}
    placed = jpeft.shardings(lora(params, ["up"]), real_mesh())
    assert {leaf.spec for leaf in jax.tree.leaves(placed)} == {P()}
    told = jpeft.shardings(lora(params, ["up"]), MESH, {"up": dict.fromkeys(params["up"])})
    assert {leaf.spec for leaf in jax.tree.leaves(told)} == {P()}


def test_memory_kinds_of_the_base_stay():
    mesh = real_mesh()
    kind = next(m.kind for m in jax.devices()[0].addressable_memories() if m.kind != "device")
    sharding = NamedSharding(mesh, P("fsdp"), memory_kind=kind)
    placed = jpeft.shardings(lora(PLAIN), real_mesh(AxisType.Explicit), {"up": {"kernel": sharding}})
    assert placed.base["up"]["kernel"].memory_kind == kind


@pytest.mark.parametrize(
    "scale, spec",
    [((1, 8), P(None, "tp")), ((4, 8), P("fsdp", "tp")), ((2, 8), P(None, "tp")), ((1, 1), P()), ((8,), P())],
)
def test_scales_of_quantised_leaves_are_split_where_their_sizes_allow(scale, spec):
    codes, scales = jnp.ones((16, 8), jnp.int8), jnp.ones(scale)
    params = {"up": {"kernel": Quantized(qwix.QArray(codes, scales, None, "int8"), jnp.dtype("float32"))}}
    wrapped = lora({"up": {"kernel": struct(16, 8)}})
    wrapped = dataclasses.replace(wrapped, base=params, adapters=random_like(wrapped.adapters, 3))
    placed = jpeft.shardings(wrapped, real_mesh(), RULES, tiny=0)
    leaf = placed.base["up"]["kernel"]
    assert (leaf.array.qvalue.spec, leaf.array.scale.spec) == (P("fsdp", "tp"), spec)
    assert own(placed, "up") == {"lora_A": P(None, "fsdp"), "lora_B": P("tp")}
    moved = jax.device_put(wrapped, placed)
    for again in (
        jpeft.shardings(moved, real_mesh(), tiny=0),
        jpeft.shardings(wrapped, real_mesh(), moved.base, tiny=0),
        jpeft.shardings(wrapped, real_mesh(), placed.base, tiny=0),
    ):
        assert jax.tree.structure(again) == jax.tree.structure(wrapped)
        assert jax.tree.leaves(again) == jax.tree.leaves(placed)


# ---- the law: placed parameters compute the same


def layer(p, x):
    kernel = p["up"]["kernel"]
    if AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types:
        kernel = jax.sharding.reshard(kernel, P(None, "tp"))
    return jnp.sin(x @ kernel + p["up"]["bias"])


SHAPES = {"up": {"kernel": (8, 8), "bias": (8,)}}
# Of methods with the same arrays the first stands for all: compilers split what is made of them.
ROWS = list({AXES[row.name]: row for row in reversed(METHODS) if row.file or row.thorough}.values())
CASES = [(row, AxisType.Auto) for row in ROWS] + [(row, AxisType.Explicit) for row in ROWS if row.thorough]


@pytest.mark.parametrize(("row", "axes"), [pytest.param(*case, id=f"{case[0].name}-{case[1].name}") for case in CASES])
@pytest.mark.usefixtures("x64")
def test_placed_parameters_compute_the_same(row, axes):
    wrapped = adapted(Problem(layer, random_like(SHAPES, 7), (), {}), row)
    given = {name: tuple(value) * 2 for name, value in row.context.items()}
    wrapped = jpeft.with_context(wrapped, **given) if given else wrapped
    x = random_like((4, 5, 8), 50, 1.0)

    def compute(wrapped, x):
        return results(jpeft.lift(layer), wrapped, (x,))

    want = jax.jit(compute, compiler_options=QUICKLY)(wrapped, x)
    mesh = real_mesh(axes)
    placed = jpeft.shardings(wrapped, mesh, RULES, tiny=0)
    rows = NamedSharding(mesh, P("fsdp"))
    with jax.set_mesh(mesh):
        moved = jax.device_put(wrapped, placed)
        step = jax.jit(compute, in_shardings=(placed, rows), compiler_options=QUICKLY)
        got = step(moved, jax.device_put(x, rows))
    assert_close(jax.tree.map(np.asarray, got), jax.tree.map(np.asarray, want))


# ---- what does not fit


@pytest.mark.parametrize(
    "base, error, message",
    [
        ({"up": {}}, ValueError, r"does not have the paths .* missing up\.kernel; unexpected none. Give .* 1 leaves"),
        (
            {"up": {"kernel": None}, "down": {"kernel": P()}},
            ValueError,
            r"missing none; unexpected down\.kernel\. .*\[\('kernel\$', PartitionSpec\(\.\.\.\)\)\]",
        ),
        ({"up": {"kernel": P("model")}}, ValueError, r"entry of up\.kernel \(6, 8\) .* no axis 'model'; .*'fsdp': 4"),
        ([("kernel", P(None, None, "tp"))], ValueError, r"rule of up\.kernel \(6, 8\) .* has 2 axes: give no more"),
        ([("kernel", P("fsdp"))], ValueError, r"axis 0 of size 6 cannot be split into 4 equal parts.*Give None"),
        ([("kernel", P("tp", "tp"))], ValueError, r"mesh axis 'tp' can split one axis only: name it once"),
        ([("kernel", ("tp",))], TypeError, r"the rule of up\.kernel is \('tp',\); expected a PartitionSpec"),
        ({"up": {"kernel": "tp"}}, TypeError, r"the entry of up\.kernel is 'tp'; expected a PartitionSpec, a Named"),
    ],
)  # fmt: skip
def test_a_partition_that_does_not_fit_is_told_by_leaf_axis_and_sizes(base, error, message):
    with pytest.raises(error, match=message):
        jpeft.shardings(lora({"up": {"kernel": struct(6, 8)}}), MESH, base)


def test_the_sharding_of_an_array_has_to_fit_the_mesh():
    params = placed_kernel()
    with pytest.raises(ValueError, match=r"the sharding of up\.kernel \(8, 8\) .* the mesh has no axis 'tp'"):
        jpeft.shardings(lora(params), AbstractMesh((8,), ("fsdp",)))
    with pytest.raises(ValueError, match=r"axis 1 of size 8 cannot be split into 3 equal parts"):
        jpeft.shardings(lora(params), AbstractMesh((3,), ("tp",)))


def test_many_paths_are_not_all_listed():
    params = {f"m{number}": {"kernel": struct(2, 2)} for number in range(11)}
    with pytest.raises(ValueError, match=r"missing m0\.kernel, .* and 3 more; unexpected none"):
        jpeft.shardings(lora(params), MESH, {})


def test_what_is_no_mesh_and_what_is_not_wrapped():
    with pytest.raises(TypeError, match=r"mesh is \('fsdp',\); expected a jax\.sharding\.Mesh, such as jax\.make_mesh"):
        jpeft.shardings(lora(PLAIN), ("fsdp",))
    with pytest.raises(TypeError, match="expected the PeftParams that jpeft.wrap returns"):
        jpeft.shardings(PLAIN, MESH)
