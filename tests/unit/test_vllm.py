"""The client of vLLM against a real HTTP server: what goes over the wire, what is tried again, what is refused, and
never a substitute."""
from __future__ import annotations

import json
import socket
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_tiny_llama
from log_prob_server import Answer, LogProbServer, Say, values

from dpo_dist.config.compose import compose
from dpo_dist.config.engines.vllm import RequestsConfig
from dpo_dist.config.errors import UserError
from dpo_dist.data.pack import Sequences, pack_pairs, pack_sequences
from dpo_dist.models.resolve import ModelFolder
from dpo_dist.reference.cache.store import LogpCache, ReferenceKey
from dpo_dist.reference.hf import HfReference
from dpo_dist.reference.vllm.engine import VllmReference, continuations
from dpo_dist.reference.vllm.open import reference_key, server_spec
from dpo_dist.reference.vllm.process import command
from dpo_dist.runtime.world import World
from dpo_dist.types import PackedBatch, TokenizedPair

ALONE = World(0, 1, 0, torch.device("cpu"))
TREES = [Sequences((5, 6, 7), ((8, 9, 1), (10, 11, 12, 13, 1))), Sequences((20, 21), ((22, 1),)),
         Sequences((30,), ((31, 32, 33, 1), (34, 1))), Sequences(tuple(range(3, 40)), (tuple(range(40, 60)),))]
N_SEQUENCES = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("m"))


@pytest.fixture(scope="module")
def wanted(folder: Path) -> torch.Tensor:
    return HfReference(ModelFolder(folder), torch.float32, "branch", torch.device("cpu")).token_logps(pack())


@pytest.fixture
def server(folder: Path) -> Iterator[LogProbServer]:
    with LogProbServer(folder) as running:
        yield running


def pack() -> PackedBatch:
    return pack_sequences(TREES)


def client(*servers: LogProbServer | str, sequences: int = 64, timeout_seconds: float = 10,
           wait_seconds: float = 20) -> VllmReference:
    urls = [server if isinstance(server, str) else server.url for server in servers]
    name = next(server.name for server in servers if not isinstance(server, str))
    return VllmReference(urls, name, 256, RequestsConfig(sequences, 2, timeout_seconds, wait_seconds), at_once=2,
                         world=ALONE)


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    assert found.dtype == torch.float32 and found.shape == wanted.shape
    return (found - wanted).abs().max().item()


def write_qwen2(folder: Path) -> Path:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(1)
    Qwen2ForCausalLM(Qwen2Config(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                 num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
                                 tie_word_embeddings=True, initializer_range=0.2)).save_pretrained(folder)
    return folder


def test_it_agrees_with_the_oracle_on_llama_and_qwen2_in_requests_of_any_size(folder: Path, tmp_path: Path):
    for where in (folder, write_qwen2(tmp_path / "qwen2")):
        oracle = HfReference(ModelFolder(where), torch.float32, "branch", torch.device("cpu")).token_logps(pack())
        with LogProbServer(where) as running:
            for size in (1, 4, 64):
                assert off(client(running, sequences=size).token_logps(pack()), oracle) < 5e-5
                assert len(running.requests[-1]["prompt"]) <= size


def test_of_a_training_pack_it_gives_the_values_of_the_counted_tokens(folder: Path, server: LogProbServer):
    pair = TokenizedPair((5, 6, 7), (8, 9, 10, 1), (11, 1), "a", chosen_counts=(False, True, False, True))
    batch = pack_pairs([pair], [0], [1.0])
    oracle = HfReference(ModelFolder(folder), torch.float32, "branch", torch.device("cpu")).token_logps(batch)
    assert len(oracle) == 4 and off(client(server).token_logps(batch), oracle) < 5e-5


def test_the_request_is_prompts_as_token_ids_and_nothing_that_would_change_the_values(
        server: LogProbServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    client(server).token_logps(pack_sequences(TREES[:1]))
    assert server.requests == [{"model": server.name, "prompt": [[5, 6, 7, 8, 9, 1], [5, 6, 7, 10, 11, 12, 13, 1]],
                                "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}]
    assert server.headers[0]["Authorization"] == "Bearer secret"


def busy(answer: Answer) -> Answer:
    raise Say(503, b'{"error": {"message": "out of memory"}}')


def cut(answer: Answer) -> Answer:
    whole = json.dumps(answer).encode()
    raise Say(200, whole[:len(whole) // 2], length=len(whole))


def no_json(answer: Answer) -> Answer:
    raise Say(200, json.dumps(answer).encode()[:-5])


def hang_up(answer: Answer) -> Answer:
    raise Say(None, b"")


def late(answer: Answer) -> Answer:
    time.sleep(4.5)
    return answer


@pytest.mark.parametrize("fault", [busy, cut, no_json, hang_up, late])
def test_what_fails_is_tried_again_in_halves_and_every_value_is_the_right_one(
        server: LogProbServer, wanted: torch.Tensor, fault):
    server.fault = lambda n, answer: fault(answer) if n <= 2 else answer
    found = client(server, timeout_seconds=3 if fault is late else 10).token_logps(pack())
    assert off(found, wanted) < 5e-5
    assert [len(r["prompt"]) for r in server.requests[:3]] == [6, 3, 2]
    answered = Counter(server.answered)
    assert len(answered) == N_SEQUENCES
    assert max(answered.values()) == 1 or fault is late, "a late answer goes out, to nobody"


def drop_position(answer: Answer) -> None:
    answer["choices"][3]["prompt_logprobs"].pop()


def empty_position(answer: Answer) -> None:
    answer["choices"][3]["prompt_logprobs"][2] = None


def other_token(answer: Answer) -> None:
    entries = answer["choices"][1]["prompt_logprobs"]
    entries[3] = {"63": next(iter(entries[3].values()))}


def set_last(value: float):
    def change(answer: Answer) -> None:
        next(iter(answer["choices"][5]["prompt_logprobs"][-1].values()))["logprob"] = value
    return change


def rename(answer: Answer) -> None:
    answer["model"] = "another"


def drop_choice(answer: Answer) -> None:
    answer["choices"].pop()


def repeat_choice(answer: Answer) -> None:
    answer["choices"][1]["index"] = 0


def no_logprobs(answer: Answer) -> None:
    for choice in answer["choices"]:
        choice["prompt_logprobs"] = None


WRONG = {
    "positions for 5 tokens": drop_position,
    "nothing at position 2, where token 32 was asked": empty_position,
    "token 63 at position 3, where token 10 was asked": other_token,
    "a log-prob of -9999.0 for token 59": set_last(-9999.0),
    "a log-prob of -inf for token 59": set_last(float("-inf")),
    "a log-prob of nan for token 59": set_last(float("nan")),
    "a log-prob of 0.5 for token 59": set_last(0.5),
    "answered for the model 'another'": rename,
    "answered 5 of 6 prompts": drop_choice,
    "answered 6 of 6 prompts": repeat_choice,
    "without prompt_logprobs": no_logprobs,
}


@pytest.mark.parametrize("message", WRONG)
def test_an_answer_that_cannot_be_right_stops_the_run_and_is_not_asked_for_again(server: LogProbServer, message: str):
    def fault(n: int, answer: Answer) -> Answer:
        WRONG[message](answer)
        return answer

    server.fault = fault
    with pytest.raises(UserError, match=message):
        client(server).token_logps(pack())
    assert len(server.requests) == 1


def test_choices_in_another_order_are_put_in_place_by_their_index(server: LogProbServer, wanted: torch.Tensor):
    server.fault = lambda n, answer: {**answer, "choices": answer["choices"][::-1]}
    assert off(client(server).token_logps(pack()), wanted) < 5e-5


def test_a_request_that_the_server_refuses_is_told_at_once(server: LogProbServer):
    reference = VllmReference([server.url], "another", 256, RequestsConfig(64, 2, 10, 20), at_once=1, world=ALONE)
    with pytest.raises(UserError, match=r"404.*does not exist"):
        reference.token_logps(pack())
    assert len(server.requests) == 1


def test_without_any_answer_it_gives_up_after_the_stated_time_and_says_what_to_do(server: LogProbServer):
    server.fault = lambda n, answer: busy(answer)
    began = time.monotonic()
    with pytest.raises(UserError, match=r"no answer for 2 s.*out of memory.*the same command goes on"):
        client(server, wait_seconds=2).token_logps(pack())
    assert 2 < time.monotonic() - began < 15


def test_a_sequence_that_the_servers_cannot_take_is_never_sent(server: LogProbServer):
    with pytest.raises(UserError, match="a sequence of 256 tokens needs servers with --max-model-len 257"):
        client(server).token_logps(pack_sequences([Sequences((3,) * 200, ((4,) * 56,))]))
    assert not server.requests


def test_all_servers_work_and_the_living_take_over_from_the_dead(folder: Path, wanted: torch.Tensor):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{closed.getsockname()[1]}"
        with LogProbServer(folder) as a, LogProbServer(folder) as b:
            a.seconds_a_request = b.seconds_a_request = 0.1
            found = client(dead, a, b, sequences=1).token_logps(pack())
            assert off(found, wanted) < 5e-5
            assert a.answered and b.answered
            assert max(Counter(a.answered + b.answered).values()) == 1


def test_values_are_read_off_the_sequence_that_they_belong_to(server: LogProbServer):
    """Each (choice, position) gets a number of its own: a shift by one, or a swap, would show."""
    def number(n: int, answer: Answer) -> Answer:
        for i, (choice, entry) in enumerate(values(answer)):
            entry["logprob"] = -(choice + 1) - i / 1000
        return answer

    server.fault = number
    found = client(server).token_logps(pack()).tolist()
    at, expected = 0, []
    for i, sequence in enumerate(continuations(pack())):
        n = len(sequence.prompt) + len(sequence.completion) - 1
        expected += [-(i + 1) - (at + k) / 1000 for k in range(len(sequence.prompt) - 1, n)]
        at += n
    assert found == pytest.approx(expected, abs=1e-6)


# -------------------------------------------------------------------------------------------------------------- the key


def reference(tmp_path: Path, *more: str):
    return compose(["model.path=m", "reference=vllm", f"reference.cache_dir={tmp_path}",
                    "reference.requests.wait_seconds=1", *more]).reference


def test_the_key_of_the_training_stack_is_what_it_always_was(tmp_path: Path):
    assert ReferenceKey("weights", "float32").folder == "1704a55499356b38fa3c8ee4"


def test_version_dtype_and_quantization_each_make_a_key_of_their_own(tmp_path: Path, server: LogProbServer):
    def key(*more: str, dtype: str = "float32") -> ReferenceKey:
        return reference_key(reference(tmp_path, *more), "weights", dtype)

    of_server = key(f"reference.urls=[{server.url}]")
    assert of_server == key("reference.version=0.0.test") and "vllm 0.0.test" in of_server.recipe
    others = [key("reference.version=2"), key("reference.version=0.0.test", "reference.quantization=fp8"),
              key("reference.version=0.0.test", dtype="bfloat16"), ReferenceKey("weights", "float32")]
    assert len({one.folder for one in (of_server, *others)}) == 5


def test_when_the_servers_are_gone_the_cache_tells_the_version_unless_there_are_two(tmp_path: Path):
    with pytest.raises(UserError, match="the cache holds no values of vllm"):
        reference_key(reference(tmp_path), "weights", "float32")
    for version in ("1.0", "2.0"):
        LogpCache(str(tmp_path), reference_key(reference(tmp_path, f"reference.version={version}"), "weights",
                                               "float32"))
        if version == "1.0":
            assert "vllm 1.0," in reference_key(reference(tmp_path, "reference.urls=[http://127.0.0.1:1]"), "weights",
                                                "float32").recipe
    with pytest.raises(UserError, match=r"the cache holds values of vllm 1\.0 and 2\.0"):
        reference_key(reference(tmp_path), "weights", "float32")
    assert np.all([p.name == "key.json" for p in tmp_path.glob("*/*")])


def test_a_server_holds_a_copy_of_the_model_on_every_gpu_or_on_every_group_that_splits_it(tmp_path: Path):
    folder = write_tiny_llama(tmp_path / "m")

    def words(gpus: int, *more: str) -> list[str]:
        config = compose([f"model.path={folder}", "reference=vllm", "reference.server=python3", *more])
        return command(server_spec(config, "bfloat16", folder, gpus), "127.0.0.1", 8000)

    def after(words: list[str], option: str) -> str | None:
        return words[words.index(option) + 1] if option in words else None

    assert after(words(8), "--data-parallel-size") == "8"
    assert after(words(8, "reference.tensor_parallel_size=4"), "--data-parallel-size") == "2"
    assert after(words(8, "reference.tensor_parallel_size=8"), "--data-parallel-size") is None
    assert after(words(1), "--data-parallel-size") is None and after(words(1), "--tensor-parallel-size") == "1"
    assert (words(8, "reference.server='serve --copies {copies} --port {port}'")
            == ["serve", "--copies", "8", "--port", "8000"])


def test_a_server_that_reads_config_json_itself_is_told_what_the_weight_files_contradict(tmp_path: Path):
    folder = write_tiny_llama(tmp_path / "m")

    def words() -> list[str]:
        config = compose([f"model.path={folder}", "reference=vllm", "reference.server=python3"])
        return command(server_spec(config, "bfloat16", folder, 1), "127.0.0.1", 8000)

    assert "--hf-overrides" not in words()
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tie_word_embeddings": True}))
    assert json.loads(words()[words().index("--hf-overrides") + 1]) == {"tie_word_embeddings": False}
