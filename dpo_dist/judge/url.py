"""A judge that is a URL: each POST carries some of the questions as JSON, and its answer the answers."""
from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

from dpo_dist.config.errors import UserError

ROWS_A_REQUEST = 32
TOKEN = "DPO_DIST_JUDGE_TOKEN"                          # of the environment: what the judge wants to see, if anything
TRY_AGAIN = (429, 500, 502, 503, 504)                    # statuses of a server that is busy or starting
PAUSES_SECONDS = (1.0, 4.0)                              # before the second and the third try


@dataclass(frozen=True)
class Url:
    url: str
    key: str
    timeout_seconds: float
    pauses_seconds: tuple[float, ...] = PAUSES_SECONDS

    def ask(self, rows: Sequence[Mapping[str, Any]]) -> Iterator[Any]:
        """The objects that it answers. UserError where it cannot be reached, refuses, or answers what is no list."""
        for start in range(0, len(rows), ROWS_A_REQUEST):
            body = self._post(json.dumps({"rows": rows[start:start + ROWS_A_REQUEST]}).encode())
            try:
                answer = json.loads(body)
            except ValueError:
                answer = None
            answers = answer.get("rows") if isinstance(answer, Mapping) else answer
            if not isinstance(answers, list):
                said = body[:200].decode(errors="replace")
                raise UserError(f"{self.key}={self.url} answered {said!r}; its answer is a JSON list of answers, or "
                                "{\"rows\": [...]}")
            yield from answers

    def _post(self, body: bytes) -> bytes:
        """The answer's body; a busy server, or one that cannot be reached, is asked again."""
        for pause in (*self.pauses_seconds, None):
            request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"})
            if token := os.environ.get(TOKEN):           # a redirection, which may lead to another server, is without
                request.add_unredirected_header("Authorization", f"Bearer {token}")
            try:
                with _opener(self.url).open(request, timeout=self.timeout_seconds) as response:
                    return bytes(response.read())
            except urllib.error.HTTPError as error:
                said = " ".join(error.read()[:300].decode(errors="replace").split())
                fault, final = f"answered {error.code}: {said or '(nothing said)'}", error.code not in TRY_AGAIN
            except TimeoutError:
                fault, final = (f"gave no answer for {self.timeout_seconds:g} s; set "
                                f"{self.key.rpartition('.')[0]}.timeout_seconds higher"), True
            except (OSError, HTTPException) as error:
                fault, final = f"cannot be reached: {getattr(error, 'reason', error)}", False
            if final or pause is None:
                break
            time.sleep(pause)
        raise UserError(f"{self.key}={self.url} {fault}")


def _opener(url: str) -> urllib.request.OpenerDirector:
    """As the environment's proxies say; a judge on this machine is asked directly."""
    is_here = urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")
    return urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if is_here else []))
