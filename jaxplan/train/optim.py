"""The optimizer: AdamW, warm-up and cosine decay, clipping by the global norm."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from jaxplan.config.schema import OptimizerConfig
from jaxplan.models.params import AgentParams


@chex.dataclass(frozen=True)
class Learner:
    """What an optimizer step changes.

    Attributes:
        params: of the agent.
        opt_state: of the optimizer.
        skipped: updates in a row that were not finite and therefore not made.
    """

    params: AgentParams
    opt_state: Any
    skipped: Array


def learning_rate_schedule(config: OptimizerConfig, num_updates: int) -> optax.Schedule:
    """Linear warm-up to the peak, cosine decay to ``final_fraction`` of it."""
    warmup = min(config.warmup_updates, max(num_updates - 1, 0))
    return optax.warmup_cosine_decay_schedule(
        init_value=config.learning_rate / (warmup + 1),
        peak_value=config.learning_rate,
        warmup_steps=warmup,
        decay_steps=max(num_updates, warmup + 1),
        end_value=config.learning_rate * config.final_fraction,
    )


def make_optimizer(
    config: OptimizerConfig, num_updates: int, value_ratio: float = 1.0
) -> optax.GradientTransformation:
    """Build AdamW for an agent.

    Args:
        config: its settings.
        num_updates: length of the schedule.
        value_ratio: learning rate of the value head, as a multiple of the trunk's.
    """

    def scale_value_head(updates: AgentParams) -> AgentParams:
        scaled = jax.tree.map(lambda u: u * value_ratio, updates.value)
        return updates.replace(value=scaled)

    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.scale_by_adam(config.beta1, config.beta2),
        optax.add_decayed_weights(config.weight_decay, mask=_is_matrix),
        optax.scale_by_learning_rate(learning_rate_schedule(config, num_updates)),
        optax.stateless(lambda updates, params: scale_value_head(updates)),
    )


def _is_matrix(params: AgentParams) -> AgentParams:
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def init_learner(
    params: AgentParams, optimizer: optax.GradientTransformation
) -> Learner:
    """A learner before its first update."""
    return Learner(
        params=params, opt_state=optimizer.init(params), skipped=jnp.int32(0)
    )


def update_learner(
    learner: Learner,
    grads: AgentParams,
    optimizer: optax.GradientTransformation,
) -> tuple[Learner, Float[Array, ""]]:
    """One update, or none if a gradient is not finite.

    Returns:
        The learner and the global norm of the gradients before clipping.
    """
    norm = optax.global_norm(grads)
    finite: Bool[Array, ""] = jnp.isfinite(norm)
    updates, opt_state = optimizer.update(grads, learner.opt_state, learner.params)
    params = optax.apply_updates(learner.params, updates)
    new, old = (params, opt_state), (learner.params, learner.opt_state)
    params, opt_state = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
    skipped = jnp.where(finite, 0, learner.skipped + 1)
    return Learner(params=params, opt_state=opt_state, skipped=skipped), norm


def nonfinite_leaves(tree: Any) -> list[str]:
    """Key paths of the leaves that hold a NaN or an infinity (host)."""
    return [
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if jnp.issubdtype(leaf.dtype, jnp.floating) and not bool(jnp.isfinite(leaf).all())
    ]
