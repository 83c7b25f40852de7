"""Parameter-efficient fine-tuning for JAX: adapters beside any parameter tree, in PEFT's file format."""

from ._activation import alora_offsets as alora_offsets
from ._adalora import (
    adalora_orthogonality_loss as adalora_orthogonality_loss,
    adalora_rank_allocator as adalora_rank_allocator,
    adalora_sliced as adalora_sliced,
)
from ._adamss import adamss_allocation as adamss_allocation
from ._adapters import (
    delete_adapter as delete_adapter,
    rename_adapter as rename_adapter,
    rescale_adapter_scale as rescale_adapter_scale,
)
from ._adaption import adaption_attention as adaption_attention, adaption_prompts as adaption_prompts
from ._arrow import create_arrow_adapter as create_arrow_adapter
from ._capture import capture_inputs as capture_inputs
from ._checkpoint import Checkpointer as Checkpointer
from ._chunked_loss import chunked_cross_entropy as chunked_cross_entropy
from ._config import (
    PeftConfig as PeftConfig,
    PeftType as PeftType,
    PromptLearningConfig as PromptLearningConfig,
    TaskType as TaskType,
    TunerConfig as TunerConfig,
)
from ._context import with_context as with_context
from ._conversion import convert_to_plain_lora as convert_to_plain_lora
from ._convert import convert_to_lora as convert_to_lora, reduce_intruder_dimension as reduce_intruder_dimension
from ._corda import (
    corda_covariances as corda_covariances,
    initialize_lora_corda_weights as initialize_lora_corda_weights,
)
from ._cpt import cpt_loss as cpt_loss
from ._eva import initialize_lora_eva_weights as initialize_lora_eva_weights
from ._hotswap import hotswap as hotswap, prepare_for_hotswap as prepare_for_hotswap, trimmed as trimmed
from ._key_value_prefix import (
    compose_cartridges as compose_cartridges,
    initialize_kv_prefix_from_past_key_values as initialize_kv_prefix_from_past_key_values,
    key_value_prefix as key_value_prefix,
)
from ._lift import Explanation as Explanation, explain as explain, infer_layouts as infer_layouts, lift as lift
from ._loftq import initialize_lora_loftq_weights as initialize_lora_loftq_weights
from ._lora_ga import (
    initialize_lora_ga_weights as initialize_lora_ga_weights,
    lora_ga_gradients as lora_ga_gradients,
)
from ._merge import merge as merge
from ._mixed import mixed_batch as mixed_batch, unmixed as unmixed
from ._optimizers import (
    create_lorafa_optimizer as create_lorafa_optimizer,
    create_loraplus_optimizer as create_loraplus_optimizer,
    create_riemannian_optimizer as create_riemannian_optimizer,
)
from ._osf import osf_gradient_projection as osf_gradient_projection
from ._params import Adapter as Adapter, PeftParams as PeftParams
from ._population import (
    population_axes as population_axes,
    stack_adapters as stack_adapters,
    unstack_adapters as unstack_adapters,
)
from ._quantize import dequantize as dequantize, quantize as quantize
from ._quantized import Quantized as Quantized
from ._remat import save_adapted_products as save_adapted_products
from ._shadow import shadow_injection as shadow_injection, shadow_update as shadow_update
from ._shardings import shardings as shardings
from ._task_vectors import (
    calculate_majority_sign_mask as calculate_majority_sign_mask,
    dare_linear as dare_linear,
    dare_ties as dare_ties,
    disjoint_merge as disjoint_merge,
    magnitude_prune as magnitude_prune,
    prune as prune,
    task_arithmetic as task_arithmetic,
    ties as ties,
)
from ._train import (
    combine as combine,
    count_parameters as count_parameters,
    grad as grad,
    partition as partition,
    print_trainable_parameters as print_trainable_parameters,
    trainable_mask as trainable_mask,
    value_and_grad as value_and_grad,
)
from ._train_state import TrainState as TrainState, train_state as train_state
from ._train_step import make_train_step as make_train_step
from ._virtual_tokens import with_virtual_tokens as with_virtual_tokens
from ._weighted import add_weighted_adapter as add_weighted_adapter
from ._wrap import disable_adapters as disable_adapters, set_adapter as set_adapter, unwrap as unwrap, wrap as wrap
from ._xlora import (
    create_xlora_adapter as create_xlora_adapter,
    with_xlora_scalings as with_xlora_scalings,
    xlora_scalings as xlora_scalings,
)
from .methods import lora_residual as _lora_residual  # noqa: F401 (its methods register themselves)
from .methods._cpt_projection import cpt_projection as cpt_projection
from .methods._frod_config import FrodConfig as FrodConfig
from .methods._initialisations import (
    CordaConfig as CordaConfig,
    EvaConfig as EvaConfig,
    LoftQConfig as LoftQConfig,
    LoraGAConfig as LoraGAConfig,
)
from .methods._lora_config import (
    ArrowConfig as ArrowConfig,
    BdLoraConfig as BdLoraConfig,
    KasaConfig as KasaConfig,
    MontecloraConfig as MontecloraConfig,
    VeloraConfig as VeloraConfig,
)
from .methods._xlora_config import XLoraConfig as XLoraConfig
from .methods.adalora import AdaLoraConfig as AdaLoraConfig
from .methods.adamss import AdamssConfig as AdamssConfig
from .methods.adaption_prompt import AdaptionPromptConfig as AdaptionPromptConfig
from .methods.beft import BeftConfig as BeftConfig
from .methods.boft import BOFTConfig as BOFTConfig
from .methods.c3a import C3AConfig as C3AConfig
from .methods.cartridge import CartridgeConfig as CartridgeConfig
from .methods.cpt import CPTConfig as CPTConfig
from .methods.deft import DeftConfig as DeftConfig
from .methods.delora import DeloraConfig as DeloraConfig
from .methods.fourierft import FourierFTConfig as FourierFTConfig
from .methods.glora import GloraConfig as GloraConfig
from .methods.gralora import GraloraConfig as GraloraConfig
from .methods.hira import HiraConfig as HiraConfig
from .methods.hra import HRAConfig as HRAConfig
from .methods.ia3 import IA3Config as IA3Config
from .methods.kasa import kasa_loss as kasa_loss
from .methods.lily import LilyConfig as LilyConfig
from .methods.ln_tuning import LNTuningConfig as LNTuningConfig
from .methods.loha import LoHaConfig as LoHaConfig
from .methods.lokr import LoKrConfig as LoKrConfig
from .methods.lora import LoraConfig as LoraConfig
from .methods.miss import MissConfig as MissConfig
from .methods.monteclora import monteclora_loss as monteclora_loss
from .methods.multitask_prompt_tuning import MultitaskPromptTuningConfig as MultitaskPromptTuningConfig
from .methods.oft import OFTConfig as OFTConfig, oft_projection as oft_projection
from .methods.osf import OSFConfig as OSFConfig
from .methods.p_tuning import PromptEncoderConfig as PromptEncoderConfig
from .methods.peanut import PeanutConfig as PeanutConfig
from .methods.poly import PolyConfig as PolyConfig
from .methods.prefix_tuning import PrefixTuningConfig as PrefixTuningConfig
from .methods.prompt_tuning import PromptTuningConfig as PromptTuningConfig
from .methods.psoft import PsoftConfig as PsoftConfig
from .methods.pvera import PveraConfig as PveraConfig
from .methods.randlora import RandLoraConfig as RandLoraConfig
from .methods.road import RoadConfig as RoadConfig
from .methods.shadow import ShadowConfig as ShadowConfig
from .methods.shira import ShiraConfig as ShiraConfig
from .methods.supertuning import SupertuningConfig as SupertuningConfig
from .methods.tinylora import TinyLoraConfig as TinyLoraConfig
from .methods.trainable_tokens import TrainableTokensConfig as TrainableTokensConfig
from .methods.unilora import UniLoraConfig as UniLoraConfig
from .methods.vblora import VBLoRAConfig as VBLoRAConfig
from .methods.vera import VeraConfig as VeraConfig
from .methods.waveft import WaveFTConfig as WaveFTConfig
