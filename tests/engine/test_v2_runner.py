"""vLLM's V2 runner, the default on GPUs, run for real on the CPU: slowly, its Triton kernels interpreted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from helpers import tiny, verifiers
from helpers.parity import Reference, check_drafts, drafted
from vllm_dflash.config import FULL, SLIDING
from vllm_dflash.ops.schemas import SCHEMAS

pytestmark = pytest.mark.engine
MAX_TOKENS = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("v2")


@pytest.fixture(scope="module")
def plain(trained, prompts, folder) -> list[list[int]]:
    """What the verifier says alone, on the V1 runner."""
    job = {
        "engine": {"model": str(trained.verifier), "max_model_len": 192, "max_num_seqs": 4},
        "runs": [
            {
                "name": "run",
                "prompts": prompts[:6],
                "params": {"temperature": 0.0, "max_tokens": MAX_TOKENS, "ignore_eos": True},
                "concurrency": 4,
            }
        ],
    }
    out = tiny.engine_job(job, folder)
    return [o[0]["token_ids"] for o in out["runs"]["run"]["outputs"]]


@pytest.fixture(scope="module")
def mixed(trained, folder) -> Path:
    """The trained drafter with a sliding and a full layer: two KV-cache groups."""
    path = folder / "mixed"
    shutil.copytree(trained.drafter, path)
    config = json.loads((path / "config.json").read_text())
    config |= {
        "layer_types": [SLIDING, FULL],
        "sliding_window": 24,
        "use_sliding_window": True,
    }
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def from_anchor(trained, folder) -> Path:
    """The same weights, read as a drafter whose anchor predicts."""
    path = folder / "from-anchor"
    shutil.copytree(trained.drafter, path)
    config = json.loads((path / "config.json").read_text())
    config["dflash_config"]["sample_from_anchor"] = True
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("layout", "ops", "engine"),
    [
        ("full", True, {}),
        pytest.param("full", False, {}, marks=pytest.mark.slow),
        ("mixed", True, {"max_num_batched_tokens": 64}),
        pytest.param("mixed", False, {}, marks=pytest.mark.slow),
        pytest.param("from anchor", True, {}, marks=pytest.mark.slow),
        pytest.param("from anchor", False, {}, marks=pytest.mark.slow),
        pytest.param(
            "full", True, {"block_size": 32, "num_gpu_blocks_override": 9}, marks=pytest.mark.slow
        ),
    ],
)
def test_drafts_and_outputs(
    trained, mixed, from_anchor, prompts, folder, plain, layout, ops, engine
) -> None:
    """Outputs are the verifier's, drafts the PyTorch drafter's; with our ops and with vLLM's kernels."""
    drafter = {"full": trained.drafter, "mixed": mixed, "from anchor": from_anchor}[layout]
    out = drafted(
        trained.verifier,
        drafter,
        prompts[:6],
        folder,
        engine=engine,
        runner="v2",
        max_tokens=MAX_TOKENS,
        dflash_ops=ops,
    )
    assert out["runner"].startswith("vllm.v1.worker.cpu.model_runner")
    assert out["proposer"] == "vllm_dflash.serving.worker.v2.speculator.DFlashSpeculator"
    assert out["drafter_model"] == "DrafterModel"
    assert out["tap"] == ops
    assert set(out["ops"]) == (set(SCHEMAS) if ops else set())
    outputs = [o[0]["token_ids"] for o in out["runs"]["run"]["outputs"]]
    assert outputs == plain
    reference = Reference(trained.verifier, drafter)
    if layout != "from anchor":  # trained otherwise, so nothing is accepted
        assert out["runs"]["run"]["counters"]["vllm:spec_decode_num_accepted_tokens_total"] > 0
    assert check_drafts(out, reference, reference.config.num_speculative_tokens) > 200


@pytest.mark.long
def test_a_hybrid_goes_on_from_the_accepted_token(verifier, prompts, folder) -> None:
    """Mamba-2 states behind rejected drafts; vLLM's CPU kernels take those of the last draft token."""
    hybrid = verifiers.make(folder / "hybrid", "nemotron_h", verifier)
    drafter = tiny.make_drafter(folder / "hybrid-drafter", hybrid)
    job = {
        "engine": {"model": str(hybrid), "max_model_len": 192, "max_num_seqs": 4},
        "runs": [
            {
                "name": "run",
                "prompts": prompts[:3],
                "params": {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True},
                "concurrency": 4,
            }
        ],
    }
    alone = tiny.engine_job(job, folder)["runs"]["run"]["outputs"]
    out = drafted(hybrid, drafter, prompts[:3], folder, runner="v2", max_tokens=8, features=False)
    assert out["runner"].startswith("vllm.v1.worker.cpu.model_runner")
    assert out["runs"]["run"]["counters"]["vllm:spec_decode_num_drafts_total"] > 0
    assert out["runs"]["run"]["outputs"] == alone
