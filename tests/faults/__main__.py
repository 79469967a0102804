"""python -m tests.faults [--trials 300] [--seed 0] [--kinds a,b] [--only kind:number] [--out FILE.json]"""
from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from pathlib import Path

from . import campaign, report, rights
from .bases import CONFIGURATIONS
from .kinds import KINDS


def main() -> int:
    """0 where each trial recovered or stopped in good order."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description="Faults done to real runs.")
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(KINDS), help="names, with commas")
    parser.add_argument("--only", action="append", default=[], help="KIND:NUMBER, one trial again; may be repeated")
    parser.add_argument("--configurations", default=",".join(CONFIGURATIONS), help="names, with commas")
    parser.add_argument("--lanes", type=int, default=2, help="trials at a time")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))       # and so removes its folders
    kinds = asked.kinds.split(",")
    if unknown := set(kinds) - KINDS.keys():
        parser.error(f"unknown kinds {', '.join(sorted(unknown))}; known: {', '.join(KINDS)}")
    with tempfile.TemporaryDirectory(prefix="dpo-dist-preload-") as folder:
        rights.preload(Path(folder))
        skipped = {kind: why for kind in kinds if (why := " and ".join(
            filter(None, map(rights.missing, KINDS[kind].needs))))}
        trials = campaign.drawn(asked.trials, [kind for kind in kinds if kind not in skipped])
        if asked.only:
            trials = [(kind, int(number)) for kind, _, number in (one.partition(":") for one in asked.only)]
        began, ended = time.monotonic(), list[campaign.Ended]()

        def show(one: campaign.Ended) -> None:
            ended.append(one)
            print(report.line(one), flush=True)

        try:
            campaign.run(trials, asked.seed, asked.lanes, show, asked.configurations.split(","))
        finally:                                             # of one that is ended early, too
            found = report.results(ended, asked.seed, time.monotonic() - began, skipped)
            print(report.table(found))
            if asked.out:
                asked.out.write_text(json.dumps(found, indent=2) + "\n")
    return int(any(not one.verdict.fine for one in ended))


if __name__ == "__main__":
    sys.exit(main())
