"""The relay against the student's own play, and the expert's own mind."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxplan.config.schema import (
    CollectConfig,
    MeshConfig,
    RelayConfig,
    RunConfig,
    SftConfig,
)
from jaxplan.core.mesh import make_mesh
from jaxplan.io.datasets import read_dataset
from jaxplan.io.stopping import StopRequest
from jaxplan.rollout.lanes import world_key
from jaxplan.rollout.schedule import episode_key, make_worlds
from jaxplan.train.collect import collect
from jaxplan.train.relay import RelayTeacher, Student
from jaxplan.train.scribe import Desk
from tests.train.test_collect import Guide

TURNS = 6


@pytest.fixture(scope="module")
def teacher(setting):
    """A student that plays by chance, on two lanes of the tests' world."""
    collected = CollectConfig(
        episodes=8, lanes=4, steps=9, plan_every=(2, 3), action_noise=0.0
    )
    config = RunConfig(
        collect=collected,
        plan=setting.plan,
        model=setting.model,
        rollout=setting.rollout,
        sft=SftConfig(updates=2000, relay=RelayConfig(episodes=8, turns=TURNS)),
    )
    desk = Desk(
        env=setting.env,
        tokenizer=setting.tokenizer,
        config=collected,
        seed=11,
        observation_tokens=12,
        plan_tokens=setting.plan.budget,
    )
    student = Student(
        load=lambda: setting.params.llama,
        mesh=make_mesh(MeshConfig()),
        language=setting.language,
        turn_tokens=setting.turn_tokens,
    )
    return RelayTeacher(Guide(), desk, student, config)


@pytest.fixture(scope="module")
def episodes(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("relay")
    tokenizer = teacher.scribe.desk.tokenizer
    about = {"tokenizer": tokenizer.sha256, "env": "shore", "text": "plain"}
    about |= {"teacher": "relay", "config": "{}"}
    collect(folder, teacher, about, lambda *_: None, StopRequest())
    rows = read_dataset(folder, tokenizer).to_pylist()
    return [[row for row in rows if row["episode"] == number] for number in range(8)]


def play_on(desk, number, actions):
    """Play actions in a trajectory's world by hand: what the expert said to each."""
    env, guide, seed = desk.env, Guide(), int(desk.world_seeds(number)[0])
    world = jax.tree.map(
        lambda leaf: leaf[0], make_worlds(env, jnp.array([seed], jnp.int32))
    )
    memory, said, turn, key = guide.init(), [], 0, episode_key(seed)
    step, act = jax.jit(env.step), jax.jit(guide.act)
    for env_step in range(desk.config.steps):
        memory, advised, _ = act(key, memory, world)
        passive = bool(env.passive(world))
        if not passive:
            if turn == len(actions):
                break
            said.append((env_step, int(advised), int(world.place)))
        action = 0 if passive else actions[turn]
        turn += not passive
        end = step(world_key(key, jnp.int32(env_step)), world, jnp.int32(action))
        world = end.state
        if end.terminated or end.truncated:
            break
    return said


def test_the_student_begins_and_the_expert_goes_on(teacher, episodes):
    desk = teacher.scribe.desk
    begun = 0
    for first in (0, 4):
        script = jax.device_get(teacher.script(first))
        for lane, turns in enumerate(script.turns.tolist()):
            rows = episodes[first + lane]
            actions = [row["action_id"] for row in rows]
            assert actions[:turns] == script.actions[lane, :turns].tolist()
            assert all(row["advice"] == "" for row in rows[turns:])
            begun += turns
            said = play_on(desk, first + lane, actions)
            assert [row["step"] for row in rows] == [step for step, *_ in said]
            for row, (_, advised, _) in zip(rows, said, strict=True):
                wanted = desk.env.action_names[advised]
                assert (row["advice"] or row["action"]) == wanted
    assert begun > 4, "the student did play"


def sleepy(setting):
    """The student, but for " Sleep" and " Move East", of which it says one a lot."""
    llama, encode = setting.params.llama, setting.tokenizer.encode
    one, other = (encode(name)[0] for name in ("Sleep", "Move East"))
    swapped = llama.embed[jnp.array([other, one])]
    return dataclasses.replace(
        llama, embed=llama.embed.at[jnp.array([one, other])].set(swapped)
    )


def test_the_student_is_followed_to_where_it_goes(teacher, setting):
    """What it does does not depend on where segments end, in its sleep or not."""

    def played(rounds):
        student = dataclasses.replace(teacher._student, load=lambda: sleepy(setting))
        rollout = dataclasses.replace(setting.rollout, num_lanes=4, rounds=rounds)
        config = dataclasses.replace(teacher._config, rollout=rollout)
        own = RelayTeacher(Guide(), teacher.scribe.desk, student, config)
        return own._play(0, TURNS)

    asleep = setting.env.action_names.index("Sleep")
    long, short = played(setting.rollout.rounds), played(5)
    assert sum(actions.count(asleep) for actions in long) > 4
    for ours, theirs in zip(long, short, strict=True):
        shared = min(len(ours), len(theirs), TURNS)
        assert shared > 0
        np.testing.assert_array_equal(ours[:shared], theirs[:shared])


def test_a_relay_ends_where_the_student_has_had_its_turns(teacher):
    script = jax.device_get(teacher.script(0))
    assert (script.turns < TURNS).all()
    assert not script.actions[:, TURNS:].any()
    begun = super(RelayTeacher, teacher).script(0)
    assert jax.tree.map(jnp.shape, script) == jax.tree.map(jnp.shape, begun), (
        "the expert would be compiled again"
    )
