"""One row a method and option: what PyTorch PEFT and jpeft have to agree on, and tiny models that both have."""

import copy
import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import torch
from transformers.pytorch_utils import Conv1D

import jpeft
from jpeft_interop import load_pretrained
from jpeft_interop._extra_file import STATE_NAME, write_kept
from tests.harness import random_like, with_derived
from tests.interop import trajectories
from tests.interop.trajectories import Twin, linear, quietly


@dataclasses.dataclass(frozen=True)
class Row:
    """One method with its options on one model.

    name: for the test's id. config: the name of the config class, in PEFT and here. twin: of `TWINS`. settings: of the
    config. scale: standard deviation of the random values that take the place of the initial ones. initial: names of
    trainable arrays that keep their initial values, as random ones mean nothing (a length, a variance). no_steps: why
    ten steps of training cannot agree with PEFT's; rate: their learning rate. no_merge: why PEFT's merged weights are
    not compared; no_forward: why PEFT's own forward is not, but its merged weights. same_bytes: whether what is loaded
    is written back to the bit. merges: whether the method merges. precious: whether arrays that follow from the base
    may come out otherwise in PyTorch (signs, near ties), so that its own are compared with ours and then taken.
    context: what a call brings for the rows of its batch.
    """

    name: str
    config: str
    settings: Mapping[str, Any]
    twin: str = "net"
    scale: float = 0.3
    initial: frozenset[str] = frozenset()
    no_steps: str | None = None
    rate: float = 0.05
    no_merge: str | None = None
    no_forward: str | None = None
    same_bytes: bool = True
    merges: bool = True
    precious: bool = False
    context: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)


# ---- models ---------------------------------------------------------------------------------------------------------


class Images(torch.nn.Module):
    """A lookup, a convolution over images and a linear layer."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(trajectories.WORDS, 6)
        self.conv = torch.nn.Conv2d(1, 4, (3, 2), padding=(1, 0))
        self.next = torch.nn.Conv2d(4, 6, 1)
        self.head = torch.nn.Linear(30, 4)

    def forward(self, ids):
        x = torch.tanh(self.conv(self.embed(ids).unsqueeze(1)))
        x = torch.tanh(self.next(x)).permute(0, 2, 3, 1)
        return self.head(x.reshape(*x.shape[:2], -1))


def images(params, ids):
    x = params["embed"]["embedding"][ids][:, None]
    for name, padding in (("conv", ((1, 1), (0, 0))), ("next", "VALID")):
        numbers = ("NCHW", "OIHW", "NCHW")
        x = jax.lax.conv_general_dilated(x, params[name]["weight"], (1, 1), padding, dimension_numbers=numbers)
        x = jnp.tanh(x + params[name]["bias"][:, None, None])
    x = x.transpose(0, 2, 3, 1)
    return linear(params["head"], x.reshape(*x.shape[:2], -1))


class Squares(torch.nn.Module):
    """A lookup, a convolution with a square window and strides over two channels, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(trajectories.WORDS, 12)
        self.conv = torch.nn.Conv2d(2, 4, 2, stride=2, padding=1)
        self.head = torch.nn.Linear(16, 4)

    def forward(self, ids):
        x = self.embed(ids).reshape(*ids.shape, 2, 6).permute(0, 2, 1, 3)
        x = torch.tanh(self.conv(x)).permute(0, 2, 3, 1)
        return self.head(x.reshape(*x.shape[:2], -1))


def squares(params, ids):
    x = params["embed"]["embedding"][ids].reshape(*ids.shape, 2, 6).transpose(0, 2, 1, 3)
    numbers = ("NCHW", "OIHW", "NCHW")
    x = jax.lax.conv_general_dilated(x, params["conv"]["weight"], (2, 2), ((1, 1), (1, 1)), dimension_numbers=numbers)
    x = jnp.tanh(x + params["conv"]["bias"][:, None, None]).transpose(0, 2, 3, 1)
    return linear(params["head"], x.reshape(*x.shape[:2], -1))


class Volumes(torch.nn.Module):
    """A lookup, a convolution over volumes and a linear layer."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(trajectories.WORDS, 8)
        self.conv = torch.nn.Conv3d(1, 4, (2, 1, 2))
        self.head = torch.nn.Linear(4, 4)

    def forward(self, ids):
        x = self.embed(ids)
        x = torch.tanh(self.conv(x.reshape(len(ids), 1, -1, 2, 4)))
        return self.head(x.mean((3, 4)).swapaxes(1, 2))


def volumes(params, ids):
    x = params["embed"]["embedding"][ids]
    x = x.reshape(len(ids), 1, -1, 2, 4)
    numbers = ("NCDHW", "OIDHW", "NCDHW")
    x = jax.lax.conv_general_dilated(x, params["conv"]["weight"], (1, 1, 1), "VALID", dimension_numbers=numbers)
    x = jnp.tanh(x + params["conv"]["bias"][:, None, None, None])
    return linear(params["head"], jnp.swapaxes(x.mean((3, 4)), 1, 2))


class Blocks(torch.nn.Module):
    """Two blocks in a list, with layers of several shapes."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(trajectories.WORDS, 6)
        sizes = {"q_proj": (6, 6), "v_proj": (6, 6), "up_proj": (6, 8), "down_proj": (8, 6)}
        self.layers = torch.nn.ModuleList(
            [torch.nn.ModuleDict({n: torch.nn.Linear(*s, bias=n[0] in "qu") for n, s in sizes.items()}) for _ in "ab"]
        )

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = x + torch.tanh(layer["q_proj"](x)) * layer["v_proj"](x)
            x = x + layer["down_proj"](torch.tanh(layer["up_proj"](x)))
        return x


def blocks(params, ids):
    x = params["embed"]["embedding"][ids]
    for number in range(2):
        layer = params["layers"][str(number)]
        x = x + jnp.tanh(linear(layer["q_proj"], x)) * linear(layer["v_proj"], x)
        x = x + linear(layer["down_proj"], jnp.tanh(linear(layer["up_proj"], x)))
    return x


class Transposed(torch.nn.Module):
    """The linear layers of GPT-2, whose weights are (in, out)."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(trajectories.WORDS, 6)
        self.first, self.second = Conv1D(8, 6), Conv1D(4, 8)

    def forward(self, ids):
        return self.second(torch.tanh(self.first(self.embed(ids))))


def transposed(params, ids):
    x = params["embed"]["embedding"][ids]
    own = [{"kernel": params[name]["weight"], "bias": params[name]["bias"]} for name in ("first", "second")]
    return linear(own[1], jnp.tanh(linear(own[0], x)))


trajectories.KINDS.update(
    images=(Images, images),
    squares=(Squares, squares),
    volumes=(Volumes, volumes),
    blocks=(Blocks, blocks),
    transposed=(Transposed, transposed),
)
LAYOUTS = {
    "squares": {"conv.weight": "oi.."},
    "images": {"conv.weight": "oi..", "next.weight": "oi.."},
    "volumes": {"conv.weight": "oi..."},
    "transposed": {"first.weight": "io", "second.weight": "io"},
}


@functools.cache
def twin(kind: str) -> Twin:
    """kind: net, tied (of `trajectories`), images, squares, volumes, blocks or transposed."""
    pair = trajectories.twin(kind)
    return dataclasses.replace(pair, layouts=LAYOUTS.get(kind, pair.layouts))


# ---- adapters -------------------------------------------------------------------------------------------------------


def config_of(package: Any, row: Row) -> Any:
    # PEFT warns of settings, such as projections that its files do not hold.
    return quietly(getattr(package, row.config), **copy.deepcopy(dict(row.settings)))


def torch_adapter(row: Row) -> Any:
    """PEFT's model with an adapter of random values."""
    torch.manual_seed(0)
    model = quietly(peft.get_peft_model, copy.deepcopy(twin(row.twin).torch_model), config_of(peft, row))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not row.initial & set(name.split(".")):
                parameter.copy_(row.scale * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def jax_adapter(row: Row) -> jpeft.PeftParams:
    """Parameters here with an adapter of random values."""
    pair = twin(row.twin)
    wrapped = jpeft.wrap(pair.params, config_of(jpeft, row), layouts=pair.layouts)
    adapter, mask = wrapped.adapters["default"], jpeft.trainable_mask(wrapped).adapters["default"]
    drawn = random_like(adapter, 100, row.scale)
    kept = jax.tree_util.tree_map_with_path(
        lambda path, old, new, trains: new if trains and not row.initial & {_name(part) for part in path} else old,
        adapter,
        drawn,
        mask,
    )
    return with_derived(dataclasses.replace(wrapped, adapters={"default": kept}))


def _name(part: Any) -> str:
    return str(getattr(part, "key", getattr(part, "name", part)))


def read(row: Row, folder: Path, **options: Any) -> jpeft.PeftParams:
    pair = twin(row.twin)
    return load_pretrained(pair.params, folder, layouts=pair.layouts, **options)


def keep_torchs_own(row: Row, model: Any, folder: Path) -> None:
    """Write what PEFT's files do not hold beside its adapter, as `save_pretrained` here writes ours."""
    if row.precious:
        write_kept(folder / STATE_NAME, torchs_own(model), folder / "adapter_model.safetensors")


def torchs_own(model: Any) -> dict[str, np.ndarray]:
    """{key: array} of PEFT's `_psoft_A_cache` and `_psoft_B_cache` and of its groups, which its files do not hold."""
    groups: dict[str, np.ndarray] = {}
    for path, module in model.named_modules():
        if hasattr(module, "seg_result"):
            own, ranks = module.seg_result["default"], [len(a) for a in module.adamss_A["default"]]
            labels = np.concatenate([np.full(len(rows), group) for group, rows in own.items()])
            order = np.concatenate([rows.numpy() for rows in own.values()])
            groups[f"{path}.adamss_labels"] = labels[np.argsort(order)].astype(np.int32)
            groups[f"{path}.adamss_ranks"] = np.asarray(ranks, np.int32)
    return groups | {
        f"{path}.psoft_{side}": getattr(module, f"_psoft_{side}_cache")["default"].numpy()
        for path, module in model.named_modules()
        if hasattr(module, "_psoft_A_cache")
        for side in "AB"
    }


def with_torchs_own(row: Row, wrapped: jpeft.PeftParams, model: Any) -> jpeft.PeftParams:
    """Ours with PEFT's singular vectors, which have to be the same up to the sign of each pair of them; groups of
    outputs have to be the same."""
    if not row.precious:
        return wrapped
    adapter, found = wrapped.adapters["default"], torchs_own(model)
    weights = {path: dict(arrays) for path, arrays in adapter.weights.items()}
    for path, arrays in weights.items():
        if "adamss_labels" in arrays:
            for name in ("adamss_labels", "adamss_ranks"):
                np.testing.assert_array_equal(arrays[name], found[f"base_model.model.{path}.{name}"])
            continue
        a, b = (found[f"base_model.model.{path}.psoft_{side}"] for side in "AB")
        signs = np.sign((a * arrays["psoft_A"]).sum(1))
        np.testing.assert_allclose(signs[:, None] * arrays["psoft_A"], a, atol=1e-4)
        np.testing.assert_allclose(signs * arrays["psoft_B"], b, atol=1e-4)
        arrays.update(psoft_A=jnp.asarray(a), psoft_B=jnp.asarray(b))
    return dataclasses.replace(wrapped, adapters={"default": dataclasses.replace(adapter, weights=weights)})


def settled(model: Any) -> Any:
    """PEFT's FRoD solves for U before it reads V from a file: here again, by its own function, of V as it was read."""
    for module in model.modules():
        if hasattr(module, "_calculate_frod_u_and_lambda"):
            weight = module.get_base_layer().weight
            weight = weight.T if module.fan_in_fan_out else weight
            module.frod_U["default"] = module._calculate_frod_u_and_lambda(module.frod_V["default"], weight)[0]
    return model


def torch_outputs(row: Row, model: Any) -> np.ndarray:
    ids, given = torch.tensor(twin(row.twin).ids), {}
    if row.context and isinstance(model, peft.PeftModel):
        # A PeftModel of no task hands such arguments to the base model.
        model, given = model.base_model, {name: torch.tensor(own) for name, own in row.context.items()}
    with torch.no_grad():
        return model(ids, **given).numpy()


def expected_outputs(row: Row, model: Any) -> np.ndarray:
    """What PEFT computes, with merged weights if its own forward is wrong."""
    return torch_outputs(row, quietly(copy.deepcopy(model).merge_and_unload) if row.no_forward else model)


def jax_outputs(row: Row, wrapped: jpeft.PeftParams) -> np.ndarray:
    pair, wrapped = twin(row.twin), jpeft.with_context(wrapped, **row.context)
    return np.asarray(jax.jit(jpeft.lift(pair.apply))(wrapped, pair.ids))


def merged_outputs(row: Row, wrapped: jpeft.PeftParams) -> np.ndarray:
    pair = twin(row.twin)
    return np.asarray(jax.jit(pair.apply)(jpeft.merge(wrapped), pair.ids))


def assert_close(found: np.ndarray, expected: np.ndarray, what: str) -> None:
    worst, scale = np.abs(found - expected).max(), np.abs(expected).max()
    assert worst <= 1e-4 * scale, f"{what}: {worst} apart, of {scale}"
