"""The same run on one device and on eight: losses, gradients, plays, and who has what.

The optimizer of these tests is plain gradient descent, so that parameters after a step
tell the gradient; AdamW would blow rounding errors up to whole steps.
"""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxplan.config.schema import (
    CollectConfig,
    EnvConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    PpoConfig,
    RolloutConfig,
    RunConfig,
    SftConfig,
)
from jaxplan.core.mesh import (
    check_tensors,
    num_shards,
    settle,
    shardings_of,
    to_host,
)
from jaxplan.io.metrics import without_timing
from jaxplan.io.stopping import StopRequest
from jaxplan.models.params import AgentParams, init_params, split_trained
from jaxplan.rollout.rounds import run_segment
from jaxplan.rollout.schedule import training_schedule
from jaxplan.train.optim import make_optimizer
from jaxplan.train.ppo import update
from jaxplan.train.ppo_loop import begin_state, iteration, play
from jaxplan.train.setting import Setting, check_mesh
from jaxplan.train.sft import Segments, sft_loss
from jaxplan.train.state import begin_learner, draw_params, reinforcible

MESHES = {"8x1x1": (8, 1, 1), "2x2x2": (2, 2, 2), "1x4x2": (1, 4, 2)}
ALONE = (1, 1, 1)
MODEL = ModelConfig(
    width=16,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=4,
    ffn_width=24,
    tie_embeddings=False,
)
ROLLOUT = RolloutConfig(
    num_lanes=16,
    segment_tokens=96,
    rounds=6,
    prefill_tokens=8,
    decode_steps=3,
    history=2,
    observation_tokens=8,
)
PPO = PpoConfig(num_minibatches=2, gamma=0.9, value_warmup_iterations=0)
SFT = SftConfig(batch_segments=8)
DESCENT = optax.sgd(0.1)
BATCH, LENGTH, TARGETS = 8, 40, 12
WITHIN = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def on_mesh(setting, tmp_path_factory):
    def make(shape, **sections) -> Setting:
        data, fsdp, model = shape
        config = RunConfig(
            mesh=MeshConfig(data=data, fsdp=fsdp, model=model),
            env=EnvConfig(pool_size=4, pool_refresh=2),
            plan=setting.plan,
            model=MODEL,
            rollout=ROLLOUT,
            sft=SFT,
            ppo=PPO,
        )
        return Setting(
            config=dataclasses.replace(config, **sections),
            run_dir=tmp_path_factory.mktemp("run"),
            env=setting.env,
            language=setting.language,
            vocab_size=setting.tokenizer.vocab_size,
            turn_tokens=setting.turn_tokens,
            stop=StopRequest(),
        )

    return make


@pytest.fixture(scope="module")
def primed(setting) -> AgentParams:
    """An agent that plans now and then, and has opinions."""
    params = init_params(jax.random.key(1), MODEL, setting.tokenizer.vocab_size)
    head = params.llama.lm_head
    for marker, bias in ((setting.plan.open, 1.5), (setting.plan.close, 6.0)):
        first = setting.tokenizer.encode(marker)[0]
        head = head.at[:, first].add(bias / MODEL.width)
    llama = dataclasses.replace(
        params.llama, embed=50 * params.llama.embed + 2.0, lm_head=head
    )
    out = jax.random.normal(jax.random.key(2), params.value.out.shape) / 4
    return AgentParams(llama=llama, value=dataclasses.replace(params.value, out=out))


@pytest.fixture(scope="module")
def segments() -> Segments:
    rng = np.random.default_rng(0)
    shape = (BATCH, LENGTH)

    def integers(low, high):
        return jnp.asarray(rng.integers(low, high, shape), jnp.int32)

    turn = jnp.asarray(np.sort(rng.integers(0, 6, shape), axis=1), jnp.int32)
    token = integers(0, 1000)
    return Segments(
        token=token,
        target=token,
        role=integers(4, 7),
        learn=(integers(0, 4) == 0).astype(jnp.int32),
        turn=turn,
        episode=jnp.ones(shape, jnp.int32),
        plan=jnp.full(shape, 2**30, jnp.int32),
        active_plan=jnp.zeros(shape, jnp.int32),
    )


def learner_on(own: Setting, params, optimizer):
    return begin_learner(params, own.specs, optimizer, own.mesh)


def assert_close(one, other) -> str:
    """Compare two pytrees; the largest difference, for the table of a report."""
    furthest = 0.0
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    for a, b in pairs:
        np.testing.assert_allclose(a, b, **WITHIN)
        furthest = max(furthest, np.abs(np.asarray(a) - np.asarray(b)).max())
    return f"{furthest:.1e}"


@pytest.fixture(scope="module")
def imitated(on_mesh, primed, segments):
    """Loss and gradients of imitation on a mesh."""

    @jax.jit
    def grade(params, segments):
        loss = partial(
            sft_loss,
            max_targets=TARGETS,
            config=SFT,
            model=MODEL,
            history=ROLLOUT.history,
        )
        return jax.value_and_grad(loss, has_aux=True)(params, None, segments)

    def run(shape):
        own = on_mesh(shape)
        params = learner_on(own, primed, DESCENT).params
        with jax.set_mesh(own.mesh):
            return grade(params, segments)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("shape", MESHES.values(), ids=MESHES)
def test_imitation_has_the_same_loss_and_gradients_on_every_mesh(
    imitated, shape, record_property
):
    (loss, metrics), grads = to_host(imitated(shape))
    (alone, alone_metrics), alone_grads = to_host(imitated(ALONE))
    assert np.isfinite(alone)
    record_property("loss", assert_close((loss, metrics), (alone, alone_metrics)))
    assert max(np.abs(grad).max() for grad in jax.tree.leaves(alone_grads)) > 1e-2
    record_property("gradients", assert_close(grads, alone_grads))


@dataclasses.dataclass(frozen=True)
class Iterations:
    """Two PPO iterations: all metrics, the end, and what was compiled on the way."""

    rows: list[dict[str, float]]
    state: dict
    compiled: tuple[int, int]


@pytest.fixture(scope="module")
def reinforced(on_mesh, primed):
    made: dict[tuple[int, ...], Iterations] = {}

    def run(shape) -> Iterations:
        if shape in made:
            return made[shape]
        own = on_mesh(shape)
        check_mesh(own)
        begun = learner_on(own, primed, DESCENT)
        reference = learner_on(own, primed, DESCENT).params.llama
        state = begin_state(own, begun)
        before = run_segment._cache_size(), update._cache_size()
        rows = []
        with jax.set_mesh(own.mesh):
            own = dataclasses.replace(own, language=settle(own.language))
            for number in range(2):
                state, row = iteration(own, state, reference, DESCENT, number)
                rows.append(without_timing(row))
        after = run_segment._cache_size(), update._cache_size()
        compiled = after[0] - before[0], after[1] - before[1]
        made[shape] = Iterations(rows=rows, state=state, compiled=compiled)
        return made[shape]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("shape", MESHES.values(), ids=MESHES)
def test_ppo_iterations_are_the_same_on_every_mesh(
    reinforced, primed, shape, record_property
):
    there, alone = reinforced(shape), reinforced(ALONE)
    for row, expected in zip(there.rows, alone.rows, strict=True):
        assert row.keys() == expected.keys()
        assert row["ppo/ratio_error"] < 1e-5
        assert row["rollout/plan_rate"] > 0
        for name, value in expected.items():
            np.testing.assert_allclose(row[name], value, **WITHIN, err_msg=name)
    record_property("metrics", assert_close(there.rows, alone.rows))
    learnt = to_host(there.state["learner"].params)
    expected = to_host(alone.state["learner"].params)
    record_property("parameters", assert_close(learnt, expected))
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), learnt, to_host(primed))
    assert max(jax.tree.leaves(moved)) > 1e-3
    stream, expected = there.state["carry"].stream, alone.state["carry"].stream
    np.testing.assert_array_equal(stream.tokens.token, expected.tokens.token)
    lanes, expected = there.state["carry"].lanes, alone.state["carry"].lanes
    np.testing.assert_array_equal(lanes.turn, expected.turn)


@pytest.mark.slow
@pytest.mark.parametrize("shape", MESHES.values(), ids=MESHES)
def test_every_program_of_an_iteration_is_compiled_once(reinforced, shape):
    assert reinforced(shape).compiled == (1, 1)


@pytest.mark.slow
@pytest.mark.parametrize("shape", MESHES.values(), ids=MESHES)
def test_after_an_update_every_tensor_is_still_where_it_belongs(
    reinforced, on_mesh, shape
):
    own = on_mesh(shape)
    state = reinforced(shape).state
    expected = learner_on(own, state["learner"].params, DESCENT)
    for leaf, begun in zip(
        jax.tree.leaves(state["learner"]), jax.tree.leaves(expected), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(begun.sharding, leaf.ndim)
    shards = num_shards(own.mesh)
    for leaf in jax.tree.leaves(state["carry"]):
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            assert leaf.addressable_shards[0].data.shape[0] * shards == leaf.shape[0]


def bytes_by_device(tree) -> set[int]:
    """What each device holds of a pytree; one number, if all hold as much."""
    held = dict.fromkeys(jax.devices(), 0)
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return set(held.values())


@pytest.mark.parametrize(
    ("shape", "parts"), [((8, 1, 1), 1), ((2, 2, 2), 4), ((1, 4, 2), 8)]
)
def test_parameters_and_optimizer_state_are_really_split(
    on_mesh, shape, parts, record_property
):
    own = on_mesh(shape)
    optimizer = make_optimizer(OptimizerConfig(), 10)
    params = draw_params(jax.random.key(0), own.specs, own.mesh)
    learner = learner_on(own, params, optimizer)
    mu, nu = (optax.tree.get(learner.opt_state, name) for name in ("mu", "nu"))
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    for tree in (params, learner.params, mu, nu):
        (held,) = bytes_by_device(tree)
        # Norms are split over fsdp alone, and the value head's last bias not at all.
        assert whole / parts <= held < whole / parts * 1.02
    record_property("bytes", f"{held:,} of {whole:,}")
    (rest,) = bytes_by_device((learner.skipped, learner.bad_leaves))
    assert rest < 64


def test_the_moments_of_muon_lie_where_their_tensors_do(on_mesh):
    own = on_mesh((2, 2, 2))
    optimizer = make_optimizer(OptimizerConfig(kind="muon"), 10)
    params = draw_params(jax.random.key(0), own.specs, own.mesh)
    learner = learner_on(own, params, optimizer)
    moments = optax.tree.get_all_with_path(learner.opt_state, "mu")
    places = [
        (leaf.shape, leaf.sharding.spec)
        for _, tree in moments
        for leaf in jax.tree.leaves(tree)
    ]
    expected = [(leaf.shape, leaf.sharding.spec) for leaf in jax.tree.leaves(params)]
    assert sorted(map(str, places)) == sorted(map(str, expected))


@pytest.fixture(scope="module")
def said(on_mesh, primed):
    """What lanes say in a segment on a mesh, and in what program."""

    def run(shape, num_lanes):
        rollout = dataclasses.replace(ROLLOUT, num_lanes=num_lanes)
        own = on_mesh(shape, rollout=rollout)
        state = begin_state(own, learner_on(own, primed, DESCENT))
        with jax.set_mesh(own.mesh):
            policy = state["learner"].params.llama
            return to_host(play(own, policy, state, 0)[1].stream.tokens.token)

    return run


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "num_lanes"), [((1, 1, 1), 2), ((8, 1, 1), 32)])
def test_what_a_lane_says_does_not_depend_on_mesh_or_batch(said, shape, num_lanes):
    tokens, expected = said(shape, num_lanes), said(ALONE, 16)
    common = min(num_lanes, 16)
    np.testing.assert_array_equal(tokens[:common], expected[:common])


COLLECTIVE = re.compile(
    r" (?:all-reduce|all-gather|reduce-scatter|all-to-all|collective-\w+)(?:-start)?\("
)
COLLECTIVE_PLACE = re.compile(COLLECTIVE.pattern + r".*op_name=\"([^\"]*)\"")


@pytest.mark.slow
@pytest.mark.parametrize("shape", MESHES.values(), ids=MESHES)
def test_worlds_are_stepped_without_a_word_between_devices(
    on_mesh, setting, primed, shape
):
    own = on_mesh(shape)
    learner = learner_on(own, primed, DESCENT)
    with jax.set_mesh(own.mesh):
        state = begin_state(own, learner)
        key = jax.random.key(0)
        program = run_segment.lower(
            learner.params.llama,
            state["carry"],
            settle(own.language),
            training_schedule(state["pool"], key, 0, ROLLOUT.num_lanes),
            0.9,
            env=own.env,
            config=ROLLOUT,
            model=MODEL,
            budget=setting.plan.budget,
            turn_tokens=own.turn_tokens,
        ).compile()
    text = program.as_text()
    places = COLLECTIVE_PLACE.findall(text)
    assert len(places) == len(COLLECTIVE.findall(text))
    scopes = {"observe": 0, "say": 0, "encode_prefix": 0, "": 0}
    for place in places:
        scopes[next(s for s in scopes if not s or f"/{s}/" in place)] += 1
    assert scopes["observe"] == 0
    if shape == (8, 1, 1):
        assert not places
    else:  # the model speaks, and its weights are gathered once
        assert scopes["say"] > 0
        assert scopes[""] > 0


ADAPTED = dataclasses.replace(MODEL, lora=LoraConfig(rank=2, alpha=4.0))
CRITIC = dataclasses.replace(ADAPTED, width=8, layers=1)


@pytest.fixture(scope="module")
def grown(on_mesh, primed):
    """Two PPO iterations with adapters and a critic of its own."""

    def run(shape):
        ppo = dataclasses.replace(PPO, critic=CRITIC)
        own = on_mesh(shape, model=ADAPTED, ppo=ppo)
        check_mesh(own)
        place = jax.jit(lambda x: x, out_shardings=shardings_of(own.specs, own.mesh))
        placed, specs = place(primed), own.specs_of("ppo")
        agent = reinforcible(own.growth_key, placed, CRITIC, specs, own.mesh)
        learns, frozen = split_trained(agent)
        learning, _ = split_trained(specs)
        state = begin_state(own, begin_learner(learns, learning, DESCENT, own.mesh))
        rows = []
        with jax.set_mesh(own.mesh):
            own = dataclasses.replace(own, language=settle(own.language))
            for number in range(2):
                state, row = iteration(
                    own, state, placed.llama, DESCENT, number, frozen
                )
                rows.append(without_timing(row))
        return rows, state["learner"].params, frozen

    return run


@pytest.mark.slow
def test_adapters_and_a_critic_learn_the_same_on_every_mesh_and_are_split(grown):
    (rows, learnt, frozen), (expected, alone, _) = grown((2, 2, 2)), grown(ALONE)
    for row, other in zip(rows, expected, strict=True):
        assert row["ppo/ratio_error"] < 1e-5
        for name, value in other.items():
            np.testing.assert_allclose(row[name], value, **WITHIN, err_msg=name)
    assert_close(to_host(learnt), to_host(alone))
    moved = [np.abs(adapter.b).max() for adapter in alone.llama.layers.lora.values()]
    assert min(moved) > 1e-5
    (held,) = bytes_by_device(frozen)
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(frozen))
    assert held < whole / 4 * 1.02


LLAMA_TEACHES = CollectConfig(teacher="llama", lanes=12)


@pytest.mark.parametrize(
    ("mesh", "sections", "told"),
    [
        ((3, 1, 1), {}, r"num_lanes=16 is not divisible by .*data=3 x .*fsdp=1 x .*=2"),
        ((4, 1, 1), {"sft": SftConfig(batch_segments=6)}, r"batch_segments=6 .*data=4"),
        ((8, 1, 1), {"collect": LLAMA_TEACHES}, r"lanes=12 .*data=8.* a Llama plays"),
        ((1, 1, 4), {}, r"mesh.model=4 does not divide kv_heads=2 of llama.layers.key"),
        ((1, 3, 1), {}, r"mesh.fsdp=3 does not divide width=16 of llama.embed"),
    ],
)
def test_a_mesh_that_does_not_divide_the_run_is_refused(on_mesh, mesh, sections, told):
    with pytest.raises(ValueError, match=told):
        check_mesh(on_mesh(mesh, **sections))
    check_tensors(on_mesh(ALONE).specs, on_mesh(ALONE).mesh)
