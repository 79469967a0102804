"""<run.dir>/model: trained weights, tokenizer, chat template and model card, for from_pretrained. <run.dir>/adapter:
the LoRA adapter alone, for peft. Also `dpo-dist export`."""
from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import safetensors.torch

from dpo_dist.config.adapter import ADAPTER_WEIGHTS
from dpo_dist.config.errors import UserError
from dpo_dist.config.schema import RunConfig
from dpo_dist.data.templates import given_text
from dpo_dist.models.copied import NAMED_TEMPLATES, settings_files, tokenizer_files
from dpo_dist.models.file_digests import exported
from dpo_dist.models.folder import Stored, stored_tensors, tied_embeddings, truthful_json
from dpo_dist.models.lora import write_adapter_config
from dpo_dist.models.quantized import is_scale
from dpo_dist.models.tokenizer import load_tokenizer
from dpo_dist.models.weights import write_shards
from dpo_dist.policy import Policy
from dpo_dist.run.checkpoint import check_fits, load_checkpoint, resume_point
from dpo_dist.run.inputs import Inputs, read_inputs
from dpo_dist.run.model_card import base_of, model_card
from dpo_dist.run.open_models import open_policy, without_auto
from dpo_dist.run.provenance import check_copied, check_same_run, provenance
from dpo_dist.run.provenance.kept import keep_export
from dpo_dist.run.push import check_push, push_model
from dpo_dist.run.tracking.metrics_file import restore_run
from dpo_dist.runtime.best import exported_step
from dpo_dist.runtime.checksums import damage, write_checksums
from dpo_dist.runtime.ending import exit_with
from dpo_dist.runtime.files import sync_tree
from dpo_dist.runtime.process import run_entry
from dpo_dist.runtime.run_dir import WRITTEN_ANEW, RunDir
from dpo_dist.runtime.terminal import Terminal
from dpo_dist.runtime.world import World

MODEL_CARD = "README.md"


def export(run_dir: RunDir, policy: Policy, inputs: Inputs, config: RunConfig, held_out: dict[str, float],
           world: World, terminal: Terminal) -> list[Path]:
    """The folders that export.what asks for, each written beside its place and moved there whole. All ranks call it;
    rank 0 writes. UserError where the model's folder has changed since the run began."""
    world.on_main(lambda: check_copied(run_dir, inputs.policy, config.model.path))
    if config.export.merged:
        _export_model(run_dir, policy, inputs, config, held_out, world, terminal)
    if config.export.adapter:
        _export_adapter(run_dir, policy, inputs, config, held_out, world)
    return run_dir.exports(config.export.merged, config.export.adapter)


def _export_model(run_dir: RunDir, policy: Policy, inputs: Inputs, config: RunConfig, held_out: dict[str, float],
                  world: World, terminal: Terminal) -> None:
    folder, base = run_dir.model, inputs.policy.base
    partial = folder.with_name("model.partial")
    world.on_main(lambda: _start_model(partial, inputs, config))
    write_shards(partial, policy.export_weights(), write=world.is_main)
    world.on_main(lambda: _finish(partial, folder, run_dir, inputs, config, held_out))
    if left := world.on_main(lambda: not_exported(base, folder)):
        terminal.say(f"not exported: {len(left)} tensors of {base} that transformers does not load, such as {left[0]}")


def _start_model(partial: Path, inputs: Inputs, config: RunConfig) -> None:
    _start(partial)
    model = truthful_json(inputs.policy.base)
    for name in ("torch_dtype", "quantization_config"):                      # weights are written whole, in this dtype
        model.pop(name, None)
    model["dtype"] = str(inputs.dtype).removeprefix("torch.")
    (partial / "config.json").write_text(json.dumps(model, indent=2) + "\n")
    for file in settings_files(inputs.policy.base):
        shutil.copyfile(file, partial / file.name)
    copy_tokenizer(inputs.policy.tokenizer, partial, config.data.chat_template)


def _export_adapter(run_dir: RunDir, policy: Policy, inputs: Inputs, config: RunConfig, held_out: dict[str, float],
                    world: World) -> None:
    partial = run_dir.adapter.with_name("adapter.partial")
    weights = policy.export_adapter(keep=world.is_main)

    def write() -> None:
        _start(partial)
        write_adapter_config(policy.model.lm, partial, *base_of(inputs.policy, config))
        safetensors.torch.save_file(weights, partial / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        copy_tokenizer(inputs.policy.tokenizer, partial, config.data.chat_template)
        _finish(partial, run_dir.adapter, run_dir, inputs, config, held_out)

    world.on_main(write)


def copy_tokenizer(source: Path, partial: Path, template: str | None) -> None:
    """Puts the tokenizer and its chat templates into the export."""
    for file in tokenizer_files(source):
        shutil.copyfile(file, partial / file.name)
    copy_templates(source, partial, template)


def _start(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


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


def _finish(partial: Path, folder: Path, run_dir: RunDir, inputs: Inputs, config: RunConfig,
            held_out: dict[str, float]) -> None:
    """Writes the model card and checksums, keeps what the folder holds, and moves it to its place."""
    content = exported(partial)
    card = model_card(inputs, config, held_out, run_dir.written("export"), content,
                      adapter_alone=folder == run_dir.adapter)
    (partial / MODEL_CARD).write_text(card)
    write_checksums(partial)
    sync_tree(partial)
    keep_export(run_dir, folder.name, content)           # before it is moved: what lies there is never told wrongly
    run_dir.pushed_json.unlink(missing_ok=True)          # it tells of the export that goes
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def are_whole(exports: Iterable[Path], say: Callable[[str], None]) -> bool:
    """Whether these folders are there, as they were exported; `say` tells which file is not."""
    for folder in exports:
        if not folder.exists():
            return False
        if wrong := damage(folder):
            say(f"{folder} is damaged: {'; '.join(wrong[:3])}; it is exported again")
            return False
    return True


def _export_command(config: RunConfig, world: World, terminal: Terminal) -> None:
    """Writes <run.dir>/model, <run.dir>/adapter or both from the run's newest whole checkpoint, or the best with
    train.keep_best."""
    run_dir = RunDir(config.run_dir)
    world.on_main(lambda: check_push(config))
    inputs = read_inputs(config, world, terminal)
    if damaged := world.on_main(lambda: check_same_run(run_dir, config, provenance(config, inputs, world))):
        raise UserError(f"{damaged}; {WRITTEN_ANEW}, and exports again where the export is damaged")
    resumed = resume_point(run_dir, world, terminal)
    if resumed is None:
        raise UserError(f"run.dir={run_dir.path} holds no whole checkpoint to export; train first, with the same "
                        "overrides")
    config = without_auto(config, inputs, resumed[1], world, terminal)
    check_fits(resumed, config, world.size)
    world.on_main(partial(restore_run, run_dir, resumed[0], terminal.say))
    newest = resumed[1].step
    step, held_out = world.on_main(lambda: exported_step(run_dir, config.train.keep_best, newest))
    policy = open_policy(config, inputs, world)
    load_checkpoint([policy], run_dir.checkpoint(step), world)
    models = export(run_dir, policy, inputs, config, held_out, world, terminal)
    terminal.say(f"model: {' and '.join(map(str, models))} (from {run_dir.checkpoint(step).name})")
    world.on_main(lambda: push_model(config, run_dir, terminal))


if __name__ == "__main__":
    exit_with(run_entry(sys.argv[1:], _export_command))
