"""Tokenizers of other Llamas through the whole program, on text of many tokens."""

import pytest

from jaxplan.io.metrics import read_metrics
from tests.scripts.test_train import train
from tests.tokenizers import llama2_like, llama3_like

RESERVED = ("<|reserved_special_token_0|>", "<|reserved_special_token_1|>")
SIZES = """
env.text=balrog env.max_steps=12 env.pool_size=4 model.layers=1
rollout.num_lanes=4 rollout.observation_tokens=512
rollout.prefill_tokens=256 rollout.history=2 rollout.segment_tokens=2560
rollout.rounds=6 rollout.decode_steps=9 collect.episodes=4 collect.lanes=4
collect.steps=12 sft.batch_segments=1 sft.updates=2 sft.relay.episodes=0
ppo.iterations=1 ppo.value_warmup_iterations=0 evaluate.episodes=4 evaluate.max_steps=12
evaluate.modes=[dynamic]
""".split()  # noqa: SIM905 (as on the command line)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pieces", "reserved"])
def test_a_llama_with_such_a_tokenizer_learns_and_plays(tmp_path, kind):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    if kind == "pieces":
        llama3_like(folder)
        markers = ("<plan>", " </plan>\\n")
    else:
        llama2_like(folder, RESERVED)
        markers = RESERVED
    done = train(
        tmp_path,
        *SIZES,
        f"text.tokenizer={folder}",
        f'plan.open="{markers[0]}"',
        f'plan.close="{markers[1]}"',
    )
    assert done.returncode == 0, done.stderr
    (row,) = [r for r in read_metrics(tmp_path / "tiny") if r["stage"] == "ppo"]
    assert row["ppo/ratio_error"] < 1e-5
    assert row["rollout/dropped_phrases"] == 0
    assert row["rollout/plan_rate"] > 0
    assert (tmp_path / "tiny" / "report" / "index.html").exists()
