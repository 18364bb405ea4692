"""Which patches of upstream/ the installed vLLM has, by its source: for ``vllm-dflash env``."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import NamedTuple


class Patch(NamedTuple):
    """How to know a patch.

    Attributes:
        file: of vLLM that it changes, below the package's folder.
        fault: text of the file without the patch.
        mended: text of the file with it.
    """

    file: str
    fault: str
    mended: str


_DRAFTER = "model_executor/models/qwen3_dflash.py"
_REJECTION = "v1/sample/rejection_sampler.py"
PATCHES = {
    "cpu-expand-kernel": Patch(
        "utils/cpu_triton_utils.py",
        "expand_kernel_impl(\n        _ensure_int64(output)",
        "output.copy_(input_val.repeat_interleave(",
    ),
    "dflash-k-norm-cpu": Patch(
        _DRAFTER,
        "torch.empty_like(all_k)\n        ops.rms_norm(",
        "in zip(all_k_normed, all_k, self._k_norm_weights)",
    ),
    "dflash-mixed-v1": Patch(
        "v1/spec_decode/dflash.py",
        "super().build_per_group_and_layer_attn_metadata(",
        "group_cad.causal = causal",
    ),
    "dflash-own-window": Patch(
        _DRAFTER,
        "self.sliding_window = sliding_window\n        self.attn = Attention(",
        "cache_config.sliding_window = None",
    ),
    "logprob-token-ids": Patch(
        _REJECTION,
        "if sampling_metadata.max_num_logprobs is not None:\n            logprobs_tensors",
        "or sampling_metadata.logprob_token_ids\n",
    ),
    "mamba2-spec-cpu": Patch(
        "model_executor/layers/mamba/ops/cpu/causal_conv1d.py",
        "pad_slot_id: int | None = None,\n    **kwargs,",
        "_causal_conv1d_update_spec(",
    ),
    "min-tokens-bonus": Patch(
        "v1/sample/sampler.py",
        "non_argmax_invariant:\n            logits = processor.apply(logits)",
        "processor.apply_to_bonus_tokens(",
    ),
    "rejection-sampler-no-drafts": Patch(
        _REJECTION,
        "if sampling_metadata.all_greedy:\n        return logits\n",
        "sampling_metadata.all_greedy or num_tokens == 0",
    ),
    "seeded-chunks": Patch(
        "v1/worker/gpu_model_runner.py",
        "gen.set_offset(gen.get_offset() - 4)",
        "any(discarded[i] for i in sampling_metadata.generators)",
    ),
    "speculators-causality": Patch(
        "transformers_utils/configs/speculators/algos.py",
        '["causal"] = not config_dict.get(',
        'if config_dict.get("sliding_window_non_causal", True):',
    ),
    "thinking-budget-drafts": Patch(
        "v1/sample/thinking_budget_state.py",
        "def _apply_forcing_to_logits(",
        "self._forced[req] = forced",
    ),
}


def state(patch: Patch, vllm: Path) -> str:
    """``in``, ``not in``, or ``other code`` where neither text is in the file, of a package's folder."""
    file = vllm / patch.file
    text = file.read_text() if file.is_file() else ""
    if patch.mended in text:
        return "in"
    return "not in" if patch.fault in text else "other code"


def describe_patches() -> dict[str, str]:
    """A row for ``vllm-dflash env``; none without vLLM, which is not imported."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        return {}
    states = {name: state(patch, Path(spec.origin).parent) for name, patch in PATCHES.items()}
    named = {
        kind: [name for name, found in states.items() if found == kind]
        for kind in ("in", "not in", "other code")
    }
    said = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in named.items() if names)
    return {"upstream patches": said}
