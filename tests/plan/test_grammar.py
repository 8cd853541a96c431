"""The automaton against a list of all turns, the modes, and refused languages."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxplan.config.schema import PlanConfig
from jaxplan.core.roles import Role, Span
from jaxplan.envs.craftax_classic import ACTION_NAMES
from jaxplan.envs.craftax_plans import PLAN_PHRASES
from jaxplan.plan import grammar as plan_grammar
from jaxplan.plan.grammar import (
    ACT,
    DECIDE,
    DECIDE_ACT,
    DECIDE_PLAN,
    REJECT,
    TEXT,
    TEXT_FIRST,
    TEXT_FULL,
    check_start,
    check_turns,
    make_grammar,
    parse_mode,
    start,
)
from jaxplan.text.tokenizer import load_tokenizer
from tests.tokenizers import KINDS, llama3_like

advance = jax.jit(plan_grammar.advance)
START = {"dynamic": DECIDE, "plan": DECIDE_PLAN, "act": DECIDE_ACT}


def role_of(position: int, kind: Span) -> Role:
    if position == 0:
        return Role.DECIDE
    return Role.ACTION if kind == Span.ACTION else Role.PLAN


@jax.jit
def take(grammar, state, token, remaining):
    """Take a token; return the state, what remains, and all there is to say of it."""
    said = (
        plan_grammar.span(grammar, state, token),
        plan_grammar.opens_plan(grammar, state, token),
        plan_grammar.closes_plan(grammar, state, token),
    )
    state, remaining = plan_grammar.advance(grammar, state, token, remaining)
    return state, remaining, said, plan_grammar.is_finished(grammar, state)


@pytest.mark.parametrize("mode", START)
@settings(max_examples=40)
@given(data=st.data(), budget=st.integers(1, 4))
def test_every_walk_has_the_masks_roles_spans_and_action_of_a_turn(
    language, mode, data, budget
):
    tables = language.tables
    turns = language.turns(mode, budget)
    state, remaining, finished = START[mode], budget, False
    written, roles, said = [], [], []
    while legal := language.may_follow(turns, written):
        assert not finished
        assert set(np.flatnonzero(tables.legal[state])) == legal
        assert tables.choice[state] == (len(legal) > 1)
        # Text is most of the vocabulary: without help no plan would ever end.
        others = sorted(legal - set(language.text)) or sorted(legal)
        token = data.draw(st.sampled_from(others) | st.sampled_from(sorted(legal)))
        written.append(token)
        roles.append(tables.role[state])
        state, remaining, of_token, finished = jax.device_get(
            take(language.grammar, state, token, remaining)
        )
        said.append(of_token)

    (turn,) = [t for t in language.matching(turns, written) if len(t) == len(written)]
    kinds = [kind for _, kind, _ in turn]
    tags = [i for i, kind in enumerate(kinds) if kind == Span.TAG]
    assert roles == [role_of(i, kind) for i, kind in enumerate(kinds)]
    assert [kind for kind, _, _ in said] == kinds
    assert [i for i, (_, opens, _) in enumerate(said) if opens] == tags[:1]
    assert [i for i, (_, _, closes) in enumerate(said) if closes] == tags[-1:]
    assert remaining == budget - kinds.count(Span.PLAN)
    assert finished
    assert tables.action[state] == turn[0][2]


def test_markers_and_actions_of_the_small_tokenizer_have_several_shared_pieces(
    language,
):
    if language.tokenizer.vocab_size < 300:
        for pieces in (language.opening, language.closing, *language.actions):
            assert len(pieces) > 1
        first = [pieces[0] for pieces in language.actions]
        assert len(set(first)) < len(first)


def test_forced_tokens_are_the_only_legal_ones(language):
    grammar = language.grammar
    assert not grammar.choice[DECIDE_PLAN]
    assert not grammar.choice[TEXT_FULL]
    inside_tags = np.flatnonzero(
        (np.asarray(grammar.entered_by) == Span.TAG)
        & (np.asarray(grammar.role) == Role.PLAN)
    )
    assert not grammar.choice[inside_tags[inside_tags != TEXT_FIRST]].any()


def test_the_inside_of_a_plan_is_from_the_first_piece_of_open_to_the_last_of_close(
    language,
):
    grammar = language.grammar
    ids = [*language.opening, language.first[0], *language.closing]
    state, remaining = jnp.int32(DECIDE), jnp.int32(2)
    inside = []
    for token in ids:
        state, remaining = advance(grammar, state, jnp.int32(token), remaining)
        inside.append(bool(plan_grammar.is_writing_plan(grammar, state)))
    assert inside == [True] * (len(ids) - 1) + [False]
    assert state == ACT


def test_an_illegal_token_leads_to_a_state_that_nothing_leaves(language):
    grammar = language.grammar
    for state in range(grammar.legal.shape[0]):
        illegal = ~np.asarray(grammar.legal[state])
        assert (np.asarray(grammar.next_state[state])[illegal] == REJECT).all()
    assert not grammar.legal[REJECT].any()
    assert not plan_grammar.is_finished(grammar, jnp.int32(REJECT))
    assert (np.asarray(grammar.next_state) >= 0).all()


def test_lanes_in_all_modes_advance_together_as_they_do_alone(language):
    grammar = language.grammar
    tokens = np.array(
        [language.opening[0], language.opening[0], language.actions[1][0]]
    )
    states = jnp.array([DECIDE, DECIDE_PLAN, DECIDE_ACT])
    remaining = jnp.array([1, 2, 3])
    together = jax.vmap(advance, in_axes=(None, 0, 0, 0))(
        grammar, states, tokens, remaining
    )
    alone = [
        advance(grammar, states[i], jnp.int32(tokens[i]), remaining[i])
        for i in range(3)
    ]
    np.testing.assert_array_equal(together[0], [state for state, _ in alone])
    np.testing.assert_array_equal(together[1], [left for _, left in alone])


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("dynamic", [DECIDE] * 6),
        ("never", [DECIDE_ACT] * 6),
        ("every-1", [DECIDE_PLAN] * 6),
        ("every-3", [DECIDE_PLAN, DECIDE_ACT, DECIDE_ACT] * 2),
    ],
)
def test_a_mode_is_the_state_a_turn_begins_in(mode, expected):
    every = parse_mode(mode)
    assert [int(start(every, turn)) for turn in range(6)] == expected
    lanes = jax.vmap(jax.jit(start))(jnp.full(6, every), jnp.arange(6))
    assert lanes.tolist() == expected
    assert lanes.dtype == jnp.int32
    assert not start(every, 0).weak_type


@pytest.mark.parametrize(
    "mode", ["every-0", "every--1", "every-", "Never", "every-1.5"]
)
def test_an_unknown_mode_is_refused_with_the_known_ones(mode):
    with pytest.raises(
        ValueError, match="allowed are 'dynamic', 'never', and 'every-K'"
    ):
        parse_mode(mode)


def test_the_shipped_tokenizer_carries_the_plans_and_actions_of_craftax():
    tokenizer = load_tokenizer("shipped")
    grammar = make_grammar(tokenizer, ACTION_NAMES, PlanConfig())
    decisions = np.flatnonzero(grammar.legal[DECIDE]).tolist()
    assert [tokenizer.decode([token]) for token in decisions] == [
        "<plan>",
        *ACTION_NAMES,
    ]
    for phrase in PLAN_PHRASES:
        assert all(grammar.legal[TEXT, token] for token in tokenizer.encode(phrase))


def test_an_action_that_begins_as_a_plan_is_refused():
    tokenizer = load_tokenizer("shipped")
    with pytest.raises(ValueError, match=r"plan\.open .* actions \['Do'\]"):
        make_grammar(tokenizer, ("Noop", "Do"), PlanConfig(open="Do it"))


def test_an_action_that_begins_as_another_is_refused():
    tokenizer = load_tokenizer("shipped")
    with pytest.raises(ValueError, match="'Do' are also the first of 'Do it'"):
        make_grammar(tokenizer, ("Do it", "Do"), PlanConfig())


def test_the_same_action_twice_is_refused():
    with pytest.raises(ValueError, match="differ"):
        make_grammar(load_tokenizer("shipped"), ("Do", "Do"), PlanConfig())


def test_an_end_marker_that_could_be_plan_text_is_refused():
    with pytest.raises(ValueError, match=r"' end' of plan\.close"):
        make_grammar(load_tokenizer("shipped"), ("Do",), PlanConfig(close=" end"))


def test_an_action_without_words_is_refused():
    with pytest.raises(ValueError, match="action '': the tokenizer makes no token"):
        make_grammar(load_tokenizer("shipped"), ("Do", ""), PlanConfig())


def test_a_tokenizer_without_plan_text_is_refused():
    tokenizer = load_tokenizer("shipped")
    mute = dataclasses.replace(tokenizer, texts=("",) * tokenizer.vocab_size)
    with pytest.raises(ValueError, match="no token of this tokenizer is plan text"):
        make_grammar(mute, ("Do",), PlanConfig())


@pytest.mark.parametrize("kind", KINDS)
def test_an_end_that_joins_the_text_before_it_is_refused_with_what_to_do(
    tmp_path, kind
):
    match = r"'</plan>' behind '<plan> \.' .* one by one .* ' </plan>"
    with pytest.raises(ValueError, match=match):
        make_grammar(KINDS[kind](tmp_path), ACTION_NAMES, PlanConfig())


def test_an_end_that_joins_the_action_behind_it_is_refused(tmp_path):
    plan = PlanConfig(close=" </plan> ")
    match = "an action may not follow plan.close: 'Noop' behind ' </plan> '"
    with pytest.raises(ValueError, match=match):
        make_grammar(llama3_like(tmp_path), ACTION_NAMES, plan)


def test_a_turn_that_joins_the_observations_around_it_is_refused(tmp_path):
    tokenizer, names = llama3_like(tmp_path), ACTION_NAMES
    with pytest.raises(ValueError, match=r"'<plan>' behind ' >' .* begin with a space"):
        check_turns(tokenizer, names, PlanConfig(), [" >"], ["\n"])
    check_turns(tokenizer, names, PlanConfig(open=" <plan>"), [" >"], ["\n"])
    with pytest.raises(ValueError, match="'oop' behind 'N' is"):
        check_turns(tokenizer, ("N",), PlanConfig(), ["\n"], ["oop"])
    with pytest.raises(ValueError, match="may not follow the prompt"):
        check_start(tokenizer, " a.", ["\nYou see"])


def test_a_special_token_that_takes_the_space_behind_it_is_refused(tmp_path):
    llama3_like(tmp_path, ("<plan>", "</plan>"))
    path = tmp_path / "tokenizer.json"
    spec = json.loads(path.read_text())
    for added in spec["added_tokens"]:
        added["rstrip"] = True
    path.write_text(json.dumps(spec))
    match = "plan text may not follow plan.open: ' go' behind '<plan>'"
    with pytest.raises(ValueError, match=match):
        make_grammar(load_tokenizer(str(path)), ACTION_NAMES, PlanConfig())
