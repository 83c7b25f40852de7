"""LoRA's rows; its options have tables of their own (test_round_trip.py, test_lora_variants_vs_peft.py)."""

from tests.interop.methods.parity import Row

ROWS = [
    Row("lora", "LoraConfig", {"r": 3, "target_modules": ["embed", "conv", "first", "second"]}),
    Row("lora, images", "LoraConfig", {"r": 2, "target_modules": ["conv", "next", "head"]}, "images"),
    Row("lora, volumes", "LoraConfig", {"r": 2, "target_modules": ["conv"]}, "volumes"),
    Row("lora, blocks", "LoraConfig", {"r": 2, "target_modules": ["q_proj", "down_proj"]}, "blocks"),
    Row("lora, transposed", "LoraConfig", {"r": 2, "target_modules": ["first"], "fan_in_fan_out": True}, "transposed"),
]
