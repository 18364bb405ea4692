"""Drafters of ``speculators`` and ours, read by each other: the same drafts (by its PyTorch classes)."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from helpers import tiny
from vllm_dflash.checkpoint import convert, load_weights, read_config
from vllm_dflash.config import FULL, SLIDING, CandidateHead, DrafterConfig
from vllm_dflash.training.config import Hyperparameters
from vllm_dflash.training.learner import Learner, Sample, SharedHead

pytest.importorskip(
    "speculators",
    reason="the Makefile installs it without its requirements, which would replace torch",
)
import speculators.models.dflash.core as theirs
from speculators.config import SpeculatorModelConfig
from speculators.model import SpeculatorModel

LENGTH, WINDOW = 48, 64  # a window that no context here fills: the two count it differently
IDS = (0, 1, 3)
MIXED = (SLIDING, FULL)


@pytest.fixture(scope="module")
def verifier(tmp_path_factory) -> Path:
    return tiny.make_verifier(tmp_path_factory.mktemp("speculators") / "verifier")


@pytest.fixture(scope="module")
def vocabulary(verifier) -> tuple[torch.Tensor, torch.Tensor]:
    from safetensors.torch import load_file

    weights = load_file(verifier / "model.safetensors")
    return weights["model.embed_tokens.weight"], weights["lm_head.weight"]


@pytest.fixture(scope="module")
def sample() -> Sample:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(6, tiny.VOCAB, (LENGTH,), generator=generator).tolist()
    features = torch.randn(LENGTH, 3 * 64, generator=generator)
    mask = [p >= 8 for p in range(LENGTH)]
    return Sample("one", tokens, mask, features)


@pytest.fixture
def anchors(sample, monkeypatch) -> list[int]:
    chosen = sorted(random.Random(1).sample(range(9, LENGTH - 9), 8))
    picked = (torch.tensor(chosen), torch.ones(len(chosen), dtype=torch.bool))
    monkeypatch.setattr(theirs, "select_anchors", lambda *args: picked)
    return chosen


def randomize(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.startswith(("embed_tokens", "lm_head", "verifier_")):
                continue
            std, mean = (0.3, 1.0) if "norm" in name else (0.15, 0.0)
            weight.copy_(mean + std * torch.randn(weight.shape, generator=generator))


def our_logits(folder: Path, vocabulary, sample: Sample, anchors: list[int]) -> torch.Tensor:
    """``[anchors, drafted positions, draft vocabulary]``, as a checkpoint folder is read."""
    config = DrafterConfig.from_dict(read_config(folder))
    weights = load_weights(folder, config)
    ids = weights["d2t"] + torch.arange(len(weights["d2t"])) if "d2t" in weights else None
    head = SharedHead(*vocabulary, ids, weights.get("lm_head.weight"))
    hparams = Hyperparameters(autocast="float32", codebooks="free")
    learner = Learner(config, hparams, head, 1)
    learner.load_drafter(weights)
    with torch.no_grad():
        return head.logits(learner.drafter, learner._forward([sample], [anchors])[0])


def their_logits(model, sample: Sample, anchors: list[int]) -> torch.Tensor:
    model.eval().float()
    with torch.no_grad():
        logits = model._backbone_forward(
            sample.features_TF.unsqueeze(0),
            torch.tensor([sample.token_ids]),
            torch.tensor([sample.loss_mask]),
            torch.zeros(1, LENGTH, 64),
            torch.zeros(1, LENGTH, dtype=torch.int64),
            torch.arange(LENGTH).unsqueeze(0),
            max_anchors=len(anchors),
        )[1]
    first = 0 if model.config.sample_from_anchor else 1
    return logits.view(len(anchors), model.block_size, -1)[:, first:]


def load_theirs(folder: Path):
    config = SpeculatorModelConfig.from_pretrained(str(folder))
    # Flex attention, their default, does not compile on a CPU.
    config.transformer_layer_config._attn_implementation = "sdpa"
    return SpeculatorModel.from_pretrained(str(folder), config=config)


def assert_equal_drafts(left: torch.Tensor, right: torch.Tensor) -> None:
    assert left.shape == right.shape
    assert torch.equal(left.argmax(-1), right.argmax(-1))
    torch.testing.assert_close(left, right, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("small", [False, True], ids=["full vocabulary", "draft vocabulary"])
@pytest.mark.parametrize(
    ("kinds", "changes"),
    [
        ((FULL, FULL), {}),
        ((FULL, FULL), {"sliding_window_non_causal": True}),
        ((SLIDING, SLIDING), {}),
        ((SLIDING, SLIDING), {"sliding_window_non_causal": True}),
        (MIXED, {}),
        (MIXED, {"sliding_window_non_causal": True}),
        ((FULL, FULL), {"sample_from_anchor": True}),
    ],
    ids=str,
)
def test_theirs_read_by_ours(
    kinds, changes, small, verifier, vocabulary, sample, anchors, tmp_path
) -> None:
    from speculators.train.cli import create_transformer_layer_config

    full = [i for i, kind in enumerate(kinds) if kind == FULL]
    layers = create_transformer_layer_config(str(verifier), 2, "qwen3", "silu", WINDOW, full)
    t2d = d2t = None
    if small:
        ids = torch.arange(10, 210)
        t2d, d2t = torch.zeros(tiny.VOCAB, dtype=torch.bool), ids - torch.arange(200)
        t2d[ids] = True
    model = SpeculatorModel.registry["dflash"].from_training_args(
        layers,
        t2d=t2d,
        d2t=d2t,
        draft_vocab_size=200 if small else tiny.VOCAB,
        block_size=8,
        verifier_name_or_path=str(verifier),
        target_layer_ids=[i + 1 for i in IDS],
        mask_token_id=5,
        draft_attn_impl="sdpa",
        **changes,
    )
    randomize(model)
    model.save_pretrained(tmp_path / "theirs")
    want = their_logits(model, sample, anchors)
    assert_equal_drafts(our_logits(tmp_path / "theirs", vocabulary, sample, anchors), want)
    config, _ = convert(tmp_path / "theirs", tmp_path / "zlab", "zlab")
    assert config.dtype == "float32"
    assert_equal_drafts(our_logits(tmp_path / "zlab", vocabulary, sample, anchors), want)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"draft_vocab_size": 200},
        {"layer_types": (SLIDING, SLIDING), "sliding_window": WINDOW},
        {"layer_types": (SLIDING, SLIDING), "sliding_window": WINDOW, "causal": False},
        {"layer_types": MIXED, "sliding_window": WINDOW},
        {"sample_from_anchor": True},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        {"attention_bias": True},
        {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
    ],
    ids=str,
)
def test_ours_read_by_theirs(changes, verifier, vocabulary, sample, anchors, tmp_path) -> None:
    source = tiny.make_drafter(tmp_path / "ours", verifier, target_layer_ids=IDS, **changes)
    convert(source, tmp_path / "spec", "speculators")
    model = load_theirs(tmp_path / "spec")
    got = their_logits(model, sample, anchors)
    assert_equal_drafts(our_logits(source, vocabulary, sample, anchors), got)
    # Saved again by theirs, it is still the same drafter.
    model.save_pretrained(tmp_path / "again")
    assert_equal_drafts(our_logits(tmp_path / "again", vocabulary, sample, anchors), got)


def test_the_two_count_a_window_differently(
    verifier, vocabulary, sample, anchors, tmp_path
) -> None:
    """What ``convert`` and ``inspect`` say of it; where this fails, they need not say it any more."""
    window = {"layer_types": (SLIDING, SLIDING), "sliding_window": 6}
    source = tiny.make_drafter(tmp_path / "ours", verifier, target_layer_ids=IDS, **window)
    _, remarks = convert(source, tmp_path / "spec", "speculators")
    assert any("from the anchor by speculators" in r for r in remarks)
    got = their_logits(load_theirs(tmp_path / "spec"), sample, anchors)
    ours = our_logits(source, vocabulary, sample, anchors)
    # The first drafted token sees one row less, the last one as many as its place in the block.
    assert not torch.allclose(ours, got, atol=1e-3)


def selected(selector, logits: torch.Tensor, hidden: torch.Tensor, before: torch.Tensor):
    """Scores of a position's candidates, by token; theirs has its own way to take candidates."""
    with torch.no_grad():
        ids, scores = selector.select(logits, hidden, before)
    return torch.full_like(logits, float("-inf")).scatter(-1, ids, scores)


@pytest.mark.parametrize("back", [False, True], ids=["ours by theirs", "and theirs by ours"])
@pytest.mark.parametrize(
    "changes", [{}, {"layer_types": (SLIDING, SLIDING), "sliding_window": WINDOW, "causal": False}]
)
def test_dflash2(changes, back, verifier, vocabulary, sample, anchors, tmp_path) -> None:
    """The head too: convolutions by the logits, the selector by its scores behind any token."""
    head = CandidateHead(selector_rank=8, selector_top_k=6)
    ours = tiny.make_drafter(
        tmp_path / "ours", verifier, target_layer_ids=IDS, head=head, **changes
    )
    convert(ours, tmp_path / "spec", "speculators")
    model = load_theirs(tmp_path / "spec")
    assert type(model).__name__ == "DFlash2DraftModel"
    if back:
        randomize(model)
        with torch.no_grad():
            for book in ("predecessor_codebook", "successor_codebook"):
                getattr(model.candidate_selector, book).mul_(6)
        model.save_pretrained(tmp_path / "theirs")
        ours = tmp_path / "theirs"
    got = their_logits(model, sample, anchors)
    assert_equal_drafts(our_logits(ours, vocabulary, sample, anchors), got)
    config = DrafterConfig.from_dict(read_config(ours))
    assert config.head == head
    plain = got.argmax(-1)
    from vllm_dflash.modeling.dflash2 import CandidateSelector, top_candidates

    weights = load_weights(ours, config)
    mine = CandidateSelector(tiny.VOCAB, config.hidden_size, head.selector_rank)
    mine.load_state_dict(
        {n.partition(".")[2]: w for n, w in weights.items() if n.startswith("candidate_selector")}
    )
    hidden = torch.randn(len(anchors), 7, config.hidden_size)
    before = torch.randint(0, tiny.VOCAB, plain.shape)
    theirs_scores = selected(model.candidate_selector, got, hidden, before)
    with torch.no_grad():
        ids, values = top_candidates(got, head.selector_top_k)
        scores = values + mine(hidden, before, ids)
    torch.testing.assert_close(theirs_scores.gather(-1, ids), scores, atol=1e-4, rtol=1e-4)
    assert not torch.equal(theirs_scores.argmax(-1), plain), "the selector changes nothing"


def test_dflash2_of_a_draft_vocabulary_stays_in_z_labs_format(verifier, tmp_path) -> None:
    head = CandidateHead(selector_rank=8, selector_top_k=6)
    made = tiny.make_drafter(tmp_path / "ours", verifier, head=head, draft_vocab_size=200)
    with pytest.raises(ValueError, match=r"draft vocabulary \(200 of 384"):
        convert(made, tmp_path / "spec", "speculators")


def test_other_kinds_of_theirs_are_named(tmp_path) -> None:
    config = DrafterConfig(64, 2, 2, 1, 32, 96, 384, 8, (0, 1), 5, verifier="v")
    for kind, name in (("xpress", "XPress"), ("dspark", "DSpark")):
        raw = json.loads(json.dumps(config.to_dict("speculators"))) | {
            "speculators_model_type": kind
        }
        with pytest.raises(ValueError, match=name):
            DrafterConfig.from_dict(raw)
