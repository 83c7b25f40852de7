"""What the comparisons of prompts with PEFT share."""

import functools

import pytest


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """pair(name): a tiny random model of a kind, in PyTorch and here, made once for all files."""
    # Late, as PyTorch need not be there.
    from tests.interop.prompt_models import pair_of

    root = tmp_path_factory.mktemp("prompts")
    return functools.cache(lambda name: pair_of(name, root / name.replace(" ", "_")))
