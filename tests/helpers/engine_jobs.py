"""Runs one in-process engine as a job file says; a process of its own per engine.

    PYTHONPATH=tests python -m helpers.engine_jobs job.json out.json

The job: ``engine`` (EngineArgs), ``runs`` (each ``name``, ``prompts`` as token ids, ``params`` of
SamplingParams for all or per prompt, ``lora``: per prompt the folder of an adapter or null,
``concurrency``, ``abort``: [prompt index, after how many steps], ``cut``: the same, while the step runs, as
a client's disconnect mostly comes,
``sampler``: "accept_all" for a deliberately wrong rejection sampler), ``record``: a safetensors file for the
features and drafts that the proposer sees, ``config``: whether to return the engine's configuration,
``features``: false to save none of them, ``random_lengths``: whether draft lengths, and whom to draft for,
are left to chance, ``async``: whether to schedule asynchronously, which vLLM does not on a CPU, ``costs``:
[seconds of a step, of each token more, of a draft pass] in place of measured ones.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import re
import sys
import time
from pathlib import Path
from typing import Any


class Recorder:
    """Wraps the proposer's ``propose``, stock or ours: what it is given and what it drafts."""

    def __init__(self) -> None:
        from vllm.v1.worker import gpu_model_runner

        from vllm_dflash.serving.worker.features.recorder import FeatureRecorder

        self.features = FeatureRecorder()
        self.drafts: list[dict[str, Any]] = []
        self.runner: Any = None
        self.recording = False
        from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer

        draft = SpecDecodeBaseProposer.propose

        def drafting(proposer, *args, **kwargs):
            drafted = draft(proposer, *args, **kwargs)
            if self.recording and self.runner is not None:
                rows = getattr(proposer, "draft_rows", None)
                rows = range(len(drafted)) if rows is None else rows.tolist()
                self._observe_drafts(kwargs, list(rows), drafted)
            return drafted

        SpecDecodeBaseProposer.propose = drafting
        cls = gpu_model_runner.DFlashProposer
        # Ours goes through its own method, in steps too that vLLM's never hears of.
        name = "take_features" if hasattr(cls, "take_features") else "propose"
        original = getattr(cls, name)

        def recorded(proposer, *args, **kwargs):
            out = original(proposer, *args, **kwargs)
            if self.recording and self.runner is not None:
                if name == "take_features":
                    _, positions, metadata, rejected = args
                    self._observe_features(out, positions, metadata, rejected)
                else:
                    self._observe_features(
                        kwargs["target_hidden_states"],
                        kwargs["target_positions"],
                        kwargs["common_attn_metadata"],
                        kwargs.get("num_rejected_tokens_gpu"),
                    )
            return out

        setattr(cls, name, recorded)

    def _observe_features(self, features: Any, positions: Any, metadata: Any, rejected: Any):
        self.features.observe(
            self.runner.input_batch.req_ids,
            metadata.query_start_loc_cpu,
            positions[0] if positions.dim() == 2 else positions,
            features,
            rejected,
        )

    def _observe_drafts(self, kwargs: dict[str, Any], rows: list[int], drafted: Any) -> None:
        request_ids = self.runner.input_batch.req_ids
        starts = kwargs["common_attn_metadata"].query_start_loc_cpu.tolist()
        rejected = kwargs.get("num_rejected_tokens_gpu")
        positions = kwargs["target_positions"]
        positions = positions[0] if positions.dim() == 2 else positions
        for row, i in enumerate(rows):
            request_id = request_ids[i]
            last = starts[i + 1] - 1 - (int(rejected[i]) if rejected is not None else 0)
            self.drafts.append(
                {
                    "key": request_id[:-9],
                    "anchor": int(positions[last]) + 1,
                    "token": int(kwargs["next_token_ids"][i]),
                    "drafts": drafted[row].tolist(),
                }
            )


def random_lengths(seed: int = 0) -> None:
    """Makes the draft-length policy draft for random requests and choose random lengths."""
    import numpy as np

    from vllm_dflash.draft_length import worker_policy

    rng = np.random.default_rng(seed)

    def choose(survival_BK, seconds_M):
        longest = (survival_BK > 0).sum(axis=1)
        lengths = tuple(int(rng.integers(0, n + 1)) for n in longest)
        tokens = len(lengths) + sum(survival_BK[i, :n].sum() for i, n in enumerate(lengths))
        return worker_policy.DraftBudget(lengths, float(tokens), float(seconds_M[0]))

    def probes(self, requests, drafting, *args):
        some = rng.random(len(requests)) < rng.choice([0.0, 0.5, 1.0])
        return [i for i in np.flatnonzero(some).tolist() if i not in drafting]

    worker_policy.assign_draft_budget = choose
    worker_policy._sizes = lambda *args: []
    worker_policy.WorkerPolicy._probes = probes


def random_lengths_ahead(seed: int = 0) -> None:
    """The same where the scheduler chooses: draft passes at random, and lengths."""
    import numpy as np

    from vllm_dflash.draft_length.scheduler_policy import SchedulerPolicy

    rng = np.random.default_rng(seed)
    choose = SchedulerPolicy.verify_lengths

    def lengths(self, batch):
        chosen = choose(self, batch)
        some = tuple(int(rng.integers(0, n + 1)) for n in batch.drafted)
        return dataclasses.replace(chosen, lengths=some)

    SchedulerPolicy.verify_lengths = lengths
    SchedulerPolicy.should_draft = lambda self, batch: bool(rng.random() < 0.6)


def schedule_asynchronously() -> None:
    """Undoes what vLLM's CPU platform does to ``async_scheduling``."""
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config

    def check_and_update_config(cls, vllm_config):
        check(vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)


def fixed_costs(step: float, token: float, draft: float) -> None:
    """What dummy steps would say, without the minutes that interpreted ones take."""
    from vllm_dflash.draft_length.cost import StepCost
    from vllm_dflash.serving.worker import calibration

    def measured(*args):
        return StepCost([1, 64], [step, step + 63 * token], draft=(draft, 0.0))

    calibration.measured = measured


def count_ops() -> dict[str, int]:
    """Counts the calls of the plugin's ops from now on."""
    from vllm_dflash import ops

    counts: dict[str, int] = {}
    call = ops._call

    def counted(op, *args):
        counts[op] = counts.get(op, 0) + 1
        return call(op, *args)

    ops._call = counted
    return counts


class RecorderV2:
    """The same for the V2 runner: drafts of vLLM's own ``propose``, features from our class around it.

    Where stock runs, those come from ``propose``, too.
    """

    def __init__(self) -> None:
        from vllm.v1.worker.gpu.spec_decode.dflash.speculator import DFlashSpeculator

        from vllm_dflash.serving.worker.features.recorder import FeatureRecorder

        self.features = FeatureRecorder()
        self.drafts: list[dict[str, Any]] = []
        self.recording = False
        self._runner: Any = None
        stock = DFlashSpeculator.propose

        @functools.wraps(stock)
        def propose(speculator, batch, *args, **kwargs):
            drafted = stock(speculator, batch, *args, **kwargs)
            given = inspect.signature(stock).bind(speculator, batch, *args, **kwargs).arguments
            if self.recording and not hasattr(type(speculator), "recorder"):
                self._observe_features(batch, given["aux_hidden_states"], given["num_rejected"])
            if self.recording and not getattr(speculator, "_skipping", False):
                self._observe(batch, given["last_sampled"], given["num_rejected"], drafted)
            return drafted

        DFlashSpeculator.propose = propose

    @property
    def runner(self) -> Any:
        return self._runner

    @runner.setter
    def runner(self, runner: Any) -> None:
        self._runner = runner
        runner.speculator.recorder = self.features

    def _observe_features(self, batch: Any, aux_hidden_states: Any, rejected: Any) -> None:
        import torch

        rows = batch.num_tokens
        self.features.observe(
            request_ids=batch.req_ids,
            query_start_loc=batch.query_start_loc_np[: batch.num_reqs + 1],
            positions=batch.positions[:rows],
            features_TF=torch.cat([h[:rows] for h in aux_hidden_states], dim=-1),
            num_rejected=rejected[: batch.num_reqs] if batch.num_draft_tokens else None,
        )

    def _observe(self, batch: Any, last_sampled: Any, rejected: Any, drafted: Any) -> None:
        starts = batch.query_start_loc_np
        for i, request_id in enumerate(batch.req_ids):
            last = int(starts[i + 1]) - 1 - int(rejected[i])
            self.drafts.append(
                {
                    "key": request_id[:-9],
                    "anchor": int(batch.positions[last]) + 1,
                    "token": int(last_sampled[batch.idx_mapping[i]]),
                    "drafts": drafted[i].tolist(),
                }
            )


def sampling_params(raw: dict[str, Any]) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import (
        RepetitionDetectionParams,
        RequestOutputKind,
        StructuredOutputsParams,
    )

    # Also gathers the n outputs of a request, which otherwise come one by one.
    raw = {**raw, "output_kind": RequestOutputKind.FINAL_ONLY}
    if "structured_outputs" in raw:
        raw["structured_outputs"] = StructuredOutputsParams(**raw["structured_outputs"])
    if "repetition_detection" in raw:
        raw["repetition_detection"] = RepetitionDetectionParams(**raw["repetition_detection"])
    return SamplingParams(**raw)


def counters() -> dict[str, float]:
    """vLLM's counters of speculation, preemption and prefix hits, and our gauges."""
    from prometheus_client import REGISTRY

    wanted = ("vllm:spec_decode_", "vllm:num_preemptions", "vllm:prefix_cache_hits", "vllm_dflash:")
    out: dict[str, float] = {}
    for metric in REGISTRY.collect():
        for sample in metric.samples:
            if metric.name.startswith(wanted) and not sample.name.endswith("_created"):
                name = sample.name
                if "position" in sample.labels:
                    name += f"/{sample.labels['position']}"
                if "drafter" in sample.labels:
                    name += f"/{Path(sample.labels['drafter']).name}"
                out[name] = out.get(name, 0) + sample.value
    return out


def accept_all(module: Any) -> Any:
    """Replaces vLLM's rejection sampling by one that accepts every draft; gives the original."""
    original = module.rejection_sample

    def wrong(draft_token_ids, num_draft_tokens, max_spec_len, cu, probs, target, bonus, *a, **k):
        out = original(
            draft_token_ids, num_draft_tokens, max_spec_len, cu, probs, target, bonus, *a, **k
        )
        at = 0
        for row, count in enumerate(num_draft_tokens):
            out[row, :count] = draft_token_ids[at : at + count].to(out.dtype)
            out[row, count] = bonus[row]
            at += count
        return out

    module.rejection_sample = wrong
    return original


def logprobs(positions: Any) -> list[list[tuple[int, float]]]:
    return [
        sorted(((t, p.logprob) for t, p in step.items()), key=lambda x: (-x[1], x[0]))
        for step in positions
    ]


def completion(output: Any) -> dict[str, Any]:
    out = {
        "token_ids": list(output.token_ids),
        "text": output.text,
        "finish": output.finish_reason,
        "stop": output.stop_reason,
    }
    if output.logprobs:
        out["logprobs"] = logprobs(output.logprobs)
    return out


def adapter(path: str | None) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest("adapter", 1, path) if path else None


def run(engine: Any, job: dict[str, Any]) -> list[list[dict[str, Any]] | None]:
    """Closed loop with ``concurrency`` requests in flight; an aborted request gives None."""
    prompts, name = job["prompts"], job["name"]
    params = job["params"]
    params = params if isinstance(params, list) else [params] * len(prompts)
    todo = list(enumerate(prompts))
    results: list[list[dict[str, Any]] | None] = [None] * len(prompts)
    abort, steps, running = job.get("abort"), 0, set()
    while todo or engine.has_unfinished_requests():
        while todo and len(running) < job.get("concurrency", 8):
            i, prompt = todo.pop(0)
            engine.add_request(
                f"{name}:{i}",
                {"prompt_token_ids": prompt},
                sampling_params(params[i]),
                lora_request=adapter(job["lora"][i]) if "lora" in job else None,
            )
            running.add(f"{name}:{i}")
        cut = job.get("cut")
        if cut and steps + 1 == cut[1]:
            core = engine.engine_core.engine_core
            gone = [r for r in core.scheduler.requests if r.startswith(f"{name}:{cut[0]}-")]
            assert gone, "it has ended"
            core.aborts_queue.put_nowait(gone)
        for output in engine.step():
            if output.finished:
                i = int(output.request_id.rsplit(":", 1)[1])
                results[i] = [completion(o) for o in output.outputs]
                if any(output.prompt_logprobs or ()):
                    results[i][0]["prompt_logprobs"] = logprobs(output.prompt_logprobs[1:])
                running.discard(output.request_id)
        steps += 1
        if abort and steps == abort[1]:
            engine.abort_request([f"{name}:{abort[0]}"])
            running.discard(f"{name}:{abort[0]}")
        if cut and steps == cut[1]:
            engine.abort_request([f"{name}:{cut[0]}"])
            running.discard(f"{name}:{cut[0]}")
    return results


class LastDraft:
    """Highest position of a draft token that a scheduler sends to the verifier, since the last reading."""

    def __init__(self, scheduler: Any) -> None:
        self.position = -1
        schedule = scheduler.schedule

        def noted(*args, **kwargs):
            output = schedule(*args, **kwargs)
            for name, tokens in output.scheduled_spec_decode_tokens.items():
                if tokens:  # scheduled tokens are counted as computed by now
                    last = scheduler.requests[name].num_computed_tokens - 1
                    self.position = max(self.position, last)
            return output

        scheduler.schedule = noted

    def take(self) -> int:
        position, self.position = self.position, -1
        return position


def describe(engine: Any) -> dict[str, Any]:
    """The engine's configuration, without what differs between any two processes."""
    text = repr(engine.vllm_config)
    text = re.sub(r"0x[0-9a-f]+|instance_id='[^']*'|engine_id='[^']*'", "", text)
    return {"hash": engine.vllm_config.compute_hash(), "repr": text}


def main(job_file: str, out_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    v2 = job.get("runner") == "v2"
    if v2:
        from helpers import interpreted_v2

        interpreted_v2.install()
    from vllm import EngineArgs
    from vllm.plugins import load_general_plugins
    from vllm.v1.engine.llm_engine import LLMEngine

    load_general_plugins()
    if "reasoning_parser_plugin" in job["engine"]:
        # As a server does; the engine looks for the parser before it reads the file.
        from vllm.reasoning import ReasoningParserManager

        ReasoningParserManager.import_reasoning_parser(job["engine"]["reasoning_parser_plugin"])
    calls = count_ops()
    if job.get("random_lengths"):
        random_lengths()
        random_lengths_ahead()
    if job.get("async"):
        schedule_asynchronously()
    if job.get("costs"):
        fixed_costs(*job["costs"])
    recorder: Any = None
    if job.get("record"):
        recorder = RecorderV2() if v2 else Recorder()
    result: dict[str, Any] = {"plugin": "vllm_dflash.plugin" in sys.modules}
    args = {"enforce_eager": True, "dtype": "float32", "disable_log_stats": False, **job["engine"]}
    from vllm.v1.engine.core import EngineCore

    allocated: list[str] = []
    initialize = EngineCore._initialize_kv_caches

    def noted(*a, **k):
        allocated.append("kv cache")
        return initialize(*a, **k)

    EngineCore._initialize_kv_caches = noted
    try:
        engine = LLMEngine.from_engine_args(EngineArgs(**args))
    except Exception as error:
        result |= {
            "error_type": type(error).__name__,
            "error": str(error),
            "kv_cache_planned": bool(allocated),
        }
        Path(out_file).write_text(json.dumps(result))
        return
    runner = engine.collective_rpc(lambda worker: worker.model_runner)[0]
    drafter = getattr(runner, "speculator" if v2 else "drafter", None)
    result["config_hash"] = engine.vllm_config.compute_hash()
    result["runner"] = type(runner).__module__
    result["tap"] = getattr(drafter, "tap", None) is not None
    result["proposer"] = f"{type(drafter).__module__}.{type(drafter).__name__}"
    verifier = runner.model if v2 else runner.get_model()
    result["verifier"] = type(verifier).__name__
    result["adapted"] = getattr(verifier, "_dflash_tap", None) is not None
    result["drafter_model"] = type(getattr(drafter, "model", None)).__name__
    if job.get("config"):
        result["config"] = describe(engine)
    if recorder is not None:
        recorder.runner = runner
    result["runs"] = {}
    scheduler = engine.engine_core.engine_core.scheduler
    last_draft = LastDraft(scheduler)
    for one in job["runs"]:
        if recorder is not None:
            recorder.recording = True
            asked, name = zip(one["prompts"], one["params"], strict=True), one["name"]
            recorder.features.watch(
                {f"{name}:{i}": len(p) + how["max_tokens"] for i, (p, how) in enumerate(asked)}
            )
        restore = None
        if one.get("sampler") == "accept_all":
            from vllm.v1.sample import rejection_sampler

            restore = accept_all(rejection_sampler)
        before = counters()
        outputs = run(engine, one)
        if restore is not None:
            rejection_sampler.rejection_sample = restore
        after = counters()
        changed = {
            k: v - before.get(k, 0) if not k.startswith("vllm_dflash") else v
            for k, v in after.items()
        }
        result["runs"][one["name"]] = {
            "outputs": outputs,
            "counters": changed,
            "last_draft": last_draft.take(),
        }
    if job["engine"].get("speculative_config"):
        time.sleep(0.6)  # the engine is idle, and its last figures are written
    result["counters"] = counters()
    result["ops"] = calls
    result["scheduler"] = f"{type(scheduler).__module__}.{type(scheduler).__name__}"
    result["batches"] = engine.engine_core.engine_core.batch_queue_size
    lengths = getattr(drafter, "lengths", None) or getattr(scheduler, "draft_lengths", None)
    if lengths is not None:
        from vllm_dflash.serving.draft_stats import engine_name, figures, read_stats, stats_file

        result["lengths"] = figures(lengths.policy.counters)
        result["served"] = read_stats(stats_file(engine_name(engine.vllm_config)))
    if recorder is not None:
        from safetensors.torch import save_file

        tensors = {}
        for name, one in result["runs"].items():
            # Those of a cached prefix are not computed either.
            for i, outputs in enumerate(one["outputs"] if job.get("features", True) else ()):
                # The last token's features are never computed.
                length = len(job_prompt(job, name, i)) + len(outputs[0]["token_ids"]) - 1
                features, _ = recorder.features.take(f"{name}:{i}", length)
                tensors[f"{name}:{i}"] = features.contiguous()
        save_file(tensors, job["record"])
        result["drafts"] = recorder.drafts
    Path(out_file).write_text(json.dumps(result))


def job_prompt(job: dict[str, Any], name: str, index: int) -> list[int]:
    return next(r for r in job["runs"] if r["name"] == name)["prompts"][index]


if __name__ == "__main__":
    main(*sys.argv[1:3])
