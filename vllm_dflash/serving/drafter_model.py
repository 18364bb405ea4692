"""The served drafter: vLLM's DFlash model with checked weights and a cheaper greedy draft."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from vllm.model_executor.models.qwen3_dflash import DFlashQwen3ForCausalLM


class DrafterModel(DFlashQwen3ForCausalLM):
    """Registered as ``DFlashDraftModel``, for z-lab and speculators checkpoints."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]):
        """Loads a checkpoint; ValueError names the first tensor with NaN or infinity."""

        def checked():
            for name, tensor in weights:
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    raise ValueError(
                        f"drafter weight {name} has non-finite values; the checkpoint is broken, "
                        "train or download it again"
                    )
                yield name, tensor

        return super().load_weights(checked())

    def greedy_draft_tokens(self, hidden_states: Tensor) -> Tensor:
        """Most likely verifier token id of each row ``[T, H]``, int64 ``[T]``.

        Equal to ``compute_logits(...).argmax(-1)``, but without scattering the logits of a draft
        vocabulary over the verifier's: d2t keeps the order, so ties resolve alike.
        """
        logits = self.logits_processor(self.lm_head, hidden_states)
        tokens = logits.argmax(dim=-1)
        if self.draft_id_to_target_id is not None:
            tokens = tokens + self.draft_id_to_target_id[tokens]
        return tokens
