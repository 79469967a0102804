"""A value that the device is still computing, wanted by the process, but not at once."""
from __future__ import annotations

import torch
from torch import Tensor


class Later:
    """A copy of a tensor on its way from the device: `values` waits for it, and for nothing queued after it."""

    def __init__(self, tensor: Tensor):
        self._values, self._copied = tensor.detach().clone(), None
        if tensor.is_cuda:
            pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._values = pinned.copy_(tensor, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    @property
    def values(self) -> Tensor:
        if self._copied is not None:
            self._copied.synchronize()
        return self._values

    @property
    def is_on_its_way(self) -> bool:
        """Whether `values` may have to wait."""
        return self._copied is not None and not self._copied.query()
