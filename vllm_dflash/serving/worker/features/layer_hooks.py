"""Verifiers without vLLM's Eagle3 interface, adapted at load: hooks on their decoder layers."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.models.interfaces import supports_eagle3
from vllm.sequence import IntermediateTensors
from vllm.v1.worker.gpu.spec_decode.eagle.eagle3_utils import get_eagle3_aux_layers_from_config

from vllm_dflash.serving.patching import specialise
from vllm_dflash.serving.worker.features.probe import first_output_is_whole
from vllm_dflash.serving.worker.features.tap import (
    FeatureTap,
    cannot_tap,
    feature_buffer,
    write_features,
)
from vllm_dflash.serving.worker.features.verifier import find_embedding, language_model

logger = logging.getLogger("vllm.vllm_dflash")
_ADAPTED = "vllm_dflash.serving.worker.features.layer_hooks:adapted"


def adapt_verifier(
    verifier: nn.Module, vllm_config: Any, device: torch.device
) -> FeatureTap | None:
    """Gives a verifier what vLLM asks of one for dflash; nothing is done to those that have it.

    The instance's class becomes a subclass of its own with the Eagle3 interface, an embedding where vLLM
    looks for one, and a ``forward`` that returns the tap's mark. Works eager and compiled.

    Returns:
        The tap, also of a verifier adapted before; None for those with an interface of their own.

    Raises:
        ValueError: the layers or the embedding cannot be found, or the layout cannot be tapped; it names
            the way out.
    """
    if supports_eagle3(verifier):
        return getattr(verifier, "_dflash_tap", None)
    name = type(verifier).__name__
    out = (
        "; vLLM's Transformers backend may serve it: --model-impl transformers "
        '(`vllm-dflash train`: --engine-args \'{"model_impl": "transformers"}\')'
    )
    reason = cannot_tap(vllm_config)
    if reason:
        raise ValueError(
            f"{name} has no Eagle3 interface, so vllm-dflash must tap it, which it does not with {reason}"
        )
    text = language_model(verifier)
    num_layers = vllm_config.model_config.get_total_num_hidden_layers()
    layers = _decoder_layers(text, num_layers)
    if layers is None:
        raise ValueError(f"cannot find the {num_layers} decoder layers of {name}" + out)
    if any(getattr(m, "use_sequence_parallel", False) for m in text.modules()):
        raise ValueError(
            f"the layers of {name} hold parts of the tokens between them (sequence parallel)" + out
        )
    embedding = find_embedding(text)
    if embedding is None:
        raise ValueError(f"cannot find the token embedding of {name}" + out)
    # vLLM's ids: i is the state behind i decoder layers.
    layer_ids = get_eagle3_aux_layers_from_config(vllm_config.speculative_config) or ()
    if not layer_ids or min(layer_ids) < 0 or max(layer_ids) > num_layers:
        raise ValueError(
            f"the drafter reads the states behind layers {layer_ids} of {name}, which has {num_layers}"
        )
    hidden_size = vllm_config.model_config.get_hidden_size()
    columns = {layer: i * hidden_size for i, layer in enumerate(sorted(set(layer_ids)))}
    try:
        whole = first_output_is_whole(text, layers, vllm_config, device)
    except ValueError as error:
        raise ValueError(f"cannot tap {name}: {error}" + out) from error
    tap = FeatureTap(text, feature_buffer(vllm_config, len(columns) * hidden_size, device))
    for layer, column in columns.items():
        if layer == 0:
            layers[0].register_forward_pre_hook(_InputHook(text, column), with_kwargs=True)
        else:
            layers[layer - 1].register_forward_hook(_OutputHook(text, column, whole))
    _change_class(text, embedding, tap if text is verifier else None)
    if text is not verifier:
        _change_class(verifier, None, tap)
    logger.info("vllm-dflash taps %d layers of %s by hooks", len(columns), name)
    return tap


def _decoder_layers(text: nn.Module, num_layers: int) -> nn.ModuleList | None:
    """The one list of decoder layers: the outermost of that length."""
    found = [
        (path.count("."), module)
        for path, module in text.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    ]
    outermost = [m for depth, m in found if depth == min(d for d, _ in found)]
    return outermost[0] if len(outermost) == 1 else None


class _OutputHook:
    """Writes the state behind a decoder layer: its first output if that is ``whole``, else the sum of two."""

    def __init__(self, text: nn.Module, column: int, whole: bool) -> None:
        self.text, self.column, self.whole = text, column, whole

    def __call__(self, layer: nn.Module, inputs: Any, output: Any) -> None:
        states = output[0] if isinstance(output, (tuple, list)) else output
        write_features(self.text, states, None if self.whole else output[1], self.column)


class _InputHook:
    """Writes what the first decoder layer gets: the embeddings."""

    def __init__(self, text: nn.Module, column: int) -> None:
        self.text, self.column = text, column

    def __call__(self, layer: nn.Module, args: Any, kwargs: Any) -> None:
        states = kwargs.get("hidden_states")
        if states is None:
            states = next(a for a in args if isinstance(a, Tensor) and a.is_floating_point())
        write_features(self.text, states, None, self.column)


def _change_class(model: nn.Module, embedding: nn.Module | None, tap: FeatureTap | None) -> None:
    """Puts a subclass with the missing members under an instance; the one vLLM calls gets the ``tap``."""
    inner = getattr(model, "model", None)
    # vLLM shares `model.embed_tokens` with the drafter; a property adds no second name to the weights.
    found = any(hasattr(inner, name) for name in ("embed_tokens", "embedding"))
    if embedding is not None and inner is not None and not found:
        specialise(inner, _ADAPTED, {"embed_tokens": property(lambda self: embedding)})
    members: dict[str, Any] = {}
    if embedding is not None:
        if inner is None:
            members["model"] = property(lambda self: SimpleNamespace(embed_tokens=embedding))
        if not hasattr(model, "lm_head"):
            members["lm_head"] = property(lambda self: embedding)
    if tap is not None:
        members |= _interface(type(model), tap)
    specialise(model, _ADAPTED, members)


def adapted(cls: type, members: dict[str, Any]) -> type:
    """A subclass of one of vLLM's models with more members."""
    return type(cls.__name__, (cls,), {"__module__": cls.__module__, **members})


def _interface(cls: Any, tap: FeatureTap) -> dict[str, Any]:
    """Members of vLLM's ``SupportsEagle3``, and a ``forward`` that returns the tap's mark."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = cls.forward(self, *args, **kwargs)
        if isinstance(output, IntermediateTensors):
            return output
        return output, [tap.mark(output)]

    return {
        "forward": forward,
        "supports_eagle3": True,
        "has_own_lm_head": False,
        "has_own_embed_tokens": False,
        "set_aux_hidden_state_layers": lambda self, layers: None,
        "get_eagle3_default_aux_hidden_state_layers": lambda self: (),
        "_dflash_tap": tap,
    }
