"""The whole program on its smallest sizes, in processes of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxplan.io.metrics import read_metrics, without_timing
from jaxplan.io.stopping import EXIT_CODE

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = REPOSITORY / "configs" / "tiny.yaml"
ENVIRONMENT = os.environ | {
    "JAX_NUM_CPU_DEVICES": "1",  # as users have it
    "PYTHONPATH": str(REPOSITORY),
}
MODES = ("dynamic", "never", "every-1", "every-4")
STAGES = ("collect", "sft", "ppo", "evaluate", "report")


def command(root: Path, *overrides: str) -> list[str]:
    script = str(REPOSITORY / "scripts" / "train.py")
    program = [sys.executable, script, "--config", str(TINY)]
    return [*program, f"run_root={root}", *overrides]


def train(
    root: Path, *overrides: str, **environment: str
) -> subprocess.CompletedProcess:
    """Run to the end."""
    return subprocess.run(
        command(root, *overrides),
        cwd=root,
        capture_output=True,
        text=True,
        env=ENVIRONMENT | environment,
    )


def numbers(run: Path) -> list[dict]:
    return [without_timing(row) for row in read_metrics(run)]


def final_params(run: Path, stage: str) -> dict[str, np.ndarray]:
    """The arrays of a stage's newest checkpoint, by name."""
    import jax

    from jaxplan.config.reader import load_config
    from jaxplan.envs.worlds import make_env
    from jaxplan.io.stopping import StopRequest
    from jaxplan.rollout.setup import longest_turn, make_language
    from jaxplan.text.tokenizer import load_tokenizer
    from jaxplan.train.setting import Setting, load_policy

    config = load_config(run / "config.yaml")
    tokenizer, env = load_tokenizer(config.text.tokenizer), make_env(config.env)
    setting = Setting(
        config=config,
        run_dir=run,
        env=env,
        language=make_language(tokenizer, env, config.plan),
        vocab_size=tokenizer.vocab_size,
        turn_tokens=longest_turn(tokenizer, env, config.plan),
        stop=StopRequest(),
    )
    leaves = jax.tree_util.tree_leaves_with_path(load_policy(setting, stage))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_same_run(one: Path, other: Path) -> None:
    assert numbers(one) == numbers(other)
    for stage in ("sft", "ppo"):
        ours, theirs = final_params(one, stage), final_params(other, stage)
        assert ours.keys() == theirs.keys()
        for name, leaf in ours.items():
            np.testing.assert_array_equal(leaf, theirs[name], err_msg=name)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    root = tmp_path_factory.mktemp("one")
    done = train(root)
    assert done.returncode == 0, done.stderr
    return root / "tiny", done


@pytest.mark.slow
def test_one_command_runs_all_stages(finished):
    run, done = finished
    for stage in STAGES:
        results = json.loads((run / "stages" / f"{stage}.json").read_text())
        assert results["wall_seconds"] > 0
    summary = json.loads((run / "report" / "summary.json").read_text())
    assert summary.keys() >= {
        "config",
        "commit",
        "versions",
        "hardware",
        "wall_seconds",
        "results",
    }
    rows = [(row["arm"], row["mode"]) for row in summary["results"]]
    assert rows == [
        ("random", "never"),
        *((arm, mode) for arm in ("sft", "sft+rl") for mode in MODES),
    ]
    assert "<html" in (run / "report" / "index.html").read_text()
    assert str(run / "report" / "index.html") in done.stderr
    for stage in ("sft", "ppo"):
        assert list((run / "tensorboard" / stage).glob("events.out.tfevents.*"))


@pytest.mark.slow
def test_the_numbers_of_training_are_sane(finished):
    run, _ = finished
    rows = [row for row in read_metrics(run) if row["stage"] == "ppo"]
    assert [row["step"] for row in rows] == [0, 1, 2]
    for row in rows:
        assert row["ppo/ratio_error"] < 1e-4
        assert row["ppo/skipped_updates"] == 0
        assert row["rollout/env_steps"] > 0
        assert 0 <= row["rollout/plan_rate"] <= 1
    losses = [row["sft/loss"] for row in read_metrics(run) if row["stage"] == "sft"]
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_the_same_command_again_only_reports(finished):
    run, _ = finished
    before = (run / "metrics.jsonl").read_bytes()
    again = train(run.parent)
    assert again.returncode == 0, again.stderr
    for stage in STAGES[:-1]:
        assert f"{stage}: done before" in again.stderr
    assert "report: " in again.stderr
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory) -> tuple[Path, list[int]]:
    """The same run, asked to stop in the first iterations of PPO, and gone on with."""
    root = tmp_path_factory.mktemp("two")
    process = subprocess.Popen(
        command(root),
        cwd=root,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=ENVIRONMENT,
    )
    run = root / "tiny"
    while process.poll() is None:
        if any(row["stage"] == "ppo" for row in read_metrics(run)):
            process.send_signal(signal.SIGTERM)
            break
        time.sleep(0.02)
    codes = [process.wait()]
    stopped_at = len([row for row in read_metrics(run) if row["stage"] == "ppo"])
    codes.append(train(root).returncode)
    return run, [stopped_at, *codes]


@pytest.mark.slow
def test_a_run_that_was_stopped_and_resumed_equals_one_that_was_not(
    finished, interrupted
):
    """Two directories, one seed: it shows that a seed reproduces, too."""
    run, (stopped_at, first, second) = interrupted
    assert first == EXIT_CODE
    assert second == 0
    assert 1 <= stopped_at < 3
    assert_same_run(finished[0], run)
    tables = [
        json.loads((path / "report" / "summary.json").read_text())["results"]
        for path in (finished[0], run)
    ]
    assert tables[0] == tables[1]


@pytest.mark.slow
def test_a_changed_config_is_refused_and_the_keys_are_named(finished):
    run, _ = finished
    refused = train(run.parent, "model.width=48", "ppo.gamma=0.9")
    assert refused.returncode == 2
    assert "Traceback" not in refused.stderr
    assert "model.width: made with 32, now 48" in refused.stderr
    assert "ppo.gamma: made with 0.99, now 0.9" in refused.stderr


@pytest.mark.slow
def test_a_dataset_is_learnt_with_whatever_tokenizer(finished, tmp_path):
    """Another file with the same vocabulary: other hash, same ids, same numbers."""
    from jaxplan.text.tokenizer import SHIPPED, load_tokenizer

    run, _ = finished
    other = tmp_path / "tokenizer.json"
    other.write_text(json.dumps(json.loads(SHIPPED.read_text()), indent=3))
    assert load_tokenizer(str(other)).sha256 != load_tokenizer("shipped").sha256
    done = train(
        tmp_path,
        f"text.tokenizer={other}",
        f"sft.dataset={run / 'dataset'}",
        "stages=[sft]",
    )
    assert done.returncode == 0, done.stderr
    expected = [row for row in numbers(run) if row["stage"] == "sft"]
    assert numbers(tmp_path / "tiny") == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("text.tokenizer=/no/such/tokenizer.json", "/no/such/tokenizer.json"),
        ("rollout.segment_tokens=100", "rollout.segment_tokens=100 is too small"),
        ("rollout.rounds=2", "rollout.rounds=2 with decode_steps=4"),
        ("ppo.num_minibatches=3", "num_minibatches=3"),
        ("ppo.clip_ep=0.1", "did you mean 'clip_eps'?"),
    ],
)
def test_a_mistake_is_explained_before_anything_runs(tmp_path, override, sentence):
    refused = train(tmp_path, override)
    assert refused.returncode == 2
    assert "Traceback" not in refused.stderr
    assert sentence in refused.stderr
    assert not (tmp_path / "tiny" / "dataset").exists()


def test_an_sft_that_ppo_would_not_start_from_is_refused(tmp_path):
    refused = train(tmp_path, "ppo.start=chance")
    assert refused.returncode == 2
    assert "ppo.start=chance leaves nothing to do for the SFT" in refused.stderr
    assert not (tmp_path / "tiny").exists()


@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
def test_a_jax_that_does_not_start_is_told_in_one_line(tmp_path, flags):
    refused = train(tmp_path, *flags, JAX_PLATFORMS="abacus")
    assert refused.returncode == 2
    assert "Traceback" not in refused.stderr
    assert "error: Unable to initialize backend 'abacus'" in refused.stderr


def test_a_run_root_that_is_no_folder_is_told_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    refused = train(tmp_path, f"run_root={tmp_path / 'file'}")
    assert refused.returncode == 2
    assert "Traceback" not in refused.stderr
    assert str(tmp_path / "file") in refused.stderr
    plain = train(tmp_path, f"run_root={tmp_path / 'file'}", JAXPLAN_TRACEBACK="1")
    assert "Traceback" in plain.stderr


@pytest.mark.slow
def test_a_dry_run_tells_memory_for_devices_that_are_not_there(tmp_path):
    sizes = ["rollout.num_lanes=256", "sft.batch_segments=64", "collect.lanes=64"]
    done = train(tmp_path, "mesh.data=8", "mesh.fsdp=8", *sizes, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "mesh: data=8 x fsdp=8 x model=1, 64 devices" in done.stdout
    small = ["env.name=probe", "--compile", "--device-memory=1MiB"]
    wanting = train(tmp_path, "--dry-run", *small)
    assert wanting.returncode == 1
    assert "its program, compiled" in wanting.stdout
    assert "too big by" in wanting.stdout
    assert not list(tmp_path.glob("tiny/*"))


@pytest.mark.slow
def test_one_agent_is_trained_and_measured_at_every_price_it_is_told(tmp_path):
    done = train(
        tmp_path,
        "plan.prices=[0,0.5]",
        "stages=[ppo,evaluate,report]",
        "ppo.start=chance",
        "rollout.segment_tokens=400",
        "evaluate.modes=[dynamic]",
        "evaluate.arms=[chance+rl]",
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "tiny/report/summary.json").read_text())
    assert [row["arm"] for row in summary["results"]] == [
        "chance+rl@0",
        "chance+rl@0.5",
    ]
    for row in read_metrics(tmp_path / "tiny"):
        if row["stage"] == "ppo":
            rates = row["rollout/plan_rate_at_0"], row["rollout/plan_rate_at_0.5"]
            assert min(rates) <= row["rollout/plan_rate"] <= max(rates)
            assert row["ppo/ratio_error"] < 1e-5
