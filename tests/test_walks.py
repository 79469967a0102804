"""What adding a variant touches: its own file or files, its YAML, one line of a table. Each is added to a copy of the
house, and used."""
from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO, write_rows, write_tiny_llama


@pytest.fixture
def house(tmp_path: Path) -> Path:
    for name in ("dpo_dist", "conf"):
        shutil.copytree(REPO / name, tmp_path / "house" / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "house"


def add(house: Path, file: str, text: str) -> None:
    """A file of the variant's own."""
    assert not (house / file).exists()
    (house / file).write_text(text)


def add_line(house: Path, file: str, before: str, line: str) -> None:
    """One line, after the first one that contains `before`."""
    lines = (house / file).read_text().splitlines()
    at = next(i for i, text in enumerate(lines) if before in text)
    (house / file).write_text("\n".join([*lines[:at + 1], line, *lines[at + 1:], ""]))


def touched(house: Path) -> set[str]:
    files = [path for path in house.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {str(path.relative_to(house)) for path in files
            if not (REPO / path.relative_to(house)).exists()
            or path.read_bytes() != (REPO / path.relative_to(house)).read_bytes()}


def run(house: Path, *words: str, code: int = 0) -> str:
    """What the copy's own command says."""
    done = subprocess.run([sys.executable, "-m", "dpo_dist.launcher.cli", *words], cwd=house, capture_output=True,
                          text=True, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    write_tiny_llama(tmp_path / "m")
    write_rows(tmp_path / "rows.jsonl", 8)
    return [f"model.path={tmp_path / 'm'}", f"data.train={tmp_path / 'rows.jsonl'}", "cluster.device=cpu",
            "model.dtype=fp32", "zero=none", "train.pairs_per_step=4", "train.max_steps=1",
            f"data.cache_dir={tmp_path / 'tokens'}", f"reference.cache_dir={tmp_path / 'reference'}",
            f"run.dir={tmp_path / 'run'}"]


def test_an_engine_is_its_description_its_implementation_its_yaml_and_one_line(house: Path, words: list[str]):
    add(house, "dpo_dist/config/engines/constant.py", """
from dataclasses import dataclass
from typing import Literal
from dpo_dist.config.options import VALUES, option
from dpo_dist.config.reference import ReferenceConfig

@dataclass(frozen=True)
class ConstantConfig(ReferenceConfig):
    engine: Literal["constant"] = option()
    nats: float = option(VALUES, between=(-9, 0))

    def recipe(self, rounds, ranks_of_node):
        return [f"constant {self.nats}"]
""")
    add(house, "dpo_dist/reference/constant.py", """
import torch
from dpo_dist.reference import ReferenceEngine

def open_engine(config, setup):
    return Constant(config.nats)

class Constant(ReferenceEngine):
    def __init__(self, nats):
        self.nats = nats

    def token_logps(self, batch):
        return torch.full((len(batch.targets),), self.nats)
""")
    add(house, "conf/reference/constant.yaml", """defaults:
  - _base
  - _self_

engine: constant                # says the same of every token
nats: -1.0                      # what it says
""")
    add_line(house, "dpo_dist/config/engines/__init__.py", "ENGINES: dict",
             '    "constant": __import__("dpo_dist.config.engines.constant", '
             'fromlist=["ConstantConfig"]).ConstantConfig,')
    assert touched(house) == {"dpo_dist/config/engines/constant.py", "dpo_dist/config/engines/__init__.py",
                              "dpo_dist/reference/constant.py", "conf/reference/constant.yaml"}
    assert "reference.nats=-1.0" in run(house, "train", "--help")
    assert ("reference.nats=-10.0 must be between -9 and 0"
            in run(house, "plan", *words, "reference=constant", "reference.nats=-10", code=2))
    assert "it goes with reference=constant" in run(house, "plan", *words, "reference.nats=-2", code=2)
    assert "scored 16, cached 0" in run(house, "score", *words, "reference=constant")
    assert "scored 0, cached 16" in run(house, "score", *words, "reference=constant")
    assert "scored 16, cached 0" in run(house, "score", *words, "reference=constant",
                                        "reference.nats=-2"), "another value, another key"


def test_a_loss_is_a_function_a_yaml_and_one_line(house: Path, words: list[str]):
    source = (house / "dpo_dist/losses.py").read_text()
    function = ("def squared(pairs: PairLogps, loss: LossConfig) -> Tensor:\n    return (1 - _margin(pairs, "
                "loss)).square()\n\n\n")
    (house / "dpo_dist/losses.py").write_text(source.replace("def ipo(", function + "def ipo("))
    add_line(house, "dpo_dist/config/loss_options.py", '    "hinge"', '    "squared": LossOptions(_DIFFERENCE),')
    add(house, "conf/loss/squared.yaml", "defaults:\n  - _base\n  - _self_\n\nname: squared   # the squared distance "
                                         "of the margin from 1\n")
    assert touched(house) == {"dpo_dist/losses.py", "dpo_dist/config/loss_options.py", "conf/loss/squared.yaml"}
    assert "loss 1.0000" in run(house, "run", *words, "loss=squared")


def test_an_optimizer_is_its_entry_its_module_and_its_yaml(house: Path, words: list[str], tmp_path: Path):
    add(house, "dpo_dist/policy/optimizers/sgd.py", """
import torch
from dpo_dist.policy.skip import SkipsOnHost

class Sgd(SkipsOnHost, torch.optim.SGD):
    pass

def make_optimizer(optim, weights):
    return Sgd(weights.everything, lr=0.0, momentum=optim.momentum)
""")
    add_line(house, "dpo_dist/config/optimizers.py", '    "adamw": AdamWConfig', """    "sgd": dataclass(frozen=True)(
        type("SgdConfig", (OptimConfig,), {"__annotations__": {"momentum": "float"}, "momentum": option(RUN),
                                           "title": "SGD", "state_bytes": lambda self, *elements: 4.0 * sum(elements),
                                           "__module__": __name__})),""")
    add(house, "conf/optim/sgd.yaml", "defaults:\n  - adamw\n  - _self_\n\nname: sgd                       # plain\n"
                                      "momentum: 0.5                   # of the gradients\n")
    assert touched(house) == {"dpo_dist/policy/optimizers/sgd.py", "dpo_dist/config/optimizers.py",
                              "conf/optim/sgd.yaml"}
    assert "it goes with optim=muon or optim=sgd" in run(house, "plan", *words, "optim.momentum=0.1", code=2)
    run(house, "train", *words, "optim=sgd")
    assert "| optimizer | SGD, lr" in (tmp_path / "run" / "model" / "README.md").read_text()


def test_a_tracker_is_its_module_its_yaml_and_its_entry(house: Path, words: list[str], tmp_path: Path):
    add(house, "dpo_dist/run/tracking/shout.py", """
def open_tracker(config, run_dir, resumed_step):
    return Shout(run_dir / "shouted")

class Shout:
    def __init__(self, file):
        self.file = file

    def log(self, row):
        self.file.write_text(f"STEP {row['step']}")

    def log_samples(self, step, rows):
        pass

    def finish(self, summary):
        pass
""")
    add_line(house, "dpo_dist/config/tracking.py", '"mlflow": MlflowConfig}',
             'TRACKERS["shout"] = dataclass(frozen=True)(type("ShoutConfig", (TrackingConfig,), {}))')
    add(house, "conf/tracking/shout.yaml", "name: shout                     # the last step, in capitals\n")
    assert touched(house) == {"dpo_dist/run/tracking/shout.py", "dpo_dist/config/tracking.py",
                              "conf/tracking/shout.yaml"}
    run(house, "train", *words, "tracking=shout")
    assert (tmp_path / "run" / "shouted").read_text() == "STEP 1"


def test_a_config_key_is_a_field_and_a_line_of_yaml(house: Path, words: list[str]):
    add_line(house, "dpo_dist/config/schema.py", "    keep_checkpoints: int",
             "    patience_steps: int = option(above=0)")
    add_line(house, "conf/config.yaml", "  keep_checkpoints: 2",
             "  patience_steps: 10            # steps without progress")
    assert touched(house) == {"dpo_dist/config/schema.py", "conf/config.yaml"}
    assert "train.patience_steps=10" in run(house, "train",
                                            "--help") and "steps without progress" in run(house, "train", "--help")
    assert ("train.patience_steps=0 must be greater than 0"
            in run(house, "plan", *words, "train.patience_steps=0", code=2))
