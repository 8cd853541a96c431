"""Relay: the student plays the first turns of an episode, the expert the rest.

Imitation of an expert that errs in single steps only does not tell what to do where a
student's own mistakes lead. Here the student leads there, and the expert says in every
turn what it would do, and does it from the turn on in which it takes over (DAgger,
arXiv:1011.0686).
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxplan.config.schema import RunConfig
from jaxplan.core.mesh import LANES, settle
from jaxplan.envs.base import Expert
from jaxplan.models.params import LlamaParams
from jaxplan.plan.grammar import DYNAMIC
from jaxplan.rollout.rounds import Language, init_carry, run_segment
from jaxplan.rollout.schedule import Schedule, make_worlds
from jaxplan.rollout.scripted import Script
from jaxplan.train.collect import ExpertTeacher
from jaxplan.train.scribe import Desk

_TAKES_OVER = (
    4,
)  # when the expert does: beside the chances of ``jaxplan.train.scribe``


@dataclasses.dataclass(frozen=True, eq=False)
class Student:
    """Who plays first.

    Attributes:
        load: its weights, when they are first needed.
        language: the tokenizer's tables.
        turn_tokens: tokens of the longest turn.
    """

    load: Callable[[], LlamaParams]
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
        self._student, self._config = student, config
        self._rollout = dataclasses.replace(config.rollout, num_lanes=desk.config.lanes)
        self._params: LlamaParams | None = None

    def script(self, first: int) -> Script:
        """What the student does in a batch, up to where the expert takes over."""
        most = self._config.sft.relay.turns
        actions = np.zeros((self.scribe.desk.config.lanes, most), np.int32)
        turns = np.zeros(len(actions), np.int32)
        for lane, played in enumerate(self._play(first, most)):
            played = played[:most]
            actions[lane, : len(played)] = played
            # Before the last turn, which may have been deadly.
            chance = self.scribe.desk.chance(first + lane, _TAKES_OVER)
            turns[lane] = chance.integers(max(len(played), 1))
        return Script(actions=jnp.asarray(actions), turns=jnp.asarray(turns))

    def _play(self, first: int, most: int) -> list[list[int]]:
        """The student's actions in a batch of worlds, until it dies or has enough."""
        if self._params is None:
            self._params = self._student.load()
        desk, student, rollout = self.scribe.desk, self._student, self._rollout
        schedule = _one_episode(desk, first)
        key = jax.random.key(0)
        carry = init_carry(desk.env, student.language, schedule, key, rollout)
        carry, language = settle(carry, LANES), settle(student.language)
        actions: list[list[int]] = [[] for _ in range(rollout.num_lanes)]
        over = np.zeros(rollout.num_lanes, bool)
        while not all(over | [len(played) >= most for played in actions]):
            carry, segment = run_segment(
                self._params,
                carry,
                language,
                schedule,
                1.0,
                env=desk.env,
                config=rollout,
                model=self._config.model,
                budget=self._config.plan.budget,
                turn_tokens=student.turn_tokens,
            )
            end, ended = jax.device_get((segment.turns.end, segment.episodes.finished))
            for lane in np.flatnonzero(~over):
                actions[lane] += end.action[lane, end.complete[lane]].tolist()
            over |= ended.any(axis=0)
        return actions


def _one_episode(desk: Desk, first: int) -> Schedule:
    seeds = jnp.asarray(desk.world_seeds(first))
    lanes = seeds.shape[0]
    return Schedule(
        worlds=make_worlds(desk.env, seeds),
        world=jnp.arange(lanes, dtype=jnp.int32)[:, None],
        seed=seeds[:, None],
        mode=jnp.full((lanes, 1), DYNAMIC, jnp.int32),
        entries=jnp.ones(lanes, jnp.int32),
    )
