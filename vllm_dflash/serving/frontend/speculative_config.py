"""From ``--speculative-config`` to vLLM's ``SpeculativeConfig``: options, defaults, checks."""

from __future__ import annotations

import functools
import logging
import os
import uuid
from dataclasses import dataclass, fields, replace
from typing import Any

from vllm_dflash import __version__
from vllm_dflash.checkpoint import check_weights, quantization, read_config
from vllm_dflash.config import DrafterConfig, VerifierInfo
from vllm_dflash.config_formats import AmbiguousConfig, UnsupportedDrafter, is_speculators
from vllm_dflash.options import ADDITIONAL_CONFIG_KEY, PREFIX, Options
from vllm_dflash.serving import patching
from vllm_dflash.serving.draft_limits import position_limit

logger = logging.getLogger("vllm.vllm_dflash")
#: Set by vllm-dflash itself for a server's API processes.
_NAME_ENV = "VLLM_DFLASH_SERVER_NAME"
_BLOCK_DROP = "disable_eagle_block_drop"


def _is_dflash(config: dict[str, Any]) -> bool:
    method = config.get("method")
    if method is not None:
        return method == "dflash"
    # vLLM detects the method from the drafter's name; our own keys say it as well.
    return "dflash" in str(config.get("model", "")).lower() or any(
        k.replace("-", "_").startswith(PREFIX) for k in config
    )


@dataclass(frozen=True)
class _Checkpoint:
    """A drafter's files, as far as they are looked at before vLLM loads them.

    Attributes:
        config: None where vLLM serves it with classes of its own (DFlash 2, LiLiCorr, ...).
        raw: the parsed config.json.
    """

    model: str
    raw: dict[str, Any]
    config: DrafterConfig | None


def _read(model: str, revision: str | None, tokens_given: bool) -> _Checkpoint:
    raw = read_config(model, revision)
    try:
        return _Checkpoint(model, raw, DrafterConfig.from_dict(raw))
    except UnsupportedDrafter as error:
        logger.info("vllm-dflash leaves the drafter %s to vLLM: %s", model, error)
    except AmbiguousConfig as error:
        # vLLM reads one of the two places and serves it, if it need not ask for the block size.
        if not tokens_given:
            raise ValueError(
                f"{error}; or give num_speculative_tokens and vLLM serves it as it reads it"
            ) from error
        logger.warning("vllm-dflash serves the drafter %s unchecked: %s", model, error)
    return _Checkpoint(model, raw, None)


def _check(
    checkpoint: _Checkpoint,
    drafter: DrafterConfig,
    engine_args: Any,
    verifier: Any,
    probabilistic: bool,
) -> None:
    """ValueError for a pair that stock vLLM would crash on or serve with ruined acceptance."""
    info = VerifierInfo.from_hf_config(verifier.hf_config, str(verifier.model))
    drafter.check_verifier(info)
    for remark in (*drafter.remarks, *drafter.verifier_remarks(info)):
        logger.warning("vllm-dflash: drafter %s: %s", checkpoint.model, remark)
    # vLLM shards the drafter like the verifier, whatever draft_tensor_parallel_size says.
    drafter.check_ranks(engine_args.tensor_parallel_size)
    if probabilistic and drafter.vocab_size < info.vocab_size:
        raise ValueError(
            f"draft_sample_method is 'probabilistic', but the drafter {checkpoint.model} knows "
            f"{drafter.vocab_size} of the verifier's {info.vocab_size} tokens, and vLLM compares rows of "
            "probabilities of one width; use 'greedy'"
        )
    if quantization(checkpoint.model, checkpoint.raw) is None:
        # Names and shapes of quantised weights are the quantiser's.
        check_weights(checkpoint.model, drafter)


def mend_causality(hf_config: Any, raw: dict[str, Any], config: DrafterConfig) -> None:
    """Gives full-attention layers of a speculators file the causality that they were trained with.

    vLLM 0.33 and older take the flag of the sliding layers for all of them (vLLM #56692).

    Args:
        hf_config: what vLLM has read; changed.
        raw, config: the file, and as it is meant.
    """
    dflash = getattr(hf_config, "dflash_config", None) or {}
    if is_speculators(raw) and config.causal is None and dflash.get("causal"):
        # By layer type then, as in z-lab's files.
        hf_config.dflash_config = {**dflash, "causal": None}


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


def _server_name(engine_args: Any) -> str:
    """A name for the server that these arguments are of.

    Several API processes make configurations of their own; they find the name in their environment, where
    the process that starts them and the engines left it.
    """
    rank = getattr(engine_args, "_api_process_rank", 0)
    several = getattr(engine_args, "_api_process_count", 1) > 1
    if several and rank >= 0 and _NAME_ENV in os.environ:
        return os.environ[_NAME_ENV]
    name = uuid.uuid4().hex
    if several and rank < 0:
        os.environ[_NAME_ENV] = name
    return name


def wrap_create_speculative_config(original):
    """Wraps ``EngineArgs.create_speculative_config``; other methods pass through untouched.

    For method dflash it takes the ``dflash_*`` keys out, fills ``num_speculative_tokens`` from the
    checkpoint, and compares drafter and verifier before anything is allocated.
    """

    # Deferred: the plugin is registered before vLLM is imported.
    from vllm.transformers_utils.utils import is_cloud_storage

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
        model, tokens = given.get("model"), rest.get("num_speculative_tokens", self.spec_tokens)
        if options.learn:
            source = options.learn_from and os.path.abspath(options.learn_from)
            weights = options.learn_weights
            if weights == "auto":
                weights = "all" if self.tensor_parallel_size == 1 else "decode"
            folder = os.path.abspath(options.learn)
            options = replace(options, learn=folder, learn_from=source, learn_weights=weights)
            choose = patching.load("vllm_dflash.learning.start:drafter_to_serve")
            revision = given.get("revision")
            model = choose(options, model, revision, tokens, self, target_model_config)
            given["model"] = rest["model"] = model
        checkpoint = drafter = None
        stored = bool(model) and is_cloud_storage(str(model))
        if stored and tokens is None:
            raise ValueError(
                f"the drafter {model} is in object storage, where its block size is not looked up: give "
                "num_speculative_tokens in --speculative-config"
            )
        if model and not stored:
            try:
                checkpoint = _read(model, given.get("revision"), tokens is not None)
                drafter = checkpoint.config
            except ValueError:
                if options.check:
                    raise
        if checkpoint is not None and drafter is not None:
            if tokens is None:
                tokens = drafter.num_speculative_tokens
                if tokens is None:
                    raise ValueError(
                        f"the drafter {model} does not state its block size: give num_speculative_tokens in "
                        "--speculative-config"
                    )
                rest["num_speculative_tokens"] = tokens
            trained = drafter.num_speculative_tokens
            if trained is not None and isinstance(tokens, int) and tokens > trained:
                logger.warning(
                    "num_speculative_tokens is %d, but the drafter %s was trained for blocks of %d, that is "
                    "%d tokens: those behind are rarely accepted",
                    tokens,
                    model,
                    drafter.draft_block_size,
                    trained,
                )
            if options.check:
                probabilistic = given.get("draft_sample_method") == "probabilistic"
                _check(checkpoint, drafter, self, target_model_config, probabilistic)
        if stored or drafter is not None:
            from vllm.config import SpeculativeConfig

            if _BLOCK_DROP in {f.name for f in fields(SpeculativeConfig)}:
                # vLLM computes the last block of a cached prefix anew for the states that an EAGLE drafter
                # starts from. Ours reads its own cache of the prefix, which is as complete as the verifier's.
                rest.setdefault(_BLOCK_DROP, True)
        self.speculative_config = rest
        made = original(self, target_model_config, *args, **kwargs)
        if stored and made is not None:
            # vLLM has fetched its configuration by now; weights are streamed later.
            logger.warning("vllm-dflash serves the drafter %s unchecked: object storage", model)
            try:
                checkpoint = _read(made.draft_model_config.model, None, tokens_given=True)
                drafter = checkpoint.config
            except ValueError:
                if options.check:
                    raise
        carried = {"version": __version__, **options.as_dict()}
        if drafter is not None:
            # The verifier is compiled with its taps: other layers must not find this one in the cache.
            carried["target_layer_ids"] = list(drafter.target_layer_ids)
        self.additional_config = {
            **(self.additional_config or {}),
            ADDITIONAL_CONFIG_KEY: carried,
        }
        if made is not None and checkpoint is not None and drafter is not None:
            mend_causality(made.draft_model_config.hf_config, checkpoint.raw, drafter)
        if made is not None and options.draft_length == "auto":
            # Travels to the workers with it; not a field, so it keys no compile cache.
            made.dflash_stats = _server_name(self)
        if made is not None and options.learn:
            made.dflash_learn = options.learn
        if made is not None and made.draft_model_config is not None:
            limit = position_limit(made, target_model_config.max_model_len)
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
