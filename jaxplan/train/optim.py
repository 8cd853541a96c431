"""The optimizer: AdamW or Muon, warm-up, cosine decay, clipping by the global norm.

It computes in float32 and keeps its moments so, whatever the parameters are stored as.
"""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray
from optax.contrib import MuonDimensionNumbers, muon

from jaxplan.config.schema import OptimizerConfig, PpoConfig
from jaxplan.models.params import AgentParams

_MOMENTUM = 0.95  # of Muon
# Root mean square of Muon's step as a share of the learning rate. Adam's lies between
# 0.2 and 0.4 (arXiv:2502.16982, section 2.2).
_UPDATE_RMS = 0.4
# Input and output axes of a layer's matrices; axis 0 is the layer.
_HEADS_OUT = MuonDimensionNumbers(reduction_axis=(1,), output_axis=(2, 3))
_PLAIN = MuonDimensionNumbers(reduction_axis=(1,), output_axis=(2,))
_MATRICES = {
    "query": _HEADS_OUT,
    "key": _HEADS_OUT,
    "value": _HEADS_OUT,
    "attention_out": MuonDimensionNumbers(reduction_axis=(1, 2), output_axis=(3,)),
    "gate": _PLAIN,
    "up": _PLAIN,
    "down": _PLAIN,
}


@chex.dataclass(frozen=True)
class Learner:
    """What an optimizer step changes.

    Attributes:
        params: of the agent.
        opt_state: of the optimizer.
        skipped: updates in a row that were not finite and therefore not made.
        bad_leaves: by tensor, whether its last gradient was not finite.
    """

    params: AgentParams
    opt_state: Any
    skipped: Int[Array, ""]
    bad_leaves: AgentParams


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
    config: OptimizerConfig,
    num_updates: int,
    value_ratio: float = 1.0,
    critic_ratio: float = 1.0,
) -> optax.GradientTransformation:
    """Build the optimizer of an agent.

    Args:
        config: its settings.
        num_updates: length of the schedule.
        value_ratio: learning rate of the value head, as a multiple of its trunk's.
        critic_ratio: that of a critic of its own, as a multiple of the actor's; such a
            critic's gradients are clipped apart from the actor's, too.
    """

    # Optax says ArrayTree for any pytree, which to a type checker excludes ours.
    def scale(updates: Any, _: Any) -> Any:
        trunk_ratio = 1.0 if updates.critic is None else critic_ratio
        head_ratio = value_ratio * trunk_ratio
        value = jax.tree.map(lambda u: u * head_ratio, updates.value)
        critic = jax.tree.map(lambda u: u * trunk_ratio, updates.critic)
        return dataclasses.replace(updates, value=value, critic=critic)

    def clip(updates: Any, _: Any) -> Any:
        if updates.critic is None:
            return _clip(updates, config.max_grad_norm)
        llama = _clip(updates.llama, config.max_grad_norm)
        judging = _clip((updates.value, updates.critic), config.max_grad_norm)
        return AgentParams(llama=llama, value=judging[0], critic=judging[1])

    rate = learning_rate_schedule(config, num_updates)
    return optax.chain(
        optax.stateless(clip),
        _muon(config, rate) if config.kind == "muon" else _adamw(config, rate),
        optax.stateless(scale),
    )


def make_ppo_optimizer(config: PpoConfig) -> optax.GradientTransformation:
    """Build the optimizer of PPO, for all the updates it makes."""
    return make_optimizer(
        config.optimizer,
        config.iterations * config.num_epochs * config.num_minibatches,
        value_ratio=config.value_learning_rate_ratio,
        critic_ratio=config.critic_learning_rate_ratio,
    )


def _clip(updates: Any, norm: float) -> Any:
    return optax.clip_by_global_norm(norm).update(updates, optax.EmptyState())[0]


def _adamw(
    config: OptimizerConfig, rate: optax.Schedule
) -> optax.GradientTransformation:
    return optax.adamw(
        rate,
        config.beta1,
        config.beta2,
        weight_decay=config.weight_decay,
        mask=_is_matrix,
    )


def _muon(
    config: OptimizerConfig, rate: optax.Schedule
) -> optax.GradientTransformation:
    return muon(
        rate,
        beta=_MOMENTUM,
        weight_decay=config.weight_decay,
        adam_b1=config.beta1,
        adam_b2=config.beta2,
        muon_weight_dimension_numbers=_layer_matrices,
        consistent_rms=_UPDATE_RMS,
    )


def _layer_matrices(params: Any) -> Any:
    """Which axes of a stacked weight are a matrix's inputs and outputs; None: none."""

    def axes(path: Any, _: Array) -> MuonDimensionNumbers | None:
        in_layers = any(getattr(key, "name", None) == "layers" for key in path)
        return _MATRICES.get(path[-1].name) if in_layers else None

    return jax.tree.map_with_path(axes, params)


def _is_matrix(params: Any) -> Any:
    """Which tensors decay: neither biases nor the norms, stacked though these are."""

    def decays(path: Any, leaf: Array) -> bool:
        return leaf.ndim > 1 and not path[-1].name.endswith(("norm", "bias"))

    return jax.tree.map_with_path(decays, params)


def init_learner(
    params: AgentParams, optimizer: optax.GradientTransformation
) -> Learner:
    """A learner before its first update."""
    return Learner(
        params=params,
        opt_state=optimizer.init(_widen(params)),
        skipped=jnp.int32(0),
        bad_leaves=jax.tree.map(lambda _: jnp.array(False), params),
    )


def update_learner(
    learner: Learner,
    grads: Any,
    optimizer: optax.GradientTransformation,
    trunk_weight: Float[Array, ""] | None = None,
) -> tuple[Learner, Float[Array, ""]]:
    """One update, or none if a gradient is not finite.

    Args:
        learner: what is updated.
        grads: of its parameters.
        optimizer: of the learner.
        trunk_weight: what the Llama's step is multiplied by; 0 holds it still though
            its weights decay.

    Returns:
        The learner and the global norm of the gradients before clipping.
    """
    before, grads = _widen(learner.params), _widen(grads)
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(norm)
    updates, opt_state = optimizer.update(grads, learner.opt_state, before)
    if trunk_weight is not None:
        updates = _weigh_llama(updates, trunk_weight)
    old = learner.params, learner.opt_state
    after = optax.apply_updates(before, updates)
    new = _store(after, learner.params, opt_state), opt_state
    params, opt_state = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
    return Learner(
        params=params,
        opt_state=opt_state,
        skipped=jnp.where(finite, 0, learner.skipped + 1),
        bad_leaves=jax.tree.map(lambda g: ~jnp.isfinite(jnp.sum(g * g)), grads),
    ), norm


def _weigh_llama(updates: Any, weight: Float[Array, ""]) -> Any:
    llama = jax.tree.map(lambda step: weight * step, updates.llama)
    return dataclasses.replace(updates, llama=llama)


def _widen(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)


def _store(tree: Any, like: Any, opt_state: Any) -> Any:
    """Round to the dtypes the parameters are stored as.

    Rounding to bfloat16 is random and right on average: a step is often smaller than
    half the distance to the next number, and to the nearest it would always be lost.
    """
    leaves, treedef = jax.tree.flatten(tree)
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(like)]
    if all(dtype == jnp.float32 for dtype in dtypes):
        return tree
    _, number = optax.tree.get_all_with_path(opt_state, "count")[0]
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), number), len(leaves))
    stored = [
        leaf if dtype == jnp.float32 else _round_randomly(leaf, key)
        for leaf, dtype, key in zip(leaves, dtypes, keys, strict=True)
    ]
    return jax.tree.unflatten(treedef, stored)


def _round_randomly(numbers: Array, key: PRNGKeyArray) -> Array:
    """Float32 to one of the two bfloat16 around it: its upper half, after a chance."""
    lower = jax.random.bits(key, numbers.shape, jnp.uint16).astype(jnp.uint32)
    bits = jax.lax.bitcast_convert_type(numbers, jnp.uint32) + lower
    cut = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    return cut.astype(jnp.bfloat16)


def bad_leaves(learner: Learner) -> list[str]:
    """Names of the tensors whose last gradient was not finite (host)."""
    return [
        jax.tree_util.keystr(path)
        for path, bad in jax.tree_util.tree_leaves_with_path(learner.bad_leaves)
        if bad
    ]
