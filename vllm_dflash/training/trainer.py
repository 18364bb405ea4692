"""``vllm-dflash train``: the driver's half. It plans, the worker's session computes."""

from __future__ import annotations

import hashlib
import json
import math
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from vllm_dflash.checkpoint import TRAINING_FILE
from vllm_dflash.config import CheckpointFormat, DrafterConfig
from vllm_dflash.cpu_dtype import float32_sentence, verifier_dtype
from vllm_dflash.environment import versions
from vllm_dflash.files import ANY_FILES, claim_file, claim_folder, mark_folder, writing
from vllm_dflash.processes import STOP_SIGNALS, Interrupted, Stopped
from vllm_dflash.renamed import run_config
from vllm_dflash.training.config import StepLayout, TrainConfig
from vllm_dflash.training.conversations import load_conversations, opening_digest
from vllm_dflash.training.curves import draw_curves
from vllm_dflash.training.engine import (
    VerifierEngine,
    check_block,
    check_engine,
    cut_sentence,
    fit_max_len,
    write_seat,
)
from vllm_dflash.training.feature_store import read_index
from vllm_dflash.training.host_memory import default_feature_gib
from vllm_dflash.training.memory import MemoryPlan, feature_rows, plan_table
from vllm_dflash.training.plan import (
    Window,
    balanced_owners,
    epoch_steps,
    first_that_fit,
    keep_back,
    owner,
    plan_windows,
    rows_by_rank,
    run_steps,
)
from vllm_dflash.training.planning import drafter_config, plan_of_machine
from vllm_dflash.training.prepare import check_prompts, prepare_examples, verifier_eos
from vllm_dflash.training.rejections import check_rejected, report_rejected
from vllm_dflash.training.replicas import Replicas, replica_environments
from vllm_dflash.training.reporting import Reporter
from vllm_dflash.training.responses import is_log, response_logs
from vllm_dflash.training.rows import as_list, holds_rejects
from vllm_dflash.training.run_folder import RunFolder
from vllm_dflash.training.tokenization import Example, keep_date
from vllm_dflash.training.vocab import choose_draft_vocab

#: Evaluations take at most this share of the time, and are no closer than so many seconds.
_EVAL_SHARE, _EVAL_SECONDS = 0.05, 30.0
#: Of the room for features, what held-out sequences may take for the whole run.
_HELD_OUT_SHARE = 0.25
#: Of the training's time, what saving may take; where it would take more, it is done up to so many times more
#: seldom than --save-minutes says.
_SAVE_SHARE, _MORE_SELDOM = 0.03, 12
#: Seconds of training between two answers of the worker, so that progress and signals stay alive.
_CALL_SECONDS = 2.0
_MAX_CALL_STEPS = 64


@contextmanager
def _stop_flag() -> Iterator[list[int]]:
    """A list that a first signal to stop fills; a second one acts as it does elsewhere."""
    seen: list[int] = []

    def handler(signum, frame):
        seen.append(signum)
        for s, old in before.items():
            signal.signal(s, old)

    before = {s: h for s in STOP_SIGNALS if (h := signal.getsignal(s)) != signal.SIG_IGN}
    for signum in before:
        signal.signal(signum, handler)
    try:
        yield seen
    finally:
        for s, old in before.items():
            signal.signal(s, old)


def with_feature_gib(config: TrainConfig) -> TrainConfig:
    """The same with a number where none is given: that of the run to resume, since it decides which
    sequences are extracted together."""
    if config.feature_gib is not None:
        return config
    before = None if config.restart else RunFolder.setting(config.run_path, "feature_gib")
    return replace(config, feature_gib=before or default_feature_gib(config.engine.ranks))


def with_dtype(config: TrainConfig, hf_config: Any) -> TrainConfig:
    """The same with the dtype that ``auto`` is here: that of the run to resume, where there is one."""
    given = config.engine.dtype
    before = None if config.restart else RunFolder.setting(config.run_path, "engine.dtype")
    if given == "auto" and before in ("auto", "float32"):
        dtype = before
    else:
        dtype = verifier_dtype(given, config.verifier, hf_config, config.engine.extra)
    return replace(config, engine=replace(config.engine, dtype=dtype))


def claim_outputs(config: TrainConfig) -> None:
    """Checks before any work that what the run will write can be written and replaces nothing of the user's.

    Raises:
        ValueError: names the path and what is wrong with it.
    """
    inputs = {
        "the verifier": str(config.verifier),
        "the drafter of --init-from": config.init_from,
        "the data": config.data,
        "the held-out data": config.eval_data,
    }
    claim_folder(config.output, "drafter", "-o", inputs=inputs)
    claim_file(config.rejected_beside, "-o", holds_rejects, inputs=inputs)
    RunFolder.claim(config.run_path, inputs, restart=config.restart)
    for log in response_logs(config.responses) if config.responses is not None else ():
        claim_file(log, "--responses", is_log, inputs=inputs, link=True)
    cache = config.cache_features
    if cache is None:
        return
    for taken in (config.output, config.run_path):
        if taken.resolve() in (cache.resolve(), *cache.resolve().parents):
            raise ValueError(
                f"--cache-features {cache} lies in {taken}, which a run writes; give another place"
            )
    claim_folder(cache, "features", "--cache-features", inputs=inputs, names=ANY_FILES, link=True)
    for index in sorted(cache.glob("*/index.json")) + sorted(cache.glob("*/rank-*/index.json")):
        read_index(index)


def train(config: TrainConfig, reporter: Reporter) -> dict[str, Any]:
    """Trains a drafter and writes it to ``config.output``; returns the run's summary.

    Raises:
        ValueError: something the user gave cannot work; nothing that was good is lost.
        Interrupted: a signal stopped the run after its state was saved.
    """
    try:
        return _train(config, reporter)
    except Stopped as stop:
        raise Interrupted(str(stop), stop.signum) from None


def _train(config: TrainConfig, reporter: Reporter) -> dict[str, Any]:
    # Everything that can be wrong is looked at before the engine takes its minutes to start.
    claim_outputs(config)
    reporter.check(config)
    hf_config = config.verifier.load_config()
    drafter = drafter_config(config, hf_config)
    drafter.to_dict(config.checkpoint_format)  # or why not
    asked = config.engine.max_len
    config = replace(config, engine=fit_max_len(config.engine, hf_config, drafter))
    check_block(config.engine, drafter)
    check_engine(hf_config, config.engine)
    if config.data_parallel_size > 1:
        replica_environments(config.data_parallel_size, config.engine.ranks)  # or why not
    plan = plan_of_machine(
        config.verifier,
        hf_config,
        drafter,
        config.hparams,
        config.engine,
        config.data_parallel_size,
    )
    conversations, rejected = load_conversations(
        config.data, chat_template_kwargs=config.chat_template_kwargs, limit=config.limit
    )
    held_out, held_rejected = (
        load_conversations(config.eval_data, chat_template_kwargs=config.chat_template_kwargs)
        if config.eval_data
        else ([], [])
    )
    # A run that cannot begin leaves no folder behind, whose settings would then be in the way.
    beside = config.rejected_beside
    num_rows, num_held_rows = len(conversations) + len(rejected), len(held_out) + len(held_rejected)
    check_rejected(rejected, num_rows, beside, config.max_rejected)
    check_rejected(held_rejected, num_held_rows, beside, config.max_rejected)
    check_prompts(config.verifier, conversations, config.engine.extra)
    if held_out:
        check_prompts(config.verifier, held_out, config.engine.extra)
    given = config.engine.dtype
    config = with_dtype(with_feature_gib(config), hf_config)
    folder = RunFolder(config.run_path, config.identity(), restart=config.restart)
    if (summary := finished(config.output, folder, config.checkpoint_format)) is not None:
        reporter.say(
            f"this run is finished: {summary['steps']} steps, nothing is left to do. To train again, give "
            "--restart, which replaces this drafter, or another -o, which keeps it"
        )
        curves = folder.curves if folder.curves.is_file() else None
        reporter.finished(config.output, summary, curves)
        return summary
    if config.cache_features is not None:
        with writing(config.cache_features):
            config.cache_features.mkdir(parents=True, exist_ok=True)
            mark_folder(config.cache_features, "features")
    reporter.open(folder, config)
    say, allowed = reporter.say, config.max_rejected
    report_rejected(rejected, num_rows, folder.rejected, allowed, say)
    if config.eval_data:
        report_rejected(held_rejected, num_held_rows, folder.rejected_heldout, allowed, say)
    reporter.say(
        f"{len(conversations)} conversations ({len(rejected)} rejected); drafter of "
        f"{drafter.num_hidden_layers} layers, blocks of {drafter.draft_block_size} tokens, reads the "
        f"verifier's layers {', '.join(map(str, drafter.target_layer_ids))}, mask token "
        f"{drafter.mask_token_id}"
    )
    reporter.say(
        "to do: start the verifier, "
        + ("" if config.on_policy else "have it write its own responses to the prompts, ")
        + "extract its features (hidden states), train. Stop with Ctrl-C at any time: the same command "
        f"goes on from what is in {folder.path}"
    )
    if sentence := float32_sentence(given, config.engine.dtype):
        reporter.say(sentence)
    if config.engine.max_len < asked:
        reporter.say(cut_sentence(config.engine.max_len, asked))
    if plan is not None:
        reporter.table(*plan_table(plan))
    if (replicas := config.data_parallel_size) > 1:
        reporter.say(
            f"{replicas} replicas of the verifier; what all but the first print goes to "
            f"{folder.path / 'replica-*.log'}"
        )
    with reporter.stage("starting the verifier"):
        seat = write_seat(drafter, folder.path / "seat")
        memory = None if plan is None else plan.engine_args()
        engine = (
            VerifierEngine(config.verifier, seat, config.engine, memory=memory)
            if replicas == 1
            else Replicas(config.verifier, seat, config.engine, replicas, folder.path, memory)
        )
    try:
        keep_date(engine.tokenizer, folder.started)
        return Trainer(config, drafter, folder, engine, reporter, plan).run(
            conversations, rejected, held_out, held_rejected
        )
    finally:
        engine.close()


def finished(
    output: Path, folder: RunFolder, checkpoint_format: CheckpointFormat = "zlab"
) -> dict[str, Any] | None:
    """The summary of a run whose drafter stands in the output as it is asked for, else None."""
    state, file = folder.state(), output / TRAINING_FILE
    if state is None or not file.is_file():
        return None
    summary = json.loads(file.read_text())
    same = run_config(summary.get("config") or {}) == folder.config
    same = same and summary.get("checkpoint_format", "zlab") == checkpoint_format
    return summary if same and summary.get("steps") == state["step"] else None


def examples_digest(examples: list[Example]) -> str:
    """What tells whether a resumed run trains on the same token sequences."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example.id, example.token_ids, example.loss_mask]).encode())
    return digest.hexdigest()[:16]


def save_pause(least: float, took: float) -> float:
    """Seconds until the next state is saved.

    Args:
        least: what the user asked for.
        took: how long the last state took.
    """
    return min(max(least, took / _SAVE_SHARE), _MORE_SELDOM * least)


class Trainer:
    """A run from its prompts to the finished drafter; the engine computes."""

    def __init__(
        self,
        config: TrainConfig,
        drafter: DrafterConfig,
        folder: RunFolder,
        engine: VerifierEngine,
        reporter: Reporter,
        plan: MemoryPlan | None = None,
    ) -> None:
        self.layout = StepLayout() if plan is None else plan.layout
        self.config, self.drafter, self.folder = config, drafter, folder
        self.engine, self.reporter = engine, reporter
        self.bad: dict[str, str] = {}
        self.examples_digest = ""
        self.step = 0
        self.stop: list[int] = []
        self.next_save = math.inf
        self.seconds = {"responses": 0.0, "extract": 0.0, "train": 0.0}

    def run(self, conversations, rejected, held_out, held_rejected) -> dict[str, Any]:
        started = time.monotonic()
        if self.config.hparams.loss_kind.needs_final_states:
            self.engine.call("check_kl", self.drafter.vocab_size)
        if self.config.records:
            self.engine.record_responses(
                self.folder.features,
                self.drafter.target_layer_ids,
                self.config.hparams.loss_kind.needs_final_states,
                self.config.engine.max_len,
            )
        logs = response_logs(self.config.responses or self.folder.responses)
        examples = self._prepare("responses", conversations, rejected, logs[0])
        if held_out:
            held = self._prepare(
                "held-out responses",
                held_out,
                held_rejected,
                logs[1],
                self.folder.rejected_heldout,
            )
        else:
            examples, held = keep_back(
                examples,
                {c.id: opening_digest(c) for c in conversations},
                self.config.holdout,
                self.config.max_holdout,
                self.config.hparams.seed,
            )
        held = self._that_fit(held)
        self.seconds["responses"] = time.monotonic() - started
        by_key = {f"train/{e.id}": e for e in examples}
        held_by_key = {f"heldout/{e.id}": e for e in held}
        self.examples_digest = examples_digest([*examples, *held])
        draft_ids = self._draft_vocab(examples)
        steps_per_epoch = len(epoch_steps(list(by_key), self.config.hparams.batch_size, 0, 0))
        total = self.config.max_steps or max(1, round(self.config.epochs * steps_per_epoch))
        info = self.engine.call(
            "begin",
            self.drafter.to_dict(),
            self.config.hparams.as_dict(),
            draft_ids,
            total,
            self.config.init_from,
            self._cache_dir(),
            asdict(self.layout),
        )
        self.reporter.say(
            f"training {info['parameters'] / 1e6:.1f}M parameters on {info['device']} ({info['autocast']}) "
            f"for {total} steps ({total / steps_per_epoch:.1f} epochs of {len(by_key)} sequences); "
            f"{len(held_by_key)} held out"
        )
        assert self.drafter.num_speculative_tokens is not None
        self.reporter.terms(self.drafter.num_speculative_tokens, len(held_by_key))
        ranks, sequences = self.config.ranks, self.config.hparams.batch_size
        if ranks > 1:
            self.reporter.say(
                f"{ranks} ranks share each step by sequence, {sequences} a step (--batch-size)"
                + ("; with fewer than ranks some idle" if sequences < ranks else "")
            )
        held_ids = {k: e.token_ids for k, e in held_by_key.items()}
        train_ids = {k: e.token_ids for k, e in by_key.items()}
        owners = self._owners(train_ids | held_ids)
        if self.config.data_parallel_size > 1:
            owners |= self._balanced_owners(by_key, total)
        self.engine.register(
            [
                (key, list(e.token_ids), list(e.loss_mask), e.source)
                for key, e in (by_key | held_by_key).items()
            ],
            owners,
        )
        if self.config.records:
            self._report_recorded(list(by_key | held_by_key))
        with _stop_flag() as self.stop:
            self.step = self._resume(total)
            self._extract(held_by_key, keep=[], what="extracting held-out features")
            block_size = self._shared_block_size
            held_rows = rows_by_rank(held_ids, block_size, owners)
            windows = plan_windows(
                train_ids,
                sequences_per_step=self.config.hparams.batch_size,
                seed=self.config.hparams.seed,
                total_steps=total,
                max_rows=self._feature_rows() - max(held_rows.values(), default=0),
                block_size=block_size,
                owners=owners,
            )
            held_keys = [k for k in held_by_key if k not in self.bad]
            self._train(windows, by_key, held_keys, total)
        return self._finish(total, held_keys, len(by_key))

    def _prepare(self, what, conversations, rejected, responses_path, rejected_path=None):
        most = self.config.sampling.max_tokens

        def generated(requests: int) -> tuple[int, float]:
            return self.engine.generated.expected(requests, most)

        with self.reporter.progress(what, "responses", generated) as update:
            examples, _ = prepare_examples(
                self.engine,
                self.config.verifier,
                conversations,
                rejected,
                on_policy=self.config.on_policy,
                sampling=self.config.sampling,
                responses_path=responses_path,
                rejected_path=rejected_path or self.folder.rejected,
                max_len=self.config.engine.max_len,
                progress=update,
                max_rejected=self.config.max_rejected,
                say=self.reporter.say,
            )
        return examples

    def _report_recorded(self, keys: list[str]) -> None:
        folder = self.folder.features
        recorded = len(self.engine.call("recorded", keys))
        size = sum(file.stat().st_size for file in folder.iterdir())
        self.reporter.say(
            f"features of {recorded} of {len(keys)} sequences were recorded while generating "
            f"({size / 2**30:.2f} GiB in {folder}); the others' are extracted"
        )

    @property
    def _shared_block_size(self) -> int:
        """Tokens in the blocks of which sequences share the features."""
        # What was recorded comes from the disk as whole sequences.
        whole = self.config.engine.max_len + 1
        return whole if self.config.records else self.engine.kv_block_size

    def _owners(self, sequences: Mapping[str, Sequence[int]]) -> dict[str, int]:
        return {k: owner(ids, self.config.ranks) for k, ids in sequences.items()}

    def _balanced_owners(self, examples: dict[str, Example], total: int) -> dict[str, int]:
        """Of those that the run's steps are made of. What a step has to do is blocks, one at each anchor."""
        hparams = self.config.hparams
        steps = run_steps(list(examples), hparams.batch_size, hparams.seed, total)
        work = {k: min(sum(e.loss_mask), hparams.num_anchors) for k, e in examples.items()}
        return balanced_owners(steps, work, self.config.ranks)

    def _that_fit(self, held: list[Example]) -> list[Example]:
        """Of the held-out examples no more than leave room to train: their features stay till the end."""
        sequences = {e.id: e.token_ids for e in held}
        fit = first_that_fit(
            sequences,
            max_rows=int(_HELD_OUT_SHARE * self._feature_rows()),
            block_size=self._shared_block_size,
            owners=self._owners(sequences),
        )
        if len(fit) < len(held):
            self.reporter.say(
                f"held out are the first {len(fit)} of {len(held)} sequences, whose features take "
                f"{_HELD_OUT_SHARE:.0%} of --feature-gib {self.config.feature_gib}; `vllm-dflash eval` "
                "evaluates all of them"
            )
        return held[: len(fit)]

    def _draft_vocab(self, examples: list[Example]) -> list[int] | None:
        if not self.drafter.has_draft_vocab or self.config.init_from is not None:
            # A drafter to go on from brings its own; the session reads it from the checkpoint.
            return None
        responses = [
            [t for t, m in zip(e.token_ids, e.loss_mask, strict=True) if m] for e in examples
        ]
        eos = sorted(verifier_eos(self.engine, self.config.verifier))
        ids, covered = choose_draft_vocab(
            responses,
            [e.token_ids for e in examples],
            self.drafter.logits_vocab_size,
            self.drafter.vocab_size,
            eos,
        )
        self.reporter.say(
            f"draft vocabulary of {len(ids)} tokens covers {covered:.1%} of the response tokens"
        )
        return ids

    def _cache_dir(self) -> str | None:
        """A folder of its own for each verifier, set of layers and dtype."""
        if self.config.cache_features is None:
            return None
        engine = self.config.engine
        what = [
            str(self.config.verifier),
            list(self.drafter.target_layer_ids),
            engine.dtype,
            engine.extra,
            self.config.verifier.weights_version(),
            self.config.hparams.loss_kind.needs_final_states,
        ]
        if self.config.verifier.revision is not None:
            what.append(self.config.verifier.revision)
        if engine.ranks > 1:
            what.append(engine.ranks)  # each keeps its own sequences, in bits of its own
        if self.config.data_parallel_size > 1:
            what.append(f"{self.config.data_parallel_size} replicas")
        digest = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]
        return str(self.config.cache_features / digest)

    def _feature_rows(self) -> int:
        assert self.config.feature_gib is not None
        return feature_rows(
            self.config.feature_gib / self.config.data_parallel_size,
            self.drafter,
            self.config.engine,
            self.config.hparams.loss_kind.needs_final_states,
        )

    def _resume(self, total: int) -> int:
        state = self.folder.state()
        if state is None:
            self.folder.cut_metrics(0)
            return 0
        weights = self.config.verifier.weights_version()
        if state.get("weights", weights) != weights:
            raise ValueError(
                f"{self.folder.path} holds a run on other weights of {self.config.verifier} than today's. "
                "Put them back to resume, or give another -o (or --restart to discard the run)"
            )
        if state.get("examples", self.examples_digest) != self.examples_digest:
            raise ValueError(
                f"{self.folder.path} holds a run on other token sequences than today's: the verifier's "
                "tokenizer, its chat template or its own code has changed since. Put it back to resume, or "
                "give another -o (or --restart to discard the run)"
            )
        self.engine.call("load_state", str(self.folder.path / state["file"]))
        self.bad = dict(state.get("bad", {}))
        self.seconds |= state.get("seconds", {})
        self.folder.cut_metrics(state["step"])
        self.reporter.say(f"resuming at step {state['step']} of {total}")
        return state["step"]

    def _save(self, step: int) -> None:
        started = time.monotonic()
        self.engine.call("save_state", str(self.folder.new_state_file(step)))
        self.folder.commit_state(
            step,
            {
                "bad": self.bad,
                "seconds": self.seconds,
                "examples": self.examples_digest,
                "weights": self.config.verifier.weights_version(),
            },
        )
        self.next_save = time.monotonic() + save_pause(
            60 * self.config.save_minutes, time.monotonic() - started
        )

    def _extract(
        self, examples: dict[str, Example], keep: list[str], what: str = "extracting features"
    ) -> None:
        """Features of the given examples, all of them together or (all at hand) none.

        Those recorded while generating count as never asked for, so that a resumed run extracts the same.
        Features of other examples than these and ``keep`` are freed first.
        """
        wanted = {k: e.token_ids for k, e in examples.items() if k not in self.bad}
        self.engine.call("keep", [*wanted, *keep])
        for key in self.engine.call("recorded", list(wanted)):
            del wanted[key]
        if sum(map(len, self.engine.call_ranks("stored", list(wanted)))) == len(wanted):
            return
        started = time.monotonic()
        tokens = failed = 0
        with self.reporter.progress(what, unit="tokens") as update:
            total = sum(len(ids) for ids in wanted.values())
            update(0, total)
            for key, problem in self.engine.extract(wanted):
                tokens += len(wanted[key])
                update(tokens, total)
                if problem:
                    failed += 1
                    self._ban(key, problem, failed, len(wanted))
                if self.stop:
                    raise self._stopped()
        self.seconds["extract"] += time.monotonic() - started

    def _ban(self, key: str, reason: str, count: int, of: int) -> None:
        """Leaves a sequence out from now on; it is the ``count``-th to fail of so many that could have."""
        self.bad[key] = reason
        self.reporter.say(f"skipping {key}: {reason}")
        if count > max(1, self.config.hparams.max_skipped * of):
            raise ValueError(
                f"{count} of {of} sequences had to be skipped, the last because {reason}; "
                f"training stops (--max-skipped {self.config.hparams.max_skipped})"
            )

    def _stopped(self) -> Interrupted:
        """Saves what a resumed run needs."""
        self.reporter.say("stopping: the state is saved")
        self._save(self.step)
        name = signal.Signals(self.stop[0]).name
        return Interrupted(f"stopped by {name} at step {self.step}", self.stop[0])

    def _train(
        self,
        windows: list[Window],
        examples: dict[str, Example],
        held_keys: list[str],
        total: int,
    ) -> None:
        every = self.config.eval_every
        first = self.step
        next_eval = time.monotonic() + _EVAL_SECONDS
        self.next_save = time.monotonic() + 60 * self.config.save_minutes
        chunk = 1
        with self.reporter.training(first, total) as report:
            for window in windows:
                if window.end <= first:
                    continue
                self._extract({k: examples[k] for k in window.keys}, keep=held_keys)
                while self.step < window.end:
                    count = min(chunk, window.end - self.step)
                    if every:
                        count = min(count, every - self.step % every)
                    at = self.step - window.first_step
                    steps = [
                        (self.step + i, [k for k in keys if k not in self.bad])
                        for i, keys in enumerate(window.steps[at : at + count])
                    ]
                    began = time.monotonic()
                    rows = self.engine.call("train", steps)
                    took = time.monotonic() - began
                    self.seconds["train"] += took
                    self.step += count
                    chunk = max(
                        1, min(_MAX_CALL_STEPS, round(count * _CALL_SECONDS / max(took, 1e-3)))
                    )
                    for row in rows:
                        for key in row["bad"]:
                            reason = f"non-finite loss at step {row['step']}"
                            self._ban(key, reason, len({*self.bad, key}), len(examples))
                    self.folder.append_metrics(rows)
                    report(rows, took)
                    due = self.step % every == 0 if every else time.monotonic() > next_eval
                    if due and self.step < total and held_keys:
                        began = time.monotonic()
                        self._evaluate(self.step, held_keys)
                        took = time.monotonic() - began
                        next_eval = began + took + max(_EVAL_SECONDS, took / _EVAL_SHARE)
                    if self.stop:
                        raise self._stopped()
                    if time.monotonic() > self.next_save:
                        self._save(self.step)
        if first < total:
            self._save(total)

    def _evaluate(self, step: int, held_keys: list[str]) -> dict[str, Any]:
        got = self.engine.call("evaluate", held_keys, self.drafter.num_speculative_tokens)
        self.folder.append_metrics([{"step": step - 1, "tau": got["tau"]}])
        self.reporter.evaluated(step, got["tau"])
        return got

    def _workload(self) -> dict[str, Any]:
        """What the held-out acceptance is acceptance of."""
        config = self.config
        return {
            "num_speculative_tokens": self.drafter.num_speculative_tokens,
            "drafts": "greedy",
            "data": ", ".join(as_list(config.eval_data or config.data))
            + ("" if config.eval_data else ", held back"),
            "responses": "of the data" if config.on_policy else asdict(config.sampling),
            "dtype": config.engine.dtype,
            "chat_template_kwargs": config.chat_template_kwargs or {},
        }

    def _finish(self, total: int, held_keys: list[str], num_train: int) -> dict[str, Any]:
        with self.reporter.stage("last evaluation and export"):
            summary = self._export(total, held_keys, num_train)
        curves = draw_curves(
            self.folder.read_metrics(),
            summary["tau_heldout"],
            f"{self.config.output.name}, a drafter for {Path(summary['verifier']).name}",
            self.folder.curves,
        )
        self.reporter.finished(self.config.output, summary, curves)
        return summary

    def _export(self, total: int, held_keys: list[str], num_train: int) -> dict[str, Any]:
        held = self._evaluate(total, held_keys) if held_keys else None
        if held is not None:
            held |= self._workload()
        summary = {
            "verifier": str(self.config.verifier),
            "steps": total,
            "checkpoint_format": self.config.checkpoint_format,
            "train_sequences": num_train,
            "skipped": self.bad,
            "minutes": {name: s / 60 for name, s in self.seconds.items()},
            "tau_heldout": held,
            "versions": versions(),
            "config": self.folder.config,
        }
        extra = {TRAINING_FILE: json.dumps(summary, indent=2) + "\n"}
        self.engine.call("export", str(self.config.output), self.config.checkpoint_format, extra)
        return summary
