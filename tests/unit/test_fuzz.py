"""A part of what `make fuzz` tries: odd inputs of every kind, none of which ends in a traceback."""
from __future__ import annotations

import importlib

import pytest


def test_three_hundred_odd_inputs_are_read_or_told():
    fuzz = importlib.import_module("fuzz")
    shown: list[str] = []
    assert fuzz.fuzz(range(300), seed=14, show=shown.append) == 0, "\n".join(shown)


def test_a_finding_is_shown_with_what_runs_it_again(monkeypatch: pytest.MonkeyPatch):
    fuzz = importlib.import_module("fuzz")

    def broken(random: object, folder: object) -> str:
        raise KeyError("nothing")

    monkeypatch.setattr(fuzz, "KINDS", {broken: 1})
    shown: list[str] = []
    assert fuzz.fuzz(range(2), seed=3, show=shown.append) == 2
    assert shown[0].startswith("FOUND broken --seed 3 --only 0: KeyError: 'nothing'")
