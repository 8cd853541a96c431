"""Datasets by one command, in processes of their own, on tiny sizes."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.scripts.test_train import ENVIRONMENT, REPOSITORY, TINY


def start(script: str, root: Path, *arguments: str) -> subprocess.CompletedProcess:
    path = str(REPOSITORY / "scripts" / script)
    command = [sys.executable, path, "--config", str(TINY), f"run_root={root}"]
    done = subprocess.run(
        [*command, *arguments],
        cwd=root,
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.mark.slow
def test_collect_writes_a_dataset_and_nothing_else(tmp_path):
    styles = "collect.styles=[terse,milestone,justified]"
    asked = ("plan.budget=48", "rollout.segment_tokens=640", "rollout.rounds=12")
    more = ("collect.texts=[balrog]", "collect.sleeping=0.5")
    done = start("collect.py", tmp_path, styles, *asked, *more)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "tiny" / "checkpoints").exists()
    folder = tmp_path / "tiny" / "dataset"
    card = json.loads((folder / "card.json").read_text())
    assert card["episodes"] == 16
    assert set(card["styles"]) == {"terse", "milestone", "justified"}
    assert "# Turns of expert in craftax_classic" in (folder / "README.md").read_text()
    table = pq.read_table(folder / "turns-00000.parquet")
    texts = table["observation_balrog"].to_pylist()
    assert all("Your status:" in text for text in texts)
    results = json.loads((tmp_path / "tiny" / "stages" / "collect.json").read_text())
    assert results["cut_plans"] == 0


@pytest.mark.slow
def test_a_llama_teaches_a_dataset_that_is_read_like_any_other(tmp_path):
    asked = ("collect.teacher=llama", "collect.episodes=8", "collect.styles=[]")
    sizes = ("rollout.segment_tokens=640", "collect.steps=20", "sft.batch_segments=1")
    sizes += ("model.layers=1",)
    done = start("train.py", tmp_path, *asked, *sizes, "stages=[collect,sft]")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "tiny" / "dataset"
    assert json.loads((folder / "card.json").read_text())["teacher"] == "llama"
    sft = json.loads((tmp_path / "tiny" / "stages" / "sft.json").read_text())
    assert sft["sft/held_out_perplexity_action"] > 1
