"""Reading the running verifier inside vLLM's worker: its embedding, its lm_head, its final states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed.parallel_state import get_tp_group
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

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
                f"the verifier's {name} is quantised; training needs it in full precision"
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
    """Records what the verifier's model returns, the states its lm_head reads.

    Needed by the kl loss only. A forward hook on the outermost module sees every step, also where the
    decoder inside it is compiled.
    """

    def __init__(self, model: nn.Module) -> None:
        self.last: Tensor | None = None
        self._handle = model.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.last = output[0] if isinstance(output, tuple) else output

    def remove(self) -> None:
        self._handle.remove()
        self.last = None


def verifier_dtype(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())
