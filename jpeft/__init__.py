"""Parameter-efficient fine-tuning for JAX: adapters beside any parameter tree, in PEFT's file format."""

from ._config import PeftConfig as PeftConfig, PeftType as PeftType, TaskType as TaskType, TunerConfig as TunerConfig
from ._lift import Explanation as Explanation, explain as explain, infer_layouts as infer_layouts, lift as lift
from ._merge import merge as merge
from ._params import Adapter as Adapter, PeftParams as PeftParams, with_context as with_context
from ._train import (
    combine as combine,
    count_parameters as count_parameters,
    grad as grad,
    partition as partition,
    print_trainable_parameters as print_trainable_parameters,
    trainable_mask as trainable_mask,
    value_and_grad as value_and_grad,
)
from ._wrap import disable_adapters as disable_adapters, set_adapter as set_adapter, unwrap as unwrap, wrap as wrap
from .methods.lora import LoraConfig as LoraConfig
