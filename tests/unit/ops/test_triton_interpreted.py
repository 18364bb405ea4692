"""The Triton kernels against the reference, and that they compile.

Without a GPU the cases run in Triton's interpreter, on CPU tensors. An environment variable chooses it when
triton is imported, so a process of its own runs this file again with it. With a GPU they run natively too.
"""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers import op_cases as cases
from vllm_dflash.ops import reference

triton = pytest.importorskip("triton")

from vllm_dflash.ops import triton_kernels  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
RUNS_KERNELS = INTERPRETED or DEVICE == "cuda"
#: Elements around an output that must keep their value.
MARGIN = 3
made_up = settings(max_examples=40, database=None, deadline=None)


def call(op: Callable[..., None], case: dict[str, Any]) -> None:
    """Calls an op with a case's values in the order of its parameters; None for those a case leaves out."""
    op(*[case.get(name) for name in inspect.signature(op).parameters])


def moved(value: Any) -> Any:
    """To the device under test, with the strides kept."""
    if isinstance(value, Tensor):
        return torch.empty_strided(
            value.size(), value.stride(), dtype=value.dtype, device=DEVICE
        ).copy_(value)
    return [moved(v) for v in value] if isinstance(value, list) else value


def with_margins(tensor: Tensor, order: tuple[int, ...] | None = None) -> tuple[Tensor, Tensor]:
    """A buffer full of canaries, and the view inside that holds ``tensor``; dimensions lie in ``order``."""
    order = order or tuple(range(tensor.dim()))
    base = torch.full([tensor.shape[i] + 2 * MARGIN for i in order], cases.CANARY, device=DEVICE)
    base = base.to(tensor.dtype)
    view = base[(slice(MARGIN, -MARGIN),) * base.dim()].permute(
        [order.index(i) for i in range(len(order))]
    )
    view.copy_(tensor)
    return base, view


def check_block(case: dict[str, Any]) -> None:
    case = {name: moved(value) for name, value in case.items()}
    results = []
    for op in (reference.build_block, triton_kernels.build_block):
        outputs = {n: with_margins(case[n]) for n in cases.BLOCK_OUTPUTS if case.get(n) is not None}
        call(op, case | {name: view for name, (_, view) in outputs.items()})
        results.append({name: base for name, (base, _) in outputs.items()})
    for name, want in results[0].items():
        assert torch.equal(results[1][name], want), f"{name}: {results[1][name]} instead of {want}"


def check_kv(
    case: dict[str, Any], order: tuple[int, ...] | None = None, exact: bool = False
) -> None:
    """``order``: how blocks, tokens, heads and elements lie; default as in the case, without margins."""
    case = {name: moved(value) for name, value in case.items()}
    results = []
    for op in (reference.store_context_kv, triton_kernels.store_context_kv):
        caches, bases = {}, []
        for name in ("key_caches", "value_caches"):
            pairs = [
                with_margins(cache, order) if order else (moved(cache),) * 2 for cache in case[name]
            ]
            caches[name] = [view for _, view in pairs]
            bases += [base for base, _ in pairs]
        call(op, case | caches)
        results.append((caches, bases))
    (want, want_bases), (got, got_bases) = results
    for name in ("key_caches", "value_caches"):
        cases.assert_caches_close(got[name], want[name])
        for layer, (a, b) in enumerate(zip(got[name], want[name], strict=True)):
            if exact:
                assert torch.equal(raw(a), raw(b))
            # What belongs to no slot is not merely close to what it was.
            slots = case["slots"][layer] if case["slots"] else torch.arange(case["kv"].shape[0])
            rest = torch.ones(a.shape[0] * a.shape[1], dtype=torch.bool)
            rest[slots[slots >= 0].cpu()] = False
            assert torch.equal(raw(a).flatten(0, 1)[rest], raw(b).flatten(0, 1)[rest])
    if order:
        inside = (slice(MARGIN, -MARGIN),) * 4
        for a, b in zip(got_bases, want_bases, strict=True):
            raw(a)[inside] = raw(b)[inside] = 0
            assert torch.equal(raw(a), raw(b))


def raw(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8) if tensor.dtype in cases.FLOAT8 else tensor


# --- in the interpreter, or on a GPU --------------------------------------------------------------

BLOCKS = {
    "decode": {"context_lens": [4, 4, 4], "rejected": [0, 2, 3]},
    "no rejected given": {"context_lens": [5, 1], "rejected": None},
    "prefill and decode": {"context_lens": [70, 1, 4], "rejected": [0, 0, 1]},
    "empty requests": {"context_lens": [0, 3, 0, 0, 2, 0], "rejected": [0, 1, 0, 0, 0, 0]},
    "all rejected": {"context_lens": [4, 2], "rejected": [4, 2], "states": True},
    "too many rejected": {"context_lens": [4, 2], "rejected": [9, -3]},
    "no requests": {"context_lens": [], "rejected": [], "padding": 3},
    "no requests with states": {"context_lens": [], "rejected": [], "states": True},
    "no tokens": {"context_lens": [0, 0], "rejected": [0, 0], "states": True, "lengths": True},
    "padding": {"context_lens": [4, 1], "rejected": [1, 0], "padding": 7},
    "three groups": {"context_lens": [20, 4], "rejected": [0, 2], "kv_block_sizes": (16, 5, 1)},
    "states": {"context_lens": [4, 9, 1], "rejected": [2, 0, 0], "states": True, "padding": 3},
    "lengths": {"context_lens": [4, 9, 1], "rejected": [2, 0, 0], "lengths": True},
    "from anchor": {"context_lens": [4, 9], "rejected": [2, 0], "sample_from_anchor": True, "states": True},
    "one from anchor": {
        "context_lens": [4, 9], "rejected": [2, 0], "sample_from_anchor": True, "num_draft_tokens": 1,
    },
    "int64": {"context_lens": [4, 9], "rejected": [2, 0], "wide": True, "states": True, "lengths": True},
    "evicted blocks": {"context_lens": [60, 40], "rejected": [0, 3], "null_blocks": True},
    "end of the model": {"context_lens": [4, 4], "rejected": [0, 3], "starts": [252, 251], "states": True},
    "end of the model inside a block": {
        "context_lens": [4, 4], "rejected": [0, 3], "starts": [243, 249], "max_model_len": 250,
    },
    "block boundary": {"context_lens": [1, 2, 16, 17], "rejected": None, "starts": [15, 15, 16, 31]},
    "several programs": {
        "context_lens": [300, 1, 0, 200], "rejected": [0, 1, 0, 150], "max_model_len": 600, "padding": 99,
    },
    "many requests": {"context_lens": [3, 0, 1] * 60, "rejected": [1, 0, 0] * 60, "states": True},
}  # fmt: skip


class TestBuildBlock:
    __test__ = RUNS_KERNELS

    @pytest.mark.parametrize("name", BLOCKS)
    def test_case(self, name):
        check_block(cases.block_case(**BLOCKS[name]))

    @given(data=st.data())
    @made_up
    def test_made_up(self, data):
        lens = data.draw(st.lists(st.integers(0, 40), max_size=6), label="context_lens")
        rejected = [data.draw(st.integers(0, n)) for n in lens]
        check_block(
            cases.block_case(
                lens,
                data.draw(st.sampled_from([rejected, None])),
                num_draft_tokens=data.draw(st.integers(1, 16)),
                kv_block_sizes=tuple(
                    data.draw(st.lists(st.integers(1, 33), min_size=1, max_size=3))
                ),
                sample_from_anchor=data.draw(st.booleans()),
                states=data.draw(st.booleans()),
                lengths=data.draw(st.booleans()),
                padding=data.draw(st.integers(0, 9)),
                wide=data.draw(st.booleans()),
                null_blocks=data.draw(st.booleans()),
                seed=data.draw(st.integers(0, 99)),
            )
        )

    def test_non_consecutive_positions(self):
        case = cases.block_case([6], [0])
        case["target_positions"] = torch.tensor([3, 4, 90, 91, 17, 16])
        check_block(case)

    def test_tokens_of_no_request(self):
        """CUDA graphs pad the tokens: there are more than the requests own, before or behind."""
        case = cases.block_case([6, 5], [0, 2], padding=2)
        case["query_start_loc"] = torch.tensor([2, 6, 9], dtype=torch.int32)
        check_block(case)

    @pytest.mark.parametrize(
        "given",
        [("temperature", "temperature_out"), ("seeds", "seeds_out"), ("sample_positions",), ()],
    )
    def test_each_optional_argument(self, given):
        case = cases.block_case([4, 9], [2, 0], states=True)
        optional = {"temperature", "temperature_out", "seeds", "seeds_out"}
        optional |= {"sample_positions", "sample_requests", "num_sampled", "prefill_ids"}
        check_block({name: v for name, v in case.items() if name not in optional or name in given})

    def test_states_that_are_none(self):
        """The data of CUDA tensors is not checked: nothing may be read or written where there is no state."""
        case = cases.block_case([4, 9, 2], [2, 0, 0], states=True)
        index = case["request_index"].clone()
        index[0], index[2] = -1, 10**6
        case = {name: moved(value) for name, value in (case | {"request_index": index}).items()}
        base, case["temperature_out"] = with_margins(case["temperature_out"])
        call(triton_kernels.build_block, case)
        assert case["input_ids"].view(3, 4)[[0, 2], 0].tolist() == [0, 0]
        written = (base != cases.CANARY).nonzero().flatten().tolist()
        assert written == [MARGIN + int(index[1])]


class TestTap:
    __test__ = RUNS_KERNELS

    @pytest.mark.parametrize("residual", [True, False], ids=["residual", "plain"])
    @pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
    @pytest.mark.parametrize(("tokens", "width"), [(1, 64), (9, 100), (3, 2500), (0, 8)])
    def test_case(self, dtype, tokens, width, residual):
        hidden = torch.randn(tokens, 2 * width, device=DEVICE).to(dtype)[:, width:]
        other = (
            torch.randn(tokens, width + 3, device=DEVICE).to(dtype)[:, :width] if residual else None
        )
        features = torch.full((tokens + 2, 3 * width + 1), 7.0, dtype=dtype, device=DEVICE)
        want = features.clone()
        reference.tap_hidden_states(want, hidden, other, width)
        triton_kernels.tap_hidden_states(features, hidden, other, width)
        # The interpreter rounds to bfloat16 towards zero.
        loose = INTERPRETED and residual and dtype == torch.bfloat16
        rtol = torch.finfo(dtype).eps if loose else 0
        torch.testing.assert_close(features, want, rtol=rtol, atol=0)


KV = {
    "plain": {},
    "interleaved": {"is_neox": False},
    "partial": {"rotary_dim": 32},
    "partial interleaved": {"rotary_dim": 24, "is_neox": False},
    "no rotation": {"rotary_dim": 0},
    "HND": {"layout": "HND"},
    "split": {"layout": "split"},
    "head of 80": {"head_size": 80, "rotary_dim": 40},
    "head of 96": {"head_size": 96, "num_heads": 3, "is_neox": False},
    "head of 112": {"head_size": 112, "num_heads": 5},
    "one head": {"num_heads": 1, "head_size": 256},
    "more heads than a tile": {"num_heads": 20, "head_size": 128, "num_layers": 1},
    "small head": {"head_size": 12, "rotary_dim": 6},
    "one layer": {"num_layers": 1},
    "many layers": {"num_layers": 9, "num_heads": 1, "head_size": 8},
    "value scale": {"value_scale": 0.3},
    "two groups": {"groups": 2, "num_layers": 3},
    "wider projection": {"non_contiguous": True},
    "staging": {"consecutive": True},
    "all skipped": {"skipped": 1.1},
    "one-token blocks": {"kv_block_size": 1},
}
NHD, HND, HEADS_FIRST = (0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3)


class TestStoreContextKv:
    __test__ = RUNS_KERNELS

    @pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
    @pytest.mark.parametrize("name", KV)
    def test_case(self, name, dtype):
        for tokens in (1, 6):
            check_kv(cases.kv_case(tokens, dtype=dtype, **KV[name]))

    def test_no_tokens(self):
        check_kv(cases.kv_case(0))

    @pytest.mark.parametrize("order", [NHD, HND, HEADS_FIRST])
    @pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
    def test_margins(self, dtype, order):
        check_kv(cases.kv_case(7, dtype=dtype, head_size=80, num_heads=3), order)

    @pytest.mark.parametrize("order", [NHD, HND])
    @pytest.mark.parametrize("cache_dtype", cases.FLOAT8, ids=str)
    @pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
    def test_float8(self, dtype, cache_dtype, order):
        """With values that saturate."""
        check_kv(cases.kv_case(9, dtype=dtype, cache_dtype=cache_dtype, value_scale=300.0), order)

    @pytest.mark.parametrize("cache_dtype", cases.FLOAT8, ids=str)
    def test_float8_rounding(self, cache_dtype):
        """All float8 numbers, the middles between them, their float32 neighbours, and what saturates."""
        numbers = torch.arange(256, dtype=torch.uint8).view(cache_dtype).float()
        numbers = numbers[numbers.isfinite()].sort().values
        middles = (numbers[1:] + numbers[:-1]) / 2
        points = torch.cat(
            [numbers, middles, torch.tensor([1e-45, 1e-10, 1e6, 3e38, torch.inf, 0.0])]
        )
        away = torch.full_like(points, torch.inf)
        points = torch.cat([points, -points, points.nextafter(away), points.nextafter(-away)])
        points = torch.cat([points, torch.tensor([torch.nan])])
        case = cases.kv_case(
            -(-points.numel() // 64), cache_dtype=cache_dtype, num_layers=1, num_heads=1, skipped=0
        )
        values = case["kv"][:, 0, 1, 0]
        values.copy_(
            torch.nn.functional.pad(points, (0, values.numel() - points.numel())).view_as(values)
        )
        case["value_scales"] = None
        want = cases.clone(case)
        call(reference.store_context_kv, want)
        got = {name: moved(value) for name, value in case.items()}
        call(triton_kernels.store_context_kv, got)
        # The values' bytes in the order of their tokens; no rounding in float32 came before.
        rows = [
            c["value_caches"][0].cpu().flatten(0, 1)[c["slots"][0].cpu(), 0] for c in (got, want)
        ]
        assert torch.equal(raw(rows[0]), raw(rows[1]))

    def test_scales_of_a_cache_that_is_not_float8(self):
        case = cases.kv_case(5)
        check_kv(
            case
            | {"key_scales": torch.tensor([0.5, 3.0]), "value_scales": torch.tensor([7.0, 0.1])}
        )

    def test_rope_in_float32(self):
        check_kv(cases.kv_case(9, dtype=torch.float16, rope_dtype=torch.float32))

    def test_int32(self):
        case = cases.kv_case(9, groups=2)
        case["positions"] = case["positions"].int()
        case["slots"] = [
            slots.int() if layer else slots for layer, slots in enumerate(case["slots"])
        ]
        check_kv(case)

    def test_slots_outside_the_caches(self):
        case = cases.kv_case(6, skipped=0)
        capacity = case["key_caches"][0].shape[0] * case["key_caches"][0].shape[1]
        case["slots"] = [s.clone() for s in case["slots"]]
        case["slots"][0][0], case["slots"][1][3], case["slots"][1][5] = capacity, 2**40, -(2**40)
        want = cases.clone(case)
        for slots in want["slots"]:
            slots[slots >= capacity] = -1
        call(reference.store_context_kv, want)
        got = {name: moved(value) for name, value in case.items()}
        call(triton_kernels.store_context_kv, got)
        cases.assert_caches_close([c.cpu() for c in got["key_caches"]], want["key_caches"])
        cases.assert_caches_close([c.cpu() for c in got["value_caches"]], want["value_caches"])

    def test_layers_that_lie_differently(self):
        case, other = cases.kv_case(6, num_layers=3), cases.kv_case(6, num_layers=3, layout="HND")
        for name in ("key_caches", "value_caches"):
            case[name][1] = other[name][1]
        check_kv(case)

    @given(data=st.data())
    @made_up
    def test_made_up(self, data):
        head = data.draw(st.integers(1, 40)) * 2
        dtype = data.draw(st.sampled_from(cases.FLOATS))
        check_kv(
            cases.kv_case(
                data.draw(st.integers(0, 5)),
                num_layers=data.draw(st.integers(1, 4)),
                num_heads=data.draw(st.integers(1, 4)),
                head_size=head,
                rotary_dim=2 * data.draw(st.integers(0, head // 2)),
                is_neox=data.draw(st.booleans()),
                dtype=dtype,
                cache_dtype=data.draw(st.sampled_from([dtype, *cases.FLOAT8])),
                kv_block_size=data.draw(st.integers(1, 20)),
                groups=data.draw(st.integers(1, 3)),
                value_scale=data.draw(st.sampled_from([1.0, 0.5])),
                non_contiguous=data.draw(st.booleans()),
                seed=data.draw(st.integers(0, 99)),
            ),
            data.draw(st.sampled_from([None, NHD, HND, HEADS_FIRST])),
        )


# --- anywhere -------------------------------------------------------------------------------------


@pytest.mark.skipif(INTERPRETED, reason="is the process that this test starts")
def test_in_the_interpreter():
    """Everything above, in a process in which Triton interprets."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "--noconftest",
        "-p",
        "no:cacheprovider",
        __file__,
    ]
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "passed" in result.stdout


@pytest.mark.parametrize("op", ["build_block", "tap_hidden_states", "store_context_kv"])
def test_parameters_are_those_of_the_reference(op):
    ours, theirs = (inspect.signature(getattr(m, op)) for m in (triton_kernels, reference))
    assert list(ours.parameters) == list(theirs.parameters)


class FakeDriver:
    """As much of a GPU as Triton asks for to compile a launch."""

    def __init__(self, capability: int) -> None:
        self.target = triton.backends.compiler.GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        # Triton keeps what it compiled per device: none that a real launch could find.
        return ("compiled for", self.target.arch)

    def get_current_stream(self, device):
        return 0


@pytest.fixture
def compiled(monkeypatch, tmp_path) -> Callable[..., list]:
    """Gives the kernels that an op's launches compile to, for a GPU that need not be there."""
    if INTERPRETED:
        pytest.skip("the interpreter compiles nothing")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def compile_(op: Callable[..., None], case: dict[str, Any], capability: int = 90) -> list:
        # Not set_active(): what undoes it looks for a GPU.
        monkeypatch.setattr(triton.runtime.driver, "_active", FakeDriver(capability))
        call(op, case)
        launches, recorded[:] = recorded[:], []
        return launches

    recorded: list = []
    kernels = (v for name, v in vars(triton_kernels).items() if name.endswith("_kernel"))
    for kernel in kernels:

        def run(*args, grid, warmup, run=kernel.run, **kwargs):
            recorded.append(run(*args, grid=grid, warmup=True, **kwargs))

        monkeypatch.setattr(kernel, "run", run)
    return compile_


def check_binary(launches: list, capability: int = 90) -> None:
    assert len(launches) == 1, "one launch an op"
    assert f".target sm_{capability}" in launches[0].asm["ptx"]
    assert launches[0].asm["cubin"].startswith(b"\x7fELF")


CAPABILITIES = (75, 80, 90, 120)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    "name", ["decode", "states", "three groups", "lengths", "from anchor", "int64"]
)
def test_build_block_compiles(compiled, name, capability):
    case = cases.block_case(**BLOCKS[name])
    check_binary(compiled(triton_kernels.build_block, case, capability), capability)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
def test_tap_compiles(compiled, dtype, capability):
    hidden = torch.zeros(5, 2048, dtype=dtype)
    case = {"features": hidden.repeat(1, 3), "hidden": hidden, "residual": hidden, "column": 2048}
    check_binary(compiled(triton_kernels.tap_hidden_states, case, capability), capability)
    check_binary(
        compiled(triton_kernels.tap_hidden_states, case | {"residual": None}, capability),
        capability,
    )


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize(
    "how",
    [
        {"head_size": 128, "num_heads": 8, "num_layers": 5},
        {"head_size": 80, "is_neox": False, "rotary_dim": 40, "layout": "HND"},
        {"cache_dtype": torch.float8_e4m3fn, "groups": 2},
        {"cache_dtype": torch.float8_e5m2, "rope_dtype": torch.float32},
        {"consecutive": True, "num_layers": 1},
        {"num_layers": 32, "num_heads": 1, "head_size": 16},
    ],
)
def test_store_context_kv_compiles(compiled, how, dtype, capability):
    case = cases.kv_case(9, dtype=dtype, **how)
    check_binary(compiled(triton_kernels.store_context_kv, case, capability), capability)


def test_stores_are_wide(compiled):
    """The choice between the layers' pointers must not cost what Triton knows of their alignment."""
    case = cases.kv_case(9, dtype=torch.bfloat16, head_size=128, num_heads=8, num_layers=5)
    (kernel,) = compiled(triton_kernels.store_context_kv, case)
    assert kernel.asm["ptx"].count("st.global.v4.b32") == 2


def test_steps_do_not_compile_anew(compiled):
    """Requests, tokens and the alignment of slices change from step to step; the kernels do not."""
    first = cases.block_case([4] * 16, [0] * 16, states=True, padding=32)
    launches = compiled(triton_kernels.build_block, first)
    for context_lens in ([], [1], [5, 2], [3] * 17, [0, 100, 1], [16]):
        case = cases.block_case(context_lens, [0] * len(context_lens), states=True)
        launches += compiled(triton_kernels.build_block, case)
        odd = {n: with_margins(case[n])[1] for n in cases.BLOCK_OUTPUTS}
        launches += compiled(triton_kernels.build_block, case | odd)
    assert len({id(kernel) for kernel in launches}) == 1

    launches, odd_launches = [], []
    for tokens in (1, 2, 16, 33):
        case = cases.kv_case(tokens, kv_block_size=16)
        launches += compiled(triton_kernels.store_context_kv, case)
        launches += compiled(triton_kernels.store_context_kv, case | {"value_scale": 0.3 * tokens})
        odd = {"slots": [with_margins(slots)[1] for slots in case["slots"]]}
        odd_launches += compiled(triton_kernels.store_context_kv, case | odd)
    assert len({id(kernel) for kernel in launches}) == 1
    # Triton always specialises on the alignment of pointers that come in a tuple.
    assert len({id(kernel) for kernel in odd_launches}) == 1


BAD_BLOCKS = {
    "num_draft_tokens is 0": {"num_draft_tokens": 0},
    "input_ids has 3 elements, needs 8": {"input_ids": torch.zeros(3, dtype=torch.int32)},
    "input_ids has dtype torch.float32": {"input_ids": torch.zeros(8)},
    "target_positions has 2 dimensions": {"target_positions": torch.zeros(2, 4, dtype=torch.int64)},
    "target_positions has stride 2": {"target_positions": torch.zeros(16, dtype=torch.int64)[::2]},
    "kv_block_sizes[0] is 0": {"kv_block_sizes": [0]},
    "kv_block_sizes has 2 entries, block_tables 1": {"kv_block_sizes": [16, 16]},
    "block_tables[0] has dtype torch.int64": {
        "block_tables": [torch.zeros(2, 16, dtype=torch.int64)]
    },
    "block_tables[0] has 1 rows, needs 2": {
        "block_tables": [torch.zeros(1, 16, dtype=torch.int32)]
    },
    "query_slots has 2 rows, row 5": {"query_slot_rows": [5]},
    "num_sampled and prefill_ids": {"num_sampled": torch.zeros(2, dtype=torch.int32)},
    "context_slots has rows of 1, needs 8": {"context_slots": torch.zeros(1, 1, dtype=torch.int64)},
    "context_slots has 0 rows, needs 1": {"context_slots": torch.zeros(0, 8, dtype=torch.int64)},
    "block_seq_lens is on meta": {
        "block_seq_lens": torch.zeros(2, dtype=torch.int32, device="meta")
    },
}


@pytest.mark.parametrize("message", BAD_BLOCKS)
def test_build_block_refuses(message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 the message is compared below
        call(triton_kernels.build_block, cases.block_case([4, 4], [0, 1]) | BAD_BLOCKS[message])
    assert message in str(error.value)


BAD_KV = {
    "kv has dtype torch.float64": {"kv": torch.zeros(6, 2, 2, 2, 64, dtype=torch.float64)},
    "kv must have the shape": {"kv": torch.zeros(6, 2, 2, 64)},
    "k_norm_weights must have the shape [2, 64]": {"k_norm_weights": torch.zeros(2, 32)},
    "k_norm_weights has dtype torch.bfloat16": {"k_norm_weights": torch.zeros(2, 64).bfloat16()},
    "positions has 5 elements, needs 6": {"positions": torch.zeros(5, dtype=torch.int64)},
    "cos_sin_cache rotates 80 elements": {"cos_sin_cache": torch.zeros(500, 80)},
    "key_caches has 1 layers, kv 2": {"key_caches": [torch.zeros(4, 16, 2, 64)]},
    "key_caches[0] has dtype torch.float16": {"key_caches": [torch.zeros(4, 16, 2, 64).half()] * 2},
    "value_caches[1] differs": {
        "key_caches": [torch.zeros(4, 16, 2, 64)] * 2,
        "value_caches": [torch.zeros(n, 16, 2, 64) for n in (4, 5)],
    },
    "slots[0] has 3 elements, needs 6": {"slots": [torch.zeros(3, dtype=torch.int64)] * 2},
    "slots has 1 layers, kv 2": {"slots": [torch.zeros(6, dtype=torch.int64)]},
}


@pytest.mark.parametrize("message", BAD_KV)
def test_store_context_kv_refuses(message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 the message is compared below
        call(triton_kernels.store_context_kv, cases.kv_case(6) | BAD_KV[message])
    assert message in str(error.value)


BAD_TAPS = {
    "hidden has dtype torch.bfloat16, features torch.float32": (
        torch.zeros(4, 8).bfloat16(),
        None,
        0,
    ),
    "features has 4 rows, hidden 5": (torch.zeros(5, 8), None, 0),
    "column is 9, hidden has 8 columns, features 16": (torch.zeros(4, 8), None, 9),
    "column is -1": (torch.zeros(4, 8), None, -1),
    "residual must have the shape of hidden, [4, 8]": (torch.zeros(4, 8), torch.zeros(3, 8), 0),
    "hidden has 1 dimensions": (torch.zeros(8), None, 0),
    "hidden has inner stride 2": (torch.zeros(4, 16)[:, ::2], None, 0),
}


@pytest.mark.parametrize("message", BAD_TAPS)
def test_tap_refuses(message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 the message is compared below
        triton_kernels.tap_hidden_states(torch.zeros(4, 16), *BAD_TAPS[message])
    assert message in str(error.value)


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
def test_in_a_cuda_graph():
    """Captured once, replayed with other data in the same tensors."""
    block, kv = cases.block_case([4, 9], [1, 0], states=True, padding=2), cases.kv_case(6)
    block, kv = ({name: moved(value) for name, value in case.items()} for case in (block, kv))
    call(triton_kernels.build_block, block)
    call(triton_kernels.store_context_kv, kv)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(triton_kernels.build_block, block)
        call(triton_kernels.store_context_kv, kv)
    block["num_rejected"].copy_(torch.tensor([3, 4]))
    kv["kv"].normal_()
    want_block, want_kv = ({n: moved(v) for n, v in case.items()} for case in (block, kv))
    call(reference.build_block, want_block)
    call(reference.store_context_kv, want_kv)
    graph.replay()
    torch.cuda.synchronize()
    for name in cases.BLOCK_OUTPUTS:
        assert torch.equal(block[name], want_block[name])
    for name in ("key_caches", "value_caches"):
        cases.assert_caches_close(kv[name], want_kv[name])
