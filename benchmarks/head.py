"""What DFlash 2's head is worth at equal training time: two trained drafters go on, with it and without.

    vllm-dflash train VERIFIER --data DATA --eval-data HELD -o RUN --cache-features RUN-features ...
    python benchmarks/head.py VERIFIER RUN RUN-features --data DATA --eval-data HELD --traffic NAME -o FILE

The finished run of ``train`` is where every arm starts, and its responses and features are what all learn
from, so that no engine is needed. Each arm takes as many steps as fit into ``--minutes`` of CPU time by the
cost of its own steps, which are measured in turns. Then all held-out conversations are walked offline.

A row is a seed: tau with the head and without, how often its selector is right where the logits alone are not
(``selector_lift``), and what share of a training step the head is. The other arms: tables for codebooks
(``free``), and the head with one half of it left as it starts.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from vllm_dflash.bench.report import write_json
from vllm_dflash.checkpoint import load_weights, save_drafter
from vllm_dflash.config import DrafterConfig
from vllm_dflash.environment import describe_machine, versions
from vllm_dflash.modeling.acceptance import Acceptance
from vllm_dflash.training.config import Hyperparameters
from vllm_dflash.training.conversations import load_conversations
from vllm_dflash.training.feature_store import FeatureStore
from vllm_dflash.training.learner import Learner, Sample, SharedHead
from vllm_dflash.training.plan import content_key, epoch_steps
from vllm_dflash.training.planning import with_head
from vllm_dflash.training.responses import regenerate
from vllm_dflash.verifier import Verifier

#: What of the head each arm learns; None has no head.
ARMS: dict[str, tuple[str, ...] | None] = {
    "without": None,
    "with": ("conv", "selector"),
    "free": ("conv", "selector"),
    "conv only": ("conv",),
    "selector only": ("selector",),
}
#: Rounds by which steps are timed, and those before, which are not counted.
_PROBES, _WARM = 16, 3


class ConvOnly(Learner):
    """Learns by the loss of a plain drafter."""

    def _with_selector(self, loss, *args, **kwargs):
        return loss


class Traffic:
    """A run's conversations with their features, and the drafter that it made."""

    def __init__(self, args: argparse.Namespace) -> None:
        verifier = Verifier(args.verifier)
        self.tokenizer = verifier.with_template(verifier.load_tokenizer())
        self.config = DrafterConfig.from_pretrained(args.run)
        self.start = load_weights(args.run, self.config)
        tables = load_file(Path(args.verifier) / "model.safetensors")
        self.embedding = tables["model.embed_tokens.weight"]
        self.lm_head = tables.get("lm_head.weight", self.embedding)
        (folder,) = (f.parent for f in args.features.glob("*/index.json"))
        self.features = FeatureStore(2**40, folder)
        log = args.run.with_name(f"{args.run.name}-run") / "responses.jsonl"
        self.max_len = args.max_len
        self.train = self._samples(args.data, log)
        self.held = self._samples(args.eval_data, log.with_name("responses-heldout.jsonl"))

    def _samples(self, data: str, log: Path) -> dict[str, Sample]:
        with log.open() as lines:
            fingerprint = json.loads(next(lines))["fingerprint"]
        conversations, _ = load_conversations(data)
        examples, _ = regenerate(
            conversations,
            self.tokenizer,
            lambda requests: iter(()),  # what was not generated is left out
            log,
            fingerprint=fingerprint,
            max_len=self.max_len,
        )
        out = {}
        for example in examples:
            key = content_key(example.token_ids)
            if key in self.features:
                rows, _ = self.features.get(key)
                out[example.id] = Sample(example.id, example.token_ids, example.loss_mask, rows)
        return out

    def learner(self, arm: str, hparams: Hyperparameters, total_steps: int) -> Learner:
        learned = ARMS[arm]
        config = self.config if learned is None else with_head(self.config)
        ids = self.start["d2t"] + torch.arange(len(self.start["d2t"]))
        head = SharedHead(self.embedding, self.lm_head, ids, self.start.get("lm_head.weight"))
        hparams = replace(hparams, codebooks="free" if arm == "free" else "factored")
        make = ConvOnly if arm == "conv only" else Learner
        learner = make(config, hparams, head, total_steps)
        learner.load_drafter(self.start)
        for name, parameter in learner.drafter.named_parameters():
            left = "selector" if arm == "conv only" else "_conv." if arm == "selector only" else " "
            if left in name:
                parameter.requires_grad_(False)
        return learner


def steps_of(samples: dict[str, Sample], seed: int, count: int) -> list[list[Sample]]:
    steps: list[tuple[str, ...]] = []
    epoch = 0
    while len(steps) < count:
        steps += epoch_steps(list(samples), 1, seed, epoch)
        epoch += 1
    return [[samples[key] for key in step] for step in steps[:count]]


def timed(learner: Learner, step: int, samples: list[Sample]) -> float:
    """CPU seconds of a step."""
    begun = time.process_time()
    learner.step(step, samples)
    return time.process_time() - begun


def step_seconds(learners: dict[str, Learner], samples: dict[str, Sample], seed: int):
    """CPU seconds of the arms' steps over the same sequences, in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in learners}
    for step, some in enumerate(steps_of(samples, seed, _WARM + _PROBES)):
        for name, learner in learners.items():
            seconds[name].append(timed(learner, step, some))
    return {name: median(times[_WARM:]) for name, times in seconds.items()}


def accepted(learner: Learner, held: dict[str, Sample], dtype: torch.dtype) -> dict[str, Any]:
    drafter, total = learner.serving_drafter(dtype), Acceptance()
    for sample in held.values():
        total.merge(learner.accept(drafter, sample, learner.num_draft_tokens, dtype))
    keys = ("tau", "num_drafts", "unary_accuracy", "selector_accuracy", "selector_lift")
    return {k: v for k, v in total.as_dict().items() if k in keys}


def run_arm(
    traffic: Traffic, arm: str, hparams: Hyperparameters, steps: int, export: Path | None
) -> dict[str, Any]:
    learner = traffic.learner(arm, hparams, steps)
    seconds = sum(
        timed(learner, step, some)
        for step, some in enumerate(steps_of(traffic.train, hparams.seed, steps))
    )
    found = accepted(learner, traffic.held, torch.bfloat16)
    if export is not None:
        tensors: dict[str, Tensor] = learner.head.checkpoint_tensors() | learner.weights()
        save_drafter(export, learner.config, tensors)
    return {"steps": steps, "cpu_seconds": seconds, **found}


def row_of(name: str, seed: int, arms: dict[str, Any], seconds: dict[str, float]) -> dict[str, Any]:
    """The figures of one traffic and seed."""
    return {
        "traffic": name,
        "seed": seed,
        "tau_without": arms["without"]["tau"],
        "tau_with": arms["with"]["tau"],
        "selector_lift": arms["with"]["selector_lift"],
        "training_share": 1 - seconds["without"] / seconds["with"],
        "step_seconds": seconds,
        "arms": arms,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("verifier")
    parser.add_argument("run", type=Path, help="Output of the run to go on from.")
    parser.add_argument("features", type=Path, help="What it was given as --cache-features.")
    parser.add_argument("--data", required=True, help="As that run's.")
    parser.add_argument("--eval-data", required=True, help="As that run's.")
    parser.add_argument("--max-len", type=int, default=1024, help="As that run's.")
    parser.add_argument("--traffic", required=True, help="Its name in the rows.")
    parser.add_argument(
        "--minutes", type=float, default=2.5, help="Of CPU time, each arm and seed."
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--num-anchors", type=int, default=32)
    parser.add_argument("--arms", nargs="+", default=["without", "with"], choices=ARMS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--export", type=Path, help="Folder for the drafters that come out.")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    traffic = Traffic(args)
    report: dict[str, Any] = {
        "verifier": Path(args.verifier).name,
        "minutes": args.minutes,
        "threads": args.threads,
        "conversations": len(traffic.train),
        "held_out": len(traffic.held),
        "machine": describe_machine(),
        "versions": versions(),
        "rows": [],
    }
    for seed in args.seeds:
        hparams = Hyperparameters(lr=args.lr, num_anchors=args.num_anchors, seed=seed)
        learners = {arm: traffic.learner(arm, hparams, _PROBES) for arm in args.arms}
        if not report["rows"]:
            found = accepted(learners[args.arms[0]], traffic.held, torch.bfloat16)
            report["tau_at_start"] = found["tau"]
        seconds = step_seconds(learners, traffic.train, seed)
        del learners
        arms = {}
        for arm in args.arms:
            steps = max(1, round(60 * args.minutes / seconds[arm]))
            export = args.export / f"{arm.replace(' ', '-')}-{seed}" if args.export else None
            arms[arm] = run_arm(traffic, arm, hparams, steps, export)
            print(args.traffic, seed, arm, arms[arm], flush=True)
        report["rows"].append(row_of(args.traffic, seed, arms, seconds))
        write_json(report, args.output)


if __name__ == "__main__":
    main()
