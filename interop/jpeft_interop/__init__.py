"""Everything that knows Hugging Face: PEFT's adapter files, and base models with the names of `transformers`."""

from ._family import Family as Family
from ._load import load_adapter as load_adapter
from ._load import load_config as load_config
from ._load import load_pretrained as load_pretrained
from ._save import save_pretrained as save_pretrained
from ._verify import Report as Report
from ._verify import verify as verify
