"""Parameter-efficient fine-tuning for JAX: adapters beside any parameter tree, in PEFT's file format."""

from ._config import PeftConfig as PeftConfig
from ._config import PeftType as PeftType
from ._config import TaskType as TaskType
from ._config import TunerConfig as TunerConfig
from ._lift import Explanation as Explanation
from ._lift import explain as explain
from ._lift import infer_layouts as infer_layouts
from ._lift import lift as lift
from ._merge import merge as merge
from ._params import Adapter as Adapter
from ._params import PeftParams as PeftParams
from ._params import with_context as with_context
from ._train import combine as combine
from ._train import count_parameters as count_parameters
from ._train import grad as grad
from ._train import partition as partition
from ._train import print_trainable_parameters as print_trainable_parameters
from ._train import trainable_mask as trainable_mask
from ._train import value_and_grad as value_and_grad
from ._wrap import disable_adapters as disable_adapters
from ._wrap import set_adapter as set_adapter
from ._wrap import unwrap as unwrap
from ._wrap import wrap as wrap
from .methods.lora import LoraConfig as LoraConfig
