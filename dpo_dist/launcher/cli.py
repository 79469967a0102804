"""The command `dpo-dist VERB [key=value ...]`. No torch here: help and errors answer at once."""
from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from dpo_dist.compose import compose, documented_keys
from dpo_dist.config import UserError, nearest, to_dict
from dpo_dist.launcher.local import device_count, run_stages
from dpo_dist.launcher.plan import plan

VERBS = {
    "run": "the whole way: score the reference, train, evaluate on held-out pairs, export",
    "score": "fill the cache with the reference's log-probs, and nothing else",
    "train": "train (scoring what the cache lacks), evaluate, export; the same command goes on where it stopped",
    "eval": "loss, rewards and accuracy of model.path on held-out pairs",
    "export": "write <run.dir>/model from the newest whole checkpoint",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 on success, 2 for a user's mistake, else what the failed stage gave."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _main(words)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _main(words: list[str]) -> int:
    if not words or words[0] in ("--help", "-h", "help"):
        print(_usage())
        return 0
    verb, rest = words[0], words[1:]
    if verb not in VERBS:
        raise UserError(f"unknown command '{verb}': {nearest(verb, VERBS)}")
    if "--help" in rest or "-h" in rest:
        print(_verb_help(verb))
        return 0
    show = "--cfg" in rest
    if show:
        at = rest.index("--cfg")
        if rest[at + 1:at + 2] != ["job"]:
            raise UserError("--cfg takes the word job, as in: dpo-dist train model.path=... --cfg job")
        del rest[at:at + 2]
    for word in rest:
        if word.startswith("-"):
            raise UserError(f"unknown option '{word}': the options are --help and --cfg job; everything else is key=value")
    config = compose(rest)
    if show:
        print(OmegaConf.to_yaml(to_dict(config)), end="")
        return 0
    return run_stages(plan(verb, config, rest, device_count(config.cluster)), Path(config.run_dir))


def _usage() -> str:
    verbs = "\n".join(f"  {name:<8}{text}" for name, text in VERBS.items())
    return f"usage: dpo-dist VERB [key=value ...]\n\n{verbs}\n\ndpo-dist VERB --help lists the keys; --cfg job prints the resolved config."


def _verb_help(verb: str) -> str:
    lines = [f"dpo-dist {verb} [key=value ...]: {VERBS[verb]}", "",
             "Groups are chosen as in loss=ipo zero=zero2 tracking=wandb; keys are set as in loss.beta=0.3:", ""]
    for key, default, meaning in documented_keys():
        lines.append(f"  {key + '=' + default:<44} {meaning}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
