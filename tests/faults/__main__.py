"""python -m tests.faults [--trials 300] [--seed 0] [--kinds a,b] [--only kind:number] [--out FILE.json]"""
from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from . import campaign, report
from .kinds import KINDS


def main() -> int:
    """0 where each trial recovered or stopped in good order."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description="Faults done to real runs.")
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(KINDS), help="names, with commas")
    parser.add_argument("--only", action="append", default=[], help="KIND:NUMBER, one trial again; may be repeated")
    parser.add_argument("--lanes", type=int, default=2, help="trials at a time")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    kinds = asked.kinds.split(",")
    if unknown := set(kinds) - KINDS.keys():
        parser.error(f"unknown kinds {', '.join(sorted(unknown))}; known: {', '.join(KINDS)}")
    trials = campaign.drawn(asked.trials, kinds)
    if asked.only:
        trials = [(kind, int(number)) for kind, _, number in (one.partition(":") for one in asked.only)]
    began = time.monotonic()
    ended = campaign.run(trials, asked.seed, asked.lanes, lambda one: print(report.line(one), flush=True))
    found = report.results(ended, asked.seed, time.monotonic() - began, {})
    print(report.table(found))
    if asked.out:
        asked.out.write_text(json.dumps(found, indent=2) + "\n")
    return int(any(not one.verdict.fine for one in ended))


if __name__ == "__main__":
    sys.exit(main())
