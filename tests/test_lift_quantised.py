"""Quantised weights: an adapter acts on what the codes of a leaf stand for, or is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jpeft
from jpeft._contract import is_quantised
from tests.cases import GainConfig
from tests.harness import random_like
from tests.test_laws import randomised

CODES = jnp.asarray(np.random.default_rng(0).integers(-127, 128, (4, 6)), jnp.int8)
SCALE, ZERO = jnp.linspace(0.004, 0.01, 6, dtype=jnp.float32), jnp.arange(6, dtype=jnp.float32)
BLOCKS = jnp.asarray(np.random.default_rng(1).uniform(0.004, 0.01, (2, 1, 6)), jnp.float32)
X = random_like((3, 4), 50, 1.0)
F32 = jnp.float32


def blockwise(w):
    return (w.astype(F32).reshape(2, 2, 6) * BLOCKS).reshape(4, 6)


# How a kernel becomes a weight.
FORMS = {
    "a scale": lambda w: w.astype(F32) * SCALE,
    "the scale on the left": lambda w: SCALE * w.astype(F32),
    "a scale of its own shape": lambda w: w.astype(F32) * jnp.broadcast_to(SCALE, (4, 6)),
    "one number": lambda w: w.astype(F32) * 0.01,
    "a divisor": lambda w: w.astype(F32) / (1 / SCALE),
    "a zero point": lambda w: (w.astype(F32) - ZERO) * SCALE,
    "an integer zero point": lambda w: (w.astype(jnp.int32) - 3).astype(F32) * SCALE,
    "an offset": lambda w: w.astype(F32) * SCALE + ZERO,
    "blocks": blockwise,
    "a jitted function": lambda w: jax.jit(blockwise)(w),
    "transposed twice": lambda w: (w.T.astype(F32) * SCALE[:, None]).T,
    "cast afterwards": lambda w: (w.astype(jnp.bfloat16) * jnp.ones((), jnp.bfloat16)).astype(F32),
    "used whole": lambda w: jnp.sin(w.astype(F32) * SCALE),
}


def wrapped(config=jpeft.LoraConfig, kernel=CODES, **layouts):
    params = {"d": {"kernel": jnp.zeros(kernel.shape, F32)}}
    own = randomised(jpeft.wrap(params, config(target_modules=["d"]), layouts=layouts))
    return dataclasses.replace(own, base={"d": {"kernel": kernel}})


def product(form, params, x):
    return x @ form(params["d"]["kernel"])


def weight(form, own):
    """The merged weight of the dequantised tree; of what is made of a weight, that."""
    if form is FORMS["used whole"]:
        return jnp.sin(weight(FORMS["a scale"], own))
    return jpeft.merge(dataclasses.replace(own, base={"d": {"kernel": form(CODES)}}))["d"]["kernel"]


@pytest.mark.parametrize("config", [jpeft.LoraConfig, GainConfig])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_adapter_acts_on_the_dequantised_weight(form, config):
    own = wrapped(config)
    got = jax.jit(jpeft.lift(functools.partial(product, form)))(own, X)
    np.testing.assert_allclose(got, X @ weight(form, own), rtol=1e-4, atol=1e-4)


def test_a_table_is_dequantised_before_rows_are_looked_up():
    params = {"embed": {"embedding": CODES.astype(F32) * SCALE}}
    own = randomised(jpeft.wrap(params, jpeft.LoraConfig(target_modules=["embed"])))
    own = dataclasses.replace(own, base={"embed": {"embedding": CODES}})
    ids = np.array([3, 0, 3])
    got = jpeft.lift(lambda p, ids: (p["embed"]["embedding"].astype(F32) * SCALE)[ids])(own, ids)
    want = jpeft.merge(dataclasses.replace(own, base=params))["embed"]["embedding"][ids]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"'embed.embedding' is quantised and used by gather before its scale"):
        jpeft.lift(lambda p, ids: p["embed"]["embedding"][ids].astype(F32) * SCALE)(own, ids)


def test_floats_of_eight_bits_are_codes_too():
    kernel = jnp.asarray(np.linspace(-2, 2, 24).reshape(4, 6), jnp.float8_e4m3fn)
    own = wrapped(kernel=kernel)
    exact = dataclasses.replace(own, base={"d": {"kernel": kernel.astype(F32) * SCALE}})
    got = jpeft.lift(lambda p, x: x @ (p["d"]["kernel"].astype(F32) * SCALE))(own, X)
    np.testing.assert_allclose(got, X @ jpeft.merge(exact)["d"]["kernel"], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="its dtype is float8_e4m3fn; expected a floating-point one of 16 bits"):
        jpeft.merge(own)
    assert [is_quantised(dtype) for dtype in (jnp.float16, jnp.int4, jnp.uint8)] == [False, True, True]


def late(p, x):
    return (x @ p["d"]["kernel"].astype(F32)) * SCALE


def stacked(p, x):
    kernel = p["d"]["kernel"]
    both = jnp.stack([kernel, kernel])
    return x @ both[0].astype(F32) * SCALE


REFUSED = {
    "before its scale": (late, "used by dot_general before its scale is applied, so that its adapter would"),
    "by integers": (
        lambda p, x: lax.dot_general(
            x.astype(jnp.int8), p["d"]["kernel"], (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32
        ),
        "used by dot_general before its scale",
    ),
    "in a scan": (
        lambda p, x: lax.scan(lambda c, own: (c + own @ p["d"]["kernel"].astype(F32), None), jnp.zeros(6), x)[0],
        "used by dot_general before its scale",
    ),
    "as a stack": (stacked, "used by dot_general before its scale"),
    "as it is": (lambda p, x: jnp.sin(p["d"]["kernel"].astype(F32)), "used by sin before its scale"),
    "returned": (lambda p, x: p["d"]["kernel"], "used by output before its scale"),
    "as indices": (lambda p, x: jnp.ones(256)[p["d"]["kernel"].astype(jnp.int32)], "before its scale is applied"),
    "two scales": (
        lambda p, x: x @ (p["d"]["kernel"].astype(F32) * SCALE * 2),
        "'d.kernel' is quantised and multiplied twice.*expected one scale: multiply the scales",
    ),
    "over its scale": (lambda p, x: x @ (SCALE / p["d"]["kernel"].astype(F32)), "used by div before its scale"),
    "a scale that makes it larger": (
        lambda p, x: x @ (p["d"]["kernel"].astype(F32)[None] * SCALE.reshape(6, 1, 1)).sum(0),
        "used by mul before its scale",
    ),
}


@pytest.mark.parametrize(("function", "text"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("config", [jpeft.LoraConfig, GainConfig])
def test_what_cannot_be_told_is_refused(function, text, config):
    with pytest.raises(ValueError, match=text):
        jax.eval_shape(jpeft.lift(function), wrapped(config), X)


def test_what_no_adapter_acts_on_may_be_scaled_late():
    own = jpeft.disable_adapters(wrapped())
    np.testing.assert_allclose(jpeft.lift(late)(own, X), late(own.base, X))


def test_rows_of_a_quantised_table_cannot_begin_from_it():
    config = jpeft.LoraConfig(target_modules=["d"], trainable_token_indices={"embed": [1]})
    params = {"d": {"kernel": jnp.ones((6, 6))}, "embed": {"embedding": CODES}}
    with pytest.raises(ValueError, match="'embed' reads the weight, but 'embed.embedding' is quantised"):
        jpeft.wrap(params, config)
