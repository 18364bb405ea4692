"""What is decided before an engine starts: the drafter's shape, and the memory of each GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from vllm_dflash.bounds import check_bounds, count, option_of
from vllm_dflash.config import CandidateHead, DrafterConfig, VerifierInfo
from vllm_dflash.environment import gpu_memory
from vllm_dflash.training.config import DrafterShape, EngineOptions, Hyperparameters
from vllm_dflash.training.durations import (
    DECODE_SHARE,
    PREFILL_SHARE,
    TRAIN_SHARE,
    Card,
    Traffic,
    durations,
)
from vllm_dflash.training.engine import check_block, fit_max_len
from vllm_dflash.training.memory import MemoryPlan, card_bytes, plan_memory, plan_table
from vllm_dflash.training.reporting import Reporter
from vllm_dflash.training.verifier_memory import VerifierSizes, verifier_sizes
from vllm_dflash.verifier import Verifier

#: Engine arguments by which a user sizes the engine.
_SIZES_ENGINE = ("gpu_memory_utilization", "kv_cache_memory_bytes")


def new_drafter(
    given: DrafterShape, hf_config: Any, mask_token_id: int, name: str
) -> DrafterConfig:
    """A drafter of the given shape for a verifier; ValueError where the two do not go together."""
    shape: Any = given.with_defaults()
    try:
        drafter = DrafterConfig.for_verifier(
            hf_config,
            mask_token_id=mask_token_id,
            name=name,
            num_hidden_layers=shape.layers,
            draft_block_size=shape.block_size,
            target_layer_ids=shape.target_layer_ids,
            num_features=shape.features,
            draft_vocab_size=shape.draft_vocab,
            intermediate_size=shape.intermediate_size,
            hidden_size=shape.hidden_size,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            layer_types=shape.layer_types,
            sliding_window=shape.sliding_window,
            causal=shape.causal,
            sample_from_anchor=shape.sample_from_anchor,
        )
        return drafter if shape.head is None else with_head(drafter)
    except ValueError as error:
        options = ", ".join(option_of(field_name) for field_name in given.given())
        raise ValueError(
            f"{error} (given: {options or 'no option, it is the verifier'})"
        ) from error


def with_head(drafter: DrafterConfig) -> DrafterConfig:
    """The drafter with DFlash 2's head, its own where it has one."""
    if drafter.head is not None:
        return drafter
    candidates = min(CandidateHead.selector_top_k, drafter.logits_vocab_size)
    head = CandidateHead.for_width(drafter.hidden_size, selector_top_k=candidates)
    return drafter.with_(head=head)


def _sizes(verifier: Verifier, hf_config: Any, engine: EngineOptions) -> VerifierSizes:
    remote = verifier.trust_remote_code
    return verifier_sizes(hf_config, Path(verifier.model), engine.dtype, trust_remote_code=remote)


def plan_of_machine(
    verifier: Verifier,
    hf_config: Any,
    drafter: DrafterConfig,
    hparams: Hyperparameters,
    engine: EngineOptions,
) -> MemoryPlan | None:
    """The memory plan for this machine's GPUs; None without one, or where --engine-args size the engine.

    Raises:
        ValueError: the run does not fit, or the verifier's size cannot be told.
    """
    import torch

    cards = gpu_memory() if torch.version.cuda else []
    if not cards or not engine.extra.keys().isdisjoint(_SIZES_ENGINE):
        return None
    sizes = _sizes(verifier, hf_config, engine)
    text = hf_config.get_text_config()
    card = min(total for total, _ in cards)
    plan = plan_memory(text, sizes, drafter, hparams, engine, card)
    if not plan.fits:
        raise ValueError(plan.refusal())
    return plan


def print_plan(
    verifier: Verifier,
    shape: DrafterShape,
    hparams: Hyperparameters,
    engine: EngineOptions,
    gpu_gb: float,
    traffic: Traffic,
    card: Card,
    console: Console,
) -> None:
    """The memory plan and the minutes of a run on GPUs that are not here.

    Raises:
        ValueError: it does not fit; the plan is printed before.
    """
    check_bounds(
        traffic, {"prompts": count(), "prompt_tokens": count(), "response_tokens": count()}
    )
    hf_config = verifier.load_config()
    info = VerifierInfo.from_hf_config(hf_config, str(verifier))
    # Which token is the mask makes no difference here, and there may be no tokenizer.
    mask = info.vocab_size - (2 if info.pad_token_id == info.vocab_size - 1 else 1)
    drafter = new_drafter(shape, hf_config, mask, str(verifier))
    engine = fit_max_len(engine, hf_config, drafter)
    check_block(engine, drafter)
    sizes = _sizes(verifier, hf_config, engine)
    text = hf_config.get_text_config()
    plan = plan_memory(text, sizes, drafter, hparams, engine, card_bytes(gpu_gb))
    reporter = Reporter(console)
    reporter.table(*plan_table(plan))
    if not plan.fits:
        raise ValueError(plan.refusal())
    seconds = durations(plan, text, sizes, drafter, hparams, engine, traffic, card)
    rows = [(name, f"{s / 60:.0f}") for name, s in seconds.items()]
    reporter.table(f"Minutes, by arithmetic ({traffic.prompts} conversations)", rows)
    reporter.say(
        "Nothing here is measured. Assumed: a GPU shows 15/16 of the GiB in its name; "
        f"{card.flops / 1e12:g} TFLOP/s, of which training reaches {TRAIN_SHARE:.0%} and prefill "
        f"{PREFILL_SHARE:.0%}; {card.bandwidth / 1e12:g} TB/s, of which decoding reaches {DECODE_SHARE:.0%}."
    )
