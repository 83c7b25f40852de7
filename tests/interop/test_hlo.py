"""The reader of compiled programs: exact counts on programs whose work is known, and the three compilers' dialects."""

import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from jpeft_interop._hlo import collectives, flops
from jpeft_interop._hlo_bytes import bytes_moved
from jpeft_interop._hlo_runs import runs
from jpeft_interop._hlo_text import program


def text(fn, *shapes, **compiler_options):
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(fn).lower(*arrays).compile(compiler_options=compiler_options or None).as_text()


def stack(x, w):
    """Layers of one width, scanned and rematerialised."""
    return jnp.sum(jax.lax.scan(jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None)), x, w)[0] ** 2)


def nested(x, w):
    """Three trips of a loop around a scanned stack."""
    return jax.lax.fori_loop(0, 3, lambda _, x: jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, w)[0], x)


def convolved(x, w):
    return jax.lax.conv_general_dilated(x, w, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def attended(q, k, v):
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k)), v)


KNOWN = {
    "one product": (lambda x, w: x @ w, [(4, 6), (6, 10)], 2 * 4 * 6 * 10),
    "two batch axes": (attended, [(2, 5, 3, 8)] * 3, 2 * (2 * 2 * 3 * 5 * 5 * 8)),
    # Forward, once more for the backward pass, and the two products of the backward pass.
    "scan with remat, its gradient": (jax.grad(stack, (0, 1)), [(4, 16), (7, 16, 16)], 4 * 7 * 2 * 4 * 16 * 16),
    # The gradient in the input alone has one product of the two.
    "scan with remat, one gradient": (jax.grad(stack), [(4, 16), (7, 16, 16)], 3 * 7 * 2 * 4 * 16 * 16),
    "a loop in a loop": (nested, [(4, 16), (5, 16, 16)], 3 * 5 * 2 * 4 * 16 * 16),
    "convolution": (convolved, [(2, 9, 9, 3), (3, 3, 3, 5)], 2 * (2 * 4 * 4 * 5) * (3 * 3 * 3)),
}


@pytest.mark.parametrize("name", KNOWN)
def test_flops_of_products_are_exact(name):
    fn, shapes, expected = KNOWN[name]
    assert flops(text(fn, *shapes)) == expected


def test_the_bound_in_a_loops_condition_serves_where_the_compiler_states_no_count():
    fn, shapes, expected = KNOWN["a loop in a loop"]
    compiled = text(fn, *shapes)
    assert "known_trip_count" in compiled
    assert flops(compiled.replace("known_trip_count", "something_else")) == expected
    # A loop that only its data ends is counted once.
    endless = text(lambda x, w: jax.lax.while_loop(lambda x: x[0, 0] < 5, lambda x: x @ w, x), (4, 4), (4, 4))
    assert flops(endless) == 2 * 4 * 4 * 4


COUNTED = """%body (p: (u32[], f32[4,4], u32[])) -> (u32[], f32[4,4], u32[]) {
  %p = (u32[]{:T(128)}, f32[4,4]{1,0}, u32[]{:T(128)}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=0
  %x = f32[4,4]{1,0} get-tuple-element(%p), index=1
  %by = u32[]{:T(128)} get-tuple-element(%p), index=2
  %two = u32[]{:T(128)} constant(2)
  %next = u32[]{:T(128)} add(%i, STEP)
  %y = f32[4,4]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %q = (u32[]{:T(128)}, f32[4,4]{1,0}, u32[]{:T(128)}) tuple(%next, %y, %by)
}

%condition (p: (u32[], f32[4,4], u32[])) -> pred[] {
  %p = (u32[]{:T(128)}, f32[4,4]{1,0}, u32[]{:T(128)}) parameter(0)
  %bound = u32[]{:T(128)} constant(8)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %compare = pred[]{:T(512)} compare(%i, %bound), direction=DIRECTION
}

"""


@pytest.mark.parametrize(
    ("start", "step", "direction", "trips"),
    [(0, "%two", "LT", 4), (1, "%two", "LT", 4), (2, "%two", "LT", 3), (0, "%by", "LE", 3), (8, "%by", "LT", 0)],
)
def test_loops_that_do_not_count_by_one_from_zero(start, step, direction, trips):
    """As the TPU compiler writes a product with a weight whose pieces it exchanges: two pieces a trip."""
    loop = entry(
        f"%start = u32[]{{:T(128)}} constant({start})",
        "%three = u32[]{:T(128)} constant(3)",
        "%begin = u32[]{:T(128)} copy(%start)",
        "%x = f32[4,4]{1,0} parameter(0)",
        "%given = (u32[]{:T(128)}, f32[4,4]{1,0}, u32[]{:T(128)}) tuple(%begin, %x, %three)",
        "ROOT %loop = (u32[]{:T(128)}, f32[4,4]{1,0}, u32[]{:T(128)}) while(%given), condition=%condition, body=%body",
        before=COUNTED.replace("STEP", step).replace("DIRECTION", direction),
    )
    assert flops(loop) == trips * 2 * 4 * 4 * 4


def test_bytes_grow_by_the_same_amount_with_each_trip():
    moved = [bytes_moved(text(jax.grad(stack), (32, 64), (layers, 64, 64))) for layers in (4, 8, 16)]
    assert moved[2] - moved[1] == 2 * (moved[1] - moved[0]) > 0
    # A trip reads its layer's matrix in each pass at least, and never the whole stack.
    assert 2 * 64 * 64 * 4 * 4 <= moved[1] - moved[0] < 8 * 16 * 64 * 64 * 4


def test_bytes_of_a_program_without_loops_are_the_compilers():
    compiled = jax.jit(lambda x, w: x @ w).lower(*[jax.ShapeDtypeStruct((64, 64), jnp.float32)] * 2).compile()
    assert bytes_moved(compiled.as_text()) == compiled.cost_analysis()["bytes accessed"] == 3 * 64 * 64 * 4


def test_collectives_of_a_sharded_scan():
    mesh = jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2)
    w = jax.ShapeDtypeStruct((5, 64, 64), jnp.float32, sharding=NamedSharding(mesh, P(None, "fsdp", "tp")))
    x = jax.ShapeDtypeStruct((32, 64), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))
    compiled = jax.jit(jax.grad(stack, 1)).lower(x, w).compile()
    found = collectives(compiled.as_text())
    # Both passes gather each layer's rows over the four devices of "fsdp"; the gradients are summed over them, in the
    # loop or, all at once, behind it.
    gathered = [one for one in found if (one.kind, one.shape) == ("all-gather", (64, 32))]
    assert len(gathered) >= 2 and {(one.times, one.group, one.bytes) for one in gathered} == {(5, 4, 64 * 32 * 4)}
    summed = [one for one in found if one.kind == "all-reduce" and one.group == 4]
    assert [one.total for one in summed] == [5 * 64 * 32 * 4]
    assert {one.kind for one in found} == {"all-gather", "all-reduce"}


def test_a_tuple_of_arrays_reduced_at_once_is_an_entry_each():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, P("data"))
    arrays = [jax.ShapeDtypeStruct((8, size), jnp.float32, sharding=rows) for size in (3, 5)]
    compiled = jax.jit(lambda x, y: (x.sum(0), y.sum(0))).lower(*arrays).compile().as_text()
    assert sorted(one.shape for one in collectives(compiled)) == [(3,), (5,)]
    assert {one.group for one in collectives(compiled)} == {8}


def entry(*lines, before=""):
    body = "\n".join(f"  {line}" for line in lines)
    return f"HloModule jit_step, is_scheduled=true\n\n{before}ENTRY %main (x: f32[8]) -> f32[8] {{\n{body}\n}}\n"


GPU = entry(
    "%x = f32[128,1024]{1,0} parameter(0)",
    "%w = f32[16,1024]{1,0} parameter(1)",
    "%all-gather-start = (f32[16,1024]{1,0}, f32[128,1024]{1,0}) all-gather-start(%w), channel_id=1, "
    'replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, metadata={op_name="jit(step)/dot"}',
    "%all-gather-done = f32[128,1024]{1,0} all-gather-done(%all-gather-start)",
    "%reduce-scatter-start = ((f32[128,1024]{1,0}), f32[16,1024]{1,0}) reduce-scatter-start(%x), channel_id=2, "
    "replica_groups=[1,8]<=[8], dimensions={0}, to_apply=%add",
    "%reduce-scatter-done = f32[16,1024]{1,0} reduce-scatter-done(%reduce-scatter-start)",
    "%all-reduce-start = f32[16]{0} all-reduce-start(%y), channel_id=3, replica_groups={}, to_apply=%add",
    "%all-reduce-done = f32[16]{0} all-reduce-done(%all-reduce-start)",
    "%permute-start = (u8[4]{0}, u8[4]{0}, u32[], u32[]) collective-permute-start(%z), channel_id=4, "
    "source_target_pairs={{0,1},{1,0}}",
    "%custom-call.1 = (f32[128,128]{1,0}, s8[4194304]{0}) custom-call(%x, %all-gather-done), "
    'custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":'
    '{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["1"],"lhs_batch_dimensions":[]}}}',
    "ROOT %done = f32[8]{0} parameter(2)",
)

SPREAD = (
    "replica_groups=mesh['axis_0'=8,'axis_1'=2] {'axis_1'}, dimensions={1}, "
    'backend_config={"async_collective_fusion_config":{"flag_start":"2","flag_end":"8"}}'
)
TPU = entry(
    "%x = bf16[128,512]{1,0:T(8,128)(2,1)} parameter(0)",
    "%start = (bf16[128,512]{1,0:T(8,128)(2,1)S(1)}, bf16[128,1024]{1,0:T(8,128)(2,1)S(1)}, /*index=2*/u32[]{:S(2)}) "
    "fusion(%x), kind=kCustom, calls=%first",
    "%piece = bf16[128,512]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%start), index=0",
    "%done = bf16[128,1024]{1,0:T(8,128)(2,1)S(1)} fusion(%piece), kind=kCustom, calls=%last",
    "%scattered = bf16[128,512]{1,0:T(8,128)(2,1)S(1)} fusion(%done), kind=kCustom, calls=%all-reduce-scatter.1",
    "%q = bf16[4,256,8,64]{3,1,2,0:T(8,128)(2,1)} parameter(1)",
    "%k = bf16[4,256,8,64]{3,1,2,0:T(8,128)(2,1)} parameter(2)",
    "%scores = bf16[4,8,256,256]{2,3,1,0:T(8,128)(2,1)S(1)} convolution(%q, %k), window={size=4x8 stride=3x7 "
    "lhs_dilate=4x8}, dim_labels=0b1f_0o1i->01bf",
    "%r = bf16[1024,256]{1,0} parameter(3)",
    '%ragged = bf16[1024,512]{1,0} custom-call(%r), custom_call_target="tpu_custom_call", '
    'backend_config={"cost_estimate":{"flops":"268435456","transcendentals":"0"}}',
    "ROOT %out = f32[8]{0} parameter(4)",
    before=f"""%first (a: bf16[128,512]) -> (bf16[128,512], bf16[128,1024], u32[]) {{
  %a = bf16[128,512]{{1,0}} parameter(0)
  %all-gather.40 = bf16[128,1024]{{1,0:T(8,128)(2,1)}} all-gather(%a), channel_id=10, {SPREAD}
  ROOT %begun = (bf16[128,512], bf16[128,1024], u32[]) custom-call(%all-gather.40), custom_call_target="AsyncStart"
}}

%last (b: bf16[128,512]) -> bf16[128,1024] {{
  %b = bf16[128,512]{{1,0}} parameter(0)
  %all-gather.44 = bf16[128,1024]{{1,0:T(8,128)(2,1)}} all-gather(%b), channel_id=10, {SPREAD}
  ROOT %ended = bf16[128,1024] custom-call(%all-gather.44), custom_call_target="AsyncDone"
}}

%all-reduce-scatter.1 (c: bf16[128,1024]) -> bf16[128,512] {{
  %c = bf16[128,1024]{{1,0}} parameter(0)
  %all-reduce.6 = bf16[128,1024]{{1,0}} all-reduce(%c), channel_id=9, replica_groups={{{{0,1}},{{2,3}}}}, to_apply=%add
  ROOT %part = bf16[128,512]{{1,0}} dynamic-slice(%all-reduce.6), dynamic_slice_sizes={{128,512}}
}}

""",
)  # fmt: skip


def summary(dialect):
    return [(one.kind, one.dtype, one.shape, one.bytes, one.group) for one in collectives(dialect)]


def test_the_gpu_compilers_dialect():
    assert summary(GPU) == [
        ("all-gather", "f32", (128, 1024), 128 * 1024 * 4, 4),
        ("reduce-scatter", "f32", (16, 1024), 16 * 1024 * 4, 8),
        ("all-reduce", "f32", (16,), 64, 0),
        ("collective-permute", "u8", (4,), 4, 2),
    ]
    assert collectives(GPU)[0].source == "jit(step)/dot"
    assert flops(GPU) == 2 * 128 * 1024 * 128


def test_the_tpu_compilers_dialect():
    assert summary(TPU) == [
        ("all-gather", "bf16", (128, 1024), 128 * 1024 * 2, 2),
        ("reduce-scatter", "bf16", (128, 512), 128 * 512 * 2, 2),
    ]
    # A product over two batch axes stands as a dilated convolution; most of its places meet a dilation's gap.
    assert flops(TPU) == 2 * 4 * 8 * 256 * 256 * 64 + 268435456


def test_an_asynchronous_computation_counts_where_it_starts():
    wrapped = entry(
        "%x = f32[8]{0} parameter(0)",
        "%begun = ((f32[8]{0}), f32[16]{0}, u32[]) async-start(%x), calls=%inner",
        "%later = ((f32[8]{0}), f32[16]{0}, u32[]) async-update(%begun), calls=%inner",
        "ROOT %ended = f32[16]{0} async-done(%later), calls=%inner",
        before="%inner (y: f32[8]) -> f32[16] {\n  %y = f32[8]{0} parameter(0)\n"
        "  ROOT %both = f32[16]{0} all-gather(%y), channel_id=1, replica_groups={{0,1}}, dimensions={0}\n}\n\n",
    )
    assert summary(wrapped) == [("all-gather", "f32", (16,), 64, 2)]


def test_both_branches_of_a_conditional_are_read():
    shapes = [(4, 6), (6, 6)]
    compiled = text(lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: jnp.sin(x @ w) @ w), *shapes)
    assert flops(compiled) == 3 * 2 * 4 * 6 * 6


def test_arrays_of_less_than_a_byte_an_element():
    parsed = program(entry("ROOT %x = (s4[3,5]{1,0:E(4)}, pred[7], f8e4m3fn[2], c64[2], token[]) parameter(0)"))
    (run,) = runs(parsed)
    assert [array.bytes for array in run.instruction.result] == [math.ceil(15 / 2), 7, 2, 16, 0]


def test_text_that_is_no_program_is_refused():
    for read in (collectives, flops, bytes_moved):
        with pytest.raises(ValueError, match=r"expected the text of a compiled program.*not 'module @jit"):
            read("module @jit_f {}")
