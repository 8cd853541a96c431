"""Packed segments against a slow reading of the visibility rule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxplan.core.roles import Role
from jaxplan.models.visibility import NO_PLAN, PROMPT_EPISODE, TokenMeta, visible
from jaxplan.plan.grammar import DECIDE
from jaxplan.train.packing import Packer, TurnTokens

SIZE, HISTORY = 48, 2
PROMPT = [900, 901, 902]


@pytest.fixture(scope="module")
def words(setting):
    """How to say a turn: plan tokens (none: no plan), and an action's name."""
    encode = setting.tokenizer.encode

    def turn(observation, plan, action, learn=True, advice=""):
        text = (
            [*encode(setting.plan.open), *plan, *encode(setting.plan.close)]
            if plan
            else []
        )
        return TurnTokens(
            observation=observation,
            generated=[*text, *encode(action)],
            plan_length=len(text),
            learn_action=learn,
            advice=encode(advice),
        )

    return turn


def pack_all(setting, episodes, size=SIZE, history=HISTORY):
    packer = Packer(setting.language.grammar, [PROMPT], size, history)
    for turns in episodes:
        packer.add(turns)
    return packer.finish()


def test_segments_take_their_prompts_in_turn(setting, words):
    prompts = [[900], [901, 902]]
    packer = Packer(setting.language.grammar, prompts, SIZE, HISTORY)
    packer.add([words([1, 2, 3, 4], [], "Noop")] * 40)
    fields = packer.finish()
    opened = [
        tokens[role == Role.PROMPT].tolist()
        for tokens, role in zip(fields["token"], fields["role"], strict=True)
    ]
    assert len(opened) > 3
    assert opened == [prompts[number % 2] for number in range(len(opened))]


TURNS = st.tuples(
    st.integers(1, 5),  # observation tokens
    st.integers(0, 3),  # plan tokens
    st.sampled_from(["Noop", "Dig Well", "Dig Pit"]),
    st.booleans(),  # learn the action
)
EPISODES = st.lists(st.lists(TURNS, min_size=1, max_size=6), min_size=1, max_size=4)


def spell(words, setting, episodes):
    """Turns whose observation and plan tokens tell which turn they belong to."""
    legal = np.flatnonzero(setting.language.grammar.legal[3])  # plan text
    number, spelled = 0, []
    for turns in episodes:
        spelled.append([])
        for seen, planned, action, learn in turns:
            observation = [300 + (7 * number + i) % 500 for i in range(seen)]
            plan = [int(legal[(11 * number + i) % len(legal)]) for i in range(planned)]
            spelled[-1].append(words(observation, plan, action, learn))
            number += 1
    return spelled


def expected_tokens(setting, spelled):
    """All tokens of a trajectory with their facts, turn by turn, written plainly."""
    grammar = jax.device_get(setting.language.grammar)
    turn_number = plan_number = 0
    for episode, turns in enumerate(spelled, 1):
        for turn in turns:
            turn_number += 1
            before = plan_number
            plan_number += turn.plan_length > 0
            rows = [
                (token, Role.OBSERVATION, 0, turn_number, episode, NO_PLAN, before)
                for token in turn.observation
            ]
            state = DECIDE
            for place, token in enumerate(turn.generated):
                in_plan = place < turn.plan_length
                open_still = place < turn.plan_length - 1
                wanted = in_plan or turn.learn_action
                rows.append(
                    (
                        token,
                        grammar.role[state],
                        int(wanted and grammar.legal[state].sum() > 1),
                        turn_number,
                        episode,
                        plan_number if in_plan else NO_PLAN,
                        before if open_still else plan_number,
                    )
                )
                state = grammar.next_state[state, token]
            yield np.array(rows)


FIELDS = ("token", "role", "learn", "turn", "episode", "plan", "active_plan")


@settings(max_examples=40)
@given(EPISODES)
def test_every_turn_is_written_once_and_sees_all_it_may(setting, words, episodes):
    spelled = spell(words, setting, episodes)
    fields = pack_all(setting, spelled)
    rows = np.stack(
        [fields[name] for name in FIELDS], axis=-1
    )  # [segment, place, field]
    turns = list(expected_tokens(setting, spelled))
    written = []
    for segment in rows:
        roles = segment[:, FIELDS.index("role")]
        assert segment[: len(PROMPT), 0].tolist() == PROMPT
        assert (segment[: len(PROMPT), 4] == PROMPT_EPISODE).all()
        own = (roles != Role.PAD) & (roles != Role.PROMPT) & (roles != Role.CARRIED)
        written += segment[own].tolist()
        check_prefix(segment, own, turns)
    assert written == np.concatenate(turns).tolist()
    assert fields["learn"].sum() == sum(turn[:, 2].sum() for turn in turns)


@jax.jit
def see(columns):
    position = jnp.arange(columns.shape[1], dtype=jnp.int32)
    key = TokenMeta(position=position, **dict(zip(FIELDS[3:], columns, strict=True)))
    query = jax.tree.map(lambda column: column[-1:], key)
    return visible(query, key, HISTORY)[0]


def seen_by_last(rows):
    """Which rows the last one sees; padding in front makes all calls alike."""
    columns = np.zeros((4, 512), np.int32)
    columns[:, -len(rows) :] = rows[:, 3:].T
    return np.asarray(see(columns))[-len(rows) :]


def check_prefix(segment, own, turns):
    """What is carried is what the first token after it sees of the turns before it."""
    roles = segment[:, FIELDS.index("role")]
    carried = segment[roles == Role.CARRIED]
    assert (carried[:, FIELDS.index("learn")] == 0).all()
    first = segment[own][0]
    before = [turn for turn in turns if turn[0, 3] < first[3]]
    history = np.concatenate(before) if before else np.zeros((0, len(FIELDS)), int)
    everything = np.concatenate([history, first[None]])
    expected = everything[seen_by_last(everything)][:-1]
    facts = [FIELDS.index(name) for name in ("token", "turn", "episode", "plan")]
    np.testing.assert_array_equal(carried[:, facts], expected[:, facts])


def test_the_active_plan_is_carried_however_old_it_is(setting, words):
    plan = np.flatnonzero(setting.language.grammar.legal[3])[:3].tolist()
    turns = [words([300, 301], plan, "Noop")]
    turns += [words([400 + i] * 4, [], "Noop") for i in range(30)]
    fields = pack_all(setting, [turns])
    assert len(fields["token"]) > 2
    opening = setting.tokenizer.encode(setting.plan.open)
    closing = setting.tokenizer.encode(setting.plan.close)
    for tokens, roles in zip(fields["token"][1:], fields["role"][1:], strict=True):
        carried = tokens[roles == Role.CARRIED].tolist()
        text = [*opening, *plan, *closing]
        assert carried[: len(text)] == text
        assert 300 not in carried


def test_an_action_that_is_not_to_be_learnt_has_no_loss_but_its_plan_does(
    setting, words
):
    plan = np.flatnonzero(setting.language.grammar.legal[3])[:2].tolist()
    turn = words([300], plan, "Noop", learn=False)
    fields = pack_all(setting, [[turn]])
    learnt = fields["role"][fields["learn"] > 0].tolist()
    assert Role.ACTION not in learnt
    assert learnt.count(Role.PLAN) == 3  # two of text, and the choice to close
    assert learnt.count(Role.DECIDE) == 1
    silent = pack_all(setting, [[words([300], [], "Noop", learn=False)]])
    assert silent["learn"].sum() == 0


def test_advice_is_learnt_in_place_of_what_was_done(setting, words):
    encode = setting.tokenizer.encode
    done, better = encode("Dig Pit"), encode("Dig Well")
    shared = next(i for i in range(9) if done[i] != better[i])
    assert shared >= 1, "the two begin alike"

    def learnt(action, advice, plan=()):
        turn = words([300], list(plan), action, advice=advice)
        fields = pack_all(setting, [[turn]])
        places = fields["learn"] > 0
        assert fields["token"][fields["role"] > Role.OBSERVATION].tolist()[
            -len(encode(action)) :
        ] == encode(action), "what was done stays in sight"
        return fields["target"][places].tolist()

    assert learnt("Noop", "Dig Well") == encode("Dig Well")[:1]
    assert learnt("Dig Pit", "Noop") == encode("Noop")[:1]
    choices = learnt("Dig Pit", "")
    assert choices[-1] == done[shared]
    assert learnt("Dig Pit", "Dig Well") == [*choices[:-1], better[shared]]
    plan = np.flatnonzero(setting.language.grammar.legal[3])[:2].tolist()
    with_plan = learnt("Noop", "Dig Well", plan)
    assert with_plan[1:3] == plan
    assert with_plan[-1] == better[0]


def test_without_advice_the_targets_are_the_tokens(setting, words):
    plan = np.flatnonzero(setting.language.grammar.legal[3])[:2].tolist()
    turns = [words([300, 301], plan, "Dig Well"), words([302], [], "Noop")]
    fields = pack_all(setting, [turns])
    np.testing.assert_array_equal(fields["target"], fields["token"])


def test_a_turn_that_does_not_fit_is_refused(setting, words):
    with pytest.raises(ValueError, match=r"rollout\.segment_tokens=48 is too small"):
        pack_all(setting, [[words([300] * 45, [], "Noop")]])
    with pytest.raises(ValueError, match="what it can see takes 49 tokens"):
        pack_all(setting, [[words([300] * 22, [], "Noop")] * 2], history=3)


def test_a_turn_outside_the_grammar_is_refused(setting):
    turn = TurnTokens(
        observation=[300], generated=[301], plan_length=0, learn_action=True
    )
    with pytest.raises(ValueError, match=r"turn \[301\] is not in the plan grammar"):
        pack_all(setting, [[turn]])
