"""Draft tokens on their way to the scheduler: with the step's output instead of by a question of their own.

Without asynchronous scheduling vLLM's engine core asks its workers for draft tokens after every step
(``EngineCore.post_step``), whether there are any or not. From another process the answer takes longer than
choosing what to draft, and the device waits.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

_DRAFTS = "_dflash_draft_token_ids"


def send_with_output(runner: Any) -> None:
    """In a worker: the V1 runner's output of a step takes the draft tokens along."""
    sample = runner.sample_tokens

    def sample_tokens(*args: Any, **kwargs: Any) -> Any:
        output = sample(*args, **kwargs)
        # vLLM shares one empty output between steps.
        if getattr(output, "req_ids", None):
            drafts = runner.take_draft_token_ids()
            if drafts is not None:
                setattr(output, _DRAFTS, drafts)
        return output

    runner.sample_tokens = sample_tokens


def patch_executor(module: ModuleType) -> None:
    """In the engine core: the executor answers from the latest output, where that has an answer."""
    cls: Any = module.MultiprocExecutor
    sample, take = cls.sample_tokens, cls.take_draft_token_ids

    @functools.wraps(sample)
    def sample_tokens(self, *args, **kwargs):
        output = sample(self, *args, **kwargs)
        setattr(self, _DRAFTS, getattr(output, _DRAFTS, None))
        return output

    @functools.wraps(take)
    def take_draft_token_ids(self):
        drafts = getattr(self, _DRAFTS, None)
        setattr(self, _DRAFTS, None)
        return take(self) if drafts is None else drafts

    cls.sample_tokens, cls.take_draft_token_ids = sample_tokens, take_draft_token_ids
