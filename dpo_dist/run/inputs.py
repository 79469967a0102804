"""What a command reads before it starts: the models' folders and digests, and the tokenized pairs."""
from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpo_dist.config.errors import UserError
from dpo_dist.config.rules import check_reference_adapter, check_starting_adapter
from dpo_dist.config.schema import RunConfig
from dpo_dist.data.packing import check_budget
from dpo_dist.data.prepare import digests_folder
from dpo_dist.data.store import PairStore
from dpo_dist.data.summary import summary_lines
from dpo_dist.losses import check_strengths
from dpo_dist.models.attention import describe_attention
from dpo_dist.models.cost import forward_flops
from dpo_dist.models.digest import folder_digest, model_digest
from dpo_dist.models.fit import choose_attention
from dpo_dist.models.folder import check_quantized, quantization, read_config, tied_embeddings
from dpo_dist.models.fused import choose_kernels, fused_misfit
from dpo_dist.models.head import kernels_misfit
from dpo_dist.models.load import torch_dtype
from dpo_dist.models.quantized import check_library, describe, recipe, trainable
from dpo_dist.models.resolve import ModelFolder, resolve
from dpo_dist.models.text import text_config
from dpo_dist.models.whole import check_whole
from dpo_dist.reference.cache.store import ReferenceKey
from dpo_dist.reference.make import Setup, reference_key
from dpo_dist.run.tokenizing import tokenized_pairs
from dpo_dist.runtime.run_dir import RunDir
from dpo_dist.runtime.shared_folders import check_shared
from dpo_dist.runtime.terminal import Terminal
from dpo_dist.runtime.world import World
from dpo_dist.sizing.flops import Flops
from dpo_dist.sizing.lengths import Lengths


@dataclass(frozen=True)
class Inputs:
    policy: ModelFolder
    policy_digest: str
    reference_digest: str
    same_start: bool                     # whether policy and reference start from the same weights
    dtype: torch.dtype
    attention: str                       # how the policy's packs are computed: branch or padded
    fused: bool                          # whether one kernel each computes its norms, rotary embedding and SwiGLU
    reference_setup: Setup               # what the reference's engine is opened with
    reference_key: ReferenceKey          # what the cache's values are found by
    flops: Flops                         # of the policy's forward
    train: PairStore
    eval: PairStore

    @property
    def pads(self) -> bool:
        """Whether policy or reference computes padded rows."""
        return "padded" in (self.attention, self.reference_setup.attention)

    @property
    def lengths(self) -> tuple[Lengths, int]:
        """(mean tokens of the pairs, tokens of the longest pair), of those to train on, else of those held out."""
        pairs = self.train if len(self.train) else self.eval
        tokens = pairs.lengths()
        prompt, chosen, rejected = tokens.mean(0).tolist()
        means = Lengths(prompt, chosen, rejected, len(pairs), f"mean of {len(pairs):,} tokenized pairs")
        return means, int(tokens.sum(1).max())


def read_inputs(config: RunConfig, world: World, terminal: Terminal) -> Inputs:
    """All inputs, checked."""
    check_shared(config, world)
    policy, reference = _model_folders(config, world, terminal)
    model, reference_model = read_config(policy.base), read_config(reference.base)
    _check_quantization(config, model, reference_model)
    if config.model.quantization != "none":
        terminal.say(describe(model, config.model.path))
    for folder, name in {reference.base: "reference.path", policy.base: "model.path"}.items():
        _tell_tied(folder, name, terminal)
    digests = digests_folder(config.data)
    digest = folder_digest(policy, digests, world)
    attention, misfit = choose_attention(config.model, policy.base)
    if misfit:
        terminal.say(f"attention: padded rows, as branch attention does not fit this model ({misfit})")
    reference_digest, reference_attention = digest, attention
    if reference != policy:
        reference_digest = folder_digest(reference, digests, world)
        reference_attention = choose_attention(config.model, reference.base)[0]
    if config.reference.adapter_beside:
        _check_same_base(config, policy, reference, digests, world)
    padded = attention == "padded" or (config.reference.mode == "live" and reference_attention == "padded")
    dtype = torch_dtype(config.model, world.device)
    fused = _tell_kernels(config, model, attention, dtype, world, terminal)
    reference_fused = fused and (
        reference.base == policy.base or fused_misfit(reference_model, dtype, world.device) is None)
    bits = config.reference_quantization
    setup = Setup(reference, dtype, reference_attention, world, fused=reference_fused, quantization=bits)
    key = world.on_main(lambda: reference_key(config.reference, reference_digest, setup, recipe(reference_model, bits)))
    same_start = digest == reference_digest and (
        recipe(model, config.model.quantization) == recipe(reference_model, bits))
    train, held_out = _read_pairs(config, policy.tokenizer, world, terminal)
    for pairs in (train, held_out):
        if len(pairs):
            _check_pairs(pairs, config, padded)
            _check_fits(pairs, model, f"model.path={config.model.path}")
            _check_fits(pairs, reference_model, f"reference.path={config.reference_path}")
    return Inputs(policy, digest, reference_digest, same_start, dtype, attention, fused, setup, key,
                  replace(forward_flops(model), padded=padded), train, held_out)


def _model_folders(config: RunConfig, world: World, terminal: Terminal) -> tuple[ModelFolder, ModelFolder]:
    """(the policy's, the reference's). UserError where an adapter does not go with other keys, or where an export is
    damaged. All ranks call it."""
    policy = _whole("model.path", config.model.path, config, world)
    if policy.adapter is not None:
        check_starting_adapter(config, policy.adapter)                   # a hub's adapter is known only now
        if policy.adapter.dropout:
            terminal.say(f"model.path: the adapter was trained with lora_dropout={policy.adapter.dropout}; here it is "
                         "0, as log-probs of one model are one set of numbers")
    if not config.loss.needs_reference:
        return policy, policy
    if config.reference.bare_base:
        return policy, ModelFolder(policy.base)
    reference = _whole("reference.path", config.reference_path, config, world)
    if reference.adapter is not None:
        check_reference_adapter(config)
    elif config.reference.adapter_beside:
        raise UserError(f"reference.path={config.reference_path} is no adapter, which reference.engine="
                        f"{config.reference.engine} needs; set reference=hf or reference=zero")
    return policy, reference


def _whole(key: str, path: str, config: RunConfig, world: World) -> ModelFolder:
    """Where this model is. Rank 0 reads its files where they have checksums, before anything is taken from them."""
    memory = digests_folder(config.data)
    world.on_main(lambda: check_whole(Path(path), key, memory))
    folder = resolve(path, key, config.run.offline)
    for part in {folder.base, *([folder.adapter.folder] if folder.adapter else [])} - {Path(path)}:
        world.on_main(partial(check_whole, part, key, memory))                       # a base, or from the hub
    return folder


def _check_same_base(config: RunConfig, policy: ModelFolder, reference: ModelFolder, memory: Path,
                     world: World) -> None:
    if model_digest(policy.base, memory, world) != model_digest(reference.base, memory, world):
        raise UserError(f"reference.path={config.reference_path} is an adapter for {reference.base}, whose weights are "
                        f"others than those of the policy's base {policy.base}; reference=adapter needs one base: give "
                        "an adapter for it, or set reference=hf or reference=zero")


def _tell_tied(folder: Path, key: str, terminal: Terminal) -> None:
    """Tells where config.json and the weight files disagree on the output head."""
    tied = tied_embeddings(folder)
    if tied.flag and not tied.in_files:
        terminal.say(f"{key}: config.json says tie_word_embeddings=true, but the weight files hold an output head that "
                     "differs from the embedding; both are used as they are in the files, and exports say "
                     "tie_word_embeddings=false")


def _tell_kernels(config: RunConfig, model: Any, attention: str, dtype: torch.dtype, world: World,
                  terminal: Terminal) -> bool:
    """Tells which kernels a GPU uses, and why not faster ones; whether norms, rotary embedding and SwiGLU are fused."""
    fused, why_not = choose_kernels(config.model.kernels, model, dtype, world.device)
    if why_not:
        terminal.say(f"kernels: the model's own code computes norms, rotary embedding and activation ({why_not})")
    if attention == "branch" and (how := describe_attention(model, dtype, world.device)):
        terminal.say(f"attention: {how}")
    if world.device.type == "cuda" and (misfit := kernels_misfit(world.device)):
        terminal.say("head: torch's own operations compute the log-probs, which takes longer (Triton's kernels: "
                     f"{misfit})")
    return fused


def _check_quantization(config: RunConfig, policy: Any, reference: Any) -> None:
    """UserError for quantized weights that cannot be trained or computed here, by the models' configs."""
    wanted = config.model.quantization != "none"
    if (how := quantization(policy)) and not (wanted and trainable(policy)):
        remedy = ("set model.quantization=nf4 and model.lora.rank=16 to train adapters on them" if trainable(policy)
                  else "give the full weights, and the quantized ones as reference.path")
        raise UserError(f"model.path={config.model.path} is quantized ({how}) and cannot be trained; {remedy}")
    if wanted:
        check_library(f"model.quantization={config.model.quantization}")
    if (how := quantization(reference)) and not config.reference.is_policy:
        if not config.reference.computes_quantized:
            raise UserError(f"reference.path={config.reference_path} is quantized ({how}), which "
                            f"{config.reference.described} cannot compute; set reference=hf reference.offload=none")
        if not config.reference.outside:
            check_quantized(reference, f"reference.path={config.reference_path}")


def _read_pairs(config: RunConfig, folder: Path, world: World, terminal: Terminal) -> tuple[PairStore, PairStore]:
    if not config.data.train and not config.data.eval:
        raise UserError("data.train=[] names no data; set data.train=[{path: rows.jsonl}]")
    train, held_out = tokenized_pairs(config.data, folder, world, terminal)
    world.on_main(lambda: _show(train, held_out, RunDir(config.run_dir).data_summary, terminal))
    return train, held_out


def _show(train: PairStore, held_out: PairStore, file: Path, terminal: Terminal) -> None:
    """Shows what became of the rows, and keeps it in the run's folder. A later stage only says where it is."""
    summary = "\n".join(summary_lines(train, "train") + summary_lines(held_out, "held out"))
    if file.exists() and file.read_bytes() == summary.encode():
        terminal.say(f"data: {len(train):,} pairs to train on, {len(held_out):,} held out, as told in {file}")
    else:
        file.write_text(summary)
        terminal.say(summary)


def _check_pairs(pairs: PairStore, config: RunConfig, padded: bool) -> None:
    if config.loss.needs_whole_step and np.ptp(pairs.weight) > 0:
        raise UserError(f"loss.name={config.loss.name} sorts over pairs, so rows cannot have weights or confidences "
                        "of their own; leave them out with columns={weight: null, confidence: null} in the data entry")
    if len(pairs) and pairs.tie.all():
        raise UserError(f"data.ties={config.data.ties}, and all {len(pairs)} pairs are ties: nothing says which answer "
                        "is better; add data with preferences")
    if config.loss.needs_strength:
        check_strengths(torch.from_numpy(np.array(pairs.strength)))
    check_budget(pairs.lengths(), lambda index: pairs[index].where, config.train.tokens_per_microbatch, padded)


def _check_fits(pairs: PairStore, model: Any, key: str) -> None:
    """UserError where the pairs are too long for a model, or hold ids that it does not know."""
    model = text_config(model)
    longest = int((pairs.lengths()[:, 0] + pairs.lengths()[:, 1:].max(1)).max())
    positions = getattr(model, "max_position_embeddings", None)
    if positions is not None and longest > positions:
        raise UserError(f"data holds a sequence of {longest} tokens, but {key} has {positions} positions; "
                        f"set data.max_length={positions}")
    rope = getattr(model, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings") or getattr(
        model, "original_max_position_embeddings", None) or positions
    if rope.get("rope_type") in ("dynamic", "longrope") and original is not None and longest > original:
        raise UserError(f"data holds a sequence of {longest} tokens; beyond {original}, {key} changes its position "
                        "embedding with the longest sequence of a forward, so log-probs would depend on packing; set "
                        f"data.max_length={original}")
    vocabulary = getattr(model, "vocab_size", None)
    largest = pairs.largest_id()
    if vocabulary is not None and largest >= vocabulary:
        raise UserError(f"data holds token id {largest}, but {key} has a vocabulary of {vocabulary}; "
                        "use the tokenizer that belongs to the model")
