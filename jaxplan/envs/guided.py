"""A world in which somebody knows what to do: for the modes scripted and prompted.

There the plans of an agent are not all its own. A scripted player looks on from the
same cell, with a memory of its own, and says when a plan is due; in ``scripted-K`` its
words are forced in as the agent's plan as well. The actions stay the agent's. So what
is lost by planning at the wrong time, by planning the wrong thing, and by not doing
what was planned, can be told apart.
"""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from jaxplan.envs.base import EnvStep, Expert, Intent, Phrases, State, TextEnv

_GUIDE = 1  # its chances are none of the world's


@chex.dataclass(frozen=True)
class Guided:
    """Where the world stands, and what its guide makes of it.

    Attributes:
        world: state of the world.
        memory: of the guide.
        intent: what the guide would go for now.
    """

    world: State
    memory: Any
    intent: Intent


@dataclasses.dataclass(frozen=True)
class GuidedEnv:
    """A ``TextEnv`` that is the same to the agent, and has a guide.

    Attributes:
        env: the world.
        guide: who looks on.
        style: how it words its plans, index into ``guide.styles``.
    """

    env: TextEnv
    guide: Expert
    style: int = 0

    @property
    def action_names(self) -> tuple[str, ...]:
        """The world's."""
        return self.env.action_names

    @property
    def phrases(self) -> tuple[str, ...]:
        """The world's."""
        return self.env.phrases

    @property
    def instructions(self) -> str:
        """The world's."""
        return self.env.instructions

    @property
    def event_names(self) -> tuple[str, ...]:
        """The world's."""
        return self.env.event_names

    @property
    def max_steps(self) -> int:
        """The world's."""
        return self.env.max_steps

    def reset(self, key: PRNGKeyArray) -> Guided:
        """Make a world, and let the guide have its first look."""
        return self._look(key, self.guide.init(), self.env.reset(key))

    def step(self, key: PRNGKeyArray, state: Guided, action: Int[Array, ""]) -> EnvStep:
        """Play one action; the guide sees what comes of it."""
        step = self.env.step(key, state.world, action)
        looked = self._look(key, state.memory, step.state)
        return dataclasses.replace(step, state=looked)

    def describe(self, state: Guided) -> Phrases:
        """Say what the player sees."""
        return self.env.describe(state.world)

    def passive(self, state: Guided) -> Bool[Array, ""]:
        """Tell whether the next action will be ignored."""
        return self.env.passive(state.world)

    def plan(self, key: PRNGKeyArray, state: Guided) -> Phrases:
        """Say what the guide would go for, in phrases of ``guide.phrases``."""
        return self.guide.say(key, state.intent, jnp.int32(self.style))

    def _look(self, key: PRNGKeyArray, memory: Any, world: State) -> Guided:
        own_key = jax.random.fold_in(key, _GUIDE)
        memory, _, intent = self.guide.act(own_key, memory, world)
        return Guided(world=world, memory=memory, intent=intent)
