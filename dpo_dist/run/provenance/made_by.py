"""What made a run besides its inputs: the code, the libraries, the machines. No host or user names, no torch."""
from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import dpo_dist
from dpo_dist.config.compose import conf_dir
from dpo_dist.runtime.cores import usable_cores

# what computes, renders or reads; their versions are told
PACKAGES = ("dpo-dist", "torch", "deepspeed", "transformers", "datasets", "peft", "tokenizers", "safetensors", "jinja2",
            "numpy", "pyarrow")
GIB = 2**30


def versions() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES}


def version(package: str) -> str:
    """As installed; a checkout may run without being installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def code_files() -> dict[str, str]:
    """{file: short digest} of the package's code and of conf/, as they lie here."""
    package = Path(dpo_dist.__file__).resolve().parent
    files = {f"dpo_dist/{file.relative_to(package)}": file for file in package.rglob("*.py")}
    files |= {f"conf/{file.relative_to(conf_dir())}": file for file in conf_dir().rglob("*.yaml")}
    return {name: hashlib.blake2b(files[name].read_bytes(), digest_size=6).hexdigest() for name in sorted(files)}


def code(files: dict[str, str]) -> dict[str, Any]:
    """The version, a digest of `files`, and in a checkout the commit and whether files differ from it."""
    content = "".join(f"{name}\0{digest}\n" for name, digest in files.items())
    return {"version": version("dpo-dist"), "files": hashlib.sha256(content.encode()).hexdigest()[:16], **_commit()}


def _commit() -> dict[str, Any]:
    """Of the checkout that the package lies in; nothing where it is installed, or where there is no git."""
    root = Path(dpo_dist.__file__).resolve().parent.parent
    if not (root / ".git").exists() or shutil.which("git") is None:
        return {"commit": None, "dirty": None}
    commit, changed = (_git(root, *words) for words in (("rev-parse", "HEAD"),
                                                         ("status", "--porcelain", "--", "dpo_dist", "conf")))
    return {"commit": commit, "dirty": None if changed is None else bool(changed)}


def _git(root: Path, *words: str) -> str | None:
    """What git says; None where it refuses, as in another user's checkout."""
    command = ["git", "--no-optional-locks", "-C", str(root), *words]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


@dataclass(frozen=True)
class Machine:
    """What a rank computes on."""

    node: int
    cpu: str
    cores: int
    memory_gib: int
    gpu: str | None                          # name and memory


def this_machine(node: int, gpu: str | None) -> Machine:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    return Machine(node, cpu_model(), len(usable_cores()), round(memory), gpu)


def cpu_model() -> str:
    """The processor's name, or its architecture where the system does not tell the name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def hardware(machines: Sequence[Machine]) -> dict[str, Any]:
    """Of all ranks together, JSON-ready: kinds of nodes and of GPUs, with how many there are of each."""
    nodes = {machine.node: machine for machine in machines}.values()
    kinds = Counter(f"{m.cpu}, {m.cores} cores, {m.memory_gib} GiB" for m in nodes)
    return {"nodes": dict(kinds), "gpus": dict(Counter(m.gpu for m in machines if m.gpu))}


def code_in_words(code: dict[str, Any]) -> str:
    commit = f", commit {code['commit']}{' with changes' if code['dirty'] else ''}" if code["commit"] else ""
    return f"dpo-dist {code['version']}{commit} (files {code['files']})"


def ranks_in_words(ranks: int) -> str:
    return f"{ranks} rank{'s' * (ranks != 1)}"


def start_in_words(start: dict[str, Any]) -> str:
    """Of an earlier start of a run that went on with something else."""
    made = code_in_words(start["code"]) if "code" in start else f"dpo-dist {start['versions']['dpo-dist']}"
    return f"{made}, {ranks_in_words(start['ranks'])}"


def hardware_in_words(hardware: dict[str, Any]) -> str:
    return ", ".join(f"{n} × {kind}" for kinds in (hardware["gpus"], hardware["nodes"]) for kind, n in kinds.items())
