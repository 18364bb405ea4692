"""Lengths are chosen where vLLM starts the engine core and its workers as processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import tiny

pytestmark = pytest.mark.engine
#: Two requests to each engine; then the figures that its processes have left for the metrics.
SCRIPT = """
import asyncio, json, sys, time


async def main(given):
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**given))
    params = SamplingParams(
        temperature=0.0, max_tokens=12, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY
    )

    async def ask(number):
        prompt = {"prompt_token_ids": [7 + number, 8, 9, 10]}
        async for output in engine.generate(prompt, params, f"r{number}"):
            return output.outputs[0].token_ids

    lengths = [len(await ask(n)) for n in range(2)]
    time.sleep(0.6)  # the last figures are written
    from vllm_dflash.serving.draft_stats import engine_of, read_stats, stats_file

    name = engine.vllm_config.speculative_config.dflash_stats
    figures = read_stats(stats_file(engine_of(name, 0)))
    engine.shutdown()
    print("RESULT", json.dumps({"lengths": lengths, "steps": figures["steps"]}))


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))
"""


@pytest.fixture(scope="module")
def drafter(verifier, tmp_path_factory) -> Path:
    return tiny.make_drafter(tmp_path_factory.mktemp("launch") / "drafter", verifier)


def launched(verifier, drafter, folder) -> dict:
    script = folder / "launch.py"
    script.write_text(SCRIPT)
    given = {
        "model": str(verifier),
        "max_model_len": 64,
        "max_num_seqs": 4,
        "enforce_eager": True,
        "dtype": "float32",
        "speculative_config": {"method": "dflash", "model": str(drafter)},
        "distributed_executor_backend": "mp",
    }
    env = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn",
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
    return json.loads(line.removeprefix("RESULT"))


@pytest.mark.long
def test_an_engine_core_of_its_own(verifier, drafter, tmp_path) -> None:
    out = launched(verifier, drafter, tmp_path)
    assert out["lengths"] == [12, 12]
    assert out["steps"] >= 4
