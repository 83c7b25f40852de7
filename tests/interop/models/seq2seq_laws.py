"""What has to hold of every encoder-decoder: laws that its tests call with a model of their family."""

import jax
import numpy as np
import pytest

from jpeft_interop.models._cache import take_rows


def close(actual, expected):
    expected = np.asarray(expected)
    np.testing.assert_allclose(actual, expected, atol=1e-5 * np.abs(expected).max())


def token_by_token(model, source, ids):
    """A prefill and then one token at a time give the logits of the whole, for rows in whatever order."""
    whole = model.apply(model.params, **source, decoder_input_ids=ids)
    start = jax.jit(lambda params, ids: model.apply(params, **source, decoder_input_ids=ids, cache_length=12))
    output = start(model.params, ids[:, :3])
    close(output.logits, whole.logits[:, :3])
    close(output.encoder_last_hidden_state, whole.encoder_last_hidden_state)
    assert all(
        {"key", "value", "cross_key", "cross_value"} == memory.keys()
        for memory in output.past_key_values.layers.values()
    )
    order = np.array([2, 0, 0])
    cache, mask = take_rows(output.past_key_values, order), source.get("attention_mask")
    mask = {} if mask is None else {"attention_mask": mask[order]}
    step = jax.jit(lambda params, cache, ids: model.apply(params, decoder_input_ids=ids, past_key_values=cache, **mask))
    for place in range(3, ids.shape[1]):
        output = step(model.params, cache, ids[order, place : place + 1])
        cache = output.past_key_values
        assert output.encoder_last_hidden_state is None
        close(output.logits[:, 0], whole.logits[order, place])


def encoder_output_in_place_of_its_input(model, source, ids):
    """The encoder's output, given in place of its input, gives the same logits, and `logits_to_keep` the last ones."""
    whole = model.apply(model.params, **source, decoder_input_ids=ids)
    mask = {name: value for name, value in source.items() if name == "attention_mask"}
    encoded = whole.encoder_last_hidden_state
    given = model.apply(
        model.params, **mask, encoder_last_hidden_state=encoded, decoder_input_ids=ids, logits_to_keep=2
    )
    close(given.logits, whole.logits[:, -2:])
    assert given.encoder_hidden_states is None


def contradictions_are_refused(model, source, ids):
    """Inputs that contradict one another are refused, by name."""
    cache = model.apply(model.params, **source, decoder_input_ids=ids, cache_length=12).past_key_values

    def call(**inputs):
        return jax.eval_shape(lambda: model.apply(model.params, **inputs))

    with pytest.raises(ValueError, match="one of decoder_input_ids and decoder_inputs_embeds, got both"):
        call(**source, decoder_input_ids=ids, decoder_inputs_embeds=np.zeros((3, 9, 24), np.float32))
    with pytest.raises(ValueError, match="past_key_values holds what the decoder needs.*without input_"):
        call(**source, decoder_input_ids=ids, past_key_values=cache)
    with pytest.raises(ValueError, match=r"decoder_attention_mask must have .*\(3, 9\); got \(3, 8\)"):
        call(**source, decoder_input_ids=ids, decoder_attention_mask=np.ones((3, 8), int))
    with pytest.raises(ValueError, match=r"decoder's batch of 3; got \(2, 9, 24\)"):
        call(encoder_last_hidden_state=np.zeros((2, 9, 24), np.float32), decoder_input_ids=ids)
