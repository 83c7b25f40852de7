"""Loading takes little more memory than the parameters have: measured by the kernel, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

HIDDEN, WIDE, VOCABULARY = 1024, 2816, 15360

LOAD = """
import json, sys
from pathlib import Path
import jax
from jpeft_interop.models import FlaxAutoModelForCausalLM

def kilobytes(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key + ":"))

jax.block_until_ready(jax.numpy.zeros(3))
before = kilobytes("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # The peak starts anew.
model = FlaxAutoModelForCausalLM.from_pretrained(sys.argv[1], **json.loads(sys.argv[2]))
leaves = jax.tree.leaves(model.params)
peak = kilobytes("VmHWM") - before
print(1024 * peak / sum(leaf.nbytes for leaf in leaves), *{leaf.dtype.name for leaf in leaves})
"""


def write_llama(folder, layers, dtype):
    """A Llama with tied embeddings: 15.7 million parameters in the embedding, 12.8 million in each layer."""
    config = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": WIDE, "num_hidden_layers": layers}
    config |= {"model_type": "llama", "num_attention_heads": 16, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    square, up, down = (HIDDEN, HIDDEN), (WIDE, HIDDEN), (HIDDEN, WIDE)
    layer = {f"self_attn.{name}_proj": square for name in "qkvo"}
    layer |= {"mlp.gate_proj": up, "mlp.up_proj": up, "mlp.down_proj": down}
    layer |= {"input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,)}
    shapes = {f"layers.{i}.{name}": shape for i in range(layers) for name, shape in layer.items()}
    shapes |= {"embed_tokens": (VOCABULARY, HIDDEN), "norm": (HIDDEN,)}
    rng = np.random.default_rng(0)
    tensors = {f"model.{name}.weight": rng.random(shape, np.float32).astype(dtype) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells and resets the peak")
@pytest.mark.parametrize("layers, dtype", [(5, np.float32), (10, ml_dtypes.bfloat16)])
def test_peak_of_memory_while_loading(tmp_path, layers, dtype):
    write_llama(tmp_path, layers, dtype)
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", LOAD, str(tmp_path), "{}"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    (tmp_path / "model.safetensors").unlink()  # pytest would keep it.
    assert result.returncode == 0, result.stderr
    ratio, name = result.stdout.split()
    assert name == np.dtype(dtype).name
    assert 0.95 < float(ratio) <= 1.15
