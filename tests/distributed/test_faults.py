"""A small fault campaign (`make faults` has a large one): whatever happens to a run, the same command ends in the
undisturbed weights, or says what stands in its way."""
from __future__ import annotations

import pytest
from faults import campaign, report
from faults.kinds import KINDS, LONG

pytestmark = pytest.mark.distributed

TRIALS, SEED = 20, 0


@pytest.mark.slow
def test_twenty_faults_are_survived_or_explained():
    kinds = [name for name, kind in KINDS.items() if not kind.needs and name not in LONG]
    ended = campaign.run(campaign.drawn(TRIALS, kinds), SEED, lanes=2, show=lambda one: None, among=("zero3", "one"))
    failed = [report.line(one) for one in ended if not one.verdict.fine]
    assert not failed, "\n".join(failed)
