"""Triton's kernels compute what torch's operations compute."""
from __future__ import annotations

import interpreter
import pytest

pytestmark = pytest.mark.skipif(interpreter.MISSING, reason="triton is not installed: `make` puts it beside the "
                                                            "environment on x86-64")


def test_the_head_through_its_kernels_equals_the_head_through_torchs_operations():
    interpreter.check("check_head_kernels.py")
