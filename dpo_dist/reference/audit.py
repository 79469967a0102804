"""The parity audit: before values of an engine outside the training stack are used, the training stack rescores a
sample.

Every server scores the sample twice, in different orders and batches: values that depend on a sequence's place in a
request, or on earlier requests, differ in one of them.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from dpo_dist.config.errors import UserError
from dpo_dist.config.reference import AuditConfig, OutsideConfig
from dpo_dist.config.schema import RunConfig
from dpo_dist.data.pack import Sequences, pack_sequences
from dpo_dist.data.packing import filled_in_turn
from dpo_dist.data.store import PairStore, PairStores
from dpo_dist.reference import ReferenceEngine
from dpo_dist.reference.cache.store import ReferenceKey
from dpo_dist.runtime.files import write_json
from dpo_dist.runtime.json_files import SEAL, found_sealed, sealed
from dpo_dist.runtime.run_dir import RunDir
from dpo_dist.runtime.terminal import Terminal
from dpo_dist.runtime.world import World
from dpo_dist.types import TokenizedPair

# fp32: three times the worst that vLLM 0.32 showed on tiny models whose own fp32 forward is as far from their fp64 one
# (8e-5 a token). bf16: both engines round; 0.02 a token and up to 0.8 a completion is what bf16 is from fp32 in either.
BOUNDS = {
    torch.float32: {"token_mean": 2e-5, "token_max": 2e-4, "sequence_max": 2e-3, "margin_max": 1e-3},
    torch.bfloat16: {"token_mean": 0.05, "token_max": 1.0, "sequence_max": 2.5, "margin_max": 0.5},
}
WORST_SHOWN = 5
FILE = "parity.json"
Logps = dict[tuple[tuple[int, ...], tuple[int, ...]], np.ndarray]


@dataclass(frozen=True)
class PairError:
    """How far a pair's values are from the oracle's, nats: its worst token, its worse completion's sum, its margin."""

    where: str
    token: float
    sequence: float
    margin: float


@dataclass(frozen=True)
class Parity:
    """What an audit found: |engine - oracle| in nats; margins are chosen minus rejected, before beta. Of all completion
    tokens, as the cache holds them, whichever of them a loss counts."""

    engine: str                          # the recipe of the values
    oracle: str
    servers: int
    pairs: int
    tokens: int                          # of the sample; each was scored twice by every server
    token_mean: float
    token_max: float
    sequence_mean: float
    sequence_max: float
    margin_mean: float
    margin_max: float
    worst: tuple[PairError, ...]


def audit(config: RunConfig, key: ReferenceKey, dtype: torch.dtype, engines: Sequence[ReferenceEngine],
          open_oracle: Callable[[], ReferenceEngine], data_sets: Sequence[PairStore], world: World,
          terminal: Terminal) -> None:
    """Compares each engine with the oracle; UserError over a bound. All ranks call it: all run the oracle, which may be
    sharded, and rank 0 asks the engines. The figures go to <run.dir>/parity.json, and beside the values of a cache.
    """
    settings = _settings(config)
    sample = sample_pairs(data_sets, settings.pairs)
    oracle = open_oracle()
    wanted = _scored(oracle, by_prompt(sample), config.train.tokens_per_microbatch)
    oracle.close()

    def judge() -> None:
        found = [_scored(engine, order(sample), config.train.tokens_per_microbatch // part)
                 for engine in engines for part, order in ((1, by_prompt), (3, one_by_one))]
        parity = compare(sample, wanted, found, key.recipe, settings.oracle, len(engines))
        _report(parity, config, key, dtype, terminal)

    world.on_main(judge)


def believe_earlier_audit(config: RunConfig, key: ReferenceKey, dtype: torch.dtype, terminal: Terminal) -> None:
    """For values that are all in the cache: the audit that preceded them must be within this run's bounds too."""
    kept = _beside_values(config, key)
    if not kept.exists():
        raise UserError(f"reference.cache_dir={config.reference.cache_dir} holds values of '{key.recipe}' without the "
                        f"audit that preceded them ({kept} is missing); remove {kept.parent}, and they are scored "
                        "again")
    raw = found_sealed(kept)
    if raw is None:
        raise UserError(f"{kept} is damaged, and with it the audit of the values beside it; remove {kept.parent}, and "
                        "they are scored again")
    raw = {**raw, "worst": tuple(PairError(**entry) for entry in raw["worst"])}
    _report(Parity(**{name: value for name, value in raw.items() if name != SEAL}), config, key, dtype, terminal)


def sample_pairs(data_sets: Sequence[PairStore], n: int) -> list[TokenizedPair]:
    """n pairs, chosen by content: the longest, up to n/2 that share their prompt, the rest by their hash."""
    content = np.concatenate([pairs.content for pairs in data_sets if len(pairs)])
    lengths = np.concatenate([pairs.lengths() for pairs in data_sets if len(pairs)])
    mixed = content[:, 0] ^ content[:, 1] ^ (content[:, 2] << np.uint64(1))
    by_hash = np.argsort(mixed, kind="stable")
    _, which, count = np.unique(content[:, 0], return_inverse=True, return_counts=True)
    siblings = np.lexsort((mixed, content[:, 0]))
    siblings = siblings[count[which[siblings]] > 1][:n // 2]
    chosen = dict.fromkeys([int(lengths.sum(1).argmax()), *siblings.tolist(), *by_hash[:n].tolist()])
    pairs = PairStores(data_sets)
    return [store[place] for store, place in map(pairs.at, list(chosen)[:n])]


def by_prompt(pairs: Sequence[TokenizedPair]) -> list[Sequences]:
    """The completions of each prompt side by side, as scoring has them."""
    trees: dict[tuple[int, ...], dict[tuple[int, ...], None]] = {}
    for pair in pairs:
        trees.setdefault(pair.prompt_ids, {}).update({pair.chosen_ids: None, pair.rejected_ids: None})
    return [Sequences(prompt, tuple(completions)) for prompt, completions in trees.items()]


def one_by_one(pairs: Sequence[TokenizedPair]) -> list[Sequences]:
    """The same sequences backwards, each after a prompt of its own."""
    return [Sequences(tree.prompt, (completion,)) for tree in reversed(by_prompt(pairs))
            for completion in reversed(tree.completions)]


def compare(pairs: Sequence[TokenizedPair], wanted: Logps, found: Sequence[Logps], engine: str, oracle: str,
            servers: int) -> Parity:
    """The Parity of several scorings of the pairs with the oracle's."""
    # one entry a pair; in the first three an array over all scorings
    tokens, sequences, margins, errors = [], [], [], []
    for pair in pairs:
        # (scorings, tokens) each: the errors of the chosen and of the rejected completion
        chosen, rejected = (np.stack([logps[pair.prompt_ids, ids].astype(np.float64) for logps in found])
                            - wanted[pair.prompt_ids, ids] for ids in (pair.chosen_ids, pair.rejected_ids))
        tokens.append(np.abs(np.hstack([chosen, rejected])).ravel())
        sequences.append(np.abs([chosen.sum(1), rejected.sum(1)]).ravel())
        margins.append(np.abs(chosen.sum(1) - rejected.sum(1)))
        errors.append(PairError(pair.where, *(float(of[-1].max()) for of in (tokens, sequences, margins))))
    worst = sorted(errors, key=lambda e: -e.token)[:WORST_SHOWN]
    token, sequence, margin = map(np.concatenate, (tokens, sequences, margins))
    return Parity(engine, oracle, servers, len(pairs), sum(map(len, wanted.values())), float(token.mean()),
                  float(token.max()), float(sequence.mean()), float(sequence.max()), float(margin.mean()),
                  float(margin.max()), tuple(worst))


def _report(parity: Parity, config: RunConfig, key: ReferenceKey, dtype: torch.dtype, terminal: Terminal) -> None:
    """Shows and keeps the figures. UserError if one is over its bound; the cache then gets no audit."""
    beta = config.loss.beta or 1.0
    measured = {**asdict(parity), "margin_mean": beta * parity.margin_mean, "margin_max": beta * parity.margin_max}
    settings = _settings(config)
    bounds = {name: default if getattr(settings, name) is None else getattr(settings, name)
              for name, default in BOUNDS[dtype].items()}
    shown = {"token": "a token", "sequence": "a completion", "margin": f"a margin, times {beta:g}"}
    rows = [[name, f"{measured[f'{kind}_mean']:.2e}", f"{measured[f'{kind}_max']:.2e}", _shown(bounds, kind)]
            for kind, name in shown.items()]
    terminal.table(f"parity of {parity.engine} with {parity.oracle}: {parity.pairs} pairs, {parity.tokens} tokens, "
                   f"scored twice by {parity.servers} server(s); |error| in nats", ["of", "mean", "worst", "bound"],
                   rows)
    over = [f"{name} {measured[name]:.3g} is over reference.audit.{name}={bound:g}" for name, bound in bounds.items()
            if not measured[name] <= bound]
    write_json(RunDir(config.run_dir).parity_json, {**measured, "beta": beta, "bounds": bounds, "passed": not over})
    if over:
        worst = "; ".join(f"{e.where}: {e.token:.3g} a token, {e.sequence:.3g} a completion, "
                          f"{beta * e.margin:.3g} a margin" for e in parity.worst)
        raise UserError(f"the audit stopped the run before a value was used: {parity.engine} does not agree with "
                        f"{parity.oracle} ({'; '.join(over)}). Worst pairs, in nats: {worst}. Remedy: the servers must "
                        f"hold the weights of reference.path={config.reference_path} in {key.dtype}, without prefix "
                        "caching and quantization; or raise the bound")
    if config.reference.mode != "live":                  # whose values no cache keeps
        write_json(_beside_values(config, key), sealed(asdict(parity)))


def _shown(bounds: dict[str, float], kind: str) -> str:
    return ", ".join(f"{name.removeprefix(kind + '_')} {bound:g}" for name, bound in bounds.items()
                     if name.startswith(kind))


def _settings(config: RunConfig) -> AuditConfig:
    assert isinstance(config.reference, OutsideConfig), "only an engine outside the training stack is audited"
    return config.reference.audit


def _scored(engine: ReferenceEngine, trees: Sequence[Sequences], tokens_per_pack: int) -> Logps:
    sizes = np.array([len(tree.prompt) + sum(map(len, tree.completions)) for tree in trees], dtype=np.int64)
    found: Logps = {}
    for start, end in pairwise(filled_in_turn(sizes, np.ones_like(sizes), tokens_per_pack).tolist()):
        pack = pack_sequences(trees[start:end])
        for (prompt, completion), values in zip(pack.sequences(), pack.split(engine.token_logps(pack).cpu()),
                                                strict=True):
            found[tuple(prompt.tolist()), tuple(completion.tolist())] = values.numpy()
    return found


def _beside_values(config: RunConfig, key: ReferenceKey) -> Path:
    return Path(config.reference.cache_dir) / key.folder / FILE
