"""How long a run will take on a GPU that nobody has tried: arithmetic from FLOPs and bandwidth.

The shares of a card's peak that are reached are assumptions, all named here and said beside the figures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm_dflash.config import DrafterConfig
from vllm_dflash.training.config import EngineOptions, Hyperparameters
from vllm_dflash.training.memory import MemoryPlan, drafter_parameters
from vllm_dflash.training.verifier_memory import VerifierSizes, kv_bytes

#: Shares of the peak: of matrix products while training and in prefill, of bandwidth while decoding.
TRAIN_SHARE, PREFILL_SHARE, DECODE_SHARE = 0.35, 0.5, 0.6
#: Bytes that AdamW reads and writes of a parameter, and casts to bfloat16 of it.
_OPTIMIZER_BYTES = 36


@dataclass(frozen=True)
class Traffic:
    """The data of a run.

    Attributes:
        prompts: conversations.
        prompt_tokens, response_tokens: of each, on average.
        epochs: passes of training over them.
    """

    prompts: int
    prompt_tokens: int
    response_tokens: int
    epochs: float


@dataclass(frozen=True)
class Card:
    """One GPU: dense bfloat16 FLOP/s and bytes/s."""

    flops: float
    bandwidth: float


def durations(
    plan: MemoryPlan,
    text: Any,
    sizes: VerifierSizes,
    drafter: DrafterConfig,
    hparams: Hyperparameters,
    engine: EngineOptions,
    traffic: Traffic,
    card: Card,
) -> dict[str, float]:
    """Seconds of ``responses``, ``features`` and ``training``."""
    ranks = engine.ranks
    length = min(engine.max_len, traffic.prompt_tokens + traffic.response_tokens)
    prefill = 2 * sizes.active / ranks / (card.flops * PREFILL_SHARE)
    # A step of decoding reads the weights once and every sequence's cache; half of a response is there.
    cached = kv_bytes(text, length - traffic.response_tokens // 2, length, ranks)
    full = kv_bytes(text, engine.max_len, engine.max_num_batched_tokens, ranks)
    room = int(plan.kv_cache // max(full * length / engine.max_len, 1))
    together = max(1, min(engine.max_num_seqs, room, traffic.prompts))
    reading = (sizes.weights / ranks + together * cached) / (card.bandwidth * DECODE_SHARE)
    step = max(reading, together * prefill)
    decode = traffic.prompts * traffic.response_tokens / together * step
    responses = traffic.prompts * traffic.prompt_tokens * prefill + decode
    steps = traffic.epochs * traffic.prompts / hparams.batch_size / ranks
    return {
        "responses": responses,
        "features": traffic.prompts * length * prefill,
        "training": steps * step_seconds(drafter, hparams, length, traffic, card, plan),
    }


def step_seconds(
    drafter: DrafterConfig,
    hparams: Hyperparameters,
    length: int,
    traffic: Traffic,
    card: Card,
    plan: MemoryPlan,
) -> float:
    """One training step of a rank."""
    numbers = drafter_parameters(drafter)
    layers, hidden = drafter.num_hidden_layers, drafter.hidden_size
    anchors = hparams.batch_size * min(hparams.num_anchors, traffic.response_tokens)
    rows = anchors * drafter.known_block_size("it decides how long a step takes")
    queries = drafter.num_attention_heads * drafter.head_dim
    keys = drafter.num_key_value_heads * drafter.head_dim
    parts = -(-anchors // (plan.layout.anchors_in_flight or anchors))
    mlp = 3 * hidden * drafter.intermediate_size
    again = 2 * mlp if plan.layout.checkpoint_mlps else 0
    flops = rows * layers * (6 * numbers["matrices"] + again)
    context = parts * hparams.batch_size * length
    flops += context * 6 * (numbers["fc"] + layers * 2 * hidden * keys)
    flops += rows * layers * 14 * (length // 2 + 512) * queries
    # The head is frozen: its own gradient is not computed.
    flops += rows * 4 * hidden * drafter.logits_vocab_size
    # Ranks share this, and then exchange what they updated, which takes about as long and is not counted.
    optimizer = (numbers["fc"] + layers * numbers["layer"]) * _OPTIMIZER_BYTES / card.bandwidth
    return flops / (card.flops * TRAIN_SHARE) + optimizer
