"""``/metrics`` of a server with several API processes, by vLLM's own router in a process like theirs."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from helpers import tiny

pytestmark = pytest.mark.thorough
CODE = """
import json, sys
from types import SimpleNamespace

from vllm_dflash.plugin import register
register()
from fastapi import FastAPI
from fastapi.testclient import TestClient
from vllm.v1.metrics.loggers import PrometheusStatLogger

spec = SimpleNamespace(
    method="dflash", model="x", num_speculative_tokens=4, revision=None, dflash_learn=sys.argv[1]
)
metrics = PrometheusStatLogger._spec_decoding_cls(spec, ["model_name", "engine"], {0: ["m", "0"]})
step = SimpleNamespace(
    num_drafts=3, num_draft_tokens=12, num_accepted_tokens=6, num_accepted_tokens_per_pos=[3, 2, 1, 0]
)
metrics.observe(step, 0)
app = FastAPI()
from vllm.entrypoints.serve.instrumentator.metrics import attach_router
attach_router(app)
print(json.dumps(TestClient(app).get("/metrics").text))
"""


def test_metrics_of_ours_are_there(tmp_path):
    counters = (
        "captured", "duplicates", "unusable", "extracted", "not_extracted", "steps", "anchors", "slices",
        "seconds", "comparisons", "promotions", "rollbacks", "not_written", "gave_way", "skipped_sequences",
        "written_dropped", "written_damaged",
    )  # fmt: skip
    none = {"sources": {}}
    status = {"state": "paused", "version": 2, "history": [], "replay": none, "held_out": none}
    status |= {"to_learn": 5, "longest_slice_seconds": 0.1, **dict.fromkeys(counters, 7)}
    status["served"] = [{"version": 2, "source": "chat", "drafts": 10, "accepted_tokens": 25}]
    (tmp_path / "status.json").write_text(json.dumps(status))
    (tmp_path / "shared").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path)],
        env=tiny.environment(PROMETHEUS_MULTIPROC_DIR=str(tmp_path / "shared")),
        capture_output=True,
        text=True,
        check=True,
    )
    lines = json.loads(done.stdout.splitlines()[-1]).splitlines()
    for line in (
        'vllm:spec_decode_num_drafts_total{engine="0",model_name="m"} 3.0',
        'vllm_dflash:acceptance_length{drafter="x",engine="0",model_name="m"} 3.0',
        "vllm_dflash:learn_captured_total 7.0",
        'vllm_dflash:learn_state{state="paused"} 1.0',
        'vllm_dflash:learn_drafts_total{source="chat",version="2"} 10.0',
        'vllm_dflash:learn_accepted_tokens_total{source="chat",version="2"} 25.0',
    ):
        assert lines.count(line) == 1
