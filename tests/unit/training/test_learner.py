"""The training step, teacher-forced acceptance, and resuming bit for bit."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_dflash.checkpoint import load_weights, save_drafter
from vllm_dflash.config import DrafterConfig
from vllm_dflash.modeling.drafter import Drafter
from vllm_dflash.modeling.losses import dpace_weights
from vllm_dflash.training import learner as learner_module
from vllm_dflash.training.config import Hyperparameters, StepLayout
from vllm_dflash.training.learner import Learner, Sample, SharedHead, block_targets

VOCAB, HIDDEN, BLOCK = 40, 24, 4
CONFIG = DrafterConfig(
    hidden_size=HIDDEN,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=12,
    intermediate_size=48,
    vocab_size=VOCAB,
    draft_block_size=BLOCK,
    target_layer_ids=(1, 2),
    mask_token_id=VOCAB - 1,
    dtype="float32",
)
HPARAMS = Hyperparameters(lr=5e-3, num_anchors=16, autocast="float32", warmup_ratio=0.0)


def make_head(draft_ids: list[int] | None = None, dtype=torch.float32) -> SharedHead:
    generator = torch.Generator().manual_seed(9)
    embedding = torch.randn(VOCAB, HIDDEN, generator=generator).to(dtype)
    lm_head = torch.randn(VOCAB, HIDDEN, generator=generator).to(dtype)
    return SharedHead(embedding, lm_head, None if draft_ids is None else torch.tensor(draft_ids))


def make_sample(seed: int, prompt: int = 4, length: int = 14, final: bool = False) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCAB - 1, (length,), generator=generator).tolist()
    features = torch.randn(length - 1, CONFIG.num_features, generator=generator)
    states = torch.randn(length - 1, HIDDEN, generator=generator) if final else None
    return Sample(f"s{seed}", ids, [p >= prompt for p in range(length)], features, states)


def make_learner(
    config=CONFIG, head=None, total_steps: int = 100, ranks=None, **hparams
) -> Learner:
    head = head or make_head()
    made = Learner(config, replace(HPARAMS, **hparams), head, total_steps, ranks=ranks)
    made.verifier_logits = lambda states: states @ head.verifier_lm_head.T
    return made


def forward(learner: Learner, sample: Sample, anchors: list[int]):
    """Logits ``[A, K, V]``, labels and validity ``[A, K]``."""
    hidden, labels, valid = learner._forward([sample], [anchors])
    return learner.head.logits(learner.drafter, hidden), labels, valid


def snapshot(learner: Learner) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in learner.drafter.named_parameters()}


def assert_same(left: dict, right: dict) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def mask_of(text: str) -> list[bool]:
    return [c == "x" for c in text]


def bare_sample(mask: str, num_features: int | None = None) -> Sample:
    rows = len(mask) - 1 if num_features is None else num_features
    ids = list(range(100, 100 + len(mask)))
    return Sample("bare", ids, mask_of(mask), torch.zeros(rows, CONFIG.num_features))


# ---- which positions ----


@pytest.mark.parametrize(
    ("mask", "rows", "anchors", "spans"),
    [
        ("...xxxx", None, [3, 4, 5], [(3, 7)]),
        ("..xx..xxx.", None, [2, 6, 7], [(2, 4), (6, 9)]),
        ("..x..x", None, [], [(2, 3), (5, 6)]),
        ("xx", None, [0], [(0, 2)]),
        ("......", None, [], []),
        (".xxxxx", 2, [1, 2], [(1, 6)]),  # a block needs the features of every earlier position
        ("x", None, [], [(0, 1)]),
    ],
)
def test_anchors_are_generated_tokens_with_a_generated_successor(mask, rows, anchors, spans):
    sample = bare_sample(mask, rows)
    assert sample.anchor_candidates() == anchors
    assert sample.response_spans() == spans


@given(st.text("x.", min_size=2, max_size=14), st.integers(1, 6))
@settings(max_examples=80)
def test_block_targets_by_brute_force(mask, num_draft):
    sample = bare_sample(mask)
    anchors = list(range(len(mask) - 1))
    tokens, valid = block_targets([sample], [anchors], num_draft)
    assert tokens.shape == valid.shape == (len(anchors), num_draft)
    for row, p in enumerate(anchors):
        for k in range(num_draft):
            at = p + 1 + k
            inside = at < len(mask) and all(mask[i] == "x" for i in range(p + 1, at + 1))
            assert bool(valid[row, k]) == inside
            if inside:
                assert int(tokens[row, k]) == 100 + at


def test_block_targets_of_several_samples():
    samples = [bare_sample("xxxx"), bare_sample(".xxx.")]
    tokens, valid = block_targets(samples, [[0], [1, 2]], 2)
    assert tokens[valid].tolist() == [101, 102, 102, 103, 103]
    assert valid.tolist() == [[True, True], [True, True], [True, False]]


def test_anchors_are_random_but_fixed_by_seed_step_and_sample():
    learner = make_learner(num_anchors=5)
    sample = make_sample(1, length=40)
    picks = [learner.pick_anchors(step, sample) for step in range(6)]
    assert picks == [make_learner(num_anchors=5).pick_anchors(step, sample) for step in range(6)]
    assert len({tuple(p) for p in picks}) == 6
    for pick in picks:
        assert pick == sorted(set(pick))
        assert len(pick) == 5
        assert set(pick) <= set(sample.anchor_candidates())
    assert picks[0] != make_learner(num_anchors=5, seed=1).pick_anchors(0, sample)
    assert picks[0] != learner.pick_anchors(0, replace(sample, key="other"))
    assert make_learner(num_anchors=99).pick_anchors(0, sample) == sample.anchor_candidates()


# ---- learning rate ----


def test_learning_rate():
    learner = make_learner(total_steps=100, lr=2.0, warmup_ratio=0.1, min_lr=0.25)
    assert [learner.lr_at(s) for s in (0, 4, 9)] == pytest.approx([0.2, 1.0, 2.0])
    assert learner.lr_at(10) == pytest.approx(2.0)
    assert learner.lr_at(55) == pytest.approx(2.0 * (0.25 + 0.75 / 2))
    assert learner.lr_at(100) == pytest.approx(0.5)
    assert learner.lr_at(1000) == pytest.approx(0.5)
    rates = [learner.lr_at(s) for s in range(10, 101)]
    assert rates == sorted(rates, reverse=True)
    assert make_learner(total_steps=1).lr_at(0) > 0


# ---- learning ----


@pytest.mark.thorough
@pytest.mark.parametrize("from_anchor", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_two_samples_are_learned_by_heart(optimizer, from_anchor):
    config = CONFIG.with_(sample_from_anchor=from_anchor)
    lr = 2e-2 if optimizer == "muon" else 5e-3
    learner = make_learner(config, total_steps=150, optimizer=optimizer, lr=lr)
    # Responses of 1 + n (K + 1) tokens: a perfect drafter fills every block.
    num_draft = config.num_speculative_tokens
    length = 4 + 1 + 2 * (num_draft + 1)
    samples = [make_sample(s, length=length) for s in (1, 2)]
    metrics = [learner.step(i, samples) for i in range(150)]
    assert metrics[-1]["loss"] < 0.1 < 1.0 < metrics[0]["loss"]
    assert metrics[0]["bad"] == []
    served = learner.serving_drafter(torch.float32)
    for sample in samples:
        got = learner.accept(served, sample, num_draft, torch.float32)
        assert got.tau == num_draft + 1
        assert got.num_drafts == 2
    last = metrics[-1]
    assert last["right"] == last["valid"]
    assert last["accepted"] == sum(last["valid"])
    assert last["anchors"] == 2 * min(16, length - 5)
    assert last["tokens"] == 2 * (length - 1)


def test_untrained_drafters_accept_little():
    learner = make_learner()
    served = learner.serving_drafter(torch.float32)
    sample = make_sample(3, length=60)
    got = learner.accept(served, sample, BLOCK - 1, torch.float32)
    assert got.tau < 1.5
    assert got.num_drafts + got.num_accepted == 60 - 4 - 1


def test_acceptance_does_not_depend_on_the_passes(monkeypatch):
    learner = make_learner()
    samples = [make_sample(s, length=30) for s in (1, 2)]
    for i in range(25):
        learner.step(i, samples)
    served = learner.serving_drafter(torch.float32)
    whole = learner.accept(served, samples[0], BLOCK - 1, torch.float32)
    assert 0 < whole.num_accepted < 25
    monkeypatch.setattr(learner_module, "EVAL_ANCHORS", 3)
    assert learner.accept(served, samples[0], BLOCK - 1, torch.float32) == whole

    pauses: list[None] = []

    def paused(parts):
        while True:
            try:
                pauses.append(next(parts))
            except StopIteration as done:
                return done.value

    parts = learner.accept_by_parts(served, samples[0], BLOCK - 1, torch.float32, 4)
    assert paused(parts) == whole
    assert len(pauses) > 3


def test_acceptance_of_several_responses_and_narrower_blocks():
    learner = make_learner()
    sample = replace(make_sample(5, length=14), loss_mask=mask_of("..xxxx..xxxxx."))
    for i in range(150):
        learner.step(i, [sample])
    served = learner.serving_drafter(torch.float32)
    got = learner.accept(served, sample, BLOCK - 1, torch.float32)
    # 3 tokens to draft, the last of them in place of the bonus token, and 4 = 3 + bonus.
    assert (got.num_drafts, got.num_accepted) == (2, 5)
    assert got.right_per_position == [2, 2, 2]
    # Blocks of another width than trained are other inputs: only the counting is checked.
    narrow = learner.accept(served, sample, 1, torch.float32)
    assert len(narrow.accepted_per_position) == 1
    assert narrow.num_drafts + narrow.num_accepted == 7


def test_accepted_counts_the_prefix_only():
    learner = make_learner()
    sample = make_sample(1)
    with torch.no_grad():
        logits, labels, valid = forward(learner, sample, learner.pick_anchors(0, sample))
    right = (logits.argmax(-1) == labels) & valid
    want = 0
    for row in right.tolist():
        want += row.index(False) if False in row else len(row)
    assert learner.step(0, [sample])["accepted"] == want


def test_bfloat16_autocast_keeps_fp32_masters(monkeypatch):
    monkeypatch.setattr(learner_module, "cpu_has_bfloat16", lambda: True)
    learner = make_learner(head=make_head(dtype=torch.bfloat16), autocast="bfloat16")
    sample = replace(make_sample(1), features_TF=make_sample(1).features_TF.bfloat16())
    metrics = [learner.step(i, [sample]) for i in range(60)]
    assert metrics[-1]["loss"] < 0.5 * metrics[0]["loss"]
    assert {p.dtype for p in learner.drafter.parameters()} == {torch.float32}
    served = learner.serving_drafter(torch.bfloat16)
    assert {p.dtype for p in served.parameters()} == {torch.bfloat16}
    assert learner.accept(served, sample, 3, torch.bfloat16).tau > 2


def test_float32_computes_in_float32(monkeypatch):
    seen = []
    learner = make_learner(head=make_head(dtype=torch.bfloat16))
    sample = replace(make_sample(1), features_TF=make_sample(1).features_TF.bfloat16())
    real = learner_module.block_loss

    def block_loss(hidden, *args, **kwargs):
        seen.append((hidden.dtype, torch.is_autocast_enabled("cpu")))
        return real(hidden, *args, **kwargs)

    monkeypatch.setattr(learner_module, "block_loss", block_loss)
    learner.step(0, [sample])
    assert seen == [(torch.float32, False)]


def test_a_cpu_without_bfloat16_computes_in_float32(monkeypatch):
    """Emulated it takes several times as long."""
    for has, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(learner_module, "cpu_has_bfloat16", lambda has=has: has)
        learner = make_learner(autocast="bfloat16", optimizer="muon")
        assert learner.hparams.autocast == str(dtype).removeprefix("torch.")
        assert learner.optimizers["muon"].dtype == dtype
    assert make_learner(optimizer="muon").optimizers["muon"].dtype == torch.float32


def test_steps_without_anchors_do_nothing():
    learner = make_learner()
    before = snapshot(learner)
    sample = replace(make_sample(1), loss_mask=[False] * 14)
    assert learner.step(0, [sample]) == {"step": 0, "anchors": 0, "bad": []}
    assert_same(snapshot(learner), before)


# ---- the kl loss ----


def test_kl_learns_the_verifiers_distribution():
    learner = make_learner(loss="kl")
    samples = [make_sample(s, final=True) for s in (1, 2)]
    metrics = [learner.step(i, samples) for i in range(100)]
    assert metrics[-1]["loss"] < 0.2 * metrics[0]["loss"]
    # It has learned the verifier's most likely tokens, not the recorded ones.
    sample = samples[0]
    with torch.no_grad():
        logits, _, valid = forward(learner, sample, [4])
    want = learner.head.logits(learner.drafter, sample.final_TH[4:7]).argmax(-1)
    assert logits[0].argmax(-1)[valid[0]].tolist() == want.tolist()


def test_kl_is_against_the_verifiers_head_not_the_drafters_own():
    head = SharedHead(
        make_head().embedding, make_head().lm_head, None, own_lm_head=torch.zeros(VOCAB, HIDDEN)
    )
    learner = make_learner(head=head, loss="kl")
    sample = make_sample(1, final=True)
    got = learner._verifier_logits([sample], [[4, 5]])(slice(None))
    want = sample.final_TH[torch.tensor([[4, 5, 6], [5, 6, 7]])] @ make_head().lm_head.T
    torch.testing.assert_close(got, want)


def test_kl_needs_final_states():
    with pytest.raises(ValueError, match=r"final states of s1"):
        make_learner(loss="kl").step(0, [make_sample(1)])


def test_kl_needs_what_the_verifier_makes_of_its_head():
    """lm_head alone says nothing of caps, scales and biases."""
    learner = make_learner(loss="kl")
    learner.verifier_logits = lambda states: 2 * torch.tanh(states @ make_head().lm_head.T / 2)
    got = learner._verifier_logits([make_sample(1, final=True)], [[4, 5]])(slice(None))
    assert got.abs().max() <= 2
    learner.verifier_logits = None
    with pytest.raises(ValueError, match="needs the verifier's logits"):
        learner.step(0, [make_sample(1, final=True)])


# ---- draft vocabulary ----


def test_tokens_outside_the_draft_vocabulary_end_the_block():
    learner = make_learner(CONFIG.with_(draft_vocab_size=6), make_head([0, 2, 5, 7, 11, 30]))
    sample = replace(make_sample(1), token_ids=[1, 1, 1, 1, 2, 5, 7, 9, 11, 0, 30, 30, 3, 2])
    logits, labels, valid = forward(learner, sample, [4, 5, 8, 10, 11])
    assert logits.shape == (5, 3, 6)
    assert valid.tolist() == [
        [True, True, False],  # 5 7 | 9
        [True, False, False],  # 7 | 9
        [True, True, True],  # 0 30 30
        [True, False, False],  # 30 | 3
        [False, False, False],  # | 3
    ]
    assert labels[valid].tolist() == [2, 3, 3, 0, 5, 5, 5]


def test_draft_vocabulary_in_training_and_checkpoint(tmp_path):
    ids = list(range(0, VOCAB, 2))
    config = CONFIG.with_(draft_vocab_size=len(ids))
    learner = make_learner(config, make_head(ids))
    even = [2 * (t // 2) for t in make_sample(1).token_ids]
    sample = replace(make_sample(1, length=14), token_ids=even)
    for i in range(150):
        learner.step(i, [sample])
    served = learner.serving_drafter(torch.float32)
    # 9 tokens behind the first: 4, 4, and the last one.
    assert learner.accept(served, sample, 3, torch.float32).tau == 3
    tensors = learner.head.checkpoint_tensors()
    assert (tensors["d2t"] + torch.arange(len(ids))).tolist() == ids
    assert torch.equal(tensors["lm_head.weight"], make_head().lm_head[ids])
    save_drafter(tmp_path / "d", config, learner.weights() | tensors)
    loaded = load_weights(tmp_path / "d", config)
    assert loaded["t2d"].nonzero().flatten().tolist() == ids
    odd = replace(sample, token_ids=[t + 1 for t in even])
    assert learner.accept(served, odd, 3, torch.float32).tau == 1


def test_head_without_draft_vocabulary():
    head = make_head()
    assert head.checkpoint_tensors() == {}
    ids = torch.arange(5)
    assert torch.equal(head.labels(ids), ids)
    assert torch.equal(head.tokens(ids), ids)
    own = SharedHead(head.embedding, head.lm_head, None, own_lm_head=torch.ones(VOCAB, HIDDEN))
    assert torch.equal(own.checkpoint_tensors()["lm_head.weight"], torch.ones(VOCAB, HIDDEN))


def test_head_maps_back_and_forth():
    head = make_head([1, 4, 6])
    assert head.labels(torch.tensor([0, 1, 4, 5, 6])).tolist() == [-1, 0, 1, -1, 2]
    assert head.tokens(torch.tensor([[0, 2], [1, 1]])).tolist() == [[1, 6], [4, 4]]
    hidden = torch.randn(2, 3, HIDDEN)
    torch.testing.assert_close(
        head.logits(Drafter(CONFIG), hidden), (hidden @ make_head().lm_head.T)[..., [1, 4, 6]]
    )


def test_mask_tokens_may_have_an_embedding_of_their_own():
    head = make_head()
    own = SharedHead(head.embedding, head.lm_head, None, mask_embedding=torch.full((HIDDEN,), 7.0))
    ids = torch.tensor([[1, CONFIG.mask_token_id], [CONFIG.mask_token_id, 2]])
    drafter = Drafter(CONFIG)
    want = head.embed(drafter, ids)
    want[ids == CONFIG.mask_token_id] = 7.0
    assert torch.equal(own.embed(drafter, ids), want)


def test_tokens_that_only_the_verifier_has_are_read_and_not_drafted():
    """A drafter whose vocabulary lacks the verifier's padding rows."""
    full = make_head()
    for ids in (None, torch.tensor([1, 4, 6])):
        head = SharedHead(full.embedding, full.lm_head[: VOCAB - 2], ids)
        tokens = torch.tensor([1, VOCAB - 1])
        assert head.labels(tokens).tolist() == [1 if ids is None else 0, -1]
        assert head.embed(Drafter(CONFIG), tokens).shape == (2, HIDDEN)


def test_a_block_size_that_is_not_stated_cannot_be_trained():
    with pytest.raises(ValueError, match="block_size is missing"):
        make_learner(CONFIG.with_(draft_block_size=None))


def test_drafter_of_another_width_learns_its_own_embedding_and_head(tmp_path):
    config = CONFIG.with_(hidden_size=16, target_hidden_size=HIDDEN, draft_vocab_size=VOCAB - 1)
    head = make_head([*range(VOCAB - 1)])
    learner = make_learner(config, head)
    own = snapshot(learner)
    # Before training: the directions in which the verifier's rows are longest.
    _, _, directions = torch.linalg.svd(head.lm_head, full_matrices=False)
    got, want = own["lm_head.weight"], head.lm_head @ directions[:16].T
    torch.testing.assert_close(got @ got.T, want @ want.T, rtol=1e-3, atol=1e-3)
    samples = [make_sample(1), make_sample(2)]
    first = learner.step(0, samples)
    for step in range(1, 60):
        last = learner.step(step, samples)
    assert last["loss"] < 0.5 * first["loss"]
    for name in ("embed_tokens.weight", "lm_head.weight"):
        assert not torch.equal(own[name], snapshot(learner)[name])
    weights = head.checkpoint_tensors() | learner.weights()
    save_drafter(tmp_path / "drafter", config, weights)
    loaded = load_weights(tmp_path / "drafter", config)
    other = make_learner(config, head, seed=5)
    other.load_drafter(loaded)
    assert_same(snapshot(learner), snapshot(other))


# ---- broken input ----


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("loss", ["dpace", "ce", "kl"])
def test_non_finite_features_are_named_and_change_nothing(loss, value):
    learner = make_learner(loss=loss, ema_decay=0.9)
    good, broken = make_sample(1, final=True), make_sample(2, final=True)
    learner.step(0, [good])
    broken.features_TF[2, 3] = value
    before = [snapshot(learner), dict(learner.weights())]
    before[1] = {n: t.clone() for n, t in before[1].items()}
    metrics = learner.step(1, [good, broken])
    assert metrics["bad"] == ["s2"]
    assert_same(snapshot(learner), before[0])
    assert_same(learner.weights(), before[1])
    assert learner.step(2, [good])["bad"] == []


def test_non_finite_gradients_are_not_applied():
    learner = make_learner()
    learner.drafter.fc.weight.register_hook(lambda grad: grad * math.nan)
    before = snapshot(learner)
    metrics = learner.step(0, [make_sample(1), make_sample(2)])
    assert metrics["bad"] == ["s1", "s2"]
    assert math.isfinite(metrics["loss"])
    assert_same(snapshot(learner), before)


# ---- state ----


@pytest.mark.parametrize(
    "hparams",
    [{}, {"optimizer": "muon"}, {"ema_decay": 0.9}, {"weight_decay": 0.1, "loss": "ce"}],
    ids=str,
)
def test_resuming_is_bit_for_bit(hparams, tmp_path):
    samples = [make_sample(s, length=30) for s in (1, 2)]
    straight = make_learner(num_anchors=4, warmup_ratio=0.5, total_steps=10, **hparams)
    for i in range(4):
        straight.step(i, samples)
    straight.save_state(tmp_path / "state.safetensors")
    resumed = make_learner(num_anchors=4, warmup_ratio=0.5, total_steps=10, **hparams)
    for i in range(2):  # whatever it did before is replaced
        resumed.step(i, samples[:1])
    resumed.load_state(tmp_path / "state.safetensors")
    for i in range(4, 7):
        assert straight.step(i, samples) == resumed.step(i, samples)
    assert_same(snapshot(resumed), snapshot(straight))
    assert_same(resumed.weights(), straight.weights())
    if "ema_decay" in hparams:
        assert not torch.equal(straight.weights()["fc.weight"], straight.drafter.fc.weight)


def test_state_before_the_first_step(tmp_path):
    straight, resumed = make_learner(), make_learner(seed=1)
    straight.save_state(tmp_path / "state.safetensors")
    resumed.load_state(tmp_path / "state.safetensors")
    assert_same(snapshot(resumed), snapshot(straight))


def test_state_of_something_else(tmp_path):
    file = tmp_path / "state.safetensors"
    make_learner().save_state(file)
    with pytest.raises(ValueError, match=r"lacks model\.layers\.2"):
        make_learner(CONFIG.with_(num_hidden_layers=3)).load_state(file)
    with pytest.raises(ValueError, match=r"lacks ema\."):
        make_learner(ema_decay=0.9).load_state(file)
    wide = make_learner(CONFIG.with_(intermediate_size=50))
    before = snapshot(wide)
    with pytest.raises(ValueError, match=r"up_proj.*\(48, 24\).*\(50, 24\)|gate_proj.*48.*50"):
        wide.load_state(file)
    assert_same(snapshot(wide), before)
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match="cannot be read"):
        make_learner().load_state(file)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_decay_is_of_matrices_and_state_keeps_its_names(optimizer, tmp_path):
    """Norms have no decay; the optimizer's two groups are saved and read back under the right names."""
    learner = make_learner(weight_decay=50.0, optimizer=optimizer, lr=1e-3, warmup_ratio=0.0)
    before = snapshot(learner)
    learner.step(0, [make_sample(1)])
    after = snapshot(learner)
    shrunk = {n for n in before if after[n].norm() < 0.97 * before[n].norm()}
    matrices = {n for n, p in before.items() if p.dim() == 2}
    assert shrunk == matrices
    file = tmp_path / "state.safetensors"
    learner.save_state(file)
    again = make_learner(weight_decay=50.0, optimizer=optimizer, lr=1e-3, warmup_ratio=0.0)
    again.load_state(file)
    for one in (learner, again):
        one.step(1, [make_sample(1)])
    assert_same(snapshot(learner), snapshot(again))


def test_average_follows_the_weights():
    learner = make_learner(ema_decay=0.15)
    want = snapshot(learner)
    for i in range(3):
        learner.step(i, [make_sample(1)])
        now = snapshot(learner)
        kept = min(0.15, (1 + i) / (10 + i))  # a short run forgets its random start
        want = {n: kept * want[n] + (1 - kept) * now[n] for n in now}
    for name, tensor in learner.weights().items():
        torch.testing.assert_close(tensor, want[name])
    served = learner.serving_drafter(torch.float32)
    assert torch.equal(served.fc.weight, learner.weights()["fc.weight"])
    assert not torch.equal(served.fc.weight, learner.drafter.fc.weight)


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_fine_tuning_starts_from_a_checkpoint(ema, tmp_path):
    first = make_learner()
    first.step(0, [make_sample(1)])
    save_drafter(tmp_path / "d", CONFIG, first.weights())
    second = make_learner(seed=5, ema_decay=ema)
    second.load_drafter(load_weights(tmp_path / "d", CONFIG) | {"t2d": torch.ones(3)})
    assert_same(snapshot(second), snapshot(first))
    assert_same(second.weights(), first.weights())
    second.step(0, [make_sample(2)])
    assert not torch.equal(second.drafter.fc.weight, first.drafter.fc.weight)


def test_evaluating_leaves_training_alone():
    learner = make_learner()
    learner.step(0, [make_sample(1)])
    before = snapshot(learner)
    served = learner.serving_drafter(torch.float32)
    with torch.no_grad():
        served.fc.weight.zero_()
    assert_same(snapshot(learner), before)


# ---- parts of a step ----


def test_parts_of_a_step_hold_so_many_anchors_and_lose_none():
    samples = [make_sample(s) for s in (1, 2, 3)]
    anchors = [[4, 5, 6, 7, 8], [5], [4, 6, 9]]
    learner = make_learner()
    assert list(learner._parts(samples, anchors)) == [(samples, anchors)]
    for limit in range(1, 11):
        learner.layout = StepLayout(limit)
        parts = list(learner._parts(samples, anchors))
        sizes = [sum(map(len, groups)) for _, groups in parts]
        assert sizes[:-1] == [limit] * (len(sizes) - 1)
        assert 0 < sizes[-1] <= limit
        got = [(s.key, p) for part in parts for s, g in zip(*part, strict=True) for p in g]
        want = [(s.key, p) for s, g in zip(samples, anchors, strict=True) for p in g]
        assert got == want
    assert list(learner._parts([], [])) == []


@pytest.mark.parametrize("loss", ["dpace", "ce", "kl"])
@pytest.mark.parametrize("in_flight", [1, 5])
def test_a_step_in_parts_is_the_step(loss, in_flight):
    samples = [make_sample(s, length=20, final=True) for s in (1, 2)]
    whole, parts = make_learner(loss=loss), make_learner(loss=loss)
    parts.layout = StepLayout(in_flight)
    for i in range(3):
        want, got = whole.step(i, samples), parts.step(i, samples)
        assert got.pop("loss") == pytest.approx(want.pop("loss"), rel=1e-5)
        assert got.pop("grad_norm") == pytest.approx(want.pop("grad_norm"), rel=1e-4)
        assert got == want
    for name, weight in snapshot(whole).items():
        torch.testing.assert_close(snapshot(parts)[name], weight, rtol=0, atol=2e-4)


def test_a_step_is_that_of_the_plain_loss():
    """Gradients of all logits at once by autograd, clipped by torch, and AdamW."""
    samples = [make_sample(s, length=20) for s in (1, 2)]
    learner, plain = make_learner(max_grad_norm=0.5), make_learner(max_grad_norm=0.5)
    got = learner.step(0, samples)
    anchors = [plain.pick_anchors(0, s) for s in samples]
    hidden, labels, valid = plain._forward(samples, anchors)
    logits = plain.head.logits(plain.drafter, hidden)
    ce = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="none"
    ).view(labels.shape)
    weights = dpace_weights(torch.exp(-ce.detach()), valid, 0.5)
    loss = (ce * weights).sum() / weights.sum()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(plain.drafter.parameters(), 0.5)
    assert got["loss"] == pytest.approx(float(loss.detach()), rel=1e-6)
    assert got["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
    assert got["grad_norm"] > 0.5
    for group in plain.optimizers["adamw"].param_groups:
        group["lr"] = plain.lr_at(0)
    plain.optimizers["adamw"].step()
    for name, weight in snapshot(plain).items():
        torch.testing.assert_close(snapshot(learner)[name], weight, rtol=1e-4, atol=1e-6)


def test_a_sequence_that_goes_wrong_in_a_later_part_changes_nothing():
    learner = make_learner()
    learner.layout = StepLayout(3)
    broken = make_sample(2)
    broken.features_TF[2, 3] = math.nan
    before = snapshot(learner)
    assert learner.step(0, [make_sample(1), broken])["bad"] == ["s2"]
    assert_same(snapshot(learner), before)
    assert all(p.grad is None for p in learner.drafter.parameters())


@pytest.mark.parametrize("autocast", ["float32", "bfloat16"])
def test_checkpointed_mlps_change_no_bit_and_keep_nothing(autocast):
    kept = []
    wide = 40  # as no other tensor of the drafter
    config = CONFIG.with_(intermediate_size=wide)
    learners = [make_learner(config, autocast=autocast) for _ in range(2)]
    learners[1].drafter.checkpoint_mlps(True)
    for learner in learners:
        shapes = []

        def pack(tensor, shapes=shapes):
            if tensor.shape[-1] == wide and tensor.dim() > 1:
                shapes.append(tensor.shape)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            hidden = learner._forward([make_sample(1)], [[4, 5]])[0]
        kept.append([s for s in shapes if s[0] != CONFIG.hidden_size])
        assert hidden.requires_grad
    assert kept[0]
    assert not kept[1]
    for i in range(3):
        assert learners[0].step(i, [make_sample(1)]) == learners[1].step(i, [make_sample(1)])
    assert_same(snapshot(learners[0]), snapshot(learners[1]))


# ---- half blocks first ----


def test_the_first_steps_train_half_blocks_at_twice_the_anchors():
    samples = [make_sample(seed, length=20) for seed in range(2)]  # 15 places each
    hparams = {"num_anchors": 6, "half_blocks": 0.25}
    learner, whole = make_learner(**hparams), make_learner(**hparams | {"half_blocks": 0.0})
    first, last = learner.step(24, samples), learner.step(25, samples)
    assert [first["anchors"], last["anchors"]] == [24, 12]
    # Blocks of 2 draft one token; the metrics have a place for each of a whole block.
    assert first["valid"] == [24, 0, 0]
    assert len(first["right"]) == BLOCK - 1
    assert last["valid"][2] > 0
    assert whole.step(24, samples)["anchors"] == 12
    # Too few places: a response has no twice so many anchors.
    assert not learner.halves_blocks(0, make_sample(0, length=14))
    assert learner.halves_blocks(0, make_sample(0, length=20))
    mixed = learner.step(24, [make_sample(0, length=14), samples[1]])
    assert mixed["anchors"] == 6 + 12
    assert mixed["valid"][0] == 18
    assert 0 < mixed["valid"][1] <= 6


def test_a_trained_drafter_goes_on_with_whole_blocks():
    sample = make_sample(0, length=20)
    learner = make_learner(num_anchors=6)
    assert learner.halves_blocks(0, sample)
    learner.load_drafter(make_learner(seed=1).weights())
    assert not learner.halves_blocks(0, sample)


@pytest.mark.parametrize("loss", ["dpace", "kl"])
def test_a_step_of_half_blocks_in_parts_is_the_step(loss):
    samples = [make_sample(s, length=20, final=True) for s in (1, 2)]
    whole, parts = (make_learner(num_anchors=6, loss=loss) for _ in range(2))
    parts.layout = StepLayout(anchors_in_flight=3)
    left, right = whole.step(0, samples), parts.step(0, samples)
    assert left["anchors"] == right["anchors"] == 24
    assert right["loss"] == pytest.approx(left["loss"], rel=1e-5)
    for name, weight in snapshot(whole).items():
        torch.testing.assert_close(snapshot(parts)[name], weight, rtol=1e-4, atol=1e-5)
