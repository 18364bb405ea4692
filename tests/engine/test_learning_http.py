"""A learning server's HTTP: routes behind its API key, and metrics of several API processes."""

from __future__ import annotations

import json
import os
import random
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tomllib
from prometheus_client.parser import text_string_to_metric_families

from helpers import tiny
from helpers.api_server import Server, serving

pytestmark = [pytest.mark.engine, pytest.mark.long]
ROOT = Path(__file__).parents[2]
ROUTE = "/v1/dflash/learn"


def http(server: Server, path: str, key: str = "", body: Any = None) -> tuple[int, Any]:
    """Status and JSON; a POST where there is a body."""
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(server.url + path, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def samples(server: Server) -> dict[str, dict[tuple, float]]:
    """Of each metric the values by labels."""
    out: dict[str, dict[tuple, float]] = {}
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=60) as answer:
        for family in text_string_to_metric_families(answer.read().decode()):
            for s in family.samples:
                key = tuple(sorted(s.labels.items()))
                assert key not in out.setdefault(s.name, {}), "told twice"
                out[s.name][key] = s.value
    return out


def installed(folder: Path) -> str:
    """A path with this tree's entry points, as an installation has them."""
    info = folder / "vllm_dflash-0.dist-info"
    info.mkdir(parents=True)
    info.joinpath("METADATA").write_text("Metadata-Version: 2.1\nName: vllm-dflash\nVersion: 0\n")
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    text = "".join(
        f"[{group}]\n" + "".join(f"{n} = {v}\n" for n, v in points.items())
        for group, points in groups.items()
    )
    (info / "entry_points.txt").write_text(text)
    return os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH", ""))))


def spec(folder: Path, drafter: Path, **more: Any) -> dict[str, Any]:
    return {
        "method": "dflash",
        "model": str(drafter),
        "num_speculative_tokens": 4,
        "dflash_learn": str(folder),
        "dflash_learn_slice_ms": 50,
        **more,
    }


def test_routes_behind_the_key_and_metrics_of_two_api_processes(trained, tmp_path):
    """``trained``'s drafter is accepted often."""
    folder, key = tmp_path / "learn", "secret"
    env = {"PYTHONPATH": installed(tmp_path / "site"), "VLLM_PLUGINS": "dflash,dflash_learn"}
    args = ("--api-key", key, "--api-server-count", "2")
    with serving(
        trained.verifier,
        tmp_path / "s",
        *args,
        speculative=spec(folder, trained.drafter),
        environment=env,
        limit=600,
    ) as server:
        command = f"{ROUTE}/pause"
        for wrong in ("", "other"):
            assert http(server, ROUTE, wrong)[0] == 401
            assert http(server, command, wrong, {})[0] == 401
        assert http(server, command, key, {}) == (200, {"command": "pause", "taken": True})

        def complete(seed: int) -> int:
            body = {
                "model": "model",
                "prompt": tiny.sentence(random.Random(seed), 12),
                "max_tokens": 24,
                "temperature": 0,
                "ignore_eos": True,
                "vllm_xargs": {"dflash_source": "odd" if seed % 2 else "even"},
            }
            return http(server, "/v1/completions", key, body)[0]

        with ThreadPoolExecutor(8) as pool:  # connections of both processes
            assert set(pool.map(complete, range(48))) == {200}
        time.sleep(2.5)  # figures are written every second
        code, status = http(server, ROUTE, key)
        assert (code, status["state"], status["captured"]) == (200, "paused", 48)
        # Whichever process answers says the same.
        told = [samples(server) for _ in range(6)]
        for metrics in told:
            assert metrics["vllm_dflash:learn_captured_total"] == {(): 48}
            assert metrics["vllm_dflash:learn_state"][(("state", "paused"),)] == 1
        first = told[0]
        for name in ("drafts", "accepted_tokens"):
            ours = first[f"vllm_dflash:learn_{name}_total"]
            assert {dict(labels)["source"] for labels in ours} <= {"odd", "even"}
            assert {dict(labels)["version"] for labels in ours} == {"0"}
            drafter = [
                n
                for k, n in first[f"vllm_dflash:{name}_total"].items()
                if ("source", "drafter") in k
            ]
            assert sum(ours.values()) == sum(drafter) > 0
        (tau,) = first["vllm_dflash:acceptance_length"].values()
        all_drafts, all_accepted = (
            sum(first[f"vllm:spec_decode_num_{n}_total"].values())
            for n in ("drafts", "accepted_tokens")
        )
        assert tau == pytest.approx(1 + all_accepted / all_drafts)
        assert all(
            m["vllm_dflash:acceptance_length"] == first["vllm_dflash:acceptance_length"]
            for m in told
        )
        # Steering.
        assert http(server, f"{ROUTE}/promote", key, {"version": 7})[0] == 400
        assert http(server, f"{ROUTE}/promote", key, {})[0] == 400
        assert http(server, f"{ROUTE}/promote", key, {"version": "x"})[0] in (400, 422)
        assert http(server, f"{ROUTE}/resume", key, {})[0] == 200
        assert http(server, f"{ROUTE}/stop", key, {})[0] == 404
        assert http(server, f"{ROUTE}/promote", key, {"version": 0})[0] == 200
        time.sleep(1.5)
        status = http(server, ROUTE, key)[1]
        assert status["state"] == "learning"
        assert status["history"][-1]["event"] == "promoted"


def test_routes_are_there_only_where_they_are_asked_for(trained, tmp_path):
    env = {"PYTHONPATH": installed(tmp_path / "site"), "VLLM_PLUGINS": "dflash"}
    with serving(
        trained.verifier,
        tmp_path / "s",
        speculative=spec(tmp_path / "learn", trained.drafter),
        environment=env,
    ) as server:
        assert http(server, ROUTE)[0] == 404
        assert http(server, f"{ROUTE}/pause", body={})[0] == 404
