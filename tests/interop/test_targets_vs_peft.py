"""The modules that a config selects, compared with those that PEFT itself adapts."""

import warnings

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: E402
from peft.utils.other import ModulesToSaveWrapper  # noqa: E402

import jpeft  # noqa: E402

LAYER = {
    "self_attn.q_proj": lambda: torch.nn.Linear(4, 4),
    "self_attn.v_proj": lambda: torch.nn.Linear(4, 6, bias=False),
    "mlp.up": lambda: torch.nn.Linear(4, 8),
    "mlp.experts.0.wi": lambda: torch.nn.Linear(4, 5),
    "mlp.experts.1.wi": lambda: torch.nn.Linear(4, 5),
    "norm": lambda: torch.nn.LayerNorm(4),
}
PARTS = {
    "embed_tokens": lambda: torch.nn.Embedding(11, 4),
    "patches": lambda: torch.nn.Conv2d(3, 4, 2),
    **{f"model.layers.{i}.{name}": make for i in range(12) for name, make in LAYER.items()},
    **{f"vision.blocks.{i}.attn.q_proj": lambda: torch.nn.Linear(4, 4) for i in range(2)},
    "layers.0.q_proj": lambda: torch.nn.Linear(4, 4),
    "score": lambda: torch.nn.Linear(4, 2),
    "box_score": lambda: torch.nn.Linear(4, 2),
    "head.dense": lambda: torch.nn.Linear(4, 4),
    "head.out": lambda: torch.nn.Linear(4, 2),
}


def torch_model():
    root = torch.nn.Module()
    for path, make in PARTS.items():
        *above, name = path.split(".")
        module = root
        for part in above:
            if not hasattr(module, part):
                module.add_module(part, torch.nn.Module())
            module = getattr(module, part)
        module.add_module(name, make())
    return root


def jax_tree(model):
    """The same modules as a flat Flax tree: kernels (in, out), no data."""
    tree = {}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            tree[path] = {"kernel": jnp.zeros((module.in_features, module.out_features))}
        elif isinstance(module, torch.nn.Embedding):
            tree[path] = {"embedding": jnp.zeros((module.num_embeddings, module.embedding_dim))}
        elif isinstance(module, torch.nn.Conv2d):
            tree[path] = {"kernel": jnp.zeros((*module.kernel_size, module.in_channels, module.out_channels))}
        elif "Norm" in type(module).__name__:
            tree[path] = {"scale": jnp.zeros(module.weight.shape)}
        else:
            continue
        if getattr(module, "bias", None) is not None:
            tree[path]["bias"] = jnp.zeros(module.bias.shape)
    return tree


def adapted_by_peft(model, **fields):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            peft.inject_adapter_in_model(peft.LoraConfig(r=2, **fields), model)
        except ValueError:
            return "refused", set()
    modules = dict(model.named_modules())
    saved = {path for path, module in modules.items() if isinstance(module, ModulesToSaveWrapper)}
    return {path for path, module in modules.items() if isinstance(module, BaseTunerLayer)}, saved


def adapted_by_us(tree, **fields):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            adapter = jpeft.wrap(tree, jpeft.LoraConfig(r=2, **fields)).adapters["default"]
        except ValueError:
            return "refused", set()
    return set(adapter.sites), {path.rpartition(".")[0] for path in adapter.replaced}


CASES = [
    {"target_modules": ["q_proj"]},
    {"target_modules": ["q_proj", "v_proj"]},
    {"target_modules": ["self_attn.q_proj"]},
    {"target_modules": ["proj"]},
    {"target_modules": ["q_proj", "nothing"]},
    {"target_modules": ["nothing"]},
    {"target_modules": ["model.layers.3.mlp.up"]},
    {"target_modules": ["1.mlp.up"]},
    {"target_modules": ["embed_tokens", "patches"]},
    {"target_modules": ["norm"]},
    {"target_modules": ["q_proj", "norm"]},
    {"target_modules": ["self_attn"]},
    {"target_modules": ["q_proj", "mlp"]},
    {"target_modules": "q_proj"},
    {"target_modules": r".*q_proj"},
    {"target_modules": r"model\.layers\.\d\.self_attn\.[qv]_proj"},
    {"target_modules": r"model\.layers\.1"},
    {"target_modules": r".*norm"},
    {"target_modules": r".*\.nothing"},
    {"target_modules": "all-linear"},
    {"target_modules": "ALL-LINEAR"},
    {"target_modules": "all-linear", "exclude_modules": ["q_proj", "score"]},
    {"target_modules": "all-linear", "exclude_modules": r"model\..*"},
    {"target_modules": "all-linear", "modules_to_save": ["head.out"]},
    {"target_modules": "all-linear", "modules_to_save": ["head"]},
    {"target_modules": ["q_proj"], "exclude_modules": ["vision.blocks.0.attn.q_proj"]},
    {"target_modules": ["q_proj"], "exclude_modules": r".*self_attn.*"},
    {"target_modules": ["q_proj"], "exclude_modules": ["self_attn"]},
    {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]},
    {"target_modules": ["q_proj"], "exclude_modules": ["nothing"]},
    {"target_modules": ["q_proj", "up"], "layers_to_transform": 1},
    {"target_modules": ["q_proj", "up"], "layers_to_transform": [1, 10]},
    {"target_modules": ["q_proj", "up"], "layers_to_transform": []},
    {"target_modules": ["q_proj", "up"], "layers_to_transform": [99]},
    {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
    {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "blocks"},
    {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": ["blocks", "layers"]},
    {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "nothing"},
    {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": ""},
    {"target_modules": ["wi"], "layers_to_transform": [1]},
    {"target_modules": ["wi"], "layers_to_transform": [1], "layers_pattern": "experts"},
    {"target_modules": ["q_proj", "model.layers.5.mlp.up"], "layers_to_transform": [0]},
    {"target_modules": ["q_proj"], "modules_to_save": ["score"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["head.out"]},
    {"target_modules": ["q_proj", "score"], "modules_to_save": ["score"]},
    {"target_modules": ["score"], "modules_to_save": ["score"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["classifier", "score"]},
    {"target_modules": ["q_proj"], "layers_pattern": ["layers"]},
    {"target_modules": r".*q_proj", "layers_to_transform": [1]},
    {"target_modules": r".*q_proj", "layers_pattern": "layers"},
    {"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"nothing": 4}},
]


@pytest.mark.parametrize("fields", CASES, ids=lambda fields: " ".join(f"{k}={v}" for k, v in fields.items()))
def test_the_same_modules_are_adapted_and_saved(fields):
    model = torch_model()
    tree = jax_tree(model)
    theirs, their_saved = adapted_by_peft(model, **fields)
    ours, our_saved = adapted_by_us(tree, **fields)
    assert ours == theirs
    # A container saved in full is one wrapper in PEFT and its leaves here.
    assert {path for path in tree if any(path == s or path.startswith(f"{s}.") for s in their_saved)} == our_saved


def test_the_table_has_rows_of_every_outcome():
    outcomes = [adapted_by_us(jax_tree(torch_model()), **c)[0] for c in CASES]
    assert outcomes.count("refused") > 5
    assert len({frozenset(outcome) for outcome in outcomes if outcome != "refused"}) > 15


SIZES = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 32}


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", None])
@pytest.mark.parametrize(
    "name",
    ["LlamaForCausalLM", "LlamaForSequenceClassification", "BertForSequenceClassification", "GPTNeoXForCausalLM"],
)
def test_all_linear_means_the_same_in_transformers_models(name, task_type):
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**SIZES, pad_token_id=0))
    tree = jax_tree(model)
    theirs, _ = adapted_by_peft(model, target_modules="all-linear", task_type=task_type)
    ours, _ = adapted_by_us(tree, target_modules="all-linear", task_type=task_type)
    assert ours == theirs
    assert ours


RANKS = {r"model\.layers\.1\d\..*": 5, "q_proj": 3, "self_attn.v_proj": 4, "up|nothing": 6}
ALPHAS = {"v_proj": 32, r"layers\.[2-4]\.self_attn\.q_proj": 9}


def test_ranks_and_scalings_follow_the_patterns_alike():
    fields = {"target_modules": ["q_proj", "v_proj", "up"], "rank_pattern": RANKS, "alpha_pattern": ALPHAS}
    model = torch_model()
    adapter = jpeft.wrap(jax_tree(model), jpeft.LoraConfig(**fields)).adapters["default"]
    peft.inject_adapter_in_model(peft.LoraConfig(**fields), model)
    theirs = {
        path: (module.r["default"], module.scaling["default"])
        for path, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    }
    ours = {path: (a["lora_A"].shape[0], float(adapter.scaling[path])) for path, a in adapter.weights.items()}
    assert ours.keys() == theirs.keys()
    assert len({rank for rank, _ in ours.values()}) == 4
    for path, (rank, scaling) in ours.items():
        assert rank == theirs[path][0]
        np.testing.assert_allclose(scaling, theirs[path][1], rtol=1e-6)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"modules_to_save": ["score"]},
        {"bias": "lora_only"},
        {"bias": "all"},
        {"inference_mode": True},
        {"target_modules": ["embed_tokens", "patches", "v_proj"]},
        {"target_modules": "all-linear", "modules_to_save": ["head"]},
    ],
)
def test_parameters_are_counted_alike(fields, capsys):
    fields = {"r": 2, "target_modules": ["q_proj"], **fields}
    model = torch_model()
    wrapped = jpeft.wrap(jax_tree(model), jpeft.LoraConfig(**fields))
    theirs = peft.get_peft_model(model, peft.LoraConfig(**fields))
    assert jpeft.count_parameters(wrapped) == theirs.get_nb_trainable_parameters()
    jpeft.print_trainable_parameters(wrapped)
    ours_printed = capsys.readouterr().out
    theirs.print_trainable_parameters()
    assert ours_printed == capsys.readouterr().out
