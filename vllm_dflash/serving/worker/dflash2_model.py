"""The served DFlash 2 drafter: vLLM's model, with what its V1 runner lacks.

vLLM itself has the walk in its V2 runner only, and would draft on V1 as if there were no selector. There ours
walks; on V2 vLLM's speculator does, with this model.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.model_executor.models.qwen3_dflash2 import (
    DFlash2Qwen3DecoderLayer,
    DFlash2Qwen3ForCausalLM,
    DFlash2Qwen3Model,
    DFlashGroupedConv,
)
from vllm.v1.spec_decode.llm_base_proposer import compute_probs_and_sample_next_token

from vllm_dflash.modeling.dflash2 import greedy_walk, scores_on_path, transition_scores
from vllm_dflash.serving.patching import specialise
from vllm_dflash.serving.worker.drafter_model import DrafterLayer, DrafterModel


class StepConv(DFlashGroupedConv):
    """vLLM's convolutions for blocks whose width differs from step to step, as on the V1 runner.

    Attributes:
        offsets: int64, place of each row in its block.
    """

    offsets: Tensor

    def _convolve(self, hidden_states: Tensor, delta: Tensor, side: int) -> Tensor:
        rows = hidden_states.unflatten(-1, (self.num_groups, self.group_size))
        base = self.base_kernel[side].unflatten(-1, (self.num_groups, self.group_size))
        kernels = base + delta.unsqueeze(-1)
        out = kernels[:, 0] * rows
        offsets = self.offsets[: rows.shape[0]]
        for tap in range(1, self.taps):
            inside = (offsets >= tap).view(-1, 1, 1)
            before = F.pad(rows[:-tap], (0, 0, 0, 0, tap, 0))
            out = out + kernels[:, tap] * before * inside
        return out.flatten(-2)


class HeadLayer(DrafterLayer, DFlash2Qwen3DecoderLayer):
    """Our draft layer with vLLM's convolutions."""


class HeadLayers(DFlash2Qwen3Model):
    """vLLM's stack of draft layers and selector, of our layers."""

    decoder_layer_cls = HeadLayer


class HeadDrafterModel(DrafterModel, DFlash2Qwen3ForCausalLM):
    """Registered as ``DFlash2DraftModel``, for z-lab and speculators checkpoints."""

    model_cls = HeadLayers  # type: ignore[assignment]

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        dflash = self.config.dflash_config
        from_anchor = bool(dflash.get("sample_from_anchor", False))
        tokens = vllm_config.speculative_config.num_speculative_tokens
        self._width = tokens + (not from_anchor)
        self._offsets: Tensor | None = None
        inner: Any = self.model
        convs = [c for layer in inner.layers for c in (layer.attention_conv, layer.mlp_conv)]
        for conv in convs:
            conv.block_size = self._width
        if not vllm_config.use_v2_model_runner:
            graphs = vllm_config.compilation_config.max_cudagraph_capture_size or 0
            limits = vllm_config.scheduler_config
            rows = max(limits.max_num_batched_tokens, limits.max_num_seqs * (tokens + 1), graphs)
            device = convs[0].base_kernel.device
            self._offsets = torch.arange(rows, device=device) % self._width
            for conv in convs:
                specialise(conv, "vllm_dflash.serving.worker.dflash2_model:StepConv")
                conv.register_buffer("offsets", self._offsets, persistent=False)

    def set_block_width(self, width: int) -> None:
        """Tells the convolutions how many tokens the blocks of this step have."""
        if self._offsets is not None and width != self._width:
            self._width = width
            rows = torch.arange(len(self._offsets), device=self._offsets.device)
            self._offsets.copy_(rows % width)

    def compute_candidates(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Verifier ids of the most likely tokens of each row ``[T, C]``, ascending, and their logits.

        vLLM's are in the order of their logits, where equal ones come as they may, and know no draft
        vocabulary.
        """
        ids, logits = super().compute_candidates(hidden_states)
        ids, order = ids.sort(dim=-1)
        if self.draft_id_to_target_id is not None:
            ids = ids + self.draft_id_to_target_id[ids]
        return ids, logits.gather(-1, order)

    def _scores(self, hidden_states: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
        """Candidates ``[B, K, C]`` and the scores of each behind each of the position before."""
        ids, logits = self.compute_candidates(hidden_states)
        shape = (len(anchors), -1, ids.shape[-1])
        ids, logits = ids.view(shape), logits.view(shape)
        selector: Any = self.model.candidate_selector
        context = selector.hidden_projection(hidden_states).view(*ids.shape[:2], -1)
        scores = transition_scores(
            selector.predecessor_codebook,
            selector.successor_codebook,
            context,
            ids,
            logits,
            anchors,
        )
        return ids, scores

    def greedy_walk(
        self, hidden_states: Tensor, anchors: Tensor, confidence: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Draft tokens by the selector, int64 ``[B*K]``, and their probabilities among the candidates.

        Args:
            hidden_states: of the drafted positions, request by request ``[B*K, H]``.
            anchors: verifier ids of the tokens in front of the blocks ``[B]``.
            confidence: whether the probabilities are wanted, float32 ``[B*K]``; else they are None.
        """
        ids, scores = self._scores(hidden_states, anchors)
        path = greedy_walk(scores)
        index = path.unsqueeze(-1)
        tokens = ids.gather(-1, index).flatten()
        if not confidence:
            return tokens, None
        probability = scores_on_path(scores, path).softmax(-1).gather(-1, index)
        return tokens, probability.flatten()

    def sampled_walk(
        self, hidden_states: Tensor, anchors: Tensor, sampling_metadata: Any
    ) -> tuple[Tensor, Tensor]:
        """Draft tokens drawn by the selector's scores ``[B*K]``, and what they were drawn from: float32
        probabilities ``[B*K, V]`` over the verifier's tokens, 0 but for the candidates."""
        ids, scores = self._scores(hidden_states, anchors)
        num_requests, num_draft = ids.shape[:2]
        at = ids.new_zeros(num_requests)
        path, drawn_from = [], []
        for k in range(num_draft):
            rows = scores[:, k].gather(1, at[:, None, None].expand(-1, 1, ids.shape[-1])).squeeze(1)
            at, probs = compute_probs_and_sample_next_token(rows, sampling_metadata)
            path.append(at)
            drawn_from.append(probs)
        tokens = ids.gather(-1, torch.stack(path, dim=1).unsqueeze(-1)).flatten()
        probs = torch.stack(drawn_from, dim=1).flatten(0, 1)
        out = probs.new_zeros(len(probs), self.config.vocab_size)
        return tokens, out.scatter_(1, ids.flatten(0, 1), probs)
