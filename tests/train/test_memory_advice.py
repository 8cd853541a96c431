"""What people are told of memory, and whether it is what the estimate says."""

import dataclasses

import pytest

from jaxplan.train.memory import GIB, STAGES, plan_memory
from jaxplan.train.memory_advice import memory_table, verdict
from tests.train.test_memory import preset


def test_what_does_not_fit_is_told_with_what_would_help(on_shore):
    own = on_shore(preset("quickstart"))
    plan = plan_memory(own)
    sentence, fits = verdict(own, plan, plan.peak - GIB // 2)
    assert not fits
    assert sentence.startswith("too big by 0.500 GiB")
    helping = {
        change: float(peak) * GIB
        for peak, change in (line.split() for line in sentence.splitlines()[1:])
    }
    assert list(helping.values()) == sorted(helping.values())
    assert max(helping.values()) < plan.peak
    assert helping.keys() >= {
        "mesh.fsdp=2",
        "model.remat=layer",
        "rollout.num_lanes=32",
    }
    leaner = dataclasses.replace(own.config.model, remat="layer")
    config = dataclasses.replace(own.config, model=leaner)
    expected = plan_memory(dataclasses.replace(own, config=config)).peak
    assert helping["model.remat=layer"] == pytest.approx(expected, rel=0.01)
    assert verdict(own, plan, plan.peak)[1]


def test_the_table_has_a_line_for_each_part_and_sums_up(on_shore):
    plan = plan_memory(on_shore(preset("100m")))
    lines = memory_table(plan, dict.fromkeys(STAGES, GIB)).splitlines()
    assert lines[0] == "mesh: data=1 x fsdp=1 x model=1, 1 devices"
    table = {line[:26].strip(): line[26:].split() for line in lines[2:]}
    numbers = [
        [0.0 if cell == "-" else float(cell) for cell in cells]
        for part, cells in table.items()
        if part != "total" and not part.startswith("its program")
    ]
    for column, total in enumerate(table["total"]):
        expected = sum(row[column] for row in numbers)
        assert float(total) == pytest.approx(expected, abs=0.01)
    assert table["its program, compiled"] == ["1.000"] * 3
