"""Whether run.json is as the run wrote it: its config against its identity, and what is kept beside it."""
from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from dpo_dist.config.compose import choices, compose
from dpo_dist.config.decode import decode
from dpo_dist.config.errors import UserError
from dpo_dist.config.options import to_dict
from dpo_dist.config.schema import RunConfig
from dpo_dist.data.digests import in_order
from dpo_dist.models.file_digests import digest_of
from dpo_dist.run.provenance.changed_keys import changed_keys
from dpo_dist.run.provenance.kept import Kept
from dpo_dist.runtime.run_dir import RunDir
from dpo_dist.verify.finding import Finding, examples

NOT_NAMED = "changes are found by the digests of run.json only, and not named"
OTHER_RUN = "it no longer says what was trained: the same command with these values is another run"


def read_run(run_dir: RunDir) -> dict[str, Any]:
    """The content of run.json. UserError where there is none, or none that can be read."""
    return run_dir.written("verify", edited=True)


def config_of(run: Mapping[str, Any]) -> tuple[RunConfig, str | None]:
    """(the config that run.json holds, why it cannot be read). Keys that a run of another version lacks have their
    defaults. Where it cannot be read, the config is that of `identity_of`. UserError where neither can."""
    try:
        return decode(run["config"]), None
    except UserError as error:
        problem = str(error)
    try:
        return decode(_filled(run["config"], _defaults(run))), None
    except UserError:
        return decode(_filled(run["identity_of"], _defaults(run))), problem


def _defaults(run: Mapping[str, Any]) -> dict[str, Any]:
    """The default config with the run's engine, cluster, tracker, optimizer and loss, as far as they are known."""
    chosen = []
    for section, key in (("reference", "engine"), ("cluster", "name"), ("tracking", "name"), ("optim", "name"),
                         ("loss", "name")):
        value = run["config"].get(section, {}).get(key)
        chosen += [f"{section}={value}"] if value in choices(section) else []
    return to_dict(compose([*chosen, f"model.path={json.dumps(run['identity_of']['model']['path'])}"]))


def _filled(written: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    return {**defaults, **{key: _filled(value, defaults[key]) if isinstance(value, dict)
                           and isinstance(defaults.get(key), dict) else value for key, value in written.items()}}


def check_config(run: Mapping[str, Any], config: RunConfig, problem: str | None, kept: Kept) -> Iterator[Finding]:
    """Findings on run.json itself. problem: why its config cannot be read."""
    identity, passport = run["identity_of"], run["passport"]
    changed = changed_keys(identity, config.identity_dict())
    named = [f"{key} was {was}, is now {now}" for key, was, now in changed]
    recorded = passport.get("config", _digest(identity))
    if problem:
        yield Finding("changed", "config", f"run.json was edited, or is of another version: {problem}",
                      "what follows is compared with what decided the weights (identity_of)")
    elif changed:
        yield Finding("changed", "config", f"run.json was edited: {examples(named)}", OTHER_RUN, {"keys": named})
    elif recorded != _digest(identity):
        yield Finding("changed", "config", f"run.json was edited: its config has the identity "
                      f"{_digest(identity)[:16]}, and the run began as {recorded[:16]}", OTHER_RUN)
    else:
        loss = ", ".join(f"{key}={value}" for key, value in vars(config.loss).items() if value is not None)
        yield Finding("same", "config", f"identity {recorded[:16]}: {loss}")
    yield from _since_export(run, kept, {key for key, _, _ in changed})


def _since_export(run: Mapping[str, Any], kept: Kept, told: set[str]) -> Iterator[Finding]:
    """What is another in run.json than it was when the weights were exported, beyond the keys already told."""
    if "run" not in kept.exported:
        return
    keys = [(key, was, now) for key, was, now in changed_keys(kept.exported["run"], dict(run))
            if key.partition(".")[2] not in told]
    deciding = [f"{key} was {was}, is now {now}" for key, was, now in keys if not key.startswith("config.")]
    others = [f"{key} was {was}, is now {now}" for key, was, now in keys if key.startswith("config.")]
    if deciding:
        yield Finding("changed", "run.json", f"edited since the export: {examples(deciding)}",
                      "what it records is not what the run recorded", {"keys": deciding})
    elif others:
        yield Finding("harmless", "run.json", f"edited since the export: {examples(others)}",
                      "these keys do not decide the weights", {"keys": others})


def check_kept(run: Mapping[str, Any], kept: Kept) -> tuple[Kept, list[Finding]]:
    """(what can be believed of what is kept beside run.json, findings on the rest). A part is believed where run.json
    has its digest."""
    passport, found = run["passport"], []
    wrong = {
        "rows.npz": any(f"{key}/{at}" in kept.rows and in_order(kept.rows[f"{key}/{at}"].rows) != file["in_order"]
                        for key, files in passport.get("data", {}).items() for at, file in enumerate(files))
        or any(split in kept.pairs and in_order(kept.pairs[split]) != entry["in_order"]
               for split, entry in passport.get("splits", {}).items()),
        "models.json": bool(kept.models) and {
            name: digest_of(model) for name, model in kept.models.items()} != passport.get("models"),
        "templates.json": bool(kept.templates) and {
            name: digest_of(text) for name, text in kept.templates.items()} != passport.get("templates")}
    empty: dict[str, dict[str, Any]] = {"rows.npz": {"rows": {}, "pairs": {}}, "models.json": {"models": {}},
                                        "templates.json": {"templates": {}}}
    there = {"rows.npz": kept.pairs, "models.json": kept.models, "templates.json": kept.templates}
    recorded = {"rows.npz": "data", "models.json": "models", "templates.json": "templates"}
    for name, content in there.items():
        if not content and passport.get(recorded[name]):
            found.append(Finding("told", f"provenance/{name}", "is gone", NOT_NAMED))
    for name, is_wrong in wrong.items():
        if is_wrong:
            kept = replace(kept, **empty[name])
            found.append(Finding("changed", f"provenance/{name}", "does not fit run.json: one of the two was edited",
                                 NOT_NAMED))
    return kept, found


def _digest(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
