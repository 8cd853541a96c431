"""Run a sweep: one dataset, one primed agent a seed, one PPO run a point and seed.

    python scripts/sweep.py --config configs/sweeps/plan_cost.yaml
    python scripts/sweep.py --config configs/sweeps/plan_cost.yaml --list
    python scripts/sweep.py --config configs/sweeps/plan_cost.yaml --index 3

Every run is one of scripts/train.py, in ``run_root/<name>-...``; the same command again
goes on where it was. ``--list`` prints one line a job and ``--index`` runs one of them,
for a job array; what several jobs need is made once, by ``--index shared``. ``--jobs``
runs several side by side. The table and the figure are in ``run_root/<name>``. Agents
that are told prices (``plan.prices``) have a row for each, and need no axis.
"""

import argparse
import itertools
import shlex
import sys
from pathlib import Path

from jaxplan.config.reader import ConfigError, load_config
from jaxplan.config.schema import RunConfig
from jaxplan.io.jobs import Job, jobs_at_once, run_jobs

TRAIN = Path(__file__).with_name("train.py")
# Keys that make no difference between points: what a sweep sets itself, and sections
# that no run of a point reads. Dataset and primed agents are the same for all points.
SET = (
    *("name", "run_root", "seed", "stages"),
    *("ppo.start", "evaluate.arms", "evaluate.modes"),
)
UNUSED = ("about", "collect", "expert", "sft", "sweep")


def main() -> int:
    """Run what has not been run, then write the table."""
    args = _parse()
    try:
        config = load_config(args.config, args.overrides)
        *shared, points = batches = plan_jobs(config)
        check_table(config, load_jobs(args.config, args.overrides, batches))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    if args.list:
        for number, (name, overrides) in enumerate(points):
            print(number, name, shlex.join(overrides))
        return 0
    chosen = {None: batches, "shared": shared}.get(args.index)
    if chosen is None:
        number = int(args.index)
        if number >= len(points):
            print(
                f"--index {number}: there are 0 to {len(points) - 1}", file=sys.stderr
            )
            return 2
        chosen = [[points[number]]]
    command = [sys.executable, str(TRAIN), "--config", args.config, *args.overrides]
    command += ["--resume"] * args.resume
    for batch in chosen:
        status = run_jobs(command, batch, args.jobs)
        if status:
            return status
    if args.index is None:
        _write(config)
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("--list", action="store_true", help="print the jobs")
    parser.add_argument("--index", type=_index, help="run one job, or 'shared'")
    parser.add_argument("--jobs", type=jobs_at_once, default=1, help="side by side")
    parser.add_argument("--resume", action="store_true", help="as of train.py")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_intermixed_args()


def _index(text: str) -> str:
    if text != "shared" and not text.isdecimal():
        raise argparse.ArgumentTypeError(
            f"{text!r}: a number of --list is wanted, or 'shared'"
        )
    return text


def plan_jobs(config: RunConfig) -> list[list[Job]]:
    """The runs, in batches: each needs those before it, and none of its own.

    The last one has a run for each point and seed; all others are what these share.

    Raises:
        ConfigError: the config varies nothing, or what has no effect.
    """
    from jaxplan.eval.sweep import points

    _check_axes(config)
    root, name = Path(config.run_root), config.name
    data = root / f"{name}-data" / "dataset"
    collected = [(f"{name}-data", [_stages("collect")])]
    primings: list[Job] = []
    jobs: list[Job] = []
    for seed in seeds_of(config):
        start, own_seed = config.ppo.start, f"seed={seed}"
        if primes(config):
            primed = f"{name}-primed-{seed}"
            learn = [f"sft.dataset={data}", _stages("sft"), own_seed]
            primings.append((primed, learn))
            start = str(root / primed)
        for point in points(config.sweep):
            own = [
                *point.overrides,
                own_seed,
                f"ppo.start={start}",
                _stages("ppo,evaluate,report"),
                f"evaluate.arms=[{arm_of(config)}]",
                f"evaluate.modes=[{mode_of(config, point)}]",
            ]
            jobs.append((run_name(config, point, seed), own))
    if len({name for name, _ in jobs}) < len(jobs):
        raise ConfigError(["sweep.axes: two points have one name; name a value once"])
    return [collected, primings, jobs] if primes(config) else [jobs]


def run_name(config: RunConfig, point, seed: int) -> str:
    """The name of the run of a point and seed."""
    return "-".join(filter(None, (config.name, point.name, str(seed))))


def _check_axes(config: RunConfig) -> None:
    """Refuse axes along which all runs would be the same."""
    axes = [key for key, _ in config.sweep.axes]
    if not axes and not config.plan.prices:
        raise ConfigError(["sweep.axes: empty; name a key and its values"])
    idle = [key for key in axes if key in SET or key.partition(".")[0] in UNUSED]
    if idle:
        raise ConfigError(
            [
                f"sweep.axes: {', '.join(idle)} would change nothing: points differ in "
                f"their PPO alone, and a sweep itself sets {', '.join(SET)}"
            ]
        )
    if len({*axes}) < len(axes):
        raise ConfigError([f"sweep.axes: {axes}: name each key once"])


def _stages(names: str) -> str:
    return f"stages=[{names}]"


def primes(config: RunConfig) -> bool:
    """Whether PPO starts from an agent of the sweep's own."""
    return config.ppo.start == "sft"


def seeds_of(config: RunConfig) -> range:
    """The seeds of training; each names its runs."""
    return range(config.seed, config.seed + config.sweep.seeds)


def arm_of(config: RunConfig) -> str:
    """What the report calls the agent after PPO."""
    return "chance+rl" if config.ppo.start == "chance" else "sft+rl"


def mode_of(config: RunConfig, point) -> str:
    """The plan mode an agent is measured in: that it was trained in."""
    return str(point.values.get("ppo.mode", config.ppo.mode))


def load_jobs(
    file: str, overrides: list[str], batches: list[list[Job]]
) -> list[RunConfig]:
    """The configs of all runs, so that mistakes are told before anything runs.

    Raises:
        ConfigError: naming every mistake of the first run that has one.
    """
    jobs = itertools.chain(*batches)
    return [load_config(file, [*overrides, f"name={name}", *own]) for name, own in jobs]


def check_table(config: RunConfig, runs: list[RunConfig]) -> None:
    """Refuse what cannot be told in one table and figure.

    Raises:
        ConfigError: runs are told different prices, or there is nothing to draw beside.
    """
    from jaxplan.eval.sweep import read_rows

    for run in runs:
        if run.plan.prices != config.plan.prices:
            raise ConfigError(
                [
                    f"plan.prices={list(run.plan.prices)} in {run.name}: all points of "
                    f"a sweep are told the same prices, here {list(config.plan.prices)}"
                ]
            )
    if config.sweep.beside:
        try:
            read_rows(Path(config.sweep.beside))
        except ValueError as error:
            raise ConfigError([f"sweep.beside: {error}"]) from error


def _write(config: RunConfig) -> None:
    from jaxplan.eval.sweep import points, summarise_point, write_sweep
    from jaxplan.io.rundir import made_by, warn_of

    root, rows = Path(config.run_root), []
    for point in points(config.sweep):
        runs = [root / run_name(config, point, seed) for seed in seeds_of(config)]
        arm, mode = arm_of(config), mode_of(config, point)
        confidence = config.evaluate.confidence
        for price in config.plan.prices or [None]:
            first = rows[0] if rows else None
            told = (confidence, price, first)
            rows.append(summarise_point(point, runs, arm, mode, *told))
    commits = sorted({commit for row in rows for commit in row.pop("commits")})
    for commit in commits:
        warn_of(commit or None)
    about = {
        "question": config.about.question,
        "run": config.about.run,
        "start": Path(config.ppo.start).name,  # where it lies is nobody's business
        **made_by(),
        "commit": ", ".join(commits) if all(commits) else None,
    }
    beside = Path(config.sweep.beside) if config.sweep.beside else None
    print(write_sweep(rows, about, root / config.name, beside))


if __name__ == "__main__":
    sys.exit(main())
