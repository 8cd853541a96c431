import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
LOCKS = sorted((REPOSITORY / "requirements").glob("*.txt"))
SOURCES = [
    file
    for folder in ("jaxplan", "scripts", "tests")
    for file in sorted((REPOSITORY / folder).rglob("*.py"))
    if file != Path(__file__).resolve()
]
UNSAFE = {
    "a pickle runs code when it is read": r"\b(cloud)?pickle\b|allow_pickle=True",
    "torch.load reads pickles": r"\btorch\.load\(",
    "eval and exec run what they read": r"(?<![\w.])(eval|exec)\(",
    "a stranger's code": r"trust_remote_code=True",
    "only the safe loader of YAML": r"yaml\.(unsafe_|full_)?load(_all)?\(|UnsafeLoader",
    "a shell reads more than was meant": r"shell=True|os\.system\(",
}


def test_imports_point_downwards_and_keep_to_their_doors():
    finished = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr


@pytest.mark.parametrize("reason", UNSAFE)
def test_nothing_that_runs_code_from_data_is_used(reason):
    found = [
        f"{file.relative_to(REPOSITORY)}:{number}: {line.strip()}"
        for file in SOURCES
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if re.search(UNSAFE[reason], line)
    ]
    assert found == []


def test_remote_code_is_refused_wherever_transformers_loads():
    for file in SOURCES:
        text = file.read_text()
        loads = len(re.findall(r"\bAuto\w+\.from_pretrained\(", text))
        assert text.count("trust_remote_code=False") >= loads, file


def test_reading_a_config_does_not_start_jax():
    program = "import sys, jaxplan.config.reader; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_there_is_a_lock_for_each_platform_with_hashes_and_no_addresses():
    assert [lock.stem for lock in LOCKS] == ["cpu", "cuda12", "cuda13", "tpu"]
    for lock in LOCKS:
        text = lock.read_text()
        assert "//" not in text, lock
        pins = re.findall(
            r"(?m)^(\S+)==\S+.*\n((?: +--hash=sha256:[0-9a-f]{64}.*\n)*)", text
        )
        assert len(pins) == len(re.findall(r"(?m)^\S", text)), lock
        assert all(hashes for _, hashes in pins), lock


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_a_lock_pins_what_the_project_asks_for(lock):
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    names = {re.split(r"[<>=!\[]", requirement)[0] for requirement in wanted}
    pinned = set(re.findall(r"(?m)^([\w-]+)==", lock.read_text()))
    assert names <= pinned
    assert "torch" not in pinned
    text = lock.read_text()
    assert "jax==0.10.1 ; python_full_version < '3.12'" in text
    assert not re.search(r"(?m)^jax(lib)?==(0\.10\.2|0\.11\.0)\b", text)


def test_tests_mirror_the_modules_that_they_test():
    scripts = {file.stem for file in (REPOSITORY / "scripts").glob("*.py")}
    for file in sorted((REPOSITORY / "tests").glob("*/test_*.py")):
        package = REPOSITORY / "jaxplan" / file.parent.name
        modules = {module.stem for module in package.glob("*.py")} | scripts
        tested = file.stem.removeprefix("test_")
        assert any(f"{tested}_".startswith(f"{name}_") for name in modules), file
