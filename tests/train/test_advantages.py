"""Turn advantages against a slow loop, worked numbers and the laws of ppo.md."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from jaxplan.train.advantages import net_rewards, normalise, turn_gae

LANES, TURNS = 2, 6
SHAPE = (LANES, TURNS)
ELEMENTS = st.floats(-2, 2, width=32, allow_subnormal=False)
NUMBERS = npst.arrays(np.float32, SHAPE, elements=ELEMENTS)
COUNTS = npst.arrays(np.int32, SHAPE, elements=st.integers(0, 20))
MASKS = npst.arrays(np.bool_, SHAPE)
FRACTION = st.floats(0, 1, width=32, allow_subnormal=False)

gae = jax.jit(turn_gae)
net = jax.jit(net_rewards)
whiten = jax.jit(normalise, static_argnames="clip")


def slow_gae(rewards, discounts, values, complete, gae_lambda):
    """The recursion of ppo.md, section 3, one turn after the other."""
    advantages = np.zeros(rewards.shape)
    for lane in range(rewards.shape[0]):
        following = 0.0
        for turn in reversed(range(rewards.shape[1])):
            if not complete[lane, turn]:
                following = 0.0
                continue
            last = turn + 1 == rewards.shape[1]
            next_value = 0.0 if last else values[lane, turn + 1]
            discount = discounts[lane, turn]
            following = (
                rewards[lane, turn]
                + discount * next_value
                - values[lane, turn]
                + discount * gae_lambda * following
            )
            advantages[lane, turn] = following
    return advantages


@given(NUMBERS, npst.arrays(np.float32, SHAPE, elements=FRACTION), NUMBERS, MASKS)
def test_turn_advantages_are_those_of_a_slow_loop(rewards, discounts, values, complete):
    expected = slow_gae(rewards, discounts, values, complete, 0.95)
    actual = gae(rewards, discounts, values, complete, 0.95)
    np.testing.assert_allclose(actual, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("critic", "expected"),
    [
        (0.0, [0.5757, 0.6921, 0.8319, 0.9405, 1, 0, 0]),
        (0.1, [0.5330, 0.6441, 0.7776, 0.8813, 0.9381, -0.0647, -0.1]),
    ],
)
def test_the_estimators_table_of_the_formulation_is_reproduced(critic, expected):
    rewards = jnp.zeros((1, 20)).at[0, 9].set(1.0)
    discounts = jnp.full((1, 20), 0.99).at[0, 19].set(0.0)  # terminated at the end
    values = jnp.full((1, 20), critic)
    advantages = gae(rewards, discounts, values, jnp.ones((1, 20), bool), 0.95)
    shown = advantages[0, jnp.array([0, 3, 6, 8, 9, 10, 19])]
    np.testing.assert_allclose(shown, expected, atol=6e-5)


def worked(plan_cost, bootstrap):
    """Three turns worked by hand; ``bootstrap`` None: the episode terminated."""
    rewards = net_rewards(
        jnp.array([[0.0, 1.0, 0.0, 0.0]]),
        jnp.array([[5, 0, 10, 7]]),
        jnp.array([[True, False, True, True]]),
        plan_cost,
        0.0,
    )
    last = 0.0 if bootstrap is None else 0.9
    discounts = jnp.array([[0.9, 0.9, last, 0.9]])
    # Behind the last turn stands what it bootstraps on, or the next episode's turn.
    beyond = 0.6 if bootstrap is None else bootstrap
    values = jnp.array([[0.5, 0.4, 0.3, beyond]])
    complete = jnp.array([[True, True, True, False]])
    return turn_gae(rewards, discounts, values, complete, 0.8)[0, :3]


def test_a_terminated_episode_has_the_advantages_worked_by_hand():
    np.testing.assert_allclose(worked(0.01, None), [0.22904, 0.582, -0.4], atol=1e-6)


def test_a_truncated_episode_has_the_advantages_worked_by_hand():
    expected = [0.322352, 0.7116, -0.22]
    np.testing.assert_allclose(worked(0.01, 0.2), expected, atol=1e-6)


@pytest.mark.parametrize("bootstrap", [None, 0.2])
def test_the_price_of_plan_tokens_acts_as_worked_by_hand(bootstrap):
    slope = jax.jacobian(worked)(0.01, bootstrap)
    np.testing.assert_allclose(slope, [-10.184, -7.2, -10], rtol=1e-6)


@given(NUMBERS, COUNTS, MASKS)
def test_net_rewards_charge_tokens_and_calls(rewards, plan_tokens, planned):
    expected = rewards - 0.01 * plan_tokens.astype(float) - 0.2 * planned
    actual = net(rewards, plan_tokens, planned, 0.01, 0.2)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


@given(NUMBERS, COUNTS, MASKS)
def test_plans_that_cost_nothing_change_no_bit(rewards, plan_tokens, planned):
    free = net(rewards, plan_tokens, planned, jnp.float32(0.0), 0.0)
    assert np.array_equal(free, rewards)


def test_without_costs_a_longer_plan_changes_no_other_advantage():
    rewards = jnp.arange(12.0).reshape(SHAPE) / 10
    discounts, values = jnp.full(SHAPE, 0.9), jnp.full(SHAPE, 0.3)
    complete = jnp.ones(SHAPE, bool)

    def advantages(length):
        lengths = jnp.ones(SHAPE, jnp.int32).at[0, 2].set(length)
        priced = net_rewards(rewards, lengths, complete, 0.0, 0.0)
        return turn_gae(priced, discounts, values, complete, 0.95)

    np.testing.assert_array_equal(advantages(1), advantages(19))


def test_turns_without_reward_still_separate_turns():
    def first_advantage(idle_turns):
        rewards = jnp.zeros((1, TURNS)).at[0, idle_turns].set(1.0)
        discounts = jnp.full((1, TURNS), 0.9)
        everything = jnp.ones((1, TURNS), bool)
        return turn_gae(rewards, discounts, jnp.zeros((1, TURNS)), everything, 0.8)[
            0, 0
        ]

    for idle in range(TURNS):
        np.testing.assert_allclose(first_advantage(idle), 0.72**idle, rtol=1e-5)


def test_a_reward_gives_no_credit_to_later_turns():
    discounts, values = jnp.full((1, TURNS), 0.9), jnp.full((1, TURNS), 0.3)
    complete = jnp.ones((1, TURNS), bool)
    credit = jax.jacobian(lambda r: turn_gae(r, discounts, values, complete, 0.8)[0])(
        jnp.zeros((1, TURNS))
    )[:, 0]  # [advantage of turn, reward of turn]
    assert (np.tril(credit, -1) == 0).all()
    assert (np.diag(credit) == 1).all()


@pytest.mark.parametrize("gae_lambda", [0.8, 1.0])
def test_a_bootstrap_reaches_back_with_its_discounts(gae_lambda):
    discounts = jnp.full((1, TURNS), 0.9)
    complete = jnp.ones((1, TURNS), bool).at[0, -1].set(False)

    def advantages(bootstrap):
        values = jnp.zeros((1, TURNS)).at[0, -1].set(bootstrap)
        return turn_gae(jnp.zeros((1, TURNS)), discounts, values, complete, gae_lambda)

    shift = (advantages(0.5) - advantages(0.0))[0, -2::-1]
    back = np.arange(1, TURNS)  # 1 is the turn before the bootstrap
    np.testing.assert_allclose(
        shift, 0.9 * (0.9 * gae_lambda) ** (back - 1) * 0.5, rtol=1e-5
    )


@jax.jit
@jax.jacobian
def advantage_of_price(plan_cost, values, plan_tokens):
    planned, complete = plan_tokens > 0, jnp.ones(SHAPE, bool)
    rewards = net_rewards(values, plan_tokens, planned, plan_cost, 0.0)
    return turn_gae(rewards, jnp.full(SHAPE, 0.9), values, complete, 0.8)


@given(NUMBERS, COUNTS)
def test_the_cost_is_linear_in_its_price(values, plan_tokens):
    slope = advantage_of_price(jnp.float32(0.0), values, plan_tokens)
    expected = np.zeros(SHAPE)
    for turn in range(TURNS):
        for later in range(turn, TURNS):
            expected[:, turn] -= 0.72 ** (later - turn) * plan_tokens[:, later]
    np.testing.assert_allclose(slope, expected, rtol=1e-4, atol=1e-4)


def test_an_incomplete_turn_has_no_advantage_and_stops_the_credit():
    complete = jnp.ones((1, 4), bool).at[0, 2].set(False)
    values = jnp.array([[0.1, 0.2, 0.3, 0.4]])

    def advantages(rewards):
        return turn_gae(rewards, jnp.full((1, 4), 0.9), values, complete, 0.8)[0]

    early = advantages(jnp.zeros((1, 4)))
    late = advantages(jnp.array([[0.0, 0.0, 9.0, 9.0]]))
    assert early[2] == late[2] == 0
    np.testing.assert_array_equal(early[:2], late[:2])
    np.testing.assert_allclose(early[1], 0.9 * 0.3 - 0.2, rtol=1e-6)


@given(NUMBERS, MASKS)
def test_normalised_advantages_are_white_over_the_turns_that_count(advantages, mask):
    expected = np.zeros(SHAPE)
    if mask.any():
        kept = advantages[mask].astype(float)
        expected[mask] = (kept - kept.mean()) / (kept.std() + 1e-8)
    spread = np.ptp(advantages[mask]) if mask.any() else 0
    if spread == 0 or spread > 1e-2:  # between, float32 has no digits left
        actual = whiten(advantages, mask, clip=10.0)
        if spread:
            np.testing.assert_allclose(actual, expected, atol=2e-3)
        assert np.isfinite(actual).all()
        assert (actual[~mask] == 0).all()


def test_normalised_advantages_are_clipped():
    lonely = jnp.zeros((1, 1000)).at[0, 0].set(1.0)
    normal = normalise(lonely, jnp.ones((1, 1000), bool), 10.0)
    assert normal[0, 0] == 10
