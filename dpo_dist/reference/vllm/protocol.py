"""What goes over the wire to a server of log-probs, and what is accepted as an answer.

POST /v1/completions with prompts as token ids, `max_tokens: 1`, `prompt_logprobs: 0`. The answer's choice i (by
`index`) is prompt i; its `prompt_logprobs` has one entry a token: null for the first, then {"<token id>": {"logprob":
...}} (vllm/entrypoints/openai/completion/ protocol.py, CompletionResponseChoice). Nothing is ever put in place of a
value that is missing or cannot be right.
"""
from __future__ import annotations

import http.client
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from dpo_dist.config.errors import UserError

CLAMPED = -9999.0                        # what vLLM writes for -inf, which JSON cannot say
ROUNDING = 1e-4                          # nats by which a log-prob of nearly 0 may come out above 0
TRY_AGAIN = (408, 425, 429)              # besides 5xx: the server asks to try again later


class Unanswered(Exception):
    """The server is down, late or overloaded, or ended while answering. Trying again may help."""

    def __init__(self, message: str, refused: bool = False):
        super().__init__(message)
        self.refused = refused           # nobody listens there: a smaller request would not help


@dataclass(frozen=True)
class Continuation:
    """A completion after its prompt, as token ids."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]


@dataclass(frozen=True)
class About:
    """What a server says of itself."""

    version: str
    longest: Mapping[str, int | None]    # {name of a model: tokens of prompt and answer that it takes}


def about(url: str, timeout_seconds: float) -> About:
    """What the server says of itself. Raises Unanswered, or UserError where it is no server of this kind."""
    version, models = _exchange(url, "/version", timeout_seconds), _exchange(url, "/v1/models", timeout_seconds)
    try:
        return About(str(version["version"]),
                     {str(model["id"]): model.get("max_model_len") for model in models["data"]})
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"reference.urls: {url} does not answer /version and /v1/models as vLLM does; give the URL of "
                        "a vLLM server") from error


def score(url: str, model: str, sequences: Sequence[Continuation], timeout_seconds: float) -> list[np.ndarray]:
    """Log-probs of each sequence's completion tokens: (C,) float32, nats. Raises Unanswered; UserError for a wrong
    answer."""
    answer = _exchange(url, "/v1/completions", timeout_seconds, {
        "model": model, "prompt": [[*s.prompt, *s.completion] for s in sequences], "max_tokens": 1, "temperature": 0,
        "prompt_logprobs": 0})
    try:
        if answer["model"] != model:
            raise UserError(f"{url} answered for the model '{answer['model']}', asked was '{model}'; look at "
                            "reference.urls and served_name")
        choices = {choice["index"]: choice["prompt_logprobs"] for choice in answer["choices"]}
        if len(answer["choices"]) != len(sequences) or choices.keys() != set(range(len(sequences))):
            raise UserError(f"{url} answered {len(answer['choices'])} of {len(sequences)} prompts; its values are not "
                            "used")
        return [_logps(url, sequence, choices[i]) for i, sequence in enumerate(sequences)]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{url} answered without prompt_logprobs ({error!r}); reference.urls must be servers that know "
                        "them, such as vLLM") from error


def _logps(url: str, sequence: Continuation, entries: Sequence[Mapping[str, Any] | None]) -> np.ndarray:
    tokens = (*sequence.prompt, *sequence.completion)
    if len(entries) != len(tokens):
        raise UserError(f"{url} answered {len(entries)} positions for {len(tokens)} tokens; its values are not used")
    values = []
    for at, (token, entry) in enumerate(zip(tokens[1:], entries[1:], strict=True), 1):
        if entry is None or str(token) not in entry:
            there = "nothing" if entry is None else f"token {', '.join(entry)}"
            raise UserError(f"{url} answered {there} at position {at}, where token {token} was asked; its values are "
                            "not used")
        values.append(float(entry[str(token)]["logprob"]))
    logps = values[len(sequence.prompt) - 1:]
    for at, value in enumerate(logps):
        if not (math.isfinite(value) and CLAMPED < value <= ROUNDING):
            raise UserError(f"{url} answered a log-prob of {value} for token {sequence.completion[at]} (position "
                            f"{len(sequence.prompt) + at} of {len(tokens)}), which cannot be used; look at the model's "
                            "weights and at the data")
    return np.array(logps, dtype=np.float32)


def _exchange(url: str, path: str, timeout_seconds: float, content: Mapping[str, Any] | None = None) -> Any:
    """The server's JSON answer. Each call opens its own connection: nothing is shared between threads."""
    where = urlsplit(url)
    kind = http.client.HTTPSConnection if where.scheme == "https" else http.client.HTTPConnection
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("VLLM_API_KEY"):            # the same variable from which a vLLM server reads it
        headers["Authorization"] = f"Bearer {key}"
    connection = kind(where.netloc, timeout=timeout_seconds)
    try:
        body = None if content is None else json.dumps(content).encode()
        connection.request("GET" if body is None else "POST", where.path.rstrip("/") + path, body, headers)
        response = connection.getresponse()
        status, answer = response.status, response.read()
    except (OSError, http.client.HTTPException) as error:
        raise Unanswered(f"{url}: {type(error).__name__}: {error}",
                         refused=isinstance(error, ConnectionRefusedError)) from error
    finally:
        connection.close()
    if status >= 500 or status in TRY_AGAIN:
        raise Unanswered(f"{url}{path} answered {status}: {_server_message(answer)}")
    if status != 200:
        raise UserError(f"{url}{path} refused the request with {status}: {_server_message(answer)}")
    try:
        return json.loads(answer)
    except ValueError as error:
        raise Unanswered(f"{url}{path} ended in the middle of its answer ({len(answer)} bytes)") from error


def _server_message(answer: bytes) -> str:
    """The server's own message, in a line."""
    try:
        return str(json.loads(answer)["error"]["message"])[:300]
    except (ValueError, KeyError, TypeError):
        return " ".join(answer[:300].decode(errors="replace").split()) or "(nothing said)"
