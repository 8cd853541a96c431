"""Scripted players in the same worlds: the teaching expert, and the random floor."""

import dataclasses
from functools import partial

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxplan.envs.base import Expert, Intent, Phrases, State, TextEnv
from jaxplan.rollout.lanes import world_key
from jaxplan.rollout.schedule import episode_key


@chex.dataclass(frozen=True)
class Trajectories:
    """One episode for every world, step by step, [steps, B] each.

    Attributes:
        alive: the episode had not ended before this step.
        passive: the player was asleep: the action was not asked for.
        observations: what the player saw, in the words of each describer.
        turn: turns played before; asleep, also that of the next one.
        intent: what the player meant to do.
        advised: what the player would have played.
        action: what was played: that, a random action, or what the script says.
        reward: task reward.
        events: achievements unlocked in this step.
        counts: see ``EnvStep``, of this step.
        terminated: the episode ended with this step.
    """

    alive: Bool[Array, "*axes"]
    passive: Bool[Array, "*axes"]
    observations: tuple[Phrases, ...]
    turn: Int[Array, "*axes"]
    intent: Intent
    advised: Int[Array, "*axes"]
    action: Int[Array, "*axes"]
    reward: Float[Array, "*axes"]
    events: Bool[Array, "*axes E"]
    counts: dict[str, Int[Array, "*axes"]]
    terminated: Bool[Array, "*axes"]


@dataclasses.dataclass(frozen=True)
class RandomPlayer:
    """Plays every action alike and has no plan: the floor of every table."""

    num_actions: int
    phrases: tuple[str, ...] = ("",)
    styles: tuple[str, ...] = ("silent",)
    goal_names: tuple[str, ...] = ("none",)

    def init(self) -> Array:
        """Remember nothing."""
        return jnp.zeros((), jnp.int32)

    def act(
        self, key: PRNGKeyArray, memory: Array, state: State
    ) -> tuple[Array, Int[Array, ""], Intent]:
        """Draw an action."""
        del state
        action = jax.random.randint(key, (), 0, self.num_actions, jnp.int32)
        return memory, action, Intent(goal=jnp.zeros((), jnp.int32), facts=())

    def say(self, key: PRNGKeyArray, intent: Intent, style: Array) -> Phrases:
        """Say nothing."""
        del key, intent, style
        return Phrases(ids=jnp.zeros(1, jnp.int32), mask=jnp.zeros(1, bool))


@chex.dataclass(frozen=True)
class Script:
    """The first turns of episodes that somebody has played before, to be played again.

    Attributes:
        actions: one for each turn in which the world asks for one.
        turns: how many of them count; from then on the player plays by itself.
    """

    actions: Int[Array, "*axes turns"]
    turns: Int[Array, "*axes"]


@chex.dataclass(frozen=True)
class _Player:
    world: State
    memory: chex.ArrayTree
    turn: Int[Array, "*axes"]
    over: Bool[Array, "*axes"]
    stray: Int[Array, "*axes"]  # the random action that is being repeated, or -1


@partial(
    jax.jit,
    static_argnames=("env", "player", "steps", "describers", "noise", "noise_steps"),
)
def play_scripted(
    worlds: State,
    seeds: Int[Array, " B"],
    *,
    env: TextEnv,
    player: Expert,
    steps: int,
    describers: tuple[TextEnv, ...] = (),
    noise: float = 0.0,
    noise_steps: int = 1,
    script: Script | None = None,
) -> Trajectories:
    """Let a scripted player play one episode in every world, all at once.

    Where a script is played the player looks on: it sees every turn, says what it would
    do, and goes on from there once the script has ended.

    Args:
        worlds: stacked, one a lane.
        seeds: of the episodes, see ``Schedule.seed``.
        env: the world.
        player: who plays.
        steps: env steps at most; an episode that is not over then is cut off.
        describers: the same world in the words that are to be written down.
        noise: share of steps whose action is drawn at random.
        noise_steps: for how many steps such an action is repeated, on average.
        script: what is played first, in every lane.
    """
    keys = jax.vmap(episode_key)(seeds)
    nothing = jnp.zeros(seeds.shape, jnp.int32)
    silent = Script(actions=nothing[:, None], turns=nothing)
    before = silent if script is None else script

    def one_step(lane: _Player, script: Script, key: PRNGKeyArray, step: Array):
        strays = (noise, noise_steps)
        return _scripted_step(lane, script, key, step, env, player, describers, strays)

    def all_lanes(lanes: _Player, step: Array):
        lift = jax.vmap(one_step, in_axes=(0, 0, 0, None))
        return lift(lanes, before, keys, step)

    memories = jax.tree.map(
        lambda leaf: jnp.broadcast_to(leaf, (seeds.shape[0], *jnp.shape(leaf))),
        player.init(),
    )
    start = _Player(
        world=worlds,
        memory=memories,
        turn=nothing,
        over=nothing > 0,
        stray=nothing - 1,
    )
    return jax.lax.scan(all_lanes, start, jnp.arange(steps))[1]


def _scripted_step(
    lane: _Player,
    script: Script,
    key: PRNGKeyArray,
    step: Array,
    env: TextEnv,
    player: Expert,
    describers: tuple[TextEnv, ...],
    strays: tuple[float, int],
) -> tuple[_Player, Trajectories]:
    own_key = jax.random.fold_in(jax.random.fold_in(key, 1), step)
    act_key, noise_key, which_key = jax.random.split(own_key, 3)
    memory, advised, intent = player.act(act_key, lane.memory, lane.world)
    advised = advised.astype(jnp.int32)
    stray = draw_stray(lane.stray, noise_key, which_key, len(env.action_names), *strays)
    action = jnp.where(stray >= 0, stray, advised)
    scripted = script.actions[jnp.minimum(lane.turn, script.actions.shape[0] - 1)]
    action = jnp.where(lane.turn < script.turns, scripted, action)
    passive = env.passive(lane.world)
    result = env.step(world_key(key, step), lane.world, action)
    record = Trajectories(
        alive=~lane.over,
        passive=passive,
        observations=tuple(each.describe(lane.world) for each in describers),
        turn=lane.turn,
        intent=intent,
        advised=advised,
        action=action,
        reward=jnp.where(lane.over, 0.0, result.reward),
        events=~lane.over & result.events,
        counts=jax.tree.map(lambda n: jnp.where(lane.over, 0, n), result.counts),
        terminated=~lane.over & result.terminated,
    )
    over = lane.over | result.terminated | result.truncated
    turn = lane.turn + (~passive).astype(jnp.int32)
    lane = _Player(world=result.state, memory=memory, turn=turn, over=over, stray=stray)
    return lane, record


def draw_stray(
    before: Int[Array, ""],
    noise_key: PRNGKeyArray,
    which_key: PRNGKeyArray,
    num_actions: int,
    share: float,
    length: int,
) -> Int[Array, ""]:
    """Draw whether an action is random, and which: one begun is repeated for a while.

    Args:
        before: the random action of the step before, or -1.
        noise_key: for whether.
        which_key: for which.
        num_actions: to choose from.
        share: of steps, in the long run.
        length: of a repetition, on average.

    Returns:
        The action, or -1.
    """
    repeats = 1 - 1 / length
    begins = share / length / (1 - share * repeats)
    any_action = jax.random.randint(which_key, (), 0, num_actions, jnp.int32)
    fresh = jnp.where(jax.random.uniform(noise_key) < begins, any_action, -1)
    again = jax.random.uniform(jax.random.fold_in(noise_key, 0)) < repeats
    return jnp.where((before >= 0) & again, before, fresh)
