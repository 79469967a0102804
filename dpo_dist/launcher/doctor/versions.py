"""Are the installed packages ones that dpo-dist supports? Read from their metadata; nothing is imported."""
from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import dpo_dist
from dpo_dist.config.schema import RunConfig
from dpo_dist.launcher.doctor.finding import Finding

SHOWN = ("torch", "deepspeed", "transformers", "datasets", "hydra-core", "omegaconf")
# there in a checkout and in the image
CONSTRAINTS = Path(dpo_dist.__file__).resolve().parent.parent / "constraints.txt"


def versions(config: RunConfig) -> Finding:
    extras = ["", *(["qlora"] if config.model.quantization != "none" else [])]
    try:
        about = metadata.metadata("dpo-dist")
    except metadata.PackageNotFoundError:
        return Finding("dpo-dist itself is not installed", "pip install -c constraints.txt -e .")
    wrong = []
    if platform.python_version() not in SpecifierSet(about["Requires-Python"]):
        wrong.append(f"Python {platform.python_version()}, needs {about['Requires-Python']}")
    for needed in map(Requirement, metadata.requires("dpo-dist") or []):
        if needed.marker and not any(needed.marker.evaluate({"extra": extra}) for extra in extras):
            continue
        found = installed(needed.name)
        if found is None:
            wrong.append(f"{needed.name} is missing")
        elif not needed.specifier.contains(found, prereleases=True):
            wrong.append(f"{needed.name} {found}, needs {needed.specifier}")
    if wrong:
        project = f"'.[{extras[-1]}]'" if extras[-1] else "."
        return Finding("; ".join(wrong), f"pip install -c constraints.txt {project} installs the tested versions")
    shown = ", ".join(f"{name} {installed(name)}" for name in SHOWN)
    untested = list(_other_than_tested())
    return Finding(f"Python {platform.python_version()}, {shown}"
                   + (f" (supported; not the tested {', '.join(untested)})" if untested else ""))


def _other_than_tested() -> Iterator[str]:
    """`name==version` of constraints.txt for each shown package that is installed in another version."""
    lines = CONSTRAINTS.read_text().splitlines() if CONSTRAINTS.is_file() else []
    for pinned in (Requirement(line) for line in lines if line and not line.startswith("#")):
        found = installed(pinned.name)
        applies = pinned.name in SHOWN and (pinned.marker is None or pinned.marker.evaluate())
        if applies and found and not pinned.specifier.contains(found):
            yield f"{pinned.name}{pinned.specifier}"


def installed(name: str) -> str | None:
    """The installed version of a package."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
