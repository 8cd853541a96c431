"""PPO's losses over roles and turns; ppo.md, section 5, is the specification."""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxplan.config.schema import PpoConfig, RoleCoefficients
from jaxplan.core.masked import masked_mean
from jaxplan.train.decisions import RoleMasks, Scores


@chex.dataclass(frozen=True)
class Factors:
    """Both factors of every decision, one beside the other.

    Attributes:
        log_prob: under the policy that learns.
        behavior: under the policy that sampled.
        reference: under the policy that SFT left.
        entropy: normalised, of the policy that learns.
    """

    log_prob: Float[Array, "B M"]
    behavior: Float[Array, "B M"]
    reference: Float[Array, "B M"]
    entropy: Float[Array, "B M"]


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


def policy_loss(
    scores: Scores,
    behavior: tuple[Float[Array, "B M"], Float[Array, "B M"]],
    reference: Scores,
    masks: RoleMasks,
    advantages: Float[Array, "B M"],
    num_turns: Float[Array, ""],
    config: PpoConfig,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Sum over the factors of a turn, mean over turns: the macro-action's gradient.

    Args:
        scores: of the policy that learns.
        behavior: log-probabilities (plan or act, which token) of the sampler.
        reference: scores of the SFT policy.
        masks: the role each factor is trained in.
        advantages: normalised, one a decision (that of its turn).
        num_turns: turns in the batch.
        config: coefficients.

    Returns:
        The loss, and metrics by role.
    """
    decide = Factors(
        log_prob=scores.decide,
        behavior=behavior[0],
        reference=reference.decide,
        entropy=scores.decide_entropy,
    )
    which = Factors(
        log_prob=scores.which,
        behavior=behavior[1],
        reference=reference.which,
        entropy=scores.which_entropy,
    )
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

    log_ratio = jnp.where(mask, factors.log_prob - factors.behavior, 0.0)
    objective = clipped_surrogate(
        log_ratio, advantages, config.clip_eps, config.clip_eps_high, config.dual_clip
    )
    kl = reference_kl(factors.log_prob, factors.reference)

    def per_turn(values: Float[Array, "B M"]) -> Float[Array, ""]:
        return jnp.sum(jnp.where(mask, values, 0.0)) / num_turns

    loss = (
        -coefficient(config.role_coef) * per_turn(objective)
        + coefficient(config.kl_coef) * per_turn(kl)
        - coefficient(config.ent_coef) * per_turn(factors.entropy)
    )
    ratio = jnp.exp(log_ratio)
    outside = (ratio < 1 - config.clip_eps) | (ratio > 1 + config.clip_eps_high)
    metrics = {
        f"ppo/approx_kl_{role}": masked_mean(ratio - 1.0 - log_ratio, mask),
        f"ppo/reference_kl_{role}": masked_mean(kl, mask),
        f"ppo/clip_fraction_{role}": masked_mean(outside.astype(jnp.float32), mask),
        f"ppo/{role}_entropy": masked_mean(factors.entropy, mask),
        f"ppo/ratio_error_{role}": jnp.max(jnp.abs(log_ratio), initial=0.0),
    }
    return loss, metrics


def value_loss(
    values: Float[Array, "B H"],
    targets: Float[Array, "B H"],
    mask: Bool[Array, "B H"],
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


def explained_variance(
    values: Float[Array, "B H"],
    targets: Float[Array, "B H"],
    mask: Bool[Array, "B H"],
) -> Float[Array, ""]:
    """Share of the targets' variance that the values account for; at most 1."""

    def variance(x: Float[Array, "B H"]) -> Float[Array, ""]:
        return masked_mean((x - masked_mean(x, mask)) ** 2, mask)

    return 1.0 - variance(targets - values) / jnp.maximum(variance(targets), 1e-8)
