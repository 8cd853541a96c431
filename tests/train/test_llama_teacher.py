"""A tiny Llama teaches: its turns are the dataset, its plans come when they must."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxplan.config.schema import (
    CollectConfig,
    MeshConfig,
    RolloutConfig,
    RunConfig,
)
from jaxplan.core.mesh import make_mesh
from jaxplan.core.roles import Role
from jaxplan.io.datasets import read_dataset
from jaxplan.io.stopping import StopRequest
from jaxplan.plan.grammar import DYNAMIC, NEVER
from jaxplan.plan.prompts import STYLE_PROMPTS
from jaxplan.train.collect import collect
from jaxplan.train.llama_teacher import LlamaTeacher, prompt_of
from jaxplan.train.scribe import Desk
from tests.fakes import Shore

CONFIG = CollectConfig(
    teacher="llama",
    episodes=6,
    lanes=4,
    steps=8,
    plan_every=(2, 3),
    styles=("milestone", "next_steps"),
)
ROLLOUT = RolloutConfig(
    segment_tokens=384,
    rounds=12,
    decode_steps=3,
    prefill_tokens=24,
    history=2,
    observation_tokens=8,
)


@pytest.fixture(scope="module")
def desk(setting):
    return Desk(
        env=Shore(max_steps=CONFIG.steps),
        tokenizer=setting.tokenizer,
        config=CONFIG,
        seed=5,
        observation_tokens=8,
        plan_tokens=setting.plan.budget,
    )


def make(desk, setting, rollout=ROLLOUT, **changes):
    desk = dataclasses.replace(desk, config=dataclasses.replace(CONFIG, **changes))
    config = RunConfig(plan=setting.plan, model=setting.model, rollout=rollout)
    mesh = make_mesh(MeshConfig())
    return LlamaTeacher(lambda: setting.params, mesh, config, desk)


def run(directory, teacher):
    tokenizer = teacher.scribe.desk.tokenizer
    about = {"tokenizer": tokenizer.sha256, "env": "shore", "text": "plain"}
    about |= {"teacher": "llama", "config": "{}"}
    collect(directory, teacher, about, lambda *_: None, StopRequest())
    return read_dataset(directory, tokenizer).to_pylist()


@pytest.fixture(scope="module")
def rows(tmp_path_factory, desk, setting):
    return run(tmp_path_factory.mktemp("llama"), make(desk, setting))


def test_plans_come_in_every_kth_turn_and_in_no_other(rows, desk):
    assert {row["episode"] for row in rows} == set(range(CONFIG.episodes))
    for row in rows:
        due = row["turn"] % desk.plan_turns(row["episode"])[0] == 0
        assert (row["plan"] != "") == due
        assert row["learn"]
        assert row["style"] == desk.style(row["episode"], ())
    assert {row["style"] for row in rows} == set(CONFIG.styles)


def test_what_is_written_down_is_what_the_engine_played(rows, desk, setting):
    """The rollout's own account of the first batch, turn by turn and in sum."""
    teacher = make(desk, setting)
    segments = teacher.play(0)
    returns, turns = {}, {}
    for segment in segments:
        ends = segment.episodes
        for place in np.argwhere(ends.finished):
            stats = jax.tree.map(lambda a, at=tuple(place): a[at], ends.stats)
            returns[int(place[1])] = float(stats.task_return)
            turns[int(place[1])] = int(stats.turns)
    for lane in range(CONFIG.lanes):
        own = [row for row in rows if row["episode"] == lane]
        assert len(own) == turns[lane]
        total = sum(row["reward"] for row in own)
        np.testing.assert_allclose(total, returns[lane], rtol=1e-4)


def test_every_lane_reads_its_own_prompt(desk, setting):
    teacher = make(desk, setting)
    carry = teacher._start(0, teacher._schedule(0))
    tokens, cursor = carry.stream.tokens, np.asarray(carry.stream.cursor)
    styles = set()
    for lane in range(CONFIG.lanes):
        style = desk.style(lane, ())
        prompt = STYLE_PROMPTS[style].replace("{open}", "{plan}")
        text = "You walk.\n\n" + prompt.replace("{close}", "<end>")
        ids = desk.tokenizer.encode(text)
        assert cursor[lane] == len(ids)
        assert tokens.token[lane, : len(ids)].tolist() == ids
        roles = np.asarray(tokens.role[lane])
        assert (roles[: len(ids)] == Role.PROMPT).all()
        assert (roles[len(ids) :] == Role.PAD).all()
        styles.add(style)
    assert styles == set(CONFIG.styles)


@pytest.mark.parametrize(
    ("prompting", "mode"), [("never", NEVER), ("dynamic", DYNAMIC)]
)
def test_the_frequency_is_forced_by_the_grammar(
    tmp_path, desk, setting, prompting, mode
):
    teacher = make(desk, setting, prompting=prompting, episodes=4)
    assert set(np.unique(teacher._schedule(0).mode)) == {mode}
    rows = run(tmp_path, teacher)
    planned = [row["plan"] != "" for row in rows]
    assert not all(planned)  # as they would in turn 0 of every-k
    assert not (prompting == "never" and any(planned))
    assert {row["style"] for row in rows} == {prompting}
    config = dataclasses.replace(CONFIG, prompting=prompting)
    asked, _ = prompt_of(dataclasses.replace(desk, config=config), 0, setting.plan)
    assert ("{plan}" in asked) == (prompting == "dynamic")


def test_prompts_that_do_not_fit_a_segment_are_refused(desk, setting):
    short = dataclasses.replace(ROLLOUT, segment_tokens=96)
    with pytest.raises(ValueError, match=r"segment_tokens=96 is too small"):
        make(desk, setting, rollout=short)
