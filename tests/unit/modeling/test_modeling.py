"""The drafter in plain PyTorch: masks, packing, attention, rotary embedding and losses."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_dflash.config import FULL, SLIDING, DrafterConfig
from vllm_dflash.modeling import blocks
from vllm_dflash.modeling.blocks import BlockLayout
from vllm_dflash.modeling.drafter import Drafter, RotaryEmbedding
from vllm_dflash.modeling.losses import decay_weights, default_gamma, dpace_weights

CONFIG = DrafterConfig(
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=32,
    vocab_size=50,
    draft_block_size=4,
    target_layer_ids=(1, 2),
    mask_token_id=49,
    target_hidden_size=10,
    rope_parameters={"rope_type": "default", "rope_theta": 1e4},
)
MIXED = {"layer_types": (FULL, SLIDING, SLIDING), "sliding_window": 3}
VARIANTS = {
    "plain": {},
    "mixed": MIXED,
    "mixed, bidirectional": {**MIXED, "causal": False},
    "causal": {"causal": True},
    "interleaved": {"is_neox_style": False},
    "partial": {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
    "interleaved, partial": {
        "is_neox_style": False,
        "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5},
    },
    "no GQA": {"num_key_value_heads": 4},
    "one KV head": {"num_key_value_heads": 1},
    "bias": {"attention_bias": True},
}
#: Anchors and context length of three sequences; the last has anchors at its very ends.
ANCHORS, LENGTHS = [[2, 5, 6], [4], [0, 1, 3, 7, 9]], [7, 4, 9]


@pytest.fixture(params=[512, 8, 1], ids=lambda n: f"{n} queries a chunk")
def chunk_queries(request, monkeypatch):
    monkeypatch.setattr(blocks, "MAX_CHUNK_QUERIES", request.param)
    return request.param


def make_drafter(seed: int = 0, **changes) -> Drafter:
    drafter = Drafter(CONFIG.with_(**changes))
    generator = torch.Generator().manual_seed(seed)
    drafter.init_weights(std=0.3, generator=generator)
    with torch.no_grad():  # norms of 1 and biases of 0 would hide a missing one
        for name, p in drafter.named_parameters():
            if "norm" in name or name.endswith("bias"):
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return drafter


def make_inputs(num_anchors: int, context: int, seed: int = 1, block: int = 4):
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(num_anchors, block, CONFIG.hidden_size, generator=generator)
    return embeds, torch.randn(context, CONFIG.num_features, generator=generator)


@torch.no_grad()
def run(drafter, embeds, features, anchors, lengths):
    layout = BlockLayout.build(anchors, lengths, embeds.shape[1])
    return drafter(embeds, features, layout.context_positions_T, layout)


# ---- who sees what ----


def allowed(anchor, query, key_kind, key_owner, key, window, causal) -> bool:
    """The definition at the top of blocks.py, for one query and one key of one sequence."""
    in_block = key_owner and (not causal or key <= query)
    sees = key < anchor if key_kind == "context" else in_block
    return bool(sees and (window is None or abs(query - key) < window))


@given(
    st.lists(
        st.integers(0, 12).flatmap(
            lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n), max_size=6))
        ),
        min_size=1,
        max_size=4,
    ),
    st.integers(1, 5),
    st.none() | st.integers(1, 6),
    st.booleans(),
    st.sampled_from((1, 6, 512)),
)
@settings(max_examples=80)
def test_masks_follow_the_definition(sequences, block, window, causal, queries_a_chunk):
    lengths = [length for length, _ in sequences]
    anchors = [sorted(group) for _, group in sequences]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "MAX_CHUNK_QUERIES", queries_a_chunk)
        layout = BlockLayout.build(anchors, lengths, block)
    owners = [(s, p) for s, group in enumerate(anchors) for p in group]
    rows = [(s, p) for s, length in enumerate(lengths) for p in range(length)]
    assert layout.context_positions_T.tolist() == [p for _, p in rows]
    assert layout.block_positions_AB.tolist() == [[p + k for k in range(block)] for _, p in owners]
    covered = []
    for chunk in layout.chunks:
        mine, context = range(len(owners))[chunk.anchors], range(len(rows))[chunk.context]
        covered += mine
        assert len({owners[a][0] for a in mine}) == 1
        mask = layout.mask(chunk, window, causal)
        assert mask.shape == (len(mine) * block, len(context) + len(mine) * block)
        # Every context row, also those outside the chunk, which therefore must be unseen.
        for i, a in enumerate(mine):
            sequence, anchor = owners[a]
            for k in range(block):
                row = mask[i * block + k]
                for t, (other, position) in enumerate(rows):
                    want = other == sequence and allowed(
                        anchor, anchor + k, "context", True, position, window, causal
                    )
                    got = t in context and bool(row[t - context.start])
                    assert got == want
                for j, b in enumerate(mine):
                    for m in range(block):
                        got = bool(row[len(context) + j * block + m])
                        key = owners[b][1] + m
                        assert got == allowed(
                            anchor, anchor + k, "block", a == b, key, window, causal
                        )
    assert covered == list(range(len(owners)))


def test_mask_by_hand():
    layout = BlockLayout.build([[2]], [3], 3)
    (chunk,) = layout.chunks
    assert layout.mask(chunk, None, False).int().tolist() == [[1, 1, 1, 1, 1]] * 3
    assert layout.mask(chunk, None, True).int().tolist() == [
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1],
    ]
    assert layout.mask(chunk, 2, False).int().tolist() == [
        [0, 1, 1, 1, 0],
        [0, 0, 1, 1, 1],
        [0, 0, 0, 1, 1],
    ]
    assert layout.mask(chunk, 2, True).int().tolist() == [
        [0, 1, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 1, 1],
    ]


@pytest.mark.parametrize(("anchors", "value"), [([-1, 2], "-1"), ([3, 5], "5")])
def test_anchors_beyond_the_features(anchors, value):
    with pytest.raises(ValueError, match=rf"{value}.* has 4"):
        BlockLayout.build([anchors], [4], 3)


# ---- packing and visibility ----


@pytest.mark.parametrize("name", VARIANTS)
def test_packed_is_one_at_a_time(name, chunk_queries):
    drafter = make_drafter(**VARIANTS[name])
    embeds, features = make_inputs(9, sum(LENGTHS))
    packed = run(drafter, embeds, features, ANCHORS, LENGTHS)
    at = start = 0
    for anchors, length in zip(ANCHORS, LENGTHS, strict=True):
        for anchor in anchors:
            alone = run(
                drafter, embeds[at : at + 1], features[start : start + length], [[anchor]], [length]
            )
            torch.testing.assert_close(packed[at : at + 1], alone, rtol=1e-5, atol=1e-5)
            at += 1
        start += length


@pytest.mark.parametrize("name", ["plain", "mixed"])
def test_only_earlier_features_of_the_own_sequence_count(name, chunk_queries):
    drafter = make_drafter(**VARIANTS[name])
    embeds, features = make_inputs(9, sum(LENGTHS))
    before = run(drafter, embeds, features, ANCHORS, LENGTHS)
    owners = [(s, p) for s, group in enumerate(ANCHORS) for p in group]
    row = 0
    for sequence, length in enumerate(LENGTHS):
        for position in range(length):
            changed = features.clone()
            changed[row] += 5.0
            after = run(drafter, embeds, changed, ANCHORS, LENGTHS)
            moved = [not torch.equal(x, y) for x, y in zip(before, after, strict=True)]
            assert moved == [s == sequence and position < p for s, p in owners]
            row += 1


def test_blocks_do_not_see_each_other(chunk_queries):
    drafter = make_drafter()
    embeds, features = make_inputs(9, sum(LENGTHS))
    before = run(drafter, embeds, features, ANCHORS, LENGTHS)
    changed = embeds.clone()
    changed[6, 2] += 5.0
    after = run(drafter, changed, features, ANCHORS, LENGTHS)
    moved = [not torch.equal(x, y) for x, y in zip(before, after, strict=True)]
    assert moved == [i == 6 for i in range(9)]


def test_causal_blocks_do_not_look_ahead():
    for causal in (True, False):
        drafter = make_drafter(causal=causal)
        embeds, features = make_inputs(1, 5)
        before = run(drafter, embeds, features, [[5]], [5])
        changed = embeds.clone()
        changed[0, 2] += 5.0
        after = run(drafter, changed, features, [[5]], [5])
        moved = [not torch.equal(x, y) for x, y in zip(before[0], after[0], strict=True)]
        assert moved == ([False, False, True, True] if causal else [True] * 4)


# ---- against a naive reference ----


def rms(x, weight, eps):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def rotate(vector, position, config):
    """One head vector, rotated pair by pair."""
    size = int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
    out = vector.clone()
    for i in range(size // 2):
        angle = position / config.rope_theta ** (2 * i / size)
        a, b = (i, i + size // 2) if config.is_neox_style else (2 * i, 2 * i + 1)
        out[a] = vector[a] * math.cos(angle) - vector[b] * math.sin(angle)
        out[b] = vector[b] * math.cos(angle) + vector[a] * math.sin(angle)
    return out


def reference(weights, config, embeds_BH, features_TF, anchor):
    """One block over one sequence, as Hugging Face's DFlash attention reads: loops in fp64."""
    w = {n: t.double() for n, t in weights.items()}
    eps, heads, groups = config.rms_norm_eps, config.num_attention_heads, config.num_key_value_heads
    context = rms(features_TF[:anchor].double() @ w["fc.weight"].T, w["hidden_norm.weight"], eps)
    x = embeds_BH.double()
    num_context, block = len(context), len(x)
    positions = [*range(anchor), *range(anchor, anchor + block)]
    for i in range(config.num_hidden_layers):
        p = f"layers.{i}."

        def linear(x, name, p=p):
            bias = w.get(f"{p}self_attn.{name}_proj.bias", 0)
            return x @ w[f"{p}self_attn.{name}_proj.weight"].T + bias

        normed = rms(x, w[f"{p}input_layernorm.weight"], eps)
        keys_in = torch.cat((context, normed))
        q = linear(normed, "q").view(block, heads, -1)
        k = linear(keys_in, "k").view(len(keys_in), groups, -1)
        v = linear(keys_in, "v").view(len(keys_in), groups, -1)
        q = rms(q, w[f"{p}self_attn.q_norm.weight"], eps)
        k = rms(k, w[f"{p}self_attn.k_norm.weight"], eps)
        out = torch.zeros(block, heads, config.head_dim, dtype=torch.float64)
        for b in range(block):
            for h in range(heads):
                g = h // (heads // groups)
                query = rotate(q[b, h], anchor + b, config)
                scores = torch.full((len(positions),), -math.inf, dtype=torch.float64)
                for j, position in enumerate(positions):
                    window = config.layer_window(i)
                    if config.layer_causal(i) and j >= num_context and position > anchor + b:
                        continue
                    if window is not None and abs(anchor + b - position) >= window:
                        continue
                    key = rotate(k[j, g], position, config)
                    scores[j] = query @ key / math.sqrt(config.head_dim)
                out[b, h] = torch.softmax(scores, 0) @ v[:, g]
        x = x + linear(out.flatten(1), "o")
        normed = rms(x, w[f"{p}post_attention_layernorm.weight"], eps)
        gate = normed @ w[f"{p}mlp.gate_proj.weight"].T
        up = normed @ w[f"{p}mlp.up_proj.weight"].T
        x = x + (gate * torch.sigmoid(gate) * up) @ w[f"{p}mlp.down_proj.weight"].T
    return rms(x, w["norm.weight"], eps)


@pytest.mark.parametrize("name", VARIANTS)
def test_drafter_is_the_reference(name):
    drafter = make_drafter(**VARIANTS[name])
    embeds, features = make_inputs(3, 7)
    anchors = [0, 2, 7]
    got = run(drafter, embeds, features, [anchors], [7])
    for i, anchor in enumerate(anchors):
        want = reference(drafter.state_dict(), drafter.config, embeds[i], features, anchor)
        torch.testing.assert_close(got[i].double(), want, rtol=1e-4, atol=1e-5)


def test_what_is_served_but_not_trained():
    with pytest.raises(ValueError, match="attention_sink_bias"):
        Drafter(CONFIG.with_(serve_only={"attention_sink_bias": True}))
    with pytest.raises(ValueError, match="'gelu'"):
        Drafter(CONFIG.with_(hidden_act="gelu"))


def test_initial_weights_are_a_function_of_the_seed():
    first, same, other = Drafter(CONFIG), Drafter(CONFIG), Drafter(CONFIG)
    for drafter, seed in ((first, 3), (same, 3), (other, 4)):
        drafter.init_weights(generator=torch.Generator().manual_seed(seed))
    assert torch.equal(first.fc.weight, same.fc.weight)
    assert not torch.equal(first.fc.weight, other.fc.weight)
    assert first.fc.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert torch.equal(first.norm.weight, torch.ones(24))


# ---- rotary embedding ----


def test_angles_survive_a_change_of_dtype():
    """Frequencies rounded to bfloat16 are radians off after a few hundred positions."""
    positions = torch.tensor([0, 1, 500, 4000])
    exact = Drafter(CONFIG).rope.cos_sin(positions)
    for got, want in zip(Drafter(CONFIG).bfloat16().rope.cos_sin(positions), exact, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default"},
        {"rope_type": "default", "partial_rotary_factor": 0.5},
        {"rope_type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "attention_factor": 1.3,
        },
    ],
    ids=lambda r: "-".join(map(str, r.values())),
)
@pytest.mark.parametrize("neox", [True, False], ids=["neox", "interleaved"])
def test_rotary_embedding_is_vllms(rope, neox):
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    rope = {**rope, "rope_theta": 1e4}
    config = CONFIG.with_(
        head_dim=32, rope_parameters=rope, max_position_embeddings=256, is_neox_style=neox
    )
    with set_current_vllm_config(VllmConfig()):
        theirs = get_rope(32, 256, neox, rope, dtype=torch.float32)
    positions = torch.tensor([0, 1, 7, 63, 64, 200, 255])
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(7, 4 * 32, generator=generator)
    k = torch.randn(7, 2 * 32, generator=generator)
    want_q, want_k = theirs.forward_native(positions, q.clone(), k.clone())
    ours = RotaryEmbedding(config)
    cos_sin = ours.cos_sin(positions)
    got_q = ours(q.view(7, 4, 32), *cos_sin).flatten(1)
    got_k = ours(k.view(7, 2, 32), *cos_sin).flatten(1)
    torch.testing.assert_close(got_q, want_q, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(got_k, want_k, rtol=1e-4, atol=2e-5)


def test_unknown_rotary_embedding():
    with pytest.raises(ValueError, match=r"'spiral'.*'yarn'"):
        RotaryEmbedding(CONFIG.with_(rope_parameters={"rope_type": "spiral"}))


# ---- losses ----


@st.composite
def tables(draw):
    num_anchors, num_draft = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    seed = draw(st.integers(0, 10**6))
    lengths = [draw(st.integers(0, num_draft)) for _ in range(num_anchors)]
    generator = torch.Generator().manual_seed(seed)
    probs = torch.rand(num_anchors, num_draft, generator=generator)
    valid = torch.tensor([[k < n for k in range(num_draft)] for n in lengths])
    return probs, valid, draw(st.sampled_from((0.0, 0.25, 0.5, 1.0)))


@given(tables())
@settings(max_examples=60)
def test_dpace_weights_by_their_sums(table):
    probs, valid, alpha = table
    got = dpace_weights(probs, valid, alpha)
    for a in range(len(probs)):
        for j in range(probs.shape[1]):
            want = 0.0
            for m in range(j, probs.shape[1]):
                if valid[a, m]:
                    want += math.prod(
                        (1 - alpha) * float(probs[a, i]) + alpha for i in range(m + 1)
                    )
            want *= bool(valid[a, j])
            assert float(got[a, j]) == pytest.approx(want, rel=1e-5, abs=1e-6)


def test_dpace_weights_of_certain_drafts_count_what_follows():
    valid = torch.tensor([[True, True, True, False]])
    assert dpace_weights(torch.ones(1, 4), valid, 0.5).tolist() == [[3.0, 2.0, 1.0, 0.0]]


def test_decay_weights():
    got = decay_weights(15, 7.0)
    assert got.tolist() == pytest.approx([math.exp(-k / 7) for k in range(15)], rel=1e-6)
    assert [default_gamma(b) for b in (16, 10, 8, 12)] == [7.0, 5.0, 4.0, 6.0]
