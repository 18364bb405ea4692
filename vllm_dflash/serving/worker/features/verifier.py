"""Reading the running verifier inside vLLM's worker: its embedding, its lm_head, its final states."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.distributed.parallel_state import get_tp_group
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from vllm_dflash.serving.patching import replaced, specialise

#: Where vLLM's models keep the token embedding, below the language model.
_EMBEDDINGS = (
    "model.embed_tokens",
    "model.embedding",
    "model.wte",
    "transformer.wte",
    "embed_tokens",
)
#: What the one embedding of other layouts is called.
_EMBEDDING_NAMES = (
    "embed_tokens",
    "word_embeddings",
    "wte",
    "tok_embeddings",
    "token_embedding",
    "embed_in",
)


def language_model(model: nn.Module) -> nn.Module:
    """The text model of a multimodal verifier, else the model itself."""
    return model.get_language_model() if hasattr(model, "get_language_model") else model  # type: ignore[operator]


def _find(model: nn.Module, paths: tuple[str, ...]) -> nn.Module | None:
    for path in paths:
        module: Any = model
        for part in path.split("."):
            module = getattr(module, part, None)
            if module is None:
                break
        if module is not None:
            return module
    return None


def find_embedding(text: nn.Module) -> nn.Module | None:
    """The token embedding of a language model, None where the layout is not known."""
    found = _find(text, _EMBEDDINGS)
    if found is not None:
        return found
    modules = text.named_modules()
    named = [m for path, m in modules if path.rsplit(".", 1)[-1] in _EMBEDDING_NAMES]
    embeddings = [m for m in named if isinstance(m, VocabParallelEmbedding)]
    return embeddings[0] if len(embeddings) == 1 else None


def shared_weights(model: nn.Module, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Embedding and lm_head ``[V, H]`` of the verifier, without vLLM's padding rows.

    Under tensor parallelism each rank gathers its own copy of both (of one where they are tied), since every
    rank trains on other sequences: ``V * H`` values each beside the rank's shard.

    Raises:
        ValueError: the layout is unknown, or the weights are quantised.
    """
    text = language_model(model)
    embedding = find_embedding(text)
    if embedding is None:
        raise ValueError(
            f"cannot find the token embedding of {type(model).__name__}; looked for "
            f'{", ".join(_EMBEDDINGS)}. Try --engine-args \'{{"model_impl": "transformers"}}\''
        )
    head = getattr(text, "lm_head", None)
    if head is None or not hasattr(head, "weight"):
        head = embedding
    out: list[Tensor] = []
    for name, module in (("embedding", embedding), ("lm_head", head)):
        if out and module is embedding:
            out.append(out[0])
            continue
        weight: Any = module.weight
        if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.dim() != 2:
            raise ValueError(
                f"the verifier's {name} is quantised, and the drafter learns through it: train with the "
                f"unquantised verifier (its drafter serves beside the quantised one too), or quantise with "
                f"the {name} left out"
            )
        weight = _unsharded(module, weight.detach())
        if weight.shape[0] < vocab_size:
            raise ValueError(
                f"the verifier's {name} ({type(module).__name__}) has {weight.shape[0]} of {vocab_size} rows "
                "on this rank, in a layout that cannot be gathered; train with --tensor-parallel-size 1"
            )
        out.append(weight[:vocab_size])
    return out[0], out[1]


def _unsharded(module: nn.Module, weight: Tensor) -> Tensor:
    """All rows of a vocabulary-parallel weight in the order of the token ids, padding last."""
    if not isinstance(module, VocabParallelEmbedding) or module.tp_size == 1:
        return weight
    group = module.parallel_group or get_tp_group()
    rows = group.all_gather(weight.contiguous(), dim=0)
    order = module.get_sharded_to_full_mapping()
    # Only added tokens (behind each rank's part of the original vocabulary) are out of order.
    return rows if order is None or order == sorted(order) else rows[order]


class FinalStates:
    """Keeps the states of the latest step that the verifier's lm_head reads, for the kl loss.

    They are read off the runner between its forward pass and its sampling: a hook on the verifier would not
    see a step that replays a CUDA graph.

    Attributes:
        last: ``[T, H]``, perhaps with rows of padding behind; None before any step.
    """

    def __init__(self, runner: Any) -> None:
        self.last: Tensor | None = None
        if not specialise(
            runner, "vllm_dflash.serving.worker.features.verifier:keeping_final_states"
        ):
            raise ValueError(
                "this vLLM's runner does not look as expected, so its final states cannot be kept for the kl "
                "loss; train with another loss, or with a supported vLLM"
            )
        runner.final_states = self


def keeping_final_states(cls: type) -> type:
    """A subclass of one of vLLM's runners that keeps them, for :class:`FinalStates`."""

    class KeepsFinalStates(cls):  # type: ignore[valid-type,misc]
        final_states: FinalStates

        def execute_model(self, *args: Any, **kwargs: Any) -> Any:
            output = super().execute_model(*args, **kwargs)
            state = self.execute_model_state
            self.final_states.last = None if state is None else state.hidden_states
            return output

    KeepsFinalStates.__name__ = KeepsFinalStates.__qualname__ = cls.__name__
    KeepsFinalStates.__module__ = cls.__module__
    return KeepsFinalStates


#: Logit of a token that the verifier cannot emit; finite, so that 0 * log 0 is 0 in a divergence.
_ABSENT = -1e30
#: Lengths of the random states that the probe compares: small ones, and such that reach any soft cap.
_PROBE_SCALES = (0.1, 1.0, 10.0, 100.0)


class VerifierLogits:
    """The verifier's logits of its final states, as it samples from them: ``[N, H]`` to ``[N, V]``.

    The verifier's own ``compute_logits`` runs, so soft caps, scales, multipliers and biases are applied as in
    serving. Only the projection inside it is replaced while it runs, by one onto the rows wanted: tokens that
    nobody drafts cost nothing, and tensor parallel ranks, each with states of its own, need not wait for
    one another.

    Args:
        model: the verifier.
        lm_head_VH: rows of its output projection, whole on every rank.
        token_ids: int64 ``[V]``, the tokens of the rows; None where they are 0, 1, ...

    Raises:
        ValueError: that does not give the verifier's logits (compared on random states, together with all
            ranks).
    """

    def __init__(self, model: nn.Module, lm_head_VH: Tensor, token_ids: Tensor | None) -> None:
        self.model: Any = model
        self._rows = lm_head_VH
        ids = torch.arange(len(lm_head_VH)) if token_ids is None else token_ids
        self._ids = ids.to(lm_head_VH.device)
        self._processors = [m for m in model.modules() if isinstance(m, LogitsProcessor)]
        self._bias: Tensor | None = None
        self._absent: Tensor | None = None
        self._check()

    @torch.no_grad()
    def __call__(self, states: Tensor) -> Tensor:
        with self._projection(self._project):
            logits = self.model.compute_logits(states.to(self._rows.device, self._rows.dtype))
        return logits if self._absent is None else logits.masked_fill(self._absent, _ABSENT)

    def _project(
        self, processor: Any, states: Tensor, lm_head: Any, bias: Tensor | None, *args: Any
    ) -> Tensor:
        dtype = getattr(processor, "head_dtype", None) or states.dtype
        own = None if self._bias is None else self._bias.to(dtype)
        return F.linear(states.to(dtype), self._rows.to(dtype), own)

    @contextmanager
    def _projection(self, project: Callable[..., Tensor]) -> Iterator[None]:
        """Within it the verifier's ``LogitsProcessor`` gets its logits from ``project``."""

        def of(processor: Any) -> Callable[..., Tensor]:
            def get_logits(hidden_states, lm_head, embedding_bias=None, *args, **kwargs):
                return project(
                    processor, hidden_states, lm_head, embedding_bias, *args, *kwargs.values()
                )

            return get_logits

        with ExitStack() as stack:
            for processor in self._processors:
                stack.enter_context(replaced(processor, "_get_logits", of(processor)))
            yield

    @torch.no_grad()
    def _check(self) -> None:
        """Learns what is added to the projection, and compares with the verifier's own logits."""
        width, device = self._rows.shape[1], self._rows.device
        generator = torch.Generator().manual_seed(0)
        states = torch.randn(2 * len(_PROBE_SCALES), width, generator=generator)
        states *= torch.tensor(_PROBE_SCALES).repeat_interleave(2).unsqueeze(1)
        states = states.to(device, self._rows.dtype)
        used: list[tuple[Any, Any, Tensor | None]] = []

        def note(processor, hidden_states, lm_head, bias, *args):
            used.append((processor, lm_head, bias))
            return type(processor)._get_logits(processor, hidden_states, lm_head, bias, *args)

        with self._projection(note):
            served = self.model.compute_logits(states)
        problem = f"it calls vLLM's LogitsProcessor {len(used)} times"
        if len(used) == 1:
            processor, lm_head, bias = used[0]
            if bias is not None:
                self._bias = _unsharded(lm_head, bias)[self._ids]
            if int(self._ids.max()) >= processor.org_vocab_size:
                self._absent = self._ids >= processor.org_vocab_size
            got = self(states)
            if served is None:  # vLLM gives them to the first rank alone, which compares
                return
            want = served[:, self._ids.clamp_max(served.shape[1] - 1)].float()
            if self._absent is not None:
                want.masked_fill_(self._absent, _ABSENT)
            if _same(got.float(), want, self._rows.dtype):
                return
            problem = "its logits are more than a function of each token's own logit"
        raise ValueError(
            f"--loss kl cannot be used with {type(self.model).__name__}: {problem}, so what it samples from "
            "is not known; use --loss dpace or ce"
        )


def _same(logits_NV: Tensor, other_NV: Tensor, dtype: torch.dtype) -> bool:
    """Whether they differ by no more than GEMMs of two shapes do."""
    relative = 1e-4 if dtype == torch.float32 else 3e-2
    size_NV = other_NV.masked_fill(other_NV <= _ABSENT, 0).abs()
    close = (logits_NV - other_NV).abs() <= relative * (size_NV + size_NV.mean(-1, keepdim=True))
    return bool((close | (logits_NV == other_NV)).all())


def verifier_dtype(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())
