"""A real HTTP server that answers /v1/completions as vLLM does, with the log-probs of a tiny model, and with faults
when told to.

In a test's process: `with LogProbServer(folder) as server: server.url`. As a process of its own, to be killed: python
tests/log_prob_server.py --model FOLDER --port PORT [--host HOST] [--name NAME] [--seconds-a-request S] [--answered
FILE] [--killed-after N] [--joins-a-group PORT].
"""
from __future__ import annotations

import argparse
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from transformers import AutoModelForCausalLM

Answer = dict[str, Any]


class LogProbServer(ThreadingHTTPServer):
    """`fault(n, answer)` may change the n-th request's answer, or send something else altogether by raising Say;
    `requests` are those that came, `answered` the sequences that were answered: noted before the answer goes out, so
    that whoever has it finds them there."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, folder: Path, port: int = 0, name: str | None = None, version: str = "0.0.test",
                 host: str = "127.0.0.1"):
        super().__init__((host, port), Handler)
        self.model = AutoModelForCausalLM.from_pretrained(folder).float().eval()
        self.name, self.version = name or str(folder), version
        self.max_model_len = self.model.config.max_position_embeddings
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.fault: Callable[[int, Answer], Answer] = lambda n, answer: answer
        self.seconds_a_request = 0.0
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.answered: list[tuple[int, ...]] = []
        self.lock = threading.Lock()

    def __enter__(self) -> LogProbServer:
        threading.Thread(target=self.serve_forever, daemon=True, kwargs={"poll_interval": 0.05}).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, *_: object) -> None:
        """A client that went away is nothing to tell about."""

    def note(self, sequences: list[tuple[int, ...]]) -> None:
        self.answered += sequences

    def sent(self) -> None:
        """What was noted last has gone out."""

    def complete(self, request: dict[str, Any]) -> Answer:
        choices = [{"index": i, "text": "", "logprobs": None, "finish_reason": "length",
                    "prompt_logprobs": self.prompt_logprobs(prompt)}
                   for i, prompt in enumerate(request["prompt"])]
        return {"id": "cmpl-1", "object": "text_completion", "model": self.name, "choices": choices}

    def prompt_logprobs(self, prompt: list[int]) -> list[dict[str, Any] | None]:
        with torch.no_grad(), self.lock:
            logps = torch.log_softmax(self.model(torch.tensor([prompt])).logits[0].float(), -1)
        found = [(token, logps[at, token].item()) for at, token in enumerate(prompt[1:])]
        return [None, *({str(token): {"logprob": value, "rank": 1, "decoded_token": None}} for token, value in found)]


class Say(Exception):
    """Sends these bytes instead of an answer; no status: the connection is cut after them."""

    def __init__(self, status: int | None, body: bytes, length: int | None = None):
        self.status, self.body, self.length = status, body, length


class Handler(BaseHTTPRequestHandler):
    server: LogProbServer

    def do_GET(self) -> None:
        models = {"object": "list", "data": [{"id": self.server.name, "object": "model",
                                              "max_model_len": self.server.max_model_len}]}
        self.say(200, {"/version": {"version": self.server.version}, "/v1/models": models, "/health": {}}[self.path])

    def do_POST(self) -> None:
        assert self.path == "/v1/completions", self.path
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append(request)
            self.server.headers.append(dict(self.headers))
            n = len(self.server.requests)
        time.sleep(self.server.seconds_a_request)
        if request["model"] != self.server.name:
            return self.say(404, {"error": {"message": f"The model `{request['model']}` does not exist."}})
        try:
            answer = self.server.fault(n, self.server.complete(request))
        except Say as instead:
            if instead.status is not None:
                self.send_response(instead.status)
                self.send_header("Content-Length", str(len(instead.body) if instead.length is None else instead.length))
                self.end_headers()
            self.wfile.write(instead.body)
            self.close_connection = True
            return None
        # what is noted and what is sent are the same whenever the lock is free
        with self.server.lock:
            self.server.note([tuple(prompt) for prompt in request["prompt"]])
            self.say(200, answer)
            self.server.sent()
        return None

    def say(self, status: int, content: Answer) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing on the test's terminal."""


class Reporting(LogProbServer):
    """Notes the answered sequences in a file, a line each, so that they outlive the process; and is killed, without
    warning but never between a note and its answer, once it has answered so many."""

    def __init__(self, answered_file: Path, killed_after: float, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.file, self.killed_after = answered_file, killed_after

    def note(self, sequences: list[tuple[int, ...]]) -> None:
        super().note(sequences)
        with self.file.open("a") as f:
            f.writelines(json.dumps(sequence) + "\n" for sequence in sequences)

    def sent(self) -> None:
        if len(self.answered) >= self.killed_after:
            os.kill(os.getpid(), signal.SIGKILL)


def values(answer: Answer) -> Iterator[tuple[int, dict[str, Any]]]:
    """(index of the choice, {"logprob": ...}) of every value of an answer."""
    for choice in answer["choices"]:
        for entry in choice["prompt_logprobs"][1:]:
            yield choice["index"], next(iter(entry.values()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--name")
    parser.add_argument("--seconds-a-request", type=float, default=0.0)
    parser.add_argument("--answered", type=Path, default=Path("/dev/null"))
    parser.add_argument("--killed-after", type=float, default=math.inf)
    parser.add_argument("--joins-a-group", type=int)
    given = parser.parse_args()
    if given.joins_a_group:                   # of one process, as vLLM's workers do
        torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{given.joins_a_group}", timedelta(seconds=10),
                                             world_size=1, rank=0)
    server = Reporting(given.answered, given.killed_after, given.model, given.port, given.name, host=given.host)
    server.seconds_a_request = given.seconds_a_request
    server.serve_forever()
