"""Relay: the student plays the first turns of an episode, the expert the rest.

Imitation of an expert that errs in single steps only does not tell what to do where a
student's own mistakes lead. Here the student leads there, and the expert says in every
turn what it would do, and does it from the turn on in which it takes over (DAgger,
arXiv:1011.0686).
"""

import dataclasses
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxplan.config.schema import RunConfig
from jaxplan.core.mesh import to_host
from jaxplan.envs.base import Expert
from jaxplan.models.params import LlamaParams
from jaxplan.plan.grammar import DYNAMIC
from jaxplan.rollout.play import play_segments
from jaxplan.rollout.rounds import Language, init_carry
from jaxplan.rollout.schedule import make_worlds, one_episode_schedule
from jaxplan.rollout.scripted import Script
from jaxplan.train.collect import ExpertTeacher
from jaxplan.train.scribe import TAKES_OVER, Desk


@dataclasses.dataclass(frozen=True, eq=False)
class Student:
    """Who plays first.

    Attributes:
        load: its weights, when they are first needed.
        mesh: the devices it plays on.
        language: the tokenizer's tables.
        turn_tokens: tokens of the longest turn.
    """

    load: Callable[[], LlamaParams]
    mesh: Mesh
    language: Language
    turn_tokens: int


class RelayTeacher(ExpertTeacher):
    """The expert, after a student; how long that plays is drawn for every episode."""

    def __init__(
        self, expert: Expert, desk: Desk, student: Student, config: RunConfig
    ) -> None:
        """Play nothing yet.

        Args:
            expert: who takes over.
            desk: where is played; its worlds should be none of the expert's alone.
            student: who begins.
            config: shape of the student's model, sizes of its rollout, and its turns.
        """
        super().__init__(expert, desk)
        self.together = student.mesh.size > 1
        self._student, self._config = student, config
        self._rollout = dataclasses.replace(config.rollout, num_lanes=desk.config.lanes)
        self._params: LlamaParams | None = None

    def script(self, first: int) -> Script:
        """What the student does in a batch, up to where the expert takes over."""
        desk = self.scribe.desk.config
        most = min(self._config.sft.relay.turns, desk.steps)
        actions = np.zeros((desk.lanes, desk.steps), np.int32)
        turns = np.zeros(desk.lanes, np.int32)
        with jax.set_mesh(self._student.mesh):
            begun = self._play(first, most)
        for lane, played in enumerate(begun):
            played = played[:most]
            actions[lane, : len(played)] = played
            # Before the last turn, which may have been deadly.
            chance = self.scribe.desk.chance(first + lane, TAKES_OVER)
            turns[lane] = chance.integers(max(len(played), 1))
        return Script(actions=jnp.asarray(actions), turns=jnp.asarray(turns))

    def _play(self, first: int, most: int) -> list[list[int]]:
        """The student's actions in a batch of worlds, until it dies or has enough."""
        if self._params is None:
            self._params = self._student.load()
        desk, student, rollout = self.scribe.desk, self._student, self._rollout
        seeds = jnp.asarray(desk.world_seeds(first))
        modes = jnp.full(rollout.num_lanes, DYNAMIC)
        schedule = one_episode_schedule(make_worlds(desk.env, seeds), seeds, modes)
        key = jax.random.key(0)
        segments = play_segments(
            self._params,
            init_carry(desk.env, student.language, schedule, key, rollout),
            student.language,
            itertools.repeat(schedule),
            env=desk.env,
            config=rollout,
            model=self._config.model,
            budget=self._config.plan.budget,
            turn_tokens=student.turn_tokens,
        )
        actions: list[list[int]] = [[] for _ in range(rollout.num_lanes)]
        over = np.zeros(rollout.num_lanes, bool)
        while not all(over | [len(played) >= most for played in actions]):
            segment = next(segments)
            end, ended = to_host((segment.turns.end, segment.episodes.finished))
            said = end.complete & (end.action >= 0)  # not the rest of a sleep
            for lane in np.flatnonzero(~over):
                actions[lane] += end.action[lane, said[lane]].tolist()
            over |= ended.any(axis=0)
        return actions
