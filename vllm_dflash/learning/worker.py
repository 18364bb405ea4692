"""The worker's half of learning while serving: the training session, beside the drafter that serves."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_dflash import checkpoint
from vllm_dflash.config import DrafterConfig
from vllm_dflash.learning.versions import copy_version
from vllm_dflash.modeling.drafter import Drafter
from vllm_dflash.serving.worker.features.verifier import verifier_dtype
from vllm_dflash.training.config import Hyperparameters
from vllm_dflash.training.ranks import Failure, Ranks
from vllm_dflash.training.session import TrainingSession

#: A constant rate; the average over the last steps is what is compared and served.
_HPARAMS = Hyperparameters(
    num_anchors=64, batch_size=1, warmup_ratio=0.0, min_lr=1.0, ema_decay=0.995
)
#: Anchors between two pauses: as many as there is time for. Each part computes its context anew.
_FEWEST_ANCHORS, _MOST_ANCHORS = 16, 64
#: Parameters of a drafter's layers that its context's K/V are made with, beside ``fc`` and ``hidden_norm``.
_CONTEXT = (".self_attn.k_proj.", ".self_attn.v_proj.", ".self_attn.k_norm.")
_VOCABULARY = ("embed_tokens.", "lm_head.")


def run(worker: Any, command: str, *args: Any) -> Any:
    """In a worker, called by the engine core: ``LearningSession.<command>(*args)``.

    Returns:
        Its answer; a ``Failure`` in place of a ValueError, which an executor would make a RuntimeError of.
    """
    session = worker.__dict__.get("_vllm_dflash_learning")
    if session is None:
        from vllm_dflash.serving.worker.start import tensor_parallel_group

        ranks = Ranks(tensor_parallel_group())
        session = worker.__dict__["_vllm_dflash_learning"] = LearningSession(
            worker.model_runner, ranks
        )
    if command not in session.COMMANDS:
        raise ValueError(f"unknown worker command {command!r}; known: {session.COMMANDS}")
    try:
        with session.ranks.together(), torch.inference_mode(False):
            return getattr(session, command)(*args)
    except ValueError as error:
        return Failure.of(error, session.ranks.rank)


class LearningSession(TrainingSession):
    """A training session whose work is done in parts, and whose drafter can be put in the server's place."""

    COMMANDS = (
        "start",
        "register",
        "watch",
        "collect",
        "keep",
        "release",
        "learn",
        "count",
        "advance",
        "write",
        "written",
        "swap",
        "restore",
        "load",
    )

    def __init__(self, runner: Any, ranks: Ranks | None = None) -> None:
        super().__init__(runner, ranks)
        self.everything = False
        self._work: Iterator[Any] = iter(())
        self._seconds = 0.0
        self._writer = threading.Thread()
        self._reserved: Tensor | None = None
        self._write_error: Exception | None = None
        #: Weights of the drafter that serves, in fp32 on the learner's device.
        self._serving: dict[str, Tensor] = {}
        self._draft_tokens = torch.empty(0, dtype=torch.long)

    def start(self, which: str, lr: float) -> None:
        """Makes the learner, of the drafter that serves.

        Args:
            which: weights are learned, as ``dflash_learn_weights`` says.
        """
        spec = self.source.vllm_config.speculative_config
        path, tokens = str(spec.model), spec.num_speculative_tokens
        config = DrafterConfig.from_dict(checkpoint.read_config(path))
        self.given, self.config = path, config
        self.everything = which == "all"
        if which == "none":
            self._serving, self._draft_tokens = self._loaded(path)
            return
        # Blocks as wide as they are served.
        width = tokens + (not config.sample_from_anchor)
        config = config.with_(draft_block_size=width)
        self.begin(
            config.to_dict("zlab"),
            replace(_HPARAMS, lr=lr).as_dict(),
            None,
            total_steps=1,
            init_from=path,
            cache_dir=None,
            layout={"anchors_in_flight": _FEWEST_ANCHORS},
        )
        # A long prompt's rows would take memory of the device that nobody counts on.
        self.recorder.on_host = True
        learner = self._learner()
        for name, parameter in learner.drafter.named_parameters():
            if name.startswith(_VOCABULARY) or (not self.everything and _of_context(name)):
                parameter.requires_grad_(False)
        self._serving = {n: w.clone() for n, w in learner.weights().items()}
        self._draft_tokens = learner.head.checkpoint_tensors().get("d2t", self._draft_tokens)
        self._reserve()

    def _loaded(self, path: str) -> tuple[dict[str, Tensor], Tensor]:
        """A checkpoint's weights, and its draft vocabulary as ``d2t`` (empty for none)."""
        weights = checkpoint.load_weights(path, self.config)
        weights.pop("t2d", None)
        return weights, weights.pop("d2t", torch.empty(0)).long()

    def _reserve(self) -> None:
        """Holds what learning will take of the device while vLLM measures what is left, until
        :meth:`release`."""
        learner = self._learner()
        sizes = [(p.numel(), p.requires_grad) for p in learner.drafter.parameters()]
        # Copies while candidates are compared; gradients and the optimizer's moments of what is learned.
        planned = sum(n * (4 + (12 if learned else 0)) for n, learned in sizes)
        if learner.device.type != "cpu":
            self._reserved = torch.empty(planned, dtype=torch.uint8, device=learner.device)

    def release(self) -> None:
        """vLLM has laid out its memory."""
        self._reserved = None

    def keep(self, keys: list[str]) -> None:
        super().keep(keys)
        kept = set(keys)
        self.examples = {k: e for k, e in self.examples.items() if k in kept}
        self._foreign &= kept

    # -- work in parts ---------------------------------------------------------------------------

    def learn(self, steps: list[tuple[int, list[str]]]) -> None:
        """Takes up training steps, each over the sequences named."""
        self._work = self._training(steps)

    def count(self, which: str, keys: list[str]) -> None:
        """Takes up the counting of drafts and accepted tokens (see :meth:`advance`) of a drafter.

        Args:
            which: ``served``, ``candidate``, or a version's folder.
        """
        self._work = self._counting(which, keys)

    def advance(self, seconds: float) -> Any:
        """Does a part of the work, and more while there is time; its result, None while there is more.

        With several ranks it is one part, a whole step, whose sums all must reach together.
        """
        self._seconds, end = seconds, time.monotonic() + seconds
        while True:
            started = time.monotonic()
            try:
                next(self._work)
            except StopIteration as done:
                return done.value
            now = time.monotonic()
            if self.ranks.size > 1 or now + (now - started) > end:
                return None

    def _training(
        self, steps: list[tuple[int, list[str]]]
    ) -> Generator[None, None, list[dict[str, Any]]]:
        learner, metrics = self._learner(), []
        learner.drafter.zero_grad(set_to_none=True)
        for step, keys in steps:
            samples = [self._sample(k) for k in self._own(keys)]
            started, most = time.monotonic(), learner.layout.anchors_in_flight or 0
            # One that is not full says little of one that is.
            timed = (
                self.ranks.size == 1 and sum(len(s.anchor_candidates()) for s in samples) >= most
            )
            for result in learner.step_by_parts(step, samples):
                if result is not None:
                    metrics.append({"anchors": result["anchors"], "bad": result["bad"]})
                elif self.ranks.size == 1:
                    if timed:
                        fit = anchors_that_fit(most, time.monotonic() - started, self._seconds)
                        learner.layout = replace(learner.layout, anchors_in_flight=fit)
                        timed = False
                    yield
            yield
        return metrics

    def _counting(
        self, which: str, keys: list[str]
    ) -> Generator[None, None, dict[str, tuple[int, int, int]]]:
        learner, dtype = self._learner(), verifier_dtype(self.verifier)
        drafter = self._drafter_of(which, dtype)
        own = {}
        for key in keys:
            if key not in self._foreign:
                sample, tokens = self._sample(key), learner.num_draft_tokens
                if self.ranks.size > 1:  # which must all pause together
                    own[key] = learner.accept(drafter, sample, tokens, dtype)
                else:
                    own[key] = yield from learner.accept_by_parts(
                        drafter,
                        sample,
                        tokens,
                        dtype,
                        learner.layout.anchors_in_flight or _MOST_ANCHORS,
                    )
            yield
        out = {}
        for part in self.ranks.gather(own):
            for key, got in part.items():
                first = got.accepted_per_position[0] if got.accepted_per_position else 0
                out[key] = (got.num_drafts, got.num_accepted, first)
        return out

    def _drafter_of(self, which: str, dtype: torch.dtype) -> Drafter:
        learner = self._learner()
        drafter = learner.serving_drafter(dtype)
        if which != "candidate":
            weights = self._serving
            if which != "served":
                weights = checkpoint.load_weights(which, learner.config)
            own = dict(drafter.named_parameters())
            with torch.no_grad():
                for name, weight in weights.items():
                    if name in own:
                        own[name].copy_(weight)
        return drafter

    # -- the drafter that serves -----------------------------------------------------------------

    def write(self, path: str) -> None:
        """Begins to write the learner's drafter as a checkpoint; a thread does, :meth:`written` tells."""

        if self.learner is not None:
            self._check_ranks()
        self._write_error = None
        if self.ranks.rank != 0:
            return
        if self._writer.is_alive():
            self._writer.join()
        if self.learner is None:
            self._write_by(lambda: copy_version(Path(self.given), Path(path)))
            return
        alone = copy.copy(self)
        alone.ranks = Ranks()  # the thread must not talk to other ranks
        self._write_by(lambda: alone.export(path, "zlab"))

    def _write_by(self, write: Callable[[], Any]) -> None:
        def run() -> None:
            try:
                write()
            except Exception as error:  # raised again by written()
                self._write_error = error

        self._writer = threading.Thread(target=run, name="dflash-learn-write", daemon=True)
        self._writer.start()

    def written(self, wait: float) -> bool | str:
        """Whether it is written, after so many seconds at most; in words why the disk did not take it."""
        if self._writer.ident is not None:
            self._writer.join(wait)
        if isinstance(self._write_error, OSError):
            return str(self._write_error)
        if self._write_error is not None:
            raise self._write_error
        return not self._writer.is_alive()

    def swap(self) -> None:
        """Puts the learner's weights in the place of those that serve."""
        weights = {n: w.clone() for n, w in self._learner().weights().items()}
        self._put(weights)
        self._serving = weights

    def restore(self) -> None:
        """The learner goes back to the weights that serve."""
        self._learn_from(self._serving)

    def load(self, path: str) -> None:
        """A version serves, and learning goes on from it.

        Raises:
            ValueError: it is of another drafter, or not finite; what serves stays.
        """
        config = DrafterConfig.from_dict(checkpoint.read_config(path))
        for field in ("num_hidden_layers", "target_layer_ids"):
            if getattr(config, field) != getattr(self.config, field):
                raise ValueError(f"{path} has another {field} than the drafter {self.given}")
        loaded, tokens = self._loaded(path)
        if not torch.equal(tokens, self._draft_tokens):
            raise ValueError(f"{path} has another draft vocabulary than the drafter {self.given}")
        for name, weight in self._serving.items():
            if name not in loaded or loaded[name].shape != weight.shape:
                raise ValueError(
                    f"{path} is no version of the drafter {self.given}: {name} differs"
                )
            if not loaded[name].isfinite().all():
                raise ValueError(f"{path} has NaN or infinity in {name}")
        weights = {n: loaded[n].to(self._serving[n]) for n in self._serving}
        self._put(weights)
        self._serving = weights
        if self.learner is not None:
            self._learn_from(weights)

    def _learn_from(self, weights: dict[str, Tensor]) -> None:
        learner = self._learner()
        self._work = iter(())
        learner.drafter.zero_grad(set_to_none=True)
        learner.load_drafter(weights)
        for optimizer in learner.optimizers.values():
            optimizer.state.clear()

    def _put(self, weights: dict[str, Tensor]) -> None:
        from vllm_dflash.serving.worker.reload import reload_weights

        new = {n: w for n, w in weights.items() if not n.startswith(_VOCABULARY)}
        dtype = verifier_dtype(self.verifier)
        context = any(
            not torch.equal(w.to(dtype), self._serving[n].to(dtype))
            for n, w in new.items()
            if _of_context(n)
        )
        if context and self.learner is not None and not self.everything:
            raise ValueError(
                "this version has other context weights than the one that serves; start the server with "
                'it, or with "dflash_learn_weights": "all"'
            )
        reload_weights(self.source, self.runner, new, context)


def anchors_that_fit(anchors: int, took: float, seconds: float) -> int:
    """Of a step's next parts, where a part of so many has taken so long and is to take so long at most."""
    if took > seconds:
        return max(anchors // 2, _FEWEST_ANCHORS)
    return min(2 * anchors, _MOST_ANCHORS) if took < seconds / 4 else anchors


def _of_context(name: str) -> bool:
    """Whether a parameter takes part in making the context's K/V."""
    return f".{name}".startswith((".fc.", ".hidden_norm.")) or any(k in name for k in _CONTEXT)
