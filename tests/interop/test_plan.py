"""Plans: bytes and operations against what shapes say, the compiler's refusals, the search, and bad input."""

import dataclasses
import importlib.util
import json
import math
import random

import jax
import jax.numpy as jnp
import optax
import pytest

import jpeft
import jpeft_interop
from jpeft_interop.models import FlaxAutoModelForCausalLM
from jpeft_interop.plan import __main__ as command_line, _plan
from jpeft_interop.plan._devices import target
from jpeft_interop.plan._measure import device_bytes, is_refusal, measured, needed_bytes
from jpeft_interop.plan._search import largest
from jpeft_interop.plan._steps import full_step
from jpeft_interop.plan._workload import workload

LLAMA = dict(
    model_type="llama",
    vocab_size=96,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)
T5 = dict(
    model_type="t5", vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
)
ALL_LINEAR = jpeft.LoraConfig(r=4, target_modules="all-linear")
ON_CPU = dict(platform="cpu", mesh={"fsdp": 2}, batch=4, seq=16, progress=False)


def plan(model=LLAMA, **settings):
    return jpeft_interop.plan(model, **{**ON_CPU, **settings})


def size_of(config, bits):
    model = FlaxAutoModelForCausalLM.from_config(config, abstract=True)
    return sum(leaf.size for leaf in jax.tree.leaves(model.params)) * bits // 8


@pytest.fixture(scope="module")
def llama():
    return plan(method=ALL_LINEAR, param_dtype=jnp.float32)


def test_bytes_are_those_of_the_shapes(llama):
    # Norms alone are on both devices; all else is split between them.
    whole = size_of(LLAMA, 32)
    norms = (2 * 3 + 1) * 64 * 4
    assert llama.full.parameters == llama.adapter.parameters == llama.floor.parameters == (whole - norms) // 2 + norms
    # AdamW: two moments of what trains, and a counter; the adapter has its scalings beside.
    assert llama.full.optimizer == 2 * llama.full.parameters + 4
    scalings = 7 * 3 * 4
    assert llama.adapter.optimizer == 2 * (llama.adapter.adapter - scalings) + 4
    assert llama.adapter.batch == 2 * (4 // 2) * 16 * 4
    for step in llama.steps.values():
        parts = step.parameters + step.adapter + step.optimizer + step.batch + step.temporaries + step.other
        assert step.total == parts and step.fits is None and step.largest_batch is None and step.refusal is None


def test_flops_are_the_floors_and_the_adapters_own(llama):
    tokens, sizes = 4 * 16 // 2, {"qo": (64, 64), "kv": (64, 32), "mlp": (64, 128)}
    ends = 2 * sum(sizes["qo"]) + 2 * sum(sizes["kv"]) + 3 * sum(sizes["mlp"])
    once = 2 * 4 * 3 * ends * tokens
    # Forward, and two products for one backward; the forward pass again, but for what nothing needs twice.
    added = llama.adapter.flops - llama.floor.flops
    assert 3 * once <= added <= 4 * once
    # In full each product has three of its size, and with remat four; frozen it has one fewer.
    products = 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128) * 2 * tokens
    assert llama.full.flops - llama.floor.flops > 0.9 * products
    assert llama.full.collectives and {one.kind for one in llama.full.collectives} >= {"all-gather"}


def test_as_text_and_as_numbers(llama):
    read = json.loads(llama.as_json())
    assert read["adapter"]["flops"] == llama.adapter.flops and read["settings"]["mesh"] == {"fsdp": 2}
    assert read["settings"]["trainable"] == 4 * 3 * (2 * 128 + 2 * 96 + 3 * 192)
    lines = str(llama).splitlines()
    assert lines[0].startswith("llama, 0.00 B parameters in float32; 12,288 train with LORA r=4")
    (fits,) = [line for line in lines if line.startswith("fits")]
    assert fits.split() == ["fits"] + ["not", "known"] * 3


def work_on(where, model=LLAMA, seq=16, param_dtype=jnp.bfloat16):
    return workload(
        model,
        task=None,
        mesh=where.mesh,
        dtype=jnp.bfloat16,
        param_dtype=param_dtype,
        scan_layers=True,
        remat="nothing_saveable",
        seq=seq,
        target_seq=None,
        loss_chunk_size=None,
    )


def test_the_size_of_a_program_is_that_of_any_depth():
    def lines(depth):
        work = work_on(target("cpu", None, {"fsdp": 1}), {**LLAMA, "num_hidden_layers": depth}, seq=8)
        with jax.set_mesh(work.mesh), jax.numpy_dtype_promotion("standard"):
            return len(full_step(work, optax.adamw(1e-4), 1).lower(2).as_text().splitlines())

    assert lines(80) == lines(8)


def test_accumulation_keeps_the_operations(llama):
    work = work_on(target("cpu", None, {"fsdp": 2}), param_dtype=jnp.float32)
    found = measured(full_step(work, optax.adamw(1e-4), 2), work, 4, None)
    assert found.flops == llama.full.flops
    assert found.batch == llama.full.batch and found.parameters == llama.full.parameters


def test_an_encoder_and_a_decoder_with_a_quantised_base():
    found = plan(T5, quantize="int8", seq=8, target_seq=6, full=False, floor=False)
    assert found.settings["task"] == "seq2seq-lm" and found.settings["target_seq"] == 6
    assert found.settings["method"] == "LORA r=8" and found.adapter.flops > 0
    assert found.adapter.batch == (4 // 2) * (8 + 6) * 4
    # The dense tree in bfloat16, split in two, would be half of its numbers times two bytes.
    assert found.adapter.parameters < 0.75 * found.settings["parameters"]
    assert "base in int8" in str(found)


def test_labels_of_another_task():
    found = plan({**LLAMA, "pad_token_id": 0}, task="sequence-classification", r=2, full=False, floor=False)
    assert found.adapter.batch == (4 // 2) * (16 + 1) * 4


def test_the_largest_batch_is_in_whole_units(monkeypatch, llama):
    """Rows that the mesh and the micro-batches divide; the compiler is played by a line."""

    def measure(step, work, rows, memory, effort, details=True):
        total = 1000 + 70 * rows
        return dataclasses.replace(llama.adapter, total=total, fits=total <= memory)

    monkeypatch.setattr(_plan, "measured", measure)
    found = plan(r=2, accumulate=2, memory=10_000 / 2**30)
    assert [step.largest_batch for step in found.steps.values()] == [128] * 3 and found.memory == 10_000
    assert plan(r=2, batch=4, memory=1100 / 2**30).adapter.largest_batch == 0
    assert "largest batch that fits" in str(found)


@pytest.mark.parametrize("says_how_much", [True, False])
def test_the_search_finds_the_largest_of_any_growth(says_how_much):
    draw = random.Random(5)
    for _ in range(200):
        fixed, slope, bend, start = draw.randint(0, 900), draw.randint(1, 90), draw.random(), draw.randint(1, 40)
        sizes = [fixed + slope * units + int(bend * units**1.5) for units in range(1100)]
        tried = []

        def total(units, sizes=sizes, tried=tried):
            tried.append(units)
            return sizes[units] <= 1000, sizes[units] if says_how_much else None

        expected = max((units for units in range(1, 1100) if sizes[units] <= 1000), default=0)
        assert largest(total, 1000, start, total(start)) == expected
        assert len(tried) == len(set(tried)) <= 10 + 2 * math.log2(expected + start + 2)


def test_a_model_that_cannot_fit_is_an_answer():
    seven_billion = {**LLAMA, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    seven_billion |= {"num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000}
    where = target("tpu", "v5e:1x1", None)
    work = work_on(where, seven_billion, seq=128)
    step = full_step(work, optax.adamw(1e-4), 1)
    found = measured(step, work, 1, where.memory)
    assert found.fits is False and "15.75G" in found.refusal
    # The weights, their gradient and two moments.
    assert found.total > 3.5 * found.parameters and found.parameters == 2 * 6_738_415_616
    assert found.temporaries is None and found.flops is None and found.collectives == ()


def test_a_step_compiled_for_a_tpu():
    wide = {**LLAMA, "hidden_size": 256, "intermediate_size": 512, "num_key_value_heads": 4}
    settings = dict(mesh={"fsdp": 2, "tp": 2}, batch=4, seq=128, r=8, full=False, floor=False, search=False)
    there = plan(wide, **{**settings, "platform": "tpu", "topology": "v5e:2x2"})
    here = plan(wide, **settings)
    assert there.memory == int(15.75 * 2**30) and there.adapter.fits and here.adapter.fits is None
    assert there.settings["device"] == "TPU v5 lite" and there.settings["topology"] == "v5e:2x2"
    for name in ("parameters", "adapter", "optimizer", "batch"):
        assert getattr(there.adapter, name) == getattr(here.adapter, name)
    assert there.adapter.flops == pytest.approx(here.adapter.flops, rel=0.02)
    assert {one.kind for one in there.adapter.collectives} >= {"all-gather"}
    assert "v5e:2x2 (TPU v5 lite, 15.75 GiB each), mesh fsdp=2, tp=2, 4 x 128 tokens" in str(there)


MESSAGES = {
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (53.03G) exceeds "
    "available HBM (15.75G).": 53.03 * 2**30,
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 900.5M of 15.75G "
    "hbm.": 900.5 * 2**20,
    "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 12 bytes": None,
}


def test_refusals_are_told_from_other_errors():
    for message, needed in MESSAGES.items():
        assert is_refusal(message) and needed_bytes(message) == (None if needed is None else int(needed))
    assert not is_refusal("INTERNAL: the compiler failed")


def test_other_errors_of_the_compiler_are_raised(monkeypatch):
    def refuse(self, *args, **kwargs):
        raise jax.errors.JaxRuntimeError("INTERNAL: the compiler failed")

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL: the compiler failed"):
        plan(r=2)


def test_the_compilers_effort(monkeypatch):
    asked = []

    def compile_(self, compiler_options=None):
        asked.append(compiler_options)
        raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: No such compile option: 'exec_time_optimization_effort'")

    monkeypatch.setattr(jax.stages.Lowered, "compile", compile_)
    with pytest.raises(ValueError, match="effort is -0.5, but the compiler of JAX .* has no such setting: leave it"):
        plan(r=2, effort=-0.5)
    assert asked == [{"exec_time_optimization_effort": -0.5}]


def test_bytes_of_four_bits():
    whole = jax.ShapeDtypeStruct((3, 5), jnp.int4)
    key = jax.eval_shape(lambda: jax.random.key(0))
    assert device_bytes([whole, jax.ShapeDtypeStruct((2,), jnp.bfloat16), key]) == 8 + 4


def test_planning_for_a_tpu_asks_for_its_compiler(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'package libtpu holds: pip install "jpeft\[plan\]"'):
        plan(platform="tpu", mesh=None)


WRONG = {
    "platform is 'tpus'; expected 'tpu', 'gpu' or 'cpu'": dict(platform="tpus"),
    "platform is 'gpu', but JAX has no such devices here": dict(platform="gpu"),
    "topology is 'v9z:4x4'; expected the TPU's name, a colon, .* v5e:2x2, 2x4": dict(
        platform="tpu", topology="v9z:4x4"
    ),
    "topology is 'v5e:4x4x4', but a v5e has 2 axes": dict(platform="tpu", topology="v5e:4x4x4"),
    "topology 'v5e:3x5' is not one of libtpu's: .*not divisible": dict(platform="tpu", topology="v5e:3x5"),
    "mesh fsdp=8 x tp=3 takes 24 devices, but v5e:4x4 has 16": dict(
        platform="tpu", topology="v5e:4x4", mesh={"fsdp": 8, "tp": 3}
    ),
    "mesh fsdp=9 takes 9 devices, but this machine's cpu has 8": dict(mesh={"fsdp": 9}),
    "mesh is {'fsdp': 0}; expected the size of each axis": dict(mesh={"fsdp": 0}),
    "memory is -1; expected the GiB of one device": dict(memory=-1),
    "batch is 5, which 2 does not divide: .* over 2 devices, in 1 micro-batches a step; nearest: 4": dict(batch=5),
    "batch is 2, which 6 does not divide: .* in 3 micro-batches a step; nearest: 6": dict(batch=2, accumulate=3),
    "seq is 0; expected a whole number of at least 1": dict(seq=0),
    "effort is 2; expected a number from -1": dict(effort=2),
    "task is 'seq2seq-lm'; for model_type 'llama' expected one of: causal-lm, seq": dict(task="seq2seq-lm"),
    "loss_chunk_size is 8, for task 'sequence-classification'; only causal-lm": dict(
        task="sequence-classification", loss_chunk_size=8
    ),
    "method is 'lroa'; expected the config of a method, or one of: .*lora": dict(method="lroa"),
    "method 'ia3' has no rank r; give its config, such as jpeft.IA3Config": dict(method="ia3", r=4),
    "method is a LoraConfig, and {'r': 4, 'target_modules': None} are given beside it": dict(
        method=jpeft.LoraConfig(), r=4
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_go_together_is_refused(message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace("{", r"\{")):
        plan(**WRONG[message])


def arguments(tmp_path, *more):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    common = ["--model", str(tmp_path), "--batch", "4", "--seq", "8", "--no-full", "--no-floor"]
    return [*common, *more]


def test_the_command_line(tmp_path, capsys, monkeypatch, llama):
    given = ["--platform", "cpu", "--mesh", "fsdp=2,tp=2", "--r", "2", "--target-modules", "q_proj,o_proj"]
    assert command_line.main(arguments(tmp_path, *given, "--memory", "0.000001", "--no-search")) == 0
    table = capsys.readouterr().out
    assert "mesh fsdp=2, tp=2" in table and f"{3 * 2 * 4 * 64:,} train with LORA r=2" in table
    (fits,) = [line for line in table.splitlines() if line.startswith("fits")]
    assert fits.split() == ["fits", "no"]
    monkeypatch.setattr(_plan, "plan", lambda model, **settings: llama)
    assert command_line.main(arguments(tmp_path, "--json", "--target-modules", "all-linear")) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["dtype"] == "bfloat16"


def test_the_command_line_says_what_is_wrong(tmp_path, capsys):
    assert command_line.main(arguments(tmp_path, "--topology", "v5e:5")) == 2
    assert "error: topology is 'v5e:5', but a v5e has 2 axes" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command_line.main(arguments(tmp_path, "--mesh", "fsdp:2"))
    assert "'fsdp:2'; expected sizes by name, such as fsdp=8,tp=2" in capsys.readouterr().err
