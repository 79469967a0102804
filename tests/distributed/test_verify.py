"""One small real run; then one thing that its numbers come from is changed at a time, and `verify` names it, and what
it means."""
from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import dpo_dist, write_tiny_llama
from made_tokenizers import CHATML, bpe
from safetensors.torch import load_file, save_file

from dpo_dist.verify.__main__ import main

pytestmark = pytest.mark.distributed

VOCABULARY = 400


def write_chats(path: Path, n: int, first: int = 0) -> None:
    path.write_text("".join(json.dumps({
        "prompt": f"What is {i} and {i % 3}?", "chosen": f"It is {i + i % 3}.", "rejected": f"No, {i}!", "id": i})
        + "\n" for i in range(first, first + n)))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, its model, its reference and its data; and a copy of it all beside."""
    folder = tmp_path_factory.mktemp("made") / "now"
    for name, seed in (("m", 0), ("ref", 1)):
        write_tiny_llama(folder / name, seed=seed, vocab_size=VOCABULARY)
        bpe(CHATML).save_pretrained(folder / name)
    write_chats(folder / "pairs.jsonl", 20)
    write_chats(folder / "held_out.jsonl", 6, first=100)
    dpo_dist("train", f"model.path={folder / 'm'}", f"reference.path={folder / 'ref'}", *overrides(folder),
             f"run.dir={folder / 'run'}")
    shutil.copytree(folder, folder.with_name("then"))
    return folder


def overrides(folder: Path) -> list[str]:
    return ["cluster.device=cpu", "model.dtype=fp32", f"data.cache_dir={folder / 'tokens'}", "zero=none",
            f"reference.cache_dir={folder / 'reference'}", "cluster.procs_per_node=1", "data.max_length=256",
            f"data.train={folder / 'pairs.jsonl'}", f"data.eval={folder / 'held_out.jsonl'}",
            "train.pairs_per_step=10", "train.max_steps=2", "optim.lr=1e-3"]


@pytest.fixture
def folder(made: Path) -> Iterator[Path]:
    """The same, which is again as it was once the test ends."""
    yield made
    shutil.rmtree(made)
    shutil.copytree(made.with_name("then"), made)


def verified(run: Path, code: int, *options: str) -> dict[str, dict[str, Any]]:
    """{what: finding} of the command, which ends with this code."""
    out = io.StringIO()
    assert main([str(run), "--json", *options], out) == code, out.getvalue()
    found = json.loads(out.getvalue())
    assert found["same"] == (code == 0)
    return {finding["what"]: finding for finding in found["findings"]}


def wrong(found: dict[str, dict[str, Any]]) -> set[str]:
    return {what for what, finding in found.items() if finding["status"] in ("changed", "missing")}


def rewrite(path: Path, change: Callable[[list[str]], list[str]]) -> None:
    path.write_text("".join(change(path.read_text().splitlines(keepends=True))))


def replace_in(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


PAIRS = {"training pairs", "held-out pairs"}


def test_an_untouched_run_is_the_same_in_all_that_it_comes_from(folder: Path):
    shown = dpo_dist("verify", folder / "run").stdout
    assert "the same: all that decides the weights and the held-out figures" in shown
    for options in ((), ("--pairs",), ("--quick",)):
        found = verified(folder / "run", 0, *options)
        assert {f["status"] for f in found.values()} == {"same"}
        assert {"config", "model.path", "reference.path", "tokenizer", "chat template", "data.train[0]",
                "data.eval[0]", *PAIRS, "model/", "code", "libraries", "computed on"} == found.keys()


def test_a_flipped_byte_of_the_chat_template_is_shown_with_its_place_and_what_it_does_to_the_pairs(folder: Path):
    replace_in(folder / "m" / "chat_template.jinja", "'<|im_end|>\\n'", "'<|im_end|>\\t'")
    found = verified(folder / "run", 1)
    assert wrong(found) == {"tokenizer", "chat template", *PAIRS}
    at = CHATML.index("<|im_end|>\\n") + len("<|im_end|>\\")
    assert f"'default' from byte {at} (line 1) on" in found["chat template"]["says"]
    assert f"chat_template.jinja from byte {at} on" in found["tokenizer"]["says"]
    assert "20 new or changed of 20 training pairs" in found["chat template"]["means"]


def test_a_byte_of_the_template_that_shows_in_no_pair_is_harmless(folder: Path):
    replace_in(folder / "m" / "chat_template.jinja", "{% endfor %}", "{%  endfor %}")
    found = verified(folder / "run", 0)
    assert found["chat template"]["status"] == "harmless" == found["tokenizer"]["status"]
    assert "the same 20 training pairs, token for token" in found["chat template"]["means"]


def test_a_swapped_reference_is_named_by_its_key_with_the_tensors_that_are_others(folder: Path):
    shutil.copyfile(folder / "m" / "model.safetensors", folder / "ref" / "model.safetensors")
    found = verified(folder / "run", 1)
    assert wrong(found) == {"reference.path"}
    assert "model.embed_tokens.weight" in found["reference.path"]["says"]
    assert "the reference's log-probs are others" in found["reference.path"]["means"]


def test_reordered_training_rows_are_the_same_pairs_and_other_weights(folder: Path):
    rewrite(folder / "pairs.jsonl", lambda lines: [*lines[7:], *lines[:7]])
    found = verified(folder / "run", 1)
    assert wrong(found) == {"data.train[0]", "training pairs"}
    assert "the same 20 rows in another order" in found["data.train[0]"]["says"]
    assert "trained on in another order, so not the same weights" in found["data.train[0]"]["means"]
    # and so it is
    dpo_dist("train", f"model.path={folder / 'm'}", f"reference.path={folder / 'ref'}", *overrides(folder),
             f"run.dir={folder / 'again'}")
    now, then = (load_file(folder / run / "model" / "model.safetensors") for run in ("again", "run"))
    assert any((now[name] != then[name]).any() for name in then)


def test_reordered_held_out_rows_are_harmless(folder: Path):
    rewrite(folder / "held_out.jsonl", lambda lines: lines[::-1])
    found = verified(folder / "run", 0)
    assert found["data.eval[0]"]["status"] == "harmless" == found["held-out pairs"]["status"]
    assert found["training pairs"]["status"] == "same"


def test_an_edited_row_is_named_with_its_file_line_and_field(folder: Path):
    rewrite(folder / "pairs.jsonl", lambda lines: [line.replace('"It is', '"So it is') if i == 4 else line
                                                   for i, line in enumerate(lines)])
    found = verified(folder / "run", 1)
    assert wrong(found) == {"data.train[0]", "training pairs"}
    assert found["data.train[0]"]["says"] == "pairs.jsonl: 1 row edited: pairs.jsonl:5 in chosen"
    assert found["training pairs"]["details"]["others"] == 1


def test_an_edited_held_out_row_changes_the_figures_and_not_the_weights(folder: Path):
    rewrite(folder / "held_out.jsonl", lambda lines: [lines[0].replace("No, ", "Nope, "), *lines[1:]])
    found = verified(folder / "run", 1)
    assert wrong(found) == {"data.eval[0]", "held-out pairs"}
    assert "the weights of each step are the same" in found["data.eval[0]"]["means"]


def test_an_edit_that_no_token_shows_and_a_file_written_anew_are_harmless(folder: Path):
    rewrite(folder / "pairs.jsonl", lambda lines: [line.replace('"id": 4}', '"id": 44}') for line in lines])
    rewrite(folder / "held_out.jsonl", lambda lines: [json.dumps(dict(reversed(json.loads(line).items()))) + "\n"
                                                      for line in lines])
    found = verified(folder / "run", 0)
    assert found["data.train[0]"]["says"] == "pairs.jsonl: 1 row edited: pairs.jsonl:5 in id"
    assert found["data.train[0]"]["status"] == "harmless"
    assert "the same 6 rows in the same order" in found["data.eval[0]"]["says"]


def test_a_removed_row_and_a_missing_file_are_told(folder: Path):
    rewrite(folder / "pairs.jsonl", lambda lines: lines[:2] + lines[3:])
    (folder / "held_out.jsonl").unlink()
    found = verified(folder / "run", 1)
    assert "1 row removed: row 3" in found["data.train[0]"]["says"]
    assert found["data.eval[0]"]["status"] == "missing"
    write_chats(folder / "held_out.jsonl", 6, first=100)
    assert "1 gone of 20 training pairs (19 in all now)" in verified(folder / "run", 1)["training pairs"]["says"]


def test_another_tokenizer_is_shown_by_the_tokens_that_are_others(folder: Path):
    file = folder / "m" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["?"], vocabulary["!"] = vocabulary["!"], vocabulary["?"]
    file.write_text(json.dumps(content))
    found = verified(folder / "run", 1)
    assert wrong(found) == {"tokenizer", *PAIRS}
    assert "model.vocab.? was" in found["tokenizer"]["says"]


def test_another_start_is_named_by_the_key_of_config_json_or_the_tensor(folder: Path):
    replace_in(folder / "m" / "config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05')
    found = verified(folder / "run", 1)
    assert wrong(found) == {"model.path"} and "rms_norm_eps was 1e-06, is now 1e-05" in found["model.path"]["says"]
    shutil.rmtree(folder / "m")
    assert verified(folder / "run", 1)["model.path"]["status"] == "missing"


@pytest.mark.parametrize("part", ["config", "identity_of", "passport"])
def test_an_edited_run_json_is_told_with_the_key(part: str, folder: Path):
    run = json.loads((folder / "run" / "run.json").read_text())
    if part == "passport":
        run[part]["ranks"] = 8
    else:
        run[part]["loss"]["beta"] = 0.3
    (folder / "run" / "run.json").write_text(json.dumps(run))
    found = verified(folder / "run", 1)
    told = found["run.json"]["says"] if part == "passport" else found["config"]["says"]
    assert ("passport.ranks was 1, is now 8" if part == "passport" else "loss.beta was") in told


def test_a_run_json_whose_config_and_identity_were_both_edited_no_longer_has_the_identity_it_began_with(folder: Path):
    run = json.loads((folder / "run" / "run.json").read_text())
    run["config"]["loss"]["beta"] = run["identity_of"]["loss"]["beta"] = 0.3
    (folder / "run" / "run.json").write_text(json.dumps(run))
    assert "the run began as" in verified(folder / "run", 1)["config"]["says"]


def test_what_is_kept_beside_run_json_is_not_believed_where_it_was_edited(folder: Path):
    rows = folder / "run" / "provenance" / "models.json"
    rows.write_text(rows.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    found = verified(folder / "run", 1)
    assert wrong(found) == {"provenance/models.json"} and found["model.path"]["status"] == "same"


def test_changed_exported_weights_are_named_and_a_changed_model_card_is_nobodys_business(folder: Path):
    file = folder / "run" / "model" / "model.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_file(file).items()}
    weights["model.norm.weight"][3] += 1e-6
    save_file(weights, file, metadata={"format": "pt"})
    (folder / "run" / "model" / "README.md").write_text("our model")
    found = verified(folder / "run", 1)
    assert wrong(found) == {"model/"} and found["model/"]["says"] == "1 of 21 tensors: model.norm.weight"


def test_a_run_from_before_the_digests_were_kept_is_compared_by_those_that_it_has(folder: Path):
    run = json.loads((folder / "run" / "run.json").read_text())
    old = ("policy_weights", "reference_weights", "reference_key", "reference_sync", "train_pairs", "eval_pairs",
           "dtype", "attention", "ranks", "device", "python", "versions")
    run["passport"] = {key: run["passport"][key] for key in old}
    (folder / "run" / "run.json").write_text(json.dumps(run))
    shutil.rmtree(folder / "run" / "provenance")
    found = verified(folder / "run", 0)
    assert {found[what]["status"] for what in ("config", "model.path", "reference.path", *PAIRS)} == {"same"}
    rewrite(folder / "pairs.jsonl", lambda lines: lines[::-1])
    shutil.copyfile(folder / "m" / "model.safetensors", folder / "ref" / "model.safetensors")
    assert wrong(verified(folder / "run", 1)) == {"reference.path", "training pairs"}


def test_the_run_of_a_second_round_names_the_first_as_its_parent(folder: Path):
    words = overrides(folder)
    dpo_dist("train", f"model.path={folder / 'run' / 'model'}", *words, "reference.mode=live",
             "model.lora.rank=2", "export.what=both", f"run.dir={folder / 'second'}")
    passport = json.loads((folder / "second" / "run.json").read_text())["passport"]
    assert (passport["parent"]["run"], passport["parent"]["export"]) == ("run", "model")
    assert f"| parent run | `run`, its model (run.json {passport['parent']['digest']}) |" in (
        folder / "second" / "model" / "README.md").read_text()
    assert f"(run.json {passport['parent']['digest']})" in (folder / "run" / "model" / "README.md").read_text()
    found = verified(folder / "second", 0)
    assert found["parent run"]["status"] == "same" and found["reference"]["status"] == "same"
    replace_in(folder / "run" / "run.json", '"ranks": 1', '"ranks": 8')
    found = verified(folder / "second", 0)
    assert found["parent run"]["status"] == "told" and "its run.json is another now" in found["parent run"]["says"]
    settings = folder / "second" / "adapter" / "adapter_config.json"
    settings.write_text(settings.read_text().replace('"lora_alpha": ', '"lora_alpha": 1'))
    found = verified(folder / "second", 1)
    assert wrong(found) == {"adapter/"} and "adapter_config.json" in found["adapter/"]["says"]


def test_a_folder_without_a_run_is_a_mistake_that_names_the_remedy(tmp_path: Path):
    assert "give the run.dir of one, as in: dpo-dist verify runs/my-run" in dpo_dist("verify", tmp_path, code=2).stderr
