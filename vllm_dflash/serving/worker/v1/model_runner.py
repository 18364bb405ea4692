"""vLLM's V1 model runner with a dflash drafter of ours: what it does otherwise, in one subclass."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from vllm_dflash.serving.draft_return import attach_drafts
from vllm_dflash.serving.verified import name_sources

if TYPE_CHECKING:
    from vllm_dflash.serving.worker.v1.proposer import Proposer


def drafting_runner(cls: type) -> type:
    """A subclass of one of vLLM's V1 runners, whose ``drafter`` is our proposer.

    Most of it is for draft lengths that the proposer chooses (``drafter.lengths``); without them steps go
    vLLM's way.
    """
    # What vLLM passes to propose_draft_token_ids by position.
    names = tuple(inspect.signature(cls.propose_draft_token_ids).parameters)[1:]  # type: ignore[attr-defined]

    class DraftingRunner(cls):  # type: ignore[valid-type,misc]
        """See :func:`drafting_runner`.

        Attributes:
            always_proposes: the proposer is asked in every step, also where a request comes close to
                ``max_model_len``.
        """

        drafter: Proposer
        always_proposes = False
        _kept_generators: dict[int, Any] | None = None

        def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            if self.drafter.lengths is not None:
                self.drafter.lengths.before_step(scheduler_output)
            return super().execute_model(scheduler_output, *args, **kwargs)

        def _prepare_inputs(self, *args: Any, **kwargs: Any) -> Any:
            logits_indices, metadata, *rest = super()._prepare_inputs(*args, **kwargs)
            # vLLM sends every step of an engine with a drafter through the rejection sampler, which has
            # nothing to reject where nothing was drafted and costs more than the plain sampler.
            chosen = self.drafter.lengths is not None
            if chosen and metadata is not None and metadata.max_spec_len == 0:
                metadata = None
            return logits_indices, metadata, *rest

        def propose_draft_token_ids(self, *args: Any, **kwargs: Any) -> Any:
            lengths = self.drafter.lengths
            if lengths is not None and lengths.alone:
                given = dict(zip(names, args, strict=False)) | kwargs
                if given["spec_decode_metadata"] is None and given["aux_hidden_states"]:
                    # Where nothing is drafted either, the step can do without what vLLM prepares for its
                    # proposers.
                    output = given["scheduler_output"]
                    num_tokens = output.total_num_scheduled_tokens
                    drafts = lengths.plain_step(
                        given["sampled_token_ids"],
                        [h[:num_tokens] for h in given["aux_hidden_states"]],
                        self._get_positions(num_tokens),
                        given["common_attn_metadata"],
                        output.num_spec_tokens_to_schedule,
                    )
                    if drafts is not None:
                        return drafts
            return super().propose_draft_token_ids(*args, **kwargs)

        def _input_fits_in_drafter(self, common_attn_metadata: Any) -> bool:
            # vLLM leaves the proposer out then for the whole batch, whose features of those steps the
            # drafter's context would lack for good, and schedules drafts of zeros. Chosen lengths end before
            # the limit.
            if self.always_proposes:
                return common_attn_metadata is not None
            return super()._input_fits_in_drafter(common_attn_metadata)

        def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
            output = super().sample_tokens(*args, **kwargs)
            if self.drafter.lengths is not None:
                attach_drafts(self, output)
            return output

        def take_draft_token_ids(self) -> Any:
            drafts = super().take_draft_token_ids()
            if drafts is not None and self.drafter.lengths is not None:
                name_sources(drafts, self.drafter.lengths.sent)
            return drafts

        def _sample(self, *args: Any, **kwargs: Any) -> Any:
            # vLLM samples behind each chunk of a prompt too, throws the token away and turns the request's
            # generator back, which ends the engine where generators have no offset, as on the CPU. Here such
            # a token comes from the global generator.
            if self.device.type == "cpu":
                batch, kept = self.input_batch, {}
                for row in self.discard_request_mask.np[: batch.num_reqs].nonzero()[0].tolist():
                    if row in batch.generators:
                        kept[row] = batch.generators.pop(row)
                self._kept_generators = kept
            return super()._sample(*args, **kwargs)

        def _bookkeeping_sync(self, *args: Any, **kwargs: Any) -> Any:
            try:
                return super()._bookkeeping_sync(*args, **kwargs)
            finally:
                if self._kept_generators:
                    self.input_batch.generators.update(self._kept_generators)
                    self._kept_generators = None

    DraftingRunner.__name__ = DraftingRunner.__qualname__ = cls.__name__
    DraftingRunner.__module__ = cls.__module__
    return DraftingRunner
