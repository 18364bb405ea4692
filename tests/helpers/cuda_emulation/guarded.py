"""Runs the emulated ops on tensors that lie against inaccessible pages: python guarded.py before|behind."""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parents[2])]

from helpers import op_cases as cases  # noqa: E402
from helpers.cuda_emulation import emulation  # noqa: E402

PAGE = mmap.PAGESIZE
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def guarded(value: Any, end: str) -> Any:
    """The same tensor, its first byte behind or its last byte before a page without access."""
    if isinstance(value, list):
        return [guarded(v, end) for v in value]
    if not isinstance(value, Tensor) or value.numel() == 0:
        return value
    extent = 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
    size = extent * value.element_size()
    pages = -(-size // PAGE) * PAGE
    start = libc.mmap(
        None,
        pages + 2 * PAGE,
        mmap.PROT_READ | mmap.PROT_WRITE,
        mmap.MAP_PRIVATE | mmap.MAP_ANON,
        -1,
        0,
    )
    for page in (start, start + PAGE + pages):
        if libc.mprotect(page, PAGE, 0) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
    first = start + PAGE if end == "before" else start + PAGE + pages - size
    memory = (ctypes.c_char * size).from_address(first)
    flat = torch.frombuffer(memory, dtype=torch.uint8).view(value.dtype)
    return flat.as_strided(value.shape, value.stride()).copy_(value)


def main() -> None:
    end = sys.argv[1]
    ops = emulation.load().ops
    calls: list[tuple[str, dict[str, Any]]] = []
    for lens in ([4, 9, 1], [0, 300, 0], [1] * 70):
        for padding in (0, 5):
            rejected = [n // 2 for n in lens]
            case = cases.block_case(
                lens, rejected, states=True, padding=padding, kv_block_sizes=(16, 5)
            )
            calls.append(("build_block", case))
    for dtype in cases.FLOATS:
        for width in (64, 100, 1024):
            hidden = torch.randn(5, width).to(dtype)
            case = {
                "features": torch.zeros(5, width, dtype=dtype),
                "hidden": hidden,
                "residual": hidden,
                "column": 0,
            }
            calls.append(("tap_hidden_states", case))
        for options in (
            {},
            {"head_size": 80},
            {"head_size": 12},
            {"num_heads": 3, "head_size": 128},
        ):
            for cache_dtype in (dtype, torch.float8_e5m2):
                for neox in (True, False):
                    case = cases.kv_case(
                        16, dtype=dtype, cache_dtype=cache_dtype, is_neox=neox, **options
                    )
                    calls.append(("store_context_kv", case))
    for op, case in calls:
        schema = torch._C.parse_schema(f"x::{op}{emulation.SCHEMAS[op]}")
        getattr(ops, op)(*[guarded(case.get(argument.name), end) for argument in schema.arguments])
    print(f"ran {len(calls)} calls")


if __name__ == "__main__":
    main()
