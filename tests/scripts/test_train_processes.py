"""The whole program in two processes that share a model, as on a cluster."""

import json
import sys

import numpy as np
import pytest

from jaxplan.io.datasets import read_dataset
from jaxplan.text.tokenizer import load_tokenizer
from tests.processes import finish, start_two
from tests.scripts.test_train import REPOSITORY, STAGES, TINY, numbers, train

WORLD = """
env.name=probe env.max_steps=8 collect.steps=8 evaluate.max_steps=8 sft.relay.turns=6
model.layers=1
rollout.segment_tokens=128 rollout.observation_tokens=12 rollout.history=2
collect.episodes=48 sft.batch_segments=2
evaluate.arms=[random,sft,sft+rl] evaluate.modes=[dynamic]
""".split()  # noqa: SIM905 (as on the command line)


def command(root, *overrides: str) -> list[str]:
    script = str(REPOSITORY / "scripts" / "train.py")
    return [sys.executable, script, f"--config={TINY}", f"run_root={root}", *overrides]


@pytest.mark.slow
def test_two_processes_go_through_all_stages_as_one_does(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    sizes = [*WORLD, "mesh.data=-1", "mesh.fsdp=2"]
    first, second = finish(start_two(command(tmp_path / "two", *sizes), devices=1), 0)
    ends = ("collect  48/48", "relay  8/8", "sft  8/8", "ppo  3/3", "report: ")
    assert [first.count(f"\n{told}") for told in ends] == [1] * len(ends), first
    assert second == ""
    run, alone = tmp_path / "two" / "tiny", tmp_path / "one" / "tiny"
    assert {path.stem for path in (run / "stages").iterdir()} >= set(STAGES)
    done = train(tmp_path / "one", *WORLD)
    assert done.returncode == 0, done.stderr
    tokenizer = load_tokenizer("shipped")
    for folder in ("dataset", "relay"):
        ours, theirs = (read_dataset(r / folder, tokenizer) for r in (run, alone))
        assert ours.equals(theirs), folder
    for ours, theirs in zip(numbers(run), numbers(alone), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"stage"}:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-4)
    tables = [
        json.loads((path / "report" / "summary.json").read_text())["results"]
        for path in (run, alone)
    ]
    assert tables[0] == tables[1]
