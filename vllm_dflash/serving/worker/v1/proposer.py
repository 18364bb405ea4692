"""The V1 proposer: vLLM's own, observed. Serving, training and live learning share this one object."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vllm.model_executor.models.interfaces import supports_multimodal
from vllm.v1.spec_decode.dflash import DFlashProposer

from vllm_dflash import ops
from vllm_dflash.options import Options
from vllm_dflash.serving import patching, support
from vllm_dflash.serving.draft_limits import position_limit
from vllm_dflash.serving.worker import calibration
from vllm_dflash.serving.worker.dflash2_model import HeadDrafterModel
from vllm_dflash.serving.worker.drafter_model import DrafterModel
from vllm_dflash.serving.worker.features.layer_hooks import adapt_verifier
from vllm_dflash.serving.worker.features.tap import FeatureTap, install_tap
from vllm_dflash.serving.worker.v1 import sampler
from vllm_dflash.serving.worker.v1.block_inputs import BlockInputs
from vllm_dflash.serving.worker.v1.deferred_context import DeferredContext
from vllm_dflash.serving.worker.v1.kv_groups import DraftGroup, KVGroups

if TYPE_CHECKING:
    from vllm_dflash.draft_length.cost import StepCost
    from vllm_dflash.serving.worker.features.recorder import FeatureRecorder
    from vllm_dflash.serving.worker.v1.draft_controller import DraftLengths


logger = logging.getLogger("vllm.vllm_dflash")


class Proposer(DFlashProposer):
    """Drafts as ``DFlashProposer`` does; hands what it sees to a recorder where one is attached.

    Attributes:
        runner: the V1 model runner (vLLM's base class takes but does not keep it).
        recorder: gets the verifier's features of every step, or None.
        drafting: False makes every proposal empty, so that vLLM decodes plainly while features are
            recorded (the drafter under training is not served meanwhile).
        tap: where the verifier's layers write their features, None where vLLM collects them.
        kv_groups: where the draft layers' caches are, known once vLLM has laid out the KV cache.
        kv_block_sizes: tokens in a block of each group's block table.
        query_slots: int64 ``[G, queries]``, cache slots of the block.
        context_slots: int64 ``[G, tokens]``, cache slots of the verifier's tokens.
        sample_from_anchor: whether the anchor's own output predicts: a block is then K wide, not K + 1.
        max_query_len: queries of a request.
        lengths: chooses how much is drafted, or None where that is fixed or the scheduler's.
        context: stores the context of steps without a draft pass where the scheduler chooses, else None.
        draft_rows: int64 ``[G]``, the requests that ``propose`` of vLLM drafts for; None for all.
        dummy_drafts: whether vLLM's dummy steps include a draft pass, as they do.
        step_cost: what steps cost, once that is measured.
        confidence: probabilities of the latest greedy draft tokens by the drafter, ``[G*K]``, or None.
        max_model_len: where drafting ends: vLLM's attribute, less than the server's where the drafter has
            fewer positions.
    """

    model: Any
    _dflash_hidden_states: Tensor
    _dflash_num_context: int
    _draft_attn_layer_names: set[str]
    draft_attn_groups: list[Any]
    block_size: int
    _slot_mapping_buffer: Tensor
    _context_slot_mapping_buffer: Tensor
    kv_groups: KVGroups
    kv_block_sizes: list[int]
    query_slots: Tensor
    context_slots: Tensor

    def __init__(self, vllm_config, device: torch.device, runner=None) -> None:
        stages = vllm_config.parallel_config.pipeline_parallel_size
        if stages > 1:
            raise ValueError(
                f"pipeline_parallel_size is {stages}: vLLM's V1 runner has a drafter on the last stage only "
                "and fails on the others; use --tensor-parallel-size, or the V2 runner"
            )
        super().__init__(vllm_config, device, runner)
        if device.type == "cpu":
            patching.apply("cpu")
            if vllm_config.model_config.is_hybrid:
                patching.apply("cpu hybrid")
        self.max_model_len = position_limit(vllm_config.speculative_config, self.max_model_len)
        self.runner = runner
        self.recorder: FeatureRecorder | None = None
        self.drafting = True
        self.tap: FeatureTap | None = None
        self._options = Options.from_additional_config(vllm_config.additional_config)
        self._block_inputs: BlockInputs | None = None
        self._use_ops = self._options.ops and ops.worthwhile(device)
        self.sample_from_anchor = bool(self.dflash_config.get("sample_from_anchor", False))
        self.max_query_len = self.num_speculative_tokens + (not self.sample_from_anchor)
        self.lengths: DraftLengths | None = None
        self.context: DeferredContext | None = None
        self.draft_rows: Tensor | None = None
        self.confidence: Tensor | None = None
        self.dummy_drafts = True
        self.step_cost: StepCost | None = None

    def load_model(self, target_model: nn.Module) -> None:
        config: Any = getattr(target_model, "config", None)
        if supports_multimodal(target_model) and not hasattr(config, "image_token_index"):
            # vLLM copies it to the drafter, which has no use for it, from models that have none.
            config.image_token_index = getattr(config, "image_token_id", None)
        self.tap = adapt_verifier(target_model, self.vllm_config, self.device)
        super().load_model(target_model)
        if isinstance(self.model, DrafterModel):
            self.model.leave_out_lora()
            self.max_model_len = min(self.max_model_len, self.model.num_positions)
        self._fit_runner()
        if self.tap is None and self._use_ops and isinstance(self.model, DrafterModel):
            inner: Any = self.model.model
            width = inner.fc.input_size
            self.tap = install_tap(target_model, self.vllm_config, width, self.device)

    def _fit_runner(self) -> None:
        """Tells the runner how long requests may be for the proposer to be asked, which it does by batch."""
        runner, server = self.runner, self.vllm_config.model_config.max_model_len
        if runner is None or self.max_model_len >= server:
            return
        # Ours can be asked in any step, as draft_limits has drafts end where they must. Else one long
        # request would end those of the whole batch, whose context would lack what it reads meanwhile.
        ours = isinstance(self.model, DrafterModel)
        runner.effective_drafter_max_model_len = server if ours else self.max_model_len

    def initialize_attn_backend(
        self, kv_cache_config: Any, kernel_block_sizes: list[int] | None = None
    ) -> None:
        """As vLLM's, for draft layers in several KV-cache groups (sliding and full attention, or a
        verifier whose groups are small) and of both causalities: its method runs once for each."""
        every = self._draft_attn_layer_names
        names = sorted(every)
        causal = dict.fromkeys(names, bool(self.dflash_causal))
        if hasattr(self.model, "get_draft_attn_causal"):
            names = self.model.get_draft_kv_cache_layer_names()
            causal = dict(zip(names, self.model.get_draft_attn_causal(), strict=True))
        groups: list[DraftGroup] = []
        ids: list[int] = []
        sizes: list[int] = []
        try:
            for gid, cache_group in enumerate(kv_cache_config.kv_cache_groups):
                inside = every & set(cache_group.layer_names)
                for mode in sorted({causal[name] for name in inside}):
                    self._draft_attn_layer_names = {n for n in inside if causal[n] == mode}
                    super().initialize_attn_backend(kv_cache_config, kernel_block_sizes)
                    if gid not in ids:
                        ids.append(gid)
                        # The block table counts in the attention kernel's blocks where those are smaller.
                        sizes.append(
                            kernel_block_sizes[gid] if kernel_block_sizes else self.block_size
                        )
                    row = ids.index(gid)
                    groups += [DraftGroup(g, row, mode) for g in self.draft_attn_groups]
        finally:
            self._draft_attn_layer_names = every
        self.kv_groups = KVGroups(groups, ids, names)
        self.kv_block_sizes, self.block_size = sizes, sizes[0]
        self.kv_cache_gid = ids[0]
        self.draft_attn_groups = [group.attention for group in groups]
        self.query_slots = self._slot_mapping_buffer.new_zeros(
            len(ids), self._slot_mapping_buffer.numel()
        )
        self.context_slots = self._context_slot_mapping_buffer.new_zeros(
            len(ids), self._context_slot_mapping_buffer.numel()
        )
        self._slot_mapping_buffer = self.query_slots[0]
        self._context_slot_mapping_buffer = self.context_slots[0]
        stock_knows = self.kv_groups.single and not self.sample_from_anchor
        short = self.max_model_len < self.vllm_config.model_config.max_model_len
        if self._use_ops or not stock_knows or short or self._options.draft_length == "auto":
            self._block_inputs = BlockInputs(self, plain=not self._use_ops)

    def build_per_group_and_layer_attn_metadata(
        self, cad: Any, draft_index: int = 0
    ) -> tuple[list[Any], dict[str, Any]]:
        if self.kv_groups.single:
            return super().build_per_group_and_layer_attn_metadata(cad, draft_index)
        build_all = super().build_per_group_and_layer_attn_metadata
        every, causal = self.draft_attn_groups, self.dflash_causal

        def build(group: Any, common: Any) -> tuple[list[Any], dict[str, Any]]:
            self.draft_attn_groups = [group]
            return build_all(common, draft_index)

        try:
            self.dflash_causal = True  # else vLLM wants every group without it
            return self.kv_groups.attention_metadata(self.runner, cad, self.query_slots, build)
        finally:
            self.draft_attn_groups, self.dflash_causal = every, causal

    def _get_slot_mapping(
        self, num_tokens: int, slot_mapping: Tensor | None = None
    ) -> dict[str, Tensor]:
        slots = super()._get_slot_mapping(num_tokens, slot_mapping)
        if not hasattr(self, "kv_groups") or self.kv_groups.single:
            return slots
        if slot_mapping is not None:
            self.query_slots[1:, slot_mapping.shape[0] : num_tokens].fill_(ops.PAD_SLOT)
        return {
            name: self.query_slots[group.row, :num_tokens]
            for group in self.kv_groups.groups
            for name in group.attention.layer_names
        }

    def build_model_inputs_first_pass(
        self, num_tokens: int, num_input_tokens: int, mm_embed_inputs: Any
    ) -> tuple[dict[str, Any], int]:
        if not self.kv_groups.single:
            T = self._dflash_num_context
            self.model.precompute_and_store_context_kv(
                self._dflash_hidden_states,
                self._context_positions_buffer[:T],
                [self.context_slots[row, :T] for row in self.kv_groups.layer_rows],
            )
            # vLLM's would store to the first group's slots for all layers: it gets no tokens to store.
            self._dflash_num_context = 0
            self._dflash_hidden_states = self._dflash_hidden_states[:0]
        return super().build_model_inputs_first_pass(num_tokens, num_input_tokens, mm_embed_inputs)

    def propose(self, *args, **kwargs) -> Any:
        """Draft tokens ``[B, K]``, as vLLM's; where lengths are chosen a list of tokens for each request."""
        # vLLM's runner passes keywords only; the seam check in seams.py relies on their names.
        kwargs["target_hidden_states"] = self.take_features(
            [kwargs["target_hidden_states"]],
            kwargs["target_positions"],
            kwargs["common_attn_metadata"],
            kwargs.get("num_rejected_tokens_gpu"),
        )
        if not self.drafting:
            batch_size = kwargs["common_attn_metadata"].batch_size()
            return torch.empty(batch_size, 0, dtype=torch.int64, device=self.device)
        if self.lengths is not None:
            return self.lengths.propose(super().propose, **kwargs)
        if self.context is not None and kwargs["num_speculative_tokens"] == 0:
            metadata = kwargs["common_attn_metadata"]
            self.context.add(
                kwargs["target_hidden_states"],
                kwargs["next_token_ids"],
                kwargs["target_positions"],
                metadata,
                kwargs.get("num_rejected_tokens_gpu"),
            )
            return torch.empty(metadata.batch_size(), 0, dtype=torch.int64, device=self.device)
        return super().propose(*args, **kwargs)

    def take_features(
        self,
        hidden_states: list[Tensor],
        positions: Tensor,
        metadata: Any,
        num_rejected: Tensor | None,
    ) -> Tensor:
        """Features ``[T, F]`` of a step, from the tap or else the states ``[T, ...]`` side by side; recorded
        where somebody wants them."""
        if self.tap is not None and self.tap.given(hidden_states[0]):
            features = self.tap.take(hidden_states[0].shape[0])
        else:
            features = hidden_states[0] if len(hidden_states) == 1 else torch.cat(hidden_states, -1)
        if self.recorder is not None and self.recorder.watching:
            batch = self.runner.input_batch
            known = not self.runner.use_async_spec_decode
            self.recorder.observe(
                request_ids=batch.req_ids,
                query_start_loc=metadata.query_start_loc_cpu,
                positions=positions,
                features_TF=features,
                num_rejected=num_rejected,
                num_computed=batch.num_computed_tokens_cpu[: batch.num_reqs] if known else None,
            )
        return features

    def dummy_run(self, *args: Any, **kwargs: Any) -> None:
        if self.dummy_drafts:
            super().dummy_run(*args, **kwargs)

    def measure(self, runner: Any) -> None:
        """Once the engine can run steps: mends the runner, and measures what steps cost if that is wanted."""
        ours = patching.specialise(
            runner, "vllm_dflash.serving.worker.v1.model_runner:drafting_runner"
        )
        sampler.mend(runner)
        if ours and support.enabled(self.vllm_config) and isinstance(self.model, DrafterModel):
            path = calibration.costs_file(self.vllm_config)
            self.step_cost = calibration.measured_if_possible(calibration.RunsV1(self), path)

    def choose_lengths(self) -> None:
        """Lengths are chosen from now on, here or by the scheduler: every worker knows what steps cost."""
        assert self.step_cost is not None
        self.runner.always_proposes = True
        if support.by_scheduler(self.vllm_config):
            # Rows are written at once: gathering them would wait for the device, which runs ahead here.
            self.context = DeferredContext(self, at_once=True)
            return
        # Deferred: prompt lookup brings numba.
        from vllm_dflash.serving.worker.v1 import draft_controller as draft_length

        self.lengths = draft_length.make(self, self.step_cost)

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
        if isinstance(self.model, HeadDrafterModel):
            self.model.set_block_width(self._block_width())
        if self._block_inputs is None:
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

    def _block_width(self) -> int:
        """Tokens of a block of this step."""
        return max(self.num_speculative_tokens, 1) + (not self.sample_from_anchor)

    def _anchors(self, num_drafted: int) -> Tensor:
        """Tokens in front of the blocks of this step ``[B]``, which draft so many tokens in all."""
        width = self._block_width()
        num_blocks = num_drafted // self.num_speculative_tokens
        return self.input_ids[: num_blocks * width : width]

    def _sample_draft_tokens(
        self, hidden_states: Tensor, sampling_metadata: Any
    ) -> tuple[Tensor, Tensor | None]:
        sampled = self._enable_probabilistic_draft_probs and not sampling_metadata.all_greedy
        if sampled and isinstance(self.model, HeadDrafterModel):
            anchors = self._anchors(len(hidden_states))
            return self.model.sampled_walk(hidden_states, anchors, sampling_metadata)
        return super()._sample_draft_tokens(hidden_states, sampling_metadata)

    def _greedy_sample(self, hidden_states: Tensor) -> Tensor:
        if isinstance(self.model, HeadDrafterModel):
            anchors = self._anchors(len(hidden_states))
            tokens, self.confidence = self.model.greedy_walk(
                hidden_states, anchors, confidence=self.lengths is not None
            )
            return tokens
        plain = not (self.use_local_argmax_reduction or self.use_heterogeneous_vocab)
        if plain and self._options.greedy_draft_vocab and isinstance(self.model, DrafterModel):
            tokens, self.confidence = self.model.greedy_draft_tokens(
                hidden_states, confidence=self.lengths is not None
            )
            return tokens
        return super()._greedy_sample(hidden_states)
