"""Everything that knows Hugging Face: PEFT's adapter files, and base models with the names of `transformers`."""

from ._arrow import create_arrow_model as create_arrow_model
from ._auto_peft import (
    AutoPeftModel as AutoPeftModel,
    AutoPeftModelForCausalLM as AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction as AutoPeftModelForFeatureExtraction,
    AutoPeftModelForQuestionAnswering as AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSeq2SeqLM as AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification as AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification as AutoPeftModelForTokenClassification,
    PeftConfig as PeftConfig,
)
from ._cartridge import (
    compose_cartridge_adapters as compose_cartridge_adapters,
    initialize_kv_prefix_from_text as initialize_kv_prefix_from_text,
    key_value_cache as key_value_cache,
    keys_and_values as keys_and_values,
)
from ._inject import inject_adapter_in_model as inject_adapter_in_model
from ._inputs import prepare_inputs as prepare_inputs
from ._load import load_adapter as load_adapter, load_config as load_config, load_pretrained as load_pretrained
from ._peft_model import PeftModel as PeftModel
from ._peft_tasks import (
    PeftModelForCausalLM as PeftModelForCausalLM,
    PeftModelForFeatureExtraction as PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering as PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM as PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification as PeftModelForSequenceClassification,
    PeftModelForTokenClassification as PeftModelForTokenClassification,
    get_peft_model as get_peft_model,
)
from ._save import save_pretrained as save_pretrained
from ._state_dict import (
    get_peft_model_state_dict as get_peft_model_state_dict,
    set_peft_model_state_dict as set_peft_model_state_dict,
)
from ._status import (
    TunerLayerStatus as TunerLayerStatus,
    TunerModelStatus as TunerModelStatus,
    get_layer_status as get_layer_status,
    get_model_status as get_model_status,
)
from ._verify import Report as Report, verify as verify
from .plan import Plan as Plan, StepPlan as StepPlan, plan as plan
