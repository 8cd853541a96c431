"""The host loops on a tiny world: stopped and resumed, and what makes them give up."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxplan.config.schema import (
    EnvConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    PpoConfig,
    RunConfig,
    SftConfig,
)
from jaxplan.io.checkpoints import CheckpointMismatchError, save_checkpoint
from jaxplan.io.metrics import read_metrics, without_timing
from jaxplan.io.stopping import Stopped, StopRequest
from jaxplan.models.params import lora_of, replace_lora
from jaxplan.train.data import SegmentData
from jaxplan.train.packing import Packer, TurnTokens
from jaxplan.train.ppo_loop import rollout_metrics, train_ppo
from jaxplan.train.setting import Setting, load_player, load_policy
from jaxplan.train.sft_loop import train_sft
from jaxplan.train.state import resume, start_params


class StopAfter(StopRequest):
    """Someone asks after so many updates."""

    def __init__(self, updates):
        self._left = updates

    @property
    def requested(self):
        self._left -= 1
        return self._left < 0


NEVER = 10**9


@pytest.fixture(scope="module")
def make_setting(setting):
    def make(run_dir, stop_after=NEVER, **sections) -> Setting:
        config = RunConfig(
            env=EnvConfig(pool_size=4, pool_refresh=2),
            plan=setting.plan,
            model=setting.model,
            rollout=setting.rollout,
            sft=SftConfig(
                batch_segments=2, epochs=2, validate_every=2, checkpoint_every=2
            ),
            ppo=PpoConfig(
                iterations=3, value_warmup_iterations=1, checkpoint_every=2, gamma=0.9
            ),
        )
        run_dir.mkdir(exist_ok=True)
        return Setting(
            config=dataclasses.replace(config, **sections),
            run_dir=run_dir,
            env=setting.env,
            language=setting.language,
            vocab_size=setting.tokenizer.vocab_size,
            turn_tokens=setting.turn_tokens,
            stop=StopAfter(stop_after),
        )

    return make


@pytest.fixture(scope="module")
def data(setting) -> SegmentData:
    """Seven segments in which every other turn plans."""
    encode = setting.tokenizer.encode
    plan = setting.plan
    spoken = [*encode(plan.open), *encode(" stone light"), *encode(plan.close)]
    packer = Packer(
        setting.language.grammar,
        [setting.language.prompt(0)],
        setting.rollout.segment_tokens,
        setting.rollout.history,
    )
    for episode in range(60):
        said = spoken if episode % 2 else []
        turn = TurnTokens(
            observation=[500 + episode, 600],
            generated=[*said, *encode("Move East")],
            plan_length=len(said),
            learn_action=True,
        )
        packer.add([turn] * 2)
    fields = {name: field[:7] for name, field in packer.finish().items()}
    assert len(fields["token"]) == 7
    return SegmentData(fields=fields, max_targets=int(fields["learn"].sum(1).max()))


def numbers(run_dir):
    return [without_timing(row) for row in read_metrics(run_dir)]


def assert_equal_trees(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def taught(tmp_path_factory, make_setting, data) -> Setting:
    own = make_setting(tmp_path_factory.mktemp("whole") / "run")
    results = train_sft(own, data, data)
    assert results["updates"] == 6
    return own


def test_imitation_resumes_in_the_middle_of_an_epoch_as_if_never_stopped(
    tmp_path, make_setting, data, taught
):
    for updates in (2, 1):  # stopped after the 3rd update, then after the 5th
        with pytest.raises(Stopped):
            train_sft(make_setting(tmp_path / "run", updates), data, data)
    resumed = make_setting(tmp_path / "run")
    train_sft(resumed, data, data)
    assert numbers(resumed.run_dir) == numbers(taught.run_dir)
    assert [row["step"] for row in numbers(resumed.run_dir)] == list(range(6))
    assert_equal_trees(load_policy(resumed, "sft"), load_policy(taught, "sft"))


def test_imitation_learns_and_validates(taught):
    rows = numbers(taught.run_dir)
    assert rows[-1]["sft/loss"] < rows[0]["sft/loss"]
    assert [row["step"] for row in rows if "sft/held_out_token_loss" in row] == [
        1,
        3,
        5,
    ]


def test_too_few_segments_for_a_batch_are_refused(tmp_path, make_setting, data):
    own = make_setting(tmp_path, sft=SftConfig(batch_segments=8))
    with pytest.raises(ValueError, match=r"batch_segments=8.* only 7 segments"):
        train_sft(own, data, data)


def test_a_stage_is_not_made_shorter_than_it_is(tmp_path):
    state = {"weight": jnp.ones(2)}
    save_checkpoint(tmp_path, 3, state, {})
    assert resume(tmp_path, state, dict, most=3)[1] == 3
    with pytest.raises(ValueError, match="made 3 steps, and 2 are asked for"):
        resume(tmp_path, state, dict, most=2)


def test_three_lost_updates_in_a_row_end_the_run(tmp_path, make_setting, data):
    """The first update throws the parameters so far away that nothing is finite."""
    sft = SftConfig(
        batch_segments=2,
        epochs=9,
        optimizer=OptimizerConfig(learning_rate=1e30, warmup_updates=0),
    )
    own = make_setting(tmp_path, sft=sft)
    with pytest.raises(FloatingPointError, match=r"sft: 3 updates in a row .*embed"):
        train_sft(own, data, data)
    assert [row["sft/skipped_updates"] for row in read_metrics(tmp_path)] == [0, 1, 2]


@pytest.fixture(scope="module")
def reinforced(tmp_path_factory, make_setting, setting) -> Setting:
    own = make_setting(tmp_path_factory.mktemp("whole") / "run")
    assert train_ppo(own, setting.params)["iterations"] == 3
    return own


@pytest.mark.slow
def test_reinforcement_resumes_in_the_middle_of_episodes_as_if_never_stopped(
    tmp_path, make_setting, setting, reinforced
):
    with pytest.raises(Stopped):
        train_ppo(make_setting(tmp_path / "run", 0), setting.params)
    resumed = make_setting(tmp_path / "run")
    train_ppo(resumed, setting.params)
    rows = numbers(resumed.run_dir)
    assert rows == numbers(reinforced.run_dir)
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert_equal_trees(load_policy(resumed, "ppo"), load_policy(reinforced, "ppo"))


@pytest.mark.slow
def test_the_values_warm_up_before_the_policy_moves(tmp_path, make_setting, setting):
    ppo = PpoConfig(iterations=2, value_warmup_iterations=2)
    own = make_setting(tmp_path, ppo=ppo)
    train_ppo(own, setting.params)
    learnt = load_policy(own, "ppo")
    assert_equal_trees(learnt.llama, setting.params.llama)
    assert not np.array_equal(learnt.value.out, setting.params.value.out)


@pytest.mark.slow
def test_the_metrics_of_a_play_add_up(reinforced):
    for row in read_metrics(reinforced.run_dir):
        assert row["ppo/ratio_error"] < 1e-5
        assert row["ppo/skipped_updates"] == 0
        assert 0 < row["rollout/utilisation"] <= 1
        assert 0 < row["rollout/stream_fill"] <= 1
        assert row["rollout/env_steps"] >= row["rollout/turns"]
        per_turn = row["rollout/plan_rate"] * row["rollout/plan_tokens_per_plan"]
        np.testing.assert_allclose(
            per_turn, row["rollout/plan_tokens_per_turn"], rtol=1e-4
        )


def test_play_is_told_apart_by_the_price_lanes_are_told(segment):
    end = jax.device_get(segment.turns.end)
    told = jax.device_get(rollout_metrics(segment, (0.5, 2.0)))
    for lanes, name in ((slice(0, 2), "0.5"), (slice(2, 4), "2")):
        rate = end.planned[lanes][end.complete[lanes]].mean()
        np.testing.assert_allclose(
            told[f"rollout/plan_rate_at_{name}"], rate, rtol=1e-6
        )


ADAPTED = LoraConfig(rank=2, alpha=4.0, rslora=True)
CRITIC = ModelConfig(width=8, layers=1, heads=1, kv_heads=1, head_dim=8, ffn_width=8)
GROWN = {  # whether SFT trains adapters, and the critic
    "adapters throughout": (True, CRITIC),
    "adapters in PPO": (False, dataclasses.replace(CRITIC, lora=ADAPTED)),
}


@pytest.fixture(scope="module", params=GROWN.values(), ids=GROWN)
def grown(request, tmp_path_factory, make_setting, setting, data):
    """A run with adapters and a critic of its own, and the same run interrupted."""
    in_sft, critic = request.param
    sections = {
        "model": dataclasses.replace(setting.model, lora=ADAPTED),
        "sft": SftConfig(batch_segments=2, kl_coef=0.1, lora=in_sft, updates=2),
        "ppo": PpoConfig(
            iterations=2, value_warmup_iterations=1, gamma=0.9, critic=critic
        ),
    }
    runs = tmp_path_factory.mktemp("grown")
    whole = make_setting(runs / "whole", **sections)
    train_sft(whole, data, data)
    train_ppo(whole, load_policy(whole, "sft"))
    other = runs / "other"
    with pytest.raises(Stopped):
        train_sft(make_setting(other, 0, **sections), data, data)
    train_sft(make_setting(other, **sections), data, data)
    own = make_setting(other, 0, **sections)
    with pytest.raises(Stopped):
        train_ppo(own, load_policy(own, "sft"))
    own = make_setting(other, **sections)
    train_ppo(own, load_policy(own, "sft"))
    return whole, own


@pytest.mark.slow
def test_adapters_and_a_critic_resume_as_if_never_stopped(grown):
    whole, resumed = grown
    assert numbers(resumed.run_dir) == numbers(whole.run_dir)
    for stage in ("sft", "ppo"):
        assert_equal_trees(load_policy(resumed, stage), load_policy(whole, stage))


@pytest.mark.slow
def test_what_adapters_stand_beside_stays_and_the_rest_learns(grown):
    whole, _ = grown
    config = whole.config
    start = start_params(
        jax.random.key(config.seed), config.model, whole.specs, whole.mesh
    )
    primed, learnt = load_policy(whole, "sft"), load_policy(whole, "ppo")
    before = start if config.sft.lora else primed
    assert_equal_trees(
        replace_lora(learnt.llama, None), replace_lora(before.llama, None)
    )
    assert (lora_of(primed.llama) is not None) == config.sft.lora
    assert all(np.any(np.asarray(x.b)) for x in lora_of(learnt.llama).values())
    assert learnt.value.hidden.shape == (CRITIC.width, CRITIC.width)
    assert np.any(np.asarray(learnt.value.out))
    assert_equal_trees(load_player(whole, "ppo"), learnt.llama)


@pytest.mark.slow
def test_what_samples_is_what_learns_with_adapters_too(grown):
    whole, _ = grown
    rows = [row for row in numbers(whole.run_dir) if row["stage"] == "ppo"]
    assert len(rows) == 2
    assert all(row["ppo/ratio_error"] < 1e-5 for row in rows)
    assert rows[0]["ppo/reference_kl_action"] == pytest.approx(0, abs=1e-6)


@pytest.mark.slow
def test_a_run_does_not_go_on_beside_other_weights(grown):
    whole, _ = grown
    moved = jax.tree.map(lambda leaf: leaf + 1, load_policy(whole, "sft"))
    with pytest.raises(CheckpointMismatchError, match=r"other bits than now in embed"):
        train_ppo(whole, moved)
