"""Bring weights in from Hugging Face, take them back, and compare logits.

    python scripts/convert.py import DIR        # read it as a run would; writes nothing
    python scripts/convert.py export OUT --run runs/quickstart [--stage sft]
    python scripts/convert.py verify DIR        # against transformers; needs torch,
                                                # and peft where there are adapters

A run starts from a folder with ``model.weights=DIR``; nothing needs converting first.
"""

import argparse
import math
import os
import resource
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

GIB = 2**30


def main() -> int:
    """Run one command; 0 done, 1 the logits differ, 2 it cannot be done."""
    args = _parser().parse_args()
    from jaxplan.io.checkpoints import CheckpointDamagedError

    try:
        return args.run_command(args)
    except (CheckpointDamagedError, ValueError, OSError, ImportError) as error:
        if os.environ.get("JAXPLAN_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True)
    add = commands.add_parser("import", help="check and read a folder as a run would")
    add.set_defaults(run_command=_import)
    add.add_argument("folder", type=Path, metavar="DIR")
    add = commands.add_parser("export", help="write a run's policy as a folder")
    add.set_defaults(run_command=_export)
    add.add_argument("out", type=Path, metavar="OUT")
    add.add_argument("--run", type=Path, required=True, help="directory of the run")
    add.add_argument("--stage", choices=("sft", "ppo"), help="by default the last one")
    add.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32"
    )
    add.add_argument("--shard-gib", type=float, default=4.0, help="the largest file")
    add = commands.add_parser("verify", help="compare logits with transformers")
    add.set_defaults(run_command=_verify)
    add.add_argument("folder", type=Path, metavar="DIR")
    add.add_argument("--tolerance", type=float, default=1e-3, help="of the logits")
    return parser


def _import(args: argparse.Namespace) -> int:
    import jax

    from jaxplan.config.hugging_face import load_hf_shape
    from jaxplan.config.schema import ModelConfig
    from jaxplan.models.adapter_files import load_adapters
    from jaxplan.models.convert import load_hf_llama

    shape = load_hf_shape(args.folder)
    config = ModelConfig(**shape)
    began = time.monotonic()
    params = jax.block_until_ready(
        load_hf_llama(args.folder, config, shape["vocab_size"])
    )
    adapters = load_adapters(args.folder, config, None)
    seconds = time.monotonic() - began
    leaves = jax.tree.leaves((params, adapters))
    count = sum(math.prod(leaf.shape) for leaf in leaves)
    held = sum(leaf.nbytes for leaf in leaves) / GIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{args.folder}: a Llama of {count:,} parameters")
    for key, value in shape.items():
        print(f"  {key}: {value}")
    print(
        f"read in {seconds:.1f} s; {held:.2f} GiB on {jax.devices()[0].device_kind}, "
        f"this process held {peak:.2f} GiB at most\n"
        "start from it: python scripts/train.py --config ... "
        f"model.weights={args.folder}"
    )
    return 0


def _export(args: argparse.Namespace) -> int:
    from jaxplan.io.weights import export_run

    size = int(args.shard_gib * GIB)
    stage = export_run(args.run, args.out, args.stage, args.dtype, size)
    print(f"{args.out}: the {stage} policy of {args.run}, {args.dtype}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from jaxplan.io.parity import compare_logits

    parity = compare_logits(args.folder)
    equal = parity.difference <= args.tolerance
    print(
        f"{args.folder}: logits up to {parity.largest:.2f} differ by at most "
        f"{parity.difference:.2e}: {'the same' if equal else 'NOT the same'} within "
        f"{args.tolerance:g}"
    )
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
