"""The V2 speculator (vLLM's default runner on GPUs): vLLM's own, observed, with our ops underneath."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vllm_dflash import ops
from vllm_dflash.draft_length.cost import StepCost
from vllm_dflash.options import Options
from vllm_dflash.serving import patching, support
from vllm_dflash.serving.draft_limits import position_limit
from vllm_dflash.serving.worker import calibration
from vllm_dflash.serving.worker.drafter_model import DrafterModel
from vllm_dflash.serving.worker.features.layer_hooks import adapt_verifier
from vllm_dflash.serving.worker.features.tap import FeatureTap, install_tap

#: The speculator whose ``propose`` is running; ``prepare_dflash_inputs`` of vLLM does not get it.
_proposing: Any = None


def observed(cls: type) -> type:
    """A subclass of one of vLLM's dflash speculators that hands what it sees to a recorder.

    ``propose`` is passed through whole, because its parameters change from release to release. Made per
    class: DFlash 2, LiLiCorr and DSpark inherit from ``DFlashSpeculator``, so that cannot be replaced.

    The instances are a :class:`~vllm_dflash.serving.worker.features.source.FeatureSource`, and have a ``tap``
    (where the verifier's layers write their features, None where vLLM collects them), ``num_wanted`` (draft
    tokens that the step is to end with, None for all), ``dummy_drafts`` (whether dummy steps draft) and
    ``step_cost`` (what steps cost, once that is measured).
    """

    # Behind self and input_batch. Real steps pass most by position, dummy runs by name.
    names = tuple(inspect.signature(cls.propose).parameters)[2:]  # type: ignore[attr-defined]
    sampling: tuple[str, ...] = ()
    if hasattr(cls, "sample_draft"):
        sampling = tuple(inspect.signature(cls.sample_draft).parameters)[2:]

    class Observed(cls):  # type: ignore[valid-type,misc]
        recorder: Any = None
        drafting = True
        tap: FeatureTap | None = None
        num_wanted: int | None = None
        dummy_drafts = True
        #: Tokens of a request behind which nothing is drafted, where the server has more.
        draft_limit = sys.maxsize
        model: Any
        use_local_argmax_reduction: bool
        _use_ops = False
        _greedy_draft_vocab = False
        _skipping = False
        step_cost: StepCost | None = None

        @property
        def max_model_len(self) -> int:
            # The server's: a value in vLLM 0.31 and 0.32, in 0.33 a property that cannot be set.
            servers = vars(self).get("max_model_len")
            return min(super().max_model_len if servers is None else servers, self.draft_limit)

        def load_draft_model(self, target_model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
            model: Any = super().load_draft_model(target_model, *args, **kwargs)
            if isinstance(model, DrafterModel):
                model.leave_out_lora()
                self.draft_limit = min(self.draft_limit, model.num_positions)
            self.tap = getattr(target_model, "_dflash_tap", None)
            if self.tap is None and self._use_ops and isinstance(model, DrafterModel):
                inner: Any = model.model
                width = inner.fc.input_size
                self.tap = install_tap(target_model, self.vllm_config, width, self.device)
            return model

        def propose(self, input_batch: Any, *args: Any, **kwargs: Any) -> Tensor:
            global _proposing
            given = dict(zip(names, args, strict=False)) | kwargs
            real = not given.get("dummy_run", False)
            if not (real or self.dummy_drafts or given.get("skip_attn_for_dummy_run")):
                return self.draft_tokens[: input_batch.num_reqs]
            aux: Any = given.get("aux_hidden_states")
            if self.tap is not None and aux and self.tap.given(aux[0]):
                aux = given["aux_hidden_states"] = [self.tap.take(aux[0].shape[0], real)]
            if real and self.recorder is not None and self.recorder.watching:
                self._observe(input_batch, aux, given["num_rejected"])
            if real and not self.drafting:
                return self.draft_tokens[: input_batch.num_reqs]
            if real and self.num_wanted == 0:
                # vLLM 0.33 does as much itself. Before, an eager pass is the one that stores the context's
                # K/V outside the query's CUDA graph; the rest of it is left out below.
                self._skipping = given["is_profile"] = True
            _proposing = self if self._use_ops else None
            try:
                return super().propose(input_batch, **given)
            finally:
                _proposing = None
                self._skipping = False

        def sample_draft(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            given = dict(zip(sampling, args, strict=False)) | kwargs
            model: Any = self.model
            if (
                self._greedy_draft_vocab
                and given["draft_logits"] is None
                and isinstance(model, DrafterModel)
                and model.draft_id_to_target_id is not None
                and not self.use_local_argmax_reduction
                and getattr(self, "acceptance_estimator", None) is None  # reads the logits
            ):
                return model.greedy_draft_tokens(hidden_states)[0]
            return super().sample_draft(hidden_states, **given)

        def _build_uniform_attn_metadata(self, *args: Any, **kwargs: Any) -> Any:
            return None if self._skipping else super()._build_uniform_attn_metadata(*args, **kwargs)

        def _prepare_eplb_forward(self, *args: Any, **kwargs: Any) -> None:
            if not self._skipping:
                super()._prepare_eplb_forward(*args, **kwargs)

        def _generate_draft(self, *args: Any, **kwargs: Any) -> None:
            if not self._skipping:
                super()._generate_draft(*args, **kwargs)

        def measure(self, runner: Any) -> None:
            """Measures what steps cost, if lengths are to be chosen; once the engine can run steps.

            From then on draft passes follow the schedule, which has none for some steps of fixed lengths too.
            """
            patching.specialise(
                runner, "vllm_dflash.serving.worker.v2.model_runner:following_runner"
            )
            if support.enabled(runner.vllm_config):
                path = calibration.costs_file(runner.vllm_config)
                self.step_cost = calibration.measured_if_possible(
                    calibration.RunsV2(runner), path.with_name(f"v2-{path.name}")
                )

        def _observe(
            self, batch: Any, aux_hidden_states: list[Tensor], num_rejected: Tensor
        ) -> None:
            num_tokens = batch.num_tokens
            self.recorder.observe(
                request_ids=batch.req_ids,
                query_start_loc=batch.query_start_loc_np[: batch.num_reqs + 1],
                positions=batch.positions[:num_tokens],
                features_TF=torch.cat([h[:num_tokens] for h in aux_hidden_states], dim=-1),
                num_rejected=num_rejected[: batch.num_reqs] if batch.num_draft_tokens else None,
                # With drafts in flight this is what it would be if all of them were accepted.
                num_computed=None if self.drafting else batch.num_computed_tokens_np,
            )

    Observed.__name__ = Observed.__qualname__ = cls.__name__
    return Observed


def adopt(speculator: Any, options: Options) -> None:
    """Turns a speculator of vLLM into an observed one; the instance is changed, not vLLM's class."""
    patching.specialise(speculator, "vllm_dflash.serving.worker.v2.speculator:observed")
    speculator._greedy_draft_vocab = options.greedy_draft_vocab
    speculator._use_ops = options.ops and ops.worthwhile(speculator.device)


def make_speculator(vllm_config: Any, make: Callable[[], Any]) -> Any:
    """vLLM's dflash speculator, observed, also for a drafter whose anchor predicts.

    vLLM refuses ``sample_from_anchor`` for dflash, though its kernel and its DSpark speculator do it; here it
    is set as they do.

    Args:
        make: vLLM's own way to make one.
    """
    hf_config = vllm_config.speculative_config.draft_model_config.hf_config
    given = getattr(hf_config, "dflash_config", None) or {}
    from_anchor = bool(given.get("sample_from_anchor", False))
    if from_anchor:
        hf_config.dflash_config = {**given, "sample_from_anchor": False}
    try:
        speculator = make()
    finally:
        if from_anchor:
            hf_config.dflash_config = given
    if from_anchor:
        speculator.sample_from_anchor = True
        speculator.num_query_per_req = speculator.num_speculative_steps
    # vLLM's has the server's max_model_len, whatever positions the drafter has.
    speculator.draft_limit = position_limit(
        vllm_config.speculative_config, speculator.max_model_len
    )
    if speculator.device.type == "cpu" and vllm_config.model_config.is_hybrid:
        patching.apply("cpu hybrid")
    options = Options.from_additional_config(vllm_config.additional_config)
    adopt(speculator, options)
    return speculator


#: Configuration and device of the latest dflash speculator. Not it itself: what is kept here outlives the
#: engine.
_serving: tuple[Any, torch.device] | None = None


def wrap_init_speculator(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``init_speculator`` of vLLM's V2 runner; other methods pass through."""

    @functools.wraps(original)
    def init_speculator(vllm_config, *args, **kwargs):
        global _serving
        make = functools.partial(original, vllm_config, *args, **kwargs)
        spec_config = vllm_config.speculative_config
        if spec_config is None or spec_config.method != "dflash":
            return make()
        speculator = make_speculator(vllm_config, make)
        _serving = vllm_config, speculator.device
        return speculator

    return init_speculator


def wrap_set_layers(original: Callable[..., None]) -> Callable[..., None]:
    """Wraps ``set_eagle3_aux_hidden_state_layers`` of vLLM's V2 runner: adapts verifiers before."""

    @functools.wraps(original)
    def set_eagle3_aux_hidden_state_layers(model, spec_config, *args, **kwargs):
        if _serving is not None and spec_config.method == "dflash":
            adapt_verifier(model, *_serving)
        return original(model, spec_config, *args, **kwargs)

    return set_eagle3_aux_hidden_state_layers


#: What vLLM's ``prepare_dflash_inputs`` must take, in this order; 0.33 has ``num_reqs_override`` behind them.
_PREPARE_PARAMETERS = (
    "input_buffers",
    "query_slot_mapping",
    "context_positions",
    "context_slot_mapping",
    "sample_indices",
    "sample_pos",
    "sample_idx_mapping",
    "temperature",
    "seeds",
    "input_batch",
    "num_sampled",
    "num_rejected",
    "last_sampled",
    "next_prefill_tokens",
    "input_temperature",
    "input_seeds",
    "block_table",
    "block_size",
    "cp_rank",
    "cp_size",
    "cp_interleave",
    "parallel_drafting_token_id",
    "num_query_per_req",
    "num_speculative_steps",
    "max_num_reqs",
    "max_num_tokens",
    "max_model_len",
    "sample_from_anchor",
)


def wrap_prepare_inputs(original: Callable[..., None]) -> Callable[..., None]:
    """Puts ``build_block`` in place of ``prepare_dflash_inputs``: one launch for all KV-cache groups.

    vLLM calls it once a group; the first call does the work of all.

    Raises:
        ValueError: its parameters are not those known; by position they would land in the wrong place.
    """
    names = tuple(inspect.signature(original).parameters)
    known = len(_PREPARE_PARAMETERS)
    if names[:known] != _PREPARE_PARAMETERS or set(names[known:]) - {"num_reqs_override"}:
        raise ValueError(f"prepare_dflash_inputs has the parameters {', '.join(names)}")

    @functools.wraps(original)
    def prepare_dflash_inputs(*args: Any, **kwargs: Any) -> None:
        speculator = _proposing
        if speculator is None or args[0] is not speculator.input_buffers:
            return original(*args, **kwargs)
        given = dict(zip(names, args, strict=False)) | kwargs
        if given["cp_size"] != 1:
            return original(*args, **kwargs)
        if given["context_slot_mapping"].data_ptr() == speculator._context_slot_mappings.data_ptr():
            _build_block(speculator, given)
        return None

    return prepare_dflash_inputs


def _build_block(speculator: Any, given: dict[str, Any]) -> None:
    batch, buffers, tables = given["input_batch"], given["input_buffers"], speculator.block_tables
    groups = speculator.draft_kv_cache_group_ids
    # vLLM 0.31 has tables of the blocks that the attention kernels see, smaller where those are fixed.
    sizes = vars(tables).get("kernel_block_sizes", tables.block_sizes)
    if sizes[groups[0]] != given["block_size"]:
        raise RuntimeError(
            f"vLLM's block tables count in blocks of {given['block_size']} tokens where {sizes[groups[0]]} "
            'were expected; serve with "dflash_ops": false in --speculative-config and report it'
        )
    requests = given.get("num_reqs_override")
    num_reqs = batch.num_reqs if requests is None else requests
    ops.build_block(
        anchor_ids=given["last_sampled"].view(-1),
        prefill_ids=given["next_prefill_tokens"].view(-1),
        num_sampled=given["num_sampled"],
        request_index=batch.idx_mapping,
        target_positions=batch.positions[: batch.num_tokens],
        query_start_loc=batch.query_start_loc[: num_reqs + 1],
        num_rejected=given["num_rejected"],
        temperature=given["input_temperature"],
        seeds=given["input_seeds"],
        block_tables=[tables.input_block_tables[g] for g in groups],
        kv_block_sizes=[sizes[g] for g in groups],
        num_draft_tokens=given["num_speculative_steps"],
        mask_token_id=given["parallel_drafting_token_id"],
        max_model_len=given["max_model_len"],
        sample_from_anchor=given.get("sample_from_anchor", False),
        input_ids=buffers.input_ids,
        query_positions=buffers.positions,
        query_slots=tables.slot_mappings,
        query_slot_rows=groups,
        context_positions=given["context_positions"],
        context_slots=speculator._context_slot_mappings,
        sample_indices=given["sample_indices"],
        block_start_loc=buffers.query_start_loc,
        block_seq_lens=buffers.seq_lens,
        sample_positions=given["sample_pos"],
        sample_requests=given["sample_idx_mapping"],
        temperature_out=given["temperature"],
        seeds_out=given["seeds"],
    )
