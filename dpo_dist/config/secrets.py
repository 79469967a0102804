"""What is secret has no place in a configuration, which is written to run.json, logs, trackers and process lists. Such
a value is refused before anything of it is written; the message names the key and never the value."""
from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from dpo_dist.config.errors import UserError

# somebody@ in an address of the web; elsewhere (a database's) somebody:password@
_LOGIN = re.compile(r"\bhttps?://[^/\s?#@]+@|\b[a-z][\w+.-]*://[^/\s?#@:]*:[^/\s?#@]+@", re.I)
_IN_QUERY = re.compile(r"://\S*[?&;](?:[\w-]*(?:token|secret|password|passwd|signature|credential|api[_-]?key)|key|sig|"
                       r"auth)=[^&\s]", re.I)
# as providers write them: Hugging Face, GitHub, GitLab, W&B, OpenAI and Anthropic, Slack, AWS
_TOKEN = re.compile(r"\b(?:hf_[A-Za-z0-9]{30,}|gh[pousr]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{20,}|"
                    r"wandb_v\d_\w{20,}|sk-(?:[A-Za-z]+-)?[A-Za-z0-9_]{24,}|xox[abp]-[\w-]{20,}|AKIA[A-Z0-9]{16})\b")
# in a command: NAME_TOKEN=value, --api-key value; what the shell is to put there ($VARIABLE, $(cat file)) is no secret
_IN_COMMAND = re.compile(r"(?:(?<!bos_)(?<!eos_)(?<!pad_)token|secret|passw(?:or)?d|api[_-]?key)[\"']?(?:=|\s+)"
                         r"[\"']?(?![\"']?\$)[^\s\"'$-]", re.I)
COMMANDS = ("cluster.slurm.setup", "cluster.slurm.extra", "cluster.slurm.server_extra", "eval.judge.command",
            "eval.harness.arguments", "reference.server", "next.judge")
W_AND_B = re.compile(r"[0-9a-f]{40}")                    # its older keys; a commit of the hub looks the same
REMEDIES = {
    "eval.judge": "set DPO_DIST_JUDGE_TOKEN in the environment, which is sent as a bearer token",
    "next.judge": "set DPO_DIST_JUDGE_TOKEN in the environment, which is sent as a bearer token, and which a program "
                  "may read",
    "reference": "set VLLM_API_KEY in the environment, which is sent as a bearer token",
    "tracking": "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, or for W&B "
                "WANDB_API_KEY, in the environment",
    "eval.judge.command": "let the program read it from its environment",
    "eval.harness": "let lm_eval read it from its environment",
    "cluster": "set it in the environment, which Slurm hands to the job, or read it from a file of yours, as in "
               "export WANDB_API_KEY=$(cat ~/.wandb_key)",
    "export": "run `hf auth login`, or set HF_TOKEN in the environment",
    "model": "run `hf auth login`, or set HF_TOKEN in the environment",
    "data": "run `hf auth login`, or set HF_TOKEN in the environment",
}


def refuse_secrets(key: str, value: Any) -> None:
    """UserError where a value, or one below it, holds what looks like a password or a token."""
    for name, text in _texts(key, value):
        if what := _secret(name, text):
            prefix = max((known for known in REMEDIES if _below(name, known)), key=len, default=None)
            remedy = REMEDIES[prefix] if prefix else "set it in the environment"
            raise UserError(f"{name or 'a word of the command'} holds {what}, which would stand in run.json, logs and "
                            f"process lists; take it out (and renew it, if others may have seen it): {remedy}")


def refuse_secret_words(words: Iterable[str]) -> None:
    """As refuse_secrets, of a command's words key=value."""
    for word in words:
        key, sign, value = word.partition("=")
        refuse_secrets(key.lstrip("+~") if sign else "", value if sign else word)


def _secret(key: str, text: str) -> str | None:
    """What of a value is secret, in words; None where nothing looks like it."""
    if _LOGIN.search(text):
        return "an address with a login in it"
    if _IN_QUERY.search(text):
        return "an address with a token in it"
    if _TOKEN.search(text) or (W_AND_B.fullmatch(text) and _below(key, "tracking")):
        return "what looks like a token"
    if any(_below(key, command) for command in COMMANDS) and _IN_COMMAND.search(text):
        return "a password or token"
    return None


def _below(key: str, prefix: str) -> bool:
    return key == prefix or key.startswith((f"{prefix}.", f"{prefix}["))


def _texts(key: str, value: Any) -> Iterator[tuple[str, str]]:
    """(key, text) of every text in a nested value; a list of words is also one command."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _texts(f"{key}.{name}" if key else str(name), inner)
    elif isinstance(value, Sequence):
        for number, inner in enumerate(value):
            yield from _texts(f"{key}[{number}]", inner)
        if key in COMMANDS and all(isinstance(inner, str) for inner in value):
            yield key, " ".join(value)
