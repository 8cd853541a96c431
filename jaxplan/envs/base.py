"""What every world offers: plain functions on pytrees, unbatched, lifted by ``vmap``.

A world knows *words*; which tokens they become is the business of ``jaxplan.text``.
A description is therefore a list of phrase numbers into ``TextEnv.phrases``.
"""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import chex
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

State = Any  # a pytree of arrays, the world's own


@chex.dataclass(frozen=True)
class Phrases:
    """A text on the device: the phrases whose mask is True, in order, concatenated."""

    ids: Int[Array, " P"]
    mask: Bool[Array, " P"]


@chex.dataclass(frozen=True)
class Intent:
    """What a scripted player is after, before it is put into words.

    Attributes:
        goal: a number for what it goes for; the plan is outdated once this changes.
        facts: all else the words are made of, the player's own.
    """

    goal: Int[Array, ""]
    facts: Any


@chex.dataclass(frozen=True)
class EnvStep:
    """One transition of a world.

    Attributes:
        state: the world after it.
        reward: of the task.
        terminated: the episode is over by the rules.
        truncated: it is over by the time limit alone.
        events: those that first happened in it.
        counts: by name, how often something happened in it that is worth counting but
            is no achievement; the same names in every step of a world.
    """

    state: State
    reward: Float[Array, ""]
    terminated: Bool[Array, ""]
    truncated: Bool[Array, ""]
    events: Bool[Array, " E"]
    counts: dict[str, Int[Array, ""]] = dataclasses.field(default_factory=dict)


@runtime_checkable
class TextEnv(Protocol):
    """A world that lives inside ``jit`` and describes itself in phrases."""

    @property
    def action_names(self) -> tuple[str, ...]:
        """The words of every action; the action id is the index."""
        ...

    @property
    def phrases(self) -> tuple[str, ...]:
        """Every phrase a description can contain."""
        ...

    @property
    def instructions(self) -> str:
        """The text that opens a context, once."""
        ...

    @property
    def event_names(self) -> tuple[str, ...]:
        """What can happen once an episode (achievements)."""
        ...

    @property
    def max_steps(self) -> int:
        """Env steps until an episode is truncated."""
        ...

    def reset(self, key: PRNGKeyArray) -> State:
        """Make a new world; all its randomness comes from ``key``."""
        ...

    def step(self, key: PRNGKeyArray, state: State, action: Int[Array, ""]) -> EnvStep:
        """Play one action. Never resets; never both terminated and truncated."""
        ...

    def describe(self, state: State) -> Phrases:
        """Say what the player sees, and nothing else."""
        ...

    def passive(self, state: State) -> Bool[Array, ""]:
        """Tell whether the next action will be ignored (the player is asleep)."""
        ...


@runtime_checkable
class Drawn(Protocol):
    """A world whose replays have a picture beside the text."""

    def draw(self, states: State) -> dict[str, Any]:
        """Say what the report's page draws (host).

        Args:
            states: stacked, one a step of one episode.

        Returns:
            Plain data: ``frames``, one dict a step, and what all frames share. The
            page (eval/templates/replay.js) draws what it finds by its key.
        """
        ...


@runtime_checkable
class Expert(Protocol):
    """A scripted player that sees what the player sees, and says what it is up to."""

    @property
    def phrases(self) -> tuple[str, ...]:
        """Every phrase a plan can contain, in whatever style."""
        ...

    @property
    def styles(self) -> tuple[str, ...]:
        """Names of the ways it can word a plan; the first is its usual one."""
        ...

    @property
    def goal_names(self) -> tuple[str, ...]:
        """The names of its goals; the index is the number in an ``Intent``."""
        ...

    def init(self) -> Any:
        """The memory at the start of an episode: a pytree of arrays."""
        ...

    def act(
        self, key: PRNGKeyArray, memory: Any, state: State
    ) -> tuple[Any, Int[Array, ""], Intent]:
        """Choose an action; return the new memory, the action and what it is for."""
        ...

    def say(self, key: PRNGKeyArray, intent: Intent, style: Int[Array, ""]) -> Phrases:
        """Put an intent into words.

        Args:
            key: of the choice among wordings that say the same.
            intent: of ``act``.
            style: index into ``styles``.
        """
        ...
