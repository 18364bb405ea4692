"""vLLM with the patches of upstream/ and without the plugin, in engines: the faults are gone there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers import tiny, verifiers, vllm_overlay
from helpers.parity import Reference, check_drafts, drafted
from vllm_dflash.config import FULL, SLIDING

MIXED = {"layer_types": (SLIDING, FULL, SLIDING), "sliding_window": 24, "num_hidden_layers": 3}
pytestmark = [pytest.mark.engine, pytest.mark.slow]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module")
def stock(folder) -> dict[str, str]:
    """Variables of a process that imports the patched vLLM, and no plugin."""
    patched = vllm_overlay.overlay(vllm_overlay.PATCHED_VERSION, folder / "patched")
    for patch in vllm_overlay.PATCHES:
        vllm_overlay.apply(patch, patched, "--include=vllm/*")
    return {"PYTHONPATH": vllm_overlay.python_path(patched), "VLLM_PLUGINS": ""}


@pytest.mark.parametrize("layers", [{}, MIXED], ids=["full", "mixed"])
def test_drafts_are_those_trained(layers, stock, verifier, prompts, folder) -> None:
    """Each layer with its own k_norm; sliding and full layers on the V1 runner."""
    drafter = tiny.make_drafter(folder / f"drafter-{len(layers)}", verifier, **layers)
    out = drafted(verifier, drafter, prompts[:8], folder, env=stock, num_speculative_tokens=7)
    assert not out["plugin"]
    assert out["proposer"] == "vllm.v1.spec_decode.dflash.DFlashProposer"
    assert check_drafts(out, Reference(verifier, drafter), 7) > 800


def test_mamba2_is_lossless(stock, verifier, prompts, folder) -> None:
    """Greedy output of a hybrid with n-gram drafts, some accepted and some rejected."""
    path = verifiers.make(folder / "nemotron_h", "nemotron_h", verifier)

    def run(**speculative: Any) -> dict[str, Any]:
        engine = {
            "model": str(path),
            "max_model_len": 192,
            "max_num_seqs": 4,
            "enable_prefix_caching": False,
            "speculative_config": speculative or None,
        }
        # Of few tokens some n-grams come again, and the penalty ends what would go round for ever.
        params = {
            "temperature": 0.0,
            "max_tokens": 64,
            "ignore_eos": True,
            "allowed_token_ids": [20, 40, 60],
            "frequency_penalty": 0.3,
        }
        runs = [{"name": "run", "prompts": prompts[:6], "params": params, "concurrency": 4}]
        job = {"engine": engine, "runs": runs}
        return tiny.engine_job(job, folder, env=stock)["runs"]["run"]

    ngram = {"method": "ngram", "prompt_lookup_min": 1, "prompt_lookup_max": 3}
    runs = [run(), run(num_speculative_tokens=3, **ngram)]
    drafts, kept = (
        runs[1]["counters"][f"vllm:spec_decode_num_{kind}_tokens_total"]
        for kind in ("draft", "accepted")
    )
    assert 0 < kept < drafts
    plain, speculated = ([o[0]["token_ids"] for o in run["outputs"]] for run in runs)
    assert speculated == plain
