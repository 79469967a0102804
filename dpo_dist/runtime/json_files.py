"""JSON objects that are read back, of files which are written whole or not at all. No torch here."""
from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo_dist.config.errors import UserError

log = logging.getLogger(__name__)

SEAL = "digest"                        # the key of that digest


def parsed(path: Path) -> dict[str, Any]:
    """What the file says. OSError where it cannot be read, ValueError where it is no JSON object."""
    try:
        found = json.loads(path.read_bytes())
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    if not isinstance(found, dict):
        raise ValueError("it is no JSON object")
    return found


def found_object(path: Path) -> dict[str, Any] | None:
    """What the file says; None where it is not there or damaged, which a line of the log tells."""
    try:
        return parsed(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        log.warning("%s is damaged and is not read: %s", path, error)
        return None


def needed_object(path: Path, remedy: str) -> dict[str, Any]:
    """What the file says. UserError with the remedy where it cannot be read."""
    try:
        return parsed(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); {remedy}") from error


# --------------------------------------------------------------------------------------- with a digest of what it says


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content with a digest of itself, so that one flipped bit is found."""
    says = {key: value for key, value in content.items() if key != SEAL}
    return {**says, SEAL: _digest(says)}


def is_whole(content: Mapping[str, Any]) -> bool:
    """Whether it says what it said when it was sealed."""
    return content.get(SEAL) == _digest({key: value for key, value in content.items() if key != SEAL})


def found_sealed(path: Path) -> dict[str, Any] | None:
    """What a sealed file says; None where it is not there or damaged, which a line of the log tells."""
    content = found_object(path)
    if content is not None and not is_whole(content):
        log.warning("%s is damaged and is not read: its digest is another", path)
        return None
    return content


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()
