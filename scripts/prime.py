"""Run the priming experiment of a config: one dataset, four students, one table.

    python scripts/prime.py --config configs/experiments/priming/small.yaml

Every student and seed is a run of its own, started with scripts/train.py, in
``run_root/<name>-<student>-<seed>``; all learn from the dataset of ``<name>-data``. The
same command again goes on where it was. The table is ``run_root/<name>/table.md``.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from jaxplan.config.reader import ConfigError, load_config

TRAIN = Path(__file__).with_name("train.py")
# What each student is given of the teacher's turns, and how it plays. The last one
# spends on a longer history what the first spends on plans.
STUDENTS = {
    "dynamic": ("dynamic", []),
    "naive": ("never", ["sft.plans=stripped"]),
    "shuffled": ("dynamic", ["sft.plans=shuffled"]),
    "history": ("never", ["sft.plans=stripped", "rollout.history={history}",
                          "rollout.segment_tokens={segment_tokens}"]),
}  # fmt: skip
LONGER = 3  # times the history, for the last student
CURVE = "never,every-1,every-2,every-4,every-8,every-16,dynamic"


def main() -> int:
    """Run what has not been run, then write the table."""
    args = _parse()
    try:
        config = load_config(args.config, args.overrides)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    root = Path(config.run_root)
    given = [*args.overrides, f"run_root={config.run_root}"]
    history = LONGER * config.rollout.history
    seen = (history - config.rollout.history) * (config.rollout.observation_tokens + 3)
    sizes = {
        "history": history,
        "segment_tokens": config.rollout.segment_tokens + seen,
    }

    def run(name: str, *overrides: str) -> Path:
        command = [sys.executable, str(TRAIN), "--config", args.config, *given]
        print(f"== {name}", file=sys.stderr, flush=True)
        subprocess.run([*command, f"name={name}", *overrides], check=True)
        return root / name

    try:
        data = run(f"{config.name}-data", "stages=[collect]")
        learn = (f"sft.dataset={data / 'dataset'}", "stages=[sft,evaluate,report]")
        runs: dict[str, list[Path]] = {}
        for seed in range(args.seeds):
            for student, (mode, overrides) in STUDENTS.items():
                own = [override.format(**sizes) for override in overrides]
                name = f"{config.name}-{student}-{seed}"
                modes = f"evaluate.modes=[{mode}]"
                path = run(name, *learn, *own, modes, f"seed={seed}")
                runs.setdefault(student, []).append(path)
        curves = {}
        for student in ("dynamic", "naive"):
            path = run(
                f"{config.name}-{student}-0-curve",
                "stages=[evaluate,report]",
                f"evaluate.run={runs[student][0]}",
                f"evaluate.modes=[{CURVE}]",
                f"evaluate.episodes={args.curve_episodes}",
                f"evaluate.max_steps={args.curve_steps}",
            )
            curves[student] = _results(path)
    except subprocess.CalledProcessError as error:
        return error.returncode
    _write_table(config, runs, curves, root / config.name)
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each student")
    parser.add_argument("--curve-episodes", type=int, default=64)
    parser.add_argument("--curve-steps", type=int, default=600)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_intermixed_args()


def _results(run: Path) -> list[dict]:
    text = (run / "report" / "summary.json").read_text(encoding="utf-8")
    return json.loads(text)["results"]


def _write_table(config, runs, curves, folder: Path) -> None:
    from jaxplan.eval.priming import read_student, summarise, write_table

    events = list(_results(runs["dynamic"][0])[0]["per_event"])
    students = [
        read_student(student, paths, STUDENTS[student][0], len(events))
        for student, paths in runs.items()
    ]
    rows = summarise(students, events, config.evaluate.confidence)
    text = write_table(rows, curves, folder / "table.md")
    result = {"students": rows, "curves": curves}
    (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(text)


if __name__ == "__main__":
    sys.exit(main())
