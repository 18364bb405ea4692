"""Drafts of known acceptance, and draws of known probability."""

from __future__ import annotations

import torch


def drafts_of(rates, count, rng):
    """Drafts that are right with the given conditional rates, as counts compared and right."""
    compared, right = [0] * len(rates), [0] * len(rates)
    for _ in range(count):
        for k, rate in enumerate(rates):
            compared[k] += 1
            if rng.random() > rate:
                break
            right[k] += 1
    return compared, right


def chi_square_p(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """P value of the counts; cells that are expected fewer than 8 times are pooled."""
    expected = probabilities.flatten() * counts.sum()
    counts = counts.flatten().double()
    rare = expected < 8
    cells, want = counts[~rare], expected[~rare]
    if rare.any():
        cells = torch.cat([cells, counts[rare].sum().view(1)])
        want = torch.cat([want, expected[rare].sum().view(1)])
    statistic = ((cells - want) ** 2 / want).sum()
    freedom = torch.tensor((len(cells) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))
