import dataclasses
import json
import os
import platform
import socket
import subprocess
import sys

import jax
import pytest

from jaxplan.config.reader import load_config
from jaxplan.config.schema import RunConfig
from jaxplan.io.rundir import (
    RunDirectory,
    RunDirectoryError,
    check_finished,
    commit,
    commits_of,
    describe,
    hardware,
    is_kept,
    versions,
    warn_of,
)


def change(config, section, **fields):
    changed = dataclasses.replace(getattr(config, section), **fields)
    return dataclasses.replace(config, **{section: changed})


CONFIG = RunConfig(name="toy")


def test_a_new_run_has_the_resolved_config_in_it(tmp_path):
    with RunDirectory(tmp_path, CONFIG) as run:
        assert run.path == tmp_path / "toy"
        assert load_config(run.path / "config.yaml") == CONFIG


def test_the_same_command_continues_with_the_stages_done(tmp_path):
    with RunDirectory(tmp_path, CONFIG) as run:
        assert not run.is_done("collect")
        run.finish("collect", {"episodes": 3})
    with RunDirectory(tmp_path, CONFIG) as run:
        assert run.is_done("collect")
        assert run.results("collect") == {"episodes": 3, "commit": run.commit}
        with pytest.raises(RunDirectoryError, match="stage sft has not finished"):
            run.results("sft")


def test_another_config_is_refused_naming_every_key_and_the_two_ways_out(tmp_path):
    with RunDirectory(tmp_path, CONFIG):
        pass
    other = change(change(CONFIG, "ppo", gamma=0.5), "model", width=64)
    with pytest.raises(RunDirectoryError) as caught:
        RunDirectory(tmp_path, other)
    message = str(caught.value)
    assert "ppo.gamma: made with 0.99, now 0.5" in message
    assert "model.width: made with 128, now 64" in message
    assert "--resume" in message
    assert "--fresh" in message
    with RunDirectory(tmp_path, CONFIG):  # the refusal gave the lock back
        pass


def test_resume_refuses_what_shapes_the_arrays(tmp_path):
    with RunDirectory(tmp_path, CONFIG):
        pass
    other = change(change(CONFIG, "ppo", gamma=0.5), "model", width=64)
    with pytest.raises(RunDirectoryError, match="may not change") as caught:
        RunDirectory(tmp_path, other, resume=True)
    assert "model.width" in str(caught.value)
    assert "ppo.gamma" not in str(caught.value)
    assert load_config(tmp_path / "toy" / "config.yaml") == CONFIG


def test_resume_takes_new_costs_while_the_stage_runs_and_not_after(tmp_path):
    notices = []
    with RunDirectory(tmp_path, CONFIG):
        pass
    dearer = change(CONFIG, "ppo", plan_cost=0.1)
    with RunDirectory(tmp_path, dearer, resume=True, notify=notices.append) as run:
        assert load_config(run.path / "config.yaml") == dearer
        run.finish("ppo", {})
    assert notices == ["ppo.plan_cost was 0.0 until here and is now 0.1"]
    with pytest.raises(RunDirectoryError, match=r"ppo\.plan_cost"):
        RunDirectory(tmp_path, CONFIG, resume=True)


def test_more_iterations_reopen_ppo_and_what_follows(tmp_path):
    with RunDirectory(tmp_path, CONFIG) as run:
        for stage in ("collect", "sft", "ppo", "evaluate", "report"):
            run.finish(stage, {})
    longer = change(CONFIG, "ppo", iterations=1000)
    with RunDirectory(tmp_path, longer, resume=True) as run:
        done = [s for s in CONFIG.stages if run.is_done(s)]
    assert done == ["collect", "sft"]


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_what_was_told_of_an_agent_in_training_is_told_anew_when_it_is_ready(
    tmp_path, stage
):
    with RunDirectory(tmp_path, CONFIG) as run:
        for early in ("collect", "evaluate-sft+rl", "evaluate", "report"):
            run.finish(early, {})
        run.finish(stage, {})
        left = {file.stem for file in run.path.glob("stages/*")}
    assert left == {"collect", stage}


def test_an_agent_is_refused_until_its_stage_has_finished(tmp_path):
    with RunDirectory(tmp_path, CONFIG) as run:
        with pytest.raises(RunDirectoryError, match="toy: ppo has not finished"):
            check_finished(run.path, "ppo")
        run.finish("ppo", {})
        check_finished(run.path, "ppo")


def test_keys_without_influence_change_freely_with_one_notice(tmp_path):
    with RunDirectory(tmp_path, CONFIG):
        pass
    notices = []
    other = change(change(CONFIG, "about", question="?"), "sweep", seeds=5)
    with RunDirectory(tmp_path, other, notify=notices.append) as run:
        assert load_config(run.path / "config.yaml") == other
    (notice,) = notices
    assert notice.endswith("without influence: about.question, sweep.seeds")
    with pytest.raises(RunDirectoryError) as caught:
        RunDirectory(tmp_path, change(CONFIG, "ppo", gamma=0.5))
    assert "ppo.gamma" in str(caught.value)
    assert "sweep.seeds" not in str(caught.value)


def test_logging_keys_change_without_any_stage_being_done_again(tmp_path):
    with RunDirectory(tmp_path, CONFIG) as run:
        run.finish("ppo", {})
    with RunDirectory(
        tmp_path, change(CONFIG, "ppo", checkpoint_every=3), resume=True
    ) as run:
        assert run.is_done("ppo")


def test_fresh_moves_the_old_directory_aside_and_deletes_nothing(tmp_path):
    for width in (32, 64, 96):
        with RunDirectory(
            tmp_path, change(CONFIG, "model", width=width), fresh=True
        ) as run:
            run.finish("collect", {"width": width})
    for name, width in (("toy.old-1", 32), ("toy.old-2", 64), ("toy", 96)):
        marker = tmp_path / name / "stages" / "collect.json"
        assert json.loads(marker.read_text())["width"] == width


def test_fresh_does_not_move_a_directory_that_is_in_use(tmp_path):
    with (
        RunDirectory(tmp_path, CONFIG),
        pytest.raises(RunDirectoryError, match="in use"),
    ):
        RunDirectory(tmp_path, CONFIG, fresh=True)
    assert [p.name for p in tmp_path.iterdir()] == ["toy"]


def test_a_config_that_is_no_longer_read_names_the_key_and_fresh(tmp_path):
    with RunDirectory(tmp_path, CONFIG) as run:
        (run.path / "config.yaml").write_text("ppo:\n  no_such_key: 1\n")
    with pytest.raises(RunDirectoryError, match=r"no_such_key[\s\S]*--fresh"):
        RunDirectory(tmp_path, CONFIG)
    with RunDirectory(tmp_path, CONFIG, fresh=True):
        pass


def test_a_second_run_is_refused_and_the_owner_named(tmp_path):
    with RunDirectory(tmp_path, CONFIG):
        owner = f"process {os.getpid()} on {socket.gethostname()}"
        with pytest.raises(RunDirectoryError, match=owner):
            RunDirectory(tmp_path, CONFIG)
    with RunDirectory(tmp_path, CONFIG):
        pass


def take_and_die(tmp_path):
    """Open the directory in a process that is then killed."""
    code = (
        "import os, signal, sys\n"
        "from jaxplan.config.schema import RunConfig\n"
        "from jaxplan.io.rundir import RunDirectory\n"
        f"RunDirectory({str(tmp_path)!r}, RunConfig(name='toy'))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    return subprocess.run([sys.executable, "-c", code], check=False).returncode


def test_the_lock_of_a_killed_process_is_taken_over_with_a_notice(tmp_path):
    assert take_and_die(tmp_path) == -9
    notices = []
    with RunDirectory(tmp_path, CONFIG, notify=notices.append):
        pass
    (notice,) = notices
    assert "taken over from process" in notice


def test_a_process_number_that_was_given_again_does_not_hold_the_lock(tmp_path):
    assert take_and_die(tmp_path) == -9
    file = tmp_path / "toy" / "lock.json"
    lock = json.loads(file.read_text()) | {"pid": os.getpid(), "birth": "1"}
    file.write_text(json.dumps(lock))
    with RunDirectory(tmp_path, CONFIG):
        pass


def test_a_lock_of_another_machine_is_respected(tmp_path):
    assert take_and_die(tmp_path) == -9
    file = tmp_path / "toy" / "lock.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"host": "elsewhere"}))
    with pytest.raises(RunDirectoryError, match=r"on elsewhere.*delete lock\.json"):
        RunDirectory(tmp_path, CONFIG)


def test_results_that_are_no_json_leave_the_stage_unfinished(tmp_path):
    with RunDirectory(tmp_path, CONFIG) as run:
        with pytest.raises(ValueError, match="not JSON compliant"):
            run.finish("sft", {"loss": float("nan")})
        assert not run.is_done("sft")


def test_what_a_result_was_measured_on_is_recorded():
    assert versions()["python"] == platform.python_version()
    assert versions()["jax"][0].isdigit()
    assert commit() is None or commit()
    assert hardware().endswith(f"; {jax.device_count()} x cpu")
    assert f"{len(os.sched_getaffinity(0))} cores" in hardware()


def test_a_source_tree_is_dirty_by_changes_and_by_python_files_git_has_not(tmp_path):
    def git(*arguments):
        names = ("-c", "user.name=a", "-c", "user.email=b")
        subprocess.run(["git", *names, *arguments], cwd=tmp_path, check=True)

    assert describe(tmp_path) is None
    git("init", "-q")
    (tmp_path / "a.py").write_text("a = 1\n")
    (tmp_path / ".gitignore").write_text("ignored.py\n")
    git("add", ".")
    git("commit", "-q", "-m", "one")
    clean = describe(tmp_path)
    assert is_kept(clean)
    for other in ("notes.txt", "ignored.py"):
        (tmp_path / other).write_text("")
    assert describe(tmp_path) == clean
    (tmp_path / "b.py").write_text("b = 2\n")
    assert describe(tmp_path) == f"{clean}-dirty"
    (tmp_path / "b.py").unlink()
    (tmp_path / "a.py").write_text("a = 3\n")
    assert describe(tmp_path) == f"{clean}-dirty"


def test_only_code_that_no_commit_has_is_warned_of(capsys):
    warn_of("abc1234")
    assert not capsys.readouterr().err
    warn_of("abc1234-dirty")
    assert capsys.readouterr().err.startswith("warning: made by abc1234-dirty; commit")
    warn_of(None)
    assert capsys.readouterr().err.count("\n") == 1


def test_the_commits_of_runs_are_those_of_what_was_measured(tmp_path):
    def run(name, **stages):
        (tmp_path / name / "stages").mkdir(parents=True)
        for stage, told in stages.items():
            file = tmp_path / name / "stages" / f"{stage}.json"
            file.write_text(json.dumps({"commit": told} if told else {}))
        return tmp_path / name

    one, other = run("one", sft="a1", report="c3"), run("other", sft="b2")
    both, lost = run("both", sft="b2", evaluate="a1"), run("lost", sft=None)
    assert commits_of([one]) == "a1"
    assert commits_of([one, other]) == commits_of([both]) == "a1, b2"
    assert commits_of([one, lost]) is None
