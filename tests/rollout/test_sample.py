"""The two factors of a token's log-probability, when sampled and when replayed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxplan.models.llama import forward
from jaxplan.plan.grammar import ACT, DECIDE, DECIDE_ACT, TEXT, TEXT_FULL
from jaxplan.rollout.sample import choice_of, chose_plan, sample_token, token_log_probs
from jaxplan.rollout.stream import stream_metadata
from jaxplan.train.decisions import gather_decisions, role_masks, score
from tests.rollout.conftest import MODEL, ROLLOUT

DECISIONS = ROLLOUT.rounds * (1 + ROLLOUT.decode_steps)
STATES = (DECIDE, DECIDE_ACT, TEXT, TEXT_FULL, ACT)
DRAWS = 20_000


@jax.jit
def rescored(params, tokens, grammar):
    decisions = gather_decisions(tokens, DECISIONS)
    meta = stream_metadata(tokens)
    hidden = forward(params, tokens.token, meta, MODEL, ROLLOUT.history)
    scores = score(params, hidden, decisions, grammar, ROLLOUT.temperature)
    return decisions, scores, role_masks(grammar, decisions)


def test_sampled_log_probs_are_those_of_the_packed_stream(setting, play):
    grammar = setting.language.grammar
    for segment in play.segments:
        tokens = segment.stream.tokens
        decisions, scores, masks = rescored(setting.params, tokens, grammar)
        mask = np.asarray(decisions.mask)
        assert mask.sum() == np.asarray(tokens.sampled).sum()
        sampled_which = decisions.log_prob - decisions.decide_log_prob
        for replayed, sampled in (
            (scores.decide, decisions.decide_log_prob),
            (scores.which, sampled_which),
        ):
            error = np.abs(replayed - sampled)[mask]
            assert error.max() < 1e-5
        # A factor that is 1 by construction is no decision of the policy's.
        decided = np.asarray(masks.decide)
        assert (np.asarray(scores.decide)[mask & ~decided] == 0).all()
        assert (np.asarray(scores.decide)[decided] < 0).all()


def softmax(logits):
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


@pytest.mark.parametrize("state", STATES)
def test_the_factors_multiply_to_the_softmax_over_legal_tokens(setting, state):
    grammar = setting.language.grammar
    vocab = grammar.legal.shape[1]
    logits = 5 * np.random.default_rng(state).normal(size=vocab).astype(np.float32)
    legal = np.flatnonzero(grammar.legal[state])
    choice = choice_of(grammar, jnp.asarray(logits), jnp.int32(state))
    decide, which = jax.vmap(
        lambda token: token_log_probs(
            choice, token, chose_plan(grammar, jnp.int32(state), token)
        )
    )(jnp.asarray(legal, jnp.int32))
    np.testing.assert_allclose(
        np.exp(decide + which), softmax(logits[legal]), rtol=1e-4, atol=1e-7
    )
    if state != DECIDE:
        np.testing.assert_array_equal(decide, 0.0)


def test_a_forced_token_has_probability_one(setting):
    grammar = setting.language.grammar
    logits = jnp.zeros(grammar.legal.shape[1])
    token, decide, which = sample_token(
        jax.random.key(0), grammar, logits, jnp.int32(TEXT_FULL)
    )
    assert token == setting.words.closing[0]
    assert decide == 0
    assert which == 0


def test_tokens_are_drawn_as_often_as_they_are_probable(setting):
    grammar = setting.language.grammar
    vocab = grammar.legal.shape[1]
    logits = jnp.asarray(np.random.default_rng(0).normal(size=vocab), jnp.float32)
    keys = jax.random.split(jax.random.key(0), DRAWS)
    draw = jax.jit(jax.vmap(sample_token, in_axes=(0, None, None, None)))
    drawn, decide, which = draw(keys, grammar, logits, jnp.int32(DECIDE))
    legal = np.flatnonzero(grammar.legal[DECIDE])
    counts = np.bincount(np.asarray(drawn), minlength=vocab)
    assert counts.sum() == counts[legal].sum(), "an illegal token was drawn"
    expected = softmax(np.asarray(logits)[legal])
    deviation = np.sqrt(expected * (1 - expected) / DRAWS)
    assert (np.abs(counts[legal] / DRAWS - expected) < 5 * deviation).all()
    table = dict(zip(legal.tolist(), np.log(expected), strict=True))
    said = [table[token] for token in drawn[:50].tolist()]
    np.testing.assert_allclose((decide + which)[:50], said, atol=1e-5)


@pytest.mark.parametrize("share", [0.2, 1.0])
def test_exploration_throws_a_fair_coin_now_and_then_and_says_so(setting, share):
    grammar = setting.language.grammar
    vocab, opening = grammar.legal.shape[1], setting.words.opening[0]
    logits = jnp.asarray(np.random.default_rng(0).normal(size=vocab), jnp.float32)
    keys = jax.random.split(jax.random.key(0), DRAWS)
    draw = jax.jit(
        jax.vmap(sample_token, in_axes=(0, None, None, None, None)), static_argnums=4
    )
    drawn, decide, which = draw(keys, grammar, logits, jnp.int32(DECIDE), share)
    legal = np.flatnonzero(grammar.legal[DECIDE])
    policy = dict(zip(legal, softmax(np.asarray(logits)[legal]), strict=True))
    plan = (1 - share) * policy[opening] + share / 2
    table = {
        token: plan if token == opening else p * (1 - plan) / (1 - policy[opening])
        for token, p in policy.items()
    }
    counts = np.bincount(np.asarray(drawn), minlength=vocab)[legal]
    expected = np.array([table[token] for token in legal])
    deviation = np.sqrt(expected * (1 - expected) / DRAWS)
    assert (np.abs(counts / DRAWS - expected) < 5 * deviation).all()
    said = [np.log(table[token]) for token in drawn[:50].tolist()]
    np.testing.assert_allclose((decide + which)[:50], said, atol=1e-5)
    # Where there is nothing to decide, nothing is explored.
    plain = sample_token(keys[0], grammar, logits, jnp.int32(TEXT))
    other = sample_token(keys[0], grammar, logits, jnp.int32(TEXT), share)
    assert plain == other
