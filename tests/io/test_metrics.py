import json
import math

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from jaxplan.io.metrics import (
    MetricsWriter,
    metric_names,
    read_metrics,
    without_timing,
)


def write(run_dir, stage, steps, offset=0.0, resume=None):
    writer = MetricsWriter(run_dir, stage)
    if resume is not None:
        writer.resume_from(resume)
    for step in steps:
        writer.scalars(step, {"env/return": step + offset})
    writer.close()


def shown_by_tensorboard(run_dir, stage, tag="env/return"):
    events = EventAccumulator(str(run_dir / "tensorboard" / stage))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_rows_are_readable_json_and_tensorboard_shows_the_same(tmp_path):
    write(tmp_path, "ppo", range(3))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [(r["stage"], r["step"], r["env/return"]) for r in rows] == [
        ("ppo", 0, 0.0),
        ("ppo", 1, 1.0),
        ("ppo", 2, 2.0),
    ]
    assert shown_by_tensorboard(tmp_path, "ppo") == [(0, 0.0), (1, 1.0), (2, 2.0)]


def test_after_a_resume_no_step_is_there_twice_and_other_stages_stay(tmp_path):
    write(tmp_path, "sft", range(4))
    write(tmp_path, "ppo", range(5))
    write(tmp_path, "ppo", range(2, 6), offset=100.0, resume=2)
    write(tmp_path, "ppo", range(5, 7), offset=200.0, resume=5)
    expected = [(0, 0), (1, 1), (2, 102), (3, 103), (4, 104), (5, 205), (6, 206)]
    rows = [row for row in read_metrics(tmp_path) if row["stage"] == "ppo"]
    assert [(row["step"], row["env/return"]) for row in rows] == expected
    assert shown_by_tensorboard(tmp_path, "ppo") == expected
    assert [s for s, _ in shown_by_tensorboard(tmp_path, "sft")] == [0, 1, 2, 3]


def test_a_stage_restarted_from_the_beginning_keeps_nothing_of_the_first_try(tmp_path):
    write(tmp_path, "sft", range(3))
    write(tmp_path, "sft", range(1), offset=7.0, resume=0)
    assert [row["env/return"] for row in read_metrics(tmp_path)] == [7.0]
    assert shown_by_tensorboard(tmp_path, "sft") == [(0, 7.0)]


def test_a_line_torn_by_a_kill_is_dropped(tmp_path):
    write(tmp_path, "ppo", range(2))
    with (tmp_path / "metrics.jsonl").open("a") as lines:
        lines.write('{"stage": "ppo", "step": 2, "env/ret')
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1]
    write(tmp_path, "ppo", [2])
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1, 2]


def test_rows_are_on_disk_before_the_writer_is_closed(tmp_path):
    writer = MetricsWriter(tmp_path, "ppo")
    writer.scalars(0, {"env/return": 1.0})
    assert len(read_metrics(tmp_path)) == 1
    assert shown_by_tensorboard(tmp_path, "ppo") == [(0, 1.0)]
    writer.close()


def test_a_nan_is_null_in_the_json_and_nan_in_tensorboard(tmp_path):
    writer = MetricsWriter(tmp_path, "ppo")
    writer.scalars(0, {"ppo/loss": math.nan, "ppo/kl": math.inf})
    writer.close()
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    (row,) = read_metrics(tmp_path)
    assert row["ppo/loss"] is None
    assert row["ppo/kl"] is None
    assert math.isnan(shown_by_tensorboard(tmp_path, "ppo", "ppo/loss")[0][1])


def test_a_step_that_goes_backwards_is_refused_also_by_a_new_writer(tmp_path):
    write(tmp_path, "ppo", range(3))
    writer = MetricsWriter(tmp_path, "ppo")
    with pytest.raises(ValueError, match=r"step 1 after step 2.*resume_from\(1\)"):
        writer.scalars(1, {"env/return": 0.0})
    writer.close()


def test_a_name_without_a_group_is_refused(tmp_path):
    writer = MetricsWriter(tmp_path, "ppo")
    with pytest.raises(ValueError, match="'loss' has no group"):
        writer.scalars(0, {"loss": 1.0})
    writer.close()


def test_text_is_listed_by_tensorboard(tmp_path):
    writer = MetricsWriter(tmp_path, "evaluate")
    writer.text("replay/plan", "Collect **wood**.", 3)
    writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard" / "evaluate"))
    events.Reload()
    (event,) = events.Tensors("replay/plan")
    assert event.step == 3
    assert event.tensor_proto.string_val[0] == b"Collect **wood**."
    assert events.SummaryMetadata("replay/plan").plugin_data.plugin_name == "text"


def test_timing_can_be_told_from_what_a_seed_determines():
    row = {
        "stage": "ppo",
        "step": 1,
        "time": 1.0,
        "time/update": 2.0,
        "memory/peak_bytes": 3.0,
        "rollout/env_steps_per_second": 4.0,
        "env/return": 5.0,
    }
    assert without_timing(row) == {"stage": "ppo", "step": 1, "env/return": 5.0}
    assert metric_names(without_timing(row)) == ["env/return"]
