"""Many small agents that learn side by side, with one compiled program for them all.

A comparison needs an agent for every seed and every price, and one tiny model leaves
most of a device idle. The members of a population share world, sizes and settings; each
has weights, lanes and worlds of its own, a seed, and a price of its own for plan
tokens. ``vmap`` lifts the rollout and the update of ``train.loop`` over them, so a
member learns what it would learn alone.

What one run has and a population does not: a mesh, checkpoints, adapters, a critic of
its own, a start that SFT left. Worlds are drawn inside the program, all of them anew in
every iteration. Segments of at most ``models.cache.BLOCK`` tokens are by far the
cheapest: a longer cache is read in blocks, and lifted, every member reads them all.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray

from jaxplan.config.schema import RunConfig
from jaxplan.envs.base import TextEnv
from jaxplan.models.params import LlamaParams, init_params
from jaxplan.plan.grammar import parse_mode
from jaxplan.rollout.rounds import Carry, Language, init_carry, run_segment
from jaxplan.rollout.schedule import Schedule, training_schedule
from jaxplan.rollout.segment import Segment
from jaxplan.train.optim import Learner, init_learner, make_ppo_optimizer
from jaxplan.train.ppo import Recipe, update
from jaxplan.train.ppo_loop import make_recipe, rollout_metrics

_START, _WORLDS, _EPISODES = range(3)  # what a member's chance is drawn for


@chex.dataclass(frozen=True)
class Members:
    """A population, or one of its members: then without the first axis of all arrays.

    Attributes:
        learner: weights and optimizer.
        reference: the Llama it began as, for the KL term.
        carry: where its lanes stand.
        key: of all that is drawn for it.
        mode: plan mode of its episodes, see ``jaxplan.plan.grammar.start``.
        plan_cost: reward it loses per plan-text token; it may be replaced between two
            iterations, as may ``mode``.
        value_scale: of ``ppo.value_scaling``, see ``update``.
        iterations: it has made.
    """

    learner: Learner
    reference: LlamaParams
    carry: Carry
    key: Key[Array, "*members"]
    mode: Int[Array, "*members"]
    plan_cost: Float[Array, "*members"]
    value_scale: Float[Array, "*members"]
    iterations: Int[Array, "*members"]


@dataclasses.dataclass(frozen=True)
class Common:
    """What all members share: static to the compiled programs.

    Attributes:
        env: the world.
        config: of every member's run, but for ``seed`` and ``ppo.plan_cost``.
        turn_tokens: tokens of the longest turn.
        recipe: of the updates.
    """

    env: TextEnv
    config: RunConfig
    turn_tokens: int
    recipe: Recipe


def make_common(config: RunConfig, env: TextEnv, turn_tokens: int) -> Common:
    """Say once what a population's members share.

    Raises:
        ValueError: the config has parts that only a run by itself can have.
    """
    ppo = config.ppo
    for key, given in (
        ("model.weights", config.model.weights),
        ("model.lora.rank", config.model.lora.rank),
        ("ppo.critic", ppo.critic),
        ("plan.prices", config.plan.prices),
    ):
        if given:
            raise ValueError(
                f"{key}={given}: members of a population are drawn from chance, their "
                "value head stands on the actor, and each has one price; leave it out, "
                "or train alone"
            )
    optimizer = make_ppo_optimizer(ppo)
    return Common(env, config, turn_tokens, make_recipe(config, optimizer))


def begin(
    seeds: Sequence[int],
    plan_costs: Sequence[float],
    language: Language,
    common: Common,
) -> Members:
    """Agents from chance, one for each seed and the plan cost beside it."""
    if len(seeds) != len(plan_costs):
        raise ValueError(
            f"begin: {len(seeds)} seeds and {len(plan_costs)} plan costs; a member has "
            "one of each"
        )
    numbers = jnp.asarray(seeds, jnp.int32), jnp.asarray(plan_costs, jnp.float32)
    return _begin(*numbers, language, common)


@partial(jax.jit, static_argnames="common")
def _begin(
    seeds: Int[Array, " members"],
    plan_costs: Float[Array, " members"],
    language: Language,
    common: Common,
) -> Members:
    one = partial(_begin_one, language=language, common=common)
    return jax.vmap(one)(seeds, plan_costs)


def _begin_one(
    seed: Int[Array, ""],
    plan_cost: Float[Array, ""],
    language: Language,
    common: Common,
) -> Members:
    config, key = common.config, jax.random.key(seed)
    vocab_size = language.grammar.legal.shape[1]
    params = init_params(jax.random.fold_in(key, _START), config.model, vocab_size)
    nothing, mode = jnp.int32(0), jnp.int32(parse_mode(config.ppo.mode))
    schedule = _schedule(key, mode, nothing, common)
    return Members(
        learner=init_learner(params, common.recipe.optimizer),
        reference=params.llama,
        carry=init_carry(common.env, language, schedule, key, config.rollout),
        key=key,
        mode=mode,
        plan_cost=plan_cost,
        value_scale=jnp.float32(0),
        iterations=nothing,
    )


def _schedule(
    key: PRNGKeyArray, mode: Int[Array, ""], number: Int[Array, ""], common: Common
) -> Schedule:
    """Worlds of one member's iteration, and who plays which."""
    env, config = common.env, common.config

    def chance(of: int) -> PRNGKeyArray:
        return jax.random.fold_in(jax.random.fold_in(key, of), number)

    keys = jax.random.split(chance(_WORLDS), config.env.pool_size)
    worlds, lanes = jax.vmap(env.reset)(keys), config.rollout.num_lanes
    return training_schedule(worlds, chance(_EPISODES), mode, lanes)


@partial(jax.jit, static_argnames="common")
def play(members: Members, language: Language, common: Common) -> tuple[Carry, Segment]:
    """One segment of every lane of every member."""
    return jax.vmap(partial(_play_one, language=language, common=common))(members)


def _play_one(
    member: Members, language: Language, common: Common
) -> tuple[Carry, Segment]:
    config = common.config
    return run_segment(
        member.learner.params.llama,
        member.carry,
        language,
        _schedule(member.key, member.mode, member.iterations, common),
        config.ppo.gamma,
        env=common.env,
        config=config.rollout,
        model=config.model,
        budget=config.plan.budget,
        turn_tokens=common.turn_tokens,
        decide_explore=config.ppo.decide_explore,
    )


@partial(jax.jit, static_argnames="common")
def learn(
    members: Members,
    carry: Carry,
    segment: Segment,
    language: Language,
    common: Common,
) -> tuple[Members, dict[str, Array]]:
    """Every member's update on what it has just played.

    Args:
        members: who played.
        carry: where that left their lanes.
        segment: what they played.
        language: the tokenizer's tables.
        common: what they share.

    Returns:
        The members after it; metrics of play and update, NaN where there was nothing.
    """
    one = partial(_learn_one, language=language, common=common)
    return jax.vmap(one)(members, carry, segment)


def _learn_one(
    member: Members,
    carry: Carry,
    segment: Segment,
    language: Language,
    common: Common,
) -> tuple[Members, dict[str, Array]]:
    ppo = common.config.ppo
    warm = member.iterations >= ppo.value_warmup_iterations
    learner, metrics = update(
        member.learner,
        member.reference,
        segment,
        language.grammar,
        member.plan_cost,
        warm.astype(jnp.float32),
        (warm & ppo.value_trunk_grad).astype(jnp.float32),
        member.value_scale,
        recipe=common.recipe,
    )
    after = dataclasses.replace(
        member,
        learner=learner,
        carry=carry,
        value_scale=metrics.get("ppo/value_scale", member.value_scale),
        iterations=member.iterations + 1,
    )
    return after, rollout_metrics(segment) | metrics


def train(
    members: Members, iterations: int, language: Language, common: Common
) -> tuple[Members, dict[str, Float[np.ndarray, "iterations members"]]]:
    """Let all members play and learn, ``iterations`` times.

    Returns:
        The members, and their metrics (host).
    """
    rows = []
    for _ in range(iterations):
        carry, segment = play(members, language, common)
        members, row = learn(members, carry, segment, language, common)
        rows.append(row)
    return members, jax.tree.map(lambda *some: np.stack(some), *jax.device_get(rows))
