"""``vllm-dflash``: train, plan, eval, bench, learn, watch, inspect, convert, env."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from vllm_dflash.bench.config import BenchConfig
from vllm_dflash.bounds import json_object
from vllm_dflash.renamed import OldFlags
from vllm_dflash.settings import build, parsed, takes
from vllm_dflash.training.config import (
    DrafterShape,
    EngineOptions,
    EvalConfig,
    Hyperparameters,
    SamplingOptions,
    TrainConfig,
    response_limit,
)
from vllm_dflash.verifier import Verifier

if TYPE_CHECKING:
    from vllm_dflash.config import DrafterConfig

app = typer.Typer(
    name="vllm-dflash",
    help="Train, evaluate and serve DFlash drafters inside stock vLLM.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


VerifierName = Annotated[
    str, typer.Argument(help="Model folder or hub name, as `vllm serve` takes it.")
]
DrafterPath = Annotated[str, typer.Argument(help="Drafter checkpoint, a folder or hub name.")]
EngineArgs = Annotated[
    str | None,
    typer.Option(help="JSON of further vLLM engine arguments.", rich_help_panel="Engine"),
]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        help="Longest response. Default: 1024, or what --max-len leaves.",
        rich_help_panel="Responses",
    ),
]
#: What `plan` and `bench` take of a shape (a token makes no difference there) and of a verifier.
_PLANNED_SHAPE = [f.name for f in fields(DrafterShape) if f.name != "mask_token_id"]
_AS_SERVED = ("chat_template", "trust_remote_code", "revision", "tokenizer")


def _verifier(
    model: str, options: dict[str, Any], engine_args: str | None = None
) -> tuple[Verifier, dict[str, Any]]:
    """The verifier with its options, and the engine arguments that are left."""
    extra = {} if engine_args is None else json_object("--engine-args", engine_args)
    return Verifier.from_options(model, extra, **parsed(Verifier, options))


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


@app.command(cls=OldFlags)
@takes(TrainConfig, DrafterShape, Hyperparameters, SamplingOptions, EngineOptions, Verifier)
def train(
    verifier: VerifierName,
    max_tokens: MaxTokens = None,
    engine_args: EngineArgs = None,
    **options: Any,
) -> None:
    """Train a drafter for VERIFIER; the same command resumes a stopped run."""
    _quiet_engine()
    from vllm_dflash.environment import set_cpu_defaults, set_gpu_defaults

    set_cpu_defaults()
    set_gpu_defaults()
    source, extra = _verifier(verifier, options, engine_args)
    config = build(
        TrainConfig,
        options,
        verifier=source,
        shape=build(DrafterShape, options),
        hparams=build(Hyperparameters, options),
        engine=build(EngineOptions, options, extra=extra),
        sampling=build(
            SamplingOptions, options, max_tokens=response_limit(max_tokens, options["max_len"])
        ),
    )
    from vllm_dflash.training.reporting import Reporter
    from vllm_dflash.training.trainer import train as run

    run(config, Reporter())


@app.command(cls=OldFlags)
@takes(
    (EngineOptions, "tensor_parallel_size", "max_len", "max_num_seqs", "dtype"),
    (DrafterShape, *_PLANNED_SHAPE),
    (Hyperparameters, "optimizer", "ema_decay", "loss", "num_anchors", "batch_size"),
    (TrainConfig, "epochs"),
    (Verifier, "trust_remote_code", "revision"),
)
def plan(
    verifier: VerifierName,
    gpu: Annotated[float, typer.Option(help="Memory of a GPU in GB, as it is sold.")] = 80,
    prompts: Annotated[int, typer.Option(help="Conversations to train on.")] = 10_000,
    prompt_tokens: Annotated[int, typer.Option(help="Of a conversation, on average.")] = 512,
    response_tokens: Annotated[int, typer.Option(help="Of a conversation, on average.")] = 512,
    tflops: Annotated[float, typer.Option(help="Of a GPU, dense, in bfloat16.")] = 800,
    bandwidth: Annotated[float, typer.Option(help="Of a GPU's memory, in TB/s.")] = 3.3,
    **options: Any,
) -> None:
    """What training would need of a GPU that is not here: memory and minutes, by arithmetic.

    Exits with 1 where it does not fit. Only VERIFIER's config.json is read, and no GPU is used.
    """
    from vllm_dflash.training.durations import Card, Traffic
    from vllm_dflash.training.planning import print_plan

    source, _ = _verifier(verifier, options)
    print_plan(
        source,
        build(DrafterShape, options),
        build(Hyperparameters, options),
        build(EngineOptions, options),
        gpu,
        Traffic(prompts, prompt_tokens, response_tokens, options["epochs"]),
        Card(tflops * 1e12, bandwidth * 1e12),
        Console(),
    )


@app.command("eval")
@takes(EvalConfig, (EngineOptions, "max_len", "dtype", "tensor_parallel_size"), Verifier)
def eval_(
    verifier: VerifierName,
    drafter: DrafterPath,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="JSON result.")] = None,
    max_tokens: MaxTokens = None,
    engine_args: EngineArgs = None,
    **options: Any,
) -> None:
    """Acceptance of DRAFTER on held-out conversations, teacher-forced and (--engine) served."""
    _quiet_engine()
    from vllm_dflash.environment import set_cpu_defaults

    set_cpu_defaults()
    from vllm_dflash.files import atomic_write, claim_file, is_json_with
    from vllm_dflash.training.drafts_page import is_page
    from vllm_dflash.training.evaluate import evaluate
    from vllm_dflash.training.reporting import Reporter
    from vllm_dflash.training.rows import holds_rejects

    rejected, responses, html = None, options["responses"], options["page"]
    inputs = {"the verifier": verifier, "the drafter": drafter, "the data": options["data"]}
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
    source, extra = _verifier(verifier, options, engine_args)
    config = build(
        EvalConfig,
        options,
        verifier=source,
        drafter=drafter,
        rejected=rejected,
        engine=build(EngineOptions, options, extra=extra),
        max_tokens=response_limit(max_tokens, options["max_len"]),
    )
    result = evaluate(config, Reporter())
    if output is not None:
        atomic_write(output, json.dumps(result, indent=2) + "\n")
    table = Table(
        "",
        "tau",
        "drafts",
        "tokens accepted",
        "drafts whose first 1, 2, ... tokens were accepted",
        caption=f"tau: mean number of tokens that a step of the verifier yields, 1 without a drafter and at "
        f"most {result['num_speculative_tokens'] + 1} here, over {result['conversations']} conversations. "
        "Offline: drafts replayed over the verifier's responses; engine: counted by vLLM while serving",
        caption_justify="left",
    )
    rows = [("offline", result["offline"])]
    sources = result["offline"]["sources"]
    if len(sources) > 1:
        rows += [(f"  of {name}", r) for name, r in sources.items()]
    if "engine" in result:
        rows.append(("engine", result["engine"]))
    for name, r in rows:
        rates = " ".join(f"{100 * x:.0f}%" for x in r["position_rates"])
        table.add_row(name, f"{r['tau']:.3f}", str(r["num_drafts"]), str(r["num_accepted"]), rates)
    Console().print(table)


@app.command()
@takes(
    BenchConfig,
    (Verifier, *_AS_SERVED),
    (TrainConfig, "data", "chat_template_kwargs", "max_rejected"),
)
def bench(
    verifier: VerifierName,
    drafter: DrafterPath,
    engine_args: EngineArgs = None,
    **options: Any,
) -> None:
    """Output speed with and without DRAFTER, alternating in one run: table, JSON, PNG."""
    from vllm_dflash.environment import set_cpu_defaults

    set_cpu_defaults()
    from vllm_dflash.bench.prompts import load_prompts
    from vllm_dflash.bench.report import print_report, write_json, write_png
    from vllm_dflash.bench.runner import check_prompts, failed_modes, run_bench
    from vllm_dflash.cpu_dtype import float32_sentence, verifier_dtype
    from vllm_dflash.files import claim_file, claim_folder, mark_folder, writing
    from vllm_dflash.training.engine import check_engine_args
    from vllm_dflash.training.rows import holds_rejects

    source, extra = _verifier(verifier, options, engine_args)
    config = build(
        BenchConfig,
        options,
        verifier=verifier,
        drafter=drafter,
        engine_args=source.engine_args() | extra,
    )
    rows = parsed(TrainConfig, options)
    output = config.out_dir
    inputs = {"the verifier": verifier, "the drafter": drafter, "the data": options["data"]}
    claim_folder(output, "bench", "-o", inputs=inputs, names=_BENCH_FILES)
    rejected = output.with_name(f"{output.name}-rejected.jsonl")
    claim_file(rejected, "-o", holds_rejects, inputs=inputs)
    console = Console(stderr=True)
    prompts = load_prompts(
        source,
        rows["data"],
        rows["chat_template_kwargs"] or {},
        config.num_prompts,
        max_rejected=rows["max_rejected"],
        rejected_path=rejected,
        say=lambda text: console.print(text, highlight=False, soft_wrap=True),
    )
    used = check_prompts(config, prompts)
    _check_bench_drafter(config, source)
    check_engine_args(extra, asynchronous=True)
    hf_config, asked = source.load_config(), config.dtype
    config = replace(config, dtype=verifier_dtype(asked, source, hf_config, extra))
    if sentence := float32_sentence(asked, config.dtype):
        console.print(sentence, highlight=False, soft_wrap=True)
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
        mark_folder(output, "bench")
    report = run_bench(
        config,
        used,
        lambda text: console.print(text, highlight=False, soft_wrap=True),
        verifier_config=hf_config,
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


def _check_bench_drafter(config: BenchConfig, source: Verifier) -> None:
    """ValueError when a mode drafts and the drafter cannot, with this verifier or at this length."""
    from vllm_dflash.bench.config import DRAFTER_MODES
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
@takes((Verifier, "trust_remote_code", "revision"))
def inspect(
    drafter: DrafterPath,
    verifier: Annotated[
        str | None, typer.Argument(help="Also check that it fits this verifier.")
    ] = None,
    **options: Any,
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
        loaded, _ = _verifier(verifier, options)
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
def learn(
    action: Annotated[str, typer.Argument(help="status, pause, resume, promote or rollback.")],
    folder: Annotated[Path, typer.Argument(help="The server's dflash_learn.")],
    version: Annotated[int | None, typer.Argument(help="For promote; 0 is the given one.")] = None,
) -> None:
    """See or steer what a server learns."""
    from vllm_dflash.learning.control import read_status, rows, send

    if action != "status":
        taken = send(folder, action, version)
        later = "" if taken else "; the server has not taken it yet"
        Console().print(f"{action}{later}", highlight=False)
        return
    table = _facts()
    for name, value in rows(read_status(folder)).items():
        table.add_row(name, value)
    Console().print(table)


@app.command()
def watch(
    url: Annotated[str, typer.Argument(help="Of the server: http://localhost:8000.")],
    every: Annotated[float, typer.Option(help="Seconds between two rows.", min=0.1)] = 5.0,
    png: Annotated[Path | None, typer.Option(help="Draw tau and speed over time here.")] = None,
) -> None:
    """A learning server live: acceptance, speed, versions; until Ctrl-C."""
    from vllm_dflash.files import claim_file
    from vllm_dflash.learning.watch import HEADER, cells, is_plot, plot
    from vllm_dflash.learning.watch import watch as run

    if png is not None:
        claim_file(png, "--png", is_plot)
    seen = []
    widths = (8, 10, 7, 10, 9, 8, 10)
    for i, row in enumerate(run(url, every)):
        if i % 20 == 0:
            print("".join(f"{c:>{w}}" for c, w in zip(HEADER, widths, strict=True)), flush=True)
        print("".join(f"{c:>{w}}" for c, w in zip(cells(row), widths, strict=True)), flush=True)
        seen.append(row)
        if png is not None and len(seen) > 1:
            plot(seen, png)


@app.command()
def env() -> None:
    """Versions, machine, the ops in use, and the state of every seam in the installed vLLM."""
    from vllm_dflash.environment import describe_machine, versions
    from vllm_dflash.ops.load import describe_ops
    from vllm_dflash.options import plugin_disabled
    from vllm_dflash.serving.patching import probe
    from vllm_dflash.serving.upstream import describe_patches

    table = _facts()
    for name, value in (versions() | describe_machine() | describe_ops()).items():
        table.add_row(name, str(value))
    plugins = os.environ.get("VLLM_PLUGINS")
    table.add_row("VLLM_PLUGINS", plugins if plugins is not None else "unset (all plugins)")
    table.add_row("plugin", "switched off" if plugin_disabled() else "on")
    for name, state in (describe_patches() | probe()).items():
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
