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
)

SIZE, HISTORY, TARGETS = 64, 2, 24
WEIGHTS = SftConfig(plan_weight=0.3, action_weight=1.7)


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


def segments_of(setting, episodes, prompt=()):
    packer = Packer(setting.language.grammar, list(prompt), SIZE, HISTORY)
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


def slow_losses(setting, segments):
    """Negative log-likelihoods from the logits of every token, in numpy."""
    position = np.broadcast_to(np.arange(SIZE), segments.token.shape).astype(np.int32)
    meta = TokenMeta(
        position=jnp.asarray(position),
        episode=segments.episode,
        turn=segments.turn,
        plan=segments.plan,
        active_plan=segments.active_plan,
    )
    llama = setting.params.llama
    hidden = forward(llama, segments.token, meta, setting.model, HISTORY)
    logits = np.asarray(lm_logits(llama, hidden), float)
    for row, place in zip(*np.nonzero(segments.learn), strict=True):
        before, token = logits[row, place - 1], int(segments.token[row, place])
        loss = (
            np.log(np.exp(before - before.max()).sum()) + before.max() - before[token]
        )
        yield int(segments.role[row, place]), loss, before.argmax() == token


def test_the_loss_is_that_computed_in_numpy(setting, episodes, sizes):
    segments = segments_of(setting, episodes, prompt=[7, 8, 9])
    loss, metrics = loss_of(setting.params, segments, config=WEIGHTS, **sizes)
    rows = list(slow_losses(setting, segments))
    weights = [0.3 if role == Role.PLAN else 1.7 for role, _, _ in rows]
    losses = [loss for _, loss, _ in rows]
    np.testing.assert_allclose(loss, np.average(losses, weights=weights), rtol=1e-5)
    np.testing.assert_allclose(metrics["sft/token_loss"], np.mean(losses), rtol=1e-5)
    for name, role in (("plan", Role.PLAN), ("decide", Role.DECIDE)):
        own = [(loss, right) for found, loss, right in rows if found == role]
        mean, accuracy = np.mean(own, axis=0)
        np.testing.assert_allclose(metrics[f"sft/loss_{name}"], mean, rtol=1e-5)
        np.testing.assert_allclose(metrics[f"sft/accuracy_{name}"], accuracy)


def test_validation_says_the_same_without_weights(setting, episodes, sizes):
    segments = segments_of(setting, episodes, prompt=[7, 8, 9])
    metrics = sft_validate(setting.params, segments, **sizes)
    expected = np.mean([loss for _, loss, _ in slow_losses(setting, segments)])
    np.testing.assert_allclose(metrics["sft/held_out_token_loss"], expected, rtol=1e-5)


def test_episodes_score_alike_together_and_alone(setting, episodes, sizes):
    """Without a prompt, whose distance would differ, nothing else may differ."""
    segments = segments_of(setting, episodes)
    assert segments.token.shape[0] == 1
    together = scored(setting.params, segments, **sizes)
    alone = [
        scored(setting.params, segments_of(setting, [turns]), **sizes)
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
        lambda p: sft_loss(p, segments, TARGETS, WEIGHTS, model, HISTORY)[0]
    )(params)


def test_nothing_to_learn_gives_no_loss(setting, episodes, sizes):
    segments = segments_of(setting, [episodes[1][:1]])
    loss, metrics = loss_of(setting.params, segments, config=WEIGHTS, **sizes)
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
            learner, segments, optimizer=optimizer, config=WEIGHTS, **sizes
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
