"""JSON objects that are read back, of files which are written whole or not at all. No torch here."""
from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from dpo_dist.config.errors import UserError

log = logging.getLogger(__name__)


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
