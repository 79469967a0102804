"""`dpo-dist report RUN [RUN ...]`: makes report.html, any time, also while a run is under way."""
from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dpo_dist.config.errors import UserError
from dpo_dist.report.write import write_report


def main(words: Sequence[str]) -> int:
    """Exit code: 0, or 2 for a user's mistake."""
    parser = argparse.ArgumentParser(
        prog="dpo-dist report", description="One HTML file about a run or a sweep, or about several runs side by side, "
        "and beside it the numbers as JSON.")
    parser.add_argument("folders", nargs="+", metavar="RUN", help="the run.dir of a run or a sweep; several runs: side "
                        "by side")
    parser.add_argument("--to", type=Path, metavar="FILE", help="where to write it: else report.html in the folder, or "
                        "for several runs in the current one")
    options = parser.parse_args(words)
    try:
        print(f"report: {write_report(options.folders, options.to)}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: the report cannot be written: {error}; give a file that can, with --to FILE", file=sys.stderr)
        return 2
    except (LookupError, TypeError, ValueError, ArithmeticError) as error:
        print(f"error: a file in {' or '.join(options.folders)} is not as dpo-dist writes it, so there is nothing to "
              f"report ({type(error).__name__}: {error}); dpo-dist verify looks at them one by one", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
