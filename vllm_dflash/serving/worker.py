"""What ``--worker-extension-cls`` adds to vLLM's worker: one method, called by ``collective_rpc``."""

from __future__ import annotations

from typing import Any


class WorkerExtension:
    """Mixed into vLLM's worker by our own training and evaluation engines."""

    def vllm_dflash(self, command: str, *args: Any) -> Any:
        """Runs ``TrainingSession.<command>(*args)`` in this worker; the session is made on first use.

        Raises:
            ValueError: an unknown command, or an engine that does not run our V1 proposer.
        """
        session = self.__dict__.get("_vllm_dflash_session")
        if session is None:
            from vllm_dflash.training.session import TrainingSession

            runner = self.model_runner  # type: ignore[attr-defined]
            session = TrainingSession(runner.drafter, runner.get_model())
            self.__dict__["_vllm_dflash_session"] = session
        if command not in session.COMMANDS:
            raise ValueError(f"unknown worker command {command!r}; known: {session.COMMANDS}")
        return getattr(session, command)(*args)
