"""The policy's loss by hand, against a numpy loop, and its invariances."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from jaxplan.config.schema import PpoConfig, RoleCoefficients
from jaxplan.train.decisions import RoleMasks, Scores
from jaxplan.train.losses import (
    ROLES,
    Sampler,
    clipped_surrogate,
    clipped_value_loss,
    explained_variance,
    format_loss,
    policy_loss,
    reference_kl,
    value_loss,
)

SHAPE = (2, 6)
SURE = 0.999  # of a decision at most, for float32 to know the rest
LOG_PROBS = npst.arrays(
    np.float32, SHAPE, elements=st.floats(-4, 0, width=32, allow_subnormal=False)
)
NUMBERS = npst.arrays(
    np.float32, SHAPE, elements=st.floats(-3, 3, width=32, allow_subnormal=False)
)
MASKS = npst.arrays(np.bool_, SHAPE)

surrogate = jax.jit(clipped_surrogate, static_argnums=(2, 3, 4))
plain_kl = jax.jit(reference_kl)


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [
        (1.0, 2.0, 2.0),
        (1.5, 2.0, 2.4),  # clipped from above
        (0.5, 2.0, 1.0),  # worse than before: not clipped
        (0.5, -2.0, -1.6),  # clipped from below
        (1.5, -2.0, -3.0),  # worse than before: not clipped
        (9.0, -2.0, -6.0),  # the floor of the dual clip
        (9.0, 2.0, 2.4),
        (9.0, 0.0, 0.0),
    ],
)
def test_the_clipped_objective_is_that_worked_by_hand(ratio, advantage, expected):
    log_ratio, advantages = jnp.log(jnp.array([[ratio]])), jnp.array([[advantage]])
    actual = clipped_surrogate(log_ratio, advantages, 0.2, 0.2, 3.0)
    np.testing.assert_allclose(actual[0, 0], expected, rtol=1e-6)


@given(NUMBERS, NUMBERS)
def test_the_clipped_objective_is_that_of_a_slow_loop(log_ratio, advantages):
    expected = np.zeros(SHAPE)
    for place in np.ndindex(*SHAPE):
        ratio, gain = np.exp(float(log_ratio[place])), float(advantages[place])
        clipped = min(max(ratio, 0.8), 1.28)
        objective = min(ratio * gain, clipped * gain)
        expected[place] = max(objective, 3.0 * gain) if gain < 0 else objective
    actual = surrogate(log_ratio, advantages, 0.2, 0.28, 3.0)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


@given(LOG_PROBS, LOG_PROBS)
def test_the_reference_kl_has_the_value_of_k3_and_the_gradient_of_k2(ours, reference):
    difference = reference.astype(float) - ours
    value = np.exp(difference) - 1 - difference
    np.testing.assert_allclose(plain_kl(ours, reference), value, rtol=1e-4, atol=1e-4)
    gradient = kl_gradient(ours, reference)
    np.testing.assert_allclose(gradient, -difference, rtol=1e-4, atol=1e-4)


@jax.jit
def kl_gradient(ours, reference):
    return jax.grad(lambda x: jnp.sum(reference_kl(x, reference)))(ours)


def coefficients(decide=0.0, plan=0.0, action=0.0):
    return RoleCoefficients(decide=decide, plan=plan, action=action)


CONFIG = PpoConfig(
    role_coef=coefficients(1.0, 0.7, 1.3),
    kl_coef=coefficients(0.05, 0.02, 0.1),
    ent_coef=coefficients(0.01, 0.003, 0.002),
    clip_eps_high=0.28,
)
PLAIN = PpoConfig(
    role_coef=coefficients(1.0, 1.0, 1.0),
    kl_coef=coefficients(),
    ent_coef=coefficients(),
)


def scores_of(decide, which, entropy=0.5):
    flat = jnp.full(jnp.shape(decide), entropy)
    decide = jnp.asarray(decide)
    return Scores(
        decide=decide,
        decide_other=jnp.log1p(-jnp.minimum(jnp.exp(decide), SURE)),
        which=jnp.asarray(which),
        decide_entropy=flat,
        which_entropy=flat / 2,
        legal_mass=0 * flat,
    )


def sampler_of(decide, which, old=None, slot=None):
    slot = jnp.zeros(jnp.shape(decide), jnp.int32) if slot is None else slot
    return Sampler(decide=decide, which=which, old=old, slot=slot)


@jax.jit
def full_loss(ours, behavior, reference, masks, advantages, num_turns):
    loss, metrics = policy_loss(
        scores_of(*ours),
        sampler_of(*behavior),
        scores_of(*reference),
        RoleMasks(decide=masks[0], plan=masks[1], action=masks[2]),
        advantages,
        num_turns,
        CONFIG,
    )
    return loss, metrics


def slow_bernoulli_kl(p, q):
    other, of_reference = 1 - min(p, SURE), 1 - min(q, SURE)
    return p * np.log(p / q) + other * np.log(other / of_reference)


@given(
    st.tuples(LOG_PROBS, LOG_PROBS),
    st.tuples(LOG_PROBS, LOG_PROBS),
    st.tuples(LOG_PROBS, LOG_PROBS),
    st.tuples(MASKS, MASKS, MASKS),
    NUMBERS,
)
def test_the_policy_loss_is_that_of_a_slow_loop(
    ours, behavior, reference, masks, advantages
):
    expected = 0.0
    for role, mask in zip(ROLES, masks, strict=True):
        factor = 0 if role == "decide" else 1
        entropy = 0.5 if role == "decide" else 0.25
        for place in zip(*np.nonzero(mask), strict=True):
            mine, old, ref = (
                float(x[factor][place]) for x in (ours, behavior, reference)
            )
            ratio, gain = np.exp(mine - old), float(advantages[place])
            objective = min(ratio * gain, min(max(ratio, 0.8), 1.28) * gain)
            objective = max(objective, 3.0 * gain) if gain < 0 else objective
            kl = np.exp(ref - mine) - 1 - (ref - mine)
            if role == "decide":
                kl = slow_bernoulli_kl(np.exp(mine), np.exp(ref))
            expected -= getattr(CONFIG.role_coef, role) * objective
            expected += getattr(CONFIG.kl_coef, role) * kl
            expected -= getattr(CONFIG.ent_coef, role) * entropy
    loss, _ = full_loss(ours, behavior, reference, masks, advantages, jnp.float32(4.0))
    np.testing.assert_allclose(loss, expected / 4, rtol=1e-4, atol=1e-4)


def test_metrics_tell_of_each_role_by_itself():
    ratio = jnp.array([[1.0, 1.1, 1.5]])
    masks = jnp.array([[[True, False, False]], [[False, True, False]]])
    none = jnp.zeros((1, 3), bool)
    behavior = jnp.zeros((1, 3))
    _, metrics = policy_loss(
        scores_of(jnp.log(ratio), jnp.log(ratio)),
        sampler_of(behavior, behavior),
        scores_of(jnp.log(ratio), jnp.log(ratio)),
        RoleMasks(decide=masks[0], plan=masks[1], action=~none),
        jnp.ones((1, 3)),
        jnp.float32(1.0),
        CONFIG,
    )
    assert metrics["ppo/clip_fraction_decide"] == 0
    np.testing.assert_allclose(metrics["ppo/clip_fraction_action"], 1 / 3, rtol=1e-6)
    np.testing.assert_allclose(metrics["ppo/ratio_error_plan"], np.log(1.1), rtol=1e-5)
    np.testing.assert_allclose(
        metrics["ppo/ratio_error_action"], np.log(1.5), rtol=1e-5
    )
    kl = 1.5 - 1 - np.log(1.5) + 1.1 - 1 - np.log(1.1)
    np.testing.assert_allclose(metrics["ppo/approx_kl_action"], kl / 3, rtol=1e-4)
    assert metrics["ppo/reference_kl_action"] == 0
    assert metrics["ppo/decide_entropy"] == 0.5


def test_with_equal_weights_two_factors_pull_like_the_token_they_make_up():
    chance = np.random.default_rng(0)
    logits = jnp.asarray(chance.normal(size=(1, 6, 4)), jnp.float32)
    tokens = jnp.array([[0, 1, 2, 3, 1, 0]])  # 0 opens a plan, the others are actions
    advantages = jnp.asarray(chance.normal(size=(1, 6)), jnp.float32)
    everywhere = jnp.ones((1, 6), bool)
    plans = tokens == 0
    masks = RoleMasks(decide=everywhere, plan=~everywhere, action=~plans)

    def factors(logits):
        log_probs = jax.nn.log_softmax(logits)
        act = jax.nn.logsumexp(log_probs[..., 1:], axis=-1)
        chosen = jnp.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0]
        return jnp.where(plans, chosen, act), jnp.where(plans, 0.0, chosen - act)

    behavior = jax.lax.stop_gradient(factors(logits))

    def factored(logits):
        scores = scores_of(*factors(logits))
        return policy_loss(
            scores,
            sampler_of(*behavior),
            scores,
            masks,
            advantages,
            jnp.float32(3.0),
            PLAIN,
        )[0]

    def whole(logits):
        log_probs = sum(factors(logits))
        ratio = jnp.exp(log_probs - jax.lax.stop_gradient(log_probs))
        return -jnp.sum(ratio * advantages) / 3.0

    np.testing.assert_allclose(
        jax.jit(jax.grad(factored))(logits),
        jax.jit(jax.grad(whole))(logits),
        rtol=1e-4,
        atol=1e-6,
    )


def decide_gradient(plan_length):
    """The pull on the first decide token of a turn whose plan is this long."""
    size = 8
    decide = jnp.arange(size)[None] == 0
    plan = (jnp.arange(size)[None] > 0) & (jnp.arange(size)[None] <= plan_length)
    masks = RoleMasks(decide=decide, plan=plan, action=jnp.zeros((1, size), bool))
    old = jnp.full((1, size), -1.0)

    def loss(decide_log_prob):
        scores = scores_of(decide_log_prob, old)
        return policy_loss(
            scores,
            sampler_of(old, old),
            scores,
            masks,
            jnp.ones((1, size)),
            jnp.float32(1),
            PLAIN,
        )[0]

    return jax.jit(jax.grad(loss))(old)[0, 0]


def test_a_long_plan_does_not_dilute_its_decide_token():
    assert decide_gradient(1) == decide_gradient(7) == -1.0


def test_the_order_of_lanes_does_not_matter():
    chance = np.random.default_rng(0)
    numbers = [jnp.asarray(-chance.random(SHAPE), jnp.float32) for _ in range(7)]
    masks = [jnp.asarray(chance.random(SHAPE) < 0.5) for _ in range(3)]

    def loss(order):
        a, b, c, d, e, f, g = (x[order] for x in numbers)
        shuffled = tuple(mask[order] for mask in masks)
        return full_loss((a, b), (c, d), (e, f), shuffled, g, jnp.float32(3))[0]

    forward, backward = loss(jnp.array([0, 1])), loss(jnp.array([1, 0]))
    np.testing.assert_allclose(forward, backward, rtol=1e-6)


def test_what_is_masked_out_neither_counts_nor_pulls():
    chance = np.random.default_rng(0)
    ours = jnp.asarray(-chance.random(SHAPE), jnp.float32)
    wild = ours.at[0, 0].set(-1e30)
    mask = jnp.ones(SHAPE, bool).at[0, 0].set(False)

    def loss(log_probs):
        both = (log_probs, log_probs)
        old = (ours, ours)
        masks = (mask, mask, mask)
        return full_loss(both, old, old, masks, ours, jnp.float32(3))[0]

    assert loss(ours) == loss(wild)
    gradient = jax.grad(loss)(wild)
    assert jnp.isfinite(gradient).all()
    assert gradient[0, 0] == 0


def test_the_value_loss_is_quadratic_near_and_linear_far():
    values = jnp.array([[0.5, 3.0, -9.0]])
    mask = jnp.array([[True, True, False]])
    loss, gradient = jax.value_and_grad(value_loss)(values, jnp.zeros((1, 3)), mask)
    np.testing.assert_allclose(loss, (0.5 * 0.25 + 2.5) / 2)
    np.testing.assert_allclose(gradient, [[0.25, 0.5, 0.0]])


def test_the_clipped_value_loss_is_the_worse_of_both():
    values, old = jnp.array([[1.0, 0.1, 5.0]]), jnp.array([[0.0, 0.0, 0.0]])
    targets = jnp.array([[1.0, 1.0, 0.0]])
    mask = jnp.array([[True, True, False]])
    loss = clipped_value_loss(values, old, targets, mask, 0.2)
    np.testing.assert_allclose(loss, (0.5 * 0.8**2 + 0.5 * 0.9**2) / 2, rtol=1e-6)


def test_the_format_loss_is_the_lost_mass_of_a_turn():
    mass = jnp.log(jnp.array([[0.5, 0.25, 0.1]]))
    mask = jnp.array([[True, True, False]])
    np.testing.assert_allclose(
        format_loss(mass, mask, jnp.float32(2)), np.log(8) / 2, rtol=1e-6
    )


ONE_TURN_EACH = jnp.array([[0, 0, 0, 1, 1, 1]] * 2)
TURN_LEVEL = dataclasses.replace(PLAIN, ratio_level="turn")


def some_factors(seed):
    chance = np.random.default_rng(seed)
    draw = lambda: jnp.asarray(-chance.random(SHAPE), jnp.float32)
    return draw(), draw()


def plain_masks():
    decide = jnp.arange(6)[None] % 3 == jnp.zeros((2, 1), jnp.int32)
    plan = jnp.arange(6)[None] % 3 == jnp.ones((2, 1), jnp.int32)
    return RoleMasks(decide=decide, plan=plan, action=~decide & ~plan)


@pytest.mark.parametrize("shift", [0.0, 0.1, 0.5])
def test_the_ratio_of_a_turn_is_the_geometric_mean_of_its_tokens(shift):
    """One token far off counts a third; the objective is clipped as a whole."""
    decide, which = some_factors(0)
    masks, far = plain_masks(), jnp.zeros(SHAPE).at[:, 2].set(shift)
    advantages = jnp.ones(SHAPE)

    def loss(which):
        scores = scores_of(decide, which)
        sampler = sampler_of(decide, some_factors(0)[1] - far, slot=ONE_TURN_EACH)
        return policy_loss(
            scores, sampler, scores, masks, advantages, jnp.float32(4), TURN_LEVEL
        )[0]

    value, gradient = jax.value_and_grad(loss)(which)
    ratio = np.exp(shift / 3)
    np.testing.assert_allclose(value, -(3 * ratio + 3) * 2 / 4, rtol=1e-5)
    np.testing.assert_allclose(
        gradient[0], [0, *[-ratio / 4] * 2, 0, *[-0.25] * 2], rtol=1e-5
    )


def test_stale_samples_count_by_how_much_less_sure_the_sampler_was():
    old = (jnp.log(jnp.full(SHAPE, 0.5)), jnp.log(jnp.full(SHAPE, 0.6)))
    sampled = (jnp.log(jnp.full(SHAPE, 0.4)), jnp.log(jnp.full(SHAPE, 0.1)))
    masks, advantages = plain_masks(), jnp.ones(SHAPE)
    scores = scores_of(*old)
    loss, metrics = policy_loss(
        scores,
        sampler_of(*sampled, old=scores),
        scores,
        masks,
        advantages,
        jnp.float32(4),
        PLAIN,
    )
    weights = 1.25 + 2.0 + 2.0  # of decide, and of the others, where 6 is cut to 2
    np.testing.assert_allclose(loss, -weights * 4 / 4, rtol=1e-5)
    assert metrics["ppo/clip_fraction_action"] == 0
    assert metrics["ppo/ratio_error_outside_plan"] == 1


def test_an_explored_decision_is_no_error_of_the_ratio():
    p, share = 0.02, 0.1
    decide = jnp.log(jnp.full(SHAPE, p))
    mixed = jnp.log(jnp.full(SHAPE, (1 - share) * p + share / 2))
    config = dataclasses.replace(PLAIN, decide_explore=share)
    scores = scores_of(decide, decide)
    loss, metrics = policy_loss(
        scores,
        sampler_of(mixed, decide),
        scores,
        RoleMasks(decide=mixed < 0, plan=mixed > 0, action=mixed > 0),
        jnp.ones(SHAPE),
        jnp.float32(12),
        config,
    )
    np.testing.assert_allclose(loss, -p / ((1 - share) * p + share / 2), rtol=1e-5)
    np.testing.assert_allclose(metrics["ppo/ratio_error_decide"], 0, atol=1e-6)
    assert np.isnan(metrics["ppo/plan_entropy"]), "there is no plan token"


@given(NUMBERS, NUMBERS, MASKS)
def test_explained_variance_is_that_of_numpy(values, targets, mask):
    if mask.sum() < 2 or np.var(targets[mask].astype(float)) < 1e-3:
        return
    kept, wanted = values[mask].astype(float), targets[mask].astype(float)
    expected = 1 - np.var(wanted - kept) / np.var(wanted)
    actual = explained(values, targets, mask)
    np.testing.assert_allclose(actual, expected, rtol=1e-2, atol=1e-3)


explained = jax.jit(explained_variance)


def test_explained_variance_is_one_for_perfect_values():
    targets = jnp.array([[1.0, 2.0, 4.0]])
    everything = jnp.ones((1, 3), bool)
    assert explained_variance(targets, targets, everything) == 1
    assert explained_variance(jnp.ones((1, 3)), targets, everything) == 0
