"""Before a learning server starts: which drafter it begins with."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from vllm_dflash.checkpoint import computable_folder, read_config
from vllm_dflash.config import DrafterConfig
from vllm_dflash.files import owner_of
from vllm_dflash.learning.versions import GIVEN, Versions
from vllm_dflash.options import Options
from vllm_dflash.training.config import DrafterShape

logger = logging.getLogger("vllm.vllm_dflash")
#: As ``model``: no drafter yet.
AUTO = "auto"
#: A drafter made here has a layer for so many of the verifier's, five at most, and blocks of so many tokens:
#: a small one learns from little traffic, and costs little until it has.
_LAYERS_PER_LAYER, _BLOCK = 12, 8


def drafter_to_serve(
    options: Options,
    given: str | None,
    revision: str | None,
    tokens: int | None,
    engine_args: Any,
    verifier: Any,
) -> str | None:
    """The drafter that a server starts with: the version promoted last, or the given one.

    Args:
        options: the server's, with ``dflash_learn``.
        given, revision: of the speculative configuration; the model ``auto`` has a drafter made.
        tokens: ``num_speculative_tokens``, where it is given.
        engine_args: vLLM's ``EngineArgs``.
        verifier: vLLM's ``ModelConfig`` of the verifier.

    Raises:
        ValueError: the server is one that cannot learn, or the folder is not ours.
    """
    weights = options.learn_weights
    for name in ("data_parallel_size", "pipeline_parallel_size"):
        if getattr(engine_args, name, 1) > 1:
            raise ValueError(
                f"dflash_learn is set and {name} is {getattr(engine_args, name)}: a learning server has one "
                "engine without pipeline stages; leave one of the two out"
            )
    if weights == "all" and engine_args.tensor_parallel_size > 1:
        raise ValueError(
            'dflash_learn_weights is "all", which tensor parallel ranks cannot put in place; use "decode", '
            "or train a drafter first"
        )
    if given == AUTO and weights != "all":
        raise ValueError(
            'the weights of model "auto" are random and must all be learned, and dflash_learn_weights is '
            f'"{weights}"; give "all", or a drafter where tensor parallel ranks cannot do that'
        )
    if getattr(engine_args, "enable_sleep_mode", False):
        raise ValueError(
            "dflash_learn is set and enable_sleep_mode is, too; leave one of the two out"
        )
    if weights == "none" and options.learn_store != "disk":
        raise ValueError(
            'dflash_learn_weights is "none": another server learns from what this one keeps on disk; give '
            '"dflash_learn_store": "disk"'
        )
    if options.learn_from == options.learn:
        raise ValueError(
            f"dflash_learn and dflash_learn_from are both {options.learn}; give each server a folder of "
            "its own"
        )
    if options.learn_from and owner_of(Path(options.learn_from)) != "learning":
        raise ValueError(
            f"dflash_learn_from is {options.learn_from}, which is no dflash_learn of a server; start that "
            "one first"
        )
    versions = Versions(Path(options.learn))
    model = versions.to_serve(None if given == AUTO else given)
    if given != AUTO or model is not None:
        return model and _learnable(model, revision)
    path = versions.path(GIVEN)
    _make(path, tokens, engine_args, verifier)
    logger.info("vllm-dflash: no drafter yet; %s learns from the traffic", path)
    return str(path)


def _learnable(model: str, revision: str | None) -> str:
    """The folder of a drafter; ValueError if its weights are quantised, or cannot be fetched."""
    raw = read_config(model, revision)
    folder = computable_folder(model, raw, revision)
    if DrafterConfig.from_dict(raw).head is not None:
        raise ValueError(
            f"dflash_learn is set and the drafter {model} has a DFlash 2 head, which learns in "
            "`vllm-dflash train` only"
        )
    return str(folder)


def _make(path: Path, tokens: int | None, engine_args: Any, verifier: Any) -> None:
    """Writes a drafter with random weights for the verifier."""
    import torch

    from vllm_dflash.checkpoint import save_drafter
    from vllm_dflash.config import VerifierInfo
    from vllm_dflash.modeling.drafter import Drafter
    from vllm_dflash.training.planning import new_drafter
    from vllm_dflash.training.vocab import choose_mask_token
    from vllm_dflash.verifier import Verifier

    name, hf_config = str(verifier.model), verifier.hf_config
    info = VerifierInfo.from_hf_config(hf_config, name)
    source = Verifier(
        name,
        tokenizer=engine_args.tokenizer,
        revision=engine_args.revision,
        trust_remote_code=engine_args.trust_remote_code,
    )
    avoid = [info.pad_token_id] if info.pad_token_id is not None else []
    mask = choose_mask_token(source.load_tokenizer(), info.vocab_size, avoid, None)
    shape = DrafterShape(
        num_layers=max(1, min(5, info.num_hidden_layers // _LAYERS_PER_LAYER)),
        block_size=_BLOCK if tokens is None else tokens + 1,
        num_target_layers=min(5, info.num_hidden_layers),
    )
    config = new_drafter(shape, hf_config, mask, name)
    drafter = Drafter(config)
    drafter.init_weights(generator=torch.Generator().manual_seed(0))
    save_drafter(path, config, drafter.state_dict())
