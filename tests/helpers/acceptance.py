"""Drafts of known acceptance."""


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
