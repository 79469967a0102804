"""The house keeps its shape: imports run downward only, and heavy libraries stay in the rooms that need them. The
rules: architecture.py."""
from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from architecture import FLOOR, MAIN_JOBS, modules, slow_imports, violations

import dpo_dist

PACKAGE = Path(dpo_dist.__file__).parent


def test_every_room_has_a_floor_and_every_floor_a_room():
    assert {m.room for m in modules(PACKAGE).values() if m.name} == {*FLOOR, "launcher", *MAIN_JOBS}


def test_the_rules_of_imports_are_kept():
    assert violations(PACKAGE) == []


def test_help_plans_and_errors_never_wait_for_torch():
    assert slow_imports(PACKAGE) == []


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    package = tmp_path_factory.mktemp("copy") / "dpo_dist"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    return package


@contextmanager
def planted(line: str, path: Path) -> Iterator[None]:
    """The file, new or not, with one more line."""
    before = path.read_text() if path.exists() else None
    path.write_text((before or "") + "\n" + line + "\n")
    try:
        yield
    finally:
        path.write_text(before) if before is not None else path.unlink()


@pytest.mark.parametrize("file, line", [
    ("data/rows.py", "import dpo_dist.train"),
    ("data/rows.py", "from dpo_dist import train"),
    ("data/rows.py", "from dpo_dist import train as t"),
    ("data/rows.py", "from .. import train"),
    ("data/rows.py", "from ..run import inputs"),
    ("data/rows.py", "from dpo_dist.policy import make"),
    ("data/rows.py", "import dpo_dist.launcher.cli"),
    ("data/rows.py", "def f():\n    from dpo_dist import score"),
    ("data/rows.py", "import importlib; importlib.import_module('dpo_dist.evaluate')"),
    ("reference/cache/store.py", "from dpo_dist.run.inputs import Inputs"),
    ("reference/vllm/engine.py", "from dpo_dist import policy"),
    ("policy/single.py", "import dpo_dist.reference.hf as hf"),
    ("launcher/cli.py", "from dpo_dist import train"),
    ("launcher/doctor/devices.py", "from dpo_dist.data.store import PairStore"),
    ("launcher/sweep/groups.py", "from dpo_dist.models.load import resolve"),
    ("losses.py", "import torch.distributed as dist"),
    ("losses.py", "from torch import distributed"),
    ("losses.py", "import torch as t; t.distributed.barrier()"),
    ("run/perf.py", "def f():\n    torch.distributed.barrier()"),
    ("run/perf.py", "from deepspeed.ops import adam"),
    ("train.py", "import wandb"),
    ("launcher/slurm.py", "from hydra import compose"),
    ("step.py", "try:\n    pass\nexcept:\n    pass"),
    ("models/load.py", "AutoTokenizer.from_pretrained(folder)"),
    ("models/load.py", "AutoModelForCausalLM.from_config(config, trust_remote_code=True)"),
    ("data/files.py", "import pickle; pickle.load(file)"),
    ("policy/single.py", "torch.load(file)"),
    ("data/store.py", "np.load(file, allow_pickle=True)"),
    ("launcher/slurm.py", "subprocess.run(['sinfo'])"),
    ("data/helpers.py", ""),
    ("attic.py", ""),
])
def test_a_planted_violation_is_found(file: str, line: str, copy: Path):
    with planted(line, copy / file):
        assert violations(copy), f"{line!r} in {file}"


@pytest.mark.parametrize("file, line", [
    ("sizing/flops.py", "import torch"),
    ("launcher/doctor/network.py", "from transformers import AutoConfig"),
    ("config/rules.py", "from dpo_dist import losses"),
    ("launcher/cli.py", "from dpo_dist.runtime import world"),
    ("runtime/run_dir.py", "__import__('torch')"),
])
def test_planted_torch_is_found_in_what_must_be_free_of_it(file: str, line: str, copy: Path):
    with planted(line, copy / file):
        assert "torch" in slow_imports(copy)
