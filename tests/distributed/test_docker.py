"""The image's entrypoint and the compose file's two nodes, run as they stand, without a container engine: network
namespaces are the machines, a folder is the volume, and a folder holds what the image would."""
from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPO, metrics
from namespaces import two_nodes
from test_two_nodes import finish

pytestmark = pytest.mark.distributed

COMPOSE = yaml.safe_load((REPO / "docker" / "compose.yaml").read_text())
DOCKERFILE = (REPO / "docker" / "Dockerfile").read_text()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """What `COPY . .` leaves in the image under .dockerignore: only the paths that it lets through."""
    folder = tmp_path / "image"
    ignore = (REPO / ".dockerignore").read_text().split("\n")
    assert "*" in ignore, "everything is left out that is not named"
    for name in (line[1:] for line in ignore if line.startswith("!")):
        source, target = REPO / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, target)
    return folder


def inside(image: Path, **more: str) -> dict[str, str]:
    """The environment of a container: python and dpo-dist are found, and the package is the image's."""
    commands = image / "bin"
    commands.mkdir(exist_ok=True)
    (commands / "dpo-dist").write_text(f'#!/bin/sh\nexec {sys.executable} -m dpo_dist.launcher.cli "$@"\n')
    (commands / "dpo-dist").chmod(0o755)
    return {**os.environ, "PATH": f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(image), **more}


def entrypoint(image: Path) -> Path:
    """The file that the Dockerfile's ENTRYPOINT names."""
    words = json.loads(re.search(r"^ENTRYPOINT (.*)$", DOCKERFILE, re.M)[1])
    workdir = re.search(r"^WORKDIR (/opt/.*)$", DOCKERFILE, re.M)[1]
    return image / Path(words[0]).relative_to(workdir)


def test_every_file_that_the_dockerfile_copies_is_let_through(image: Path):
    copied = [word for line in re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.M) for word in line.split() if word != "."]
    assert copied
    assert all((image / name).is_file() for name in copied)


def test_a_container_runs_the_doctor_or_a_verb_or_with_overrides_alone_this_nodes_share_of_a_training(
        image: Path, tmp_path: Path):
    def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([entrypoint(image), *words], cwd=tmp_path, env=inside(image, **environment),
                              capture_output=True, text=True, timeout=120)

    default = json.loads(re.search(r"^CMD (.*)$", DOCKERFILE, re.M)[1])
    assert "torch" in run(*default).stdout
    assert "reference.cache_dir" in run("score", "--help").stdout
    shown = run("model.path=x", "loss.beta=0.3", PYTHON="echo", RUN_DIR=str(tmp_path / "run"), NODE_RANK="1",
                MASTER_ADDR="node-0").stdout
    assert shown.split() == ["-m", "dpo_dist.launcher.node", "model.path=x", "loss.beta=0.3"]


def test_the_compose_file_trains_across_its_two_nodes(image: Path, tmp_path: Path):
    volume = tmp_path / "runs"
    volume.mkdir()
    services: dict[str, dict[str, Any]] = COMPOSE["services"]
    data = services.pop("data")
    subprocess.run(data["entrypoint"], cwd=volume, env=inside(image), check=True, timeout=120)
    assert list(services) == ["node-0",
                              "node-1"] == ["node-" + s["environment"]["NODE_RANK"] for s in services.values()]
    with two_nodes() as machines:
        jobs = [machine.start([entrypoint(image), *service["command"], "train.max_steps=3"],
                              inside(image, **service["environment"]), volume)
                for machine, service in zip(machines, services.values(), strict=True)]
        for code, printed in finish(jobs):
            assert code == 0, printed
    run_dir = volume / "demo" / "two_nodes"
    assert [row["step"] for row in metrics(run_dir)] == [1, 2, 3]
    assert json.loads((run_dir / "run.json").read_text())["passport"]["ranks"] == 2
    assert (run_dir / "DONE").exists() and (run_dir / "model" / "model.safetensors").exists()


@pytest.mark.parametrize("command", [
    ["hadolint", "docker/Dockerfile"],
    ["shellcheck", "--severity=warning", "docker/entrypoint.sh", "slurm/train.sbatch",
     *map(str, sorted((REPO / "launch").iterdir()))]])
def test_the_linters_find_nothing(command: list[str]):
    done = subprocess.run([Path(sys.executable).with_name(command[0]), *command[1:]], cwd=REPO, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stdout
