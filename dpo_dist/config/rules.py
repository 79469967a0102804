"""Rules between keys: a loss's own defaults, and keys that contradict each other. No torch here.

Rules of a single variant stand beside its keys: an engine's in engines/, a cluster's in cluster.py.
"""
from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from dpo_dist.config.adapter import Adapter, is_adapter, read_adapter
from dpo_dist.config.errors import UserError, nearest
from dpo_dist.config.loss_options import LOSS_OPTIONS, MIXTURE
from dpo_dist.config.output_rules import validate_outputs
from dpo_dist.config.schema import DatasetConfig, LossConfig, OptimConfig, RunConfig

PERSISTENCE_THRESHOLD = 100_000          # as in conf/zero/zero3.yaml
# as in conf/model/default.yaml
LORA_DEFAULTS = {"alpha": None, "target_modules": "all-linear", "modules_to_save": (), "rslora": False, "dora": False}


def resolve_loss(loss: LossConfig) -> LossConfig:
    """The loss with its own defaults filled in. An option that none of its terms uses is an error, never ignored."""
    if (loss.name == MIXTURE) != bool(loss.terms):
        raise UserError(f"loss.name={loss.name} with loss.terms={loss.terms}: a weighted sum takes loss.name={MIXTURE} "
                        "and loss.terms={sigmoid: 1.0, sft: 0.5}; a single loss takes no terms")
    for name in loss.weights:
        if name not in LOSS_OPTIONS:
            raise UserError(f"loss '{name}' is unknown: {nearest(name, [*LOSS_OPTIONS, MIXTURE])}")
    used = _used_options(loss)
    filled: dict[str, Any] = {}
    for spec in dataclasses.fields(LossConfig):
        if spec.name in ("name", "terms"):
            continue
        value = getattr(loss, spec.name)
        if value is not None and spec.name not in used:
            raise UserError(f"loss.{spec.name}={value} is not used by loss '{'+'.join(loss.weights)}'; remove it "
                            f"(its options: {', '.join(sorted(used)) or 'none'})")
        filled[spec.name] = used.get(spec.name) if value is None else value
    if filled["f_alpha"] is not None and filled["f_divergence"] != "alpha_divergence":
        raise UserError(f"loss.f_alpha={filled['f_alpha']} needs loss.f_divergence=alpha_divergence")
    if filled["f_divergence"] == "alpha_divergence" and filled["f_alpha"] is None:
        filled["f_alpha"] = 0.5
    resolved = dataclasses.replace(loss, **filled)
    if resolved.needs_whole_step and filled["ld_alpha"] is not None:
        raise UserError(f"loss.ld_alpha={filled['ld_alpha']} does not go with a loss that sorts over the step; remove "
                        "it")
    return resolved


def _used_options(loss: LossConfig) -> dict[str, Any]:
    """{option: default} of all terms. UserError where two of them have different defaults and the config says none."""
    used: dict[str, Any] = {}
    for name in loss.weights:
        for option, default in LOSS_OPTIONS[name].defaults.items():
            if used.setdefault(option, default) != default and getattr(loss, option) is None:
                raise UserError(f"loss.{option} has another default for '{name}' than for the other terms of "
                                f"'{'+'.join(loss.weights)}'; set loss.{option}=...")
    return used


def validate(c: RunConfig) -> None:
    """Raises UserError for keys that contradict each other."""
    _validate_label_smoothing(c.loss)
    _validate_ties(c)
    _validate_data(c)
    _validate_model(c)
    _validate_optim(c.optim)
    _validate_reference(c)
    c.reference.check(c)
    _validate_export(c)
    _validate_zero(c)
    c.optim.check(c)
    c.cluster.check(c.reference.server_nodes)
    validate_outputs(c)


def _validate_label_smoothing(loss: LossConfig) -> None:
    for name in loss.weights:
        if LOSS_OPTIONS[name].needs_smoothing and not loss.label_smoothing:
            raise UserError(f"loss.label_smoothing={loss.label_smoothing} must be greater than 0 for loss '{name}'")
    if loss.label_smoothing == 0.5:
        raise UserError("loss.label_smoothing=0.5 leaves no preference to learn; set it below 0.5")


def _validate_ties(c: RunConfig) -> None:
    loss, nu = c.loss, c.loss.tie_nu
    if "rao_kupper" in loss.weights and nu is not None and nu < 1:
        raise UserError(f"loss.tie_nu={nu} must be at least 1 for loss 'rao_kupper' (1 = no ties); set loss.tie_nu=3")
    if c.data.ties == "keep" and not loss.knows_ties:
        without = [name for name in loss.weights if not LOSS_OPTIONS[name].knows_ties]
        known = " or ".join(f"loss={name}" for name, options in LOSS_OPTIONS.items() if options.knows_ties)
        raise UserError(f"data.ties=keep, but loss.name={loss.name} has no likelihood for ties ({', '.join(without)}); "
                        f"set {known}, or data.ties=drop")
    if c.data.ties == "keep" and "rao_kupper" in loss.weights and nu == 1:           # an infinite loss
        raise UserError("data.ties=keep, but loss.tie_nu=1 says that there are no ties; set loss.tie_nu=3, or "
                        "data.ties=drop")


def _does_nothing(key: str, value: Any, why: str) -> UserError:
    return UserError(f"{key}={value} would do nothing: {why}; remove it")


def _validate_data(c: RunConfig) -> None:
    for key, datasets in (("data.train", c.data.train), ("data.eval", c.data.eval), ("audit.against", c.audit.against)):
        for i, dataset in enumerate(datasets):
            _validate_dataset(f"{key}[{i}]", dataset)
    for key, datasets in (("data.eval", c.data.eval), ("audit.against", c.audit.against)):
        for i, dataset in enumerate(datasets):
            if dataset.weight != 1.0:
                raise _does_nothing(f"{key}[{i}].weight", dataset.weight, "held-out pairs are each counted once")
    if c.data.eval and c.data.eval_fraction:
        raise UserError(f"data.eval_fraction={c.data.eval_fraction} and data.eval are both set; keep one of them")
    if c.train.eval_every_steps and not c.data.eval and not c.data.eval_fraction:
        raise UserError(f"train.eval_every_steps={c.train.eval_every_steps} has nothing to evaluate; set data.eval or "
                        "data.eval_fraction=0.05")


def _validate_dataset(key: str, dataset: DatasetConfig) -> None:
    if Path(dataset.path).expanduser().exists():
        for name in ("subset", "revision"):
            if getattr(dataset, name) is not None:
                raise _does_nothing(f"{key}.{name}", getattr(dataset, name),
                                    f"'{dataset.path}' is a file or folder, and only a hub data set has a {name}")
    for name, column in (dataset.columns or {}).items():
        if column == name:
            raise _does_nothing(f"{key}.columns.{name}", column, "that is its name already")


def _validate_optim(optim: OptimConfig) -> None:
    for beta in optim.betas:
        if not 0 <= beta < 1:
            raise UserError(f"optim.betas={list(optim.betas)} must each be at least 0 and less than 1")
    if optim.min_lr_ratio and optim.schedule == "constant":
        raise _does_nothing("optim.min_lr_ratio", optim.min_lr_ratio, "optim.schedule=constant keeps optim.lr")


def _validate_model(c: RunConfig) -> None:
    lora, again = c.model.lora, c.model.gradient_checkpointing
    if again != "auto" and again < 0:
        raise UserError(f"model.gradient_checkpointing={again} must be auto, true, false, or a number of layers, 0 or "
                        "more")
    if lora.rank < 0:
        raise UserError(f"model.lora.rank={lora.rank} must be 0 (no adapters) or greater")
    if is_adapter(Path(c.model.path)):
        check_starting_adapter(c, read_adapter(Path(c.model.path), "model.path"))
    for key, default in LORA_DEFAULTS.items():
        if lora.rank == 0 and getattr(lora, key) != default:
            raise UserError(f"model.lora.{key}={getattr(lora, key)} does nothing while model.lora.rank=0; set "
                            "model.lora.rank=16")
    if c.model.quantization != "none":
        _validate_quantization(c)


def _validate_quantization(c: RunConfig) -> None:
    how, reference = f"model.quantization={c.model.quantization}", c.reference
    if not c.trains_adapter:
        raise UserError(f"{how} freezes the weights, and model.lora.rank=0 trains nothing else; set "
                        "model.lora.rank=16, or model.quantization=none")
    if not c.loss.needs_reference:
        return
    if reference.bare_base and reference.path is not None:
        raise UserError(f"reference.path={reference.path} would be those weights in full, but with {how} and "
                        f"reference.engine={reference.engine} the reference is in 4 bits; remove reference.path, or "
                        "set reference=hf")
    in_four_bits = reference.is_policy or (reference.computes_quantized and not reference.outside)
    if reference.path is None and not in_four_bits:
        raise UserError(f"with {how} and no reference.path the reference is the same 4-bit weights, which "
                        f"{reference.described} cannot compute; set reference=adapter_off or reference=hf, or "
                        f"reference.path={c.model.path} for the full weights")


def check_starting_adapter(c: RunConfig, adapter: Adapter) -> None:
    """UserError where model.path is this adapter and keys ask for another one."""
    for key, default in {"rank": 0, **LORA_DEFAULTS}.items():
        if (value := getattr(c.model.lora, key)) != default:
            raise _does_nothing(f"model.lora.{key}", value, f"model.path={c.model.path} is an adapter already "
                                f"({adapter.described()}), which is trained on as it is")


def check_reference_adapter(c: RunConfig) -> None:
    """UserError where the reference is an adapter on a base and its engine computes whole models only."""
    r = c.reference
    if not r.may_adapt and not r.bare_base:
        raise UserError(f"reference.path={c.reference_path} is an adapter, which {r.described} cannot compute; "
                        "set reference=adapter (beside a LoRA policy on the same base), reference=hf or "
                        "reference=zero, or give the merged model")


def _validate_export(c: RunConfig) -> None:
    if c.export.adapter and not c.trains_adapter:
        raise UserError(f"export.what={c.export.what}, but no adapter is trained; set model.lora.rank=16, or give an "
                        "adapter as model.path, or remove export.what")


def _validate_reference(c: RunConfig) -> None:
    """What holds for every engine."""
    r = c.reference
    if r.mode == "ahead" and r.is_policy:
        raise UserError(f"reference.mode=ahead scores beside training, but with reference.engine={r.engine} the "
                        "reference is the policy's own base; set reference.mode=cached or live, or reference=hf")
    if r.procs is not None and r.mode != "ahead":
        raise UserError(f"reference.procs={r.procs} would do nothing: with reference.mode={r.mode} the training "
                        "processes score; remove it, or set reference.mode=ahead")
    _validate_sync(c)
    if c.loss.needs_reference and is_adapter(Path(c.reference_path)):
        check_reference_adapter(c)
    if not c.loss.needs_reference:
        for key, default in (("path", None), ("engine", "hf"), ("mode", "cached")):
            if getattr(r, key) != default:
                raise _does_nothing(f"reference.{key}", getattr(r, key), f"loss.name={c.loss.name} uses no reference")


def _validate_sync(c: RunConfig) -> None:
    sync = c.reference.sync
    for key, value, modes in (("alpha", sync.alpha, ("soft",)), ("every_steps", sync.every_steps, ("soft", "hard"))):
        if value is not None and sync.mode not in modes:
            raise _does_nothing(f"reference.sync.{key}", value, f"reference.sync.mode={sync.mode}")
        if value is None and sync.mode in modes:
            raise UserError(f"reference.sync.{key} is not set; set "
                            f"reference.sync.{key}={0.6 if key == 'alpha' else 512}, or another value")
    if sync.alpha is not None and not 0 < sync.alpha <= 1:
        raise UserError(f"reference.sync.alpha={sync.alpha} must be greater than 0 and at most 1")
    if sync.mode == "none":
        return
    if not c.loss.needs_reference:
        raise _does_nothing("reference.sync.mode", sync.mode, f"loss.name={c.loss.name} uses no reference")
    if c.reference.mode != "live":
        raise UserError(f"reference.sync.mode={sync.mode} moves the reference while training runs, so its log-probs "
                        f"cannot be scored beforehand (reference.mode={c.reference.mode}); set reference.mode=live")
    if not c.reference.may_follow:
        raise UserError(f"reference.sync.mode={sync.mode} moves the reference's own weights, which "
                        f"reference.engine={c.reference.engine} does not have at hand; set reference=hf or "
                        "reference=zero")
    if c.trains_adapter:
        raise UserError(f"reference.sync.mode={sync.mode} needs a policy that trains whole weights; set "
                        "model.lora.rank=0, and give a whole model as model.path")


def _validate_zero(c: RunConfig) -> None:
    # the stage that "auto" becomes obeys these as well
    zero, stage = c.zero, c.zero.stage
    if stage not in (3, "auto"):
        if zero.offload_parameters != "none":
            raise UserError(f"zero.offload_parameters={zero.offload_parameters} needs zero.stage=3, not {stage}")
        for key, default in (("persistence_threshold", PERSISTENCE_THRESHOLD), ("secondary_partition", None)):
            if getattr(zero, key) != default:
                raise UserError(f"zero.{key}={getattr(zero, key)} does nothing with zero.stage={stage}, which keeps "
                                "every parameter whole; remove it, or set zero=zero3")
    _validate_secondary_partition(c)
    if stage is None and zero.reduce_dtype != "auto":
        raise UserError(f"zero.reduce_dtype={zero.reduce_dtype} does nothing with zero.stage=null, which has no other "
                        "ranks; remove it")
    if stage in (None, 0) and zero.offload_optimizer != "none":
        raise UserError(f"zero.offload_optimizer={zero.offload_optimizer} needs zero.stage=1, 2 or 3, not {stage}")
    if stage is None and (c.cluster.procs_per_node or 1) > 1:
        raise UserError("zero.stage=null is plain torch in one process, but "
                        f"cluster.procs_per_node={c.cluster.procs_per_node}; set zero=zero3 or "
                        "cluster.procs_per_node=1")
    if stage == 0 and c.model.dtype == "bf16":
        raise UserError("model.dtype=bf16 needs fp32 master weights, which DeepSpeed's zero.stage=0 has not; set "
                        "zero=zero1 (or higher), or zero=none in one process, or model.dtype=fp32")


def _validate_secondary_partition(c: RunConfig) -> None:
    ranks = c.zero.secondary_partition
    if ranks is None:
        return
    if ranks < 2:
        raise UserError(f"zero.secondary_partition={ranks} must be a number of ranks, 2 or more; as many as a node has "
                        "GPUs")
    if c.cluster.procs_per_node is not None and (c.cluster.nodes * c.cluster.procs_per_node) % ranks:
        raise UserError(f"zero.secondary_partition={ranks} does not divide the "
                        f"{c.cluster.nodes * c.cluster.procs_per_node} ranks; set it to "
                        f"cluster.procs_per_node={c.cluster.procs_per_node}")
