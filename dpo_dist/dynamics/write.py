"""datamap.json and suspects.jsonl: what each pair taught, for a person, the report and `dpo-dist next`."""
from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_dist.data.store import PairStore
from dpo_dist.dynamics.datamap import DataMap, data_map
from dpo_dist.dynamics.suspects import Suspicion, suspicion
from dpo_dist.dynamics.visits import read_visits
from dpo_dist.dynamics.words import word_evidence
from dpo_dist.runtime.checksums import checksum
from dpo_dist.runtime.files import replacing, write_json
from dpo_dist.runtime.json_files import found_sealed, sealed
from dpo_dist.runtime.run_dir import RunDir

log = logging.getLogger(__name__)

LISTED = 100                                 # entries of each list in datamap.json
POINTS = 2_000                               # of the map
DIGITS = 5                                   # significant ones


def write_dynamics(run_dir: RunDir, pairs: PairStore, say: Callable[[str], None] = log.warning
                   ) -> dict[str, Any] | None:
    """What datamap.json holds now, written with suspects.jsonl from the visits so far; None, and no file, where no pair
    had a reward. Also of a run under way. Ties have no label that could be flipped, and are in neither file. say: tells
    that visits are missing, as their file is damaged."""
    decided = np.asarray(pairs.tie) == 0
    visits = read_visits(run_dir.visits, say).of_pairs(decided)
    if not len(visits):
        return None
    map_ = data_map(visits, len(pairs))
    suspects = suspicion(visits, np.where(decided, word_evidence(pairs), 0.0))
    ranking = np.argsort(-suspects.score, kind="stable")
    ranking = ranking[decided[ranking]]
    with replacing(run_dir.suspects) as file:
        for line in _ranked(pairs, map_, suspects, ranking):
            file.write(line)
    never, lost = map_.never_learned(), map_.forgotten()
    whole = sealed({"pairs": len(pairs), "visits": len(visits), "last_step": int(visits.step[-1]),
             "counts": {"never_learned": len(never), "forgotten": len(lost), "suspects": suspects.flipped},
             "never_learned": _entries(pairs, map_, suspects, never[:LISTED]),
             "forgotten": _entries(pairs, map_, suspects, lost[:LISTED]),
             "suspects": _entries(pairs, map_, suspects, ranking[:LISTED]),
             "map": _points(pairs, map_), "suspects_jsonl": checksum(run_dir.suspects)})
    write_json(run_dir.datamap_json, whole)
    return whole


def dynamics_are_whole(run_dir: RunDir) -> bool:
    """Whether datamap.json and suspects.jsonl are there, and as they were written."""
    found = found_sealed(run_dir.datamap_json)
    suspects = run_dir.suspects
    return found is not None and suspects.is_file() and found.get("suspects_jsonl") == checksum(suspects)


def _ranked(pairs: PairStore, map_: DataMap, suspects: Suspicion, ranking: NDArray[np.int64]) -> Iterator[bytes]:
    for rank, i in enumerate(ranking.tolist(), start=1):
        yield json.dumps({"rank": rank, **_about(pairs, map_, suspects, i), "first_margin": _number(map_.first[i]),
                          "last_margin": _number(map_.last[i]), "visits": int(map_.visits[i])}).encode() + b"\n"


def _entries(pairs: PairStore, map_: DataMap, suspects: Suspicion, of: NDArray[np.int64]) -> list[dict[str, Any]]:
    return [{**_about(pairs, map_, suspects, i), "margins": [_number(margin) for margin in map_.of(i)]}
            for i in of.tolist()]


def _about(pairs: PairStore, map_: DataMap, suspects: Suspicion, i: int) -> dict[str, Any]:
    """score: log-odds in nats that the label is flipped, less `from_margins` and `from_words`, which speak for it."""
    return {"pair": i, "where": pairs.where_of(i), "source": pairs.source_of(i), "score": _number(suspects.score[i]),
            "from_margins": _number(-suspects.margins[i]), "from_words": _number(-suspects.words[i]),
            "confidence": _number(map_.confidence[i]), "variability": _number(map_.variability[i])}


def _points(pairs: PairStore, map_: DataMap) -> dict[str, list[Any]]:
    """At most POINTS pairs that were trained on: those with the smallest hashes, whatever the order of the rows."""
    seen = np.flatnonzero(map_.visits)
    content = np.asarray(pairs.content)[seen]
    some = np.sort(seen[np.argsort(content[:, 1] ^ content[:, 0], kind="stable")[:POINTS]])
    return {"confidence": _numbers(map_.confidence[some]), "variability": _numbers(map_.variability[some]),
            "correct": _numbers(map_.correct[some]), "where": [pairs.where_of(i) for i in some.tolist()]}


def _numbers(values: Iterable[float]) -> list[float | None]:
    return [_number(value) for value in values]


def _number(value: float) -> float | None:
    """As JSON has it: null for NaN."""
    return None if np.isnan(value) else float(f"{value:.{DIGITS}g}")
