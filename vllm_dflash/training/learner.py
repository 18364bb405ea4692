"""The training step and teacher-forced evaluation. Plain PyTorch: no vllm, no I/O but safetensors.

Everything random is derived from (seed, step), and the learning rate from the step, so that a
resumed run needs only weights and optimizer state to go on bit for bit.

Shape suffixes as in modeling/drafter.py; K = drafted positions of a block.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_dflash.config import DrafterConfig
from vllm_dflash.environment import cpu_has_bfloat16
from vllm_dflash.files import atomic_path
from vllm_dflash.modeling.acceptance import Acceptance, walk
from vllm_dflash.modeling.blocks import BlockLayout
from vllm_dflash.modeling.dflash2 import (
    CandidateSelector,
    greedy_walk,
    multiplied_out,
    top_candidates,
    transition_scores,
)
from vllm_dflash.modeling.drafter import Drafter
from vllm_dflash.modeling.losses import BlockLoss, block_loss, default_gamma, position_weights
from vllm_dflash.training.config import Hyperparameters, StepLayout
from vllm_dflash.training.muon import Muon
from vllm_dflash.training.ranks import Ranks
from vllm_dflash.training.selector import factors, selector_loss
from vllm_dflash.training.sharding import freeze, shards

#: Anchors whose blocks are drafted in one evaluation pass.
EVAL_ANCHORS = 256


@dataclass(frozen=True)
class Sample:
    """One conversation as the learner sees it.

    Attributes:
        key: name in messages.
        token_ids: all tokens.
        loss_mask: True where the verifier generated the token.
        features_TF: verifier features of positions 0..T-1; rows of the last token may be absent.
        final_TH: the verifier's final hidden states, for the kl loss only.
    """

    key: str
    token_ids: Sequence[int]
    loss_mask: Sequence[bool]
    features_TF: Tensor
    final_TH: Tensor | None = None

    def anchor_candidates(self) -> list[int]:
        """Where served blocks can be anchored: generated tokens with a generated successor."""
        mask = self.loss_mask
        last = min(len(mask) - 1, self.features_TF.shape[0] + 1)
        return [p for p in range(last) if mask[p] and mask[p + 1]]

    def response_spans(self) -> list[tuple[int, int]]:
        """Generated stretches as half-open ranges."""
        spans, start = [], None
        for p, generated in enumerate([*self.loss_mask, False]):
            if generated and start is None:
                start = p
            elif not generated and start is not None:
                spans.append((start, p))
                start = None
        return spans


class SharedHead:
    """The verifier's frozen embedding and lm_head, the latter cut to the draft vocabulary.

    Args:
        embedding_VH: the verifier's token embedding.
        lm_head_VH: its output projection.
        draft_token_ids: verifier ids of the draft vocabulary, ascending; None for all.
        own_lm_head: a drafter's own projection (rows as ``draft_token_ids``), where it brought one.
        mask_embedding: ``[H]``, what mask tokens are embedded as where it is not their row; not learned.

    A drafter of another width has both of its own and learns them; the draft vocabulary is still from here.
    """

    def __init__(
        self,
        embedding_VH: Tensor,
        lm_head_VH: Tensor,
        draft_token_ids: Tensor | None,
        own_lm_head: Tensor | None = None,
        mask_embedding: Tensor | None = None,
    ) -> None:
        self.embedding = embedding_VH.detach()
        self.mask_embedding = mask_embedding
        self.draft_token_ids = draft_token_ids
        head = lm_head_VH.detach()
        self.draft_index: Tensor | None = None
        if draft_token_ids is not None:
            draft_token_ids = draft_token_ids.to(head.device)
            self.draft_token_ids = draft_token_ids
            head = head[draft_token_ids].clone()
            self.draft_index = torch.full(
                (embedding_VH.shape[0],), -1, dtype=torch.int64, device=head.device
            )
            self.draft_index[draft_token_ids] = torch.arange(
                len(draft_token_ids), device=head.device
            )
        self.verifier_lm_head = head
        self.has_own_lm_head = own_lm_head is not None
        self.lm_head = head if own_lm_head is None else own_lm_head.to(head.device, head.dtype)

    def embed(self, drafter: Drafter, token_ids: Tensor) -> Tensor:
        """The drafter's input ``[..., H]`` for verifier token ids."""
        own = drafter.embed_tokens
        embeds = F.embedding(token_ids, self.embedding if own is None else own.weight)
        if self.mask_embedding is not None:
            is_mask = (token_ids == drafter.config.mask_token_id).unsqueeze(-1)
            embeds = torch.where(is_mask, self.mask_embedding.to(embeds), embeds)
        return embeds

    def projection(self, drafter: Drafter) -> Tensor:
        """The output projection ``[V, H]``; a parameter where the drafter learns its own."""
        return self.lm_head if drafter.lm_head is None else drafter.lm_head.weight

    def logits(self, drafter: Drafter, hidden: Tensor) -> Tensor:
        """Draft-vocabulary logits ``[..., V]`` of the drafter's hidden states ``[..., H]``."""
        weight = self.projection(drafter).to(hidden.dtype)
        # One GEMM over all rows: for a strided view F.linear copies the weight once per batch row.
        flat = F.linear(hidden.reshape(-1, hidden.shape[-1]), weight)
        return flat.view(*hidden.shape[:-1], -1)

    def labels(self, token_ids: Tensor) -> Tensor:
        """Draft-vocabulary ids of verifier tokens, -1 where the draft vocabulary lacks them."""
        if self.draft_index is not None:
            return self.draft_index[token_ids]
        return torch.where(token_ids < self.verifier_lm_head.shape[0], token_ids, -1)

    def tokens(self, draft_ids: Tensor) -> Tensor:
        """Verifier tokens of draft-vocabulary ids."""
        return draft_ids if self.draft_token_ids is None else self.draft_token_ids[draft_ids]

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """``lm_head.weight`` and ``d2t`` (offsets, as speculators and vLLM store them).

        Empty where the drafter uses the verifier's own lm_head as it is.
        """
        if self.draft_token_ids is None:
            return {"lm_head.weight": self.lm_head} if self.has_own_lm_head else {}
        ids = self.draft_token_ids.cpu()
        return {"lm_head.weight": self.lm_head, "d2t": ids - torch.arange(len(ids))}


class Learner:
    """A drafter, its optimizer and the step.

    Args:
        config: of the drafter.
        hparams: of the training.
        head: embedding and output projection that drafter and verifier share.
        total_steps: of the whole run, for the learning rate.
        device: where the drafter is.
        ranks: the workers that train it together; each keeps the optimizer state of some parameters.
        verifier_logits: draft-vocabulary logits ``[N, V]`` that the verifier samples from, by its final
            states ``[N, H]``; for the kl loss. lm_head alone does not tell: verifiers cap and scale them.
        layout: how a step is run.
    """

    def __init__(
        self,
        config: DrafterConfig,
        hparams: Hyperparameters,
        head: SharedHead,
        total_steps: int,
        device: torch.device | str = "cpu",
        ranks: Ranks | None = None,
        verifier_logits: Callable[[Tensor], Tensor] | None = None,
        layout: StepLayout | None = None,
    ) -> None:
        if torch.device(device).type == "cpu" and not cpu_has_bfloat16():
            # It would be emulated, several times slower than fp32.
            hparams = replace(hparams, autocast="float32")
        self.config, self.hparams, self.head = config, hparams, head
        self.verifier_logits = verifier_logits
        self.layout = layout or StepLayout()
        self.total_steps = total_steps
        self.ranks = ranks or Ranks()
        self.device = torch.device(device)
        self.block_size = config.known_block_size("give it there to train this drafter")
        self.num_draft_tokens = self.block_size - (not config.sample_from_anchor)
        self.gamma = hparams.gamma or default_gamma(self.block_size)
        self.drafter = Drafter(config, factored=True)
        self.drafter.checkpoint_mlps(self.layout.checkpoint_mlps)
        generator = torch.Generator().manual_seed(hparams.seed)
        self.drafter.init_weights(generator=generator)
        self.drafter.to(self.device, torch.float32)
        self.drafter.init_vocab_weights(head.embedding[: config.vocab_size], head.verifier_lm_head)
        if hparams.codebooks == "free" and config.head is not None:
            # From the same start: what the codebooks would be made of.
            whole = self._multiplied_out(dict(self.drafter.state_dict()))
            self.drafter = Drafter(config).to(self.device)
            self.drafter.checkpoint_mlps(self.layout.checkpoint_mlps)
            self.drafter.load_state_dict(whole)
        self._from_scratch = True
        freeze(self.drafter)
        self._shards = shards(self.drafter, hparams.optimizer, self.ranks.size)
        self.optimizers = self._make_optimizers()
        self.ema: dict[str, Tensor] | None = None
        if hparams.ema_decay:
            self.ema = {n: p.detach().clone() for n, p in self.drafter.named_parameters()}

    def _make_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Those of this rank's part; a kind that has no parameter in it is absent."""
        hp = self.hparams
        params = dict(self.drafter.named_parameters())
        self._optimizer_names: dict[str, list[str]] = {}
        for name, kind in self._shards[self.ranks.rank].items():
            self._optimizer_names.setdefault(kind, []).append(name)
        out: dict[str, torch.optim.Optimizer] = {}
        for kind, names in self._optimizer_names.items():
            names.sort(key=lambda n: params[n].dim() < 2)  # as the optimizer numbers them: by group
            matrices = [params[n] for n in names if params[n].dim() >= 2]
            vectors = [params[n] for n in names if params[n].dim() < 2]
            options: dict[str, Any] = {"lr": hp.lr, "weight_decay": hp.weight_decay}
            if kind == "muon":
                out[kind] = Muon(matrices, getattr(torch, hp.autocast), **options)
            else:
                groups: list[dict[str, Any]] = []
                if matrices:
                    groups.append({"params": matrices})
                if vectors:
                    groups.append({"params": vectors, "weight_decay": 0.0})
                out[kind] = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True, **options)
        return out

    # -- one step --------------------------------------------------------------------------------

    def lr_at(self, step: int) -> float:
        """Linear warm-up, then cosine to ``min_lr``; a function of the step alone."""
        hp = self.hparams
        warm = max(1, round(hp.warmup_ratio * self.total_steps))
        if step < warm:
            return hp.lr * (step + 1) / warm
        done = (step - warm) / max(1, self.total_steps - warm)
        cosine = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
        return hp.lr * (hp.min_lr + (1 - hp.min_lr) * cosine)

    def pick_anchors(self, step: int, sample: Sample, times: int = 1) -> list[int]:
        """Random anchors of one sequence, ascending; a function of (seed, step, sequence).

        Args:
            times: how often ``num_anchors`` to take, if there are so many.
        """
        candidates = sample.anchor_candidates()
        rng = random.Random(f"{self.hparams.seed}/{step}/{sample.key}")
        count = min(times * self.hparams.num_anchors, len(candidates))
        return sorted(rng.sample(candidates, count))

    def halves_blocks(self, step: int, sample: Sample) -> bool:
        """Whether a step trains on half blocks of a sequence, at twice the anchors.

        A young drafter gets a block's first tokens wrong, and what stands behind a wrong token is never
        accepted. So it learns the first half from twice as many places first, for the same work. Where a
        response has no more places there is nothing to gain, and a trained drafter is past that.
        """
        early = self._from_scratch and step < self.hparams.half_blocks * self.total_steps
        places = len(sample.anchor_candidates())
        return early and self.block_size >= 4 and places >= 2 * self.hparams.num_anchors

    def step(self, step: int, samples: Sequence[Sample]) -> dict[str, Any]:
        """One optimizer step over the samples of all ranks, which end with the same weights.

        Args:
            step: decides anchors and learning rate.
            samples: this rank's part of the step, maybe nothing.

        Returns:
            Metrics of the whole step; ``bad`` names the sequences that made loss or gradients non-finite,
            in which case the weights are as before.
        """
        *_, metrics = self.step_by_parts(step, samples)
        assert metrics is not None
        return metrics

    def step_by_parts(
        self, step: int, samples: Sequence[Sample]
    ) -> Iterator[dict[str, Any] | None]:
        """:meth:`step`, with a pause (None) behind each part of ``layout.anchors_in_flight`` anchors."""
        samples = [s for s in samples if s.anchor_candidates()]
        own = self._none()
        own["tokens"] = sum(s.features_TF.shape[0] for s in samples)
        own["keys"] = tuple(s.key for s in samples)
        halved = [self.halves_blocks(step, s) for s in samples]
        for times in (1, 2):
            some = [s for s, half in zip(samples, halved, strict=True) if half == (times == 2)]
            anchors = [self.pick_anchors(step, s, times) for s in some]
            for part in self._parts(some, anchors, times):
                figures = self._learn(*part, self.block_size // times)
                own |= {n: _added([own[n], more]) for n, more in figures.items()}
                yield None
        yield self._finish_step(step, own)

    def _finish_step(self, step: int, own: dict[str, Any]) -> dict[str, Any]:
        parts = self.ranks.gather(own)
        keys, bad = (sorted({k for p in parts for k in p.pop(n)}) for n in ("keys", "bad"))
        if not keys:
            return {"step": step, "anchors": 0, "bad": []}
        whole = {name: _added([p[name] for p in parts]) for name in parts[0]}
        weight = max(whole.pop("weight"), 1e-9)
        whole["loss"] /= weight
        lr = self.lr_at(step)
        grad_norm = float("nan")
        if not bad and math.isfinite(whole["loss"]):
            grad_norm = self._finish_gradients(weight)
        if math.isfinite(grad_norm):
            for optimizer in self.optimizers.values():
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.step()
            self._share_weights()
            self._update_ema(step)
        else:
            bad = bad or keys
        self.drafter.zero_grad(set_to_none=True)
        return {"step": step, "lr": lr, "grad_norm": grad_norm, "bad": bad, **whole}

    def _none(self) -> dict[str, Any]:
        """What of a step's figures no anchors give; each kind adds up."""
        none = [0] * self.num_draft_tokens
        figures = {"loss": 0.0, "weight": 0.0, "anchors": 0, "tokens": 0, "accepted": 0}
        return {**figures, "right": none, "valid": none, "keys": (), "bad": ()}

    def _parts(
        self, samples: Sequence[Sample], anchors: list[list[int]], times: int = 1
    ) -> Iterator[tuple[list[Sample], list[list[int]]]]:
        """Cuts a step into parts of ``times`` ``layout.anchors_in_flight``, sequence by sequence."""
        limit = times * (self.layout.anchors_in_flight or sum(map(len, anchors)))
        some: list[tuple[Sample, list[int]]] = []
        room = limit
        for sample, group in zip(samples, anchors, strict=True):
            while group:
                some.append((sample, group[:room]))
                room, group = room - len(group[:room]), group[room:]
                if room == 0:
                    yield [s for s, _ in some], [g for _, g in some]
                    some, room = [], limit
        if some:
            yield [s for s, _ in some], [g for _, g in some]

    def _backward(
        self, samples: Sequence[Sample], anchors: list[list[int]], block_size: int | None = None
    ) -> tuple[BlockLoss, Tensor]:
        """Adds the gradients of a part of a step, not yet divided by the step's weight.

        Returns:
            Its loss, and which positions are valid ``[A, K]``.
        """
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.hparams.autocast == "bfloat16"
        ):
            hidden_AKH, labels_AK, valid_AK = self._forward(samples, anchors, block_size)
            loss = block_loss(
                hidden_AKH,
                self.head.projection(self.drafter),
                labels_AK,
                valid_AK,
                loss=self.hparams.loss,
                gamma=self.gamma,
                alpha=self.hparams.alpha,
                verifier_logits=self._verifier_logits(samples, anchors, labels_AK.shape[1]),
                num_candidates=self._num_candidates,
            )
            if self._num_candidates:
                loss = self._with_selector(loss, samples, anchors, hidden_AKH, labels_AK, valid_AK)
        loss.total.backward()
        return loss, valid_AK

    @property
    def _num_candidates(self) -> int:
        return 0 if self.config.head is None else self.config.head.selector_top_k

    def _with_selector(
        self,
        loss: BlockLoss,
        samples: Sequence[Sample],
        anchors: list[list[int]],
        hidden_AKH: Tensor,
        labels_AK: Tensor,
        valid_AK: Tensor,
    ) -> BlockLoss:
        """The loss with the selector's added, each position weighted by the selector's own certainty; what is
        right is what the selector takes, as that is what is served."""
        ids = [s.token_ids[p] for s, group in zip(samples, anchors, strict=True) for p in group]
        anchors_A = torch.tensor(ids, device=labels_AK.device)
        ce_AK, found_AK, right_AK = selector_loss(
            self.drafter,
            self.head,
            hidden_AKH,
            anchors_A,
            labels_AK,
            valid_AK,
            loss.candidates_AKC,
        )
        hp = self.hparams
        # Behind a label that cannot be taken nothing is accepted.
        certainty_AK = torch.where(found_AK, ce_AK.detach(), torch.inf)
        weights_AK = position_weights(
            certainty_AK, valid_AK, kind=hp.loss_kind, gamma=self.gamma, alpha=hp.alpha
        )
        return loss._replace(
            total=loss.total + (ce_AK * weights_AK).sum(),
            ce_AK=loss.ce_AK + ce_AK.detach(),
            right_AK=right_AK,
        )

    def _learn(
        self, samples: Sequence[Sample], anchors: list[list[int]], block_size: int
    ) -> dict[str, Any]:
        """Adds the gradients of a part of a step; its figures."""
        loss, valid_AK = self._backward(samples, anchors, block_size)
        right_AK = loss.right_AK
        beyond = [0] * (self.block_size - block_size)
        owners = [i for i, group in enumerate(anchors) for _ in group]
        return {
            "loss": float(loss.total.detach()),
            "weight": float(loss.weight),
            "anchors": len(owners),
            "accepted": int(right_AK.long().cumprod(-1).sum()),
            "right": right_AK.sum(0).tolist() + beyond,
            "valid": valid_AK.sum(0).tolist() + beyond,
            "bad": tuple({samples[owners[a]].key for a in _non_finite_rows(loss.ce_AK)}),
        }

    def _finish_gradients(self, weight: float) -> float:
        """Sums the gradients of all ranks, makes the sum a mean, clips it; the norm that it had."""
        self._sum_gradients()
        grads = [p.grad for p in self.drafter.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(grads)) / weight
        torch._foreach_mul_(grads, min(1.0, self.hparams.max_grad_norm / (norm + 1e-6)) / weight)
        return norm

    def _sum_gradients(self) -> None:
        if self.ranks.size == 1:
            return
        grads = []
        for parameter in self.drafter.parameters():
            if parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                grads.append(parameter.grad)
        self.ranks.sum(grads)

    def _forward(
        self, samples: Sequence[Sample], anchors: list[list[int]], block_size: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Final hidden states ``[A, K, H]``, draft-vocabulary labels and validity ``[A, K]``.

        Args:
            block_size: None for the drafter's.
        """
        config = self.config
        block_size = block_size or self.block_size
        # Features behind a sequence's last anchor are seen by nobody.
        lengths = [max(group) for group in anchors]
        features = torch.cat(
            [s.features_TF[:n].to(self.device) for s, n in zip(samples, lengths, strict=True)]
        )
        layout = BlockLayout.build(anchors, lengths, block_size, self.device)
        first = 0 if config.sample_from_anchor else 1
        tokens_AK, valid_AK = block_targets(samples, anchors, block_size - first)
        tokens_AK, valid_AK = tokens_AK.to(self.device), valid_AK.to(self.device)
        labels_AK = self.head.labels(tokens_AK)
        # A token outside the draft vocabulary ends the block: nothing behind it can be accepted.
        valid_AK = valid_AK & (labels_AK >= 0).long().cumprod(-1).bool()
        embeds = self._block_embeds(self.drafter, samples, anchors, block_size)
        if self.hparams.autocast == "float32":
            features, embeds = features.float(), embeds.float()
        hidden_ABH = self.drafter(embeds, features, layout.context_positions_T, layout)
        return hidden_ABH[:, first:], labels_AK, valid_AK

    def _block_embeds(
        self,
        drafter: Drafter,
        samples: Sequence[Sample],
        anchors: list[list[int]],
        draft_block_size: int,
    ) -> Tensor:
        ids = torch.tensor(
            [
                [s.token_ids[p], *[self.config.mask_token_id] * (draft_block_size - 1)]
                for s, group in zip(samples, anchors, strict=True)
                for p in group
            ],
            device=self.head.embedding.device,
        )
        return self.head.embed(drafter, ids)

    def _verifier_logits(
        self, samples: Sequence[Sample], anchors: list[list[int]], num_draft: int | None = None
    ) -> Callable[[slice], Tensor] | None:
        """The verifier's draft-vocabulary logits ``[a, K, V]`` at a slice of the anchors, for kl.

        They are as it samples from them. The drafter's have neither cap nor scale: vLLM samples drafts from
        what its lm_head gives, also where that is the verifier's.
        """
        if not self.hparams.loss_kind.needs_final_states:
            return None
        num_draft = num_draft or self.num_draft_tokens
        rows = []
        for sample, group in zip(samples, anchors, strict=True):
            if sample.final_TH is None:
                raise ValueError(
                    f"the {self.hparams.loss} loss needs the verifier's final states of {sample.key}"
                )
            # Token p + 1 + k is predicted by the final state of position p + k.
            at = torch.tensor(group).unsqueeze(1) + torch.arange(num_draft)
            rows.append(sample.final_TH[at.clamp_max(sample.final_TH.shape[0] - 1)])
        of_states = self.verifier_logits
        if of_states is None:
            raise ValueError(f"the {self.hparams.loss} loss needs the verifier's logits")
        final_AKH = torch.cat(rows)

        def logits(part: slice) -> Tensor:
            # In the verifier's own precision, whatever the drafter's is.
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                return of_states(final_AKH[part].flatten(0, 1)).unflatten(0, (-1, num_draft))

        return logits

    def _share_weights(self) -> None:
        """Gives every rank the parameters that the others have updated."""
        params = {n: p.detach() for n, p in self.drafter.named_parameters()}
        self.ranks.share([[params[n] for n in names] for names in self._shards])

    def _update_ema(self, step: int) -> None:
        if self.ema is None:
            return
        params = [p.detach() for _, p in self.drafter.named_parameters()]
        decay = self.hparams.ema_decay
        if self._from_scratch:  # a short run must not end up with an average of its random start
            decay = min(decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.ema.values()), params, 1 - decay)

    # -- evaluation ------------------------------------------------------------------------------

    @torch.no_grad()
    def serving_drafter(self, dtype: torch.dtype) -> Drafter:
        """A copy as it would be served: exported weights in the serving dtype."""
        weights = self.weights()
        if self.config.head is not None:
            served = Drafter(self.config)
            served.load_state_dict(weights)
            return served.to(self.device, dtype).eval()
        # No second copy in fp32 on the way.
        memo: dict[int, Any] = {
            id(p): torch.nn.Parameter(weights[n].to(dtype, copy=True), requires_grad=False)
            for n, p in self.drafter.named_parameters()
        }
        return copy.deepcopy(self.drafter, memo).eval()

    @torch.no_grad()
    def accept(
        self, drafter: Drafter, sample: Sample, num_draft_tokens: int, dtype: torch.dtype
    ) -> Acceptance:
        """Teacher-forced greedy acceptance over one conversation (see ``modeling.acceptance``).

        The block is as wide as served, 1 + ``num_draft_tokens``.
        """
        parts = self.accept_by_parts(drafter, sample, num_draft_tokens, dtype, EVAL_ANCHORS)
        while True:
            try:
                next(parts)
            except StopIteration as done:
                return done.value

    @torch.no_grad()
    def accept_by_parts(
        self,
        drafter: Drafter,
        sample: Sample,
        num_draft_tokens: int,
        dtype: torch.dtype,
        num_anchors: int,
    ) -> Generator[None, None, Acceptance]:
        """:meth:`accept` with a pause behind each part of so many anchors; each computes its context anew."""
        config = self.config
        from_anchor = config.sample_from_anchor
        width = num_draft_tokens if from_anchor else num_draft_tokens + 1
        total = Acceptance()
        features = sample.features_TF.to(self.device, dtype)
        for start, end in sample.response_spans():
            positions = [p for p in range(start, end - 1) if p <= features.shape[0]]
            matches: list[list[bool]] = []
            for i in range(0, len(positions), num_anchors):
                group = positions[i : i + num_anchors]
                length = max(group)
                layout = BlockLayout.build([group], [length], width, self.device)
                embeds = self._block_embeds(drafter, [sample], [group], width).to(dtype)
                hidden = drafter(embeds, features[:length], layout.context_positions_T, layout)
                hidden = hidden[:, 0 if from_anchor else 1 :]
                logits = self.head.logits(drafter, hidden)
                drafted = self.head.tokens(logits.argmax(-1))
                tokens, valid = block_targets([sample], [group], num_draft_tokens)
                if drafter.candidate_selector is not None:
                    before = torch.tensor([sample.token_ids[p] for p in group], device=self.device)
                    unary = (drafted.cpu() == tokens) & valid
                    drafted = self._select(drafter, hidden, logits, before)
                    behind_right = torch.cat(
                        (before.unsqueeze(1), tokens[:, :-1].to(self.device)), dim=1
                    )
                    # of each position alone, behind the right token
                    one_by_one = self._select(
                        drafter,
                        hidden.flatten(0, 1).unsqueeze(1),
                        logits.flatten(0, 1).unsqueeze(1),
                        behind_right.flatten(),
                    ).view_as(tokens)
                    total.add_selected(
                        int(valid.sum()),
                        int(unary.sum()),
                        int(((one_by_one.cpu() == tokens) & valid).sum()),
                    )
                matches += ((drafted.cpu() == tokens) & valid).tolist()
                yield
            total.merge(walk(matches, num_draft_tokens))
        return total

    def _select(self, drafter: Drafter, hidden: Tensor, logits: Tensor, anchors: Tensor) -> Tensor:
        """Verifier ids that the selector takes ``[A, K]``, each behind the one that it took before.

        Args:
            hidden, logits: ``[A, K, ...]``.
            anchors: tokens in front of the first ``[A]``.
        """
        selector = drafter.candidate_selector
        assert isinstance(selector, CandidateSelector)
        ids, values = top_candidates(logits, self._num_candidates)
        candidates = self.head.tokens(ids)
        scores = transition_scores(
            selector.predecessor_codebook,
            selector.successor_codebook,
            selector.hidden_projection(hidden),
            candidates,
            values,
            anchors,
        )
        return candidates.gather(-1, greedy_walk(scores).unsqueeze(-1)).squeeze(-1)

    # -- state -----------------------------------------------------------------------------------

    def weights(self) -> dict[str, Tensor]:
        """What is exported: the moving average where there is one."""
        if self.ema is not None:
            return self._multiplied_out(dict(self.ema))
        return self._multiplied_out({n: p.detach() for n, p in self.drafter.named_parameters()})

    @torch.no_grad()
    def _multiplied_out(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        head = self.head
        embedding = head.embedding[: self.config.vocab_size]
        return multiplied_out(weights, embedding, head.verifier_lm_head, head.draft_token_ids)

    def load_drafter(self, weights: dict[str, Tensor]) -> None:
        """Starts from a trained drafter's weights (fine-tuning); a head that it lacks stays as it is.

        Raises:
            ValueError: its codebooks are no projections of the verifier's tables, but are to learn as such.
        """
        selector = self.drafter.candidate_selector
        if "candidate_selector.predecessor_codebook" in weights and not isinstance(
            selector, CandidateSelector
        ):
            factored = factors(weights, self.head)
            if factored is None:
                raise ValueError(
                    "this drafter's codebooks are no projections of the verifier's embedding and lm_head; "
                    "train them as they are: --codebooks free"
                )
            weights = factored
        start = dict(self.drafter.named_parameters())
        own = {n: w for n, w in weights.items() if n in start}
        missing = [n for n in set(start) - set(own) if not _of_head(n)]
        if missing:
            raise ValueError(f"the drafter to start from lacks {sorted(missing)[0]}")
        with torch.no_grad():
            for n, w in own.items():
                start[n].copy_(w)
        self._from_scratch = False
        if self.ema is not None:
            self.ema = {n: p.detach().clone() for n, p in self.drafter.named_parameters()}

    def save_state(self, file: Path) -> None:
        """Weights, moving average and optimizer state in one safetensors file, whatever the ranks.

        All ranks must call it; the first writes.
        """
        from safetensors.torch import save_file

        tensors = {f"model.{n}": p.detach() for n, p in self.drafter.named_parameters()}
        for n, tensor in (self.ema or {}).items():
            tensors[f"ema.{n}"] = tensor
        for n, tensor in self._optimizer_tensors():
            if self.ranks.rank == 0:
                tensors[n] = tensor.cpu()
        if self.ranks.rank != 0:
            return
        with atomic_path(file) as partial:
            save_file({n: t.contiguous().cpu() for n, t in tensors.items()}, partial)

    def _optimizer_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The optimizer state of all ranks, on each, one tensor at a time."""
        own = {}
        for kind, optimizer in self.optimizers.items():
            names = self._optimizer_names[kind]
            for i, slot in optimizer.state_dict()["state"].items():
                for key, value in slot.items():
                    own[f"{kind}.{names[i]}.{key}"] = torch.as_tensor(value, device=self.device)
        kinds = self.ranks.gather([(n, t.shape, t.dtype) for n, t in own.items()])
        for rank, part in enumerate(kinds):
            for n, shape, dtype in part:
                mine = rank == self.ranks.rank
                tensor = own[n] if mine else torch.empty(shape, dtype=dtype, device=self.device)
                self.ranks.broadcast([tensor], rank)
                yield n, tensor

    def load_state(self, file: Path) -> None:
        """Inverse of :meth:`save_state`; ValueError when the file is not of this drafter.

        Each rank takes its part.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(file)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"training state {file} cannot be read: {error}") from error
        params = dict(self.drafter.named_parameters())
        wanted = {f"model.{n}": p.shape for n, p in params.items()}
        wanted |= {f"ema.{n}": p.shape for n, p in (self.ema or {}).items()}
        for n, shape in wanted.items():
            if n not in tensors:
                raise ValueError(f"training state {file} lacks {n}; it is of another run")
            if tensors[n].shape != shape:
                raise ValueError(
                    f"training state {file} has {n} of shape {tuple(tensors[n].shape)}, this "
                    f"drafter's is {tuple(shape)}; it is of another run"
                )
        with torch.no_grad():
            for n, p in params.items():
                p.copy_(tensors[f"model.{n}"])
            if self.ema is not None:
                self.ema = {n: tensors[f"ema.{n}"].to(self.device) for n in self.ema}
        for kind, optimizer in self.optimizers.items():
            state: dict[int, dict[str, Tensor]] = {}
            for i, n in enumerate(self._optimizer_names[kind]):
                prefix = f"{kind}.{n}."
                slot = {
                    k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)
                }
                if slot:
                    state[i] = slot
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": state, "param_groups": groups})


def _of_head(name: str) -> bool:
    """Whether a parameter is of the part that makes a DFlash drafter one of DFlash 2."""
    return "_conv." in name or name.startswith("candidate_selector.")


def block_targets(
    samples: Sequence[Sample], anchors: list[list[int]], num_draft_tokens: int
) -> tuple[Tensor, Tensor]:
    """Verifier tokens behind each anchor ``[A, K]`` and whether they lie in the same response."""
    tokens, valid = [], []
    for sample, group in zip(samples, anchors, strict=True):
        ids, mask = sample.token_ids, sample.loss_mask
        for p in group:
            ahead = list(ids[p + 1 : p + 1 + num_draft_tokens])
            inside, generated = [], True
            for flag in mask[p + 1 : p + 1 + num_draft_tokens]:
                generated = generated and flag
                inside.append(generated)
            short = num_draft_tokens - len(ahead)
            tokens.append(ahead + [0] * short)
            valid.append(inside + [False] * short)
    return torch.tensor(tokens), torch.tensor(valid)


def _added(parts: Sequence[Any]) -> Any:
    """The sum of numbers, or of lists of them position by position; tuples are joined."""
    if isinstance(parts[0], list):
        return [sum(column) for column in zip(*parts, strict=True)]
    return sum(parts, start=type(parts[0])())


def _non_finite_rows(ce_AK: Tensor) -> list[int]:
    return torch.nonzero(~torch.isfinite(ce_AK).all(-1)).flatten().tolist()
