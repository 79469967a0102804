"""What comes with a model or with data is read, and never run; what is secret is not written down."""
from __future__ import annotations

import io
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import write_rows, write_text_and_image, write_tiny_llama
from made_tokenizers import CHATML, bpe, config, make_tokenize
from untrusted import AUTO_MAP, CODE, change_json, write_pickle, write_untrusted

from dpo_dist.config.adapter import read_adapter
from dpo_dist.config.compose import compose
from dpo_dist.config.errors import UserError
from dpo_dist.config.schema import DatasetConfig
from dpo_dist.config.secrets import refuse_secrets
from dpo_dist.data import chat
from dpo_dist.data.files import read_records
from dpo_dist.data.templates import chat_templates
from dpo_dist.judge.url import Url
from dpo_dist.models.folder import read_config, weight_files
from dpo_dist.models.load import load_causal_lm
from dpo_dist.models.resolve import resolve
from dpo_dist.models.tokenizer import load_tokenizer
from dpo_dist.models.workers import model_of, tokenizer_of
from dpo_dist.runtime.run_dir import RunDir


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that only code of the folder would make. Standard input says yes to whatever is asked."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 1000))
    return tmp_path / "canary"


# --------------------------------------------------------------------------------------------- code in a model's folder


def test_code_of_a_model_is_refused_whatever_stands_on_standard_input(tmp_path: Path, canary: Path):
    folder = write_untrusted(tmp_path / "m", canary)
    for load in (read_config, weight_and_model, model_of):
        with pytest.raises((UserError, ValueError)):
            load(folder)
    with pytest.raises(UserError, match=r"code of its own \(auto_map\), which is never run"):
        read_config(folder)
    assert not canary.exists()


def weight_and_model(folder: Path) -> None:
    load_causal_lm(folder, torch.float32, "branch")


def test_code_beside_a_model_that_transformers_knows_is_not_run(tmp_path: Path, canary: Path):
    folder = write_untrusted(tmp_path / "m", canary, "llama", ("config.json", "generation_config.json"))
    model = load_causal_lm(folder, torch.float32, "padded")
    model.generate(torch.tensor([[3, 4]]), max_new_tokens=2)               # not that of custom_generate/
    model_of(folder).generate(torch.tensor([[3, 4]]), max_new_tokens=2)
    assert type(model).__module__.startswith("transformers.") and not canary.exists()


def test_code_of_a_tokenizer_is_refused_whatever_stands_on_standard_input(tmp_path: Path, canary: Path):
    folder = write_untrusted(tmp_path / "m", canary, named_in=("config.json", "tokenizer_config.json"))
    with pytest.raises(UserError, match=r"the tokenizer in .* has code of its own .* never run"):
        load_tokenizer(folder)
    with pytest.raises(ValueError):
        tokenizer_of(folder)
    bpe().save_pretrained(folder)                                          # now transformers has one for it, too
    change_json(folder / "tokenizer_config.json", auto_map=AUTO_MAP)
    change_json(folder / "config.json", model_type="llama")
    assert load_tokenizer(folder) is not None and not canary.exists()


def test_code_of_a_processor_is_not_run(tmp_path: Path, canary: Path):
    folder = write_text_and_image(tmp_path / "m")
    (folder / "own.py").write_text(CODE.format(canary=str(canary)))
    for name in ("preprocessor_config.json", "processor_config.json"):
        change_json(folder / name, auto_map=AUTO_MAP)
    load_causal_lm(folder, torch.float32, "padded")
    assert not canary.exists()


def test_code_of_an_adapters_base_is_refused(tmp_path: Path, canary: Path):
    write_untrusted(tmp_path / "base", canary)
    adapter = write_adapter(tmp_path / "adapter", tmp_path / "base")
    with pytest.raises(UserError, match="never run"):
        read_config(resolve(str(adapter), "reference.path", offline=True).base)
    assert not canary.exists()


def test_code_of_the_hub_for_attention_is_refused(tmp_path: Path):
    folder = write_tiny_llama(tmp_path / "m")
    change_json(folder / "config.json", attn_implementation="somebody/attention")
    with pytest.raises(UserError, match=r"attention code of the hub \(attn_implementation=somebody/attention\)"):
        read_config(folder)


# -------------------------------------------------------------------------------------------------------------- pickles


def write_adapter(folder: Path, base: Path) -> Path:
    from safetensors.torch import save_file

    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "base_model_name_or_path": str(base), "r": 2, "lora_alpha": 4,
        "target_modules": ["q_proj"]}))
    save_file({f"base_model.model.model.layers.0.self_attn.q_proj.lora_{x}.weight": torch.zeros(2, 2) for x in "AB"},
              folder / "adapter_model.safetensors")
    return folder


def test_pickled_weights_are_refused(tmp_path: Path, canary: Path):
    folder = write_tiny_llama(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    write_pickle(folder / "pytorch_model.bin", canary)
    with pytest.raises(UserError, match=r"no \*\.safetensors, and pytorch_model\.bin is a pickle"):
        weight_and_model(folder)
    change_json(folder / "model.safetensors.index.json", weight_map={"lm_head.weight": "pytorch_model.bin"})
    with pytest.raises(UserError, match=r"names pytorch_model\.bin, which is no safetensors file"):
        weight_files(folder)
    adapter = write_adapter(tmp_path / "adapter", folder)
    (adapter / "adapter_model.safetensors").unlink()
    write_pickle(adapter / "adapter_model.bin", canary)
    with pytest.raises(UserError, match=r"a pickle \(adapter_model\.bin\), which may run code"):
        read_adapter(adapter, "model.path")
    assert not canary.exists()


def test_pickled_rows_and_scripts_of_a_data_set_are_not_read(tmp_path: Path, canary: Path):
    data = tmp_path / "data"
    for name in ("rows.pkl", "rows.pt", "rows.npy"):
        write_pickle(data / name, canary)
        with pytest.raises(UserError, match="not a kind of file"):
            list(read_records(DatasetConfig(str(data / name))))
    (data / "data.py").write_text(CODE.format(canary=str(canary)))
    with pytest.raises(UserError, match="a folder without data files"):
        list(read_records(DatasetConfig(str(data))))
    write_rows(data / "rows.jsonl", 3)
    assert len(list(read_records(DatasetConfig(str(data))))) == 3 and not canary.exists()


# ------------------------------------------------------------------------------------------------------------ templates

ESCAPES = [
    "{{ cycler.__init__.__globals__.os.popen('touch CANARY').read() }}",
    "{{ lipsum.__globals__['os'].popen('touch CANARY').read() }}",
    "{{ ''.__class__.__mro__[1].__subclasses__()[0] }}",
    "{{ (''|attr('__class__')).__mro__[1].__subclasses__()[0] }}",
    "{{ ('{0.__class__.__init__.__globals__[os]}'|attr('format'))(cycler).x }}",
    "{{ raise_exception.__globals__['sys'].modules['os'].system('touch CANARY') }}",
    "{{ self.__init__.__globals__.__builtins__.__import__('os').system('touch CANARY') }}",
    "{{ messages.append({}) }}",
    "{% include '/etc/passwd' %}",
    "{% import '/etc/passwd' as stolen %}",
]


@pytest.mark.parametrize("escape", ESCAPES)
def test_a_template_that_breaks_out_of_its_sandbox_is_refused(escape: str, canary: Path):
    with pytest.raises(UserError, match=r"data\.chat_template .* cannot render one question"):
        chat_templates(bpe(escape.replace("CANARY", str(canary)) + CHATML), None, {})
    assert not canary.exists()


def test_what_a_template_prints_of_pythons_inside_is_nothing(canary: Path):
    shown = "{% set x = '{0.__class__.__init__.__globals__}'.format(cycler) %}{{ x }}"
    with pytest.raises(UserError, match="cannot render"):
        chat_templates(bpe(shown + CHATML), None, {})


@pytest.mark.parametrize("endless", [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% set n = namespace(x=3) %}{% for a in range(99999) %}{% set n.x = n.x * n.x %}{% endfor %}",
])
def test_a_template_without_an_end_is_ended(endless: str):
    with mock.patch.object(chat, "RENDER_SECONDS", 0.3), pytest.raises(UserError, match=r"was not done after 0\.3 s"):
        chat_templates(bpe(endless + CHATML), None, {})


@pytest.mark.parametrize("greedy", ["{{ 'a' * 10 * 1000000000000000000 * 1000 }}", "{{ range(10000000) }}",
                                    "{{ 1 // 0 }}", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"])
def test_a_template_that_wants_too_much_is_refused_in_one_line(greedy: str):
    with pytest.raises(UserError, match="cannot render one question"):
        chat_templates(bpe(greedy + CHATML), None, {})


def test_a_template_that_computes_a_power_is_refused_and_unpacked_arguments_are_not():
    with pytest.raises(UserError, match=r"computes a power \(\*\*\)"):
        chat_templates(bpe("{{ 10 ** 10 ** 10 }}" + CHATML), None, {})
    assert chat_templates(bpe("{% set n = namespace(**{'a': 1}) %}" + CHATML), None, {}) is not None


def test_the_clock_of_templates_leaves_an_alarm_of_others_alone():
    import signal

    before = signal.getsignal(signal.SIGALRM)
    assert make_tokenize(bpe(CHATML), config()) is not None
    assert signal.getsignal(signal.SIGALRM) is before and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


# ------------------------------------------------------------------------------------------------------------- secrets

SECRET = "Geheim5wort"
TOKEN = "hf_" + "aB3" * 12
GIVEN = [
    (f"eval.judge.url=https://me:{SECRET}@judge.example/ask", "eval.judge.url", "DPO_DIST_JUDGE_TOKEN"),
    (f"eval.judge.url=https://judge.example/ask?token={SECRET}", "eval.judge.url", "DPO_DIST_JUDGE_TOKEN"),
    (f"eval.judge.url=https://{SECRET}@judge.example", "eval.judge.url", "DPO_DIST_JUDGE_TOKEN"),
    (f"eval.judge.command=[python,judge.py,--api-key,{SECRET}]", "eval.judge.command", "from its environment"),
    (f"reference.urls=[http://a:8000,'http://u:{SECRET}@b:8000']", "reference.urls", "VLLM_API_KEY"),
    (f"reference.server='vllm serve --api-key {SECRET} --port {{port}}'", "reference.server", "VLLM_API_KEY"),
    (f"tracking.uri=https://me:{SECRET}@mlflow.example", "tracking.uri", "MLFLOW_TRACKING_PASSWORD"),
    (f"tracking.uri=postgresql://me:{SECRET}@db/mlflow", "tracking.uri", "MLFLOW_TRACKING_PASSWORD"),
    (f"tracking.entity={'0123456789' * 4}", "tracking.entity", "WANDB_API_KEY"),
    (f"model.path=https://me:{SECRET}@host/model", "model.path", "HF_TOKEN"),
    (f"data.train=[{{path: 'https://host/rows.jsonl?api_key={SECRET}'}}]", "data.train", "HF_TOKEN"),
    (f"export.push_to_hub={TOKEN}", "export.push_to_hub", "hf auth login"),
    (f"run.dir=runs/{TOKEN}", "run.dir", "in the environment"),
    (f"cluster.slurm.setup=['export WANDB_API_KEY={SECRET}']", "cluster.slurm.setup", "cat ~/.wandb_key"),
    (f"nonsense.key=https://me:{SECRET}@host", "nonsense.key", "in the environment"),
    (f"eval.judge.url=[[https://me:{SECRET}@host", "eval.judge.url", "DPO_DIST_JUDGE_TOKEN"),
]


@pytest.mark.parametrize("word, key, remedy", GIVEN)
def test_a_secret_in_the_command_is_refused_by_its_key_and_not_repeated(word: str, key: str, remedy: str):
    with pytest.raises(UserError) as refused:
        compose(["model.path=m", "data.train=rows.jsonl", word])
    told = str(refused.value)
    assert told.startswith(f"{key} holds") or told.startswith(f"{key}[")
    assert remedy in told and SECRET not in told and TOKEN not in told and "\n" not in told


def test_a_secret_in_a_file_of_the_users_own_is_refused_too(tmp_path: Path):
    (tmp_path / "mine.yaml").write_text(f"eval:\n  judge:\n    url: https://me:{SECRET}@host\n  samples: 8\n")
    with pytest.raises(UserError, match=r"^eval\.judge\.url holds an address with a login") as refused:
        compose(["model.path=m", f"experiment={tmp_path / 'mine.yaml'}"])
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize("key, value", [
    ("eval.judge.url", "http://localhost:8000/judge?model=a&n=3"), ("tracking.uri", "postgresql://me@db/mlflow"),
    ("model.path", "Qwen/Qwen2.5-7B-Instruct@" + "a" * 40), ("data.train[0].revision", "0123456789" * 4),
    ("data.train[0].path", "hf://datasets/me@main/rows.jsonl"), ("data.chat_template", CHATML),
    ("eval.harness.arguments", ["--gen_kwargs", "eos_token=x", "--apply_chat_template"]),
    ("reference.server", "vllm serve --skip-tokenizer-init --max-tokens 5 --port {port}"),
    ("cluster.slurm.setup", ["export WANDB_API_KEY=$(cat ~/.wandb_key)", 'export HF_TOKEN="$MY_TOKEN"']),
])
def test_what_only_resembles_a_secret_is_taken(key: str, value: object):
    refuse_secrets(key, value)


def test_a_judges_token_goes_to_the_judge_and_not_where_it_is_sent_on_to(monkeypatch: pytest.MonkeyPatch):
    seen: list[tuple[str, str | None]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append((self.path, self.headers.get("Authorization")))
            self.send_response(302)
            self.send_header("Location", "/elsewhere")
            self.end_headers()

        def do_GET(self) -> None:
            seen.append((self.path, self.headers.get("Authorization")))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"[{}]")

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setenv("DPO_DIST_JUDGE_TOKEN", SECRET)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert list(Url(f"http://127.0.0.1:{server.server_port}/ask", "eval.judge.url", 10.0).ask([{"id": 0}])) == [{}]
        server.shutdown()
    assert seen == [("/ask", f"Bearer {SECRET}"), ("/elsewhere", None)]


# --------------------------------------------------------------------------------------------------------- run folders

OTHERS_GROUP, NOBODY = 54321, 65534


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that everybody may enter, as pytest's own are not."""
    folder = Path(tempfile.mkdtemp(prefix="dpo-dist-public-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def may_read(file: Path, user: int, group: int) -> bool:
    """Whether a person of that id and group can read the file."""
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setgid(group)
            os.setuid(user)
            file.read_bytes()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.skipif(os.getuid() != 0, reason="only root may be somebody else")
@pytest.mark.parametrize("readable_by, group_reads, others_read", [
    ("owner", False, False), ("group", True, False), ("all", True, True)])
def test_a_run_folder_is_readable_by_others_only_where_that_is_asked(readable_by: str, group_reads: bool,
                                                                     others_read: bool, public: Path):
    run_dir = RunDir(public / "runs" / "mine")
    run_dir.make(compose(["model.path=m", f"run.readable_by={readable_by}"]).run.readable_by)
    file = run_dir.logs / "rank-0.log"
    file.write_text("what the model answered")
    file.chmod(0o644)
    os.chown(run_dir.path, 0, OTHERS_GROUP)
    assert may_read(file, NOBODY, OTHERS_GROUP) is group_reads
    assert may_read(file, NOBODY, NOBODY) is others_read


def test_the_mode_of_a_folder_that_is_there_is_never_changed_and_the_umask_decides_nothing(tmp_path: Path):
    (tmp_path / "old").mkdir(0o775)
    (tmp_path / "old").chmod(0o775)
    RunDir(tmp_path / "old").make()
    before = os.umask(0o077)
    try:
        RunDir(tmp_path / "new").make("all")
    finally:
        os.umask(before)
    assert [oct((tmp_path / name).stat().st_mode & 0o777) for name in ("old", "new")] == ["0o775", "0o755"]
