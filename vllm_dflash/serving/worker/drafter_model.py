"""The served drafter: vLLM's DFlash model with checked weights and a cheaper greedy draft."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from vllm import _custom_ops as vllm_ops
from vllm.model_executor.models.qwen3_dflash import (
    DFlashQwen3DecoderLayer,
    DFlashQwen3ForCausalLM,
    DFlashQwen3Model,
)

from vllm_dflash import ops
from vllm_dflash.options import Options
from vllm_dflash.serving.worker.context_kv import ContextKV


class DrafterLayer(DFlashQwen3DecoderLayer):
    """A draft layer with its own type of attention only.

    It need not know the types of the others (vLLM refuses mixed ones on the V1 runner), and has no window but
    its own: vLLM gives one without a window that of a verifier whose layers all have one, so that a drafter
    is served with another attention than it was trained with.
    """

    def __init__(self, vllm_config: Any, *, config: Any, layer_idx: int, **kwargs: Any) -> None:
        types = getattr(config, "layer_types", None)
        if types and len(set(types)) > 1:
            config = copy.copy(config)
            config.layer_types = [types[layer_idx]] * len(types)
            # Read only where no layer is sliding, and then for all of them.
            config.dflash_config = {**(config.dflash_config or {}), "use_swa": False}
        cache_config: Any = kwargs.get("cache_config")
        if getattr(cache_config, "sliding_window", None) is not None:
            kwargs["cache_config"] = cache_config = copy.copy(cache_config)
            cache_config.sliding_window = None
        super().__init__(vllm_config, config=config, layer_idx=layer_idx, **kwargs)


class DrafterLayers(DFlashQwen3Model):
    """vLLM's stack of draft layers, of our class."""

    decoder_layer_cls = DrafterLayer

    def _build_fused_kv_buffers(self) -> None:
        """Fuses the weights that the context's K/V are made with, into buffers that stay where they are.

        vLLM's are plain attributes, new ones each time: sleep mode loses them, and other weights leave CUDA
        graphs with the old ones. It also fuses behind every tensor of a reload, while layers have none.
        """
        kept = vars(self).setdefault("_fused", {})
        if kept:
            self._refill(kept)
            return
        super()._build_fused_kv_buffers()
        for name in ("_fused_kv_weight", "_fused_kv_bias", "_k_norm_weights"):
            fused = getattr(self, name)
            if fused is not None:
                kept[name] = fused
                delattr(self, name)
                self.register_buffer(name, fused, persistent=False)

    def _refill(self, kept: dict[str, Tensor]) -> None:
        """Copies what the layers have now; those that wait for the rest of their weights come later.

        Args:
            kept: the buffers by name. A reload takes them off the module and puts the same tensors back.
        """
        for i, layer in enumerate(self.layers):
            attn: Any = layer.self_attn
            rows = slice(2 * attn.kv_size * i, 2 * attn.kv_size * (i + 1))
            of_layer = (
                ("_fused_kv_weight", rows, attn.qkv_proj, "weight", attn.q_size),
                ("_fused_kv_bias", rows, attn.qkv_proj, "bias", attn.q_size),
                ("_k_norm_weights", i, attn.k_norm, "weight", 0),
            )
            for name, at, module, of_module, start in of_layer:
                if name not in kept:  # a quantised projection has other tensors
                    continue
                source = getattr(module, of_module)
                if source.is_meta:
                    continue
                if source.shape[1:] != kept[name].shape[1:] and name == "_fused_kv_weight":
                    raise RuntimeError(
                        "the drafter's weights cannot be replaced here: vLLM's CPU backend keeps packed "
                        "copies only; start the server with the new checkpoint"
                    )
                kept[name][at].copy_(source[start:])

    def _normalize_context_k(self, all_k: Tensor) -> Tensor:
        """RMS norm of the context keys ``[L, T, G, D]`` with each layer's own weight ``[L, D]``.

        vLLM does all layers in one ``rms_norm``, whose CPU kernel takes the first layer's weight for all of
        them: drafts of a trained drafter then differ from what it was trained to draft.
        """
        if all_k.device.type != "cpu":
            return super()._normalize_context_k(all_k)
        out = torch.empty_like(all_k)
        eps: Any = self._rms_norm_eps
        for normed, k, weight in zip(out, all_k, self._k_norm_weights, strict=True):
            vllm_ops.rms_norm(normed, k, weight, eps)
        return out


class DrafterModel(DFlashQwen3ForCausalLM):
    """Registered as ``DFlashDraftModel``, for z-lab and speculators checkpoints."""

    model_cls = DrafterLayers
    _options = Options()

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._options = Options.from_additional_config(vllm_config.additional_config)
        use_ops = self._options.ops and ops.worthwhile(
            torch.device(vllm_config.device_config.device_type)
        )
        self._context_kv = ContextKV(self.model) if use_ops else None
        self._max_model_len = vllm_config.model_config.max_model_len
        inner: Any = self.model
        #: Rows of the rotary table.
        self.num_positions: int = inner.layers[0].self_attn.rotary_emb.cos_sin_cache.shape[0]

    def precompute_and_store_context_kv(
        self,
        context_states: Tensor,
        context_positions: Tensor,
        context_slot_mapping: Tensor | list[Tensor | None] | None = None,
    ) -> None:
        """As vLLM's; with ``dflash_ops`` through :class:`ContextKV`. Positions that the drafter does not have
        are left out: nothing is drafted there."""
        if self.num_positions < self._max_model_len:
            beyond = context_positions >= self.num_positions
            context_positions = context_positions.masked_fill(beyond, 0)
            context_slot_mapping = _without(context_slot_mapping, beyond)
        if self._context_kv is not None and self._context_kv.usable():
            self._context_kv.store(context_states, context_positions, context_slot_mapping)
        else:
            super().precompute_and_store_context_kv(
                context_states, context_positions, context_slot_mapping
            )

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]):
        """Loads a checkpoint; ValueError names the first tensor with NaN or infinity."""
        if not self._options.check:
            return super().load_weights(weights)

        def checked():
            for name, tensor in weights:
                # isfinite knows no 8-bit types; those come from quantisers, not from training.
                plain = tensor.is_floating_point() and tensor.element_size() > 1
                if plain and not torch.isfinite(tensor).all():
                    raise ValueError(
                        f"drafter weight {name} has non-finite values; the checkpoint is broken, "
                        "train or download it again"
                    )
                yield name, tensor

        return super().load_weights(checked())

    def leave_out_lora(self) -> None:
        """Takes the layers below the verifier's LoRA, which vLLM puts around what it shares.

        An adapter's layers work on the rows of the verifier's step, not on the draft's; and no drafter is
        trained with one.
        """
        for owner, name in ((self.model, "embed_tokens"), (self, "lm_head")):
            shared: Any = getattr(owner, name, None)
            if hasattr(shared, "base_layer"):
                setattr(owner, name, shared.base_layer)

    def greedy_draft_tokens(
        self, hidden_states: Tensor, confidence: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Most likely verifier token id of each row ``[T, H]``, int64 ``[T]``, and its probability.

        Equal to ``compute_logits(...).argmax(-1)``, but without scattering the logits of a draft
        vocabulary over the verifier's: d2t keeps the order, so ties resolve alike.

        Args:
            confidence: whether the probabilities are wanted, float32 ``[T]``; else they are None.
        """
        logits = self.logits_processor(self.lm_head, hidden_states)
        best, tokens = logits.max(dim=-1)
        probability = None
        if confidence:
            probability = (best.float() - torch.logsumexp(logits.float(), dim=-1)).exp()
        if self.draft_id_to_target_id is not None:
            tokens = tokens + self.draft_id_to_target_id[tokens]
        return tokens, probability


def _without(slots: Any, left_out: Tensor) -> Any:
    """Slots of context tokens, for all layers or a list with one for each, without those ``left_out [T]``."""
    if slots is None:
        return None
    if isinstance(slots, (list, tuple)):
        return [_without(one, left_out) for one in slots]
    return slots.masked_fill(left_out, ops.PAD_SLOT)
