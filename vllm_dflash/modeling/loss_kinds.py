"""The losses by name, and what they need; :mod:`vllm_dflash.modeling.losses` computes them.

Without torch, so that a command line can be checked before torch is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Loss:
    """A training loss.

    Attributes:
        needs_final_states: it compares with the verifier's distribution, so the verifier's final hidden
            states are recorded beside the features.
        decays: positions weigh ``exp(-(k-1)/gamma)``; else as D-PACE says, with ``alpha``.
    """

    name: str
    needs_final_states: bool
    decays: bool


LOSSES = {
    loss.name: loss
    for loss in (
        Loss("dpace", needs_final_states=False, decays=False),
        Loss("ce", needs_final_states=False, decays=True),
        Loss("kl", needs_final_states=True, decays=True),
    )
}
