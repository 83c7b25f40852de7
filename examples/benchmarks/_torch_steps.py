"""The same training steps in PyTorch: a Llama of `transformers` as large as the decoder in JAX, eager."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from _models import Shape
from _steps import Step


def llama(shape: Shape, dtype: str = "float32", device: str = "cpu") -> Any:
    config = transformers.LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        use_cache=False,
    )
    with torch.device(device):
        return transformers.LlamaForCausalLM(config).to(getattr(torch, dtype))


def random_tokens(shape: Shape, count: int) -> torch.Tensor:
    return torch.randint(0, shape.vocabulary, (2, count // 2))


def floor_step(model: Any, tokens: torch.Tensor) -> Step:
    """Nothing trains but shifts of what the first q, k and v give: the gradient passes every activation, no weight."""
    model.requires_grad_(False)
    attention = model.model.layers[0].self_attn
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
        shift = torch.nn.Parameter(torch.zeros(projection.out_features, dtype=projection.weight.dtype))
        projection.register_parameter("shift", shift)
        projection.register_forward_hook(lambda module, inputs, y: y + module.shift)
    return step(model, tokens)


def step(model: Any, tokens: torch.Tensor, added: Callable[[Any], Any] | None = None, **inputs: Any) -> Step:
    """Forward, backward and AdamW of what trains. added(model): a term of the loss that the caller has to add.

    inputs: what the model takes besides the tokens.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, fused=True)

    def run() -> None:
        loss = model(input_ids=tokens, labels=tokens, **inputs).loss
        (loss if added is None else loss + added(model)).backward()
        optimizer.step()
        optimizer.zero_grad()

    run()
    return run
