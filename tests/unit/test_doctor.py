"""`dpo-dist doctor` on real trouble: each check is seen green, and red with its remedy."""
from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from unittest import mock

import pytest
from conftest import REPO, dpo_dist, train_on, write_rows, write_tiny_llama

from dpo_dist.config.compose import compose
from dpo_dist.launcher import cli
from dpo_dist.launcher.doctor import folders
from dpo_dist.launcher.doctor.services import slurm
from dpo_dist.runtime.ports import free_port
from dpo_dist.runtime.shared_folders import shared_folders

CHECKS = ("versions", "devices", "compiled ops", "ports", "shared folder", "clock", "disk", "wandb", "slurm")
LEFT_OUT = ("GLOO_SOCKET_IFNAME", "MASTER_ADDR", "MASTER_PORT", "NNODES", "NODE_RANK", "WANDB_API_KEY", "NETRC")


def doctor(folder: Path, *words: object, code: int, path: Path | None = None, **environment: str) -> dict[str, str]:
    """{check: what it said, with its remedy} of a doctor that was run in `folder`; `path` goes before all other
    packages."""
    clean = {key: value for key, value in os.environ.items() if key not in LEFT_OUT}
    packages = os.pathsep.join([*([str(path)] if path else []), str(REPO)])
    done = subprocess.run([sys.executable, "-m", "dpo_dist.launcher.cli", "doctor", "cluster.device=cpu",
                           *map(str, words)], cwd=folder, capture_output=True, text=True, timeout=120,
                          env={**clean, "PYTHONPATH": packages, **environment})
    assert done.returncode == code, done.stdout + done.stderr
    return findings(done.stdout)


def doctor_here(folder: Path, *words: object, code: int, **environment: str) -> dict[str, str]:
    """As `doctor`, in this process, which asks torch once for all tests: for what packages have no part in."""
    clean, out = {key: value for key, value in os.environ.items() if key not in LEFT_OUT}, StringIO()
    before = Path.cwd()
    os.chdir(folder)
    try:
        with mock.patch.dict(os.environ, {**clean, **environment}, clear=True), redirect_stdout(out):
            found = cli.main(["doctor", "cluster.device=cpu", *map(str, words)])
    finally:
        os.chdir(before)
    assert found == code, out.getvalue()
    return findings(out.getvalue())


def findings(shown: str) -> dict[str, str]:
    """{check: what it said, with its remedy}."""
    seen: dict[str, str] = {}
    for line in shown.splitlines():
        if line.startswith(("ok ", "RED")):
            name = next(name for name in CHECKS if line[5:].startswith(name))
            seen[name] = line
        elif line.strip().startswith("remedy:"):
            seen[name] += line
    assert all(("remedy: " in text) == text.startswith("RED") for text in seen.values())
    return seen


def red(seen: dict[str, str]) -> list[str]:
    return [name for name, text in seen.items() if text.startswith("RED")]


def package(folder: Path, name: str, code: str) -> Path:
    """A folder for PYTHONPATH that holds a module of this name."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.py").write_text(code)
    return folder


@contextmanager
def listening(port: int = 0) -> Iterator[int]:
    with socket.create_server(("127.0.0.1", port)) as server:
        yield int(server.getsockname()[1])


def test_on_a_sound_machine_all_is_green_and_nothing_is_left_behind(tmp_path: Path):
    seen = doctor(tmp_path, code=0)
    assert [name for name in seen if name != "slurm"] == ["versions", "devices", "compiled ops", "ports",
                                                          "shared folder", "clock", "disk"]
    assert "torch 2" in seen["versions"] and "cores" in seen["devices"] and "none needed" in seen["compiled ops"]
    assert list(tmp_path.iterdir()) == []


def test_a_config_mistake_is_one_message_and_exit_code_2(tmp_path: Path):
    assert "did you mean 'model.path'" in dpo_dist("doctor", "model.pat=x", code=2).stderr


def test_a_version_outside_the_supported_range_is_red(tmp_path: Path):
    about = tmp_path / "old" / "torch-2.1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.1.0\n")
    seen = doctor(tmp_path, code=1, path=tmp_path / "old")
    assert red(seen) == ["versions"]
    assert "torch 2.1.0, needs >=2.8" in seen["versions"] and "pip install -c constraints.txt" in seen["versions"]


def test_what_4_bit_weights_need_is_looked_at_where_a_run_has_them(tmp_path: Path):
    about = tmp_path / "asks" / "dpo_dist-0.1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: dpo-dist\nVersion: 0.1.0\nRequires-Python: >=3.10\n"
                                    "Requires-Dist: bitsandbytes>=99; extra == 'qlora'\n")
    seen = doctor(tmp_path, "model.lora.rank=4", "model.quantization=nf4", code=1, path=tmp_path / "asks")
    assert "bitsandbytes" in seen["versions"] and "pip install -c constraints.txt '.[qlora]'" in seen["versions"]
    assert "bitsandbytes" not in doctor(tmp_path, code=0, path=tmp_path / "asks")["versions"]


def test_a_torch_that_does_not_load_and_a_gpu_that_is_not_there_are_red(tmp_path: Path):
    broken = package(tmp_path / "broken", "torch", "raise ImportError('libcudart.so.12: cannot open shared object "
                                                   "file')")
    seen = doctor(tmp_path, code=1, path=broken)
    assert "devices" in red(seen) and "libcudart.so.12: cannot open" in seen["devices"]
    hidden = doctor(tmp_path, "cluster.device=cuda", code=1, CUDA_VISIBLE_DEVICES="")
    assert "cluster.device=cuda, but torch sees no GPU" in hidden["devices"]
    assert "set cluster.device=cpu" in hidden["devices"]


def test_a_deepspeed_that_does_not_load_is_red_where_it_is_used(tmp_path: Path):
    broken = package(tmp_path / "broken", "deepspeed", "raise RuntimeError('built for another torch')")
    seen = doctor(tmp_path, code=1, path=broken)
    assert red(seen) == ["compiled ops"]
    assert "built for another torch" in seen["compiled ops"] and "zero=none" in seen["compiled ops"]
    assert "compiled ops" not in doctor(tmp_path, "zero=none", code=0, path=broken)


def test_an_occupied_master_port_is_red_and_a_free_one_green(tmp_path: Path):
    with listening() as port:
        seen = doctor_here(tmp_path, "zero=none", code=1, MASTER_PORT=str(port))
    assert red(seen) == ["ports"]
    assert f"MASTER_PORT={port} cannot be had" in seen["ports"] and "set MASTER_PORT to a free port" in seen["ports"]
    assert f"port {port} is free" in doctor_here(tmp_path, "zero=none", code=0, MASTER_PORT=str(port))["ports"]
    assert "is no port" in doctor_here(tmp_path, "zero=none", code=1, MASTER_PORT="http")["ports"]


def test_an_interface_that_is_not_there_is_red_and_a_real_one_green(tmp_path: Path):
    seen = doctor_here(tmp_path, "zero=none", code=1, GLOO_SOCKET_IFNAME="ib7")
    assert red(seen) == ["ports"] and "ib7 is no interface" in seen["ports"] and "lo" in seen["ports"]
    assert "lo (127.0.0.1) talks" in doctor_here(tmp_path, "zero=none", code=0, GLOO_SOCKET_IFNAME="lo")["ports"]


def test_an_unknown_master_address_is_red(tmp_path: Path):
    seen = doctor_here(tmp_path, "zero=none", code=1, MASTER_PORT=str(free_port()), MASTER_ADDR="nobody.invalid",
                       GLOO_SOCKET_IFNAME="lo")
    assert "MASTER_ADDR=nobody.invalid has no address" in seen["ports"]


def test_a_file_where_a_folder_should_be_is_red(tmp_path: Path):
    (tmp_path / "file").write_text("")
    seen = doctor_here(tmp_path, "zero=none", f"data.cache_dir={tmp_path / 'file'}", code=1)
    assert red(seen) == ["shared folder"]
    assert "data.cache_dir=" in seen["shared folder"]
    assert "set data.cache_dir to a folder that can be written" in seen["shared folder"]


def test_the_cache_of_the_reference_is_looked_at_where_it_is_written(tmp_path: Path):
    def looked_at(mode: str) -> bool:
        config = compose([f"model.path={tmp_path}", f"reference.mode={mode}"])
        return "reference.cache_dir" in shared_folders(config)

    assert looked_at("cached") and looked_at("ahead") and not looked_at("live")


def test_a_disk_of_this_machine_alone_is_red_for_several_nodes(tmp_path: Path):
    seen = doctor_here(tmp_path, "zero=none", code=1, NNODES="2", GLOO_SOCKET_IFNAME="lo", MASTER_PORT=str(free_port()))
    assert red(seen) == ["shared folder"]
    assert "a disk of this machine alone" in seen["shared folder"] and "that every node mounts" in seen["shared folder"]


def test_a_clock_that_is_off_the_file_systems_is_red(tmp_path: Path):
    late = package(tmp_path / "late", "sitecustomize", "import time\nreal = time.time\ntime.time = lambda: real() - "
                                                       "3600\n")
    seen = doctor(tmp_path, "zero=none", code=1, path=late)
    assert red(seen) == ["clock"] and "-3600 s off" in seen["clock"] and "NTP" in seen["clock"]


def test_a_full_or_read_only_disk_is_red(tmp_path: Path):
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting needs root")
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], capture_output=True,
                             text=True)
    if mounted.returncode:
        pytest.skip(f"nothing can be mounted here: {mounted.stderr.strip()}")
    try:
        seen = doctor_here(tmp_path, "zero=none", f"run.dir={small / 'run'}", code=1)
        assert red(seen) == ["disk"]
        assert "needs 1.0 GiB" in seen["disk"]
        assert "set run.dir to a larger disk" in seen["disk"]
        subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
        seen = doctor_here(tmp_path, "zero=none", f"run.dir={small / 'run'}", code=1)
        assert "shared folder" in red(seen) and "Read-only file system" in seen["shared folder"]
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.distributed
@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_the_room_that_is_asked_for_is_what_checkpoints_and_model_take(
        zero: str, tmp_path: Path, base: list[str], monkeypatch: pytest.MonkeyPatch):
    write_tiny_llama(tmp_path / "m", hidden_size=256, intermediate_size=512)
    write_rows(tmp_path / "rows.jsonl", 8)
    words = [f"model.path={tmp_path / 'm'}", *base, train_on(tmp_path / "rows.jsonl"), f"zero={zero}",
             f"run.dir={tmp_path / 'run'}"]
    dpo_dist("train", *words, "train.pairs_per_step=4", "train.max_steps=2", "train.save_every_steps=1")
    left = [tmp_path / "run" / "checkpoints", tmp_path / "run" / "model"]
    written = sum(file.stat().st_size for folder in left for file in folder.rglob("*") if file.is_file())
    monkeypatch.setattr(folders, "LEAST_FREE_GIB", 0)            # the run is smaller than the least that is asked for
    # 1 and the one being written: 2
    needed, why = folders.needed_bytes(compose([*words, "train.keep_checkpoints=1"]))
    assert "2 checkpoints" in why
    assert needed == pytest.approx(written, rel=0.05)


def test_wandb_online_needs_a_login_and_a_server_that_answers(tmp_path: Path):
    online = ["zero=none", "tracking=wandb", "tracking.mode=online"]
    assert "offline" in doctor_here(tmp_path, "zero=none", "tracking=wandb", code=0)["wandb"]
    nobody = {"HOME": str(tmp_path), "WANDB_BASE_URL": "http://127.0.0.1:1"}
    seen = doctor_here(tmp_path, *online, code=1, **nobody)
    assert red(seen) == ["wandb"]
    assert "there is no login for 127.0.0.1" in seen["wandb"]
    assert "`wandb login`" in seen["wandb"]
    seen = doctor_here(tmp_path, *online, code=1, **nobody, WANDB_API_KEY="k" * 40)
    assert "127.0.0.1 does not answer" in seen["wandb"] and "tracking.mode=offline" in seen["wandb"]
    with listening() as port:
        seen = doctor_here(tmp_path, *online, code=0, **{**nobody, "WANDB_BASE_URL": f"http://127.0.0.1:{port}"},
                           WANDB_API_KEY="k" * 40)
    assert "a login is there" in seen["wandb"]


def test_slurm_is_told_where_it_is_and_a_dead_controller_stops_only_runs_that_need_it(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sinfo = tmp_path / "bin" / "sinfo"
    sinfo.parent.mkdir()

    def say(script: str) -> str:
        sinfo.write_text(f"#!/bin/sh\n{script}\n")
        sinfo.chmod(0o755)
        return doctor_here(tmp_path, "zero=none", code=0, PATH=f"{sinfo.parent}:{os.environ['PATH']}")["slurm"]

    assert "gpu (4 nodes idle)" in say("echo gpu 4 idle")
    assert ("Unable to contact slurm controller; only cluster=slurm needs it"
            in say("echo Unable to contact slurm " "controller >&2; exit 1"))

    config = compose(["model.path=m"])
    on_slurm = compose(["model.path=m", "cluster=slurm"])
    monkeypatch.setenv("PATH", str(sinfo.parent))
    dead = slurm(on_slurm)
    assert dead is not None and not dead.ok and dead.text == "cluster=slurm, but Unable to contact slurm controller"
    sinfo.unlink()
    missing = slurm(on_slurm)
    assert missing is not None and not missing.ok and "there is no sinfo here" in missing.text
    assert slurm(config) is None
