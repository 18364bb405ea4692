"""The group of all ranks of all replicas, for :class:`~vllm_dflash.training.ranks.Ranks`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class ReplicaGroup:
    """What ``Ranks`` reads of vLLM's ``GroupCoordinator``, which knows the ranks of one engine only.

    Args:
        cpu_group: torch's process group for the host's tensors.
        device_group: that for the tensors that are summed.
    """

    def __init__(self, cpu_group: Any, device_group: Any) -> None:
        self.cpu_group, self._device_group = cpu_group, device_group
        self.world_size: int = cpu_group.size()
        self.rank_in_group: int = cpu_group.rank()

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sums over the ranks, in place; all of them get the same bits."""
        torch.distributed.all_reduce(tensor, group=self._device_group)
        return tensor

    def broadcast(self, tensor: Tensor, src: int) -> Tensor:
        """Gives the tensor the values that it has on rank ``src`` of the group, in place."""
        torch.distributed.broadcast(tensor, group=self._device_group, group_src=src)
        return tensor
