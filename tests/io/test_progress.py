import os
import pty
import select
import tempfile

from jaxplan.io.progress import Progress


def lines_of(steps, total, seconds_per_step, **options):
    """What is printed when ``steps`` are reported, one every so many seconds."""
    now = [0.0]
    with tempfile.TemporaryFile("w+") as stream:
        with Progress(
            "ppo", total, stream=stream, clock=lambda: now[0], **options
        ) as progress:
            for step in steps:
                now[0] += seconds_per_step
                progress.update(step, loss=step / 10)
        stream.seek(0)
        return stream.read().splitlines()


def test_without_a_terminal_there_is_a_line_per_interval_and_the_last():
    lines = lines_of(range(1, 101), 100, seconds_per_step=1.0, interval=30.0)
    assert [line.split()[1] for line in lines] == [
        "1/100",
        "31/100",
        "61/100",
        "91/100",
        "100/100",
    ]


def test_a_line_says_stage_step_values_and_time_left():
    (line,) = lines_of([5], 20, seconds_per_step=10.0)
    assert line == "ppo  5/20  loss 0.5  30 s left"


def test_the_last_line_says_how_long_it_took():
    lines = lines_of([10, 20], 20, seconds_per_step=50.0)
    assert lines[-1] == "ppo  20/20  loss 2  done in 1 min 40 s"


def test_time_left_counts_only_the_steps_of_this_process():
    (line,) = lines_of([15], 20, seconds_per_step=10.0, done=10)
    assert line.endswith("10 s left")


def test_values_are_written_for_people(capsys):
    with Progress("ppo", 1) as progress:
        progress.update(
            1,
            env_return=7.25,
            env_steps_per_second=1204.4,
            tokens_per_second=98765.0,
            plan_rate=0.1254,
            loss=float("nan"),
            episodes=12,
        )
    written = capsys.readouterr().err
    for words in (
        "env return 7.25",
        "env steps/s 1,204",
        "tokens/s 98,765",
        "plan rate 12.5%",
        "loss nan",
        "episodes 12",
    ):
        assert words in written


def test_on_a_terminal_the_line_is_drawn_live(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    outer, inner = pty.openpty()
    with open(inner, "w") as terminal:
        with Progress("sft", 10, stream=terminal) as progress:
            progress.update(4, loss=0.5)
        terminal.flush()
        drawn = ""
        while select.select([outer], [], [], 0.5)[0]:  # it comes piece by piece
            drawn += os.read(outer, 100_000).decode()
    os.close(outer)
    assert "\x1b[" in drawn
    assert "4/10" in drawn
    assert "loss 0.5" in drawn


def test_a_warning_is_a_line_of_its_own(capsys):
    with Progress("ppo", 9) as progress:
        progress.tell("[plan] is rare")
    assert capsys.readouterr().err == "ppo  [plan] is rare\n"
