"""The reference in vLLM: open.py (which servers, which key), process.py (starts one), on_node.py (on a node of its
own), engine.py (the client), protocol.py (request and answer)."""
from __future__ import annotations

from dpo_dist.reference.vllm.open import open_engine, reference_key

__all__ = ["open_engine", "reference_key"]
