"""Measure how fast a config's PPO runs on this machine, and in which precision.

    python scripts/bench.py --config configs/quickstart.yaml [key=value ...]
    python scripts/bench.py --config ... ppo.start=runs/quickstart    # a trained agent

Nothing else should run meanwhile. Prints one JSON object: the time to the end of the
first iteration (compilation), medians of the iterations after it, and quantiles of the
difference between sampled and teacher-forced log-probabilities in float32 and bfloat16.
"""

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path

from jaxplan.config.reader import ConfigError, load_config

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # as in scripts/train.py

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "jax"


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--repeats", type=int, default=10, help="iterations timed")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    if args.repeats < 1:
        parser.error(f"--repeats {args.repeats}: at least one iteration is timed")
    try:
        config = load_config(args.config, args.overrides)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    import jax
    from train import make_setting

    from jaxplan.core.runtime import start_jax
    from jaxplan.io.checkpoints import CheckpointDamagedError
    from jaxplan.io.rundir import made_by
    from jaxplan.io.stopping import StopRequest
    from jaxplan.train.bench import log_prob_errors, time_iterations
    from jaxplan.train.setting import load_policy
    from jaxplan.train.state import start_params

    try:
        start_jax(CACHE)
    except (RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        _, setting = make_setting(config, Path(config.run_root), StopRequest())
        if config.ppo.start in ("sft", "chance"):
            key = jax.random.key(config.seed)
            agent = start_params(key, config.model, setting.specs, setting.mesh)
        else:
            other = dataclasses.replace(setting, run_dir=Path(config.ppo.start))
            agent = load_policy(other, "sft")
        measured = time_iterations(setting, agent, args.repeats)
        errors = {
            dtype: log_prob_errors(setting, agent, dtype)
            for dtype in ("float32", "bfloat16")
        }
    except (CheckpointDamagedError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    about = {
        "name": config.name,
        "start": config.ppo.start,
        **made_by(),
        "repeats": args.repeats,
    }
    print(json.dumps(about | measured | {"log_prob_error": errors}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
