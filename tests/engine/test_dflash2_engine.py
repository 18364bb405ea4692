"""DFlash 2 drafters in vLLM's real engine: their drafts are those of the plain PyTorch drafter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers import tiny
from helpers.parity import Reference, check_drafts, drafted
from vllm_dflash.config import CandidateHead

pytestmark = pytest.mark.engine
HEAD = CandidateHead(selector_rank=8, selector_top_k=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("dflash2")


@pytest.fixture(scope="module")
def drafter(verifier, folder) -> Path:
    return tiny.make_drafter(folder / "drafter", verifier, head=HEAD)


def check(out, verifier: Path, drafter: Path, least: int) -> None:
    reference = Reference(verifier, drafter)
    assert check_drafts(out, reference, reference.config.num_speculative_tokens) > least
    # The selector does change drafts, else the walk is not seen.
    weight = reference.drafter.candidate_selector.hidden_projection.weight
    weight.data.zero_()
    with pytest.raises(AssertionError):
        check_drafts(out, reference, reference.config.num_speculative_tokens)


@pytest.mark.parametrize(
    "changes",
    [
        {"draft_vocab_size": 200},
        pytest.param({}, marks=pytest.mark.long),
        pytest.param({"sample_from_anchor": True, "draft_block_size": 7}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_drafts_on_v1(changes, verifier, prompts, folder) -> None:
    drafter = tiny.make_drafter(folder / "-".join(["v1", *changes]), verifier, head=HEAD, **changes)
    out = drafted(verifier, drafter, prompts[:6], folder)
    assert out["drafter_model"] == "HeadDrafterModel"
    check(out, verifier, drafter, 400)


@pytest.mark.long
def test_a_head_for_a_plain_drafter(verifier, prompts_file, prompts, folder) -> None:
    """Trained from nothing, given a head, evaluated, served: by the commands that users type."""
    plain, head = folder / "plain", folder / "with-head"
    common = (verifier, "--data", prompts_file, *tiny.TRAIN_ARGS)
    data = ("--num-anchors", "32", "--holdout", "0.1")
    tiny.cli("train", *common, *data, "-o", plain, "--draft-vocab", "256", "--max-steps", "40")
    shape = ("--init-from", plain, "--head", "dflash2", "--lr", "3e-3", "--max-steps", "60")
    tiny.cli("train", *common, *data, "-o", head, *shape)
    assert "DFlash 2: conv_kernel_size 2" in tiny.cli("inspect", head, verifier).stdout
    result = folder / "eval.json"
    sizes = ("--dtype", "float32", "--max-len", "160", "--max-tokens", "48")
    tiny.cli("eval", verifier, head, "--data", prompts_file, *sizes, "--engine", "-o", result)
    got = json.loads(result.read_text())
    assert got["offline"]["selector_accuracy"] > 0
    assert got["disagreement"] is None
    assert got["offline"]["tau"] > 1
    out = drafted(verifier, head, prompts[:6], folder)
    assert check_drafts(out, Reference(verifier, head), 7) > 300


@pytest.mark.long
def test_chosen_lengths_on_v1(verifier, drafter, prompts, folder) -> None:
    """Whoever is drafted for, and however much of it is sent: the walk and the blocks are the same."""
    out = drafted(verifier, drafter, prompts[:8], folder, random_lengths=True, features=False)
    figures = out["lengths"]
    assert 0 < figures["drafted_steps"] < 0.8 * figures["steps"]
    whole = drafted(verifier, drafter, prompts[:8], folder)
    assert out["sequences"] == whole["sequences"]
    out["features"] = whole["features"]
    check(out, verifier, drafter, 300)


@pytest.mark.long
def test_drafts_under_torch_compile_with_narrower_blocks(
    verifier, drafter, prompts, folder
) -> None:
    """vLLM's table by batch size gives steps of other lengths than the block's, which is compiled once."""
    table = [[1, 1, 7], [2, 2, 4], [3, 4, 2]]
    out = drafted(
        verifier,
        drafter,
        prompts[:4],
        folder,
        engine={"enforce_eager": False},
        max_tokens=[16, 16, 40, 64],  # so that fewer and fewer are in flight
        num_speculative_tokens_per_batch_size=table,
    )
    counts = {len(d["drafts"]) for d in out["drafts"]}
    assert counts == {2, 4, 7}
    reference = Reference(verifier, drafter)
    for count in counts:
        some = {**out, "drafts": [d for d in out["drafts"] if len(d["drafts"]) == count]}
        assert check_drafts(some, reference, count) > 20


@pytest.mark.long
@pytest.mark.parametrize("where", ["ours", "stock"])
def test_drafts_on_v2(where, verifier, drafter, prompts, folder) -> None:
    """vLLM's own speculator walks; with our model, and with none of ours in the process."""
    out = drafted(
        verifier,
        drafter,
        prompts[:3],
        folder,
        runner="v2",
        max_tokens=12,
        env={"VLLM_PLUGINS": ""} if where == "stock" else None,
        num_speculative_tokens=7,
    )
    speculator = (
        "vllm_dflash.serving.worker.v2.speculator" if where == "ours" else "vllm.v1.worker.gpu"
    )
    assert out["proposer"].startswith(speculator)
    assert out["proposer"].endswith(".DFlash2Speculator")
    model = "HeadDrafterModel" if where == "ours" else "DFlash2Qwen3ForCausalLM"
    assert out["drafter_model"] == model
    # Stock vLLM norms the context keys of all layers like the first on a CPU.
    reference = Reference(verifier, drafter, first_k_norm=where == "stock")
    assert check_drafts(out, reference, 7) > 50
