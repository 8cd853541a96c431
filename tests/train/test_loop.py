"""The host loops on a tiny world: stopped and resumed, and what makes them give up."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxplan.config.schema import (
    EnvConfig,
    OptimizerConfig,
    PpoConfig,
    RunConfig,
    SftConfig,
)
from jaxplan.io.metrics import read_metrics, without_timing
from jaxplan.io.stopping import Stopped, StopRequest
from jaxplan.train.data import SegmentData
from jaxplan.train.loop import (
    Setting,
    load_policy,
    train_ppo,
    train_sft,
)
from jaxplan.train.packing import Packer, TurnTokens


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
        np.asarray(setting.language.prompt).tolist(),
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
