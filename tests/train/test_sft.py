"""Imitation on packed segments: the loss in numpy, and no leak between episodes."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxplan.config.schema import OptimizerConfig, SftConfig
from jaxplan.core.roles import Role
from jaxplan.models.heads import lm_logits
from jaxplan.models.llama import forward
from jaxplan.models.params import init_params
from jaxplan.models.visibility import TokenMeta
from jaxplan.train.optim import init_learner, make_optimizer
from jaxplan.train.packing import Packer, TurnTokens
from jaxplan.train.sft import (
    Segments,
    batch_indices,
    imitate,
    sft_loss,
    sft_update,
    sft_validate,
    validation_metrics,
)

SIZE, HISTORY, TARGETS = 64, 2, 24
WEIGHTS = SftConfig(plan_weight=0.3, action_weight=1.7, observation_weight=0.6)


@pytest.fixture(scope="module")
def episodes(setting):
    """Two episodes that share no word of what is seen."""
    encode = setting.tokenizer.encode
    text = np.flatnonzero(setting.language.grammar.legal[3])[:4].tolist()
    plan = [*encode(setting.plan.open), *text, *encode(setting.plan.close)]

    def turn(observation, planned, action, learn):
        said = plan if planned else []
        return TurnTokens(
            observation=observation,
            generated=[*said, *encode(action)],
            plan_length=len(said),
            learn_action=learn,
        )

    return (
        [turn([500, 501], True, "Noop", True), turn([502], False, "Dig Pit", True)],
        [turn([600], False, "Noop", False), turn([601, 602], True, "Noop", True)],
    )


def segments_of(setting, episodes, prompt=(), observations=False):
    grammar = setting.language.grammar
    packer = Packer(grammar, [prompt], SIZE, HISTORY, observations)
    for turns in episodes:
        packer.add(turns)
    fields = packer.finish()
    return Segments(**{name: jnp.asarray(field) for name, field in fields.items()})


scored = jax.jit(imitate, static_argnames=("max_targets", "model", "history"))
loss_of = jax.jit(
    sft_loss, static_argnames=("max_targets", "config", "model", "history")
)


@pytest.fixture(scope="module")
def sizes(setting):
    return {"max_targets": TARGETS, "model": setting.model, "history": HISTORY}


def other_llama(setting):
    """Weights to start from, unlike those of the agent."""
    vocab = setting.tokenizer.vocab_size
    return init_params(jax.random.key(9), setting.model, vocab).llama


def slow_log_probs(setting, llama, segments):
    """Of the whole vocabulary behind every token, in numpy."""
    position = np.broadcast_to(np.arange(SIZE), segments.token.shape).astype(np.int32)
    meta = TokenMeta(
        position=jnp.asarray(position),
        episode=segments.episode,
        turn=segments.turn,
        plan=segments.plan,
        active_plan=segments.active_plan,
    )
    hidden = forward(llama, segments.token, meta, setting.model, HISTORY)
    logits = np.asarray(lm_logits(llama, hidden), float)
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def slow_losses(setting, segments):
    """Role, negative log-likelihood, correctness and KL of every token with a loss."""
    own = slow_log_probs(setting, setting.params.llama, segments)
    start = slow_log_probs(setting, other_llama(setting), segments)
    for row, place in zip(*np.nonzero(segments.learn), strict=True):
        before, token = own[row, place - 1], int(segments.token[row, place])
        kl = (np.exp(before) * (before - start[row, place - 1])).sum()
        role = int(segments.role[row, place])
        yield role, -before[token], before.argmax() == token, kl


WEIGHT_OF = {Role.PLAN: 0.3, Role.OBSERVATION: 0.6}


@pytest.mark.parametrize("observations", [False, True])
def test_the_loss_is_that_computed_in_numpy(setting, episodes, sizes, observations):
    segments = segments_of(setting, episodes, [7, 8, 9], observations)
    loss, metrics = loss_of(setting.params, None, segments, config=WEIGHTS, **sizes)
    rows = list(slow_losses(setting, segments))
    weights = [WEIGHT_OF.get(role, 1.7) for role, *_ in rows]
    losses = [loss for _, loss, *_ in rows]
    np.testing.assert_allclose(loss, np.average(losses, weights=weights), rtol=1e-5)
    np.testing.assert_allclose(metrics["sft/token_loss"], np.mean(losses), rtol=1e-5)
    for name, role in (
        ("plan", Role.PLAN),
        ("decide", Role.DECIDE),
        ("observation", Role.OBSERVATION),
    ):
        own = [(loss, right) for found, loss, right, _ in rows if found == role]
        mean, accuracy = np.mean(own, axis=0) if own else (0.0, 0.0)
        np.testing.assert_allclose(metrics[f"sft/loss_{name}"], mean, rtol=1e-5)
        np.testing.assert_allclose(metrics[f"sft/accuracy_{name}"], accuracy)
    assert metrics["sft/start_kl"] == 0


def test_the_divergence_from_the_start_is_that_computed_in_numpy(
    setting, episodes, sizes
):
    segments = segments_of(setting, episodes, prompt=[7, 8, 9])
    plain, _ = loss_of(setting.params, None, segments, config=WEIGHTS, **sizes)
    held = dataclasses.replace(WEIGHTS, kl_coef=0.25)
    start = other_llama(setting)
    loss, metrics = loss_of(setting.params, start, segments, config=held, **sizes)
    expected = np.mean([kl for *_, kl in slow_losses(setting, segments)])
    assert expected > 0.1
    np.testing.assert_allclose(metrics["sft/start_kl"], expected, rtol=1e-4)
    np.testing.assert_allclose(loss, plain + 0.25 * expected, rtol=1e-4)
    own = setting.params.llama
    at_start, _ = loss_of(setting.params, own, segments, config=held, **sizes)
    np.testing.assert_allclose(at_start, plain, rtol=1e-5)


def test_a_strong_divergence_term_keeps_the_agent_where_it_started(
    setting, episodes, sizes
):
    segments = segments_of(setting, episodes, prompt=[7, 8, 9])
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2), 20)
    ends = []
    for coefficient in (0.0, 20.0):
        config = dataclasses.replace(WEIGHTS, kl_coef=coefficient)
        own = jax.tree.map(jnp.copy, setting.params)
        learner = init_learner(own, optimizer)
        for _ in range(5):
            learner, metrics = sft_update(
                learner,
                setting.params.llama,
                segments,
                optimizer=optimizer,
                config=config,
                **sizes,
            )
        ends.append(float(metrics["sft/start_kl"]))
    assert ends[1] < 0.25 * ends[0]


def test_validation_counts_every_token_once(setting, episodes, sizes):
    segments = segments_of(setting, episodes, [7, 8, 9], observations=True)
    assert segments.token.shape[0] == 1
    twice = jax.tree.map(lambda rows: jnp.concatenate([rows, rows]), segments)
    sums = sft_validate(
        setting.params,
        other_llama(setting),
        twice,
        jnp.array([True, False]),
        **sizes,
    )
    sums = jax.tree.map(float, sums)
    rows = list(slow_losses(setting, segments))
    metrics = validation_metrics(sums, measured_kl=True)
    for name, place in (("token_loss", 1), ("start_kl", 3)):
        expected = np.mean([row[place] for row in rows])
        found = metrics[f"sft/held_out_{name}"]
        np.testing.assert_allclose(found, expected, rtol=1e-4)
    for name, role in (("plan", Role.PLAN), ("observation", Role.OBSERVATION)):
        own = [row for row in rows if row[0] == role]
        assert sums[name]["tokens"] == len(own)
        perplexity = np.exp(np.mean([loss for _, loss, *_ in own]))
        found = metrics[f"sft/held_out_perplexity_{name}"]
        np.testing.assert_allclose(found, perplexity, rtol=1e-4)
        found = metrics[f"sft/held_out_accuracy_{name}"]
        np.testing.assert_allclose(found, np.mean([right for _, _, right, _ in own]))


def test_what_did_not_occur_has_no_perplexity():
    nothing = {"tokens": 0.0, "loss": 0.0, "correct": 0.0, "kl": 0.0}
    some = {"tokens": 2.0, "loss": 3.0, "correct": 1.0, "kl": 0.0}
    metrics = validation_metrics({"plan": nothing, "action": some}, measured_kl=False)
    assert set(metrics) == {
        "sft/held_out_token_loss",
        "sft/held_out_loss_action",
        "sft/held_out_perplexity_action",
        "sft/held_out_accuracy_action",
    }
    assert metrics["sft/held_out_accuracy_action"] == 0.5


def test_episodes_score_alike_together_and_alone(setting, episodes, sizes):
    """Without a prompt, whose distance would differ, nothing else may differ."""
    segments = segments_of(setting, episodes)
    assert segments.token.shape[0] == 1
    together = scored(setting.params, None, segments, **sizes)
    alone = [
        scored(setting.params, None, segments_of(setting, [turns]), **sizes)
        for turns in episodes
    ]
    packed = np.asarray(together.loss)[np.asarray(together.mask)]
    apart = [np.asarray(one.loss)[np.asarray(one.mask)] for one in alone]
    assert all(len(losses) > 0 for losses in apart)
    np.testing.assert_allclose(packed, np.concatenate(apart), rtol=1e-4, atol=1e-5)


def test_a_gradient_is_the_same_from_episodes_together_and_alone(setting, episodes):
    """The loss is a mean, so each episode counts by the weight of its targets."""
    segments = segments_of(setting, episodes)
    assert segments.token.shape[0] == 1
    together = leak(setting.params, segments, setting.model)
    total, weights = jax.tree.map(jnp.zeros_like, together), 0.0
    for turns in episodes:
        alone = segments_of(setting, [turns])
        is_plan = alone.role == Role.PLAN
        weight = jnp.where(is_plan, WEIGHTS.plan_weight, WEIGHTS.action_weight)
        weight = jnp.sum(jnp.where(alone.learn > 0, weight, 0.0))
        gradient = leak(setting.params, alone, setting.model)
        total = jax.tree.map(lambda t, g, w=weight: t + w * g, total, gradient)
        weights += weight
    for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(total), strict=True):
        np.testing.assert_allclose(a, b / weights, rtol=1e-4, atol=1e-6)
    assert jnp.max(jnp.abs(together.llama.embed)) > 1e-3


@pytest.mark.parametrize("learnt", [0, 1])
def test_no_gradient_leaks_from_one_episode_to_another(setting, episodes, learnt):
    """The head is not the embedding here, so an embedding moves if it is read."""
    model = dataclasses.replace(setting.model, tie_embeddings=False)
    params = init_params(jax.random.key(0), model, setting.tokenizer.vocab_size)
    segments = segments_of(setting, episodes)
    assert segments.token.shape[0] == 1
    own = dataclasses.replace(
        segments, learn=jnp.where(segments.episode == learnt + 1, segments.learn, 0)
    )
    gradient = leak(params, own, model).llama.embed
    pull = np.abs(gradient).max(axis=1)
    seen = {0: [500, 501, 502], 1: [600, 601, 602]}
    assert (pull[seen[learnt]] > 0).all()
    assert (pull[seen[1 - learnt]] == 0).all()


@partial(jax.jit, static_argnums=2)
def leak(params, segments, model):
    return jax.grad(
        lambda p: sft_loss(p, None, segments, TARGETS, WEIGHTS, model, HISTORY)[0]
    )(params)


def test_nothing_to_learn_gives_no_loss(setting, episodes, sizes):
    segments = segments_of(setting, [episodes[1][:1]])
    loss, metrics = loss_of(setting.params, None, segments, config=WEIGHTS, **sizes)
    assert loss == 0
    assert metrics["sft/token_loss"] == 0


def test_updates_make_the_loss_smaller(setting, episodes, sizes):
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2), 20)
    own = jax.tree.map(jnp.copy, setting.params)
    learner = init_learner(own, optimizer)
    segments = segments_of(setting, episodes, prompt=[7, 8, 9])
    losses = []
    for _ in range(8):
        learner, metrics = sft_update(
            learner, None, segments, optimizer=optimizer, config=WEIGHTS, **sizes
        )
        losses.append(float(metrics["sft/loss"]))
    assert losses[-1] < 0.8 * losses[0]
    assert metrics["sft/skipped_updates"] == 0


def test_every_epoch_is_a_permutation_of_its_own():
    epochs = [
        np.concatenate([batch_indices(10, 3, 3 * epoch + i, seed=4) for i in range(3)])
        for epoch in range(4)
    ]
    for seen in epochs:
        assert len(set(seen.tolist())) == 9
        assert set(seen.tolist()) <= set(range(10))
    assert len({tuple(seen.tolist()) for seen in epochs}) == 4
    whole = np.concatenate([batch_indices(9, 3, i, seed=4) for i in range(3)])
    assert sorted(whole.tolist()) == list(range(9))


def test_a_batch_depends_on_its_number_alone():
    order = [batch_indices(10, 3, number, seed=4) for number in range(7)]
    resumed = [batch_indices(10, 3, number, seed=4) for number in range(4, 7)]
    np.testing.assert_array_equal(order[4:], resumed)
    assert not np.array_equal(
        order, [batch_indices(10, 3, i, seed=5) for i in range(7)]
    )
