"""The judge hook: real commands, a real server, and win rates that position and length do not decide."""
from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpo_dist.config.errors import UserError
from dpo_dist.judge import Comparison, Judge, open_judge
from dpo_dist.judge.url import Url
from dpo_dist.judge.win_rate import Duel, judge_duels, length_controlled
from dpo_dist.stats.intervals import share_interval

LONGER = """
import json, sys
for line in sys.stdin:
    row = json.loads(line)
    if "answer" in row:
        print(json.dumps({"id": row["id"], "score": len(row["answer"])}), flush=True)
    else:
        print(json.dumps({"id": row["id"], "score_a": len(row["a"]), "score_b": len(row["b"])}), flush=True)
"""


def command(folder: Path, program: str, timeout_seconds: float = 20.0) -> Judge:
    (folder / "judge.py").write_text(program)
    return open_judge([sys.executable, str(folder / "judge.py")], None, "eval.judge.command", timeout_seconds)


def questions(n: int) -> list[Comparison]:
    return [Comparison(f"prompt {i}", "x" * (i % 3), "x" * 1) for i in range(n)]


def test_a_command_compares_and_scores(tmp_path: Path):
    judge = command(tmp_path, LONGER)
    assert judge.compare(questions(6)) == [0.0, 0.5, 1.0] * 2
    assert judge.score(["p", "p"], ["ab", "abcd"]) == [2.0, 4.0] and judge.compare([]) == []


def test_a_command_may_answer_in_any_order_by_winner_and_only_once_it_has_read_more_than_a_pipe_holds(tmp_path: Path):
    judge = command(tmp_path, """
import json, sys
rows = [json.loads(line) for line in sys.stdin]
for row in reversed(rows):
    print(json.dumps({"id": row["id"], "winner": ["a", "b", "tie"][int(row["prompt"][7:]) % 3], "why": "x" * 200}))
""")
    many = [Comparison(f"prompt {i}", "x" * 400, "y" * 400) for i in range(600)]
    assert judge.compare(many) == [1.0, 0.0, 0.5] * 200


def test_answers_that_are_lists_of_token_ids_reach_the_judge(tmp_path: Path):
    assert command(tmp_path, LONGER).compare([Comparison([1, 2], [3, 4, 5], [6])]) == [1.0]


@pytest.mark.parametrize("program, said", [
    ("import sys; sys.exit('no key for the model')", "ended with exit code 1: no key for the model"),
    ("print('Loading model')", "wrote a line that is no JSON: 'Loading model'"),
    ("print('{\"id\": \"7\", \"winner\": \"a\"}')", "whose id was not asked"),
    ("print('{\"id\": \"0\", \"winner\": \"c\"}')", 'a JSON object with "winner": "a", "b" or "tie"'),
    ("print('{\"id\": \"0\", \"score_a\": NaN, \"score_b\": 1}')", 'a JSON object with "winner"'),
    ("print('[1]')", "whose id was not asked"),
    ("print('{\"id\": \"0\", \"winner\": \"a\"}\\n' * 2)", "answered id 0 twice"),
    ("print('{\"id\": \"1\", \"winner\": \"a\"}')", "left 1 of 2 questions without an answer, the first with id 0"),
    ("import os; os.close(0); os.close(1); raise SystemExit(3)", "exit code 3"),
])
def test_a_broken_command_is_a_clear_message(tmp_path: Path, program: str, said: str):
    with pytest.raises(UserError, match=r"eval\.judge\.command=") as refused:
        command(tmp_path, program).compare(questions(2))
    assert said in str(refused.value)


def test_a_command_that_is_silent_for_too_long_is_ended_with_all_that_it_started(tmp_path: Path):
    judge = command(tmp_path, f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(tmp_path / 'pid')!r}, "w").write(str(child.pid))
time.sleep(60)
""", timeout_seconds=0.5)
    with pytest.raises(UserError, match=r"no answer for 0.5 s; set eval.judge.timeout_seconds higher"):
        judge.compare(questions(1))
    child = Path("/proc", (tmp_path / "pid").read_text(), "stat")
    deadline = time.monotonic() + 5
    while child.exists() and child.read_text().split(")")[1].split()[0] != "Z":
        assert time.monotonic() < deadline, "a process of the judge is left"
        time.sleep(0.02)


def test_a_command_that_is_not_there_is_told_before_anything_is_asked():
    with pytest.raises(UserError, match="there is no program 'no-such-judge'"):
        open_judge(["no-such-judge"], None, "eval.judge.command")


# -------------------------------------------------------------------------------------------------------------- by URL


class QuietServer(ThreadingHTTPServer):
    requests, daemon_threads = 0, True

    def handle_error(self, *_: object) -> None:
        """A judge that was given up has no reader."""


@pytest.fixture
def server() -> Iterator[Callable[[Callable[[int, list[dict[str, Any]]], tuple[int, Any]]], str]]:
    """Starts a real server whose answers are those of a function of (number of the request, rows): its URL."""
    running: list[ThreadingHTTPServer] = []

    def serve(answer: Callable[[int, list[dict[str, Any]]], tuple[int, Any]]) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                rows = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["rows"]
                self.server.requests += 1
                status, said = answer(self.server.requests, rows)
                body = said if isinstance(said, bytes) else json.dumps(said).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        started = QuietServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=started.serve_forever, daemon=True, kwargs={"poll_interval": 0.02}).start()
        running.append(started)
        return f"http://127.0.0.1:{started.server_address[1]}/judge"

    yield serve
    for one in running:
        one.shutdown()
        one.server_close()


def asked(url: str, timeout_seconds: float = 5.0) -> Judge:
    """As open_judge gives it, without pauses between tries."""
    return Judge(Url(url, "eval.judge.url", timeout_seconds, (0.0, 0.0)).ask, "eval.judge.url", url)


def longer(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"id": row["id"], "score_a": len(row["a"]), "score_b": len(row["b"])} for row in rows]


def test_a_url_compares_some_at_a_time_and_may_answer_a_list_or_rows(server):
    sizes: list[int] = []

    def answer(number: int, rows: list[dict[str, Any]]) -> tuple[int, Any]:
        sizes.append(len(rows))
        return 200, longer(rows) if number == 1 else {"rows": longer(rows)}

    assert open_judge(None, server(answer), "eval.judge.url").compare(questions(60)) == [0.0, 0.5, 1.0] * 20
    assert sizes == [32, 28]


def test_a_busy_url_is_asked_again(server):
    url = server(lambda number, rows: (503, b"loading") if number < 3 else (200, longer(rows)))
    assert asked(url).compare(questions(3)) == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("answer, said", [
    ((503, b"still loading"), "answered 503: still loading"), ((401, b""), "answered 401: (nothing said)"),
    ((200, b"<html>"), "answered '<html>'; its answer is a JSON list"), ((200, []), "left 2 of 2 questions")])
def test_a_broken_url_is_a_clear_message(server, answer: tuple[int, Any], said: str):
    with pytest.raises(UserError, match=r"eval\.judge\.url=http") as refused:
        asked(server(lambda number, rows: answer)).compare(questions(2))
    assert said in str(refused.value)


def test_a_url_that_is_not_there_or_silent_is_a_clear_message(server):
    with pytest.raises(UserError, match=r"cannot be reached: .*refused"):
        asked("http://127.0.0.1:9/").compare(questions(1))
    with pytest.raises(UserError, match=r"gave no answer for 0.2 s; set eval.judge.timeout_seconds"):
        asked(server(lambda number, rows: (time.sleep(1), (200, []))[1]), 0.2).compare(questions(1))


# ----------------------------------------------------------------------------------------------------------- win rates


def by(prefer: Callable[[dict[str, Any]], str]) -> Judge:
    """A judge in this process."""
    return Judge(lambda rows: [{"id": row["id"], "winner": prefer(row)} for row in rows], "eval.judge.command", "here")


def duels(n: int, ours: str = "good", theirs: str = "bad") -> list[Duel]:
    return [Duel(f"p{i}", ours, theirs, 10 + i % 7, 10 + i % 5) for i in range(n)]


def test_a_judge_that_likes_the_first_answer_gives_one_half_and_is_found_out():
    found, won = judge_duels(by(lambda row: "a"), duels(40))
    assert found.win_rate.value == 0.5 and found.first_preferred == 1.0 and found.position_consistency == 0.0
    assert found.ties == 40 and set(won) == {0.5}


def test_a_judge_that_knows_gives_its_rate_whatever_the_order():
    found, won = judge_duels(by(lambda row: "a" if row["a"] == "good" else "b"), duels(40))
    assert found.win_rate.value == 1.0 and found.position_consistency == 1.0 and found.first_preferred == 0.5
    assert 0.9 < found.win_rate.low < 1.0 and (found.wins, found.ties, found.losses) == (40, 0, 0)
    assert won.tolist() == [1.0] * 40


def test_the_judge_is_not_told_whose_an_answer_is_and_sees_both_orders():
    seen: list[dict[str, Any]] = []
    judge_duels(by(lambda row: seen.append(row) or "tie"), duels(20))
    assert len(seen) == 40 and sum(row["a"] == "good" for row in seen) == 20
    assert [row["id"] for row in seen] == [str(i) for i in range(40)]
    first = [row["a"] == "good" for row in seen]
    assert 4 <= sum(first[:20]) <= 16, "in one shuffled row"


def test_at_equal_length_a_judge_of_length_alone_finds_no_winner_and_a_judge_of_quality_still_does():
    r = np.random.default_rng(1)
    difference = r.normal(20, 25, 400)                    # our answers are longer
    of_length = (difference > 0).astype(float)
    assert share_interval(of_length).value > 0.7
    controlled = length_controlled(of_length, difference)
    assert controlled.low < 0.5 < controlled.high
    for truth in (0.8, 0.5, 0.3):                         # a logit of quality, and one of length
        p = 1 / (1 + np.exp(-(np.log(truth / (1 - truth)) + 1.5 * np.tanh(difference / difference.std()))))
        won = (r.random(400) < p).astype(float)
        found = length_controlled(won, difference)
        assert found.low <= truth <= found.high and abs(found.value - truth) < 0.1
        assert share_interval(won).value > found.value


def test_the_interval_of_the_length_controlled_rate_covers_the_truth_as_often_as_it_says():
    r, held = np.random.default_rng(2), 0
    for _ in range(400):
        difference = r.normal(5, 20, 80)
        p = 1 / (1 + np.exp(-(0.4 + 1.0 * np.tanh(difference / 20))))
        found = length_controlled((r.random(80) < p).astype(float), difference)
        held += found.low <= 1 / (1 + np.exp(-0.4)) <= found.high
    assert 0.93 <= held / 400 <= 0.98


def test_answers_that_win_every_time_have_an_interval_at_equal_length_as_wide_as_so_few_allow():
    difference = np.linspace(-20, 40, 20)
    found = length_controlled(np.ones(20), difference)
    assert found.low < share_interval(np.ones(20)).low < 0.9 < found.value < found.high < 1
    separated = length_controlled((difference > 0).astype(float), difference)
    assert separated.low < 0.5 < separated.high


def test_equal_lengths_leave_the_plain_rate_and_too_few_pairs_no_controlled_one():
    won = np.array([1.0, 0.0, 1.0, 1.0] * 5)
    assert length_controlled(won, np.zeros(20)) == share_interval(won)
    assert length_controlled(won[:9], np.arange(9.0)) is None
