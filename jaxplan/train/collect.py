"""The teacher's trajectories: somebody plays, and says a plan every K turns.

K is drawn once for each trajectory, and so is the style of its plans, as in the paper
(K ~ U[2, 12], arXiv:2509.03581, section 4). Turns in which the player sleeps are not
asked for; what they earn belongs to the turn before.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from jaxplan.core.ahead import begin_ahead
from jaxplan.core.processes import agree, first_alone
from jaxplan.envs.base import Expert, Intent, Phrases
from jaxplan.io.datasets import DatasetWriter
from jaxplan.io.stopping import Stopped, StopRequest
from jaxplan.rollout.schedule import episode_key, make_worlds
from jaxplan.rollout.scripted import Script, play_scripted
from jaxplan.train.scribe import Desk, Scribe, make_speech

_SAID_AT_ONCE = 128  # plans put into words in one call
_PLAYER_SPEAKS = 2  # beside the keys of the world (0) and of the player's choices (1)


@runtime_checkable
class Teacher(Protocol):
    """Whoever plays trajectories, a batch at a time."""

    @property
    def scribe(self) -> Scribe:
        """Who writes them down."""
        ...

    @property
    def together(self) -> bool:
        """Whether all processes play, on a mesh: one batch after the other then.

        Programs of several threads would meet in another order on another device.
        """
        ...

    def account(self) -> dict[str, Any]:
        """What is to be told at the end, besides the dataset's card."""
        ...

    def play(self, first: int) -> Any:
        """Begin the batch of trajectories from number ``first`` on."""
        ...

    def write_down(
        self, first: int, played: Any, wanted: int
    ) -> Iterable[dict[str, Any]]:
        """The columns of the first ``wanted`` trajectories of a batch begun."""
        ...


def collect(
    directory: Path,
    teacher: Teacher,
    about: dict[str, str],
    progress: Callable[[int, int], None],
    stop: StopRequest,
) -> dict[str, Any]:
    """Write all trajectories, going on where a killed run stopped.

    Args:
        directory: of the dataset.
        teacher: who plays, and how much: see ``Desk``.
        about: written into every shard, see ``DatasetWriter``.
        progress: is told the episodes done and the turns written so far.
        stop: asked between two batches of episodes.

    Returns:
        The dataset's card, and what the teacher has to tell of this time; nothing in
        any process but the first.

    Raises:
        Stopped: someone asked; whole batches are kept.
        ValueError: the directory holds another dataset.
    """
    desk = teacher.scribe.desk
    config = desk.config
    writer = first_alone(
        lambda: DatasetWriter(directory, about, config.lanes, tuple(desk.other_texts))
    )
    done, turns = agree(writer.episodes if writer else 0), 0
    starts = range(done, config.episodes, config.lanes)
    follow = _played if writer else _others
    for first, batch in follow(teacher, starts):
        for columns in batch:
            if writer:
                writer.add_episode(columns)
                turns += len(columns["step"])
        progress(min(first + config.lanes, config.episodes), turns)
        if stop.requested:
            raise Stopped

    def close() -> dict[str, Any]:
        return writer.close() | teacher.account() if writer else {}

    return first_alone(close) or {}  # the others read it next


_Batch = tuple[int, Iterable[dict[str, Any]]]  # its first number, its trajectories


def _played(teacher: Teacher, starts: range) -> Iterator[_Batch]:
    """Play, if alone the next batches while the host writes this one down."""
    in_turn = ((first, teacher.play(first)) for first in starts)
    batches = in_turn if teacher.together else begin_ahead(starts, teacher.play)
    for first, played in batches:
        wanted = min(starts.step, starts.stop - first)
        yield first, teacher.write_down(first, played, wanted)


def _others(teacher: Teacher, starts: range) -> Iterator[_Batch]:
    """Follow the first process, which alone writes, and play where it needs all."""
    for first in starts:
        if teacher.together:
            teacher.play(first)
        yield first, ()


class ExpertTeacher:
    """The scripted expert of a world; it knows what it is after, and says so.

    Raises:
        ValueError: a style is none of the expert's.
    """

    def __init__(self, expert: Expert, desk: Desk) -> None:
        unknown = [s for s in desk.config.styles if s not in expert.styles]
        if unknown:
            raise ValueError(
                f"collect.styles: {unknown} are no styles of this expert; it has "
                f"{', '.join(expert.styles)}"
            )
        self.scribe, self.together = Scribe(desk), False
        self._expert = expert
        self._speech = make_speech(desk.tokenizer, expert.phrases)

    def account(self) -> dict[str, Any]:
        """What is to be told at the end."""
        return self.scribe.account()

    def play(self, first: int) -> Any:
        """Begin the batch of trajectories from number ``first`` on."""
        desk = self.scribe.desk
        seeds = jnp.asarray(desk.world_seeds(first))
        return play_scripted(
            make_worlds(desk.env, seeds),
            seeds,
            env=desk.env,
            player=self._expert,
            steps=desk.config.steps,
            describers=desk.describers,
            noise=desk.config.action_noise,
            noise_steps=desk.config.noise_steps,
            script=self.script(first),
        )

    def script(self, first: int) -> Script:
        """What was played before the expert, from number ``first`` on: nothing.

        A script is as long as an episode: whoever begins, the program is the same.
        """
        del first
        desk = self.scribe.desk.config
        actions = jnp.zeros((desk.lanes, desk.steps), jnp.int32)
        return Script(actions=actions, turns=jnp.zeros(desk.lanes, jnp.int32))

    def write_down(
        self, first: int, played: Any, wanted: int
    ) -> Iterator[dict[str, Any]]:
        """The columns of the first ``wanted`` trajectories of a batch begun."""
        host = jax.device_get(played)
        seeds = self.scribe.desk.world_seeds(first)
        for lane in range(wanted):
            own = jax.tree.map(lambda array, i=lane: array[:, i], host)
            yield self._columns(first + lane, int(seeds[lane]), own)

    def _columns(self, number: int, seed: int, played: Any) -> dict[str, Any]:
        desk = self.scribe.desk
        step = self.scribe.steps(number, played)
        style = desk.style(number, self._expert.styles)
        goals = played.intent.goal[step]
        every, first = desk.plan_turns(number)
        on_change = desk.config.replan_on_change
        speaks = speaking_turns(goals.tolist(), every, first, on_change)
        said: Any = self._say(played.intent, step[speaks], style, seed)
        plans = self.scribe.phrased_plans(self._speech, said.ids, said.mask, speaks)
        names = self._expert.goal_names
        return (
            self.scribe.columns(played, step, style)
            | plans
            | {"goal": [names[goal] for goal in goals]}
        )

    def _say(self, intents: Intent, step: np.ndarray, style: str, seed: int) -> Phrases:
        """Put the intents of some steps into words."""
        number = jnp.int32(self._expert.styles.index(style))
        parts = []
        # Once at least: where nothing is said, the rows have a shape all the same.
        for start in range(0, max(len(step), 1), _SAID_AT_ONCE):
            chosen = np.resize(step[start : start + _SAID_AT_ONCE], _SAID_AT_ONCE)
            own = jax.tree.map(lambda array, at=chosen: array[at], intents)
            parts.append(
                _say_all(own, chosen, number, jnp.int32(seed), expert=self._expert)
            )
        whole = jax.tree.map(lambda *rows: np.concatenate(rows), *jax.device_get(parts))
        return jax.tree.map(lambda array: array[: len(step)], whole)


def speaking_turns(
    goals: list[int], every: int, first: int, on_change: bool
) -> np.ndarray:
    """In which turns a plan is said: the first, every K-th, and maybe at a new goal.

    Args:
        goals: what the player is after, by turn.
        every: K, counted from the last plan.
        first: turn of the first plan.
        on_change: whether a goal other than the last plan's calls for a plan.
    """
    speaks, since, said = np.zeros(len(goals), bool), every - first, None
    for turn, goal in enumerate(goals):
        changed = on_change and said is not None and goal != said
        if since == every or changed:
            speaks[turn], since, said = True, 0, goal
        since += 1
    return speaks


@partial(jax.jit, static_argnames="expert")
def _say_all(
    intents: Intent,
    step: jax.Array,
    style: jax.Array,
    seed: jax.Array,
    *,
    expert: Expert,
) -> Phrases:
    own = jax.random.fold_in(episode_key(seed), _PLAYER_SPEAKS)
    keys = jax.vmap(lambda number: jax.random.fold_in(own, number))(step)
    return jax.vmap(expert.say, in_axes=(0, 0, None))(keys, intents, style)


def to_json(config: Any) -> str:
    """A config section as JSON, for the shard's metadata."""
    return json.dumps(dataclasses.asdict(config))
