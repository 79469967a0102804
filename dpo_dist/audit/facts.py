"""What an audit keeps of the data: about 150 bytes a pair and 300 a prompt, none of the texts."""
from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_dist.audit.languages import FUNCTION_WORDS, SCRIPTS
from dpo_dist.audit.signatures import BANDS, MOST_WORDS, bands_of
from dpo_dist.audit.style import FEATURES

LANGUAGES = ("", *SCRIPTS, *FUNCTION_WORDS)
TRAIN, HELD_OUT, BENCHMARK = 0, 1, 2         # what a data set is for
# bits of `flags`
SPECIAL, EMPTY_REASONING, ALIKE, EQUAL, SPLIT_VOTE, RATED, ASKS, TOKENS = (1 << bit for bit in range(8))
TIE, BOTH_BAD = "tie", "both_bad"
TIES = ("", TIE, BOTH_BAD)

COLUMNS: dict[str, tuple[str, int]] = {      # of a pair: (dtype, columns); 0 columns = one-dimensional
    "data_set": ("<u2", 0), "place": ("<u4", 0), "number": ("<i8", 0),           # where it stands
    "content": ("<u8", 3),                   # hashes of prompt, chosen, rejected
    "length": ("<i4", 2),                    # characters of chosen and rejected; tokens of token_ids rows
    "style": ("<i1", len(FEATURES)),         # 1: only chosen has it, -1: only rejected
    "opening": ("<u4", 2),                   # of chosen and rejected; 0 = none
    "language": ("<u1", 3),                  # places in LANGUAGES, of prompt, chosen, rejected
    "order": ("<i1", 0),                     # 1: chosen stood before rejected, -1: after; 0 unknown
    "flags": ("<u1", 0), "tie": ("<u1", 0),  # a place in TIES
    "annotator": ("<u4", 0),                 # a hash; 0 = unknown
}
PROMPT_COLUMNS: dict[str, tuple[str, int]] = {   # of each distinct prompt of a split
    "prompt": ("<u8", 0), "loose": ("<u8", 0), "split": ("<u1", 0), "at_place": ("<u4", 0), "at_number": ("<i8", 0),
    "bands": ("<u4", BANDS), "n_words": ("<u2", 0),
    "numbers": ("<u4", 0)}                   # a hash of the numbers in it


@dataclass
class Facts:
    """Of some rows, in their order. Arrays by name (COLUMNS, PROMPT_COLUMNS), and what is counted."""

    arrays: dict[str, NDArray[Any]]
    words: NDArray[np.uint32]                # of all prompts, laid end to end: n_words of each
    places: list[str]                        # "rows.jsonl:"
    # (where, TIE or BOTH_BAD) of judgments that gave no pair
    ties: list[tuple[str, str]] = field(default_factory=list)
    openings: dict[int, str] = field(default_factory=dict)

    def __getattr__(self, name: str) -> NDArray[Any]:
        try:
            return self.__dict__["arrays"][name]
        except KeyError:
            raise AttributeError(name) from None

    def __len__(self) -> int:
        return len(self.arrays["data_set"])

    def where(self, at: int) -> str:
        """Where pair `at` stands."""
        return self._where(self.arrays["place"][at], self.arrays["number"][at])

    def wheres(self, which: NDArray[np.int64]) -> list[str]:
        return [self.where(at) for at in which.tolist()]

    def prompt_where(self, at: int) -> str:
        """Where prompt `at` stands first."""
        return self._where(self.arrays["at_place"][at], self.arrays["at_number"][at])

    def has(self, flag: int) -> NDArray[np.bool_]:
        return (self.arrays["flags"] & flag) > 0

    def _where(self, place: int, number: int) -> str:
        return self.places[place] + (str(number) if number >= 0 else "")

    @staticmethod
    def joined(parts: Sequence[Facts]) -> Facts:
        """All of them, in order; each prompt of a split once."""
        places: dict[str, int] = {}
        moved = []
        for part in parts:
            number = np.array([places.setdefault(place, len(places)) for place in part.places] or [0], dtype="<u4")
            moved.append({**part.arrays, **{name: number[part.arrays[name]] if len(part.arrays[name]) else
                                            part.arrays[name] for name in ("place", "at_place")}})
        arrays = {name: np.concatenate([part[name] for part in moved]) for name in (*COLUMNS, *PROMPT_COLUMNS)}
        words = np.concatenate([part.words for part in parts])
        whole = Facts(arrays, words, list(places), [tie for part in parts for tie in part.ties],
                      {key: text for part in reversed(parts) for key, text in part.openings.items()})
        return whole._distinct()

    def _distinct(self) -> Facts:
        """The same without prompts that stand there twice in one split: the first stays."""
        arrays = self.arrays
        keys = np.stack([arrays["prompt"], arrays["split"].astype("<u8")], 1)
        _, first = np.unique(keys, axis=0, return_index=True)
        if len(first) == len(keys):
            return self
        first = np.sort(first)
        starts = np.concatenate([[0], np.cumsum(arrays["n_words"], dtype=np.int64)])
        kept = [self.words[starts[i]:starts[i + 1]] for i in first]
        words = np.concatenate(kept) if kept else self.words[:0]
        return Facts({**arrays, **{name: arrays[name][first] for name in PROMPT_COLUMNS}}, words, self.places,
                     self.ties, self.openings)


class FactsWriter:
    """Collects the facts of rows, one by one."""

    def __init__(self) -> None:
        self._rows: dict[str, list[Any]] = {name: [] for name in (*COLUMNS, *PROMPT_COLUMNS)}
        self._words: list[NDArray[np.uint32]] = []
        self._places: dict[str, int] = {}
        self._seen: set[tuple[int, int]] = set()
        self.ties: list[tuple[str, str]] = []
        self.openings: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._rows["data_set"])

    def add(self, where: str, values: dict[str, Any]) -> None:
        """A pair's values by the names of COLUMNS, but for where it stands."""
        place, number = self._place(where)
        for name, value in {**values, "place": place, "number": number}.items():
            self._rows[name].append(value)

    def is_new(self, prompt: int, split: int) -> bool:
        return (prompt, split) not in self._seen

    def add_prompt(self, where: str, values: dict[str, Any], words: NDArray[np.uint32]) -> None:
        """A prompt's values, and its words in order."""
        self._seen.add((values["prompt"], values["split"]))
        place, number = self._place(where)
        for name, value in {**values, "at_place": place, "at_number": number}.items():
            self._rows[name].append(value)
        self._words.append(words)

    def facts(self) -> Facts:
        # of a long prompt the smallest hashes: a sample that two alike prompts share
        kept = [np.unique(words)[:MOST_WORDS] for words in self._words]
        self._rows["n_words"] = [len(words) for words in kept]
        arrays = {}
        for name, (dtype, columns) in {**COLUMNS, **PROMPT_COLUMNS}.items():
            values = bands_of(self._words) if name == "bands" else np.array(self._rows[name], dtype=dtype)
            arrays[name] = values.reshape(-1, columns) if columns else values
        words = np.concatenate(kept) if kept else np.empty(0, "<u4")
        return Facts(arrays, words, list(self._places), self.ties, self.openings)

    def _place(self, where: str) -> tuple[int, int]:
        match = re.fullmatch(r"(.*?)(0|[1-9]\d{0,17})", where, re.DOTALL)
        place, number = (match[1], int(match[2])) if match else (where, -1)
        return self._places.setdefault(place, len(self._places)), number


assert {f.name for f in fields(Facts)}.isdisjoint({*COLUMNS, *PROMPT_COLUMNS} - {"words"}), "arrays are found by name"
