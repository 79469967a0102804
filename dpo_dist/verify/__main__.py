"""`dpo-dist verify RUN`: is everything that a run's numbers come from still what it was? It writes nothing."""
from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from typing import TextIO

from dpo_dist.config.errors import UserError
from dpo_dist.data.prepare import digests_folder
from dpo_dist.run.provenance.kept import Kept
from dpo_dist.runtime.hub_commits import pin
from dpo_dist.runtime.run_dir import WRITTEN_ANEW, RunDir
from dpo_dist.verify.configuration import check_config, check_kept, config_of, read_run
from dpo_dist.verify.finding import Finding, lines
from dpo_dist.verify.made_by import check_made_by
from dpo_dist.verify.pairs import check_pairs, decided, made_again, unchanged
from dpo_dist.verify.rows import data_set_changes
from dpo_dist.verify.texts import text_changes
from dpo_dist.verify.weights import check_exports, check_models, check_parent

EXIT_CODES = """exit code: 0 where all that decides the weights and the held-out figures, and what was exported, is the
same; 1 where something changed or is missing; 2 for a mistake, such as a folder without a run.

--json: {"run", "same", "findings": [{"status", "what", "says", "means", "details"}]}

same: as it was.  harmless: changed, without an effect on the numbers.  told: changed, and no digest can say what it
does (code, library versions, machine).  changed, missing: the run's numbers no longer come from this."""


def main(words: Sequence[str], out: TextIO) -> int:
    """Exit code: 0, 1 where something changed or is missing, 2 for a user's mistake."""
    parser = argparse.ArgumentParser(prog="dpo-dist verify", description=__doc__, epilog=EXIT_CODES,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="the run.dir of a run")
    parser.add_argument("--json", action="store_true", help="for a program: one object with `same` and `findings`")
    parser.add_argument("--pairs", action="store_true",
                        help="tokenize the rows again even where files, tokenizer and template are the same")
    parser.add_argument("--quick", action="store_true",
                        help="believe digests in data.cache_dir of files whose size and time stamps are the same, "
                             "instead of reading them")
    options = parser.parse_args(words)
    os.environ["HF_HUB_OFFLINE"] = "1"                   # read when Hugging Face's libraries are imported
    try:
        with contextlib.redirect_stdout(sys.stderr):
            run_dir = RunDir(options.run.removeprefix("run.dir="))
            pin(run_dir.hub_commits())
            found = verify(run_dir, options.pairs, options.quick)
    except (UserError, OSError) as error:    # OSError: of a folder that may not be looked at, or a disk that is full
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (LookupError, TypeError, AttributeError) as error:
        print(f"error: a file of {options.run}, most likely run.json, is not as dpo-dist writes it "
              f"({type(error).__name__}: {error}); {WRITTEN_ANEW}", file=sys.stderr)
        return 2
    same = not any(finding.fails for finding in found)
    if options.json:
        findings = [finding.plain() for finding in found]
        print(json.dumps({"run": options.run, "same": same, "findings": findings}, indent=2), file=out)
    else:
        print("\n".join([*lines(found), "", _verdict(found)]), file=out)
    return 0 if same else 1


def verify(run_dir: RunDir, pairs: bool, quick: bool) -> list[Finding]:
    """All findings, in the order of a run. UserError where there is no run."""
    run = read_run(run_dir)
    config, problem = config_of(run)
    kept, found = check_kept(run, Kept.read(run_dir))
    memory = digests_folder(config.data) if quick else None
    models = [*check_models(run, config, kept, memory)]  # first: it may need torch, which the tokenizer can do without
    data, texts = data_set_changes(run, config, kept, memory), [*text_changes(run_dir, run, config, kept)]
    again = pairs or any(change.became != "same" for change in (*data, *texts))
    splits = decided([*data, *texts], made_again(run, config, kept), run) if again else unchanged(run)
    best = config.train.keep_best
    return [*check_config(run, config, problem, kept), *found, *models,
            *(change.finding(splits, best) for change in (*texts, *data)),
            *check_pairs(splits, again, best), *check_exports(run_dir, kept), *check_parent(run, config),
            *check_made_by(run, kept, again)]


def _verdict(found: Sequence[Finding]) -> str:
    wrong = [finding.what for finding in found if finding.fails]
    if wrong:
        return f"not the same: {', '.join(wrong)}"
    told = [finding.what for finding in found if finding.status == "told"]
    return "the same: all that decides the weights and the held-out figures" + (
        f" (told besides: {', '.join(told)})" if told else "")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], sys.stdout))
