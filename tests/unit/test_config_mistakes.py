"""Whatever stands in a command or in an experiment's file gives a config or one line, never a library's traceback."""
from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from conftest import dpo_dist
from hypothesis import given, settings
from hypothesis import strategies as st
from mutated import VALUES

from dpo_dist.config.compose import compose, documented_keys, parsed_for_sweep
from dpo_dist.config.decode import decode
from dpo_dist.config.errors import UserError
from dpo_dist.config.options import to_dict
from dpo_dist.config.schema import RunConfig
from dpo_dist.config.words import quoted
from dpo_dist.launcher.sweep.multirun import compose_each

# {a word: how its line begins, or what it holds}
MISTAKES = {
    "zero=true": "zero=true is not a choice: one of: auto, none, zero0",
    "data=null": "data=null is not a choice: one of: alpaca, arena",
    "tracking=1e309": "tracking=1e309 is not a choice: one of: mlflow, none",
    "experiment={a: b}": "experiment={a: b} is not a choice: one of: first_run",
    "experiment=first_rum": "experiment=first_rum is not a choice: did you mean 'first_run'?",
    "experiment=/etc": "experiment=/etc is not a choice",
    "experiment=null": "experiment=null is not a choice",
    "loss=../loss/ipo": "loss=../loss/ipo is not a choice",
    "loss=[dpo,ipo]": "loss=[dpo,ipo] is not a choice",
    "loss@optim=ipo": "'loss@optim=ipo': a group has its one place; write loss=...",
    "++loss=ipo": "cannot set '++loss=ipo': force-add of config groups is not supported",
    "~loss": "loss is missing; set loss=...",
    "~train.seed": "train.seed is missing; set train.seed=...",
    "~zero=x": "cannot set '~zero=x': Could not delete",
    "+train.seed=1": "cannot set '+train.seed=1': Could not append to config.",
    "tracking=1,2,3": "'tracking=1,2,3' has several values, which are the runs of a sweep: write dpo-dist run -m",
    "train.seed=range(1,3)": "'train.seed=range(1,3)' has several values",
    "train.seed=int(abc)": "cannot read the override 'train.seed=int(abc)': write key=value",
    "zero": "cannot read the override 'zero': write key=value",
    "=x": "'=x' has no key: write key=value",
    "hydra.run.dir=x": "'hydra.run.dir=x' would do nothing without a sweep",
    "+sweep=beta_lr": "'+sweep=beta_lr' would do nothing without a sweep",
    "train=[1]": "cannot set 'train=[1]': Cannot merge DictConfig with ListConfig",
    "train=null": "train=None must be a mapping with keys pairs_per_step",
    "run.dir=${oc.env:HOME}": "'run.dir=${oc.env:HOME}': ${...:...} takes a value from outside the config",
    "run.dir='\\\\${oc.env:HOME}'": "takes a value from outside the config",
    "run.dir='${${loss.name}}'": "takes a value from outside the config",
    "run.dir=${run.dir}": "cannot set 'run.dir=${run.dir}': Recursive interpolation detected",
    "run.dir='${'": "cannot set 'run.dir='${''",
    "run.dir=a\nb": "cannot read the override 'run.dir=a\\nb'",
    "run.dir=a\0b": "cannot read the override 'run.dir=a\\x00b'",
    "run.dir=caf\udce9": "'run.dir=caf\\udce9' is not UTF-8 at character 12",
    "run.dir=''": "run.dir is empty; give a text, or leave it out",
    "model.path=''": "model.path is empty",
    "run.dir=" + "x" * 300_000: "has 300,008 characters, and 200,000 are read at most",
    "model.path=" + "x" * 5_000: "cannot be looked at: File name too long; give another path",
    "loss.beta=nan": "loss.beta=nan must be a finite number",
    "optim.lr=1e309": "optim.lr=inf must be a finite number",
    "optim.lr='nan'": "optim.lr=nan must be a finite number",
    "loss.simpo_gamma=nan": "loss.simpo_gamma=nan must be a finite number",
    "data.chat_template_kwargs={a: inf}": "data.chat_template_kwargs.a=inf must be a finite number",
    "train.seed=1" + "0" * 30: "train.seed=10^30 has more than the 64 bits of a whole number",
    "train.pairs_per_step=1e300": "train.pairs_per_step=10^300 has more than the 64 bits",
    "optim.lr=-1" + "0" * 400: "optim.lr=-10^400 has more than the 64 bits",
    "train.seed=" + "1" * 5_000: "cannot read the override 'train.seed=111",
    "data.train=" + "[" * 40 + "]" * 40: "is nested more than 30 deep",
    "data.train=" + "[" * 400 + "]" * 400: "maximum recursion depth exceeded",
    "data.train={}": "cannot set 'data.train={}'",
}


@pytest.mark.parametrize("word", MISTAKES, ids=lambda word: ascii(word[:40]))
def test_a_word_that_no_library_expects_is_told_in_one_line(word: str):
    with pytest.raises(UserError) as told:
        compose([word] if word.startswith("model.path") else ["model.path=m", word])
    line = str(told.value)
    assert MISTAKES[word] in line and "\n" not in line and len(line) < 5_000
    line.encode()


FILES = {
    "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
        f"{key}: &{key} [{', '.join([f'*{before}'] * 9)}]\n" for before, key in pairwise("abcdef")):
        "the file holds more than 100,000 values, its aliases written out",
    "a: &a [*a]": "is no YAML that can be read: maximum recursion depth",
    "a: " + "[" * 2_000 + "]" * 2_000: "is no YAML that can be read: maximum recursion depth",
    "[1, 2]": "the file holds list, and no mapping",
    "": "the file holds NoneType, and no mapping",
    "a: !!python/object/apply:os.system [ls]": "is no YAML that can be read: could not determine a constructor",
    "train: {seed: 1, seed: 2}": "found duplicate key seed",
    "train: {seed: !!binary aGVsbG8=}": "train.seed is bytes, which no key takes",
    "train: !!set {a, b}": "is no YAML that can be read",
    "train: {seed: 0x" + "f" * 6_000 + "}": "has more than the 64 bits",
    "run: {dir: '${oc.env:HOME}'}": "takes a value from outside the config",
    'run: {dir: "\\ud800"}': "run.dir='\\ud800' holds '\\ud800', which no text may",
    'run: {dir: "a\\0b"}': "run.dir='a\\x00b' holds '\\x00', which no text may",
    "hydra: {run: {dir: x}}": "its key hydra would do nothing",
    "defaults: 3": "defaults must be a list (got int)",
    "defaults:\n  - override /loss: nope": "Could not find 'loss/nope'",
    "1: 2": "unknown key '1'",
}


@pytest.mark.parametrize("text", FILES, ids=lambda text: ascii(text[:40]))
def test_an_experiments_file_that_says_nothing_sound_is_told_in_one_line(tmp_path: Path, text: str):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as told:
        compose(["model.path=m", f"experiment={file}"])
    assert FILES[text] in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize("content", [b"a: \xe9\n", bytes(range(256)), b"\0"])
def test_an_experiments_file_that_is_no_text_is_told(tmp_path: Path, content: bytes):
    (tmp_path / "mine.yaml").write_bytes(content)
    with pytest.raises(UserError, match="is no YAML that can be read"):
        compose(["model.path=m", f"experiment={tmp_path / 'mine.yaml'}"])


def test_a_key_may_take_its_value_from_another():
    assert compose(["model.path=m", "run.dir=runs/${model.path}/x"]).run_dir == "runs/m/x"
    assert compose(["model.path=m", r"run.dir='\${HOME}'"]).run_dir == "${HOME}"


SWEEPS = {
    "train.seed=range(0,1e12)": "is a sweep of 2,001 runs or more, and 2,000 are the most",
    "train.seed=range(0,1,0)": "cannot be swept",
    "train.seed=range(1,0)": "has no value",
    "zero=true,false": "zero=True is not a choice",
    "train.seed=1,nan": "must be",
    "train.seed=1,${oc.env:HOME}": "takes a value from outside the config",
}


@pytest.mark.parametrize("word", SWEEPS)
def test_a_sweep_of_odd_values_is_told_in_one_line(word: str):
    with pytest.raises(UserError) as told:
        compose_each(parsed_for_sweep(["model.path=m", word]))
    assert SWEEPS[word] in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize("words", [
    ["plan", "model.path=m", "zero=true"], ["run", "-m", "model.path=m", "train.seed=range(0,1e12)"],
    ["run", "-m", "model.path=m", "loss.beta=0.1,0.2", "data.eval_fraction=0.1", "hydra.sweeper.max_batch_size=x"],
    ["train", "model.path=m", "data=null", "--cfg", "job"], ["doctor", "tracking=1,2"],
    ["status", "x" * 5_000], ["report", "x" * 5_000], ["verify", "x" * 5_000], ["next", "x" * 5_000],
    ["status", "/dev/null"], ["next", "--nothing"],
    ["show", "model.path=m", "--rows", "1", "data.train={}"]], ids=lambda words: " ".join(words)[:40])
def test_every_verb_ends_with_code_2_and_without_a_traceback(words: list[str]):
    told = dpo_dist(*words, code=2).stderr
    assert "Traceback" not in told and told.strip()


# ------------------------------------------------------------------------------------------------- whatever comes along

KEYS = sorted(key for key, _, _ in documented_keys())
quick = settings(deadline=None, derandomize=True, max_examples=15, database=None)


@quick
@given(st.lists(st.tuples(st.sampled_from(KEYS), st.sampled_from(VALUES) | st.text(max_size=12)
                          | st.floats().map(repr) | st.integers().map(str)), min_size=1, max_size=2))
def test_every_override_gives_a_config_or_one_line(pairs: list[tuple[str, str]]):
    try:
        assert isinstance(compose(["model.path=m", *(f"{key}={value}" for key, value in pairs)]), RunConfig)
    except UserError as told:
        assert "\n" not in str(told)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=5)


@settings(quick, max_examples=150)
@given(st.sampled_from([key for key in KEYS if key.count(".") == 1]), plain)
def test_every_value_of_a_key_is_decoded_or_told(key: str, value: object):
    section, name = key.split(".")
    config = {**DEFAULT, section: {**DEFAULT[section], name: value}}
    try:
        assert isinstance(decode(config), RunConfig)
    except UserError as told:
        str(told).encode()


@settings(quick, max_examples=15)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12)
       | st.text("\\$${}'\"a,", min_size=1, max_size=9))
def test_any_text_can_be_written_as_a_word(text: str):
    assert compose(["model.path=m", f"run.dir={quoted(text)}"]).run_dir == text


DEFAULT = to_dict(compose(["model.path=m"]))
