"""Two worker processes: serving is lossless and drafts as PyTorch does, training ends as with one."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_train_engine import metric_steps, same_weights, stop_at

from helpers import tiny, verifiers
from helpers.parity import Reference, check_drafts

pytestmark = pytest.mark.engine
RANK_JOBS = "helpers.rank_jobs"
SERVED = {"max_model_len": 192, "max_num_seqs": 4, "enable_prefix_caching": False}
GREEDY = {"temperature": 0.0, "max_tokens": 40, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("ranks")


def serve(
    verifier: Path,
    drafter: Path | None,
    prompts: list,
    folder: Path,
    more: dict[str, Any] | None = None,
    **engine: Any,
) -> dict[str, Any]:
    """With a drafter: a run without drafting, then one with, recorded on both ranks.

    Scheduled ahead (``more={"async": True}``) only the second.
    """
    speculative = {
        "method": "dflash",
        "model": str(drafter),
        "dflash_draft_length": "fixed",
        **engine.pop("speculative", {}),
    }
    job = {
        "engine": {
            "model": str(verifier),
            "tensor_parallel_size": 2,
            **SERVED,
            **({"speculative_config": speculative} if drafter else {}),
            **engine,
        },
        "runs": [
            {
                "name": "plain",
                "prompts": prompts,
                "params": GREEDY,
                "concurrency": 4,
                "drafting": False,
            }
        ],
    }
    if drafter:
        record = str(folder / f"{drafter.name}-features")
        job["runs"].append({**job["runs"][0], "name": "run", "drafting": True, "record": record})
    job |= more or {}
    if drafter and job.get("async"):
        # What is scheduled ahead counts on drafts.
        job["runs"] = job["runs"][1:]
    return tiny.engine_job(job, folder, module=RANK_JOBS)


def tokens(run: dict[str, Any]) -> list[list[int]]:
    return [o[0]["token_ids"] for o in run["outputs"]]


def check_served(out: dict[str, Any], verifier: Path, drafter: Path, prompts: list) -> int:
    """Lossless, alike on both ranks, and every draft PyTorch's; returns how many were compared."""
    plain, run = out["runs"]["plain"], out["runs"]["run"]
    assert tokens(run) == tokens(plain)
    assert plain["counters"].get("vllm:spec_decode_num_drafts_total", 0) == 0
    assert run["counters"]["vllm:spec_decode_num_drafts_total"] > 0
    first, second = run["ranks"]
    assert first["drafts"] == second["drafts"]
    features, other = (load_file(r["features"]) for r in run["ranks"])
    assert all(torch.equal(features[k], other[k]) for k in features)
    sequences = {
        f"run:{i}": p + t for i, (p, t) in enumerate(zip(prompts, tokens(run), strict=True))
    }
    recorded = {
        "drafts": first["drafts"],
        "features": features,
        "sequences": sequences,
        "prompt_lens": {f"run:{i}": len(p) for i, p in enumerate(prompts)},
        "max_model_len": SERVED["max_model_len"],
    }
    return check_drafts(recorded, Reference(verifier, drafter), 7)


@pytest.mark.long
def test_serving_on_two_ranks(trained, prompts, folder) -> None:
    """A draft vocabulary whose head is split, and one key/value head that both ranks hold."""
    out = serve(trained.verifier, trained.drafter, prompts, folder)
    for rank in out["ranks"]:
        assert rank == {
            "proposer": "vllm_dflash.serving.worker.v1.proposer.Proposer",
            "tap": True,
            "kv_heads": 1,
            "query_heads": 1,
            "lm_head_rows": 128,
        }
    assert check_served(out, trained.verifier, trained.drafter, prompts) > 1000
    assert out["runs"]["run"]["counters"]["vllm:spec_decode_num_accepted_tokens_total"] > 100


@pytest.mark.long
def test_one_rank_chooses_draft_lengths(trained, prompts, folder) -> None:
    """Clocks and so costs differ between the ranks; whom they draft for does not."""
    out = serve(
        trained.verifier,
        trained.drafter,
        prompts[:8],
        folder,
        speculative={"dflash_draft_length": "auto"},
    )
    plain, run = out["runs"]["plain"], out["runs"]["run"]
    assert tokens(run) == tokens(plain)
    first, second = run["ranks"]
    assert first["drafts"] == second["drafts"]
    assert len(first["drafts"]) > 0


@pytest.mark.long
def test_the_scheduler_chooses_draft_lengths(trained, prompts, folder) -> None:
    """Scheduled ahead, with random lengths: both ranks draft alike, and every draft is PyTorch's."""
    out = serve(
        trained.verifier,
        trained.drafter,
        prompts[:8],
        folder,
        more={"async": True, "random_lengths": True},
        speculative={"dflash_draft_length": "auto"},
    )
    alone = serve(trained.verifier, None, prompts[:8], folder)
    out["runs"]["plain"] = alone["runs"]["plain"]
    assert check_served(out, trained.verifier, trained.drafter, prompts[:8]) > 150
    counters = out["runs"]["run"]["counters"]
    drafts = counters["vllm:spec_decode_num_drafts_total"]
    assert 2 * drafts < counters["vllm:spec_decode_num_draft_tokens_total"] < 6 * drafts


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "speculative"),
    [
        ({"num_attention_heads": 4, "num_key_value_heads": 2}, {}),
        ({"num_attention_heads": 4, "num_key_value_heads": 4, "attention_bias": True}, {}),
        ({"draft_vocab_size": 150}, {"draft_tensor_parallel_size": 1}),
        ({}, {"dflash_ops": False, "draft_tensor_parallel_size": 2}),
    ],
    ids=["one kv head a rank", "two kv heads a rank", "padded draft vocabulary", "no ops"],
)
def test_serving_other_drafters(verifier, prompts, folder, changes, speculative) -> None:
    drafter = tiny.make_drafter(
        folder / f"shape-{len(list(folder.glob('shape-*')))}", verifier, **changes
    )
    out = serve(verifier, drafter, prompts[:8], folder, speculative=speculative)
    assert [r["kv_heads"] for r in out["ranks"]] == [
        max(1, changes.get("num_key_value_heads", 1) // 2)
    ] * 2
    assert check_served(out, verifier, drafter, prompts[:8]) > 800
    # The engine without any drafter says the same as the one that holds its own back.
    alone = serve(verifier, None, prompts[:8], folder)
    assert tokens(alone["runs"]["plain"]) == tokens(out["runs"]["run"])


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["glm4", "gemma3_text", "gpt2", "qwen3_moe", "olmo2"])
def test_serving_other_verifiers(model_type, verifier, prompts, folder) -> None:
    """Tapped by hooks, native, and through the Transformers backend."""
    path = verifiers.make(folder / model_type, model_type, verifier)
    drafter = tiny.make_drafter(folder / f"{model_type}-drafter", path)
    out = serve(path, drafter, prompts[:6], folder, max_num_batched_tokens=64)
    assert tokens(out["runs"]["run"]) == tokens(out["runs"]["plain"])
    features, other = (load_file(r["features"]) for r in out["runs"]["run"]["ranks"])
    assert all(torch.equal(features[k], other[k]) for k in features)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 6, "num_key_value_heads": 3}, "3 key/value heads"),
        ({"num_attention_heads": 3}, "3 attention heads"),
        ({"intermediate_size": 65}, "an MLP of width 65"),
    ],
)
def test_a_drafter_that_cannot_be_split_is_refused(verifier, folder, changes, message) -> None:
    from vllm import EngineArgs

    drafter = tiny.make_drafter(folder / "-".join(map(str, changes.values())), verifier, **changes)
    args = EngineArgs(
        model=str(verifier),
        max_model_len=192,
        tensor_parallel_size=2,
        speculative_config={"method": "dflash", "model": str(drafter)},
    )
    with pytest.raises(ValueError, match=f"--tensor-parallel-size 2: it has {message}"):
        args.create_engine_config()


# -- training ----------------------------------------------------------------------------------

STEPS = 8


def train(
    trained,
    out: Path,
    ranks: int,
    *more: str,
    steps: int = STEPS,
    sequences: int = 4,
    **kwargs: Any,
) -> Any:
    return tiny.cli(
        *train_args(trained, out, ranks, *more, steps=steps, sequences=sequences), **kwargs
    )


def train_args(
    trained, out: Path, ranks: int, *more: str, steps: int = STEPS, sequences: int = 4
) -> list[str]:
    return [
        *map(str, ("train", trained.verifier, "--data", trained.prompts, "-o", out)),
        *tiny.TRAIN_ARGS, "--lr", "2e-3", "--num-anchors", "16", "--holdout", "0.1",
        "--max-steps", str(steps), "--batch-size", str(sequences),
        "--tensor-parallel-size", str(ranks), *more,
    ]  # fmt: skip


def state(out: Path) -> dict[str, torch.Tensor]:
    """The newest saved state in fp32 (the checkpoint is in the verifier's dtype)."""
    (file,) = out.with_name(out.name + "-run").glob("state-*.safetensors")
    return load_file(file)


def largest_difference(a: Path, b: Path) -> float:
    one, two = state(a), state(b)
    assert one.keys() == two.keys()
    return max(
        float((one[k] - two[k]).abs().max()) for k in one if k.startswith(("model.", "ema."))
    )


def metrics(out: Path) -> list[dict[str, Any]]:
    lines = out.with_name(out.name + "-run").joinpath("metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.long
def test_training_on_two_ranks_equals_one(trained, folder, capsys) -> None:
    """The export refuses weights that differ between ranks, so there is one result to compare."""
    for ranks in (1, 2):
        done = train(trained, folder / f"ranks-{ranks}", ranks)
    assert "2 ranks share each step by sequence" in done.stderr
    one, two = (metrics(folder / f"ranks-{r}") for r in (1, 2))
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in ("anchors", "tokens", "right", "valid", "accepted", "bad", "lr"):
            assert a.get(name) == b.get(name), name
        for name in ("loss", "grad_norm", "tau"):
            assert a.get(name, 0) == pytest.approx(b.get(name, 0), rel=1e-5), name
    difference = largest_difference(folder / "ranks-1", folder / "ranks-2")
    moved = max(
        float(v.abs().max()) for k, v in state(folder / "ranks-2").items() if k.endswith("exp_avg")
    )
    with capsys.disabled():
        print(f"\nlargest difference of a weight after {STEPS} steps: {difference:.1e}")
    assert moved > 0
    assert difference < 2e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ("--loss", "kl", "--optimizer", "muon", "--ema-decay", "0.9"),
        ("--loss", "ce", "--draft-vocab", "250"),
        ("--feature-gib", "0.0003"),
    ],
    ids=["kl-muon-ema", "draft-vocabulary", "windows"],
)
@pytest.mark.parametrize("sequences", [1, 3])
def test_other_recipes_on_two_ranks(trained, folder, more, sequences) -> None:
    """With one sequence a step, one of the ranks has nothing to add."""
    name = f"{'-'.join(more).replace('--', '')}-{sequences}"
    outs = [folder / f"{name}-{ranks}" for ranks in (1, 2)]
    for ranks, out in enumerate(outs, start=1):
        train(trained, out, ranks, *more, sequences=sequences)
    assert largest_difference(*outs) < 2e-5


@pytest.mark.long
def test_features_recorded_while_generating_on_two_ranks(trained, folder) -> None:
    """The first rank records, both train on its files: as from extracted features."""
    extracted, recorded = folder / "extracted", folder / "recorded"
    train(trained, extracted, 2)
    done = train(trained, recorded, 2, "--features-from", "generation")
    count, of = re.search(
        r"features of (\d+) of (\d+) sequences were recorded", done.stderr
    ).groups()
    assert count == of != "0"
    assert "extracting features: " not in done.stderr
    assert largest_difference(extracted, recorded) < 2e-5


@pytest.mark.slow
def test_killed_and_stopped_on_two_ranks(trained, folder) -> None:
    """As with one: the same bytes as the run that was never stopped, from a feature cache too."""
    whole, resumed = folder / "whole", folder / "resumed"
    train(trained, whole, 2, steps=300)
    args = train_args(trained, resumed, 2, "--cache-features", str(folder / "cache"), steps=300)
    command = tiny.cli_command(*args, "--save-minutes", "0")
    run = folder / "resumed-run"
    # Ctrl-C in a terminal: every process of the group gets it.
    code, err = stop_at(command, run, 30, signal.SIGINT, group=True)
    assert code == 130, err
    assert "the same command resumes" in err
    stopped = json.loads((run / "state.json").read_text())["step"]
    code, _ = stop_at(command, run, stopped + 30, signal.SIGKILL)
    assert code == -signal.SIGKILL
    killed = json.loads((run / "state.json").read_text())["step"]
    assert stopped < killed < 300
    done = tiny.cli(*args)
    assert f"resuming at step {killed}" in done.stderr
    assert "extracting" not in done.stderr
    assert len(list((folder / "cache").rglob("index.json"))) == 2
    assert metric_steps(run) == list(range(300))
    assert same_weights(whole, resumed)


@pytest.mark.slow
def test_offline_tau_on_two_ranks_is_the_engines(trained, folder) -> None:
    result = folder / "eval.json"
    tiny.cli(
        "eval", trained.verifier, trained.drafter, "--data", trained.prompts, "--engine",
        "-o", result, "--dtype", "float32", "--max-len", "192", "--max-tokens", "64",
        "--concurrency", "4", "--tensor-parallel-size", "2",
    )  # fmt: skip
    got = json.loads(result.read_text())
    assert got["offline"]["num_accepted"] > 100
    assert got["engine"]["num_drafts"] == got["offline"]["num_drafts"]
    assert got["engine"]["tau"] == pytest.approx(got["offline"]["tau"], rel=0.02)


def test_what_training_does_not_follow_is_refused(verifier, prompts_file, folder) -> None:
    for given, message in (
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size is 2.*--tensor-parallel-size"),
        ({"data_parallel_size": 2}, "data_parallel_size is 2.*--tensor-parallel-size"),
        ({"distributed_executor_backend": "ray"}, "distributed_executor_backend is 'ray'"),
    ):
        done = tiny.cli(
            "train", verifier, "--data", prompts_file, "-o", folder / "refused",
            "--engine-args", json.dumps(given), code=1,
        )  # fmt: skip
        assert re.search(message, done.stderr), done.stderr
        assert not (folder / "refused-run").exists()
