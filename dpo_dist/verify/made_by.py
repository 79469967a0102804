"""Whether the code, the libraries and the machine are those that made the run. What a difference does to the numbers no
digest can say, so it is told, and fails nothing."""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dpo_dist.run.provenance.kept import Kept
from dpo_dist.run.provenance.made_by import (
    code,
    code_files,
    code_in_words,
    cpu_model,
    hardware_in_words,
    ranks_in_words,
    start_in_words,
    version,
)
from dpo_dist.verify.finding import Finding, examples

RENDERS = ("transformers", "tokenizers", "jinja2", "datasets", "pyarrow")


def check_made_by(run: Mapping[str, Any], kept: Kept, pairs_made_again: bool) -> Iterator[Finding]:
    """Findings on code, libraries and hardware."""
    passport = run["passport"]
    yield from _code(passport, kept, pairs_made_again)
    changed = [f"{name} was {was}, is now {now}" for name, was in passport["versions"].items()
               if name != "dpo-dist" and (now := version(name)) != was]
    if changed:
        renders = any(text.startswith(RENDERS) for text in changed) and not pairs_made_again
        yield Finding("told", "libraries", examples(changed),
                      "another rounding at least" + (_MAKE_PAIRS if renders else ""), {"versions": changed})
    else:
        yield Finding("same", "libraries", ", ".join(f"{name} {passport['versions'][name]}" for name in
                                                     ("torch", "transformers", "deepspeed")))
    if "hardware" in passport:
        here = any(kind.startswith(cpu_model()) for kind in passport["hardware"]["nodes"])
        said = f"{hardware_in_words(passport['hardware'])}; {ranks_in_words(passport['ranks'])}, {passport['dtype']}"
        yield Finding("same", "computed on", said) if here and not passport["hardware"]["gpus"] else Finding(
            "told", "computed on", said, "a GPU's kernels, and another kind of machine, round in their own way")
    for start in passport.get("earlier", []):
        yield Finding("told", "earlier start", f"until step {start['until_step']}: {start_in_words(start)}",
                      "the run went on with what stands above", start)


_MAKE_PAIRS = "; --pairs makes the pairs again and tells whether their tokens are the same"


def _code(passport: Mapping[str, Any], kept: Kept, pairs_made_again: bool) -> Iterator[Finding]:
    files = code_files()
    now = code(files)
    if "code" not in passport:
        yield Finding("told", "code", f"then dpo-dist {passport['versions']['dpo-dist']}; now {code_in_words(now)}")
    elif passport["code"]["files"] == now["files"]:
        yield Finding("same", "code", code_in_words(passport["code"]))
    else:
        others = [name for name in sorted({**kept.code, **files}) if kept.code.get(name) != files.get(name)]
        yield Finding("told", "code", f"then {code_in_words(passport['code'])}; now {code_in_words(now)}: "
                      f"{examples(others)}", "whether these files compute other numbers only they can say"
                      + ("" if pairs_made_again else _MAKE_PAIRS), {"files": others})
