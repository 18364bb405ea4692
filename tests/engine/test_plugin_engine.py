"""The plugin inside vLLM: other methods untouched, bad drafters refused early, metrics."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import tiny

pytestmark = pytest.mark.engine
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_max": 3,
    "prompt_lookup_min": 1,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("plugin")


def job(verifier: Path, prompts: list, speculative: dict | None) -> dict[str, Any]:
    return {
        "engine": {
            "model": str(verifier),
            "max_model_len": 192,
            "max_num_seqs": 4,
            "speculative_config": speculative,
        },
        "config": True,
        "runs": [
            {
                "name": "run",
                "prompts": prompts,
                "params": {"temperature": 0.0, "max_tokens": 32},
                "concurrency": 4,
            }
        ],
    }


@pytest.mark.parametrize("method", ["none", "ngram"])
def test_other_methods_are_untouched(verifier, prompts, folder, method) -> None:
    """Configuration, compile-cache key, proposer, outputs and counters, with and without the plugin."""
    one = job(verifier, prompts[:8], NGRAM if method == "ngram" else None)
    env = {"NUMBA_NUM_THREADS": "1"}
    with_plugin = tiny.engine_job(one, folder, env=env)
    without = tiny.engine_job(one, folder, env={**env, "VLLM_PLUGINS": ""})
    assert with_plugin["plugin"]
    assert not without["plugin"]
    assert with_plugin["config"] == without["config"]
    assert with_plugin["runs"] == without["runs"]
    assert with_plugin["proposer"] == without["proposer"]
    if method == "ngram":
        assert with_plugin["runs"]["run"]["counters"]["vllm:spec_decode_num_drafts_total"] > 0


def test_bad_drafters_end_in_one_clear_error(trained, folder) -> None:
    """Every one is a ValueError before an engine exists; one process tries them all."""
    other = tiny.make_verifier(folder / "other", hidden=96, vocab=400, tokenizer=False, layers=3)
    cut = folder / "cut"
    shutil.copytree(trained.drafter, cut)
    weights = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    empty = folder / "empty"
    empty.mkdir()
    base = {"method": "dflash", "model": str(trained.drafter)}
    cases: dict[str, tuple[Path, dict[str, Any], tuple[str, ...]]] = {
        "unknown option": (
            trained.verifier,
            {**base, "dflash_foo": 1},
            ("dflash_foo", "dflash_check"),
        ),
        "option type": (
            trained.verifier,
            {**base, "dflash_check": "maybe"},
            ("dflash_check", "maybe"),
        ),
        "other verifier": (other, base, ("does not fit", "hidden size is 96", "[3] do not exist")),
        "cut weights": (
            trained.verifier,
            {**base, "model": str(cut)},
            ("cut short", "model.safetensors"),
        ),
        "no such drafter": (
            trained.verifier,
            {**base, "model": str(folder / "nowhere")},
            ("nowhere", "does not exist"),
        ),
        "empty folder": (trained.verifier, {**base, "model": str(empty)}, ("config.json",)),
    }
    script = folder / "bad.py"
    script.write_text(
        "import json, sys\n"
        "from vllm import EngineArgs\n"
        "out = {}\n"
        "for name, (model, speculative) in json.load(open(sys.argv[1])).items():\n"
        "    try:\n"
        "        EngineArgs(model=model, dtype='float32', max_model_len=192, enforce_eager=True,\n"
        "                   speculative_config=speculative).create_engine_config()\n"
        "        out[name] = None\n"
        "    except Exception as error:\n"
        "        out[name] = [type(error).__name__, str(error)]\n"
        "json.dump(out, open(sys.argv[2], 'w'))\n"
    )
    good = (
        trained.verifier,
        {**base, "dflash_check": True, "dflash-greedy-draft-vocab": False},
        (),
    )
    todo = {name: (str(c[0]), c[1]) for name, c in {**cases, "good": good}.items()}
    (folder / "bad.json").write_text(json.dumps(todo))
    subprocess.run(
        [sys.executable, script, folder / "bad.json", folder / "bad-out.json"],
        env=tiny.environment(),
        check=True,
        timeout=300,
    )
    got = json.loads((folder / "bad-out.json").read_text())
    assert got.pop("good") is None
    for name, (_, _, parts) in cases.items():
        assert got[name] is not None, f"{name} was accepted"
        kind, text = got[name]
        assert kind == "ValueError", f"{name}: {kind}: {text}"
        for part in parts:
            assert part in text, f"{name}: {part!r} not in {text!r}"


def test_nan_weights_are_refused_before_the_kv_cache(trained, prompts, folder) -> None:
    bad = folder / "nan"
    shutil.copytree(trained.drafter, bad)
    weights = load_file(bad / "model.safetensors")
    weights["layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(weights, bad / "model.safetensors", metadata={"format": "pt"})
    one = job(trained.verifier, prompts[:2], {"method": "dflash", "model": str(bad)})
    out = tiny.engine_job(one, folder)
    assert out["error_type"] == "ValueError"
    assert "layers.1.mlp.up_proj.weight" in out["error"]
    assert "non-finite" in out["error"]
    assert not out["kv_cache_planned"]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def get(url: str, body: dict | None = None) -> str:
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return response.read().decode()


def metric(text: str, name: str) -> dict[str, float]:
    """Samples of one metric: labels to value."""
    out = {}
    for line in text.splitlines():
        if line.startswith(name + "{"):
            labels, value = line[len(name) :].rsplit(" ", 1)
            out[labels] = float(value)
    return out


def test_metrics_of_a_running_server(trained, folder) -> None:
    """The OpenAI server (engine core in another process) exports tau and the drafter's name, and what its
    training promised, which here is far too much."""
    port = free_port()
    drafter = folder / "promising"
    shutil.copytree(trained.drafter, drafter)
    training = trained.summary
    held = training["tau_heldout"]
    assert held["num_speculative_tokens"] == 7
    assert held["sources"]
    for figures in (held, *held["sources"].values()):
        assert len(figures["conditional_rates"]) == 7
        figures |= {"conditional_rates": [0.97] * 7, "num_drafts": 1000}
    (drafter / "dflash_training.json").write_text(json.dumps(training))
    spec = json.dumps({"method": "dflash", "model": str(drafter), "dflash_check": True})
    log = folder / "server.log"
    with log.open("wb") as out:
        server = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "vllm.entrypoints.openai.api_server",
                "--model",
                str(trained.verifier),
                "--dtype",
                "float32",
                "--enforce-eager",
                "--max-model-len",
                "192",
                "--port",
                str(port),
                "--host",
                "127.0.0.1",
                "--speculative-config",
                spec,
                "--served-model-name",
                "tiny",
            ],
            env=tiny.environment(),
            stdout=out,
            stderr=out,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(600):
            assert server.poll() is None, log.read_text()[-4000:]
            try:
                get(f"{url}/health")
                break
            except OSError:
                time.sleep(0.5)
        rows = trained.prompts.read_text().splitlines()
        # 500 drafts have to be compared before a word is said; a busy machine may draft seldom.
        for _ in range(12):
            for row in rows:
                body = {"model": "tiny", "max_tokens": 40, "temperature": 0, **json.loads(row)}
                get(f"{url}/v1/chat/completions", body)
            text = get(f"{url}/metrics")
            sources = metric(text, "vllm_dflash:drafts_total").items()
            if any('source="drafter"' in labels and n > 600 for labels, n in sources):
                break
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
    (drafts,) = metric(text, "vllm:spec_decode_num_drafts_total").values()
    (accepted,) = metric(text, "vllm:spec_decode_num_accepted_tokens_total").values()
    ((labels, tau),) = metric(text, "vllm_dflash:acceptance_length").items()
    assert accepted > 0
    assert tau == pytest.approx(1 + accepted / drafts)
    assert f'drafter="{drafter}"' in labels
    (served,) = metric(text, "vllm_dflash:drafter_acceptance_length").values()
    assert 1.3 < served < 4
    expected = metric(text, "vllm_dflash:expected_acceptance_length")
    assert list(expected.values()) == pytest.approx(
        [1 + sum(0.97**k for k in range(1, 8))] * len(expected)
    )
    assert len(expected) == 1 + len(held["sources"])
    assert sum('source="all"' in labels for labels in expected) == 1
    said = [line for line in log.read_text().splitlines() if "accepts far less here" in line]
    assert len(said) == 1
    assert str(drafter) in said[0]
    lengths = metric(text, "vllm_dflash:draft_length_total")
    assert len(lengths) == 8
    assert sum(metric(text, "vllm_dflash:steps_total").values()) > 0
    for name in ("drafts", "proposed_tokens", "accepted_tokens", "expected_tokens"):
        assert len(metric(text, f"vllm_dflash:{name}_total")) == 2
    (speedup,) = metric(text, "vllm_dflash:estimated_speedup").values()
    assert speedup > 0
    ((labels, one),) = metric(text, "vllm_dflash:drafter_info").items()
    assert one == 1
    assert 'num_speculative_tokens="7"' in labels
