"""Our trainer beside that of speculators 0.9, on a CPU, one thread each: the same verifier, conversations,
features, drafter shape and judge.

    vllm-dflash train VERIFIER --data DATA --eval-data HELD -o RUN ...
    python benchmarks/trainers.py VERIFIER RUN --data DATA --eval-data HELD --traffic NAME \\
        --speculators-python ENV/bin/python --work FOLDER --minutes 1 5 15 -o FILE

The finished run of ``train`` gives the verifier's responses. Features are taken once, by transformers, in
the files that speculators reads; both trainers learn from those. ``trainers_speculators.py`` says how to
make its environment and what is patched there. Every budget is a run of its own with its whole schedule, of
as many steps as its core-minutes hold by the CPU time of its own steps. Extraction is on neither's clock, and
the tau of every drafter, as saved, is our offline walk over the held-out conversations.

Run again with the same work folder and file it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from vllm_dflash.bench.report import write_json
from vllm_dflash.checkpoint import load_weights, save_drafter
from vllm_dflash.config import DrafterConfig
from vllm_dflash.environment import describe_machine, set_cpu_defaults, versions
from vllm_dflash.modeling.acceptance import Acceptance
from vllm_dflash.modeling.losses import block_loss, dpace_weights
from vllm_dflash.training.config import Hyperparameters
from vllm_dflash.training.conversations import load_conversations
from vllm_dflash.training.learner import Learner, Sample, SharedHead
from vllm_dflash.training.plan import epoch_steps
from vllm_dflash.training.responses import regenerate
from vllm_dflash.training.vocab import choose_draft_vocab
from vllm_dflash.verifier import Verifier

THEIRS = ("default", "default, AdamW", "same")
#: Steps whose CPU time tells how many fit a budget, and those before, which are not counted.
_PROBES, _WARM = 30, 2


class Bench:
    """The work folder: conversations, their features, and what both trainers are told."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.work, self.verifier = args, args.work, args.verifier
        self.report: dict[str, Any] = {"features": {}, "batch": {}, "speed": [], "rows": []}
        self.config = DrafterConfig.from_pretrained(args.run)
        self.dtype = getattr(torch, args.dtype)
        self.examples = self._examples()
        self.report["features"] = self._features()
        with safe_open(Path(self.verifier) / "model.safetensors", framework="pt") as tables:
            self.embedding = tables.get_tensor("model.embed_tokens.weight")
            tied = "lm_head.weight" not in set(tables.keys())
            self.lm_head = self.embedding if tied else tables.get_tensor("lm_head.weight")
        self.draft_ids = torch.tensor(self.examples["draft_token_ids"])
        self.setting = {
            "verifier": self.verifier,
            "num_layers": self.config.num_hidden_layers,
            "block_size": self.config.draft_block_size,
            "aux_layer_ids": list(self.config.aux_hidden_state_layer_ids),
            "mask_token_id": self.config.mask_token_id,
            "vocab_size": self.config.vocab_size,
            "hidden_size": self.config.hidden_size,
            "draft_token_ids": self.examples["draft_token_ids"],
            "num_anchors": args.num_anchors,
            "row_tokens": args.max_len,
            "dtype": args.dtype,
        }
        (self.work / "setting.json").write_text(json.dumps(self.setting))

    def _examples(self) -> dict[str, Any]:
        file = self.work / "examples.json"
        if file.exists():
            return json.loads(file.read_text())
        args, verifier = self.args, Verifier(self.verifier)
        tokenizer = verifier.with_template(verifier.load_tokenizer())
        log = args.run.with_name(f"{args.run.name}-run") / "responses.jsonl"
        out: dict[str, Any] = {}
        for part, data, responses in (
            ("train", args.data, log),
            ("heldout", args.eval_data, log.with_name("responses-heldout.jsonl")),
        ):
            with responses.open() as lines:
                fingerprint = json.loads(next(lines))["fingerprint"]
            conversations, _ = load_conversations(data)
            examples, _ = regenerate(
                conversations, tokenizer, lambda requests: iter(()), responses,
                fingerprint=fingerprint, max_len=10**6,
            )  # fmt: skip
            out[part] = [
                {
                    "id": e.id,
                    "token_ids": list(e.token_ids),
                    "loss_mask": list(map(int, e.loss_mask)),
                }
                for e in examples
                if len(e.token_ids) <= args.max_len
            ]
        # More held-out conversations than the run had make tau sharper.
        keep = args.conversations
        out["heldout"] += out["train"][keep : keep + args.more_heldout]
        out["train"] = out["train"][:keep]
        responses = [
            [t for t, m in zip(e["token_ids"], e["loss_mask"], strict=True) if m]
            for e in out["train"]
        ]
        eos = AutoConfig.from_pretrained(self.verifier).eos_token_id
        out["draft_token_ids"], _ = choose_draft_vocab(
            responses,
            [e["token_ids"] for e in out["train"]],
            self.config.draft_vocab_size,
            self.config.vocab_size,
            {eos} if isinstance(eos, int) else set(eos),
        )
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(out))
        return out

    def _features(self) -> dict[str, Any]:
        """Features of all conversations as speculators keeps them: five layers and the last; once."""
        done, folder = self.work / "features.json", self.work / "data" / "hidden_states"
        if done.exists():
            return json.loads(done.read_text())
        folder.mkdir(parents=True, exist_ok=True)
        model = AutoModelForCausalLM.from_pretrained(self.verifier, dtype=self.dtype).eval()
        states: dict[int, Tensor] = {}
        for i, layer in enumerate(model.model.layers):
            layer.register_forward_hook(
                lambda module, given, out, i=i: states.__setitem__(
                    i + 1, out[0] if isinstance(out, tuple) else out
                )
            )
        wanted = [*self.config.aux_hidden_state_layer_ids, len(model.model.layers)]
        rows = self.examples["train"] + self.examples["heldout"]
        begun, size = time.process_time(), 0
        with torch.inference_mode():
            for i, row in enumerate(rows):
                ids = torch.tensor([row["token_ids"]])
                model.model(ids, use_cache=False)
                hidden = torch.stack([states[layer].squeeze(0) for layer in wanted], dim=1)
                file = folder / f"hs_{i}.safetensors"
                save_file({"hidden_states": hidden, "token_ids": ids[0]}, file)
                size += file.stat().st_size
        seconds = time.process_time() - begun
        train = {
            name: [row[key] for row in self.examples["train"]]
            for name, key in (("input_ids", "token_ids"), ("loss_mask", "loss_mask"))
        }
        train["seq_len"] = [len(ids) for ids in train["input_ids"]]
        (self.work / "data.json").write_text(json.dumps(train))
        script = (
            "import json, sys, datasets; d = datasets.Dataset.from_dict(json.load(open(sys.argv[1])));"
            "d.with_format('torch').save_to_disk(sys.argv[2])"
        )
        python = self.args.speculators_python
        subprocess.run(
            [python, "-c", script, self.work / "data.json", self.work / "data"], check=True
        )
        found = {
            "conversations": len(rows),
            "tokens": sum(len(row["token_ids"]) for row in rows),
            "cpu_seconds": seconds,
            "bytes_on_disk_theirs": size,
            "bytes_in_memory_ours": size * (len(wanted) - 1) // len(wanted),
        }
        done.write_text(json.dumps(found))
        return found

    def samples(self, part: str) -> list[Sample]:
        first = 0 if part == "train" else len(self.examples["train"])
        out = []
        for i, row in enumerate(self.examples[part]):
            file = self.work / "data" / "hidden_states" / f"hs_{first + i}.safetensors"
            states = load_file(file)["hidden_states"][:-1, :-1].flatten(1)
            mask = [bool(flag) for flag in row["loss_mask"]]
            out.append(Sample(row["id"], row["token_ids"], mask, states))
        return out

    def learner(self, steps: int, seed: int = 0, **hparams: Any) -> Learner:
        head = SharedHead(self.embedding, self.lm_head, self.draft_ids)
        given = {
            "lr": self.args.lr,
            "num_anchors": self.args.num_anchors,
            "autocast": self.args.dtype,
        }
        return Learner(self.config, Hyperparameters(seed=seed, **(given | hparams)), head, steps)

    def theirs(self, *words: str | int | Path) -> str:
        script = Path(__file__).with_name("trainers_speculators.py")
        command = [self.args.speculators_python, script, words[0], self.work, *words[1:]]
        ran = subprocess.run(
            [str(word) for word in command],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            env=self.args.environment,
        )
        return ran.stdout

    # -- what is compared ------------------------------------------------------------------------

    def compare_batch(self) -> dict[str, float]:
        """Loss and gradients of one batch in fp32, with the same weights and anchors."""
        learner = self.learner(1, autocast="float32")
        learner.head = SharedHead(self.embedding.float(), self.lm_head.float(), self.draft_ids)
        sample = self.samples("train")[0]
        anchors = learner.pick_anchors(0, sample)
        for again in range(2):
            weights = {n: p.detach().clone() for n, p in learner.drafter.named_parameters()}
            given = {**weights, "anchors": torch.tensor(anchors)}
            save_file(given, self.work / "batch-in.safetensors")
            self.theirs("batch")
            theirs = load_file(self.work / "batch-theirs.safetensors")
            hidden, labels, valid = learner._forward([sample], [anchors])
            if not again:
                # Its labels are the most likely tokens by the final states, which bf16 has rounded, ours
                # those that were generated. What is compared are the blocks where they agree.
                same = ((labels == theirs["labels"]) | ~valid).all(-1) & (
                    valid == theirs["valid"]
                ).all(-1)
                share = float(same.float().mean())
                anchors = [a for a, ok in zip(anchors, same.tolist(), strict=True) if ok]
        logits = learner.head.logits(learner.drafter, hidden)
        loss = block_loss(hidden, learner.head.lm_head, labels, valid, alpha=0.5)
        weight = dpace_weights(torch.exp(-loss.ce_AK), valid, 0.5).sum()
        # Theirs divides by the valid positions, ours by the sum of their weights.
        (loss.total / valid.sum()).backward()
        apart = whole = 0.0
        for name, p in learner.drafter.named_parameters():
            if p.grad is not None:
                apart += float((p.grad - theirs[f"grad.{name}"]).square().sum())
                whole += float(p.grad.square().sum())
        return {
            "anchors": len(anchors),
            "anchors_with_equal_labels": share,
            "loss_ours": float(loss.total.detach() / valid.sum()),
            "loss_theirs": float(theirs["loss"]),
            "normalisation": float(weight / valid.sum()),
            "logits_largest_difference": float((logits - theirs["logits"]).abs().max()),
            "gradients_relative_difference": math.sqrt(apart / whole),
        }

    def step_seconds(self, trainer: str, recipe: str) -> float:
        """CPU seconds of a step, median; measured once a recipe."""
        for row in self.report["speed"]:
            if (row["trainer"], row["recipe"]) == (trainer, recipe):
                return row["step_seconds"]
        _, found = self.train(trainer, recipe, _PROBES, 0)
        row = {"trainer": trainer, "recipe": recipe, "step_seconds": found["step_seconds"]}
        row["anchors_per_s"] = self.args.num_anchors / found["step_seconds"]
        self.report["speed"].append(row)
        return found["step_seconds"]

    def train(self, trainer: str, recipe: str, steps: int, seed: int) -> tuple[Path, dict]:
        """A drafter of so many steps, and the CPU seconds that they took."""
        if trainer == "speculators":
            out = self.work / "theirs"
            found = self.theirs("train", recipe, steps, seed, out)
            return out / "0", json.loads(found.splitlines()[-1])
        learner = self.learner(steps, seed, **RECIPES[recipe])
        train = {s.key: s for s in self.samples("train")}
        order: list[tuple[str, ...]] = []
        for epoch in range(steps):
            if len(order) >= steps:
                break
            order += epoch_steps(list(train), learner.hparams.batch_size, seed, epoch)
        clock = [time.process_time()]
        for step, keys in enumerate(order[:steps]):
            learner.step(step, [train[key] for key in keys])
            clock.append(time.process_time())
        spent = [b - a for a, b in pairwise(clock)]
        out = self.work / "ours"
        tensors = {**learner.weights(), **learner.head.checkpoint_tensors()}
        save_drafter(out, self.config.with_(dtype="bfloat16"), tensors)
        return out, {
            "cpu_seconds": clock[-1] - clock[0],
            "step_seconds": median(spent[_WARM:] or spent),
        }

    def accepted(self, folder: Path) -> dict[str, Any]:
        """tau of a saved drafter, of whichever format."""
        config = DrafterConfig.from_pretrained(folder)
        weights = load_weights(folder, config)
        learner = self.learner(1)
        learner = Learner(config, learner.hparams, learner.head, 1)
        learner.load_drafter(weights)
        drafter, total = learner.serving_drafter(self.dtype), Acceptance()
        for sample in self.held:
            total.merge(learner.accept(drafter, sample, learner.num_draft_tokens, self.dtype))
        return {"tau": total.tau, "num_drafts": total.num_drafts}

    def run(self) -> None:
        args = self.args
        self.held = self.samples("heldout")
        if args.output.exists():
            self.report = json.loads(args.output.read_text())
        self.report |= {
            "verifier": Path(self.verifier).name,
            "traffic": args.traffic,
            "conversations": len(self.examples["train"]),
            "held_out": len(self.held),
            "dtype": args.dtype,
            "num_anchors": args.num_anchors,
            "machine": describe_machine(),
            "versions": versions() | {"speculators": "0.9.0"},
        }
        self.report["batch"] = self.report["batch"] or self.compare_batch()
        runs = [("speculators", r, args.minutes) for r in args.theirs]
        runs += [("vllm-dflash", r, args.our_minutes or args.minutes) for r in args.ours]
        for seed in args.seeds:
            for trainer, recipe, budgets in runs:
                for minutes in budgets:
                    self._row(trainer, recipe, minutes, seed)
        self._write()

    def _row(self, trainer: str, recipe: str, minutes: float, seed: int) -> None:
        name = {"trainer": trainer, "recipe": recipe, "minutes": minutes, "seed": seed}
        if any(name.items() <= row.items() for row in self.report["rows"]):
            return
        steps = max(1, round(60 * minutes / self.step_seconds(trainer, recipe)))
        folder, found = self.train(trainer, recipe, steps, seed)
        row = {**name, "steps": steps, "core_minutes": found["cpu_seconds"] / 60}
        row |= {"step_seconds": found["step_seconds"], **self.accepted(folder)}
        self.report["rows"].append(row)
        print(row, flush=True)
        self._write()

    def _write(self) -> None:
        self.report["summary"] = summary(self.report)
        write_json(self.report, self.args.output)


def curve(rows: list[dict], trainer: str, recipe: str) -> list[tuple[float, float]]:
    """Core-minutes and tau of each budget, means over the seeds."""
    budgets: dict[float, list[dict]] = {}
    for row in rows:
        if (row["trainer"], row["recipe"]) == (trainer, recipe):
            budgets.setdefault(row["minutes"], []).append(row)
    return [
        (
            sum(r["core_minutes"] for r in some) / len(some),
            sum(r["tau"] for r in some) / len(some),
        )
        for _, some in sorted(budgets.items())
    ]


def minutes_for(points: list[tuple[float, float]], tau: float) -> float | None:
    """Core-minutes at which a curve has a tau, between its points by log(minutes); None if it ends below.

    A curve that starts above gives its first point's minutes: an upper bound.
    """
    for i, (minutes, reached) in enumerate(points):
        if reached >= tau:
            if i == 0:
                return minutes
            before, low = points[i - 1]
            share = (tau - low) / (reached - low)
            return math.exp(math.log(before) + share * (math.log(minutes) - math.log(before)))
    return None


def summary(report: dict[str, Any]) -> list[dict[str, Any]]:
    """For each recipe of ours and theirs: anchors a second, and core-minutes to the same tau, as ratios."""
    rows, speed = report["rows"], report["speed"]
    names = list(dict.fromkeys((r["trainer"], r["recipe"]) for r in rows))
    rate = {(s["trainer"], s["recipe"]): s["anchors_per_s"] for s in speed}
    out = []
    for ours in names:
        for theirs in names:
            if ours[0] != "vllm-dflash" or theirs[0] != "speculators":
                continue
            mine = curve(rows, *ours)
            points = []
            for minutes, tau in curve(rows, *theirs):
                own = minutes_for(mine, tau)
                ratio = None if own is None else own / minutes
                points.append(
                    {
                        "their_core_minutes": minutes,
                        "their_tau": tau,
                        "core_minutes_ratio_at_equal_tau": ratio,
                    }
                )
            out.append(
                {
                    "ours": ours[1],
                    "theirs": theirs[1],
                    "anchors_per_s_ratio": rate[ours] / rate[theirs],
                    "points": points,
                }
            )
    return out


#: What of ours is changed; the first is what `vllm-dflash train` does.
RECIPES: dict[str, dict[str, Any]] = {"default": {}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("verifier")
    parser.add_argument("run", type=Path, help="Output of a finished `vllm-dflash train`.")
    parser.add_argument("--data", required=True, help="As that run's.")
    parser.add_argument("--eval-data", required=True, help="As that run's.")
    parser.add_argument("--traffic", required=True, help="Its name in the report.")
    parser.add_argument("--speculators-python", required=True)
    parser.add_argument("--work", type=Path, required=True, help="Folder of features (gigabytes).")
    parser.add_argument("--conversations", type=int, default=400, help="To train on.")
    parser.add_argument("--more-heldout", type=int, default=0, help="Of those behind them.")
    parser.add_argument(
        "--max-len", type=int, default=528, help="Tokens; longer ones are left out."
    )
    parser.add_argument("--minutes", type=float, nargs="+", default=[1, 5, 15])
    parser.add_argument("--our-minutes", type=float, nargs="+", help="Budgets of ours, if others.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--lr", type=float, default=1.5e-3, help="Ours.")
    parser.add_argument("--num-anchors", type=int, default=32)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--theirs", nargs="*", default=["same"], choices=THEIRS)
    parser.add_argument("--ours", nargs="*", default=["default"], choices=RECIPES)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    # Each process as its own command has it: ours tells malloc to keep memory, theirs does not.
    args.environment = dict(os.environ)
    set_cpu_defaults()
    torch.set_num_threads(1)
    Bench(args).run()


if __name__ == "__main__":
    main()
