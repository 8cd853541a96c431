"""Reading and writing turns: what is written is read back, what is wrong is located."""

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxplan.core.roles import Span
from jaxplan.plan.parse import TurnError, parse_turn, render_turn

BUDGET = 3


@st.composite
def turns(draw, language):
    """Draw ids of a turn with the span of each, and its action."""
    turn = draw(st.sampled_from(language.turns("dynamic", BUDGET)))
    ids = [
        draw(st.sampled_from(sorted(language.standing_for(token))))
        for token, _, _ in turn
    ]
    return ids, [kind for _, kind, _ in turn], turn[0][2]


@settings(max_examples=50)
@given(data=st.data())
def test_every_turn_parses(language, data):
    ids, kinds, action = data.draw(turns(language))
    parsed = parse_turn(language.tables, language.tokenizer, ids, BUDGET)
    assert parsed.action == action
    assert list(parsed.spans) == kinds
    text = "".join(
        language.tokenizer.text_of(token)
        for token, kind in zip(ids, kinds, strict=True)
        if kind == Span.PLAN
    )
    assert parsed.plan == (text or None)


@settings(max_examples=50)
@given(data=st.data())
def test_every_corrupted_token_is_rejected_at_its_position(language, data):
    ids, _, _ = data.draw(turns(language))
    position = data.draw(st.integers(0, len(ids) - 1))
    allowed = language.may_follow(language.turns("dynamic", BUDGET), ids[:position])
    vocabulary = range(-1, language.tokenizer.vocab_size + 1)
    wrong = data.draw(st.sampled_from([t for t in vocabulary if t not in allowed]))
    ids[position] = wrong
    with pytest.raises(TurnError, match=f"position {position}: ") as error:
        parse_turn(language.tables, language.tokenizer, ids, BUDGET)
    assert error.value.position == position


@settings(max_examples=50)
@given(data=st.data())
def test_a_turn_cut_short_or_followed_by_more_is_rejected_at_its_end(language, data):
    ids, _, _ = data.draw(turns(language))
    kept = data.draw(st.integers(0, len(ids) - 1))
    with pytest.raises(TurnError, match=f"position {kept}: the end") as error:
        parse_turn(language.tables, language.tokenizer, ids[:kept], BUDGET)
    assert error.value.position == kept
    longer = [*ids, data.draw(st.sampled_from(language.text))]
    with pytest.raises(TurnError, match="expected nothing: the turn is complete"):
        parse_turn(language.tables, language.tokenizer, longer, BUDGET)


def test_an_error_says_what_may_stand_there(language):
    ids = [*language.opening, *language.closing]
    with pytest.raises(TurnError) as error:
        parse_turn(language.tables, language.tokenizer, ids, BUDGET)
    assert error.value.expected == ("plan text",)
    full = [*language.opening, language.first[0], language.text[0]]
    with pytest.raises(TurnError) as error:
        parse_turn(language.grammar, language.tokenizer, full, budget=1)
    assert error.value.position == len(full) - 1
    closing = language.tokenizer.decode(language.closing[:1])
    assert error.value.expected == (repr(closing),)


@pytest.mark.parametrize("plan", [None, " find wood", " mine 2 coal, then rest"])
def test_what_is_rendered_is_parsed(language, plan):
    grammar = jax.device_get(language.grammar)
    ids = render_turn(language.tokenizer, grammar, plan, "Make Wood Pickaxe")
    parsed = parse_turn(grammar, language.tokenizer, ids, budget=32)
    assert (parsed.plan, parsed.action) == (plan, 4)


@pytest.mark.parametrize("plan", [" a\nb", " a</plan>", " a > b", " \t", " caf\u00e9"])
def test_a_plan_with_text_that_cannot_be_in_a_plan_is_refused(language, plan):
    with pytest.raises(ValueError, match="may not stand in a plan"):
        render_turn(language.tokenizer, language.grammar, plan, "Noop")


def test_an_empty_plan_and_an_unknown_action_are_refused(language):
    with pytest.raises(ValueError, match="at least one token"):
        render_turn(language.tokenizer, language.grammar, "", "Noop")
    for name in ("Fly", "Noop Noop", ""):
        with pytest.raises(ValueError, match="is not one of this grammar"):
            render_turn(language.tokenizer, language.grammar, None, name)
