"""Train every point of a sweep with every seed, side by side, and compare.

    python scripts/compare.py --config configs/experiments/estimators/config.yaml

For tiny agents that begin by chance and are judged by how they learn: all seeds of a
point, and all its plan costs, are one population (jaxplan/train/population.py), no
point has a run directory, and no panel is played. What is larger, or begins with SFT,
is for scripts/sweep.py. Prints the table; ``result.json`` is in ``run_root/<name>``.
"""

import argparse
import os
import sys
import time
from pathlib import Path

from jaxplan.config.reader import ConfigError, load_config
from jaxplan.config.schema import RunConfig

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # as in scripts/train.py

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "jax"
COST = "ppo.plan_cost"


def main() -> int:
    """Train, then write the table."""
    args = _parse()
    try:
        config = load_config(args.config, args.overrides)
        if not config.sweep.axes:
            raise ConfigError(["sweep.axes: empty; name a key and its values"])
        populations = [
            (load_config(args.config, [*args.overrides, *shared]), points)
            for shared, points in group_points(config)
        ]
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    from jaxplan.core.runtime import start_jax

    try:
        start_jax(CACHE)
    except (RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    began, curves = time.monotonic(), []
    try:
        for own, points in populations:
            print("==", *(point.name for point in points), file=sys.stderr, flush=True)
            curves += train_points(own, points)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(_write(config, curves, time.monotonic() - began))
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_intermixed_args()


def group_points(config: RunConfig) -> list[tuple[list[str], list]]:
    """Points that differ in nothing but their plan cost, and what they share."""
    from jaxplan.eval.sweep import Point, points

    groups: dict[tuple, list] = {}
    for point in points(config.sweep):
        shared = {key: value for key, value in point.values.items() if key != COST}
        groups.setdefault(tuple(Point(shared).overrides), []).append(point)
    return [(list(shared), group) for shared, group in groups.items()]


def train_points(config: RunConfig, points: list) -> list[tuple]:
    """Train one population; every point with its metrics, [iterations, seeds]."""
    from jaxplan.envs.worlds import make_env
    from jaxplan.io.chat import open_tokenizer
    from jaxplan.rollout.setup import check_sizes, longest_turn, make_language
    from jaxplan.train import population

    tokenizer, env = open_tokenizer(config), make_env(config.env)
    language = make_language(tokenizer, env, config.plan)
    turn_tokens = longest_turn(tokenizer, env, config.plan)
    check_sizes(language, config.rollout, config.plan, turn_tokens)
    common = population.make_common(config, env, turn_tokens)
    seeds = config.sweep.seeds
    costs = [float(point.values.get(COST, config.ppo.plan_cost)) for point in points]
    members = population.begin(
        [config.seed + number for number in range(seeds)] * len(points),
        [cost for cost in costs for _ in range(seeds)],
        language,
        common,
    )
    _, metrics = population.train(members, config.ppo.iterations, language, common)
    of_point = [
        {name: every[:, number * seeds :][:, :seeds] for name, every in metrics.items()}
        for number in range(len(points))
    ]
    return list(zip(points, of_point, strict=True))


def _write(config: RunConfig, curves: list[tuple], seconds: float) -> str:
    from jaxplan.eval.comparison import summarise_seeds, write_comparison
    from jaxplan.io.rundir import made_by, warn_of

    rows: list[dict] = []
    for point, metrics in curves:
        first = rows[0] if rows else None
        rows.append(summarise_seeds(point, metrics, first, config.evaluate.confidence))
    made = made_by()
    warn_of(made["commit"])
    about = {
        "question": config.about.question,
        "run": config.about.run,
        **made,
        "wall_seconds": seconds,
        "seeds": config.sweep.seeds,
        "iterations": config.ppo.iterations,
    }
    return write_comparison(rows, about, Path(config.run_root) / config.name)


if __name__ == "__main__":
    sys.exit(main())
