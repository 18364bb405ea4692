"""The V1 proposer: vLLM's own, observed. Serving, training and live learning share this one object."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from vllm.v1.sample import rejection_sampler
from vllm.v1.spec_decode.dflash import DFlashProposer

from vllm_dflash.options import Options
from vllm_dflash.serving.drafter_model import DrafterModel

if TYPE_CHECKING:
    from vllm_dflash.serving.features import FeatureRecorder


class Proposer(DFlashProposer):
    """Drafts as ``DFlashProposer`` does; hands what it sees to a recorder where one is attached.

    Attributes:
        runner: the V1 model runner (vLLM's base class takes but does not keep it).
        recorder: gets the verifier's features of every step, or None.
        drafting: False makes every proposal empty, so that vLLM decodes plainly while features are
            recorded (the drafter under training is not served meanwhile).
    """

    def __init__(self, vllm_config, device: torch.device, runner=None) -> None:
        super().__init__(vllm_config, device, runner)
        if device.type == "cpu":
            _mend_cpu_sampling()
        self.runner = runner
        self.recorder: FeatureRecorder | None = None
        self.drafting = True
        self._options = Options.from_additional_config(vllm_config.additional_config)

    def propose(self, *args, **kwargs) -> Tensor:
        # vLLM's runner passes keywords only; the seam check in seams.py relies on their names.
        if self.recorder is not None:
            self.recorder.observe(
                request_ids=self.runner.input_batch.req_ids,
                query_start_loc=kwargs["common_attn_metadata"].query_start_loc_cpu,
                positions=kwargs["target_positions"],
                features_TF=kwargs["target_hidden_states"],
                num_rejected=kwargs.get("num_rejected_tokens_gpu"),
            )
        if not self.drafting:
            batch_size = kwargs["common_attn_metadata"].batch_size()
            return torch.empty(batch_size, 0, dtype=torch.int64, device=self.device)
        return super().propose(*args, **kwargs)

    def _greedy_sample(self, hidden_states: Tensor) -> Tensor:
        plain = not (self.use_local_argmax_reduction or self.use_heterogeneous_vocab)
        if plain and self._options.greedy_draft_vocab and isinstance(self.model, DrafterModel):
            return self.model.greedy_draft_tokens(hidden_states)
        return super()._greedy_sample(hidden_states)


def _mend_cpu_sampling() -> None:
    """Mends what keeps vLLM 0.31 and 0.32 from sampling right while speculating on the CPU.

    * ``expand_batch_to_tokens`` never writes its result there, so that temperature, top-k and top-p of
      draft rows are whatever the memory held: wrong samples, or the end of the engine (vLLM #55005).
    * In a batch without draft tokens (a prefill) top-k takes the maximum of an empty tensor, which ends
      the engine.
    """
    original = rejection_sampler.apply_sampling_constraints
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def apply_sampling_constraints(logits: Tensor, *args, **kwargs) -> Tensor:
        return logits if logits.shape[0] == 0 else original(logits, *args, **kwargs)

    @functools.wraps(rejection_sampler.expand_batch_to_tokens)
    def expand_batch_to_tokens(
        x: Tensor, cu_num_tokens: Tensor, num_tokens: int, replace_from=0, replace_to=0
    ) -> Tensor:
        counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
        out = x.repeat_interleave(counts, output_size=num_tokens)
        return out.masked_fill_(out == replace_from, replace_to)

    rejection_sampler.apply_sampling_constraints = apply_sampling_constraints
    rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens
