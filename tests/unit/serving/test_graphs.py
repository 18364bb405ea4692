"""The list of CUDA graphs that vLLM's V2 runner is to capture; none is captured here."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.worker.gpu import cudagraph_utils

from vllm_dflash.serving import support
from vllm_dflash.serving.worker.v2.cudagraphs import wrap_init_candidates

K = 7


@pytest.fixture
def module(monkeypatch):
    """vLLM's module; its class is as it was afterwards."""
    cls = cudagraph_utils.ModelCudaGraphManager
    base = cudagraph_utils.CudaGraphManager._init_candidates
    monkeypatch.setattr(cls, "_init_candidates", wrap_init_candidates(base))
    return cudagraph_utils


def lengths(module, monkeypatch, chooses: bool, table=None, layers=()) -> set[int]:
    """Tokens of each request in the full graphs.

    Args:
        layers: the verifier's, as vLLM's ``static_forward_context`` has them.
    """
    monkeypatch.setattr(support, "scheduler_chooses", lambda config: chooses)
    spec = Spec(num_speculative_tokens=K, num_speculative_tokens_per_batch_size=table)
    manager = module.ModelCudaGraphManager.__new__(module.ModelCudaGraphManager)
    config = SimpleNamespace(
        speculative_config=spec,
        num_speculative_tokens=K,
        use_v2_model_runner=True,
        model_config=SimpleNamespace(is_hybrid=bool(layers)),
        cache_config=SimpleNamespace(use_kda_recoverssm=False),
        compilation_config=SimpleNamespace(
            static_forward_context=dict(enumerate(layers)),
            cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE,
        ),
    )
    vars(manager).update(
        vllm_config=config,
        compilation_config=SimpleNamespace(
            cudagraph_capture_sizes=[8, 16, 32], max_cudagraph_capture_size=32
        ),
        cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE,
        max_num_reqs=16,
        decode_query_len=K + 1,
        varlen_decode=False,
        lora_capture_cases=[0],
        ubatch_runner=None,
        _candidates={},
        _capture_descs={},
    )
    before = module.build_dynamic_sd_schedule_lookup, copy.copy(vars(spec))
    manager._init_candidates()
    assert manager.vllm_config is config
    assert (module.build_dynamic_sd_schedule_lookup, vars(spec)) == before
    full = manager._capture_descs[CUDAGraphMode.FULL]
    assert all(d.num_tokens == d.num_reqs * d.uniform_token_count for d in full)
    return {d.uniform_token_count for d in full}


class Spec(SimpleNamespace):
    def uses_dynamic_speculative_decoding(self) -> bool:
        return self.num_speculative_tokens_per_batch_size is not None


def test_steps_without_drafts_get_graphs(module, monkeypatch) -> None:
    assert lengths(module, monkeypatch, True) == {1, 2, 4, K + 1}
    assert lengths(module, monkeypatch, True, [(1, 8, 5), (9, 16, 2)]) == {1, 3, 6}


def test_fixed_lengths_leave_it_as_it_is(module, monkeypatch) -> None:
    assert lengths(module, monkeypatch, False) == {K + 1}
    assert lengths(module, monkeypatch, False, [(1, 16, 5)]) == {6}


class Recurrent(MambaBase):
    """A recurrent layer of the verifier."""

    mamba_type = None

    def __init__(self, kind: str) -> None:
        self.mamba_type = MambaAttentionBackendEnum[kind]

    def get_state_shape(self):
        return ()

    def get_state_dtype(self):
        return ()


@pytest.mark.parametrize("kind", ["MAMBA1", "MAMBA2", "SHORT_CONV"])
def test_hybrids_capture_what_their_builder_takes(kind, module, monkeypatch) -> None:
    """The builder's own assertion decides."""
    layer = Recurrent(kind)
    builder = layer.get_attn_backend().get_builder_cls()
    made = SimpleNamespace(
        num_spec_tokens=K, decode_cudagraph_max_bs=16, build=lambda *args, **kwargs: "built"
    )

    def capture(query_len: int) -> str:
        start = torch.arange(3) * query_len
        batch = SimpleNamespace(max_query_len=query_len, num_reqs=2, query_start_loc=start)
        return builder.build_for_cudagraph_capture(made, batch)

    with pytest.raises(AssertionError):
        capture(1)
    captured = lengths(module, monkeypatch, True, layers=[object(), layer])
    assert captured == {K + 1}
    assert all(capture(n) == "built" for n in captured)


def test_other_recurrent_layers_are_captured_for_both(module, monkeypatch) -> None:
    """The builder of gated delta nets takes any length."""
    assert lengths(module, monkeypatch, True, layers=[Recurrent("GDN_ATTN")]) == {1, K + 1}
