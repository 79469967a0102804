"""What a RunConfig must obey: a loss's own defaults, ranges, and keys that contradict each other. No torch here."""
from __future__ import annotations

import dataclasses
import math
from typing import Any

from dpo_dist.config.errors import UserError, nearest
from dpo_dist.config.loss_options import LOSS_OPTIONS, MIXTURE
from dpo_dist.config.schema import ClusterConfig, LossConfig, RunConfig

NETWORK_VARIABLES = ("NCCL_", "GLOO_", "TORCH_NCCL_", "UCX_", "FI_")
PERSISTENCE_THRESHOLD = 100_000          # as in conf/zero/zero3.yaml


def resolve_loss(loss: LossConfig) -> LossConfig:
    """The loss with its own defaults filled in. An option that none of its terms uses is an error, never ignored."""
    if (loss.name == MIXTURE) != bool(loss.terms):
        raise UserError(f"loss.name={loss.name} with loss.terms={loss.terms}: a weighted sum takes loss.name={MIXTURE} and "
                        "loss.terms={sigmoid: 1.0, sft: 0.5}; a single loss takes no terms")
    for name in loss.weights:
        if name not in LOSS_OPTIONS:
            raise UserError(f"loss '{name}' is unknown: {nearest(name, [*LOSS_OPTIONS, MIXTURE])}")
    used: dict[str, Any] = {}
    for name in loss.weights:
        for option, default in LOSS_OPTIONS[name].defaults.items():
            if used.setdefault(option, default) != default and getattr(loss, option) is None:
                raise UserError(f"loss.{option} has another default for '{name}' than for the other terms of "
                                f"'{'+'.join(loss.weights)}'; set loss.{option}=...")
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
        raise UserError(f"loss.ld_alpha={filled['ld_alpha']} does not go with a loss that sorts over the step; remove it")
    return resolved


def validate(c: RunConfig) -> None:
    """Raises UserError for values out of range and for keys that contradict each other."""
    def positive(**values: float | None) -> None:
        for key, value in values.items():
            if value is not None and not value > 0:
                raise UserError(f"{key.replace('__', '.')}={value} must be greater than 0")

    positive(data__max_length=c.data.max_length, train__pairs_per_step=c.train.pairs_per_step,
             train__tokens_per_microbatch=c.train.tokens_per_microbatch, train__epochs=c.train.epochs,
             train__max_steps=c.train.max_steps, train__log_every_steps=c.train.log_every_steps,
             train__eval_every_steps=c.train.eval_every_steps, train__save_every_steps=c.train.save_every_steps,
             train__keep_checkpoints=c.train.keep_checkpoints, cluster__nodes=c.cluster.nodes,
             cluster__procs_per_node=c.cluster.procs_per_node, cluster__timeout_seconds=c.cluster.timeout_seconds,
             cluster__peak_tflops=c.cluster.peak_tflops, cluster__jobs_at_once=c.cluster.jobs_at_once,
             reference__procs=c.reference.procs, reference__nodes=c.reference.nodes, reference__sync__every_steps=c.reference.sync.every_steps,
             reference__tensor_parallel_size=c.reference.tensor_parallel_size,
             optim__lr=c.optim.lr, loss__beta=c.loss.beta,
             loss__discopop_tau=c.loss.discopop_tau)
    positive(optim__eps=c.optim.eps)
    for beta in c.optim.betas:
        if not 0 <= beta < 1:
            raise UserError(f"optim.betas={list(c.optim.betas)} must each be at least 0 and less than 1")
    if c.model.lora.rank < 0:
        raise UserError(f"model.lora.rank={c.model.lora.rank} must be 0 (no adapters) or greater")
    _between("optim.warmup_ratio", c.optim.warmup_ratio, 0, 1)
    _between("optim.max_grad_norm", c.optim.max_grad_norm, 0, math.inf)
    _between("optim.weight_decay", c.optim.weight_decay, 0, math.inf)
    _between("data.eval_fraction", c.data.eval_fraction, 0, 0.9)
    _between("loss.ld_alpha", c.loss.ld_alpha, 0, 1)
    _validate_label_smoothing(c.loss)
    for split, sets in (("train", c.data.train), ("eval", c.data.eval)):
        for i, d in enumerate(sets):
            positive(**{f"data__{split}[{i}]__weight": d.weight})
            if split == "eval" and d.weight != 1.0:
                raise UserError(f"data.eval[{i}].weight={d.weight} would do nothing: held-out pairs are each counted once; remove it")
    if c.data.eval and c.data.eval_fraction:
        raise UserError(f"data.eval_fraction={c.data.eval_fraction} and data.eval are both set; keep one of them")
    if c.model.gradient_checkpointing != "auto" and c.model.gradient_checkpointing < 0:
        raise UserError(f"model.gradient_checkpointing={c.model.gradient_checkpointing} must be auto, true, false, or a "
                        "number of layers, 0 or more")
    if c.model.lora.rank == 0 and c.model.lora.alpha is not None:
        raise UserError(f"model.lora.alpha={c.model.lora.alpha} does nothing while model.lora.rank=0; set model.lora.rank=16")
    if c.model.lora.rank == 0 and c.model.lora.target_modules != "all-linear":
        raise UserError(f"model.lora.target_modules={c.model.lora.target_modules} does nothing while model.lora.rank=0; set model.lora.rank=16")
    if c.train.eval_every_steps and not c.data.eval and not c.data.eval_fraction:
        raise UserError(f"train.eval_every_steps={c.train.eval_every_steps} has nothing to evaluate; set data.eval or data.eval_fraction=0.05")
    _validate_reference(c)
    _validate_zero(c)
    _validate_cluster(c.cluster)


def _validate_label_smoothing(loss: LossConfig) -> None:
    _between("loss.label_smoothing", loss.label_smoothing, 0, 0.5)
    for name in ("robust", "exo_pair"):
        if name in loss.weights and not loss.label_smoothing:
            raise UserError(f"loss.label_smoothing={loss.label_smoothing} must be greater than 0 for loss '{name}'")
    if loss.label_smoothing == 0.5:
        raise UserError("loss.label_smoothing=0.5 leaves no preference to learn; set it below 0.5")


def _validate_reference(c: RunConfig) -> None:
    if c.reference.engine == "adapter_off":
        if c.model.lora.rank == 0:
            raise UserError("reference.engine=adapter_off needs a LoRA policy; set model.lora.rank=16, or reference.engine=hf")
        if c.reference.path not in (None, c.model.path):
            raise UserError(f"reference.path={c.reference.path} differs from model.path={c.model.path}, but adapter_off takes the "
                            "policy's own base weights as reference; remove reference.path or set reference.engine=hf")
    engine_of = {"cpu": "zero", "disk": "hf"}
    if c.reference.offload != "none" and c.reference.engine != engine_of[c.reference.offload]:
        raise UserError(f"reference.offload={c.reference.offload} is only for reference.engine={engine_of[c.reference.offload]}, "
                        f"not {c.reference.engine}")
    splits = c.reference.engine == "tensor_parallel" or (c.reference.engine == "vllm" and c.reference.server)
    if c.reference.tensor_parallel_size is not None and not splits:
        raise UserError(f"reference.tensor_parallel_size={c.reference.tensor_parallel_size} does nothing with reference.engine="
                        f"{c.reference.engine}; remove it, set reference=tensor_parallel, or reference.server for reference=vllm")
    _validate_served(c)
    if c.reference.mode == "ahead" and c.reference.engine == "adapter_off":
        raise UserError("reference.mode=ahead scores beside training, but with reference.engine=adapter_off the reference is the policy "
                        "itself; set reference.mode=cached or live, or reference.engine=hf")
    if c.reference.procs is not None and c.reference.mode != "ahead":
        raise UserError(f"reference.procs={c.reference.procs} would do nothing: with reference.mode={c.reference.mode} the training processes "
                        "score; remove it, or set reference.mode=ahead")
    _validate_sync(c)
    if not c.loss.needs_reference:
        for key, default in (("path", None), ("engine", "hf"), ("mode", "cached")):
            if getattr(c.reference, key) != default:
                raise UserError(f"reference.{key}={getattr(c.reference, key)} would do nothing: loss.name={c.loss.name} uses no reference; "
                                "remove it")


def _validate_served(c: RunConfig) -> None:
    """The keys of a reference in servers of its own."""
    r = c.reference
    if c.cluster.slurm is not None and c.cluster.slurm.server_extra and not r.nodes:
        raise UserError(f"cluster.slurm.server_extra={list(c.cluster.slurm.server_extra)} is for the nodes of reference.nodes, which is not "
                        "set; remove it, or set reference.nodes")
    if r.engine != "vllm":
        for key in ("urls", "server", "nodes", "served_name", "version", "quantization", "requests", "audit"):
            if getattr(r, key):
                raise UserError(f"reference.{key}={getattr(r, key)} is only for reference=vllm, not {r.engine}; remove it")
        return
    if r.requests is None or r.audit is None:
        raise UserError("reference.engine=vllm needs reference.requests and reference.audit; choose it by reference=vllm, which sets them")
    if r.urls and r.server and not r.nodes:              # of servers on nodes of their own, the job itself adds the URLs
        raise UserError(f"reference.urls={r.urls} and reference.server={r.server} are both set; keep one of them")
    if r.nodes and not r.server:
        raise UserError(f"reference.nodes={r.nodes} needs servers to start there; set reference.server to the python of an environment that "
                        "holds vLLM")
    if r.nodes and c.cluster.name != "slurm":
        raise UserError(f"reference.nodes={r.nodes} are nodes that Slurm gives; set cluster=slurm, or start the servers and set reference.urls")
    if r.server and len(r.server.split()) > 1 and "{port}" not in r.server:
        raise UserError(f"reference.server={r.server} has no {{port}}, so nobody knows where it would listen; write --port {{port}}")
    for section in ("requests", "audit"):
        for key, value in dataclasses.asdict(getattr(r, section)).items():
            if isinstance(value, int | float) and not value > 0:
                raise UserError(f"reference.{section}.{key}={value} must be greater than 0")
    if r.requests.wait_seconds >= c.cluster.timeout_seconds:
        raise UserError(f"reference.requests.wait_seconds={r.requests.wait_seconds} must be less than cluster.timeout_seconds="
                        f"{c.cluster.timeout_seconds}, after which the other ranks give up; lower it")


def _validate_sync(c: RunConfig) -> None:
    sync = c.reference.sync
    for key, value, modes in (("alpha", sync.alpha, ("soft",)), ("every_steps", sync.every_steps, ("soft", "hard"))):
        if value is not None and sync.mode not in modes:
            raise UserError(f"reference.sync.{key}={value} would do nothing: reference.sync.mode={sync.mode}; remove it")
        if value is None and sync.mode in modes:
            raise UserError(f"reference.sync.{key} is not set; set reference.sync.{key}={0.6 if key == 'alpha' else 512}, or another value")
    if sync.alpha is not None and not 0 < sync.alpha <= 1:
        raise UserError(f"reference.sync.alpha={sync.alpha} must be greater than 0 and at most 1")
    if sync.mode == "none":
        return
    if not c.loss.needs_reference:
        raise UserError(f"reference.sync.mode={sync.mode} would do nothing: loss.name={c.loss.name} uses no reference; remove it")
    if c.reference.mode != "live":
        raise UserError(f"reference.sync.mode={sync.mode} moves the reference while training runs, so its log-probs cannot be scored "
                        f"beforehand (reference.mode={c.reference.mode}); set reference.mode=live")
    if c.reference.engine not in ("hf", "zero"):
        raise UserError(f"reference.sync.mode={sync.mode} moves the reference's own weights, which reference.engine={c.reference.engine} does "
                        "not have at hand; set reference=hf or reference=zero")
    if c.reference.offload == "disk":
        raise UserError(f"reference.sync.mode={sync.mode} cannot move weights that stay in their files; set reference.offload=none")
    if c.model.lora.rank:
        raise UserError(f"reference.sync.mode={sync.mode} needs a policy that trains whole weights; set model.lora.rank=0")


def _validate_zero(c: RunConfig) -> None:
    stage = c.zero.stage                                 # "auto" becomes the stage that fits, which then obeys these as well
    if stage not in (3, "auto"):
        if c.zero.offload_parameters != "none":
            raise UserError(f"zero.offload_parameters={c.zero.offload_parameters} needs zero.stage=3, not {stage}")
        if c.zero.persistence_threshold != PERSISTENCE_THRESHOLD:
            raise UserError(f"zero.persistence_threshold={c.zero.persistence_threshold} does nothing with zero.stage={stage}, which keeps "
                            "every parameter whole; remove it, or set zero=zero3")
        if c.zero.secondary_partition is not None:
            raise UserError(f"zero.secondary_partition={c.zero.secondary_partition} does nothing with zero.stage={stage}, which keeps "
                            "every parameter whole; remove it, or set zero=zero3")
    _validate_secondary_partition(c)
    if stage is None and c.zero.reduce_dtype != "auto":
        raise UserError(f"zero.reduce_dtype={c.zero.reduce_dtype} does nothing with zero.stage=null, which has no other ranks; remove it")
    if stage in (None, 0) and c.zero.offload_optimizer != "none":
        raise UserError(f"zero.offload_optimizer={c.zero.offload_optimizer} needs zero.stage=1, 2 or 3, not {stage}")
    if stage is None and (c.cluster.procs_per_node or 1) > 1:
        raise UserError(f"zero.stage=null is plain torch in one process, but cluster.procs_per_node={c.cluster.procs_per_node}; "
                        "set zero=zero3 or cluster.procs_per_node=1")
    if stage == 0 and c.model.dtype == "bf16":
        raise UserError("model.dtype=bf16 needs fp32 master weights, which DeepSpeed's zero.stage=0 has not; set zero=zero1 (or higher), or "
                        "zero=none in one process, or model.dtype=fp32")


def _validate_secondary_partition(c: RunConfig) -> None:
    ranks = c.zero.secondary_partition
    if ranks is None:
        return
    if ranks < 2:
        raise UserError(f"zero.secondary_partition={ranks} must be a number of ranks, 2 or more; as many as a node has GPUs")
    if c.cluster.procs_per_node is not None and (c.cluster.nodes * c.cluster.procs_per_node) % ranks:
        raise UserError(f"zero.secondary_partition={ranks} does not divide the {c.cluster.nodes * c.cluster.procs_per_node} ranks; set it to "
                        f"cluster.procs_per_node={c.cluster.procs_per_node}")


def _validate_cluster(c: ClusterConfig) -> None:
    for name in c.environment or {}:
        if not name.startswith(NETWORK_VARIABLES):
            raise UserError(f"cluster.environment.{name} is not a setting of the network between ranks (those begin with "
                            f"{', '.join(NETWORK_VARIABLES)}); set it in the shell, or in cluster.slurm.setup")
    if c.name == "local":
        if c.nodes > 1:
            raise UserError(f"cluster.nodes={c.nodes} with cluster=local: one machine cannot start others; take cluster=slurm, or run "
                            "launch/node.sh on each machine (or launch/hosts.sh once) and leave cluster.nodes out")
        if c.slurm is not None:
            raise UserError("cluster.slurm is set, but cluster=local does nothing with it; set cluster=slurm")
        return
    if c.slurm is None:
        raise UserError("cluster.name=slurm without cluster.slurm; set cluster=slurm, which brings it")
    if c.procs_per_node is None:
        raise UserError("cluster.procs_per_node=null: from here the nodes' devices cannot be counted; set cluster.procs_per_node=8, one a GPU")
    if c.slurm.signal_seconds <= 0:
        raise UserError(f"cluster.slurm.signal_seconds={c.slurm.signal_seconds} must be greater than 0")
    if c.slurm.max_requeues < 0:
        raise UserError(f"cluster.slurm.max_requeues={c.slurm.max_requeues} must be 0 (never) or greater")
    if c.slurm.container_mounts and c.slurm.container_image is None:
        raise UserError(f"cluster.slurm.container_mounts={c.slurm.container_mounts} does nothing without cluster.slurm.container_image; set it")
    for key, lines in (("extra", c.slurm.extra), ("server_extra", c.slurm.server_extra)):
        for line in lines:
            if not line.startswith("-"):
                raise UserError(f"cluster.slurm.{key} has '{line}', which is not an option of sbatch; write it as in '--cpus-per-task=16'")


def _between(key: str, value: float | None, low: float, high: float) -> None:
    if value is not None and not low <= value <= high:
        raise UserError(f"{key}={value} must be between {low} and {high}")
