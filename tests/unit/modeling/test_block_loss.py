"""The loss by chunks of anchors against its plain form: all logits at once, gradients by autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_dflash.modeling import losses
from vllm_dflash.modeling.losses import block_loss, decay_weights, dpace_weights

LOSSES = ("dpace", "ce", "kl")


def plain(hidden, head, labels, valid, loss, gamma, alpha, verifier):
    """Total, weight, CE and what is right, in the precision of the hidden states."""
    logits = hidden @ head.T
    rows = F.cross_entropy(
        logits.flatten(0, 1), torch.where(valid, labels, -100).flatten(), reduction="none"
    )
    ce = rows.view(labels.shape)
    term = ce
    if loss == "kl":
        p, q = verifier.log_softmax(-1), logits.log_softmax(-1)
        term = torch.where(valid, (p.exp() * (p - q)).sum(-1), 0)
    weights = decay_weights(labels.shape[1], gamma).to(hidden) * valid
    if loss == "dpace":
        weights = dpace_weights(torch.exp(-ce.detach()), valid, alpha)
    right = (logits.argmax(-1) == labels) & valid
    return (term * weights).sum(), weights.sum(), ce.detach(), right


def inputs(anchors=5, num_draft=4, width=6, vocab=9, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    labels = torch.randint(vocab, (anchors, num_draft), generator=generator)
    lengths = torch.randint(num_draft + 1, (anchors, 1), generator=generator)
    valid = torch.arange(num_draft) < lengths
    labels = torch.where(valid, labels, -1)
    hidden, head = normal(anchors, num_draft, width), normal(vocab, width)
    return hidden, head, labels, valid, normal(anchors, num_draft, vocab)


@given(
    anchors=st.integers(1, 9),
    num_draft=st.integers(1, 5),
    width=st.integers(1, 7),
    vocab=st.integers(1, 12),
    anchors_a_chunk=st.integers(1, 10),
    loss=st.sampled_from(LOSSES),
    learned_head=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=120)
def test_loss_and_gradients_are_those_of_the_plain_form(
    anchors, num_draft, width, vocab, anchors_a_chunk, loss, learned_head, seed
):
    hidden, head, labels, valid, verifier = inputs(anchors, num_draft, width, vocab, seed)
    results = []
    with pytest.MonkeyPatch.context() as patch:
        one = num_draft * vocab * losses.logit_bytes(torch.float64, loss)
        patch.setattr(losses, "CHUNK_BYTES", anchors_a_chunk * one)
        for by_chunks in (True, False):
            h = hidden.clone().requires_grad_()
            w = head.clone().requires_grad_(learned_head)
            if by_chunks:
                asked = []

                def of_verifier(part, asked=asked):
                    asked.append(part)
                    return verifier[part]

                got = block_loss(
                    h,
                    w,
                    labels,
                    valid,
                    loss=loss,
                    gamma=3.0,
                    alpha=0.3,
                    verifier_logits=of_verifier,
                )
                assert len(asked) == (-(-anchors // anchors_a_chunk) if loss == "kl" else 0)
            else:
                got = plain(h, w, labels, valid, loss, 3.0, 0.3, verifier)
            # As the learner does: the whole step's weight is known at the end.
            (got[0] * 0.7).backward()
            results.append((*(t.detach() for t in got[:4]), h.grad, w.grad))
    for ours, theirs in zip(*results, strict=True):
        if theirs is None:
            assert ours is None
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("own_head", [False, True])
def test_under_autocast_it_is_the_plain_form_to_bfloat16(loss, own_head):
    hidden, head, labels, valid, verifier = inputs(64, 4, 32, 50, dtype=torch.float32)
    head = head if own_head else head.bfloat16()
    grads = []
    for by_chunks in (True, False):
        h, w = hidden.clone().requires_grad_(), head.clone().requires_grad_(own_head)
        with torch.autocast("cpu", torch.bfloat16):
            if by_chunks:
                got = block_loss(
                    h, w, labels, valid, loss=loss, gamma=3.0, verifier_logits=verifier.__getitem__
                )
            else:
                logits = F.linear(h, w).float()
                assert F.linear(h, w).dtype == torch.bfloat16
                eye = torch.eye(50)
                with torch.autocast("cpu", enabled=False):
                    got = plain(logits, eye, labels, valid, loss, 3.0, 0.5, verifier)
        (got[0] / got[1]).backward()
        grads.append((got[0].detach(), got[1], got[3], h.grad, w.grad))
    ours, theirs = grads
    assert ours[0].dtype == torch.float32
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-5, atol=0)
    assert torch.equal(ours[2], theirs[2])
    for got, want in zip(ours[3:], theirs[3:], strict=True):
        if want is None:
            assert got is None
        else:
            assert (got - want).norm() < 0.01 * want.norm()


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.parametrize("loss", LOSSES)
def test_never_more_logits_than_a_chunk_holds(loss, monkeypatch):
    hidden, head, labels, valid, verifier = inputs(40, 4, 6, 1000, dtype=torch.float32)
    monkeypatch.setattr(
        losses, "CHUNK_BYTES", 3 * 4 * 1000 * losses.logit_bytes(hidden.dtype, loss)
    )
    hidden.requires_grad_()
    with Largest() as seen:
        got = block_loss(
            hidden, head, labels, valid, loss=loss, verifier_logits=verifier.__getitem__
        )
        got.total.backward()
    assert seen.elements == 3 * 4 * 1000
    # A chunk holds an anchor at least.
    monkeypatch.setattr(losses, "CHUNK_BYTES", 1)
    assert losses.chunk_anchors(4, 1000, torch.bfloat16) == 1


@pytest.mark.parametrize("loss", LOSSES)
def test_what_is_invalid_counts_for_nothing(loss):
    hidden, head, labels, valid, verifier = inputs()
    hidden.requires_grad_()
    verifier[~valid] = float("nan")
    got = block_loss(hidden, head, labels, valid, loss=loss, verifier_logits=verifier.__getitem__)
    got.total.backward()
    assert torch.isfinite(got.total)
    assert torch.equal(hidden.grad.abs().sum(-1) > 0, valid)
    assert not got.ce_AK[~valid].any()
    assert not got.right_AK[~valid].any()
    nothing = block_loss(
        hidden, head, labels, valid & False, loss=loss, verifier_logits=verifier.__getitem__
    )
    assert (float(nothing.total.detach()), float(nothing.weight)) == (0, 0)


def test_kl_is_zero_where_the_verifier_agrees():
    hidden, head, labels, valid, _ = inputs()
    hidden.requires_grad_()
    same = hidden.detach() @ head.T + 3.0  # a constant changes no distribution
    got = block_loss(hidden, head, labels, valid, loss="kl", verifier_logits=same.__getitem__)
    got.total.backward()
    assert float(got.total.detach()) == pytest.approx(0, abs=1e-12)
    assert hidden.grad.abs().max() < 1e-12


def test_unknown_losses_and_missing_targets():
    hidden, head, labels, valid, _ = inputs()
    with pytest.raises(ValueError, match="verifier's logits"):
        block_loss(hidden, head, labels, valid, loss="kl")
    with pytest.raises(ValueError, match="'mse'"):
        block_loss(hidden, head, labels, valid, loss="mse")  # type: ignore[arg-type]


@pytest.mark.parametrize("anchors_a_chunk", [1, 3, 64])
def test_candidates_are_the_most_likely_tokens(anchors_a_chunk, monkeypatch):
    hidden, head, labels, valid, _ = inputs(8, 4, 6, 30)
    one = 4 * 30 * losses.logit_bytes(torch.float64)
    monkeypatch.setattr(losses, "CHUNK_BYTES", anchors_a_chunk * one)
    got = block_loss(hidden, head, labels, valid, num_candidates=5)
    assert torch.equal(got.candidates_AKC, (hidden @ head.T).topk(5).indices)
    assert block_loss(hidden, head, labels, valid).candidates_AKC.shape == (8, 4, 0)
