"""What evaluations leave in a run's folder: evaluations/step-NNNNNN.parquet and evaluation.json."""
from __future__ import annotations

from dpo_dist.config.schema import LossConfig
from dpo_dist.data.store import PairStore
from dpo_dist.evaluation.facts import Facts
from dpo_dist.evaluation.pairs import EvaluatedPairs
from dpo_dist.evaluation.summary import Summary, summarize
from dpo_dist.runtime.files import write_json
from dpo_dist.runtime.json_files import found_sealed, sealed
from dpo_dist.runtime.run_dir import RunDir, by_step


def keep_evaluation(run_dir: RunDir, step: int, pairs: EvaluatedPairs, facts: Facts, loss: LossConfig,
                    moves: bool = False, kl: Summary | None = None) -> Summary:
    """Writes both, and returns the summary. An evaluation that is made again takes the earlier one's place, and those
    of later steps go: they will be made again too. moves: the reference follows the policy (TR-DPO)."""
    for later, path in by_step(run_dir.evaluations.glob("*.parquet")).items():
        if later > step:
            path.unlink()
    pairs.write(run_dir.evaluation(step))
    summary = summarize(step, pairs, facts, loss, _start(run_dir, step, loss, moves), kl)
    _write(run_dir, [*(one for one in read_summaries(run_dir) if one["step"] < step), summary])
    return summary


def mend_summaries(run_dir: RunDir, until: int, held_out: PairStore, loss: LossConfig, moves: bool) -> str | None:
    """Makes summaries up to a step that evaluation.json lacks again, from what each evaluation measured of each pair,
    but for the KL of samples; what a person is told of it. None where nothing is lacking."""
    known = {one["step"]: one for one in read_summaries(run_dir)}
    lacking = {step: pairs for step, path in by_step(run_dir.evaluations.glob("*.parquet")).items()
               if step <= until and step not in known
               and (pairs := EvaluatedPairs.read(path)) is not None and len(pairs) == len(held_out)}
    if not lacking:
        return None
    facts = Facts.of(held_out)
    known |= {step: summarize(step, pairs, facts, loss, _start(run_dir, step, loss, moves), None)
              for step, pairs in lacking.items()}
    _write(run_dir, [known[step] for step in sorted(known)])
    return (f"{run_dir.evaluation_json.name} was damaged or missing: what it said of "
            f"{', '.join(f'step {step}' for step in sorted(lacking))} is made again, but for the KL of samples")


def _start(run_dir: RunDir, step: int, loss: LossConfig, moves: bool) -> EvaluatedPairs | None:
    """The evaluation before training, where a later one is compared with it."""
    return EvaluatedPairs.read(run_dir.evaluation(0)) if (moves or not loss.needs_reference) and step > 0 else None


def _write(run_dir: RunDir, summaries: list[Summary]) -> None:
    write_json(run_dir.evaluation_json, sealed({"evaluations": summaries}))


def read_summaries(run_dir: RunDir) -> list[Summary]:
    """The summaries of a run's evaluations, by step; none before the first, or where the file is damaged."""
    found = (found_sealed(run_dir.evaluation_json) or {}).get("evaluations")
    return [one for one in found if isinstance(one, dict) and isinstance(one.get("step"), int)] if isinstance(
        found, list) else []
