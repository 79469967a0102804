"""Which servers a run uses, what is checked of them, and their cache key, of which vLLM's version is a part."""
from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_dist.config.engines.vllm import VllmConfig
from dpo_dist.config.errors import UserError
from dpo_dist.config.schema import RunConfig
from dpo_dist.config.secrets import refuse_secrets
from dpo_dist.models.folder import read_config, tied_embeddings
from dpo_dist.models.text import text_config
from dpo_dist.reference.cache.store import ReferenceKey, described_keys
from dpo_dist.reference.vllm.engine import VllmReference
from dpo_dist.reference.vllm.process import Server, ServerSpec, installed_version, start_server
from dpo_dist.reference.vllm.protocol import About, Unanswered, about
from dpo_dist.runtime.run_dir import RunDir

if TYPE_CHECKING:
    from dpo_dist.reference.make import Setup

LOOK_SECONDS = 10.0                      # for an answer to /version and /v1/models
# shares of a GPU's memory for a server: on the ranks' node, the audit's oracle needs some too
BESIDE_THE_ORACLE, NODE_OF_ITS_OWN = 0.5, 0.9


def recipe(version: str, quantization: str | None) -> str:
    """How the values come to be, besides weights and dtype: the words of ReferenceKey.recipe."""
    return f"vllm {version}, quantization {quantization or 'none'}, prompt_logprobs, v1"


def reference_key(config: VllmConfig, weights: str, dtype: str) -> ReferenceKey:
    """The key of the servers' values. The version comes from the config, from what is installed, or from the servers;
    if they are gone and the cache holds values of one version, that one. UserError where none of these tells."""
    def key(version: str) -> ReferenceKey:
        return ReferenceKey(weights, dtype, recipe(version, config.quantization))

    version = config.version or (installed_version(config.server) if config.server else None)
    if version is not None:
        return key(version)
    held = _held_versions(config, key)
    if config.urls:
        wait_seconds = 0 if len(held) == 1 else config.requests.wait_seconds
        for url in _urls(config.urls, wait_seconds):
            try:
                return key(_about_once_up(url, wait_seconds).version)
            except Unanswered:
                continue
    if len(held) == 1:
        return key(held[0])
    missing = (f"the cache holds values of vllm {' and '.join(held)}" if held
               else "the cache holds no values of vllm for these weights")
    raise UserError(f"reference.urls={config.urls or '[]'} has no server that answers, and {missing}; start the "
                    "servers, or set reference.version and reference.server or reference.urls")


def open_engine(config: VllmConfig, setup: Setup) -> VllmReference:
    """The engine on servers that were looked at: they serve the model under its name, in the version of the key.

    With reference.server, the first rank of each machine starts one, and that machine's ranks use it. All ranks call
    it.
    """
    run, key, world, requests = setup.run, setup.key, setup.world, config.requests
    assert run is not None and key is not None
    name = _name(run)
    server: Server | None = None
    copies = 1                                           # of the model, in each server
    if config.urls:
        urls, sharing = _urls(config.urls, requests.wait_seconds), world.size
    elif config.nodes:
        raise UserError(f"the cache lacks values, and reference.nodes={config.nodes} servers are started by the job "
                        "that scores; run `dpo-dist score` with the same keys first")
    elif config.server:
        gpus = world.local_size if world.device.type == "cuda" else 1
        spec = server_spec(run, key.dtype, setup.folder.base, gpus)
        copies = spec.copies
        if world.local_rank == 0:
            log = RunDir(run.run_dir).server_log(world.rank)
            server = start_server(spec, log, requests.wait_seconds)
        started = world.gather(server.url if server else None)
        urls, sharing = [str(started[world.rank - world.local_rank])], world.local_size
    else:
        raise UserError("reference.engine=vllm has values to score, but no servers: set "
                        "reference.urls=[http://host:8000], or reference.server to the python of an environment that "
                        "holds vLLM")
    longest = [_checked(url, name, key, config) for url in urls]
    # ranks begin with different servers
    turned = urls[world.rank % len(urls):] + urls[:world.rank % len(urls)]
    at_once = max(1, requests.at_once * copies * len(urls) // sharing)
    return VllmReference(turned, name, min((n for n in longest if n is not None), default=None), requests, at_once,
                         world, on_close=server.stop if server else lambda: None)


def served(config: RunConfig) -> VllmConfig:
    """The reference's keys, of a run whose reference is in servers."""
    assert isinstance(config.reference, VllmConfig)
    return config.reference


def _name(config: RunConfig) -> str:
    return served(config).served_name or config.reference_path


def server_spec(config: RunConfig, dtype: str, folder: Path, gpus: int) -> ServerSpec:
    """What reference.server should serve on a machine's GPUs. dtype: as in ReferenceKey; folder: the model's."""
    r = served(config)
    assert r.server is not None
    positions = getattr(text_config(read_config(folder)), "max_position_embeddings", None)
    tied = tied_embeddings(folder)
    overrides = json.dumps({"tie_word_embeddings": tied.in_files}) if tied.flag != tied.in_files else None
    longest = config.data.max_length + 1
    split = r.tensor_parallel_size or 1
    return ServerSpec(r.server, str(folder), _name(config), dtype, r.quantization,
                      longest if positions is None else min(longest, positions), split, max(1, gpus // split),
                      NODE_OF_ITS_OWN if r.nodes else BESIDE_THE_ORACLE, config.run.offline, overrides)


def _urls(given: Iterable[str] | str, wait_seconds: float) -> list[str]:
    """The servers' URLs; a file of them may still be on its way."""
    if isinstance(given, str):
        file, until = Path(given), time.monotonic() + wait_seconds
        while not file.is_file() and time.monotonic() < until:
            time.sleep(1.0)
        if not file.is_file():
            if not wait_seconds:
                return []
            raise UserError(f"reference.urls={given} was not there after {wait_seconds:g} s: it is to be a file with "
                            "one URL a line, or a list")
        given = file.read_text(errors="replace").split()
    urls = [url.rstrip("/").removesuffix("/v1") for url in given]
    refuse_secrets("reference.urls", urls)               # those of a file, too
    for url in urls:
        if not re.match(r"https?://[^/]+", url):
            raise UserError(f"reference.urls holds '{url}', which is no URL; write it as http://host:8000")
    if not urls:
        raise UserError(f"reference.urls={given} names no server; write one URL a line")
    return urls


def _about_once_up(url: str, wait_seconds: float) -> About:
    """What the server says of itself; it may still be starting. Raises Unanswered after `wait_seconds`."""
    until = time.monotonic() + wait_seconds
    while True:
        try:
            return about(url, LOOK_SECONDS)
        except Unanswered:
            if time.monotonic() >= until:
                raise
            time.sleep(1.0)


def _checked(url: str, name: str, key: ReferenceKey, config: VllmConfig) -> int | None:
    """The longest sequence that the server takes. UserError where it is not what the run is to use."""
    wait_seconds = config.requests.wait_seconds
    try:
        server_says = _about_once_up(url, wait_seconds)
    except Unanswered as failure:
        raise UserError(f"the reference's server {url} did not answer for {wait_seconds:g} s ({failure}); start it, or "
                        "take it out of reference.urls") from failure
    if recipe(server_says.version, config.quantization) != key.recipe:
        raise UserError(f"{url} is vllm {server_says.version}, but this run's values are of '{key.recipe}'; use one "
                        f"version, or set reference.version={server_says.version} to score all of them with it")
    if name not in server_says.longest:
        raise UserError(f"{url} serves {', '.join(server_says.longest) or 'nothing'}, but not '{name}'; set "
                        "reference.served_name, or serve the model that reference.path names")
    return server_says.longest[name]


def _held_versions(config: VllmConfig, key: Callable[[str], ReferenceKey]) -> list[str]:
    """Versions of vLLM whose values for these weights are in the cache."""
    wanted = key("VERSION")
    pattern = re.escape(wanted.recipe).replace("VERSION", r"(\S+)")
    found = set()
    for held in described_keys(config.cache_dir):
        match = re.fullmatch(pattern, held.recipe)
        if match and (held.weights, held.dtype) == (wanted.weights, wanted.dtype):
            found.add(match[1])
    return sorted(found)
