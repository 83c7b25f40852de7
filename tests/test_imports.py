"""Imports point one way, versions of JAX are met in one place, and files stay short."""

import ast
import pathlib
import subprocess
import sys

import pytest

import jpeft
from tests.cases import METHODS
from tests.interop.beside_cases import BESIDE

ROOT = pathlib.Path(jpeft.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
METHOD_FILES = sorted(path for path in (ROOT / "methods").glob("*.py") if not path.name.startswith("_"))
HEAVY = ("jpeft_interop", "flax", "torch", "transformers", "safetensors", "huggingface_hub", "equinox", "haiku", "peft")
OF_METHODS = (
    "jpeft._begin",
    "jpeft._contract",
    "jpeft._config",
    "jpeft._decoder_blocks",
    "jpeft._patterns",
    "jpeft._shadow",
    "jpeft._torch_random",
    "jpeft.methods",
)

over_files = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))


def imported(path):
    """Every module that a file imports, in full; `from x import y` counts as both x and x.y."""
    package = ".".join(path.relative_to(ROOT.parent).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def within(module, packages):
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def test_the_reader_of_imports_sees_relative_ones():
    assert {"jpeft._config", "jpeft._contract.Site"} <= set(imported(ROOT / "methods" / "lora.py"))
    assert "jpeft._config.PeftConfig" in set(imported(ROOT / "__init__.py"))


@over_files
def test_nothing_heavy_and_nothing_private_of_jax(path):
    assert not [module for module in imported(path) if within(module, (*HEAVY, "jax._src"))]
    assert "jax._src" not in path.read_text()


@pytest.mark.parametrize("path", sorted((ROOT / "methods").glob("*.py")), ids=lambda path: path.name)
def test_methods_and_what_they_share_see_the_contract_alone(path):
    ours = {module for module in imported(path) if within(module, ("jpeft",))}
    assert ours or path not in METHOD_FILES
    assert not [module for module in ours if not within(module, OF_METHODS)]


@over_files
def test_the_engine_knows_no_method(path):
    allowed = path == ROOT / "__init__.py" or path.parent.name == "methods"
    assert allowed or not [module for module in imported(path) if within(module, ("jpeft.methods",))]


def test_what_depends_on_the_inside_of_jax_is_in_one_file():
    inside = [path.name for path in FILES if any(within(module, ("jax.extend",)) for module in imported(path))]
    assert inside == ["_jaxpr.py"]


def test_importing_jpeft_imports_nothing_heavy():
    code = f"import sys, jpeft; print([name for name in {(*HEAVY, 'orbax')!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_method_is_in_the_table():
    # A router is made of other adapters and not by `wrap`: tests/test_arrow.py; the others adapt no module of their
    # own: tests/methods/test_parts.py, tests/interop/test_laws_beside.py.
    apart = {"arrow.py", "ln_tuning.py", "trainable_tokens.py"} | {row.file for row in BESIDE}
    assert sorted({row.file for row in METHODS if row.file} | apart) == [path.name for path in METHOD_FILES]


@over_files
def test_files_stay_short(path):
    most = 200 if path.name == "lora.py" else 130 if path in METHOD_FILES else 450
    assert len(path.read_text().splitlines()) <= most
