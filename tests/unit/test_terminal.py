"""What a person sees, and what goes to the log. Each test starts a real process, as the file descriptors are the
point."""
from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2]), "OMP_NUM_THREADS": "1"}
PRELUDE = """
import logging, os, sys, warnings
from dpo_dist.runtime.terminal import Terminal
terminal = Terminal.start({log!r}, is_main={is_main})
"""


def run(body: str, log: Path, is_main: bool = True, **options: object) -> subprocess.CompletedProcess[str]:
    script = PRELUDE.format(log=str(log), is_main=is_main) + textwrap.dedent(body)
    settings: dict[str, Any] = {"capture_output": True, "env": ENVIRONMENT} | options
    return subprocess.run([sys.executable, "-c", script], text=True, timeout=60, **settings)


def test_what_is_said_reaches_stdout_and_everything_else_the_log(tmp_path: Path) -> None:
    done = run("""
        os.write(1, b"C on stdout\\n"); os.write(2, b"C on stderr\\n")
        print("python on stdout"); print("python on stderr", file=sys.stderr)
        logging.getLogger("library").info("through logging")
        warnings.warn("a warning")
        os.system("echo a child process")
        terminal.say("step 0: loss [bold]0.6931[/bold] :tada:")
    """, tmp_path / "logs" / "rank-0.log")
    assert done.returncode == 0
    assert done.stdout == "step 0: loss [bold]0.6931[/bold] :tada:\n" and done.stderr == ""
    log = (tmp_path / "logs" / "rank-0.log").read_text()
    for chatter in ("C on stdout", "C on stderr", "python on stdout", "python on stderr",
                    "INFO library: through logging", "a warning", "a child process", "step 0: loss"):
        assert chatter in log
    assert re.search(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+ INFO library: through logging$", log, re.M)


def test_the_log_of_an_earlier_attempt_is_kept(tmp_path: Path) -> None:
    run("print('first attempt')", tmp_path / "log")
    run("print('second attempt')", tmp_path / "log")
    assert (tmp_path / "log").read_text() == "first attempt\nsecond attempt\n"


def test_only_the_main_process_speaks_but_an_error_is_heard_from_any(tmp_path: Path) -> None:
    done = run("""
        terminal.say("hidden")
        terminal.table("hidden", ["a"], [[1]])
        with terminal.progress(2) as progress:
            progress.update(1, loss=0.5)
        terminal.error("rank 1: data.train=rows.jsonl is not there")
    """, tmp_path / "log", is_main=False)
    assert done.stdout == "" and done.stderr == "rank 1: data.train=rows.jsonl is not there\n"
    assert "rank 1: data.train" in (tmp_path / "log").read_text()


def test_an_uncaught_exception_is_heard_and_its_traceback_is_in_the_log(tmp_path: Path) -> None:
    done = run("raise RuntimeError('the weights are not finite')", tmp_path / "log", is_main=False)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == f"RuntimeError: the weights are not finite\nThe traceback is in {tmp_path / 'log'}\n"
    assert "Traceback (most recent call last)" in (tmp_path / "log").read_text()


def test_progress_without_a_terminal_is_a_line_now_and_then_and_the_last(tmp_path: Path) -> None:
    done = run("""
        with terminal.progress(100, done=10, description="train") as progress:
            for step in range(11, 101):
                progress.update(step, loss=0.5, accuracy=0.75, pairs_per_second=12.34)
        with terminal.progress(9, description="stopped early") as progress:
            for step in range(1, 6):
                progress.update(step)
    """, tmp_path / "log")
    lines = done.stdout.splitlines()
    assert re.fullmatch(r"train  11/100  loss 0\.5000  accuracy 0\.750  12\.3 pairs/s  \d+:\d\d:\d\d left", lines[0])
    assert lines[1] == "train  100/100  loss 0.5000  accuracy 0.750  12.3 pairs/s"
    assert lines[2].startswith("stopped early  1/9") and lines[3].startswith("stopped early  5/9")
    assert len(lines) == 4


def test_progress_on_a_terminal_is_a_bar_that_lets_lines_pass(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    body = """
        with terminal.progress(3, description="train") as progress:
            for step in range(1, 4):
                progress.update(step, loss=0.25, accuracy=1.0, pairs_per_second=8)
                print("chatter")
                if step == 2:
                    terminal.say("checkpoint written")
                    with terminal.progress(1, description="evaluate") as inner:
                        inner.update(1)
    """
    done = run(body, tmp_path / "log", capture_output=False, stdin=theirs, stdout=theirs, stderr=theirs,
               env=ENVIRONMENT | {"TERM": "xterm"})
    os.set_blocking(ours, False)
    seen = os.read(ours, 1 << 16).decode()
    os.close(ours)
    os.close(theirs)
    assert done.returncode == 0
    assert "━" in seen and "3/3" in seen and "loss 0.2500  accuracy 1.000  8.0 pairs/s" in seen
    assert "checkpoint written" in seen and "evaluate" in seen and "chatter" not in seen
    assert "\x1b[?25l" not in seen, "the cursor must not be hidden: a killed run could not show it again"


def test_a_table_is_shown_whole(tmp_path: Path) -> None:
    long = "a/very/long/path/" * 12
    done = run(f"terminal.table('Worst pairs', ['pair', 'margin [nats]'], [[{long!r}, -1.5], ['b', 0.25]])",
               tmp_path / "log")
    assert "Worst pairs" in done.stdout and "margin [nats]" in done.stdout and "-1.5" in done.stdout
    assert re.sub(r"[^a-z/]", "", done.stdout).count("a/very/long/path/") == 12


def test_a_reader_that_goes_away_does_not_stop_the_run(tmp_path: Path) -> None:
    body = """
        for i in range(3):
            terminal.say("is anyone there?")
            terminal.error("no")
        with terminal.progress(2) as progress:
            progress.update(1, loss=1.0)
        open(RESULT, "w").write("trained")
    """.replace("RESULT", repr(str(tmp_path / "result")))
    reading, writing = os.pipe()
    os.close(reading)
    done = run(body, tmp_path / "log", capture_output=False, stdout=writing, stderr=writing)
    os.close(writing)
    assert done.returncode == 0 and (tmp_path / "result").read_text() == "trained"
    assert (tmp_path / "log").read_text().count("nobody reads") == 2, "said once for each of stdout and stderr"


def test_a_process_without_stdout_and_stderr_still_runs(tmp_path: Path) -> None:
    script = PRELUDE.format(log=str(tmp_path / "log"), is_main=True) + "terminal.say('hello'); os.write(2, b'chatter')"
    done = subprocess.run(["/bin/sh", "-c", f'exec "{sys.executable}" -c "$SCRIPT" <&- >&- 2>&-'],
                          env=ENVIRONMENT | {"SCRIPT": script}, timeout=60)
    assert done.returncode == 0
    assert "hello" in (tmp_path / "log").read_text() and "chatter" in (tmp_path / "log").read_text()


def test_stop_gives_the_output_back_and_a_second_start_works(tmp_path: Path) -> None:
    done = run(f"""
        hook = sys.excepthook
        terminal.say("one"); print("to the first log")
        terminal.stop(); terminal.stop()
        print("to the person"); print("an error", file=sys.stderr)
        second = Terminal.start({str(tmp_path / 'second')!r}, is_main=True)
        third = Terminal.start({str(tmp_path / 'third')!r}, is_main=True)
        third.say("two"); print("to the third log")
        third.stop()
        print(len(logging.root.handlers), "handlers", sys.excepthook is sys.__excepthook__)
    """, tmp_path / "first")
    assert done.stdout == "one\nto the person\ntwo\n0 handlers True\n" and done.stderr == "an error\n"
    assert "to the first log" in (tmp_path / "first").read_text() and "to the third log" in (tmp_path
                                                                                             / "third").read_text()
    assert (tmp_path / "second").read_text() == ""


def test_without_capture_only_logging_and_warnings_go_to_the_log(tmp_path: Path) -> None:
    body = f"""
        terminal.stop()
        terminal = Terminal.start({str(tmp_path / 'log')!r}, is_main=True, capture=False)
        print("printed"); logging.getLogger("library").warning("logged"); terminal.say("said")
    """
    done = run(body, tmp_path / "other")
    assert sorted(done.stdout.split()) == ["printed", "said"] and done.stderr == ""
    assert "WARNING library: logged" in (tmp_path / "log").read_text()


@pytest.mark.distributed
def test_under_torchrun_each_rank_has_its_log_and_the_person_one_voice(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(textwrap.dedent(f"""
        import os
        from dpo_dist.runtime.terminal import Terminal
        rank = int(os.environ["RANK"])
        terminal = Terminal.start({str(tmp_path)!r} + f"/rank-{{rank}}.log", is_main=rank == 0)
        os.write(2, b"chatter")
        terminal.say("hello")
    """))
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
                           str(script)], env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout == "hello\n" and "chatter" not in done.stderr
    assert all("chatter" in (tmp_path / f"rank-{rank}.log").read_text() for rank in (0, 1))
