"""What ``--worker-extension-cls`` adds to vLLM's worker: one method, called by ``collective_rpc``."""

from __future__ import annotations

import os
from typing import Any


class WorkerExtension:
    """Mixed into vLLM's worker by our own training and evaluation engines."""

    def vllm_dflash(self, command: str, *args: Any) -> Any:
        """Runs ``TrainingSession.<command>(*args)`` in this worker; the session is made on first use.

        Returns:
            The command's answer; with several ranks a ``Failure`` in place of a ValueError, since vLLM's
            executor makes a RuntimeError of whatever a worker process raises.

        Raises:
            ValueError: an unknown command, or an engine whose proposer or speculator is not ours.
        """
        from vllm_dflash.training.ranks import Failure

        ranks = self._vllm_dflash_ranks()
        try:
            with ranks.together():
                return self._vllm_dflash_run(ranks, command, *args)
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

    def _vllm_dflash_run(self, ranks: Any, command: str, *args: Any) -> Any:
        session = self.__dict__.get("_vllm_dflash_session")
        if session is None:
            from vllm_dflash.training.session import TrainingSession

            session = TrainingSession(self.model_runner, ranks)  # type: ignore[attr-defined]
            self.__dict__["_vllm_dflash_session"] = session
        if command not in session.COMMANDS:
            raise ValueError(f"unknown worker command {command!r}; known: {session.COMMANDS}")
        return getattr(session, command)(*args)
