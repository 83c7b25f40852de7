"""The rows of `adapters.py` in PyTorch PEFT: the same work by the same names, as fast as its settings allow."""

import argparse
import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from _adapters_sizes import LLAMA, LOADED, MIXED, SMALL, population_names
from _models import PROJECTIONS
from _rows import Row, Rows
from _torch_steps import llama
from peft.utils.hotswap import hotswap_adapter, hotswap_adapter_from_state_dict


def rows(args: argparse.Namespace, folder: Path) -> Rows:
    """folder: of an adapter for the small model, as `adapters.py` saves it."""
    training = {name: row for hidden in args.widths for name, row in sequential(args, hidden).items()}
    return {**wrapping(), **loading(folder), **mixing(args), **training}


def wrapping() -> Rows:
    config = peft.LoraConfig(r=16, target_modules=list(PROJECTIONS))
    abstract, small = llama(LLAMA, device="meta"), llama(SMALL)
    return {
        "wrap, 7B shapes": Row(lambda: peft.get_peft_model(abstract, config, low_cpu_mem_usage=True).unload),
        "wrap, 32 small layers": Row(lambda: peft.get_peft_model(small, config).unload),
    }


def loading(folder: Path) -> Rows:
    load = functools.partial(peft.PeftModel.from_pretrained, model_id=folder, low_cpu_mem_usage=True)
    base, many, slot = llama(SMALL), load(llama(SMALL)), load(llama(SMALL))
    names = [f"number {number}" for number in range(LOADED)]
    for name in names:
        many.load_adapter(folder, name, low_cpu_mem_usage=True)
    config: Any = slot.active_peft_config
    values = {key: value.clone() for key, value in slot.state_dict().items() if ".lora_" in key}

    def load_next() -> Callable[[], None]:
        many.load_adapter(folder, "next", low_cpu_mem_usage=True)
        return functools.partial(many.delete_adapter, "next")

    def swap() -> None:
        # It takes the tensors out of what it is given.
        hotswap_adapter_from_state_dict(slot, dict(values), "default", config)

    return {
        "load the first adapter": Row(lambda: load(base).unload),
        "load the 20th": Row(load_next, "load the first adapter"),
        "switch": Row(lambda: many.set_adapter(random.choice(names))),
        "hot-swap, from a file": Row(lambda: hotswap_adapter(slot, str(folder), "default", torch_device="cpu")),
        "hot-swap, in memory": Row(swap),
    }


class Layer(torch.nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.query = torch.nn.Linear(hidden, hidden, bias=False)
        self.value = torch.nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: Any) -> Any:
        return x + self.value(torch.tanh(self.query(x)))


class Network(torch.nn.Module):
    def __init__(self, layers: int, hidden: int) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(Layer(hidden) for _ in range(layers))

    def forward(self, x: Any) -> Any:
        for layer in self.layers:
            x = layer(x)
        return x


def mixing(args: argparse.Namespace) -> Rows:
    config = peft.LoraConfig(r=args.rank, target_modules=["query", "value"], init_lora_weights=False)
    model = peft.get_peft_model(Network(args.layers, args.hidden), config, adapter_name="0").eval()
    for number in range(1, max(MIXED)):
        model.add_adapter(str(number), config)
    x = torch.randn(8, args.tokens, args.hidden)

    def run(count: int | None) -> None:
        names = {} if count is None else {"adapter_names": [_name(count) for _ in range(len(x))]}
        with torch.no_grad():
            model(x, **names)

    single = "a single adapter, 8 rows"
    mixed = {f"mixed batch over {count}": Row(functools.partial(run, count), single) for count in MIXED}
    return {single: Row(lambda: run(None)), **mixed}


def _name(count: int) -> str:
    number = random.randrange(-1, count)
    return "__base__" if number < 0 else str(number)


def sequential(args: argparse.Namespace, hidden: int) -> Rows:
    config = peft.LoraConfig(r=8, target_modules=["query", "value"])
    x, target = torch.randn(2, 4, 16, hidden)
    models = [peft.get_peft_model(Network(args.layers, hidden), config) for _ in range(args.members)]
    trained = [[weight for weight in model.parameters() if weight.requires_grad] for model in models]
    optimizers = [torch.optim.AdamW(own, lr=1e-3, fused=True) for own in trained]

    def run() -> None:
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            ((model(x) - target) ** 2).mean().backward()
            optimizer.step()

    return {population_names(args.members, hidden)[0]: Row(run)}
