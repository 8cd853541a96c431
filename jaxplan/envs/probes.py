r"""Probe worlds, whose answers are known: what a working agent must reach, and when.

Each tests one thing that can be wrong (gamma is the discount per env step):

- ``constant``: a reward of 1 whatever happens. The value is 1.
- ``observed``: the sign tells the reward, 1 for east and -1 for west; actions do
  nothing. The value is the reward.
- ``delayed``: the first action decides, west for 1 and east for -1, and ``delay``
  turns later the episode ends with it. The value before step i is
  gamma^(delay - i).
- ``action``: 1 for going west, -1 for going east. The value is 1.
- ``both``: 1 for following the sign, -1 for going against it. The value is 1.
- ``plan``: the sign is gone before it is needed. Who follows it in the second turn
  earns the stake, who goes against it loses the stake. Both are in sight in the first
  turn, in the second only the stake is. With ``rollout.history: 1`` nothing but a plan
  carries the sign over. Silence speaks as well: who plans at one sign alone and takes
  a turn without a plan for the other always knows. Planning there turns the loss of a
  stake into its gain, so the best rate of plans in first turns is one half for every
  stake that is worth it (``worth_planning``) and nothing for the others: a step
  function of what a plan costs. Where plans cost nothing, more do no harm. In the
  second turn a plan is worth nothing at all, and it supersedes the one that knows.

The rules never look at the plan; it pays by what the agent itself can see in it, be it
its text or what the model keeps of the observation where the plan stands.

An observation is the number of the probe, the stake, and the sign if it is in sight::

     5: iron east
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxplan.config.schema import EnvConfig, ExpertConfig
from jaxplan.envs.base import EnvStep, Intent, Phrases

KINDS = ("constant", "observed", "delayed", "action", "both", "plan")
STAKES = (0.2, 0.6, 1.0, 1.4)  # of ``plan``
ACTION_NAMES = ("Move West", "Move East")
WEST, EAST = 0, 1

_CONSTANT, _OBSERVED, _DELAYED, _ACTION, _BOTH, _PLAN = range(len(KINDS))
_NUMBERS = tuple(f" {number}:" for number in range(len(KINDS)))
_STAKE_WORDS = (" wood", " stone", " iron", " diamond")
_SIGN_WORDS = (" west", " east")


@chex.dataclass(frozen=True)
class ProbeState:
    """Where an episode stands.

    Attributes:
        kind: index into ``KINDS``; data, so that all probes share one program.
        sign: ``WEST`` or ``EAST``, in sight in the first turn only.
        stake: index into ``STAKES``.
        first: the first action; what it was before there was one does not matter.
        env_steps: so far.
    """

    kind: Int[Array, "*axes"]
    sign: Int[Array, "*axes"]
    stake: Int[Array, "*axes"]
    first: Int[Array, "*axes"]
    env_steps: Int[Array, "*axes"]


def worth_planning(
    stake: Int[Array, "*axes"], price: float, gamma: float
) -> Bool[Array, "*axes"]:
    """Tell for which stakes a plan pays in first turns of ``plan``, at one sign of two.

    Args:
        stake: indices into ``STAKES``.
        price: of the cheapest plan, ``ppo.plan_cost`` of its tokens and
            ``ppo.call_cost``.
        gamma: discount per env step.
    """
    return 2.0 * gamma * jnp.array(STAKES)[stake] > price


@dataclasses.dataclass(frozen=True)
class Probe:
    """The world; an episode plays one of ``kinds``, drawn at random."""

    kinds: tuple[str, ...]
    delay: int
    max_steps: int
    action_names: tuple[str, ...] = ACTION_NAMES
    phrases: tuple[str, ...] = (*_NUMBERS, *_STAKE_WORDS, *_SIGN_WORDS)
    instructions: str = " find"
    event_names: tuple[str, ...] = ()

    def reset(self, key: PRNGKeyArray) -> ProbeState:
        """Draw kind, sign and stake, independently and evenly."""
        kind_key, sign_key, stake_key = jax.random.split(key, 3)
        numbers = jnp.array([KINDS.index(kind) for kind in self.kinds], jnp.int32)
        zero = jnp.zeros((), jnp.int32)
        return ProbeState(
            kind=numbers[jax.random.randint(kind_key, (), 0, len(self.kinds))],
            sign=jax.random.randint(sign_key, (), 0, 2, jnp.int32),
            stake=jax.random.randint(stake_key, (), 0, len(STAKES), jnp.int32),
            first=zero,
            env_steps=zero,
        )

    def step(
        self, key: PRNGKeyArray, state: ProbeState, action: Int[Array, ""]
    ) -> EnvStep:
        """Play one action. Never resets; never both terminated and truncated."""
        del key  # nothing is left to chance
        action = action.astype(jnp.int32)
        first = jnp.where(state.env_steps == 0, action, state.first)
        last = _last_step(state.kind, self.delay)
        terminated = state.env_steps == last
        env_steps = state.env_steps + 1
        earned = self._earned(state, action, first)
        return EnvStep(
            state=dataclasses.replace(state, first=first, env_steps=env_steps),
            reward=jnp.where(terminated, earned, 0.0).astype(jnp.float32),
            terminated=terminated,
            truncated=(env_steps >= self.max_steps) & ~terminated,
            events=jnp.zeros(0, bool),
        )

    def _earned(
        self, state: ProbeState, action: Int[Array, ""], first: Int[Array, ""]
    ) -> Float[Array, ""]:
        """What the last step of an episode pays."""

        def sign_of(yes: Array) -> Array:
            return jnp.where(yes, 1.0, -1.0)

        follows = sign_of(action == state.sign)
        return jnp.stack(
            [
                jnp.ones(()),
                sign_of(state.sign == EAST),
                sign_of(first == WEST),
                sign_of(action == WEST),
                follows,
                follows * jnp.array(STAKES)[state.stake],
            ]
        )[state.kind]

    def describe(self, state: ProbeState) -> Phrases:
        """Say what the player sees, and nothing else."""
        stakes = len(KINDS)
        signs = stakes + len(STAKES)
        has_stake, has_sign = state.kind == _PLAN, state.env_steps == 0
        return Phrases(
            ids=jnp.stack([state.kind, stakes + state.stake, signs + state.sign]),
            mask=jnp.stack([jnp.array(True), has_stake, has_sign]),
        )

    def passive(self, state: ProbeState) -> Bool[Array, ""]:
        """Nobody sleeps here."""
        return jnp.zeros_like(state.kind, bool)


def _last_step(kind: Int[Array, ""], delay: int) -> Int[Array, ""]:
    """Number of the step that ends an episode, from 0."""
    one_turn = jnp.zeros_like(kind)
    return jnp.where(kind == _DELAYED, delay, jnp.where(kind == _PLAN, 1, one_turn))


def make_probe(config: EnvConfig) -> Probe:
    """Build the world of ``config``.

    Raises:
        ValueError: there is no such text level.
    """
    if config.text != "compact":
        raise ValueError(
            f"env.text='{config.text}': probes have no such text; allowed: 'compact'"
        )
    return Probe(
        kinds=config.probe.kinds, delay=config.probe.delay, max_steps=config.max_steps
    )


@dataclasses.dataclass(frozen=True)
class ProbeExpert:
    """The best player: it goes where it should, and says so."""

    phrases: tuple[str, ...] = _SIGN_WORDS
    styles: tuple[str, ...] = ("terse",)
    goal_names: tuple[str, ...] = ("west", "east")

    def init(self) -> Int[Array, ""]:
        """Remember no sign."""
        return jnp.full((), WEST, jnp.int32)

    def act(
        self, key: PRNGKeyArray, memory: Int[Array, ""], state: ProbeState
    ) -> tuple[Int[Array, ""], Int[Array, ""], Intent]:
        """Follow the sign where it counts, and else go west."""
        del key
        sign = jnp.where(state.env_steps == 0, state.sign, memory)
        counts = (state.kind == _BOTH) | (state.kind == _PLAN)
        way = jnp.where(counts, sign, WEST)
        return sign, way, Intent(goal=way, facts=())

    def say(self, key: PRNGKeyArray, intent: Intent, style: Int[Array, ""]) -> Phrases:
        """Say where it goes: one token of the shipped tokenizer."""
        del key, style
        return Phrases(ids=intent.goal[None], mask=jnp.ones(1, bool))


def make_probe_expert(config: EnvConfig, skill: ExpertConfig) -> ProbeExpert:
    """Make the best player.

    Raises:
        ValueError: it is asked to be worse than it can be.
    """
    del config
    if skill != ExpertConfig():
        raise ValueError(
            "expert: the player of probe knows one way to play; leave out errors, "
            "dawdling and unknown_goals"
        )
    return ProbeExpert()
