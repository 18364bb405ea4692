"""``vllm-dflash train``: the driver's half. It plans, the worker's session computes."""

from __future__ import annotations

import hashlib
import json
import math
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from vllm_dflash.bounds import SHARE, Bound, check_bounds, check_choice, count, option_of
from vllm_dflash.checkpoint import (
    TRAINING_FILE,
    check_computable,
    check_weights,
    read_config,
    save_drafter,
)
from vllm_dflash.config import CheckpointFormat, DrafterConfig, VerifierInfo
from vllm_dflash.environment import versions
from vllm_dflash.files import ANY_FILES, claim_file, claim_folder, mark_folder, writing
from vllm_dflash.processes import STOP_SIGNALS, Interrupted, Stopped
from vllm_dflash.training.config import (
    DrafterShape,
    EngineOptions,
    Hyperparameters,
    SamplingOptions,
    StepLayout,
)
from vllm_dflash.training.conversations import load_conversations
from vllm_dflash.training.engine import (
    VerifierEngine,
    check_block,
    check_engine,
    cut_sentence,
    fit_max_len,
    seat_drafter,
)
from vllm_dflash.training.feature_store import read_index
from vllm_dflash.training.host_memory import default_feature_gib
from vllm_dflash.training.memory import MemoryPlan, plan_table
from vllm_dflash.training.plan import Window, epoch_steps, owner, plan_windows, rows_by_rank
from vllm_dflash.training.planning import new_drafter, plan_of_machine, with_head
from vllm_dflash.training.prepare import check_prompts, prepare_examples, verifier_eos
from vllm_dflash.training.rejections import check_rejected, report_rejected
from vllm_dflash.training.reporting import Reporter
from vllm_dflash.training.rows import Data, as_list, data_files, holds_rejects
from vllm_dflash.training.run_folder import RunFolder
from vllm_dflash.training.tokenization import Example, keep_date
from vllm_dflash.training.vocab import choose_draft_vocab, choose_mask_token
from vllm_dflash.verifier import Verifier

#: Evaluations take at most this share of the time, and are no closer than so many seconds.
_EVAL_SHARE, _EVAL_SECONDS = 0.05, 30.0
#: Of the training's time, what saving may take; where it would take more, it is done up to so many times more
#: seldom than --save-minutes says.
_SAVE_SHARE, _MORE_SELDOM = 0.03, 12
#: Seconds of training between two answers of the worker, so that progress and signals stay alive.
_CALL_SECONDS = 2.0
_MAX_CALL_STEPS = 64


@dataclass(frozen=True)
class TrainConfig:
    """A training run.

    Attributes:
        verifier: the model, and how it is loaded and served.
        data: prompts or conversations (training/conversations.py lists the formats), one name or several.
        output: folder of the finished drafter; the run's own folder is ``<output>-run``.
        eval_data: held-out conversations; without it ``holdout`` of the data is kept back.
        epochs: passes over the data; ``max_steps`` cuts or extends them.
        init_from: a drafter to go on from.
        feature_gib: the host's memory for features of each worker; beyond it they are extracted again. None
            takes half of what is available when a run is first started, shared by the workers.
        features_from: ``extraction``, or ``generation`` to record them while responses are generated.
        save_minutes: between saved states; up to 12 times as long where saving takes over 3 % of the time.
        max_rejected: share of the rows of the data (and of the held-out data) that may be rejected.
    """

    verifier: Verifier
    data: Data
    output: Path
    eval_data: Data | None = None
    holdout: float = 0.05
    max_holdout: int = 64
    epochs: float = 6.0
    max_steps: int | None = None
    on_policy: bool = False
    init_from: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    limit: int | None = None
    fmt: CheckpointFormat = "zlab"
    feature_gib: float | None = None
    cache_features: Path | None = None
    features_from: str = "extraction"
    eval_every: int | None = None
    save_minutes: float = 5.0
    tensorboard: bool = False
    restart: bool = False
    max_rejected: float = 0.5
    shape: DrafterShape = field(default_factory=DrafterShape)
    hparams: Hyperparameters = field(default_factory=Hyperparameters)
    engine: EngineOptions = field(default_factory=EngineOptions)
    sampling: SamplingOptions = field(default_factory=SamplingOptions)

    def __post_init__(self) -> None:
        bounds = {
            "holdout": Bound(low=0, below=1),
            "max_holdout": count(0),
            "epochs": Bound(above=0, high=100_000),
            "max_steps": count(1, 100_000_000),
            "limit": count(),
            "feature_gib": Bound(above=0, high=2**20),
            "eval_every": count(),
            "save_minutes": Bound(low=0),
            "max_rejected": SHARE,
        }
        check_bounds(self, bounds)
        check_choice("features_from", self.features_from, ("extraction", "generation"))
        if not self.records:
            return
        if self.on_policy:
            raise ValueError(
                "--features-from generation records while responses are generated, but --on-policy generates "
                "none; leave one out"
            )
        if self.engine.ranks > 1:
            raise ValueError(
                f"--features-from generation records on one rank, not {self.engine.ranks}; leave it out"
            )

    @property
    def records(self) -> bool:
        """Whether features are recorded while responses are generated."""
        return self.features_from == "generation"

    @property
    def run_path(self) -> Path:
        return self.output.with_name(self.output.name + "-run")

    @property
    def rejected_beside(self) -> Path:
        """Where rejected rows are kept of data that no run can begin with."""
        return self.output.with_name(self.output.name + "-rejected.jsonl")

    def with_feature_gib(self) -> TrainConfig:
        """The same with a number where none is given: that of the run to resume, since it decides which
        sequences are extracted together."""
        if self.feature_gib is not None:
            return self
        before = None if self.restart else RunFolder.setting(self.run_path, "feature_gib")
        return replace(self, feature_gib=before or default_feature_gib(self.engine.ranks))

    def identity(self) -> dict[str, Any]:
        """What decides the weights, flat: a run is resumed only with the same."""
        out: dict[str, Any] = self.verifier.identity()
        for name in (
            "data eval_data holdout max_holdout epochs max_steps on_policy init_from "
            "chat_template_kwargs limit feature_gib"
        ).split():
            out[name] = getattr(self, name)
        if self.records:  # runs of before there was a choice can be resumed without
            out["features_from"] = self.features_from
        for name in ("data", "eval_data"):
            files = data_files(getattr(self, name) or [])
            if files:
                out[f"{name}_sha256"] = _digest(files)
        parts: dict[str, Any] = {
            "shape": self.shape.with_defaults(),
            "hparams": self.hparams,
            "engine": self.engine,
            "sampling": self.sampling,
        }
        for name, part in parts.items():
            out |= {f"{name}.{k}": v for k, v in asdict(part).items()}
        return out


def _digest(files: list[Path]) -> str:
    """SHA-256 of a file; of several, that of their digests."""
    digests = []
    for file in files:
        digest = hashlib.sha256()
        with file.open("rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
        digests.append(digest.hexdigest())
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


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


def verifier_config(verifier: Verifier | str) -> Any:
    """The verifier's transformers config; ValueError when there is none at that path or name."""
    return Verifier.of(verifier).load_config()


def drafter_config(config: TrainConfig, hf_config: Any) -> DrafterConfig:
    """The drafter to train: of ``init_from``, or made for the verifier."""
    info = VerifierInfo.from_hf_config(hf_config, str(config.verifier))
    if config.init_from is not None:
        raw = read_config(config.init_from)
        drafter = DrafterConfig.from_dict(raw)
        drafter.check_verifier(info)
        drafter.known_block_size("give it there to train this drafter")
        check_computable(config.init_from, raw)
        check_weights(config.init_from, drafter)
        _check_same_shape(config.shape, drafter, config.init_from)
        return drafter if config.shape.head is None else with_head(drafter)
    ids, features = config.shape.target_layer_ids, config.shape.features
    if ids is not None and features not in (None, len(ids)):
        raise ValueError(
            f"--features is {features}, but --target-layer-ids names {len(ids)} layers; leave one out"
        )
    if features is not None and features > info.num_hidden_layers:
        raise ValueError(
            f"--features is {features}, but the verifier has {info.num_hidden_layers} layers to read"
        )
    tokenizer = config.verifier.load_tokenizer()
    avoid = [info.pad_token_id] if info.pad_token_id is not None else []
    mask = choose_mask_token(tokenizer, info.vocab_size, avoid, config.shape.mask_token_id)
    return new_drafter(config.shape, hf_config, mask, str(config.verifier))


def _check_same_shape(shape: DrafterShape, drafter: DrafterConfig, name: str) -> None:
    """ValueError when the user gives a shape that the drafter to go on from does not have."""
    has = {
        "layers": drafter.num_hidden_layers,
        "block_size": drafter.draft_block_size,
        "features": len(drafter.target_layer_ids),
        "target_layer_ids": drafter.target_layer_ids,
        "draft_vocab": drafter.logits_vocab_size,
        "mask_token_id": drafter.mask_token_id,
        "intermediate_size": drafter.intermediate_size,
        "hidden_size": drafter.hidden_size,
        "heads": drafter.num_attention_heads,
        "kv_heads": drafter.num_key_value_heads,
        "head_dim": drafter.head_dim,
        "layer_types": drafter.layer_types,
        "sliding_window": drafter.sliding_window,
        "causal": drafter.causal,
        "sample_from_anchor": drafter.sample_from_anchor,
        "head": shape.head,  # which one without can be given
    }
    for field_name, value in shape.given().items():
        if value != has[field_name]:
            raise ValueError(
                f"{option_of(field_name)} is {value!r}, but the drafter --from {name} has "
                f"{has[field_name]!r}, and a drafter keeps its shape; leave the option out"
            )


def claim_outputs(config: TrainConfig) -> None:
    """Checks before any work that what the run will write can be written and replaces nothing of the user's.

    Raises:
        ValueError: names the path and what is wrong with it.
    """
    inputs = {
        "the verifier": str(config.verifier),
        "the drafter of --from": config.init_from,
        "the data": config.data,
        "the held-out data": config.eval_data,
    }
    claim_folder(config.output, "drafter", "-o", inputs=inputs)
    claim_file(config.rejected_beside, "-o", holds_rejects, inputs=inputs)
    RunFolder.claim(config.run_path, inputs, restart=config.restart)
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


def write_seat(config: DrafterConfig, path: Path) -> Path:
    import torch

    from vllm_dflash.modeling.drafter import Drafter

    seat = seat_drafter(config)
    drafter = Drafter(seat)
    drafter.init_weights(generator=torch.Generator().manual_seed(0))
    save_drafter(path, seat, drafter.state_dict())
    return path


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
    hf_config = verifier_config(config.verifier)
    drafter = drafter_config(config, hf_config)
    asked = config.engine.max_len
    config = replace(config, engine=fit_max_len(config.engine, hf_config, drafter))
    check_block(config.engine, drafter)
    check_engine(hf_config, config.engine)
    plan = plan_of_machine(config.verifier, hf_config, drafter, config.hparams, config.engine)
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
    config = config.with_feature_gib()
    folder = RunFolder(config.run_path, config.identity(), restart=config.restart)
    if (summary := finished(config.output, folder)) is not None:
        reporter.say(
            f"this run is finished: {summary['steps']} steps; the same command with --restart trains anew, "
            "another -o beside it"
        )
        reporter.finished(config.output, summary, None)
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
        f"{len(conversations)} conversations ({len(rejected)} rejected), drafter of "
        f"{drafter.num_hidden_layers} layers, block {drafter.draft_block_size}, verifier layers "
        f"{list(drafter.target_layer_ids)}, mask token {drafter.mask_token_id}"
    )
    if config.engine.max_len < asked:
        reporter.say(cut_sentence(config.engine.max_len, asked))
    if plan is not None:
        reporter.table(*plan_table(plan))
    with reporter.stage("starting the verifier"):
        engine = VerifierEngine(
            config.verifier,
            write_seat(drafter, folder.path / "seat"),
            config.engine,
            memory=None if plan is None else plan.engine_args(),
        )
    try:
        keep_date(engine.tokenizer, folder.started)
        return _Run(config, drafter, folder, engine, reporter, plan).run(
            conversations, rejected, held_out, held_rejected
        )
    finally:
        engine.close()


def finished(output: Path, folder: RunFolder) -> dict[str, Any] | None:
    """The summary of a run whose drafter stands in the output as the run wrote it, else None."""
    state, file = folder.state(), output / TRAINING_FILE
    if state is None or not file.is_file():
        return None
    summary = json.loads(file.read_text())
    same = summary.get("config") == folder.config
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


class _Run:
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
        if self.config.hparams.loss == "kl":
            self.engine.call("check_kl", self.drafter.vocab_size)
        if self.config.records:
            self.engine.record_responses(
                self.folder.features,
                self.drafter.target_layer_ids,
                self.config.hparams.loss == "kl",
                self.config.engine.max_len,
            )
        examples = self._prepare("responses", conversations, rejected, self.folder.responses)
        if held_out:
            held = self._prepare(
                "held-out responses",
                held_out,
                held_rejected,
                self.folder.path / "responses-heldout.jsonl",
                self.folder.rejected_heldout,
            )
        else:
            examples, held = self._keep_back(examples)
        self.seconds["responses"] = time.monotonic() - started
        by_key = {f"train/{e.id}": e for e in examples}
        held_by_key = {f"heldout/{e.id}": e for e in held}
        self.examples_digest = examples_digest([*examples, *held])
        draft_ids = self._draft_vocab(examples)
        steps_per_epoch = len(epoch_steps(list(by_key), self.config.hparams.sequences, 0, 0))
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
        ranks, sequences = self.config.engine.ranks, self.config.hparams.sequences
        if ranks > 1:
            self.reporter.say(
                f"{ranks} ranks share each step by sequence, {sequences} a step (--sequences)"
                + ("; with fewer than ranks some idle" if sequences < ranks else "")
            )
        self.engine.call(
            "register",
            [
                (key, list(e.token_ids), list(e.loss_mask), e.source)
                for key, e in (by_key | held_by_key).items()
            ],
        )
        if self.config.records:
            self._report_recorded(list(by_key | held_by_key))
        with _stop_flag() as self.stop:
            self.step = self._resume()
            self._extract(held_by_key, keep=[])
            owners = {k: owner(e.token_ids, ranks) for k, e in (by_key | held_by_key).items()}
            # What was recorded comes from the disk as whole sequences.
            whole = self.config.engine.max_len + 1
            block_size = whole if self.config.records else self.engine.kv_block_size
            held_ids = {k: e.token_ids for k, e in held_by_key.items()}
            held_rows = rows_by_rank(held_ids, block_size, owners)
            windows = plan_windows(
                {k: e.token_ids for k, e in by_key.items()},
                sequences_per_step=self.config.hparams.sequences,
                seed=self.config.hparams.seed,
                total_steps=total,
                max_rows=self._feature_tokens() - max(held_rows.values(), default=0),
                block_size=block_size,
                owners=owners,
            )
            held_keys = [k for k in held_by_key if k not in self.bad]
            self._train(windows, by_key, held_keys, total)
        return self._finish(total, held_keys, len(by_key))

    def _prepare(self, what, conversations, rejected, responses_path, rejected_path=None):
        with self.reporter.progress(what, unit="responses") as update:
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

    def _keep_back(self, examples: list[Example]) -> tuple[list[Example], list[Example]]:
        """Held-out examples by whole conversations, so that no turn leaks."""
        names = sorted({e.id.rsplit("#", 1)[0] for e in examples})
        count = min(self.config.max_holdout, round(self.config.holdout * len(names)))
        if count == 0 or count == len(names):
            return examples, []
        kept = set(random.Random(f"{self.config.hparams.seed}/holdout").sample(names, count))
        held = [e for e in examples if e.id.rsplit("#", 1)[0] in kept]
        return [e for e in examples if e.id.rsplit("#", 1)[0] not in kept], held

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
            self.config.hparams.loss == "kl",
        ]
        if self.config.verifier.revision is not None:
            what.append(self.config.verifier.revision)
        if engine.ranks > 1:
            what.append(engine.ranks)  # each keeps its own sequences, in bits of its own
        digest = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]
        return str(self.config.cache_features / digest)

    def _feature_tokens(self) -> int:
        """Tokens whose features (and final states, for kl) fit ``feature_gib``."""
        width = self.drafter.num_features
        if self.config.hparams.loss == "kl":
            width += self.drafter.target_hidden_size or self.drafter.hidden_size
        width *= 4 if self.config.engine.dtype == "float32" else 2
        assert self.config.feature_gib is not None
        return int(self.config.feature_gib * 2**30) // width

    def _resume(self) -> int:
        state = self.folder.state()
        if state is None:
            self.folder.cut_metrics(0)
            return 0
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
        self.reporter.say(f"resuming at step {state['step']}")
        return state["step"]

    def _save(self, step: int) -> None:
        started = time.monotonic()
        self.engine.call("save_state", str(self.folder.new_state_file(step)))
        self.folder.commit_state(
            step,
            {"bad": self.bad, "seconds": self.seconds, "examples": self.examples_digest},
        )
        self.next_save = time.monotonic() + save_pause(
            60 * self.config.save_minutes, time.monotonic() - started
        )

    def _extract(self, examples: dict[str, Example], keep: list[str]) -> None:
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
        tokens = 0
        with self.reporter.progress("extracting features", unit="tokens") as update:
            total = sum(len(ids) for ids in wanted.values())
            for key, problem in self.engine.extract(wanted):
                tokens += len(wanted[key])
                update(tokens, total)
                if problem:
                    self._ban(key, problem, len(wanted))
                if self.stop:
                    raise self._stopped()
        self.seconds["extract"] += time.monotonic() - started

    def _ban(self, key: str, reason: str, of: int) -> None:
        self.bad[key] = reason
        self.reporter.say(f"skipping {key}: {reason}")
        if len(self.bad) > max(1, self.config.hparams.max_bad * of):
            raise ValueError(
                f"{len(self.bad)} of {of} sequences had to be skipped, the last because {reason}; "
                f"training stops (--max-bad {self.config.hparams.max_bad})"
            )

    def _stopped(self) -> Interrupted:
        """Saves what a resumed run needs."""
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
                            self._ban(key, f"non-finite loss at step {row['step']}", len(examples))
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
        held = self._evaluate(total, held_keys) if held_keys else None
        if held is not None:
            held |= self._workload()
        summary = {
            "verifier": str(self.config.verifier),
            "steps": total,
            "train_sequences": num_train,
            "skipped": self.bad,
            "minutes": {name: s / 60 for name, s in self.seconds.items()},
            "tau_heldout": held,
            "versions": versions(),
            "config": self.folder.config,
        }
        extra = {TRAINING_FILE: json.dumps(summary, indent=2) + "\n"}
        self.engine.call("export", str(self.config.output), self.config.fmt, extra)
        curves = self.folder.draw_curves()
        self.reporter.finished(self.config.output, summary, curves)
        return summary
