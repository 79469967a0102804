"""What a checkpoint holds of the policy: the trained weights in fp32 and their optimizer's state, each rank its part.

    weights-RANK.safetensors         {"0": a tensor that the optimizer updates, "1": ...}
    optim_states-RANK.safetensors    {"0.exp_avg": its state, "0.step": ...}

Which elements of which weight lie where stands in both files. So any number of ranks under any ZeRO stage can read
them: each takes the elements that it holds itself, from whichever files have them.
"""
from __future__ import annotations

import json
from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import ExitStack
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from dpo_dist.policy.parts import Part
from dpo_dist.runtime.tensor_file import TensorFile

WEIGHTS, STATES = "weights", "optim_states"
State = dict[str, Any]                     # of one tensor: {"exp_avg": Tensor, "step": Tensor or number, ...}


@dataclass(frozen=True)
class TrainedState:
    """What a rank holds of it."""

    tensors: Sequence[Tensor]              # what the optimizer updates: flat tensors, or whole weights
    parts: dict[str, Part]                 # {weight: where this rank's part of it lies}
    states: MutableMapping[Tensor, State]  # the optimizer's own
    # the weights that this rank writes, where every rank holds all of them; None = all that it holds
    writes: frozenset[str] | None = None

    @staticmethod
    def whole(weights: Mapping[str, Tensor], states: MutableMapping[Tensor, State], rank: int = 0,
              ranks: int = 1) -> TrainedState:
        """Where each rank holds every weight: they share the writing."""
        parts = {name: Part(i, 0, 0, weight.numel()) for i, (name, weight) in enumerate(weights.items())}
        return TrainedState(list(weights.values()), parts, states, frozenset(list(weights)[rank::ranks]))

    def files(self, rank: int) -> dict[str, TensorFile]:
        """{name: what this rank writes}, as views of what it holds."""
        parts = {name: part for name, part in self.parts.items() if self.writes is None or name in self.writes}
        tensors = {i: self.tensors[i] for i in sorted({part.tensor for part in parts.values()})}
        states = {(i, key): value for i, tensor in tensors.items()
                  for key, value in self.states.get(tensor, {}).items()}
        index = {"parts": json.dumps({name: astuple(part) for name, part in parts.items()}),
                 "numbers": json.dumps([[i, key, value] for (i, key), value in states.items()
                                        if not isinstance(value, Tensor)])}
        return {_file(WEIGHTS, rank): TensorFile({str(i): _flat(tensor) for i, tensor in tensors.items()}, index),
                _file(STATES, rank): TensorFile({f"{i}.{key}": _flat(value) for (i, key), value in states.items()
                                                 if isinstance(value, Tensor)}, index)}

    @torch.no_grad()
    def restore(self, folder: Path, rank: int) -> None:
        """Gives weights and state the values that are saved there, by any number of ranks under any stage."""
        with ExitStack() as stack:
            saved = [_RankFiles.open(folder, number, stack) for number in range(_ranks(folder))]
            if rank < len(saved) and saved[rank].parts == self.parts:
                self._take_all(saved[rank])
            else:
                self._take_parts(saved)

    def _take_all(self, saved: _RankFiles) -> None:
        """From this rank's own files: also DeepSpeed's padding, and state that is not one of each element's (8-bit
        AdamW's scales)."""
        for i, tensor in enumerate(self.tensors):
            tensor.copy_(saved.weights.get_tensor(str(i)).view_as(tensor))
            for key, value in saved.state(i).items():
                self._set(tensor, key, value)

    def _take_parts(self, saved: Sequence[_RankFiles]) -> None:
        for name, part in self.parts.items():
            tensor, holders = self.tensors[part.tensor], [files for files in saved if name in files.parts]
            _own(part, tensor).copy_(_elements(holders, name, "", part))
            per_element, shared = holders[0].state_of(name)
            state = self.states.setdefault(tensor, {})
            for key in per_element:
                values = _elements(holders, name, f".{key}", part)
                if key not in state:
                    state[key] = torch.zeros_like(tensor, dtype=values.dtype)
                _own(part, state[key]).copy_(values)
            for key, value in shared.items():
                self._set(tensor, key, value)

    def _set(self, tensor: Tensor, key: str, value: Any) -> None:
        state = self.states.setdefault(tensor, {})
        if not isinstance(value, Tensor):
            state[key] = value
        elif isinstance(state.get(key), Tensor):
            state[key].copy_(value.view_as(state[key]))
        else:                                            # a copy for each: an optimizer increments `step` in place
            same_shape = value.ndim and value.numel() == tensor.numel()
            state[key] = (value.view_as(tensor) if same_shape else value).to(tensor.device, copy=True)


@dataclass(frozen=True)
class _RankFiles:
    """The two files that one rank wrote."""

    weights: Any                           # as safetensors opens it
    states: Any
    parts: dict[str, Part]
    numbers: dict[tuple[int, str], Any]    # state that is no tensor
    names: list[str]                       # of state that is

    @staticmethod
    def open(folder: Path, rank: int, stack: ExitStack) -> _RankFiles:
        weights, states = (stack.enter_context(safetensors.safe_open(folder / _file(what, rank), framework="pt"))
                           for what in (WEIGHTS, STATES))
        index = states.metadata()
        return _RankFiles(weights, states, {name: Part(*part) for name, part in json.loads(index["parts"]).items()},
                          {(i, key): value for i, key, value in json.loads(index["numbers"])}, list(states.keys()))

    def state(self, tensor: int) -> State:
        """All state of a tensor."""
        return {**{key: value for (i, key), value in self.numbers.items() if i == tensor},
                **{key: self.states.get_tensor(f"{tensor}.{key}") for key in self._keys(tensor)}}

    def state_of(self, weight: str) -> tuple[list[str], State]:
        """(the names of state that each element has, state of the tensor as a whole), where this weight lies."""
        tensor = self.parts[weight].tensor
        shape = self.weights.get_slice(str(tensor)).get_shape()
        per_element = [key for key in self._keys(tensor)
                       if self.states.get_slice(f"{tensor}.{key}").get_shape() == shape]
        return per_element, {key: value for key, value in self.state(tensor).items() if key not in per_element}

    def _keys(self, tensor: int) -> list[str]:
        prefix = f"{tensor}."
        return [name.removeprefix(prefix) for name in self.names if name.startswith(prefix)]


def _elements(holders: Sequence[_RankFiles], name: str, suffix: str, part: Part) -> Tensor:
    """The elements of a weight that a part has, or of its state where `suffix` says which, from all files that hold
    some."""
    found, end = [], part.first + part.length
    for files, held in sorted(((files, files.parts[name]) for files in holders), key=lambda one: one[1].first):
        first, last = max(part.first, held.first), min(end, held.first + held.length)
        if first < last:
            file = files.states if suffix else files.weights
            start = held.start + first - held.first
            found.append(file.get_slice(f"{held.tensor}{suffix}")[start:start + last - first])
    return torch.cat(found)


def _own(part: Part, tensor: Tensor) -> Tensor:
    """What a part has of its tensor, flat."""
    return tensor.view(-1)[part.start:part.start + part.length]


def _flat(tensor: Tensor) -> Tensor:
    """As it is in a file: elements of a weight are found by their number."""
    return tensor.detach().reshape(-1) if tensor.ndim else tensor.detach()


def _file(what: str, rank: int) -> str:
    return f"{what}-{rank:05d}.safetensors"


def _ranks(folder: Path) -> int:
    """How many ranks wrote the checkpoint."""
    return len(list(folder.glob(f"{WEIGHTS}-*.safetensors")))
