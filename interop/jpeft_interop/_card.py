"""The model card that goes with an adapter."""

import json
from collections.abc import Sequence
from typing import Any

from jpeft import PeftConfig


def model_card(config: PeftConfig, base_model: str | None = None) -> str:
    """The text of a README.md that says what the folder holds, and nothing that nobody knows.

    >>> import jpeft
    >>> print(model_card(jpeft.LoraConfig(target_modules=["query"]), "some/base").split("---")[1])
    <BLANKLINE>
    library_name: peft
    base_model: "some/base"
    tags:
    - "base_model:adapter:some/base"
    - "lora"
    <BLANKLINE>
    """
    base = base_model or config.base_model_name_or_path
    lines = ["---", "library_name: peft"]
    # A JSON string is a YAML string, too, whatever characters are in it.
    lines += [f"base_model: {json.dumps(base)}"] if base else []
    lines += ["tags:", *(f"- {json.dumps(tag)}" for tag in card_tags(config, base)), "---", ""]
    lines += [f"# {_method(config)} adapter{f' for {base}' if base else ''}", ""]
    lines += ["Written by jpeft; PyTorch PEFT loads it, too: `peft.PeftModel.from_pretrained(model, folder)`.", ""]
    return "\n".join(lines)


def card_tags(config: PeftConfig, base_model: str | None) -> list[str]:
    return [*([f"base_model:adapter:{base_model}"] if base_model else []), _method(config).lower()]


def updated_card(text: str, *, tags: Sequence[str], pipeline_tag: str | None, base_model: str | None) -> str:
    """The text of a README.md with what the Hub reads brought up to date, and all else as it was.

    tags: are added to those that are there. pipeline_tag: is set if there is none.

    >>> print(updated_card("Mine.", tags=["lora"], pipeline_tag=None, base_model="some/base"))
    ---
    base_model: some/base
    library_name: peft
    tags:
    - lora
    ---
    Mine.
    """
    from huggingface_hub import ModelCard

    card = ModelCard(text)
    known: dict[str, Any] = {"base_model": base_model} if base_model else {}
    if pipeline_tag and not card.data.get("pipeline_tag"):
        known["pipeline_tag"] = pipeline_tag
    known |= {"library_name": "peft", "tags": sorted({*(card.data.get("tags") or ()), *tags})}
    for name, value in known.items():
        card.data[name] = value
    return str(card)


def _method(config: PeftConfig) -> str:
    return getattr(config.peft_type, "value", "adapter")
