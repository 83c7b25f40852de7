"""The model card that goes with an adapter."""

import json

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
    method = getattr(config.peft_type, "value", "adapter")
    tags = [*([f"base_model:adapter:{base}"] if base else []), method.lower()]
    lines = ["---", "library_name: peft"]
    # A JSON string is a YAML string, too, whatever characters are in it.
    lines += [f"base_model: {json.dumps(base)}"] if base else []
    lines += ["tags:", *(f"- {json.dumps(tag)}" for tag in tags), "---", ""]
    lines += [f"# {method} adapter{f' for {base}' if base else ''}", ""]
    lines += ["Written by jpeft; PyTorch PEFT loads it, too: `peft.PeftModel.from_pretrained(model, folder)`.", ""]
    return "\n".join(lines)
