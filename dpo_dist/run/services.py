"""What a run needs from outside, looked at before anything is computed: tracker, hub, judge, harness."""
from __future__ import annotations

from dpo_dist.config.schema import RunConfig
from dpo_dist.run.judging import check_judge
from dpo_dist.run.lm_eval import check_harness
from dpo_dist.run.push import check_push
from dpo_dist.run.tracking.make import check_tracker


def check_services(config: RunConfig) -> None:
    """UserError where one of them would fail in the end."""
    check_tracker(config)
    check_push(config)
    check_judge(config.eval.judge)
    check_harness(config.eval.harness)
