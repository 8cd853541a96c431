"""Adapters and a critic of its own, from the first stage to a folder of PEFT's."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest

from jaxplan.config.hugging_face import load_hf_shape
from jaxplan.config.schema import ModelConfig
from jaxplan.io.metrics import read_metrics
from jaxplan.models.adapter_files import load_adapters
from tests.scripts.test_convert import convert, llama_in, program
from tests.scripts.test_train import TINY, final_params

SIZES = shlex.split("""
model.lora.rank=2 model.lora.alpha=4.0 model.lora.rslora=true
model.lora.targets=[query,value,down]
ppo.critic='{width: 16, layers: 1, heads: 2, kv_heads: 1, head_dim: 8, ffn_width: 32}'
ppo.critic_learning_rate_ratio=2.0
env.name=pogs env.max_steps=12 rollout.observation_tokens=64 collect.steps=12
collect.styles=[] sft.relay.turns=6 evaluate.max_steps=12 ppo.checkpoint_every=1
evaluate.arms=[random,sft,sft+rl] evaluate.modes=[dynamic]
""")


def train(root: Path, *overrides: str):
    config, place = f"--config={TINY}", f"run_root={root}"
    return program("train.py", config, place, *SIZES, *overrides)


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> tuple[Path, Path]:
    """A run that learnt for two iterations, went on for two, and was exported."""
    root = tmp_path_factory.mktemp("adapters")
    for overrides in (["ppo.iterations=2"], ["ppo.iterations=4", "--resume"]):
        done = train(root, *overrides)
        assert done.returncode == 0, done.stderr
    written = convert("export", root / "out", "--run", root / "tiny")
    assert written.returncode == 0, written.stderr
    return root / "tiny", root / "out"


@pytest.mark.slow
def test_adapters_and_a_critic_go_through_all_stages_and_on_after_a_stop(exported):
    run, _ = exported
    rows = [row for row in read_metrics(run) if row["stage"] == "ppo"]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    for row in rows:
        assert row["ppo/ratio_error"] < 1e-5
        assert row["ppo/skipped_updates"] == 0
    summary = json.loads((run / "report" / "summary.json").read_text())
    assert {row["arm"] for row in summary["results"]} >= {"random", "sft", "sft+rl"}
    primed, learnt = (final_params(run, stage) for stage in ("sft", "ppo"))
    for name, tensor in primed.items():
        if name.startswith(".llama"):  # adapters learn, and nothing else of it
            same = np.array_equal(tensor, learnt[name])
            assert same == (".lora" not in name), name
    assert any(name.startswith(".critic") for name in learnt)


@pytest.mark.slow
def test_what_was_exported_is_what_was_learnt(exported):
    run, out = exported
    shape = load_hf_shape(out)
    assert (shape["lora"].rank, shape["lora"].rslora) == (2, True)
    assert sorted(shape["lora"].targets) == ["down", "query", "value"]
    learnt = final_params(run, "ppo")
    adapters = load_adapters(out, ModelConfig(**shape), None)
    for target, adapter in adapters.items():
        for part in ("a", "b"):
            saved = learnt[f".llama.layers.lora['{target}'].{part}"]
            np.testing.assert_array_equal(getattr(adapter, part), saved)
    for folder, place in ((out, ".llama"), (out / "critic", ".critic")):
        np.testing.assert_array_equal(llama_in(folder).embed, learnt[f"{place}.embed"])
    read = convert("import", out)
    assert read.returncode == 0, read.stderr
    assert "rank=2" in read.stdout


@pytest.mark.slow
def test_peft_finds_the_same_logits_in_it(exported):
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    _, out = exported
    verified = convert("verify", out, "--tolerance", "1e-4")
    assert verified.returncode == 0, verified.stdout + verified.stderr
