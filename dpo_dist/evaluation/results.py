"""What evaluations leave in a run's folder: evaluations/step-NNNNNN.parquet and evaluation.json."""
from __future__ import annotations

from dpo_dist.config.schema import LossConfig
from dpo_dist.evaluation.facts import Facts
from dpo_dist.evaluation.pairs import EvaluatedPairs
from dpo_dist.evaluation.summary import Summary, summarize
from dpo_dist.runtime.files import write_json
from dpo_dist.runtime.json_files import found_sealed, sealed
from dpo_dist.runtime.run_dir import RunDir


def keep_evaluation(run_dir: RunDir, step: int, pairs: EvaluatedPairs, facts: Facts, loss: LossConfig,
                    moves: bool = False, kl: Summary | None = None) -> Summary:
    """Writes both, and returns the summary. An evaluation that is made again takes the earlier one's place, and those
    of later steps go: they will be made again too. moves: the reference follows the policy (TR-DPO)."""
    for path in run_dir.evaluations.glob("step-*.parquet"):
        if path > run_dir.evaluation(step):
            path.unlink()
    pairs.write(run_dir.evaluation(step))
    needs_start = (moves or not loss.needs_reference) and step > 0
    start = EvaluatedPairs.read(run_dir.evaluation(0)) if needs_start else None
    summary = summarize(step, pairs, facts, loss, start, kl)
    earlier = [one for one in read_summaries(run_dir) if one["step"] < step]
    write_json(run_dir.evaluation_json, sealed({"evaluations": [*earlier, summary]}))
    return summary


def read_summaries(run_dir: RunDir) -> list[Summary]:
    """The summaries of a run's evaluations, by step; none before the first, or where
    the file is damaged."""
    found = (found_sealed(run_dir.evaluation_json) or {}).get("evaluations")
    return [one for one in found if isinstance(one, dict) and isinstance(one.get("step"), int)] if isinstance(
        found, list) else []
