"""Imitation: cross-entropy on plan and action tokens of packed segments.

The loss is that of the full vocabulary, without the grammar's mask, so the model learns
by itself what is legal; the rollout's ``legal_mass`` shows how well. Two terms are
optional, as in arXiv:2509.03581: a divergence from the starting weights, and the tokens
of observations as further targets.
"""

import math
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from jaxplan.config.schema import ModelConfig, SftConfig
from jaxplan.core.masked import masked_mean, masked_sum
from jaxplan.core.mesh import split_by_lane
from jaxplan.core.roles import Role
from jaxplan.models.heads import chunk_tokens, lm_logits, map_token_chunks
from jaxplan.models.llama import forward
from jaxplan.models.params import AgentParams, LlamaParams, join
from jaxplan.models.visibility import TokenMeta
from jaxplan.train.decisions import hidden_before, select
from jaxplan.train.optim import Learner, update_learner

_ROLES = {
    "decide": Role.DECIDE,
    "plan": Role.PLAN,
    "action": Role.ACTION,
    "observation": Role.OBSERVATION,
}


@chex.dataclass(frozen=True)
class Segments:
    """Packed segments, see ``jaxplan.train.packing``; ``target`` is what to imitate."""

    token: Int[Array, "B S"]
    role: Int[Array, "B S"]
    learn: Int[Array, "B S"]
    turn: Int[Array, "B S"]
    episode: Int[Array, "B S"]
    plan: Int[Array, "B S"]
    active_plan: Int[Array, "B S"]
    target: Int[Array, "B S"]


@chex.dataclass(frozen=True)
class _Targets:
    """The tokens with a loss: their negative log-likelihood, and what else is known.

    ``kl`` is KL(agent | reference) over the whole vocabulary, 0 without a reference.
    """

    loss: Float[Array, "B M"]
    correct: Bool[Array, "B M"]
    kl: Float[Array, "B M"]
    role: Int[Array, "B M"]
    mask: Bool[Array, "B M"]


def imitate(
    params: AgentParams,
    reference: LlamaParams | None,
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
    places, mask = select(segments.learn > 0, max_targets)
    target = jnp.take_along_axis(segments.target, places, axis=1)
    llamas = [params.llama] if reference is None else [params.llama, reference]
    at = [
        hidden_before(forward(llama, segments.token, meta, model, history), places)
        for llama in llamas
    ]

    def score_chunk(at: list[Array], target: Array):
        own, *start = (
            jax.nn.log_softmax(lm_logits(llama, hidden))
            for llama, hidden in zip(llamas, at, strict=True)
        )
        loss = -jnp.take_along_axis(own, target[:, None], axis=-1)[:, 0]
        gaps = [jnp.exp(own) * (own - other) for other in start]
        kl = jnp.sum(gaps[0], axis=-1) if gaps else jnp.zeros_like(loss)
        return loss, jnp.argmax(own, axis=-1) == target, kl

    chunk = chunk_tokens(params.llama)
    loss, correct, kl = map_token_chunks(score_chunk, chunk, at, target)
    return _Targets(
        loss=loss,
        correct=correct,
        kl=kl,
        role=jnp.take_along_axis(segments.role, places, axis=1),
        mask=mask,
    )


def _metrics(targets: _Targets) -> dict[str, Float[Array, ""]]:
    metrics = {
        "sft/token_loss": masked_mean(targets.loss, targets.mask),
        "sft/start_kl": masked_mean(targets.kl, targets.mask),
    }
    for name, role in _ROLES.items():
        mask = targets.mask & (targets.role == role)
        correct = targets.correct.astype(jnp.float32)
        metrics[f"sft/loss_{name}"] = masked_mean(targets.loss, mask)
        metrics[f"sft/accuracy_{name}"] = masked_mean(correct, mask)
    return metrics


def sft_loss(
    params: AgentParams,
    reference: LlamaParams | None,
    segments: Segments,
    max_targets: int,
    config: SftConfig,
    model: ModelConfig,
    history: int,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Weighted mean negative log-likelihood of the tokens with a loss.

    With a reference, ``kl_coef`` times the mean divergence from it is added.
    """
    targets = imitate(params, reference, segments, max_targets, model, history)
    weight = jnp.select(
        [targets.role == Role.PLAN, targets.role == Role.OBSERVATION],
        [config.plan_weight, config.observation_weight],
        config.action_weight,
    )
    weight = jnp.where(targets.mask, weight, 0.0)
    loss = jnp.sum(weight * targets.loss) / jnp.maximum(jnp.sum(weight), 1e-8)
    metrics = _metrics(targets)
    return loss + config.kl_coef * metrics["sft/start_kl"], metrics


@partial(
    jax.jit,
    static_argnames=("optimizer", "max_targets", "config", "model", "history"),
    donate_argnames="learner",
)
def sft_update(
    learner: Learner,
    reference: LlamaParams | None,
    segments: Segments,
    *,
    optimizer: optax.GradientTransformation,
    max_targets: int,
    config: SftConfig,
    model: ModelConfig,
    history: int,
    frozen: AgentParams | None = None,
) -> tuple[Learner, dict[str, Float[Array, ""]]]:
    """One optimizer step on a batch of segments.

    Args:
        learner: parameters and optimizer; donated.
        reference: the starting weights, or None to learn without regard to them.
        segments: the batch.
        optimizer: of ``make_optimizer``.
        max_targets: tokens with a loss a segment may have.
        config: SFT's settings.
        model: sizes of the model.
        history: turns that stay visible.
        frozen: what of the agent does not learn, see ``split_trained``.
    """

    def loss_of(trained: AgentParams):
        params = join(trained, frozen)
        return sft_loss(
            params, reference, segments, max_targets, config, model, history
        )

    (loss, metrics), grads = jax.value_and_grad(loss_of, has_aux=True)(learner.params)
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
    reference: LlamaParams | None,
    segments: Segments,
    counted: Bool[Array, " B"],
    *,
    max_targets: int,
    model: ModelConfig,
    history: int,
) -> dict[str, dict[str, Float[Array, ""]]]:
    """Sums over the tokens of episodes that are not trained on.

    Args:
        params: of the agent.
        reference: the starting weights, or None.
        segments: the batch.
        counted: which of its segments count.
        max_targets: tokens with a loss a segment may have.
        model: sizes of the model.
        history: turns that stay visible.

    Returns:
        By role: ``tokens``, and the sums of ``loss``, ``correct`` and ``kl`` over them.
    """
    targets = imitate(params, reference, segments, max_targets, model, history)
    mask = targets.mask & counted[:, None]
    sums = {}
    for name, role in _ROLES.items():
        own = mask & (targets.role == role)
        sums[name] = {
            "tokens": jnp.sum(own, dtype=jnp.float32),
            "loss": masked_sum(targets.loss, own),
            "correct": masked_sum(targets.correct.astype(jnp.float32), own),
            "kl": masked_sum(targets.kl, own),
        }
    return sums


def validation_metrics(
    sums: dict[str, dict[str, float]], measured_kl: bool
) -> dict[str, float]:
    """Turn the sums of ``sft_validate`` into means by role, and perplexities (host).

    Args:
        sums: added up over batches.
        measured_kl: whether there was a reference.
    """
    total = {
        kind: sum(role[kind] for role in sums.values())
        for kind in ("tokens", "loss", "kl")
    }
    tokens = max(total["tokens"], 1.0)
    metrics = {"token_loss": total["loss"] / tokens}
    if measured_kl:
        metrics["start_kl"] = total["kl"] / tokens
    for name, own in sums.items():
        if own["tokens"]:
            loss = own["loss"] / own["tokens"]
            metrics[f"loss_{name}"] = loss
            metrics[f"perplexity_{name}"] = math.exp(loss)
            metrics[f"accuracy_{name}"] = own["correct"] / own["tokens"]
    return {f"sft/held_out_{name}": value for name, value in metrics.items()}


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
