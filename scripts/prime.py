"""Run the priming experiment of a config: one dataset, four students, their tables.

    python scripts/prime.py --config configs/experiments/priming/small.yaml

Every student and seed is a run of its own, started with scripts/train.py, in
``run_root/<name>-<student>-<seed>``; all learn from the dataset of ``<name>-data``. The
same command again goes on where it was, and ``--jobs 2`` runs two side by side. Prints
the tables; ``result.json`` is in ``run_root/<name>``.
"""

import argparse
import json
import sys
from itertools import chain
from pathlib import Path

from sweep import load_jobs

from jaxplan.config.reader import ConfigError, load_config
from jaxplan.config.schema import RunConfig
from jaxplan.io.jobs import Job, jobs_at_once, run_jobs

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
FORCED = ("dynamic", "naive")  # whose plan frequency is also set from outside
CURVE = "never,every-1,every-2,every-4,every-8,every-16,dynamic"
# Whom the expert tells when to plan, or when and what; and one of them over how often.
GUIDED = {
    "dynamic": ("prompted-4", "scripted-4"),
    "naive": ("scripted-4",),
    "shuffled": ("scripted-4",),
}
GUIDED_CURVE = ("dynamic", "scripted-1,scripted-2,scripted-4,scripted-8,scripted-16")


def main() -> int:
    """Run what has not been run, then write the table."""
    args = _parse()
    try:
        config = load_config(args.config, args.overrides)
        batches = plan_jobs(config, args)
        if config.plan.prices:
            raise ConfigError(
                [
                    f"plan.prices={list(config.plan.prices)}: students that are told "
                    "prices are measured at each, and the table has one row for each "
                    "student; leave them out"
                ]
            )
        load_jobs(args.config, args.overrides, batches)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    given = [*args.overrides, f"run_root={config.run_root}"]
    command = [sys.executable, str(TRAIN), "--config", args.config, *given]
    command += ["--resume"] * args.resume
    for batch in batches:
        status = run_jobs(command, batch, args.jobs)
        if status:
            return status
    print(_write(config, args.seeds))
    return 0


def plan_jobs(config: RunConfig, args: argparse.Namespace) -> list[list[Job]]:
    """The runs, in batches: each needs those before it, and none of its own."""
    name, root = config.name, Path(config.run_root)
    data = f"{name}-data"
    collect: list[Job] = [(data, ["stages=[collect]"])]
    dataset = f"sft.dataset={root / data / 'dataset'}"
    history = LONGER * config.rollout.history
    seen = (history - config.rollout.history) * (config.rollout.observation_tokens + 3)
    sizes = {
        "history": history,
        "segment_tokens": config.rollout.segment_tokens + seen,
    }
    students: list[Job] = [
        (
            f"{name}-{student}-{seed}",
            [
                dataset,
                "stages=[sft,evaluate,report]",
                *(override.format(**sizes) for override in overrides),
                f"evaluate.modes=[{mode}]",
                f"seed={seed}",
            ],
        )
        for seed in range(args.seeds)
        for student, (mode, overrides) in STUDENTS.items()
    ]

    def play(run: str, as_name: str, modes: str, *sizes: str) -> Job:
        """Let a trained student play again."""
        of_run = [f"evaluate.run={root / run}", f"evaluate.modes=[{modes}]"]
        return as_name, ["stages=[evaluate,report]", *of_run, *sizes]

    small = (
        f"evaluate.episodes={args.curve_episodes}",
        f"evaluate.max_steps={args.curve_steps}",
    )
    curves = [
        play(f"{name}-{student}-0", f"{name}-{student}-0-curve", CURVE, *small)
        for student in FORCED
    ]
    runs = {
        f"{name}-{student}-{seed}": ",".join(modes)
        for seed in range(args.seeds)
        for student, modes in GUIDED.items()
    }
    guided = [play(run, f"{run}-guided", modes) for run, modes in runs.items()]
    student, modes = GUIDED_CURVE
    run = f"{name}-{student}-0"
    guided.append(play(run, f"{run}-guided-curve", modes, *small))
    return [collect, students, curves, guided]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--seeds", type=_count, default=3, help="runs of each student")
    parser.add_argument("--jobs", type=jobs_at_once, default=1, help="side by side")
    parser.add_argument("--curve-episodes", type=_count, default=64)
    parser.add_argument("--curve-steps", type=_count, default=600)
    parser.add_argument("--resume", action="store_true", help="as of train.py")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_intermixed_args()


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a number from 1 on is wanted")
    return int(text)


def _write(config: RunConfig, seeds: int) -> str:
    from jaxplan.eval.priming import (
        format_priming,
        measure,
        read_student,
        summarise,
        summarise_guided,
    )
    from jaxplan.io.rundir import commits_of, made_by, warn_of

    root, name = Path(config.run_root), config.name
    confidence = config.evaluate.confidence

    def results(run: Path) -> list[dict]:
        text = (run / "report" / "summary.json").read_text(encoding="utf-8")
        return json.loads(text)["results"]

    runs = {
        student: [root / f"{name}-{student}-{seed}" for seed in range(seeds)]
        for student in STUDENTS
    }
    forced = {student: root / f"{name}-{student}-0-curve" for student in FORCED}
    events = list(results(runs["dynamic"][0])[0]["per_event"])
    students = [
        read_student(student, paths, STUDENTS[student][0], len(events))
        for student, paths in runs.items()
    ]
    again = {
        student: [run.with_name(f"{run.name}-guided") for run in runs[student]]
        for student in GUIDED
    }
    guided = [
        (mode, read_student(student, again[student], mode, len(events)))
        for student, modes in GUIDED.items()
        for mode in modes
    ]
    student, _ = GUIDED_CURVE
    curve = root / f"{name}-{student}-0-guided-curve"
    first = [*chain(*runs.values()), *forced.values()]
    later = [*chain(*again.values()), curve]
    commits = commits_of(first), commits_of(later)
    for commit in dict.fromkeys(commits):
        warn_of(commit)
    result = {
        "question": config.about.question,
        "run": config.about.run,
        **made_by(),
        "commit": commits[0],
        **measure(root / f"{name}-data", [*first, *later]),
        "students": summarise(students, events, confidence),
        "curves": {student: results(run) for student, run in forced.items()},
        "guided": {
            "commit": commits[1],
            "students": summarise_guided(students, guided, confidence),
            "curve": {"student": student, "results": results(curve)},
        },
    }
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    return format_priming(result)


if __name__ == "__main__":
    sys.exit(main())
