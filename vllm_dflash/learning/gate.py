"""Whether a candidate is better than the drafter that serves: on held-out conversations, paired."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

#: Drafts and accepted tokens of one conversation.
Counts = tuple[int, int]
_ROUNDS = 1000
#: One-sided: so often a candidate that is no better passes.
_ERROR = 0.01
#: Conversations before anything is concluded, and of a group before it can forbid.
MIN_CONVERSATIONS = 12
#: A group is one that counts if it has this share of the conversations.
_BIG = 0.15
#: tau may be lower in a group by so much.
_TOLERANCE = 0.02


@dataclass(frozen=True)
class Verdict:
    """A comparison.

    Attributes:
        better: the candidate is to serve.
        worse: it is worse overall, beyond chance.
        tau_before, tau_after: pooled.
        reason: in words, for the log.
    """

    better: bool
    worse: bool
    tau_before: float
    tau_after: float
    reason: str


def tau(counts: Sequence[Counts]) -> float:
    """Pooled ``1 + accepted / drafts``."""
    drafts = sum(n for n, _ in counts)
    return 1 + sum(a for _, a in counts) / drafts if drafts else 1.0


def ratio_interval(
    before: Sequence[Counts], after: Sequence[Counts], error: float = _ERROR, seed: int = 0
) -> tuple[float, float]:
    """Interval of the ratio of pooled taus, after over before, by a bootstrap over conversations.

    The same conversations are drawn for both: what is easy for one is easy for the other.
    """
    pairs = np.asarray(list(zip(before, after, strict=True)), dtype=np.float64)  # [N, 2, 2]
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(len(pairs), np.full(len(pairs), 1 / len(pairs)), size=_ROUNDS)
    sums = np.tensordot(weights, pairs, axes=1)  # [rounds, 2, 2]
    taus = 1 + sums[..., 1] / np.maximum(sums[..., 0], 1)
    low, high = np.quantile(taus[:, 1] / taus[:, 0], [error, 1 - error])
    return float(low), float(high)


def judge(
    before: Mapping[str, Counts], after: Mapping[str, Counts], groups: Mapping[str, Sequence[str]]
) -> Verdict:
    """Compares two drafters on the conversations that both have counts of.

    Args:
        before: of the drafter that serves, by conversation.
        after: of the candidate.
        groups: conversations by source and by age, none of which may lose.
    """
    keys = [k for k in before if k in after]
    old, new = [before[k] for k in keys], [after[k] for k in keys]
    tau_before, tau_after = tau(old), tau(new)
    if len(keys) < MIN_CONVERSATIONS:
        reason = f"{len(keys)} held-out conversations, {MIN_CONVERSATIONS} are needed"
        return Verdict(False, False, tau_before, tau_after, reason)
    low, high = ratio_interval(old, new)
    said = f"tau {tau_before:.3f} -> {tau_after:.3f} on {len(keys)} held-out conversations"
    if low <= 1:
        word = "worse" if high < 1 else "no real difference"
        return Verdict(False, high < 1, tau_before, tau_after, f"{said}: {word}")
    for name, members in groups.items():
        inside = [k for k in members if k in before and k in after]
        if len(inside) < max(MIN_CONVERSATIONS, _BIG * len(keys)):
            continue
        a, b = tau([before[k] for k in inside]), tau([after[k] for k in inside])
        if b < (1 - _TOLERANCE) * a:
            return Verdict(
                False, False, tau_before, tau_after, f"{said}, but {a:.3f} -> {b:.3f} in {name}"
            )
    return Verdict(True, False, tau_before, tau_after, said)
