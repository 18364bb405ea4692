"""The C++ kernels against the reference, opcheck, and what they say about bad arguments."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import op_cases as cases
from vllm_dflash import ops
from vllm_dflash.ops import reference
from vllm_dflash.ops.schemas import NAMESPACE, SCHEMAS

pytestmark = pytest.mark.skipif(
    ops.load().cpu != "cpp", reason="the C++ extension is not in use: " + ops.load().describe()
)


def ordered(op: str, case: dict) -> list:
    """The arguments of an op in the order of its schema; None for those a case leaves out."""
    names = [a.name for a in getattr(torch.ops.vllm_dflash, op).default._schema.arguments]
    return [case.get(name) for name in names]


def check_block(case: dict) -> None:
    want = cases.clone(case)
    reference.build_block(*ordered("build_block", want))
    ops.build_block(**case)
    for name in cases.BLOCK_OUTPUTS:
        if case.get(name) is not None:
            torch.testing.assert_close(
                case[name], want[name], rtol=0, atol=0, msg=lambda m, n=name: n + m
            )


@pytest.mark.parametrize("op", SCHEMAS)
def test_schema_is_the_one_the_fallbacks_use(op):
    schema = str(getattr(torch.ops.vllm_dflash, op).default._schema)
    python = torch._C.parse_schema(f"{NAMESPACE}::{op}{SCHEMAS[op]}")
    assert schema == str(python)


BLOCKS = {
    "decode": {"context_lens": [4, 4, 4], "rejected": [0, 2, 3]},
    "no rejected given": {"context_lens": [5, 1], "rejected": None},
    "prefill and decode": {"context_lens": [70, 1, 4], "rejected": [0, 0, 1]},
    "empty requests": {"context_lens": [0, 3, 0, 2, 0], "rejected": [0, 1, 0, 0, 0]},
    "all rejected": {"context_lens": [4, 2], "rejected": [4, 2]},
    "too many rejected": {"context_lens": [4, 2], "rejected": [9, -3]},
    "no requests": {"context_lens": [], "rejected": []},
    "no tokens": {"context_lens": [0, 0], "rejected": [0, 0]},
    "padding": {"context_lens": [4, 1], "rejected": [1, 0], "padding": 7},
    "two groups": {"context_lens": [20, 4], "rejected": [0, 2], "kv_block_sizes": (16, 5)},
    "states": {"context_lens": [4, 9, 1], "rejected": [2, 0, 0], "states": True, "padding": 3},
    "lengths": {"context_lens": [4, 9, 1], "rejected": [2, 0, 0], "lengths": True},
    "from anchor": {
        "context_lens": [4, 9],
        "rejected": [2, 0],
        "sample_from_anchor": True,
        "states": True,
    },
    "int64": {"context_lens": [4, 9], "rejected": [2, 0], "wide": True, "states": True},
    "evicted blocks": {"context_lens": [60, 40], "rejected": [0, 3], "null_blocks": True},
    "end of the model": {"context_lens": [4, 4], "rejected": [0, 3], "starts": [252, 251]},
    "end of the model inside a block": {
        "context_lens": [4, 4],
        "rejected": [0, 3],
        "starts": [243, 249],
        "max_model_len": 250,
    },
    "block boundary": {
        "context_lens": [1, 2, 16, 17],
        "rejected": None,
        "starts": [15, 15, 16, 31],
    },
    "long": {"context_lens": [20000, 15000], "rejected": [0, 3], "max_model_len": 40000},
}


@pytest.mark.parametrize("name", BLOCKS)
def test_build_block(name):
    check_block(cases.block_case(**BLOCKS[name]))


@given(data=st.data())
@settings(max_examples=150)
def test_build_block_made_up(data):
    lens = data.draw(st.lists(st.integers(0, 40), max_size=6), label="context_lens")
    rejected = [data.draw(st.integers(0, n)) for n in lens]
    check_block(
        cases.block_case(
            lens,
            data.draw(st.sampled_from([rejected, None])),
            num_draft_tokens=data.draw(st.integers(1, 16)),
            kv_block_sizes=tuple(data.draw(st.lists(st.integers(1, 33), min_size=1, max_size=3))),
            sample_from_anchor=data.draw(st.booleans()),
            states=data.draw(st.booleans()),
            lengths=data.draw(st.booleans()),
            padding=data.draw(st.integers(0, 9)),
            wide=data.draw(st.booleans()),
            null_blocks=data.draw(st.booleans()),
            seed=data.draw(st.integers(0, 99)),
        )
    )


def test_non_consecutive_positions():
    case = cases.block_case([6], [0])
    case["target_positions"] = torch.tensor([3, 4, 90, 91, 17, 16])
    check_block(case)


@pytest.mark.parametrize("residual", [True, False], ids=["residual", "plain"])
@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize(("tokens", "width"), [(1, 64), (9, 100), (70, 577), (0, 8)])
def test_tap(dtype, tokens, width, residual):
    hidden = torch.randn(tokens, 2 * width).to(dtype)[:, width:]
    other = torch.randn(tokens, width + 3).to(dtype)[:, :width] if residual else None
    features = torch.full((tokens + 2, 3 * width + 1), 7.0, dtype=dtype)
    want = features.clone()
    reference.tap_hidden_states(want, hidden, other, width)
    ops.tap_hidden_states(features, hidden, other, column=width)
    torch.testing.assert_close(features, want, rtol=0, atol=0)


KV = {
    "plain": {},
    "interleaved": {"is_neox": False},
    "partial": {"rotary_dim": 32},
    "partial interleaved": {"rotary_dim": 24, "is_neox": False},
    "no rotation": {"rotary_dim": 0},
    "HND": {"layout": "HND"},
    "split": {"layout": "split"},
    "odd head": {"head_size": 80, "rotary_dim": 40},
    "one head": {"num_heads": 1, "head_size": 256},
    "small head": {"head_size": 12, "rotary_dim": 6},
    "value scale": {"value_scale": 0.3},
    "two groups": {"groups": 2, "num_layers": 3},
    "wider projection": {"non_contiguous": True},
    "staging": {"consecutive": True},
    "all skipped": {"skipped": 1.1},
    "one-token blocks": {"kv_block_size": 1},
}


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("name", KV)
def test_store_context_kv(name, dtype):
    for tokens in (0, 1, 7, 130):
        check_kv(cases.kv_case(tokens, dtype=dtype, **KV[name]))


@pytest.mark.parametrize("cache_dtype", cases.FLOAT8, ids=str)
@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
def test_store_context_kv_float8(dtype, cache_dtype):
    case = cases.kv_case(33, dtype=dtype, cache_dtype=cache_dtype, value_scale=300.0, layout="HND")
    check_kv(case)


def test_store_context_kv_rope_in_float32():
    check_kv(cases.kv_case(33, dtype=torch.bfloat16, rope_dtype=torch.float32))


@given(data=st.data())
@settings(max_examples=80)
def test_store_context_kv_made_up(data):
    head = data.draw(st.integers(1, 40)) * 2
    check_kv(
        cases.kv_case(
            data.draw(st.integers(0, 40)),
            num_layers=data.draw(st.integers(1, 5)),
            num_heads=data.draw(st.integers(1, 4)),
            head_size=head,
            rotary_dim=2 * data.draw(st.integers(0, head // 2)),
            is_neox=data.draw(st.booleans()),
            dtype=data.draw(st.sampled_from(cases.FLOATS)),
            layout=data.draw(st.sampled_from(["NHD", "HND", "split"])),
            kv_block_size=data.draw(st.integers(1, 20)),
            groups=data.draw(st.integers(1, 3)),
            value_scale=data.draw(st.sampled_from([1.0, 0.5])),
            non_contiguous=data.draw(st.booleans()),
            seed=data.draw(st.integers(0, 99)),
        )
    )


def check_kv(case: dict) -> None:
    want = cases.clone(case)
    for cache in ("key_caches", "value_caches"):  # views keep what lies between them
        want[cache] = [c.clone() for c in case[cache]]
    reference.store_context_kv(*ordered("store_context_kv", want))
    ops.store_context_kv(**case)
    cases.assert_caches_close(case["key_caches"], want["key_caches"])
    cases.assert_caches_close(case["value_caches"], want["value_caches"])


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
def test_store_context_kv_against_float64(dtype):
    """One rounding: within half a unit in the last place (and float32's own error) of the exact result."""
    case = cases.kv_case(50, dtype=dtype, rope_dtype=torch.float32, skipped=0, layout="split")
    exact = {
        k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v
        for k, v in case.items()
    }
    kv, weights = exact["kv"], exact["k_norm_weights"]
    ops.store_context_kv(**case)
    cos, sin = exact["cos_sin_cache"][case["positions"]][:, None].chunk(2, -1)
    for layer in range(2):
        k = kv[:, layer, 0]
        k = k * torch.rsqrt(k.square().mean(-1, keepdim=True) + 1e-6) * weights[layer]
        a, b = k.chunk(2, -1)
        k = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
        got = case["key_caches"][layer].flatten(0, 1)[case["slots"][layer]].double()
        eps = torch.finfo(dtype).eps
        slack = 4e-7 if dtype != torch.float32 else 3 * eps
        assert ((got - k).abs() <= 0.5 * eps * k.abs() + slack * (1 + k.abs())).all()


@pytest.mark.parametrize("states", [False, True])
def test_opcheck_build_block(states):
    case = cases.block_case([4, 9], [1, 0], states=states, padding=2, kv_block_sizes=(16, 8))
    torch.library.opcheck(torch.ops.vllm_dflash.build_block.default, ordered("build_block", case))


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("residual", [True, False])
def test_opcheck_tap(dtype, residual):
    hidden = torch.randn(5, 16).to(dtype)
    features = torch.zeros(8, 40, dtype=dtype)
    args = (features, hidden, hidden * 2 if residual else None, 8)
    torch.library.opcheck(torch.ops.vllm_dflash.tap_hidden_states.default, args)


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
def test_opcheck_store_context_kv(dtype):
    case = cases.kv_case(6, dtype=dtype, layout="split")
    torch.library.opcheck(
        torch.ops.vllm_dflash.store_context_kv.default, ordered("store_context_kv", case)
    )


def test_tap_under_compile():
    features = torch.zeros(16, 64)

    @torch.compile(fullgraph=True)
    def layers(x):
        for i in range(2):
            x = x * 2 + 1
            torch.ops.vllm_dflash.tap_hidden_states(features, x, x, 32 * i)
        return x

    x = torch.randn(16, 32)
    layers(x)
    torch.testing.assert_close(features[:, :32], 2 * (x * 2 + 1))
    torch.testing.assert_close(features[:, 32:], 2 * ((x * 2 + 1) * 2 + 1))


BAD_BLOCKS = {
    "num_draft_tokens is 0": {"num_draft_tokens": 0},
    "input_ids has 3 elements, needs 8": {"input_ids": torch.zeros(3, dtype=torch.int32)},
    "input_ids has dtype Float": {"input_ids": torch.zeros(8)},
    "target_positions has 2 dimensions": {"target_positions": torch.zeros(2, 4, dtype=torch.int64)},
    "target_positions has stride 2": {"target_positions": torch.zeros(16, dtype=torch.int64)[::2]},
    "kv_block_sizes[0] is 0": {"kv_block_sizes": [0]},
    "request_index[1] is 9, there are 2": {"request_index": torch.tensor([1, 9])},
    "kv_block_sizes has 2 entries, block_tables 1": {"kv_block_sizes": [16, 16]},
    "block_tables[0] has dtype Long": {"block_tables": [torch.zeros(2, 16, dtype=torch.int64)]},
    "block_tables[0] has 1 rows, needs 2": {
        "block_tables": [torch.zeros(1, 16, dtype=torch.int32)]
    },
    "query_slots has 2 rows, row 5": {"query_slot_rows": [5]},
    "query_start_loc[1] is 9": {"query_start_loc": torch.tensor([0, 9, 8])},
    "target_positions[3] is -1": {"target_positions": torch.tensor([0, 1, 2, -1, 4, 5, 6, 7])},
    "num_sampled and prefill_ids": {"num_sampled": torch.zeros(2, dtype=torch.int32)},
    "context_slots has rows of 1, needs 8": {"context_slots": torch.zeros(1, 1, dtype=torch.int64)},
}


@pytest.mark.parametrize("message", BAD_BLOCKS)
def test_build_block_refuses(message):
    case = cases.block_case([4, 4], [0, 1]) | BAD_BLOCKS[message]
    with pytest.raises(
        RuntimeError, match=r"(?s)vllm_dflash::build_block failed.*dflash_ops"
    ) as error:
        ops.build_block(**case)
    assert message in str(error.value)


BAD_KV = {
    "kv has dtype Double": {"kv": torch.zeros(6, 2, 2, 2, 64, dtype=torch.float64)},
    "kv must have the shape": {"kv": torch.zeros(6, 2, 2, 64)},
    "k_norm_weights must be contiguous with shape [2, 64]": {"k_norm_weights": torch.zeros(2, 32)},
    "k_norm_weights has dtype bfloat16, kv float32": {
        "k_norm_weights": torch.zeros(2, 64).bfloat16()
    },
    "positions has 5 elements, needs 6": {"positions": torch.zeros(5, dtype=torch.int64)},
    "positions[0] is 500, cos_sin_cache has 500 rows": {"positions": torch.full((6,), 500)},
    "cos_sin_cache rotates 80 elements": {"cos_sin_cache": torch.zeros(500, 80)},
    "key_caches has 1 layers, kv 2": {"key_caches": [torch.zeros(4, 16, 2, 64)]},
    "slots[1] has 3 elements, needs 6": {"slots": [torch.zeros(6).long(), torch.zeros(3).long()]},
    "slots[0] has dtype int32": {"slots": [torch.zeros(6).int()] * 2},
    "slots has 1 layers, kv 2": {"slots": [torch.zeros(6).long()]},
    "hold 9999 for token 0": {"slots": [torch.full((6,), 9999)] * 2},
}


@pytest.mark.parametrize("message", BAD_KV)
def test_store_context_kv_refuses(message):
    case = cases.kv_case(6) | BAD_KV[message]
    with pytest.raises(RuntimeError, match="vllm_dflash::store_context_kv failed") as error:
        ops.store_context_kv(**case)
    assert message in str(error.value)


BAD_TAPS = {
    "hidden has dtype bfloat16, features float32": (torch.zeros(4, 8).bfloat16(), None, 0),
    "features has 4 rows, hidden 5": (torch.zeros(5, 8), None, 0),
    "column is 9, hidden has 8 columns, features 16": (torch.zeros(4, 8), None, 9),
    "column is -1": (torch.zeros(4, 8), None, -1),
    "residual must have the shape of hidden, [4, 8]": (torch.zeros(4, 8), torch.zeros(3, 8), 0),
    "hidden has 1 dimensions": (torch.zeros(8), None, 0),
    "hidden has inner stride 2": (torch.zeros(4, 16)[:, ::2], None, 0),
}


@pytest.mark.parametrize("message", BAD_TAPS)
def test_tap_refuses(message):
    hidden, residual, column = BAD_TAPS[message]
    with pytest.raises(RuntimeError, match="vllm_dflash::tap_hidden_states failed") as error:
        ops.tap_hidden_states(torch.zeros(4, 16), hidden, residual, column=column)
    assert message in str(error.value)
