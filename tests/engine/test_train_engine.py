"""Training through a real engine: features, the whole command, and going on after a crash."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers import tiny, warm

pytestmark = pytest.mark.engine

FEATURES_SCRIPT = """
import json, os, sys, weakref

job = json.load(open(sys.argv[1]))
if job["interpreted"]:
    from helpers import interpreted_v2
    interpreted_v2.install()
    del os.environ["VLLM_USE_V2_MODEL_RUNNER"]  # vLLM chooses it by itself
from safetensors.torch import save_file
from vllm_dflash.training.config import EngineOptions, Hyperparameters
from vllm_dflash.training.engine import VerifierEngine

options = EngineOptions(
    dtype="float32", max_len=160, max_num_seqs=job["seqs"], max_num_batched_tokens=job["budget"]
)
before = dict(os.environ)
engine = VerifierEngine(job["verifier"], job["seat"], options)
loss = Hyperparameters(loss="kl").as_dict()
config = json.load(open(job["seat"] + "/config.json"))
engine.call("begin", config, loss, None, 1, None, None)
examples = dict(job["examples"])
engine.call("register", [(k, ids, [True] * len(ids), "test") for k, ids in examples.items()])
problems = dict(engine.extract(examples))
session = engine.engine.collective_rpc(lambda w: w._vllm_dflash_session)[0]
out = {}

def put(name):
    for key in examples:
        sample = session._sample(key)
        out[f"{name}/{key}"] = sample.features_TF.clone()
        out[f"{name}-final/{key}"] = sample.final_TH.clone()

put("shared")
kept = sum(len(features) for features, _ in session.features.store._memory.values())
again = dict(engine.extract(examples))
put("again")
# The first sequence cannot be used: what reads its prefix must do without.
session_take = session.recorder.take

def broken_once(key, *args):
    features = session_take(key, *args)
    if key == "row/0" and session._planned["row/3"].parent:
        raise ValueError("broken")
    return features

session.recorder.take = broken_once
retried = dict(engine.extract(examples))
put("retried")
del session.recorder.take
save_file(out, sys.argv[2])
runner = type(session.runner).__module__
held = (session, session.verifier, session.learner, session.source, session.source.model, session.source.tap)
held = {type(x).__name__: weakref.ref(x) for x in (*held, session.runner, session.recorder)}
del session, session_take
engine.close()
left = [name for name, ref in held.items() if ref() is not None]
changed = {k for k in before.keys() | os.environ.keys() if before.get(k) != os.environ.get(k)}
result = {"problems": problems, "again": again, "retried": retried, "kept": kept}
result |= {"runner": runner, "held": len(held), "left": left, "changed": sorted(changed)}
json.dump(result, open(sys.argv[2] + ".json", "w"))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("train")


@pytest.fixture(scope="module")
def conversations(prompts) -> dict[str, list[int]]:
    """Token sequences of very different lengths, two of them with a common prefix."""
    rows = [
        p + [(7 * i + j * j) % 300 + 6 for j in range(5 + 7 * (i % 5))]
        for i, p in enumerate(prompts)
    ]
    # One is another's prefix, and one comes twice.
    more = [rows[0] + [9, 8, 7], [11, 12], rows[3][:65], rows[1]]
    return {f"row/{i}": ids[:150] for i, ids in enumerate([*rows, *more])}


@pytest.mark.parametrize(
    ("seqs", "budget", "runner"),
    [
        (4, 32, "cpu_model_runner"),
        pytest.param(4, 32, "cpu.model_runner", marks=pytest.mark.long),
        pytest.param(64, 4096, "cpu_model_runner", marks=pytest.mark.slow),
    ],
    ids=["chunked", "chunked, V2", "at once"],
)
def test_features_equal_hugging_face(verifier, folder, conversations, seqs, budget, runner) -> None:
    """Features of the seam, and the final states of the kl loss, against ``hidden_states``; then the engine
    is closed, and neither models nor changes of the environment stay."""
    from transformers import AutoModelForCausalLM

    name = f"{seqs}-{runner}"
    seat = tiny.make_drafter(folder / f"seat-{name}", verifier, draft_block_size=2)
    script = folder / "features.py"
    script.write_text(FEATURES_SCRIPT)
    job = {
        "verifier": str(verifier),
        "seat": str(seat),
        "interpreted": runner == "cpu.model_runner",
        "seqs": seqs,
        "budget": budget,
        "examples": list(conversations.items()),
    }
    (folder / "features.json").write_text(json.dumps(job))
    out = folder / f"features-{name}.safetensors"
    subprocess.run(
        [sys.executable, script, folder / "features.json", out],
        env=tiny.environment(PYTHONPATH=os.pathsep.join([str(warm.TESTS), *sys.path])),
        check=True,
        timeout=300,
    )
    result = json.loads(Path(f"{out}.json").read_text())
    assert result["problems"] == result["again"] == dict.fromkeys(conversations)
    assert result["retried"] == dict.fromkeys(conversations) | {"row/0": "broken"}
    # Every third begins with the same system message, of more than a block.
    assert result["kept"] < 0.8 * sum(len(ids) - 1 for ids in conversations.values())
    assert result["runner"] == f"vllm.v1.worker.{runner}"
    assert (result["held"], result["left"], result["changed"]) == (8, [], [])
    got = load_file(out)
    for key in conversations:
        # What the cache still held does not matter: the same bits.
        assert torch.equal(got[f"again/{key}"], got[f"shared/{key}"])
    layers = json.loads((seat / "config.json").read_text())["dflash_config"]["target_layer_ids"]
    assert layers == [0, 2, 3]
    model = AutoModelForCausalLM.from_pretrained(verifier, dtype=torch.float32)
    before_norm: list[torch.Tensor] = []
    # Hugging Face's last hidden state is normed, the last layer's own output is not.
    model.model.norm.register_forward_pre_hook(lambda module, args: before_norm.append(args[0]))
    for key, ids in conversations.items():
        before_norm.clear()
        with torch.no_grad():
            hidden = model(torch.tensor([ids[:-1]]), output_hidden_states=True).hidden_states
        states = [before_norm[0] if i == 3 else hidden[i + 1] for i in layers]
        want = torch.cat(states, dim=-1)[0]
        for name in ("shared", "retried"):
            features, final = got[f"{name}/{key}"], got[f"{name}-final/{key}"]
            assert features.shape == want.shape
            torch.testing.assert_close(features, want, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(final, hidden[-1][0], rtol=1e-4, atol=1e-4)


def test_train_leaves_drafter_and_run_folder(trained, prompts) -> None:
    assert sorted(p.name for p in trained.drafter.iterdir()) == [
        ".vllm-dflash.json",
        "config.json",
        "dflash_training.json",
        "model.safetensors",
    ]
    summary = trained.summary
    assert summary["steps"] == 300
    # round(0.1 * 24) conversations are held out.
    assert summary["train_sequences"] == 22
    assert summary["skipped"] == {}
    assert summary["tau_heldout"]["num_drafts"] > 20
    config = json.loads((trained.run / "run.json").read_text())
    assert config["config"]["hparams.lr"] == 4e-3
    rows = [json.loads(line) for line in (trained.run / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in rows if "loss" in r]
    assert [r["step"] for r in steps] == list(range(300))
    assert [r["step"] for r in rows if "tau" in r] == [149, 299]
    assert sum(r["loss"] for r in steps[-20:]) < 0.6 * sum(r["loss"] for r in steps[:20])
    accepted, anchors = (sum(r[k] for r in steps[-20:]) for k in ("accepted", "anchors"))
    assert 1 + accepted / anchors > 2
    assert (trained.run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (trained.run / "rejected.jsonl").read_text() == ""
    assert len((trained.run / "responses.jsonl").read_text().splitlines()) == 1 + len(prompts)
    assert len(list(trained.run.glob("state-*.safetensors"))) == 1
    assert "drafter written to" in trained.output


def metric_steps(run: Path) -> list[int]:
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return []
    out = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if "loss" in row:
            out.append(row["step"])
    return out


def stop_at(
    command: list[str], run: Path, step: int, sig: int, saved: bool = False, group: bool = False
) -> tuple[int, str]:
    """Runs a training until it has done ``step`` (and saved a state), then sends a signal.

    To the process, or as a terminal does to its whole ``group``.
    """
    process = subprocess.Popen(
        command,
        env=tiny.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=group,
    )
    try:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and process.poll() is None:
            if max(metric_steps(run), default=-1) >= step and (
                not saved or (run / "state.json").is_file()
            ):
                break
            time.sleep(0.05)
        assert process.poll() is None, "training ended before it could be stopped"
        os.killpg(process.pid, sig) if group else process.send_signal(sig)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()
    return process.returncode, err


def same_weights(a: Path, b: Path) -> bool:
    return (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()


@pytest.mark.long
def test_killed_and_stopped_runs_resume_bit_for_bit(trained, folder) -> None:
    """SIGTERM, then kill -9, then to the end: the same bytes as the run that was never stopped."""
    out = folder / "resumed"
    run = folder / "resumed-run"
    args = ("train", trained.verifier, "--data", trained.prompts, "-o", out, *trained.args)
    # Saves at every chance, so that the kill comes after one; it is no part of a run's identity.
    command = tiny.cli_command(*args, "--save-minutes", "0")
    code, err = stop_at(command, run, 40, signal.SIGTERM)
    assert code == 128 + signal.SIGTERM, err
    assert "the same command resumes" in err
    assert not out.exists()
    stopped = json.loads((run / "state.json").read_text())["step"]
    assert 40 < stopped < 300
    code, _ = stop_at(command, run, stopped + 40, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert not out.exists()
    killed = json.loads((run / "state.json").read_text())["step"]
    assert stopped < killed < 300

    done = tiny.cli(*args, "--lr", "5e-3", code=1)
    assert "hparams.lr" in done.stderr
    assert "0.004" in done.stderr
    assert done.stderr.count("error:") == 1

    # As the release before wrote it.
    text = (run / "run.json").read_text()
    for old, new in {"anchors": "num_anchors", "sequences": "batch_size"}.items():
        assert f'"hparams.{new}"' in text
        text = text.replace(f'"hparams.{new}"', f'"hparams.{old}"')
    (run / "run.json").write_text(text)
    done = tiny.cli(*args)
    assert f"resuming at step {killed}" in done.stderr
    assert metric_steps(run) == list(range(300))
    assert same_weights(out, trained.drafter)
    a, b = (json.loads((d / "dflash_training.json").read_text()) for d in (out, trained.drafter))
    assert a["tau_heldout"] == b["tau_heldout"]


def short(trained, out: Path, *more: str, data: Path | None = None, steps: int = 40, **kwargs: Any):
    args = (*tiny.TRAIN_ARGS, "--lr", "2e-3", "--num-anchors", "16", "--max-steps", str(steps))
    return tiny.cli(
        "train",
        trained.verifier,
        "--data",
        data or trained.prompts,
        "-o",
        out,
        *args,
        *more,
        **kwargs,
    )


def test_a_finished_run_says_so_without_an_engine(trained) -> None:
    before = (trained.drafter / "model.safetensors").read_bytes()
    args = ("--data", trained.prompts, "-o", trained.drafter, *trained.args)
    done = tiny.cli("train", trained.verifier, *args)
    assert "this run is finished: 300 steps" in done.stderr
    assert "starting the verifier" not in done.stderr
    assert (trained.drafter / "model.safetensors").read_bytes() == before


@pytest.mark.long
def test_the_console_is_the_command_s(trained, folder) -> None:
    """Nothing of vLLM's or torch's on it: no warning concerns the user here."""
    args = ("train", trained.verifier, "--data", trained.prompts, "-o", folder / "quiet")
    env = {k: v for k, v in tiny.environment().items() if not k.endswith("_LOGGING_LEVEL")}
    done = subprocess.run(
        tiny.cli_command(*args, *tiny.TRAIN_ARGS, "--max-steps", "2", "--num-anchors", "16"),
        env=env, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == ""
    ours = ("starting the verifier", "responses:", "extracting features:", "training ", "step ")
    ours += (
        "drafter written",
        "curves:",
        "24 conversations",
        "training:",
        "to do: ",
        "tau: ",
        "next, ",
    )
    ours += ("extracting held-out features:", "held-out tau", "last evaluation and export")
    assert [line for line in done.stderr.splitlines() if not line.startswith(ours)] == []


@pytest.mark.slow
def test_windows_of_features_resume_too(trained, folder) -> None:
    """Too little memory for all features: each window's are extracted again when it comes."""
    small = ("--feature-gib", "0.0003")
    short(trained, folder / "windowed", *small)
    command = tiny.cli_command(
        "train", trained.verifier, "--data", trained.prompts, "-o", folder / "windowed-2",
        *tiny.TRAIN_ARGS, "--lr", "2e-3", "--num-anchors", "16", "--max-steps", "40", *small,
        "--save-minutes", "0",
    )  # fmt: skip
    code, _ = stop_at(command, folder / "windowed-2-run", 6, signal.SIGKILL, saved=True)
    assert code == -signal.SIGKILL
    done = tiny.cli(*command[1:])
    assert "resuming at step" in done.stderr
    assert done.stderr.count("extracting features:") > 2
    assert same_weights(folder / "windowed", folder / "windowed-2")


@pytest.mark.slow
def test_feature_cache_is_used_again(trained, folder) -> None:
    cache = ("--cache-features", str(folder / "cache"))
    first = short(trained, folder / "cached", *cache)
    assert "extracting features:" in first.stderr
    assert list((folder / "cache").rglob("*.safetensors"))
    again = short(trained, folder / "cached-2", *cache)
    assert "extracting" not in again.stderr
    assert same_weights(folder / "cached", folder / "cached-2")
    plain = short(trained, folder / "plain")
    assert plain.returncode == 0
    assert same_weights(folder / "plain", folder / "cached")


def test_fine_tuning_goes_on_from_a_drafter(trained, folder) -> None:
    """``--init-from`` keeps shape, draft vocabulary and mask embedding, and starts where the drafter was."""
    out, base_folder = folder / "tuned", folder / "with-mask-embedding"
    shutil.copytree(trained.drafter, base_folder)
    token = json.loads((base_folder / "config.json").read_text())["dflash_config"]["mask_token_id"]
    mask = load_file(trained.verifier / "model.safetensors")["model.embed_tokens.weight"][token]
    torch.save({"embedding": mask.clone()}, base_folder / "mask_embedding.pt")
    short(trained, out, "--init-from", str(base_folder), "--holdout", "0", steps=20)
    rows = (folder / "tuned-run" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in rows]
    first = [json.loads(line) for line in (trained.run / "metrics.jsonl").read_text().splitlines()]
    assert steps[0]["loss"] < 0.7 * first[0]["loss"]
    tuned, base = (load_file(d / "model.safetensors") for d in (out, trained.drafter))
    assert torch.equal(tuned["d2t"], base["d2t"])
    assert torch.equal(tuned["lm_head.weight"], base["lm_head.weight"])
    assert not torch.equal(tuned["fc.weight"], base["fc.weight"])
    state = torch.load(out / "mask_embedding.pt", weights_only=True)
    assert state["mask_token_id"] == token
    assert torch.equal(state["embedding"], mask.to(state["embedding"].dtype))
    assert json.loads((out / "dflash_training.json").read_text())["tau_heldout"] is None


@pytest.mark.slow
def test_on_policy_trusts_the_data(trained, folder, prompts) -> None:
    rows = []
    for line in trained.prompts.read_text().splitlines():
        row = json.loads(line)
        row["messages"].append(
            {"role": "assistant", "content": "the cat sleeps under the old tree"}
        )
        rows.append(json.dumps(row))
    rows.append(json.dumps({"messages": [{"role": "user", "content": "no answer"}]}))
    rows.append("not json")
    data = folder / "answered.jsonl"
    data.write_text("\n".join(rows) + "\n")
    done = short(trained, folder / "on-policy", "--on-policy", data=data, steps=120)
    assert "responses:" not in done.stderr or "24" in done.stderr
    rejected = (folder / "on-policy-run" / "rejected.jsonl").read_text().splitlines()
    assert len(rejected) == 2
    steps = metric_steps(folder / "on-policy-run")
    assert steps == list(range(120))
    summary = json.loads((folder / "on-policy" / "dflash_training.json").read_text())
    assert summary["tau_heldout"]["tau"] > 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ("--loss", "kl", "--optimizer", "muon", "--ema-decay", "0.9"),
        ("--loss", "ce", "--checkpoint-format", "speculators", "--draft-vocab", "128"),
        ("--temperature", "1.0", "--top-k", "20", "--top-p", "0.9", "--autocast", "bfloat16"),
    ],
    ids=["kl-muon-ema", "ce-speculators", "sampled"],
)
def test_other_recipes(trained, folder, more) -> None:
    out = folder / "-".join(more).replace("--", "").replace(".", "_")
    short(trained, out, *more, steps=60)
    steps = [
        json.loads(line)
        for line in out.with_name(out.name + "-run")
        .joinpath("metrics.jsonl")
        .read_text()
        .splitlines()
    ]
    losses = [r["loss"] for r in steps if "loss" in r]
    assert len(losses) == 60
    assert sum(losses[-10:]) < sum(losses[:10])
    tiny.cli("inspect", out, trained.verifier)


@pytest.mark.slow
def test_recipes_with_more_state_resume_too(trained, folder) -> None:
    """Muon's momentum and the moving average are part of the state."""
    more = ("--optimizer", "muon", "--ema-decay", "0.95", "--loss", "kl")
    short(trained, folder / "muon", *more, steps=200)
    command = tiny.cli_command(
        "train", trained.verifier, "--data", trained.prompts, "-o", folder / "muon-2",
        *tiny.TRAIN_ARGS, "--lr", "2e-3", "--num-anchors", "16", "--max-steps", "200", *more,
    )  # fmt: skip
    code, _ = stop_at(command, folder / "muon-2-run", 20, signal.SIGINT)
    assert code == 130
    tiny.cli(*command[1:])
    assert same_weights(folder / "muon", folder / "muon-2")


def test_environment_is_left_alone() -> None:
    """The helpers above pass environments explicitly; nothing of them leaks into this process."""
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in os.environ
