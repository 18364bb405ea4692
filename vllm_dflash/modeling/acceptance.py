"""Teacher-forced acceptance: the engine's draft-and-verify walk, replayed on recorded tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Acceptance:
    """Pooled counts of a speculative run.

    Attributes:
        num_drafts: verify steps that carried a draft.
        num_accepted: draft tokens accepted, bonus tokens not counted.
        accepted_per_position: how often position k (0-based) was accepted.
    """

    num_drafts: int = 0
    num_accepted: int = 0
    accepted_per_position: list[int] = field(default_factory=list)

    @property
    def tau(self) -> float:
        """Acceptance length ``1 + accepted / drafts``, pooled; 1.0 where nothing was drafted."""
        return 1.0 + self.num_accepted / self.num_drafts if self.num_drafts else 1.0

    @property
    def position_rates(self) -> list[float]:
        """Acceptance rate of each draft position over all drafts."""
        return [n / max(self.num_drafts, 1) for n in self.accepted_per_position]

    def add_draft(self, num_accepted: int, num_draft_tokens: int) -> None:
        """Counts one verify step."""
        self.num_drafts += 1
        self.num_accepted += num_accepted
        short = num_draft_tokens - len(self.accepted_per_position)
        self.accepted_per_position.extend([0] * max(short, 0))
        for k in range(num_accepted):
            self.accepted_per_position[k] += 1

    def merge(self, other: Acceptance) -> None:
        """Pools another run into this one."""
        self.num_drafts += other.num_drafts
        self.num_accepted += other.num_accepted
        short = len(other.accepted_per_position) - len(self.accepted_per_position)
        self.accepted_per_position.extend([0] * max(short, 0))
        for k, n in enumerate(other.accepted_per_position):
            self.accepted_per_position[k] += n

    def as_dict(self) -> dict:
        return {
            "tau": self.tau,
            "num_drafts": self.num_drafts,
            "num_accepted": self.num_accepted,
            "position_rates": self.position_rates,
        }


def walk(matches: Sequence[Sequence[bool]], num_draft_tokens: int) -> Acceptance:
    """Replays draft-and-verify over one response.

    The engine's first draft is anchored at the first response token (sampled by the prefill); a
    step that accepts n drafts moves the anchor n + 1 tokens on, and a response ends when its last
    token is emitted.

    Args:
        matches: ``matches[i][k]`` tells whether the block anchored at response token i drafts
            response token i + 1 + k rightly. Rows are needed for every token but the last and may
            be cut short at the end of the response.
        num_draft_tokens: drafted tokens per step, K.
    """
    out, at = Acceptance(), 0
    while at < len(matches):
        accepted = 0
        for right in matches[at][:num_draft_tokens]:
            if not right:
                break
            accepted += 1
        out.add_draft(accepted, num_draft_tokens)
        at += accepted + 1
    return out
