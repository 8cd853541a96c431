"""The probes against their rules, written out episode by episode."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxplan.config.schema import EnvConfig, ExpertConfig, PlanConfig, ProbeConfig
from jaxplan.envs.base import Expert, TextEnv
from jaxplan.envs.probes import KINDS, STAKES, ProbeState, worth_planning
from jaxplan.envs.worlds import make_env, make_expert
from jaxplan.plan.grammar import make_grammar
from jaxplan.text.phrases import make_phrase_table, phrases_text
from jaxplan.text.tokenizer import load_tokenizer

CONFIG = EnvConfig(name="probe", probe=ProbeConfig(kinds=KINDS, delay=2), max_steps=9)
WORLD, EXPERT = make_env(CONFIG), make_expert(CONFIG)
KEY = jax.random.key(0)
step, describe = jax.jit(WORLD.step), jax.jit(WORLD.describe)
WEST, EAST = 0, 1


def start(kind, sign, stake=0):
    numbers = {"kind": KINDS.index(kind), "sign": sign, "stake": stake}
    fields = {name: jnp.int32(n) for name, n in numbers.items()}
    return ProbeState(**fields, first=jnp.int32(0), env_steps=jnp.int32(0))


def play(state, actions):
    """Rewards and texts of an episode that ends with the last of ``actions``."""
    rewards, texts = [], []
    for left, action in enumerate(actions, 1 - len(actions)):
        seen = describe(state)
        texts.append(
            phrases_text(WORLD.phrases, np.asarray(seen.ids), np.asarray(seen.mask))
        )
        result = step(KEY, state, jnp.int32(action))
        assert bool(result.terminated) == (left == 0)
        assert not bool(result.truncated)
        rewards.append(float(result.reward))
        state = result.state
    return rewards, texts


ONE_TURN = {
    "constant": lambda sign, action: 1,
    "observed": lambda sign, action: 1 if sign == EAST else -1,
    "action": lambda sign, action: 1 if action == WEST else -1,
    "both": lambda sign, action: 1 if action == sign else -1,
}


@pytest.mark.parametrize("kind", ONE_TURN)
def test_one_turn_pays_by_what_the_probe_is_named_for(kind):
    for sign, action in itertools.product((WEST, EAST), repeat=2):
        rewards, texts = play(start(kind, sign), [action])
        assert rewards == [ONE_TURN[kind](sign, action)]
        assert texts == [f" {KINDS.index(kind)}: {('west', 'east')[sign]}"]


def test_a_delayed_reward_is_for_the_first_action_alone():
    for actions in itertools.product((WEST, EAST), repeat=3):
        rewards, texts = play(start("delayed", EAST), actions)
        assert rewards == [0, 0, 1 if actions[0] == WEST else -1]
        assert texts == [" 2: east", " 2:", " 2:"]


def test_the_stake_is_earned_by_following_the_sign_that_is_gone():
    words = ("wood", "stone", "iron", "diamond")
    for sign, stake, *actions in itertools.product((0, 1), range(4), (0, 1), (0, 1)):
        rewards, texts = play(start("plan", sign, stake), actions)
        expected = STAKES[stake] if actions[1] == sign else -STAKES[stake]
        np.testing.assert_allclose(rewards, [0, expected], rtol=1e-6)
        way = ("west", "east")[sign]
        assert texts == [f" 5: {words[stake]} {way}", f" 5: {words[stake]}"]


def test_a_time_limit_truncates_and_pays_nothing():
    short = make_env(dataclasses.replace(CONFIG, max_steps=1))
    for kind in ("delayed", "plan"):
        result = short.step(KEY, start(kind, EAST), jnp.int32(WEST))
        assert bool(result.truncated)
        assert not bool(result.terminated)
        assert float(result.reward) == 0


def test_worlds_are_drawn_evenly_from_the_kinds_asked_for():
    kinds = ("both", "plan")
    world = make_env(dataclasses.replace(CONFIG, probe=ProbeConfig(kinds=kinds)))
    drawn = jax.device_get(jax.vmap(world.reset)(jax.random.split(KEY, 1600)))
    cases = np.stack([drawn.kind, drawn.sign, drawn.stake], axis=1)
    numbers = [KINDS.index(kind) for kind in kinds]
    for case in itertools.product(numbers, (WEST, EAST), range(4)):
        assert 60 < (cases == case).all(axis=1).sum() < 140  # of 100, sigma 10
    assert not drawn.env_steps.any()


def test_a_plan_pays_for_the_stakes_above_its_price():
    stakes = jnp.arange(4)
    for price, paying in ((0.0, 4), (0.7, 3), (1.4, 2), (2.2, 1), (2.6, 0)):
        pays = np.asarray(worth_planning(stakes, price, gamma=0.9))
        assert pays.tolist() == [False] * (4 - paying) + [True] * paying


def test_the_expert_earns_all_there_is_and_says_where_it_goes():
    for kind, sign in itertools.product(KINDS, (WEST, EAST)):
        state, memory, over = start(kind, sign, stake=2), EXPERT.init(), False
        while not over:
            memory, action, intent = EXPERT.act(KEY, memory, state)
            said = EXPERT.say(KEY, intent, jnp.int32(0))
            assert EXPERT.phrases[int(said.ids[0])] == f" {('west', 'east')[action]}"
            assert int(intent.goal) == int(action)
            result = step(KEY, state, action)
            state, over = result.state, bool(result.terminated)
        best = {"plan": STAKES[2], "observed": 1 if sign == EAST else -1}
        assert float(result.reward) == pytest.approx(best.get(kind, 1))


def test_texts_plans_and_actions_take_a_token_a_word():
    tokenizer = load_tokenizer("shipped")
    table = make_phrase_table(tokenizer, (*WORLD.phrases, *EXPERT.phrases))
    assert (np.asarray(table.lengths) == 1).all()
    make_grammar(tokenizer, WORLD.action_names, PlanConfig())
    assert all(len(tokenizer.encode(name)) == 1 for name in WORLD.action_names)


def test_it_offers_what_a_world_and_a_player_have_to():
    assert isinstance(WORLD, TextEnv)
    assert isinstance(EXPERT, Expert)
    assert not WORLD.passive(start("plan", EAST))


def test_what_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"env.text='balrog': .* allowed: 'compact'"):
        make_env(dataclasses.replace(CONFIG, text="balrog"))
    with pytest.raises(ValueError, match="knows one way to play; leave out errors"):
        make_expert(CONFIG, ExpertConfig(errors=0.5))
    with pytest.raises(ValueError, match=r"kinds=\(\): an episode needs a probe"):
        ProbeConfig(kinds=())
