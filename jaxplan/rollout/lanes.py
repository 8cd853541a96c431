"""A lane: one environment with its place in its own token stream.

Everything here is written for one lane and lifted by ``vmap``; lanes never look at each
other, so what a lane does depends on its schedule and its keys alone.
"""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxplan.core.roles import Span
from jaxplan.envs.base import EnvStep, Phrases, State, TextEnv
from jaxplan.envs.guided import GuidedEnv
from jaxplan.models.visibility import NO_PLAN
from jaxplan.plan import grammar as plan_grammar
from jaxplan.plan.grammar import Grammar
from jaxplan.rollout.schedule import Schedule, episode_key
from jaxplan.text.phrases import PhraseTable, pack


@chex.dataclass(frozen=True)
class EpisodeStats:
    """The account of one episode, kept while it lasts.

    Attributes:
        task_return: undiscounted sum of the task reward, without plan costs.
        events: achievements unlocked.
        counts: see ``EnvStep``, summed.
        env_steps: steps of the world, sleeping ones included.
        turns: turns that are over, each one choice of the agent.
        plans: turns in which a plan was written.
        plan_tokens: plan-text tokens written.
    """

    task_return: Float[Array, "*axes"]
    events: Bool[Array, "*axes E"]
    counts: dict[str, Int[Array, "*axes"]]
    env_steps: Int[Array, "*axes"]
    turns: Int[Array, "*axes"]
    plans: Int[Array, "*axes"]
    plan_tokens: Int[Array, "*axes"]


@chex.dataclass(frozen=True)
class Given:
    """The plan a lane was given last, where plans are given.

    Attributes:
        plan: in the words of the guide.
        goal: what the guide was after.
        turn: of the episode, in which it was given.
    """

    plan: Phrases
    goal: Int[Array, "*axes"]
    turn: Int[Array, "*axes"]


@chex.dataclass(frozen=True)
class Lane:
    """Where a lane stands; see ``jaxplan.rollout.rounds`` for how it moves on.

    Attributes:
        world: state of the environment.
        key: key of the current episode.
        entry: episodes begun; the current one is schedule entry ``entry - 1``.
        live: False while the schedule is exhausted.
        ended: the lane waits for a new world. An episode that was truncated has its
            last observation at the end of the stream.
        asleep: the world goes on without asking for an action.
        mode: plan mode of the episode.
        turn: turns begun in the lane's life.
        episode_turn: choices made in this episode before this turn.
        state: grammar state of the turn.
        remaining: plan-text tokens the grammar still allows in this turn.
        generated: tokens generated in this turn.
        plan: number of the newest plan begun.
        active_plan: number of the newest plan of a complete turn.
        turn_reward: task reward of this turn so far, discounted per env step.
        turn_env_steps: env steps of this turn so far.
        turn_plan_tokens: plan-text tokens of this turn so far.
        stats: account of the episode.
        given: its plan, if the world has a guide.
    """

    world: State
    key: PRNGKeyArray
    entry: Int[Array, "*axes"]
    live: Bool[Array, "*axes"]
    ended: Bool[Array, "*axes"]
    asleep: Bool[Array, "*axes"]
    mode: Int[Array, "*axes"]
    turn: Int[Array, "*axes"]
    episode_turn: Int[Array, "*axes"]
    state: Int[Array, "*axes"]
    remaining: Int[Array, "*axes"]
    generated: Int[Array, "*axes"]
    plan: Int[Array, "*axes"]
    active_plan: Int[Array, "*axes"]
    turn_reward: Float[Array, "*axes"]
    turn_env_steps: Int[Array, "*axes"]
    turn_plan_tokens: Int[Array, "*axes"]
    stats: EpisodeStats
    given: Given | None


@chex.dataclass(frozen=True)
class TurnEnd:
    """What a world step says of the turn it belongs to.

    Attributes:
        complete: the turn is over and may be learnt from.
        reward: task reward, summed over the turn's env steps with their discounts.
        discount: gamma to the power of the env steps; 0 where the episode terminated.
        plan_tokens: plan-text tokens of the turn.
        planned: whether the turn wrote a plan.
        action: what the turn said; -1 where it said nothing, being the rest of a sleep
            that began before the segment.
    """

    complete: Bool[Array, "*axes"]
    reward: Float[Array, "*axes"]
    discount: Float[Array, "*axes"]
    plan_tokens: Int[Array, "*axes"]
    planned: Bool[Array, "*axes"]
    action: Int[Array, "*axes"]


@chex.dataclass(frozen=True)
class EpisodeEnd:
    """One finished episode, where ``finished`` is True."""

    finished: Bool[Array, "*axes"]
    terminated: Bool[Array, "*axes"]
    entry: Int[Array, "*axes"]
    stats: EpisodeStats


def _empty_stats(env: TextEnv, world: State) -> EpisodeStats:
    """The account of no step yet; a step says itself what there is to count."""
    zero = jnp.zeros((), jnp.int32)
    step = jax.eval_shape(env.step, jax.random.key(0), world, zero)
    return EpisodeStats(
        task_return=jnp.zeros((), jnp.float32),
        events=jnp.zeros(step.events.shape, bool),
        counts=jax.tree.map(lambda _: zero, step.counts),
        env_steps=zero,
        turns=zero,
        plans=zero,
        plan_tokens=zero,
    )


def _nothing_given(env: TextEnv, world: State) -> Given | None:
    """No plan, of the size of one; nothing in a world without a guide."""
    if not isinstance(env, GuidedEnv):
        return None
    zero = jnp.zeros((), jnp.int32)
    plan = jax.eval_shape(env.plan, jax.random.key(0), world)
    empty = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), plan)
    return Given(plan=empty, goal=zero, turn=zero)


def _pick(choice: Bool[Array, ""], new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(choice, a, b), new, old)


def init_lanes(
    env: TextEnv, schedule: Schedule, key: PRNGKeyArray, num_lanes: int
) -> Lane:
    """Lanes that wait for their first world."""
    zero = jnp.zeros((), jnp.int32)
    world = jax.tree.map(lambda leaf: leaf[0], schedule.worlds)
    one = Lane(
        world=world,
        key=key,
        entry=zero,
        live=jnp.array(True),
        ended=jnp.array(True),
        asleep=jnp.array(False),
        mode=zero,
        turn=zero,
        episode_turn=zero,
        state=zero,
        remaining=zero,
        generated=zero,
        plan=zero,
        active_plan=zero,
        turn_reward=jnp.zeros((), jnp.float32),
        turn_env_steps=zero,
        turn_plan_tokens=zero,
        stats=_empty_stats(env, world),
        given=_nothing_given(env, world),
    )
    return jax.tree.map(
        lambda leaf: jnp.broadcast_to(leaf, (num_lanes, *leaf.shape)), one
    )


def token_key(lane: Lane) -> PRNGKeyArray:
    """The sampling key of the lane's next token: its episode, turn and place."""
    turn_key = jax.random.fold_in(lane.key, 1 + lane.episode_turn)  # 0 is the world's
    return jax.random.fold_in(turn_key, lane.generated)


def world_key(episode_key: PRNGKeyArray, env_step: Int[Array, ""]) -> PRNGKeyArray:
    """The key of one env step of an episode."""
    return jax.random.fold_in(jax.random.fold_in(episode_key, 0), env_step)


def is_ready(lane: Lane, grammar: Grammar) -> Bool[Array, ""]:
    """The lane has said its action, and the world has yet to hear it."""
    return ~lane.asleep & ~lane.ended & plan_grammar.is_finished(grammar, lane.state)


def act(
    lane: Lane,
    env: TextEnv,
    grammar: Grammar,
    gamma: Float[Array, ""] | float,
    closing: Bool[Array, ""] | bool,
) -> tuple[Lane, TurnEnd, EpisodeEnd]:
    """Step the world of a lane that has said its action, or that is asleep.

    Args:
        lane: one lane.
        env: its world.
        grammar: the plan grammar, which knows the action a finished turn names.
        gamma: discount per env step.
        closing: the segment ends here: a sleeping lane ends its turn as well, so that
            what it earned so far is accounted for.
    """
    acting = lane.live & (is_ready(lane, grammar) | (lane.asleep & ~lane.ended))
    action = grammar.action[lane.state]
    key = world_key(lane.key, lane.stats.env_steps)
    step = env.step(key, lane.world, jnp.maximum(action, 0))
    passive = env.passive(step.state)
    over = step.terminated | step.truncated
    asleep = acting & passive & ~over
    complete = acting & (~asleep | closing)
    discount = jnp.float32(gamma) ** lane.turn_env_steps.astype(jnp.float32)
    reward = lane.turn_reward + jnp.where(acting, discount * step.reward, 0.0)
    planned = lane.plan > lane.active_plan
    end = TurnEnd(
        complete=complete,
        reward=reward,
        discount=jnp.where(step.terminated, 0.0, discount * gamma),
        plan_tokens=lane.turn_plan_tokens,
        planned=planned,
        action=action,
    )
    stats = _count(lane.stats, step, end, acting, asleep)
    moved = dataclasses.replace(
        lane,
        world=_pick(acting, step.state, lane.world),
        asleep=jnp.where(acting, asleep, lane.asleep),
        ended=lane.ended | (acting & step.truncated),
        active_plan=jnp.where(complete, lane.plan, lane.active_plan),
        turn_reward=reward,
        turn_env_steps=lane.turn_env_steps + acting.astype(jnp.int32),
        stats=stats,
    )
    finished = EpisodeEnd(
        finished=acting & over,
        terminated=acting & step.terminated,
        entry=lane.entry - 1,
        stats=stats,
    )
    return moved, end, finished


def _count(
    old: EpisodeStats,
    step: EnvStep,
    end: TurnEnd,
    acting: Bool[Array, ""],
    asleep: Bool[Array, ""],
) -> EpisodeStats:
    """Add an env step; who sleeps on beyond a segment's end chooses only once."""
    planned = end.complete & end.planned
    return EpisodeStats(
        task_return=old.task_return + jnp.where(acting, step.reward, 0.0),
        events=old.events | (acting & step.events),
        counts=jax.tree.map(
            lambda total, new: total + jnp.where(acting, new, 0),
            old.counts,
            step.counts,
        ),
        env_steps=old.env_steps + acting.astype(jnp.int32),
        turns=old.turns + (acting & ~asleep).astype(jnp.int32),
        plans=old.plans + planned.astype(jnp.int32),
        plan_tokens=old.plan_tokens + jnp.where(end.complete, end.plan_tokens, 0),
    )


def begin_episode(
    lane: Lane,
    schedule_row: tuple[Array, Array, Array, Array],
    worlds: State,
    begin: Bool[Array, ""],
) -> Lane:
    """Give the lane the next world of its schedule, where ``begin`` and there is one.

    Args:
        lane: one lane.
        schedule_row: the lane's (world, seed, mode, entries) of ``Schedule``.
        worlds: the schedule's ready-made worlds.
        begin: whether this lane needs a world now.
    """
    world, seed, mode, entries = schedule_row
    column = lane.entry % world.shape[0]
    live = (entries < 0) | (lane.entry < entries)
    fresh = dataclasses.replace(
        lane,
        world=jax.tree.map(lambda leaf: leaf[world[column]], worlds),
        key=episode_key(seed[column]),
        entry=lane.entry + 1,
        asleep=jnp.array(False),
        mode=mode[column],
        episode_turn=jnp.full((), -1, jnp.int32),  # ``begin_turn`` makes it 0
        active_plan=lane.plan,
        stats=jax.tree.map(jnp.zeros_like, lane.stats),
    )
    return dataclasses.replace(
        _pick(begin & live, fresh, lane),
        live=jnp.where(begin, live, lane.live),
        ended=jnp.where(begin, ~live, lane.ended),
    )


def begin_turn(lane: Lane, budget: int, begin: Bool[Array, ""]) -> Lane:
    """Start the lane's next turn, where ``begin``."""
    zero = jnp.zeros((), jnp.int32)
    # Who sleeps on beyond a segment's end is still in the same turn of the episode.
    episode_turn = lane.episode_turn + (~lane.asleep).astype(jnp.int32)
    fresh = dataclasses.replace(
        lane,
        turn=lane.turn + 1,
        episode_turn=episode_turn,
        state=plan_grammar.start(lane.mode, episode_turn),
        remaining=jnp.full((), budget, jnp.int32),
        generated=zero,
        turn_reward=jnp.zeros((), jnp.float32),
        turn_env_steps=zero,
        turn_plan_tokens=zero,
    )
    return _pick(begin, fresh, lane)


def take_advice(lane: Lane, env: GuidedEnv, begin: Bool[Array, ""]) -> Lane:
    """Give the lane a plan for the turn it begins, where its guide wants one.

    Args:
        lane: one lane.
        env: its world.
        begin: whether the lane has just begun a turn.
    """
    given: Any = lane.given
    goal, turn = lane.world.intent.goal, lane.episode_turn
    guided, _, every = plan_grammar.guidance(lane.mode)
    due = (turn == 0) | (goal != given.goal) | (turn - given.turn >= every)
    key = jax.random.fold_in(token_key(lane), 0)
    fresh = Given(plan=env.plan(key, lane.world), goal=goal, turn=turn)
    listens = begin & guided & ~lane.asleep
    given = _pick(listens & due, fresh, given)
    advised = dataclasses.replace(lane, given=given)
    return _pick(begin, dataclasses.replace(advised, state=_start(advised)), advised)


def dictate(
    lane: Lane,
    grammar: Grammar,
    table: PhraseTable,
    budget: int,
    token: Int[Array, ""],
) -> tuple[Int[Array, ""], Bool[Array, ""]]:
    """Put the next token of the plan given in the place of the one sampled.

    Args:
        lane: one lane.
        grammar: the plan grammar.
        table: the guide's phrases.
        budget: plan-text tokens a turn may have; phrases beyond it are left out.
        token: the one sampled.

    Returns:
        The token to be said, and whether it is dictated.
    """
    given: Any = lane.given
    text, length, _ = pack(table, given.plan, budget)
    place = lane.turn_plan_tokens
    end = jnp.argmax(grammar.legal[plan_grammar.TEXT_FULL]).astype(jnp.int32)
    said = jnp.where(place < length, text[jnp.minimum(place, budget - 1)], end)
    in_text = (lane.state == plan_grammar.TEXT_FIRST) | (
        lane.state == plan_grammar.TEXT
    )
    _, scripted, _ = plan_grammar.guidance(lane.mode)
    dictated = scripted & in_text
    return jnp.where(dictated, said, token), dictated


def _start(lane: Lane) -> Int[Array, ""]:
    """The state the lane's turn begins in; with a plan where one is given in it."""
    state = plan_grammar.start(lane.mode, lane.episode_turn)
    if lane.given is None:
        return state
    guided, _, _ = plan_grammar.guidance(lane.mode)
    now = guided & (lane.given.turn == lane.episode_turn)
    spoken = now & lane.given.plan.mask.any()
    return jnp.where(spoken, plan_grammar.DECIDE_PLAN, state)


def restart_turn(lane: Lane, budget: int) -> Lane:
    """Forget what the lane has written in a turn the segment's end has cut off."""
    return dataclasses.replace(
        lane,
        state=_start(lane),
        remaining=jnp.full((), budget, jnp.int32),
        generated=jnp.zeros((), jnp.int32),
        plan=lane.active_plan,
        turn_plan_tokens=jnp.zeros((), jnp.int32),
    )


def write(
    lane: Lane,
    grammar: Grammar,
    token: Int[Array, ""],
    writing: Bool[Array, ""],
) -> tuple[Lane, dict[str, Array]]:
    """Take the token the lane has said, where ``writing``.

    Returns:
        The lane, and what the token is: span, plan and active_plan (``Tokens``).
    """
    state = lane.state
    span = plan_grammar.span(grammar, state, token)
    opens = plan_grammar.opens_plan(grammar, state, token)
    closes = plan_grammar.closes_plan(grammar, state, token)
    plan = lane.plan + opens.astype(jnp.int32)
    in_plan = opens | plan_grammar.is_writing_plan(grammar, state)
    closed = (plan > lane.active_plan) & (~in_plan | closes)
    facts = {
        "span": span,
        "plan": jnp.where(in_plan, plan, NO_PLAN),
        "active_plan": jnp.where(closed, plan, lane.active_plan),
    }
    next_state, remaining = plan_grammar.advance(grammar, state, token, lane.remaining)
    is_text = (span == Span.PLAN).astype(jnp.int32)
    written = dataclasses.replace(
        lane,
        state=next_state,
        remaining=remaining,
        generated=lane.generated + 1,
        plan=plan,
        turn_plan_tokens=lane.turn_plan_tokens + is_text,
    )
    return _pick(writing, written, lane), facts
