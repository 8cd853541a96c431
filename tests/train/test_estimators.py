"""Estimators against the tables of ppo.md, section 9, and their equivalences."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxplan.config.schema import PpoConfig
from jaxplan.core.roles import Span
from jaxplan.rollout.lanes import TurnEnd
from jaxplan.train.advantages import net_rewards
from jaxplan.train.estimators import ESTIMATORS, Play, plan_tokens_answered_for

TURNS, OBSERVED, SAMPLED = 20, 150, 8
SHOWN = [0, 3, 6, 8, 9, 10, 19]
GAMMA = 0.99
CONFIG = PpoConfig(gamma=GAMMA, gae_lambda=0.95)


@partial(jax.jit, static_argnames=("name", "config"))
def token_credit(play, plan_cost, name, config):
    return ESTIMATORS[name](play, plan_cost, config).tokens[0]


def play_of(critic, rewards, observed, sampled, text=None, plan_cost=0.0):
    """One lane whose turns have so many tokens each, terminated at the end.

    Args:
        critic: value of every state.
        rewards: of the turns.
        observed: tokens of every observation.
        sampled: tokens of each turn.
        text: plan-text tokens of each turn, from its second token on.
        plan_cost: what each of them costs.
    """
    turns, stream, position, slot, starts = len(sampled), [], [], [], []
    text = np.zeros(turns, int) if text is None else text
    for number, (count, plan) in enumerate(zip(sampled, text, strict=True)):
        stream += [Span.NONE] * observed
        starts.append(len(stream))
        position += range(len(stream), len(stream) + count)
        slot += [number] * count
        spans = [Span.TAG] + [Span.PLAN] * plan + [Span.ACTION] * count
        stream += spans[:count]
    counts = jnp.asarray([*text, 0], jnp.int32)[None]
    reward = jnp.asarray([*rewards, 0], jnp.float32)[None]
    discount = jnp.full((1, turns + 1), GAMMA).at[0, turns - 1].set(0.0)
    end = TurnEnd(
        complete=jnp.arange(turns + 1)[None] < turns,
        reward=reward,
        discount=discount,
        plan_tokens=counts,
        planned=counts > 0,
        action=0 * counts,
    )
    flat = jnp.zeros((1, len(position)))
    return Play(
        counted=flat == 0,
        position=jnp.asarray(position, jnp.int32)[None],
        slot=jnp.asarray(slot, jnp.int32)[None],
        log_prob=flat - 0.5,
        is_action=flat == 0,
        token_values=flat + critic,
        starts=jnp.asarray([*starts, len(stream) + 1], jnp.int32)[None],
        end=end,
        rewards=net_rewards(reward, counts, counts > 0, plan_cost, 0.0),
        values=jnp.full((1, turns + 1), critic),
        span=jnp.asarray([*stream, 0, 0], jnp.int32)[None],
    )


def table_play(critic, observed=OBSERVED):
    return play_of(critic, np.eye(TURNS)[9], observed, [SAMPLED] * TURNS)


def firsts(play, name, config=CONFIG):
    """Advantages at the first sampled token of every turn."""
    advantages = token_credit(play, jnp.float32(0), name, config)
    first = np.unique(np.asarray(play.slot[0]), return_index=True)[1]
    return np.asarray(advantages)[first]


ZERO = {
    "turn": [0.5757, 0.6921, 0.8319, 0.9405, 1, 0, 0],
    "smdp": [0.5757, 0.6921, 0.8319, 0.9405, 1, 0, 0],
    "token_gae": [0.0079, 0.0343, 0.1493, 0.3985, 0.6509, 0, 0],
    "bilevel": [0.0079, 0.0343, 0.1493, 0.3985, 0.6509, 0, 0],
    "token_gae_through_obs": [0, 0, 0, 0, 0.6509, 0, 0],
    "row_return": [0.6509] * 7,
}
CONSTANT = {
    "turn": [0.5330, 0.6441, 0.7776, 0.8813, 0.9381, -0.0647, -0.1],
    "token_gae": [-0.0090, 0.0174, 0.1324, 0.3814, 0.6337, -0.0175, -0.0710],
    "token_gae_through_obs": [*[-0.0710] * 3, -0.0709, 0.5799, -0.0710, -0.0710],
    "bilevel": [-0.0096, 0.0146, 0.1201, 0.3485, 0.5799, -0.0175, -0.0710],
    "row_return": [0.5799] * 7,
}


@pytest.mark.parametrize("name", ZERO)
def test_without_a_critic_credit_is_that_of_the_table(name):
    found = firsts(table_play(0.0), name)[SHOWN]
    np.testing.assert_allclose(found, ZERO[name], atol=6e-5)


@pytest.mark.parametrize("name", CONSTANT)
def test_with_a_constant_critic_credit_is_that_of_the_table(name):
    found = firsts(table_play(0.1), name)[SHOWN]
    np.testing.assert_allclose(found, CONSTANT[name], atol=6e-5)


def test_a_lambda_inside_turns_punishes_their_length_as_in_the_table():
    config = dataclasses.replace(CONFIG, gae_lambda_token=0.95)
    found = firsts(table_play(0.0), "smdp", config)[SHOWN]
    expected = [0.0159, 0.0561, 0.1979, 0.4587, 0.6983, 0, 0]
    np.testing.assert_allclose(found, expected, atol=6e-5)


def test_observations_with_values_of_their_own_are_tokens_like_any_other():
    """SkyRL and slime: every token of the stream is a step with its value."""
    length = OBSERVED + SAMPLED
    play = play_of(0.1, np.eye(TURNS)[9], 0, [length] * TURNS)
    found = token_credit(play, jnp.float32(0), "token_gae", CONFIG)
    first = np.asarray(found)[OBSERVED::length][SHOWN]
    expected = [*[-0.0168] * 4, 0.6341, -0.0168, -0.0710]
    np.testing.assert_allclose(first, expected, atol=6e-5)


@pytest.mark.parametrize("name", sorted(set(ZERO) - {"row_return"}))
def test_without_discounts_all_recursions_agree(name):
    undiscounted = dataclasses.replace(CONFIG, gamma=1.0, gae_lambda=1.0)
    play = table_play(0.0)
    end = dataclasses.replace(
        play.end, discount=jnp.where(play.end.discount > 0, 1.0, 0.0)
    )
    found = firsts(dataclasses.replace(play, end=end), name, undiscounted)
    np.testing.assert_allclose(found, np.arange(TURNS) <= 9, atol=1e-5)


@pytest.mark.parametrize("name", ["turn", "smdp", "token_gae", "bilevel", "row_return"])
def test_longer_observations_change_no_advantage(name):
    short, long = (firsts(table_play(0.1, n), name) for n in (3, OBSERVED))
    np.testing.assert_allclose(short, long, atol=1e-6)


def ragged_play(plan_cost, plan_of_second=2):
    chance = np.random.default_rng(0)
    rewards, text = chance.normal(size=5), np.array([3, plan_of_second, 0, 1, 4])
    play = play_of(0.0, rewards, 4, text + 3, text, plan_cost)
    values = jnp.asarray(chance.normal(size=play.values.shape), jnp.float32)
    inside = chance.normal(size=200)[: play.slot.shape[1]]
    first = np.append(True, np.diff(np.asarray(play.slot[0])) > 0)
    at_turn = np.asarray(values)[0, np.asarray(play.slot[0])]
    tokens = np.where(first, at_turn, inside).astype(np.float32)
    return dataclasses.replace(
        play, values=values, token_values=jnp.asarray(tokens)[None]
    ), text


def test_values_and_costs_inside_a_turn_leave_its_first_advantage_alone():
    play, _ = ragged_play(0.03)
    config = dataclasses.replace(CONFIG, gamma=GAMMA)
    by_turn = firsts(play, "turn", config)
    advantages = token_credit(play, jnp.float32(0.03), "smdp", config)
    first = np.unique(np.asarray(play.slot[0]), return_index=True)[1]
    np.testing.assert_allclose(np.asarray(advantages)[first], by_turn, atol=1e-5)


def test_plan_tokens_are_answered_for_by_the_sampled_token_before_them():
    plain, text = Span.NONE, Span.PLAN
    span = jnp.array(
        [[plain, Span.TAG, text, text, Span.TAG, plain, text, text, plain]]
    )
    position = jnp.array([[1, 2, 4, 7, 0]])  # the text at 3 and 6 is forced
    slot = jnp.array([[0, 0, 0, 1, 0]])
    starts = jnp.array([[1, 6, 8]])
    found = plan_tokens_answered_for(span, position, slot, starts)
    assert found[0, :4].tolist() == [0, 2, 0, 2]


def test_a_turn_in_which_nothing_is_sampled_is_a_node_with_its_own_value():
    play, _ = ragged_play(0.0)
    silent = dataclasses.replace(play, counted=play.counted & (play.slot != 2))
    config = dataclasses.replace(CONFIG, gamma=GAMMA)
    expected = firsts(silent, "turn", config)
    found = firsts(silent, "smdp", config)
    assert expected[2] == found[2] == 0
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("name", ["smdp", "token_gae", "token_gae_through_obs"])
def test_an_unfinished_turn_is_bootstrapped_on_and_gets_no_credit(name):
    play, _ = ragged_play(0.0)
    complete = play.end.complete.at[0, 3].set(False)
    cut = dataclasses.replace(
        play,
        end=dataclasses.replace(play.end, complete=complete),
        counted=play.counted & (play.slot != 3),
    )
    config = dataclasses.replace(CONFIG, gamma=GAMMA)
    before = token_credit(cut, jnp.float32(0), name, config)
    richer = dataclasses.replace(cut.end, reward=cut.end.reward.at[0, 4].add(9.0))
    later = dataclasses.replace(cut, rewards=cut.rewards.at[0, 4].add(9), end=richer)
    after = token_credit(later, jnp.float32(0), name, config)
    early = np.asarray(play.slot[0]) < 3
    np.testing.assert_array_equal(before[early], after[early])
    last = np.flatnonzero(np.asarray(play.slot[0]) == 2)[-1]
    fading = (GAMMA * 0.95) ** 4 if name.endswith("obs") else 1.0
    delta = play.end.reward[0, 2] + GAMMA * fading * play.values[0, 3]
    np.testing.assert_allclose(
        before[last], delta - play.token_values[0, last], atol=1e-5
    )


def test_group_scores_are_of_whole_episodes():
    play = play_of(0.0, [1.0, 2.0, 0.0, 5.0, 1.0], 2, [2] * 5)
    discount = play.end.discount.at[0, 1].set(0.0)  # episodes of 2 and of 3 turns
    end = dataclasses.replace(play.end, discount=discount)
    found = firsts(dataclasses.replace(play, end=end), "grpo")
    np.testing.assert_allclose(found, [-1, -1, 1, 1, 1], atol=1e-5)


def test_confidence_weighs_turns_by_their_least_sure_action_token():
    play = play_of(0.0, [1.0, 2.0, 0.0, 5.0], 2, [2] * 4)
    end = dataclasses.replace(play.end, discount=play.end.discount.at[0, 1].set(0.0))
    log_prob = jnp.log(jnp.array([[0.9, 0.2, 0.6, 0.9, 0.4, 0.9, 0.9, 0.9]]))
    play = dataclasses.replace(play, end=end, log_prob=log_prob)
    stretched = (np.array([0.2, 0.6, 0.4, 0.9]) - 0.2) / 0.7
    weight = np.exp(2 * stretched) / np.exp(2 * stretched).mean()
    found = firsts(play, "confidence_weighted")
    np.testing.assert_allclose(found, [-1, -1, 1, 1] * weight, rtol=1e-4)
