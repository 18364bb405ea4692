"""Features in the host's memory: how much there is, slabs, and copies one step ahead."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_learner import make_sample

from vllm_dflash.environment import available_bytes
from vllm_dflash.training import host_memory
from vllm_dflash.training.config import TrainConfig
from vllm_dflash.training.host_memory import (
    HostMemory,
    default_feature_gib,
    on_device,
    one_ahead,
)
from vllm_dflash.training.run_folder import RunFolder
from vllm_dflash.training.trainer import with_feature_gib
from vllm_dflash.verifier import Verifier

GIB = 2**30


def machine(root: Path, gib: int, cgroup: str, files: dict[str, str]) -> Path:
    """A file system of a machine with so much available and these control group files."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable:  {gib * 2**20} kB\n")
    (root / "proc/self/cgroup").write_text(cgroup)
    for name, text in files.items():
        file = root / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


@pytest.mark.parametrize(
    ("cgroup", "files", "gib"),
    [
        ("0::/\n", {}, 64),
        ("0::/a/b\n", {"a/b/memory.max": "max\n", "a/b/memory.current": "5"}, 64),
        (
            "0::/a/b\n",
            {
                "a/b/memory.max": f"{16 * GIB}\n",
                "a/b/memory.current": f"{6 * GIB}\n",
                "a/b/memory.stat": f"anon 7\ninactive_file {2 * GIB}\n",
            },
            12,
        ),
        # The limit of a group above.
        (
            "0::/a/b\n",
            {
                "a/memory.max": f"{8 * GIB}",
                "a/memory.current": f"{GIB}",
                "a/b/memory.max": "max",
                "a/b/memory.current": "1",
            },
            7,
        ),
        # In a container its own group is the root.
        ("0::/../x\n", {"memory.max": f"{9 * GIB}", "memory.current": "0"}, 9),
        # Version 1.
        (
            "3:cpuset:/\n4:cpu,memory:/x\n",
            {
                "memory/x/memory.limit_in_bytes": f"{10 * GIB}",
                "memory/x/memory.usage_in_bytes": f"{4 * GIB}",
                "memory/memory.limit_in_bytes": "9223372036854771712",
                "memory/memory.usage_in_bytes": f"{50 * GIB}",
            },
            6,
        ),
    ],
)
def test_available_memory_is_the_groups_where_that_is_less(tmp_path, cgroup, files, gib):
    assert available_bytes(machine(tmp_path, 64, cgroup, files)) == gib * GIB


def test_the_default_is_half_shared_by_the_workers(monkeypatch):
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 50 * GIB)
    assert [default_feature_gib(n) for n in (1, 2, 4)] == [25.0, 12.5, 6.2]
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 0)
    assert default_feature_gib(1) == 0.1
    monkeypatch.undo()
    assert 0.1 <= default_feature_gib(1) < available_bytes() / GIB


def test_a_resumed_run_keeps_its_number(tmp_path, monkeypatch):
    """What is available changes from day to day; which sequences are extracted together must not."""
    monkeypatch.setattr("vllm_dflash.training.trainer.default_feature_gib", lambda ranks: 7.5)
    config = TrainConfig(Verifier("v"), "d", tmp_path / "out")
    first = with_feature_gib(config)
    assert first.feature_gib == 7.5
    RunFolder(config.run_path, {"feature_gib": first.feature_gib})
    monkeypatch.setattr("vllm_dflash.training.trainer.default_feature_gib", lambda ranks: 3.0)
    assert with_feature_gib(config).feature_gib == 7.5
    assert with_feature_gib(replace(config, restart=True)).feature_gib == 3.0
    assert with_feature_gib(replace(config, feature_gib=2.0)).feature_gib == 2.0


def test_slabs_are_filled_and_given_back(monkeypatch):
    monkeypatch.setattr(host_memory, "SLAB_BYTES", 4096)
    memory = HostMemory(pin=False)
    shapes = [(3, 5), (7,), (600, 2), (2, 2), (3000,)]
    dtypes = [torch.bfloat16, torch.float64, torch.float32, torch.int8, torch.float32]
    tensors = [memory.empty(torch.Size(s), d) for s, d in zip(shapes, dtypes, strict=True)]
    for i, tensor in enumerate(tensors):
        tensor.fill_(i)
    for i, (tensor, shape, dtype) in enumerate(zip(tensors, shapes, dtypes, strict=True)):
        assert (tuple(tensor.shape), tensor.dtype) == (shape, dtype)
        assert (tensor == i).all()
        assert tensor.storage_offset() * tensor.element_size() % 256 == 0
    slabs = [t.untyped_storage().data_ptr() for t in tensors]
    # The third does not fit beside the first two; the last is larger than a slab.
    assert slabs[0] == slabs[1] != slabs[2] != slabs[3]
    assert len(tensors[4].untyped_storage()) == 12000


def test_on_a_cpu_nothing_is_moved():
    features = torch.ones(3, 2)
    assert HostMemory()(features) is features
    sample = make_sample(1)
    (got,) = on_device([["a"]], lambda keys: [sample], torch.device("cpu"))
    assert got[0] is sample


def test_copies_start_one_step_ahead():
    events = []

    class Copies:
        def start(self, samples):
            events.append(f"copy {samples}")
            return samples

        def finish(self, samples):
            events.append(f"wait {samples}")
            return samples

    for samples in one_ahead(iter("abc"), Copies()):
        events.append(f"step {samples}")
    assert events == [
        "copy a", "copy b", "wait a", "step a", "copy c", "wait b", "step b", "wait c", "step c",
    ]  # fmt: skip
    assert list(one_ahead(iter(""), Copies())) == []
    assert list(one_ahead(iter("a"), Copies())) == ["a"]


@pytest.mark.engine
def test_epochs_after_the_first_ask_nothing_of_the_verifier(trained):
    """27 epochs: the held-out sequences are extracted once, and the others once."""
    asked = re.findall(r"extracting (?:held-out )?features: (\d+) tokens in", trained.output)
    assert trained.summary["steps"] * 2 > 25 * trained.summary["train_sequences"]
    assert len(asked) == 2
