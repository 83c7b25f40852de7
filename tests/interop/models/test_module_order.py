"""The order of modules by their names, against the order in which the models of transformers register them."""

import functools
import importlib
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers.pytorch_utils import Conv1D  # noqa: E402

from jpeft._order import module_order, uncertain  # noqa: E402
from jpeft_interop.models import FAMILIES  # noqa: E402

KINDS = (torch.nn.Linear, Conv1D, torch.nn.Embedding, torch.nn.Conv1d, torch.nn.Conv2d)
CASES = [
    case
    for file in sorted(Path(__file__).parent.glob("cases_*.py"))
    for case in importlib.import_module(f"tests.interop.models.{file.stem}").CASES
]
UNTOLD = ("roberta", "xlm-roberta")
TYPED = ("bert", "deberta-v2", *UNTOLD)


@functools.cache
def registered():
    """{model_type: the names of the modules of each of its cases and tasks, as PyTorch has them}."""
    found = {}
    for case in CASES:
        config = case.config()
        own = found.setdefault(config.model_type, set())
        for task in case.tasks:
            with torch.device("meta"):
                model = getattr(transformers, FAMILIES[config.model_type].architectures[task].name)(config)
            own.add(tuple(name for name, module in model.named_modules() if isinstance(module, KINDS)))
    return found


def test_every_family_is_here():
    assert registered().keys() == set(FAMILIES)


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_names_tell_the_order_or_that_they_do_not(model_type):
    for names in registered()[model_type]:
        doubtful = uncertain(names)
        assert not doubtful or model_type in TYPED
        assert doubtful or module_order(reversed(names)) == list(names)


def test_what_names_do_not_tell_is_the_heads_and_the_types_of_tokens():
    for model_type in TYPED:
        for names in registered()[model_type]:
            heads = ("classifier", "lm_head", "qa_outputs")
            kept = [name for name in names if not name.startswith(heads) and "token_type" not in name]
            assert module_order(reversed(kept)) == kept and not uncertain(kept)


def test_the_order_of_some_modules_is_that_of_all():
    """Where the output layer, which tells of a late query, is not adapted."""
    for model_type in ("opt", "llama", "whisper", "t5"):
        names = max(registered()[model_type], key=len)
        some = [name for name in names if name.endswith(("q_proj", "v_proj", ".q", ".v"))]
        assert module_order(sorted(some)) == some
