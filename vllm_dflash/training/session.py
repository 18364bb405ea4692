"""The worker's half of training: features from the seam, the learner on the same device.

Commands arrive through ``collective_rpc("vllm_dflash", (command, ...))``; arguments and results are plain
data, so that the same calls work for an engine in another process.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_dflash import checkpoint
from vllm_dflash.config import CheckpointFormat, DrafterConfig
from vllm_dflash.modeling.acceptance import Acceptance
from vllm_dflash.serving.worker.features.recorder import BrokenFeatures, FeatureRecorder
from vllm_dflash.serving.worker.features.source import feature_source
from vllm_dflash.serving.worker.features.verifier import (
    FinalStates,
    VerifierLogits,
    shared_weights,
    verifier_dtype,
)
from vllm_dflash.training.config import Hyperparameters, StepLayout
from vllm_dflash.training.feature_store import SHARD_BYTES, FeatureStore
from vllm_dflash.training.generated import GeneratedFeatures, ReadFeatures
from vllm_dflash.training.host_memory import on_device
from vllm_dflash.training.learner import Learner, Sample, SharedHead
from vllm_dflash.training.piece_store import PieceStore
from vllm_dflash.training.plan import content_key, owner
from vllm_dflash.training.prefixes import Piece, rows_wanted
from vllm_dflash.training.ranks import Ranks, checksum

#: The driver decides what is kept (``keep``); the store need not.
_UNBOUNDED = 2**62


class TrainingSession:
    """Lives in a vLLM worker, beside the verifier it learns from.

    Under tensor parallelism there is one in each worker, and all get the same commands. A sequence belongs to
    one rank, which keeps its features, trains on it and evaluates it; gradients and metrics are summed.
    """

    COMMANDS: tuple[str, ...] = (
        "begin",
        "record_responses",
        "watch_responses",
        "take_response",
        "end_responses",
        "recorded",
        "check_kl",
        "drafting",
        "register",
        "watch",
        "collect",
        "flush",
        "keep",
        "stored",
        "digest",
        "train",
        "walk",
        "evaluate",
        "save_state",
        "load_state",
        "export",
    )

    def __init__(self, runner: Any, ranks: Ranks | None = None) -> None:
        """
        Args:
            runner: vLLM's model runner of either version.

        Raises:
            ValueError: what drafts in it is not ours.
        """
        self.source = feature_source(runner)
        self.runner, self.verifier = runner, runner.get_model()
        self.ranks = ranks or Ranks()
        self.recorder = FeatureRecorder()
        self.source.recorder = self.recorder
        self.examples: dict[str, tuple[list[int], list[bool], str]] = {}
        self._foreign: set[str] = set()
        self.learner: Learner | None = None
        self.features = PieceStore(FeatureStore(_UNBOUNDED))
        #: Whole sequences by their tokens, in the cache folder.
        self.cache: FeatureStore | None = None
        #: Those recorded while responses were generated.
        self.generated: GeneratedFeatures | ReadFeatures | None = None
        self._walked: dict[str, Acceptance] = {}
        self._planned: dict[str, Piece] = {}
        self._watched: dict[str, int] = {}
        self._own_embedding: dict[str, Tensor] = {}
        self._mask_embedding: Tensor | None = None
        #: The verifier layers of the features, in their order.
        self.layers: list[int] = []

    def drafting(self, enabled: bool) -> None:
        """Whether the engine's own (untrained) drafter drafts; off while features are recorded."""
        self.source.drafting = enabled

    def check_kl(self, vocab_size: int) -> None:
        """ValueError where the kl loss has no targets with this verifier."""
        _, lm_head = shared_weights(self.verifier, vocab_size)
        VerifierLogits(self.verifier, lm_head, None)

    def begin(
        self,
        drafter_config: dict[str, Any],
        hparams: dict[str, Any],
        draft_token_ids: list[int] | None,
        total_steps: int,
        init_from: str | None,
        cache_dir: str | None,
        layout: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Makes the learner.

        Args:
            drafter_config: a z-lab ``config.json``.
            hparams: ``Hyperparameters`` as a dict.
            draft_token_ids: verifier ids of the draft vocabulary; ``init_from`` brings its own.
            total_steps: steps of the whole run, which the learning rate depends on.
            init_from: checkpoint folder to start from.
            cache_dir: folder for features on disk, or None.
            layout: ``StepLayout`` as a dict; None for its defaults.
        """
        config = DrafterConfig.from_dict(drafter_config)
        self.layers = sorted(set(config.target_layer_ids))
        hp = Hyperparameters.from_dict(hparams)
        # A drafter may know fewer tokens than the verifier has rows; it reads all and drafts its own.
        rows = self.source.vllm_config.model_config.get_vocab_size()
        embedding, lm_head = shared_weights(self.verifier, rows)
        lm_head = lm_head[: config.vocab_size]
        ids = torch.tensor(draft_token_ids) if draft_token_ids is not None else None
        weights: dict[str, Tensor] = {}
        if init_from is not None:
            start = config
            if config.head is not None and DrafterConfig.from_pretrained(init_from).head is None:
                start = config.with_(head=None)
            weights = checkpoint.load_weights(init_from, start)
        if "d2t" in weights:
            ids = weights["d2t"] + torch.arange(len(weights["d2t"]))
        own_vocab = config.has_own_vocab_weights
        if "embed_tokens.weight" in weights and not own_vocab:
            embedding = weights["embed_tokens.weight"].to(embedding.device)
            self._own_embedding = {"embed_tokens.weight": embedding}
        own_lm_head = None if own_vocab else weights.get("lm_head.weight")
        self._mask_embedding = weights.pop(checkpoint.MASK_EMBEDDING, None)
        if self._mask_embedding is not None:
            self._mask_embedding = self._mask_embedding.to(embedding)
        head = SharedHead(embedding, lm_head, ids, own_lm_head, self._mask_embedding)
        final = verifier_logits = None
        if hp.loss_kind.needs_final_states:
            final = self.recorder.final_states or FinalStates(self.runner)
            verifier_logits = VerifierLogits(
                self.verifier, head.verifier_lm_head, head.draft_token_ids
            )
        self.recorder.final_states = final
        self.learner = Learner(
            config,
            hp,
            head,
            total_steps,
            embedding.device,
            self.ranks,
            verifier_logits,
            StepLayout(**(layout or {})),
        )
        if weights:
            self.learner.load_drafter(weights)
        folder = Path(cache_dir) if cache_dir else None
        if folder is not None and self.ranks.size > 1:
            folder /= f"rank-{self.ranks.rank}"
        self.features = PieceStore(FeatureStore(_UNBOUNDED))
        self.cache = FeatureStore(0, folder) if folder is not None else None
        return {
            "parameters": sum(p.numel() for p in self.learner.drafter.parameters()),
            "device": str(embedding.device),
            "autocast": self.learner.hparams.autocast,
            "threads": torch.get_num_threads(),
        }

    # -- features --------------------------------------------------------------------------------

    def record_responses(
        self,
        folder: str,
        layers: list[int],
        final_states: bool,
        max_len: int,
        block_size: int,
        num_blocks: int,
    ) -> None:
        """From now on features are recorded while responses are generated (:class:`GeneratedFeatures`).

        Args:
            folder: keeps them.
            layers: the verifier layers, ascending.
            final_states: whether to record those too, for the kl loss.
        """
        if final_states:
            self.recorder.final_states = FinalStates(self.runner)
        if self.ranks.rank != 0:
            self.generated = ReadFeatures(Path(folder))
            return
        store = FeatureStore(SHARD_BYTES, Path(folder))
        self.generated = GeneratedFeatures(
            self.recorder, store, layers, max_len, block_size, num_blocks
        )

    def _generated(self) -> GeneratedFeatures | ReadFeatures:
        if self.generated is None:
            raise ValueError("responses are not recorded: call record_responses first")
        return self.generated

    def watch_responses(self, prompts: dict[str, list[int]], max_tokens: int) -> None:
        self._generated().watch(prompts, max_tokens)

    def take_response(self, key: str, response: list[int]) -> None:
        self._generated().take(key, response)

    def end_responses(self) -> None:
        self._generated().end()

    def recorded(self, keys: list[str]) -> list[str]:
        """Those of the keys whose features were recorded while their responses were generated."""
        if self.generated is None:
            return []
        return [k for k in keys if self._content(k) in self.generated.store]

    def register(
        self,
        examples: list[tuple[str, list[int], list[bool], str]],
        owners: dict[str, int] | None = None,
    ) -> None:
        """Tells the session about examples: key, token ids, loss mask, source; and the ranks that they belong
        to, None for those of :func:`~vllm_dflash.training.plan.owner`."""
        for key, token_ids, loss_mask, source in examples:
            self.examples[key] = (list(token_ids), list(loss_mask), source)
            rank = owner(token_ids, self.ranks.size) if owners is None else owners[key]
            if rank != self.ranks.rank:
                self._foreign.add(key)

    def _own(self, keys: Iterable[str]) -> list[str]:
        return [k for k in keys if k not in self._foreign]

    def watch(self, pieces: dict[str, tuple[str | None, int, int]]) -> None:
        """Asks for the rows of sequences that will be submitted: their pieces (:class:`Piece`)."""
        self._planned = {key: Piece(*piece) for key, piece in pieces.items()}
        # Of other ranks' sequences the prefixes that this rank's read.
        self._watched = rows_wanted(self._planned, self._own(self._planned))
        self.recorder.watch(self._watched)

    def collect(self, ends: dict[str, int]) -> dict[str, str]:
        """Moves recorded features to the store; returns the keys that failed, with the reason.

        Args:
            ends: rows of each sequence, at most those that were watched.

        Raises:
            BrokenFeatures: not this sequence failed but the extraction.
        """
        failed = {}
        for key, end in ends.items():
            if key not in self._watched:
                continue
            piece, rows = self._planned[key], min(end, self._watched[key])
            token_ids = self.examples[key][0] if key in self.examples else None
            try:
                features, final = self.recorder.take(key, rows, self.layers, token_ids, piece.start)
            except BrokenFeatures:
                raise
            except ValueError as error:
                failed[key] = str(error)
                continue
            # Recorded under inference mode; autograd needs an ordinary tensor.
            final = None if final is None else final.clone()
            self.features.put(key, piece._replace(end=end), features.clone(), final)
        return failed

    def flush(self) -> None:
        """Ends an extraction; whole sequences go to the cache folder, where there is one."""
        done = self._own(self._planned)
        for key in done:
            if self._planned[key].start == self._planned[key].end:
                self.features.put(key, self._planned[key], None)
        if self.cache is not None:
            for key in done:
                if key in self.features:
                    self.cache.put(self._content(key), *self.features.get(key))
            self.cache.flush()
        self._planned, self._watched = {}, {}

    def keep(self, keys: list[str]) -> None:
        """Frees the memory of all features but these."""
        self.features.keep(self._own(keys))

    def stored(self, keys: list[str]) -> list[str]:
        """Those of this rank's keys whose features are at hand, in memory or in the cache folder."""
        return [k for k in self._own(keys) if k in self.features or self._on_disk(k) is not None]

    def _content(self, key: str) -> str:
        return content_key(self.examples[key][0])

    def _on_disk(self, key: str) -> FeatureStore | None:
        stores = (self.generated.store if self.generated is not None else None, self.cache)
        content = self._content(key)
        return next((s for s in stores if s is not None and content in s), None)

    def _rows(self, key: str) -> tuple[Tensor, Tensor | None]:
        if key not in self.features and (store := self._on_disk(key)) is not None:
            features, final = store.get(self._content(key))
            self.features.put(key, Piece(None, 0, len(features)), features, final)
        return self.features.get(key)

    def digest(self, keys: list[str]) -> dict[str, str]:
        """SHA-256 of each sequence's features, to compare bits across runs and ways of recording."""
        out = {}
        for key in self._own(keys):
            features, _ = self._rows(key)
            out[key] = hashlib.sha256(features.float().cpu().numpy().tobytes()).hexdigest()
        return out

    def _sample(self, key: str) -> Sample:
        token_ids, loss_mask, _ = self.examples[key]
        features, final = self._rows(key)
        return Sample(key, token_ids, loss_mask, features, final)

    # -- learning --------------------------------------------------------------------------------

    def _learner(self) -> Learner:
        if self.learner is None:
            raise ValueError("the session has no drafter yet: call begin first")
        return self.learner

    def train(self, steps: list[tuple[int, list[str]]]) -> list[dict[str, Any]]:
        """Runs the given steps, each over the sequences named; returns their metrics."""
        learner = self._learner()
        samples = on_device(
            [keys for _, keys in steps],
            lambda keys: [self._sample(k) for k in self._own(keys)],
            learner.device,
        )
        return [learner.step(step, mine) for (step, _), mine in zip(steps, samples, strict=True)]

    def walk(self, keys: list[str], num_draft_tokens: int) -> None:
        """Goes over sequences for the next :meth:`evaluate`; their features may be freed then."""
        learner = self._learner()
        dtype = verifier_dtype(self.verifier)
        drafter = learner.serving_drafter(dtype)
        for part in self.ranks.gather(
            {
                key: learner.accept(drafter, self._sample(key), num_draft_tokens, dtype)
                for key in self._own(keys)
            }
        ):
            self._walked |= part

    def evaluate(
        self, keys: list[str], num_draft_tokens: int, step_by_step: bool = False
    ) -> dict[str, Any]:
        """Teacher-forced greedy acceptance, pooled and by source, in the serving dtype; step by step with the
        tokens that each step of a sequence delivered."""
        if rest := [k for k in keys if k not in self._walked]:
            self.walk(rest, num_draft_tokens)
        accepted, self._walked = self._walked, {}
        total, by_source, per_example = Acceptance(), OrderedDict[str, Acceptance](), []
        for key in keys:
            got = accepted[key]
            total.merge(got)
            by_source.setdefault(self.examples[key][2], Acceptance()).merge(got)
            per_example.append(got.tau)
        return {
            **total.as_dict(),
            "mean_of_examples": sum(per_example) / max(len(per_example), 1),
            "sources": {name: a.as_dict() for name, a in by_source.items()},
            **({"delivered": {k: accepted[k].delivered for k in keys}} if step_by_step else {}),
        }

    # -- state -----------------------------------------------------------------------------------

    def _check_ranks(self) -> None:
        """RuntimeError when the ranks' weights differ in a bit."""
        if self.ranks.size == 1:
            return
        learner = self._learner()
        digests = self.ranks.gather(
            checksum((*learner.drafter.state_dict().values(), *learner.weights().values()))
        )
        if len(set(digests)) > 1:
            raise RuntimeError(
                f"the drafter's weights differ between ranks ({', '.join(d[:8] for d in digests)}); "
                "nothing was written. Resume from the last saved state, and report it"
            )

    def save_state(self, file: str) -> None:
        """Writes what a resumed run needs; one rank does, with the optimizer state of all."""
        self._check_ranks()
        self._learner().save_state(Path(file))

    def load_state(self, file: str) -> None:
        self._learner().load_state(Path(file))

    def export(
        self, path: str, fmt: CheckpointFormat, extra_files: dict[str, str] | None = None
    ) -> None:
        """Writes the drafter as a checkpoint (atomic)."""
        self._check_ranks()
        if self.ranks.rank != 0:
            return
        learner = self._learner()
        weights: dict[str, Tensor] = (
            learner.head.checkpoint_tensors() | self._own_embedding | learner.weights()
        )
        if self._mask_embedding is not None:
            weights[checkpoint.MASK_EMBEDDING] = self._mask_embedding
        checkpoint.save_drafter(path, learner.config, weights, fmt, extra_files)
