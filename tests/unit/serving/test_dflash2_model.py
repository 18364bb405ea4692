"""The served DFlash 2 drafter's own parts, without an engine."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from vllm.model_executor.models.qwen3_dflash2 import DFlash2Qwen3ForCausalLM, _grouped_conv

from helpers.acceptance import chi_square_p
from vllm_dflash.modeling.dflash2 import CandidateSelector
from vllm_dflash.serving.worker.dflash2_model import HeadDrafterModel, StepConv


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def bare(cls: type, **attributes):
    """An instance without what only an engine can make."""
    made = cls.__new__(cls)
    nn.Module.__init__(made)
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize("taps", [1, 2, 3])
def test_blocks_may_get_narrower_and_wider_again(taps):
    offsets = torch.arange(64) % 8
    base = nn.Parameter(noise(2, taps, 32), requires_grad=False)
    conv = bare(StepConv, num_groups=4, group_size=8, taps=taps, base_kernel=base, offsets=offsets)
    model = bare(HeadDrafterModel, _offsets=offsets, _width=8)
    for width, blocks in ((8, 3), (5, 4), (1, 2), (8, 8)):
        model.set_block_width(width)
        x, delta = noise(width * blocks, 32, seed=1), noise(width * blocks, taps, 4, seed=2)
        got = conv._convolve(x, delta, 1)
        want = _grouped_conv(x, delta, base[1], width, 4, 8, taps)
        torch.testing.assert_close(got, want)


@pytest.fixture
def model(monkeypatch) -> HeadDrafterModel:
    """Of 12 tokens, 3 of which are candidates; a row of hidden states is the logits."""
    selector = CandidateSelector(12, 12, 4)
    with torch.no_grad():
        for i, weight in enumerate(selector.parameters()):
            weight.copy_(noise(*weight.shape, seed=10 + i))
    selector.requires_grad_(False)

    def most_likely(self, hidden):
        values, ids = hidden.topk(3)
        return ids, values

    monkeypatch.setattr(DFlash2Qwen3ForCausalLM, "compute_candidates", most_likely)
    inner = bare(nn.Module, candidate_selector=selector)
    return bare(
        HeadDrafterModel,
        model=inner,
        draft_id_to_target_id=None,
        config=SimpleNamespace(vocab_size=12),
    )


def step_scores(model, logits: torch.Tensor, before: int) -> torch.Tensor:
    """Scores of all tokens behind one, -inf where no candidate."""
    ids = logits.topk(3).indices
    selector = model.model.candidate_selector
    scores = logits[ids] + selector(logits, torch.tensor(before), ids)
    return torch.full((12,), float("-inf")).scatter(0, ids, scores)


def test_the_greedy_walk_takes_the_best_behind_what_it_took(model):
    hidden, anchors = noise(4 * 3, 12, seed=3), torch.tensor([1, 5, 5, 11])
    tokens, confidence = model.greedy_walk(hidden, anchors, confidence=True)
    for request, before in enumerate(anchors.tolist()):
        for k in range(3):
            at = 3 * request + k
            scores = step_scores(model, hidden[at], before)
            before = int(scores.argmax())
            assert tokens[at] == before
            torch.testing.assert_close(confidence[at], scores.softmax(-1).max())
    assert model.greedy_walk(hidden, anchors)[1] is None
    assert not torch.equal(tokens, hidden.argmax(-1))


def test_a_draft_vocabularys_candidates_have_the_verifiers_ids(model):
    model.draft_id_to_target_id = torch.arange(12)  # draft id i is token 2 i
    ids, logits = model.compute_candidates(noise(5, 12))
    want = noise(5, 12).topk(3)
    assert torch.equal(ids, 2 * want.indices.sort(-1).values)
    assert torch.equal(logits.sort(-1, descending=True).values, want.values)


@pytest.mark.parametrize("temperature", [0.5, 1.5])
def test_sampled_drafts_have_the_distribution_that_is_said_of_them(model, temperature):
    one = noise(2, 12, seed=3)
    runs = 20_000
    metadata = SimpleNamespace(
        temperature=torch.full((runs + 1,), temperature), all_greedy=False, all_random=False
    )
    metadata.temperature[-1] = 0.0  # greedy, beside the others
    hidden = one.repeat(runs + 1, 1)
    anchors = torch.full((runs + 1,), 7)
    torch.manual_seed(0)
    tokens, probs = model.sampled_walk(hidden, anchors, metadata)
    greedy, _ = model.greedy_walk(one, anchors[:1])
    assert tokens[-2:].tolist() == greedy.tolist()
    tokens, probs = tokens[:-2].view(-1, 2), probs[:-2].view(-1, 2, 12)
    first = (step_scores(model, one[0], 7) / temperature).softmax(-1)
    torch.testing.assert_close(probs[:, 0], first.expand(runs, -1))
    expected = torch.zeros(12, 12)
    for token in first.nonzero().flatten().tolist():
        second = (step_scores(model, one[1], token) / temperature).softmax(-1)
        mine = tokens[:, 0] == token
        torch.testing.assert_close(probs[mine, 1], second.expand(int(mine.sum()), -1))
        expected[token] = first[token] * second
    seen = torch.bincount(tokens[:, 0] * 12 + tokens[:, 1], minlength=144).view(12, 12)
    assert not seen[expected == 0].any()
    possible = expected > 0
    assert chi_square_p(seen[possible], expected[possible].double()) > 1e-4
