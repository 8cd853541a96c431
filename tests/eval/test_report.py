import html.parser
import json
import math
import os
import pty
import re

import numpy as np
import pytest

from jaxplan.eval.page import make_curves, render_page
from jaxplan.eval.report import (
    crafter_score,
    make_result,
    print_table,
    write_report,
)
from jaxplan.io.metrics import MetricsWriter

EVENTS = ("wake_up", "eat_cow", "place_table")


def result(
    arm="sft", mode="dynamic", episodes=8, plan_rate=0.25, counts=(), events=EVENTS
):
    shape = episodes, len(events)
    unlocked = np.arange(episodes * len(events)).reshape(shape) % 4 == 0
    return make_result(
        arm,
        mode,
        {
            "achievements": unlocked.sum(axis=1),
            "return": unlocked.sum(axis=1) - 0.5,
            "plan_rate": np.full(episodes, plan_rate),
            "plan_tokens_per_turn": np.linspace(0, 4, episodes),
            "steps": np.arange(episodes) + 100,
        },
        {name: np.arange(episodes) % 3 for name in counts},
        unlocked,
        events,
    )


def summary(**changes):
    return {
        "config": {"name": "toy <b>&", "seed": 0},
        "commit": None,
        "versions": {"jax": "0.10.1"},
        "hardware": "a laptop",
        "wall_seconds": {
            "collect": 1.0,
            "sft": 2.0,
            "ppo": None,
            "evaluate": 3.0,
            "compile": 0.5,
        },
        "results": [result(), result("random", "never", plan_rate=0.0)],
        **changes,
    }


def frame(step, **changes):
    return {
        "step": step,
        "view": [[2] * 9] * 7,
        "facing": "n",
        "sleeping": False,
        "vitals": {"health": 9, "food": 9, "drink": 9, "energy": 9},
        "inventory": {"wood": 1},
        "light": 1.0,
        "action": "noop",
        "plan": "</script><script>alert(1)</script>",
        "planned_now": step == 0,
        "reward": 0.0,
        "unlocked": [],
        "achievements": 0,
        "observation": "grass",
        **changes,
    }


def replay(*frames):
    return {
        "arm": "sft",
        "mode": "dynamic",
        "seed": 7,
        "action_names": ["noop"],
        "event_names": list(EVENTS),
        "tile_names": ["invalid", "out of bounds", "grass"],
        "frames": list(frames or [frame(0), frame(1, unlocked=["wake_up"])]),
    }


class Page(html.parser.HTMLParser):
    """What a browser would see: tags with attributes, and the data element's text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.data, self._in_data = [], "", False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._in_data = dict(attrs).get("id") == "data"

    def handle_data(self, data):
        if self._in_data:
            self.data += data

    def handle_endtag(self, tag):
        self._in_data = False


def test_a_result_has_the_promised_keys_and_plain_means():
    row = result()
    assert list(row)[:3] == ["arm", "mode", "episodes"]
    assert row["episodes"] == 8
    assert row["achievements"]["mean"] == pytest.approx(6 / 8)
    assert row["achievements"]["low"] < 6 / 8 < row["achievements"]["high"]
    assert row["steps"]["mean"] == 103.5
    assert row["per_event"] == {"wake_up": 0.25, "eat_cow": 0.25, "place_table": 0.25}
    json.dumps(row, allow_nan=False)


def test_a_result_of_no_episodes_is_unknown_and_not_zero():
    row = result(episodes=0)
    assert row["achievements"] == {"mean": None, "low": None, "high": None}
    assert row["score"] is None
    assert row["per_event"] is None


def test_a_world_with_nothing_to_unlock_has_no_score():
    row = result(events=())
    assert row["achievements"]["mean"] == 0
    assert row["score"] is None
    assert row["per_event"] == {}
    json.dumps(row, allow_nan=False)


def test_the_score_is_the_log_weighted_mean_of_success_rates():
    rates = [0.0, 0.5, 1.0]
    by_hand = math.exp(sum(math.log(1 + 100 * s) for s in rates) / 3) - 1
    assert crafter_score(np.array(rates)) == pytest.approx(by_hand)
    assert crafter_score(np.ones(22)) == pytest.approx(100.0)


def test_summary_json_is_what_was_handed_in(tmp_path):
    given = summary()
    write_report(tmp_path, given)
    written = json.loads((tmp_path / "report" / "summary.json").read_text())
    assert written == given


def test_a_summary_with_other_keys_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"summary: missing \[\], unknown \['note'\]"):
        write_report(tmp_path, summary(note=""))
    with pytest.raises(ValueError, match=r"wall_seconds: missing \['collect'"):
        write_report(tmp_path, summary(wall_seconds={}))


def test_the_page_needs_no_network_and_holds_the_data_unharmed(tmp_path):
    writer = MetricsWriter(tmp_path, "sft")
    writer.scalars(0, {"sft/loss": 2.0})
    writer.close()
    path = write_report(tmp_path, summary(), replay())
    text = path.read_text()
    page = Page(text)
    assert not [a for _, a in page.tags if {"src", "href", "srcset"} & set(a)]
    assert not [t for t, _ in page.tags if t in ("link", "img", "iframe")]
    assert "@import" not in text
    assert "url(" not in text
    assert set(re.findall(r"https?://[^\"\s]*", text)) == {"http://www.w3.org/2000/svg"}
    data = json.loads(page.data)
    assert data["summary"] == summary()
    assert data["replay"] == replay()
    assert data["curves"][0]["main"] == [{"name": "sft/loss", "lines": [[[0, 2.0]]]}]


def test_every_element_the_script_looks_for_is_in_the_page():
    text = render_page(summary(), [], None)
    wanted = set(re.findall(r"(?:byId|getElementById)\(\"([a-z-]+)\"\)", text))
    ids = {a["id"] for _, a in Page(text).tags if "id" in a}
    assert {"result-table", "frequency-chart", "replay-body"} <= wanted <= ids


def test_text_from_the_run_cannot_become_markup():
    text = render_page(summary(), [], replay())
    assert "alert(1)</script>" not in text
    assert "<title>toy &lt;b>&amp;</title>" in text


def test_a_held_out_metric_joins_the_chart_of_the_training_metric():
    rows = [
        {"stage": "sft", "step": s, "time": 0.0, "sft/loss": 1.0, "sft/grad_norm": 2.0}
        for s in range(2)
    ]
    rows[1]["sft/held_out_loss"] = 3.0
    (stage,) = make_curves(rows)
    assert stage == {
        "stage": "sft",
        "main": [{"name": "sft/loss", "lines": [[[0, 1.0], [1, 1.0]], [[1, 3.0]]]}],
        "rest": [{"name": "sft/grad_norm", "lines": [[[0, 2.0], [1, 2.0]]]}],
    }


def test_long_curves_are_averaged_and_unknown_values_left_out():
    rows = [
        {"stage": "ppo", "step": s, "time": 0.0, "env/return": float(s)}
        for s in range(900)
    ]
    rows[0]["env/return"] = None
    (stage,) = make_curves(rows)
    (points,) = stage["main"][0]["lines"]
    assert len(points) == 300
    assert points[0] == [3, 2.0]
    assert points[-1] == [899, 898.5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"view": [[2] * 9] * 6}, r"frame 1 has a view of shape \(6, 9\)"),
        ({"view": [[3] * 9] * 7}, "frame 1 has tiles 3 to 3, there are 3 names"),
        ({"unlocked": ["fly"]}, "frame 1 unlocks unknown {'fly'}"),
    ],
)
def test_a_replay_that_cannot_be_drawn_is_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        write_report(tmp_path, summary(), replay(frame(0), frame(1, **change)))


def test_a_replay_without_a_picture_is_words_alone(tmp_path):
    bare = replay()
    del bare["tile_names"]
    for drawn in bare["frames"]:
        for key in ("view", "facing", "sleeping", "vitals", "inventory", "light"):
            del drawn[key]
    assert Page(write_report(tmp_path, summary(), bare).read_text()).data


def test_a_replay_frame_without_a_key_is_refused(tmp_path):
    broken = frame(0)
    del broken["plan"]
    with pytest.raises(ValueError, match=r"frame 0 misses \['plan'\]"):
        write_report(tmp_path, summary(), replay(broken))


def test_the_table_is_plain_text_where_there_is_no_terminal(capsys):
    print_table([result(), result(episodes=0)])
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["arm", "mode", "achievements"]
    assert re.match(r"sft  dynamic  0\.75 \[0\.\d\d, \d\.\d\d\] ", first)
    assert "25.0% [25.0%, 25.0%]" in first
    assert second.split()[2:] == ["-"] * 5


def test_what_a_world_counts_has_columns_of_its_own(capsys):
    row = result(counts=("backtracks",))
    assert row["counts"]["backtracks"]["mean"] == pytest.approx(7 / 8)
    print_table([row])
    head, line = capsys.readouterr().out.splitlines()
    assert head.split()[-2:] == ["steps", "backtracks"]
    assert re.search(r"  0\.88 \[0\.\d\d, 1\.\d\d\]$", line)


def test_the_table_is_drawn_on_a_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    outer, inner = pty.openpty()
    with open(inner, "w") as terminal:
        print_table([result()], terminal)
        terminal.flush()
        drawn = os.read(outer, 100_000).decode()
    os.close(outer)
    assert "dynamic" in drawn
    assert "─" in drawn or "━" in drawn
