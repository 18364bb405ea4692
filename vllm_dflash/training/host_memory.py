"""Features in the host's memory: how much there is, page-locked slabs, and the way back to the device.

On a GPU the features of an epoch are many times what the card has room for, and the host has it. They are
moved there as they are recorded, into memory that the device reads by itself, and each step's are copied
while the step before it computes. On a CPU nothing is moved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vllm_dflash.environment import available_bytes
from vllm_dflash.training.learner import Sample

#: A power of two: torch rounds page-locked memory up to one, and pieces by themselves would waste up to half.
SLAB_BYTES = 256 * 2**20
#: Where the device may start reading in one go.
_ALIGNMENT = 256
#: Of what is available; the rest is the verifier's (on a CPU), the learner's, and the page cache's.
_SHARE = 0.5


def default_feature_gib(ranks: int) -> float:
    """What each of the workers on this machine may keep of features, if nobody says."""
    return max(0.1, int(10 * available_bytes() * _SHARE / ranks / 2**30) / 10)


class HostMemory:
    """Moves tensors from a GPU to page-locked memory of the host; those on a CPU stay as they are.

    A slab is given back when nothing that was put into it is left.
    """

    def __init__(self, pin: bool = True) -> None:
        self._pin = pin
        self._slab = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def __call__(self, tensor: Tensor) -> Tensor:
        if tensor.device.type != "cuda":
            return tensor
        return self.empty(tensor.shape, tensor.dtype).copy_(tensor)

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor in a slab."""
        num_bytes = shape.numel() * dtype.itemsize
        start = -(-self._used // _ALIGNMENT) * _ALIGNMENT
        if start + num_bytes > len(self._slab):
            size = max(SLAB_BYTES, num_bytes)
            self._slab, start = torch.empty(size, dtype=torch.uint8, pin_memory=self._pin), 0
        self._used = start + num_bytes
        return self._slab[start : self._used].view(dtype).view(shape)


def on_device(
    steps: Iterable[Any], load: Callable[[Any], list[Sample]], device: torch.device
) -> Iterator[list[Sample]]:
    """The samples of each step, on the device.

    Args:
        steps: what ``load`` makes samples of.
        load: gives one step's samples, their features in the host's memory on a GPU.
        device: the learner's; for a CPU samples are handed on as they are.
    """
    if device.type != "cuda":
        yield from map(load, steps)
        return
    yield from one_ahead(map(load, steps), _Copies(device))


def one_ahead(steps: Iterable[list[Sample]], copies: Any) -> Iterator[list[Sample]]:
    """Starts copying each step's samples before the step in front of it is handed out."""
    waiting: list[list[Sample]] = []
    for samples in steps:
        waiting.append(copies.start(samples))
        if len(waiting) == 2:
            yield copies.finish(waiting.pop(0))
    for started in waiting:
        yield copies.finish(started)


class _Copies:
    """Copies to a GPU on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)

    def start(self, samples: list[Sample]) -> list[Sample]:
        with torch.cuda.stream(self.stream):
            return [
                replace(
                    sample,
                    features_TF=sample.features_TF.to(self.device, non_blocking=True),
                    final_TH=None
                    if sample.final_TH is None
                    else sample.final_TH.to(self.device, non_blocking=True),
                )
                for sample in samples
            ]

    def finish(self, samples: list[Sample]) -> list[Sample]:
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.stream)
        for sample in samples:
            for tensor in (sample.features_TF, sample.final_TH):
                if tensor is not None:
                    # Its memory belongs to the other stream, which must not have it back too early.
                    tensor.record_stream(current)
        return samples
