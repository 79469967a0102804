"""<run.dir>/command.txt: what trains the same again, for the report and for people."""
from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from dpo_dist.runtime.files import write_atomic
from dpo_dist.runtime.run_dir import RunDir


def write_command(run_dir: RunDir, words: Sequence[str]) -> None:
    """Keeps the overrides as a command, with the folder that its relative paths start from. Without run.dir: in the
    run's own folder there would be nothing to do."""
    kept = [word for word in words if not word.startswith("run.dir=")]
    write_atomic(run_dir.command, f"{shlex.join(['dpo-dist', 'run', *kept])}\n# typed in {Path.cwd()}\n")
