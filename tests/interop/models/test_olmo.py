"""OLMo 2 alone: the precision of its norms, and what is refused."""

import importlib

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jpeft_interop.models import FlaxAutoModelForCausalLM
from jpeft_interop.models.olmo import Norm

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
olmo2 = importlib.import_module("transformers.models.olmo2.modeling_olmo2")


def test_norm_is_scaled_before_the_cast():
    random = np.random.default_rng(0)
    x, scale = random.normal(size=(64, 24)).astype(np.float32), random.normal(size=24).astype(np.float32)
    norm = Norm(24, eps=1e-5)
    norm.scale = nnx.Param(jnp.asarray(scale))
    ours = norm(jnp.asarray(x, jnp.bfloat16))
    theirs = olmo2.Olmo2RMSNorm(24, eps=1e-5)
    with torch.no_grad():
        theirs.weight.copy_(torch.tensor(scale))
        expected = theirs(torch.tensor(x).bfloat16()).float().numpy()
    assert ours.dtype == jnp.bfloat16
    # Scaled after the cast, one in three values would differ.
    assert (np.asarray(ours, np.float32) != expected).mean() < 0.01


@pytest.mark.parametrize("key, value", [("mlp_bias", True), ("sliding_window", 4), ("clip_qkv", 8.0)])
def test_what_is_not_implemented_is_refused(key, value):
    with pytest.raises(ValueError, match=f"{key}={value}"):
        FlaxAutoModelForCausalLM.from_config({"model_type": "olmo2", key: value}, abstract=True)
