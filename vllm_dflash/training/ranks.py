"""The workers that train one drafter together: vLLM's tensor parallel ranks of the verifier."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: Bytes that are summed at once: few enough launches, and little memory beside the gradients.
_BUCKET_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Failure:
    """What one rank tells the others (and, for what a user can put right, the driver) instead of a result."""

    message: str
    by_user: bool

    @classmethod
    def of(cls, error: Exception, rank: int) -> Failure:
        if isinstance(error, ValueError):
            return cls(str(error), True)
        return cls(f"rank {rank} failed with {type(error).__name__}: {error}", False)

    def error(self) -> Exception:
        return (ValueError if self.by_user else RuntimeError)(self.message)


class _PeerFailed(Exception):
    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


class Ranks:
    """Collectives in which no rank waits for one that failed.

    Each begins with an exchange over the host in which every rank says that it is there, or why not; inside
    :meth:`together` an error of one rank becomes an error of all.

    Args:
        group: vLLM's ``GroupCoordinator`` of the ranks; None for a worker on its own, for which everything
            here is free.
    """

    def __init__(self, group: Any = None) -> None:
        self._group = group
        self.size: int = 1 if group is None else group.world_size
        self.rank: int = 0 if group is None else group.rank_in_group

    def gather(self, part: Any) -> list[Any]:
        """The parts of all ranks, in their order; any plain data."""
        if self.size == 1:
            return [part]
        parts: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(parts, part, group=self._group.cpu_group)
        for one in parts:
            if isinstance(one, Failure):
                raise _PeerFailed(one)
        return parts

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Sums each tensor over the ranks, in place; all ranks get the same bits.

        Small tensors travel together: each collective costs its latency.
        """
        self.gather(None)
        self._exchange(tensors, lambda flat: self._group.all_reduce(flat))

    def broadcast(self, tensors: Sequence[Tensor], owner: int) -> None:
        """Gives each tensor the values that it has on rank ``owner``, in place; small ones together."""
        self.share([[]] * owner + [tensors])

    def share(self, tensors: Sequence[Sequence[Tensor]]) -> None:
        """:meth:`broadcast` of the tensors of each rank, those of rank 0 first."""
        self.gather(None)
        for owner, part in enumerate(tensors):
            self._exchange(part, self._from(owner))

    def _from(self, owner: int) -> Callable[[Tensor], Tensor]:
        return lambda flat: self._group.broadcast(flat, owner)

    def _exchange(self, tensors: Sequence[Tensor], collective: Callable[[Tensor], Tensor]) -> None:
        if self.size == 1:
            return
        for bucket in _buckets(tensors):
            parts = [t.reshape(-1) for t in bucket]
            flat = parts[0] if len(parts) == 1 else torch.cat(parts)
            results = collective(flat).split([t.numel() for t in bucket])
            for tensor, result in zip(bucket, results, strict=True):
                tensor.copy_(result.view(tensor.shape))

    @contextmanager
    def together(self) -> Iterator[None]:
        """Work that all ranks do or none has done.

        Raises:
            ValueError: what a rank raised as such, on every rank.
            RuntimeError: another error, on the other ranks.
        """
        try:
            yield
            self.gather(None)
        except _PeerFailed as peer:
            raise peer.failure.error() from None
        except Exception as error:
            if self.size > 1:
                with suppress(_PeerFailed):  # our own comes back with the others
                    self.gather(Failure.of(error, self.rank))
            raise


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive tensors of one dtype, of at most ``_BUCKET_BYTES`` together if they are several."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        more = tensor.numel() * tensor.element_size()
        if bucket and (size + more > _BUCKET_BYTES or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += more
    if bucket:
        yield bucket


#: Elements that are looked at together; 32 MiB of int64.
_CHUNK = 2**22


def checksum(tensors: Iterable[Tensor]) -> str:
    """A number that a change of any bit of the tensors changes, computed on their device.

    Their bits as integers, each times an odd number of its position, added modulo 2**64: any order of adding
    gives the same. Tensors that share memory count once.
    """
    sums: list[Tensor] = []
    seen: set[tuple[int, int]] = set()
    for tensor in tensors:
        at = (tensor.data_ptr(), tensor.numel())
        if at in seen or not tensor.numel():
            continue
        seen.add(at)
        bits = tensor.detach().contiguous().view(-1).view(_BITS[tensor.element_size()])
        for part in bits.split(_CHUNK):
            odd = torch.arange(1, 2 * len(part), 2, device=part.device)
            sums.append((part.to(torch.int64) * odd).sum())
    total = 0
    for value in torch.stack(sums).tolist() if sums else []:
        total = (total * _MULTIPLIER + value) % 2**64
    return f"{total:016x}"


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
#: Odd, so that no chunk's sum is lost (that of splitmix64).
_MULTIPLIER = 0x9E3779B97F4A7C15
