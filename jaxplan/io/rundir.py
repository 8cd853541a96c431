"""The directory of a run: whose it is, by which config, and how far it has come.

The same command always continues the run. A directory belongs to one config; a stage
is done when its marker is there, and the marker holds its results and the commit that
made them. One run at a time works in it; of several processes the first one writes, and
the others see the same directory on a shared disk.
"""

import fcntl
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax

from jaxplan.config.reader import ConfigError, differences, load_config, to_yaml
from jaxplan.config.schema import RunConfig
from jaxplan.core.processes import first_alone, is_first

# What --resume may change in a run that has begun. Of two entries the longer key wins;
# all other keys shape the data or the arrays and must stay.
_FREE = "free"  # has no influence on results, and needs no --resume
_UNFINISHED = "unfinished"  # while its stage is not done; with a notice
_REDO = "redo"  # the stage and those after it are done again
_MAY_CHANGE = {
    "about": _FREE,
    "name": _FREE,
    "run_root": _FREE,
    "stages": _FREE,
    "mesh": _FREE,
    "sweep": _FREE,
    "collect.endpoint.url": _UNFINISHED,
    "collect.endpoint.timeout_seconds": _UNFINISHED,
    "collect.endpoint.retries": _UNFINISHED,
    "collect.endpoint.budget_tokens": _UNFINISHED,
    "sft": _UNFINISHED,
    "sft.batch_segments": None,
    "sft.held_out": None,
    "sft.dataset": None,
    "sft.plans": None,
    "sft.relay": None,
    "sft.lora": None,
    "sft.validate_every": _FREE,
    "sft.checkpoint_every": _FREE,
    "sft.panel_every": _FREE,
    "sft.panel_episodes": _FREE,
    "ppo": _UNFINISHED,
    "ppo.start": None,
    "ppo.iterations": _REDO,
    "ppo.checkpoint_every": _FREE,
    "ppo.critic": None,
    "evaluate": _REDO,
}
_ORDER = ("collect", "sft", "ppo", "evaluate", "report")
_TRAINING = ("sft", "ppo")  # whose agents evaluate plays with
_PACKAGES = ("jax", "jaxlib", "numpy", "optax", "orbax-checkpoint", "craftax")

Notify = Callable[[str], None]


class RunDirectoryError(RuntimeError):
    """The run cannot use this directory; the message says what to do."""


class RunDirectory:
    """An open run directory; a context manager that holds its lock.

    Args:
        root: folder of all runs.
        config: of this run; the directory is ``root/<config.name>``.
        resume: go on although keys differ that may change.
        fresh: move what is there aside to ``<name>.old-N`` and begin anew.
        notify: is handed sentences that a person should see.

    Attributes:
        path: the directory.
        commit: of the code that works in it, as it was at the start.

    Raises:
        RunDirectoryError: another process works in it, or it is another config's.
        OtherProcessError: the first process was refused.
    """

    def __init__(
        self,
        root: Path | str,
        config: RunConfig,
        *,
        resume: bool = False,
        fresh: bool = False,
        notify: Notify = lambda sentence: None,
    ):
        self.path = Path(root).resolve() / config.name
        self.commit = commit()
        self._notify = notify
        first_alone(lambda: self._open(config, resume, fresh))

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the directory back."""
        if is_first():
            _write_lock(self.path / "lock.json", owner=None)

    def is_done(self, stage: str) -> bool:
        """Tell whether a stage has finished."""
        return self._marker(stage).exists()

    def finish(self, stage: str, results: dict[str, Any]) -> None:
        """Mark a stage as finished; ``results`` is JSON, the commit is added to it.

        What was evaluated and reported of an agent before it was ready is open again.
        """
        first_alone(lambda: self._finish(stage, results))

    def results(self, stage: str) -> dict[str, Any]:
        """Read what a finished stage left.

        Raises:
            RunDirectoryError: it has not finished.
        """
        if not self.is_done(stage):
            raise RunDirectoryError(
                f"{self.path}: stage {stage} has not finished; "
                f"add it to the stages of the run"
            )
        return json.loads(self._marker(stage).read_text(encoding="utf-8"))

    def _marker(self, stage: str) -> Path:
        return marker(self.path, stage)

    def _finish(self, stage: str, results: dict[str, Any]) -> None:
        if stage in _TRAINING:
            self._reopen("evaluate")
        _write_json(self._marker(stage), results | {"commit": self.commit})

    def _open(self, config: RunConfig, resume: bool, fresh: bool) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock()
        try:
            if fresh and (self.path / "config.yaml").exists():
                self._begin_anew()
            self._settle_config(config, resume)
        except BaseException:
            self.close()
            raise

    def _lock(self) -> None:
        owner = _write_lock(self.path / "lock.json", owner=_this_process())
        if owner is None:
            return
        name = f"process {owner['pid']} on {owner['host']}, started {owner['started']}"
        if _may_be_alive(owner):
            raise RunDirectoryError(
                f"{self.path}: in use by {name}; wait for it, or choose another name. "
                "If that process is gone, delete lock.json"
            )
        self._notify(f"{self.path}: taken over from {name}, which is gone")

    def _begin_anew(self) -> None:
        taken = {path.name for path in self.path.parent.iterdir()}
        name = self.path.name
        number = next(n for n in range(1, 10**6) if f"{name}.old-{n}" not in taken)
        aside = self.path.with_name(f"{name}.old-{number}")
        self.close()
        os.replace(self.path, aside)
        self._notify(f"{self.path}: what was there is now {aside.name}")
        self.path.mkdir()
        self._lock()

    def _settle_config(self, config: RunConfig, resume: bool) -> None:
        """Compare with the config that the directory was made by, and keep the new."""
        file = self.path / "config.yaml"
        if file.exists():
            changed = differences(_read_config(file), config)
            self._judge_changes(changed, resume)
        _write_text(file, to_yaml(config))

    def _judge_changes(self, changed: list[tuple[str, Any, Any]], resume: bool) -> None:
        free = [key for key, _, _ in changed if _rule(key) == _FREE]
        changed = [change for change in changed if change[0] not in free]
        refused = [c for c in changed if not resume or not self._may_change(c[0])]
        if refused:
            hint = (
                "these may not change in a run that has begun. "
                if resume
                else "--resume goes on with the new values where that is possible. "
            )
            lines = [f"  {key}: made with {a!r}, now {b!r}" for key, a, b in refused]
            raise RunDirectoryError(
                f"{self.path}: made by another config\n"
                + "\n".join(lines)
                + f"\n{hint}--fresh moves the directory aside and begins anew."
            )
        if free:
            names = ", ".join(free)
            self._notify(f"changed since the run began, without influence: {names}")
        for key, old, new in changed:
            self._notify(f"{key} was {old!r} until here and is now {new!r}")
            if _rule(key) == _REDO:
                self._reopen(key.partition(".")[0])

    def _may_change(self, key: str) -> bool:
        rule = _rule(key)
        if rule == _UNFINISHED:
            return not self.is_done(key.partition(".")[0])
        return rule is not None

    def _reopen(self, stage: str) -> None:
        for later in _ORDER[_ORDER.index(stage) :]:
            self._marker(later).unlink(missing_ok=True)
            for part in self._marker(later).parent.glob(f"{later}-*.json"):
                part.unlink()


def marker(run_dir: Path, stage: str) -> Path:
    """The file that is there once a stage has finished."""
    return run_dir / "stages" / f"{stage}.json"


def check_finished(run_dir: Path, stage: str) -> None:
    """Refuse the agent of a stage that is still training, or never began.

    Raises:
        RunDirectoryError: the stage has no marker.
        OtherProcessError: the first process saw that.
    """

    def check() -> None:
        if not marker(run_dir, stage).exists():
            raise RunDirectoryError(
                f"{run_dir}: {stage} has not finished there, so its agent cannot be "
                "used yet; run that stage to its end first"
            )

    first_alone(check)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide results."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def commit() -> str | None:
    """``git describe`` of the source tree, ``-dirty`` if changed; None without one.

    A Python file that git does not know is a change, too.
    """
    return describe(Path(__file__).resolve().parents[2])


def describe(root: Path) -> str | None:
    """``commit`` of a source tree."""
    if not (root / ".git").exists():  # installed, or inside someone else's repository
        return None
    try:
        name = _git(root, "describe", "--always", "--dirty")
        new = _git(root, "ls-files", "--others", "--exclude-standard", "--", "*.py")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{name}-dirty" if new and not name.endswith("-dirty") else name


def is_kept(name: str | None) -> bool:
    """Tell whether a commit holds all of the code that ran as it."""
    return name is not None and not name.endswith("-dirty")


def warn_of(name: str | None) -> None:
    """Say on stderr that a result of this commit cannot be made again, if so."""
    if not is_kept(name):
        sys.stderr.write(
            f"warning: made by {name or 'an unknown commit'}; commit first, so that "
            "the result can be made again\n"
        )


def commits_of(runs: Iterable[Path]) -> str | None:
    """Name the commits that made some runs; None if one is unknown.

    A report may have been written again since, and measures nothing.
    """
    files = [file for run in runs for file in (run / "stages").glob("*.json")]
    stages = [json.loads(f.read_text("utf-8")) for f in files if f.stem != "report"]
    names = {stage.get("commit") for stage in stages}
    known = [name for name in names if name is not None]
    return ", ".join(sorted(known)) if len(known) == len(names) else None


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def made_by() -> dict[str, Any]:
    """What a result was made by: ``commit``, ``versions`` and ``hardware``."""
    return {"commit": commit(), "versions": versions(), "hardware": hardware()}


def hardware() -> str:
    """One line on the machine and on the devices that JAX computes on."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    return f"{_cpu_model()}, {cores} cores, {memory:.0f} GiB memory; {devices}"


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _rule(key: str) -> str | None:
    """Look up a key or the nearest section above it."""
    while key and key not in _MAY_CHANGE:
        key = key.rpartition(".")[0]
    return _MAY_CHANGE.get(key)


def _read_config(file: Path) -> RunConfig:
    try:
        return load_config(file, resolved=True)
    except ConfigError as error:
        raise RunDirectoryError(
            f"{file.parent}: made by another version of jaxplan; this one cannot read "
            f"its config\n{error}\n--fresh moves the directory aside to begin anew."
        ) from error


def _write_lock(path: Path, owner: dict[str, Any] | None) -> dict[str, Any] | None:
    """Take or give back the lock, unless another process that may live has it.

    The file lock only makes reading and writing one act; it is not held.

    Args:
        path: of the lock file.
        owner: who takes it; None gives it back.

    Returns:
        Who had it.
    """
    with path.open("a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        content = file.read()
        before = json.loads(content) if content else None
        if owner is None or before is None or not _may_be_alive(before):
            file.truncate(0)
            file.write(json.dumps(owner) if owner else "")
    return before


def _this_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "birth": _birth(os.getpid()),
    }


def _may_be_alive(owner: dict[str, Any]) -> bool:
    """Tell whether an owner may still run; of another machine nobody can know."""
    if owner["host"] != socket.gethostname():
        return True
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return owner["birth"] == _birth(owner["pid"])  # else the number was given again


def _birth(pid: int) -> str | None:
    """When a process began, in ticks since boot; None where the system does not say."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return None
    return stat.rpartition(")")[2].split()[19]


def _write_json(path: Path, value: Any) -> None:
    _write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def _write_text(path: Path, text: str) -> None:
    """Write a whole file in one step, so that a kill leaves the old one or the new."""
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
