"""A population is nothing but its members, each alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxplan.config.schema import LoraConfig, PlanConfig
from jaxplan.plan.grammar import DYNAMIC
from jaxplan.rollout.rounds import run_segment
from jaxplan.rollout.schedule import training_schedule
from jaxplan.train.population import begin, make_common, play, train
from jaxplan.train.ppo import update
from tests.train.probe_agents import agents

ITERATIONS, SEEDS, COSTS = 3, (5, 5, 6), (0.0, 0.3, 0.3)
LANGUAGE, COMMON = agents(
    ("plan",), learning_rate=1e-3, value_warmup_iterations=1, decide_explore=0.3
)


@pytest.fixture(scope="module")
def start():
    return begin(SEEDS, COSTS, LANGUAGE, COMMON)


@pytest.fixture(scope="module")
def trained(start):
    return train(start, ITERATIONS, LANGUAGE, COMMON)


def alone(member):
    """What one agent learns, iteration by iteration, without ``vmap``."""
    config, carry, rows = COMMON.config, member.carry, []
    learner = jax.tree.map(jnp.copy, member.learner)  # it will be donated
    for number in range(ITERATIONS):
        worlds, episodes = (
            jax.random.fold_in(jax.random.fold_in(member.key, of), number)
            for of in (1, 2)
        )
        keys = jax.random.split(worlds, config.env.pool_size)
        carry, segment = run_segment(
            learner.params.llama,
            carry,
            LANGUAGE,
            training_schedule(
                jax.vmap(COMMON.env.reset)(keys),
                episodes,
                DYNAMIC,
                config.rollout.num_lanes,
            ),
            config.ppo.gamma,
            env=COMMON.env,
            config=config.rollout,
            model=config.model,
            budget=config.plan.budget,
            turn_tokens=COMMON.turn_tokens,
            decide_explore=config.ppo.decide_explore,
        )
        warm = jnp.float32(number >= 1)
        learner, metrics = update(
            learner,
            member.reference,
            segment,
            LANGUAGE.grammar,
            member.plan_cost,
            warm,
            warm,
            jnp.float32(0),
            recipe=COMMON.recipe,
        )
        rows.append(metrics)
    return learner, segment, rows


@pytest.mark.slow
def test_a_member_learns_what_it_would_learn_alone(start, trained):
    members, metrics = trained
    for number in range(len(SEEDS)):
        member = jax.tree.map(lambda leaf, i=number: leaf[i], start)
        learner, _, rows = alone(member)
        ours = jax.tree.map(lambda leaf, i=number: leaf[i], members.learner.params)
        for a, b in zip(
            jax.tree.leaves(ours), jax.tree.leaves(learner.params), strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
        for name in ("ppo/policy_loss", "ppo/net_reward_per_turn", "ppo/grad_norm"):
            expected = [row[name] for row in rows]
            np.testing.assert_allclose(
                metrics[name][:, number], expected, rtol=1e-4, atol=1e-5
            )


@pytest.mark.slow
def test_members_of_one_seed_differ_by_their_price_alone(start, trained):
    cheap, dear, other = (
        jax.tree.map(lambda leaf, i=i: leaf[i], start.reference.embed) for i in range(3)
    )
    np.testing.assert_array_equal(cheap, dear)
    assert (cheap != other).any()
    _, metrics = trained
    turns, tokens = (
        metrics[f"rollout/{name}"][0] for name in ("turns", "plan_tokens_per_turn")
    )
    assert turns[0] == turns[1]
    assert tokens[0] == tokens[1] > 0
    net = metrics["ppo/net_reward_per_turn"][0]
    np.testing.assert_allclose(net[0] - net[1], 0.3 * tokens[0], rtol=1e-4)


@pytest.mark.slow
def test_what_was_sampled_is_what_is_trained_with_a_coin_in_play_as_well(trained):
    _, metrics = trained
    assert metrics["ppo/ratio_error"].max() < 1e-5
    assert metrics["rollout/plan_rate"].shape == (ITERATIONS, len(SEEDS))


@pytest.mark.slow
def test_worlds_are_drawn_anew_in_every_iteration(start, trained):
    members, _ = trained
    one, other = (
        jax.device_get(play(m, LANGUAGE, COMMON)[1]) for m in (start, members)
    )
    assert (one.stream.tokens.token != other.stream.tokens.token).any()
    assert (members.iterations == ITERATIONS).all()


def test_what_a_population_cannot_do_is_refused():
    config = COMMON.config
    adapted = dataclasses.replace(
        config, model=dataclasses.replace(config.model, lora=LoraConfig(rank=2))
    )
    with pytest.raises(ValueError, match=r"model.lora.rank=2: members .* train alone"):
        make_common(adapted, COMMON.env, COMMON.turn_tokens)
    told = dataclasses.replace(config, plan=PlanConfig(prices=(0.0, 1.0)))
    with pytest.raises(ValueError, match=r"plan.prices=.* has one price"):
        make_common(told, COMMON.env, COMMON.turn_tokens)
    with pytest.raises(ValueError, match="2 seeds and 1 plan costs"):
        begin([0, 1], [0.0], LANGUAGE, COMMON)
