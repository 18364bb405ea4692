"""What the machine can do."""

from __future__ import annotations

import platform

import pytest
import torch

from vllm_dflash.environment import cpu_has_bfloat16


@pytest.mark.parametrize(
    ("instructions", "isa", "has"),
    [
        ((True, True), None, True),
        ((True, False), "", True),
        ((False, False), None, False),
        ((True, True), "AVX512_CORE_BF16", True),
        ((True, True), "ALL", True),
        ((True, True), "avx512_core", False),
        ((True, True), "AVX2", False),
    ],
)
def test_bfloat16_needs_instructions_that_nobody_masks(monkeypatch, instructions, isa, has):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    avx512, amx = instructions
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    if isa is None:
        monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    else:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", isa)
    assert cpu_has_bfloat16() is has


@pytest.mark.skipif(platform.machine() != "x86_64", reason="reads x86's flags")
def test_this_machine_answers(monkeypatch):
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    assert cpu_has_bfloat16() == ("avx512_bf16" in flags() or "amx_tile" in flags())


def flags() -> set[str]:
    with open("/proc/cpuinfo") as file:
        return set(next(line for line in file if line.startswith("flags")).split())
