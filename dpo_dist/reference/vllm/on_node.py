"""One of the reference's servers on its own node (reference.nodes): python -m dpo_dist.reference.vllm.on_node PORT
key=value ...

slurm/train.sbatch starts it beside the ranks, tells them its URL, and ends it when they have ended.
"""
from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence

import torch

from dpo_dist.config.compose import compose
from dpo_dist.config.errors import UserError
from dpo_dist.config.rules import check_reference_adapter
from dpo_dist.models.load import torch_dtype
from dpo_dist.models.resolve import resolve
from dpo_dist.reference.vllm.open import served, server_spec
from dpo_dist.reference.vllm.process import end_of, start_server
from dpo_dist.runtime.run_dir import RunDir
from dpo_dist.runtime.world import device_of


def main(words: Sequence[str]) -> int:
    """Returns only if the server ended by itself or did not start. A signal ends both (runtime/child_process.py)."""
    port, overrides = int(words[0]), words[1:]
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    try:
        config = compose(overrides)
        reference = resolve(config.reference_path, "reference.path", config.run.offline)
        if reference.adapter is not None:
            check_reference_adapter(config)
        device = device_of(config.cluster, 0)
        dtype = str(torch_dtype(config.model, device)).removeprefix("torch.")
        gpus = torch.cuda.device_count() if device.type == "cuda" else 1
        run_dir = RunDir(config.run_dir)
        run_dir.make(config.run.readable_by)
        log = run_dir.server_log(node)
        server = start_server(server_spec(config, dtype, reference.base, gpus), log,
                              served(config).requests.wait_seconds, "0.0.0.0", port)
    except UserError as error:
        print(f"error: {node}: {error}", file=sys.stderr, flush=True)
        return 2
    print(f"reference: the server on {node} answers", flush=True)
    code = server.watcher.wait()
    print(f"error: the reference's server on {node} ended with code {code}: {end_of(log)}", file=sys.stderr, flush=True)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
