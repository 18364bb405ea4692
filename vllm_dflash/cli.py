"""``vllm-dflash``: train, plan, eval, bench, inspect, convert, env."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from vllm_dflash.bench.runner import BenchConfig
    from vllm_dflash.config import DrafterConfig
    from vllm_dflash.verifier import Verifier as LoadedVerifier

app = typer.Typer(
    name="vllm-dflash",
    help="Train, evaluate and serve DFlash drafters inside stock vLLM.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _panel(name: str) -> Callable[..., Any]:
    """``typer.Option`` for options that ``--help`` shows together."""
    return partial(typer.Option, rich_help_panel=name)


data_option, responses_option = _panel("Data"), _panel("Responses")
drafter_option, training_option = _panel("Drafter"), _panel("Training")
engine_option = _panel("Engine")

Verifier = Annotated[
    str, typer.Argument(help="Model folder or hub name, as `vllm serve` takes it.")
]
DrafterPath = Annotated[str, typer.Argument(help="Drafter checkpoint folder.")]
Data = Annotated[
    list[str],
    data_option(
        "--data",
        help="JSONL, JSON or Parquet of messages, ShareGPT, prompts or logged requests: a file, a folder, a "
        "pattern, or a Hugging Face data set (org/name:split, org/name/subset:split). May be repeated.",
    ),
]
MaxRejected = Annotated[
    float, data_option(help="Share of the rows that may be rejected; 1 allows all.")
]
TrustRemoteCode = Annotated[
    bool,
    engine_option("--trust-remote-code", help="Let Python code that comes with the verifier run."),
]
Revision = Annotated[
    str | None, engine_option(help="Branch, tag or commit of a verifier named on the Hub.")
]
Tokenizer = Annotated[str | None, engine_option(help="Another tokenizer than the verifier's.")]
ChatTemplate = Annotated[
    str | None, data_option(help="The server's chat template: a file, or the text itself.")
]
ReasoningParser = Annotated[
    str | None,
    data_option(
        help="The server's, as vLLM's: splits thinking from the answer in replies that become history. "
        "Default: at the markers that tokenizer and template show."
    ),
]
Dtype = Annotated[str, engine_option(help="The verifier's dtype, as vLLM's --dtype.")]
MaxLen = Annotated[int, data_option(help="Longest conversation in tokens.")]
TemplateKwargs = Annotated[
    str | None,
    data_option(help="JSON of chat_template_kwargs, as the server uses them (thinking mode...)."),
]
EngineArgs = Annotated[str | None, engine_option(help="JSON of further vLLM engine arguments.")]
TensorParallelSize = Annotated[
    int, engine_option(help="Ranks of the verifier, as vLLM's --tensor-parallel-size.")
]
MaxTokens = Annotated[
    int | None, responses_option(help="Longest response. Default: 1024, or what --max-len leaves.")
]
SpeculativeTokens = Annotated[
    int | None,
    drafter_option(
        "-k", "--num-speculative-tokens", help="Draft tokens a step. Default: all of a block."
    ),
]
Limit = Annotated[int | None, data_option(help="Use only the first usable conversations.")]


def _json_option(name: str, text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} {text!r} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name} {text!r} is not a JSON object")
    return value


def _int_list(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"{name} is {text!r}; give whole numbers separated by commas") from error


def _layer_types(text: str | None) -> tuple[str, ...] | None:
    from vllm_dflash.config import FULL, SLIDING

    if text is None:
        return None
    kinds = {"sliding": SLIDING, "full": FULL}
    try:
        return tuple(kinds[part.strip()] for part in text.split(","))
    except KeyError as error:
        raise ValueError(
            f"--layer-types is {text!r}; give sliding or full for each layer, separated by commas"
        ) from error


def _one_or_all(names: list[str]) -> str | tuple[str, ...]:
    """A single name as it is, so that a run of one file keeps its identity."""
    return names[0] if len(names) == 1 else tuple(names)


def _verifier(
    model: str, engine_args: str | None, **options: Any
) -> tuple[LoadedVerifier, dict[str, Any]]:
    """The verifier with its options, and the engine arguments that are left."""
    from vllm_dflash.verifier import Verifier

    return Verifier.from_options(model, _json_option("--engine-args", engine_args), **options)


def _quiet_engine() -> None:
    """Leaves the console to the command: of vLLM and torch only errors are shown, unless the user
    asks for more by their variables. Called before either is imported."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # Until an engine is made vLLM has not set its logging up.
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"].upper())
    # vLLM looks at every name of torch.distributed, those that torch is about to drop included.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.triton_utils")


def _facts() -> Table:
    """A table of names and values, whole also where the terminal is narrow."""
    table = Table(show_header=False)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    return table


@app.command()
def train(
    verifier: Verifier,
    data: Data,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the drafter.")],
    eval_data: Annotated[
        list[str] | None, data_option(help="Held-out conversations; default: a part of the data.")
    ] = None,
    layers: Annotated[int | None, drafter_option(help="Draft layers. Default: 5.")] = None,
    block_size: Annotated[
        int | None, drafter_option(help="Draft block, anchor included. Default: 16.")
    ] = None,
    features: Annotated[
        int | None, drafter_option(help="How many verifier layers to read. Default: 5.")
    ] = None,
    target_layer_ids: Annotated[
        str | None, drafter_option(help="Which ones, 0-based, comma separated.")
    ] = None,
    draft_vocab: Annotated[
        int | None, drafter_option(help="Draft only the N tokens the verifier uses most.")
    ] = None,
    mask_token_id: Annotated[int | None, drafter_option(help="Default: a reserved token.")] = None,
    intermediate_size: Annotated[
        int | None, drafter_option(help="Default: the verifier's.")
    ] = None,
    hidden_size: Annotated[
        int | None, drafter_option(help="Default: the verifier's, whose embedding is then shared.")
    ] = None,
    heads: Annotated[int | None, drafter_option(help="Default: the verifier's.")] = None,
    kv_heads: Annotated[int | None, drafter_option(help="Default: the verifier's.")] = None,
    head_dim: Annotated[int | None, drafter_option(help="Default: the verifier's.")] = None,
    sliding_window: Annotated[
        int | None,
        drafter_option(help="In tokens, of the layers that --layer-types calls sliding."),
    ] = None,
    layer_types: Annotated[
        str | None,
        drafter_option(help="sliding or full for each layer, comma separated. Default: all full."),
    ] = None,
    causal: Annotated[
        bool | None,
        drafter_option(help="Block tokens see only earlier ones. Default: in sliding layers."),
    ] = None,
    sample_from_anchor: Annotated[
        bool,
        drafter_option("--sample-from-anchor", help="A block of B drafts B tokens, not B - 1."),
    ] = False,
    head: Annotated[
        str | None,
        drafter_option(help="dflash2: make blocks coherent by DFlash 2's head. Default: none."),
    ] = None,
    codebooks: Annotated[
        str,
        training_option(help="Of a head: factored (from the verifier's tables) or free."),
    ] = "factored",
    init_from: Annotated[
        str | None, drafter_option("--from", help="Fine-tune this drafter.")
    ] = None,
    on_policy: Annotated[
        bool, data_option("--on-policy", help="Trust the responses in the data.")
    ] = False,
    epochs: Annotated[float, training_option(help="Passes over the data.")] = 6.0,
    max_steps: Annotated[
        int | None, training_option(help="Steps in all, whatever --epochs says.")
    ] = None,
    loss: Annotated[str, training_option(help="dpace, ce or kl.")] = "dpace",
    gamma: Annotated[float | None, training_option(help="Decay of ce and kl.")] = None,
    alpha: Annotated[float, training_option(help="Smoothing of dpace.")] = 0.5,
    optimizer: Annotated[str, training_option(help="adamw or muon.")] = "adamw",
    lr: Annotated[float, training_option(help="Peak learning rate.")] = 6e-4,
    weight_decay: Annotated[
        float, training_option(help="Decay of the matrices, times the rate.")
    ] = 0.0,
    warmup: Annotated[float, training_option(help="Share of the steps.")] = 0.04,
    min_lr: Annotated[float, training_option(help="End of the cosine, share of --lr.")] = 0.0,
    clip: Annotated[float, training_option(help="Largest norm of the gradient.")] = 1.0,
    ema: Annotated[float, training_option(help="Decay of averaged weights; 0 for none.")] = 0.0,
    anchors: Annotated[int, training_option(help="Random anchors of a sequence.")] = 512,
    sequences: Annotated[int, training_option(help="Sequences of a step.")] = 1,
    autocast: Annotated[
        str, training_option(help="bfloat16 (if the device has instructions for it) or float32.")
    ] = "bfloat16",
    seed: Annotated[int, training_option(help="Of initial weights, order and anchors.")] = 0,
    max_bad: Annotated[
        float, training_option(help="Share of sequences that may be skipped.")
    ] = 0.1,
    holdout: Annotated[float, data_option(help="Share kept back without --eval-data.")] = 0.05,
    temperature: Annotated[float, responses_option(help="Of regenerated responses.")] = 0.0,
    top_p: Annotated[float, responses_option(help="Of regenerated responses.")] = 1.0,
    top_k: Annotated[int, responses_option(help="Of regenerated responses; 0 for all tokens.")] = 0,
    max_tokens: MaxTokens = None,
    max_len: MaxLen = 3072,
    max_num_seqs: Annotated[int, responses_option(help="Responses generated at once.")] = 256,
    dtype: Dtype = "auto",
    tensor_parallel_size: TensorParallelSize = 1,
    chat_template: ChatTemplate = None,
    chat_template_kwargs: TemplateKwargs = None,
    reasoning_parser: ReasoningParser = None,
    trust_remote_code: TrustRemoteCode = False,
    revision: Revision = None,
    tokenizer: Tokenizer = None,
    engine_args: EngineArgs = None,
    limit: Limit = None,
    max_rejected: MaxRejected = 0.5,
    feature_gib: Annotated[
        float | None,
        training_option(
            help="Host memory for features of each worker; half of what is available, shared by the workers."
        ),
    ] = None,
    cache_features: Annotated[
        Path | None, training_option(help="Keep features on disk for later epochs and runs.")
    ] = None,
    features_from: Annotated[
        str,
        training_option(help="extraction, or generation: recorded while responses are generated."),
    ] = "extraction",
    eval_every: Annotated[
        int | None,
        training_option(help="Steps between evaluations. Default: by time, 5 % of it at most."),
    ] = None,
    save_minutes: Annotated[
        float,
        training_option(
            help="Minutes between saved states; up to 12 times as many if saving takes over 3 % of the time."
        ),
    ] = 5.0,
    checkpoint_format: Annotated[str, drafter_option(help="zlab or speculators.")] = "zlab",
    tensorboard: Annotated[
        bool, training_option("--tensorboard", help="Also log for TensorBoard in the run folder.")
    ] = False,
    restart: Annotated[
        bool, training_option("--restart", help="Discard an earlier run of this output.")
    ] = False,
) -> None:
    """Train a drafter for VERIFIER; the same command resumes a stopped run."""
    _quiet_engine()
    from vllm_dflash.environment import set_gpu_defaults

    set_gpu_defaults()
    from vllm_dflash.training.config import (
        DrafterShape,
        EngineOptions,
        Hyperparameters,
        SamplingOptions,
        response_limit,
    )
    from vllm_dflash.training.loop import TrainConfig
    from vllm_dflash.training.loop import train as run
    from vllm_dflash.training.reporting import Reporter

    if checkpoint_format not in ("zlab", "speculators"):
        raise ValueError(
            f"--checkpoint-format is {checkpoint_format!r}; allowed are zlab and speculators"
        )
    source, extra = _verifier(
        verifier,
        engine_args,
        chat_template=chat_template,
        reasoning_parser=reasoning_parser,
        trust_remote_code=trust_remote_code,
        revision=revision,
        tokenizer=tokenizer,
    )
    config = TrainConfig(
        verifier=source,
        data=_one_or_all(data),
        output=output,
        eval_data=_one_or_all(eval_data) if eval_data else None,
        max_rejected=max_rejected,
        holdout=holdout,
        epochs=epochs,
        max_steps=max_steps,
        on_policy=on_policy,
        init_from=init_from,
        chat_template_kwargs=_json_option("--chat-template-kwargs", chat_template_kwargs) or None,
        limit=limit,
        fmt=checkpoint_format,  # type: ignore[arg-type]
        feature_gib=feature_gib,
        cache_features=cache_features,
        features_from=features_from,
        eval_every=eval_every,
        save_minutes=save_minutes,
        tensorboard=tensorboard,
        restart=restart,
        shape=DrafterShape(
            layers=layers,
            block_size=block_size,
            features=features,
            target_layer_ids=_int_list("--target-layer-ids", target_layer_ids)
            if target_layer_ids is not None
            else None,
            draft_vocab=draft_vocab,
            mask_token_id=mask_token_id,
            intermediate_size=intermediate_size,
            hidden_size=hidden_size,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            layer_types=_layer_types(layer_types),
            sliding_window=sliding_window,
            causal=causal,
            sample_from_anchor=sample_from_anchor,
            head=head,
        ),
        hparams=Hyperparameters(
            lr=lr,
            weight_decay=weight_decay,
            warmup=warmup,
            min_lr=min_lr,
            clip=clip,
            optimizer=optimizer,  # type: ignore[arg-type]
            anchors=anchors,
            sequences=sequences,
            loss=loss,  # type: ignore[arg-type]
            gamma=gamma,
            alpha=alpha,
            codebooks=codebooks,
            ema=ema,
            autocast=autocast,
            seed=seed,
            max_bad=max_bad,
        ),
        engine=EngineOptions(
            dtype=dtype,
            max_len=max_len,
            max_num_seqs=max_num_seqs,
            tensor_parallel_size=tensor_parallel_size,
            extra=extra,
        ),
        sampling=SamplingOptions(
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            max_tokens=response_limit(max_tokens, max_len),
        ),
    )
    run(config, Reporter())


@app.command()
def plan(
    verifier: Verifier,
    gpu: Annotated[float, typer.Option(help="Memory of a GPU in GB, as it is sold.")] = 80,
    tensor_parallel_size: TensorParallelSize = 1,
    prompts: Annotated[int, typer.Option(help="Conversations to train on.")] = 10_000,
    prompt_tokens: Annotated[int, typer.Option(help="Of a conversation, on average.")] = 512,
    response_tokens: Annotated[int, typer.Option(help="Of a conversation, on average.")] = 512,
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 6.0,
    layers: Annotated[int | None, typer.Option(help="Draft layers. Default: 5.")] = None,
    block_size: Annotated[
        int | None, typer.Option(help="Draft block, anchor included. Default: 16.")
    ] = None,
    features: Annotated[
        int | None, typer.Option(help="How many verifier layers to read. Default: 5.")
    ] = None,
    draft_vocab: Annotated[int | None, typer.Option(help="Draft only so many tokens.")] = None,
    intermediate_size: Annotated[int | None, typer.Option(help="Default: the verifier's.")] = None,
    optimizer: Annotated[str, typer.Option(help="adamw or muon.")] = "adamw",
    ema: Annotated[float, typer.Option(help="Decay of averaged weights; 0 for none.")] = 0.0,
    loss: Annotated[str, typer.Option(help="dpace, ce or kl.")] = "dpace",
    anchors: Annotated[int, typer.Option(help="Random anchors of a sequence.")] = 512,
    sequences: Annotated[int, typer.Option(help="Sequences of a step.")] = 1,
    max_len: MaxLen = 3072,
    max_num_seqs: Annotated[int, typer.Option(help="Responses generated at once.")] = 256,
    dtype: Dtype = "auto",
    tflops: Annotated[float, typer.Option(help="Of a GPU, dense, in bfloat16.")] = 800,
    bandwidth: Annotated[float, typer.Option(help="Of a GPU's memory, in TB/s.")] = 3.3,
    trust_remote_code: TrustRemoteCode = False,
    revision: Revision = None,
) -> None:
    """What training would need of a GPU that is not here: memory and minutes, by arithmetic.

    Exits with 1 where it does not fit. Only VERIFIER's config.json is read, and no GPU is used.
    """
    from vllm_dflash.training.config import DrafterShape, EngineOptions, Hyperparameters
    from vllm_dflash.training.durations import Card, Traffic
    from vllm_dflash.training.planning import print_plan

    source, _ = _verifier(verifier, None, trust_remote_code=trust_remote_code, revision=revision)
    print_plan(
        source,
        DrafterShape(
            layers=layers,
            block_size=block_size,
            features=features,
            draft_vocab=draft_vocab,
            intermediate_size=intermediate_size,
        ),
        Hyperparameters(
            optimizer=optimizer,  # type: ignore[arg-type]
            ema=ema,
            loss=loss,  # type: ignore[arg-type]
            anchors=anchors,
            sequences=sequences,
        ),
        EngineOptions(
            dtype=dtype,
            max_len=max_len,
            max_num_seqs=max_num_seqs,
            tensor_parallel_size=tensor_parallel_size,
        ),
        gpu,
        Traffic(prompts, prompt_tokens, response_tokens, epochs),
        Card(tflops * 1e12, bandwidth * 1e12),
        Console(),
    )


@app.command("eval")
def eval_(
    verifier: Verifier,
    drafter: DrafterPath,
    data: Data,
    engine: Annotated[
        bool, typer.Option("--engine", help="Also serve the prompts and read vLLM's counters.")
    ] = False,
    num_speculative_tokens: SpeculativeTokens = None,
    on_policy: Annotated[
        bool, data_option("--on-policy", help="Trust the responses in the data.")
    ] = False,
    concurrency: Annotated[int, typer.Option(help="Requests in flight of --engine.")] = 4,
    responses: Annotated[
        Path | None, responses_option(help="Keep generated responses here and reuse them.")
    ] = None,
    max_tokens: MaxTokens = None,
    max_len: MaxLen = 3072,
    dtype: Dtype = "auto",
    tensor_parallel_size: TensorParallelSize = 1,
    chat_template: ChatTemplate = None,
    chat_template_kwargs: TemplateKwargs = None,
    reasoning_parser: ReasoningParser = None,
    trust_remote_code: TrustRemoteCode = False,
    revision: Revision = None,
    tokenizer: Tokenizer = None,
    engine_args: EngineArgs = None,
    limit: Limit = None,
    max_rejected: MaxRejected = 0.5,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="JSON result.")] = None,
    html: Annotated[
        Path | None, typer.Option(help="A page of responses that shows where each draft ended.")
    ] = None,
) -> None:
    """Acceptance of DRAFTER on held-out conversations, teacher-forced and (--engine) served."""
    _quiet_engine()
    from vllm_dflash.files import atomic_write, claim_file, is_json_with
    from vllm_dflash.training.config import EngineOptions, response_limit
    from vllm_dflash.training.drafts_page import is_page
    from vllm_dflash.training.evaluate import EvalConfig, evaluate
    from vllm_dflash.training.reporting import Reporter
    from vllm_dflash.training.rows import holds_rejects

    rejected = None
    inputs = {"the verifier": verifier, "the drafter": drafter, "the data": data}
    if output is not None:
        claim_file(output, "-o", is_json_with("verifier", "drafter", "offline"), inputs=inputs)
        rejected = output.with_name(f"{output.stem}.rejected.jsonl")
        claim_file(rejected, "-o", holds_rejects, inputs=inputs)
        if responses is not None and responses.resolve() == output.resolve():
            raise ValueError(f"-o {output} is also --responses; give two files")
    if html is not None:
        claim_file(html, "--html", is_page, inputs=inputs)
        if html.resolve() in {p.resolve() for p in (output, responses) if p is not None}:
            raise ValueError(f"--html {html} is also -o or --responses; give two files")
    source, extra = _verifier(
        verifier,
        engine_args,
        chat_template=chat_template,
        reasoning_parser=reasoning_parser,
        trust_remote_code=trust_remote_code,
        revision=revision,
        tokenizer=tokenizer,
    )
    config = EvalConfig(
        verifier=source,
        drafter=drafter,
        data=_one_or_all(data),
        rejected=rejected,
        page=html,
        max_rejected=max_rejected,
        num_speculative_tokens=num_speculative_tokens,
        on_policy=on_policy,
        through_engine=engine,
        concurrency=concurrency,
        chat_template_kwargs=_json_option("--chat-template-kwargs", chat_template_kwargs) or None,
        limit=limit,
        responses=responses,
        engine=EngineOptions(
            dtype=dtype,
            max_len=max_len,
            tensor_parallel_size=tensor_parallel_size,
            extra=extra,
        ),
        max_tokens=response_limit(max_tokens, max_len),
    )
    result = evaluate(config, Reporter())
    if output is not None:
        atomic_write(output, json.dumps(result, indent=2) + "\n")
    table = Table("", "tau", "drafts", "accepted", "acceptance by position")
    rows = [("offline", result["offline"])]
    rows += [(f"  {name}", r) for name, r in result["offline"]["sources"].items()]
    if "engine" in result:
        rows.append(("engine", result["engine"]))
    for name, r in rows:
        rates = " ".join(f"{100 * x:.0f}%" for x in r["position_rates"])
        table.add_row(name, f"{r['tau']:.3f}", str(r["num_drafts"]), str(r["num_accepted"]), rates)
    Console().print(table)


@app.command()
def bench(
    verifier: Verifier,
    drafter: DrafterPath,
    data: Data,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the report.")] = Path(
        "bench"
    ),
    modes: Annotated[str, typer.Option(help="Of none, ngram, stock, ours, adaptive.")] = (
        "none,ngram,stock,ours"
    ),
    concurrency: Annotated[str, typer.Option(help="Requests in flight, comma separated.")] = "1,4",
    num_prompts: Annotated[int, typer.Option(help="Prompts of a run.")] = 16,
    repeats: Annotated[int, typer.Option(help="Measured runs of each mode.")] = 3,
    max_tokens: Annotated[int, typer.Option(help="Longest response.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on to --max-tokens; flatters drafters.")
    ] = False,
    num_speculative_tokens: SpeculativeTokens = None,
    dtype: Dtype = "auto",
    max_model_len: Annotated[
        int | None,
        engine_option(help="As vLLM's; leave room for a draft. Default: as prompts need."),
    ] = None,
    sharing: Annotated[
        str,
        typer.Option(
            help="Engines on one device: together, sleep or restart between turns, or auto: what fits."
        ),
    ] = "auto",
    enforce_eager: Annotated[
        bool, engine_option("--enforce-eager", help="No compilation: quick start, slow serving.")
    ] = False,
    prefix_caching: Annotated[
        bool, engine_option("--prefix-caching", help="Let repeats reuse cached prompts.")
    ] = False,
    chat_template: ChatTemplate = None,
    chat_template_kwargs: TemplateKwargs = None,
    trust_remote_code: TrustRemoteCode = False,
    revision: Revision = None,
    tokenizer: Tokenizer = None,
    engine_args: EngineArgs = None,
    max_rejected: MaxRejected = 0.5,
) -> None:
    """Output speed with and without DRAFTER, alternating in one run: table, JSON, PNG."""
    from vllm_dflash.bench.prompts import load_prompts
    from vllm_dflash.bench.report import print_report, write_json, write_png
    from vllm_dflash.bench.runner import BenchConfig, check_prompts, failed_modes, run_bench
    from vllm_dflash.files import claim_file, claim_folder, mark_folder, writing
    from vllm_dflash.training.engine import check_engine_args
    from vllm_dflash.training.rows import holds_rejects

    source, extra = _verifier(
        verifier,
        engine_args,
        chat_template=chat_template,
        trust_remote_code=trust_remote_code,
        revision=revision,
        tokenizer=tokenizer,
    )
    config = BenchConfig(
        verifier=verifier,
        drafter=drafter,
        num_speculative_tokens=num_speculative_tokens,
        modes=tuple(mode.strip() for mode in modes.split(",")),
        concurrencies=_int_list("--concurrency", concurrency),
        num_prompts=num_prompts,
        repeats=repeats,
        max_tokens=max_tokens,
        temperature=temperature,
        ignore_eos=ignore_eos,
        dtype=dtype,
        max_model_len=max_model_len,
        sharing=sharing,
        enforce_eager=enforce_eager,
        prefix_caching=prefix_caching,
        out_dir=output,
        engine_args=source.engine_args() | extra,
    )
    kwargs = _json_option("--chat-template-kwargs", chat_template_kwargs)
    inputs = {"the verifier": verifier, "the drafter": drafter, "the data": data}
    claim_folder(output, "bench", "-o", inputs=inputs, names=_BENCH_FILES)
    rejected = output.with_name(f"{output.name}-rejected.jsonl")
    claim_file(rejected, "-o", holds_rejects, inputs=inputs)
    console = Console(stderr=True)
    prompts = load_prompts(
        source,
        _one_or_all(data),
        kwargs,
        num_prompts,
        max_rejected=max_rejected,
        rejected_path=rejected,
        say=lambda text: console.print(text, highlight=False, soft_wrap=True),
    )
    used = check_prompts(config, prompts)
    _check_bench_drafter(config, source)
    check_engine_args(extra, asynchronous=True)
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
        mark_folder(output, "bench")
    report = run_bench(
        config,
        used,
        lambda text: console.print(text, highlight=False, soft_wrap=True),
        verifier_config=source.load_config(),
    )
    write_json(report, output / "report.json")
    print_report(report)
    failed = failed_modes(report)
    if len(failed) < len(config.modes):
        write_png(report, output / "report.png")
    if failed:
        raise RuntimeError(f"these modes failed: {', '.join(failed)}; see {output / 'logs'}")


#: What a benchmark's folder holds besides our mark.
_BENCH_FILES = r"report\.(json|png)|logs/[\w-]+\.log"


def _check_bench_drafter(config: BenchConfig, source: LoadedVerifier) -> None:
    """ValueError when a mode drafts and the drafter cannot, with this verifier or at this length."""
    from vllm_dflash.bench.runner import DRAFTER_MODES
    from vllm_dflash.checkpoint import check_weights, quantization, read_config
    from vllm_dflash.config import DrafterConfig, VerifierInfo
    from vllm_dflash.config_formats import UnsupportedDrafter
    from vllm_dflash.training.evaluate import draft_tokens

    if not DRAFTER_MODES & set(config.modes) or config.drafter is None:
        return
    raw = read_config(config.drafter)
    try:
        drafter = DrafterConfig.from_dict(raw)
    except UnsupportedDrafter:
        if config.num_speculative_tokens is None:
            raise
        return  # vLLM serves it by itself
    drafter.check_verifier(VerifierInfo.from_hf_config(source.load_config(), config.verifier))
    if quantization(config.drafter, raw) is None:
        check_weights(config.drafter, drafter)
    draft_tokens(config.num_speculative_tokens, drafter)


@app.command()
def inspect(
    drafter: DrafterPath,
    verifier: Annotated[
        str | None, typer.Argument(help="Also check that it fits this verifier.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    revision: Revision = None,
) -> None:
    """What a checkpoint is, and whether it fits a verifier."""
    from vllm_dflash.checkpoint import MASK_EMBEDDING, load_weights, quantization, read_config
    from vllm_dflash.config import DrafterConfig, VerifierInfo
    from vllm_dflash.config_formats import is_speculators, speculators_remarks

    raw = read_config(drafter)
    config = DrafterConfig.from_dict(raw)
    fmt = "speculators" if is_speculators(raw) else "z-lab"
    remarks = [*config.remarks, *(speculators_remarks(config) if is_speculators(raw) else [])]
    table = _facts()
    rows: dict[str, Any] = {
        "format": fmt,
        "verifier it names": config.verifier or "none",
        "layers": f"{config.num_hidden_layers} x {config.hidden_size}, MLP {config.intermediate_size}",
        "heads": f"{config.num_attention_heads} query, {config.num_key_value_heads} KV, "
        f"{config.head_dim} each",
        "block size": "not stated: the server's num_speculative_tokens decides"
        if config.draft_block_size is None
        else f"{config.draft_block_size} ({config.num_speculative_tokens} speculative tokens)",
        "verifier layers read": f"{list(config.target_layer_ids)} (vLLM aux ids "
        f"{list(config.aux_hidden_state_layer_ids)})",
        "mask token": config.mask_token_id,
        "vocabulary": f"{config.vocab_size}, drafts from {config.logits_vocab_size}",
        "head": "none"
        if config.head is None
        else "DFlash 2: " + ", ".join(f"{k} {v}" for k, v in vars(config.head).items()),
        "attention": _attention(config),
        "rotary embedding": ", ".join(f"{k} {v}" for k, v in config.rope_parameters.items())
        + f"; {config.max_position_embeddings} positions",
    }
    quantised = quantization(drafter, raw)
    if quantised is not None:
        rows["weights"] = f"quantised ({quantised}): vLLM checks them"
    elif Path(drafter).is_dir():
        weights = load_weights(drafter, config)
        dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in weights.values()})
        rows["weights"] = (
            f"{sum(t.numel() for t in weights.values()) / 1e6:.1f}M values in {len(weights)} tensors "
            f"({', '.join(dtypes)}), complete and finite"
        )
        if MASK_EMBEDDING in weights:
            rows["mask token's embedding"] = "its own (mask_embedding.pt)"
    if verifier is not None:
        loaded, _ = _verifier(
            verifier, None, trust_remote_code=trust_remote_code, revision=revision
        )
        info = VerifierInfo.from_hf_config(loaded.load_config(), verifier)
        config.check_verifier(info)
        remarks += config.verifier_remarks(info)
        rows["fits"] = verifier
    for i, text in enumerate(dict.fromkeys(remarks), start=1):
        rows[f"note {i}"] = text
    for name, value in rows.items():
        table.add_row(name, str(value))
    Console().print(table)
    config.check_windows()


def _attention(config: DrafterConfig) -> str:
    """Type, window and causality of the draft layers, neighbours of a kind together."""
    from itertools import groupby

    from vllm_dflash.config import FULL, SLIDING

    kinds = []
    for i in range(config.num_hidden_layers):
        sliding = (config.layer_types or (FULL,) * config.num_hidden_layers)[i] == SLIDING
        name = (
            f"sliding over {config.sliding_window or 'no known number of'} tokens"
            if sliding
            else "full"
        )
        kinds.append(f"{name}, {'causal' if config.layer_causal(i) else 'bidirectional'}")
    return "; ".join(f"{len(list(same))} x {kind}" for kind, same in groupby(kinds))


@app.command()
def convert(
    drafter: DrafterPath,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the new one.")],
    to: Annotated[str, typer.Option("--to", help="zlab or speculators.")],
    verifier: Annotated[
        str | None,
        typer.Option(help="The verifier to name; the speculators format needs one."),
    ] = None,
) -> None:
    """Rewrite a checkpoint in the other public format."""
    from vllm_dflash.checkpoint import convert as run

    _, remarks = run(drafter, output, to, verifier)  # type: ignore[arg-type]
    for remark in remarks:
        Console(stderr=True).print(f"note: {remark}", highlight=False)
    Console().print(f"{output} written in the {to} format", highlight=False)


@app.command()
def env() -> None:
    """Versions, machine, the ops in use, and the state of every seam in the installed vLLM."""
    from vllm_dflash.environment import describe_machine, describe_ops, versions
    from vllm_dflash.options import plugin_disabled
    from vllm_dflash.serving.seams import probe

    table = _facts()
    for name, value in (versions() | describe_machine() | describe_ops()).items():
        table.add_row(name, str(value))
    plugins = os.environ.get("VLLM_PLUGINS")
    table.add_row("VLLM_PLUGINS", plugins if plugins is not None else "unset (all plugins)")
    table.add_row("plugin", "switched off" if plugin_disabled() else "on")
    for name, state in probe().items():
        table.add_row(name, state)
    Console().print(table)


def main() -> None:
    """Runs the command line; what a user can put right ends in one line and exit code 1.

    Wrong usage exits with 2, a signal with 128 and its number.
    """
    from vllm_dflash.processes import Stopped, close_stdin, stop_by_signal

    close_stdin()
    try:
        with stop_by_signal():
            code = app(standalone_mode=False)
    except Stopped as stop:
        _fail(str(stop), 128 + stop.signum)
    except Exception as error:
        if os.environ.get("VLLM_DFLASH_TRACEBACK") or isinstance(error, AssertionError):
            raise
        _fail(*_last_words(error))
    sys.exit(code if isinstance(code, int) else 0)


def _fail(line: str, code: int) -> NoReturn:
    if line:
        print(line, file=sys.stderr)
    sys.exit(code)


def _last_words(error: Exception) -> tuple[str, int]:
    """The line and the exit code for an error."""
    from safetensors import SafetensorError

    from vllm_dflash.processes import Interrupted

    if isinstance(error, Interrupted):
        return f"{error}; the same command resumes", 128 + error.signum
    # Typer brings its own copy of click or uses the installed one.
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()  # type: ignore[attr-defined]
        return "", 2
    if hasattr(error, "format_message"):
        text, code = error.format_message(), 2
    elif isinstance(error, (ValueError, OSError, RuntimeError, SafetensorError)):
        text, code = str(error) or type(error).__name__, 1
    else:
        text, code = f"unexpected {type(error).__name__}: {error}", 1
        text += " (a fault of vllm-dflash; VLLM_DFLASH_TRACEBACK=1 shows where)"
    return f"error: {' '.join(text.split())}", code
