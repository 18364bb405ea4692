"""What vLLM's V1 runner does otherwise with our drafter: with a stand-in for the runner, no engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vllm_dflash.serving.verified import Sent
from vllm_dflash.serving.worker.v1.model_runner import drafting_runner


class Runner:
    """As far as the subclass asks vLLM's."""

    def __init__(self, lengths: Any = None) -> None:
        self.drafter = SimpleNamespace(lengths=lengths)
        self.device = torch.device("cpu")
        self.events: list = []
        self.input_batch = SimpleNamespace(num_reqs=3, generators={0: "g0", 1: "g1"})
        self.discard_request_mask = SimpleNamespace(np=np.array([True, False, True, True]))

    def execute_model(self, scheduler_output, intermediate_tensors=None):
        self.events.append(("step", scheduler_output))
        return "output"

    def _prepare_inputs(self, scheduler_output, num_scheduled_tokens):
        return "indices", scheduler_output, 3

    def propose_draft_token_ids(
        self,
        scheduler_output,
        sampled_token_ids,
        aux_hidden_states,
        spec_decode_metadata,
        common_attn_metadata,
    ):
        return "vLLM's"

    def _get_positions(self, num_tokens):
        return ("positions", num_tokens)

    def _input_fits_in_drafter(self, common_attn_metadata):
        return "as it is"

    def sample_tokens(self, grammar_output):
        return SimpleNamespace(req_ids=["a"])

    def take_draft_token_ids(self):
        return SimpleNamespace(tokens=[[1]])

    def _sample(self, logits, spec_decode_metadata):
        self.events.append(dict(self.input_batch.generators))

    def _bookkeeping_sync(self, fails=False):
        if fails:
            raise RuntimeError("vLLM's")
        self.events.append(dict(self.input_batch.generators))


class Lengths:
    alone = True

    def __init__(self, drafts=None) -> None:
        self.sent = {"a": Sent("lookup", (0.5,))}
        self.begun: list = []
        self.drafts, self.asked = drafts, []

    def before_step(self, scheduler_output) -> None:
        self.begun.append(scheduler_output)

    def plain_step(self, *args):
        self.asked.append(args)
        return self.drafts


def made(lengths: Any = None) -> Any:
    return drafting_runner(Runner)(lengths)


def test_it_is_named_as_vllms() -> None:
    assert (type(made()).__name__, type(made()).__module__) == ("Runner", __name__)


def test_lengths_hear_of_each_step_before_it_is_run() -> None:
    lengths = Lengths()
    runner = made(lengths)
    runner.events = lengths.begun  # one list, to see the order
    assert runner.execute_model("now") == "output"
    assert lengths.begun == ["now", ("step", "now")]
    assert made().execute_model("now") == "output"


@pytest.mark.parametrize(
    ("chosen", "most", "kept"), [(True, 0, False), (True, 2, True), (False, 0, True)]
)
def test_steps_without_drafts_are_sampled_plainly(chosen, most, kept) -> None:
    metadata = SimpleNamespace(max_spec_len=most)
    indices, got, longest = made(Lengths() if chosen else None)._prepare_inputs(metadata, None)
    assert (indices, longest) == ("indices", 3)
    assert got is (metadata if kept else None)


def propose(runner: Any, aux=("abcdef",), metadata=None) -> Any:
    output = SimpleNamespace(total_num_scheduled_tokens=2, num_spec_tokens_to_schedule=7)
    return runner.propose_draft_token_ids(
        output, "sampled", aux and list(aux), metadata, common_attn_metadata="common"
    )


def test_plain_steps_need_no_proposer() -> None:
    lengths = Lengths(drafts=[[]])
    assert propose(made(lengths)) == [[]]
    assert lengths.asked == [("sampled", ["ab"], ("positions", 2), "common", 7)]
    assert propose(made(Lengths(drafts=None))) == "vLLM's"
    assert propose(made()) == "vLLM's"
    for no in ({"metadata": "some drafts"}, {"aux": None}):
        assert propose(made(lengths), **no) == "vLLM's"
    lengths.alone = False
    assert propose(made(lengths)) == "vLLM's"
    assert len(lengths.asked) == 1


def test_the_proposer_is_asked_near_the_end() -> None:
    runner = made()
    assert runner._input_fits_in_drafter("some") == "as it is"
    runner.always_proposes = True
    assert runner._input_fits_in_drafter("some") is True
    assert runner._input_fits_in_drafter(None) is False


def test_drafts_and_their_sources_go_with_the_output() -> None:
    output = made(Lengths()).sample_tokens(None)
    assert output._dflash_draft_token_ids.tokens == [[1]]
    assert output._dflash_draft_token_ids._dflash_sent == {"a": Sent("lookup", (0.5,))}
    assert vars(made().sample_tokens(None)) == {"req_ids": ["a"]}
    assert vars(made().take_draft_token_ids()) == {"tokens": [[1]]}


def test_generators_of_prompt_chunks_are_kept_out() -> None:
    """Whatever becomes of the step."""
    runner = made()
    both = {0: "g0", 1: "g1"}
    runner._sample(None, None)
    assert runner.input_batch.generators == {1: "g1"}
    runner._bookkeeping_sync()
    assert runner.events == [{1: "g1"}, {1: "g1"}]
    assert runner.input_batch.generators == both
    runner._sample(None, None)
    with pytest.raises(RuntimeError, match="vLLM's"):
        runner._bookkeeping_sync(fails=True)
    assert runner.input_batch.generators == both
    runner.device = torch.device("cuda")
    runner._sample(None, None)
    assert runner.input_batch.generators == both
