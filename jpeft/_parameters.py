"""Parameters as targets: PEFT's `target_parameters`, which means the weights of modules by their own names.

In PyTorch it is the way to adapt what is no layer: the experts of a mixture, stacked in one parameter, and routers.
"""

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

from ._contract import EMBEDDING, INPUT, LINEAR, OUTPUT, STACK, Method, Site
from ._paths import WEIGHT_NAMES, last_name, parent
from ._patterns import matches
from ._sites import Candidate

WEIGHT = "weight"
"""What PyTorch calls the parameter of a layer that has one of `WEIGHT_NAMES` here."""

# A parameter's product is not seen by PEFT, only its value; it can have nothing that needs the product's input.
PLAIN = {
    "lora_dropout": 0.0,
    "fan_in_fan_out": False,
    "lora_bias": False,
    "use_dora": False,
    "use_qalora": False,
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "kasa_config": None,
    "monteclora_config": None,
    "use_bdlora": None,
    "velora_config": None,
}


def parameter_path(leaf: str) -> str:
    """The path of a leaf as PyTorch calls the parameter.

    >>> parameter_path("layers.0.mlp.gate.kernel"), parameter_path("layers.0.mlp.experts.down_proj")
    ('layers.0.mlp.gate.weight', 'layers.0.mlp.experts.down_proj')
    """
    return f"{parent(leaf)}.{WEIGHT}".lstrip(".") if last_name(leaf) in WEIGHT_NAMES else leaf


def is_parameter(site: Site) -> bool:
    """Whether a site is a parameter by itself rather than the weight of a module.

    >>> is_parameter(Site("mlp.gate.weight", "mlp.gate.kernel", None, "io", (4, 2), "float32"))
    True
    """
    return parent(site.path) == parent(site.leaf)


def parameter_sites(
    leaves: Mapping[str, Any], found: Mapping[str, Candidate], config: Any, method: Method
) -> dict[str, Site]:
    """The sites of `config.target_parameters` by the paths of the parameters, in the tree's order.

    A name means the parameter that equals it or ends in `.name`; exclude_modules and layers_to_transform have no say,
    as in PEFT. Raises ValueError for a parameter that is no matrix and no stack of matrices, whose layout is unknown,
    or that is a lookup table, and for a config that does more than add a low-rank product; warns (UserWarning) about
    names that mean nothing.
    """
    names = getattr(config, "target_parameters", None)
    if not names:
        return {}
    paths = {leaf: parameter_path(leaf) for leaf in leaves}
    meant = {leaf: path for leaf, path in paths.items() if matches(path, names) or matches(leaf, names)}
    idle = [name for name in names if not any(matches(path, [name]) for path in (*meant, *meant.values()))]
    if idle:
        warnings.warn(f"target_parameters entries that match no parameter: {', '.join(map(repr, idle))}", stacklevel=5)
    if meant:
        _check_plain(config, method)
    by_leaf = {candidate.leaf: candidate for candidate in found.values()}
    return {path: _site(leaf, path, leaves[leaf], by_leaf.get(leaf)) for leaf, path in meant.items()}


def _site(leaf: str, path: str, array: Any, candidate: Candidate | None) -> Site:
    if candidate is None:
        raise ValueError(
            f"target_parameters means {leaf!r} of shape {tuple(getattr(array, 'shape', ()))}; expected a parameter of "
            "two axes, or three of which one stacks experts"
        )
    if candidate.kind == EMBEDDING:
        raise ValueError(
            f"target_parameters means {leaf!r}, the table of a lookup; name its module in target_modules instead"
        )
    bare = last_name(leaf) not in WEIGHT_NAMES
    if bare and candidate.layout == INPUT + OUTPUT and not candidate.explicit:
        # PyTorch has such a parameter as it is here, and PEFT takes any matrix for (out, in).
        candidate = dataclasses.replace(candidate, layout=OUTPUT + INPUT)
    site = candidate.site()
    if site.kind != LINEAR or len(site.stack) > 1 or len(site.shape) > 3:
        raise ValueError(
            f"target_parameters means {leaf!r} of shape {site.shape} and layout {site.layout!r}; expected a parameter "
            f"of two axes, or three of which one is a stack of experts ({STACK!r})"
        )
    return dataclasses.replace(site, path=path)


def _check_plain(config: Any, method: Method) -> None:
    for name, plain in PLAIN.items():
        value = getattr(config, name, plain)
        if value != plain:
            raise ValueError(
                f"target_parameters={config.target_parameters!r} with {name}={value!r}; a parameter can only have a "
                f"plain low-rank product added: expected {name}={plain!r}"
            )
    if method.factors is None:
        raise ValueError(f"target_parameters={config.target_parameters!r} with a method without low-rank factors")


def check_disjoint(modules: Mapping[str, Site], parameters: Mapping[str, Site]) -> None:
    """Raise ValueError if a parameter belongs to a module that is adapted as such."""
    owners = {site.leaf: path for path, site in modules.items()}
    for path, site in parameters.items():
        if site.leaf in owners:
            raise ValueError(
                f"target_parameters means {path!r}, which target_modules means as well ({owners[site.leaf]!r}); name "
                "it in one of them"
            )
