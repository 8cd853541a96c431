"""Advantages: of turns, with one value a turn, and of the nodes of a packed stream.

Discounts are per env step and a plan is priced; ``estimators`` says which of the two a
run learns from.
"""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Price = Float[Array, ""] | Float[Array, "B 1"] | float  # of a plan-text token


def net_rewards(
    rewards: Float[Array, "B H"],
    plan_tokens: Int[Array, "B H"],
    planned: Bool[Array, "B H"],
    plan_cost: Price,
    call_cost: Float[Array, ""] | float,
) -> Float[Array, "B H"]:
    """Task reward less what the turn's plan cost (ppo.md, section 2).

    Args:
        rewards: task reward of a turn.
        plan_tokens: plan-text tokens of the turn.
        planned: whether it wrote a plan.
        plan_cost: reward lost per plan-text token, one for all lanes or [B, 1].
        call_cost: reward lost per plan.
    """
    tokens = plan_tokens.astype(jnp.float32)
    calls = planned.astype(jnp.float32)
    return rewards - plan_cost * tokens - call_cost * calls


def turn_gae(
    rewards: Float[Array, "B H"],
    discounts: Float[Array, "B H"],
    values: Float[Array, "B H"],
    complete: Bool[Array, "B H"],
    gae_lambda: Float[Array, ""] | float,
) -> Float[Array, "B H"]:
    """Generalised advantage estimates over turns (arXiv:1506.02438, eq. 16).

    ``A_h = r_h + d_h V_{h+1} - V_h + d_h lambda A_{h+1}`` (ppo.md, section 3). A slot
    that is not complete has no advantage and cuts the recursion; its value is what the
    turn before it bootstraps on.

    Args:
        rewards: net reward of the turn.
        discounts: gamma to the power of the turn's env steps, 0 where it terminated.
        values: of the state each turn starts from.
        complete: slots that hold a whole turn.
        gae_lambda: per turn.
    """
    next_values = jnp.concatenate(
        [values[:, 1:], jnp.zeros_like(values[:, :1])], axis=1
    )
    deltas = jnp.where(complete, rewards + discounts * next_values - values, 0.0)

    kept = jnp.where(complete, discounts, 0.0)

    def backwards(following, turn):
        delta, discount = turn
        advantage = delta + discount * gae_lambda * following
        return advantage, advantage

    _, advantages = jax.lax.scan(
        backwards, jnp.zeros_like(values[:, 0]), (deltas.T, kept.T), reverse=True
    )
    return advantages.T


@chex.dataclass(frozen=True)
class Nodes:
    """The packed stream as a recursion sees it: what is neither is skipped.

    Attributes:
        node: has an advantage.
        boundary: is only bootstrapped on, and cuts the recursion.
        reward: of a node.
        value: of a node or boundary.
        discount: of the next one's value, seen from a node.
        trace: of the next one's advantage, seen from a node.
    """

    node: Bool[Array, "B S"]
    boundary: Bool[Array, "B S"]
    reward: Float[Array, "B S"]
    value: Float[Array, "B S"]
    discount: Float[Array, "B S"]
    trace: Float[Array, "B S"]


def stream_gae(nodes: Nodes) -> Float[Array, "B S"]:
    """``A_i = r_i + g_i V[nxt] - V_i + t_i A[nxt]`` in one pass (ppo.md, section 3)."""

    def backwards(following: tuple[Array, Array], here: Nodes):
        next_advantage, next_value = following
        own = here.reward + here.discount * next_value - here.value
        own = own + here.trace * next_advantage
        cut = jnp.where(here.boundary, 0.0, next_advantage)
        advantage = jnp.where(here.node, own, cut)
        value = jnp.where(here.node | here.boundary, here.value, next_value)
        return (advantage, value), jnp.where(here.node, own, 0.0)

    nothing = jnp.zeros_like(nodes.value[:, 0])
    time_major = jax.tree.map(jnp.transpose, nodes)
    _, advantages = jax.lax.scan(
        backwards, (nothing, nothing), time_major, reverse=True
    )
    return advantages.T


def normalise(
    advantages: Float[Array, "B N"],
    mask: Bool[Array, "B N"],
    clip: float,
    share: Float[Array, "B N"] | float = 1.0,
) -> Float[Array, "B N"]:
    """Whiten over *turns* (not tokens, which would weight turns by length), and clip.

    Args:
        advantages: one a turn, or one a token.
        mask: those that count.
        clip: bound on the absolute normalised advantage.
        share: of a token in its turn, so that every turn counts once.
    """
    count = jnp.maximum(jnp.sum(jnp.where(mask, share, 0.0)), 1.0)
    mean = jnp.sum(jnp.where(mask, share * advantages, 0.0)) / count
    centred = jnp.where(mask, advantages - mean, 0.0)
    deviation = jnp.sqrt(jnp.sum(share * centred**2) / count)
    return jnp.clip(centred / (deviation + 1e-8), -clip, clip)
