"""What ``--worker-extension-cls`` adds to vLLM's worker: methods that ``collective_rpc`` calls."""

from __future__ import annotations

import os
from typing import Any


class WorkerExtension:
    """Mixed into vLLM's worker by our own training and evaluation engines."""

    def vllm_dflash(self, command: str, *args: Any) -> Any:
        """Runs ``TrainingSession.<command>(*args)`` in this worker; the session is made on first use.

        All ranks that train together run it together, those of other replicas included.

        Returns:
            The command's answer; with several ranks a ``Failure`` in place of a ValueError, since vLLM's
            executor makes a RuntimeError of whatever a worker process raises.

        Raises:
            ValueError: an unknown command, or an engine whose proposer or speculator is not ours.
        """
        everyone = self.__dict__.get("_vllm_dflash_everyone")
        return self._vllm_dflash_together(everyone or self._vllm_dflash_ranks(), command, *args)

    def vllm_dflash_own(self, command: str, *args: Any) -> Any:
        """The same, of this engine's ranks alone."""
        return self._vllm_dflash_together(self._vllm_dflash_ranks(), command, *args)

    def vllm_dflash_join(self, ports: tuple[int, int], replica: int, replicas: int) -> None:
        """From now on the ranks of several engines train together; returns once all are there.

        Args:
            ports: free ones on this machine.
            replica: number of this engine.
            replicas: how many there are.
        """
        from vllm_dflash.serving.worker.start import stateless_groups
        from vllm_dflash.training.ranks import Ranks
        from vllm_dflash.training.replica_group import ReplicaGroup

        own = self._vllm_dflash_ranks()
        rank = replica * own.size + own.rank
        groups = stateless_groups(ports, rank, replicas * own.size)
        everyone = self.__dict__["_vllm_dflash_everyone"] = Ranks(ReplicaGroup(*groups))
        self._vllm_dflash_session_of(own).ranks = everyone

    def _vllm_dflash_together(self, ranks: Any, command: str, *args: Any) -> Any:
        from vllm_dflash.training.ranks import Failure

        try:
            with ranks.together():
                session = self._vllm_dflash_session_of(ranks)
                if command not in session.COMMANDS:
                    raise ValueError(
                        f"unknown worker command {command!r}; known: {session.COMMANDS}"
                    )
                return getattr(session, command)(*args)
        except ValueError as error:
            if ranks.size == 1:
                raise
            return Failure.of(error, ranks.rank)

    def _vllm_dflash_ranks(self) -> Any:
        ranks = self.__dict__.get("_vllm_dflash_group")
        if ranks is None:
            from vllm_dflash.serving.worker.start import tensor_parallel_group
            from vllm_dflash.training.ranks import Ranks

            ranks = self.__dict__["_vllm_dflash_group"] = Ranks(tensor_parallel_group())
            if ranks.size > 1:
                # Ctrl-C is for the driver, which has the workers save what a resumed run needs; they end with
                # it all the same, when vLLM's pipe to it closes.
                os.setpgrp()
        return ranks

    def _vllm_dflash_session_of(self, ranks: Any) -> Any:
        session = self.__dict__.get("_vllm_dflash_session")
        if session is None:
            from vllm_dflash.training.session import TrainingSession

            session = TrainingSession(self.model_runner, ranks)  # type: ignore[attr-defined]
            self.__dict__["_vllm_dflash_session"] = session
        return session
