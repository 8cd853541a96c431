"""PPO on segments: ``iteration = rollout -> advantages -> update``.

One forward pass of the packed streams gives log-probabilities, entropies and values of
everything that was sampled; docs of the formulation: ppo.md, in its default mode (turn
advantages, token ratios, behaviour log-probabilities as the sampler recorded them).
"""

import dataclasses
from functools import partial

import chex
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from jaxplan.config.schema import ModelConfig, PpoConfig
from jaxplan.core.masked import masked_mean
from jaxplan.models.heads import value
from jaxplan.models.llama import forward
from jaxplan.models.params import AgentParams, LlamaParams, join
from jaxplan.plan.grammar import Grammar
from jaxplan.rollout.segment import Segment, Turns
from jaxplan.rollout.stream import Tokens, stream_metadata
from jaxplan.train.advantages import net_rewards, normalise, turn_gae
from jaxplan.train.decisions import (
    Decisions,
    RoleMasks,
    Scores,
    gather_decisions,
    hidden_before,
    role_masks,
    score,
)
from jaxplan.train.losses import explained_variance, policy_loss, value_loss
from jaxplan.train.optim import Learner, update_learner


@chex.dataclass(frozen=True)
class Batch:
    """What the loss needs of some lanes.

    Attributes:
        tokens: the streams.
        decisions: their sampled tokens.
        masks: how each is trained.
        reference: scores of the SFT policy.
        advantages: normalised, of the turn each decision belongs to.
        starts: stream position of each turn's first generated token.
        targets: of the values there.
        complete: slots that hold a whole turn.
    """

    tokens: Tokens
    decisions: Decisions
    masks: RoleMasks
    reference: Scores
    advantages: Float[Array, "B M"]
    starts: Int[Array, "B H"]
    targets: Float[Array, "B H"]
    complete: Bool[Array, "B H"]


@chex.dataclass(frozen=True)
class _View:
    """One forward pass over streams."""

    scores: Scores
    values: Float[Array, "B H"]


def _look(
    params: AgentParams,
    tokens: Tokens,
    decisions: Decisions,
    starts: Int[Array, "B H"],
    grammar: Grammar,
    model: ModelConfig,
    history: int,
    temperature: float,
    trunk_weight: Float[Array, ""] | float,
    critic: ModelConfig | None,
) -> _View:
    """Scores and values; ``trunk_weight`` as in ``ppo_loss``."""
    meta = stream_metadata(tokens)
    hidden = forward(params.llama, tokens.token, meta, model, history)
    judged, weight = hidden, trunk_weight
    if critic is not None and params.critic is not None:
        judged = forward(params.critic, tokens.token, meta, critic, history)
        weight = 1.0
    at = hidden_before(judged, starts)
    still = jax.lax.stop_gradient(at)
    return _View(
        scores=score(params.llama, hidden, decisions, grammar, temperature),
        values=value(params.value, still + weight * (at - still)),
    )


def _of_turn(
    values: Float[Array, "B H"], decisions: Decisions, turns: Turns
) -> tuple[Float[Array, "B M"], Bool[Array, "B M"]]:
    """A number of each decision's turn, and whether that turn is complete."""
    slot = decisions.turn - turns.number[:, :1]
    inside = jnp.clip(slot, 0, values.shape[1] - 1)
    complete = jnp.take_along_axis(turns.end.complete, inside, axis=1)
    number = jnp.take_along_axis(values, inside, axis=1)
    return number, complete & decisions.mask


def prepare(
    params: AgentParams,
    reference: LlamaParams,
    segment: Segment,
    grammar: Grammar,
    plan_cost: Float[Array, ""] | float,
    config: PpoConfig,
    model: ModelConfig,
    history: int,
    temperature: float,
    max_decisions: int,
) -> tuple[Batch, dict[str, Float[Array, ""]]]:
    """Values, advantages and reference scores of a fresh segment."""
    tokens, turns = segment.stream.tokens, segment.turns
    decisions = gather_decisions(tokens, max_decisions)
    look = partial(
        _look,
        tokens=tokens,
        decisions=decisions,
        starts=turns.start,
        grammar=grammar,
        model=model,
        history=history,
        temperature=temperature,
        trunk_weight=0.0,
        critic=config.critic,
    )
    values = look(params).values
    scores = look(dataclasses.replace(params, llama=reference)).scores
    end, complete = turns.end, turns.end.complete
    rewards = net_rewards(
        end.reward, end.plan_tokens, end.planned, plan_cost, config.call_cost
    )
    advantages = turn_gae(rewards, end.discount, values, complete, config.gae_lambda)
    normal = normalise(advantages, complete, config.advantage_clip)
    of_decision, counted = _of_turn(normal, decisions, turns)
    targets = advantages + values
    decisions = dataclasses.replace(decisions, mask=counted)
    batch = Batch(
        tokens=tokens,
        decisions=decisions,
        masks=role_masks(grammar, decisions),
        reference=scores,
        advantages=jnp.where(counted, of_decision, 0.0),
        starts=turns.start,
        targets=targets,
        complete=complete,
    )
    metrics = {
        "ppo/explained_variance": explained_variance(values, targets, complete),
        "ppo/value_mean": masked_mean(values, complete),
        "ppo/target_mean": masked_mean(targets, complete),
        "ppo/net_reward_per_turn": masked_mean(rewards, complete),
    }
    return batch, metrics


def ppo_loss(
    params: AgentParams,
    batch: Batch,
    grammar: Grammar,
    policy_weight: Float[Array, ""],
    trunk_weight: Float[Array, ""],
    config: PpoConfig,
    model: ModelConfig,
    history: int,
    temperature: float,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The loss of a minibatch (ppo.md, section 5).

    Args:
        params: that learn.
        batch: some lanes.
        grammar: the plan grammar.
        policy_weight: 0 while only values are learnt, else 1.
        trunk_weight: how much of the value loss's gradient reaches a shared trunk; a
            critic of its own always has all of it, and the actor nothing.
        config: coefficients.
        model: sizes of the model.
        history: turns that stay visible.
        temperature: of the behaviour policy.
    """
    decisions = batch.decisions
    view = _look(
        params,
        batch.tokens,
        decisions,
        batch.starts,
        grammar,
        model,
        history,
        temperature,
        trunk_weight,
        config.critic,
    )
    num_turns = jnp.maximum(jnp.sum(batch.complete, dtype=jnp.float32), 1.0)
    behavior = (
        decisions.decide_log_prob,
        decisions.log_prob - decisions.decide_log_prob,
    )
    policy, metrics = policy_loss(
        view.scores,
        behavior,
        batch.reference,
        batch.masks,
        batch.advantages,
        num_turns,
        config,
    )
    critic = value_loss(view.values, batch.targets, batch.complete)
    loss = policy_weight * policy + config.vf_coef * critic
    metrics |= {
        "ppo/policy_loss": policy,
        "ppo/value_loss": critic,
        "rollout/legal_mass": masked_mean(view.scores.legal_mass, decisions.mask),
    }
    return loss, metrics


def split_lanes(batch: Batch, parts: int) -> Batch:
    """Cut the lanes into minibatches along a new first axis; lane i goes to i % parts.

    Which lanes meet does not matter to the sum of their gradients, and lanes are
    exchangeable, so there is nothing to shuffle.
    """

    def split(array: Array) -> Array:
        apart = array.reshape(array.shape[0] // parts, parts, *array.shape[1:])
        return jnp.swapaxes(apart, 0, 1)

    return jax.tree.map(split, batch)


@partial(
    jax.jit,
    static_argnames=(
        "optimizer",
        "config",
        "model",
        "history",
        "temperature",
        "max_decisions",
    ),
    donate_argnames="learner",
)
def update(
    learner: Learner,
    reference: LlamaParams,
    segment: Segment,
    grammar: Grammar,
    plan_cost: Float[Array, ""],
    policy_weight: Float[Array, ""],
    trunk_weight: Float[Array, ""],
    *,
    optimizer: optax.GradientTransformation,
    config: PpoConfig,
    model: ModelConfig,
    history: int,
    temperature: float,
    max_decisions: int,
    frozen: AgentParams | None = None,
) -> tuple[Learner, dict[str, Float[Array, ""]]]:
    """Learn from one segment: ``num_epochs`` passes over ``num_minibatches``.

    Args:
        learner: parameters and optimizer; donated.
        reference: the policy SFT left, for the KL term.
        segment: what the current parameters have just played.
        grammar: the plan grammar.
        plan_cost: reward lost per plan-text token.
        policy_weight: see ``ppo_loss``.
        trunk_weight: see ``ppo_loss``.
        optimizer: of ``make_optimizer``.
        config: PPO's settings.
        model: sizes of the model.
        history: turns that stay visible.
        temperature: the segment was sampled with.
        max_decisions: sampled tokens a lane may have, see ``gather_decisions``.
        frozen: what of the agent does not learn, see ``split_trained``.

    Returns:
        The learner and the metrics, mean over minibatches; ``ppo/ratio_error`` is that
        of the first minibatch, before any update, and should be 0.
    """
    batch, metrics = prepare(
        join(learner.params, frozen),
        reference,
        segment,
        grammar,
        plan_cost,
        config,
        model,
        history,
        temperature,
        max_decisions,
    )
    minibatches = split_lanes(batch, config.num_minibatches)

    def loss_of(trained: AgentParams, *arguments):
        return ppo_loss(join(trained, frozen), *arguments)

    gradient = jax.grad(loss_of, has_aux=True)

    def step(learner: Learner, minibatch: Batch):
        grads, step_metrics = gradient(
            learner.params,
            minibatch,
            grammar,
            policy_weight,
            trunk_weight,
            config,
            model,
            history,
            temperature,
        )
        learner, norm = update_learner(learner, grads, optimizer)
        return learner, step_metrics | {"ppo/grad_norm": norm}

    def epoch(learner: Learner, _: None):
        return jax.lax.scan(step, learner, minibatches)

    learner, steps = jax.lax.scan(epoch, learner, None, length=config.num_epochs)
    first = {
        name: steps.pop(name)[0, 0] for name in list(steps) if "ratio_error" in name
    }
    metrics |= {name: jnp.mean(values) for name, values in steps.items()}
    metrics["ppo/ratio_error"] = jnp.max(jnp.stack(list(first.values())))
    metrics["ppo/skipped_updates"] = learner.skipped.astype(jnp.float32)
    return learner, metrics
