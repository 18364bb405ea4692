"""The workers that train one drafter together: vLLM's tensor parallel ranks of the verifier."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


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
        """Sums each tensor over the ranks, in place."""
        if self.size == 1:
            return
        self.gather(None)
        for tensor in tensors:
            tensor.copy_(self._group.all_reduce(tensor.contiguous()))

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
