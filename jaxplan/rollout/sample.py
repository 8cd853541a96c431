"""Sampling among legal tokens: temperature, Gumbel maximum, no sort."""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxplan.plan.grammar import DECIDE, DECIDE_ACT, Grammar

_ILLEGAL = -1e30  # finite, so that differences of masked values are never NaN


@chex.dataclass(frozen=True)
class Choice:
    """A distribution over legal tokens, factored where a plan may be begun.

    At ``DECIDE`` the first piece of a plan competes with the first pieces of actions.
    With p its probability, log pi(x) is log p if it was chosen, else
    log(1 - p) + log pi(x | no plan): two factors (ppo.md, section 6). In every other
    state the first factor is 1.

    Attributes:
        legal: tokens of the second factor: all legal ones but a plan's opening.
        log_probs: of the second factor, over the vocabulary.
        log_plan: log p, 0 outside ``DECIDE``.
        log_act: log(1 - p), 0 outside ``DECIDE``.
    """

    legal: Bool[Array, "*axes V"]
    log_probs: Float[Array, "*axes V"]
    log_plan: Float[Array, "*axes"]
    log_act: Float[Array, "*axes"]


def choice_of(
    grammar: Grammar, logits: Float[Array, "*axes V"], state: Int[Array, "*axes"]
) -> Choice:
    """The policy's distribution in grammar ``state``.

    Args:
        grammar: the plan grammar.
        logits: of the model, float32, already divided by the temperature.
        state: grammar states.
    """
    deciding = state == DECIDE
    rest = jnp.where(deciding, DECIDE_ACT, state)
    legal = grammar.legal[rest]
    opening = grammar.legal[state] & ~legal
    masked = jnp.where(legal, logits, _ILLEGAL)
    log_rest = jax.nn.logsumexp(masked, axis=-1)
    log_open = jax.nn.logsumexp(jnp.where(opening, logits, _ILLEGAL), axis=-1)
    log_all = jnp.logaddexp(log_rest, log_open)
    zero = jnp.zeros_like(log_rest)
    return Choice(
        legal=legal,
        log_probs=masked - log_rest[..., None],
        log_plan=jnp.where(deciding, log_open - log_all, zero),
        log_act=jnp.where(deciding, log_rest - log_all, zero),
    )


def token_log_probs(
    choice: Choice, token: Int[Array, "*axes"], opens: Bool[Array, "*axes"]
) -> tuple[Float[Array, "*axes"], Float[Array, "*axes"]]:
    """The two factors of a token's log-probability: plan or act, and which token.

    Args:
        choice: the distribution it came from.
        token: the token.
        opens: whether it chose to plan where there was a choice.
    """
    decide = jnp.where(opens, choice.log_plan, choice.log_act)
    which = jnp.take_along_axis(choice.log_probs, token[..., None], axis=-1)[..., 0]
    return decide, jnp.where(opens, 0.0, which)


def chose_plan(
    grammar: Grammar, state: Int[Array, "*axes"], token: Int[Array, "*axes"]
) -> Bool[Array, "*axes"]:
    """True where a plan was begun though an action was legal."""
    return (state == DECIDE) & ~grammar.legal[DECIDE_ACT, token]


def sample_token(
    key: PRNGKeyArray,
    grammar: Grammar,
    logits: Float[Array, " V"],
    state: Int[Array, ""],
    decide_explore: float = 0.0,
) -> tuple[Int[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """Draw a legal token.

    Args:
        key: of the draw.
        grammar: the plan grammar.
        logits: of the model, already divided by the temperature.
        state: the grammar state.
        decide_explore: share of the choices between plan and action that a fair coin
            makes instead of the policy (ppo.md, section 6).

    Returns:
        The token, and the two factors of the log-probability it was drawn with.
    """
    gumbel = jax.random.gumbel(key, logits.shape, logits.dtype)
    legal = grammar.legal[state]
    if decide_explore:
        legal &= _coin(key, grammar, state, decide_explore)
    token = _first_of_the_largest(jnp.where(legal, logits + gumbel, _ILLEGAL))
    choice = choice_of(grammar, logits, state)
    opens = chose_plan(grammar, state, token)
    decide, which = token_log_probs(choice, token, opens)
    if decide_explore:
        decide = jnp.where(state == DECIDE, explored(decide, decide_explore), decide)
    return token, decide, which


def _first_of_the_largest(scores: Float[Array, " V"]) -> Int[Array, ""]:
    """``argmax``, in two plain reductions: XLA's own is not vectorised on a CPU."""
    places = jnp.arange(scores.size, dtype=jnp.int32)
    return jnp.min(jnp.where(scores == jnp.max(scores), places, scores.size))


def explored(decide: Float[Array, "*axes"], share: float) -> Float[Array, "*axes"]:
    """Log-probability of a decision of which a fair coin makes a ``share``."""
    if not share:
        return decide
    return jnp.logaddexp(jnp.log1p(-share) + decide, jnp.log(share / 2))


def _coin(
    key: PRNGKeyArray, grammar: Grammar, state: Int[Array, ""], share: float
) -> Bool[Array, " V"]:
    """Tokens a coin leaves to choose from: all, where it is not thrown."""
    thrown, plans = jax.random.uniform(jax.random.fold_in(key, 1), (2,))
    acts = grammar.legal[DECIDE_ACT]
    side = jnp.where(plans < 0.5, ~acts, acts)
    return side | (thrown >= share) | (state != DECIDE)
