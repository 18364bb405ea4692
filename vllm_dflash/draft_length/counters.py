"""What drafting did since start: steps, time, tokens, and what no speculation would have taken."""

from __future__ import annotations

import numpy as np

from vllm_dflash.draft_length.cost import StepCost

DRAFTER, LOOKUP = "drafter", "lookup"


class Counters:
    """Counts since start, by source where they differ.

    Args:
        cost: of steps.
        num_tokens: K, the most draft tokens of a request.

    Attributes:
        steps: verifier steps without prompt chunks.
        drafted_steps: those before which the drafter ran.
        tokens: emitted by those steps.
        seconds: spent on all steps, those with prompt chunks and draft passes included.
        plain_seconds: what the same tokens would have taken without speculation, by the measured costs; steps
            with prompt chunks as long as they took without their drafts.
        lengths: how often each draft length was chosen, ``[K + 1]``.
        drafts, proposed, accepted, expected: drafts and their tokens by source. Where the scheduler chooses
            these are vLLM's counts; the worker counts what it could compare with the text that followed, so
            not those of requests' last steps.
        compared, right: the drafter's drafts by position, ``[K]``: those with a token of the text in its
            place and every position before it right, and those of them that were right there, too.
    """

    def __init__(self, cost: StepCost, num_tokens: int) -> None:
        self.cost = cost
        self.steps = self.drafted_steps = self.tokens = 0
        self.seconds = self.plain_seconds = 0.0
        self.lengths = [0] * (num_tokens + 1)
        self.drafts = {DRAFTER: 0, LOOKUP: 0}
        self.proposed = {DRAFTER: 0, LOOKUP: 0}
        self.accepted = {DRAFTER: 0, LOOKUP: 0}
        self.expected = {DRAFTER: 0.0, LOOKUP: 0.0}
        self.compared, self.right = [0] * num_tokens, [0] * num_tokens

    @property
    def speedup(self) -> float | None:
        """Estimated speed over that without speculation; None before the first step."""
        return self.plain_seconds / self.seconds if self.seconds else None

    def verified(self, source: str, drafts: int, proposed: int, accepted: int) -> None:
        """Counts drafts that went to the verifier, their tokens, and those accepted."""
        self.drafts[source] += drafts
        self.proposed[source] += proposed
        self.accepted[source] += accepted

    def compare(self, first: int, right: int, wrong: bool) -> None:
        """Counts what the text says of one draft of the drafter's.

        Args:
            first: positions that were counted before.
            right: positions known to be right by now, those included.
            wrong: whether the next one is known to be wrong.
        """
        for k in range(first, right):
            self.compared[k] += 1
            self.right[k] += 1
        if wrong:
            self.compared[right] += 1

    def chose(self, lengths_B: np.ndarray) -> None:
        """Counts draft lengths of a step's requests."""
        for length, times in enumerate(np.bincount(lengths_B).tolist()):
            self.lengths[length] += times

    def compare_batch(self, tried_B: np.ndarray, right_B: np.ndarray) -> None:
        """:meth:`compare` of new drafts: of each the positions whose fate is known, and those right."""
        for counts, reached_B in ((self.compared, tried_B), (self.right, right_B)):
            # Reached position k: all that reached as far or farther.
            reached_K = np.bincount(reached_B, minlength=len(counts) + 1)[:0:-1].cumsum()[::-1]
            counts[:] = (counts + reached_K).tolist()

    def add(
        self,
        num_tokens: int,
        num_requests: int,
        context: float,
        seconds: float,
        drafts: int = 0,
        draft_seconds: float = 0.0,
    ) -> None:
        """Counts a step without prompt chunks.

        Its time without speculation is scaled by the costs of the two, so that a step that was held up is so
        in both.

        Args:
            num_tokens: emitted.
            num_requests, context: its requests, and their tokens altogether.
            seconds: that it took, ``draft_seconds`` of them for its draft pass.
            drafts: draft tokens that it verified.
        """
        plain = self.cost.verify_one(num_requests, context, 0)
        modelled = self.cost.verify_one(num_requests, context, drafts) + draft_seconds
        self.steps += 1
        self.tokens += num_tokens
        self.seconds += seconds
        self.plain_seconds += seconds * plain / modelled * num_tokens / num_requests

    def add_prompts(
        self,
        num_requests: int,
        context: float,
        seconds: float,
        drafts: int = 0,
        accepted: int = 0,
        draft_seconds: float = 0.0,
    ) -> None:
        """Counts a step with prompt chunks, beside which other requests may verify drafts.

        Without speculation it takes as long, but for the ``drafts`` of all requests together and the draft
        pass, and those ``accepted`` take plain steps.
        """
        plain = self.cost.verify_one(num_requests, context, 0)
        verifying = self.cost.verify_one(num_requests, context, drafts) - plain
        self.seconds += seconds + draft_seconds
        self.plain_seconds += max(seconds - verifying, 0.0) + plain * accepted / num_requests
