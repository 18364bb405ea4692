"""One vLLM engine in a process of its own, core and workers inside, so that its steps can be looked into.

Parent and child exchange lines of JSON. The child runs what it is told to, and times steps in which every
request decodes.
"""

from __future__ import annotations

import copy
import json
import os
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

from smoke.rows import last_line

HERE = Path(__file__).resolve().parent
#: Steps at the start of a run that are not timed: prompts, and what is looked up on first use.
SKIPPED_STEPS = 3
#: Interpreted kernels take seconds a step: costs are given to the policy, not measured.
REHEARSED_COSTS = (0.01, 0.0001, 0.001)


class Engine:
    """The parent's side.

    Args:
        name: of messages and the log.
        config: ``engine`` (fields of EngineArgs); ``plugin``; ``interpreted``: the V2 runner on a CPU;
            ``record``: keep all drafts.
        log_path: for what the child prints.

    Raises:
        RuntimeError: of all methods: the engine died or took too long.
    """

    def __init__(self, name: str, config: dict[str, Any], log_path: Path) -> None:
        self.name, self.log_path = name, log_path
        log_path.parent.mkdir(parents=True, exist_ok=True)
        env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        env |= {"VLLM_PLUGINS": "dflash" if config["plugin"] else "", "VLLM_NO_USAGE_STATS": "1"}
        env["PYTHONPATH"] = os.pathsep.join(
            (str(HERE.parents[1] / "tests"), str(HERE.parent), env.get("PYTHONPATH", ""))
        )
        with log_path.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "smoke.engine", json.dumps(config)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=env,
            )
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def answer(self, timeout: float) -> dict[str, Any]:
        """The child's next answer; the first one says that the engine is ready, and what it is."""
        try:
            line = self._lines.get(timeout=max(timeout, 0.1))
        except queue.Empty:
            raise RuntimeError(f"{self.name}: no answer in {timeout:.0f} s") from None
        if not line:
            code = self.process.wait()
            raise RuntimeError(f"{self.name}: exit code {code}: {self._cause()}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{self.name}: {answer['error']}")
        return answer

    def ask(self, command: dict[str, Any], timeout: float) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self.answer(timeout)

    def close(self) -> None:
        """Ends the child."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.close()
            self.process.wait(15)
        except (OSError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()

    def _cause(self) -> str:
        return last_line(self.log_path.read_text(errors="replace"))


# -- the child's side --------------------------------------------------------------------------


def serve(config: dict[str, Any]) -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what vLLM prints must not mix with the answers
    try:
        engine, about, drafts = start(config)
        print(json.dumps(about), file=answers)
        for line in sys.stdin:
            command = json.loads(line)
            drafts.clear()
            result = profiled(engine, command) if command.get("profile") else timed(engine, command)
            print(json.dumps({**result, "drafts": list(drafts)}), file=answers)
    except Exception as error:
        print(
            json.dumps({"error": f"{type(error).__name__}: {last_line(str(error))}"}), file=answers
        )
        raise


def start(config: dict[str, Any]) -> tuple[Any, dict[str, Any], list[dict[str, Any]]]:
    """The engine, what is to be said of it, and the list that drafts will be put into."""
    if config["interpreted"]:
        from helpers import interpreted_v2

        interpreted_v2.install()
    began = time.perf_counter()
    from vllm import EngineArgs
    from vllm.plugins import load_general_plugins
    from vllm.v1.engine.llm_engine import LLMEngine

    load_general_plugins()
    from helpers import engine_jobs

    if config["interpreted"]:
        engine_jobs.schedule_asynchronously()
    costs: list[Any] = []
    if config["plugin"]:
        if config["interpreted"]:
            engine_jobs.fixed_costs(*REHEARSED_COSTS)
        from vllm_dflash.serving.worker import calibration

        measured = calibration.measured

        def noted(*args: Any) -> Any:
            cost = measured(*args)
            costs.append(copy.deepcopy(cost))  # serving refines it
            return cost

        calibration.measured = noted
    drafts: list[dict[str, Any]] = []
    if config["record"]:
        recorder = engine_jobs.RecorderV2()
        recorder.recording, drafts = True, recorder.drafts
    engine = LLMEngine.from_engine_args(EngineArgs(**config["engine"]))
    runner = engine.collective_rpc(lambda worker: worker.model_runner)[0]
    drafter = getattr(runner, "speculator", None) or getattr(runner, "drafter", None)
    vllm = engine.vllm_config
    about: dict[str, Any] = {
        "start_s": round(time.perf_counter() - began, 1),
        "v2": ".gpu.model_runner" in type(runner).__module__ or config["interpreted"],
        "proposer": type(drafter).__module__ if drafter is not None else None,
        "async": bool(vllm.scheduler_config.async_scheduling),
        "graphs": str(vllm.compilation_config.cudagraph_mode).rpartition(".")[2],
    }
    if costs:
        about["costs"] = [
            {
                "requests": b,
                "step_ms": 1e3 * float(c.step(b, b, 0)),
                "draft_ms": _draft_ms(c, b, vllm),
            }
            for c in costs[:1]
            for b in (1, 8, 32)
        ]
    return engine, about, drafts


def _draft_ms(cost: Any, requests: int, vllm_config: Any) -> float:
    width = vllm_config.speculative_config.num_speculative_tokens + 1
    return 1e3 * float(cost.draft_fixed + cost.per_query * requests * width)


def timed(engine: Any, command: dict[str, Any]) -> dict[str, Any]:
    """Greedy outputs of the prompts, ``concurrency`` in flight, and the median step in which all decode."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        temperature=0.0,
        max_tokens=command["max_tokens"],
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    prompts, most = command["prompts"], command["concurrency"]
    outputs: list[list[int]] = [[] for _ in prompts]
    todo, running, steps = list(enumerate(prompts)), 0, []
    before, began = _accepted(engine), time.perf_counter()
    full = 0
    while todo or running:
        added = bool(todo and running < most)
        while todo and running < most:
            i, prompt = todo.pop(0)
            engine.add_request(f"{command['name']}:{i}", {"prompt_token_ids": prompt}, params)
            running += 1
        full = 0 if added else full + 1
        start = time.perf_counter()
        finished = [output for output in engine.step() if output.finished]
        if full > SKIPPED_STEPS and not finished:
            steps.append(time.perf_counter() - start)
        for output in finished:
            outputs[int(output.request_id.rpartition(":")[2])] = list(output.outputs[0].token_ids)
        running -= len(finished)
    seconds = time.perf_counter() - began
    counted = [a - b for a, b in zip(_accepted(engine), before, strict=True)]
    return {
        "outputs": outputs,
        "step_ms": round(1e3 * median(steps), 3) if steps else None,
        "tokens_per_s": round(sum(map(len, outputs)) / seconds, 1),
        "num_drafts": counted[0],
        "num_accepted": counted[1],
    }


def _accepted(engine: Any) -> list[float]:
    """Drafts and accepted tokens so far."""
    names = ("vllm:spec_decode_num_drafts", "vllm:spec_decode_num_accepted_tokens")
    values = {m.name: m.value for m in engine.get_metrics() if m.name in names}
    return [values.get(name, 0) for name in names]


def profiled(engine: Any, command: dict[str, Any]) -> dict[str, Any]:
    """What steps in which all decode spend their time on.

    Returns:
        ``step_ms``, ``busy``: share of it in which the device works (kernels of a step may overlap), and
        ``kernels``: milliseconds a step of the longest.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True, detokenize=False)
    for i, prompt in enumerate(command["prompts"]):
        engine.add_request(f"profile:{i}", {"prompt_token_ids": prompt}, params)
    for _ in range(2 * SKIPPED_STEPS):
        engine.step()
    cuda, count = torch.cuda.is_available(), 4
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiler:
        began = time.perf_counter()
        for _ in range(count):
            engine.step()
        if cuda:
            torch.cuda.synchronize()
        seconds = (time.perf_counter() - began) / count
    while engine.has_unfinished_requests():
        engine.step()
    events = []
    for event in profiler.key_averages():
        micros = event.self_device_time_total if cuda else event.self_cpu_time_total
        if micros:
            events.append((event.key[:70], micros / count / 1e3))
    events.sort(key=lambda event: -event[1])
    return {
        "step_ms": round(1e3 * seconds, 3),
        "busy": round(sum(ms for _, ms in events) / (1e3 * seconds), 3),
        "kernels": {name: round(ms, 3) for name, ms in events[:8]},
    }


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
