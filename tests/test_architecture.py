"""The house keeps its shape: imports run downward only, and heavy libraries stay in the rooms that need them."""
from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import dpo_dist

PACKAGE = Path(dpo_dist.__file__).parent
# From the ground up; a room may import rooms of lower floors, and its own.
FLOORS = [
    ["loss_options", "head_blocks"],
    ["config"],
    ["rules"],
    ["decode"],
    ["compose", "terminal", "watched", "lock"],
    ["preference", "world", "schedule", "tracking", "flops", "stop", "head_kernels", "process_defaults", "later"],
    ["head", "logps", "losses", "entry", "perf", "shared_folders", "shape"],
    ["metrics", "data", "models", "preflight", "sizing"],
    ["automatic", "predicted_time"],
    ["policy", "reference", "size_report"],
    ["inputs", "step", "step_results", "checkpoint", "parity"],
    ["engines", "gate", "passport"],
    ["score", "evaluate", "export"],
    ["train"],
]
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
ONLY_IN = {
    "deepspeed": {"policy/zero.py", "reference/zero.py", "reference/tensor_parallel.py", "world.py"},
    "wandb": {"tracking.py"},
    "hydra": {"compose.py", "launcher/sweep/multirun.py"},
    "omegaconf": {"compose.py", "launcher/cli.py", "launcher/sweep/multirun.py"},
}
TORCH_FREE = {"loss_options", "head_blocks", "config", "rules", "decode", "compose", "watched", "launcher", "flops", "shape", "sizing",
              "automatic", "predicted_time", "size_report"}


def imports(path: Path) -> Iterator[str]:
    """Every module that the file imports, wherever in it; of `from x import y`, x."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def test_every_room_has_a_floor():
    assert {room(p) for p in FILES} - set(FLOOR) == {"launcher", "demo"}


def test_imports_run_downward_only():
    for path in FILES:
        here = room(path)
        for module in imports(path):
            if not module.startswith("dpo_dist.") or here in ("launcher", "demo"):
                continue
            there = module.split(".")[1]
            assert there == here or FLOOR[there] < FLOOR[here], f"{path.relative_to(PACKAGE)} imports {module}"


def test_policy_and_reference_never_import_each_other():
    for here, there in (("policy", "reference"), ("reference", "policy")):
        for path in (PACKAGE / here).glob("*.py"):
            assert not any(module.startswith(f"dpo_dist.{there}") for module in imports(path)), path


def test_the_launcher_starts_the_entry_points_and_never_imports_them():
    for path in (PACKAGE / "launcher").glob("*.py"):
        rooms = {module.split(".")[1] for module in imports(path) if module.startswith("dpo_dist.")}
        assert rooms <= {"config", "compose", "launcher", "size_report"}, path


def test_heavy_libraries_stay_in_their_rooms():
    for path in FILES:
        for module in imports(path):
            library = module.split(".")[0]
            if library in ONLY_IN:
                assert str(path.relative_to(PACKAGE)) in ONLY_IN[library], f"{path} imports {module}"
            assert library != "torch" or room(path) not in TORCH_FREE, f"{path} imports torch"


def test_torch_distributed_is_called_in_world_alone():
    for path in FILES:
        if path.name != "world.py":
            assert not any(module.startswith("torch.distributed") for module in imports(path)), path
            assert "torch.distributed." not in path.read_text().replace("torch.distributed.run", ""), path


def test_no_bare_except_and_no_catch_all_names():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.ExceptHandler) and node.type is None), f"{path}:{node.lineno}"
        assert path.stem not in ("utils", "helpers", "common", "misc"), path
