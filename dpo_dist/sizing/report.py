"""What `dpo-dist plan` says of sizes: predictions and, if memory runs out, the smallest change that fits. No torch
here."""
from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dpo_dist.config.adapter import local_folders
from dpo_dist.config.errors import UserError
from dpo_dist.config.options import TOKENS, deciding, override
from dpo_dist.config.schema import RunConfig, with_keys
from dpo_dist.runtime.checksums import damage
from dpo_dist.sizing.automatic import choose
from dpo_dist.sizing.estimate import GIB, Memory, cache_bytes, memory, scoring_memory
from dpo_dist.sizing.hardware import CPU, GPU_80GB, Hardware
from dpo_dist.sizing.lengths import Lengths, worst_lengths
from dpo_dist.sizing.one_process import one_process_line
from dpo_dist.sizing.shape import ModelShape, read_shape
from dpo_dist.sizing.step_time import scoring_seconds, step_time

MOST_NODES = 1024


class Change(NamedTuple):
    """One or several keys' new values, and what they cost."""

    words: tuple[str, ...]
    config: RunConfig
    nodes: int


def sizing_lines(config: RunConfig, procs_per_node: int) -> list[str]:
    """The lines that `plan` shows; one line with the reason where sizes cannot be predicted."""
    try:
        shape = read_shape(*local_folders(config.model.path, "model.path"))
    except UserError as error:
        return [f"sizes     not predicted: {error}"]
    nodes = config.cluster.nodes
    device = CPU if config.cluster.device == "cpu" else GPU_80GB
    return report(config, shape, token_lengths(config), Hardware(nodes, nodes * procs_per_node, device))


def report(config: RunConfig, shape: ModelShape, lengths: Lengths, world: Hardware) -> list[str]:
    """Memory, time and communication of a run, line by line; pure."""
    chosen = choose(config, shape, lengths, world)
    config = chosen.config
    need, time = memory(config, shape, lengths, world), step_time(config, shape, lengths, world)
    moment, peak = max(need.moments.items(), key=lambda entry: entry[1])
    shown = [f"{name.replace('_', ' ')} {value / GIB:.2f}" for name, value in vars(need).items() if value]
    unproven = "" if world.device.measured else "; never held against a GPU's own figures"
    lines = [
        f"model     {shape.parameters / 1e9:.2f} B parameters ({shape.model_type}), {world.ranks} ranks on "
        f"{world.nodes} nodes",
        f"tokens    {lengths.pair:.0f} a pair; {lengths.source}",
        *([f"chosen    {chosen.line}"] if chosen.line else []),
        f"memory    {peak / GIB:.2f} GiB a rank, when {moment}{unproven}",
        f"          GiB: {', '.join(shown)}",
        f"step      {time.seconds:.3g} s: computing {time.compute:.3g}, communication {time.communication:.3g}"
        + (" (behind it)" if time.overlaps else "") + f", update {time.update:.3g}; {time.sent / GIB:.3g} GiB sent by "
                                                      "a rank",
        f"assumed   {world.device.name}: {world.device.flops / 1e12:.4g} TFLOP/s at {world.device.efficiency:.0%}, "
        f"{world.link / 1e9:.3g} GB/s between ranks, {world.device.bandwidth / 1e9:.4g} GB/s of memory"]
    seconds, stored = scoring_seconds(config, shape, lengths, world), cache_bytes(lengths)
    scores = config.loss.needs_reference and config.reference.mode != "live"
    scorer = scoring_memory(config, shape, lengths, world)               # bytes of a rank that scores
    if scores:
        lines.append(f"scoring   {scorer / GIB:.2f} GiB a rank; " + (
            f"{seconds:.3g} s on all ranks, cache {stored / 2**20:.3g} MiB" if seconds is not None
            and stored is not None
            else "time and cache size need the number of pairs, known once the data is tokenized"))
    if faster := one_process_line(config, shape, lengths, world):
        lines.append(f"faster    {faster}")
    if not need.fits(world.device):
        lines += too_large(config, shape, lengths, world, need)
    if scores and not config.reference.outside and scorer > world.device.memory:
        lines.append(f"scoring does not fit with reference.engine={config.reference.engine}; set "
                     f"{config.reference.needs_less}")
    return lines


def too_large(config: RunConfig, shape: ModelShape, lengths: Lengths, world: Hardware, need: Memory) -> list[str]:
    """What does not fit, and the smallest change that does."""
    def sizes(need: Memory) -> str:
        return f"{need.peak / 1e9:.0f} GB a rank" + (f" and {need.host / 1e9:.0f} of the host" if need.host else "")

    device = world.device
    too_much = (f"does not fit: {sizes(need)}, but there are {device.memory / 1e9:.0f} and "
                f"{device.host_memory / 1e9:.0f} of the host")
    change = smallest_change(config, shape, lengths, world)
    if change is None:
        return [too_much, f"nothing that is known here makes it fit on {MOST_NODES} nodes or fewer"]
    wider = replace(world, nodes=change.nodes, ranks=world.ranks // world.nodes * change.nodes)
    return [too_much, f"fits with {' '.join(change.words)}: {sizes(memory(change.config, shape, lengths, wider))}"]


def smallest_change(config: RunConfig, shape: ModelShape, lengths: Lengths, world: Hardware) -> Change | None:
    """The change of the fewest keys that fits; among these the one with the shortest predicted step. More nodes come
    last."""
    a_node, nodes = world.ranks // world.nodes, world.nodes
    while nodes <= MOST_NODES:
        wider = replace(world, nodes=nodes, ranks=a_node * nodes)
        more = (f"cluster.nodes={nodes}",) if nodes > world.nodes else ()
        for candidates in _changes(config, lengths):
            fitting = [(words, changed) for words, changed in candidates
                       if memory(changed, shape, lengths, wider).fits(world.device)]
            if fitting:
                words, best = min(fitting, key=lambda entry: step_time(entry[1], shape, lengths, wider).seconds)
                return Change((*words, *more), best, nodes)
        nodes *= 2
    return None


def _changes(config: RunConfig, lengths: Lengths) -> Iterator[list[tuple[tuple[str, ...], RunConfig]]]:
    """For each number of keys, from none up: every way to change as many, as (overrides, config)."""
    single = _single_changes(config, lengths)
    for size in range(len(dict(single)) + 1):
        found = []
        for chosen in combinations(single, size):
            changed = with_keys(config, dict(chosen))
            if len(dict(chosen)) == size and _allowed(changed):          # each key once
                found.append((tuple(override(key, value) for key, value in chosen), changed))
        yield found


def _allowed(config: RunConfig) -> bool:
    """What rules.py says of these keys."""
    zero = config.zero
    return ((zero.offload_parameters == "none" or zero.stage == 3)
            and (zero.offload_optimizer == "none" or zero.stage not in (None, 0)))


def _single_changes(config: RunConfig, lengths: Lengths) -> list[tuple[str, Any]]:
    """(key, value) of each change that makes room; a key may have several values."""
    changes: list[tuple[str, Any]] = [
        ("zero.stage", stage) for stage in (1, 2, 3) if stage > (config.zero.chosen_stage or 0)]
    fewer = config.train.tokens_per_microbatch // 2
    while fewer >= lengths.pair:
        changes.append(("train.tokens_per_microbatch", fewer))
        fewer //= 2
    if config.model.gradient_checkpointing is False:
        changes.append(("model.gradient_checkpointing", 0))
    if config.model.gradient_checkpointing is not True:
        changes.append(("model.gradient_checkpointing", True))
    changes += [(f"zero.{key}", "cpu") for key in ("offload_optimizer", "offload_parameters")
                if getattr(config.zero, key) == "none"]
    return changes


def token_lengths(config: RunConfig) -> Lengths:
    """Means over the pairs last tokenized with these keys, if data.cache_dir has any; else the worst case."""
    stores = [file for file in Path(config.data.cache_dir).glob("*/asked.json") if ".tmp-" not in file.parent.name]
    for file in sorted(stores, key=lambda file: file.stat().st_mtime, reverse=True):
        if damage(file.parent, files=(file.name, "train/spans.npy").__contains__):
            continue                                     # the next run tokenizes again
        spans = np.load(file.parent / "train" / "spans.npy", mmap_mode="r")
        if len(spans) and json.loads(file.read_text()) == deciding(config.data, TOKENS):
            prompt, chosen, rejected = np.diff(spans, axis=1).mean(0).tolist()
            return Lengths(prompt, chosen, rejected, len(spans), f"mean of {len(spans):,} tokenized pairs")
    return worst_lengths(config.data.max_length)
