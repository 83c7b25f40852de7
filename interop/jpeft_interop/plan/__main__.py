"""Plan a training step from the command line:

    python -m jpeft_interop.plan --model config.json --method lora --r 16 --topology v5e:4x4 --mesh fsdp=8,tp=2 \\
        --batch 64 --seq 2048
"""

import argparse
import os
import sys
from typing import Any


def main(arguments: list[str] | None = None) -> int:
    args = parsed(arguments)
    if args.platform == "tpu":
        # Nothing runs, so nothing may wait for a TPU that is not there.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax

    if args.platform == "tpu":
        jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
    from ._plan import plan

    try:
        found = plan(
            args.model,
            method=args.method,
            r=args.r,
            target_modules=args.target_modules,
            platform=args.platform,
            topology=args.topology,
            mesh=args.mesh,
            batch=args.batch,
            seq=args.seq,
            target_seq=args.target_seq,
            task=args.task,
            dtype=args.dtype,
            param_dtype=args.param_dtype,
            quantize=args.quantize,
            scan_layers=not args.no_scan_layers,
            remat=None if args.remat == "none" else args.remat,
            loss_chunk_size=args.loss_chunk_size,
            accumulate=args.accumulate,
            full=not args.no_full,
            floor=not args.no_floor,
            search=not args.no_search,
            memory=args.memory,
            effort=args.effort,
        )
    except (ValueError, ImportError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(found.as_json() if args.json else found)
    return 0


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m jpeft_interop.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a folder with a config.json, or such a file")
    parser.add_argument("--method", default="lora", help="PEFT's name for it")
    parser.add_argument("--r", type=int, help="rank of the method; its own default if left out")
    parser.add_argument("--target-modules", type=names, help="names with commas between, or all-linear")
    parser.add_argument("--platform", default="tpu", choices=["tpu", "gpu", "cpu"])
    parser.add_argument("--topology", help="of TPU chips; v5e:4x4 if left out")
    parser.add_argument("--mesh", type=axes, help="fsdp=8,tp=2; all devices for fsdp if left out")
    parser.add_argument("--batch", type=int, required=True, help="rows of one step, over all devices")
    parser.add_argument("--seq", type=int, required=True, help="tokens of a row")
    parser.add_argument("--target-seq", type=int, help="tokens of a decoder's row")
    parser.add_argument("--task", help="of jpeft_interop.models, such as sequence-classification")
    parser.add_argument("--dtype", default="bfloat16", help="of the computation")
    parser.add_argument("--param-dtype", help="of the stored parameters; --dtype if left out")
    parser.add_argument("--quantize", help="of the base: int8, int4, nf4, fp8")
    parser.add_argument("--remat", default="nothing_saveable", help="what a layer keeps for its backward pass, or none")
    parser.add_argument("--loss-chunk-size", type=int, help="tokens whose scores are made at a time")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches a step")
    parser.add_argument("--memory", type=float, help="GiB of one device")
    parser.add_argument("--effort", type=float, default=0.0, help="of the compiler, from -1, the quickest, to 1")
    parser.add_argument("--no-scan-layers", action="store_true", help="layers one by one")
    parser.add_argument("--no-full", action="store_true", help="leave out full fine-tuning")
    parser.add_argument("--no-floor", action="store_true", help="leave out the frozen model")
    parser.add_argument("--no-search", action="store_true", help="leave out the largest batch")
    parser.add_argument("--json", action="store_true", help="numbers in place of a table")
    return parser.parse_args(arguments)


def names(text: str) -> Any:
    listed = [name for name in text.split(",") if name]
    return text if text == "all-linear" else listed


def axes(text: str) -> dict[str, int]:
    try:
        return {name: int(size) for name, size in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; expected sizes by name, such as fsdp=8,tp=2") from None


if __name__ == "__main__":
    sys.exit(main())
