"""Adapter configurations: PEFT's field names, as frozen and hashable dataclasses."""

import dataclasses
import enum
from collections.abc import Iterator, Mapping
from typing import Any


class TaskType(enum.StrEnum):
    """What the adapted model is for, spelled as PEFT spells it."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


class PeftType(enum.StrEnum):
    """The methods that this package implements, under PEFT's names."""

    LORA = "LORA"
    ADALORA = "ADALORA"
    ADAMSS = "ADAMSS"
    ADAPTION_PROMPT = "ADAPTION_PROMPT"
    BEFT = "BEFT"
    BOFT = "BOFT"
    C3A = "C3A"
    CARTRIDGE = "CARTRIDGE"
    CPT = "CPT"
    DEFT = "DEFT"
    DELORA = "DELORA"
    FOURIERFT = "FOURIERFT"
    FROD = "FROD"
    GLORA = "GLORA"
    GRALORA = "GRALORA"
    HIRA = "HIRA"
    HRA = "HRA"
    IA3 = "IA3"
    LILY = "LILY"
    LN_TUNING = "LN_TUNING"
    LOHA = "LOHA"
    LOKR = "LOKR"
    MISS = "MISS"
    MULTITASK_PROMPT_TUNING = "MULTITASK_PROMPT_TUNING"
    OFT = "OFT"
    OSF = "OSF"
    PEANUT = "PEANUT"
    POLY = "POLY"
    PREFIX_TUNING = "PREFIX_TUNING"
    PROMPT_TUNING = "PROMPT_TUNING"
    PSOFT = "PSOFT"
    PVERA = "PVERA"
    P_TUNING = "P_TUNING"
    RANDLORA = "RANDLORA"
    ROAD = "ROAD"
    SHADOW = "SHADOW"
    SHIRA = "SHIRA"
    SUPERTUNING = "SUPERTUNING"
    TINYLORA = "TINYLORA"
    TRAINABLE_TOKENS = "TRAINABLE_TOKENS"
    UNILORA = "UNILORA"
    VBLORA = "VBLORA"
    VERA = "VERA"
    WAVEFT = "WAVEFT"
    XLORA = "XLORA"


class FrozenMapping(Mapping[Any, Any]):
    """An ordered, hashable mapping, so that a config with patterns can be static under `jit`."""

    def __init__(self, entries: Mapping[Any, Any] = {}):
        self._items = tuple((key, freeze(value)) for key, value in entries.items())
        self._entries = dict(self._items)

    def __getitem__(self, key: Any) -> Any:
        return self._entries[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __hash__(self) -> int:
        return hash(self._items)

    def __eq__(self, other: object) -> bool:
        # Order counts: the first matching pattern of a rank_pattern wins.
        if isinstance(other, FrozenMapping):
            return self._items == other._items
        return isinstance(other, Mapping) and self._entries == dict(other)

    def __repr__(self) -> str:
        return repr(self._entries)


def freeze(value: Any) -> Any:
    """The hashable twin of a JSON-like value: lists become tuples, dicts `FrozenMapping`s."""
    if isinstance(value, Mapping):
        return value if isinstance(value, FrozenMapping) else FrozenMapping(value)
    if isinstance(value, (set, frozenset)):
        return tuple(sorted(value))
    if isinstance(value, (list, tuple)):
        return tuple(freeze(entry) for entry in value)
    return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """The fields that every adapter config has, with PEFT's names and meanings.

    `extra` carries the fields of an `adapter_config.json` that this package does not know, so that
    saving writes them back. Instances are hashable: lists are stored as tuples.

    >>> import jpeft
    >>> jpeft.LoraConfig(r=4, target_modules=["query"]).target_modules
    ('query',)
    """

    peft_type: PeftType | None = None
    task_type: TaskType | str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    auto_mapping: Mapping[str, Any] | None = None
    peft_version: str | None = None
    extra: Mapping[str, Any] = dataclasses.field(default_factory=FrozenMapping, repr=False)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, freeze(getattr(self, field.name)))
        task_type = self.task_type
        if task_type is None or isinstance(task_type, TaskType):
            return
        if task_type not in TaskType.__members__:
            raise ValueError(f"task_type is {task_type!r}; expected one of {', '.join(TaskType.__members__)} or None")
        object.__setattr__(self, "task_type", TaskType(task_type))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TunerConfig(PeftConfig):
    """The fields that say which modules a method acts on (PEFT's rules, `_targets.py`).

    target_modules: names (a path equals one or ends in `.name`), one regular expression that must match
    the whole path, or "all-linear". exclude_modules: the same forms, taken away again.
    layers_to_transform, layers_pattern: layer indices, and the name of the list that they count.
    modules_to_save: modules trained and saved in full. bias: "none", "all" or "<method>_only".
    """

    target_modules: str | tuple[str, ...] | list[str] | None = None
    exclude_modules: str | tuple[str, ...] | list[str] | None = None
    layers_to_transform: int | tuple[int, ...] | list[int] | None = None
    layers_pattern: str | tuple[str, ...] | list[str] | None = None
    modules_to_save: tuple[str, ...] | list[str] | None = None
    bias: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.modules_to_save, str):
            raise TypeError(f"modules_to_save is {self.modules_to_save!r}; expected a list of names")
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name} is {getattr(self, name)!r} while target_modules is the string "
                        f"{self.target_modules!r}; it works with a list of names only: list the names, or put the "
                        "layers into the regular expression"
                    )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"layers_pattern is {self.layers_pattern!r} while layers_to_transform is None; "
                "give the indices of the layers in layers_to_transform"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptLearningConfig(PeftConfig):
    """The fields of methods that learn a prompt: rows before the input, or keys and values before those of attention.

    num_virtual_tokens: length of the prompt. token_dim: size of an embedding; of a prefix, of the keys of one layer.
    num_transformer_submodules: 2 for an encoder and a decoder, whose prompts follow one another; None: by task_type.
    num_attention_heads (of keys and values), num_layers: of the model, for a prefix. What is None is taken from the
    model's parameters or its config where they tell. modules_to_save: modules trained and saved in full.
    embedding_scale: no field of PEFT, what the model multiplies the rows of its table with, for prompts that begin as
    some of them; `jpeft_interop` says it for its models, and files do not hold it.
    """

    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    modules_to_save: tuple[str, ...] | list[str] | None = None
    embedding_scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.modules_to_save, str):
            raise TypeError(f"modules_to_save is {self.modules_to_save!r}; expected a list of names")
        sizes = ("num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers", "num_transformer_submodules")
        for name in sizes:
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} is {value!r}; expected a whole number of at least 1, or None")

    @property
    def submodules(self) -> int:
        """How many prompts there are: one, or one for the encoder and one for the decoder."""
        if self.num_transformer_submodules is not None:
            return self.num_transformer_submodules
        return 2 if self.task_type == TaskType.SEQ_2_SEQ_LM else 1
