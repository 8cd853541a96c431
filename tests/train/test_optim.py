"""Clipping, schedule and the skipped update, against numpy and by hand."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxplan.config.schema import LoraConfig, OptimizerConfig
from jaxplan.core.specs import abstract_tensors
from jaxplan.models.params import (
    AgentParams,
    agent_specs,
    init_params,
    split_trained,
)
from jaxplan.train.optim import (
    bad_leaves,
    init_learner,
    learning_rate_schedule,
    make_optimizer,
    update_learner,
)
from tests.fakes import TINY_MODEL

CONFIG = OptimizerConfig(learning_rate=1e-2, warmup_updates=4, final_fraction=0.1)
FLAT = OptimizerConfig(
    learning_rate=1e-2, warmup_updates=0, final_fraction=1.0, beta1=0.0, beta2=0.0
)


update = jax.jit(update_learner, static_argnums=2)


@pytest.fixture(scope="module")
def params() -> AgentParams:
    return init_params(jax.random.key(0), TINY_MODEL, 20)


def gradients(params, scale=1.0):
    leaves, tree = jax.tree.flatten(params)
    chance = np.random.default_rng(0)
    drawn = [jnp.asarray(scale * chance.normal(size=x.shape), x.dtype) for x in leaves]
    return jax.tree.unflatten(tree, drawn)


def test_warm_up_is_linear_and_decay_a_cosine():
    rate = learning_rate_schedule(CONFIG, 24)
    expected = [1e-2 * (1 + i) / 5 for i in range(4)]
    expected += [
        1e-2 * (0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * i / 20))) for i in range(21)
    ]
    rates = [float(rate(update)) for update in range(25)]
    np.testing.assert_allclose(rates, expected, rtol=1e-4)


@pytest.mark.parametrize("updates", [1, 2, 4])
def test_a_run_shorter_than_its_warm_up_has_a_schedule(updates):
    rate = learning_rate_schedule(CONFIG, updates)
    rates = [float(rate(update)) for update in range(updates)]
    assert all(0 < r <= 1e-2 for r in rates)
    assert rates == sorted(rates)


def test_the_first_update_has_a_learning_rate_above_zero(params):
    optimizer = make_optimizer(CONFIG, 24)
    learner, _ = update(init_learner(params, optimizer), gradients(params), optimizer)
    moved = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), learner.params, params)
    assert min(jax.tree.leaves(moved)) > 0


def test_weights_that_decay_can_be_held_still(params):
    decaying = dataclasses.replace(FLAT, weight_decay=0.5)
    optimizer, none = make_optimizer(decaying, 8), gradients(params, scale=0.0)
    held, free = (
        update(init_learner(params, optimizer), none, optimizer, jnp.float32(w))[0]
        for w in (0.0, 1.0)
    )
    for before, still, moved in zip(
        *(
            jax.tree.leaves(tree.layers.gate)
            for tree in (params.llama, held.params.llama, free.params.llama)
        ),
        strict=True,
    ):
        np.testing.assert_array_equal(still, before)
        np.testing.assert_allclose(moved, before * (1 - 1e-2 * 0.5), rtol=1e-5)
    assert (held.params.value.hidden != params.value.hidden).any()


def test_clipping_is_by_the_global_norm(params):
    """One Adam moment shows it: element-wise clipping would bend the gradient."""
    config = dataclasses.replace(FLAT, beta1=0.9, beta2=0.999, max_grad_norm=0.5)
    optimizer = make_optimizer(config, 10)
    grads = gradients(params, scale=3.0)
    learner, norm = update(init_learner(params, optimizer), grads, optimizer)
    squares = [np.sum(np.asarray(g, float) ** 2) for g in jax.tree.leaves(grads)]
    np.testing.assert_allclose(norm, np.sqrt(sum(squares)), rtol=1e-5)
    moment = optax.tree.get(learner.opt_state, "mu")
    factor = 0.5 / np.sqrt(sum(squares)) * (1 - 0.9)
    for seen, grad in zip(jax.tree.leaves(moment), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(seen, factor * grad, rtol=1e-4, atol=1e-9)


def test_small_gradients_are_not_clipped(params):
    config = dataclasses.replace(FLAT, beta1=0.9, beta2=0.999, max_grad_norm=1e6)
    optimizer = make_optimizer(config, 10)
    grads = gradients(params)
    learner, _ = update(init_learner(params, optimizer), grads, optimizer)
    moment = optax.tree.get(learner.opt_state, "mu")
    for seen, grad in zip(jax.tree.leaves(moment), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(seen, 0.1 * grad, rtol=1e-5)


def test_the_value_head_learns_at_its_own_rate(params):
    """Without moments Adam moves every entry by the learning rate alone."""
    optimizer = make_optimizer(FLAT, 10, value_ratio=7.0)
    learner, _ = update(init_learner(params, optimizer), gradients(params), optimizer)
    moved = jax.tree.map(lambda a, b: np.abs(a - b), learner.params, params)
    for leaf in jax.tree.leaves(moved.llama):
        np.testing.assert_allclose(np.median(leaf), 1e-2, rtol=1e-3)
    for leaf in jax.tree.leaves(moved.value):
        np.testing.assert_allclose(np.median(leaf), 7e-2, rtol=1e-3)


def test_only_matrices_decay(params):
    config = dataclasses.replace(FLAT, weight_decay=0.5)
    optimizer = make_optimizer(config, 10)
    nothing = jax.tree.map(jnp.zeros_like, params)
    learner, _ = update(init_learner(params, optimizer), nothing, optimizer)
    kept = {".llama.layers.attention_norm", ".llama.layers.ffn_norm"}
    kept |= {".llama.final_norm", ".value.hidden_bias", ".value.out", ".value.out_bias"}
    after = jax.tree.leaves(learner.params)
    before = jax.tree_util.tree_leaves_with_path(params)
    for new, (path, old) in zip(after, before, strict=True):
        name = jax.tree_util.keystr(path)
        share = 1 if name in kept else 1 - 1e-2 * 0.5
        np.testing.assert_allclose(new, share * old, rtol=1e-6, err_msg=name)


def test_the_biases_of_layers_do_not_decay_stacked_though_they_are():
    model = dataclasses.replace(TINY_MODEL, attention_bias=True, mlp_bias=True)
    ones = jax.tree.map(lambda spec: jnp.ones(spec.shape), agent_specs(model, 20))
    optimizer = make_optimizer(dataclasses.replace(FLAT, weight_decay=0.5), 10)
    nothing = jax.tree.map(jnp.zeros_like, ones)
    decay = jax.jit(lambda p: optimizer.update(nothing, optimizer.init(p), p))
    layers = decay(ones)[0].llama.layers
    assert jnp.all(layers.query < 0)
    for name in ("query_bias", "attention_out_bias", "gate_bias", "down_bias"):
        assert jnp.all(getattr(layers, name) == 0), name


@pytest.mark.parametrize("poison", [jnp.nan, jnp.inf])
def test_a_gradient_that_is_not_finite_is_skipped_counted_and_named(params, poison):
    optimizer = make_optimizer(CONFIG, 24)
    good = gradients(params)
    learner, _ = update(init_learner(params, optimizer), good, optimizer)
    bad_value = dataclasses.replace(
        good.value, hidden=good.value.hidden.at[0, 0].set(poison)
    )
    bad = dataclasses.replace(good, value=bad_value)
    for count in (1, 2):
        skipped, norm = update(learner, bad, optimizer)
        assert not jnp.isfinite(norm)
        assert skipped.skipped == count
        assert bad_leaves(skipped) == [".value.hidden"]
        before, after = ((x.params, x.opt_state) for x in (learner, skipped))
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
            np.testing.assert_array_equal(a, b)
        learner = skipped
    recovered, _ = update(learner, good, optimizer)
    assert recovered.skipped == 0
    assert bad_leaves(recovered) == []


def test_muon_steps_along_the_orthogonal_factor_of_a_matrix(params):
    """Against a singular value decomposition; the iteration is only roughly exact."""
    config = dataclasses.replace(FLAT, kind="muon")
    optimizer = make_optimizer(config, 10)
    grads = gradients(params)
    learner, _ = update(init_learner(params, optimizer), grads, optimizer)
    inputs = {"query": 1, "attention_out": 2, "gate": 1, "down": 1}
    for name, count in inputs.items():
        start, end = (getattr(p.llama.layers, name) for p in (params, learner.params))
        for layer, (old, new) in enumerate(zip(start, end, strict=True)):
            rows = math.prod(old.shape[:count])
            matrix = np.asarray(getattr(grads.llama.layers, name)[layer], float)
            u, _, v = np.linalg.svd(matrix.reshape(rows, -1), full_matrices=False)
            step = -np.asarray(new - old, float).reshape(rows, -1)
            scale = 1e-2 * 0.4 * math.sqrt(max(step.shape))
            values = np.linalg.svd(step / scale, compute_uv=False)
            assert 0.6 < values.min() <= values.max() < 1.3, name
            cosine = (
                np.sum(step * (u @ v)) / np.linalg.norm(step) / np.linalg.norm(u @ v)
            )
            assert cosine > 0.95, name


def test_muon_leaves_all_but_the_layers_matrices_to_adam(params):
    grads = gradients(params)
    ends = [
        update(init_learner(params, optimizer), grads, optimizer)[0].params
        for optimizer in (
            make_optimizer(dataclasses.replace(FLAT, kind=kind), 10)
            for kind in ("adamw", "muon")
        )
    ]
    for name in ("embed", "final_norm"):
        by_adam, by_muon = (getattr(end.llama, name) for end in ends)
        np.testing.assert_allclose(by_adam, by_muon, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ends[0].value.hidden, ends[1].value.hidden, rtol=1e-5)
    gap = np.abs(np.asarray(ends[0].llama.layers.up - ends[1].llama.layers.up)).max()
    assert gap > 1e-3


def test_only_what_learns_has_moments():
    """Adapters and the value head: bytes counted by hand."""
    lora = LoraConfig(rank=3, targets=("query", "attention_out", "down"))
    model = dataclasses.replace(TINY_MODEL, lora=lora)
    trained, _ = split_trained(abstract_tensors(agent_specs(model, 20)))
    optimizer = make_optimizer(OptimizerConfig(), 10)
    learner = jax.eval_shape(lambda p: init_learner(p, optimizer), trained)
    width, ffn, heads, depth = 32, 48, 4 * 8, 2
    adapters = depth * 3 * ((width + heads) + (heads + width) + (ffn + width))
    value_head = width * width + 2 * width + 1
    for name in ("mu", "nu"):
        moments = jax.tree.leaves(optax.tree.get(learner.opt_state, name))
        held = sum(leaf.size * leaf.dtype.itemsize for leaf in moments)
        assert held == 4 * (adapters + value_head)


def test_a_critic_of_its_own_is_clipped_and_stepped_apart():
    """Two losses, two norms: by plain arithmetic, on the first step of a schedule."""
    critic = dataclasses.replace(TINY_MODEL, layers=1)
    specs = agent_specs(TINY_MODEL, 20, critic)
    params = jax.tree.map(lambda spec: jnp.zeros(spec.shape), specs)
    config = OptimizerConfig(warmup_updates=0, max_grad_norm=1.0)
    optimizer = make_optimizer(config, 10, value_ratio=5.0, critic_ratio=3.0)
    small = jax.tree.map(lambda x: jnp.full_like(x, 1e-6), params)
    grads = dataclasses.replace(
        small, critic=jax.tree.map(lambda x: jnp.full_like(x, 7.0), small.critic)
    )
    learner, _ = update(init_learner(params, optimizer), grads, optimizer)
    mu = optax.tree.get(learner.opt_state, "mu")
    kept = 1 - config.beta1  # of a first gradient
    np.testing.assert_allclose(mu.llama.final_norm, kept * 1e-6, rtol=1e-5)
    judging = optax.tree.norm((grads.value, grads.critic))
    np.testing.assert_allclose(mu.critic.final_norm, kept * 7.0 / judging, rtol=1e-5)
    rate = config.learning_rate
    np.testing.assert_allclose(learner.params.critic.embed, -3.0 * rate, rtol=1e-3)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_bfloat16_parameters_take_the_steps_of_float32_ones_on_average(kind):
    # Steps of 1e-5 on weights near 1 are a thousandth of what bfloat16 tells apart.
    model = dataclasses.replace(TINY_MODEL, param_dtype="bfloat16")
    config = dataclasses.replace(FLAT, kind=kind, learning_rate=1e-5, beta2=0.9)
    optimizer = make_optimizer(config, 100)
    narrow = init_params(jax.random.key(0), model, 20)
    embed = jnp.ones_like(narrow.llama.embed)
    narrow = dataclasses.replace(
        narrow, llama=dataclasses.replace(narrow.llama, embed=embed)
    )
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), narrow)
    grads = jax.tree.map(jnp.ones_like, narrow)
    learners = [init_learner(params, optimizer) for params in (narrow, wide)]
    for _ in range(40):
        learners = [
            update(
                learner,
                jax.tree.map(lambda g, p: g.astype(p.dtype), grads, of),
                optimizer,
            )[0]
            for learner, of in zip(learners, (narrow, wide), strict=True)
        ]
    stored, exact = (learner.params.llama for learner in learners)
    assert stored.embed.dtype == stored.layers.query.dtype == jnp.bfloat16
    assert stored.final_norm.dtype == stored.layers.ffn_norm.dtype == jnp.float32
    for _, moments in optax.tree.get_all_with_path(learners[0].opt_state, "mu"):
        dtypes = {leaf.dtype for leaf in jax.tree.leaves(moments)}
        assert dtypes == {jnp.dtype("float32")}
    moved = np.mean(1 - np.asarray(stored.embed, np.float32))
    expected = np.mean(1 - np.asarray(exact.embed))
    assert expected > 1e-4
    assert moved == pytest.approx(expected, rel=0.5)
