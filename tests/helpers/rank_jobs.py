"""Runs one engine over several worker processes as a job file says, and asks every rank what it saw.

    PYTHONPATH=tests python -m helpers.rank_jobs job.json out.json

The job: ``engine`` (EngineArgs), ``async``, ``random_lengths`` (of the scheduler) and ``runs`` as in
``engine_jobs.py``, each with ``drafting``: False to decode without the drafter, and ``record``: a path to
which each rank appends its number for the features it saw.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from helpers import engine_jobs

#: In a worker.
_recorder: engine_jobs.Recorder | None = None


def set_drafting(worker: Any, enabled: bool) -> None:
    worker.model_runner.drafter.drafting = enabled


def start_recording(worker: Any, lengths: dict[str, int]) -> None:
    global _recorder
    if _recorder is None:
        _recorder = engine_jobs.Recorder()
        _recorder.runner = worker.model_runner
    _recorder.recording = True
    _recorder.features.watch(lengths)


def stop_recording(worker: Any, lengths: dict[str, int], file: str) -> dict[str, Any]:
    from safetensors.torch import save_file

    assert _recorder is not None
    _recorder.recording = False
    tensors = {k: _recorder.features.take(k, n)[0].contiguous() for k, n in lengths.items()}
    path = f"{file}.{worker.rank}"
    save_file(tensors, path)
    drafts, _recorder.drafts = _recorder.drafts, []
    return {"drafts": drafts, "features": path}


def describe(worker: Any) -> dict[str, Any]:
    drafter = worker.model_runner.drafter
    attention = drafter.model.model.layers[0].self_attn
    return {
        "proposer": f"{type(drafter).__module__}.{type(drafter).__name__}",
        "tap": drafter.tap is not None,
        "kv_heads": attention.num_kv_heads,
        "query_heads": attention.num_heads,
        "lm_head_rows": drafter.model.lm_head.weight.shape[0],
    }


def main(job_file: str, out_file: str) -> None:
    # The functions above travel by the name of this module, which is not __main__ in a worker.
    from vllm import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    from helpers import rank_jobs as remote

    job = json.loads(Path(job_file).read_text())
    args = {"enforce_eager": True, "dtype": "float32", "disable_log_stats": False, **job["engine"]}
    if job.get("random_lengths"):
        engine_jobs.random_lengths_ahead()
    if job.get("async"):
        engine_jobs.schedule_asynchronously()
    try:
        engine = LLMEngine.from_engine_args(EngineArgs(**args))
    except Exception as error:
        answer = {"error_type": type(error).__name__, "error": str(error)}
        Path(out_file).write_text(json.dumps(answer))
        return

    def ask(function: Any, *args: Any) -> list[Any]:
        return engine.collective_rpc(function, args=args)

    result: dict[str, Any] = {"runs": {}}
    drafts = "speculative_config" in job["engine"]
    if drafts:
        result["ranks"] = ask(remote.describe)
    for one in job["runs"]:
        name, limit = one["name"], one["params"]["max_tokens"]
        if drafts:
            ask(remote.set_drafting, one.get("drafting", True))
        if one.get("record"):
            lengths = {f"{name}:{i}": len(p) + limit for i, p in enumerate(one["prompts"])}
            ask(remote.start_recording, lengths)
        before = engine_jobs.counters()
        outputs = engine_jobs.run(engine, one)
        after = engine_jobs.counters()
        result["runs"][name] = {
            "outputs": outputs,
            "counters": {k: v - before.get(k, 0) for k, v in after.items()},
        }
        if one.get("record"):
            # The last token's features are never computed.
            lengths = {
                f"{name}:{i}": len(p) + len(o[0]["token_ids"]) - 1
                for i, (p, o) in enumerate(zip(one["prompts"], outputs, strict=True))
                if o is not None
            }
            result["runs"][name]["ranks"] = ask(remote.stop_recording, lengths, one["record"])
    Path(out_file).write_text(json.dumps(result))
    engine.engine_core.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:3])
