"""Scripted players on the panel: when they unlock what, and how long their plans live.

Nobody has to guess what a scripted player is after: it says so in every step. So its
arm has more to tell than that of an agent.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from jaxplan.core.ahead import begin_ahead
from jaxplan.envs.base import Expert
from jaxplan.eval.panels import Episodes, Panel
from jaxplan.eval.stats import bootstrap
from jaxplan.rollout.schedule import make_worlds
from jaxplan.rollout.scripted import Trajectories, play_scripted

INTERRUPTION = 3  # env steps; a shorter change of goal, such as a fight, is none
_HORIZONS = (100, 300, 600)  # env steps at which achievements are counted, too


@dataclasses.dataclass(frozen=True)
class ScriptedPlay:
    """A scripted player's panel (host).

    Attributes:
        episodes: the account of the episodes.
        unlocked: by episode and event, the env step it first happened in; -1 if never.
        goals: what it was after, [steps, episodes]; -1 once the episode had ended.
    """

    episodes: Episodes
    unlocked: Int[np.ndarray, "episodes E"]
    goals: Int[np.ndarray, "steps episodes"]


def play_scripted_panel(
    panel: Panel, player: Expert, progress: Callable[[int, int], None]
) -> ScriptedPlay:
    """Play the panel's worlds with a scripted player, which has no plan modes.

    Args:
        panel: the worlds.
        player: who plays.
        progress: is told episodes finished and env steps played.
    """
    seeds = np.asarray(panel.seeds)
    lanes = min(panel.rollout.num_lanes, len(seeds))

    def play(start: int) -> Trajectories:
        # Filled up to one size, so that it is compiled once.
        own = jnp.asarray(np.resize(seeds[start : start + lanes], lanes))
        return play_scripted(
            make_worlds(panel.env, own),
            own,
            env=panel.env,
            player=player,
            steps=panel.config.max_steps,
        )

    parts: list[Any] = []
    env_steps = 0
    for start, played in begin_ahead(range(0, len(seeds), lanes), play):
        parts.append(jax.device_get(played))
        done = min(start + lanes, len(seeds))
        env_steps += int(parts[-1].alive[:, : done - start].sum())
        progress(done, env_steps)
    host: Any = jax.tree.map(
        lambda *some: np.concatenate(some, axis=1)[:, : len(seeds)], *parts
    )
    unlocked = np.where(host.events.any(axis=0), host.events.argmax(axis=0), -1)
    return ScriptedPlay(
        episodes=_episodes(host, seeds),
        unlocked=unlocked,
        goals=np.where(host.alive, host.intent.goal, -1),
    )


def _episodes(host: Any, seeds: np.ndarray) -> Episodes:
    nothing = np.zeros(len(seeds), np.int32)
    return Episodes(
        mode=nothing,
        seed=seeds,
        task_return=host.reward.sum(axis=0),
        events=host.events.any(axis=0),
        counts={name: count.sum(axis=0) for name, count in host.counts.items()},
        env_steps=host.alive.sum(axis=0),
        turns=(host.alive & ~host.passive).sum(axis=0),
        plans=nothing,
        plan_tokens=nothing,
        terminated=host.terminated.any(axis=0),
    )


def describe_play(
    play: ScriptedPlay,
    event_names: Sequence[str],
    goal_names: Sequence[str],
    confidence: float,
) -> dict[str, Any]:
    """What a scripted arm has to say beyond a row of results.

    Returns:
        ``median_step`` by event, among the episodes in which it happened;
        ``achievements_by_step``, intervals at earlier horizons; ``plan_life`` by goal:
        share of the steps, number of plans, and mean, median, p90 of their length.
    """
    medians = {
        name: float(np.median(steps[steps >= 0])) if (steps >= 0).any() else None
        for name, steps in zip(event_names, play.unlocked.T, strict=True)
    }
    counts = {
        str(horizon): bootstrap(
            ((play.unlocked >= 0) & (play.unlocked < horizon)).sum(axis=1), confidence
        ).to_json()
        for horizon in _HORIZONS
        if horizon < play.goals.shape[0]
    }
    return {
        "median_step": medians,
        "achievements_by_step": counts,
        "plan_life": plan_life(play.goals.T, goal_names),
    }


def goal_lives(
    goals: Iterable[int], interruption: int = INTERRUPTION
) -> list[tuple[int, int]]:
    """How long each goal was followed: (goal, env steps) one after the other.

    Args:
        goals: of an episode, step by step.
        interruption: a stretch of at most so many steps between two of one goal counts
            as part of it.
    """
    runs = [(goal, len(list(steps))) for goal, steps in itertools.groupby(goals)]
    lives: list[tuple[int, int]] = []
    for goal, length in runs:
        if len(lives) > 1 and lives[-2][0] == goal and lives[-1][1] <= interruption:
            length += lives.pop()[1] + lives.pop()[1]
        lives.append((goal, length))
    return lives


def plan_life(
    episodes: Int[np.ndarray, "episodes steps"], goal_names: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Length of the goals' lives in env steps, by goal, the most frequent first.

    Args:
        episodes: goals by episode and step, -1 once the episode had ended.
        goal_names: of the goals.
    """
    lengths: dict[int, list[int]] = {}
    for goals in episodes:
        for goal, length in goal_lives(goals[goals >= 0].tolist()):
            lengths.setdefault(goal, []).append(length)
    total = sum(map(sum, lengths.values()))
    by_share = sorted(lengths, key=lambda goal: -sum(lengths[goal]))
    return {
        goal_names[goal]: {
            "share": sum(lengths[goal]) / total,
            "plans": len(lengths[goal]),
            "mean": float(np.mean(lengths[goal])),
            "median": float(np.median(lengths[goal])),
            "p90": float(np.quantile(lengths[goal], 0.9)),
        }
        for goal in by_share
    }


def format_play(row: dict[str, Any]) -> str:
    """Write the tables of a scripted arm, from its row of results."""
    lines = [f"{row['arm']}: unlocked in … of the episodes, at step (median)"]
    for name, rate in row["per_event"].items():
        step = row["median_step"][name]
        when = "-" if step is None else f"{step:.0f}"
        lines.append(f"  {name:<20} {rate:7.1%} {when:>6}")
    lines.append(f"  alive at the end     {row['alive']['mean']:7.1%}")
    for horizon, interval in row["achievements_by_step"].items():
        name = f"by step {horizon}"
        lines.append(f"  {name:<20} {interval['mean']:7.2f}")
    lines += ["", "a plan lives for … env steps"]
    head = (
        f"  {'goal':<20} {'share':>7} {'plans':>7} {'mean':>6} {'median':>6} {'p90':>6}"
    )
    lines.append(head)
    for goal, life in row["plan_life"].items():
        lines.append(
            f"  {goal:<20} {life['share']:7.1%} {life['plans']:>7} {life['mean']:6.1f} "
            f"{life['median']:6.0f} {life['p90']:6.0f}"
        )
    return "\n".join(lines) + "\n"
