"""The public names: adding or removing one is a decision, made here."""

import inspect
import types

import pytest

import jpeft

PUBLIC = """
Adapter Explanation LoraConfig PeftConfig PeftParams PeftType TaskType TunerConfig combine count_parameters
disable_adapters explain grad infer_layouts lift merge partition print_trainable_parameters set_adapter trainable_mask
unwrap value_and_grad with_context wrap
""".split()


def test_public_names():
    found = [name for name in dir(jpeft) if not name.startswith("_")]
    assert sorted(name for name in found if not isinstance(getattr(jpeft, name), types.ModuleType)) == PUBLIC


def test_public_modules():
    modules = [name for name in dir(jpeft) if isinstance(getattr(jpeft, name), types.ModuleType)]
    assert [name for name in modules if not name.startswith("_")] == ["methods"]


@pytest.mark.parametrize("name", PUBLIC)
def test_every_name_says_what_it_is(name):
    assert inspect.getdoc(getattr(jpeft, name))
