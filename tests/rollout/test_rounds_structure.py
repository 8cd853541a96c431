"""What the compiled rollout must not do: trace again, call back, copy its caches."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params

from jaxplan.models.cache import block_sizes
from jaxplan.models.params import init_params
from jaxplan.rollout.rounds import _Rollout, init_carry, run_segment
from tests.rollout.conftest import GAMMA, MODEL, PLAN, ROLLOUT


def test_one_trace_serves_all_segments(setting, play):
    setting.run(play.carries[0], play.schedule)  # caches may have been cleared
    traces = run_segment._cache_size()
    for carry in (play.carries[0], play.carries[1], play.carries[-1]):
        setting.run(carry, play.schedule)
    assert run_segment._cache_size() == traces


def test_the_host_is_never_called(setting, play):
    traced = run_segment.trace(
        setting.params,
        play.carries[0],
        setting.language,
        play.schedule,
        GAMMA,
        env=setting.env,
        config=ROLLOUT,
        model=MODEL,
        budget=PLAN.budget,
        turn_tokens=setting.turn_tokens,
    )
    assert not re.findall("callback|infeed|outfeed", str(traced.jaxpr))


def casts(jaxpr, shape, in_loop=False):
    """Whether each cast of a tensor of this shape happens inside a loop."""
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "convert_element_type" and eqn.invars[0].aval.shape == shape:
            yield in_loop
        for inner in jaxprs_in_params(eqn.params):
            yield from casts(inner, shape, in_loop or name in ("scan", "while"))


def test_weights_are_cast_once_and_not_for_every_token(setting, play):
    traced = run_segment.trace(
        setting.params,
        play.carries[0],
        setting.language,
        play.schedule,
        GAMMA,
        env=setting.env,
        config=ROLLOUT,
        model=dataclasses.replace(MODEL, compute_dtype="bfloat16"),
        budget=PLAN.budget,
        turn_tokens=setting.turn_tokens,
    )
    tensors = [setting.params.embed.shape, (16, 24), (24, 16)]  # gate and up, down
    found = [list(casts(traced.jaxpr.jaxpr, shape)) for shape in tensors]
    assert found == [[False], [False] * 2 * MODEL.layers, [False] * MODEL.layers]


@pytest.mark.parametrize("unread", [0, 1])
def test_the_model_is_asked_only_where_there_is_something_to_read(
    setting, play, monkeypatch, unread
):
    rollout = _Rollout(
        params=setting.params,
        language=setting.language,
        schedule=play.schedule,
        gamma=GAMMA,
        env=setting.env,
        config=ROLLOUT,
        model=MODEL,
        budget=PLAN.budget,
        turn_tokens=setting.turn_tokens,
        decide_explore=0.0,
    )
    state = rollout._begin(play.carries[1])
    read = state.stream.cursor.at[0].add(-unread)
    cache = dataclasses.replace(state.cache, cursor=read)
    state = dataclasses.replace(state, cache=cache)

    def say(self, state, chunk, limit):  # counts how often it is called
        return dataclasses.replace(state, dropped=state.dropped + 1)

    def observe(self, state, closing):
        return state, play.segments[0].episodes

    monkeypatch.setattr(_Rollout, "_say", say)
    monkeypatch.setattr(_Rollout, "_observe", observe)
    after, _ = jax.jit(rollout._round)(state, jnp.int32(1), prefix=read)
    assert (after.dropped == unread * (1 + ROLLOUT.decode_steps)).all()


@pytest.mark.slow
def test_caches_are_written_in_place(setting, play):
    # Keys and values outweigh all else: a copy of one layer's would be seen.
    model = dataclasses.replace(MODEL, head_dim=128)
    config = dataclasses.replace(ROLLOUT, num_lanes=16, segment_tokens=256)
    assert len(block_sizes(256)) == 2  # so that there is a choice of how much to read
    params = init_params(jax.random.key(0), model, setting.tokenizer.vocab_size).llama
    schedule = dataclasses.replace(
        play.schedule,
        **{name: jnp.zeros((16, 6), jnp.int32) for name in ("world", "seed", "mode")},
        entries=jnp.full(16, -1, jnp.int32),
    )
    carry = init_carry(
        setting.env, setting.language, schedule, jax.random.key(0), config
    )
    compiled = run_segment.lower(
        params,
        carry,
        setting.language,
        schedule,
        GAMMA,
        env=setting.env,
        config=config,
        model=model,
        budget=PLAN.budget,
        turn_tokens=setting.turn_tokens,
    ).compile()
    layer_bytes = 2 * 16 * 256 * 128 * 4
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert temporary < (model.layers + 1) * layer_bytes
    # Zeros are copied into the carry once a segment, each buffer; nothing else is.
    copies = re.findall(r"= f32\[16,\d,128,128\]\S* copy\(", compiled.as_text())
    assert len(copies) <= 2 * model.layers * len(block_sizes(256))
