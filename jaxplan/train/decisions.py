"""The sampled tokens of a segment, gathered, and what the policy thinks of them now.

Fewer than a tenth of all tokens are choices of the agent. Only these need the LM head,
so they are gathered from the stream before it.
"""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxplan.core.roles import Role
from jaxplan.models.heads import chunk_tokens, lm_logits, map_token_chunks
from jaxplan.models.params import LlamaParams
from jaxplan.plan.grammar import DECIDE, DECIDE_ACT, Grammar
from jaxplan.rollout.sample import choice_of, chose_plan, token_log_probs
from jaxplan.rollout.stream import Tokens


@chex.dataclass(frozen=True)
class Decisions:
    """Sampled tokens, in the order of the stream; the rest of the slots are masked.

    Attributes:
        position: of the token in its stream.
        token: the id that was chosen.
        state: grammar state it was chosen in.
        turn: number of its turn in the lane's life.
        log_prob: behaviour log-probability, both factors.
        decide_log_prob: its factor "plan or act".
        mask: slots that hold a token.
    """

    position: Int[Array, "B M"]
    token: Int[Array, "B M"]
    state: Int[Array, "B M"]
    turn: Int[Array, "B M"]
    log_prob: Float[Array, "B M"]
    decide_log_prob: Float[Array, "B M"]
    mask: Bool[Array, "B M"]


@chex.dataclass(frozen=True)
class Scores:
    """What a policy says of decisions; factors as in ``Choice``.

    Attributes:
        decide: log-probability of planning, or of acting, whichever was chosen.
        decide_other: log-probability of the other one; 0 where there was no choice.
        which: log-probability of the token among its like.
        decide_entropy: of the Bernoulli "plan or act", as a share of log 2.
        which_entropy: of the second factor, as a share of log(number of options).
        legal_mass: log of what the unmasked model would have put on legal tokens.
    """

    decide: Float[Array, "*axes"]
    decide_other: Float[Array, "*axes"]
    which: Float[Array, "*axes"]
    decide_entropy: Float[Array, "*axes"]
    which_entropy: Float[Array, "*axes"]
    legal_mass: Float[Array, "*axes"]


@chex.dataclass(frozen=True)
class RoleMasks:
    """Which factor of which decision is trained as what."""

    decide: Bool[Array, "B M"]
    plan: Bool[Array, "B M"]
    action: Bool[Array, "B M"]


def select(mask: Bool[Array, "B S"], size: int) -> tuple[Array, Array]:
    """Positions of the first ``size`` True entries of every row, and which are real."""
    rank = jnp.cumsum(mask, axis=1) - 1
    slot = jnp.where(mask, rank, size)
    rows = jnp.arange(mask.shape[0], dtype=jnp.int32)[:, None]
    columns = jnp.broadcast_to(jnp.arange(mask.shape[1], dtype=jnp.int32), mask.shape)
    position = jnp.zeros((mask.shape[0], size), jnp.int32)
    position = position.at[rows, slot].set(columns, mode="drop")
    count = jnp.sum(mask, axis=1, dtype=jnp.int32)
    return position, jnp.arange(size, dtype=jnp.int32)[None, :] < count[:, None]


def gather_decisions(tokens: Tokens, size: int) -> Decisions:
    """Collect the sampled tokens of every lane.

    Args:
        tokens: of the stream, [B, S].
        size: slots per lane; rounds x (1 + decode_steps) can never be too few.
    """
    position, mask = select(tokens.sampled, size)
    at = jax.tree.map(
        lambda array: jnp.take_along_axis(array, position, axis=1), tokens
    )
    return Decisions(
        position=position,
        token=at.token,
        state=at.state,
        turn=at.turn,
        log_prob=at.log_prob,
        decide_log_prob=at.decide_log_prob,
        mask=mask,
    )


def role_masks(grammar: Grammar, decisions: Decisions) -> RoleMasks:
    """Sort the factors of decisions by role (ppo.md, sections 1 and 6)."""
    state, mask = decisions.state, decisions.mask
    plans = chose_plan(grammar, state, decisions.token)
    rest = jnp.where(state == DECIDE, DECIDE_ACT, state)
    which = mask & ~plans & (grammar.legal.sum(-1) > 1)[rest]
    is_plan = grammar.role[state] == Role.PLAN
    return RoleMasks(
        decide=mask & (state == DECIDE), plan=which & is_plan, action=which & ~is_plan
    )


def hidden_before(
    hidden: Float[Array, "B S D"], position: Int[Array, "B M"]
) -> Float[Array, "B M D"]:
    """The hidden states that predict the tokens at ``position``."""
    before = jnp.maximum(position - 1, 0)
    return jnp.take_along_axis(hidden, before[..., None], axis=1)


def score(
    params: LlamaParams,
    hidden: Float[Array, "B S D"],
    decisions: Decisions,
    grammar: Grammar,
    temperature: float,
) -> Scores:
    """Log-probabilities and entropies under ``params``, on the replayed grammar masks.

    Args:
        params: the policy.
        hidden: its hidden states of the whole stream.
        decisions: what to score.
        grammar: the plan grammar.
        temperature: of the behaviour policy.
    """
    at = hidden_before(hidden, decisions.position)

    def score_chunk(at, token, state):
        logits = lm_logits(params, at) / temperature
        choice = choice_of(grammar, logits, state)
        plans = chose_plan(grammar, state, token)
        decide, which = token_log_probs(choice, token, plans)
        legal = jnp.where(grammar.legal[state], logits, -jnp.inf)
        # Slots that hold no decision may stand in a state without legal tokens.
        any_legal = jnp.any(grammar.legal[state], axis=-1)
        mass = jax.nn.logsumexp(
            jnp.where(any_legal[:, None], legal, logits), axis=-1
        ) - jax.nn.logsumexp(logits, axis=-1)
        return Scores(
            decide=decide,
            decide_other=jnp.where(plans, choice.log_act, choice.log_plan),
            which=which,
            decide_entropy=_decide_entropy(choice.log_plan, choice.log_act),
            which_entropy=_entropy(choice.log_probs, choice.legal),
            legal_mass=mass,
        )

    chunk = chunk_tokens(params)
    return map_token_chunks(score_chunk, chunk, at, decisions.token, decisions.state)


def _entropy(
    log_probs: Float[Array, "*axes V"], legal: Bool[Array, "*axes V"]
) -> Float[Array, "*axes"]:
    kept = jnp.where(legal, log_probs, 0.0)
    entropy = -jnp.sum(jnp.where(legal, jnp.exp(kept) * kept, 0.0), axis=-1)
    options = jnp.sum(legal, axis=-1)
    return entropy / jnp.log(jnp.maximum(options, 2).astype(jnp.float32))


def _decide_entropy(
    log_plan: Float[Array, "*axes"], log_act: Float[Array, "*axes"]
) -> Float[Array, "*axes"]:
    entropy = -(jnp.exp(log_plan) * log_plan + jnp.exp(log_act) * log_act)
    return entropy / jnp.log(2.0)
