"""Acceptance of drafts: what tau counts, and the engine's draft-and-verify walk, replayed on recorded tokens.

Every tau of ours counts delivered tokens, those that the client gets. A verify step delivers one token
without a draft; with one it delivers the accepted draft tokens and the verifier's own behind them, as far as
the response goes: what lies behind max_tokens, an end-of-text token or a stop is not delivered. The tokens
that a step delivers beyond the one are its accepted ones. So for whole responses

    delivered tokens after each response's first  =  drafts + accepted + steps without a draft
    tau  =  1 + accepted / drafts  =  tokens delivered a step with a draft

without a correction at the end: where a response ends with a draft token, that step has no token of the
verifier's, and the last draft token is the one that it would have delivered anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Acceptance:
    """Pooled counts of a speculative run.

    Attributes:
        num_drafts: verify steps that carried a draft.
        num_accepted: tokens that those steps delivered beyond one each.
        accepted_per_position: how many of them delivered more than ``k + 1`` tokens, for k = 0, 1, ...
        compared_per_position: drafts whose position k (0-based) has a token of the response in its place, and
            all positions before it were right.
        right_per_position: those of them in which position k was right, too.
        delivered: tokens that each step delivered, in their order; only replayed responses have them.
        selected: of a drafter with a selector, all positions, each behind the right token; how many of them
            are right by their logits alone, and how many by the selector.
    """

    num_drafts: int = 0
    num_accepted: int = 0
    accepted_per_position: list[int] = field(default_factory=list)
    compared_per_position: list[int] = field(default_factory=list)
    right_per_position: list[int] = field(default_factory=list)
    delivered: list[int] = field(default_factory=list)
    selected: tuple[int, int, int] = (0, 0, 0)

    @property
    def tau(self) -> float:
        """Acceptance length ``1 + accepted / drafts``, pooled; 1.0 where nothing was drafted."""
        return 1.0 + self.num_accepted / self.num_drafts if self.num_drafts else 1.0

    @property
    def position_rates(self) -> list[float]:
        """Share of the drafts that brought more than 0, 1, ... tokens beyond the one; sum to tau - 1."""
        return [n / max(self.num_drafts, 1) for n in self.accepted_per_position]

    @property
    def conditional_rates(self) -> list[float]:
        """Share of right tokens at each position among those compared. Unlike ``position_rates`` they do not
        depend on where responses end, nor on how many tokens a draft has."""
        return rates(self.compared_per_position, self.right_per_position)

    def add_draft(self, num_accepted: int, num_draft_tokens: int) -> None:
        """Counts one verify step that delivered ``1 + num_accepted`` tokens."""
        self.num_drafts += 1
        self.num_accepted += num_accepted
        _widen(self.accepted_per_position, num_draft_tokens)
        for k in range(num_accepted):
            self.accepted_per_position[k] += 1

    def add_compared(self, right: Sequence[bool], num_draft_tokens: int) -> None:
        """Counts a draft's positions that lie inside the response, up to the first wrong one."""
        _widen(self.compared_per_position, num_draft_tokens)
        _widen(self.right_per_position, num_draft_tokens)
        for k, hit in enumerate(right):
            self.compared_per_position[k] += 1
            if not hit:
                break
            self.right_per_position[k] += 1

    def add_selected(self, num_positions: int, right_unary: int, right_selector: int) -> None:
        """Counts positions that a selector chose for."""
        more = (num_positions, right_unary, right_selector)
        self.selected = tuple(a + b for a, b in zip(self.selected, more, strict=True))  # type: ignore[assignment]

    def merge(self, other: Acceptance) -> None:
        """Pools another run into this one."""
        self.add_selected(*other.selected)
        self.num_drafts += other.num_drafts
        self.num_accepted += other.num_accepted
        self.delivered += other.delivered
        for name in ("accepted_per_position", "compared_per_position", "right_per_position"):
            mine, theirs = getattr(self, name), getattr(other, name)
            _widen(mine, len(theirs))
            for k, n in enumerate(theirs):
                mine[k] += n

    def as_dict(self) -> dict:
        positions, unary, selector = self.selected
        head = {}
        if positions:
            head = {
                "unary_accuracy": unary / positions,
                "selector_accuracy": selector / positions,
                "selector_lift": (selector - unary) / positions,
            }
        return {
            **head,
            "tau": self.tau,
            "num_drafts": self.num_drafts,
            "num_accepted": self.num_accepted,
            "position_rates": self.position_rates,
            "conditional_rates": self.conditional_rates,
        }


def _widen(counts: list[int], width: int) -> None:
    counts.extend([0] * max(width - len(counts), 0))


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
        left = len(matches) - at  # tokens of the response behind the anchor
        inside = matches[at][: min(num_draft_tokens, left)]
        right = next((k for k, hit in enumerate(inside) if not hit), len(inside))
        delivered = min(right + 1, left)
        out.add_draft(delivered - 1, num_draft_tokens)
        out.add_compared(inside, num_draft_tokens)
        out.delivered.append(delivered)
        at += delivered
    return out


# -- acceptance by position ---------------------------------------------------------------------


def rates(compared: Sequence[int], right: Sequence[int]) -> list[float]:
    """Share of right tokens at each position where those before were right; 0 where none was compared."""
    return [r / n if n else 0.0 for n, r in zip(compared, right, strict=True)]


def full_length_tau(conditional_rates: Sequence[float]) -> float:
    """tau of drafts that all have as many tokens as there are rates, in text without an end.

    ``1 + sum_k prod_{j<=k} rate_j``, the product-limit estimate: drafts of any lengths, also chosen ones, and
    those cut off by the end of a response tell what whole drafts would give.
    """
    tau, product = 1.0, 1.0
    for rate in conditional_rates:
        product *= rate
        tau += product
    return tau


#: How much more uncertain tau is than if drafts were independent: those of one response are alike.
_CLUSTERING = 10.0


def full_length_tau_bound(
    compared: Sequence[int], right: Sequence[int], num_errors: float = 4.0
) -> float:
    """Upper confidence bound of :func:`full_length_tau`, by so many standard errors.

    The errors of the rates are propagated (the delta method), and multiplied by what drafts of one response
    have in common; a rate is that with one more success and one more failure.
    """
    smooth = [(r + 1) / (n + 2) for n, r in zip(compared, right, strict=True)]
    variance = 0.0
    for j, (rate, n) in enumerate(zip(smooth, compared, strict=True)):
        product, slope = 1.0, 0.0
        for k, other in enumerate(smooth):
            product *= other
            slope += product / rate if k >= j else 0.0
        variance += slope**2 * rate * (1 - rate) / (n + 2)
    return full_length_tau(smooth) + num_errors * (_CLUSTERING * variance) ** 0.5
