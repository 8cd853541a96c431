"""PPO's losses over roles and turns; ppo.md, section 5, is the specification."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxplan.config.schema import PpoConfig, RoleCoefficients
from jaxplan.core.masked import masked_mean, or_nan
from jaxplan.rollout.sample import explored
from jaxplan.train.decisions import RoleMasks, Scores

ROLES = ("decide", "plan", "action")

_LEAST = -80.0  # log-probability below which a choice is as good as impossible
_MOST = 2.0  # weight of a token that the sampler found less probable


@chex.dataclass(frozen=True)
class Factors:
    """One factor of every decision, as the loss wants it.

    Attributes:
        log_ratio: of the policy that learns to the one it is held near.
        error: of the policy that learns to the one that sampled.
        kl: to the policy that SFT left.
        entropy: normalised, of the policy that learns.
        weight: of the objective, for what the ratio leaves out.
    """

    log_ratio: Float[Array, "B M"]
    error: Float[Array, "B M"]
    kl: Float[Array, "B M"]
    entropy: Float[Array, "B M"]
    weight: Float[Array, "B M"] | float


@chex.dataclass(frozen=True)
class Sampler:
    """Both factors of what the sampler and the policy before the update said.

    Attributes:
        decide: log-probability of planning, or of acting, as sampled.
        which: of the token among its like, as sampled.
        old: scores of the policy before the update; None in ``bypass``, where the
            sampler itself is what the ratio is to.
        slot: of the turn each decision belongs to.
    """

    decide: Float[Array, "B M"]
    which: Float[Array, "B M"]
    old: Scores | None
    slot: Int[Array, "B M"]


def clipped_surrogate(
    log_ratio: Float[Array, "B M"],
    advantages: Float[Array, "B M"],
    clip_low: float,
    clip_high: float,
    dual_clip: float,
) -> Float[Array, "B M"]:
    """PPO's clipped objective with a floor for bad actions (arXiv:1912.09729, eq. 5).

    Args:
        log_ratio: log pi - log mu.
        advantages: of the decision's turn.
        clip_low: the ratio counts down to 1 - clip_low.
        clip_high: and up to 1 + clip_high.
        dual_clip: c > 1; where A < 0 the objective is at least c A.
    """
    ratio = jnp.exp(jnp.clip(log_ratio, -20.0, 20.0))
    clipped = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    objective = jnp.minimum(ratio * advantages, clipped * advantages)
    floored = jnp.maximum(objective, dual_clip * advantages)
    return jnp.where(advantages < 0, floored, objective)


def reference_kl(
    log_prob: Float[Array, "B M"], reference: Float[Array, "B M"]
) -> Float[Array, "B M"]:
    """KL(pi | reference) from samples: k3's value with k2's gradient.

    The plain gradients of the k1 and k3 estimators are wrong in expectation.
    """
    difference = jnp.clip(reference - log_prob, -20.0, 20.0)
    k2 = 0.5 * difference**2
    k3 = jnp.exp(difference) - 1.0 - difference
    return k2 + jax.lax.stop_gradient(k3 - k2)


def bernoulli_kl(scores: Scores, reference: Scores) -> Float[Array, "B M"]:
    """KL(pi | reference) of the choice between a plan and an action, in closed form."""

    def term(ours: Float[Array, "B M"], theirs: Float[Array, "B M"]):
        ours, theirs = jnp.maximum(ours, _LEAST), jnp.maximum(theirs, _LEAST)
        return jnp.exp(ours) * (ours - theirs)

    chosen = term(scores.decide, reference.decide)
    return chosen + term(scores.decide_other, reference.decide_other)


def _factors(
    now: tuple[Float[Array, "B M"], Float[Array, "B M"]],
    sampled: Float[Array, "B M"],
    old: Float[Array, "B M"] | None,
    kl: Float[Array, "B M"],
    entropy: Float[Array, "B M"],
) -> Factors:
    """One factor; ``now`` is the policy that learns, and as it would sample."""
    log_prob, as_sampler = now
    weight: Float[Array, "B M"] | float = 1.0
    if old is not None:
        weight = jnp.minimum(jnp.exp(jnp.clip(old - sampled, -20.0, 20.0)), _MOST)
    return Factors(
        log_ratio=log_prob - (sampled if old is None else old),
        error=as_sampler - sampled,
        kl=kl,
        entropy=entropy,
        weight=weight,
    )


def turn_level(
    decide: Float[Array, "B M"],
    which: Float[Array, "B M"],
    masks: RoleMasks,
    slot: Int[Array, "B M"],
) -> tuple[Float[Array, "B M"], Float[Array, "B M"]]:
    """Give both factors of all tokens of a turn the geometric mean of their ratios.

    The mean is over tokens (arXiv:2507.18071, eq. 14): its value is that of the turn,
    its gradient that of each factor.
    """
    whole = jnp.where(masks.decide, decide, 0.0)
    whole = whole + jnp.where(masks.plan | masks.action, which, 0.0)
    token = masks.decide | masks.plan | masks.action
    rows = jnp.arange(slot.shape[0])[:, None]
    # A lane has at most one turn more than rounds, and a decision a round or more.
    empty = jnp.zeros((slot.shape[0], slot.shape[1] + 2))
    total = empty.at[rows, slot].add(jnp.where(token, whole, 0.0))
    count = empty.at[rows, slot].add(token.astype(jnp.float32))
    mean = jnp.take_along_axis(total / jnp.maximum(count, 1.0), slot, axis=1)
    stop = jax.lax.stop_gradient

    def own(factor: Float[Array, "B M"]) -> Float[Array, "B M"]:
        return stop(mean) + factor - stop(factor)

    return own(decide), own(which)


def policy_loss(
    scores: Scores,
    sampler: Sampler,
    reference: Scores,
    masks: RoleMasks,
    advantages: Float[Array, "B M"],
    num_turns: Float[Array, ""],
    config: PpoConfig,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Sum over the factors of a turn, mean over turns: the macro-action's gradient.

    Args:
        scores: of the policy that learns.
        sampler: what it said.
        reference: scores of the SFT policy.
        masks: the role each factor is trained in.
        advantages: normalised, one a decision (that of its turn).
        num_turns: turns in the batch.
        config: coefficients.

    Returns:
        The loss, and metrics by role; a mean is NaN where the role has no token.
    """
    old = sampler.old
    decide = _factors(
        (scores.decide, explored(scores.decide, config.decide_explore)),
        sampler.decide,
        None if old is None else old.decide,
        bernoulli_kl(scores, reference),
        scores.decide_entropy,
    )
    which = _factors(
        (scores.which, scores.which),
        sampler.which,
        None if old is None else old.which,
        reference_kl(scores.which, reference.which),
        scores.which_entropy,
    )
    if config.ratio_level == "turn":
        of_decide, of_which = turn_level(
            decide.log_ratio, which.log_ratio, masks, sampler.slot
        )
        decide = dataclasses.replace(decide, log_ratio=of_decide)
        which = dataclasses.replace(which, log_ratio=of_which)
    roles = {
        "decide": (decide, masks.decide),
        "plan": (which, masks.plan),
        "action": (which, masks.action),
    }
    total, metrics = jnp.float32(0.0), {}
    for role, (factors, mask) in roles.items():
        loss, role_metrics = _role_loss(
            role, factors, mask, advantages, num_turns, config
        )
        total = total + loss
        metrics |= role_metrics
    return total, metrics


def _role_loss(
    role: str,
    factors: Factors,
    mask: Bool[Array, "B M"],
    advantages: Float[Array, "B M"],
    num_turns: Float[Array, ""],
    config: PpoConfig,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    def coefficient(section: RoleCoefficients) -> float:
        return getattr(section, role)

    log_ratio = jnp.where(mask, factors.log_ratio, 0.0)
    objective = clipped_surrogate(
        log_ratio, advantages, config.clip_eps, config.clip_eps_high, config.dual_clip
    )

    def per_turn(values: Float[Array, "B M"]) -> Float[Array, ""]:
        return jnp.sum(jnp.where(mask, values, 0.0)) / num_turns

    loss = (
        -coefficient(config.role_coef) * per_turn(factors.weight * objective)
        + coefficient(config.kl_coef) * per_turn(factors.kl)
        - coefficient(config.ent_coef) * per_turn(factors.entropy)
    )
    ratio = jnp.exp(log_ratio)
    outside = (ratio < 1 - config.clip_eps) | (ratio > 1 + config.clip_eps_high)
    metrics = {
        f"ppo/approx_kl_{role}": ratio - 1.0 - log_ratio,
        f"ppo/reference_kl_{role}": factors.kl,
        f"ppo/clip_fraction_{role}": outside.astype(jnp.float32),
        f"ppo/{role}_entropy": factors.entropy,
    }
    means = {
        name: or_nan(masked_mean(values, mask), mask)
        for name, values in metrics.items()
    }
    return loss, means | _ratio_errors(role, factors.error, mask)


def _ratio_errors(
    role: str, error: Float[Array, "B M"], mask: Bool[Array, "B M"]
) -> dict[str, Float[Array, ""]]:
    """How far the policy is from what the sampler recorded of it."""
    error = jnp.where(mask, error, 0.0)
    ratio = jnp.exp(jnp.clip(error, -20.0, 20.0))
    outside = (ratio < 0.9) | (ratio > 1.1)
    return {
        f"ppo/ratio_error_{role}": jnp.max(jnp.abs(error), initial=0.0),
        f"ppo/ratio_error_mean_{role}": masked_mean(jnp.abs(error), mask),
        f"ppo/ratio_error_k3_{role}": masked_mean(ratio - 1.0 - error, mask),
        f"ppo/ratio_error_outside_{role}": masked_mean(
            outside.astype(jnp.float32), mask
        ),
    }


def format_loss(
    legal_mass: Float[Array, "B M"],
    mask: Bool[Array, "B M"],
    num_turns: Float[Array, ""],
) -> Float[Array, ""]:
    """Pressure towards legal tokens, which a masked policy does not feel."""
    return -jnp.sum(jnp.where(mask, legal_mass, 0.0)) / num_turns


def value_loss(
    values: Float[Array, "B N"],
    targets: Float[Array, "B N"],
    mask: Bool[Array, "B N"],
) -> Float[Array, ""]:
    """Huber loss of values, mean over turns; its gradient is bounded by 1.

    Args:
        values: predicted, at the first decision of each turn.
        targets: unnormalised advantage plus the value it was computed from.
        mask: complete turns.
    """
    error = jnp.abs(values - targets)
    huber = jnp.where(error < 1.0, 0.5 * error**2, error - 0.5)
    return masked_mean(huber, mask)


def clipped_value_loss(
    values: Float[Array, "B N"],
    old: Float[Array, "B N"],
    targets: Float[Array, "B N"],
    mask: Bool[Array, "B N"],
    clip: float,
) -> Float[Array, ""]:
    """Squared loss, the worse of the value and of one held near the ``old`` one."""
    near = old + jnp.clip(values - old, -clip, clip)
    error = jnp.maximum((values - targets) ** 2, (near - targets) ** 2)
    return masked_mean(0.5 * error, mask)


def explained_variance(
    values: Float[Array, "B N"],
    targets: Float[Array, "B N"],
    mask: Bool[Array, "B N"],
) -> Float[Array, ""]:
    """Share of the targets' variance that the values account for; at most 1."""

    def variance(x: Float[Array, "B N"]) -> Float[Array, ""]:
        return masked_mean((x - masked_mean(x, mask)) ** 2, mask)

    return 1.0 - variance(targets - values) / jnp.maximum(variance(targets), 1e-8)
