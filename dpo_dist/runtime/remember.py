"""What was computed from the whole content of a large file, kept for as long as the file stays as it is."""
from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpo_dist.runtime.files import write_json
from dpo_dist.runtime.json_files import found_sealed, sealed

# a file that changed this shortly before it was read may change again without another time stamp: file systems count
# in steps, and the clocks of a server and of this machine differ
SETTLED_SECONDS = 2.0


def remembered(memory: Path | None, what: str, file: Path, compute: Callable[[Path], Any]) -> Any:
    """`compute(file)`, as JSON has it; from the folder `memory` where it is known for the file as it is now.

    The file is taken for unchanged where path, size, inode and both time stamps are the same: content that is written
    with an old modification time (`cp -p`, `touch -d`) still has a new time of change. `what` names the computation.
    Any number of processes may share the folder. None: nothing is remembered. A note has a digest of what it says: a
    damaged one is not believed.
    """
    if memory is None:
        return compute(file)
    name = hashlib.blake2b(f"{what}\0{file.resolve()}".encode(), digest_size=16).hexdigest()
    note, began, state = memory / f"{name}.json", time.time(), _state(file)
    known = found_sealed(note)
    if known is not None and known.get("state") == state:
        return known["value"]
    value = compute(file)
    settled = began - max(state["mtime_ns"], state["ctime_ns"]) / 1e9 > SETTLED_SECONDS
    if settled and _state(file) == state:                # else it changed while it was read
        try:
            memory.mkdir(parents=True, exist_ok=True)
            write_json(note, sealed({"what": what, "file": str(file.resolve()), "state": state, "value": value}))
        except OSError:                                  # only slower: it is computed again at the next start
            pass
    return value


def _state(file: Path) -> dict[str, int]:
    found = file.stat()
    return {"size": found.st_size, "inode": found.st_ino, "mtime_ns": found.st_mtime_ns, "ctime_ns": found.st_ctime_ns}
