"""benchmarks/bench_serve.py: vLLM's own client before a real server, and what it is started with."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from helpers import tiny
from vllm_dflash.bench.engine_process import EngineSpec

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import bench_serve


def test_a_server_gets_the_engine_of_its_mode(tmp_path) -> None:
    speculative = {"method": "dflash", "model": "d", "num_speculative_tokens": 7}
    args = {"dtype": "float32", "enforce_eager": True, "enable_prefix_caching": False, "seed": 3}
    spec = EngineSpec("plugin", "a/model: x", args, speculative)
    file = bench_serve.server_file(spec, tmp_path / "plugin.yaml", 8123)
    given = yaml.safe_load(file.read_text())
    assert json.loads(given.pop("speculative-config")) == speculative
    assert given == {
        "model": "a/model: x",
        "host": "127.0.0.1",
        "port": 8123,
        "dtype": "float32",
        "enforce-eager": True,
        "no-enable-prefix-caching": True,
        "seed": 3,
    }


def test_what_follows_two_dashes_is_the_clients() -> None:
    args = bench_serve.parse(["v", "d", "--num-prompts", "4", "--", "--dataset-name", "random"])
    assert (args.verifier, args.num_prompts) == ("v", 4)
    assert args.client == ["--dataset-name", "random"]
    assert bench_serve.parse(["v", "d", "--also", 's={"method": "suffix"}']).also == [
        ("s", {"method": "suffix"})
    ]
    for bad in ("s", "s=[]", "plugin={}", "s={"):
        with pytest.raises(SystemExit):
            bench_serve.parse(["v", "d", "--also", bad])
    runs = [{"output_throughput": n, "median_ttft_ms": 1.0} for n in (1.0, 5.0, 2.0)]
    made = bench_serve.summarize(runs)
    assert made["output_throughput"] == 2.0
    assert made["spec_decode_acceptance_length"] is None


@pytest.mark.engine
@pytest.mark.long
def test_a_server_and_the_client(tmp_path, verifier, prompts_file, monkeypatch) -> None:
    drafter = tiny.make_drafter(tmp_path / "drafter", verifier)
    for name, value in tiny.CPU_ENV.items():
        monkeypatch.setenv(name, value)
    engine = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256}
    out = tmp_path / "out"
    bench_serve.main(
        [
            str(verifier), str(drafter), "--data", str(prompts_file), "-o", str(out), "--modes", "plugin",
            "--also", 'bigram={"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}',
            "--concurrency", "2", "--num-prompts", "4", "--max-tokens", "16",
            "--rates", "20", "--burstiness", "0.5", "--goodput", "e2el:600000",
            "--engine-args", json.dumps(engine), "--", "--ignore-eos",
        ]
    )  # fmt: skip
    report = json.loads((out / "report.json").read_text())
    rows = [(row["mode"], row["load"]) for row in report["rows"]]
    loads = ("2 in flight", "20/s, burstiness 0.5")
    assert rows == [(mode, load) for load in loads for mode in ("plugin", "bigram")]
    for figures in report["rows"]:
        assert figures["output_throughput"] > 0
        assert figures["spec_decode_acceptance_length"] >= 1 or figures["mode"] == "bigram"
        assert figures["request_goodput"] > 0
    result = json.loads((out / "plugin-0-1.json").read_text())
    assert (result["completed"], result["total_output_tokens"]) == (4, 64)
    # The prompts that training and `bench` would make, token by token.
    assert result["total_input_tokens"] == sum(map(len, tiny.prompt_ids(verifier, prompts_file, 4)))
    assert result["spec_decode_num_drafts"] > 0
