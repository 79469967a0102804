"""What the house's rules are, and what breaks them: `violations` of a package's source, which test_architecture.py asks
for."""
from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Set
from dataclasses import dataclass
from functools import cache
from pathlib import Path

# From the ground up. A room may import rooms of lower floors, and its own; a room is a folder or a file of dpo_dist/.
FLOORS = [
    ["config"],
    ["types", "runtime", "stats"],
    ["sizing", "losses", "logps", "judge"],
    ["data", "models"],
    ["policy", "reference"],
    ["run", "dynamics"],
    ["step", "evaluation"],
    ["step0_checks", "evaluate", "export", "score", "show", "audit", "next", "harness"],
    ["verify", "report"],
    ["train_run"],
    ["train_end"],
    ["train"],
]
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
# The launcher starts the entry points as processes. It may import these, and of `runtime` what is free of torch.
LAUNCHER_IMPORTS = {"config", "sizing", "runtime", "launcher"}
# Whole jobs for a person to start, above all floors.
MAIN_JOBS = ("demo", "real")
ONLY_IN = {
    "deepspeed": {"policy.zero", "policy.optimizers.cpu_adam", "reference.zero", "reference.tensor_parallel",
                  "runtime.world"},
    "bitsandbytes": {"policy.optimizers.adamw_8bit", "models.quantized"},
    "wandb": {"run.tracking.wandb"},
    "mlflow": {"run.tracking.mlflow"},
    "hydra": {"config.compose", "config.overrides", "launcher.sweep.multirun"},
    "omegaconf": {"config.compose", "config.overrides", "launcher.cli"},
    "torch.distributed": {"runtime.world"},
}
# Help, plans and error messages come from these alone, so they must not wait for torch.
TORCH_FREE = ("config", "sizing", "stats", "judge", "launcher", "report", "runtime.alone", "runtime.best",
              "runtime.checksums", "runtime.child_process", "runtime.cores", "runtime.disk_faults",
              "runtime.ending", "runtime.files", "runtime.host_memory", "runtime.hub_commits",
              "runtime.json_files", "runtime.json_lines", "runtime.lock", "runtime.ports", "runtime.preemption",
              "runtime.prefetch", "runtime.progress", "runtime.rank", "runtime.remember", "runtime.run_dir",
              "runtime.shared_folders", "runtime.standard_streams", "runtime.tables", "runtime.terminal",
              "runtime.watchdog", "runtime.without_torch")
SLOW = ("torch", "transformers", "deepspeed", "datasets", "wandb", "mlflow", "peft", "accelerate")
# neither asks nor reads code: peft's own configuration, transformers' table of ways to quantize
UNASKED = ("peft.LoraConfig.from_pretrained", "AutoHfQuantizer.from_config")
VAGUE = ("utils", "helpers", "common", "misc")


@dataclass(frozen=True)
class Module:
    name: str                              # below the package: data.rows; "" is the package itself
    path: Path
    tree: ast.Module

    @property
    def room(self) -> str:
        return self.name.split(".")[0]


def modules(package: Path) -> dict[str, Module]:
    """{name: module} of every file below the package, however deep."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = Module(name, path, _parsed(path.read_text()))
    return found


_parsed = cache(ast.parse)                 # the same file is looked at for each violation that a test plants elsewhere


def imports(module: Module, known: Set[str]) -> Iterator[tuple[int, str]]:
    """(line, whole name) of every module that is imported, wherever in the file and by whatever spelling: `import a.b
    as c`, `from a import b` where b is a module, `from . import b`, `import_module("a.b")`, `torch.distributed` by
    attribute."""
    package = "dpo_dist"
    whole = f"{package}.{module.name}".rstrip(".")
    folder = whole if module.path.name == "__init__.py" else whole.rpartition(".")[0]
    torch_names = {"torch"}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
                if alias.name == "torch" and alias.asname:
                    torch_names.add(alias.asname)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = folder.split(".")[:len(folder.split(".")) - node.level + 1]
                base = ".".join([*up, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                is_module = (inner.removeprefix(f"{package}.") in known if inner.startswith(f"{package}.")
                             else inner == "torch.distributed")
                yield node.lineno, inner if is_module else base
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                yield node.lineno, str(node.args[0].value)
    for node in ast.walk(module.tree):
        of_torch = isinstance(node, ast.Attribute) and getattr(node.value, "id", None) in torch_names
        if of_torch and node.attr == "distributed":
            yield node.lineno, "torch.distributed"


def violations(package: Path) -> list[str]:
    """One line for each breach of the rules in this package's source."""
    known = modules(package)
    return [breach for module in known.values() for breach in _of_module(module, frozenset(known))]


@cache
def _of_module(module: Module, known: frozenset[str]) -> list[str]:
    found = []
    if module.name and module.room not in FLOOR and module.room not in ("launcher", *MAIN_JOBS):
        found.append(f"{module.name}: the room has no floor")
    if module.path.stem in VAGUE:
        found.append(f"{module.name}: a name that says nothing")
    for line, name in imports(module, known):
        found += [f"{module.name}:{line} imports {name}: {why}" for why in _breaches(module, name)]
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            found.append(f"{module.name}:{node.lineno} has a bare except")
        if isinstance(node, ast.Call):
            found += [f"{module.name}:{node.lineno} {why}" for why in _unsafe(node)]
    return found


def _unsafe(call: ast.Call) -> Iterator[str]:
    """What may run code that comes with data, or ask the person behind a terminal whether to."""
    name = ast.unparse(call.func)
    said = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    asks = name.rpartition(".")[2] in ("from_pretrained", "from_config") and name not in UNASKED
    if asks and said.get("trust_remote_code") != "False":
        yield f"{name} does not say trust_remote_code=False"
    if (name == "torch.load" and said.get("weights_only") != "True") or said.get("allow_pickle", "False") != "False":
        yield f"{name} may read a pickle"
    if name.split(".")[0] in ("pickle", "dill", "cloudpickle", "joblib") or name in ("yaml.load", "eval", "exec"):
        yield f"{name} may run what it reads"
    starts = name in ("subprocess.run", "subprocess.Popen", "subprocess.check_output")
    if starts and not {"stdin", "input"} & said.keys():
        yield f"{name} does not say what the process's standard input is"


def _breaches(module: Module, imported: str) -> Iterator[str]:
    for library, homes in ONLY_IN.items():
        if (imported == library or imported.startswith(f"{library}.")) and module.name not in homes:
            yield f"{library} belongs to {', '.join(sorted(homes))}"
    if not imported.startswith("dpo_dist.") or module.name == "":
        return
    there = imported.split(".")[1]
    if module.room == "launcher":
        if there not in LAUNCHER_IMPORTS:
            yield "the launcher starts entry points, and never imports them"
    elif module.room not in MAIN_JOBS and there != module.room:
        if there in ("launcher", *MAIN_JOBS) or FLOOR.get(there, 0) >= FLOOR.get(module.room, 0):
            yield "imports run downward only"
        if {module.room, there} == {"policy", "reference"}:
            yield "policy and reference never import each other"


def torch_free(package: Path) -> list[str]:
    """The modules that must not import torch."""
    return [name for name in modules(package)
            if any(name == room or name.startswith(f"{room}.") for room in TORCH_FREE)]


def slow_imports(package: Path) -> list[str]:
    """The slow libraries that are loaded in a fresh process once every torch-free module is imported there."""
    names = [f"dpo_dist.{name}" for name in torch_free(package)]
    program = (f"import importlib, sys\nsys.path.insert(0, {str(package.parent)!r})\n"
               f"for name in {names!r}: importlib.import_module(name)\n"
               f"print(*[name for name in {SLOW!r} if name in sys.modules])")
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout.split()
