"""The host loop of PPO: dispatch, log, save, stop, resume.

The device does the work; the host calls one compiled program after another, writes down
what it says, and never looks at a value before the next program is on its way.
"""

import dataclasses
import functools
import resource
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding

from jaxplan.config.schema import RunConfig
from jaxplan.core.masked import masked_mean
from jaxplan.core.mesh import (
    LANES,
    WHOLE,
    AnyMesh,
    settle,
    sharding_on,
)
from jaxplan.io.checkpoints import save_checkpoint
from jaxplan.io.metrics import MetricsWriter
from jaxplan.io.progress import Progress
from jaxplan.io.stopping import Stopped
from jaxplan.io.weights import keep_frozen
from jaxplan.models.params import AgentParams, LlamaParams, join, split_trained
from jaxplan.plan.grammar import DYNAMIC, parse_mode
from jaxplan.rollout.rounds import Carry, init_carry, run_segment
from jaxplan.rollout.schedule import make_worlds, settle_schedule, training_schedule
from jaxplan.rollout.segment import Segment
from jaxplan.train.optim import Learner, make_ppo_optimizer
from jaxplan.train.ppo import Recipe, update
from jaxplan.train.setting import Setting, raise_if_lost
from jaxplan.train.state import (
    abstract_learner,
    begin_learner,
    reinforcible,
    resume,
    with_shardings,
)
from jaxplan.train.watch import Watch


def peak_memory_bytes() -> int:
    """The most memory this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _pool_seeds(setting: Setting, first: int, count: int) -> jax.Array:
    """Seeds of the ``count`` worlds made from number ``first`` on."""
    seeds = [
        np.random.default_rng([setting.config.seed, 3, number]).integers(2**24, 2**30)
        for number in range(first, first + count)
    ]
    return jnp.asarray(np.array(seeds, np.int32))


def _begin_play(setting: Setting, pool_seeds: jax.Array) -> dict[str, Any]:
    """A pool of worlds, and lanes that wait for one."""
    config = setting.config
    pool = make_worlds(setting.env, pool_seeds)
    key = jax.random.key(config.seed)
    schedule = training_schedule(pool, key, DYNAMIC, config.rollout.num_lanes)
    carry = init_carry(setting.env, setting.language, schedule, key, config.rollout)
    state = {"carry": carry, "pool": pool}
    if config.ppo.value_scaling:
        state["value_scale"] = jnp.float32(0)
    return state


def _play_shardings(setting: Setting, mesh: AnyMesh) -> dict[str, NamedSharding]:
    """Every lane on its device; the pool on all, so that any lane finds any world."""
    lanes, whole = (sharding_on(mesh, axes) for axes in (LANES, WHOLE))
    scale = {"value_scale": whole} if setting.config.ppo.value_scaling else {}
    return {"carry": lanes, "pool": whole, **scale}


def abstract_play(setting: Setting, mesh: AnyMesh) -> dict[str, Any]:
    """The lanes and the pool of worlds: shapes, and where they lie."""
    seeds = jax.ShapeDtypeStruct((setting.config.env.pool_size,), jnp.int32)
    play = jax.eval_shape(functools.partial(_begin_play, setting), seeds)
    return with_shardings(play, _play_shardings(setting, mesh))


def _abstract_state(setting: Setting, learner: Learner) -> dict[str, Any]:
    """All that lives on between two iterations: shapes, and where it lies."""
    return {"learner": learner} | abstract_play(setting, setting.mesh)


def begin_state(setting: Setting, learner: Learner) -> dict[str, Any]:
    """All that lives on between two iterations, before the first one."""
    seeds = _pool_seeds(setting, 0, setting.config.env.pool_size)
    begin = jax.jit(
        functools.partial(_begin_play, setting),
        out_shardings=_play_shardings(setting, setting.mesh),
    )
    return {"learner": learner} | begin(seeds)


@jax.jit
def _replace_worlds(pool: Any, fresh: Any, place: jax.Array) -> Any:
    return jax.tree.map(
        lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, place, 0),
        pool,
        fresh,
    )


def first_state(
    setting: Setting, primed: AgentParams, optimizer: optax.GradientTransformation
) -> tuple[Callable[[], dict[str, Any]], AgentParams]:
    """What makes the state before the first iteration, and what stands beside it.

    Args:
        setting: the run.
        primed: the agent PPO begins with; adapters and a critic of its own are added.
        optimizer: of its learner.
    """
    mesh, specs = setting.mesh, setting.specs_of("ppo")
    critic = setting.config.ppo.critic
    agent = reinforcible(setting.growth_key, primed, critic, specs, mesh)
    learns, frozen = split_trained(agent)

    def begin() -> dict[str, Any]:
        learning, _ = split_trained(specs)
        learner = begin_learner(learns, learning, optimizer, mesh)
        return begin_state(setting, learner)

    return begin, frozen


def _begin_ppo(
    setting: Setting, primed: AgentParams, optimizer: optax.GradientTransformation
) -> tuple[dict[str, Any], int, AgentParams]:
    """The state, the iterations that led to it, and what the learner stands beside."""
    begin, frozen = first_state(setting, primed, optimizer)
    keep_frozen(setting.run_dir, frozen)
    learning, _ = split_trained(setting.specs_of("ppo"))
    learner = abstract_learner(learning, optimizer, setting.mesh)
    target = _abstract_state(setting, learner)
    state, first = resume(
        setting.checkpoints("ppo"), target, begin, setting.config.ppo.iterations
    )
    return state, first, frozen


def train_ppo(setting: Setting, primed: AgentParams) -> dict[str, Any]:
    """Improve a primed agent by PPO.

    Args:
        setting: the run.
        primed: the agent SFT left; its Llama is the reference of the KL term, too, and
            shares with the policy what adapters stand beside.

    Returns:
        Results of the stage: env steps played.

    Raises:
        Stopped: someone asked the run to stop; it resumes from the last iteration.
    """
    ppo = setting.config.ppo
    optimizer = make_ppo_optimizer(ppo)
    state, first, frozen = _begin_ppo(setting, primed, optimizer)
    env_steps, watch = 0, Watch(ppo)
    with (
        jax.set_mesh(setting.mesh),
        closing(MetricsWriter(setting.run_dir, "ppo")) as writer,
        Progress("ppo", ppo.iterations, done=first) as progress,
    ):
        writer.resume_from(first)
        setting = dataclasses.replace(setting, language=settle(setting.language))
        for number in range(first, ppo.iterations):
            state, row = iteration(
                setting, state, primed.llama, optimizer, number, frozen
            )
            raise_if_lost(state["learner"], "ppo")
            env_steps += int(row["rollout/env_steps"])
            writer.scalars(number, row)
            for warning in watch.warnings(number, row):
                writer.text("ppo/warnings", warning, number)
                progress.tell(f"warning, iteration {number}: {warning}")
            progress.update(number + 1, **_shown(row))
            done = number + 1
            last = done == ppo.iterations
            stopping = setting.stop.requested and not last
            if done % ppo.checkpoint_every == 0 or last or stopping:
                save_checkpoint(setting.checkpoints("ppo"), done, state, row)
            if stopping:
                raise Stopped
    return {"iterations": ppo.iterations, "env_steps_this_time": env_steps}


def _shown(row: dict[str, float]) -> dict[str, float]:
    names = {
        "reward": "env/reward_per_turn",
        "achievements": "env/achievements",
        "plan_rate": "rollout/plan_rate",
        "env_steps_per_second": "rollout/env_steps_per_second",
        "tokens_per_second": "rollout/tokens_per_second",
    }
    return {short: row[name] for short, name in names.items() if name in row}


def iteration(
    setting: Setting,
    state: dict[str, Any],
    reference: LlamaParams,
    optimizer: Any,
    number: int,
    frozen: AgentParams | None = None,
) -> tuple[dict[str, Any], dict[str, float]]:
    """Rollout, then update; then some new worlds for the pool."""
    config, ppo = setting.config, setting.config.ppo
    began = time.monotonic()
    agent = join(state["learner"].params, frozen)
    carry, segment = play(setting, agent.llama, state, number)
    measured = jax.device_get(rollout_metrics(segment, config.plan.prices))
    played = time.monotonic()
    warm = number >= ppo.value_warmup_iterations
    learner, metrics = update(
        state["learner"],
        reference,
        segment,
        setting.language.grammar,
        lane_prices(config),
        jnp.float32(warm),
        jnp.float32(warm and ppo.value_trunk_grad),
        state["value_scale"] if ppo.value_scaling else jnp.float32(0),
        recipe=make_recipe(config, optimizer),
        frozen=frozen,
    )
    kept = {"value_scale": metrics["ppo/value_scale"]} if ppo.value_scaling else {}
    row = {name: float(value) for name, value in (measured | metrics).items()}
    updated = time.monotonic()
    row |= {
        "time/rollout_seconds": played - began,
        "time/update_seconds": updated - played,
        "rollout/env_steps_per_second": row["rollout/env_steps"] / (played - began),
        "rollout/tokens_per_second": row["rollout/tokens"] / (played - began),
        "memory/peak_bytes": float(peak_memory_bytes()),
    }
    row = {name: value for name, value in row.items() if not np.isnan(value)}
    pool = _refresh(setting, state["pool"], number)
    return {"learner": learner, "carry": carry, "pool": pool, **kept}, row


def lane_prices(config: RunConfig) -> jax.Array:
    """What a plan token costs: a number, or [lanes, 1] where lanes are told."""
    if not config.plan.prices:
        return jnp.float32(config.ppo.plan_cost)
    prices = config.plan.prices
    lanes = np.repeat(prices, config.rollout.num_lanes // len(prices))
    return jnp.asarray(lanes[:, None], jnp.float32)


def make_recipe(config: RunConfig, optimizer: Any) -> Recipe:
    """What the updates of a run have in common."""
    rollout = config.rollout
    return Recipe(
        optimizer=optimizer,
        config=config.ppo,
        model=config.model,
        history=rollout.history,
        temperature=rollout.temperature,
        max_decisions=rollout.rounds * (1 + rollout.decode_steps),
    )


def play(
    setting: Setting, params: LlamaParams, state: dict[str, Any], number: int
) -> tuple[Carry, Segment]:
    """One training segment of every lane, on worlds drawn for iteration ``number``."""
    config = setting.config
    key = jax.random.fold_in(jax.random.key(config.seed), number)
    mode, lanes = parse_mode(config.ppo.mode), config.rollout.num_lanes
    schedule = training_schedule(state["pool"], key, mode, lanes)
    return run_segment(
        params,
        state["carry"],
        setting.language,
        settle_schedule(schedule),
        config.ppo.gamma,
        env=setting.env,
        config=config.rollout,
        model=config.model,
        budget=config.plan.budget,
        turn_tokens=setting.turn_tokens,
        decide_explore=config.ppo.decide_explore,
    )


def _refresh(setting: Setting, pool: Any, number: int) -> Any:
    """Replace some worlds of the pool, round robin."""
    env = setting.config.env
    count = min(env.pool_refresh, env.pool_size)
    if not count:
        return pool
    seeds = _pool_seeds(setting, env.pool_size + number * count, count)
    place = (number * count) % (env.pool_size - count + 1)
    return _replace_worlds(pool, make_worlds(setting.env, seeds), jnp.int32(place))


@functools.partial(jax.jit, static_argnames="prices")
def rollout_metrics(
    segment: Segment, prices: tuple[float, ...] = ()
) -> dict[str, jax.Array]:
    """What a segment says of play; means are NaN where there was nothing.

    Args:
        segment: of one iteration.
        prices: of a plan token, each told to as many lanes in a row.
    """
    end, ends = segment.turns.end, segment.episodes
    tokens = jnp.sum(segment.encoded_tokens)
    said = end.complete & (end.action >= 0)  # who sleeps on has chosen before
    planned = (end.planned & said).astype(jnp.float32)
    plan_tokens = jnp.where(said, end.plan_tokens, 0).astype(jnp.float32)
    plans = jnp.maximum(jnp.sum(planned), 1.0)
    any_finished = jnp.any(ends.finished)
    each = end.complete.shape[0] // max(len(prices), 1)
    told = [slice(n * each, (n + 1) * each) for n in range(len(prices))]
    unlocked = jnp.sum(ends.stats.events, axis=-1).astype(jnp.float32)

    def of_episodes(values: jax.Array) -> jax.Array:
        mean = masked_mean(values.astype(jnp.float32), ends.finished)
        return jnp.where(any_finished, mean, jnp.nan)

    return {
        "env/return": of_episodes(ends.stats.task_return),
        "env/achievements": of_episodes(unlocked),
        "env/episode_env_steps": of_episodes(ends.stats.env_steps),
        **{f"env/{name}": of_episodes(n) for name, n in ends.stats.counts.items()},
        "env/episodes": jnp.sum(ends.finished),
        "env/reward_per_turn": masked_mean(end.reward, end.complete),
        "rollout/turns": jnp.sum(said),
        "rollout/env_steps": jnp.sum(segment.env_steps),
        "rollout/tokens": tokens,
        "rollout/plan_rate": masked_mean(planned, said),
        "rollout/plan_tokens_per_turn": masked_mean(plan_tokens, said),
        **{
            f"rollout/plan_rate_at_{price:.12g}": masked_mean(
                planned[lanes], said[lanes]
            )
            for price, lanes in zip(prices, told, strict=True)
        },
        "rollout/plan_tokens_per_plan": jnp.sum(plan_tokens) / plans,
        "rollout/utilisation": tokens / jnp.sum(segment.token_slots),
        "rollout/stream_fill": jnp.mean(segment.stream.cursor)
        / segment.stream.tokens.token.shape[1],
        "rollout/dropped_phrases": jnp.sum(segment.dropped_phrases),
    }
