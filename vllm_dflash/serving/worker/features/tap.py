"""The feature tap: verifier layers write their hidden states straight into one persistent buffer.

vLLM's Eagle3 interface makes a tensor a layer, copies each once more under full CUDA graphs, and concatenates
them before the drafter. With the tap each layer adds and writes its columns in one pass, and the drafter
reads the buffer, whose address never changes.
"""

from __future__ import annotations

import logging
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.models.interfaces import EagleModelMixin

from vllm_dflash import ops
from vllm_dflash.serving.patching import replace

logger = logging.getLogger("vllm.vllm_dflash")


class FeatureTap:
    """Persistent features of the verifier's last step.

    Attributes:
        features: ``[max tokens, L * H]``, concatenated in ascending layer order as ``torch.cat`` of vLLM's
            auxiliary hidden states would be.
    """

    def __init__(self, inner: nn.Module, features: Tensor) -> None:
        ops.load()  # the op must exist before the verifier is traced
        self.features = features
        # A buffer, so that a compiled verifier that comes from a cache looks it up and writes to this one.
        inner.register_buffer("_dflash_features", features, persistent=False)
        self._written = False

    @staticmethod
    def mark(states: Tensor) -> Tensor:
        """What a tapped verifier returns as its auxiliary hidden states: one column, as many rows."""
        return states[:, :1]

    def given(self, aux_hidden_states: Tensor) -> bool:
        """Whether the verifier's step went through the tap: then it returned the mark, one column wide."""
        return aux_hidden_states.shape[-1] == 1

    def take(self, num_tokens: int, real: bool = True) -> Tensor:
        """Features of the verifier's step ``[num_tokens, L * H]``: a view, valid until its next step.

        Args:
            num_tokens: rows of the step.
            real: False for vLLM's dummy steps, which may run nothing.

        Raises:
            RuntimeError: the first real step left the buffer as it was allocated.
        """
        features = self.features[:num_tokens]
        if real and not self._written:
            # Once, since it waits for the device. With zeros the drafter drafts, but nothing is accepted.
            if not features.any():
                raise RuntimeError(
                    "the verifier's layers wrote no features into vllm-dflash's tap "
                    '(vllm_dflash::tap_hidden_states was not called); serve with "dflash_ops": false in '
                    "--speculative-config and report it with the verifier's name"
                )
            self._written = True
        return features


def write_features(
    tapped: Any, hidden_states: Tensor, residual: Tensor | None, column: int
) -> None:
    """A layer's columns of the buffer of a tapped module."""
    if torch.compiler.is_compiling():
        # The sum is an expression of the graph, as where vLLM collects it. An op that takes the residual has
        # it rounded to the model's dtype; Inductor else recomputes it, unrounded, in the kernels that go on
        # with it, and a tapped verifier in bfloat16 would not say what an untapped one says.
        value = hidden_states if residual is None else hidden_states + residual
        # The op itself: what the wrapper adds to an error cannot be traced.
        torch.ops.vllm_dflash.tap_hidden_states(tapped._dflash_features, value, None, column)
    else:
        ops.tap_hidden_states(tapped._dflash_features, hidden_states, residual, column=column)


def cannot_tap(vllm_config: Any) -> str | None:
    """Why this engine's verifier cannot be tapped, whatever it is, and the way out; None if it can."""
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        return "pipeline stages; use --tensor-parallel-size instead of --pipeline-parallel-size"
    if getattr(vllm_config.parallel_config, "use_ubatching", False):
        return "micro-batches, which would write the same rows; leave DBO off"
    if getattr(vllm_config.speculative_config, "disable_padded_drafter_batch", False):
        # The rejected rows are taken out of the features before the drafter sees them.
        return "disable_padded_drafter_batch; leave it off"
    return None


def _tap_layer(
    self: Any,
    aux_hidden_states: list[Tensor],
    layer_idx: int,
    hidden_states: Tensor,
    residual: Tensor | None,
) -> list[Tensor]:
    """In place of ``EagleModelMixin._maybe_add_hidden_state``; also traced by ``torch.compile``."""
    layers = self.aux_hidden_state_layers
    if layer_idx in layers:
        column = layers.index(layer_idx) * hidden_states.shape[-1]
        write_features(self, hidden_states, residual, column)
        if layer_idx == layers[-1]:
            # The mark that this step's features are in the buffer. Models return the list if it is not empty.
            aux_hidden_states.append(FeatureTap.mark(hidden_states))
    return aux_hidden_states


def install_tap(
    verifier: nn.Module, vllm_config: Any, width: int, device: torch.device
) -> FeatureTap | None:
    """Puts a tap into a verifier with vLLM's Eagle3 mixin; None where vLLM's own way must stay.

    That is: verifiers with a collection of their own (the Transformers backend), layers that hold shards of
    the tokens between them (sequence parallel), and what :func:`cannot_tap` names.

    Args:
        width: features of a token, the input size of the drafter's ``fc``.
    """
    if cannot_tap(vllm_config):
        return None
    inner = [m for m in verifier.modules() if isinstance(m, EagleModelMixin)]
    if len(inner) != 1 or getattr(inner[0], "use_sequence_parallel", False):
        return None
    if type(inner[0])._maybe_add_hidden_state is not EagleModelMixin._maybe_add_hidden_state:
        return None
    tap = FeatureTap(inner[0], feature_buffer(vllm_config, width, device))
    replace(inner[0], "_maybe_add_hidden_state", MethodType(_tap_layer, inner[0]))
    logger.info("vllm-dflash taps %s", type(inner[0]).__name__)
    return tap


def feature_buffer(vllm_config: Any, width: int, device: torch.device) -> Tensor:
    """Room for the features of the largest step ``[tokens, width]``, in the verifier's dtype."""
    rows = max(
        vllm_config.scheduler_config.max_num_batched_tokens,
        vllm_config.compilation_config.max_cudagraph_capture_size or 0,
    )
    return torch.zeros(rows, width, dtype=vllm_config.model_config.dtype, device=device)
