"""Other weights for a drafter by vLLM's own means: what the context's K/V are made with follows, in place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from helpers import tiny

BUFFERS = ("_fused_kv_weight", "_k_norm_weights")


@pytest.fixture(scope="module")
def drafter(verifier, tmp_path_factory):
    return tiny.make_drafter(tmp_path_factory.mktemp("drafter") / "drafter", verifier)


@pytest.fixture(scope="module")
def config(verifier, drafter) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(
        model=str(verifier),
        max_model_len=64,
        dtype="float32",
        speculative_config={"method": "dflash", "model": str(drafter)},
    ).create_engine_config()


@pytest.fixture
def load(config, tmp_path, monkeypatch) -> Iterator[Any]:
    """Loads the drafter as a worker does, on one rank."""
    from vllm import distributed
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model

    # As vLLM's CPU worker has it.
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    config.compilation_config.static_forward_context.clear()
    with set_current_vllm_config(config):
        rendezvous = f"file://{tmp_path}/rendezvous"
        distributed.init_distributed_environment(1, 0, rendezvous, 0, "gloo")
        distributed.initialize_model_parallel(1, 1)
        draft = config.speculative_config.draft_model_config
        yield lambda: get_model(vllm_config=config, model_config=draft)
        distributed.destroy_model_parallel()
        distributed.destroy_distributed_environment()


def update(model: Any, config: Any, weights: dict[str, Tensor]) -> None:
    """``start_draft_weight_update``, tensors one by one, and its end."""
    from vllm.model_executor.model_loader import reload

    with torch.no_grad():
        reload.initialize_layerwise_reload(model)
        for name, tensor in weights.items():
            model.load_weights([(name, tensor)])
        reload.finalize_layerwise_reload(model, config.model_config)


def fused(weights: dict[str, Tensor], num_layers: int) -> list[Tensor]:
    """Of whole weights, as vLLM fuses them."""
    of = [f"layers.{i}.self_attn" for i in range(num_layers)]
    return [
        torch.cat([weights[f"{name}.{kind}_proj.weight"] for name in of for kind in "kv"]),
        torch.stack([weights[f"{name}.k_norm.weight"] for name in of]),
    ]


def test_fused_weights_are_replaced_in_place(load, config, drafter, monkeypatch) -> None:
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    # On GPUs plain weights stay as they are; vLLM's CPU backend packs them.
    monkeypatch.setattr(
        UnquantizedLinearMethod, "process_weights_after_loading", lambda self, layer: None
    )
    model = load()
    inner, names = model.model, [f"model.{name}" for name in BUFFERS]
    # What sleep mode keeps; and no checkpoint has them.
    assert set(names) <= dict(model.named_buffers()).keys()
    assert set(names).isdisjoint(model.state_dict())
    where = [getattr(inner, name).data_ptr() for name in BUFFERS]
    old = load_file(drafter / "model.safetensors")
    new = {n: w + torch.rand_like(w) if w.is_floating_point() else w for n, w in old.items()}
    partly = new | {n: w for n, w in old.items() if "layers.1." in n}
    for given, whole in ((new, new), ({n: old[n] for n in old if "layers.1." in n}, partly)):
        update(model, config, given)
        now = [getattr(inner, name) for name in BUFFERS]
        expected = fused(whole, len(inner.layers))
        assert all(torch.equal(got, want) for got, want in zip(now, expected, strict=True))
        assert [tensor.data_ptr() for tensor in now] == where
        assert set(names) <= dict(model.named_buffers()).keys()
        assert torch.equal(inner._hidden_norm_weight, whole["hidden_norm.weight"])


def test_packed_weights_cannot_be_replaced(load, config, drafter) -> None:
    with pytest.raises(RuntimeError, match="packed copies only"):
        update(load(), config, load_file(drafter / "model.safetensors"))
