"""The V1 proposer: vLLM's own, observed. Serving, training and live learning share this one object."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vllm.v1.sample import rejection_sampler
from vllm.v1.spec_decode.dflash import DFlashProposer

from vllm_dflash import ops
from vllm_dflash.options import Options
from vllm_dflash.serving.adapter import adapt_verifier
from vllm_dflash.serving.block_inputs import BlockInputs
from vllm_dflash.serving.drafter_model import DrafterModel
from vllm_dflash.serving.tap import FeatureTap, install_tap

if TYPE_CHECKING:
    from vllm_dflash.serving.features import FeatureRecorder


class Proposer(DFlashProposer):
    """Drafts as ``DFlashProposer`` does; hands what it sees to a recorder where one is attached.

    Attributes:
        runner: the V1 model runner (vLLM's base class takes but does not keep it).
        recorder: gets the verifier's features of every step, or None.
        drafting: False makes every proposal empty, so that vLLM decodes plainly while features are
            recorded (the drafter under training is not served meanwhile).
        tap: where the verifier's layers write their features, None where vLLM collects them.
    """

    def __init__(self, vllm_config, device: torch.device, runner=None) -> None:
        stages = vllm_config.parallel_config.pipeline_parallel_size
        if stages > 1:
            raise ValueError(
                f"pipeline_parallel_size is {stages}: vLLM's V1 runner has a drafter on the last stage only and "
                "fails on the others; use --tensor-parallel-size, or the V2 runner"
            )
        super().__init__(vllm_config, device, runner)
        if device.type == "cpu":
            _mend_cpu_sampling()
        self.runner = runner
        self.recorder: FeatureRecorder | None = None
        self.drafting = True
        self.tap: FeatureTap | None = None
        self._options = Options.from_additional_config(vllm_config.additional_config)
        self._block_inputs: BlockInputs | None = None
        self._use_ops = self._options.ops and ops.worthwhile(device)
        if self._use_ops:
            self._block_inputs = BlockInputs(self)

    def load_model(self, target_model: nn.Module) -> None:
        self.tap = adapt_verifier(target_model, self.vllm_config, self.device)
        super().load_model(target_model)
        if self.tap is None and self._use_ops and isinstance(self.model, DrafterModel):
            width = self.model.model.fc.input_size
            self.tap = install_tap(target_model, self.vllm_config, width, self.device)

    def propose(self, *args, **kwargs) -> Tensor:
        # vLLM's runner passes keywords only; the seam check in seams.py relies on their names.
        features = kwargs["target_hidden_states"]
        if self.tap is not None and self.tap.given(features):
            kwargs["target_hidden_states"] = self.tap.take(features.shape[0])
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

    def set_inputs_first_pass(
        self,
        target_token_ids: Tensor,
        next_token_ids: Tensor,
        target_positions: Tensor,
        target_hidden_states: Tensor,
        token_indices_to_sample: Tensor | None,
        cad: Any,
        num_rejected_tokens_gpu: Tensor | None,
    ) -> tuple[int, Tensor, Any]:
        # Without draft tokens (vLLM's batch-size table says 0) there is no block to build.
        if self._block_inputs is None or self.num_speculative_tokens == 0:
            return super().set_inputs_first_pass(
                target_token_ids,
                next_token_ids,
                target_positions,
                target_hidden_states,
                token_indices_to_sample,
                cad,
                num_rejected_tokens_gpu,
            )
        # What build_model_inputs_first_pass of vLLM reads.
        self._dflash_num_context = target_token_ids.shape[0]
        self._dflash_hidden_states = target_hidden_states
        return self._block_inputs.build(
            self, next_token_ids, target_positions, cad, num_rejected_tokens_gpu
        )

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
