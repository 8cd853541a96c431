"""A panel: one arm on a fixed list of worlds, in every plan mode, modes side by side.

The seed of a world fixes the world and all that is random in the episode, so every arm
and every mode meets the same worlds, whatever the batch.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxplan.config.schema import EvaluateConfig, ModelConfig, RolloutConfig
from jaxplan.core.mesh import num_shards, to_host
from jaxplan.envs.base import Expert, TextEnv
from jaxplan.envs.guided import GuidedEnv
from jaxplan.eval.report import Result, make_result
from jaxplan.eval.stats import bootstrap
from jaxplan.models.params import LlamaParams
from jaxplan.plan.grammar import GUIDED, parse_mode
from jaxplan.rollout.play import play_segments, take_lanes
from jaxplan.rollout.rounds import Language, init_carry
from jaxplan.rollout.schedule import (
    Dealer,
    EpisodeList,
    every_world_in_every_mode,
    make_worlds,
)
from jaxplan.rollout.segment import Segment

_FEWEST_LANES = 8  # fewer do not make a step cheaper


@dataclasses.dataclass(frozen=True)
class Episodes:
    """The account of finished episodes, one row each (host).

    Attributes:
        mode: index of the plan mode.
        seed: of the world.
        task_return: undiscounted sum of task rewards.
        events: achievements unlocked, [episodes, events].
        counts: what else the world counts, by name.
        env_steps: steps of the world.
        turns: choices of the agent.
        plans: turns with a plan.
        plan_tokens: plan-text tokens.
        terminated: False where the time limit ended it.
    """

    mode: np.ndarray
    seed: np.ndarray
    task_return: np.ndarray
    events: np.ndarray
    counts: dict[str, np.ndarray]
    env_steps: np.ndarray
    turns: np.ndarray
    plans: np.ndarray
    plan_tokens: np.ndarray
    terminated: np.ndarray

    def of_mode(self, mode: int) -> "Episodes":
        """The episodes of one mode, by seed."""
        rows = np.flatnonzero(self.mode == mode)
        rows = rows[np.argsort(self.seed[rows])]
        columns = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return Episodes(**jax.tree.map(lambda column: column[rows], columns))


@dataclasses.dataclass(frozen=True)
class Panel:
    """What all arms are measured on.

    Attributes:
        env: the worlds.
        config: which of them, and the plan modes.
        rollout: sizes of the rollout.
        model: sizes of the model.
        budget: plan-text tokens a turn may have.
        turn_tokens: tokens of the longest turn.
        guide: whose plans are given in the modes with a guide.
        style: how the guide words them, index into ``guide.styles``.
    """

    env: TextEnv
    config: EvaluateConfig
    rollout: RolloutConfig
    model: ModelConfig
    budget: int
    turn_tokens: int
    guide: Expert | None = None
    style: int = 0

    @property
    def played(self) -> TextEnv:
        """The world that is played: with the guide, where a mode asks for it."""
        modes = [parse_mode(mode) for mode in self.config.modes]
        if self.guide is None or min(modes) > GUIDED:
            return self.env
        return GuidedEnv(self.env, self.guide, self.style)

    @property
    def seeds(self) -> jax.Array:
        """The worlds of the panel."""
        return self.config.seed + jnp.arange(self.config.episodes, dtype=jnp.int32)

    def listed(self) -> EpisodeList:
        """All worlds in all modes."""
        modes = jnp.array([parse_mode(m) for m in self.config.modes], jnp.int32)
        worlds = make_worlds(self.played, self.seeds)
        return every_world_in_every_mode(worlds, self.seeds, modes)


def play_panel(
    params: LlamaParams,
    panel: Panel,
    language: Language,
    listed: EpisodeList,
    progress: Callable[[int, int], None],
) -> tuple[Episodes, list[Segment]]:
    """Play the panel with one policy, segment by segment, until all episodes ended.

    Args:
        params: the policy.
        panel: worlds and modes.
        language: the tokenizer's tables for ``panel.played``.
        listed: the episodes of the panel, ``Panel.listed``.
        progress: is told episodes finished and env steps played; what it raises
            ends the panel.

    Returns:
        The episodes, and the segments of the first lane (host), for a replay.
    """
    lanes = panel.rollout.num_lanes
    dealer = Dealer(listed, lanes, _fewer(lanes))
    rows: list[dict[str, Any]] = []
    lane_segments: list[Segment] = []
    finished = env_steps = 0
    segments = _segments(params, panel, language, dealer)
    while finished < len(listed):
        segment = next(segments)
        new = _finished_rows(segment, listed, dealer)
        rows.append(new)
        lane_segments.append(first_lane(segment))
        finished += len(new["seed"])
        env_steps += int(new["env_steps"].sum())
        progress(finished, env_steps)
    columns = jax.tree.map(lambda *parts: np.concatenate(parts), *rows)
    modes = [parse_mode(mode) for mode in panel.config.modes]
    columns["mode"] = np.array([modes.index(m) for m in columns["mode"].tolist()])
    return Episodes(**columns), lane_segments


def _segments(
    params: LlamaParams, panel: Panel, language: Language, dealer: Dealer
) -> Iterator[Segment]:
    """Play what is dealt, in all lanes and then in those that have not finished."""
    env, key, schedule = panel.played, jax.random.key(0), dealer.schedule()
    carry = init_carry(env, language, schedule, key, panel.rollout)
    while True:
        carry = yield from play_segments(
            params,
            carry,
            language,
            dealer.schedules(),
            env=env,
            config=panel.rollout,
            model=panel.model,
            budget=panel.budget,
            turn_tokens=panel.turn_tokens,
        )
        carry = take_lanes(carry, dealer.narrow())


def _fewer(num_lanes: int) -> int:
    """With how many lanes to end, or 0: it is another program to be compiled."""
    mesh = jax.sharding.get_mesh()
    quarter = num_lanes // 4
    worth = quarter >= _FEWEST_LANES
    fits = mesh.empty or quarter % num_shards(mesh) == 0
    return quarter if worth and fits else 0


def first_lane(segment: Segment) -> Segment:
    """Stream and turns of lane 0, on the host."""
    tokens, turns = segment.stream, segment.turns
    stream, turns = to_host(jax.tree.map(lambda array: array[:1], (tokens, turns)))
    return dataclasses.replace(segment, stream=stream, turns=turns)


def _finished_rows(
    segment: Segment, listed: EpisodeList, dealer: Dealer
) -> dict[str, Any]:
    ends: Any = to_host(segment.episodes)
    where = np.nonzero(ends.finished)  # (round, lane) of every finished episode
    number = dealer.collect(where[1], ends.entry[where])
    stats = jax.tree.map(lambda column: column[where], ends.stats)
    return {
        "mode": listed.mode[number],
        "seed": listed.seed[number],
        "terminated": ends.terminated[where],
        **{
            field.name: getattr(stats, field.name)
            for field in dataclasses.fields(stats)
        },
    }


def result_of(
    arm: str,
    mode: str,
    episodes: Episodes,
    event_names: tuple[str, ...],
    confidence: float,
) -> Result:
    """One row of the result table, with bootstrap intervals over episodes.

    ``alive`` is the share of episodes that the time limit ended, and not death.
    """
    turns = np.maximum(episodes.turns, 1)
    columns = {
        "achievements": episodes.events.sum(axis=1),
        "return": episodes.task_return,
        "plan_rate": episodes.plans / turns,
        "plan_tokens_per_turn": episodes.plan_tokens / turns,
        "steps": episodes.env_steps,
    }
    row = make_result(
        arm, mode, columns, episodes.counts, episodes.events, event_names, confidence
    )
    alive = bootstrap((~episodes.terminated).astype(float), confidence)
    return row | {"alive": alive.to_json()}


def make_probe(
    panel: Panel, language: Language
) -> Callable[[LlamaParams], dict[str, float]]:
    """Prepare a panel that is played again and again while an agent learns.

    Args:
        panel: worlds and modes.
        language: the tokenizer's tables.

    Returns:
        What plays it with a policy, and tells the means as metrics.
    """
    listed = panel.listed()

    def probe(params: LlamaParams) -> dict[str, float]:
        episodes, _ = play_panel(params, panel, language, listed, lambda *_: None)
        turns = np.maximum(episodes.turns, 1)
        return {
            "panel/achievements": float(episodes.events.sum(axis=1).mean()),
            "panel/return": float(episodes.task_return.mean()),
            "panel/alive": float((~episodes.terminated).mean()),
            "panel/plan_rate": float((episodes.plans / turns).mean()),
        }

    return probe


def by_episode(episodes: Episodes) -> dict[str, list]:
    """What the rows of an experiment are compared by, world by world, as plain data.

    ``unlocked`` names the events of each episode by their numbers.
    """
    return {
        "seed": episodes.seed.tolist(),
        "unlocked": [np.flatnonzero(events).tolist() for events in episodes.events],
        "return": np.asarray(episodes.task_return, float).tolist(),
        "alive": (~episodes.terminated).astype(int).tolist(),
        "steps": episodes.env_steps.tolist(),
        "plan_tokens": episodes.plan_tokens.tolist(),
    }
