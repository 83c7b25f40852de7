"""The public names: adding or removing one is a decision, made here."""

import inspect
import types

import pytest

import jpeft

PUBLIC = """
AdaLoraConfig AdamssConfig Adapter AdaptionPromptConfig ArrowConfig BOFTConfig BdLoraConfig BeftConfig C3AConfig
CPTConfig CartridgeConfig Checkpointer CordaConfig DeftConfig DeloraConfig EvaConfig Explanation FourierFTConfig
FrodConfig GloraConfig GraloraConfig HRAConfig HiraConfig IA3Config KasaConfig LNTuningConfig LilyConfig LoHaConfig
LoKrConfig LoftQConfig LoraConfig LoraGAConfig MissConfig MontecloraConfig MultitaskPromptTuningConfig OFTConfig
OSFConfig PeanutConfig PeftConfig PeftParams PeftType PolyConfig PrefixTuningConfig PromptEncoderConfig
PromptLearningConfig PromptTuningConfig PsoftConfig PveraConfig Quantized RandLoraConfig RoadConfig ShadowConfig
ShiraConfig SupertuningConfig TaskType TinyLoraConfig TrainState TrainableTokensConfig TunerConfig UniLoraConfig
VBLoRAConfig VeloraConfig VeraConfig WaveFTConfig XLoraConfig adalora_orthogonality_loss adalora_rank_allocator
adalora_sliced adamss_allocation adaption_attention adaption_prompts add_weighted_adapter alora_offsets
calculate_majority_sign_mask capture_inputs chunked_cross_entropy combine compose_cartridges convert_to_lora
convert_to_plain_lora corda_covariances count_parameters cpt_loss cpt_projection create_arrow_adapter
create_lorafa_optimizer create_loraplus_optimizer create_riemannian_optimizer create_xlora_adapter dare_linear
dare_ties delete_adapter dequantize disable_adapters disjoint_merge explain grad hotswap infer_layouts
initialize_kv_prefix_from_past_key_values initialize_lora_corda_weights initialize_lora_eva_weights
initialize_lora_ga_weights initialize_lora_loftq_weights kasa_loss key_value_prefix lift lora_ga_gradients
magnitude_prune make_train_step merge mixed_batch monteclora_loss oft_projection osf_gradient_projection partition
population_axes prepare_for_hotswap print_trainable_parameters prune quantize reduce_intruder_dimension rename_adapter
rescale_adapter_scale save_adapted_products set_adapter shadow_injection shadow_update shardings stack_adapters
task_arithmetic ties train_state trainable_mask trimmed unmixed unstack_adapters unwrap value_and_grad with_context
with_virtual_tokens with_xlora_scalings wrap xlora_scalings
""".split()


def test_public_names():
    found = [name for name in dir(jpeft) if not name.startswith("_")]
    assert sorted(name for name in found if not isinstance(getattr(jpeft, name), types.ModuleType)) == PUBLIC


def test_public_modules():
    modules = [name for name in dir(jpeft) if isinstance(getattr(jpeft, name), types.ModuleType)]
    assert [name for name in modules if not name.startswith("_")] == ["methods"]


@pytest.mark.parametrize("name", PUBLIC)
def test_every_name_says_what_it_is(name):
    assert inspect.getdoc(getattr(jpeft, name))
