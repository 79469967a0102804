"""What is printed and written of a campaign."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .campaign import Ended
from .verdict import VERDICTS


def line(ended: Ended) -> str:
    head = f"{ended.verdict.name:9} {ended.kind}:{ended.number} ({ended.seconds:.1f} s) {'; '.join(ended.told)}"
    detail = ended.verdict.detail.replace("\n", "\n            ")
    return f"{head}\n            {detail}" if detail else head


def results(ended: Sequence[Ended], seed: int, seconds: float, skipped: dict[str, str]) -> dict[str, Any]:
    """{kinds: {kind: counts}, total: counts, failures: [...]}; seconds are of the trials, `seconds` of the clock."""
    kinds = {kind: counts([one for one in ended if one.kind == kind]) for kind in sorted({one.kind for one in ended})}
    return {"seed": seed, "clock_seconds": round(seconds), "kinds": kinds, "total": counts(ended), "skipped": skipped,
            "failures": [{"kind": one.kind, "number": one.number, "verdict": one.verdict.name, "told": one.told,
                          "detail": one.verdict.detail} for one in ended if not one.verdict.fine]}


def counts(ended: Sequence[Ended]) -> dict[str, int]:
    return {"trials": len(ended), **{name: sum(one.verdict.name == name for one in ended) for name in VERDICTS},
            "seconds": round(sum(one.seconds for one in ended))}


def table(found: dict[str, Any]) -> str:
    columns = ("trials", *VERDICTS, "seconds")
    width = max(map(len, [*found["kinds"], "kind"]))
    rows = [*found["kinds"].items(), ("all", found["total"])]
    return "\n".join([f"{'kind':{width}}" + "".join(f"{name:>11}" for name in columns),
                      *(f"{kind:{width}}" + "".join(f"{row[name]:11}" for name in columns) for kind, row in rows),
                      *(f"{kind:{width}}  skipped: {why}" for kind, why in found["skipped"].items())])
