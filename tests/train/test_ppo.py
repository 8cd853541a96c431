"""The update on a real play of a tiny agent in a tiny world."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxplan.config.schema import ModelConfig, PpoConfig
from jaxplan.core.roles import Role
from jaxplan.models.heads import value
from jaxplan.models.llama import forward
from jaxplan.models.params import init_params
from jaxplan.plan.grammar import ACT
from jaxplan.rollout.stream import stream_metadata
from jaxplan.train.optim import Learner, init_learner
from jaxplan.train.ppo import (
    Recipe,
    next_value_scale,
    ppo_loss,
    prepare,
    split_lanes,
    update,
)

OPTIMIZER = optax.sgd(0.1)  # its step is the gradient, so gradients can be compared
CONFIG = PpoConfig(num_minibatches=2, gamma=0.9, gae_lambda=0.8)
WHOLE = dataclasses.replace(CONFIG, num_minibatches=1)


def recipe_of(setting, config):
    return Recipe(
        optimizer=OPTIMIZER,
        config=config,
        model=setting.model,
        history=setting.rollout.history,
        temperature=setting.rollout.temperature,
        max_decisions=setting.rollout.rounds * (1 + setting.rollout.decode_steps),
    )


@pytest.fixture(scope="module")
def learn(setting, segment):
    """Update a fresh copy of the agent; the copy is donated."""

    def run(
        policy=1.0,
        trunk=1.0,
        plan_cost=0.0,
        config=CONFIG,
        segment=segment,
        params=None,
    ):
        params = setting.params if params is None else params
        learner = init_learner(jax.tree.map(jnp.copy, params), OPTIMIZER)
        return update(
            learner,
            setting.params.llama,
            segment,
            setting.language.grammar,
            jnp.asarray(plan_cost, jnp.float32),
            jnp.float32(policy),
            jnp.float32(trunk),
            jnp.float32(0),
            recipe=recipe_of(setting, config),
        )

    return run


@pytest.fixture(scope="module")
def learnt(learn) -> tuple[Learner, dict]:
    return learn()


def same(one, other):
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return [bool((a == b).all()) for a, b in pairs]


def test_a_fresh_segment_has_a_ratio_of_one(learnt):
    _, metrics = learnt
    assert metrics["ppo/ratio_error"] <= 1e-5
    assert metrics["ppo/skipped_updates"] == 0


def test_another_policy_has_another_ratio(setting, learn):
    llama = setting.params.llama
    other = dataclasses.replace(llama, final_norm=1.1 * llama.final_norm)
    _, metrics = learn(params=dataclasses.replace(setting.params, llama=other))
    assert metrics["ppo/ratio_error"] > 1e-2
    assert metrics["ppo/reference_kl_action"] > 0


def test_a_value_only_update_leaves_the_llama_as_it_is(setting, learn):
    learner, _ = learn(policy=0.0, trunk=0.0)
    assert all(same(learner.params.llama, setting.params.llama))
    assert not any(same(learner.params.value, setting.params.value))


def test_the_value_loss_may_shape_the_trunk(setting, learn):
    learner, _ = learn(policy=0.0, trunk=1.0)
    assert not any(same(learner.params.llama, setting.params.llama))


def test_a_policy_update_moves_every_tensor(setting, learnt):
    learner, _ = learnt
    assert not any(same(learner.params, setting.params))
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(learner.params))


def test_iterations_share_one_compilation(learn):
    learn()
    compiled = update._cache_size()
    for plan_cost in (0.0, 0.1, 0.2):
        learn(plan_cost=plan_cost, policy=plan_cost)
    assert update._cache_size() == compiled


def test_the_order_of_lanes_does_not_change_the_update(learn, segment):
    order = jnp.array([2, 0, 3, 1])
    shuffled = dataclasses.replace(
        segment,
        stream=jax.tree.map(lambda leaf: leaf[order], segment.stream),
        turns=jax.tree.map(lambda leaf: leaf[order], segment.turns),
    )
    one, _ = learn(config=WHOLE)
    other, _ = learn(config=WHOLE, segment=shuffled)
    for a, b in zip(
        jax.tree.leaves(one.params), jax.tree.leaves(other.params), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def prepared(setting, segment):
    batch, metrics = jax.jit(prepare, static_argnames="recipe")(
        setting.params,
        setting.params.llama,
        segment,
        setting.language.grammar,
        jnp.float32(0.01),
        recipe=recipe_of(setting, CONFIG),
    )
    return jax.device_get(batch), metrics


@pytest.fixture(scope="module")
def values(setting, segment):
    """What the critic says at the token before each turn's first own one."""
    tokens = segment.stream.tokens
    hidden = forward(
        setting.params.llama,
        tokens.token,
        stream_metadata(tokens),
        setting.model,
        setting.rollout.history,
    )
    rows = jnp.arange(tokens.token.shape[0])[:, None]
    before = hidden[rows, jnp.maximum(segment.turns.start - 1, 0)]
    return np.asarray(value(setting.params.value, before))


@pytest.fixture(scope="module")
def slow_advantages(segment, values):
    """Turn advantages by the recursion, NaN where no whole turn is."""
    end = jax.device_get(segment.turns.end)
    advantages = np.full(values.shape, np.nan)
    for lane in range(values.shape[0]):
        following = 0.0
        for slot in reversed(range(values.shape[1])):
            if not end.complete[lane, slot]:
                following = 0.0
                continue
            discount = end.discount[lane, slot]
            reward = end.reward[lane, slot] - 0.01 * end.plan_tokens[lane, slot]
            delta = reward + discount * values[lane, slot + 1] - values[lane, slot]
            following = delta + discount * 0.8 * following
            advantages[lane, slot] = following
    return advantages


def test_targets_are_advantages_plus_values(segment, prepared, values, slow_advantages):
    batch, metrics = prepared
    complete = np.asarray(segment.turns.end.complete)
    assert complete.sum() > 15
    assert np.std(values[complete]) > 0.01
    targets = (slow_advantages + values)[complete]
    np.testing.assert_allclose(batch.targets[complete], targets, atol=1e-4)
    np.testing.assert_allclose(metrics["ppo/target_mean"], targets.mean(), atol=1e-4)


def test_each_decision_has_the_normalised_advantage_of_its_turn(
    segment, prepared, slow_advantages
):
    batch, _ = prepared
    complete = np.asarray(segment.turns.end.complete)
    numbers = np.asarray(segment.turns.number)
    kept = slow_advantages[complete]
    normal = (slow_advantages - kept.mean()) / kept.std()
    decisions = batch.decisions
    sampled = np.asarray(segment.stream.tokens.sampled).sum()
    counted = 0
    for lane, slot in np.argwhere(complete):
        own = decisions.mask[lane] & (decisions.turn[lane] == numbers[lane, slot])
        expected = normal[lane, slot]
        np.testing.assert_allclose(batch.advantages[lane][own], expected, atol=1e-3)
        counted += own.sum()
    assert counted == decisions.mask.sum()
    assert 0 < counted <= sampled
    assert (batch.advantages[~decisions.mask] == 0).all()


def test_minibatches_hold_every_lane_once(prepared):
    batch, _ = prepared
    halves = split_lanes(jax.tree.map(jnp.asarray, batch), 2)
    for whole, cut in zip(jax.tree.leaves(batch), jax.tree.leaves(halves), strict=True):
        assert cut.shape == (2, whole.shape[0] // 2, *whole.shape[1:])
        np.testing.assert_array_equal(cut[0], whole[0::2])
        np.testing.assert_array_equal(cut[1], whole[1::2])


def test_a_price_of_zero_is_no_bit_different_from_no_price(learn, learnt, segment):
    end = segment.turns.end
    unpriced = dataclasses.replace(
        segment.turns,
        end=dataclasses.replace(end, plan_tokens=jnp.zeros_like(end.plan_tokens)),
    )
    other, _ = learn(segment=dataclasses.replace(segment, turns=unpriced))
    assert all(same(learnt[0].params, other.params))


def test_the_critic_tells_what_plans_are_worth(setting, segment, prepared, values):
    _, metrics = prepared
    tokens, turns = jax.device_get((segment.stream.tokens, segment.turns))
    hidden = forward(
        setting.params.llama,
        segment.stream.tokens.token,
        stream_metadata(segment.stream.tokens),
        setting.model,
        setting.rollout.history,
    )
    everywhere = np.asarray(value(setting.params.value, hidden))
    gains = []
    for lane, slot in np.argwhere(turns.end.complete & turns.end.planned):
        own = tokens.turn[lane] == turns.number[lane, slot]
        act = np.flatnonzero(own & (tokens.state[lane] == ACT) & tokens.sampled[lane])
        gains.append(everywhere[lane, act[0] - 1] - values[lane, slot])
    assert len(gains) > 3
    np.testing.assert_allclose(
        metrics["ppo/planning_advantage"], np.mean(gains), atol=1e-5
    )


def test_boundaries_bootstrap_on_the_state_that_follows(segment, values, prepared):
    """What ppo.md, section 4, says of the ends of turns, in a real play."""
    batch, _ = prepared
    tokens, turns = jax.device_get((segment.stream.tokens, segment.turns))
    end, seen = turns.end, set()
    for lane, slot in np.argwhere(end.complete):
        start, following = turns.start[lane, slot], turns.start[lane, slot + 1]
        reward = end.reward[lane, slot] - 0.01 * end.plan_tokens[lane, slot]
        own = batch.targets[lane, slot]
        assert end.discount[lane, slot] > 0  # nobody dies here, see test_estimators
        # The position a turn bootstraps on is the end of an observation of its own
        # episode: of a truncated one the terminal one, before any new world.
        assert tokens.role[lane, following - 1] == Role.OBSERVATION
        assert tokens.episode[lane, following - 1] == tokens.episode[lane, start - 1]
        if not end.complete[lane, slot + 1]:
            bootstrap = end.discount[lane, slot] * values[lane, slot + 1]
            np.testing.assert_allclose(own, reward + bootstrap, atol=1e-4)
            own_turn = tokens.turn[lane] == turns.number[lane, slot + 1]
            is_last = slot + 1 == turns.slot[lane]
            said = (own_turn & (tokens.role[lane] >= Role.DECIDE)).any()
            seen.add(("unfinished" if said else "closing") if is_last else "truncated")
            decided = batch.decisions.turn[lane] == turns.number[lane, slot + 1]
            assert not (decided & batch.decisions.mask[lane]).any()
    assert {"truncated", "closing"} <= seen
    carried = tokens.role == Role.CARRIED  # a new prefix: seen, and never trained
    assert carried.any()
    assert not (carried & tokens.sampled).any()


def test_everything_optional_at_once_starts_from_a_ratio_of_one(learn, setting):
    config = dataclasses.replace(
        WHOLE,
        estimator="smdp",
        ratio_level="turn",
        off_policy="decoupled",
        num_epochs=2,
        value_loss="clip",
        value_scaling=True,
        format_coef=0.1,
        call_cost=0.01,
    )
    learner, metrics = learn(config=config, plan_cost=0.01)
    assert metrics["ppo/ratio_error"] <= 1e-5
    assert metrics["ppo/value_scale"] > 0
    assert not any(same(learner.params, setting.params))
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(learner.params))


def test_the_value_scale_is_a_running_standard_deviation():
    targets, mask = jnp.array([[1.0, 3.0, 99.0]]), jnp.array([[True, True, False]])
    np.testing.assert_allclose(next_value_scale(jnp.float32(0), targets, mask), 1.0)
    mixed = next_value_scale(jnp.float32(2), targets, mask)
    np.testing.assert_allclose(mixed, np.sqrt(0.9 * 4 + 0.1), rtol=1e-6)


def test_plan_tokens_are_paid_for(learn, segment):
    end = jax.device_get(segment.turns.end)
    spent = end.plan_tokens[end.complete].mean()
    assert spent > 0
    _, free = learn(plan_cost=0.0)
    _, priced = learn(plan_cost=0.1)
    difference = free["ppo/net_reward_per_turn"] - priced["ppo/net_reward_per_turn"]
    np.testing.assert_allclose(difference, 0.1 * spent, rtol=1e-4)


def test_every_lane_may_have_its_own_price(learn, segment):
    end = jax.device_get(segment.turns.end)
    prices = np.array([0.0, 0.1, 0.0, 0.4])[:, None]
    spent = (prices * end.plan_tokens)[end.complete].mean()
    assert spent > 0
    one, free = learn(plan_cost=0.1), learn(plan_cost=0.0)[1]
    same_in_all = learn(plan_cost=np.full((4, 1), 0.1))
    told = learn(plan_cost=prices)[1]
    difference = free["ppo/net_reward_per_turn"] - told["ppo/net_reward_per_turn"]
    np.testing.assert_allclose(difference, spent, rtol=1e-4)
    chex.assert_trees_all_close(same_in_all[0].params, one[0].params, atol=1e-6)


CRITIC = ModelConfig(width=8, layers=1, heads=1, kv_heads=1, head_dim=8, ffn_width=8)


@pytest.fixture(scope="module")
def judged(setting, segment):
    """An agent with a critic of its own, and the gradient of each of its losses."""
    config = dataclasses.replace(CONFIG, critic=CRITIC)
    own = init_params(jax.random.key(4), CRITIC, setting.tokenizer.vocab_size)
    head = dataclasses.replace(own.value, out=jnp.ones(CRITIC.width))
    params = dataclasses.replace(setting.params, value=head, critic=own.llama)
    recipe = recipe_of(setting, config)

    def loss_of(params, batch, name):
        grammar, one = setting.language.grammar, jnp.float32(1.0)
        return ppo_loss(params, batch, grammar, one, one, recipe)[1][name]

    @jax.jit
    def gradients(params, reference, segment):
        batch, _ = prepare(
            params,
            reference,
            segment,
            setting.language.grammar,
            0.0,
            recipe,
        )
        names = ("ppo/policy_loss", "ppo/value_loss")
        return [jax.grad(loss_of)(params, batch, name) for name in names]

    return gradients(params, setting.params.llama, segment)


def sizes(grads):
    return [float(jnp.abs(grad).max()) for grad in jax.tree.leaves(grads)]


def test_a_critic_of_its_own_and_the_actor_leave_each_other_alone(judged):
    of_policy, of_values = judged
    assert min(sizes(of_policy.llama)) > 0
    assert max(sizes((of_policy.critic, of_policy.value))) == 0
    assert max(sizes(of_values.llama)) == 0
    assert min(sizes((of_values.critic, of_values.value))) > 0
