"""<run.dir>/model: trained weights, tokenizer, chat template and model card, for from_pretrained. Also `dpo-dist
export`."""
from __future__ import annotations

import json
import shutil
import sys
from fnmatch import fnmatch
from pathlib import Path

from dpo_dist.config.errors import UserError
from dpo_dist.config.schema import RunConfig
from dpo_dist.data.templates import given_text
from dpo_dist.models.folder import Stored, stored_tensors, tied_embeddings, truthful_json
from dpo_dist.models.quantized import is_scale
from dpo_dist.models.tokenizer import load_tokenizer
from dpo_dist.models.weights import write_shards
from dpo_dist.policy import Policy
from dpo_dist.run.checkpoint import resume_point
from dpo_dist.run.inputs import Inputs, read_inputs
from dpo_dist.run.open_models import open_policy, without_auto
from dpo_dist.run.provenance import check_same_run, provenance
from dpo_dist.run.push import check_push, push_model
from dpo_dist.runtime.best import exported_step
from dpo_dist.runtime.process import exit_with, run_entry
from dpo_dist.runtime.run_dir import RunDir
from dpo_dist.runtime.terminal import Terminal
from dpo_dist.runtime.world import World

# What is copied of the model's folder: files of tokenizers (of whatever name), chat templates, processors of images ...
COPIED = (".json", ".jinja", ".model", ".txt", ".tiktoken")
# ... and what is not: written anew, or of another training
NOT_COPIED = ("config.json", "*.index.json", "trainer_state.json", "*_results.json", "quantize_config.json",
              "requirements*.txt", "LICENSE*", "README*")
NAMED_TEMPLATES = "additional_chat_templates"        # a folder: {name}.jinja


def export_model(run_dir: RunDir, policy: Policy, inputs: Inputs, config: RunConfig, held_out: dict[str, float],
                 world: World, terminal: Terminal) -> Path:
    """Writes the model beside its final place and moves it there whole. All ranks call it; rank 0 writes."""
    folder, partial = run_dir.model, run_dir.model.with_name("model.partial")
    world.on_main(lambda: _start(partial, inputs, config, held_out))
    write_shards(partial, policy.export_weights(), write=world.is_main)
    world.on_main(lambda: _finish(partial, run_dir))
    if left := world.on_main(lambda: not_exported(inputs.policy_folder, folder)):
        terminal.say(f"not exported: {len(left)} tensors of {inputs.policy_folder} that transformers does not load, "
                     f"such as {left[0]}")
    return folder


def _start(partial: Path, inputs: Inputs, config: RunConfig, held_out: dict[str, float]) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model = truthful_json(inputs.policy_folder)
    for name in ("torch_dtype", "quantization_config"):                      # weights are written whole, in this dtype
        model.pop(name, None)
    model["dtype"] = str(inputs.dtype).removeprefix("torch.")
    (partial / "config.json").write_text(json.dumps(model, indent=2) + "\n")
    for file in sorted(inputs.policy_folder.iterdir()):
        if file.suffix in COPIED and file.is_file() and not any(fnmatch(file.name, name) for name in NOT_COPIED):
            shutil.copyfile(file, partial / file.name)
    copy_templates(inputs.policy_folder, partial, config.data.chat_template)
    (partial / "README.md").write_text(model_card(inputs, config, held_out))


def copy_templates(source: Path, partial: Path, setting: str | None) -> None:
    """Puts the chat templates into the export: all of the tokenizer's own, or the one that data.chat_template gives."""
    named = source / NAMED_TEMPLATES
    if named.is_dir():
        shutil.copytree(named, partial / NAMED_TEMPLATES)
    tokenizer = load_tokenizer(partial)
    given = given_text(tokenizer, setting)
    if tokenizer is not None and given is not None:
        shutil.rmtree(partial / NAMED_TEMPLATES, ignore_errors=True)
        tokenizer.chat_template = given
        tokenizer.save_pretrained(partial)


def not_exported(source: Path, model: Path) -> list[str]:
    """Names of tensors that the exported model lacks and its source has, as layers that predict further tokens ahead
    are; but for a second copy of tied embeddings."""
    known, exported = stored_tensors(source), stored_tensors(model)
    second_copy = tied_embeddings(source).in_files
    known = {name: tensor for name, tensor in known.items() if not is_scale(name)}
    left = sorted(known.keys() - exported.keys())
    left = [name for name in left if not (second_copy and known[name].shape in _shapes_of_embeddings(exported))]
    # files that name the same tensors otherwise have as many
    return left if len(known) - second_copy > len(exported) else []


def _shapes_of_embeddings(tensors: dict[str, Stored]) -> set[tuple[int, ...]]:
    return {tensor.shape for name, tensor in tensors.items() if "emb" in name or "wte" in name}


def _finish(partial: Path, run_dir: RunDir) -> None:
    run_dir.pushed_json.unlink(missing_ok=True)          # it tells of the model that goes
    shutil.rmtree(run_dir.model, ignore_errors=True)
    partial.rename(run_dir.model)


def model_card(inputs: Inputs, config: RunConfig, held_out: dict[str, float]) -> str:
    """Markdown: what was trained, on which data, with which reference and loss, and the held-out results."""
    loss = ", ".join(f"{k}={v}" for k, v in vars(config.loss).items() if v is not None and k != "name")
    reference = "none"
    if config.loss.needs_reference:
        reference = f"`{config.reference_path}` (weights {inputs.reference_digest})"
    bits = f", in 4 bits ({config.model.quantization})" if config.model.quantization != "none" else ""
    names = ", ".join(f"`{d.name or d.path}`" for d in config.data.train) or "-"
    lines = ["---", "library_name: transformers", "tags: [dpo, preference-optimization]", "---", "", "# Model card", "",
             f"`{config.model.path}`, trained on preference pairs with dpo-dist.", "", "| | |", "|---|---|",
             f"| starting weights | `{config.model.path}` ({inputs.policy_digest}){bits} |",
             f"| reference | {reference} |",
             f"| data | {names}: {len(inputs.train)} pairs (digest {inputs.train.digest[:16]}) |",
             f"| loss | {config.loss.name} ({loss}) |",
             f"| optimizer | {config.optim.title}, lr {config.optim.lr}, {config.optim.schedule}, "
             f"{config.train.pairs_per_step} pairs a step |",
             "| trained weights | "
             f"{'LoRA rank ' + str(config.model.lora.rank) + ', merged' if config.model.lora.rank else 'all'} |", ""]
    if held_out:
        lines += [f"Held-out pairs: {len(inputs.eval)}", "", "| metric | mean |", "|---|---|"]
        lines += [*(f"| {name} | {value:.4f} |" for name, value in held_out.items()), ""]
    return "\n".join(lines)


def _export_command(config: RunConfig, world: World, terminal: Terminal) -> None:
    """Writes <run.dir>/model from the run's newest whole checkpoint, or the best with train.keep_best."""
    run_dir = RunDir(config.run_dir)
    world.on_main(lambda: check_push(config))
    inputs = read_inputs(config, world, terminal)
    config = without_auto(config, inputs, world, terminal)
    world.on_main(lambda: check_same_run(run_dir, config, provenance(config, inputs, world)))
    resumed = world.on_main(lambda: resume_point(run_dir, config, world.size))
    if resumed is None:
        raise UserError(f"run.dir={run_dir.path} holds no whole checkpoint to export; train first, with the same "
                        "overrides")
    newest = resumed[1].step
    step, held_out = world.on_main(lambda: exported_step(run_dir, config.train.keep_best, newest))
    policy = open_policy(config, inputs, world)
    policy.load(run_dir.checkpoint(step))
    model = export_model(run_dir, policy, inputs, config, held_out, world, terminal)
    terminal.say(f"model: {model} (from {run_dir.checkpoint(step).name})")
    world.on_main(lambda: push_model(config, run_dir, terminal))


if __name__ == "__main__":
    exit_with(run_entry(sys.argv[1:], _export_command))
