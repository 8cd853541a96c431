"""Imitation: cross-entropy on plan and action tokens of packed segments.

The loss is that of the full vocabulary, without the grammar's mask, so the model learns
by itself what is legal; the rollout's ``legal_mass`` shows how well.
"""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from jaxplan.config.schema import ModelConfig, SftConfig
from jaxplan.core.masked import masked_mean
from jaxplan.core.mesh import split_by_lane
from jaxplan.core.roles import Role
from jaxplan.models.heads import lm_logits, map_token_chunks
from jaxplan.models.llama import forward
from jaxplan.models.params import AgentParams
from jaxplan.models.visibility import TokenMeta
from jaxplan.train.decisions import hidden_before, select
from jaxplan.train.optim import Learner, update_learner

_CHUNK = 4096  # tokens whose logits exist at one time


@chex.dataclass(frozen=True)
class Segments:
    """Packed segments, see ``jaxplan.train.packing``."""

    token: Int[Array, "B S"]
    role: Int[Array, "B S"]
    learn: Int[Array, "B S"]
    turn: Int[Array, "B S"]
    episode: Int[Array, "B S"]
    plan: Int[Array, "B S"]
    active_plan: Int[Array, "B S"]


@chex.dataclass(frozen=True)
class _Targets:
    """The tokens with a loss: their negative log-likelihood, role, and correctness."""

    loss: Float[Array, "B M"]
    correct: Bool[Array, "B M"]
    role: Int[Array, "B M"]
    mask: Bool[Array, "B M"]


def imitate(
    params: AgentParams,
    segments: Segments,
    max_targets: int,
    model: ModelConfig,
    history: int,
) -> _Targets:
    """Score every token that has a loss."""
    segments = split_by_lane(segments)
    length = segments.token.shape[1]
    position = jnp.broadcast_to(jnp.arange(length), segments.token.shape)
    meta = TokenMeta(
        position=position,
        episode=segments.episode,
        turn=segments.turn,
        plan=segments.plan,
        active_plan=segments.active_plan,
    )
    hidden = forward(params.llama, segments.token, meta, model, history)
    places, mask = select(segments.learn > 0, max_targets)
    at = hidden_before(hidden, places)
    target = jnp.take_along_axis(segments.token, places, axis=1)

    def score_chunk(at: Array, target: Array):
        logits = lm_logits(params.llama, at)
        log_probs = jax.nn.log_softmax(logits)
        loss = -jnp.take_along_axis(log_probs, target[:, None], axis=-1)[:, 0]
        return loss, jnp.argmax(logits, axis=-1) == target

    loss, correct = map_token_chunks(score_chunk, _CHUNK, at, target)
    return _Targets(
        loss=loss,
        correct=correct,
        role=jnp.take_along_axis(segments.role, places, axis=1),
        mask=mask,
    )


def _metrics(targets: _Targets) -> dict[str, Float[Array, ""]]:
    roles = {"decide": Role.DECIDE, "plan": Role.PLAN, "action": Role.ACTION}
    metrics = {"sft/token_loss": masked_mean(targets.loss, targets.mask)}
    for name, role in roles.items():
        mask = targets.mask & (targets.role == role)
        correct = targets.correct.astype(jnp.float32)
        metrics[f"sft/loss_{name}"] = masked_mean(targets.loss, mask)
        metrics[f"sft/accuracy_{name}"] = masked_mean(correct, mask)
    return metrics


def sft_loss(
    params: AgentParams,
    segments: Segments,
    max_targets: int,
    config: SftConfig,
    model: ModelConfig,
    history: int,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Weighted mean negative log-likelihood of the tokens with a loss."""
    targets = imitate(params, segments, max_targets, model, history)
    is_plan = targets.role == Role.PLAN
    weight = jnp.where(is_plan, config.plan_weight, config.action_weight)
    weight = jnp.where(targets.mask, weight, 0.0)
    loss = jnp.sum(weight * targets.loss) / jnp.maximum(jnp.sum(weight), 1e-8)
    return loss, _metrics(targets)


@partial(
    jax.jit,
    static_argnames=("optimizer", "max_targets", "config", "model", "history"),
    donate_argnames="learner",
)
def sft_update(
    learner: Learner,
    segments: Segments,
    *,
    optimizer: optax.GradientTransformation,
    max_targets: int,
    config: SftConfig,
    model: ModelConfig,
    history: int,
) -> tuple[Learner, dict[str, Float[Array, ""]]]:
    """One optimizer step on a batch of segments.

    Args:
        learner: parameters and optimizer; donated.
        segments: the batch.
        optimizer: of ``make_optimizer``.
        max_targets: tokens with a loss a segment may have.
        config: SFT's settings.
        model: sizes of the model.
        history: turns that stay visible.
    """
    (loss, metrics), grads = jax.value_and_grad(sft_loss, has_aux=True)(
        learner.params, segments, max_targets, config, model, history
    )
    learner, norm = update_learner(learner, grads, optimizer)
    skipped = learner.skipped.astype(jnp.float32)
    return learner, metrics | {
        "sft/loss": loss,
        "sft/grad_norm": norm,
        "sft/skipped_updates": skipped,
    }


@partial(jax.jit, static_argnames=("max_targets", "model", "history"))
def sft_validate(
    params: AgentParams,
    segments: Segments,
    *,
    max_targets: int,
    model: ModelConfig,
    history: int,
) -> dict[str, Float[Array, ""]]:
    """Loss and accuracy by role on segments of episodes that are not trained on."""
    metrics = _metrics(imitate(params, segments, max_targets, model, history))
    return {name.replace("sft/", "sft/held_out_"): m for name, m in metrics.items()}


def batch_indices(num_segments: int, batch: int, update: int, seed: int) -> np.ndarray:
    """Which segments update number ``update`` learns from (host).

    Every epoch is a permutation of its own; what does not fill a batch at its end is
    left out. The order is a function of the update's number, so a run that was stopped
    in the middle of an epoch goes on with the segments it has not seen.
    """
    per_epoch = num_segments // batch
    epoch, place = divmod(update, per_epoch)
    order = np.random.default_rng([seed, epoch]).permutation(num_segments)
    return order[place * batch : (place + 1) * batch]
