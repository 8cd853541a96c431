"""Results that are kept of runs, and the README whose tables are made of them."""

import json
from pathlib import Path

import pytest

from jaxplan.eval.results import fill_tables, keep_result, result_path

ROOT = Path(__file__).resolve().parents[2]
CONFIG = {
    "name": "x",
    "seed": 3,
    "run_root": "runs",
    "stages": ["sft", "report"],
    "ppo": {"gamma": 0.9, "clip": 1},
}
INTERVAL = {"mean": 2.0, "low": 1.5, "high": 2.25}
ROW = {
    "arm": "sft",
    "mode": "dynamic",
    "episodes": 8,
    **dict.fromkeys(("achievements", "return", "plan_rate", "steps"), INTERVAL),
    "plan_tokens_per_turn": INTERVAL,
    "counts": {},
}
STAGES = ("sft", "evaluate-sft", "report")
MARKERS = {stage: {"commit": "abc1234"} for stage in STAGES}
WALL = {"collect": 30.0, "sft": 60.0, "ppo": None, "evaluate": 30.0, "compile": 12.0}


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    (folder / "report").mkdir(parents=True)

    def write(markers=MARKERS, **changes):
        (folder / "stages").mkdir()
        for stage, marker in markers.items():
            (folder / "stages" / f"{stage}.json").write_text(json.dumps(marker))
        summary = {
            "config": CONFIG,
            "commit": "abc1234",
            "versions": {"jax": "0.10.1"},
            "hardware": "two cores",
            "wall_seconds": WALL,
            "results": [ROW],
        } | changes
        text = json.dumps(summary)
        (folder / "report" / "summary.json").write_text(text, encoding="utf-8")
        return folder

    speeds = [{"sft/tokens_per_second": speed} for speed in (10.0, 30.0, 20.0)]
    rows = [
        {"stage": "sft", "step": step, "time": 0.0} | speed
        for step, speed in enumerate(speeds)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    return write


def test_a_run_is_kept_with_what_made_it_and_its_medians(run):
    kept = keep_result(run(), CONFIG)
    assert kept["results"] == [ROW]
    assert (kept["name"], kept["seed"], kept["commit"]) == ("x", 3, "abc1234")
    assert kept["measured"] == {"sft_tokens_per_second": 20.0}


def test_modes_are_kept_world_by_world(run):
    episodes = {
        "dynamic": {"seed": [7, 8], "unlocked": [[0], [0, 1]]},
        "never": {"seed": [7, 8], "unlocked": [[], [0]]},
    }
    evaluated = MARKERS["evaluate-sft"] | {"episodes": episodes}
    config = CONFIG | {"evaluate": {"confidence": 0.9}}
    folder = run(markers=MARKERS | {"evaluate-sft": evaluated}, config=config)
    kept = keep_result(folder, config)
    assert kept["pairs"]["sft"]["dynamic"]["never"]["mean"] == 1.0


def test_where_a_run_lay_and_keys_of_later_code_do_not_matter(run):
    later = CONFIG | {"run_root": "/elsewhere", "new": 1}
    assert keep_result(run(), later)["name"] == "x"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"commit": "abc1234-dirty"}, "report by abc1234-dirty"),
        ({"commit": None}, "report by an unknown commit"),
        ({"markers": MARKERS | {"sft": {}}}, "sft by an unknown commit"),
        ({"markers": {"report": MARKERS["report"]}}, "sft by an unknown commit"),
        (
            {"markers": MARKERS | {"sft": {"commit": "0ld"}}},
            "made sft by 0ld, report by abc1234, evaluate-sft by abc1234",
        ),
        (
            {
                "markers": {stage: {"commit": "abc1234-dirty"} for stage in STAGES},
                "commit": "abc1234-dirty",
            },
            "sft by abc1234-dirty",
        ),
        ({"config": CONFIG | {"ppo": {"gamma": 1.0, "clip": 1}}}, r"\['ppo.gamma'\]"),
    ],
)
def test_a_run_that_cannot_be_made_again_is_refused(run, changes, words):
    with pytest.raises(ValueError, match=words):
        keep_result(run(**changes), CONFIG)


def test_a_run_without_a_report_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="has not finished"):
        keep_result(tmp_path, CONFIG)


def test_the_table_of_a_sweep_is_kept_as_it_is(tmp_path):
    about = {"question": "Why?", "run": "python x.py", "hours": 1.0}
    result = {"question": "Why?", "run": "python x.py", "commit": "abc1234", "rows": []}
    (tmp_path / "result.json").write_text(json.dumps(result))
    assert keep_result(tmp_path, {"about": about}) == result
    with pytest.raises(ValueError, match="answers 'Why\\?', not the config's"):
        keep_result(tmp_path, {"about": about | {"question": "How?"}})
    for commit in ("abc1234, 0ld5678", "abc1234-dirty", None):
        (tmp_path / "result.json").write_text(json.dumps(result | {"commit": commit}))
        with pytest.raises(ValueError, match="let one commit make every run"):
            keep_result(tmp_path, {"about": about})
    helped = result | {"students_commit": "abc1234-dirty"}
    (tmp_path / "result.json").write_text(json.dumps(helped))
    with pytest.raises(ValueError, match="made by abc1234-dirty"):
        keep_result(tmp_path, {"about": about})


def test_a_result_lies_beside_its_config():
    alone, shared = Path("a/quickstart.yaml"), Path("a/pogs/config.yaml")
    assert result_path(alone) == Path("a/quickstart.result.json")
    assert result_path(shared) == Path("a/pogs/result.json")


def test_tables_are_filled_and_the_rest_of_the_text_stays(run, tmp_path):
    (tmp_path / "r.json").write_text(json.dumps(keep_result(run(), CONFIG)))
    text = (
        "before\n<!-- rows of r.json -->\nold\n<!-- end -->\nbetween\n"
        "<!-- measures of r.json -->\n<!-- end -->\nafter\n"
    )
    filled = fill_tables(text, tmp_path)
    assert "old" not in filled
    assert "sft  dynamic  2.00 [1.50, 2.25]" in filled
    assert "| all stages | 2.0 minutes |" in filled
    assert "| wall seconds: collect, sft, evaluate | 30, 60, 30 |" in filled
    assert "| imitation, median | 20 tokens/s |" in filled
    assert "in PPO" not in filled, "there was none"
    for kept in ("before\n", "<!-- end -->\nbetween\n", "<!-- end -->\nafter\n"):
        assert kept in filled
    assert fill_tables(filled, tmp_path) == filled


def test_peak_memory_is_told_as_that_of_the_process(run, tmp_path):
    result = keep_result(run(), CONFIG)
    result["measured"] |= {"peak_gib": 2.96}
    (tmp_path / "r.json").write_text(json.dumps(result))
    filled = fill_tables("<!-- measures of r.json -->\n<!-- end -->\n", tmp_path)
    assert "| peak memory | 3.0 GiB of the process |" in filled


def test_an_unknown_table_is_refused(run, tmp_path):
    (tmp_path / "r.json").write_text(json.dumps(keep_result(run(), CONFIG)))
    with pytest.raises(ValueError, match="rows, pairs, play, measures, points"):
        fill_tables("<!-- rose of r.json -->\n<!-- end -->", tmp_path)


def test_the_tables_of_the_readme_are_those_of_the_results():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("<!-- end -->") >= 4
    assert fill_tables(text, ROOT) == text, "run: python scripts/results.py"
