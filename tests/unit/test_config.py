"""Every mistake in a config is one message that names key, value and remedy; nothing is ignored."""
from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpo_dist.config.compose import compose, conf_dir, documented_keys, yaml_comments
from dpo_dist.config.decode import VARIANTS, decode
from dpo_dist.config.errors import UserError
from dpo_dist.config.options import to_dict
from dpo_dist.config.schema import RunConfig

MISTAKES = {
    "unknown key 'loss.bta': did you mean 'loss.beta'": ["loss.bta=1"],
    "unknown key 'trian': did you mean 'train'": ["+trian=1"],
    "unknown key 'data.train[0].fromat': did you mean 'format'": ["data.train=[{path: a, fromat: hh}]"],
    "loss=dppo is not a choice: did you mean 'dpo'": ["loss=dppo"],
    "model.path is not set; set model.path=": ["model.path=null"],
    "data.train[0].path is not set": ["data=hh"],
    "model.dtype='fp16' is not allowed": ["model.dtype=fp16"],
    "zero.stage=4 is not allowed": ["zero.stage=4"],
    "train.pairs_per_step='many' must be a whole number": ["train.pairs_per_step=many"],
    "train.pairs_per_step=0 must be greater than 0": ["train.pairs_per_step=0"],
    "optim.betas=[0.9] must have 2 entries": ["optim.betas=[0.9]"],
    "data.train=3 must be a list": ["data.train=3"],
    "loss 'sigmoyd' is unknown: did you mean 'sigmoid'": ["loss.name=sigmoyd"],
    "loss.simpo_gamma=1.0 is not used by loss 'sigmoid'; remove it": ["loss.simpo_gamma=1"],
    "loss.beta=0.2 is not used by loss 'sft'": ["loss=sft", "loss.beta=0.2"],
    "loss.f_alpha=0.5 needs loss.f_divergence=alpha_divergence": ["loss.f_alpha=0.5"],
    "a weighted sum takes loss.name=mixture": ["loss.terms={sft: 1}"],
    "loss.beta has another default for 'sigmoid_norm'": ["loss.name=mixture", "loss.terms={sigmoid: 1, "
                                                         "sigmoid_norm: 1}"],
    "loss.beta has another default for 'simpo'": ["loss.name=mixture", "loss.terms={sigmoid: 1, simpo: 1}"],
    "loss.ld_alpha=0.5 does not go with a loss that sorts": ["loss.name=mixture", "loss.terms={aot: 1, sigmoid: 1}",
                                                             "loss.ld_alpha=0.5"],
    "loss.label_smoothing=0.0 must be greater than 0": ["loss=robust", "loss.label_smoothing=0"],
    "loss.label_smoothing=0.7 must be between 0 and 0.5": ["loss.label_smoothing=0.7"],
    "reference.engine=adapter_off needs a LoRA policy": ["reference=adapter_off"],
    "adapter_off takes the policy's own base weights": ["reference=adapter_off", "model.lora.rank=4",
                                                        "reference.path=other"],
    "reference.offload='cpu' is not allowed: one of: disk, none with reference=hf; it goes with reference=zero": [
        "reference.offload=cpu"],
    "with reference=zero; it goes with reference=hf": ["reference=zero", "reference.offload=disk"],
    "unknown key 'reference.tensor_parallel_size': it goes with reference=tensor_parallel or reference=vllm": [
        "reference.tensor_parallel_size=2"],
    "reference.path=r would do nothing: loss.name=simpo uses no reference": ["loss=simpo", "reference.path=r"],
    "unknown key 'reference.urls': it goes with reference=vllm": ["reference.urls=[http://a]"],
    "reference.urls=('http://a',) and reference.server=python are both set": ["reference=vllm",
                                                                              "reference.urls=[http://a]",
                                                                              "reference.server=python"],
    "reference.server=podman run x has no {port}": ["reference=vllm", "reference.server='podman run x'"],
    "optim.betas=[0.9, 1.5] must each be at least 0 and less than 1": ["optim.betas=[0.9,1.5]"],
    "optim.min_lr_ratio=0.1 would do nothing: optim.schedule=constant": ["optim.schedule=constant",
                                                                         "optim.min_lr_ratio=0.1"],
    "optim.min_lr_ratio=1.5 must be between 0 and 1": ["optim.min_lr_ratio=1.5"],
    "optim.eps=-1.0 must be greater than 0": ["optim.eps=-1"],
    "model.lora.dora=True does nothing while model.lora.rank=0": ["model.lora.dora=true"],
    "export.what=both, but no adapter is trained": ["export.what=both"],
    "reference.engine=adapter needs a LoRA policy": ["reference=adapter", "reference.path=r"],
    "which is the base itself; set reference=adapter_off": ["reference=adapter", "model.lora.rank=4"],
    "with reference.engine=adapter the reference is the policy's own base": [
        "reference=adapter", "model.lora.rank=4", "reference.path=r", "reference.mode=ahead"],
    "unknown key 'optim.momentum': it goes with optim=muon": ["optim.momentum=0.9"],
    "optim.nesterov=true would do nothing with optim.momentum=0": ["optim=muon", "optim.momentum=0"],
    "optim.momentum=1.0 must be less than 1": ["optim=muon", "optim.momentum=1"],
    "model.lora.rank=4 trains two factors instead": ["optim=muon", "model.lora.rank=4"],
    "optim.name=muon multiplies matrices in its update": ["optim=muon", "zero.offload_optimizer=cpu"],
    "optim.name=adamw_8bit makes state small": ["optim.name=adamw_8bit", "zero.offload_optimizer=cpu"],
    "optim.name=cpu_adam updates state that lies in CPU memory": ["optim=cpu_adam"],
    "model.lora.rank=-4 must be 0 (no adapters) or greater": ["model.lora.rank=-4"],
    "model.quantization=nf4 freezes the weights, and model.lora.rank=0 trains nothing else": ["model.quantization=nf4"],
    "the reference is the same 4-bit weights, which reference.engine=zero cannot compute; set reference=adapter_off": [
        "model.quantization=nf4", "model.lora.rank=4", "reference=zero"],
    "which reference.engine=hf with reference.offload=disk cannot compute": [
        "model.quantization=nf4", "model.lora.rank=4", "reference.offload=disk"],
    "which reference.engine=vllm cannot compute; set reference=adapter_off or reference=hf, or reference.path=m": [
        "model.quantization=nf4", "model.lora.rank=4", "reference=vllm"],
    "reference.path=m would be those weights in full, but with model.quantization=nf4": [
        "model.quantization=nf4", "model.lora.rank=4", "reference=adapter_off", "reference.path=m"],
    "zero.persistence_threshold=5 does nothing with zero.stage=2": ["zero=zero2", "zero.persistence_threshold=5"],
    "is for the nodes of reference.nodes, which is not set": ["cluster=slurm",
                                                              "cluster.slurm.server_extra=['--mem=0']"],
    "cluster.slurm.server_extra has 'mem'": ["cluster=slurm", "reference=vllm", "reference.server=p",
                                             "reference.nodes=1", "cluster.slurm.server_extra=[mem]"],
    "reference.nodes=2 needs servers to start there": ["reference=vllm", "cluster=slurm", "reference.nodes=2"],
    "reference.nodes=2 are nodes that Slurm gives": ["reference=vllm", "reference.server=python", "reference.nodes=2"],
    "unknown key 'reference.nodes': it goes with reference=vllm": ["cluster=slurm", "reference.nodes=2"],
    "reference.tensor_parallel_size=2 does nothing with reference.engine=vllm": ["reference=vllm",
                                                                                 "reference.tensor_parallel_size=2"],
    "reference.audit.pairs=0 must be greater than 0": ["reference=vllm", "reference.audit.pairs=0"],
    "reference.requests.wait_seconds=2000.0 must be less than cluster.timeout_seconds": ["reference=vllm",
                                                                                          "reference.requests.wait_seconds=2000"],
    "unknown key 'tracking.mode': it goes with tracking=wandb": ["tracking=tensorboard", "tracking.mode=offline"],
    "reference.engine='vlm' is not allowed: did you mean 'vllm'": ["reference.engine=vlm", "reference=hf"],
    "reference=vlm is not a choice: did you mean 'vllm'": ["reference.engine=vlm"],
    "loss=mixture is not a choice: loss=rpo and loss=mpo are mixtures; for one of your own set loss.name=mixture and "
    "loss.terms": [
        "loss=mixture"],
    "experiment=nowhere.yaml: there is no such file": ["experiment=nowhere.yaml"],
    "zero.offload_parameters=cpu needs zero.stage=3": ["zero=zero2", "zero.offload_parameters=cpu"],
    "model.gradient_checkpointing=-1 must be": ["model.gradient_checkpointing=-1"],
    "model.gradient_checkpointing='some' is not allowed: one of auto, true or false, a whole number": [
        "model.gradient_checkpointing=some"],
    "zero.secondary_partition=2 does nothing with zero.stage=2": ["zero=zero2", "zero.secondary_partition=2"],
    "zero.secondary_partition=1 must be": ["zero.secondary_partition=1"],
    "zero.secondary_partition=8 does not divide the 12 ranks": ["zero.secondary_partition=8",
                                                                "cluster.procs_per_node=12"],
    "zero.reduce_dtype=fp32 does nothing with zero.stage=null": ["zero=none", "zero.reduce_dtype=fp32"],
    "zero.stage=null is plain torch in one process": ["zero=none", "cluster.procs_per_node=2"],
    "which DeepSpeed's zero.stage=0 has not": ["zero=zero0", "model.dtype=bf16"],
    "model.lora.alpha=8.0 does nothing while model.lora.rank=0": ["model.lora.alpha=8"],
    "model.lora.target_modules=('nope',) does nothing while model.lora.rank=0": ["model.lora.target_modules=[nope]"],
    "train.eval_every_steps=5 has nothing to evaluate": ["train.eval_every_steps=5"],
    "train.keep_best=rewards/accuracy is not allowed: did you mean 'rewards/accuracies'": [
        "train.keep_best=rewards/accuracy", "data.eval_fraction=0.1"],
    "train.keep_best=kl is not allowed: one of: loss, rewards/accuracies, rewards/margins": ["train.keep_best=kl"],
    "train.keep_best=loss is measured on held-out pairs, and there are none": ["train.keep_best=loss"],
    "train.keep_best=rewards/margins is not measured with loss.name=sft": [
        "train.keep_best=rewards/margins", "data.eval_fraction=0.1", "loss=sft"],
    "train.save_every_minutes=0.0 must be greater than 0": ["train.save_every_minutes=0"],
    "eval.samples=4 answers held-out prompts, and there are none": ["eval.samples=4"],
    "eval.samples=-1 must be between 0 and inf": ["eval.samples=-1"],
    "eval.temperature=0.7 would do nothing: eval.samples=0": ["eval.temperature=0.7"],
    "eval.max_new_tokens=8 would do nothing: eval.samples=0": ["eval.max_new_tokens=8"],
    "export.push_to_hub=mine is no name of a model on the hub; write owner/name": [
        "export.push_to_hub=mine", "run.offline=false"],
    "export.push_to_hub=me/my--model is no name": ["export.push_to_hub=me/my--model", "run.offline=false"],
    "export.push_to_hub=me/mine needs the network; set run.offline=false": ["export.push_to_hub=me/mine"],
    "unknown key 'tracking.uri': it goes with tracking=mlflow": ["tracking.uri=http://a"],
    "reference.mode=live would do nothing: loss.name=orpo uses no reference": ["loss=orpo", "reference.mode=live"],
    "reference.mode=ahead scores beside training, but": ["reference=adapter_off", "model.lora.rank=4",
                                                         "reference.mode=ahead"],
    "reference.procs=2 would do nothing": ["reference.procs=2"],
    "reference.sync.alpha=0.5 would do nothing": ["reference.sync.alpha=0.5"],
    "reference.sync.alpha=0.5 would do nothing: reference.sync.mode=hard": ["reference.sync.mode=hard",
                                                                            "reference.sync.alpha=0.5"],
    "reference.sync.every_steps is not set; set": ["reference.sync.mode=hard", "reference.mode=live"],
    "reference.sync.alpha=1.5 must be greater than 0 and at most 1": ["reference.sync={mode: soft, alpha: 1.5, "
                                                                      "every_steps: 2}"],
    "(reference.mode=cached); set reference.mode=live": ["reference.sync={mode: hard, every_steps: 2}"],
    "(reference.mode=ahead); set reference.mode=live": ["reference.sync={mode: hard, every_steps: 2}",
                                                        "reference.mode=ahead"],
    "which reference.engine=adapter_off does not have at hand": ["reference=adapter_off", "model.lora.rank=4",
                                                                 "reference.mode=live",
                                                                 "reference.sync={mode: hard, every_steps: 2}"],
    "needs a policy that trains whole weights; set model.lora.rank=0": ["model.lora.rank=4", "reference.mode=live",
                                                                        "reference.sync={mode: hard, every_steps: 2}"],
    "data.eval_fraction=0.1 and data.eval are both set": ["data.eval=[{path: a}]", "data.eval_fraction=0.1"],
    "data.eval[0].weight=2.0 would do nothing": ["data.eval=[{path: a, weight: 2}]"],
    "unknown key 'cluster.slurm.partition': it goes with cluster=slurm": ["cluster.slurm.partition=gpu"],
    "cluster.max_restarts=-1 must be 0 (never) or greater": ["cluster.max_restarts=-1"],
    "cluster.min_nodes=3 is more than cluster.nodes=2": ["cluster=slurm", "cluster.nodes=2", "cluster.min_nodes=3"],
    "cluster.nodes=2 with cluster=local: one machine cannot start others": ["cluster.nodes=2"],
    "cluster.environment.OMP_NUM_THREADS is not a setting of the network": ["cluster.environment={OMP_NUM_THREADS: 4}"],
    "cluster.procs_per_node=null: from here the nodes' devices cannot be counted": ["cluster=slurm",
                                                                                    "cluster.procs_per_node=null"],
    "cluster.slurm.signal_seconds=0 must be greater than 0": ["cluster=slurm", "cluster.slurm.signal_seconds=0"],
    "cluster.slurm.extra has 'mem=0', which is not an option of sbatch": ["cluster=slurm",
                                                                          "cluster.slurm.extra=['mem=0']"],
    "does nothing without cluster.slurm.container_image": ["cluster=slurm",
                                                           "cluster.slurm.container_mounts=['/data:/data']"],
    "cannot read the override 'data.train=['": ["data.train=["],
}


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_is_one_message_with_key_value_and_remedy(message: str):
    with pytest.raises(UserError, match=re.escape(message)) as found:
        compose(["model.path=m", *MISTAKES[message]])
    assert "\n" not in str(found.value)


def test_a_command_without_a_model_says_so():
    with pytest.raises(UserError, match=r"model\.path is not set; set model\.path="):
        compose([])


def test_the_command_answers_a_mistake_with_exit_code_2_and_no_traceback_and_without_torch():
    script = ("import sys; from dpo_dist.launcher.cli import main; code = main(sys.argv[1:]); assert 'torch' not in "
              "sys.modules; sys.exit(code)")
    done = subprocess.run([sys.executable, "-c", script, "train", "model.path=m", "optim.learning_rate=1"],
                          capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown key 'optim.learning_rate'")
    assert len(done.stderr.splitlines()) == 1


def test_every_yaml_key_has_a_comment():
    for path in conf_dir().rglob("*.yaml"):
        for key, _, comment in yaml_comments(path):
            assert comment, f"{path.name}: {key} has no comment"


def test_help_lists_every_key_of_the_configuration():
    config = to_dict(compose(["model.path=m"]))
    listed = {key for key, _, _ in documented_keys()}
    for group in ("model", "data", "reference", "optim", "train", "eval", "export", "zero", "cluster", "run"):
        for key, value in config[group].items():
            assert f"{group}.{key}" in listed or any(f"{group}.{key}.{k}" in listed
                                                     for k in (value or {})), f"{group}.{key}"


def test_every_group_choice_composes():
    for folder in conf_dir().iterdir():
        if not folder.is_dir() or folder.name in ("experiment", "sweep"):
            continue
        for choice in (f.stem for f in folder.glob("*.yaml") if not f.stem.startswith("_")):
            extra = ["model.lora.rank=8"] if choice in ("adapter_off", "adapter") else []
            extra += ["reference.path=r"] if choice == "adapter" else []
            extra += ["zero.offload_optimizer=cpu"] if choice == "cpu_adam" else []
            extra += ["data.train.0.path=rows"] if folder.name == "data" and choice != "default" else []
            compose(["model.path=m", f"{folder.name}={choice}", *extra])


def test_every_experiment_composes():
    for path in (conf_dir() / "experiment").glob("*.yaml"):
        compose(["model.path=m", f"experiment={path.stem}"])


def test_a_losss_own_defaults_are_filled_in_and_shown():
    assert compose(["model.path=m"]).loss.beta == 0.1
    assert compose(["model.path=m", "loss=simpo"]).loss.simpo_gamma == 1.0
    assert compose(["model.path=m", "loss.name=sft"]).loss.beta is None
    assert compose(["model.path=m", "loss=sigmoid_norm"]).loss.beta == 5.0


def test_a_config_survives_being_written_and_decoded():
    config = compose(["model.path=m", "loss=mpo", "data.train=[{path: a, weight: 0.5}, b]"])
    assert decode(to_dict(config)) == config


def test_the_same_command_names_the_same_folder_and_another_beta_another():
    one = compose(["model.path=m"])
    assert one.run_dir == compose(["model.path=m", "cluster.procs_per_node=4", "train.log_every_steps=7"]).run_dir
    assert one.run_dir != compose(["model.path=m", "loss.beta=0.2"]).run_dir


def test_the_key_that_names_a_variant_chooses_it_as_its_group_does():
    for key, group in (("reference.engine=zero", "reference=zero"), ("tracking.name=wandb", "tracking=wandb"),
                       ("cluster.name=slurm", "cluster=slurm")):
        assert compose(["model.path=m", key]) == compose(["model.path=m", group])


def test_a_path_alone_is_a_data_set():
    config = compose(["model.path=m", "data.train=pairs.jsonl", "data.eval=held_out.jsonl"])
    assert [d.path for d in (*config.data.train, *config.data.eval)] == ["pairs.jsonl", "held_out.jsonl"]
    assert config.data == compose(["model.path=m", "data.train=[{path: pairs.jsonl}]",
                                   "data.eval=[held_out.jsonl]"]).data


def test_an_experiment_may_be_a_file_of_ones_own(tmp_path: Path):
    mine = tmp_path / "my recipe-1.yaml"
    mine.write_text("defaults:\n  - override /loss: ipo\n\noptim:\n  lr: 3e-6\n")
    config = compose(["model.path=m", f"experiment='{mine}'", "train.seed=5"])
    assert (config.loss.name, config.optim.lr, config.train.seed) == ("ipo", 3e-6, 5)


def sections(kind: type) -> Iterator[type]:
    """The config dataclasses below one, itself first."""
    yield kind
    for hint in typing.get_type_hints(kind).values():
        for part in (hint, *typing.get_args(hint)):
            if part in VARIANTS:
                for variant in VARIANTS[part][1].values():
                    yield from sections(variant)
            elif dataclasses.is_dataclass(part):
                yield from sections(part)


def test_every_field_says_what_it_decides_and_only_what_is_trained_names_a_run():
    for section in sections(RunConfig):
        for spec in dataclasses.fields(section):
            assert "decides" in spec.metadata, f"{section.__name__}.{spec.name} is declared without option()"
    identity = compose(["model.path=m"]).identity_dict()
    assert identity["reference"] == {"path": None, "sync": {"mode": "none", "alpha": None, "every_steps": None}}
    assert not {"cluster", "tracking", "run", "zero", "experiment", "eval", "export"} & identity.keys()


def test_what_is_exported_names_a_run_and_how_it_is_followed_does_not():
    plain, held_out = compose(["model.path=m"]), ["model.path=m", "data.eval_fraction=0.1"]
    followed = compose([*held_out, "train.save_every_minutes=10", "eval.samples=8", "export.push_to_hub=me/it",
                        "run.offline=false", "tracking=mlflow"])
    assert followed.identity() == compose(held_out).identity() != plain.identity()
    assert compose([*held_out, "train.keep_best=loss"]).identity() != compose(held_out).identity()


@pytest.mark.parametrize("words, digest", [
    ([], "7463e6e54e6c"), (["reference=zero", "reference.offload=cpu"], "7463e6e54e6c"), (["loss=mpo"], "a1af4e3be3ff"),
    (["data.train=[a,{path: b,weight: 2}]", "model.lora.rank=3"], "0031caaee526"),
    (["reference=vllm", "cluster=slurm"], "7463e6e54e6c")])
def test_runs_and_caches_of_before_are_found_again(words: list[str], digest: str):
    assert compose(["model.path=m", *words]).identity()[:12] == digest


def test_help_shows_a_comment_that_goes_on_over_several_lines(tmp_path: Path):
    (tmp_path / "a.yaml").write_text("one: 1          # first\n                # and second\nsection:        # of two\n"
                                     "                # not one's\n  two: 2        # third\n")
    assert yaml_comments(tmp_path / "a.yaml") == [("one", "1", "first and second"), ("section.two", "2", "third")]
