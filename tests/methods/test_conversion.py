"""Adapters of any method that changes weights alone as LoRA: what is merged is the same, at a rank that suffices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft._contract import EMBEDDING, method_of
from jpeft._low_rank import is_plain_lora
from jpeft._paths import leaves_by_path
from tests.cases import METHODS
from tests.harness import QUICKLY, Problem, adapted, assert_close, random_like

CONFIGS = {row.name: row.config(**row.options) for row in METHODS}
ROWS = [
    row
    for row in METHODS
    if row.mergeable and not method_of(CONFIGS[row.name]).changes_bias and not is_plain_lora(CONFIGS[row.name])
]


# With the same largest rank everywhere, 4, which then is the rank of the conversion.
SHAPES = {"query": {"kernel": (4, 6), "bias": (6,)}, "0:2": {"value": {"kernel": (2, 4, 4)}}}
TABLE = {"embed": {"embedding": (7, 4)}}


def problem(row):
    shapes = {**SHAPES, **(TABLE if EMBEDDING in method_of(CONFIGS[row.name]).kinds else {})}
    return Problem(lambda params: params, random_like(shapes, 7, 1.0), (), {"0:2.value.kernel": "bio"})


def changes(wrapped, name):
    merged, base = (leaves_by_path(tree) for tree in (jpeft.merge(wrapped, adapter_names=name), wrapped.base))
    return {path: merged[path] - base[path] for path in merged}


def both_changes(wrapped):
    """(of the converted adapter, of the adapter)"""
    converted = jpeft.convert_to_lora(wrapped, "default", 4, "lora", dtype=jnp.float64)
    return changes(converted, "lora"), changes(wrapped, "default")


def test_the_methods_that_peft_converts_are_among_them():
    files = {row.file for row in METHODS if row.file}
    known = "c3a delora fourierft gralora loha lokr miss psoft randlora tinylora unilora vblora vera waveft".split()
    wanted = {f"{name}.py" for name in known} & files
    assert wanted <= {row.file for row in ROWS} and {"c3a.py", "vera.py", "vblora.py"} <= wanted


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_all_of_the_change_comes_along(row):
    """Layers of a stack and modules that share arrays, too."""
    got, want = jax.jit(both_changes, compiler_options=QUICKLY)(adapted(problem(row), row))
    assert_close(got, want, 1e-9)
    changed = {path for path, change in want.items() if np.abs(change).max() > 1e-3}
    assert changed >= {"query.kernel", "0:2.value.kernel"} and "query.bias" not in changed


def test_an_adapter_with_token_rows_keeps_them():
    params = {"embed": {"embedding": jnp.ones((5, 4))}, "q": {"kernel": jnp.ones((4, 6))}}
    config = jpeft.VeraConfig(r=2, target_modules=["q"])
    rows = jpeft.wrap(params, jpeft.LoraConfig(target_modules=["q"], use_dora=True, trainable_token_indices=[2]))
    new = jpeft.convert_to_lora(rows, "default", 2, "lora").adapters["lora"]
    assert list(new.rows) == ["embed.embedding"] and new.config.trainable_token_indices == (2,)
    assert jpeft.convert_to_lora(jpeft.wrap(params, config), "default", 2, "lora").adapters["lora"].rows == {}


def test_a_method_that_adapts_no_module_is_refused():
    wrapped = jpeft.wrap({"norm": {"scale": jnp.ones(4)}}, jpeft.LNTuningConfig(target_modules=["norm"]))
    with pytest.raises(TypeError, match="'default' with its LNTuningConfig adapts no module that LoRA could"):
        jpeft.convert_to_lora(wrapped, "default", 2, "lora")
