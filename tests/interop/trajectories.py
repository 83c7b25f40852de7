"""Ten steps of SGD in PyTorch PEFT and here, from one start: tiny models twice, and the steps on both sides."""

import copy
import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import torch
import transformers

import jpeft
from jpeft_interop import load_adapter, load_pretrained

STEPS, RATE, TOLERANCE = 10, 0.5, 1e-3
WORDS = 11


@dataclasses.dataclass(frozen=True)
class Twin:
    """One model twice, with the same random weights, and the outputs that both learn to give."""

    torch_model: Any
    params: Any
    apply: Callable[[Any, Any], Any]
    layouts: Mapping[str, str]
    ids: np.ndarray
    wanted: np.ndarray


# ---- models ---------------------------------------------------------------------------------------------------------


class Net(torch.nn.Module):
    """A lookup, a convolution and two linear layers."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(WORDS, 6)
        self.conv = torch.nn.Conv1d(6, 5, 3)
        self.first = torch.nn.Linear(5, 8)
        self.second = torch.nn.Linear(8, 4, bias=False)

    def forward(self, ids):
        x = torch.tanh(self.conv(self.embed(ids).swapaxes(1, 2))).swapaxes(1, 2)
        return self.second(torch.tanh(self.first(x)))


def net(params, ids):
    x = jnp.swapaxes(params["embed"]["embedding"][ids], 1, 2)
    numbers = ("NCH", "OIH", "NCH")
    x = jax.lax.conv_general_dilated(x, params["conv"]["weight"], (1,), "VALID", dimension_numbers=numbers)
    x = jnp.swapaxes(jnp.tanh(x + params["conv"]["bias"][:, None]), 1, 2)
    return linear(params["second"], jnp.tanh(linear(params["first"], x)))


class Tied(torch.nn.Module):
    """A table that is the output layer, too, with what PEFT asks such a model for."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self):
        super().__init__()
        self.config = transformers.PretrainedConfig(tie_word_embeddings=True)
        table = torch.nn.Embedding(WORDS, 6)
        self.model = torch.nn.ModuleDict({"embed_tokens": table, "up": torch.nn.Linear(6, 6)})
        self.lm_head = torch.nn.Linear(6, WORDS, bias=False)
        self.lm_head.weight = table.weight

    def get_input_embeddings(self):
        return self.model["embed_tokens"]

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, ids):
        return self.lm_head(torch.tanh(self.model["up"](self.model["embed_tokens"](ids))))


def tied(params, ids):
    table = params["model"]["embed_tokens"]["embedding"]
    return jnp.tanh(linear(params["model"]["up"], table[ids])) @ table.T


class Gate(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3, 6))

    def forward(self, x):
        return torch.softmax(x @ self.weight.T, -1)


class Mixture(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = torch.nn.Parameter(torch.zeros(3, 8, 6))
        self.down_proj = torch.nn.Parameter(torch.zeros(3, 4, 8))

    def forward(self, x, shares):
        h = torch.tanh(torch.einsum("bti,ehi->bteh", x, self.gate_up_proj))
        return (shares[..., None] * torch.einsum("bteh,eoh->bteo", h, self.down_proj)).sum(2)


class Experts(torch.nn.Module):
    """A lookup, a router whose weight is a parameter of two axes, and experts in parameters of three."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(WORDS, 6)
        self.gate, self.experts = Gate(), Mixture()

    def forward(self, ids):
        x = self.embed(ids)
        return self.experts(x, self.gate(x))


def experts(params, ids):
    x, own = params["embed"]["embedding"][ids], params["experts"]
    h = jnp.tanh(jnp.einsum("bti,ehi->bteh", x, own["gate_up_proj"]))
    shares = jax.nn.softmax(x @ params["gate"]["weight"].T, -1)
    return (shares[..., None] * jnp.einsum("bteh,eoh->bteo", h, own["down_proj"])).sum(2)


class Layers(torch.nn.Module):
    """Two layers in a list, which PEFT can make more of."""

    def __init__(self):
        super().__init__()
        self.config = transformers.PretrainedConfig(num_hidden_layers=2)
        self.embed = torch.nn.Embedding(WORDS, 6)
        self.layers = torch.nn.ModuleList([torch.nn.ModuleDict({"up": torch.nn.Linear(6, 6)}) for _ in range(2)])

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = x + torch.tanh(layer["up"](x))
        return x


REPLICATED = [[0, 2], [0, 1], [1, 2]]


def layers(params, ids):
    x = params["embed"]["embedding"][ids]
    for number in range(len(params["layers"])):
        x = x + jnp.tanh(linear(params["layers"][str(number)]["up"], x))
    return x


def linear(own, x):
    y = x @ own["kernel"]
    return y + own["bias"] if "bias" in own else y


def randomise(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return model


def params_of(model):
    """The tree of a PyTorch model's parameters, each once."""
    params, modules = {}, dict(model.named_modules())
    for key, tensor in model.named_parameters():
        *path, name = key.split(".")
        module = modules[".".join(path)]
        array = jnp.asarray(tensor.detach().numpy())
        if name == "weight" and isinstance(module, torch.nn.Linear):
            name, array = "kernel", array.T
        if name == "weight" and isinstance(module, torch.nn.Embedding):
            name = "embedding"
        own = functools.reduce(lambda tree, step: tree.setdefault(step, {}), path, params)
        own[name] = array
    return params


KINDS = {"net": (Net, net), "tied": (Tied, tied), "experts": (Experts, experts), "layers": (Layers, layers)}


@functools.cache
def twin(kind: str) -> Twin:
    """kind: of `KINDS`. The layers are those of REPLICATED here; in PyTorch the adapter's config makes them so."""
    of_torch, apply = KINDS[kind]
    model = randomise(of_torch(), 3)
    params = params_of(model)
    if kind == "layers":
        own = [params["layers"][str(number)] for first, end in REPLICATED for number in range(first, end)]
        params["layers"] = {str(number): layer for number, layer in enumerate(own)}
    layouts = {"conv.weight": "oi.", "gate.weight": "oi", "experts.gate_up_proj": "boi", "experts.down_proj": "boi"}
    ids = np.random.default_rng(0).integers(0, WORDS, (4, 9))
    with torch.no_grad():
        shape = model(torch.tensor(ids)).shape
    wanted = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    present = {name: layout for name, layout in layouts.items() if name.split(".")[0] in params}
    return Twin(model, params, apply, present, ids, wanted)


# ---- adapters -------------------------------------------------------------------------------------------------------


def quietly(function, *args, **kwargs):
    """PEFT warns of what it does on purpose."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def with_adapter(pair: Twin, settings, *, drawn: bool = True):
    """PEFT's model with an adapter; drawn: whether all that trains gets random values, rather than PEFT's own."""
    torch.manual_seed(0)
    model = quietly(peft.get_peft_model, copy.deepcopy(pair.torch_model), peft.LoraConfig(**copy.deepcopy(settings)))
    return drawn_values(model) if drawn else model


def drawn_values(model, seed=7):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # A magnitude is a length.
            if parameter.requires_grad and "magnitude" not in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def read(pair: Twin, model, folder: Path) -> jpeft.PeftParams:
    """What PEFT's model has now, through its files: the first adapter trains, the others do not."""
    quietly(model.save_pretrained, folder)
    wrapped = load_pretrained(pair.params, folder, layouts=pair.layouts, is_trainable=True)
    for name in list(model.peft_config)[1:]:
        wrapped = load_adapter(wrapped, folder / name, name, layouts=pair.layouts)
    return jpeft.set_adapter(wrapped, list(model.peft_config))


def qalora_layer(weights, in_features: int, group_size: int, scaling: float):
    """PEFT's forward pass of QALoRA for a layer with these weights, which it has for layers of GPTQ alone.

    Returns a function of the inputs and the base layer's outputs, and the parameters.
    """
    layer = torch.nn.Module()
    layer.in_features, layer.scaling = in_features, {"default": scaling}
    layer.qalora_group_size, layer.lora_dropout = {"default": group_size}, {"default": torch.nn.Identity()}
    for name, array in weights.items():
        linear = torch.nn.Linear(1, 1)
        linear.weight = torch.nn.Parameter(torch.tensor(np.array(array)))
        setattr(layer, name, torch.nn.ModuleDict({"default": linear}))
    forward = peft.tuners.lora.variants.QALoraLinearVariant.forward
    return functools.partial(forward, layer, "default"), {
        name: getattr(layer, name)["default"].weight for name in weights
    }


# ---- steps ----------------------------------------------------------------------------------------------------------


def torch_steps(loss, parameters, rate=RATE):
    """The losses of some steps."""
    optimizer, losses = torch.optim.SGD(parameters, rate), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def jax_steps(loss, wrapped, rate=RATE):
    """The losses of some steps, and the parameters after them."""
    mask = jpeft.trainable_mask(wrapped)

    @jax.jit
    def step(wrapped):
        value, gradient = jpeft.value_and_grad(loss)(wrapped)
        return value, jax.tree.map(lambda t, p, g: p - rate * g if t else p, mask, wrapped, gradient)

    losses = []
    for _ in range(STEPS):
        value, wrapped = step(wrapped)
        losses.append(float(value))
    return losses, wrapped


def torch_loss(pair: Twin, model):
    ids, wanted = torch.tensor(pair.ids), torch.tensor(pair.wanted)
    return lambda: ((model(ids) - wanted) ** 2).mean()


def jax_loss(pair: Twin):
    lifted = jpeft.lift(pair.apply)
    return lambda wrapped: ((lifted(wrapped, pair.ids) - pair.wanted) ** 2).mean()


def trained_arrays(wrapped: jpeft.PeftParams) -> dict[tuple[str, ...], np.ndarray]:
    """All that trains in the first adapter, by module or leaf, and name."""
    trainable = jpeft.partition(wrapped)[0].adapters["default"]
    found = {(path, name): x for path, own in trainable.weights.items() for name, x in own.items()}
    found |= {(path,): x for path, x in trainable.replaced.items()}
    found |= {(path,): rows.values for path, rows in trainable.rows.items()}
    return {path: np.asarray(array) for path, array in found.items() if array is not None}
