"""ShadowPEFT: what happens around a block, where the arrays are put, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

import jpeft
from tests.stacked_trees import stacked

WIDTH, RANK = 4, 2


def arrays():
    """The arrays of one block, random, in float64."""
    rng = np.random.default_rng(0)
    shapes = {"shadow_down.default.weight": (RANK, WIDTH), "shadow_up.default.weight": (WIDTH, RANK)}
    for part in ("transform", "gate"):
        for name, shape in {"0.weight": (3, WIDTH), "0.bias": (3,), "2.weight": (WIDTH, 3), "2.bias": (WIDTH,)}.items():
            shapes[f"shadow_update_{part}.default.{name}"] = shape
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def states():
    return np.random.default_rng(9).normal(size=(2, 2, 3, WIDTH))


def layers_of(p, part, x):
    own = {name: p[f"shadow_update_{part}.default.{name}"] for name in ("0.weight", "0.bias", "2.weight", "2.bias")}
    inner = x @ own["0.weight"].T + own["0.bias"]
    return 0.5 * inner * (1 + erf(inner / np.sqrt(2))) @ own["2.weight"].T + own["2.bias"]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_formulas(dtype):
    """The paper's equations 2 to 7 in float64; the result has the dtype of the model's state."""
    exact, (hidden, shadow) = arrays(), states()
    injected = (
        hidden + 0.3 * (hidden - shadow) @ exact["shadow_down.default.weight"].T @ exact["shadow_up.default.weight"].T
    )
    gate = 1 / (1 + np.exp(-layers_of(exact, "gate", hidden)))
    updated = (1 - gate) * shadow + gate * layers_of(exact, "transform", hidden)

    p = {name: jnp.asarray(array, jnp.float32) for name, array in exact.items()}
    given = (jnp.asarray(hidden, dtype), jnp.asarray(shadow, dtype))
    found = jpeft.shadow_injection(p, *given, alpha=0.3), jpeft.shadow_update(p, *given)
    rate = 1e-5 if dtype == jnp.float32 else 5e-2
    for array, expected in zip(found, (injected, updated), strict=True):
        assert array.dtype == dtype
        np.testing.assert_allclose(np.asarray(array, np.float64), expected, rtol=rate, atol=rate)


def test_dropout():
    """Of the difference of the states, in training alone: entries that are kept are scaled up."""
    identity = {f"shadow_{name}.default.weight": jnp.eye(WIDTH) for name in ("down", "up")}
    hidden, shadow = jnp.ones((50, 20, WIDTH)), jnp.zeros((50, 20, WIDTH))
    inject = jax.jit(lambda rng: jpeft.shadow_injection(identity, hidden, shadow, alpha=1.0, rng=rng, dropout=0.25))
    first, second = inject(jax.random.key(0)), inject(jax.random.key(1))
    np.testing.assert_allclose(np.unique(first), [1.0, 1.0 + 1.0 / 0.75], rtol=1e-6)
    assert (first == 1.0).mean() == pytest.approx(0.25, abs=0.03)
    assert (first != second).any()
    np.testing.assert_array_equal(inject(None), 2.0 * hidden)


def decoder(depth=3, **more):
    """A tree that is laid out as a decoder's."""
    rng = np.random.default_rng(0)

    def layer():
        return {
            "q_proj": {"kernel": jnp.asarray(rng.normal(size=(WIDTH, 6)), jnp.float32), "bias": jnp.zeros(6)},
            "norm": {"scale": jnp.ones(WIDTH)},
        }

    body = {"embed_tokens": {"embedding": jnp.ones((9, WIDTH))}, "norm": {"scale": jnp.ones(WIDTH)}, **more}
    body["layers"] = {str(number): layer() for number in range(depth)}
    return {"model": body, "lm_head": {"kernel": jnp.ones((WIDTH, 9))}}


def adapter(tree, rng=0, **fields):
    return jpeft.wrap(tree, jpeft.ShadowConfig(r=RANK, **fields), rng=jax.random.key(rng)).adapters["default"]


def test_the_shadow_mirrors_the_first_blocks():
    """Names, shapes and orientation are those of PyTorch; norms begin as ones, biases as zeros."""
    found = adapter(decoder(depth=2), shadow_num_hidden_layers=3, share_embeddings=False)
    own = {"q_proj.weight": (6, WIDTH), "q_proj.bias": (6,), "norm.weight": (WIDTH,)}
    expected = {f"layers.{number}.{name}": shape for number in range(3) for name, shape in own.items()}
    expected |= {"norm.weight": (WIDTH,), "embed_tokens.weight": (9, WIDTH)}
    assert {name: array.shape for name, array in found.shared.items()} == {
        f"shadow_backbone.default.{name}": shape for name, shape in expected.items()
    }
    assert found.shared["shadow_backbone.default.norm.weight"].tolist() == [1.0] * WIDTH
    assert not found.shared["shadow_backbone.default.layers.2.q_proj.bias"].any()
    assert 0.005 < found.shared["shadow_backbone.default.layers.2.q_proj.weight"].std() < 0.05
    assert "shadow_backbone.default.embed_tokens.weight" not in adapter(decoder()).shared
    assert not adapter(decoder()).weights["model.layers.1"]["shadow_up.default.weight"].any()
    assert adapter(decoder(), init_weights=False).weights["model.layers.1"]["shadow_up.default.weight"].all()


def test_blocks_begin_alike_whatever_the_others_are():
    """By themselves, among fewer, stacked, abstract: the same values and shapes."""
    whole, part = adapter(decoder()), adapter(decoder(), layers_to_transform=[1, 2])
    assert part.config.target_modules == ("model.layers.1", "model.layers.2")
    assert list(part.weights) == list(part.config.target_modules)
    stack = adapter(stacked(decoder(), ("0:3",)))
    assert stack.config.target_modules == whole.config.target_modules
    for name, array in stack.weights["model.layers.0:3"].items():
        for number in range(3):
            np.testing.assert_array_equal(array[number], whole.weights[f"model.layers.{number}"][name])
    same = jax.tree.map(np.array_equal, part.weights, {path: whole.weights[path] for path in part.weights})
    assert all(jax.tree.leaves(same))
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, whole.shared, stack.shared)))
    shapes = adapter(jax.eval_shape(lambda: decoder()))
    assert jax.tree.map(jnp.shape, shapes.weights) == jax.tree.map(jnp.shape, whole.weights)


def test_blocks_come_in_the_order_of_their_numbers():
    tree = jax.eval_shape(lambda: decoder(depth=11))
    assert adapter(tree).config.target_modules == tuple(f"model.layers.{number}" for number in range(11))


def test_tensors_that_are_told():
    told = {"in.weight": ((3, WIDTH), 0.5, 0.0), "out.bias": ((2,), 0.0, 0.0)}
    found = adapter(decoder(), shadow_tensors=told, shadow_hidden_size=3)
    assert {name: array.shape for name, array in found.shared.items()} == {
        "shadow_backbone.default.in.weight": (3, WIDTH),
        "shadow_backbone.default.out.bias": (2,),
        "shadow_projection.default.weight": (WIDTH, 3),
    }
    assert (found.shared["shadow_backbone.default.in.weight"] == 0.5).all()


def test_a_classifier_lends_its_head():
    tree = {**decoder(), "score": {"kernel": jnp.arange(12.0).reshape(WIDTH, 3)}}
    head = adapter(tree, task_type="SEQ_CLS").shared["shadow_head.default.weight"]
    np.testing.assert_array_equal(head, tree["score"]["kernel"].T)
    assert "shadow_head.default.weight" not in adapter(decoder(), task_type="SEQ_CLS").shared


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"r": 0}, "r is 0; expected an integer of at least 1"),
        ({"shadow_hidden_size": True}, "shadow_hidden_size is True; expected an integer"),
        ({"update_hidden_size": -1}, "update_hidden_size is -1"),
        ({"shadow_dropout": 1.0}, "shadow_dropout is 1.0; expected a rate"),
        ({"auxiliary_loss_weight": -0.1}, "auxiliary_loss_weight is -0.1; expected at least 0"),
        ({"bias": "all"}, "bias is 'all'; expected 'none'"),
        ({"shadow_model": "gpt2"}, "shadow_model is 'gpt2'; expected 'mirror'.*nor that of a diffusion transformer"),
    ],
)
def test_refused_settings(fields, match):
    with pytest.raises(ValueError, match=match):
        jpeft.ShadowConfig(**fields)


def without_table():
    return {"model": {"layers": decoder()["model"]["layers"]}}


def two_tables():
    tree = without_table()
    tree["model"] |= {name: {"embedding": jnp.ones((9, WIDTH))} for name in ("left", "right")}
    return tree


BLOCKS = {"0": {"q": {"kernel": jnp.ones((WIDTH, WIDTH))}}}
REFUSED = {
    "no blocks": (
        lambda: {"encoder": {"layer": BLOCKS}},
        {},
        "called layers or h; the model has none among encoder.layer",
    ),
    "two lists": (
        lambda: {"encoder": {"layers": BLOCKS}, "decoder": {"layers": BLOCKS}},
        {},
        "the model has several: decoder.layers, encoder.layers",
    ),
    "no lists": (lambda: {"q": {"kernel": jnp.ones((2, 2))}}, {}, "the model has none among no lists"),
    "diffusion": (
        lambda: {"transformer_blocks": BLOCKS, "single_transformer_blocks": BLOCKS},
        {},
        "is a diffusion transformer, with blocks in single_transformer_blocks, transformer_blocks",
    ),
    "no block": (decoder, {"target_modules": ["q_proj"]}, "'model.layers.0.q_proj', which is no block.*model.layers.0"),
    "gap": (decoder, {"target_modules": ["0", "2"]}, "do not follow one another: model.layers.0, model.layers.2"),
    "no such layer": (decoder, {"layers_to_transform": 7}, r"is 7; expected numbers of 'model.layers': \[0, 1, 2\]"),
    "part of a stack": (
        lambda: stacked(decoder(), ("0:3",)),
        {"layers_to_transform": [0, 1]},
        "for layers 0, 1 of the stack 'model.layers.0:3', but not layer 2;",
    ),
    "no table": (without_table, {}, "as wide as the rows of the model's table of tokens.*none among model.layers.0.q"),
    "which table": (two_tables, {}, "which table holds the tokens is not known among: model.left, model.right"),
    "sizes": (decoder, {"shadow_hidden_size": 2}, "a shadow with shadow_hidden_size=2 are not told.*get_peft_model"),
    "another list": (
        lambda: {"wte": {"embedding": jnp.ones((9, WIDTH))}, "h": BLOCKS},
        {},
        "a shadow with blocks in 'h' are not told by the parameters alone",
    ),
    "no layer": (
        lambda: decoder(experts={"weight": jnp.ones((2, 3, 4))}),
        {},
        r"'model.experts.weight' of the shape \(2, 3, 4\) is of no linear layer",
    ),
}


@pytest.mark.parametrize(("tree", "fields", "match"), REFUSED.values(), ids=REFUSED)
def test_refused_trees(tree, fields, match):
    with pytest.raises(ValueError, match=match):
        adapter(tree(), **fields)


def test_states_have_to_be_of_one_shape():
    p = {name: jnp.asarray(array, jnp.float32) for name, array in arrays().items()}
    for function in (lambda *given: jpeft.shadow_injection(*given, alpha=1.0), jpeft.shadow_update):
        with pytest.raises(ValueError, match=r"hidden has the shape \(2, 4\), shadow \(2, 3\)"):
            function(p, jnp.ones((2, 4)), jnp.ones((2, 3)))


def test_it_is_not_merged():
    wrapped = jpeft.wrap(decoder(), jpeft.ShadowConfig(r=RANK))
    with pytest.raises(ValueError, match="ShadowConfig is no change of a weight"):
        jpeft.merge(wrapped)
