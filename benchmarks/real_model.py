"""Whole runs of a real model beside TRL's, on the CPU: real_model.py --model FOLDER --data FILE [options].

The same model, rows, order, steps and hyper-parameters from the same start, in fp32; each run a fresh process with
empty caches, from the command to the exported model; the variants in turn, in the other order at every second round.
Which of TRL's settings is the fastest here is tried first, on three steps each with a live reference: pairs at once
(the rest by accumulation), one process with all cores or DDP over two. Not tried: padding_free, which TRL 1.16 switches
off for DPO; gradient checkpointing, which only costs time here; workers for rows that are token ids already. Beside it
stands what TRL does with its default of 8 pairs at once. What single runs export is judged by `dpo-dist eval` on
held-out pairs.

Each finished run is written to benchmarks/results/real_model.json at once; the same command goes on where it stopped.
"""
from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from whole_run import whole_run

from dpo_dist.config.compose import compose
from dpo_dist.runtime.ports import free_port

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "real_model.json"
BETAS, RATES = (0.05, 0.1, 0.3), (1e-6, 3e-6)
CORES = len(os.sched_getaffinity(0))
TRLS_DEFAULT = 8                                             # pairs at once: TrainingArguments' batch size a device
RATIOS = {"TRL, live reference / ours": ("TRL live", "ours"),
          "TRL, precomputed / ours": ("TRL precomputed", "ours"),
          "TRL, live reference / ours, 2 processes under ZeRO-3": ("TRL live", "ours ZeRO-3"),
          "TRL, precomputed / ours, 2 processes under ZeRO-3": ("TRL precomputed", "ours ZeRO-3"),
          "TRL, live reference, 8 pairs at once / ours": ("TRL live, 8 at once", "ours"),
          "TRL, precomputed, 8 pairs at once / ours": ("TRL precomputed, 8 at once", "ours"),
          "TRL, live reference, 8 pairs at once / ours, 2 processes under ZeRO-3": ("TRL live, 8 at once",
                                                                                    "ours ZeRO-3"),
          "TRL, precomputed, 8 pairs at once / ours, 2 processes under ZeRO-3": ("TRL precomputed, 8 at once",
                                                                                 "ours ZeRO-3"),
          "six runs of TRL, precomputed / our sweep": ("TRL sweep", "ours sweep")}


class Bench:
    """A place for rows and runs, and the results so far."""

    def __init__(self, given: argparse.Namespace, home: Path):
        self.given, self.home, self.model = given, home, given.model.resolve()
        self.setup = {"pairs": given.steps * given.pairs_per_step, "held_out": given.held_out, "steps": given.steps,
                      "pairs_per_step": given.pairs_per_step, "longest": given.longest, "cores": CORES,
                      "model": json.loads((self.model / "config.json").read_text())["model_type"]}
        found = json.loads(given.out.read_text()) if given.out.exists() else {}
        self.results = found if found.get("setup") == self.setup else {"setup": self.setup}
        self.results.setdefault("rounds", {})

    def keep(self, at: dict[str, Any], name: str, make: Callable[[], Any]) -> Any:
        """at[name], made and written to the results if it is not there."""
        if name not in at:
            at[name] = make()
            self.results["summary"] = summary(self.results["rounds"])
            self.given.out.write_text(json.dumps(self.results, indent=2) + "\n")
            print(name, json.dumps(at[name]), flush=True)
        return at[name]

    def write_rows(self) -> None:
        """rows.jsonl and held_out.jsonl, the first rows of the data that are short enough, as token ids; ordered.jsonl,
        those trained on as our run orders them."""
        from dpo_dist.data.prepare import prepare
        from dpo_dist.data.sampler import make_sampler

        words = [f"model.path={self.model}", "data.on_bad_row=skip", f"data.cache_dir={self.home / 'made'}"]
        pairs = prepare(compose([*words, f"data.train={self.given.data.resolve()}"]).data, _tokenizer(self.model),
                        None)[0]
        short = [i for i in range(len(pairs)) if _length(pairs[i]) <= self.given.longest]
        count = self.setup["pairs"]
        if len(short) < count + self.given.held_out:
            sys.exit(f"only {len(short)} pairs have at most {self.given.longest} tokens; raise --longest")
        _write(self.home / "rows.jsonl", [pairs[i] for i in short[:count]])
        _write(self.home / "held_out.jsonl", [pairs[i] for i in short[count:count + self.given.held_out]])
        config = compose([*words, *self.training()])
        pairs = prepare(config.data, None, None)[0]
        sampler = make_sampler(pairs, config.train, config.data.group_by_prompt)
        order = [i for step in range(self.given.steps) for i in sampler.pairs_of_step(step + 1, 1, self.given.steps)]
        _write(self.home / "ordered.jsonl", [pairs[int(i)] for i in order])
        self.results["tokens"] = sum(_length(pairs[int(i)]) for i in order)
        self.results["tokens_as_two_sequences"] = sum(_length(pairs[int(i)]) + len(pairs[int(i)].prompt_ids)
                                                      for i in order)

    def training(self) -> list[str]:
        return [f"data.train=[{{path: {self.home / 'rows.jsonl'}, format: token_ids}}]",
                f"train.pairs_per_step={self.given.pairs_per_step}", f"train.max_steps={self.given.steps}"]

    def ours(self, folder: Path, *words: str, processes: int = 1, sweep: bool = False) -> dict[str, Any]:
        common = [f"model.path={self.model}", *self.training(), "model.dtype=fp32", "cluster.device=cpu",
                  f"cluster.procs_per_node={processes}", f"zero={'none' if processes == 1 else 'zero3'}",
                  "optim.schedule=constant", "optim.warmup_ratio=0", f"data.cache_dir={folder}/tokens",
                  f"reference.cache_dir={folder}/reference", f"run.dir={folder}/run"]
        figures: dict[str, Any] = whole_run([*_dpo_dist("run"), *(["-m"] if sweep else []), *common, *words],
                                            folder / "log")
        if sweep:
            return figures
        rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        return {**figures, "losses": [row["loss"] for row in rows if row["split"] == "train"],
                **self.judged(folder / "run" / "model", folder)}

    def trl(self, folder: Path, setting: dict[str, int], precomputed: bool, beta: float, lr: float,
            steps: int | None = None, swept_in: Path | None = None) -> dict[str, Any]:
        settings = {"model": str(self.model), "rows": str(self.home / "ordered.jsonl"), "out": str(folder / "model"),
                    "report": str(folder / "report.json"), "steps": steps or self.given.steps, "beta": beta, "lr": lr,
                    "pairs_per_step": self.given.pairs_per_step, "precomputed": precomputed,
                    "pairs_at_once": setting["pairs_at_once"],
                    "held_out": str(self.home / "held_out.jsonl") if swept_in else None}
        (folder / "settings.json").write_text(json.dumps(settings))
        processes = setting["processes"]
        words = [sys.executable, *(["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--master-port",
                                    str(free_port())] if processes > 1 else []),
                 HERE / "run_trl_whole.py", folder / "settings.json"]
        figures = whole_run(words, folder / "log", OMP_NUM_THREADS=str(max(1, CORES // processes)),
                            HF_HOME=str((swept_in or folder) / "cache"), HF_HUB_OFFLINE="1")
        return {**figures, **json.loads((folder / "report.json").read_text())}

    def judged(self, model: Path, folder: Path) -> dict[str, float]:
        """What `dpo-dist eval` says of an exported model, by the starting model as the reference."""
        whole_run([*_dpo_dist("eval"), f"model.path={model}", f"reference.path={self.model}", "model.dtype=fp32",
                   f"data.eval=[{{path: {self.home / 'held_out.jsonl'}, format: token_ids}}]", "zero=none",
                   "cluster.device=cpu", f"data.cache_dir={folder}/judge", f"reference.cache_dir={self.home}/judge",
                   f"run.dir={folder}/judged"], folder / "judge.log")
        means = json.loads((folder / "judged" / "eval.json").read_text())
        return {"held_out_accuracy": means["rewards/accuracies"], "held_out_loss": means["loss"]}

    def tried(self) -> dict[str, int]:
        """TRL's fastest setting here, by the faster of its second and third step (the first one allocates)."""
        per_step, found = self.given.pairs_per_step, self.results.setdefault("TRL's settings, seconds of a step", {})
        settings = [{"processes": processes, "pairs_at_once": at_once} for processes in sorted({1, min(2, CORES)})
                    for at_once in (8, 4, 2, 1) if per_step % (at_once * processes) == 0]
        for setting in settings:
            name = f"{setting['processes']} processes, {setting['pairs_at_once']} pairs at once"
            self.keep(found, name, lambda setting=setting: round(min(self.fresh(
                lambda folder: self.trl(folder, setting, False, 0.1, 1e-6, steps=3))["step_seconds"][1:]), 2))
        best = min(found, key=found.get)
        return next(s for s in settings if best.startswith(f"{s['processes']} processes, {s['pairs_at_once']} "))

    def fresh(self, run: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """What a run gives in a folder of its own, which is removed."""
        with tempfile.TemporaryDirectory(dir=self.home) as folder:
            return run(Path(folder))

    def variants(self, setting: dict[str, int]) -> dict[str, Callable[[Path], dict[str, Any]]]:
        def trl(folder: Path, precomputed: bool, setting: dict[str, int] = setting) -> dict[str, Any]:
            run = self.trl(folder, setting, precomputed, 0.1, 1e-6)
            return {**run, **self.judged(folder / "model", folder)}

        def six(folder: Path) -> dict[str, Any]:
            runs = []
            for i, (beta, lr) in enumerate(itertools.product(BETAS, RATES)):
                (place := folder / str(i)).mkdir()
                runs.append(self.trl(place, setting, True, beta, lr, swept_in=folder))
                shutil.rmtree(place)
            return {"seconds": round(sum(run["seconds"] for run in runs), 1),
                    "processor_seconds": round(sum(run["processor_seconds"] for run in runs), 1),
                    "peak_gib": max(run["peak_gib"] for run in runs)}

        one = ("loss.beta=0.1", "optim.lr=1e-6")
        default = {"processes": 1, "pairs_at_once": TRLS_DEFAULT}
        # the runs of a sweep are compared on held-out pairs, in both
        swept = (f"loss.beta={','.join(map(str, BETAS))}", f"optim.lr={','.join(map(str, RATES))}",
                 f"data.eval=[{{path: {self.home / 'held_out.jsonl'}, format: token_ids}}]")
        return {"ours": lambda folder: self.ours(folder, *one),
                "TRL precomputed": lambda folder: trl(folder, True),
                "ours ZeRO-3": lambda folder: self.ours(folder, *one, processes=2),
                "TRL live": lambda folder: trl(folder, False),
                "TRL precomputed, 8 at once": lambda folder: trl(folder, True, default),
                "TRL live, 8 at once": lambda folder: trl(folder, False, default),
                "ours sweep": lambda folder: self.ours(folder, *swept, sweep=True),
                "TRL sweep": six}


def summary(rounds: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds in which both of a pair were run: the ratios of their seconds and of their memory; the
    largest difference of their losses."""
    found: dict[str, Any] = {}
    for name, (theirs, ours) in RATIOS.items():
        both = [(one[theirs], one[ours]) for one in rounds.values() if theirs in one and ours in one]
        if not both:
            continue
        found[name] = {what: round(statistics.median(a[what] / b[what] for a, b in both), 2)
                       for what in ("seconds", "processor_seconds", "peak_gib")}
        if "losses" in both[0][0]:
            found[name]["losses apart"] = max(abs(x - y) for a, b in both
                                              for x, y in zip(a["losses"], b["losses"], strict=True))
    return found


def _dpo_dist(verb: str) -> list[str]:
    return [sys.executable, "-m", "dpo_dist.launcher.cli", verb]


def _tokenizer(folder: Path) -> Any:
    from dpo_dist.models.tokenizer import load_tokenizer

    return load_tokenizer(folder)


def _length(pair: Any) -> int:
    return len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids)


def _write(path: Path, pairs: list[Any]) -> None:
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    path.write_text("".join(json.dumps({name: list(map(int, getattr(pair, name))) for name in names}) + "\n"
                            for pair in pairs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the model's folder")
    parser.add_argument("--data", type=Path, required=True, help="preference rows, of a format that is told from them")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--pairs-per-step", type=int, default=8)
    parser.add_argument("--held-out", type=int, default=100, help="pairs that both exported models are judged on")
    parser.add_argument("--longest", type=int, default=256, help="tokens of the longest pair that is taken")
    parser.add_argument("--rounds", type=int, default=1, help="a round takes well over an hour on two cores")
    parser.add_argument("--only", nargs="*", help="variants to run, as they are named in the results")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    if given.pairs_per_step % TRLS_DEFAULT:
        parser.error(f"--pairs-per-step {given.pairs_per_step} is no multiple of {TRLS_DEFAULT}, the pairs that TRL "
                     f"takes at once by default; give {TRLS_DEFAULT}, {2 * TRLS_DEFAULT}, ...")
    with tempfile.TemporaryDirectory() as home:
        bench = Bench(given, Path(home))
        bench.write_rows()
        setting = bench.tried() if given.only is None or any("TRL" in name for name in given.only) else {}
        for number in range(given.rounds):
            done = bench.results["rounds"].setdefault(str(number), {})
            variants = list(bench.variants(setting).items())
            for name, run in variants if number % 2 == 0 else variants[::-1]:
                if given.only is None or name in given.only:
                    bench.keep(done, name, lambda run=run: bench.fresh(run))
    print(json.dumps(bench.results.get("summary", {}), indent=2))


if __name__ == "__main__":
    main()
