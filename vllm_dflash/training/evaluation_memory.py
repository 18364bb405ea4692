"""The memory plan of an evaluation on a GPU: the engine's share, and acceptance of drafts replayed beside it.

Nothing is trained: no gradients, no optimizer, and activations of one layer at a time.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vllm_dflash.config import DrafterConfig
from vllm_dflash.modeling.blocks import MAX_CHUNK_QUERIES
from vllm_dflash.training.config import EngineOptions
from vllm_dflash.training.learner import EVAL_ANCHORS
from vllm_dflash.training.memory import (
    SPARE,
    MemoryPlan,
    drafter_parameters,
    engine_ways_out,
    share_card,
    verifier_itemsize,
)
from vllm_dflash.training.verifier_memory import VerifierSizes


def acceptance_memory(
    config: DrafterConfig, num_draft_tokens: int, max_len: int, itemsize: int = 2
) -> int:
    """Bytes that ``Learner.accept`` adds to the drafter's weights and a sequence's features, at most.

    Args:
        config: of the drafter.
        num_draft_tokens: drafted a step.
        max_len: tokens of the sequence, a response of which fills the walk.
        itemsize: of the serving dtype.
    """
    width = num_draft_tokens + (not config.sample_from_anchor)
    anchors = min(EVAL_ANCHORS, max_len)
    rows, hidden = anchors * width, config.hidden_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    per_chunk = max(1, MAX_CHUNK_QUERIES // width)
    chunks, chunk_rows = -(-anchors // per_chunk), min(per_chunk, anchors) * width
    folded = config.num_attention_heads // config.num_key_value_heads
    layers = range(config.num_hidden_layers)
    kinds = {(config.layer_window(i), config.layer_causal(i)) for i in layers}
    # Embedded blocks and a layer's input, the projected features, cosines and sines, attention's biases.
    shared = (2 * rows + max_len) * hidden * itemsize
    shared += (rows + max_len) * config.head_dim * 4
    shared += len(kinds) * chunks * folded * chunk_rows * (max_len + chunk_rows) * itemsize
    # The layer's normed input with its widest moment: rotated queries, or the MLP's product; then the logits.
    attention = (max_len + rows) * 2 * keys * itemsize + rows * queries * (3 * itemsize + 8)
    layer = rows * hidden * itemsize + max(
        attention, 3 * rows * config.intermediate_size * itemsize
    )
    logits = rows * hidden * itemsize + anchors * num_draft_tokens * (
        config.logits_vocab_size * itemsize + hidden * itemsize
    )
    return shared + max(layer, logits)


def plan_evaluation(
    text: Any,
    sizes: VerifierSizes,
    drafter: DrafterConfig,
    num_draft_tokens: int,
    engine: EngineOptions,
    card: int,
) -> MemoryPlan:
    """The plan of the teacher-forced part of an evaluation.

    Args:
        text: the verifier's text configuration.
        sizes: of the verifier.
        drafter: that is evaluated; it sits in the engine, too.
        num_draft_tokens: drafted a step.
        engine: of the evaluation.
        card: bytes of one GPU.
    """
    card = int(card * (1 - SPARE))
    numbers = drafter_parameters(drafter)
    layers = drafter.num_hidden_layers
    total = numbers["fc"] + layers * numbers["layer"] + numbers["vocabulary"]
    total += 2 * drafter.hidden_size

    def plan(sizes: VerifierSizes = sizes, engine: EngineOptions = engine) -> MemoryPlan:
        itemsize = verifier_itemsize(engine)
        rows = [
            ("drafter in the engine", total * itemsize),
            ("drafter: fp32 weights", total * 4),
            ("drafter: as it is served, and its drafts", total * itemsize
             + acceptance_memory(drafter, num_draft_tokens, engine.max_len, itemsize)),
        ]  # fmt: skip
        seat = (layers, num_draft_tokens)
        return share_card(text, sizes, drafter, engine, card, rows, seat, sequences=1)

    def least(**changes: Any) -> int:
        return plan(**changes).least

    made = replace(plan(), work="evaluation")
    if made.fits:
        return made
    shorter = replace(engine, max_len=engine.max_len // 2)
    ways = [(f"--max-len {shorter.max_len}", least(engine=shorter))]
    ways += engine_ways_out(sizes, engine, least)
    return replace(made, ways_out=tuple(way for way in ways if way[1] < made.least))
