"""Targets of the kl loss: the logits that the verifier samples from, whatever it does to lm_head's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.logits_processor import LogitsProcessor

from helpers import tiny, verifiers
from vllm_dflash.modeling.losses import block_loss
from vllm_dflash.serving.worker.features.verifier import VerifierLogits

VOCAB, HIDDEN = 40, 16
IDS = torch.tensor([1, 2, 7, 30, 39])


class Head(nn.Module):
    """What a LogitsProcessor takes of vLLM's ParallelLMHead."""

    tp_size = 1

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(VOCAB, HIDDEN), requires_grad=False)
        self.bias = nn.Parameter(torch.randn(VOCAB), requires_grad=False) if bias else None

    @property
    def quant_method(self) -> Head:
        return self

    def apply(self, layer, states, bias=None):  # type: ignore[override]
        return F.linear(states, layer.weight, bias)


class Verifier(nn.Module):
    """The end of a vLLM model."""

    def __init__(self, bias=False, before=1.0, multiplier=1.0, mask=None, real=VOCAB, **processor):
        super().__init__()
        torch.manual_seed(1)
        self.lm_head = Head(bias)
        self.before, self.multiplier, self.mask = before, multiplier, mask
        with set_current_vllm_config(VllmConfig()):
            self.logits_processor = LogitsProcessor(VOCAB, real, **processor)

    def compute_logits(self, states: torch.Tensor) -> torch.Tensor:
        logits = self.logits_processor(self.lm_head, states * self.before, self.lm_head.bias)
        logits = logits * self.multiplier
        if self.mask is not None:
            logits[:, self.mask] = float("-inf")
        return logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ids", [None, IDS], ids=["all", "draft vocabulary"])
@pytest.mark.parametrize(
    "end",
    [
        {},
        {"soft_cap": 2.0},
        {"scale": 0.0625},
        {"scale": -0.5},
        {"soft_cap": 3.0, "multiplier": 0.25},
        {"bias": True},
        {"before": 0.1, "soft_cap": 30.0},
    ],
    ids=lambda end: "-".join(end) or "bare",
)
def test_logits_are_the_verifiers(end, ids, dtype) -> None:
    verifier = Verifier(**end).to(dtype)
    rows = verifier.lm_head.weight if ids is None else verifier.lm_head.weight[ids]
    states = (3 * torch.randn(20, HIDDEN)).to(dtype)
    want = verifier.compute_logits(states)
    got = VerifierLogits(verifier, rows, ids)(states)
    exact = 1e-5 if dtype == torch.float32 else 3e-2
    wanted = want if ids is None else want[:, ids]
    torch.testing.assert_close(got, wanted, rtol=exact, atol=exact)
    # It is left as it was.
    assert torch.equal(verifier.compute_logits(states), want)


def test_rows_of_padding_are_never_targets() -> None:
    verifier = Verifier(real=30, soft_cap=2.0)
    for ids in (None, IDS):
        rows = verifier.lm_head.weight if ids is None else verifier.lm_head.weight[ids]
        got = VerifierLogits(verifier, rows, ids)(torch.randn(6, HIDDEN))
        padding = (torch.arange(VOCAB) if ids is None else ids) >= 30
        assert got.softmax(-1)[:, padding].max() == 0
        drafted = torch.randn(6, 1, len(padding), requires_grad=True)
        labels = torch.zeros(6, 1, dtype=torch.int64)
        loss = block_loss(
            drafted,
            torch.eye(len(padding)),
            labels,
            labels == 0,
            loss="kl",
            verifier_logits=got.unsqueeze(1).__getitem__,
        ).total
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(drafted.grad).all()


@pytest.mark.parametrize(
    ("verifier", "why"),
    [
        (Verifier(logits_as_input=True), "0 times"),
        # The third of all tokens, but the third of a draft vocabulary is another one.
        (Verifier(mask=2), "more than a function"),
    ],
    ids=["another projection", "a token of its own"],
)
def test_what_cannot_be_known_is_refused(verifier, why) -> None:
    verifier.lm_head.weight.data[0] = 1  # as wide as its input
    if verifier.logits_processor.logits_as_input:
        verifier.compute_logits = lambda states: F.linear(states, verifier.lm_head.weight)
    with pytest.raises(ValueError, match=rf"--loss kl cannot .* Verifier: .*{why}"):
        VerifierLogits(verifier, verifier.lm_head.weight[IDS], IDS)


TARGETS_SCRIPT = """
import json, sys
import torch
from safetensors.torch import save_file
from vllm_dflash.training.config import EngineOptions, Hyperparameters
from vllm_dflash.training.engine import VerifierEngine

verifier, seat, file, out = sys.argv[1:]
engine = VerifierEngine(verifier, seat, EngineOptions(dtype="float32", max_len=160))
hparams = Hyperparameters(loss="kl", autocast="bfloat16").as_dict()
config = json.load(open(seat + "/config.json"))
ids = json.load(open(file))
draft = ids["draft_vocab"]
config["draft_vocab_size"] = len(draft) if draft else config["vocab_size"]
engine.call("check_kl", config["vocab_size"])
engine.call("begin", config, hparams, draft, 1, None, None)
engine.call("register", [("a", ids["tokens"], [True] * len(ids["tokens"]), "test")])
assert set(dict(engine.extract({"a": ids["tokens"]})).values()) == {None}
session = engine.engine.collective_rpc(lambda w: w._vllm_dflash_session)[0]
sample = session._sample("a")
with torch.autocast("cpu", torch.bfloat16):
    got = session.learner._verifier_logits([sample], [ids["anchors"]])(slice(None))
save_file({"targets": got.contiguous()}, out)
"""
#: model_type -> what its configuration adds; how far its logits are from the projection's alone.
ENDS: dict[str, dict[str, Any]] = {
    "gemma2": {"final_logit_softcapping": 2.0},
    "cohere": {"logit_scale": 0.0625},
    "granite": {"logits_scaling": 8.0},
    "gemma4_text": {"final_logit_softcapping": 2.0},
    "gptj": {},  # lm_head has a bias
    "llama": {},
}


@pytest.mark.engine
@pytest.mark.parametrize(
    ("model_type", "draft_vocab"),
    [
        ("gemma2", True),
        *(
            pytest.param(name, name == "gptj", marks=pytest.mark.slow)
            for name in ENDS
            if name != "gemma2"
        ),
    ],
)
def test_targets_of_training_are_hugging_faces_logits(
    model_type, draft_vocab, verifier, tmp_path, prompts, monkeypatch
) -> None:
    """In float32, though the drafter is trained in bf16."""
    changed = {**verifiers.ARCHITECTURES[model_type], **ENDS[model_type]}
    monkeypatch.setitem(verifiers.ARCHITECTURES, model_type, changed)
    made = verifiers.make(tmp_path / model_type, model_type, verifier, head_std=0.4)
    seat = tiny.make_drafter(tmp_path / "seat", made, draft_block_size=4)
    tokens = (prompts[0] + prompts[1])[:60]
    job = {
        "tokens": tokens,
        "anchors": [3, 20, 41],
        "draft_vocab": [*range(2, 300, 3)] if draft_vocab else None,
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    script, out = tmp_path / "targets.py", tmp_path / "targets.safetensors"
    script.write_text(TARGETS_SCRIPT)
    subprocess.run(
        [sys.executable, script, made, seat, tmp_path / "job.json", out],
        env=tiny.environment(),
        check=True,
        timeout=300,
    )
    from safetensors.torch import load_file

    got = load_file(out)["targets"]
    _, logits = verifiers.reference(Path(made), tokens, [0])
    at = torch.tensor(job["anchors"]).unsqueeze(1) + torch.arange(3)
    want = logits[at]
    if job["draft_vocab"] is not None:
        want = want[..., job["draft_vocab"]]
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    if "final_logit_softcapping" in ENDS[model_type]:
        assert 1.5 < got.abs().max() <= 2.0
