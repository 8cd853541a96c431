"""The host loops of SFT and PPO: dispatch, log, save, stop, resume.

The device does the work; the host calls one compiled program after another, writes down
what it says, and never looks at a value before the next program is on its way.
"""

import dataclasses
import functools
import operator
import resource
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from jaxplan.config.schema import RunConfig
from jaxplan.core.masked import masked_mean
from jaxplan.core.mesh import (
    LANES,
    WHOLE,
    AnyMesh,
    check_tensors,
    make_mesh,
    num_shards,
    settle,
    sharding_on,
    shardings_of,
)
from jaxplan.core.specs import abstract_tensors
from jaxplan.envs.base import TextEnv
from jaxplan.io.checkpoints import save_checkpoint
from jaxplan.io.metrics import MetricsWriter
from jaxplan.io.progress import Progress
from jaxplan.io.stopping import Stopped, StopRequest
from jaxplan.io.weights import keep_frozen, load_agent, load_llama, stage_specs
from jaxplan.models.params import AgentParams, LlamaParams, join, split_trained
from jaxplan.plan.grammar import DYNAMIC, parse_mode
from jaxplan.rollout.rounds import Carry, Language, init_carry, run_segment
from jaxplan.rollout.schedule import make_worlds, settle_schedule, training_schedule
from jaxplan.rollout.segment import Segment
from jaxplan.train.data import SegmentData
from jaxplan.train.optim import Learner, bad_leaves, make_optimizer
from jaxplan.train.ppo import Recipe, update
from jaxplan.train.sft import (
    batch_indices,
    sft_update,
    sft_validate,
    validation_metrics,
)
from jaxplan.train.state import (
    abstract_learner,
    begin_learner,
    reinforcible,
    resume,
    start_params,
    with_adapters,
    with_shardings,
)
from jaxplan.train.watch import Watch

_MAX_SKIPPED = 3  # updates in a row that may be lost to a gradient that is not finite
_VALIDATION_BATCH = 16  # segments at least
_GROWTH = 2**31 - 1  # no iteration has this number


@dataclasses.dataclass(frozen=True)
class Setting:
    """What both stages work with.

    Attributes:
        config: the run.
        run_dir: its directory.
        env: the world.
        language: the tokenizer's tables.
        vocab_size: of the tokenizer.
        turn_tokens: tokens of the longest turn.
        stop: asked between two updates.
    """

    config: RunConfig
    run_dir: Path
    env: TextEnv
    language: Language
    vocab_size: int
    turn_tokens: int
    stop: StopRequest

    def checkpoints(self, stage: str) -> Path:
        """Where a stage keeps its checkpoints."""
        return self.run_dir / "checkpoints" / stage

    @functools.cached_property
    def mesh(self) -> Mesh:
        """The devices of the run."""
        return make_mesh(self.config.mesh)

    @property
    def specs(self) -> AgentParams:
        """A declaration for every tensor that the run begins with."""
        return self.specs_of("start")

    def specs_of(self, stage: str) -> AgentParams:
        """A declaration for every tensor of the agent that a stage trains."""
        return stage_specs(self.config, self.vocab_size, stage)

    @property
    def growth_key(self) -> jax.Array:
        """What is drawn after the start, adapters and a critic, is drawn with this."""
        return jax.random.fold_in(jax.random.key(self.config.seed), _GROWTH)


def check_mesh(setting: Setting) -> None:
    """Refuse a mesh that does not divide what it is to split.

    Raises:
        ValueError: with the numbers, and what to change.
    """
    check_division(setting, setting.mesh)


def check_division(setting: Setting, mesh: AnyMesh) -> None:
    """``check_mesh`` for devices that need not be there."""
    config = setting.config
    for stage in ("sft", "ppo"):
        check_tensors(setting.specs_of(stage), mesh)
    shards = num_shards(mesh)
    parts = f"mesh.data={mesh.shape['data']} x mesh.fsdp={mesh.shape['fsdp']}"
    minibatches = config.ppo.num_minibatches
    if config.rollout.num_lanes % (shards * minibatches):
        raise ValueError(
            f"rollout.num_lanes={config.rollout.num_lanes} is not divisible by "
            f"{parts} x ppo.num_minibatches={minibatches}"
        )
    if _plays_in_collect(config) and config.collect.lanes % shards:
        raise ValueError(
            f"collect.lanes={config.collect.lanes} is not divisible by {parts}, and a "
            "Llama plays in them"
        )
    if config.sft.batch_segments % shards:
        raise ValueError(
            f"sft.batch_segments={config.sft.batch_segments} is not divisible by "
            f"{parts}"
        )


def _plays_in_collect(config: RunConfig) -> bool:
    """Whether lanes of a collection are played by a Llama, as teacher or student."""
    return config.collect.teacher == "llama" or config.sft.relay.episodes > 0


def peak_memory_bytes() -> int:
    """The most memory this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _raise_if_lost(learner: Learner, metrics: dict[str, float], name: str) -> None:
    """Stop when updates keep failing, and say where the numbers went wrong."""
    if metrics[f"{name}/skipped_updates"] < _MAX_SKIPPED:
        return
    raise FloatingPointError(
        f"{name}: {_MAX_SKIPPED} updates in a row had a gradient that is not finite, "
        f"at last in {bad_leaves(learner)}; the last checkpoint is good: lower the "
        "learning rate and resume"
    )


def train_sft(
    setting: Setting,
    train: SegmentData,
    held_out: SegmentData,
    probe: Callable[[LlamaParams], dict[str, float]] | None = None,
    until: int | None = None,
) -> dict[str, Any]:
    """Teach an agent to imitate; the final checkpoint is the primed policy.

    Args:
        setting: the run.
        train: segments to learn from.
        held_out: segments to validate on.
        probe: lets the student play and tells how it did, every ``sft.panel_every``
            updates.
        until: how many of all updates to have made in the end; by default all.

    Returns:
        Results of the stage: updates, and the last validation.

    Raises:
        Stopped: someone asked the run to stop; it resumes from the last update.
        ValueError: there are fewer segments than a batch holds.
    """
    config, sft = setting.config, setting.config.sft
    per_epoch = len(train) // sft.batch_segments
    if not per_epoch:
        raise ValueError(
            f"sft.batch_segments={sft.batch_segments}, but the dataset makes only "
            f"{len(train)} segments; collect more episodes or take smaller batches"
        )
    total = sft.updates or sft.epochs * per_epoch
    until = total if until is None else until
    optimizer = make_optimizer(sft.optimizer, total)

    learner, first, frozen, begun = _begin_sft(setting, optimizer)
    measuring = begun is not None and (sft.kl_coef or sft.measure_kl)
    measured = begun.llama if measuring else None
    reference = measured if sft.kl_coef else None
    tokens = sft.batch_segments * config.rollout.segment_tokens
    validation: dict[str, float] = {}
    with (
        jax.set_mesh(setting.mesh),
        closing(MetricsWriter(setting.run_dir, "sft")) as writer,
        Progress("sft", total, done=first) as progress,
    ):
        writer.resume_from(first)
        for number in range(first, until):
            began = time.monotonic()
            batch = train.batch(
                batch_indices(len(train), sft.batch_segments, number, config.seed)
            )
            learner, metrics = sft_update(
                learner,
                reference,
                batch,
                optimizer=optimizer,
                max_targets=train.max_targets,
                config=sft,
                model=config.model,
                history=config.rollout.history,
                frozen=frozen,
            )
            row = {name: float(value) for name, value in metrics.items()}
            _raise_if_lost(learner, row, "sft")
            row["sft/tokens_per_second"] = tokens / (time.monotonic() - began)
            done = number + 1
            if done % sft.validate_every == 0 or done == until:
                agent = join(learner.params, frozen)
                validation = _validate(setting, agent, measured, held_out)
                row |= validation
            if probe is not None and done % sft.panel_every == 0:
                row |= probe(join(learner.params, frozen).llama)
            writer.scalars(number, row)
            progress.update(
                done,
                loss=row["sft/loss"],
                accuracy=row["sft/accuracy_decide"],
                tokens_per_second=row["sft/tokens_per_second"],
            )
            stopping = setting.stop.requested and done < until
            if done % sft.checkpoint_every == 0 or done == until or stopping:
                save_checkpoint(setting.checkpoints("sft"), done, learner, row)
            if stopping:
                raise Stopped
    padding = train.padding_share
    return {"updates": total, "padding_share": padding, **validation}


def _begin_sft(
    setting: Setting, optimizer: optax.GradientTransformation
) -> tuple[Learner, int, AgentParams | None, AgentParams | None]:
    """The learner, the updates it has made, what it stands beside, and its start.

    The last two are None where nothing asks for them: then nobody keeps the start.
    """
    config, mesh, specs = setting.config, setting.mesh, setting.specs_of("sft")
    learning, staying = split_trained(specs)

    def start() -> AgentParams:
        key = jax.random.key(config.seed)
        return start_params(key, config.model, setting.specs, mesh)

    def parts(agent: AgentParams) -> tuple[AgentParams, AgentParams]:
        llama = with_adapters(setting.growth_key, agent.llama, specs.llama, mesh)
        return split_trained(dataclasses.replace(agent, llama=llama))

    def begin() -> Learner:
        learns, _ = parts(start() if begun is None else begun)
        return begin_learner(learns, learning, optimizer, mesh)

    wanted = jax.tree.leaves(staying) or config.sft.kl_coef or config.sft.measure_kl
    begun = start() if wanted else None
    frozen = None if begun is None else parts(begun)[1]
    if frozen is not None:
        keep_frozen(setting.run_dir, frozen)
    target = abstract_learner(learning, optimizer, mesh)
    learner, first = resume(setting.checkpoints("sft"), target, begin)
    return learner, first, frozen, begun


def _validate(
    setting: Setting,
    params: AgentParams,
    start: LlamaParams | None,
    data: SegmentData,
) -> dict[str, float]:
    """Over all held-out tokens; what fills the last batch up does not count."""
    shards = num_shards(setting.mesh)
    size = -(-_VALIDATION_BATCH // shards) * shards
    sums: Any = None
    for first in range(0, len(data), size):
        indices = np.arange(first, first + size)
        batch, counted = data.batch(indices % len(data)), indices < len(data)
        own = sft_validate(
            params,
            start,
            batch,
            jnp.asarray(counted),
            max_targets=data.max_targets,
            model=setting.config.model,
            history=setting.config.rollout.history,
        )
        own = jax.tree.map(float, own)
        sums = own if sums is None else jax.tree.map(operator.add, sums, own)
    return validation_metrics(sums, start is not None)


def load_policy(setting: Setting, stage: str) -> AgentParams:
    """The agent a finished stage left."""
    specs = setting.specs_of(stage)
    target = with_shardings(abstract_tensors(specs), shardings_of(specs, setting.mesh))
    return load_agent(setting.run_dir, stage, target)


def load_player(setting: Setting, stage: str) -> LlamaParams:
    """What plays of the agent a finished stage left."""
    specs = setting.specs_of(stage).llama
    target = with_shardings(abstract_tensors(specs), shardings_of(specs, setting.mesh))
    return load_llama(setting.run_dir, stage, target)


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


def _begin_ppo(
    setting: Setting, primed: AgentParams, optimizer: optax.GradientTransformation
) -> tuple[dict[str, Any], int, AgentParams]:
    """The state, the iterations that led to it, and what the learner stands beside."""
    mesh, specs = setting.mesh, setting.specs_of("ppo")
    critic = setting.config.ppo.critic
    agent = reinforcible(setting.growth_key, primed, critic, specs, mesh)
    learns, frozen = split_trained(agent)
    learning, _ = split_trained(specs)
    keep_frozen(setting.run_dir, frozen)

    def begin() -> dict[str, Any]:
        learner = begin_learner(learns, learning, optimizer, mesh)
        return begin_state(setting, learner)

    learner = abstract_learner(learning, optimizer, mesh)
    target = _abstract_state(setting, learner)
    state, first = resume(setting.checkpoints("ppo"), target, begin)
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
    updates = ppo.iterations * ppo.num_epochs * ppo.num_minibatches
    optimizer = make_optimizer(
        ppo.optimizer,
        updates,
        value_ratio=ppo.value_learning_rate_ratio,
        critic_ratio=ppo.critic_learning_rate_ratio,
    )
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
            _raise_if_lost(state["learner"], row, "ppo")
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
    lanes = np.resize(config.plan.prices, (config.rollout.num_lanes, 1))
    return jnp.asarray(lanes, jnp.float32)


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
        prices: of a plan token, told to the lanes in turn.
    """
    end, ends = segment.turns.end, segment.episodes
    tokens = jnp.sum(segment.encoded_tokens)
    planned = (end.planned & end.complete).astype(jnp.float32)
    plan_tokens = jnp.where(end.complete, end.plan_tokens, 0).astype(jnp.float32)
    plans = jnp.maximum(jnp.sum(planned), 1.0)
    any_finished = jnp.any(ends.finished)
    told = [slice(number, None, len(prices)) for number in range(len(prices))]
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
        "rollout/turns": jnp.sum(end.complete),
        "rollout/env_steps": jnp.sum(segment.env_steps),
        "rollout/tokens": tokens,
        "rollout/plan_rate": masked_mean(planned, end.complete),
        "rollout/plan_tokens_per_turn": masked_mean(plan_tokens, end.complete),
        **{
            f"rollout/plan_rate_at_{price:g}": masked_mean(
                planned[lanes], end.complete[lanes]
            )
            for price, lanes in zip(prices, told, strict=True)
        },
        "rollout/plan_tokens_per_plan": jnp.sum(plan_tokens) / plans,
        "rollout/utilisation": tokens / jnp.sum(segment.token_slots),
        "rollout/stream_fill": jnp.mean(segment.stream.cursor)
        / segment.stream.tokens.token.shape[1],
        "rollout/dropped_phrases": jnp.sum(segment.dropped_phrases),
    }
