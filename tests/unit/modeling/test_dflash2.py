"""DFlash 2's head in plain PyTorch: its equations, vLLM's functions, and that a neutral one is no head."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from test_modeling import ANCHORS, CONFIG, LENGTHS, make_inputs, run

from vllm_dflash.config import CandidateHead
from vllm_dflash.modeling.dflash2 import (
    CandidateSelector,
    FactoredSelector,
    GroupedConv,
    greedy_walk,
    multiplied_out,
    scores_on_path,
    top_candidates,
    transition_scores,
)
from vllm_dflash.modeling.drafter import Drafter

HEAD = CandidateHead(conv_kernel_size=2, conv_group_size=4, selector_rank=5, selector_top_k=6)
VOCAB, WIDTH, RANK = CONFIG.vocab_size, CONFIG.hidden_size, HEAD.selector_rank


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_conv(taps: int, seed: int = 0) -> GroupedConv:
    conv = GroupedConv(WIDTH, CandidateHead(conv_kernel_size=taps, conv_group_size=4))
    with torch.no_grad():
        conv.base_kernel.copy_(noise(2, taps, WIDTH, seed=seed))
        weight = conv.kernel_projection.weight
        weight.copy_(0.3 * noise(*weight.shape, seed=seed + 1))
    return conv


def random_selector(seed: int = 0) -> CandidateSelector:
    selector = CandidateSelector(VOCAB, WIDTH, RANK)
    with torch.no_grad():
        for i, weight in enumerate(selector.parameters()):
            weight.copy_(noise(*weight.shape, seed=seed + i))
    return selector


# ---- convolutions ----


@torch.no_grad()
@pytest.mark.parametrize("taps", [1, 2, 3])
def test_convolutions_follow_the_equations(taps):
    """u[b,c] = sum_t (base[t,c] + d[b,t,c // 4]) x[b-t,c], nothing from in front of the block."""
    conv, x, y = random_conv(taps), noise(3, 4, WIDTH, seed=5), noise(3, 4, WIDTH, seed=6)
    u, kernels = conv.prepare(x)
    z = conv.finish(y, kernels)
    d = (x @ conv.kernel_projection.weight.T).view(3, 4, 2, taps, WIDTH // 4)
    for side, given, got in ((0, x, u), (1, y, z)):
        want = torch.zeros_like(x)
        for a, b, c, t in product(range(3), range(4), range(WIDTH), range(taps)):
            if b >= t:
                kernel = conv.base_kernel[side, t, c] + d[a, b, side, t, c // 4]
                want[a, b, c] += kernel * given[a, b - t, c]
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("block", [4, 7, 8])
def test_convolutions_are_vllms(block):
    from vllm.model_executor.models.qwen3_dflash2 import _grouped_conv

    conv, x = random_conv(2), noise(3, block, WIDTH, seed=5)
    rows = x.flatten(0, 1)
    delta = conv.kernel_projection(rows).view(-1, 2, 2, WIDTH // 4)
    for side, got in ((0, conv.prepare(x)[0]), (1, conv.finish(x, conv.prepare(x)[1]))):
        base = conv.base_kernel[side]
        want = _grouped_conv(rows, delta[:, side], base, block, WIDTH // 4, 4, 2)
        assert torch.equal(got.flatten(0, 1), want)


# ---- selector ----


@torch.no_grad()
def test_scores_are_vllms():
    from vllm.model_executor.models.qwen3_dflash2 import _score_edges

    selector, hidden, logits = random_selector(), noise(3, 4, WIDTH, seed=7), noise(3, 4, VOCAB)
    anchors = torch.tensor([1, 7, 30])
    ids, values = top_candidates(logits, 6)
    context = selector.hidden_projection(hidden)
    tables = (selector.predecessor_codebook, selector.successor_codebook)
    got = transition_scores(*tables, context, ids, values, anchors)
    want = _score_edges(*tables, ids, values, context, anchors, 6)
    torch.testing.assert_close(got, want)
    path = greedy_walk(got)
    # Walked by hand, a token at a time, by the module's own scores.
    for a in range(3):
        before = anchors[a]
        for k in range(4):
            scores = values[a, k] + selector(hidden[a, k], before, ids[a, k])
            torch.testing.assert_close(scores_on_path(got, path)[a, k], scores)
            before = ids[a, k, scores.argmax()]
            assert ids[a, k, path[a, k]] == before


def test_of_equal_candidates_the_first_is_taken_as_without_a_selector():
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0, 2.0, -1.0]])
    ids, values = top_candidates(logits, 4)
    assert ids.tolist() == [[1, 2, 3, 4]]
    assert values.tolist() == [[2.0, 1.0, 2.0, 2.0]]
    assert ids[0, values.argmax()] == logits.argmax()


@torch.no_grad()
@pytest.mark.parametrize("some", [None, [3, 4, 10, 44, 49, 2, 0]], ids=["all", "draft vocabulary"])
def test_factored_codebooks_multiply_out(some):
    width = 10
    embedding, lm_head = noise(VOCAB, width, seed=1), noise(VOCAB, width, seed=2)
    ids = None if some is None else torch.tensor(sorted(some))
    rows = lm_head if ids is None else lm_head[ids]
    factored = FactoredSelector(width, WIDTH, RANK)
    factored.init_projections(embedding, rows)
    factored.hidden_projection.weight.copy_(noise(RANK, WIDTH, seed=3))
    named = {f"candidate_selector.{n}": p for n, p in factored.named_parameters()}
    weights = multiplied_out(named, embedding, rows, ids)
    stock = CandidateSelector(VOCAB, WIDTH, RANK)
    stock.load_state_dict({n.partition(".")[2]: w for n, w in weights.items()})
    hidden, before = noise(5, WIDTH, seed=4), torch.tensor([0, 9, 33, 49, 9])
    local = torch.tensor([[0, 3, 5], [1, 2, 6], [6, 5, 4], [0, 1, 2], [2, 2, 2]])
    candidates = local if ids is None else ids[local]
    got = factored(hidden, embedding[before], rows[local])
    torch.testing.assert_close(got, stock(hidden, before, candidates), atol=1e-4, rtol=1e-4)
    assert float(got.abs().min()) > 0
    # The start: columns of one length, as far as the table has directions.
    table = weights["candidate_selector.predecessor_codebook"]
    torch.testing.assert_close(table.square().mean(0), torch.ones(RANK), atol=1e-3, rtol=1e-3)
    assert multiplied_out(weights, embedding, rows, ids) == weights


# ---- the drafter ----


def with_head(factored: bool = False) -> tuple[Drafter, Drafter]:
    """A drafter and the same with a fresh head."""
    drafters = []
    for config in (CONFIG, CONFIG.with_(head=HEAD)):
        drafter = Drafter(config, factored=factored)
        drafter.init_weights(std=0.3, generator=torch.Generator().manual_seed(4))
        drafter.init_vocab_weights(noise(VOCAB, 10, seed=1), noise(VOCAB, 10, seed=2))
        drafters.append(drafter)
    return drafters[0], drafters[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_fresh_head_changes_no_bit(dtype):
    plain, head = (drafter.to(dtype) for drafter in with_head())
    embeds, features = (x.to(dtype) for x in make_inputs(9, sum(LENGTHS)))
    want = run(plain, embeds, features, ANCHORS, LENGTHS)
    got = run(head, embeds, features, ANCHORS, LENGTHS)
    assert torch.equal(got, want)
    logits = want[:, 1:] @ plain.lm_head.weight.T
    ids, values = top_candidates(logits, 6)
    selector = head.candidate_selector
    for book in (selector.predecessor_codebook, selector.successor_codebook):
        torch.nn.init.normal_(book)
    scores = transition_scores(
        selector.predecessor_codebook,
        selector.successor_codebook,
        selector.hidden_projection(got[:, 1:]),
        ids,
        values,
        torch.arange(9),
    )
    drafted = ids.gather(-1, greedy_walk(scores).unsqueeze(-1)).squeeze(-1)
    assert torch.equal(drafted, logits.argmax(-1))


def test_every_weight_of_the_head_reaches_the_output():
    _, drafter = with_head(factored=True)
    with torch.no_grad():
        for name, weight in drafter.named_parameters():
            if "conv" in name or "candidate" in name:
                weight.add_(0.1 * noise(*weight.shape))
    embeds, features = make_inputs(9, sum(LENGTHS))
    from vllm_dflash.modeling.blocks import BlockLayout

    layout = BlockLayout.build(ANCHORS, LENGTHS, embeds.shape[1])
    hidden = drafter(embeds, features, layout.context_positions_T, layout)
    rows = noise(9, 4, 10, seed=8), noise(9, 4, 6, 10, seed=9)
    drafter.candidate_selector(hidden, *rows).sum().backward()
    missing = [n for n, p in drafter.named_parameters() if p.grad is None]
    assert missing == ["embed_tokens.weight", "lm_head.weight"]
    assert all(p.grad.abs().max() > 0 for p in drafter.parameters() if p.grad is not None)


@torch.no_grad()
def test_a_recomputed_mlp_is_the_same_with_convolutions():
    _, drafter = with_head()
    for name, weight in drafter.named_parameters():
        if "conv" in name:
            weight.add_(0.1 * noise(*weight.shape))
    embeds, features = make_inputs(9, sum(LENGTHS))
    want = run(drafter, embeds, features, ANCHORS, LENGTHS)
    drafter.checkpoint_mlps(True)
    with torch.enable_grad():
        from vllm_dflash.modeling.blocks import BlockLayout

        layout = BlockLayout.build(ANCHORS, LENGTHS, embeds.shape[1])
        got = drafter(embeds, features, layout.context_positions_T, layout)
    assert torch.equal(got.detach(), want)
