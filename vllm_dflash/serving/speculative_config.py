"""From ``--speculative-config`` to vLLM's ``SpeculativeConfig``: options, defaults, checks."""

from __future__ import annotations

import functools
import logging
import uuid
from dataclasses import fields
from typing import Any

from vllm_dflash import __version__
from vllm_dflash.checkpoint import check_weights, read_config
from vllm_dflash.config import DrafterConfig, VerifierInfo
from vllm_dflash.options import ADDITIONAL_CONFIG_KEY, PREFIX, Options
from vllm_dflash.serving.draft_limit import draft_limit
from vllm_dflash.serving.seams import DRAFTER_ARCH

logger = logging.getLogger("vllm.vllm_dflash")
_BLOCK_DROP = "disable_eagle_block_drop"
#: Architectures in a drafter's config.json that end up in our drafter class.
_OWN_ARCHS = {DRAFTER_ARCH, "DFlashSpeculator"}


def _is_dflash(config: dict[str, Any]) -> bool:
    method = config.get("method")
    if method is not None:
        return method == "dflash"
    # vLLM detects the method from the drafter's name; our own keys say it as well.
    return "dflash" in str(config.get("model", "")).lower() or any(
        k.replace("-", "_").startswith(PREFIX) for k in config
    )


def _drafter_config(model: str, revision: str | None) -> DrafterConfig | None:
    """The drafter's configuration, None where vLLM serves it with classes of its own (DFlash 2,
    LiLiCorr, ...) or from quantised weights, whose names and shapes are the quantiser's."""
    raw = read_config(model, revision)
    if raw.get("quantization_config"):
        return None
    architectures = set(raw.get("architectures") or [])
    if architectures and not architectures & _OWN_ARCHS:
        return None
    if raw.get("speculators_model_type") not in (None, "dflash"):
        return None
    return DrafterConfig.from_dict(raw)


def _check_prefix_caching(engine_args: Any, verifier: Any) -> None:
    """Refuses what ends vLLM's CPU engine in its first step, whatever the speculative method."""
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    if HAS_TRITON or not current_platform.is_cpu():
        return
    # Already resolved: vLLM switches it on for most models.
    if verifier.is_hybrid and engine_args.enable_prefix_caching:
        raise ValueError(
            f"{verifier.model} has recurrent layers, whose prefix caching beside speculation needs a Triton "
            "kernel that vLLM's CPU backend lacks; switch it off: --no-enable-prefix-caching"
        )


def wrap_create_speculative_config(original):
    """Wraps ``EngineArgs.create_speculative_config``; other methods pass through untouched.

    For method dflash it takes the ``dflash_*`` keys out, fills ``num_speculative_tokens`` from the
    checkpoint, and compares drafter and verifier before anything is allocated.
    """

    @functools.wraps(original)
    def create_speculative_config(self, target_model_config, *args, **kwargs):
        given = dict(self.speculative_config or {})
        if self.spec_method is not None:
            given.setdefault("method", self.spec_method)
        if self.spec_model is not None:
            given.setdefault("model", self.spec_model)
        if not given or not _is_dflash(given):
            return original(self, target_model_config, *args, **kwargs)

        _check_prefix_caching(self, target_model_config)
        options, rest = Options.from_speculative_config(self.speculative_config or {})
        if len(rest) == len(self.speculative_config or {}):
            # No key of ours: all defaults, unless an earlier call on these arguments took them out.
            options = Options.from_additional_config(self.additional_config)
        model = given.get("model")
        drafter = None
        if model:
            try:
                drafter = _drafter_config(model, given.get("revision"))
            except ValueError:
                if options.check:
                    raise
        if model and drafter is not None:
            if rest.get("num_speculative_tokens") is None and self.spec_tokens is None:
                rest["num_speculative_tokens"] = drafter.num_speculative_tokens
            from vllm.config import SpeculativeConfig

            if _BLOCK_DROP in {f.name for f in fields(SpeculativeConfig)}:
                # vLLM computes the last block of a cached prefix anew for the states that an EAGLE drafter
                # starts from. Ours reads its own cache of the prefix, which is as complete as the verifier's.
                rest.setdefault(_BLOCK_DROP, True)
            tokens = rest.get("num_speculative_tokens", self.spec_tokens)
            too_many = isinstance(tokens, int) and tokens > drafter.num_speculative_tokens
            if options.check and too_many:
                raise ValueError(
                    f"num_speculative_tokens is {tokens}, but the drafter {model} was trained for "
                    f"blocks of {drafter.draft_block_size}: at most "
                    f"{drafter.num_speculative_tokens}"
                )
            if options.check:
                name = str(target_model_config.model)
                drafter.check_verifier(
                    VerifierInfo.from_hf_config(target_model_config.hf_config, name)
                )
                # vLLM shards the drafter like the verifier, whatever draft_tensor_parallel_size says.
                drafter.check_ranks(self.tensor_parallel_size)
                check_weights(model, drafter)
        self.speculative_config = rest
        carried = {"version": __version__, **options.as_dict()}
        if drafter is not None:
            # The verifier is compiled with its taps: other layers must not find this one in the cache.
            carried["target_layer_ids"] = list(drafter.target_layer_ids)
        self.additional_config = {
            **(self.additional_config or {}),
            ADDITIONAL_CONFIG_KEY: carried,
        }
        made = original(self, target_model_config, *args, **kwargs)
        if made is not None and options.draft_length == "auto":
            # Travels to the workers with it; not a field, so it keys no compile cache.
            made.dflash_stats = uuid.uuid4().hex
        if made is not None and made.draft_model_config is not None:
            limit = draft_limit(made, target_model_config.max_model_len)
            if limit < target_model_config.max_model_len:
                logger.warning(
                    "vllm-dflash drafts nothing beyond %d tokens of a request, as many positions as the "
                    "drafter %s has here; the server takes %d",
                    limit,
                    made.model,
                    target_model_config.max_model_len,
                )
        return made

    return create_speculative_config
