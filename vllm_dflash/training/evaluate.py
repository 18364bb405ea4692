"""``vllm-dflash eval``: teacher-forced tau, and the same through the serving path."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_dflash.checkpoint import check_weights, computable_folder, read_config
from vllm_dflash.config import DrafterConfig, VerifierInfo
from vllm_dflash.cpu_dtype import float32_sentence, verifier_dtype
from vllm_dflash.files import claim_file
from vllm_dflash.training.config import EvalConfig, Hyperparameters, SamplingOptions
from vllm_dflash.training.conversations import load_conversations
from vllm_dflash.training.drafts_page import write_page
from vllm_dflash.training.engine import (
    CPU_KV_GIB,
    VerifierEngine,
    check_block,
    check_engine,
    cut_sentence,
    fit_max_len,
)
from vllm_dflash.training.host_memory import default_feature_gib
from vllm_dflash.training.memory import feature_rows, plan_table
from vllm_dflash.training.plan import first_that_fit, owner
from vllm_dflash.training.planning import evaluation_plan_of_machine
from vllm_dflash.training.prepare import check_prompts, prepare_examples
from vllm_dflash.training.rejections import report_rejected
from vllm_dflash.training.reporting import Reporter
from vllm_dflash.training.responses import is_log
from vllm_dflash.training.tokenization import Example

if TYPE_CHECKING:
    from vllm_dflash.bench.engine_process import EngineSpec

#: Share of tau by which the engine may differ from the offline walk: ties between two tokens fall either way.
MAX_DISAGREEMENT = 0.02


def evaluate(config: EvalConfig, reporter: Reporter) -> dict[str, Any]:
    """Acceptance of a drafter on held-out conversations, by source.

    Returns:
        ``offline`` (teacher-forced) and, where asked for, ``engine`` (served): each with pooled tau,
        drafts, accepted tokens, per-position rates; ``offline`` also per source. Both count delivered tokens
        (:mod:`vllm_dflash.modeling.acceptance`); ``disagreement`` says where they differ, else it is None.

    Raises:
        ValueError: drafter, verifier or data cannot be used.
    """
    if config.responses is not None:
        inputs: dict[str, Any] = {
            "the verifier": str(config.verifier),
            "the drafter": config.drafter,
            "the data": config.data,
        }
        claim_file(config.responses, "--responses", is_log, inputs=inputs, link=True)
    hf_config = config.verifier.load_config()
    info = VerifierInfo.from_hf_config(hf_config, str(config.verifier))
    raw = read_config(config.drafter)
    drafter = DrafterConfig.from_dict(raw)
    drafter.check_verifier(info)
    check_weights(computable_folder(config.drafter, raw), drafter)
    tokens = draft_tokens(config.num_speculative_tokens, drafter)
    if drafter.draft_block_size is None:
        drafter = drafter.with_(draft_block_size=drafter.block_size_for(tokens))
    asked = config.engine.max_len
    config = replace(config, engine=fit_max_len(config.engine, hf_config, drafter, tokens))
    check_block(config.engine, drafter)
    check_engine(hf_config, config.engine, tokens)
    plan = evaluation_plan_of_machine(config.verifier, hf_config, drafter, tokens, config.engine)
    if config.engine.max_len < asked:
        reporter.say(cut_sentence(config.engine.max_len, asked))
    if plan is not None:
        reporter.table(*plan_table(plan))
    conversations, rejected = load_conversations(
        config.data, chat_template_kwargs=config.chat_template_kwargs, limit=config.limit
    )
    rejected_path = config.rejected if rejected else None  # no empty file beside the result
    total = len(conversations) + len(rejected)
    report_rejected(rejected, total, rejected_path, config.max_rejected, reporter.say)
    check_prompts(config.verifier, conversations, config.engine.extra)
    given = config.engine.dtype
    dtype = verifier_dtype(given, config.verifier, hf_config, config.engine.extra)
    config = replace(config, engine=replace(config.engine, dtype=dtype))
    if sentence := float32_sentence(given, dtype):
        reporter.say(sentence)
    rows = feature_rows(default_feature_gib(config.engine.ranks), drafter, config.engine)
    with tempfile.TemporaryDirectory(prefix="vllm-dflash-eval-") as scratch:
        responses = config.responses or Path(scratch) / "responses.jsonl"
        with reporter.stage("starting the verifier"):
            engine = VerifierEngine(
                config.verifier,
                config.drafter,
                config.engine,
                tokens,
                None if plan is None else plan.engine_args(),
            )
        try:

            def generated(requests: int) -> tuple[int, float]:
                return engine.generated.expected(requests, config.max_tokens)

            with reporter.progress("responses", "responses", generated) as update:
                examples, rejected = prepare_examples(
                    engine,
                    config.verifier,
                    conversations,
                    rejected,
                    on_policy=config.on_policy,
                    sampling=SamplingOptions(max_tokens=config.max_tokens),
                    responses_path=responses,
                    rejected_path=config.rejected,
                    max_len=config.engine.max_len,
                    progress=update,
                    max_rejected=config.max_rejected,
                    say=reporter.say,
                )
            offline = _offline(engine, drafter, config, examples, tokens, rows, reporter)
            tokenizer = engine.tokenizer
        finally:
            engine.close()
    out: dict[str, Any] = {
        "verifier": str(config.verifier),
        "drafter": config.drafter,
        "num_speculative_tokens": tokens,
        "conversations": len(conversations),
        "rejected": [{"line": r.line, "reason": r.reason} for r in rejected],
        "offline": offline,
    }
    if config.page is not None:
        write_page(config.page, out, examples, tokenizer)
        del offline["delivered"]
    if config.through_engine:
        served = [e for e in examples if e.id not in offline["skipped"]]
        out["engine"] = _served(config, served, tokens, reporter)
        out["disagreement"] = disagreement(offline, out["engine"])
        if out["disagreement"]:
            reporter.say(out["disagreement"]["message"])
    return out


def disagreement(offline: dict[str, Any], engine: dict[str, Any]) -> dict[str, Any] | None:
    """How far the engine's tau is from the offline one, and what that means; None up to 2 %."""
    relative = engine["tau"] / offline["tau"] - 1
    if abs(relative) <= MAX_DISAGREEMENT:
        return None
    return {
        "relative": relative,
        "message": (
            f"offline and engine disagree by {abs(relative):.1%} (tau {offline['tau']:.3f} over "
            f"{offline['num_drafts']} drafts, {engine['tau']:.3f} over {engine['num_drafts']}): either they "
            "read the checkpoint differently (mask embedding, causality or windows of its layers, ids of the "
            "verifier's layers, rotary settings), or met different text (--on-policy responses that this "
            "verifier would not write, near ties in bf16 or of a quantised verifier, few drafts)"
        ),
    }


def draft_tokens(given: int | None, drafter: DrafterConfig) -> int:
    """Draft tokens a step: the given number, or all that the drafter was trained for.

    Raises:
        ValueError: the drafter was not trained for so many, or does not say for how many.
    """
    most = drafter.num_speculative_tokens
    tokens = most if given is None else given
    if tokens is None:
        raise ValueError(
            "the drafter's config.json does not state its block size: give --num-speculative-tokens"
        )
    if tokens < 1 or (most is not None and tokens > most):
        raise ValueError(
            f"--num-speculative-tokens {tokens} is outside 1..{most}, what this drafter was trained for"
        )
    return tokens


def _offline(
    engine: VerifierEngine,
    drafter: DrafterConfig,
    config: EvalConfig,
    examples: list[Example],
    tokens: int,
    rows: int,
    reporter: Reporter,
) -> dict[str, Any]:
    """Acceptance by teacher forcing, over as many conversations at a time as ``rows`` of features hold."""
    hparams = Hyperparameters(codebooks="free").as_dict()  # as they are in the checkpoint
    engine.call("begin", drafter.to_dict(), hparams, None, 1, config.drafter, None)
    by_key = {e.id: e for e in examples}
    engine.call(
        "register",
        [(k, list(e.token_ids), list(e.loss_mask), e.source) for k, e in by_key.items()],
    )
    failed, done = {}, 0
    token_ids = {k: e.token_ids for k, e in by_key.items()}
    owners = {k: owner(ids, config.engine.ranks) for k, ids in token_ids.items()}
    with reporter.progress("extracting features", "sequences") as update:
        update(done, len(by_key))
        while token_ids:
            part = first_that_fit(
                token_ids,
                max_rows=rows,
                block_size=engine.kv_block_size,
                owners=owners,
            )
            for key, problem in engine.extract({k: token_ids.pop(k) for k in part}):
                done += 1
                update(done, len(by_key))
                if problem:
                    failed[key] = problem
            engine.call("walk", [k for k in part if k not in failed], tokens)
            engine.call("keep", [])
    if len(failed) == len(by_key):
        raise ValueError(f"no conversation gave usable features: {next(iter(failed.values()))}")
    good = [k for k in by_key if k not in failed]
    got = engine.call("evaluate", good, tokens, config.page is not None)
    return {**got, "skipped": failed}


def first_prompts(examples: list[Example]) -> list[tuple[list[int], int]]:
    """Every response as a request: the tokens before it and how many it has."""
    out = []
    for example in examples:
        mask = [*example.loss_mask, False]
        start = None
        for p, generated in enumerate(mask):
            if generated and start is None:
                start = p
            elif not generated and start is not None:
                out.append((list(example.token_ids[:start]), p - start))
                start = None
    return out


def serving_spec(config: EvalConfig, tokens: int, log: Path) -> EngineSpec:
    """The drafter's engine as ``vllm serve`` starts it: its runner, graphs, batches and caches.

    Args:
        tokens: drafted a step.
        log: file that gets what the engine prints.
    """
    from vllm_dflash.bench.engine_process import EngineSpec

    return EngineSpec(
        mode="plugin",
        model=str(config.verifier),
        engine_args={
            "dtype": config.engine.dtype,
            "max_model_len": config.engine.max_len + tokens + 2,
            "tensor_parallel_size": config.engine.ranks,
            **config.verifier.engine_args(),
            **config.engine.extra,
        },
        speculative_config={
            "method": "dflash",
            "model": config.drafter,
            "num_speculative_tokens": tokens,
            # tau is a figure of whole drafts in every step; chosen lengths would count the promising ones.
            "dflash_draft_length": "fixed",
        },
        # On a CPU vLLM would take most of what memory there is, or fail where part of it is in use.
        env={"VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", CPU_KV_GIB)},
        log_path=log,
    )


def _served(
    config: EvalConfig, examples: list[Example], tokens: int, reporter: Reporter
) -> dict[str, Any]:
    """Serves the same prompts with the drafter; drafts by vLLM's counters, and what they delivered."""
    from vllm_dflash.bench.engine_process import EngineProcess

    # Left behind if the engine fails: the error names its log.
    scratch = Path(tempfile.mkdtemp(prefix="vllm-dflash-eval-"))
    spec = serving_spec(config, tokens, scratch / "engine.log")
    requests = first_prompts(examples)
    with EngineProcess(spec) as process:
        with reporter.stage("starting vLLM with the drafter"):
            process.start()
            startup_s = process.wait_ready()["startup_s"]
        # Drafts of a fixed length: acceptance is counted, speed is bench's.
        with reporter.stage(f"serving {len(requests)} prompts to count acceptance"):
            result = process.run(
                [ids for ids, _ in requests],
                # As long as the responses that the offline walk went over.
                max_tokens=[length for _, length in requests],
                concurrency=config.concurrency,
            )
    shutil.rmtree(scratch)
    counters = result.counters
    return {
        "tau": counters.acceptance_length or 1.0,
        "num_drafts": counters.num_drafts,
        "num_accepted": counters.num_accepted_tokens,
        "position_rates": counters.acceptance_per_position or [],
        "startup_s": startup_s,
        "output_tokens": result.num_output_tokens,
        "output_tokens_per_s": result.output_tokens_per_s,
    }
