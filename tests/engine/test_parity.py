"""What the engine drafts is what the plain PyTorch drafter drafts, and tau is the same in both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import tiny
from helpers.parity import MAX_TOKENS, Reference, check_drafts, drafted
from vllm_dflash.config import FULL, SLIDING

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("parity")


@pytest.mark.parametrize("layout", ["full", pytest.param("mixed", marks=pytest.mark.slow)])
def test_drafts_after_steps_without(layout, trained, prompts, folder) -> None:
    """Drafting for some requests, or for none for a while, leaves every later draft PyTorch's.

    Three of the requests end at ``max_model_len`` while others go on.
    """
    drafter = trained.drafter
    if layout == "mixed":
        drafter = tiny.make_drafter(
            folder / "mixed-any",
            trained.verifier,
            layer_types=(SLIDING, FULL),
            sliding_window=24,
        )
    engine = {"max_num_batched_tokens": 64, "max_model_len": 100}
    out = drafted(
        trained.verifier, drafter, prompts[:12], folder, engine=engine, random_lengths=True
    )
    assert [len(out["sequences"][f"run:{i}"]) for i in (0, 3, 6)] == [100] * 3
    figures = out["lengths"]
    assert 0 < figures["drafted_steps"] < 0.8 * figures["steps"]
    assert check_drafts(out, Reference(trained.verifier, drafter), 7) > 300


@pytest.mark.long
def test_drafts_behind_a_cached_prefix(trained, prompts, folder) -> None:
    """The whole of a cached prefix is used, and drafts read the drafter's own cache of it."""
    prefix = (prompts[0] * 3)[:100]
    # Every third has a long system message of its own.
    long = [prefix + p for i, p in enumerate(prompts[:12]) if i % 3]
    engine = {"enable_prefix_caching": True, "block_size": 32, "max_num_seqs": 1}
    models = trained.verifier, trained.drafter
    cached = drafted(*models, long, folder, engine=engine, max_tokens=24, features=False)
    hits = cached["runs"]["run"]["counters"]["vllm:prefix_cache_hits_total"]
    assert hits >= 96 * (len(long) - 1)
    whole = drafted(*models, long, folder, max_tokens=24)
    assert cached["sequences"] == whole["sequences"]
    cached["features"] = whole["features"]
    assert check_drafts(cached, Reference(*models), 7) > 500


@pytest.mark.long
def test_drafts_behind_a_prefix_that_waited(trained, prompts, folder) -> None:
    """Answers become cached prefixes though nothing may have been drafted in them: no context is missing."""
    models = trained.verifier, trained.drafter
    length = {"max_model_len": 256}
    first = drafted(*models, prompts[:8], folder)
    answers = [first["sequences"][f"run:{i}"] for i in range(8)]
    # The same once more, and then as the beginning of a longer request.
    both = prompts[:8] + [a + p for a, p in zip(answers, prompts[8:16], strict=True)]
    # And some that share what the first of them may not have written yet.
    both += [(prompts[16] * 4)[:96] + p for p in prompts[17:23]]
    # The longest come close to the end of what the engine takes.
    longest = max(len(p) for p in both) + MAX_TOKENS
    engine = {"enable_prefix_caching": True, "block_size": 32, "max_model_len": longest + 1}
    cached = drafted(*models, both, folder, engine=engine, random_lengths=True, features=False)
    figures = cached["lengths"]
    assert 0 < figures["drafted_steps"] < 0.8 * figures["steps"]
    hits = cached["runs"]["run"]["counters"]["vllm:prefix_cache_hits_total"]
    assert hits >= sum(len(a) // 32 * 32 for a in answers) / 2
    whole = drafted(*models, both, folder, engine=length)
    assert cached["sequences"] == whole["sequences"]
    cached["features"] = whole["features"]
    assert check_drafts(cached, Reference(*models), 7) > 300


def test_drafts_equal_pytorch_and_stock_vllm(trained, prompts, folder) -> None:
    """The trained drafter (z-lab format, draft vocabulary), served by us and by vLLM without us."""
    ours = drafted(trained.verifier, trained.drafter, prompts, folder)
    assert ours["drafter_model"] == "DrafterModel"
    assert ours["tap"]
    assert set(ours["ops"]) == {"build_block", "tap_hidden_states", "store_context_kv"}
    reference = Reference(trained.verifier, trained.drafter)
    compared = check_drafts(ours, reference, 7)
    assert compared > 1000
    stock = drafted(
        trained.verifier,
        trained.drafter,
        prompts,
        folder,
        env={"VLLM_PLUGINS": ""},
        num_speculative_tokens=7,
    )
    assert not stock["plugin"]
    assert stock["proposer"] == "vllm.v1.spec_decode.dflash.DFlashProposer"
    assert stock["sequences"] == ours["sequences"]
    for out in (ours, stock):
        counters = out["runs"]["run"]["counters"]
        assert counters["vllm:spec_decode_num_accepted_tokens_total"] > 0
    assert stock["drafts"] == ours["drafts"]


@pytest.mark.parametrize("where", ["ours", pytest.param("stock", marks=pytest.mark.slow)])
def test_drafts_of_a_converted_checkpoint(trained, prompts, folder, where) -> None:
    """The speculators format, four tokens of a block of eight."""
    converted = folder / f"converted-{where}"
    tiny.cli("convert", trained.drafter, "-o", converted, "--to", "speculators")
    out = drafted(
        trained.verifier,
        converted,
        prompts[:8],
        folder,
        env={"VLLM_PLUGINS": ""} if where == "stock" else None,
        num_speculative_tokens=4,
    )
    assert out["plugin"] == (where == "ours")
    assert check_drafts(out, Reference(trained.verifier, trained.drafter), 4) > 400


MIXED: dict[str, Any] = {
    "layer_types": (SLIDING, FULL, SLIDING),
    "sliding_window": 24,
    "num_hidden_layers": 3,
}


@pytest.mark.parametrize(
    "changes",
    [
        # Layers by type, which vLLM itself reads otherwise from this format; rows that only the verifier has.
        {**MIXED, "fmt": "speculators", "vocab_size": tiny.VOCAB - 8},
        {"sample_from_anchor": True, "draft_block_size": 7, "own_mask": True},
        pytest.param(MIXED, marks=pytest.mark.slow),
        pytest.param({**MIXED, "causal": False}, marks=pytest.mark.slow),
        pytest.param({**MIXED, "sample_from_anchor": True}, marks=pytest.mark.slow),
        pytest.param(
            {"layer_types": (SLIDING, SLIDING), "sliding_window": 24, "causal": False},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64},
            marks=pytest.mark.slow,
        ),
        pytest.param({"hidden_size": 96, "intermediate_size": 64}, marks=pytest.mark.slow),
        pytest.param(
            {"layer_types": (SLIDING, SLIDING), "sliding_window": 24}, marks=pytest.mark.slow
        ),
        pytest.param({"causal": True}, marks=pytest.mark.slow),
        pytest.param({"num_hidden_layers": 1, "num_features": 1}, marks=pytest.mark.slow),
        pytest.param(
            {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True},
            marks=pytest.mark.slow,
        ),
    ],
    ids=[
        "mixed, speculators, smaller vocabulary",
        "from anchor, own mask embedding",
        "mixed",
        "mixed not causal",
        "mixed from anchor",
        "sliding not causal",
        "head size",
        "hidden size",
        "sliding",
        "causal",
        "one layer",
        "other heads",
    ],
)
def test_drafts_of_other_shapes(verifier, prompts, folder, changes) -> None:
    """Untrained drafters whose norms differ from layer to layer, in chunked prefill."""
    name = "-".join(changes)
    own_mask = changes.get("own_mask", False)
    changes = {k: v for k, v in changes.items() if k != "own_mask"}
    drafter = tiny.make_drafter(folder / name, verifier, **changes)
    if own_mask:
        embedding = torch.randn(64, generator=torch.Generator().manual_seed(4))
        torch.save({"embedding": embedding}, drafter / "mask_embedding.pt")
    engine = {"max_num_batched_tokens": 64}
    out = drafted(verifier, drafter, prompts[:8], folder, engine=engine)
    reference = Reference(verifier, drafter)
    assert check_drafts(out, reference, reference.config.num_speculative_tokens) > 800


@pytest.mark.slow
def test_mixed_layers_without_the_ops(verifier, prompts, folder) -> None:
    """vLLM's kernel fills one group's slots; with the ops off plain PyTorch fills them all."""
    drafter = tiny.make_drafter(folder / "mixed-plain", verifier, **MIXED)
    out = drafted(verifier, drafter, prompts[:8], folder, dflash_ops=False)
    assert not out["ops"]
    assert check_drafts(out, Reference(verifier, drafter), 7) > 800


@pytest.mark.slow
def test_stock_vllm_norms_all_layers_like_the_first(verifier, prompts, folder) -> None:
    """What serving/worker/drafter_model.py mends: vLLM's CPU kernel takes the first k_norm for all layers.

    Also shows that the comparison of this file can fail. When vLLM mends it, this test says so.
    """
    drafter = tiny.make_drafter(folder / "norms", verifier)
    stock = {"env": {"VLLM_PLUGINS": ""}, "num_speculative_tokens": 7}
    out = drafted(verifier, drafter, prompts[:4], folder, **stock)
    check_drafts(out, Reference(verifier, drafter, first_k_norm=True), 7)
    with pytest.raises(AssertionError):
        check_drafts(out, Reference(verifier, drafter), 7)


@pytest.mark.parametrize("max_tokens", [64, pytest.param(4, marks=pytest.mark.long)])
def test_offline_tau_is_the_engines(trained, folder, capsys, max_tokens) -> None:
    """``eval --engine``: teacher-forced tau against what the engine delivered on the same prompts."""
    result, data = folder / f"eval-{max_tokens}.json", folder / f"eval-{max_tokens}.jsonl"
    data.write_text(trained.prompts.read_text() + '{"messages": []}\n')
    done = tiny.cli(
        "eval", trained.verifier, trained.drafter, "--data", data, "--engine",
        "-o", result, "--dtype", "float32", "--max-len", "192", "--max-tokens", max_tokens,
        "--concurrency", "4",
    )  # fmt: skip
    got = json.loads(result.read_text())
    offline, engine = got["offline"], got["engine"]
    with capsys.disabled():
        print(
            f"\ntau offline {offline['tau']:.4f} ({offline['num_drafts']} drafts), "
            f"engine {engine['tau']:.4f} ({engine['num_drafts']} drafts)"
        )
    # Both count delivered tokens: what the engine accepts beyond max_tokens or eos is in neither.
    for name in ("num_drafts", "num_accepted", "position_rates"):
        assert engine[name] == pytest.approx(offline[name]), name
    assert engine["tau"] == pytest.approx(offline["tau"])
    # The engine always drafts here: every token after the first comes from a step with a draft.
    after_first = engine["output_tokens"] - 24
    assert after_first == engine["num_drafts"] + engine["num_accepted"]
    assert engine["tau"] == pytest.approx(after_first / engine["num_drafts"])
    assert got["disagreement"] is None
    assert "disagree" not in done.stderr
    assert offline["num_accepted"] > (100 if max_tokens == 64 else 20)
    assert "offline" in done.stdout
    assert "engine" in done.stdout
    assert "1 of 25 rows is rejected" in done.stderr
    assert "(row 25)" in done.stderr
    assert got["rejected"] == [{"line": 25, "reason": got["rejected"][0]["reason"]}]


@pytest.mark.slow
def test_drafts_under_torch_compile(trained, prompts, folder) -> None:
    """The tap's op inside vLLM's compiled verifier; the options are part of the compile-cache key."""
    engine = {"enforce_eager": False}
    out = drafted(trained.verifier, trained.drafter, prompts[:8], folder, engine=engine)
    assert out["tap"]
    assert check_drafts(out, Reference(trained.verifier, trained.drafter), 7) > 400
    stock = drafted(
        trained.verifier, trained.drafter, prompts[:8], folder, engine=engine, dflash_ops=False
    )
    assert not stock["tap"]
    assert not stock["ops"]
    assert stock["drafts"] == out["drafts"]
    assert stock["config_hash"] != out["config_hash"]
