from pathlib import Path

import pytest

from jaxplan.config.reader import load_config, to_yaml

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
# Presets of a model are bases of runs, and no runs.
FILES = sorted({*CONFIGS.rglob("*.yaml")} - {*CONFIGS.glob("models/*")})


def test_there_are_configs():
    assert CONFIGS / "quickstart.yaml" in FILES


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(CONFIGS)))
def test_every_config_loads_says_what_it_is_for_and_survives_printing(file, tmp_path):
    config = load_config(file)
    about = config.about
    assert about.question
    assert about.run
    assert about.hardware
    assert about.hours > 0
    (tmp_path / "printed.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "printed.yaml") == config


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(CONFIGS)))
def test_the_command_in_a_config_starts_that_config(file):
    command = load_config(file).about.run
    assert f"--config configs/{file.relative_to(CONFIGS)}" in command
