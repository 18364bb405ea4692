"""How DFlash 2's head learns: loss, codebooks in both forms, a start from a plain drafter, acceptance."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_learner import (
    BLOCK,
    CONFIG,
    HIDDEN,
    VOCAB,
    assert_same,
    make_head,
    make_learner,
    make_sample,
)

from helpers import tiny
from vllm_dflash.checkpoint import load_weights, save_drafter
from vllm_dflash.config import CandidateHead
from vllm_dflash.modeling import losses
from vllm_dflash.modeling.losses import decay_weights
from vllm_dflash.training import selector as selecting
from vllm_dflash.training.learner import Learner, Sample

HEAD = CandidateHead(conv_group_size=8, selector_rank=6, selector_top_k=4)
WITH_HEAD = CONFIG.with_(head=HEAD)
DRAFT_IDS = list(range(2, VOCAB, 2))


def stir(learner: Learner, seed: int = 0) -> None:
    """A head that changes things."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in learner.drafter.named_parameters():
            if "conv" in name or "candidate" in name:
                weight.add_(0.3 * torch.randn(weight.shape, generator=generator))


def exported(learner: Learner, folder) -> dict[str, torch.Tensor]:
    save_drafter(folder, learner.config, learner.weights() | learner.head.checkpoint_tensors())
    return load_weights(folder, learner.config)


@pytest.mark.parametrize("codebooks", ["factored", "free"])
@pytest.mark.parametrize("ids", [None, DRAFT_IDS], ids=["all", "draft vocabulary"])
@pytest.mark.parametrize("loss", ["ce", "dpace"])
def test_the_loss_is_that_of_the_equations(codebooks, ids, loss):
    config = WITH_HEAD.with_(draft_vocab_size=None if ids is None else len(ids))
    learner = make_learner(config, make_head(ids), codebooks=codebooks, loss=loss)
    stir(learner)
    # Of a mix of tokens that are in the draft vocabulary.
    sample = make_sample(1, length=30)
    sample = replace(sample, token_ids=[2 * (t // 2) + 2 * (t < 2) for t in sample.token_ids])
    anchors = [5, 9, 21, 27]
    head = learner.head
    hidden, labels, valid = learner._forward([sample], [anchors])
    logits = head.logits(learner.drafter, hidden)
    weights = learner.weights()
    A, B = (weights[f"candidate_selector.{b}_codebook"] for b in ("predecessor", "successor"))
    projected = hidden @ weights["candidate_selector.hidden_projection.weight"].T
    total, weight, right = torch.zeros(()), torch.zeros(()), []
    for a, k in valid.nonzero().tolist():
        ids_here = logits[a, k].topk(4).indices.tolist()
        label = int(labels[a, k])
        if label not in ids_here:
            right.append((a, k, False, 0.0, label))
            continue
        before = sample.token_ids[anchors[a] + k]
        context = A[before] * projected[a, k]
        scores = torch.stack(
            [logits[a, k, c] + context @ B[head.tokens(torch.tensor(c))] for c in ids_here]
        )
        probability = scores.softmax(-1)[ids_here.index(label)]
        right.append((a, k, ids_here[scores.argmax()] == label, probability, label))
    assert 0 < sum(isinstance(p, float) for *_, p, _ in right) < len(right)
    # Weights: those of the loss; dpace's by each term's own probabilities.
    learner.drafter.zero_grad()
    got, _ = learner._backward([sample], [anchors])
    q_selector, q_unary = torch.ones(valid.shape), torch.ones(valid.shape)
    for a, k, _, probability, label in right:
        q_selector[a, k] = probability
        q_unary[a, k] = logits[a, k].softmax(-1)[label]
    for q in (q_unary, q_selector):
        # A label that is no candidate teaches nothing; the blocks end there.
        ce = torch.where(q > 0, -q.clamp_min(1e-30).log(), 0)
        if loss == "ce":
            w = decay_weights(BLOCK - 1, learner.gamma) * valid
        else:
            w = losses.dpace_weights(q.detach(), valid, 0.5)
        total = total + (w * ce).sum()
        weight = weight if weight > 0 else w.sum()
    torch.testing.assert_close(got.total, total, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got.weight, weight, atol=1e-4, rtol=1e-4)
    assert got.right_AK.nonzero().tolist() == [[a, k] for a, k, is_right, *_ in right if is_right]
    grads = {n: p.grad.clone() for n, p in learner.drafter.named_parameters() if p.requires_grad}
    learner.drafter.zero_grad()
    if codebooks == "free":
        total.backward()
        for n, p in learner.drafter.named_parameters():
            if p.requires_grad and "codebook" not in n and "hidden_projection" not in n:
                torch.testing.assert_close(grads[n], p.grad, atol=1e-4, rtol=1e-3)
    assert all(g.abs().max() > 0 for g in grads.values())


def test_the_selectors_part_in_chunks_is_the_same(monkeypatch):
    whole, parts = (make_learner(WITH_HEAD) for _ in range(2))
    sample, anchors = make_sample(1, length=20), [list(range(4, 18))]
    for learner in (whole, parts):
        stir(learner)
        for step in range(15):
            learner.step(step, [sample])
    want, _ = whole._backward([sample], anchors)
    monkeypatch.setattr(selecting, "CHUNK_BYTES", 2 * (BLOCK - 1) * 4 * HIDDEN * 4)
    got, _ = parts._backward([sample], anchors)
    torch.testing.assert_close(got.total, want.total)
    assert torch.equal(got.right_AK, want.right_AK)
    assert want.right_AK.any()
    for (name, p), q in zip(
        whole.drafter.named_parameters(), parts.drafter.parameters(), strict=True
    ):
        if p.requires_grad:
            torch.testing.assert_close(q.grad, p.grad, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("codebooks", ["factored", "free"])
def test_two_samples_are_learned_by_heart(codebooks):
    learner = make_learner(WITH_HEAD, codebooks=codebooks, total_steps=60)
    samples = [make_sample(1), make_sample(2)]
    figures = [learner.step(step, samples) for step in range(60)]
    assert figures[-1]["loss"] < 0.3 * figures[0]["loss"]
    drafter = learner.serving_drafter(torch.float32)
    got = learner.accept(drafter, samples[0], BLOCK - 1, torch.float32)
    assert got.num_drafts == 3
    before, _, right = got.selected
    assert right == before > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_fresh_head_drafts_as_the_drafter_that_it_was_given_to(dtype, tmp_path):
    plain = make_learner()
    for step in range(5):
        plain.step(step, [make_sample(1)])
    save_drafter(tmp_path / "plain", CONFIG, plain.weights())
    start = load_weights(tmp_path / "plain", CONFIG)
    given = make_learner(WITH_HEAD, seed=7)
    given.load_drafter(start)
    for name, weight in plain.drafter.named_parameters():
        assert torch.equal(weight, given.drafter.get_parameter(name)), name
    served, with_head = plain.serving_drafter(dtype), given.serving_drafter(dtype)
    for seed in (1, 2, 3):
        sample = make_sample(seed, length=60)
        want = plain.accept(served, sample, BLOCK - 1, dtype)
        got = given.accept(with_head, sample, BLOCK - 1, dtype)
        assert got.delivered == want.delivered
        assert got.right_per_position == want.right_per_position
        positions, unary, selected = got.selected
        assert positions > 0
        assert unary == selected
    assert "selector_lift" not in want.as_dict()
    assert got.as_dict()["selector_lift"] == 0


def test_the_option_makes_a_head_or_gives_one(tmp_path):
    from vllm_dflash.training.config import DrafterShape, TrainConfig
    from vllm_dflash.training.planning import drafter_config
    from vllm_dflash.verifier import Verifier

    verifier = tiny.make_verifier(tmp_path / "verifier")
    plain = tiny.make_drafter(tmp_path / "plain", verifier, draft_vocab_size=256)
    loaded = Verifier(str(verifier))

    def made(shape: DrafterShape, init_from=None):
        config = TrainConfig(
            verifier=loaded, data="d", output=tmp_path / "o", init_from=init_from, shape=shape
        )
        return drafter_config(config, loaded.load_config())

    asked = DrafterShape(head="dflash2")
    given = made(asked, str(plain))
    assert given.head == CandidateHead(selector_rank=16)
    assert given.with_(head=None) == made(DrafterShape(), str(plain))
    sizes = {"num_layers": 2, "num_target_layers": 3, "draft_vocab": 10}
    assert made(DrafterShape(**sizes)).head is None
    head = made(DrafterShape(head="dflash2", **sizes)).head
    assert head == CandidateHead(selector_rank=16, selector_top_k=10)
    with pytest.raises(ValueError, match="only dflash2"):
        DrafterShape(head="dspark")


def test_a_drafter_to_start_from_is_whole():
    with pytest.raises(ValueError, match=r"lacks fc\.weight"):
        make_learner(WITH_HEAD).load_drafter(
            {n: w for n, w in make_learner().weights().items() if n != "fc.weight"}
        )


@pytest.mark.parametrize("ids", [None, DRAFT_IDS], ids=["all", "draft vocabulary"])
def test_factored_codebooks_are_found_again(ids, tmp_path):
    config = WITH_HEAD.with_(draft_vocab_size=None if ids is None else len(ids), dtype="bfloat16")
    first = make_learner(config, make_head(ids))
    stir(first)
    weights = exported(first, tmp_path / "d")
    again = make_learner(config, make_head(ids), seed=3)
    again.load_drafter(weights)
    for name, weight in first.weights().items():
        torch.testing.assert_close(again.weights()[name], weight, atol=3e-2, rtol=2e-2, msg=name)
    # Free ones are taken as they are, and need be no projections.
    free = make_learner(config, make_head(ids), codebooks="free")
    free.load_drafter(weights)
    assert_same(free.weights(), {n: weights[n].float() for n in free.weights()})
    stir(free)
    with pytest.raises(ValueError, match="--codebooks free"):
        again.load_drafter(exported(free, tmp_path / "free"))


def test_both_forms_start_alike():
    factored, free = (make_learner(WITH_HEAD, codebooks=c) for c in ("factored", "free"))
    assert_same(factored.weights(), free.weights())
    book = free.weights()["candidate_selector.successor_codebook"]
    assert float(book.abs().mean()) > 0.1


@pytest.mark.parametrize("from_anchor", [False, True])
def test_acceptance_walks_the_selector(from_anchor):
    """Token by token, as a server would draft."""
    config = WITH_HEAD.with_(sample_from_anchor=from_anchor)
    learner = make_learner(config)
    stir(learner)
    with torch.no_grad():
        learner.drafter.candidate_selector.hidden_projection.weight.mul_(3)
    sample = make_sample(1, length=40)
    drafter = learner.serving_drafter(torch.float32)
    weights = learner.weights()
    A, B = (weights[f"candidate_selector.{b}_codebook"] for b in ("predecessor", "successor"))
    K = learner.num_draft_tokens
    anchors = list(range(4, 39))
    with torch.no_grad():
        hidden, _, _ = learner._forward([sample], [anchors])
        logits = learner.head.logits(drafter, hidden)
        projected = F.linear(hidden, weights["candidate_selector.hidden_projection.weight"])
    differs = 0
    for a, p in enumerate(anchors):
        before, drafted = sample.token_ids[p], []
        for k in range(K):
            values, ids = logits[a, k].topk(4)
            scores = values + B[ids] @ (A[before] * projected[a, k])
            before = int(ids[scores.argmax()])
            drafted.append(before)
        differs += drafted != logits[a].argmax(-1).tolist()
        with torch.no_grad():
            got = learner._select(
                drafter, hidden[a : a + 1], logits[a : a + 1], torch.tensor([sample.token_ids[p]])
            )
        assert got[0].tolist() == drafted
    assert differs > 10
    # And those drafts are the ones that are counted: a response of them is accepted.
    anchor = torch.tensor([sample.token_ids[4]])
    with torch.no_grad():
        draft = learner._select(drafter, hidden[:1], logits[:1], anchor)[0].tolist()
    ids = [*sample.token_ids[:5], *draft]
    mine = Sample(
        "mine", ids, [p >= 4 for p in range(len(ids))], sample.features_TF[: len(ids) - 1]
    )
    assert learner.accept(drafter, mine, K, torch.float32).delivered == [K]


def test_state_of_a_head_resumes_bit_for_bit(tmp_path):
    straight, resumed = (make_learner(WITH_HEAD, ema_decay=0.9) for _ in range(2))
    samples = [make_sample(1), make_sample(2)]
    for step in range(6):
        straight.step(step, samples)
        if step == 2:
            straight.save_state(tmp_path / "state")
    resumed.load_state(tmp_path / "state")
    for step in range(3, 6):
        resumed.step(step, samples)
    assert_same(resumed.weights(), straight.weights())
