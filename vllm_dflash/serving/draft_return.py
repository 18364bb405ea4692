"""Draft tokens on their way to the scheduler: with the step's output instead of by a question of their own.

Without asynchronous scheduling vLLM's engine core asks its workers for draft tokens after every step
(``EngineCore.post_step``), whether there are any or not. From another process the answer takes longer than
choosing what to draft, and the device waits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

_DRAFTS = "_dflash_draft_token_ids"


def attach_drafts(runner: Any, output: Any) -> None:
    """In a worker: the V1 runner's output of a step takes the draft tokens along."""
    # vLLM shares one empty output between steps.
    if getattr(output, "req_ids", None):
        drafts = runner.take_draft_token_ids()
        if drafts is not None:
            setattr(output, _DRAFTS, drafts)


def keep_drafts(original: Callable[..., Any]) -> Callable[..., Any]:
    """In the engine core, wraps ``MultiprocExecutor.sample_tokens``: keeps drafts of the latest output."""

    @functools.wraps(original)
    def sample_tokens(self, *args, **kwargs):
        output = original(self, *args, **kwargs)
        setattr(self, _DRAFTS, getattr(output, _DRAFTS, None))
        return output

    return sample_tokens


def answer_from_output(original: Callable[..., Any]) -> Callable[..., Any]:
    """In the engine core, wraps ``MultiprocExecutor.take_draft_token_ids``: asks only for drafts that the
    latest output did not bring."""

    @functools.wraps(original)
    def take_draft_token_ids(self):
        drafts = getattr(self, _DRAFTS, None)
        setattr(self, _DRAFTS, None)
        return original(self) if drafts is None else drafts

    return take_draft_token_ids
