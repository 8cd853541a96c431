"""PPO on segments: ``iteration = rollout -> advantages -> update``.

One forward pass of the packed streams gives log-probabilities, entropies and values of
everything that was sampled. ppo.md is the formulation; by default advantages are of
turns, ratios of tokens, and to the log-probabilities that the sampler recorded.
"""

import dataclasses
from functools import partial

import chex
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from jaxplan.config.schema import ModelConfig, PpoConfig
from jaxplan.core.masked import masked_mean, masked_std, or_nan
from jaxplan.core.roles import Span
from jaxplan.models.heads import value
from jaxplan.models.llama import forward
from jaxplan.models.params import AgentParams, LlamaParams, join
from jaxplan.plan.grammar import ACT, Grammar
from jaxplan.rollout.segment import Segment, Turns
from jaxplan.rollout.stream import Tokens, stream_metadata
from jaxplan.train.advantages import Price, net_rewards, normalise
from jaxplan.train.decisions import (
    Decisions,
    RoleMasks,
    Scores,
    gather_decisions,
    hidden_before,
    role_masks,
    score,
)
from jaxplan.train.estimators import (
    BY_TURN,
    ESTIMATORS,
    WITHOUT_CRITIC,
    Play,
    of_turn,
    per_slot,
)
from jaxplan.train.losses import (
    ROLES,
    Sampler,
    clipped_value_loss,
    explained_variance,
    format_loss,
    policy_loss,
    value_loss,
)
from jaxplan.train.optim import Learner, update_learner

_SCALE_DECAY = 0.9  # of the running variance of the value's targets, an iteration
_LEAST_SCALE = 1e-3
_SKIPPED = "ppo/skipped_updates"


@chex.dataclass(frozen=True)
class Batch:
    """What the loss needs of some lanes.

    Attributes:
        tokens: the streams.
        decisions: their sampled tokens.
        masks: how each is trained.
        reference: scores of the SFT policy.
        sampler: what was recorded of them.
        advantages: normalised, one a decision.
        anchors: stream positions before which a value is read: where turns start, and
            every decision where the estimator wants it.
        values: there, before the update.
        targets: of these values.
        valued: anchors that have a target.
        complete: slots that hold a whole turn.
    """

    tokens: Tokens
    decisions: Decisions
    masks: RoleMasks
    reference: Scores
    sampler: Sampler
    advantages: Float[Array, "B M"]
    anchors: Int[Array, "B N"]
    values: Float[Array, "B N"]
    targets: Float[Array, "B N"]
    valued: Bool[Array, "B N"]
    complete: Bool[Array, "B H"]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is fixed while a run learns: static to every compiled program.

    Attributes:
        optimizer: of ``make_optimizer``.
        config: PPO's settings.
        model: sizes of the model.
        history: turns that stay visible.
        temperature: segments are sampled with.
        max_decisions: sampled tokens a lane may have, see ``gather_decisions``.
    """

    optimizer: optax.GradientTransformation
    config: PpoConfig
    model: ModelConfig
    history: int
    temperature: float
    max_decisions: int


@chex.dataclass(frozen=True)
class _View:
    """One forward pass over streams."""

    scores: Scores
    values: Float[Array, "B N"]
    after_plan: Float[Array, "B H"] | None


def _look(
    params: AgentParams,
    tokens: Tokens,
    decisions: Decisions,
    anchors: Int[Array, "B N"],
    grammar: Grammar,
    recipe: Recipe,
    trunk_weight: Float[Array, ""] | float,
    after_plan: Int[Array, "B H"] | None = None,
) -> _View:
    """Scores and values; ``trunk_weight`` as in ``ppo_loss``."""
    meta = stream_metadata(tokens)
    hidden = forward(params.llama, tokens.token, meta, recipe.model, recipe.history)
    judged, weight, critic = hidden, trunk_weight, recipe.config.critic
    if critic is not None and params.critic is not None:
        judged = forward(params.critic, tokens.token, meta, critic, recipe.history)
        weight = 1.0
    at = hidden_before(judged, anchors)
    still = jax.lax.stop_gradient(at)
    after = None
    if after_plan is not None:
        after = value(params.value, hidden_before(judged, after_plan))
    return _View(
        scores=score(params.llama, hidden, decisions, grammar, recipe.temperature),
        values=value(params.value, still + weight * (at - still)),
        after_plan=after,
    )


def _slots(
    decisions: Decisions, turns: Turns
) -> tuple[Int[Array, "B M"], Bool[Array, "B M"]]:
    """The slot of each decision's turn, and whether that turn is complete."""
    slot = decisions.turn - turns.number[:, :1]
    inside = jnp.clip(slot, 0, turns.start.shape[1] - 1)
    return inside, of_turn(turns.end.complete, inside) & decisions.mask


def _plan_ends(
    decisions: Decisions, slot: Int[Array, "B M"], turns: Turns
) -> Int[Array, "B H"]:
    """Where a turn's action begins after its plan; 0 where there was no plan."""
    rows = jnp.arange(slot.shape[0])[:, None]
    begins = decisions.mask & (decisions.state == ACT)
    place = jnp.where(begins, decisions.position, 0)
    return jnp.zeros_like(turns.start).at[rows, slot].max(place)


def _credit(
    play: Play, plan_cost: Price, config: PpoConfig
) -> tuple[Float[Array, "B M"], Float[Array, "B N"], Bool[Array, "B N"]]:
    """Normalised advantages of decisions; unnormalised ones of anchors; who has one."""
    credit = ESTIMATORS[config.estimator](play, jnp.asarray(plan_cost), config)
    complete, slots = play.end.complete, play.starts.shape[1]
    if config.estimator in BY_TURN:
        of_decision = of_turn(credit.turns, play.slot)
        if config.estimator == "turn":
            normal = normalise(credit.turns, complete, config.advantage_clip)
            of_decision = of_turn(normal, play.slot)
        of_decision = jnp.where(play.counted, of_decision, 0.0)
        valued = complete & (config.estimator not in WITHOUT_CRITIC)
        return of_decision, credit.turns, valued
    count = per_slot(play.counted.astype(jnp.float32), play.slot, slots)
    share = 1.0 / jnp.maximum(of_turn(count, play.slot), 1.0)
    normal = normalise(credit.tokens, play.counted, config.advantage_clip, share)
    silent = complete & (count == 0)
    return (
        normal,
        jnp.concatenate([credit.turns, credit.tokens], axis=1),
        jnp.concatenate([silent, play.counted], axis=1),
    )


def _diagnostics(
    play: Play,
    batch: Batch,
    after_plan: Float[Array, "B H"],
    plan_ends: Int[Array, "B H"],
) -> dict[str, Float[Array, ""]]:
    """What a person wants to know before the update; see the README."""
    end, values, targets = play.end, batch.values, batch.targets
    planned, complete = end.planned, end.complete
    if values.shape[1] > planned.shape[1]:
        planned = jnp.concatenate([planned, of_turn(planned, play.slot)], axis=1)
    valued = batch.valued
    gain, has_plan = after_plan - play.values, complete & (plan_ends > 0)
    spread = masked_std(play.rewards, complete)

    def explained(mask: Bool[Array, "B N"]) -> Float[Array, ""]:
        return or_nan(explained_variance(values, targets, mask), mask)

    return {
        "ppo/explained_variance": explained(valued),
        "ppo/explained_variance_plan": explained(valued & planned),
        "ppo/explained_variance_act": explained(valued & ~planned),
        "ppo/planning_advantage": or_nan(masked_mean(gain, has_plan), has_plan),
        "ppo/reward_variance": spread**2,
        "ppo/value_mean": masked_mean(values, valued),
        "ppo/target_mean": masked_mean(targets, valued),
        "ppo/net_reward_per_turn": masked_mean(play.rewards, complete),
    }


def prepare(
    params: AgentParams,
    reference: LlamaParams,
    segment: Segment,
    grammar: Grammar,
    plan_cost: Price,
    recipe: Recipe,
) -> tuple[Batch, dict[str, Float[Array, ""]]]:
    """Values, advantages and reference scores of a fresh segment."""
    config, tokens, turns = recipe.config, segment.stream.tokens, segment.turns
    every = gather_decisions(tokens, recipe.max_decisions)
    slot, counted = _slots(every, turns)
    decisions = dataclasses.replace(every, mask=counted)
    plan_ends = _plan_ends(decisions, slot, turns)
    by_turn = config.estimator in BY_TURN
    anchors = turns.start
    if not by_turn:
        anchors = jnp.concatenate([turns.start, decisions.position], axis=1)
    look = partial(
        _look,
        tokens=tokens,
        decisions=decisions,
        anchors=anchors,
        grammar=grammar,
        recipe=recipe,
        trunk_weight=0.0,
    )
    view = look(params, after_plan=plan_ends)
    end, slots = turns.end, turns.start.shape[1]
    rewards = net_rewards(
        end.reward, end.plan_tokens, end.planned, plan_cost, config.call_cost
    )
    values = view.values[:, :slots]
    play = Play(
        counted=counted,
        position=decisions.position,
        slot=slot,
        log_prob=decisions.log_prob,
        is_action=grammar.entered_by[grammar.next_state[every.state, every.token]]
        == Span.ACTION,
        token_values=of_turn(values, slot) if by_turn else view.values[:, slots:],
        starts=turns.start,
        end=end,
        rewards=rewards,
        values=values,
        span=tokens.span,
    )
    advantages, of_anchors, valued = _credit(play, plan_cost, config)
    batch = Batch(
        tokens=tokens,
        decisions=decisions,
        masks=role_masks(grammar, decisions),
        reference=look(dataclasses.replace(params, llama=reference)).scores,
        sampler=Sampler(
            decide=decisions.decide_log_prob,
            which=decisions.log_prob - decisions.decide_log_prob,
            old=view.scores if config.off_policy == "decoupled" else None,
            slot=slot,
        ),
        advantages=advantages,
        anchors=anchors,
        values=view.values,
        targets=of_anchors + view.values,
        valued=valued,
        complete=end.complete,
    )
    assert view.after_plan is not None
    return batch, _diagnostics(play, batch, view.after_plan, plan_ends)


def ppo_loss(
    params: AgentParams,
    batch: Batch,
    grammar: Grammar,
    policy_weight: Float[Array, ""],
    trunk_weight: Float[Array, ""],
    recipe: Recipe,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The loss of a minibatch (ppo.md, section 5).

    Args:
        params: that learn.
        batch: some lanes.
        grammar: the plan grammar.
        policy_weight: 0 while only values are learnt, else 1.
        trunk_weight: how much of the value loss's gradient reaches a shared trunk; a
            critic of its own always has all of it, and the actor nothing.
        recipe: what is fixed.
    """
    decisions, config = batch.decisions, recipe.config
    view = _look(
        params,
        batch.tokens,
        decisions,
        batch.anchors,
        grammar,
        recipe,
        trunk_weight,
    )
    num_turns = jnp.maximum(jnp.sum(batch.complete, dtype=jnp.float32), 1.0)
    policy, metrics = policy_loss(
        view.scores,
        batch.sampler,
        batch.reference,
        batch.masks,
        batch.advantages,
        num_turns,
        config,
    )
    if config.format_coef:
        mass = view.scores.legal_mass
        policy += config.format_coef * format_loss(mass, decisions.mask, num_turns)
    critic = _critic_loss(view.values, batch, config)
    loss = policy_weight * policy + config.vf_coef * critic
    metrics |= {
        "ppo/policy_loss": policy,
        "ppo/value_loss": critic,
        "rollout/legal_mass": masked_mean(view.scores.legal_mass, decisions.mask),
    }
    return loss, metrics


def _critic_loss(
    values: Float[Array, "B N"], batch: Batch, config: PpoConfig
) -> Float[Array, ""]:
    if config.value_loss == "huber":
        return value_loss(values, batch.targets, batch.valued)
    return clipped_value_loss(
        values, batch.values, batch.targets, batch.valued, config.vf_clip_eps
    )


def _rescale(params: AgentParams, factor: Float[Array, ""]) -> AgentParams:
    """Multiply all values by ``factor``."""
    head = params.value
    head = dataclasses.replace(
        head, out=head.out * factor, out_bias=head.out_bias * factor
    )
    return dataclasses.replace(params, value=head)


def next_value_scale(
    scale: Float[Array, ""], targets: Float[Array, "B N"], valued: Bool[Array, "B N"]
) -> Float[Array, ""]:
    """Running standard deviation of the value's targets.

    Args:
        scale: of the iterations before; 0 if there were none.
        targets: of this one.
        valued: those that count.
    """
    fresh = masked_std(targets, valued)
    fresh = jnp.where(jnp.isfinite(fresh), fresh, jnp.where(scale > 0, scale, 1.0))
    mixed = jnp.sqrt(_SCALE_DECAY * scale**2 + (1 - _SCALE_DECAY) * fresh**2)
    return jnp.maximum(jnp.where(scale > 0, mixed, fresh), _LEAST_SCALE)


def split_lanes(batch: Batch, parts: int) -> Batch:
    """Cut the lanes into minibatches along a new first axis; lane i goes to i % parts.

    Which lanes meet does not matter to the sum of their gradients, and lanes that are
    told the same price are exchangeable and stand in a row, so every part has some of
    each and there is nothing to shuffle.
    """

    def split(array: Array) -> Array:
        apart = array.reshape(array.shape[0] // parts, parts, *array.shape[1:])
        return jnp.swapaxes(apart, 0, 1)

    return jax.tree.map(split, batch)


@partial(jax.jit, static_argnames="recipe", donate_argnames="learner")
def update(
    learner: Learner,
    reference: LlamaParams,
    segment: Segment,
    grammar: Grammar,
    plan_cost: Price,
    policy_weight: Float[Array, ""],
    trunk_weight: Float[Array, ""],
    value_scale: Float[Array, ""],
    *,
    recipe: Recipe,
    frozen: AgentParams | None = None,
) -> tuple[Learner, dict[str, Float[Array, ""]]]:
    """Learn from one segment: ``num_epochs`` passes over ``num_minibatches``.

    Args:
        learner: parameters and optimizer; donated.
        reference: the policy SFT left, for the KL term.
        segment: what the current parameters have just played.
        grammar: the plan grammar.
        plan_cost: reward lost per plan-text token, one for all lanes or [B, 1].
        policy_weight: see ``ppo_loss``.
        trunk_weight: see ``ppo_loss``.
        value_scale: the last ``ppo/value_scale``, 0 before the first; of no effect
            without ``value_scaling``.
        recipe: what is fixed.
        frozen: what of the agent does not learn, see ``split_trained``.

    Returns:
        The learner and the metrics, mean over the minibatches that have any;
        ``ppo/ratio_error`` is that of the first one, before any update, and should be
        0; ``ppo/skipped_updates`` counts those that were not finite.
    """
    config = recipe.config
    batch, metrics = prepare(
        join(learner.params, frozen), reference, segment, grammar, plan_cost, recipe
    )
    if config.value_scaling:
        scale = next_value_scale(value_scale, batch.targets, batch.valued)
        metrics["ppo/value_scale"] = scale
        batch = dataclasses.replace(
            batch, targets=batch.targets / scale, values=batch.values / scale
        )
        learner = dataclasses.replace(
            learner, params=_rescale(learner.params, 1.0 / scale)
        )
    learner, steps = _optimise(
        learner, batch, grammar, policy_weight, trunk_weight, recipe, frozen
    )
    if config.value_scaling:
        learner = dataclasses.replace(learner, params=_rescale(learner.params, scale))
    errors = {name: steps.pop(name)[0, 0] for name in list(steps) if _is_error(name)}
    metrics[_SKIPPED] = jnp.sum(steps.pop(_SKIPPED))
    metrics |= errors | {name: jnp.nanmean(values) for name, values in steps.items()}
    worst = jnp.stack([errors[f"ppo/ratio_error_{role}"] for role in ROLES])
    metrics["ppo/ratio_error"] = jnp.max(worst)
    return learner, metrics


def _is_error(name: str) -> bool:
    return name.startswith("ppo/ratio_error")


def _optimise(
    learner: Learner,
    batch: Batch,
    grammar: Grammar,
    policy_weight: Float[Array, ""],
    trunk_weight: Float[Array, ""],
    recipe: Recipe,
    frozen: AgentParams | None,
) -> tuple[Learner, dict[str, Float[Array, "epochs minibatches"]]]:
    """All optimizer steps on a batch."""
    minibatches = split_lanes(batch, recipe.config.num_minibatches)

    def loss_of(trained: AgentParams, *arguments):
        return ppo_loss(join(trained, frozen), *arguments)

    gradient = jax.grad(loss_of, has_aux=True)
    moves = None
    if recipe.config.optimizer.weight_decay:  # which needs no gradient
        moves = jnp.sign(policy_weight + trunk_weight)

    def step(learner: Learner, minibatch: Batch):
        grads, metrics = gradient(
            learner.params, minibatch, grammar, policy_weight, trunk_weight, recipe
        )
        learner, norm = update_learner(learner, grads, recipe.optimizer, moves)
        skipped = (learner.skipped > 0).astype(jnp.float32)
        return learner, metrics | {"ppo/grad_norm": norm, _SKIPPED: skipped}

    def epoch(learner: Learner, _: None):
        return jax.lax.scan(step, learner, minibatches)

    return jax.lax.scan(epoch, learner, None, length=recipe.config.num_epochs)
