"""vLLM's V2 model runner whose speculator follows the step's schedule."""

from __future__ import annotations

from typing import Any


def following_runner(cls: type) -> type:
    """A subclass of one of vLLM's V2 runners that tells our speculator how much is to be drafted: vLLM 0.31
    does not, 0.32 does without effect."""

    class FollowingRunner(cls):  # type: ignore[valid-type,misc]
        speculator: Any

        def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            dummy = kwargs.get("dummy_run", False)
            self.speculator.num_wanted = (
                None if dummy else scheduler_output.num_spec_tokens_to_schedule
            )
            return super().execute_model(scheduler_output, *args, **kwargs)

    FollowingRunner.__name__ = FollowingRunner.__qualname__ = cls.__name__
    FollowingRunner.__module__ = cls.__module__
    return FollowingRunner
