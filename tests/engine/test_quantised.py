"""Quantised verifiers: output is theirs alone, features are of the weights they stand for, training runs."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from helpers import quantised, tiny
from helpers.parity import drafted
from helpers.verifiers import reference
from vllm_dflash.serving.worker.features.verifier import shared_weights

DTYPE = "bfloat16"  # what vLLM's quantised CPU kernels know


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("quantised")


@pytest.fixture(scope="module")
def base(folder) -> Path:
    return tiny.make_verifier(folder / "base", hidden=128)


@pytest.mark.engine
@pytest.mark.parametrize(
    "scheme",
    [
        pytest.param("int8", marks=pytest.mark.long),
        pytest.param("int4", marks=pytest.mark.slow),
        pytest.param("awq", marks=pytest.mark.slow),
    ],
)
def test_serving_and_training(scheme, base, prompts, prompts_file, folder) -> None:
    exact = folder / f"{scheme}-exact"
    path = quantised.quantise(base, folder / scheme, scheme, exact)
    drafter = tiny.make_drafter(folder / f"{scheme}-drafter", path)
    raw = json.loads((drafter / "config.json").read_text())
    assert "quantization_config" not in raw
    engine = {"max_num_batched_tokens": 64, "dtype": DTYPE}
    out = drafted(path, drafter, prompts[:4], folder, engine=engine, max_tokens=16)
    assert out["tap"]
    layers = [i for i in raw["dflash_config"]["target_layer_ids"] if i < 3]
    for i in range(4):
        got = out["features"][f"run:{i}"][:, : len(layers) * 128].float()
        want, _ = reference(exact, out["sequences"][f"run:{i}"], layers)
        want = want[: len(got)]
        if scheme == "int8" and not torch.cpu._is_vnni_supported():
            # oneDNN sums products of bytes in 16 bits there, which may saturate: 3 % off were seen.
            assert (got - want).abs().mean() < 0.06 * want.abs().mean()
        else:
            # bf16 rounds to 1/256 of numbers up to 6; int8 activations add as much.
            torch.testing.assert_close(got, want, rtol=0.02, atol=0.12)
    params = {"temperature": 0.0, "max_tokens": 16, "ignore_eos": True}
    job = {
        "engine": {"model": str(path), "max_model_len": 192, "max_num_seqs": 4, "dtype": DTYPE},
        "runs": [{"name": "run", "prompts": prompts[:4], "params": params, "concurrency": 4}],
    }
    plain = tiny.engine_job(job, folder)
    for i, output in enumerate(plain["runs"]["run"]["outputs"]):
        assert out["sequences"][f"run:{i}"] == prompts[i] + output[0]["token_ids"]
    args = (*tiny.TRAIN_ARGS, "--dtype", DTYPE, "--max-steps", "4", "--num-anchors", "8")
    tiny.cli("train", path, "--data", prompts_file, "-o", folder / f"{scheme}-trained", *args)
    summary = json.loads((folder / f"{scheme}-trained" / "dflash_training.json").read_text())
    assert not summary["skipped"]


def test_a_quantised_head_names_the_way_out() -> None:
    embedding = torch.nn.Embedding(8, 4)
    packed = torch.nn.Parameter(torch.zeros(8, 1, dtype=torch.int32), requires_grad=False)
    verifier = torch.nn.Module()
    verifier.model = SimpleNamespace(embed_tokens=embedding)
    verifier.lm_head = SimpleNamespace(weight=packed)
    with pytest.raises(
        ValueError, match=r"lm_head is quantised.*train with the unquantised verifier"
    ):
        shared_weights(verifier, 8)
