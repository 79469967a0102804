"""Pairs that several ranks tokenize, each with several processes: those of one process, whatever happens on the way."""
from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
from conftest import Started, forked, forked_ranks, kill, wait_until
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dpo_dist.config.compose import compose
from dpo_dist.data.prepare import prepare
from dpo_dist.launcher.ranks import Place
from dpo_dist.models.file_digests import tokenizer_digest
from dpo_dist.models.tokenizer import load_tokenizer
from dpo_dist.runtime.ports import free_port

pytestmark = pytest.mark.distributed

ROWS = 3000
TEMPLATE = "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '<|end|>' }}{% endfor %}" \
           "{% if add_generation_prompt %}<assistant>{% endif %}"
PROGRAM = """
import os, sys
from pathlib import Path
from dpo_dist.config.errors import UserError
from dpo_dist.config.compose import compose
from dpo_dist.run import tokenizing
from dpo_dist.runtime import preemption
from dpo_dist.runtime.terminal import Terminal
from dpo_dist.runtime.world import World
preemption.listen()
folder, cores, size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
tokenizing.usable_cores = lambda: frozenset(range(cores))
tokenizing.BYTES_A_PROCESS = size
config = compose(["model.path=m", "cluster.device=cpu", "cluster.timeout_seconds=5",
                  f"data.train={folder / 'rows.jsonl'}", f"data.cache_dir={folder / 'cache'}"])
world = World.start(config.cluster)
terminal = Terminal.start(str(folder / f"log-{world.rank}"), world.is_main, capture=False)
code = 0
try:
    train, _ = tokenizing.tokenized_pairs(config.data, folder / "model", world, terminal)
    terminal.say(str(train.path.parent))
except UserError as error:
    terminal.error(str(error))
    code = 2
except preemption.Stopped as stopped:
    terminal.error(str(stopped))
    code = 3
except RuntimeError as error:
    terminal.error(str(error))
    code = 4
terminal.stop()
sys.stdout.flush()
os._exit(code)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a tokenizer and chat rows."""
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))},
                                merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>",
                            chat_template=TEMPLATE).save_pretrained(tmp_path / "model")
    write(tmp_path, ROWS)
    return tmp_path


def write(folder: Path, n: int, **changes: object) -> None:
    rows = [{"prompt": [{"role": "user", "content": f"what is {i}?"}],
             "chosen": [{"role": "assistant", "content": f"a number: {i}"}],
             "rejected": [{"role": "assistant", "content": "no idea"}], **changes} for i in range(n)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def alone(folder: Path) -> Path:
    """Where one process puts them, in a cache of its own."""
    settings = compose(["model.path=m", f"data.train={folder / 'rows.jsonl'}", f"data.cache_dir={folder / 'alone'}"])
    tokenizer = load_tokenizer(folder / "model")
    return prepare(settings.data, tokenizer, tokenizer_digest(folder / "model"))[0].path.parent


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def begun(folder: Path, ranks: int, cores: int, size: int) -> list[Started]:
    place = Place(ranks, master_port=free_port())
    return [forked("-c", PROGRAM, folder, cores, size, **place.environment(rank)) for rank in range(ranks)]


def workers(folder: Path) -> list[int]:
    """The processes that tokenize there, their watchers not counted."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if words[1:3] == ["-m", "dpo_dist.run.tokenize_part"] and words[3].startswith(str(folder)):
            found.append(int(process.name))
    return found


def all_are_gone(folder: Path) -> None:
    wait_until(lambda: not workers(folder), what="processes are left behind", seconds=30)


@pytest.mark.parametrize("ranks, cores", [(1, 1), (1, 3), (2, 2), (3, 4)])
def test_ranks_and_their_processes_give_the_store_of_one_process(ranks: int, cores: int, folder: Path):
    out = forked_ranks(ranks, "-c", PROGRAM, folder, cores, 20_000).splitlines()
    assert f"tokenized by {max(ranks, cores // ranks * ranks)} processes" in out[-2]
    assert any(line.split()[:2] == ["tokenizing", f"{ROWS}/{ROWS}"] for line in out)
    theirs = Path(out[-1])
    assert content(theirs) == content(alone(folder))
    assert [path.name for path in theirs.parent.iterdir() if path.name != "digests"] == [theirs.name]
    again = forked_ranks(ranks, "-c", PROGRAM, folder, cores, 20_000)
    assert again == out[-1] + "\n", "found, and not made again"


def test_few_rows_are_tokenized_without_starting_a_process(folder: Path):
    out = forked_ranks(2, "-c", PROGRAM, folder, 2, 1 << 20).splitlines()
    assert len(out) == 1 and content(Path(out[0])) == content(alone(folder))


def test_a_bad_row_is_told_as_one_process_tells_it(folder: Path):
    with (folder / "rows.jsonl").open("a") as file:
        file.write('{"prompt": [], "chosen": [], "rejected": []}\n')
    with pytest.raises(Exception, match="1 bad row") as raised:
        alone(folder)
    ranks = begun(folder, 2, 4, 20_000)
    for rank in ranks:
        _, err = rank.communicate(120)
        assert rank.returncode == 2 and str(raised.value) in err
    assert not [*(folder / "cache").glob("*.tmp-*")]


def test_a_process_that_dies_fails_all_ranks_and_leaves_nothing(folder: Path):
    write(folder, 200_000)
    ranks = begun(folder, 2, 2, 20_000)
    wait_until(lambda: len(workers(folder)) == 2, *ranks)
    time.sleep(1)
    kill(workers(folder)[:1])
    for rank in ranks:
        _, err = rank.communicate(60)
        assert rank.returncode == 4 and "a process that tokenizes ended with code 137" in err
    all_are_gone(folder)
    assert not [*(folder / "cache").glob("*.tmp-*")]


@pytest.mark.parametrize("heard_by", [0, 1])
def test_a_signal_to_one_rank_ends_all_of_them_in_good_order(heard_by: int, folder: Path):
    write(folder, 200_000)
    ranks = begun(folder, 2, 2, 20_000)
    wait_until(lambda: len(workers(folder)) == 2, *ranks)
    os.kill(ranks[heard_by].pid, signal.SIGTERM)
    for rank in ranks:
        _, err = rank.communicate(60)
        assert rank.returncode == 3 and "stopped by SIGTERM: the pairs were not tokenized yet" in err
    all_are_gone(folder)
    assert not [*(folder / "cache").glob("*.tmp-*")]


def test_processes_end_with_the_rank_that_started_them(folder: Path):
    write(folder, 200_000)
    ranks = begun(folder, 1, 2, 20_000)
    wait_until(lambda: len(workers(folder)) == 2, *ranks)
    kill(rank.pid for rank in ranks)
    all_are_gone(folder)
