"""The committed tokenizer is what its script makes of the project's words."""

import subprocess
import sys
from pathlib import Path

from jaxplan.text.tokenizer import SHIPPED

SCRIPT = Path(__file__).parents[2] / "scripts" / "build_tokenizer.py"


def test_building_again_gives_the_committed_file(tmp_path):
    out = tmp_path / "tokenizer.json"
    subprocess.run([sys.executable, str(SCRIPT), "--out", str(out)], check=True)
    assert out.read_bytes() == SHIPPED.read_bytes(), (
        "the words have changed: run scripts/build_tokenizer.py; models trained with "
        "the old file need the old file"
    )


def test_building_that_of_the_probes_again_gives_the_committed_file(tmp_path):
    out = tmp_path / "tokenizer.json"
    command = [sys.executable, str(SCRIPT), "--probes", "--out", str(out)]
    subprocess.run(command, check=True)
    committed = SCRIPT.parents[1] / "configs/experiments/estimators/tokenizer.json"
    assert out.read_bytes() == committed.read_bytes()
