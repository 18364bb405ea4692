"""The CUDA kernels, run on the host (tests/helpers/cuda_emulation), against the reference.

Everything but the device itself is what ships: argument checks, launch sizes, dispatch and kernels. Each case
runs in two orders of blocks and threads, and nothing around an output may change.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers import op_cases as cases
from helpers.cuda_emulation import emulation
from vllm_dflash.ops import reference
from vllm_dflash.ops.build import BuildError

EMULATION = Path(__file__).resolve().parents[2] / "helpers" / "cuda_emulation"

try:
    emulation.cuda_include()
    emulation.build.find_cxx(os.environ)
    MISSING = ""
except BuildError as error:
    MISSING = str(error)

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"the kernels cannot be emulated: {MISSING}")
made_up = settings(max_examples=150, database=None)

OUTPUTS = {
    "build_block": cases.BLOCK_OUTPUTS,
    "tap_hidden_states": ("features",),
    "store_context_kv": ("key_caches", "value_caches"),
}
#: Elements before and behind an output; keeps the alignment of the vector accesses.
MARGIN = 64


def run(op: str, case: dict[str, Any], **options: Any) -> None:
    """Runs an op, emulated and as the reference, and compares outputs and what lies around them."""
    names = OUTPUTS[op]
    emulated = emulation.load()
    want = {k: apart(v) if k in names else v for k, v in case.items()}
    call(getattr(reference, op), op, want | options)
    for order in (0, 1):
        got = {k: apart(v) if k in names else v for k, v in case.items()}
        before = emulated.launches
        emulated.set_order(order)
        call(getattr(emulated.ops, op), op, got)
        assert emulated.launches - before <= 1
        for name in names:
            compare(name, got.get(name), want.get(name))


def call(function: Any, op: str, case: dict[str, Any]) -> None:
    schema = torch._C.parse_schema(f"x::{op}{emulation.SCHEMAS[op]}")
    function(*[case.get(argument.name) for argument in schema.arguments])


def apart(value: Any) -> Any:
    """A copy with the same strides and alignment, in a storage of its own filled with canaries."""
    if isinstance(value, list):
        return [apart(v) for v in value]
    if not isinstance(value, Tensor):
        return value
    extent = 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
    extent = max(extent, 0) if value.numel() else 0
    offset = MARGIN + value.storage_offset() % 16
    storage = torch.full((offset + extent + MARGIN,), cases.CANARY).to(value.dtype)
    view = storage.as_strided(value.shape, value.stride(), offset)
    view.copy_(value)
    return view


def compare(name: str, got: Any, want: Any) -> None:
    if isinstance(got, list):
        cases.assert_caches_close(got, want)
        for a, b in zip(got, want, strict=True):
            compare_surroundings(name, a, b)
    elif got is not None:
        torch.testing.assert_close(
            got, want, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{name}: {m}"
        )
        compare_surroundings(name, got, want)


def compare_surroundings(name: str, got: Tensor, want: Tensor) -> None:
    assert torch.equal(surroundings(got), surroundings(want)), f"{name}: written beside the output"


def surroundings(tensor: Tensor) -> Tensor:
    """The bytes of a tensor's storage, zero where the tensor itself lies."""
    flat = torch.tensor([], dtype=tensor.dtype).set_(tensor.untyped_storage()).clone()
    flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).zero_()
    return flat.view(torch.uint8)


# --- the emulator --------------------------------------------------------------------------------

MISTAKES = {
    2: "lanes of one warp are at",
    3: "at __syncwarp|never come",
    4: "reads lane 1, which has left",
    5: "misaligned access of 16 bytes",
}


def selftest(kernel: int, order: int = 0) -> tuple[str, list[int]]:
    emulated = emulation.load()
    emulated.set_order(order)
    emulated.lib.vd_emulation_selftest.restype = ctypes.c_char_p
    out = (ctypes.c_int * 128)()
    return emulated.lib.vd_emulation_selftest(kernel, out).decode(), list(out)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_emulator_runs_a_right_kernel(order):
    assert selftest(0, order) == ("", [sum(range(64))] * 128)


def test_order_uncovers_a_missing_barrier():
    results = {tuple(selftest(1, order)[1]) for order in range(3)}
    assert len(results) > 1


@pytest.mark.parametrize("kernel", MISTAKES)
def test_emulator_finds_mistakes(kernel):
    said, _ = selftest(kernel)
    assert any(part in said for part in MISTAKES[kernel].split("|")), said


# --- build_block ---------------------------------------------------------------------------------

BLOCKS: dict[str, dict[str, Any]] = {
    "decode": {"context_lens": [4, 4, 4], "rejected": [0, 2, 3]},
    "one token": {"context_lens": [1], "rejected": None},
    "no rejected given": {"context_lens": [5, 1], "rejected": None},
    "prefill and decode": {"context_lens": [70, 1, 4], "rejected": [0, 0, 1]},
    "empty requests": {"context_lens": [0, 3, 0, 2, 0], "rejected": [0, 1, 0, 0, 0]},
    "all rejected": {"context_lens": [4, 2], "rejected": [4, 2]},
    "too many rejected": {"context_lens": [4, 2], "rejected": [9, -3]},
    "no requests": {"context_lens": [], "rejected": [], "padding": 5},
    "no tokens": {"context_lens": [0, 0], "rejected": [0, 0], "padding": 300},
    "padding": {"context_lens": [4, 1], "rejected": [1, 0], "padding": 7},
    "long padding": {"context_lens": [4, 1], "rejected": [1, 0], "padding": 1000, "states": True},
    "two groups": {"context_lens": [20, 4], "rejected": [0, 2], "kv_block_sizes": (16, 5)},
    "eight groups": {"context_lens": [9, 4], "rejected": None, "kv_block_sizes": (16, 5, 1, 7, 64, 2, 3, 4)},
    "states": {"context_lens": [4, 9, 1], "rejected": [2, 0, 0], "states": True, "padding": 3},
    "lengths": {"context_lens": [4, 9, 1], "rejected": [2, 0, 0], "lengths": True},
    "from anchor": {"context_lens": [4, 9], "rejected": [2, 0], "sample_from_anchor": True, "states": True},
    "int64": {"context_lens": [4, 9], "rejected": [2, 0], "wide": True, "states": True},
    "evicted blocks": {"context_lens": [60, 40], "rejected": [0, 3], "null_blocks": True},
    "end of the model": {"context_lens": [4, 4], "rejected": [0, 3], "starts": [252, 251]},
    "end inside a cache block": {
        "context_lens": [4, 4],
        "rejected": [0, 3],
        "starts": [246, 245],
        "max_model_len": 250,
    },
    "cache block boundary": {"context_lens": [1, 2, 16, 17], "rejected": None, "starts": [15, 15, 16, 31]},
    "thread block boundary": {"context_lens": [255, 1, 256, 1, 255, 2], "rejected": [0, 1, 9, 0, 255, 0]},
    "one thread block": {"context_lens": [256], "rejected": [3], "max_model_len": 600},
    "256 requests": {"context_lens": [8] * 256, "rejected": [i % 9 for i in range(256)], "states": True},
    "more requests than shared memory holds": {
        "context_lens": [i % 3 for i in range(2500)],
        "rejected": [i % 2 for i in range(2500)],
        "num_draft_tokens": 1,
    },
    "many empty requests first": {"context_lens": [0] * 1500 + [300], "rejected": None, "num_draft_tokens":
    1}, "shared memory full": {"context_lens": [1] * 1024 + [0, 1], "rejected": None, "num_draft_tokens":
    1}, "long": {"context_lens": [5000, 3000], "rejected": [0, 3], "max_model_len": 40000},
}  # fmt: skip


@pytest.mark.parametrize("name", BLOCKS)
def test_build_block(name):
    run("build_block", cases.block_case(**BLOCKS[name]))


@given(data=st.data())
@made_up
def test_build_block_made_up(data):
    lens = data.draw(st.lists(st.integers(0, 40), max_size=6), label="context_lens")
    rejected = [data.draw(st.integers(0, n)) for n in lens]
    case = cases.block_case(
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
    run("build_block", case)


def test_block_of_positions_that_jump():
    case = cases.block_case([6], [0])
    case["target_positions"] = torch.tensor([3, 4, 90, 91, 17, 16])
    run("build_block", case)


def test_rows_before_the_first_request_are_padding():
    case = cases.block_case([5, 4], [0, 1])
    case["query_start_loc"] = torch.tensor([3, 5, 9], dtype=torch.int32)
    run("build_block", case)


def test_positions_outside_the_table_are_padding():
    case = cases.block_case([6], [0], max_model_len=64)
    case["target_positions"] = torch.tensor([0, 63, -1, 1000, 2**31 - 1, 2**40])
    run("build_block", case)


def test_states_outside_the_tensors_are_left_alone():
    """A GPU cannot raise an error about its data; what it must not do is read and write elsewhere."""
    good = cases.block_case([4, 2, 3], [0, 0, 0], states=True)
    bad = {k: apart(v) if k in OUTPUTS["build_block"] else v for k, v in good.items()}
    bad["request_index"] = good["request_index"].clone()
    bad["request_index"][1] = 10**6
    call(emulation.load().ops.build_block, "build_block", bad)
    assert bad["input_ids"].view(3, -1)[1, 0] == 0
    written = {int(bad["request_index"][0]), int(bad["request_index"][2])}
    for name in ("temperature_out", "seeds_out"):
        left = [i for i, value in enumerate(bad[name].tolist()) if value == cases.CANARY]
        assert set(left) == set(range(bad[name].numel())) - written


# --- tap_hidden_states ---------------------------------------------------------------------------


def tap_case(
    tokens: int, width: int, dtype: torch.dtype, *, residual: bool, column: int = 0, spare: int = 0
) -> dict[str, Any]:
    """``spare``: further columns of hidden and residual, so that rows have other strides."""
    g = torch.Generator().manual_seed(tokens + width)
    rows = [torch.randn(tokens, width + spare, generator=g).to(dtype)[:, :width] for _ in range(2)]
    return {
        "features": torch.full((tokens + 2, -(-(column + width) // 8) * 8 + 16), 7.0, dtype=dtype),
        "hidden": rows[0],
        "residual": rows[1] if residual else None,
        "column": column,
    }


@pytest.mark.parametrize("residual", [True, False], ids=["residual", "plain"])
@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize(
    ("tokens", "width", "column", "spare"),
    [
        (1, 64, 0, 0),
        (1, 64, 3, 1),  # alignment of rows does not matter, that of the column does
        (9, 100, 8, 4),  # columns behind the last vector
        (9, 104, 104, 8),
        (7, 577, 577, 0),
        (6, 3, 1, 0),
        (2, 4096, 4096, 0),
        (3, 5376, 0, 0),
        (0, 8, 0, 0),
    ],
)
def test_tap(dtype, tokens, width, column, spare, residual):
    run(
        "tap_hidden_states",
        tap_case(tokens, width, dtype, residual=residual, column=column, spare=spare),
    )


@pytest.mark.parametrize(("tokens", "width", "column"), [(4101, 72, 8), (4099, 33, 5)])
def test_tap_of_many_tokens(tokens, width, column):
    """Enough for several rows a thread, the last ones incomplete."""
    case = tap_case(tokens, width, torch.bfloat16, residual=True, column=column)
    run("tap_hidden_states", case)
    blocks = int(emulation.load().last.split()[-1].split("x")[0])
    assert blocks == -(-tokens // 4)


@pytest.mark.parametrize(
    ("width", "column", "spare", "vectors"),
    [(4096, 0, 0, 512), (4096, 4, 0, 4096), (100, 8, 4, 12), (100, 8, 0, 100)],
)
def test_tap_takes_vectors_where_it_can(width, column, spare, vectors):
    run(
        "tap_hidden_states",
        tap_case(2, width, torch.bfloat16, residual=True, column=column, spare=spare),
    )
    chunks = -(-vectors // 256)
    threads = -(-vectors // chunks // 32) * 32
    assert emulation.load().last.endswith(f" {2 * chunks}x1x{threads}")


def test_tap_keeps_special_values():
    hidden = torch.tensor(
        [[float("inf"), -float("inf"), float("nan"), -0.0, 3e38, 1e-40, 0.0, 1.0]]
    ).bfloat16()
    run(
        "tap_hidden_states",
        {"features": torch.zeros(1, 8).bfloat16(), "hidden": hidden, "column": 0},
    )
    run(
        "tap_hidden_states",
        {
            "features": torch.zeros(1, 8).bfloat16(),
            "hidden": hidden,
            "residual": hidden,
            "column": 0,
        },
    )


@given(data=st.data())
@made_up
def test_tap_made_up(data):
    case = tap_case(
        data.draw(st.integers(0, 40)),
        data.draw(st.integers(1, 700)),
        data.draw(st.sampled_from(cases.FLOATS)),
        residual=data.draw(st.booleans()),
        column=data.draw(st.integers(0, 40)),
        spare=data.draw(st.integers(0, 16)),
    )
    run("tap_hidden_states", case)


# --- store_context_kv ----------------------------------------------------------------------------

KV: dict[str, dict[str, Any]] = {
    "plain": {},
    "interleaved": {"is_neox": False},
    "partial": {"rotary_dim": 32},
    "partial interleaved": {"rotary_dim": 32, "is_neox": False, "head_size": 128},
    "odd partial": {"rotary_dim": 20},
    "odd partial interleaved": {"rotary_dim": 24, "is_neox": False},
    "no rotation": {"rotary_dim": 0},
    "HND": {"layout": "HND"},
    "split": {"layout": "split"},
    "one head": {"num_heads": 1, "head_size": 256},
    "three heads": {"num_heads": 3, "head_size": 128, "layout": "HND"},
    "eight heads": {"num_heads": 8, "head_size": 128, "num_layers": 1},
    "nineteen heads": {"num_heads": 19, "head_size": 64, "num_layers": 1},
    "small head": {"head_size": 12, "rotary_dim": 6},
    "smallest vectors": {"head_size": 16},
    "value scale": {"value_scale": 0.3},
    "three groups": {"groups": 3, "num_layers": 5},
    "wider projection": {"non_contiguous": True},
    "staging": {"consecutive": True},
    "all skipped": {"skipped": 1.1},
    "nothing skipped": {"skipped": 0.0},
    "one-token blocks": {"kv_block_size": 1},
    "odd blocks": {"kv_block_size": 7, "layout": "HND"},
    **{
        f"head size {d}": {"head_size": d}
        for d in (32, 40, 72, 80, 96, 112, 128, 192, 256, 512, 576)
    },
    **{f"head size {d}, interleaved": {"head_size": d, "is_neox": False} for d in (80, 128, 256)},
}


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("name", KV)
def test_store_context_kv(name, dtype):
    for tokens in (0, 1, 13):
        run("store_context_kv", cases.kv_case(tokens, dtype=dtype, **KV[name]))


@pytest.mark.parametrize("cache_dtype", cases.FLOAT8, ids=str)
@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("head_size", [64, 80, 12])
def test_store_context_kv_float8(head_size, dtype, cache_dtype):
    """Values far outside a float8 saturate."""
    case = cases.kv_case(
        33,
        dtype=dtype,
        cache_dtype=cache_dtype,
        value_scale=300.0,
        layout="HND",
        head_size=head_size,
    )
    run("store_context_kv", case)
    case["key_scales"] = case["value_scales"] = None
    case["kv"] = case["kv"] * 1000
    run("store_context_kv", case)


@pytest.mark.parametrize("head_size", [128, 100])
@pytest.mark.parametrize("is_neox", [True, False], ids=["neox", "interleaved"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_store_context_kv_rope_in_float32(dtype, is_neox, head_size):
    case = cases.kv_case(
        21,
        dtype=dtype,
        rope_dtype=torch.float32,
        is_neox=is_neox,
        head_size=head_size,
        rotary_dim=head_size,
    )
    run("store_context_kv", case)


VECTORS = "more parameters"


@pytest.mark.parametrize(
    ("options", "vectors"),
    [
        ({"head_size": 64}, True),
        ({"head_size": 80}, True),
        ({"head_size": 96}, True),
        ({"head_size": 112}, True),
        ({"head_size": 128}, True),
        ({"head_size": 256, "layout": "HND"}, True),
        ({"head_size": 128, "rotary_dim": 32}, True),
        ({"head_size": 128, "is_neox": False}, True),
        ({"head_size": 128, "non_contiguous": True}, True),
        ({"head_size": 128, "rotary_dim": 40}, False),
        ({"head_size": 72}, False),
        ({"head_size": 576}, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_vectors_where_they_fit(options, vectors, cache_dtype):
    run(
        "store_context_kv",
        cases.kv_case(9, dtype=torch.bfloat16, cache_dtype=cache_dtype, **options),
    )
    assert emulation.load().last.startswith(VECTORS) == vectors


@pytest.mark.parametrize("what", ["kv", "values", "cache", "weights", "rope"])
def test_misaligned_tensors(what):
    """One element off: right all the same, without vectors."""
    case = cases.kv_case(9, dtype=torch.bfloat16, layout="split")

    def moved(tensor: Tensor) -> Tensor:
        flat = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
        return flat[1:].view(tensor.shape).copy_(tensor)

    if what == "kv":
        case["kv"] = moved(case["kv"])
    elif what == "values":
        wide = torch.empty(9 * 1024, dtype=torch.bfloat16)
        case["kv"] = wide.as_strided((9, 2, 2, 2, 64), (1024, 512, 257, 64, 1)).copy_(case["kv"])
    elif what == "cache":
        case["value_caches"][1] = moved(case["value_caches"][1])
    elif what == "weights":
        case["k_norm_weights"] = moved(case["k_norm_weights"])
    else:
        case["cos_sin_cache"] = moved(case["cos_sin_cache"])
    run("store_context_kv", case)
    assert not emulation.load().last.startswith(VECTORS)


def test_strides_of_single_rows_do_not_matter():
    case = cases.kv_case(1, dtype=torch.bfloat16, num_layers=1)
    case["kv"] = case["kv"].as_strided(case["kv"].shape, (3, 5, *case["kv"].stride()[2:]))
    run("store_context_kv", case)
    assert emulation.load().last.startswith(VECTORS)


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("heads", [1, 2, 3, 8, 9])
def test_keys_and_values_in_different_layouts(heads, cache_dtype):
    options = {
        "num_heads": heads,
        "head_size": 128,
        "dtype": torch.bfloat16,
        "cache_dtype": cache_dtype,
    }
    case = cases.kv_case(70, layout="HND", value_scale=0.7, **options)
    case["value_caches"] = cases.kv_case(70, layout="split", **options)["value_caches"]
    run("store_context_kv", case)


@pytest.mark.parametrize(("tokens", "splits"), [(11, 2), (12, 1)])
def test_large_batches_go_over_all_heads(tokens, splits):
    """Warps of a large batch take all heads in turn and wait for the slots before they read."""
    run("store_context_kv", cases.kv_case(tokens, num_heads=9, head_size=64, dtype=torch.bfloat16))
    assert emulation.load().last == f"{VECTORS} {3 * 2 * splits}x1x128"


def test_store_of_many_tokens():
    run("store_context_kv", cases.kv_case(4100, num_layers=1, num_heads=1, dtype=torch.bfloat16))


def test_slots_outside_the_caches_are_skipped():
    for head_size in (64, 12):
        case = cases.kv_case(12, head_size=head_size)
        capacity = case["key_caches"][0].shape[0] * case["key_caches"][0].shape[1]
        case["slots"][0][:6] = torch.tensor([capacity, capacity - 1, 2**31, 2**40, -5, 0])
        run("store_context_kv", case)


def test_positions_are_clamped():
    """Skipped tokens may have any position, and a GPU cannot raise an error about one that is not skipped."""
    for head_size in (64, 12):
        case = cases.kv_case(6, head_size=head_size, skipped=0)
        case["positions"] = torch.tensor([500, 499, -1, 0, 2**40, -(2**40)])
        run("store_context_kv", case, positions=case["positions"].clamp(0, 499))


def test_values_are_copied_bit_by_bit():
    case = cases.kv_case(5, dtype=torch.bfloat16, layout="split", skipped=0, consecutive=True)
    case["kv"][:, :, 1] = (
        torch.randint(-(2**15), 2**15, case["kv"][:, :, 1].shape).short().view(torch.bfloat16)
    )
    emulation.load().set_order(0)
    call(emulation.load().ops.store_context_kv, "store_context_kv", case)
    for layer in range(2):
        stored = case["value_caches"][layer].view(5, 2, 64)
        assert torch.equal(stored.view(torch.int16), case["kv"][:, layer, 1].view(torch.int16))


@given(data=st.data())
@made_up
def test_store_context_kv_made_up(data):
    step = data.draw(st.sampled_from([2, 16, 32]))
    head = data.draw(st.integers(1, 160 // step)) * step
    rotary = (
        2 * data.draw(st.integers(0, head // 2))
        if step == 2
        else step * data.draw(st.integers(0, head // step))
    )
    dtype = data.draw(st.sampled_from(cases.FLOATS))
    case = cases.kv_case(
        data.draw(st.integers(0, 30)),
        num_layers=data.draw(st.integers(1, 4)),
        num_heads=data.draw(st.integers(1, 9)),
        head_size=head,
        rotary_dim=rotary,
        is_neox=data.draw(st.booleans()),
        dtype=dtype,
        cache_dtype=data.draw(st.sampled_from([None, *cases.FLOAT8])),
        rope_dtype=data.draw(st.sampled_from([None, torch.float32])),
        layout=data.draw(st.sampled_from(["NHD", "HND", "split"])),
        kv_block_size=data.draw(st.integers(1, 20)),
        groups=data.draw(st.integers(1, 3)),
        value_scale=data.draw(st.sampled_from([1.0, 0.5])),
        non_contiguous=data.draw(st.booleans()),
        seed=data.draw(st.integers(0, 99)),
    )
    run("store_context_kv", case)


# --- errors and bounds ---------------------------------------------------------------------------


def test_arguments_are_checked():
    case = cases.kv_case(6) | {"positions": torch.zeros(5, dtype=torch.int64)}
    with pytest.raises(RuntimeError, match="store_context_kv: positions has 5 elements, needs 6"):
        call(emulation.load().ops.store_context_kv, "store_context_kv", case)
    case = cases.block_case([4], [0]) | {"kv_block_sizes": [2**31]}
    with pytest.raises(RuntimeError, match=r"build_block: kv_block_sizes\[0\] is 2147483648"):
        call(emulation.load().ops.build_block, "build_block", case)


@pytest.mark.parametrize("end", ["before", "behind"])
def test_nothing_outside_the_tensors_is_touched(end):
    """Every tensor lies against a page that may not be read; a mistake kills the process."""
    emulation.load()  # compiles
    command = [sys.executable, str(EMULATION / "guarded.py"), end]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "ran" in done.stdout
