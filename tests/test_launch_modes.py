"""Costs get from the workers to the scheduler however vLLM starts its processes; untrained drafters."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

pytestmark = pytest.mark.engine
#: Two requests to each engine; then the figures that its processes have left for the metrics.
SCRIPT = """
import asyncio, json, sys, time


async def main(given):
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms.cpu import CpuPlatform
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    if given.pop("asynchronous"):
        # vLLM's CPU platform undoes it.
        check = CpuPlatform.check_and_update_config

        def check_and_update_config(cls, vllm_config):
            check(vllm_config)
            vllm_config.scheduler_config.async_scheduling = True

        CpuPlatform.check_and_update_config = classmethod(check_and_update_config)
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**given))
    params = SamplingParams(
        temperature=0.0, max_tokens=12, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY
    )

    async def ask(number, rank):
        prompt = {"prompt_token_ids": [7 + number, 8, 9, 10]}
        async for output in engine.generate(prompt, params, f"r{number}", data_parallel_rank=rank):
            return output.outputs[0].token_ids

    ranks = given.get("data_parallel_size", 1)
    lengths = [len(await ask(n, n % ranks if ranks > 1 else None)) for n in range(2 * ranks)]
    time.sleep(0.6)  # the last figures are written
    from vllm_dflash.serving.draft_stats import engine_of, read_stats, stats_file

    name = engine.vllm_config.speculative_config.dflash_stats
    figures = [read_stats(stats_file(engine_of(name, i))) for i in range(ranks)]
    engine.shutdown()
    print("RESULT", json.dumps({"lengths": lengths, "steps": [f and f["steps"] for f in figures]}))


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))
"""


@pytest.fixture(scope="module")
def drafter(verifier, tmp_path_factory) -> Path:
    return tiny.make_drafter(tmp_path_factory.mktemp("launch") / "drafter", verifier)


def launched(verifier, drafter, folder, method="spawn", asynchronous=True, **engine) -> dict:
    script = folder / "launch.py"
    script.write_text(SCRIPT)
    given = {
        "model": str(verifier),
        "max_model_len": 64,
        "max_num_seqs": 4,
        "enforce_eager": True,
        "dtype": "float32",
        "speculative_config": {"method": "dflash", "model": str(drafter)},
        "asynchronous": asynchronous,
        **engine,
    }
    env = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_WORKER_MULTIPROCESSING_METHOD": method,
        "VLLM_LOGGING_LEVEL": "INFO",
        "VLLM_CACHE_ROOT": str(folder / "cache"),
    }
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(given)],
        env=tiny.environment(**env),
        capture_output=True,
        text=True,
        timeout=500,
    )
    said = done.stdout + done.stderr
    line = next((x for x in done.stdout.splitlines() if x.startswith("RESULT")), None)
    assert line is not None, said[-8000:]
    assert "drafts a fixed number" not in said
    assert "stock behaviour" not in said
    return {**json.loads(line.removeprefix("RESULT")), "log": said}


@pytest.mark.long
@pytest.mark.parametrize(
    ("method", "asynchronous", "executor"),
    [("spawn", True, "mp"), ("fork", True, "uni"), ("spawn", False, "mp")],
    ids=["spawned, scheduler", "forked, scheduler", "spawned, worker"],
)
def test_an_engine_core_of_its_own(method, asynchronous, executor, verifier, drafter, tmp_path):
    out = launched(
        verifier,
        drafter,
        tmp_path,
        method,
        asynchronous,
        distributed_executor_backend=executor,
    )
    assert out["lengths"] == [12, 12]
    assert out["steps"][0] >= 4
    assert ("chooses draft lengths in the scheduler" in out["log"]) == asynchronous


@pytest.mark.long
def test_data_parallel_engines(verifier, drafter, tmp_path):
    """Each asks its own workers."""
    out = launched(verifier, drafter, tmp_path, data_parallel_size=2)
    assert out["lengths"] == [12] * 4
    assert all(steps >= 4 for steps in out["steps"])
    assert out["log"].count("chooses draft lengths in the scheduler") == 2
