"""X-LoRA's router, made of adapters that are there already, and its two runs of a model."""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ._arrays import single_sites
from ._arrow import check_choosable
from ._config import PeftType
from ._contract import Site, config_class, wide_dtype, wider
from ._low_rank import padded
from ._params import Adapter, PeftParams, Sites
from ._paths import fold_in_name, leaves_by_path
from ._wrap import abstract_adapter, check_name, checked_key, checked_names, checked_params, initial_adapter

SCALINGS = "xlora_scalings"


def create_xlora_adapter(
    wrapped: PeftParams,
    adapter_names: Sequence[str],
    config: Any,
    adapter_name: str = "xlora",
    *,
    rng: jax.Array | None = None,
    dtype: Any = jnp.float32,
) -> PeftParams:
    """The same parameters with a router more, which weighs several LoRA adapters for each token (X-LoRA).

    adapter_names: of the experts, in the order of the router's arrays. config: its `adapters` and `experts` are filled
    in. rng, dtype: of the classifier's initial values.
    The router waits for `set_adapter`. It holds copies of what the experts are now: delete them if they are not needed
    by themselves. Ranks and modules may differ; an expert adds nothing where it has no module. The classifier trains,
    with `use_trainable_adapters` the copies, too. Works on abstract trees. A function that is lifted then needs
    `with_xlora_scalings`.
    Raises TypeError for another config and for adapters that are not plain LoRA of linear layers, and ValueError for
    unknown names and a taken one, no hidden_size, fewer experts than top_k_lora, and adapters that train more than
    their factors or have other layouts.
    Of https://arxiv.org/abs/2402.07148; the numbers are PEFT's.

    >>> import jpeft
    >>> config = jpeft.LoraConfig(r=2, target_modules=["query"], init_lora_weights=False)
    >>> wrapped = jpeft.wrap({"query": {"kernel": jnp.ones((4, 6))}}, config, adapter_name="law")
    >>> wrapped = jpeft.wrap(wrapped, config, adapter_name="poems", rng=jax.random.key(1))
    >>> wrapped = create_xlora_adapter(wrapped, ["law", "poems"], jpeft.XLoraConfig(hidden_size=4))
    >>> jax.tree.map(jnp.shape, wrapped.adapters["xlora"].shared)["internal_xlora_classifier.layers.0.weight"]
    (2, 4)
    """
    names = checked_names(checked_params(wrapped), adapter_names)
    check_name(adapter_name, wrapped.adapters)
    router = router_among(wrapped, names, config, rng, dtype)
    return dataclasses.replace(wrapped, adapters={**wrapped.adapters, adapter_name: router})


def router_among(
    wrapped: PeftParams, names: Sequence[str], config: Any, rng: jax.Array | None = None, dtype: Any = jnp.float32
) -> Adapter:
    """The router among these adapters of the parameters; raises what `create_xlora_adapter` does."""
    experts = {name: wrapped.adapters[name] for name in names}
    _check(config, experts)
    sites = _all_sites(experts)
    own = config.with_experts({name: (expert.config, _ranks(expert)) for name, expert in experts.items()})
    leaves = leaves_by_path(wrapped.base)
    adapted = {path: leaves[site.leaf] for path, site in sites.items()}
    parts = {name: (expert.weights, expert.scaling) for name, expert in experts.items()}
    abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves((adapted, parts)))
    begin = abstract_adapter if abstract else initial_adapter
    adapter = begin(checked_key(rng), adapted, sites, own, dtype)
    stack = functools.partial(_stacked, sites=sites)
    stacks = jax.eval_shape(stack, parts) if abstract else stack(parts)
    weights = {path: {**arrays, **stacks[path]} for path, arrays in adapter.weights.items()}
    return dataclasses.replace(adapter, weights=weights)


def experts_of(router: Adapter) -> dict[str, Adapter]:
    """The experts of a router by name, each as a LoRA adapter by itself: what `create_xlora_adapter` was given."""
    config: Any = router.config
    return {name: _expert(router, number) for number, name in enumerate(config.adapters)}


def is_router(adapter: Adapter) -> bool:
    """Whether an adapter is an X-LoRA router."""
    return adapter.config.peft_type == PeftType.XLORA


def router_of(wrapped: PeftParams) -> tuple[str, Adapter] | None:
    """The name and the adapter of the active router, if there is one; raises ValueError if there are several."""
    found = [name for name in checked_params(wrapped).active if is_router(wrapped.adapters[name])]
    if len(found) > 1:
        raise ValueError(f"the X-LoRA adapters {found} are all active; expected one of them: jpeft.set_adapter")
    return (found[0], wrapped.adapters[found[0]]) if found else None


def with_xlora_scalings(wrapped: PeftParams, last_hidden_state: Callable[[PeftParams], jax.Array]) -> PeftParams:
    """The same parameters with how much each expert counts for each token of a batch: X-LoRA's first run of the model.

    last_hidden_state(params) -> (rows, tokens, hidden_size): of the batch, by the parameters it is given, in which the
    experts are off, or weigh `scaling_pass_value`. The result is for one call, with the same batch, of the lifted
    function, and goes under one `jit` with it; a gradient reaches the classifier by it, and nothing of the first run,
    as in PEFT. Without an active X-LoRA adapter the parameters come back as they are.
    Raises ValueError as `xlora_scalings` does.

    >>> import jpeft
    >>> params = {"up": {"kernel": jnp.ones((4, 4))}, "down": {"kernel": jnp.ones((4, 2))}}
    >>> config = jpeft.LoraConfig(r=2, target_modules=["down"])
    >>> wrapped = jpeft.wrap(params, config, adapter_name="law")
    >>> wrapped = jpeft.create_xlora_adapter(wrapped, ["law"], jpeft.XLoraConfig(hidden_size=4))
    >>> hidden = jpeft.lift(lambda params, x: x @ params["up"]["kernel"])
    >>> model = jpeft.lift(lambda params, x: x @ params["up"]["kernel"] @ params["down"]["kernel"])
    >>> x = jnp.ones((1, 3, 4))
    >>> wrapped = with_xlora_scalings(jpeft.set_adapter(wrapped, "xlora"), lambda params: hidden(params, x))
    >>> wrapped.context["xlora_scalings"].shape, model(wrapped, x).shape
    ((1, 3, 1, 1), (1, 3, 2))
    """
    if router_of(wrapped) is None:
        return wrapped
    with warnings.catch_warnings():
        # What comes after the last hidden state may be adapted, too.
        warnings.filterwarnings("ignore", message="the function uses no weight of")
        state = lax.stop_gradient(last_hidden_state(first_pass(wrapped)))
    return dataclasses.replace(wrapped, context={**wrapped.context, SCALINGS: xlora_scalings(wrapped, state)})


def first_pass(wrapped: PeftParams) -> PeftParams:
    """The parameters for the run that hidden states are made in: every expert weighs `scaling_pass_value`."""
    found = router_of(wrapped)
    if found is None:
        return wrapped
    name, config = found[0], _config(found[1])
    context = {key: value for key, value in wrapped.context.items() if key != SCALINGS}
    if not config.scaling_pass_value:
        others = tuple(active for active in wrapped.active if active != name)
        return dataclasses.replace(wrapped, active=others, context=context)
    dtype = wide_dtype(found[1].shared[f"{config.layers[0]}.weight"].dtype)
    alike = jnp.full((1, 1, 1, len(config.experts)), config.scaling_pass_value, dtype)
    return dataclasses.replace(wrapped, context={**context, SCALINGS: alike})


def xlora_scalings(wrapped: PeftParams, hidden_state: Any) -> jax.Array:
    """How much each expert of the active X-LoRA adapter counts: (rows, tokens, layers or 1, experts), float32.

    hidden_state (rows, tokens, hidden_size): the last one of the model without its experts. With
    `layerwise_scalings` there is an entry for each adapted module in PyTorch's order, else one for all. A key in the
    context turns the classifier's dropout on. `top_k_lora` and what follows from it is applied in each layer.
    Raises ValueError if no X-LoRA adapter is active, or for hidden states of another form or size.

    >>> import jpeft
    >>> config = jpeft.LoraConfig(r=2, target_modules=["q"])
    >>> wrapped = jpeft.wrap({"q": {"kernel": jnp.ones((4, 6))}}, config, adapter_name="law")
    >>> wrapped = jpeft.create_xlora_adapter(wrapped, ["law"], jpeft.XLoraConfig(hidden_size=4))
    >>> xlora_scalings(jpeft.set_adapter(wrapped, "xlora"), jnp.ones((1, 2, 4))).tolist()
    [[[[1.0]], [[1.0]]]]
    """
    found = router_of(wrapped)
    if found is None:
        raise ValueError(
            f"no X-LoRA adapter is active: {', '.join(wrapped.active) or 'none at all'}; expected one, such as "
            "jpeft.create_xlora_adapter makes: jpeft.set_adapter"
        )
    name, router = found
    config, state = _config(router), jnp.asarray(hidden_state)
    if state.ndim != 3 or state.shape[-1] != config.hidden_size:
        raise ValueError(
            f"the hidden state is of shape {state.shape}; expected (rows, tokens, {config.hidden_size}), as "
            f"hidden_size of adapter {name!r} is {config.hidden_size}"
        )
    rng = wrapped.context.get("rng")
    wide = wide_dtype(router.shared[f"{config.layers[0]}.weight"].dtype)
    state = state.astype(wide)
    for number, layer in enumerate(config.layers):
        if number:
            key = None if rng is None else fold_in_name(rng.key(), f"{name}/{layer}")
            state = _dropped(jax.nn.relu(state), config.xlora_dropout_p, key)
        weight, bias = (router.shared[f"{layer}.{array}"].astype(wide) for array in ("weight", "bias"))
        state = state @ weight.T + bias
    scalings = state.reshape(*state.shape[:2], -1, len(config.experts))
    return jax.nn.softmax(scalings / config.softmax_temperature) if config.enable_softmax else scalings


def _dropped(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    if key is None or not rate:
        return x
    return jnp.where(jax.random.bernoulli(key, 1.0 - rate, x.shape), x / (1.0 - rate), 0.0)


def _config(router: Adapter) -> Any:
    return router.config


def _check(config: Any, experts: Mapping[str, Adapter]) -> None:
    kind = config_class(PeftType.XLORA)
    if not isinstance(config, kind):
        raise TypeError(f"config is {config!r}; expected a jpeft.{kind.__name__}")
    settings: Any = config
    if settings.hidden_size is None:
        raise ValueError("hidden_size is None; expected the size of the model's hidden states")
    if settings.top_k_lora is not None and settings.top_k_lora > len(experts):
        raise ValueError(
            f"top_k_lora is {settings.top_k_lora}, but there are {len(experts)} experts: {', '.join(experts)}; "
            "expected no more"
        )
    for name, expert in experts.items():
        check_choosable(name, expert)


def _all_sites(experts: Mapping[str, Adapter]) -> Sites:
    sites: dict[str, Site] = {}
    for name, expert in experts.items():
        for path, site in expert.sites.items():
            if sites.setdefault(path, site) != site:
                raise ValueError(
                    f"adapter {name!r} acts on {path!r} as {site}, another one as {sites[path]}; expected experts that "
                    "were wrapped with the same layouts"
                )
    return Sites(sites)


def _ranks(expert: Adapter) -> dict[str, int]:
    return {
        single.path: expert.weights[path]["lora_A"].shape[-2]
        for path, site in expert.sites.items()
        for single in single_sites(site)
    }


def _stacked(
    experts: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]], sites: Mapping[str, Site]
) -> dict[str, dict[str, jax.Array]]:
    """The experts' arrays one behind the other, after the sites' stack axes; zeros where one has no module."""
    found: dict[str, dict[str, jax.Array]] = {}
    for path, site in sites.items():
        own = [weights.get(path) for weights, _ in experts.values()]
        held = [arrays for arrays in own if arrays is not None]
        rank = max(arrays["lora_A"].shape[-2] for arrays in held)
        dtype = functools.reduce(wider, [array.dtype for arrays in held for array in arrays.values()])
        empty = {
            "lora_A": jnp.zeros((*site.stack, rank, site.in_features), dtype),
            "lora_B": jnp.zeros((*site.stack, site.out_features, rank), dtype),
        }
        pairs = [empty if arrays is None else arrays for arrays in own]
        factors = [padded(p["lora_A"].astype(dtype), p["lora_B"].astype(dtype), rank) for p in pairs]
        scalings = [scaling.get(path, jnp.zeros(site.stack, jnp.float32)) for _, scaling in experts.values()]
        axis = len(site.stack)
        a, b = (jnp.stack(group, axis) for group in zip(*factors, strict=True))
        found[path] = {"xlora_A": a, "xlora_B": b, "xlora_scaling": jnp.stack(scalings, axis)}
    return found


def _expert(router: Adapter, number: int) -> Adapter:
    record = _config(router).experts[number]
    weights, scaling, sites = dict[str, dict[str, Any]](), dict[str, Any](), dict[str, Site]()
    for path, site in router.sites.items():
        rank = record.ranks.get(single_sites(site)[0].path)
        if rank is not None:
            cut = functools.partial(_cut, number=number, rank=rank, axis=len(site.stack))
            arrays = router.weights[path]
            abstract = any(isinstance(array, jax.ShapeDtypeStruct) for array in arrays.values())
            weights[path], scaling[path] = jax.eval_shape(cut, arrays) if abstract else cut(arrays)
            sites[path] = site
    return Adapter(weights, {}, {}, scaling, record.config, Sites(sites))


def _cut(arrays: Mapping[str, jax.Array], number: int, rank: int, axis: int) -> tuple[dict[str, jax.Array], jax.Array]:
    a, b, scaling = (
        lax.index_in_dim(arrays[name], number, axis, keepdims=False) for name in ("xlora_A", "xlora_B", "xlora_scaling")
    )
    return {"lora_A": a[..., :rank, :], "lora_B": b[..., :rank]}, scaling
