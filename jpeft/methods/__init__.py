"""One short file a method; importing this package makes them all known. Variants of LoRA have no name of their own."""

from . import (
    bdlora as bdlora,
    dora as dora,
    kasa as kasa,
    lora_bias as lora_bias,
    mica as mica,
    monteclora as monteclora,
    qalora as qalora,
    velora as velora,
)
