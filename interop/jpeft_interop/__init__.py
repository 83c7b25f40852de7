"""Everything that knows Hugging Face: PEFT's adapter files, and base models with the names of `transformers`."""

from ._load import load_adapter as load_adapter, load_config as load_config, load_pretrained as load_pretrained
from ._save import save_pretrained as save_pretrained
from ._verify import Report as Report, verify as verify
