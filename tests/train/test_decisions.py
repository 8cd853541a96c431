"""What is gathered against a Python loop; scores on logits that are given by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra import numpy as npst

from jaxplan.core.roles import Role
from jaxplan.plan.grammar import DECIDE, DECIDE_ACT, TEXT, TEXT_FIRST
from jaxplan.train.decisions import (
    Decisions,
    gather_decisions,
    hidden_before,
    role_masks,
    score,
    select,
)

SHAPE, SLOTS = (3, 9), 5
choose = jax.jit(select, static_argnums=1)


def python_select(mask):
    return [[place for place, wanted in enumerate(row) if wanted] for row in mask]


@given(npst.arrays(np.bool_, SHAPE))
def test_the_first_true_entries_are_selected_in_order(mask):
    position, real = choose(mask, SLOTS)
    for row, wanted in enumerate(python_select(mask)):
        kept = wanted[:SLOTS]
        assert position[row][real[row]].tolist() == kept
        assert real[row].tolist() == [slot < len(kept) for slot in range(SLOTS)]


def test_decisions_are_the_sampled_tokens_of_the_stream(segment, setting):
    tokens = jax.device_get(segment.stream.tokens)
    size = setting.rollout.rounds * (1 + setting.rollout.decode_steps)
    decisions = jax.device_get(gather_decisions(segment.stream.tokens, size))
    assert decisions.mask.sum() > 20
    for lane, places in enumerate(python_select(tokens.sampled)):
        mask = decisions.mask[lane]
        assert decisions.position[lane][mask].tolist() == places
        for name in ("token", "state", "turn", "log_prob", "decide_log_prob"):
            expected = getattr(tokens, name)[lane][places]
            actual = getattr(decisions, name)[lane][mask]
            np.testing.assert_array_equal(actual, expected, err_msg=name)


def test_the_hidden_state_before_a_token_predicts_it():
    hidden = jnp.arange(8.0).reshape(1, 8, 1)
    before = hidden_before(hidden, jnp.array([[1, 5, 7]]))
    assert before[0, :, 0].tolist() == [0, 4, 6]


def identity_llama(setting):
    """A head that hands the hidden state through: logits are what a test says."""
    vocab = setting.tokenizer.vocab_size
    return dataclasses.replace(
        setting.params.llama, embed=jnp.eye(vocab), final_norm=jnp.ones(vocab)
    )


def decisions_of(states, tokens):
    shape = (1, len(states))
    zeros, numbers = jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)
    return Decisions(
        position=1 + jnp.arange(len(states), dtype=jnp.int32)[None],
        token=jnp.asarray(tokens, jnp.int32)[None],
        state=jnp.asarray(states, jnp.int32)[None],
        turn=zeros,
        log_prob=numbers,
        decide_log_prob=numbers,
        mask=jnp.ones(shape, bool),
    )


@pytest.fixture(scope="module")
def every_choice(setting):
    """Each legal token of a few states, as decisions, and logits before them."""
    grammar = jax.device_get(setting.language.grammar)
    states, tokens = [], []
    for state in (DECIDE, DECIDE_ACT, TEXT_FIRST, TEXT):
        legal = np.flatnonzero(grammar.legal[state])[:12]
        states += [state] * len(legal)
        tokens += legal.tolist()
    opening = setting.tokenizer.encode(setting.plan.open)[0]
    closing = setting.tokenizer.encode(setting.plan.close)[0]
    states += [DECIDE, TEXT]
    tokens += [opening, closing]
    chance = np.random.default_rng(0)
    vocab = setting.tokenizer.vocab_size
    logits = chance.normal(size=(1, len(states) + 1, vocab)).astype(np.float32) * 3
    return decisions_of(states, tokens), jnp.asarray(logits)


@pytest.fixture(scope="module")
def scored(setting, every_choice):
    decisions, logits = every_choice
    llama = identity_llama(setting)
    return jax.device_get(
        score(llama, logits, decisions, setting.language.grammar, 1.0)
    )


def legal_log_softmax(logits, legal):
    wide = logits.astype(float)[legal]
    return wide - wide.max() - np.log(np.exp(wide - wide.max()).sum())


def test_both_factors_add_up_to_the_log_probability_among_legal_tokens(
    setting, every_choice, scored
):
    decisions, logits = jax.device_get(every_choice)
    grammar = jax.device_get(setting.language.grammar)
    for slot, (state, token) in enumerate(
        zip(decisions.state[0], decisions.token[0], strict=True)
    ):
        legal = np.flatnonzero(grammar.legal[state])
        log_probs = legal_log_softmax(logits[0, slot], legal)
        expected = log_probs[legal.tolist().index(token)]
        actual = scored.decide[0, slot] + scored.which[0, slot]
        np.testing.assert_allclose(actual, expected, atol=1e-5)
        everything = logits[0, slot].astype(float)
        mass = np.log(np.exp(everything[legal]).sum() / np.exp(everything).sum())
        np.testing.assert_allclose(scored.legal_mass[0, slot], mass, atol=1e-5)


def test_the_first_factor_is_the_bernoulli_choice_between_plan_and_action(
    setting, every_choice, scored
):
    decisions, logits = jax.device_get(every_choice)
    grammar = jax.device_get(setting.language.grammar)
    opening = setting.tokenizer.encode(setting.plan.open)[0]
    for slot, state in enumerate(decisions.state[0]):
        if state != DECIDE:
            assert scored.decide[0, slot] == 0
            assert scored.decide_entropy[0, slot] == 0
            continue
        legal = np.flatnonzero(grammar.legal[DECIDE])
        probs = np.exp(legal_log_softmax(logits[0, slot], legal))
        p = probs[legal.tolist().index(opening)]
        chosen = p if decisions.token[0, slot] == opening else 1 - p
        np.testing.assert_allclose(scored.decide[0, slot], np.log(chosen), atol=1e-5)
        entropy = -(p * np.log2(p) + (1 - p) * np.log2(1 - p))
        np.testing.assert_allclose(scored.decide_entropy[0, slot], entropy, atol=1e-5)


def test_entropies_are_shares_of_the_most_there_can_be(setting, every_choice, scored):
    decisions, logits = jax.device_get(every_choice)
    grammar = jax.device_get(setting.language.grammar)
    for slot, state in enumerate(decisions.state[0]):
        rest = DECIDE_ACT if state == DECIDE else state
        legal = np.flatnonzero(grammar.legal[rest])
        log_probs = legal_log_softmax(logits[0, slot], legal)
        expected = -(np.exp(log_probs) * log_probs).sum() / np.log(len(legal))
        np.testing.assert_allclose(scored.which_entropy[0, slot], expected, atol=1e-5)
    decisions, logits = every_choice
    llama = identity_llama(setting)
    uniform = score(llama, 0 * logits, decisions, setting.language.grammar, 1.0)
    np.testing.assert_allclose(uniform.which_entropy, 1.0, atol=1e-5)


def test_temperature_divides_the_logits(setting, every_choice):
    decisions, logits = every_choice
    grammar = setting.language.grammar
    llama = identity_llama(setting)
    cool = score(llama, logits, decisions, grammar, 2.0)
    halved = score(llama, logits / 2, decisions, grammar, 1.0)
    np.testing.assert_allclose(cool.which, halved.which, atol=1e-6)
    np.testing.assert_allclose(cool.decide, halved.decide, atol=1e-6)


def test_illegal_logits_have_a_gradient_of_exactly_zero(setting, every_choice):
    decisions, logits = every_choice
    grammar = setting.language.grammar
    llama = identity_llama(setting)

    def everything_trained(logits):
        scores = score(llama, logits, decisions, grammar, 1.0)
        terms = scores.decide + scores.which
        return jnp.sum(terms + scores.decide_entropy + scores.which_entropy)

    gradient = jax.grad(everything_trained)(logits)[0, :-1]
    legal = grammar.legal[decisions.state[0]]
    assert (gradient[~legal] == 0).all()
    assert (jnp.abs(gradient).sum(axis=-1) > 0).all()


def test_every_factor_has_the_role_it_is_trained_in(setting, every_choice):
    decisions, _ = every_choice
    masks = jax.device_get(role_masks(setting.language.grammar, decisions))
    grammar = jax.device_get(setting.language.grammar)
    opening = setting.tokenizer.encode(setting.plan.open)[0]
    for slot, (state, token) in enumerate(
        zip(decisions.state[0].tolist(), decisions.token[0].tolist(), strict=True)
    ):
        plans = state == DECIDE and token == opening
        expected = {
            "decide": state == DECIDE,
            "plan": grammar.role[state] == Role.PLAN,
            "action": grammar.role[state] != Role.PLAN and not plans,
        }
        for role, wanted in expected.items():
            assert getattr(masks, role)[0, slot] == wanted, (role, state, token)


def test_slots_without_a_decision_have_no_role(setting, every_choice):
    decisions, _ = every_choice
    nothing = dataclasses.replace(decisions, mask=jnp.zeros_like(decisions.mask))
    masks = role_masks(setting.language.grammar, nothing)
    assert not any(mask.any() for mask in jax.tree.leaves(masks))
