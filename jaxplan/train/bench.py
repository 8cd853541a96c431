"""How fast a config's PPO runs here, and how far its sampler is from its learner.

The first iteration compiles; its time is told apart from the median of those after it.
"""

import dataclasses
import functools
import time
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxplan.core.mesh import settle
from jaxplan.models.params import AgentParams, join
from jaxplan.train.optim import make_ppo_optimizer
from jaxplan.train.ppo import Recipe, prepare
from jaxplan.train.ppo_loop import (
    first_state,
    iteration,
    lane_prices,
    make_recipe,
    play,
)
from jaxplan.train.setting import Setting

QUANTILES = (0.5, 0.9, 0.99, 0.999, 1.0)


def time_iterations(
    setting: Setting, primed: AgentParams, repeats: int
) -> dict[str, float]:
    """Run PPO iterations and time them.

    Args:
        setting: of the run.
        primed: the agent that plays and learns.
        repeats: iterations after the first.

    Returns:
        ``first_seconds``, most of it compilation; medians of the others: seconds of a
        rollout and of an update, env steps and tokens a second in a rollout, tokens a
        second in an update (all slots of the streams), and the rollout's plan rate and
        share of token slots that were used; the process' peak memory.
    """
    optimizer = make_ppo_optimizer(setting.config.ppo)
    begin, frozen = first_state(setting, primed, optimizer)
    state, rollout, rows = begin(), setting.config.rollout, []
    with jax.set_mesh(setting.mesh):
        own = dataclasses.replace(setting, language=settle(setting.language))
        began = time.monotonic()
        for number in range(repeats + 1):
            state, row = iteration(own, state, primed.llama, optimizer, number, frozen)
            if not number:
                first = time.monotonic() - began
            rows.append(row)

    def middle(name: str) -> float:
        return median(row[name] for row in rows[1:])

    update_seconds = middle("time/update_seconds")
    passes = rollout.num_lanes * rollout.segment_tokens * setting.config.ppo.num_epochs
    return {
        "first_seconds": first,
        "rollout_seconds": middle("time/rollout_seconds"),
        "update_seconds": update_seconds,
        "env_steps_per_second": middle("rollout/env_steps_per_second"),
        "rollout_tokens_per_second": middle("rollout/tokens_per_second"),
        "update_tokens_per_second": passes / update_seconds,
        "plan_rate": middle("rollout/plan_rate"),
        "utilisation": middle("rollout/utilisation"),
        "peak_gib": rows[-1]["memory/peak_bytes"] / 2**30,
    }


def log_prob_errors(
    setting: Setting, primed: AgentParams, compute_dtype: str
) -> dict[str, float]:
    """Compare what was sampled with what the same weights say when they are taught.

    Args:
        setting: of the run.
        primed: the agent.
        compute_dtype: of the model, in rollout and update.

    Returns:
        Quantiles, by their name, of |sampled - teacher-forced| log-probability over the
        sampled tokens of one segment of every lane.
    """
    model = dataclasses.replace(setting.config.model, compute_dtype=compute_dtype)
    config = dataclasses.replace(setting.config, model=model)
    own = dataclasses.replace(setting, config=config)
    optimizer = make_ppo_optimizer(config.ppo)
    begin, frozen = first_state(own, primed, optimizer)
    state = begin()
    with jax.set_mesh(own.mesh):
        own = dataclasses.replace(own, language=settle(own.language))
        agent = join(state["learner"].params, frozen)
        _, segment = play(own, agent.llama, state, 0)
        recipe = make_recipe(config, optimizer)
        errors = _errors(
            agent, segment, own.language.grammar, lane_prices(config), recipe
        )
    told = np.asarray(errors)
    told = told[~np.isnan(told)]
    return {f"q{q:g}": float(np.quantile(told, q)) for q in QUANTILES}


@functools.partial(jax.jit, static_argnames="recipe")
def _errors(
    agent: AgentParams, segment: Any, grammar: Any, price: Any, recipe: Recipe
) -> Float[jax.Array, "B M"]:
    """Of every sampled token; NaN where there is none."""
    batch, _ = prepare(agent, agent.llama, segment, grammar, price, recipe)
    taught = batch.reference.decide + batch.reference.which
    sampled = batch.sampler.decide + batch.sampler.which
    return jnp.where(batch.decisions.mask, jnp.abs(sampled - taught), jnp.nan)
