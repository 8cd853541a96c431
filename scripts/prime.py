"""Run the priming experiment of a config: one dataset, four students, their tables.

    python scripts/prime.py --config configs/experiments/priming/small.yaml

Every student and seed is a run of its own, started with scripts/train.py, in
``run_root/<name>-<student>-<seed>``; all learn from the dataset of ``<name>-data``. The
same command again goes on where it was, and ``--jobs 2`` runs two side by side. Prints
the tables; ``result.json`` is in ``run_root/<name>``. With ``--guided`` the students
play again while the world's expert looks on and tells them when to plan, or what: that
table and its ``result.json`` are in ``run_root/<name>-guided``.
"""

import argparse
import dataclasses
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
        batches = plan_guided(config, args) if args.guided else plan_jobs(config, args)
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
    write = _write_guided if args.guided else _write
    print(write(config, args.seeds))
    return 0


@dataclasses.dataclass(frozen=True)
class Runs:
    """Where the experiment's runs are."""

    root: Path
    name: str

    @classmethod
    def of(cls, config: RunConfig) -> "Runs":
        """Those of a config."""
        return cls(Path(config.run_root), config.name)

    @property
    def data(self) -> Path:
        """The one that collects."""
        return self.root / f"{self.name}-data"

    def student(self, student: str, seed: int) -> Path:
        """The one that trains a student."""
        return self.root / f"{self.name}-{student}-{seed}"

    def again(self, student: str, seed: int, what: str) -> Path:
        """One that lets a trained student play again."""
        return self.root / f"{self.name}-{student}-{seed}-{what}"


def plan_jobs(config: RunConfig, args: argparse.Namespace) -> list[list[Job]]:
    """The runs, in batches: each needs those before it, and none of its own."""
    runs = Runs.of(config)
    curves = [
        _play(runs, student, 0, "curve", CURVE, *_small(args)) for student in FORCED
    ]
    return [*_priming(config, args.seeds), curves]


def plan_guided(config: RunConfig, args: argparse.Namespace) -> list[list[Job]]:
    """The runs of the students with their teacher's help, in the same manner."""
    runs, (student, modes) = Runs.of(config), GUIDED_CURVE
    curve = _play(runs, student, 0, "guided-curve", modes, *_small(args))
    guided = [
        _play(runs, student, seed, "guided", ",".join(modes))
        for student, modes in GUIDED.items()
        for seed in range(args.seeds)
    ]
    return [*_priming(config, args.seeds), [curve, *guided]]


def _priming(config: RunConfig, seeds: int) -> list[list[Job]]:
    students = [  # the longest first, so that all cores are done at about one time
        _train(config, student, seed)
        for student in reversed(STUDENTS)
        for seed in range(seeds)
    ]
    return [[(Runs.of(config).data.name, ["stages=[collect]"])], students]


def _small(args: argparse.Namespace) -> tuple[str, str]:
    return (
        f"evaluate.episodes={args.curve_episodes}",
        f"evaluate.max_steps={args.curve_steps}",
    )


def _train(config: RunConfig, student: str, seed: int) -> Job:
    runs, rollout = Runs.of(config), config.rollout
    history = LONGER * rollout.history
    seen = (history - rollout.history) * (rollout.observation_tokens + 3)
    segment_tokens = rollout.segment_tokens + seen
    mode, overrides = STUDENTS[student]
    return runs.student(student, seed).name, [
        f"sft.dataset={runs.data / 'dataset'}",
        "stages=[sft,evaluate,report]",
        *(o.format(history=history, segment_tokens=segment_tokens) for o in overrides),
        f"evaluate.modes=[{mode}]",
        f"seed={seed}",
    ]


def _play(
    runs: Runs, student: str, seed: int, what: str, modes: str, *sizes: str
) -> Job:
    return runs.again(student, seed, what).name, [
        "stages=[evaluate,report]",
        f"evaluate.run={runs.student(student, seed)}",
        f"evaluate.modes=[{modes}]",
        *sizes,
    ]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--seeds", type=_count, default=3, help="runs of each student")
    parser.add_argument("--jobs", type=jobs_at_once, default=1, help="side by side")
    parser.add_argument("--curve-episodes", type=_count, default=64)
    parser.add_argument("--curve-steps", type=_count, default=600)
    parser.add_argument(
        "--guided", action="store_true", help="play with the help of the expert"
    )
    parser.add_argument("--resume", action="store_true", help="as of train.py")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_intermixed_args()


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a number from 1 on is wanted")
    return int(text)


def _write(config: RunConfig, seeds: int) -> str:
    from jaxplan.eval.priming import format_priming, measure, summarise

    runs = Runs.of(config)
    forced = {student: runs.again(student, 0, "curve") for student in FORCED}
    students, events, trained = _students(runs, seeds)
    made = [*trained, *forced.values()]
    result = {
        **_made(config, made),
        **measure(runs.data, made),
        "students": summarise(students, events, config.evaluate.confidence),
        "curves": {student: _results(run) for student, run in forced.items()},
    }
    _save(runs.root / runs.name, result)
    return format_priming(result)


def _write_guided(config: RunConfig, seeds: int) -> str:
    from jaxplan.eval.priming import (
        format_guided,
        playing_seconds,
        read_student,
        summarise_guided,
    )
    from jaxplan.io.rundir import commits_of

    runs, student = Runs.of(config), GUIDED_CURVE[0]
    students, events, trained = _students(runs, seeds)
    played = {
        student: [runs.again(student, seed, "guided") for seed in range(seeds)]
        for student in GUIDED
    }
    curve = runs.again(student, 0, "guided-curve")
    guided = [
        (mode, read_student(student, played[student], mode, len(events)))
        for student, modes in GUIDED.items()
        for mode in modes
    ]
    made = [*chain(*played.values()), curve]
    result = {
        **_made(config, made),
        "students_commit": commits_of(trained),
        "wall_seconds": {"evaluate": playing_seconds(made)},
        "students": summarise_guided(students, guided, config.evaluate.confidence),
        "curve": {"student": student, "results": _results(curve)},
    }
    _save(runs.root / f"{runs.name}-guided", result)
    return format_guided(result)


def _students(runs: Runs, seeds: int) -> tuple[list, list[str], list[Path]]:
    """The students as they play alone, the world's events, and all of their runs."""
    from jaxplan.eval.priming import read_student

    own = {
        student: [runs.student(student, seed) for seed in range(seeds)]
        for student in STUDENTS
    }
    events = list(_results(own["dynamic"][0])[0]["per_event"])
    students = [
        read_student(student, paths, STUDENTS[student][0], len(events))
        for student, paths in own.items()
    ]
    return students, events, [*chain(*own.values())]


def _made(config: RunConfig, made: list[Path]) -> dict:
    """What was asked, and who answered it: the commit of the runs, not of the table."""
    from jaxplan.io.rundir import commits_of, made_by, warn_of

    commit = commits_of(made)
    warn_of(commit)
    about = {"question": config.about.question, "run": config.about.run}
    return {**about, **made_by(), "commit": commit}


def _save(folder: Path, result: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")


def _results(run: Path) -> list[dict]:
    text = (run / "report" / "summary.json").read_text(encoding="utf-8")
    return json.loads(text)["results"]


if __name__ == "__main__":
    sys.exit(main())
