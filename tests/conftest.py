"""What tests share: tiny models made on the spot, rows of token ids, and the real command."""
from __future__ import annotations

import atexit
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import pytest
from template import Started, Template

from dpo_dist.launcher.ranks import Place
from dpo_dist.runtime.ports import free_port

if TYPE_CHECKING:
    from dpo_dist.runtime.world import World

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# so that processes do not compile the package anew, each of them
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ.setdefault("OMP_NUM_THREADS", "1")

REPO = Path(__file__).resolve().parent.parent
GOLDEN = REPO / "tests" / "golden"
BITSANDBYTES = Path(sys.prefix) / "bnb"                # where `make` puts it, beside the environment (packages_of)
REAL_MODEL = Path(os.environ.get("DPO_DIST_REAL_MODEL", REPO / "runs" / "real" / "dpo" / "model"))      # of `make real`
LONGEST_FIRST = ("test_slurm.py", "test_resume.py", "test_two_nodes.py", "test_gpu_benchmark.py",
                 "test_demo_and_data.py", "test_samples.py", "test_keep_best.py", "test_stop.py", "test_bad_moments.py",
                 "test_served_reference.py", "test_ahead.py", "test_policy.py", "test_adapters.py",
                 "test_recipe_runs.py",
                 "test_reference_engines.py", "test_walks.py", "test_launch_scripts.py", "test_sweep_command.py",
                 "test_docker.py", "test_cache_and_score.py", "test_sync.py", "test_golden_trajectories.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest first, so that those that run side by side end together."""
    items.sort(key=lambda item: LONGEST_FIRST.index(item.path.name) if item.path.name in LONGEST_FIRST
               else len(LONGEST_FIRST))


def write_rows(path: Path, n: int, vocabulary: int = 64, seed: int = 0,
               longest: int = 24) -> list[dict[str, list[int]]]:
    """Writes n token_ids rows of uneven lengths, and returns them."""
    r = random.Random(seed)

    def ids(low: int, high: int) -> list[int]:
        return [r.randrange(3, vocabulary) for _ in range(r.randint(low, high))]

    rows = [{"prompt_ids": ids(2, longest), "chosen_ids": [*ids(1, longest), 1], "rejected_ids": [*ids(1, longest), 1]}
            for _ in range(n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def write_tiny_llama(folder: Path, seed: int = 0, dtype: str = "float32", **changes: object) -> Path:
    """Saves a random Llama (hidden 32, 2 layers, vocabulary 64) as safetensors."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**{**_TINY, **changes})).to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def write_tiny_qwen2(folder: Path, seed: int = 0, **changes: object) -> Path:
    """Saves a random Qwen2 (biases in its projections) of the same shape; its biases are not zero, as in a trained
    one."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(Qwen2Config(**{**_TINY, **changes}))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


def write_text_and_image(folder: Path, tied: bool = True) -> Path:
    """Saves a random Gemma 3 that sees images: two layers for text, three for images, and processor files."""
    import torch
    import transformers

    text = transformers.Gemma3TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=6, query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention"], tie_word_embeddings=tied)
    vision = transformers.SiglipVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=3,
                                             num_attention_heads=2, image_size=28, patch_size=14)
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=1, image_token_id=63, boi_token_id=62,
        eoi_token_id=61, tie_word_embeddings=tied))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
    model.tie_weights()
    model.save_pretrained(folder)
    for name in ("preprocessor_config.json", "processor_config.json"):
        (folder / name).write_text(json.dumps({"image_seq_length": 1}))
    return folder


_TINY = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": False,
         "initializer_range": 0.2, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}


def dpo_dist(*words: object, code: int = 0, timeout: int = 300) -> subprocess.CompletedProcess[str]:
    """Runs the real command in a process of its own and checks its exit code."""
    running = start(*words)
    try:
        out, err = running.communicate(timeout)
    except subprocess.TimeoutExpired:
        running.kill()
        raise
    assert running.wait() == code, f"exit code {running.wait()}, wanted {code}\n{out}\n{err}"
    return subprocess.CompletedProcess(running.args, code, out, err)


def start(*words: object) -> Started:
    """The real command, started and not waited for, as from a script."""
    return forked("dpo_dist.launcher.cli", *words)


def forked(*words: object, **environment: str) -> Started:
    """A module, a file (*.py) or `-c CODE` with its arguments, as a process that is forked from the template."""
    return template().start([*map(str, words)], {**os.environ, "OMP_NUM_THREADS": "1", **environment}, REPO)


def forked_ranks(size: int, *words: object) -> str:
    """What rank 0 of so many ranks prints, each of which runs these words as in `forked`, and ends with code 0."""
    place = Place(size, master_port=free_port())
    ranks = [forked(*words, **place.environment(rank)) for rank in range(size)]
    try:
        outputs = [rank.communicate(240) for rank in ranks]
    except subprocess.TimeoutExpired:
        kill(rank.pid for rank in ranks)                 # they wait for each other
        raise
    assert [rank.returncode for rank in ranks] == [0] * size, "".join(err[-3000:] for _, err in outputs)
    return outputs[0][0]


def template() -> Template:
    """The process that commands are forked from; started by the first test that needs it, ended with the session."""
    return _template(tuple(_packages))


@contextmanager
def packages_of(*folders: Path) -> Iterator[None]:
    """Inside, commands are forked from a template that has imported everything with these folders' packages at hand."""
    _packages.extend(folders)
    try:
        yield
    finally:
        del _packages[len(_packages) - len(folders):]


_packages: list[Path] = [REPO]


@cache
def _template(packages: tuple[Path, ...]) -> Template:
    folder = Path(tempfile.mkdtemp(prefix="dpo-dist-template-"))
    started = Template(folder, {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, packages)),
                                "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false",
                                "JE_ARROW_MALLOC_CONF": "background_thread:false"})      # it must not have threads
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(started.close)
    return started


def metrics(run_dir: Path, split: str = "train") -> list[dict[str, float]]:
    """The rows of a run's metrics.jsonl of one split."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["split"] == split]


def steps_logged(run_dir: Path) -> int:
    return len(metrics(run_dir)) if (run_dir / "metrics.jsonl").exists() else 0


def model_digest(run_dir: Path) -> str:
    """Of the exported weights: equal digests, equal bits."""
    return hashlib.sha256((run_dir / "model" / "model.safetensors").read_bytes()).hexdigest()


def wait_until(true: Callable[[], object], *processes: subprocess.Popen[str] | Started, what: str = "waited in vain",
               seconds: float = 120) -> None:
    """Returns once it is true. Fails where one of these processes ends before, with what it printed."""
    deadline = time.monotonic() + seconds
    while not true():
        for process in processes:
            assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@pytest.fixture
def world() -> Iterator[World]:
    """This process as an entry point starts it, alone; its group and its environment end with the test."""
    import torch

    from dpo_dist.config.compose import compose
    from dpo_dist.runtime.world import World

    with mock.patch.dict(os.environ):
        yield World.start(compose(["model.path=m", "cluster.device=cpu"]).cluster)
        torch.distributed.destroy_process_group()


def small_run(folder: Path) -> list[str]:
    """Overrides that keep a run small, in fp32, on the CPU, its caches inside the folder, and failed once it has
    failed."""
    return ["cluster.device=cpu", "model.dtype=fp32", f"data.cache_dir={folder / 'tokens'}",
            f"reference.cache_dir={folder / 'reference'}", "cluster.procs_per_node=1", "cluster.timeout_seconds=60",
            "cluster.max_restarts=0", "data.max_length=256"]


@pytest.fixture
def base(tmp_path: Path) -> list[str]:
    return small_run(tmp_path)


def train_on(path: Path) -> str:
    return f"data.train=[{{path: {path}, format: token_ids}}]"


def eval_on(path: Path) -> str:
    return f"data.eval=[{{path: {path}, format: token_ids}}]"


def processes_on(folder: Path) -> list[int]:
    """Processes whose command line names this folder: ranks, which lead sessions of their own."""
    commands = [(int(process.name), command_line(process)) for process in Path("/proc").glob("[0-9]*")]
    commands += [(pid, words) for pid, words, _ in forked_processes()]
    return [pid for pid, words in commands if any(word.endswith(b"=" + os.fsencode(folder)) for word in words)]


def process_of_rank(rank: int, folder: Path) -> int:
    """The process id of a forked rank of the run in this folder."""
    ours = processes_on(folder)
    return next(pid for pid, _, its_rank in forked_processes() if pid in ours and its_rank == str(rank))


def forked_processes() -> list[tuple[int, list[bytes], str | None]]:
    """As Template.processes; none before a template is started."""
    return list(template().processes()) if _template.cache_info().currsize else []


def command_line(process: Path) -> list[bytes]:
    try:
        return (process / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return []                                        # it has ended


def kill(pids: Iterable[int]) -> None:
    """Without warning. One may have ended by itself: it saw another go."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
