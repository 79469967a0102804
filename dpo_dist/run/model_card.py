"""The model card of an export: what was trained on what, what came of it, and digests of all that it comes from."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpo_dist.config.schema import RunConfig
from dpo_dist.models.file_digests import digest_of
from dpo_dist.models.resolve import ModelFolder
from dpo_dist.run.inputs import Inputs
from dpo_dist.run.provenance.made_by import code_in_words, hardware_in_words, ranks_in_words, start_in_words
from dpo_dist.run.provenance.parent import run_digest
from dpo_dist.runtime.run_dir import RunDir

FILES_SHOWN = 20                             # of the data; run.json has them all


def model_card(inputs: Inputs, config: RunConfig, held_out: dict[str, float], run: dict[str, Any],
               exported: dict[str, Any], adapter_alone: bool = False) -> str:
    """Markdown: what was trained, on which data, with which reference and loss, the held-out results, and where all of
    it comes from. run: the content of run.json. exported: what file_digests.exported says of the folder."""
    loss = ", ".join(f"{k}={v}" for k, v in vars(config.loss).items() if v is not None and k != "name")
    reference = "none"
    if config.loss.needs_reference:
        reference = f"`{config.reference_path}` (weights {inputs.reference_digest})"
    bits = f", in 4 bits ({config.model.quantization})" if config.model.quantization != "none" else ""
    names = ", ".join(f"`{d.name or d.path}`" for d in config.data.train) or "-"
    library = ["library_name: peft", f"base_model: {base_of(inputs.policy, config)[0]}"] if adapter_alone else [
        "library_name: transformers"]
    merged = ", merged" if config.trains_adapter and not adapter_alone else ""
    lines = ["---", *library, "tags: [dpo, preference-optimization]", "---", "", "# Model card", "",
             f"`{config.model.path}`, trained on preference pairs with dpo-dist.", "", "| | |", "|---|---|",
             f"| starting weights | `{config.model.path}` ({inputs.policy_digest}){bits} |",
             f"| reference | {reference} |",
             f"| data | {names}: {len(inputs.train)} pairs (digest {inputs.train.digest[:16]}) |",
             f"| loss | {config.loss.name} ({loss}) |",
             f"| optimizer | {config.optim.title}, lr {config.optim.lr}, {config.optim.schedule}, "
             f"{config.train.pairs_per_step} pairs a step |",
             f"| trained weights | {_trained(inputs, config)}{merged} |", ""]
    if held_out:
        lines += [f"Held-out pairs: {len(inputs.eval)}", "", "| metric | mean |", "|---|---|"]
        lines += [*(f"| {name} | {value:.4f} |" for name, value in held_out.items()), ""]
    run_dir = RunDir(config.run_dir)
    return "\n".join([
        *lines, "## Where it comes from", "", "| | |", "|---|---|",
        f"| run | `{run_dir.path.resolve().name}` (run.json {run_digest(run)}) |",
        *(f"| {name} | {text} |" for name, text in _origin(run["passport"])),
        f"| exported tensors | {len(exported['tensors'])} ({digest_of(exported['tensors'])}) |", "",
        "`dpo-dist verify RUN`, given the run's folder, makes all digests again from what lies at the paths today, and "
        "says what changed and what that means for the numbers.", ""])


def _origin(passport: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(what, its digests in words) of all that run.json has beside the table above; only what it has, as a run may have
    begun before it was kept."""
    if "config" in passport:
        yield "config", passport["config"]
    for split, of_split in passport.get("splits", {}).items():
        if of_split["pairs"]:
            name = "training pairs" if split == "train" else "held-out pairs"
            yield name, (f"{of_split['pairs']} (in this order {of_split['in_order']}, in any order "
                         f"{of_split['any_order']})")
    files = [(key, file) for key, found in passport.get("data", {}).items() for file in found]
    for key, file in files[:FILES_SHOWN]:
        yield key, f"`{file['file']}`: {file['rows']} rows, {file['bytes']} bytes (sha256 {file['sha256']})"
    if len(files) > FILES_SHOWN:
        yield "more files", f"{len(files) - FILES_SHOWN}, in run.json"
    if "tokenizer" in passport:
        templates = "".join(f", chat template '{name}' {digest}" for name, digest in passport["templates"].items())
        yield "tokenizer", f"{passport['tokenizer']['digest']}{templates}"
    if passport.get("reference_key"):
        yield "reference log-probs", f"cache key {passport['reference_key']}"
    if "code" in passport:
        yield "code", code_in_words(passport["code"])
    yield "libraries", ", ".join(f"{name} {version}" for name, version in passport["versions"].items()
                                 if version != "not installed" and name != "dpo-dist")
    if "hardware" in passport:
        yield "computed on", (f"{hardware_in_words(passport['hardware'])}; {ranks_in_words(passport['ranks'])}, "
                              f"{passport['dtype']}")
    for start in passport.get("earlier", []):
        yield f"until step {start['until_step']}", start_in_words(start)
    if passport.get("parent"):
        parent = passport["parent"]
        yield "parent run", f"`{parent['run']}`, its {parent['export']} (run.json {parent['digest']})"


def _trained(inputs: Inputs, config: RunConfig) -> str:
    lora = config.model.lora
    if inputs.policy.adapter is not None:
        return f"{inputs.policy.adapter.described()}, gone on with"
    if not lora.rank:
        return "all"
    kinds = [word for chosen, word in ((lora.rslora, "rsLoRA"), (lora.dora, "DoRA")) if chosen]
    return f"{', '.join(kinds) or 'LoRA'} rank {lora.rank}"


def base_of(policy: ModelFolder, config: RunConfig) -> tuple[str, str | None]:
    """(the base's folder or hub name, the revision of a hub model) as an exported adapter names it."""
    named = config.model.path if policy.adapter is None else policy.adapter.hub_name
    if Path(named).is_dir() or (policy.adapter is not None and policy.adapter.base_folder() is not None):
        return str(policy.base.resolve()), None
    name, _, revision = named.partition("@")
    return name, revision or None
