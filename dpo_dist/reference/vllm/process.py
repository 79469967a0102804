"""A vLLM server of our own: started when something is to be scored, stopped afterwards, and never left behind."""
from __future__ import annotations

import os
import shlex
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dpo_dist.config.errors import UserError
from dpo_dist.reference.vllm.protocol import Unanswered, about
from dpo_dist.runtime import child_process
from dpo_dist.runtime.ports import free_port
from dpo_dist.runtime.process_defaults import ALLOCATOR, EXPANDABLE

# For reference.server=<python>. The tokens are made here, so the server needs no tokenizer; prompt log-probs must be
# computed, not cached.
STANDARD = ("-m", "vllm.entrypoints.openai.api_server", "--model", "{model}", "--served-model-name", "{name}",
            "--dtype", "{dtype}", "--max-model-len", "{max_length}", "--host", "{host}", "--port", "{port}",
            "--skip-tokenizer-init", "--no-enable-prefix-caching", "--gpu-memory-utilization", "{memory}",
            "--tensor-parallel-size", "{gpus}")
SECONDS_BETWEEN_LOOKS = 0.5
PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
PLACES = ("TORCHELASTIC_", "GROUP_", "ROLE_")            # beginnings of names
SHOWN_LINES = 5                          # of the log of a server that did not start
FIND_VERSION = ("import importlib.util as u, runpy; p = u.find_spec('vllm').submodule_search_locations[0]; "
                "print(runpy.run_path(p + '/_version.py')['__version__'])")


@dataclass(frozen=True)
class ServerSpec:
    """What a server is to hold, and how it is started."""

    server: str                          # reference.server: a python, or a whole command
    model: str                           # folder or hub name
    name: str                            # under which it serves the model
    dtype: str                           # float32 or bfloat16
    quantization: str | None
    max_length: int                      # tokens of a sequence and of the answer
    gpus: int                            # that split each layer
    copies: int                          # of the model, each on GPUs of its own; the server spreads requests over them
    gpu_memory: float                    # share of a GPU's memory that it may take
    offline: bool
    overrides: str | None = None         # JSON: what of config.json the weight files contradict


@dataclass(frozen=True)
class Server:
    url: str
    watcher: subprocess.Popen[bytes]

    def stop(self) -> None:
        child_process.stop(self.watcher)


def start_server(spec: ServerSpec, log: Path, wait_seconds: float, host: str = "127.0.0.1",
                 port: int | None = None) -> Server:
    """A server on this machine that answers, listening at `host` and `port`. UserError, with the end of its log, if it
    ends or is not up in time."""
    port = port or free_port()
    environment = {**without_place(os.environ), "HF_HUB_OFFLINE": "1" if spec.offline else "0"}
    server = Server(f"http://127.0.0.1:{port}", child_process.start(command(spec, host, port), log, environment))
    until = time.monotonic() + wait_seconds
    try:
        while time.monotonic() < until:
            if server.watcher.poll() is not None:
                raise UserError(f"reference.server={spec.server} ended with code {server.watcher.returncode} before it "
                                f"answered: {end_of(log)}")
            try:
                about(server.url, timeout_seconds=10)
                return server
            except Unanswered:
                time.sleep(SECONDS_BETWEEN_LOOKS)
        raise UserError(f"reference.server={spec.server} was not up after {wait_seconds:g} s: {end_of(log)}; look into "
                        f"{log}, or raise reference.requests.wait_seconds")
    except BaseException:
        server.stop()
        raise


def without_place(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without this process's place among others, which torchrun has put there. A server that joins a
    process group of its own would take torchrun's store for its master, and wait for it forever."""
    # set for this process, not for a server with an allocator of its own
    ours = dict.fromkeys(ALLOCATOR, EXPANDABLE)
    return {name: value for name, value in environment.items()
            if not name.startswith(PLACES) and name not in PLACE and ours.get(name) != value}


def command(spec: ServerSpec, host: str, port: int) -> list[str]:
    """The command line: one word is a python, several are a whole command; what stands in braces is filled in."""
    words = shlex.split(spec.server)
    if len(words) == 1:
        words += [*STANDARD, *(["--quantization", spec.quantization] if spec.quantization else []),
                  *(["--data-parallel-size", "{copies}"] if spec.copies > 1 else []),
                  *(["--hf-overrides", spec.overrides] if spec.overrides else [])]
    fill = {"model": spec.model, "name": spec.name, "dtype": spec.dtype, "max_length": str(spec.max_length),
            "gpus": str(spec.gpus), "copies": str(spec.copies), "memory": str(spec.gpu_memory), "host": host,
            "port": str(port)}
    for key, value in fill.items():                      # not str.format: JSON in an argument has braces of its own
        words = [word.replace("{" + key + "}", value) for word in words]
    return words


def installed_version(server: str) -> str | None:
    """vLLM's version in the environment of reference.server=<python>, without starting it; None for a whole command."""
    words = shlex.split(server)
    if len(words) > 1:
        return None
    try:
        done = subprocess.run([*words, "-c", FIND_VERSION],
                              stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"reference.server={server} cannot be run: {error}; give the python of an environment that "
                        "holds vLLM") from error
    if done.returncode:
        raise UserError(f"reference.server={server} has no vLLM ({done.stderr.strip().splitlines()[-1]}); install it "
                        "there, or give the python of another environment")
    return done.stdout.strip()


def end_of(log: Path) -> str:
    """The last lines of a server's log, in one, and where all of it is."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return " | ".join(lines[-SHOWN_LINES:]) + f" (all of it: {log})"
