"""The list of CUDA graphs that vLLM's V2 runner is to capture; none is captured here."""

from __future__ import annotations

import copy
from collections import Counter
from types import SimpleNamespace
from typing import Any

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


def manager(
    module, monkeypatch, chooses: bool, table=None, layers=(), tokens=K, most=16, sizes=(8, 16, 32)
) -> Any:
    """vLLM's, with its list of graphs.

    Args:
        layers: the verifier's, as vLLM's ``static_forward_context`` has them.
        tokens: of a draft.
        most: requests of a step.
        sizes: numbers of tokens to capture graphs for.
    """
    monkeypatch.setattr(support, "scheduler_chooses", lambda config: chooses)
    spec = Spec(num_speculative_tokens=tokens, num_speculative_tokens_per_batch_size=table)
    made = module.ModelCudaGraphManager.__new__(module.ModelCudaGraphManager)
    config = SimpleNamespace(
        speculative_config=spec,
        num_speculative_tokens=tokens,
        use_v2_model_runner=True,
        model_config=SimpleNamespace(is_hybrid=bool(layers)),
        cache_config=SimpleNamespace(use_kda_recoverssm=False),
        compilation_config=SimpleNamespace(
            static_forward_context=dict(enumerate(layers)),
            cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE,
        ),
    )
    vars(made).update(
        vllm_config=config,
        compilation_config=SimpleNamespace(
            cudagraph_capture_sizes=list(sizes), max_cudagraph_capture_size=max(sizes)
        ),
        cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE,
        max_num_reqs=most,
        decode_query_len=tokens + 1,
        varlen_decode=False,
        lora_capture_cases=[0],
        ubatch_runner=None,
        _candidates={},
        _capture_descs={},
        _graphs_captured=True,
        _lora_dispatch_map={},
    )
    before = module.build_dynamic_sd_schedule_lookup, copy.copy(vars(spec))
    made._init_candidates()
    assert made.vllm_config is config
    assert (module.build_dynamic_sd_schedule_lookup, vars(spec)) == before
    return made


def full_graphs(made: Any) -> list[Any]:
    full = made._capture_descs[CUDAGraphMode.FULL]
    assert all(d.num_tokens == d.num_reqs * d.uniform_token_count for d in full)
    return full


def lengths(*args: Any, **kwargs: Any) -> set[int]:
    """Tokens of each request in the full graphs."""
    return {d.uniform_token_count for d in full_graphs(manager(*args, **kwargs))}


class Spec(SimpleNamespace):
    def uses_dynamic_speculative_decoding(self) -> bool:
        return self.num_speculative_tokens_per_batch_size is not None


def test_steps_without_drafts_get_graphs(module, monkeypatch) -> None:
    assert lengths(module, monkeypatch, True) == {1, 2, 4, K + 1}
    assert lengths(module, monkeypatch, True, [(1, 8, 5), (9, 16, 2)]) == {1, 3, 6}


def test_fixed_lengths_leave_it_as_it_is(module, monkeypatch) -> None:
    assert lengths(module, monkeypatch, False) == {K + 1}
    assert lengths(module, monkeypatch, False, [(1, 16, 5)]) == {6}


def default_sizes(tokens: int, most: int) -> list[int]:
    """vLLM's sizes, of which those for decode steps are for so many requests of ``tokens + 1`` each."""
    plain = [1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)]
    limit = min(most * (tokens + 1) * 2, 512)
    decode = [n * (tokens + 1) for n in {*plain, most} if n <= most]
    return sorted({n for n in (*plain, *decode) if n <= limit})


@pytest.mark.parametrize("most", [100, 256])
@pytest.mark.parametrize("tokens", [4, 5, 6, 7, 8, 10, 15])
def test_every_step_of_a_length_with_graphs_gets_one(module, monkeypatch, tokens, most) -> None:
    """Full drafts get the very graph that stock vLLM has for them."""
    given = {"tokens": tokens, "most": most, "sizes": default_sizes(tokens, most)}
    stock = manager(module, monkeypatch, False, **given)
    ours = manager(module, monkeypatch, True, **given)
    for length in (1, 2, 4, 8, tokens + 1):
        reach = [d.num_reqs for d in full_graphs(ours) if d.uniform_token_count == length]
        if length > tokens + 1:
            assert not reach
            continue
        if 1 < length <= tokens:
            assert max(reach) == min(most, max(given["sizes"]) // length)
        for batch in range(1, most + 1):
            found = ours.dispatch(batch, batch * length, length, 0)
            if length == tokens + 1:
                assert found == stock.dispatch(batch, batch * length, length, 0)
            elif batch <= max(reach):
                assert (found.cg_mode, found.uniform_token_count) == (CUDAGraphMode.FULL, length)
    # Other steps have what they had.
    for num_tokens in range(1, max(given["sizes"]) + 1):
        step = (1, num_tokens, None, 0)
        assert ours.dispatch(*step) == stock.dispatch(*step)


def test_short_lengths_have_as_many_graphs_as_steps_without_drafts(module, monkeypatch) -> None:
    given = {"tokens": 15, "most": 256, "sizes": default_sizes(15, 256)}
    graphs = Counter(
        d.uniform_token_count for d in full_graphs(manager(module, monkeypatch, True, **given))
    )
    assert graphs == {1: 35, 2: 35, 4: 19, 8: 11, 16: 32}


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
