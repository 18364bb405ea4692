"""Which optimizer each parameter of a drafter has, and which rank keeps that optimizer's state.

An update depends on the gradient and the state of its own parameter only, so a rank that updates some of them
and gets the others from their owners has what it would have had alone, bit for bit.
"""

from __future__ import annotations

from vllm_dflash.modeling.drafter import Drafter

#: Tensors of a parameter's size that an optimizer keeps.
MOMENTS = {"adamw": 2, "muon": 1}
#: Learned by drafters of another width than the verifier's; AdamW, since each row is a token's.
_VOCAB_WEIGHTS = ("embed_tokens.weight", "lm_head.weight")


def freeze(drafter: Drafter) -> None:
    """Leaves the weights of ``k_norm`` untrained.

    Stock vLLM's CPU kernel norms the context keys of every layer with the first layer's weight, so only equal
    ones draft alike there. ``q_norm``'s weight takes its place.
    """
    for name, parameter in drafter.named_parameters():
        if name.endswith("k_norm.weight"):
            parameter.requires_grad_(False)


def shards(drafter: Drafter, optimizer: str, ranks: int) -> list[dict[str, str]]:
    """The trained parameters of each rank, by name, with their optimizers (keys of ``MOMENTS``).

    Whole parameters; the one with most state goes first, to the rank that has least.

    Args:
        drafter: frozen where it is not trained (:func:`freeze`).
        optimizer: ``muon`` for the matrices, or ``adamw`` for everything.
        ranks: how many share the state.
    """
    kinds, sizes = {}, {}
    for name, p in drafter.named_parameters():
        if p.requires_grad:
            muon = optimizer == "muon" and p.dim() == 2 and name not in _VOCAB_WEIGHTS
            kinds[name] = "muon" if muon else "adamw"
            sizes[name] = MOMENTS[kinds[name]] * p.numel()
    owners: dict[str, int] = {}
    held = [0] * ranks
    for name in sorted(sizes, key=lambda n: -sizes[n]):
        owners[name] = held.index(min(held))
        held[owners[name]] += sizes[name]
    return [{n: kinds[n] for n in kinds if owners[n] == rank} for rank in range(ranks)]


def moment_numbers(drafter: Drafter, optimizer: str, ranks: int) -> list[int]:
    """Numbers that each rank's optimizers keep (arguments as for :func:`shards`)."""
    sizes = {n: p.numel() for n, p in drafter.named_parameters()}
    return [
        sum(MOMENTS[kind] * sizes[n] for n, kind in part.items())
        for part in shards(drafter, optimizer, ranks)
    ]
