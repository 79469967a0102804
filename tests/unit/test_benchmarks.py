"""What the documents say of the benchmarks is what the committed results say."""
from __future__ import annotations

import subprocess
import sys

from conftest import REPO


def test_the_readmes_tables_are_those_of_the_committed_results():
    done = subprocess.run([sys.executable, "benchmarks/tables.py", "--check"], cwd=REPO)
    assert done.returncode == 0, "run benchmarks/tables.py"


def test_every_difference_to_trls_tokens_is_judged():
    assert "completions as generated" in (text := (REPO / "README.md").read_text()) and "not judged" not in text
