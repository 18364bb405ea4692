"""Adopting V2 speculators and vLLM's ``prepare_dflash_inputs``; the real runner is in test_v2_runner.py."""

from __future__ import annotations

from abc import ABC
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from vllm_dflash.options import Options
from vllm_dflash.serving.worker.features.recorder import FeatureRecorder
from vllm_dflash.serving.worker.features.tap import FeatureTap
from vllm_dflash.serving.worker.v2 import speculator as speculator_v2


class Plain:
    device = torch.device("cpu")

    def propose(self, input_batch, attn_metadata, aux_hidden_states, num_rejected, dummy_run=False):
        return aux_hidden_states


class Abstract(Plain, ABC):
    """vLLM's speculators derive from ABC, whose instances Python gives another layout."""


@pytest.mark.parametrize("cls", [Plain, Abstract])
def test_adopted_speculators_hand_on_what_they_see(cls) -> None:
    speculator = cls()
    speculator_v2.adopt(speculator, Options(ops=False))
    assert isinstance(speculator, cls)
    seen = []
    speculator.recorder = SimpleNamespace(
        watching=False, observe=lambda **given: seen.append(given)
    )
    batch = SimpleNamespace(
        num_tokens=3,
        num_reqs=1,
        req_ids=["a"],
        query_start_loc_np=torch.tensor([0, 3, 3]).numpy(),
        positions=torch.arange(8),
        num_draft_tokens=2,
    )
    aux = [torch.ones(4, 2), torch.zeros(4, 2)]
    assert speculator.propose(batch, None, aux, torch.tensor([1])) is aux
    speculator.recorder.watching = True
    assert speculator.propose(batch, None, aux, num_rejected=torch.tensor([1, 0])) is aux
    assert speculator.propose(batch, None, aux, torch.tensor([1]), dummy_run=True) is aux
    (given,) = seen
    assert given["features_TF"].shape == (3, 4)
    assert given["num_rejected"].tolist() == [1]
    batch.num_draft_tokens = 0
    speculator.propose(batch, None, aux, torch.tensor([0]))
    assert seen[-1]["num_rejected"] is None  # nothing to wait for


def test_features_of_the_tap_replace_its_mark() -> None:
    speculator = Abstract()
    speculator_v2.adopt(speculator, Options(ops=False))
    features = torch.randn(8, 6)
    speculator.tap = FeatureTap(nn.Module(), features)
    (got,) = speculator.propose(None, None, [torch.zeros(5, 1)], None)
    assert torch.equal(got, features[:5])
    features.zero_()
    speculator.propose(
        None, None, [torch.zeros(5, 1)], None
    )  # once real, it is not looked at again
    whole = [torch.zeros(5, 6)]
    assert speculator.propose(None, None, whole, None) is whole


class Sized(Plain):
    """``max_model_len`` as vLLM 0.31 and 0.32 have it."""

    def __init__(self) -> None:
        self.max_model_len = 300


class SizedByConfig(Plain):
    """As vLLM 0.33 has it: it cannot be set."""

    max_model_len = property(lambda self: 300)


@pytest.mark.parametrize("cls", [Sized, SizedByConfig])
def test_drafts_end_where_the_drafter_has_no_positions(cls) -> None:
    speculator = cls()
    speculator_v2.adopt(speculator, Options(ops=False))
    assert speculator.max_model_len == 300
    speculator.draft_limit = 200
    assert speculator.max_model_len == 200
    speculator.draft_limit = 400
    assert speculator.max_model_len == 300


class Drafting:
    """What our class relies on in the ``propose`` of vLLM 0.31 and 0.32."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.draft_tokens = torch.zeros(4, 7)

    def propose(
        self,
        input_batch,
        aux_hidden_states=None,
        num_rejected=None,
        dummy_run=False,
        is_profile=False,
    ):
        self.calls.append("eager" if is_profile else "graph")
        self._prepare_eplb_forward(1)
        self._generate_draft(self._build_uniform_attn_metadata())
        return self.draft_tokens[: input_batch.num_reqs]

    def _prepare_eplb_forward(self, num_tokens):
        self.calls.append("eplb")

    def _build_uniform_attn_metadata(self):
        self.calls.append("metadata")
        return {}

    def _generate_draft(self, metadata):
        self.calls.append("query")


def test_no_query_pass_where_nothing_is_wanted() -> None:
    speculator = Drafting()
    speculator_v2.adopt(speculator, Options(ops=False))
    batch = SimpleNamespace(num_reqs=2)
    whole = ["graph", "eplb", "metadata", "query"]
    for wanted, calls in ((None, whole), (0, ["eager"]), (7, whole), (3, whole)):
        speculator.calls.clear()
        speculator.num_wanted = wanted
        assert speculator.propose(batch).shape == (2, 7)
        assert speculator.calls == calls
    speculator.calls.clear()
    speculator.num_wanted = 0
    speculator.propose(batch, dummy_run=True)
    assert speculator.calls == whole
    speculator.calls.clear()
    speculator.dummy_drafts = False
    assert speculator.propose(batch, dummy_run=True).shape == (2, 7)
    assert speculator.calls == []


def test_features_without_drafting() -> None:
    """Rows of padding, of a graph larger than the batch, are no features."""
    speculator = Drafting()
    speculator_v2.adopt(speculator, Options(ops=False))
    speculator.recorder, speculator.drafting = FeatureRecorder(), False
    speculator.recorder.watch({"a": 3, "b": 2})
    speculator.tap = FeatureTap(nn.Module(), torch.rand(8, 6))
    batch = SimpleNamespace(
        num_reqs=2, num_tokens=5, num_draft_tokens=0, req_ids=["b-12345678", "a-12345678"],
        query_start_loc_np=np.array([0, 2, 5, 5]), num_computed_tokens_np=np.array([0, 0]),
        positions=torch.empty(8, device="meta"),  # nothing is read from a device
    )  # fmt: skip
    given = {"aux_hidden_states": [torch.zeros(8, 1)], "num_rejected": torch.zeros(3)}
    assert speculator.propose(batch, **given).shape == (2, 7)
    assert speculator.calls == []
    assert torch.equal(speculator.recorder.take("b")[0], speculator.tap.features[:2])
    assert torch.equal(speculator.recorder.take("a")[0], speculator.tap.features[2:5])
    speculator.propose(batch, dummy_run=True)
    assert "query" in speculator.calls  # vLLM's own runs are whole


def test_a_tap_that_nothing_writes_is_an_error() -> None:
    tap = FeatureTap(nn.Module(), torch.zeros(8, 6))
    assert tap.take(5, real=False).shape == (5, 6)
    with pytest.raises(RuntimeError, match=r"wrote no features.*dflash_ops"):
        tap.take(5)


def module_with(*names: str) -> ModuleType:
    module = ModuleType("speculator")
    code = f"def prepare_dflash_inputs({', '.join(names)}):\n    calls.append('stock')\n"
    exec(code, module.__dict__)
    module.calls = []
    return module


@pytest.mark.parametrize(
    "names",
    [
        speculator_v2._PREPARE_PARAMETERS[1:],
        ("device", *speculator_v2._PREPARE_PARAMETERS),
        (*speculator_v2._PREPARE_PARAMETERS, "something_new"),
    ],
    ids=["fewer", "another first", "one more"],
)
def test_other_parameters_are_refused(names) -> None:
    with pytest.raises(ValueError, match="prepare_dflash_inputs has the parameters"):
        speculator_v2.wrap_prepare_inputs(module_with(*names).prepare_dflash_inputs)


@pytest.mark.parametrize("more", [(), ("num_reqs_override",)], ids=["0.32", "0.33"])
def test_speculators_that_are_not_ours_keep_vllms(more) -> None:
    module = module_with(*speculator_v2._PREPARE_PARAMETERS, *more)
    prepare = speculator_v2.wrap_prepare_inputs(module.prepare_dflash_inputs)
    prepare(*range(len(speculator_v2._PREPARE_PARAMETERS) + len(more)))
    assert module.calls == ["stock"]


def prepared(block_size: int, **tables) -> tuple[list[int], list[int]]:
    """Slots of two context tokens, and of the block behind them, by the table of vLLM's second group.

    Args:
        block_size: that vLLM passes.
        tables: attributes of its block tables.
    """
    ints = lambda *values: torch.tensor(values, dtype=torch.int32)  # noqa: E731
    K = 2
    slots = torch.full((2, 8), -1, dtype=torch.int64)
    speculator = SimpleNamespace(
        input_buffers=SimpleNamespace(
            input_ids=torch.zeros(8, dtype=torch.int32),
            positions=torch.zeros(8, dtype=torch.int64),
            query_start_loc=torch.zeros(3, dtype=torch.int32),
            seq_lens=torch.zeros(2, dtype=torch.int32),
        ),
        block_tables=SimpleNamespace(
            input_block_tables=[ints(1, 1, 1, 1)[None], ints(3, 5, 7, 9)[None]],
            slot_mappings=slots,
            **tables,
        ),
        draft_kv_cache_group_ids=[1],
        _context_slot_mappings=torch.full((1, 4), -1, dtype=torch.int64),
    )
    batch = SimpleNamespace(
        num_reqs=1,
        num_tokens=2,
        idx_mapping=ints(0),
        positions=torch.tensor([40, 41]),
        query_start_loc=ints(0, 2),
    )
    given = {
        "input_batch": batch,
        "input_buffers": speculator.input_buffers,
        "last_sampled": torch.tensor([[7]]),
        "next_prefill_tokens": ints(0),
        "num_sampled": ints(1),
        "num_rejected": ints(0),
        "input_temperature": torch.zeros(1),
        "input_seeds": torch.zeros(1, dtype=torch.int64),
        "num_speculative_steps": K,
        "parallel_drafting_token_id": 0,
        "max_model_len": 64,
        "context_positions": torch.zeros(4, dtype=torch.int64),
        "sample_indices": torch.zeros(4, dtype=torch.int64),
        "sample_pos": torch.zeros(4, dtype=torch.int64),
        "sample_idx_mapping": torch.zeros(4, dtype=torch.int32),
        "temperature": torch.zeros(1),
        "seeds": torch.zeros(1, dtype=torch.int64),
        "block_size": block_size,
    }
    speculator_v2._build_block(speculator, given)
    return speculator._context_slot_mappings[0, :2].tolist(), slots[1, : K + 1].tolist()


def test_slots_count_in_the_blocks_of_the_tables() -> None:
    """vLLM 0.31: a group's blocks of 32 tokens are two blocks each to a kernel that knows 16."""
    got = prepared(16, block_sizes=[16, 32], kernel_block_sizes=[16, 16])
    assert got == ([7 * 16 + 8, 7 * 16 + 9], [7 * 16 + 10, 7 * 16 + 11, 7 * 16 + 12])
    got = prepared(32, block_sizes=[16, 32])  # 0.32 and 0.33
    assert got == ([5 * 32 + 8, 5 * 32 + 9], [5 * 32 + 10, 5 * 32 + 11, 5 * 32 + 12])


def test_block_tables_of_another_unit_are_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"blocks of 16 tokens where 32 .*dflash_ops"):
        prepared(16, block_sizes=[16, 32])


@pytest.mark.parametrize("greedy", [True, False])
def test_a_draft_vocabulary_is_sampled_inside_itself(greedy) -> None:
    """Not from logits scattered over the verifier's vocabulary, unless they are needed."""
    from vllm_dflash.serving.worker.drafter_model import DrafterModel

    class Sampling(Drafting):
        use_local_argmax_reduction = False

        def sample_draft(
            self, hidden_states, positions, idx_mapping, temperature, seeds, step, draft_logits
        ):
            self.calls.append("logits")
            return hidden_states.argmax(-1)

    speculator = Sampling()
    speculator_v2.adopt(speculator, Options(ops=False, greedy_draft_vocab=greedy))
    model = DrafterModel.__new__(DrafterModel)
    nn.Module.__init__(model)
    model.lm_head = None
    model.logits_processor = lambda head, hidden: hidden
    model.draft_id_to_target_id = nn.Parameter(torch.tensor([3, 4, 5]), requires_grad=False)
    speculator.model = model
    hidden = torch.eye(3)
    got = speculator.sample_draft(hidden, None, None, None, None, None, draft_logits=None)
    assert (got.tolist(), speculator.calls) == (
        ([3, 5, 7], []) if greedy else ([0, 1, 2], ["logits"])
    )
    speculator.calls.clear()
    speculator.sample_draft(hidden, None, None, None, None, None, torch.zeros(3))
    speculator.acceptance_estimator = object()
    speculator.sample_draft(hidden, None, None, None, None, None, draft_logits=None)
    model.draft_id_to_target_id = None
    speculator.acceptance_estimator = None
    speculator.sample_draft(hidden, None, None, None, None, None, None)
    assert speculator.calls == ["logits"] * 3
