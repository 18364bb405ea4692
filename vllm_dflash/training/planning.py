"""What is decided before an engine starts: the drafter's shape, and the memory of each GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from vllm_dflash.bounds import check_bounds, count, option_of
from vllm_dflash.checkpoint import check_weights, computable_folder, read_config
from vllm_dflash.config import CandidateHead, DrafterConfig, VerifierInfo
from vllm_dflash.environment import gpu_memory
from vllm_dflash.training.config import (
    DrafterShape,
    EngineOptions,
    Hyperparameters,
    TrainConfig,
)
from vllm_dflash.training.durations import (
    DECODE_SHARE,
    PREFILL_SHARE,
    TRAIN_SHARE,
    Card,
    Traffic,
    durations,
)
from vllm_dflash.training.engine import check_block, fit_max_len
from vllm_dflash.training.evaluation_memory import plan_evaluation
from vllm_dflash.training.memory import MemoryPlan, card_bytes, plan_memory, plan_table
from vllm_dflash.training.reporting import Reporter
from vllm_dflash.training.verifier_memory import VerifierSizes, verifier_sizes
from vllm_dflash.training.vocab import choose_mask_token
from vllm_dflash.verifier import Verifier

#: Engine arguments by which a user sizes the engine.
_SIZES_ENGINE = ("gpu_memory_utilization", "kv_cache_memory_bytes")
#: Fields of a shape that the drafter's configuration calls otherwise.
_IN_CONFIG = {
    "num_layers": "num_hidden_layers",
    "block_size": "draft_block_size",
    "num_target_layers": "num_features",
    "draft_vocab": "draft_vocab_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
}


def new_drafter(
    given: DrafterShape, hf_config: Any, mask_token_id: int, name: str
) -> DrafterConfig:
    """A drafter of the given shape for a verifier; ValueError where the two do not go together."""
    info = VerifierInfo.from_hf_config(hf_config, name)
    ids, num = given.target_layer_ids, given.num_target_layers
    if ids is not None and num not in (None, len(ids)):
        raise ValueError(
            f"--num-target-layers is {num}, but --target-layer-ids names {len(ids)} layers; leave one out"
        )
    if num is not None and num > info.num_hidden_layers:
        raise ValueError(
            f"--num-target-layers is {num}, but the verifier has {info.num_hidden_layers} layers to read"
        )
    shape = given.with_defaults()
    try:
        drafter = DrafterConfig.for_verifier(
            hf_config,
            name=name,
            **{_IN_CONFIG.get(k, k): v for k, v in vars(shape).items()}
            | {"mask_token_id": mask_token_id, "head": None},
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


def drafter_config(config: TrainConfig, hf_config: Any) -> DrafterConfig:
    """The drafter to train: of ``init_from``, or made for the verifier."""
    info = VerifierInfo.from_hf_config(hf_config, str(config.verifier))
    if config.init_from is not None:
        raw = read_config(config.init_from)
        drafter = DrafterConfig.from_dict(raw)
        drafter.check_verifier(info)
        drafter.known_block_size("give it there to train this drafter")
        check_weights(computable_folder(config.init_from, raw), drafter)
        _check_same_shape(config.shape, drafter, config.init_from)
        if drafter.verifier is None:
            drafter = drafter.with_(verifier=str(config.verifier))
        return drafter if config.shape.head is None else with_head(drafter)
    tokenizer = config.verifier.load_tokenizer()
    avoid = [info.pad_token_id] if info.pad_token_id is not None else []
    mask = choose_mask_token(tokenizer, info.vocab_size, avoid, config.shape.mask_token_id)
    return new_drafter(config.shape, hf_config, mask, str(config.verifier))


def _check_same_shape(shape: DrafterShape, drafter: DrafterConfig, name: str) -> None:
    """ValueError when the user gives a shape that the drafter to go on from does not have."""
    for field_name, value in shape.given().items():
        if field_name == "head":  # one without can be given
            continue
        if field_name == "num_target_layers":
            has: Any = len(drafter.target_layer_ids)
        elif field_name == "draft_vocab":
            has = drafter.logits_vocab_size
        else:
            has = getattr(drafter, _IN_CONFIG.get(field_name, field_name))
        if value != has:
            raise ValueError(
                f"{option_of(field_name)} is {value!r}, but the drafter --init-from {name} has {has!r}, and "
                "a drafter keeps its shape; leave the option out"
            )


def _sizes(verifier: Verifier, hf_config: Any, engine: EngineOptions) -> VerifierSizes:
    remote = verifier.trust_remote_code
    return verifier_sizes(hf_config, Path(verifier.model), engine.dtype, trust_remote_code=remote)


def _plan_here(
    verifier: Verifier,
    hf_config: Any,
    engine: EngineOptions,
    make: Callable[[VerifierSizes, Any, int], MemoryPlan],
) -> MemoryPlan | None:
    import torch

    cards = gpu_memory() if torch.version.cuda else []
    if not cards or not engine.extra.keys().isdisjoint(_SIZES_ENGINE):
        return None
    sizes = _sizes(verifier, hf_config, engine)
    plan = make(sizes, hf_config.get_text_config(), min(total for total, _ in cards))
    if not plan.fits:
        raise ValueError(plan.refusal())
    return plan


def plan_of_machine(
    verifier: Verifier,
    hf_config: Any,
    drafter: DrafterConfig,
    hparams: Hyperparameters,
    engine: EngineOptions,
    replicas: int = 1,
) -> MemoryPlan | None:
    """The memory plan for this machine's GPUs; None without one, or where --engine-args size the engine.

    Raises:
        ValueError: the run does not fit, or the verifier's size cannot be told.
    """
    return _plan_here(
        verifier,
        hf_config,
        engine,
        lambda sizes, text, card: plan_memory(
            text, sizes, drafter, hparams, engine, card, replicas
        ),
    )


def evaluation_plan_of_machine(
    verifier: Verifier,
    hf_config: Any,
    drafter: DrafterConfig,
    num_draft_tokens: int,
    engine: EngineOptions,
) -> MemoryPlan | None:
    """:func:`plan_of_machine` of an evaluation."""
    return _plan_here(
        verifier,
        hf_config,
        engine,
        lambda sizes, text, card: plan_evaluation(
            text, sizes, drafter, num_draft_tokens, engine, card
        ),
    )


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
