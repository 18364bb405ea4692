"""A trial step of a verifier at load: does a decoder layer's first output hold the residual already?"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

_TOKENS = 8
#: Largest difference, as a share of the largest value: bfloat16 rounds by 0.4 % and norms add a few of those.
_CLOSE = 0.03


def first_output_is_whole(
    text: nn.Module, layers: nn.ModuleList, vllm_config: Any, device: torch.device
) -> bool:
    """Whether the layers' first output is the state behind them; False: the sum of their two outputs is.

    vLLM's decoder layers mostly return ``(states, residual)`` for the next norm to add, but some return the
    sum and a residual that nobody reads. Which it is shows behind the last layer, where the model's final
    norm gets the state: the norm of one of the two must be what came out of it.

    Args:
        text: the language model, loaded; it runs a few tokens without KV cache, as in vLLM's profiling.
        layers: its decoder layers.

    Raises:
        ValueError: neither of the two explains the output, or it is no state per token.
    """
    with _observed(text, layers) as seen, _eager(text), torch.inference_mode():
        ids = torch.arange(1, _TOKENS + 1, device=device)
        positions = torch.arange(_TOKENS, device=device)
        if vllm_config.model_config.uses_mrope:
            positions = positions.expand(3, -1)
        with set_forward_context(None, vllm_config, num_tokens=_TOKENS):
            output = text(input_ids=ids, positions=positions, intermediate_tensors=None)
        states, residual = seen["last"]
        hidden_size = vllm_config.model_config.get_hidden_size()
        if states.shape != (_TOKENS, hidden_size):
            raise ValueError(
                f"{type(layers[-1]).__name__} returns {list(states.shape)} for {_TOKENS} tokens, "
                f"not a state of {hidden_size} for each"
            )
        if residual is None:
            return True
        norm, normed = seen.get("norm", (lambda x: x, output))
        errors = [_difference(_first(norm(x)), normed) for x in (states.clone(), states + residual)]
    if not min(errors) <= _CLOSE:  # also where they are no numbers
        raise ValueError(
            f"{type(layers[-1]).__name__} returns neither the state nor its two parts: their final norms "
            f"differ from the model's by {errors[0]:.0%} and {errors[1]:.0%}"
        )
    return errors[0] < errors[1]


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, (tuple, list)) else output


def _difference(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max().clamp_min(1e-12))


@contextlib.contextmanager
def _observed(text: nn.Module, layers: nn.ModuleList) -> Iterator[dict[str, Any]]:
    """Notes the last layer's outputs and the module called first behind it, with its output."""
    seen: dict[str, Any] = {}

    def last(module: nn.Module, args: Any, output: Any) -> None:
        second = output[1] if isinstance(output, (tuple, list)) and len(output) > 1 else None
        states = _first(output)
        whole = not isinstance(second, Tensor) or second.shape != states.shape
        # vLLM's fused norm overwrites its arguments.
        seen["last"] = (states.clone(), None if whole else second.clone())  # type: ignore[union-attr]

    def behind(module: nn.Module, args: Any, output: Any) -> None:
        if "last" in seen and "norm" not in seen:
            seen["norm"] = (module, _first(output).clone())

    def silent(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        # Without a cache vLLM's attention leaves its output as the memory was.
        given = kwargs.get("output")
        if isinstance(given, Tensor):
            given.zero_()
        return torch.zeros_like(output) if isinstance(output, Tensor) else output

    inside = set(layers.modules())
    handles = [layers[-1].register_forward_hook(last)]
    for module in inside:
        if isinstance(module, AttentionLayerBase):
            handles.append(module.register_forward_hook(silent, with_kwargs=True))
    for module in text.modules():
        # Modules that contain the layers end behind the norm, which has been seen by then.
        if module not in inside and not any(child is layers for child in module.modules()):
            handles.append(module.register_forward_hook(behind))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _eager(text: nn.Module) -> Iterator[None]:
    """Keeps vLLM from compiling for the trial."""
    changed = [m for m in text.modules() if getattr(m, "do_not_compile", True) is False]
    for module in changed:
        module.do_not_compile = True  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in changed:
            module.do_not_compile = False  # type: ignore[assignment]
