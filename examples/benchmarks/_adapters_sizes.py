"""What `adapters.py` measures, the same in jpeft and in PyTorch PEFT."""

from _models import Shape

LLAMA = Shape(4096, 11008, 32, 32, 32000)
SMALL = Shape(64, 128, 2, 32, 256)
LOADED = 18  # adapters beside the first one, before the 20th is loaded
MIXED = (4, 32)


def population_names(members: int, hidden: int) -> tuple[str, str, str]:
    what = f"a step of {members} adapters, width {hidden}"
    return f"{what}: one by one", f"{what}: as a population", f"{what}: the base's products alone"
