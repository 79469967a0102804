"""Where a run's numbers come from, written to run.json before the first step; what names a change later, beside it."""
from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch

from dpo_dist.config.errors import UserError
from dpo_dist.config.options import to_dict
from dpo_dist.config.schema import DataConfig, RunConfig
from dpo_dist.data.digests import FileDigests, any_order, data_set_digests, in_order, pair_digests
from dpo_dist.data.prepare import data_sets, digests_folder
from dpo_dist.data.templates import template_texts
from dpo_dist.models.copied import copied_digests
from dpo_dist.models.file_digests import described, digest_of, tokenizer_digest, tokenizer_files
from dpo_dist.models.resolve import ModelFolder
from dpo_dist.models.tokenizer import load_tokenizer
from dpo_dist.run.inputs import Inputs
from dpo_dist.run.provenance.changed_keys import differences
from dpo_dist.run.provenance.kept import Kept, rows_of
from dpo_dist.run.provenance.made_by import GIB, Machine, code, code_files, hardware, this_machine, versions
from dpo_dist.run.provenance.parent import parent_of
from dpo_dist.runtime.files import write_json
from dpo_dist.runtime.hub_commits import commits
from dpo_dist.runtime.json_files import SEAL, found_object, is_whole, needed_object, parsed, sealed
from dpo_dist.runtime.run_dir import RunDir
from dpo_dist.runtime.world import World, own_node


def provenance(config: RunConfig, inputs: Inputs, world: World) -> dict[str, Any]:
    """Digests of what goes in, versions of what computes, and the shape of the world: what is known at once."""
    return {
        "policy_weights": inputs.policy_digest,
        "reference_weights": inputs.reference_digest if config.loss.needs_reference else None,
        "reference_key": inputs.reference_key.folder if config.loss.needs_reference else None,
        "reference_sync": _sync(config) if config.loss.needs_reference else None,
        "copied_files": copied_digests(inputs.policy),
        "train_pairs": {"count": len(inputs.train), "digest": inputs.train.digest},
        "eval_pairs": {"count": len(inputs.eval), "digest": inputs.eval.digest},
        "dtype": str(inputs.dtype).removeprefix("torch."),
        "attention": inputs.attention,
        "ranks": world.size,
        "device": world.device.type,
        "python": platform.python_version(),
        "versions": versions(),
    }


def _sync(config: RunConfig) -> str:
    """How the reference moves, in words."""
    sync = config.reference.sync
    share = f"alpha {sync.alpha}, " if sync.mode == "soft" else ""
    return "none: frozen" if sync.mode == "none" else f"{sync.mode}: {share}every {sync.every_steps} steps (TR-DPO)"


# what may change where a run goes on
MADE_BY = ("code", "versions", "python", "hardware", "ranks", "device")
# what a run cannot change on its way
SAME_RUN = ("policy_weights", "reference_weights", "reference_key", "train_pairs", "dtype")


def check_same_run(run_dir: RunDir, config: RunConfig, lineage: dict[str, Any]) -> str | None:
    """UserError where the folder holds a run of another config, or of other weights or data under the same names, or
    where a file that the export takes over has changed.

    A sentence where run.json is damaged or gone: it is to be written anew, as the checkpoints say that they are of this
    run, or there are none. UserError where they say otherwise, or nothing.
    """
    before, wrong = _before(run_dir)
    changed = [*differences(before["identity_of"], config.identity_dict()),
               *differences(_same(before["passport"]), _same(lineage))] if before else []
    if before and not wrong:
        if changed:
            raise _another_run(run_dir, "; ".join(changed[:5]))
        _check_copied(before["passport"], lineage["copied_files"], config.model.path)
        return None
    if not run_dir.checkpoints():
        return f"{run_dir.run_json} was {wrong}" if wrong else None
    found = f"{run_dir.run_json} was {wrong or 'missing'}"
    known = _identity_of_checkpoints(run_dir)
    if known == config.identity() or (known is None and before and not changed):
        return found
    if known is not None:
        raise _another_run(run_dir, f"its checkpoints say so, and {found}")
    raise UserError(f"{found}, and no checkpoint says which run run.dir={run_dir.path} holds; choose another run.dir, "
                    "or remove that one")


def check_copied(run_dir: RunDir, model: ModelFolder, path: str) -> None:
    """UserError where a file that the export takes over from this model is not as it was when the run began. path: what
    model.path says."""
    _check_copied(run_dir.written("export")["passport"], copied_digests(model), path)


def _check_copied(before: dict[str, Any], now: dict[str, str], path: str) -> None:
    recorded = before.get("copied_files", now)           # a run that an earlier version began has none
    other = sorted(name for name in recorded.keys() | now.keys() if recorded.get(name) != now.get(name))
    if other:
        what = "missing" if other[0] not in now else "new" if other[0] not in recorded else "another"
        raise UserError(f"model.path={path} is not as it was when this run began: {other[0]} is {what}, and the export "
                        "takes it over. Put back what was there, or choose another run.dir")


def _another_run(run_dir: RunDir, why: str) -> UserError:
    return UserError(f"run.dir={run_dir.path} holds another run ({why}); put that back, choose another run.dir, or "
                     "remove that one")


def _same(passport: dict[str, Any]) -> dict[str, Any]:
    return {key: passport.get(key) for key in SAME_RUN}


def _before(run_dir: RunDir) -> tuple[dict[str, Any], str]:
    """(the content of run.json, how it is damaged). Neither where there is none."""
    if not run_dir.run_json.exists():
        return {}, ""
    try:
        found = parsed(run_dir.run_json)
    except (OSError, ValueError) as error:
        return {}, f"damaged ({error})"
    if lacks := [part for part in ("identity_of", "passport") if not isinstance(found.get(part), dict)]:
        return {}, f"damaged (it has no {lacks[0]})"
    # of a run that an earlier version began, nothing but JSON's own rules tells
    return found, "damaged (its digest is another)" if SEAL in found and not is_whole(found) else ""


def _identity_of_checkpoints(run_dir: RunDir) -> str | None:
    """RunConfig.identity() of the run that wrote the newest checkpoint that says so."""
    states = (found_object(folder / "state.json") or {} for folder in reversed(run_dir.checkpoints()))
    return next((state["identity"] for state in states if isinstance(state.get("identity"), str)), None)


def write_provenance(run_dir: RunDir, config: RunConfig, inputs: Inputs, lineage: dict[str, Any], world: World) -> None:
    """Writes run.json, and beside it what names a change. All ranks call it; rank 0 reads and writes."""
    machines = world.gather(_machine(world))
    _check_one_commit(world)
    world.on_main(lambda: _write(run_dir, config, inputs, lineage, machines))


def _check_one_commit(world: World) -> None:
    """UserError where ranks took another commit under one name: a branch of the hub moved between them."""
    of_all = world.gather(commits())
    for name, commit in ((name, commit) for own in of_all for name, commit in own.items()):
        if any(own.get(name, commit) != commit for own in of_all):
            raise UserError(f"'{name}' moved on the hub while this run began, and its ranks have different commits of "
                            "it; start it again")


def _write(run_dir: RunDir, config: RunConfig, inputs: Inputs, lineage: dict[str, Any],
           machines: list[Machine]) -> None:
    data = data_digests(config.data, digests_folder(config.data))
    kept = _kept(config, inputs, data)
    passport = {
        **lineage,
        "config": config.identity(),
        "loss": {name: value for name, value in to_dict(config.loss).items() if value is not None},
        "data": {key: [file.described() for file in files] for key, files in data.items()},
        "splits": {split: {"pairs": len(digests), "in_order": in_order(digests), "any_order": any_order(digests)}
                   for split, digests in kept.pairs.items()},
        "tokenizer": {"digest": tokenizer_digest(inputs.policy.tokenizer),
                      "files": tokenizer_files(inputs.policy.tokenizer)},
        "templates": {name: digest_of(text) for name, text in kept.templates.items()},
        "models": {name: digest_of(content) for name, content in kept.models.items()},
        "code": code(kept.code),
        "hardware": hardware(machines),
        "cache": {"tokens": inputs.train.path.parent.name, "reference": lineage["reference_key"]},
        "parent": parent_of(config.model.path),
        "hub": commits(),
    }
    passport["earlier"] = earlier_starts(run_dir, passport)
    kept.write(run_dir)
    write_json(run_dir.run_json, sealed({"config": to_dict(config), "passport": passport,
                                         "identity_of": config.identity_dict()}))


def earlier_starts(run_dir: RunDir, passport: dict[str, Any]) -> list[dict[str, Any]]:
    """What made the first steps of a run that goes on, where it was other code, libraries or machines: the last step of
    each such start that was saved, and what made it."""
    found, wrong = _before(run_dir)
    if not found or wrong or not (saved := run_dir.checkpoints()):
        return []
    before = found["passport"]
    made_by, earlier = {key: before[key] for key in MADE_BY if key in before}, list(before.get("earlier", []))
    if made_by != {key: passport[key] for key in made_by}:
        earlier.append({"until_step": int(saved[-1].name.rpartition("-")[2]), **made_by})
    return earlier


def data_digests(config: DataConfig, memory: Path | None) -> dict[str, list[FileDigests]]:
    """{"data.train[0]": digests of its files, ...} of all data sets."""
    return {f"data.{data_set.split}[{data_set.source}]": data_set_digests(data_set.config, memory)
            for data_set in data_sets(config)}


def _kept(config: RunConfig, inputs: Inputs, data: dict[str, list[FileDigests]]) -> Kept:
    memory = digests_folder(config.data)
    models = {"policy": described(inputs.policy, memory)}
    if config.loss.needs_reference and inputs.reference_setup.folder != inputs.policy:
        models["reference"] = described(inputs.reference_setup.folder, memory)
    tokenizer = load_tokenizer(inputs.policy.tokenizer)
    return Kept(rows_of(data), {"train": pair_digests(inputs.train), "eval": pair_digests(inputs.eval)}, models,
                template_texts(tokenizer, config.data.chat_template) or {}, code_files())


def _machine(world: World) -> Machine:
    gpu = None
    if world.device.type == "cuda":
        found = torch.cuda.get_device_properties(world.device)
        gpu = f"{found.name}, {round(found.total_memory / GIB)} GiB"
    return this_machine(own_node()[0], gpu)


def add_parity(run_dir: RunDir) -> None:
    """Puts the audit's figures into run.json, once the reference of the run was held against the training stack."""
    content = run_dir.written("train")
    content["passport"]["parity"] = needed_object(run_dir.parity_json, "remove it, and the reference is audited again")
    write_json(run_dir.run_json, sealed(content))
