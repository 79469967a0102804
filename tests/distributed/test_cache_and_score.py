"""The reference is scored once: whatever the run, the order or the world; and again only where something it depends on
changed."""
from __future__ import annotations

import json
import re
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from conftest import dpo_dist, kill, processes_on, start, train_on, write_rows, write_tiny_llama

pytestmark = pytest.mark.distributed


def score(tmp_path: Path, base: list[str], *more: str) -> tuple[int, int]:
    """(scored, cached) as the command's last line says."""
    out = dpo_dist("score", f"model.path={tmp_path / 'm'}", *base, f"run.dir={tmp_path / 'score'}", *more).stdout
    found = re.fullmatch(r"scored (\d+), cached (\d+)", out.strip().splitlines()[-1])
    assert found, out
    return int(found[1]), int(found[2])


def entries(cache_dir: Path) -> list[tuple[str, bytes]]:
    """(folder, key) of every entry of every shard."""
    shards = [(shard.parent.name, safetensors.numpy.load_file(shard)["keys"])
              for shard in cache_dir.rglob("*.safetensors")]
    return [(folder, key.tobytes()) for folder, keys in shards for key in keys]


def test_only_what_is_new_is_scored_and_nothing_that_does_not_matter_counts_as_new(tmp_path: Path, base: list[str]):
    write_tiny_llama(tmp_path / "m")
    rows = write_rows(tmp_path / "rows.jsonl", 40)
    assert score(tmp_path, base, train_on(tmp_path / "rows.jsonl")) == (80, 0)

    same = ["loss.beta=0.7", "optim.lr=1e-3", "train.seed=5", "cluster.procs_per_node=2",
            "train.tokens_per_microbatch=100", "zero=zero2", f"run.dir={tmp_path / 'elsewhere'}", "loss=ipo"]
    assert score(tmp_path, base, train_on(tmp_path / "rows.jsonl"), *same) == (0, 80)

    backwards = tmp_path / "backwards.jsonl"
    backwards.write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    assert score(tmp_path, base, train_on(backwards)) == (0, 80)

    more = tmp_path / "more.jsonl"
    more.write_text((tmp_path / "rows.jsonl").read_text()
                    + "".join(json.dumps(row) + "\n" for row in write_rows(tmp_path / "x", 10, seed=9)))
    assert score(tmp_path, base, train_on(more)) == (20, 80)

    rows[0]["chosen_ids"][0] = rows[0]["chosen_ids"][0] % 60 + 3
    one = tmp_path / "one_token.jsonl"
    one.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert score(tmp_path, base, train_on(one)) == (1, 79)


def test_which_tokens_count_does_not_matter_to_what_is_scored(tmp_path: Path, base: list[str]):
    write_tiny_llama(tmp_path / "m")
    rows = write_rows(tmp_path / "rows.jsonl", 12)
    assert score(tmp_path, base, train_on(tmp_path / "rows.jsonl")) == (24, 0)
    counted = tmp_path / "counted.jsonl"
    counted.write_text("".join(json.dumps({**row, "chosen_counts": [0] * (len(row["chosen_ids"]) - 1) + [1]}) + "\n"
                               for row in rows))
    assert score(tmp_path, base, train_on(counted)) == (0, 24)


def test_one_changed_weight_is_a_miss_for_every_pair_and_sharded_models_never_share_an_entry(tmp_path: Path,
                                                                                             base: list[str]):
    from safetensors.torch import load_file, save_file

    write_tiny_llama(tmp_path / "m")
    write_rows(tmp_path / "rows.jsonl", 12)
    sharded = [train_on(tmp_path / "rows.jsonl"), "reference=zero", "cluster.procs_per_node=2"]
    assert score(tmp_path, base, *sharded) == (24, 0)
    weights = load_file(tmp_path / "m" / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][2, 3] += 1e-3
    save_file(weights, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    assert score(tmp_path, base, *sharded) == (24, 0)
    assert len({folder for folder, _ in entries(tmp_path / "reference")}) == 2


def test_the_sharded_engine_and_the_whole_one_agree_with_the_plain_forward(tmp_path: Path, base: list[str]):
    import torch
    from transformers import LlamaForCausalLM

    from dpo_dist.logps import plain_token_logps
    from dpo_dist.reference.cache.store import LogpCache, ReferenceKey

    write_tiny_llama(tmp_path / "m")
    rows = write_rows(tmp_path / "rows.jsonl", 20)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "m").eval()
    for engine, world in (("hf", 1), ("zero", 2), ("zero", 4)):
        where = tmp_path / f"{engine}{world}"
        more = [f"reference={engine}", f"cluster.procs_per_node={world}", f"reference.cache_dir={where}"]
        score(tmp_path, base, train_on(tmp_path / "rows.jsonl"), *more,
              *(["reference.offload=cpu"] if world == 4 else []))
        (folder,) = where.iterdir()
        cache = LogpCache(str(where), ReferenceKey(**json.loads((folder / "key.json").read_text())))
        cache.open_shards(cache.verified_shards()[0])
        for row in rows:
            for completion in (row["chosen_ids"], row["rejected_ids"]):
                with torch.no_grad():
                    wanted = plain_token_logps(model, torch.tensor(row["prompt_ids"]), torch.tensor(completion)).numpy()
                assert np.abs(cache.logps(row["prompt_ids"], completion) - wanted).max() < 1e-5


def test_a_scoring_job_killed_midway_is_finished_by_another_number_of_processes_and_nothing_is_scored_twice(
        tmp_path: Path, base: list[str]):
    write_tiny_llama(tmp_path / "m", hidden_size=128, intermediate_size=512, num_hidden_layers=8)
    write_rows(tmp_path / "rows.jsonl", 400, longest=100)
    words = ["score", f"model.path={tmp_path / 'm'}", *base, f"run.dir={tmp_path / 'score'}",
             train_on(tmp_path / "rows.jsonl"), "cluster.procs_per_node=2", "train.tokens_per_microbatch=320"]
    process = start(*words)
    deadline = time.monotonic() + 120
    while len(entries(tmp_path / "reference")) < 0.3 * 800 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    kill([process.pid, *processes_on(tmp_path / "score")])
    process.wait()
    kept = len(entries(tmp_path / "reference"))
    assert 0 < kept < 800, "the kill came midway"
    assert score(tmp_path, base, train_on(tmp_path / "rows.jsonl"), "cluster.procs_per_node=3") == (800 - kept, kept)
    assert max(Counter(entries(tmp_path / "reference")).values()) == 1
    assert len(entries(tmp_path / "reference")) == 800


def test_a_damaged_shard_is_scored_again_and_the_person_is_told(tmp_path: Path, base: list[str]):
    write_tiny_llama(tmp_path / "m")
    write_rows(tmp_path / "rows.jsonl", 10)
    assert score(tmp_path, base, train_on(tmp_path / "rows.jsonl")) == (20, 0)
    shard = next((tmp_path / "reference").rglob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-8] + b"\0" * 8)
    done = dpo_dist("score", f"model.path={tmp_path / 'm'}", *base, f"run.dir={tmp_path / 'score'}",
                    train_on(tmp_path / "rows.jsonl"))
    assert "1 damaged shards set aside" in done.stdout
    assert done.stdout.strip().endswith("scored 20, cached 0")
