"""LoRA's optimizers against PEFT's: the same gradients for several steps give the same parameters; stacks of layers."""

import dataclasses
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
from tests.stacked_trees import of_layers

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from peft.optimizers import (  # noqa: E402
    create_lorafa_optimizer,
    create_loraplus_optimizer,
    create_riemannian_optimizer,
    lorafa,
)

STEPS, TOLERANCE = 10, 1e-5
SETTINGS = {"r": 3, "lora_alpha": 7, "rank_pattern": {"layers.1.q": 2}}


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(7, 4)
        self.layers = torch.nn.ModuleList([torch.nn.ModuleDict({"q": torch.nn.Linear(4, 5)}) for _ in range(3)])
        self.norm = torch.nn.LayerNorm(4)
        self.head = torch.nn.Linear(4, 2)

    def forward(self, x):
        return x


def tree() -> dict[str, Any]:
    return {
        "table": {"embedding": jnp.zeros((7, 4))},
        "layers": {str(i): {"q": {"kernel": jnp.zeros((4, 5)), "bias": jnp.zeros(5)}} for i in range(3)},
        "norm": {"scale": jnp.zeros(4), "bias": jnp.zeros(4)},
        "head": {"kernel": jnp.zeros((4, 2)), "bias": jnp.zeros(2)},
    }


def key_of(name: str) -> tuple[str, str]:
    """(module or leaf path, array) of a parameter of PEFT's model."""
    name = name.removeprefix("base_model.model.")
    if ".modules_to_save." in name:
        module, leaf = name.split(".modules_to_save.default.")
        return f"{module}.{ {'bias': 'bias', 'weight': 'scale' if module == 'norm' else 'kernel'}[leaf] }", ""
    if ".base_layer.bias" in name:
        return name.replace(".base_layer.bias", ".bias"), ""
    module, _, rest = name.partition(".lora_")
    return module, "lora_" + rest.split(".")[0]


def turned(path: str, array: np.ndarray) -> np.ndarray:
    return array.T if path.endswith("head.kernel") else array


def with_arrays(wrapped: jpeft.PeftParams, arrays: dict[tuple[str, str], Any]) -> jpeft.PeftParams:
    adapter = wrapped.adapters["default"]
    weights = {
        path: {name: jnp.asarray(arrays.get((path, name), array)) for name, array in own.items()}
        for path, own in adapter.weights.items()
    }
    replaced = {path: jnp.asarray(arrays[path, ""]) for path in adapter.replaced}
    return dataclasses.replace(
        wrapped, adapters={"default": dataclasses.replace(adapter, weights=weights, replaced=replaced)}
    )


def arrays_of(wrapped: jpeft.PeftParams) -> dict[tuple[str, str], np.ndarray]:
    adapter = wrapped.adapters["default"]
    found = {(p, n): np.asarray(a) for p, own in of_layers(adapter.weights).items() for n, a in own.items()}
    return found | {(path, ""): np.asarray(leaf) for path, leaf in adapter.replaced.items()}


def promotion(name: str) -> Any:
    # optax's own Adam raises a Python number to an integer power.
    return jax.numpy_dtype_promotion("standard" if "adamw" in name or "default" in name else "strict")


OURS = {
    "loraplus adamw": lambda: jpeft.create_loraplus_optimizer(
        optax.adamw, lr=0.01, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.1, loraplus_lr_embedding=3e-3
    ),
    "loraplus sgd": lambda: jpeft.create_loraplus_optimizer(optax.sgd, lr=0.01, loraplus_lr_ratio=4.0, momentum=0.9),
    "loraplus embedding by default": lambda: jpeft.create_loraplus_optimizer(
        optax.adamw, lr=0.01, loraplus_lr_ratio=2.0
    ),
    "lorafa": lambda: jpeft.create_lorafa_optimizer(lr=0.01),
    "lorafa with decay": lambda: jpeft.create_lorafa_optimizer(lr=0.01, weight_decay=0.3),
    "riemannian sgd": lambda: jpeft.create_riemannian_optimizer(optax.sgd, lr=0.01, reg=0.05),
    "riemannian adamw": lambda: jpeft.create_riemannian_optimizer(optax.adamw, lr=0.01, weight_decay=0.2),
}
THEIRS = {
    "loraplus adamw": lambda model: create_loraplus_optimizer(
        model,
        torch.optim.AdamW,
        lr=0.01,
        loraplus_lr_ratio=16.0,
        loraplus_weight_decay=0.1,
        loraplus_lr_embedding=3e-3,
    ),
    "loraplus sgd": lambda model: create_loraplus_optimizer(
        model, torch.optim.SGD, lr=0.01, loraplus_lr_ratio=4.0, momentum=0.9
    ),
    "loraplus embedding by default": lambda model: create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=2.0
    ),
    "lorafa": lambda model: create_lorafa_optimizer(model, 3, 7, lr=0.01),
    "lorafa with decay": lambda model: create_lorafa_optimizer(model, 3, 7, lr=0.01, weight_decay=0.3),
    "riemannian sgd": lambda model: create_riemannian_optimizer(model, torch.optim.SGD, lr=0.01, reg=0.05),
    "riemannian adamw": lambda model: create_riemannian_optimizer(model, torch.optim.AdamW, lr=0.01, weight_decay=0.2),
}


def torch_steps(
    name: str, settings: dict[str, Any]
) -> tuple[dict[Any, np.ndarray], list[dict[Any, np.ndarray]], dict[Any, np.ndarray]]:
    """(parameters before, gradients of each step, parameters after)."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(Net(), peft.LoraConfig(**settings))
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    with torch.no_grad():
        for _, parameter in trained:
            parameter.copy_(torch.randn(parameter.shape))
    snapshot = lambda value: {key_of(n): turned(key_of(n)[0], value(p).detach().numpy().copy()) for n, p in trained}  # noqa: E731
    before, gradients = snapshot(lambda p: p), []
    optimizer = THEIRS[name](model)
    for _ in range(STEPS):
        for _, parameter in trained:
            parameter.grad = torch.randn(parameter.shape)
        gradients.append(snapshot(lambda p: p.grad))
        optimizer.step()
    return before, gradients, snapshot(lambda p: p)


@pytest.mark.parametrize("half", [False, True], ids=["whole tree", "trainable half"])
@pytest.mark.parametrize("name", OURS)
def test_steps_are_pefts(name, half, monkeypatch):
    # PEFT multiplies LoRA-FA's gradient in bfloat16 where it can; the formula is what is compared.
    monkeypatch.setattr(lorafa, "is_bf16_available", lambda: False)
    targets = ["q"] if name.startswith("lorafa") else ["q", "table"]
    settings = {**SETTINGS, "target_modules": targets, "modules_to_save": ["norm", "head"], "bias": "lora_only"}
    before, gradients, after = torch_steps(name, settings)
    config = jpeft.LoraConfig(**settings)
    wrapped = with_arrays(jpeft.wrap(tree(), config), before)
    tx = OURS[name]()
    params = jpeft.partition(wrapped)[0] if half else wrapped
    zeros = jax.tree.map(lambda leaf: jnp.zeros((), leaf.dtype), wrapped)

    def given(arrays: dict[Any, np.ndarray]) -> jpeft.PeftParams:
        # As jpeft.value_and_grad gives them: a scalar for what is frozen.
        whole = with_arrays(dataclasses.replace(zeros, adapters=wrapped.adapters), arrays)
        frozen = dataclasses.replace(whole.adapters["default"], scaling=zeros.adapters["default"].scaling)
        whole = dataclasses.replace(whole, adapters={"default": frozen})
        return jpeft.partition(whole)[0] if half else whole

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for arrays in gradients:
        with promotion(name):
            params, state = step(params, state, given(arrays))
    got = arrays_of(params)
    assert got.keys() == after.keys()
    for key, want in after.items():
        np.testing.assert_allclose(got[key], want, rtol=TOLERANCE, atol=TOLERANCE, err_msg=str(key))
    moved = [key for key in after if np.abs(after[key] - before[key]).max() > 1e-3]
    assert len(moved) >= 5


@pytest.mark.parametrize("name", OURS)
def test_stacked_layers_move_like_single_ones(name):
    rng = np.random.default_rng(0)
    kernels = rng.normal(size=(3, 4, 5)).astype(np.float32)
    single = {"layers": {str(i): {"q": {"kernel": jnp.asarray(kernels[i])}} for i in range(3)}}
    whole = {"layers": {"0:3": {"q": {"kernel": jnp.asarray(kernels)}}}}
    config = jpeft.LoraConfig(r=2, lora_alpha=5, target_modules=["q"])
    shapes = {"lora_A": (3, 2, 4), "lora_B": (3, 5, 2)}
    draws = [{n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()} for _ in range(4)]

    def run(base: dict[str, Any], pick: Any) -> dict[Any, np.ndarray]:
        wrapped, tx = jpeft.wrap(base, config), OURS[name]()
        params, *gradients = (with_arrays(wrapped, pick(arrays)) for arrays in draws)
        state = tx.init(params)
        for grads in gradients:
            with promotion(name):
                updates, state = jax.jit(tx.update)(grads, state, params)
            params = optax.apply_updates(params, updates)
        return arrays_of(params)

    together = run(whole, lambda arrays: {("layers.0:3.q", n): a for n, a in arrays.items()})
    apart = run(single, lambda arrays: {(f"layers.{i}.q", n): a[i] for n, a in arrays.items() for i in range(3)})
    assert together.keys() == apart.keys()
    for key, want in apart.items():
        np.testing.assert_allclose(together[key], want, rtol=1e-5, atol=1e-6)
