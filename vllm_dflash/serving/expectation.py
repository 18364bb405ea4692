"""The acceptance that a drafter's training measured, and whether a server comes near it.

``vllm-dflash train`` leaves ``dflash_training.json`` beside the weights; its ``tau_heldout`` is described in
docs/user/training.md. Served acceptance is compared by position: what share of draft tokens was right, given
that those before it were. From both sides follows the tau of drafts that all have ``num_speculative_tokens``
tokens, whatever lengths are chosen (:func:`~vllm_dflash.modeling.acceptance.full_length_tau`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from vllm_dflash.checkpoint import TRAINING_FILE
from vllm_dflash.modeling.acceptance import full_length_tau, full_length_tau_bound, rates

logger = logging.getLogger("vllm.vllm_dflash")

#: What the figures over all sources are called.
ALL = "all"
#: Held-out drafts of a source before its figure counts as known.
_KNOWN_DRAFTS = 100
#: Sources that are shown, those with most drafts.
_MAX_SOURCES = 32
#: Drafts compared before a server is looked at; then each time that they have doubled.
_FIRST_LOOK = 500
#: Share of the expected gain (tau - 1) below which a server is far from it.
_FAR_BELOW = 0.5


@dataclass(frozen=True)
class Expectation:
    """What a drafter is expected to do.

    Attributes:
        drafter: folder or hub name.
        taus: tau of drafts of ``num_speculative_tokens`` tokens by source of the held-out data, "all" first.
        lowest: the lowest of them that enough drafts were measured for; traffic may be all of that kind.
    """

    drafter: str
    taus: dict[str, float]
    lowest: float


def read_expectation(
    drafter: str, revision: str | None, num_speculative_tokens: int
) -> Expectation | None:
    """What the drafter's training measured; None where it left nothing.

    A file that cannot be read is said in the log and is no reason not to serve.
    """
    path = _training_file(drafter, revision)
    if path is None:
        return None
    try:
        held = _held_out(json.loads(path.read_bytes()))
        if held is None:
            return None
        everything, sources = held
        curves = {ALL: everything, **sources}
        taus = {
            name: full_length_tau(curve[:num_speculative_tokens])
            for name, (curve, _) in curves.items()
        }
        known = [taus[name] for name, (_, drafts) in sources.items() if drafts >= _KNOWN_DRAFTS]
        return Expectation(drafter, taus, min([taus[ALL], *known]))
    except (OSError, ValueError, RecursionError) as error:
        logger.warning(
            "vllm-dflash knows no expected acceptance, %s cannot be read: %s", path, error
        )
        return None


def _training_file(drafter: str, revision: str | None) -> Path | None:
    """The file in a folder, or in the hub's cache; nothing is downloaded for it."""
    folder = Path(drafter)
    if folder.is_dir():
        path = folder / TRAINING_FILE
        return path if path.is_file() else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(drafter, TRAINING_FILE, revision=revision)
    except HFValidationError:  # nor a hub name: something else that vLLM can load from
        return None
    return Path(cached) if isinstance(cached, str) else None


_Curve = tuple[list[float], int]


def _held_out(training: Any) -> tuple[_Curve, dict[str, _Curve]] | None:
    """Conditional rates and number of drafts, over all and by source; None where nothing was held out."""
    held = training.get("tau_heldout") if isinstance(training, dict) else training
    if held is None:
        return None
    if not isinstance(held, dict):
        raise ValueError(f"tau_heldout is {str(held)[:40]!r}, not an object")
    by_source = held.get("sources", {})
    if not isinstance(by_source, dict):
        raise ValueError(f"tau_heldout.sources is {str(by_source)[:40]!r}, not an object")
    sources = {str(name): _curve(figures) for name, figures in by_source.items()}
    most = sorted(sources, key=lambda name: -sources[name][1])[:_MAX_SOURCES]
    return _curve(held), {name: sources[name] for name in most}


def _curve(figures: Any) -> _Curve:
    given = figures if isinstance(figures, dict) else {}
    curve, drafts = given.get("conditional_rates"), given.get("num_drafts")
    if curve is None and isinstance(given.get("position_rates"), list):
        # Of versions that measured no conditional ones: the next best thing.
        shares = [1.0, *given["position_rates"]]
        if all(_is_rate(s) for s in shares):
            curve = [min(b / a, 1.0) if a else 0.0 for a, b in pairwise(shares)]
    if not isinstance(curve, list) or not all(_is_rate(rate) for rate in curve):
        raise ValueError(f"conditional_rates is {str(curve)[:40]!r}, not a list of numbers in 0..1")
    if not isinstance(drafts, int) or isinstance(drafts, bool) or drafts < 0:
        raise ValueError(f"num_drafts is {str(drafts)[:40]!r}, not a count")
    return curve, drafts


def _is_rate(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


class AcceptanceWatch:
    """Warns once when a server stays far below what its drafter's training measured.

    Far below: even the upper bound of the served tau (four standard errors, see
    :func:`~vllm_dflash.modeling.acceptance.full_length_tau_bound`) is less than half of the way from 1 to the
    lowest of the sources' figures. It is looked at after 500 compared drafts, and whenever they have doubled.
    """

    def __init__(self, expectation: Expectation | None) -> None:
        self.expectation = expectation
        self._next_look = _FIRST_LOOK

    def look(self, compared: Sequence[int], right: Sequence[int]) -> None:
        """Takes the counts since start, by position."""
        expected = self.expectation
        if expected is None or not compared or compared[0] < self._next_look:
            return
        self._next_look = 2 * compared[0]
        bound = full_length_tau_bound(compared, right)
        if bound - 1 >= _FAR_BELOW * (expected.lowest - 1):
            return
        self.expectation = None
        figures = ", ".join(f"{tau:.2f} {name}" for name, tau in list(expected.taus.items())[:4])
        logger.warning(
            "vllm-dflash: the drafter %s accepts far less here than on held-out data of its training: "
            "acceptance length %.2f over %d drafts, expected %s. Traffic unlike its training data does "
            "that and needs no mending: chosen draft lengths make it cost next to nothing. With its own "
            "traffic the usual causes are another chat template, thinking mode or sampling than in training; "
            "another or a quantised verifier; a checkpoint read otherwise than trained (windows and "
            "causality of its layers, mask_embedding.pt missing, the verifier's layer ids, rotary settings); "
            "prefixes from elsewhere, without the drafter's cache. vllm-dflash eval --engine with held-out "
            "data tells",
            expected.drafter,
            full_length_tau(rates(compared, right)),
            compared[0],
            figures,
        )
