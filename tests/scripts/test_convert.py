"""Weights in, two updates, weights out: the programs as a person calls them."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

from jaxplan.config.hugging_face import load_hf_shape
from jaxplan.config.reader import to_yaml
from jaxplan.config.schema import ModelConfig, RunConfig
from jaxplan.io.metrics import read_metrics
from jaxplan.io.weights import copy_tokenizer
from jaxplan.models.convert import load_hf_llama, save_hf_llama
from jaxplan.models.params import init_params
from jaxplan.text.tokenizer import load_tokenizer
from tests.models.llama_reference import write_reference
from tests.scripts.test_train import ENVIRONMENT, REPOSITORY, TINY

VOCAB = load_tokenizer("shipped").vocab_size + 5  # with room to spare
MODEL = ModelConfig(
    vocab_size=VOCAB, width=32, layers=2, heads=2, head_dim=16, ffn_width=64
)


def program(name: str, *arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "scripts" / name), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )


convert = partial(program, "convert.py")


def tiny_folder(folder: Path) -> Path:
    params = init_params(jax.random.key(5), MODEL, VOCAB)
    save_hf_llama(folder, MODEL, params.llama, "bfloat16", shard_bytes=50_000)
    copy_tokenizer("shipped", folder)
    return folder


def llama_in(folder: Path):
    shape = load_hf_shape(folder)
    return load_hf_llama(folder, ModelConfig(**shape), shape["vocab_size"])


def start(root: Path, folder: Path, *overrides: str) -> subprocess.CompletedProcess:
    """Train from a folder; its config.json gives the shape."""
    config = yaml.safe_load(TINY.read_text())
    del config["base"], config["model"]
    (root / "tiny.yaml").write_text(yaml.safe_dump(config))
    return program(
        "train.py",
        f"--config={root / 'tiny.yaml'}",
        f"run_root={root}",
        f"model.weights={folder}",
        "stages=[collect,sft]",
        *overrides,
    )


@pytest.mark.slow
def test_a_folder_is_trained_from_and_left_again(tmp_path):
    folder, out = tiny_folder(tmp_path / "hf"), tmp_path / "out"
    done = start(tmp_path, folder)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "tiny"
    steps = [row["step"] for row in read_metrics(run) if row["stage"] == "sft"]
    assert len(steps) >= 2
    exported = convert("export", out, "--run", run)
    assert exported.returncode == 0, exported.stderr
    assert "the sft policy" in exported.stdout
    before, after = llama_in(folder), llama_in(out)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before, after)
    assert all(0 < m < 0.1 for m in jax.tree.leaves(moved))
    read = convert("import", out)
    assert read.returncode == 0, read.stderr
    assert f"vocab_size: {VOCAB}" in read.stdout
    assert f"model.weights={out}" in read.stdout


@pytest.mark.slow
def test_weights_are_evaluated_and_reinforced_without_sft(tmp_path):
    folder = tiny_folder(tmp_path / "hf")
    stages = "stages=[ppo,evaluate,report]"
    done = start(tmp_path, folder, stages, "ppo.iterations=2")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "tiny" / "report" / "summary.json").read_text())
    arms = dict.fromkeys(row["arm"] for row in summary["results"])
    assert list(arms) == ["random", "weights", "weights+rl"]


def test_a_damaged_checkpoint_is_told_in_one_line(tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints" / "sft" / "3").mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(RunConfig(name="run")))
    refused = convert("export", tmp_path / "out", "--run", run)
    assert refused.returncode == 2
    assert "Traceback" not in refused.stderr
    assert f"error: checkpoint {run / 'checkpoints/sft/3'}: damaged" in refused.stderr


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_folder_of_transformers_is_trained_from_and_read_by_it_again(tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, out = tmp_path / "hf", tmp_path / "out"
    write_reference(folder, vocab_size=VOCAB, attention_bias=True)
    copy_tokenizer("shipped", folder)
    done = start(tmp_path, folder)
    assert done.returncode == 0, done.stderr
    exported = convert("export", out, "--run", tmp_path / "tiny", "--dtype", "bfloat16")
    assert exported.returncode == 0, exported.stderr
    llama = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=False)
    assert llama.dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(out, trust_remote_code=False)
    ids = tokenizer("Move North", return_tensors="pt").input_ids
    assert llama(ids).logits.shape[-1] == VOCAB
    verified = convert("verify", out)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert "the same within" in verified.stdout


@pytest.mark.slow
def test_weights_that_do_not_fit_stop_a_run_before_it_begins(tmp_path):
    folder = tiny_folder(tmp_path / "hf")
    refused = start(tmp_path, folder, "model.width=48")
    assert refused.returncode == 2
    assert "model.width: got 48, but model.weights has 32" in refused.stderr
    next(folder.glob("model-00001*")).unlink()
    for done in (start(tmp_path, folder), convert("import", folder)):
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert "in the index, but not in the folder" in done.stderr
        assert "embed_tokens.weight: missing" in done.stderr
    assert not (tmp_path / "tiny").exists()
