"""Peak memory of a learner's step with fake tensors: nothing is allocated, nothing is computed.

The CPU's build of torch has no CUDA to fake, so two operations that CUDA fuses are stood in for by functions
that keep what CUDA's keep: attention (queries, keys, values, bias, output, log-sum-exp) and RMS norm (input
and one number a row).
"""

from __future__ import annotations

import weakref
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vllm_dflash.config import DrafterConfig
from vllm_dflash.modeling import drafter as drafter_module
from vllm_dflash.training import learner as learner_module
from vllm_dflash.training.config import Hyperparameters, StepLayout
from vllm_dflash.training.learner import Learner, Sample, SharedHead
from vllm_dflash.training.ranks import Ranks
from vllm_dflash.training.sharding import moment_numbers


class Live(TorchDispatchMode):
    """Bytes of the storages that are alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._seen: set[int] = set()

    def add(self, *tensors: torch.Tensor) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if id(storage) not in self._seen:
                self._seen.add(id(storage))
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self._gone, id(storage), storage.nbytes())
        self.peak = max(self.peak, self.bytes)

    def leave_out(self, tensor: torch.Tensor) -> None:
        """Counts a storage for nothing, since it is somebody else's."""
        self._seen.add(id(tensor.untyped_storage()))

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.bytes -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.add(*(t for t in tree_leaves(out) if isinstance(t, torch.Tensor)))
        return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, bias):
        out = torch.empty_like(q)
        lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
        ctx.save_for_backward(q, k, v, bias, out, lse)
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, *_ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, torch.empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def _attend(q_NQD, k_GSD, v_GSD, bias_MP):
    """As ``modeling.attention.attend``: heads that share a KV head are rows of one, keys are padded."""
    padding = bias_MP.shape[1] - k_GSD.shape[1]
    if padding:
        k_GSD, v_GSD = (torch.nn.functional.pad(x, (0, 0, 0, padding)) for x in (k_GSD, v_GSD))
    q = q_NQD.reshape(k_GSD.shape[0], -1, k_GSD.shape[2])
    return _Attention.apply(q, k_GSD, v_GSD, bias_MP).view(q_NQD.shape)


def _norm(x, shape, weight, eps):
    return _RMSNorm.apply(x, weight)


@contextmanager
def _fake_learner():
    """Fake tensors, and a learner whose arithmetic on them is what CUDA keeps."""
    with ExitStack() as stack:
        for name in ("init_weights", "init_vocab_weights"):
            stack.enter_context(
                patch.object(drafter_module.Drafter, name, lambda *args, **kwargs: None)
            )
        stack.enter_context(
            patch.object(drafter_module.Drafter, "to", lambda self, *args, **kwargs: self)
        )
        stack.enter_context(patch.object(drafter_module, "attend", _attend))
        stack.enter_context(patch.object(drafter_module.F, "rms_norm", _norm))
        # Whatever this CPU has: what is asked of it is what CUDA keeps.
        stack.enter_context(patch.object(learner_module, "cpu_has_bfloat16", lambda: True))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield


def _sample(config: DrafterConfig, key: str, max_len: int, generated: int) -> Sample:
    return Sample(
        key,
        [7] * max_len,
        [False] * (max_len - generated) + [True] * generated,
        torch.empty(max_len - 1, config.num_features, dtype=torch.bfloat16),
    )


class _Walked(Exception):
    pass


def fake_acceptance_peak(config: DrafterConfig, num_draft_tokens: int, max_len: int) -> int:
    """Bytes that live together at most while a response is replayed, in bfloat16; fp32 weights included."""
    with _fake_learner():
        vocab, hidden = config.vocab_size, config.target_hidden_size or config.hidden_size
        shared = torch.empty(vocab, hidden, dtype=torch.bfloat16)
        head = SharedHead(shared, shared[: config.logits_vocab_size], None)
        learner = Learner(config, Hyperparameters(), head, 1)
        sample = _sample(config, "s", max_len, learner_module.EVAL_ANCHORS + 1)
        live = Live()
        live.leave_out(shared)
        live.leave_out(sample.features_TF)
        live.add(*learner.drafter.parameters())
        logits = head.logits

        def last(*args):
            live.add(logits(*args))
            raise _Walked

        with live, patch.object(head, "logits", last):
            served = learner.serving_drafter(torch.bfloat16)
            with pytest.raises(_Walked):
                learner.accept(served, sample, num_draft_tokens, torch.bfloat16)
    return live.peak


def fake_peak(
    config: DrafterConfig,
    hparams: Hyperparameters,
    max_len: int,
    layout: StepLayout,
    ranks: int = 1,
) -> int:
    """Bytes that live together at most: weights, optimizer, a step over a sequence with its anchors last.

    Of several ranks the one with most optimizer state.
    """
    with _fake_learner():
        live = Live()
        vocab, hidden = config.vocab_size, config.target_hidden_size or config.hidden_size
        shared = torch.empty(vocab, hidden, dtype=torch.bfloat16)
        head = SharedHead(shared, shared[: config.logits_vocab_size], None)
        held = moment_numbers(Learner(config, hparams, head, 100).drafter, hparams.optimizer, ranks)
        group = SimpleNamespace(world_size=ranks, rank_in_group=held.index(max(held)))
        learner = Learner(config, hparams, head, 100, ranks=Ranks(group), layout=layout)
        for optimizer in learner.optimizers.values():
            names = ("exp_avg", "exp_avg_sq")
            if isinstance(optimizer, torch.optim.Muon):
                names = ("momentum_buffer",)
            for group in optimizer.param_groups:
                for p in group["params"]:
                    for name in names:
                        optimizer.state[p][name] = torch.zeros_like(p)
        generated = hparams.num_anchors + 1
        samples = [_sample(config, f"s{i}", max_len, generated) for i in range(hparams.batch_size)]
        live.leave_out(shared)  # the verifier's
        live.add(*learner.drafter.parameters(), *(learner.ema or {}).values())
        for optimizer in learner.optimizers.values():
            live.add(*(t for slot in optimizer.state.values() for t in slot.values()))
        live.add(*(s.features_TF for s in samples))
        groups = [s.anchor_candidates() for s in samples]
        assert all(len(g) == hparams.num_anchors for g in groups)
        with live:
            for part in learner._parts(samples, groups):
                learner._backward(*part)
    return live.peak
