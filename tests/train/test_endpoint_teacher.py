"""A real HTTP server with our own engine behind it, asked by the real client."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxplan.config.schema import CollectConfig, EndpointConfig, PlanConfig
from jaxplan.io.datasets import read_dataset
from jaxplan.io.stopping import Stopped, StopRequest
from jaxplan.plan.prompts import ACT, NEVER, PLAN, STYLE_PROMPTS
from jaxplan.rollout.lanes import world_key
from jaxplan.rollout.schedule import episode_key, make_worlds
from jaxplan.text.phrases import phrases_text
from jaxplan.train.collect import collect
from jaxplan.train.endpoint_teacher import (
    EndpointError,
    EndpointTeacher,
    _Conversation,
    read_answer,
    read_journal,
)
from jaxplan.train.scribe import Desk
from tests.engine_server import EngineServer
from tests.fakes import Shore

CONFIG = CollectConfig(
    teacher="endpoint", episodes=4, lanes=4, steps=7, plan_every=(2, 3)
)
TAGS = PlanConfig()


@pytest.mark.parametrize(
    ("text", "plan", "action"),
    [
        ("Move West", "", 1),
        ("<plan>go home</plan>\nMove West", "go home", 1),
        ("<plan>\nNoop first,\n then rest</plan> Sleep.", "Noop first, then rest", 3),
        ("I will move east", "", 2),
        ("Noop? No: Dig Well", "", 5),  # the last one counts
        ("dig pitfall", "", None),
        ("<plan>Move West</plan>", "Move West", None),
        ("", "", None),
        ("<plan>a < b > c\u200b</plan>Sleep", "a b c", 3),
        ("<plan>no end Sleep", "", 3),
    ],
)
def test_answers_are_taken_apart(text, plan, action):
    assert read_answer(text, TAGS, Shore().action_names) == (plan, action)


def test_a_conversation_is_a_window_with_one_plan():
    talk = _Conversation(TAGS, Shore(), history=3)
    asked = []
    says = [
        "<plan>one</plan>Move East",
        "Sleep",
        "<plan>two</plan>Noop",
        "what?",
        "Noop",
    ]
    for number, text in enumerate(says):
        asked.append(talk.ask(f"\nsee {number}", "go"))
        talk.hear(text, may_plan=True)
    assert asked[0] == [
        {"role": "system", "content": "You walk."},
        {"role": "user", "content": "see 0\n\ngo"},
    ]
    assert [message["content"] for message in asked[2]] == [
        "You walk.",
        "see 0",
        "<plan> one </plan>\nMove East",
        "see 1",
        "Sleep",
        "see 2\n\ngo",
    ]
    assert [message["content"] for message in asked[3]] == [
        "You walk.",
        "see 1",
        "Sleep",
        "see 2",
        "<plan> two </plan>\nNoop",
        "see 3\n\ngo",
    ]
    warning = "Your previous output did not contain a valid action. "
    warning += "Defaulted to action: Noop"
    assert asked[4][-1]["content"] == f"{warning}\n\nsee 4\n\ngo"
    for number in (5, 6):
        last = talk.ask(f"see {number}", "go")
        talk.hear("Sleep", may_plan=True)
    assert last[-1]["content"] == "Previous plan:\n two\n\nsee 6\n\ngo"
    assert not any("two" in message["content"] for message in last[:-1])


def test_a_plan_nobody_asked_for_is_dropped():
    talk = _Conversation(TAGS, Shore(), history=2)
    talk.ask("see", "go")
    turn = talk.hear("<plan>one</plan>Sleep", may_plan=False)
    assert (turn.plan, turn.action, turn.learn) == ("", 3, True)


def test_a_journal_forgets_a_torn_line(tmp_path):
    path = tmp_path / "000000.jsonl"
    whole = '{"text": "Sleep", "tokens": 3}\n'
    path.write_text(whole + '{"text": "No')
    (answer,) = read_journal(path)
    assert (answer.text, answer.tokens) == ("Sleep", 3)
    assert path.read_text() == whole
    assert read_journal(tmp_path / "none.jsonl") == []


@pytest.fixture(scope="module")
def desk(setting):
    return Desk(
        env=Shore(max_steps=CONFIG.steps),
        tokenizer=setting.tokenizer,
        config=CONFIG,
        seed=3,
        observation_tokens=12,
        plan_tokens=6,
    )


def run(directory, desk, setting, server, stop=None, config=CONFIG, **endpoint):
    teacher = EndpointTeacher(
        EndpointConfig(url=server.url, **{"retries": 2, "history": 3, **endpoint}),
        setting.plan,
        dataclasses.replace(desk, config=config, env=Shore(max_steps=config.steps)),
        directory / "answers",
        stop or StopRequest(),
    )
    about = {"tokenizer": desk.tokenizer.sha256, "env": "shore", "text": "plain"}
    about |= {"teacher": "endpoint", "config": "{}"}
    card = collect(
        directory / "dataset",
        teacher,
        about,
        lambda *_: None,
        stop or StopRequest(),
    )
    return card, read_dataset(directory / "dataset", desk.tokenizer)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, desk, setting):
    """A collection that nothing disturbed, and the server that answered it."""
    with EngineServer(setting, pause=0.02) as server:
        card, table = run(tmp_path_factory.mktemp("whole"), desk, setting, server)
    return server, card, table


def test_what_was_answered_is_what_was_played(whole, desk, setting):
    server, card, table = whole
    rows = table.to_pylist()
    assert len(rows) == len(server.requests) == card["turns"]
    names, env_step = desk.env.action_names, jax.jit(desk.env.step)
    for number in range(CONFIG.episodes):
        seed = int(np.random.default_rng([3, number]).integers(2**24, 2**30))
        world = make_worlds(desk.env, jnp.array([seed], jnp.int32))
        world = jax.tree.map(lambda leaf: leaf[0], world)
        key, step, over = episode_key(seed), 0, False
        for row in [row for row in rows if row["episode"] == number]:
            assert not over
            seen = desk.env.describe(world)
            text = phrases_text(
                desk.env.phrases, np.asarray(seen.ids), np.asarray(seen.mask)
            )
            assert row["observation"] == text
            assert row["step"] == step
            reward, asleep = 0.0, True
            while asleep and not over:
                done = env_step(
                    world_key(key, jnp.int32(step)), world, jnp.int32(row["action_id"])
                )
                world, step = done.state, step + 1
                reward += float(done.reward)
                over = bool(done.terminated | done.truncated)
                asleep = bool(desk.env.passive(world))
            np.testing.assert_allclose(row["reward"], reward, rtol=1e-5)
            assert row["action"] == names[row["action_id"]]
        assert over


def test_every_turn_was_asked_for_as_its_number_says(whole, desk, setting):
    server, _, table = whole
    prompts = {request["messages"][-1]["content"] for request in server.requests}
    opening = PLAN.replace("{open}", "{plan}").replace("{close}", "<end>")
    assert any(prompt.endswith(opening) for prompt in prompts)
    assert any(prompt.endswith(ACT) for prompt in prompts)
    every = {number: desk.plan_turns(number)[0] for number in range(CONFIG.episodes)}
    answers = [
        server.answers[json.dumps(request["messages"])]
        for request in server.requests
        if request["messages"][-1]["content"].endswith(opening)
    ]
    names = desk.env.action_names
    wanted = sum(read_answer(text, setting.plan, names)[0] != "" for text in answers)
    planned = 0
    for row in table.to_pylist():
        if row["turn"] % every[row["episode"]]:
            assert row["plan"] == ""
        planned += row["plan"] != ""
        assert row["plan_tokens"] == desk.tokenizer.encode(row["plan"])[:6]
    assert planned == wanted > 0, "all plans that were asked for, and no others"


def test_episodes_are_played_side_by_side(whole):
    assert whole[0].most_at_once > 1


def test_what_was_paid_is_told(whole):
    server, card, _ = whole
    assert card["spent_tokens"] > 10 * len(server.requests)


def test_failures_and_time_outs_are_tried_again(tmp_path, desk, setting, whole):
    sleeps = [0.0, 0.0, 0.0, 2.5]
    with EngineServer(setting, failures=2, sleeps=sleeps) as server:
        _, table = run(tmp_path, desk, setting, server, timeout_seconds=1.5)
    assert len(server.requests) >= len(whole[0].requests) + 3
    assert table.equals(whole[2])


def test_a_server_that_is_not_there_is_named(tmp_path, desk, setting, whole):
    with EngineServer(setting) as server:
        pass
    with pytest.raises(EndpointError, match=r"collect\.endpoint\.url=http://127"):
        run(tmp_path, desk, setting, server, retries=0)


def test_a_spent_budget_ends_it_and_a_larger_one_goes_on(
    tmp_path, desk, setting, whole
):
    undisturbed, card, expected = whole
    budget = card["spent_tokens"] // 2
    with EngineServer(setting) as server:
        with pytest.raises(EndpointError, match="are spent"):
            run(tmp_path, desk, setting, server, budget_tokens=budget)
        assert not (tmp_path / "dataset" / "card.json").exists()
        asked = len(server.requests)
        assert 0 < asked < len(undisturbed.requests)
        _, table = run(tmp_path, desk, setting, server)
    assert table.equals(expected)
    lost = len(server.requests) - len(undisturbed.requests)
    assert 0 <= lost <= CONFIG.lanes  # what was under way when the budget was spent


class StopAtOnce(StopRequest):
    def __init__(self):
        self._asked = True


def test_whoever_asks_stops_it_before_the_next_request(tmp_path, desk, setting, whole):
    with EngineServer(setting) as server, pytest.raises(Stopped):
        run(tmp_path, desk, setting, server, stop=StopAtOnce())
    assert not server.requests


@pytest.mark.parametrize("prompting", ["never", "every"])
def test_prompts_are_those_of_the_paper(tmp_path, desk, setting, prompting, whole):
    styles = ("milestone", "next_steps") if prompting == "every" else ()
    config = dataclasses.replace(
        CONFIG, prompting=prompting, styles=styles, steps=2, plan_every=(1, 1)
    )
    with EngineServer(setting) as server:
        _, table = run(tmp_path, desk, setting, server, config=config)
    asked = {json.dumps(r["messages"][-1]["content"]) for r in server.requests}
    if prompting == "never":
        assert all(NEVER in text for text in asked)
        assert not any(table["plan"].to_pylist())
        assert set(table["style"].to_pylist()) == {"never"}
    else:
        used = [s for s in STYLE_PROMPTS if any(
            STYLE_PROMPTS[s].split("{open}")[0] in text for text in asked
        )]  # fmt: skip
        assert set(used) == set(table["style"].to_pylist()) <= set(styles)


def test_a_style_that_nobody_can_be_asked_for_is_refused(tmp_path, desk, setting):
    config = dataclasses.replace(CONFIG, styles=("terse",))
    with pytest.raises(ValueError, match="'terse' is no style"):
        EndpointTeacher(
            EndpointConfig(),
            setting.plan,
            dataclasses.replace(desk, config=config),
            tmp_path / "answers",
            StopRequest(),
        )
