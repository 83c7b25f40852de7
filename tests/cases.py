"""The tables: a row a method, a row a use of weights. A new method is one row of METHODS."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, PartitionSpec as P

import jpeft
from jpeft._config import TunerConfig
from jpeft._contract import CONVOLUTION, EMBEDDING, LINEAR, Method, additive, register
from tests.frameworks import FRAMEWORKS
from tests.harness import Case, MethodRow, Problem, random_like

ALL_KINDS = frozenset({LINEAR, EMBEDDING, CONVOLUTION})


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseDeltaConfig(TunerConfig):
    """A toy: W' = W + delta."""


register(
    additive(
        config=DenseDeltaConfig,
        init=lambda key, site, config, weight: {
            "delta": jnp.zeros((site.in_features, *site.window, site.out_features))
        },
        delta=lambda p, site: p["delta"],
        kinds=ALL_KINDS,
    )
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GainConfig(TunerConfig):
    """A toy like IA3: W' = W diag(gain), b' = gain b."""


register(
    Method(
        config=GainConfig,
        init=lambda key, site, config, weight: {"gain": jnp.ones(site.out_features)},
        forward=lambda p, x, base, site, context: (lambda y: y * p["gain"].astype(y.dtype))(base(x)),
        merge=lambda p, w, b, site: (
            w * p["gain"].astype(w.dtype),
            None if b is None else b * p["gain"].astype(b.dtype),
        ),
        kinds=ALL_KINDS,
        changes_bias=True,
    )
)

SAMPLER = frozenset({f"lora_monteclora_sampler.{name}" for name in ("std_prior", "expert_weights_prior")})


def variant(name: str, options: dict[str, Any], **fields: Any) -> MethodRow:
    options = {"r": 3, "lora_alpha": 7, **options}
    return MethodRow(name, f"{name}.py", jpeft.LoraConfig, options, **{"linear": True, "factors": True, **fields})


# Those with an odd number of outputs.
UNEVEN = frozenset({"heads in", "experts"})

# A bias of the keys adds the same to all scores of a query.
KEY_BIAS = {"linen attention": frozenset(f"glora_{part}" for part in ("C.X", "C.Xd", "C.Xu", "D.X", "E.X"))}

VARIANTS = (
    variant("dora", {"use_dora": True}, linear=False, factors=False, reads=True),
    variant("lora_bias", {"lora_bias": True}, factors=False, biased=True),
    variant("mica", {"r": 1, "init_lora_weights": "mica"}, reads=True),
    variant("bdlora", {"use_bdlora": {"match_strict": False, "target_modules_bd_a": [""]}}),
    variant("kasa", {"r": 1, "kasa_config": {}}, neutral=False, reads=True),
    variant("velora", {"velora_config": {"num_groups": 64}}, factors=False),
    variant(
        "monteclora", {"monteclora_config": {"num_samples": 2, "sample_scaler": 0.5}}, factors=False, dormant=SAMPLER
    ),
    variant("qalora", {"use_qalora": True, "qalora_group_size": 1}),
    variant(
        "alora",
        {"alora_invocation_tokens": [1, 2], "task_type": "CAUSAL_LM"},
        factors=False,
        mergeable=False,
        context={"alora_offsets": (2, 3)},
    ),
)

SHARED = (
    MethodRow("vera", "vera.py", jpeft.VeraConfig, {"r": 3}, linear=True),
    MethodRow(
        "pvera",
        "pvera.py",
        jpeft.PveraConfig,
        {"r": 3},
        linear=True,
        apart={"x @ w.T, layout io": "merged: dot_general (the transposed weight of a method that is not linear)"},
    ),
    MethodRow("randlora", "randlora.py", jpeft.RandLoraConfig, {"r": 2, "randlora_alpha": 3}, linear=True),
    MethodRow(
        "vblora",
        "vblora.py",
        jpeft.VBLoRAConfig,
        {"r": 2, "num_vectors": 5, "vector_length": 1},
        linear=True,
        neutral=False,
    ),
    MethodRow("lily", "lily.py", jpeft.LilyConfig, {"r": 3, "stride_A": 2}, linear=True, mergeable=False),
    MethodRow(
        "poly",
        "poly.py",
        jpeft.PolyConfig,
        {"r": 3, "n_tasks": 2, "n_skills": 3},
        linear=True,
        mergeable=False,
        context={"task_ids": (1, 0)},
    ),
    MethodRow(
        "poly, split",
        None,
        jpeft.PolyConfig,
        {"r": 2, "n_tasks": 2, "n_skills": 2, "n_splits": 2},
        linear=True,
        mergeable=False,
        context={"task_ids": (1, 0)},
    ),
    MethodRow(
        "unilora",
        "unilora.py",
        jpeft.UniLoraConfig,
        {"r": 2, "theta_d_length": 11, "save_indices": True},
        factors=True,
        linear=True,
        neutral=False,
        collective=True,
    ),
    MethodRow(
        "tinylora",
        "tinylora.py",
        jpeft.TinyLoraConfig,
        {"u": 3, "weight_tying": 1.0},
        factors=True,
        collective=True,
        reads=True,
    ),
    MethodRow("frod", "frod.py", jpeft.FrodConfig, {"sparse_rate": 0.3}, linear=True, reads=True),
)

SPARSE = (
    MethodRow("delora", "delora.py", jpeft.DeloraConfig, {"r": 2}, linear=True, factors=True, reads=True),
    MethodRow("shira", "shira.py", jpeft.ShiraConfig, {"r": 1}, linear=True),
    MethodRow(
        "supertuning", "supertuning.py", jpeft.SupertuningConfig, {"sparsity": 0.7, "r": 2}, linear=True, reads=True
    ),
    MethodRow(
        "supertuning, found again",
        None,
        jpeft.SupertuningConfig,
        {"sparsity": 0.5, "save_precomputed_indices": False, "select_top": False},
        linear=True,
        reads=True,
    ),
    MethodRow(
        "fourierft",
        "fourierft.py",
        jpeft.FourierFTConfig,
        {"n_frequency": 5, "init_weights": True, "scaling": 3.0},
        linear=True,
    ),
    MethodRow(
        "waveft",
        "waveft.py",
        jpeft.WaveFTConfig,
        {"n_frequency": 7, "wavelet_family": "sym2", "scaling": 3.0},
        linear=True,
    ),
    MethodRow(
        "waveft, in proportion",
        None,
        jpeft.WaveFTConfig,
        {"n_frequency": 7, "proportional_parameters": True, "use_idwt": False},
        linear=True,
    ),
)

METHODS = (
    MethodRow("lora", "lora.py", jpeft.LoraConfig, {"r": 3, "lora_alpha": 7}, factors=True, thorough=True),
    MethodRow(
        "pissa",
        "lora_residual.py",
        jpeft.LoraConfig,
        {"r": 2, "init_lora_weights": "pissa"},
        factors=True,
        linear=True,
        reads=True,
    ),
    MethodRow(
        "olora",
        "lora_residual.py",
        jpeft.LoraConfig,
        {"r": 2, "init_lora_weights": "olora"},
        factors=True,
        linear=True,
        reads=True,
    ),
    MethodRow(
        "pissa, iterated",
        None,
        jpeft.LoraConfig,
        {"r": 2, "init_lora_weights": "pissa_niter_2"},
        factors=True,
        linear=True,
        reads=True,
    ),
    *VARIANTS,
    *SHARED,
    *SPARSE,
    MethodRow("beft", "beft.py", jpeft.BeftConfig, {}, linear=True, biased=True),
    MethodRow("ia3", "ia3.py", jpeft.IA3Config, {"feedforward_modules": ["value", "heads", "conv"]}),
    MethodRow("loha", "loha.py", jpeft.LoHaConfig, {"r": 1, "alpha": 3}),
    MethodRow("loha, dense", None, jpeft.LoHaConfig, {"r": 2, "use_effective_conv2d": True}),
    MethodRow("lokr", "lokr.py", jpeft.LoKrConfig, {"r": 1, "decompose_both": True}),
    MethodRow("lokr, whole", None, jpeft.LoKrConfig, {"r": 3, "decompose_factor": 2, "init_weights": "lycoris"}),
    MethodRow("hira", "hira.py", jpeft.HiraConfig, {"r": 2}),
    MethodRow("glora", "glora.py", jpeft.GloraConfig, {"r": 2, "config_D_E": "vector"}, flat=KEY_BIAS),
    MethodRow("glora, vectors", None, jpeft.GloraConfig, {"config_A_B": "vector", "config_C": "vector"}, flat=KEY_BIAS),
    MethodRow(
        "adalora", "adalora.py", jpeft.AdaLoraConfig, {"init_r": 3, "total_step": 9, "target_r": 2}, factors=True
    ),
    MethodRow("road", "road.py", jpeft.RoadConfig, {"variant": "road_4", "group_size": 2}, misfits=UNEVEN),
    MethodRow("hra", "hra.py", jpeft.HRAConfig, {"r": 2}, exact=False),
    MethodRow("hra, orthogonal", None, jpeft.HRAConfig, {"r": 2, "apply_GS": True}, neutral=False),
    MethodRow("oft", "oft.py", jpeft.OFTConfig, {"r": 1, "oft_block_size": 0, "init_weights": True}),
    MethodRow(
        "oft, exact",
        None,
        jpeft.OFTConfig,
        {"r": 1, "oft_block_size": 0, "use_cayley_neumann": False, "block_share": True},
    ),
    MethodRow("boft", "boft.py", jpeft.BOFTConfig, {"boft_block_size": 0, "boft_block_num": 1}),
    MethodRow("miss", "miss.py", jpeft.MissConfig, {"r": 2}),
    MethodRow("miss, mini", None, jpeft.MissConfig, {"r": 3, "init_weights": "mini", "mini_r": 1}),
    MethodRow("miss, bat", None, jpeft.MissConfig, {"r": 1, "init_weights": "bat"}),
    MethodRow("c3a", "c3a.py", jpeft.C3AConfig, {"block_size": 1, "init_weights": True}),
    MethodRow("gralora", "gralora.py", jpeft.GraloraConfig, {"r": 2}, misfits=UNEVEN),
    MethodRow("gralora, hybrid", None, jpeft.GraloraConfig, {"r": 4, "hybrid_r": 3, "alpha": 5}, misfits=UNEVEN),
    MethodRow("peanut", "peanut.py", jpeft.PeanutConfig, {"r": 3, "act_fn": "tanh"}),
    MethodRow("peanut, deep", None, jpeft.PeanutConfig, {"r": 2, "depth": 2, "act_fn": "silu", "scaling": 1.5}),
    MethodRow("deft", "deft.py", jpeft.DeftConfig, {"r": 2, "alpha": 3}, exact=False, reads=True),
    MethodRow(
        "deft, orthogonal", None, jpeft.DeftConfig, {"r": 2, "decomposition_method": "qr"}, exact=False, reads=True
    ),
    MethodRow("deft, para", None, jpeft.DeftConfig, {"r": 2, "para": True}, neutral=False),
    MethodRow("osf", "osf.py", jpeft.OSFConfig, {"effective_rank": 1}, factors=True, exact=False, reads=True),
    MethodRow("adamss", "adamss.py", jpeft.AdamssConfig, {"r": 3, "num_subspaces": 2}, reads=True),
    # Groups may be smaller than their rank: what fills up their arrays means nothing, and files do not hold it.
    MethodRow("adamss, rank 2", None, jpeft.AdamssConfig, {"r": 3, "num_subspaces": 2, "subspace_rank": 2}, reads=True),
    MethodRow("psoft", "psoft.py", jpeft.PsoftConfig, {"r": 2, "psoft_alpha": 3}, factors=True, reads=True),
    MethodRow("psoft, free", None, jpeft.PsoftConfig, {"r": 2, "psoft_orth": False}, factors=True, reads=True),
    MethodRow(
        "psoft, series",
        None,
        jpeft.PsoftConfig,
        {"r": 2, "use_cayley_neumann": True, "cayley_neumann_eps": 0.9},
        reads=True,
    ),
    MethodRow("dense delta", None, DenseDeltaConfig, {}),
    MethodRow("gain", None, GainConfig, {}, thorough=True),
)
LORA = METHODS[0]


def case(name: str, function: Callable[..., Any], params: Any, *args: Any, layouts: Any = {}, **fields: Any) -> Case:
    """A row of plain JAX. params, args: shapes to fill with random numbers, or arrays to take as they are."""

    def build() -> Problem:
        filled = tuple(random_like(arg, 50 + index, 1.0) for index, arg in enumerate(args))
        return Problem(function, random_like(params, 7), filled, layouts)

    return Case(name, build, **fields)


def kernel(name: str, function: Callable[..., Any], shape: tuple[int, ...], *args: Any, layout="io", **fields) -> Case:
    """A row whose parameters are one kernel: `function(w, *args)`."""

    def of_tree(params: Any, *args: Any) -> Any:
        return function(params["dense"]["kernel"], *args)

    return case(name, of_tree, {"dense": {"kernel": shape}}, *args, layouts={"dense.kernel": layout}, **fields)


def merged(primitive: str, reason: str, *others: str) -> dict[str, tuple[str, ...]]:
    """The columns of a use that no rule covers."""
    how = f"merged: {primitive} ({reason})"
    return {"how": (how, *others), "general": (how, *(_GENERAL.get(other, other) for other in others))}


def cut_by(primitive: str) -> dict[str, tuple[str, ...]]:
    """The columns of a slice of an axis that only factors can follow."""
    return {"general": (f"merged: {primitive} (slice of an input or output axis)",)}


_GENERAL = {"low-rank": "transformed"}
WITHOUT_FACTORS = "a method without factors"
LOOKUP = {"how": ("lookup",)}
CONV: dict[str, Any] = {}

X, SQUARE, STACKED = (2, 5, 4), (4, 4), (3, 4, 4)
IDS = np.array([[1, 2, 3], [0, 6, 6]], np.int32)

PRODUCTS = (
    case("with bias", lambda p, x: x @ p["d"]["kernel"] + p["d"]["bias"], {"d": {"kernel": (4, 6), "bias": (6,)}}, X),
    kernel("x @ w", lambda w, x: x @ w, (4, 6), X),
    kernel("vector @ w", lambda w, x: x @ w, (4, 6), (4,)),
    kernel("w.T @ x", lambda w, x: w.T @ x, (4, 6), (4, 5)),
    kernel("w.T @ x, batched", lambda w, x: w.T @ x, (4, 6), (2, 4, 5)),
    kernel("einsum, weight left", lambda w, x: jnp.einsum("io,bti->bto", w, x), (4, 6), X),
    kernel("einsum, weight right", lambda w, x: jnp.einsum("bti,io->tbo", x, w), (4, 6), X),
    kernel(
        "einsum over a shared batch axis", lambda w, x: jnp.einsum("bti,bio->bto", x, w), (2, 4, 6), X, layout="bio"
    ),
    kernel("x @ w.T, layout oi", lambda w, x: x @ w.T, (6, 4), X, layout="oi"),
    kernel("x @ w.T, layout io", lambda w, x: x @ w.T, (6, 4), X),
    kernel("heads out", lambda w, x: jnp.einsum("btd,dnh->bnth", x, w), (4, 2, 3), X, layout="ioo"),
    kernel("heads in", lambda w, x: jnp.einsum("btnh,nhd->btd", x, w), (2, 2, 7), (2, 5, 2, 2), layout="iio"),
    kernel("fused parts", lambda w, x: jnp.einsum("btd,skdh->sbtkh", x, w), (2, 3, 4, 5), X, layout="boio"),
    kernel("experts", lambda w, x: jnp.einsum("ebi,eio->ebo", x, w), (2, 4, 5), X, layout="bio"),
    kernel("all experts on one x", lambda w, x: jnp.einsum("bi,eio->ebo", x, w), (2, 4, 5), (3, 4), layout="bio"),
    kernel(
        "latent attention",
        lambda w, x: jnp.einsum("btnh,dnh->btnd", x, w),
        (4, 2, 2),
        (2, 5, 2, 2),
        layout="ioo",
        general=("merged: dot_general (batches over input or output axes)",),
    ),
    kernel("precision", lambda w, x: jnp.dot(x, w, precision="highest", preferred_element_type=x.dtype), (4, 6), X),
    kernel(
        "grouped product",
        lambda w, x: lax.ragged_dot(x, w, jnp.array([2, 0, 3], np.int32)),
        (3, 4, 5),
        (5, 4),
        layout="bio",
        general=(f"merged: ragged_dot_general ({WITHOUT_FACTORS})",),
    ),
    case("lookup", lambda p, ids: p["e"]["embedding"][ids], {"e": {"embedding": (7, 5)}}, IDS, **LOOKUP),
    case(
        "lookup by take",
        lambda p, ids: jnp.take(p["e"]["embedding"], ids, axis=0),
        {"e": {"embedding": (7, 5)}},
        IDS,
        **LOOKUP,
    ),
    case(
        "lookup that fills",
        lambda p, ids: jnp.take(p["e"]["embedding"], ids, axis=0, mode="fill", fill_value=0),
        {"e": {"embedding": (7, 5)}},
        IDS,
        **LOOKUP,
    ),
    case(
        "lookup out of range, zeros",
        lambda p, ids: p["e"]["embedding"].at[ids].get(mode="fill", fill_value=2),
        {"e": {"embedding": (7, 5)}},
        np.array([1, 99, 3], np.int32),
        **LOOKUP,
    ),
    case(
        "lookup out of range, clipped",
        lambda p, ids: p["e"]["embedding"].at[ids].get(mode="clip"),
        {"e": {"embedding": (7, 5)}},
        np.array([1, 99, 3], np.int32),
        **LOOKUP,
    ),
    case(
        "lookup of one id",
        lambda p, id: p["e"]["embedding"][id],
        {"e": {"embedding": (7, 5)}},
        np.int32(3),
        **{**LOOKUP, **cut_by("dynamic_slice")},
    ),
    case(
        "lookups of one id, mapped",
        lambda p, ids: jax.vmap(jax.vmap(lambda id: p["e"]["embedding"][id]))(ids),
        {"e": {"embedding": (7, 5)}},
        IDS,
        **LOOKUP,
    ),
    case(
        "lookups of one id, scanned",
        lambda p, x, ids: lax.scan(lambda c, id: (c * p["e"]["embedding"][id], c), x, ids)[0],
        {"e": {"embedding": (7, 5)}},
        (5,),
        IDS[0],
        **{**LOOKUP, **cut_by("dynamic_slice")},
    ),
    kernel(
        "experts of one id, mapped",
        lambda w, x, ids: jax.vmap(lambda x, id: x @ w[id])(x, ids),
        (3, 4, 6),
        X,
        np.array([2, 0], np.int32),
        layout="bio",
    ),
    case(
        "lookup in a transposed table",
        lambda p, ids: p["e"]["embedding"].T[ids],
        {"e": {"embedding": (5, 7)}},
        IDS,
        layouts={"e.embedding": "ov"},
        **LOOKUP,
    ),
    case(
        "lookup of heads",
        lambda p, ids: p["e"]["embedding"][ids],
        {"e": {"embedding": (7, 2, 3)}},
        IDS,
        layouts={"e.embedding": "voo"},
        **LOOKUP,
    ),
)

HWIO, NHWC, NCHW = "HWIO", "NHWC", "NCHW"


def conv(name: str, x: tuple[int, ...], w: tuple[int, ...], numbers: tuple[str, str, str], **options: Any) -> Case:
    settings = {"window_strides": (1,) * (len(x) - 2), "padding": "VALID", **options}
    columns = {"layout": settings.pop("layout", "." * (len(w) - 2) + "io"), **settings.pop("columns", CONV)}
    function = lambda w, x: lax.conv_general_dilated(x, w, dimension_numbers=numbers, **settings)  # noqa: E731
    return kernel(name, function, w, x, **columns)


CONVOLUTIONS = (
    conv("convolution", (2, 6, 6, 2), (3, 3, 2, 5), (NHWC, HWIO, NHWC)),
    conv(
        "convolution, strides and dilation",
        (2, 6, 6, 2),
        (3, 3, 2, 5),
        (NHWC, HWIO, NHWC),
        window_strides=(2, 1),
        padding="SAME",
        rhs_dilation=(1, 2),
    ),
    conv("convolution, uneven padding", (2, 5, 6, 2), (3, 3, 2, 5), (NHWC, HWIO, NHWC), padding=((2, 0), (1, 3))),
    conv("convolution, channels first", (2, 2, 6, 6), (3, 3, 2, 5), (NCHW, HWIO, NCHW)),
    conv("convolution, torch's kernel", (2, 2, 6, 6), (5, 2, 3, 3), (NCHW, "OIHW", NCHW), layout="oi.."),
    conv("convolution, one axis", (2, 6, 2), (3, 2, 5), ("NWC", "WIO", "NWC")),
    conv("convolution, three axes", (1, 4, 4, 4, 2), (2, 2, 2, 2, 3), ("NDHWC", "DHWIO", "NDHWC")),
    conv(
        "transposed convolution",
        (2, 4, 4, 2),
        (3, 3, 2, 5),
        (NHWC, HWIO, NHWC),
        lhs_dilation=(2, 2),
        padding=((1, 1), (1, 2)),
    ),
    conv(
        "grouped convolution",
        (2, 6, 6, 4),
        (3, 3, 2, 6),
        (NHWC, HWIO, NHWC),
        feature_group_count=2,
        columns=merged("conv_general_dilated", "grouped convolution"),
    ),
)

VIEWS = (
    kernel("vmap over the function", lambda w, x: jax.vmap(lambda row: w.T @ row)(x), (4, 6), (5, 4)),
    kernel("vmap over heads", lambda w, x: jax.vmap(lambda own: x @ own, in_axes=1)(w), (4, 2, 3), X, layout="ioo"),
    kernel(
        "vmap over a broadcast weight", lambda w, x: jax.vmap(jnp.matmul)(x, jnp.broadcast_to(w, (2, 4, 6))), (4, 6), X
    ),
    kernel("layers by index", lambda w, x: x @ w[1] @ w[-1] @ w[0], STACKED, X, layout="bio"),
    kernel("layers by a traced index", lambda w, x, i: x @ w[i], STACKED, X, np.int32(2), layout="bio"),
    kernel("layers unpacked", lambda w, x: [x @ own for own in w], STACKED, X, layout="bio"),
    kernel("layers unstacked", lambda w, x: [x @ own for own in jnp.unstack(w)], STACKED, X, layout="bio"),
    kernel(
        "experts by ids",
        lambda w, x, ids: jnp.einsum("bti,bio->bto", x, w[ids]),
        STACKED,
        X,
        np.array([2, 0], np.int32),
        layout="bio",
    ),
    kernel("split", lambda w, x: [x @ own for own in jnp.split(w, 3, axis=1)], (4, 6), X, **cut_by("split")),
    kernel("columns", lambda w, x: x @ w[:, 1:4], (4, 6), X, **cut_by("slice")),
    kernel("strided columns", lambda w, x: x @ w[:, ::2], (4, 6), X, **cut_by("slice")),
    kernel("rows", lambda w, x: x[..., :2] @ w[:2] + x[..., 2:] @ w[2:], (4, 6), X, **cut_by("slice")),
    kernel(
        "columns from a traced start",
        lambda w, x, i: x @ lax.dynamic_slice_in_dim(w, i, 2, 1),
        (4, 6),
        X,
        np.int32(3),
        **cut_by("dynamic_slice"),
    ),
    kernel("reshaped to heads", lambda w, x: jnp.einsum("bti,inh->btnh", x, w.reshape(4, 2, 3)), (4, 6), X),
    kernel("heads reshaped", lambda w, x: x @ w.reshape(4, 6), (4, 2, 3), X, layout="ioo"),
    kernel("flattened and back", lambda w, x: x @ w.reshape(-1).reshape(4, 6), (4, 6), X),
    kernel("permuted", lambda w, x: jnp.einsum("bti,noi->btno", x, jnp.moveaxis(w, 0, -1)), (4, 2, 3), X, layout="ioo"),
    kernel("squeezed", lambda w, x: x @ w[None, :, :, None].squeeze((0, 3)), (4, 6), X),
    kernel("barrier", lambda w, x: x @ lax.optimization_barrier((w, x))[0], (4, 6), X),
    kernel("copied", lambda w, x: x @ jnp.array(w), (4, 6), X),
    kernel("named", lambda w, x: x @ checkpoint_name(w, "w"), (4, 6), X),
    kernel(
        "fused parts as one product",
        lambda w, x: x @ jnp.moveaxis(w, 0, 1).reshape(4, 18),
        (3, 4, 6),
        X,
        layout="bio",
    ),
    kernel(
        "a batch axis of a product, gone",
        lambda w, x: jnp.einsum("bti,sio->bto", x, w),
        (3, 4, 6),
        X,
        layout="bio",
        **merged("reduce_sum", "no rule"),
    ),
    case(
        "one row of a product with ones",
        lambda p, ids: jax.nn.one_hot(ids, 7, dtype=float) @ p["e"]["embedding"],
        {"e": {"embedding": (7, 5)}},
        IDS,
    ),
    kernel("gradient stopped", lambda w, x: x @ lax.stop_gradient(w), (4, 6), X, no_gradient=True),
    case(
        "kernels stacked",
        lambda p, x: lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, jnp.stack([p["a"]["kernel"], p["b"]["kernel"]]))[
            0
        ],
        {"a": {"kernel": SQUARE}, "b": {"kernel": SQUARE}},
        X,
    ),
)


def layers(name: str, function: Callable[..., Any], *args: Any, **fields: Any) -> Case:
    """A row over three stacked square layers."""
    return kernel(name, function, STACKED, *(args or (X,)), layout="bio", **fields)


@jax.jit
def jit_tanh(x: Any, w: Any) -> Any:
    return jnp.tanh(x @ w)


def layer(x: Any, w: Any) -> tuple[Any, None]:
    return jnp.tanh(x @ w), None


def scanned(w: Any, x: Any, body: Callable[..., Any] = layer, **options: Any) -> Any:
    return lax.scan(body, x, w, **options)[0]


POLICIES = jax.checkpoint_policies


def bounded_while(w: Any, x: Any, count: Any) -> Any:
    return lax.while_loop(lambda s: s[0] < count, lambda s: (s[0] + 1, jnp.tanh(s[1] @ w[s[0]])), (0 * count, x))[1]


def returned_by_scan(w: Any, x: Any) -> Any:
    end, (sums, same) = lax.scan(lambda c, own: (jnp.tanh(c @ own), (c.sum(), own)), x, w)
    return end @ same[1], sums


CONTROL = (
    kernel("jit", lambda w, x: jax.jit(jnp.matmul)(x, w), (4, 6), X),
    kernel("nested jit", lambda w, x: jax.jit(lambda w, x: 2 * jax.jit(jnp.matmul)(x, w) + x.sum())(w, x), (4, 6), X),
    kernel("one jitted function twice", lambda w, x: jit_tanh(jit_tanh(x, w), w), SQUARE, X),
    kernel("jit that returns the weight", lambda w, x: x @ jax.jit(lambda w: (w.T, w))(w)[1], (4, 6), X),
    layers("scan", lambda w, x: lax.scan(lambda c, own: (jnp.tanh(c @ own), c.sum()), x, w)),
    layers("scan backwards, unrolled", lambda w, x: scanned(w, x, reverse=True, unroll=2)),
    layers("scan of jitted layers", lambda w, x: scanned(w, x, jax.jit(layer))),
    layers("scan that returns the weights", returned_by_scan),
    layers("scan that returns the weights, unused", lambda w, x: returned_by_scan(w, x)[1]),
    layers("scan in scan", lambda w, x: lax.scan(lambda c, _: (scanned(w, c), None), x, length=2)[0]),
    layers("scan over two axes", lambda w, x: lax.scan(lambda c, own: (scanned(own, c), None), x, w[None])[0]),
    layers(
        "scan along with indices",
        lambda w, x: scanned(
            (w, jnp.arange(3)), x, lambda c, own: (jnp.tanh(c @ own[0]) * (1 + own[1]).astype(c.dtype), None)
        ),
    ),
    kernel("scan, weight closed over", lambda w, x: scanned(None, x, lambda c, _: layer(c, w), length=3), SQUARE, X),
    kernel(
        "scan, weight carried",
        lambda w, x: lax.scan(lambda c, _: ((jnp.tanh(c[0] @ c[1]), c[1]), None), (x, w), length=3)[0][0],
        SQUARE,
        X,
    ),
    kernel(
        "scan, weight carried and used after",
        lambda w, x: (lambda end: end[0] @ end[1])(
            lax.scan(lambda c, _: ((jnp.tanh(c[0] @ c[1]), c[1]), None), (x, w), length=3)[0]
        ),
        SQUARE,
        X,
    ),
    kernel(
        "scan over output columns",
        lambda w, x: lax.scan(lambda c, own: (c, x @ own), 0.0, w.T)[1],
        (4, 6),
        X,
        general=("merged: scan (scan over an input or output axis)",),
    ),
    case(
        "scan that swaps two weights",
        lambda p, x: lax.scan(
            lambda c, _: ((jnp.tanh(c[0] @ c[1]), c[2], c[1]), None), (x, p["a"]["kernel"], p["b"]["kernel"]), length=3
        )[0][0],
        {"a": {"kernel": SQUARE}, "b": {"kernel": SQUARE}},
        X,
        **merged("scan", "the loop changes it"),
    ),
    kernel(
        "scan that changes the weight",
        lambda w, x: lax.scan(lambda c, _: ((jnp.tanh(c[0] @ c[1]), 2 * c[1]), None), (x, w), length=3)[0][0],
        SQUARE,
        X,
        **merged("scan", "the loop changes it"),
    ),
    layers("fori_loop of known length", lambda w, x: lax.fori_loop(0, 3, lambda i, c: jnp.tanh(c @ w[i]), x)),
    layers(
        "fori_loop of traced length",
        lambda w, x, n: lax.fori_loop(0, n, lambda i, c: jnp.tanh(c @ w[i]), x),
        X,
        np.int32(2),
        forward_only=True,
    ),
    layers("while_loop", bounded_while, X, np.int32(3), forward_only=True),
    kernel(
        "while_loop, weight in the condition",
        lambda w, x: lax.while_loop(lambda c: (c @ w).sum() < 50.0, lambda c: c + (c @ w) ** 2 + 1.0, x),
        SQUARE,
        X,
        forward_only=True,
    ),
    kernel(
        "while_loop, weight carried",
        lambda w, x: (lambda end: end[1] @ end[2])(
            lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1] @ c[2]), c[2]), (0, x, w))
        ),
        SQUARE,
        X,
        forward_only=True,
    ),
    kernel(
        "while_loop that changes the weight",
        lambda w, x: lax.while_loop(
            lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1] @ c[2]), 2 * c[2]), (0, x, w)
        )[1],
        SQUARE,
        X,
        forward_only=True,
        **merged("while", "the loop changes it"),
    ),
    kernel("cond", lambda w, x: lax.cond(x.sum() > 0, lambda: x @ w, lambda: 2 * x @ w), (4, 6), X),
    kernel(
        "cond, one branch without it",
        lambda w, x: lax.cond(x.sum() < 99, jnp.matmul, lambda x, w: x[..., :1] * jnp.ones(6), x, w),
        (4, 6),
        X,
    ),
    kernel(
        "cond, a branch of a constant",
        lambda w, x: lax.cond(x.sum() < 99, lambda: (x @ w).sum(), lambda: 0.0),
        (4, 6),
        X,
    ),
    kernel(
        "cond that returns the weight",
        lambda w, x: x @ lax.cond(x.sum() > 0, lambda: (w, 1), lambda: (w, 2))[0],
        (4, 6),
        X,
    ),
    layers(
        "cond in scan",
        lambda w, x: scanned(
            (w, jnp.array([True, False, True])),
            x,
            lambda c, own: (lax.cond(own[1], lambda: jnp.tanh(c @ own[0]), lambda: c), None),
        ),
    ),
    layers(
        "switch", lambda w, x, i: lax.switch(i, [lambda: x @ w[0], lambda: x @ w[1] @ w[2], lambda: -x]), X, np.int32(1)
    ),
    kernel(
        "stacked twice",
        lambda w, x: lax.scan(lambda c, own: (scanned(own, c), None), x, w)[0],
        (2, 3, 4, 4),
        X,
        layout="bbio",
    ),
    layers(
        "layers in pairs",
        lambda w, x: lax.scan(lambda c, own: (jnp.tanh(c @ own[0]) @ own[1], None), x, w[:2].reshape(1, 2, 4, 4))[0],
    ),
    kernel(
        "scan of convolutions",
        lambda w, x: scanned(
            w,
            x,
            lambda c, own: (
                jnp.tanh(lax.conv_general_dilated(c, own, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))),
                None,
            ),
        ),
        (2, 3, 4, 4),
        X,
        layout="b.io",
        **CONV,
    ),
    kernel(
        "scan of lookups",
        lambda w, ids: lax.scan(lambda c, own: (c, own[ids]), 0.0, w)[1],
        (2, 7, 5),
        IDS,
        layout="bvo",
        **LOOKUP,
    ),
    kernel("lax.map over inputs", lambda w, x: lax.map(lambda row: jnp.tanh(row @ w), x), (4, 6), X),
    layers(
        "associative_scan over layers",
        lambda w, x: x @ lax.associative_scan(jnp.matmul, w)[-1],
        **merged(
            "dot_general",
            "product of two adapted weights",
            "low-rank",
            "merged: concatenate (concatenation along an axis of the weight)",
        ),
    ),
    kernel(
        "cond, an output unused",
        lambda w, x: lax.cond(x.sum() < 99, lambda: (x.sum(), x @ w, w), lambda: (0.0, 2 * x @ w, 2 * w))[1],
        (4, 6),
        X,
    ),
    kernel("remat, an output unused", lambda w, x: jax.checkpoint(lambda w: (w.sum(), x @ w, w.T))(w)[1], (4, 6), X),
    kernel("jit, an output unused", lambda w, x: jax.jit(lambda w: (w.sum(), x @ w, w.T))(w)[1], (4, 6), X),
    kernel("remat", lambda w, x: jax.checkpoint(layer)(x, w)[0], SQUARE, X),
    kernel(
        "remat that returns the weight",
        lambda w, x: (lambda y, w: y @ w)(*jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), w))(x, w)),
        SQUARE,
        X,
    ),
    *(
        layers(
            f"scan of remat, {name}",
            lambda w, x, policy=policy: scanned(w, x, jax.checkpoint(layer, policy=policy, prevent_cse=False)),
        )
        for name, policy in (
            ("everything", POLICIES.everything_saveable),
            ("nothing", POLICIES.nothing_saveable),
            ("products", POLICIES.dots_with_no_batch_dims_saveable),
        )
    ),
    layers("remat of scan", lambda w, x: jax.checkpoint(scanned)(w, x)),
    layers("vmap of scan", lambda w, x: jax.vmap(lambda x: scanned(w, x))(x)),
    layers(
        "vmap of cond",
        lambda w, x: jax.vmap(lambda x: lax.cond(x.sum() > 0, lambda: x @ w[0], lambda: x @ w[1] @ w[2]))(x),
        **merged("select_n", "no rule"),
    ),
    kernel(
        "grad inside",
        lambda w, x: jax.grad(lambda x: jnp.tanh(x @ w).sum())(x),
        (4, 6),
        X,
    ),
    kernel("jvp inside", lambda w, x: jax.jvp(lambda x: jnp.tanh(x @ w), (x,), (2 * x,)), (4, 6), X),
    kernel(
        "linear_transpose inside",
        lambda w, x: jax.linear_transpose(lambda x: x @ w, jnp.ones((5, 4)))(x)[0],
        (4, 6),
        (5, 6),
    ),
)


# The rules below are not the true derivatives, so that a test can tell whether they are used.
@jax.custom_vjp
def halved(x: Any, w: Any) -> Any:
    """x @ w, whose gradient by the weight is said to be half of what it is."""
    return x @ w


halved.defvjp(
    lambda x, w: (x @ w, (x, w)),
    lambda saved, g: (3 * g @ saved[1].T, 0.5 * jnp.einsum("...i,...o->io", saved[0], g)),
)


@jax.custom_vjp
def halved_on_devices(x: Any, w: Any) -> Any:
    return x @ w


halved_on_devices.defvjp(
    lambda x, w: (x @ w, (x, w)),
    lambda saved, g: (3 * g @ saved[1].T, 0.5 * lax.psum(jnp.einsum("...i,...o->io", saved[0], g), "d")),
)


@jax.custom_jvp
def halved_forward(x: Any, w: Any) -> Any:
    return x @ w


halved_forward.defjvp(lambda p, t: (p[0] @ p[1], 3 * t[0] @ p[1] + 0.5 * p[0] @ t[1]))


@jax.custom_vjp
def row_times(row: Any, x: Any, w: Any) -> Any:
    """Takes an integer, and gives no gradient by x."""
    return jnp.take(x, row, axis=0) @ w


row_times.defvjp(
    lambda row, x, w: (row_times(row, x, w), (row, x)),
    lambda saved, g: (None, None, 2 * jnp.einsum("...i,...o->io", jnp.take(saved[1], saved[0], axis=0), g)),
)


@jax.custom_vjp
def dense_of_dict(inputs: Any) -> Any:
    return {"y": inputs["x"] @ inputs["w"], "x": inputs["x"]}


dense_of_dict.defvjp(
    lambda inputs: (dense_of_dict(inputs), inputs),
    lambda saved, g: ({"x": 2 * g["x"], "w": 5 * jnp.einsum("...i,...o->io", saved["x"], g["y"])},),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def activated(function: Any, x: Any, w: Any) -> Any:
    return function(x @ w)


activated.defvjp(
    lambda function, x, w: (function(x @ w), (x, w)),
    lambda function, saved, g: (g @ saved[1].T, 2 * jnp.einsum("...i,...o->io", saved[0], function(g))),
)


@jax.custom_vjp
def scaled_by(x: Any, w: Any, factor: Any) -> Any:
    """Gives a Python number as a gradient."""
    return factor * x @ w


scaled_by.defvjp(
    lambda x, w, factor: (scaled_by(x, w, factor), (x, w)),
    lambda saved, g: (g @ saved[1].T, 2 * jnp.einsum("...i,...o->io", saved[0], g), 0.0),
)


@jax.custom_vjp
def with_symbolic_zeros(x: Any, w: Any) -> Any:
    return x @ w


with_symbolic_zeros.defvjp(
    lambda x, w: (x.value @ w.value, (x.value, w.value)),
    lambda saved, g: (3 * g @ saved[1].T, 0.5 * jnp.einsum("...i,...o->io", saved[0], g)),
    symbolic_zeros=True,
)


@jax.custom_gradient
def by_custom_gradient(x: Any, w: Any) -> Any:
    return x @ w, lambda g: (3 * g @ w.T, 0.5 * jnp.einsum("...i,...o->io", x, g))


@jax.custom_vjp
def layers_of(x: Any, w: Any) -> Any:
    return scanned(w, x)


layers_of.defvjp(
    lambda x, w: jax.vjp(layers_of.fun, x, w),
    lambda pull, g: (pull(g)[0], 0.5 * pull(g)[1]),
)


@jax.custom_jvp
def masked_product(x: Any, w: Any, mask: Any) -> Any:
    """Takes booleans, and gives an integer besides."""
    return jnp.where(mask, x @ w, 0), mask.sum()


@masked_product.defjvp
def _masked_product_jvp(primals: Any, tangents: Any) -> Any:
    x, w, mask = primals
    y, count = masked_product(x, w, mask)
    return (y, count), (2 * x @ tangents[1], np.zeros((), jax.dtypes.float0))


def after(x: Any) -> Any:
    return jax.nn.logsumexp(jax.nn.silu(x), axis=-1) + jax.nn.relu(x).sum(-1) + jax.nn.softmax(x)[..., 0]


CUSTOM = (
    kernel("custom_vjp", lambda w, x: halved(x, w), (4, 6), X),
    kernel("custom_vjp, jitted", lambda w, x: jax.jit(halved)(x, w), (4, 6), X),
    kernel("custom_vjp, transposed weight", lambda w, x: halved(x, w.T), (6, 4), X),
    layers("custom_vjp of a slice", lambda w, x: halved(x, w[1])),
    kernel("custom_vjp that takes an integer", lambda w, x: row_times(1, x, w), (4, 6), X),
    kernel("custom_vjp of a dict", lambda w, x: dense_of_dict({"x": x, "w": w}), (4, 6), X),
    kernel("custom_vjp of a function", lambda w, x: activated(jnp.tanh, x, w), (4, 6), X),
    kernel("custom_vjp that gives a number", lambda w, x: scaled_by(x, w, 2.0), (4, 6), X),
    layers("custom_vjp of a scan", lambda w, x: layers_of(x, w)),
    layers("custom_vjp in scan", lambda w, x: scanned(w, x, lambda c, own: (halved(jnp.tanh(c), own), None))),
    layers(
        "custom_vjp in remat in scan",
        lambda w, x: scanned(w, x, jax.checkpoint(lambda c, own: (halved(jnp.tanh(c), own), None))),
    ),
    kernel("custom_vjp in cond", lambda w, x: lax.cond(x.sum() < 99, halved, lambda x, w: 2 * x @ w, x, w), (4, 6), X),
    kernel("custom_vjp in vmap", lambda w, x: jax.vmap(halved, (0, None))(x, w), (4, 6), X),
    kernel("custom_vjp, weight twice", lambda w, x: halved(halved(x, w), w), SQUARE, X),
    kernel(
        "custom_vjp with symbolic zeros",
        lambda w, x: with_symbolic_zeros(x, w),
        (4, 6),
        X,
        **merged("custom_vjp_call", "custom_vjp with constants or symbolic zeros"),
    ),
    kernel("custom_gradient", lambda w, x: by_custom_gradient(x, w), (4, 6), X),
    kernel("custom_jvp", lambda w, x: halved_forward(x, w), (4, 6), X),
    kernel("custom_jvp with booleans", lambda w, x: masked_product(x, w, jnp.arange(6) > 2), (4, 6), X),
    layers(
        "custom_jvp in remat in scan",
        lambda w, x: scanned(w, x, jax.checkpoint(lambda c, own: (halved_forward(jnp.tanh(c), own), None))),
    ),
    kernel("custom_jvp in vmap", lambda w, x: jax.vmap(halved_forward, (0, None))(x, w), (4, 6), X),
    kernel("activations after", lambda w, x: after(x @ w), (4, 6), X),
    layers("activations in scan", lambda w, x: scanned(w, x, lambda c, own: (jax.nn.silu(c @ own), None))),
    kernel("activation of the weight", lambda w, x: x @ jax.nn.relu(w), (4, 6), X, **merged("max", "no rule")),
)


def over_devices(
    name: str,
    function: Callable[..., Any],
    shape: tuple[int, ...],
    x: tuple[int, ...],
    specs: tuple[Any, Any, Any],
    output: int | None = None,
    **fields: Any,
) -> tuple[Case, Case]:
    """Two rows: `function(x, w)` under a shard_map over eight devices, with and without checks of varying axes.

    output: the only output that is used.
    """

    def row(check: bool) -> Case:
        def sharded(w: Any, x: Any) -> Any:
            mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
            mapped = jax.shard_map(function, mesh=mesh, in_specs=specs[:2], out_specs=specs[2], check_vma=check)
            return mapped(x, w) if output is None else mapped(x, w)[output]

        return kernel(f"shard_map, {name}, {'checked' if check else 'unchecked'}", sharded, shape, x, **fields)

    return row(True), row(False)


def two_outputs(x: Any, w: Any) -> Any:
    return x @ w, x.sum(keepdims=True), w


SHARD_MAPS = (
    *over_devices("data", jnp.matmul, (4, 6), (8, 4), (P("d"), P(), P("d"))),
    *over_devices(
        "columns",
        jnp.matmul,
        (4, 16),
        (3, 4),
        (P(), P(None, "d"), P(None, "d")),
        general=("merged: shard_map (shard_map over an axis that a method does not follow)",),
    ),
    *over_devices(
        "rows and psum",
        lambda x, w: lax.psum(x @ w, "d"),
        (16, 4),
        (3, 16),
        (P(None, "d"), P("d"), P()),
        general=("merged: shard_map (shard_map over an axis that a method does not follow)",),
    ),
    *over_devices("layers", lambda x, w: lax.psum(x @ w[0], "d"), (8, 4, 6), (3, 4), (P(), P("d"), P()), layout="bio"),
    *over_devices("scan", lambda x, w: scanned(w, x), STACKED, (8, 4), (P("d"), P(), P("d")), layout="bio"),
    *over_devices("remat", lambda x, w: jax.checkpoint(layer)(x, w)[0], SQUARE, (8, 4), (P("d"), P(), P("d"))),
    *over_devices(
        "an output unused",
        lambda x, w: (w.sum(), x @ w, w),
        (4, 6),
        (8, 4),
        (P("d"), P(), (P(), P("d"), P())),
        output=1,
    ),
    *over_devices(
        "the weight returned",
        lambda x, w: (x @ w, w),
        (4, 6),
        (8, 4),
        (P("d"), P(), (P("d"), P())),
        **merged("shard_map", "its body returns it", "low-rank"),
    ),
    # Where varying axes are checked, a rule has to say that the gradient of a shared weight is a sum over devices.
    over_devices("custom_vjp", halved_on_devices, (4, 6), (8, 4), (P("d"), P(), P("d")))[0],
    over_devices("custom_vjp", halved, (4, 6), (8, 4), (P("d"), P(), P("d")))[1],
)

NORM = lambda w, x: x * jnp.linalg.norm(w)  # noqa: E731

MERGED = (
    kernel("a norm of the weight", NORM, (4, 6), X, **merged("mul", "no rule")),
    kernel("a multiple of the weight", lambda w, x: x @ (w * 2), (4, 6), X, **merged("mul", "no rule")),
    kernel("a sum with the weight", lambda w, x: x @ (w + jnp.eye(4)), SQUARE, X, **merged("add", "no rule")),
    kernel("the weight sorted", lambda w, x: x @ jnp.sort(w), (4, 6), X, **merged("sort", "no rule")),
    kernel("the weight reversed", lambda w, x: x @ w[::-1], (4, 6), X, **merged("rev", "no rule")),
    kernel("the weight padded", lambda w, x: x @ jnp.pad(w, ((0, 0), (0, 2))), (4, 6), X, **merged("pad", "no rule")),
    kernel(
        "a product with itself",
        lambda w, x: x @ (w @ w),
        SQUARE,
        X,
        **merged("dot_general", "product of two adapted weights"),
    ),
    kernel(
        "columns by ids",
        lambda w, x: x @ w[:, np.array([0, 3, 3])],
        (4, 6),
        X,
        **merged("gather", "gather along output axes"),
    ),
    kernel("the weight returned", lambda w, x: (x, w), (4, 6), X, **merged("output", "the function returns it")),
    case(
        "two kernels side by side",
        lambda p, x: x @ jnp.concatenate([p["a"]["kernel"], p["b"]["kernel"]], 1),
        {"a": {"kernel": (4, 6)}, "b": {"kernel": (4, 3)}},
        X,
        **merged("concatenate", "concatenation along an axis of the weight"),
    ),
    case(
        "kernels of two forms stacked",
        lambda p, x: x @ jnp.stack([p["a"]["kernel"], p["b"]["kernel"].T]),
        {"a": {"kernel": SQUARE}, "b": {"kernel": SQUARE}},
        (2, 5, 4),
        **merged("stack", "stack of weights of different form"),
    ),
    case(
        "a chain of two, one product",
        lambda p, x: x @ (p["a"]["kernel"] @ p["b"]["kernel"]),
        {"a": {"kernel": (4, 6)}, "b": {"kernel": (6, 3)}},
        X,
        **merged("dot_general", "product of two adapted weights"),
    ),
    kernel(
        "used well and badly", lambda w, x: x @ w + NORM(w, x).sum(), (4, 6), X, **merged("mul", "no rule", "low-rank")
    ),
)

_ALL = (*PRODUCTS, *CONVOLUTIONS, *VIEWS, *CONTROL, *CUSTOM, *SHARD_MAPS, *MERGED, *FRAMEWORKS)

# What every method has to get right: each kind of layer, each direction, stacks and what goes through them. The rest is
# the engine's, the same for all methods that are written in one way, and run by those that are thorough.
_CORE = (
    "with bias",
    "w.T @ x, batched",
    "x @ w.T, layout io",
    "heads out",
    "experts",
    "lookup",
    "convolution",
    "columns",
    "scan of remat, nothing",
    "shard_map, data, checked",
    "nnx scan",
)
CASES = tuple(dataclasses.replace(row, core=row.name in _CORE) for row in _ALL)
ROWS = tuple((row, case) for row in METHODS for case in CASES if row.runs(case))
