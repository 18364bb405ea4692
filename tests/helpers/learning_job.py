"""What serves after a swap, in a process of its own: differences of every weight from the learner's.

    python -m helpers.learning_job job.json out.json

The job: ``verifier``, ``drafter``, ``everything`` (whether all weights are learned), ``runner`` (v1 or v2).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch


def differences(inner: Any, weights: dict[str, torch.Tensor]) -> dict[str, float]:
    """Largest differences, by what; layers are compared by what they compute, as they may be packed."""
    found: dict[str, float] = {}

    def add(name: str, served: torch.Tensor, right: torch.Tensor) -> None:
        found[name] = max(found.get(name, 0.0), float((served - right).abs().max()))

    def layer(name: str, module: Any, *parts: str) -> None:
        whole = torch.cat([weights[f"{part}.weight"] for part in parts])
        x = torch.randn(3, whole.shape[1])
        got = module(x)
        add(name, got[0] if isinstance(got, tuple) else got, x @ whole.T)

    for i, block in enumerate(inner.layers):
        at, mlp = f"layers.{i}.self_attn.", f"layers.{i}.mlp."
        layer("qkv", block.self_attn.qkv_proj, *(f"{at}{n}_proj" for n in "qkv"))
        layer("o", block.self_attn.o_proj, f"{at}o_proj")
        layer("gate_up", block.mlp.gate_up_proj, f"{mlp}gate_proj", f"{mlp}up_proj")
        layer("down", block.mlp.down_proj, f"{mlp}down_proj")
        for name, norm in (
            (f"layers.{i}.input_layernorm", block.input_layernorm),
            (f"layers.{i}.post_attention_layernorm", block.post_attention_layernorm),
            (f"{at}q_norm", block.self_attn.q_norm),
            (f"{at}k_norm", block.self_attn.k_norm),
        ):
            add("norms", norm.weight, weights[f"{name}.weight"])
    layer("fc", inner.fc, "fc")
    add("norms", inner.norm.weight, weights["norm.weight"])
    names = [
        f"layers.{i}.self_attn.{n}_proj.weight" for i in range(len(inner.layers)) for n in "kv"
    ]
    add("context", inner._fused_kv_weight, torch.cat([weights[n] for n in names]))
    add("context", inner._hidden_norm_weight, weights["hidden_norm.weight"])
    return found


def main(job_file: str, out_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    if job["runner"] == "v2":
        from helpers import interpreted_v2

        interpreted_v2.install()
    from vllm_dflash.learning import worker
    from vllm_dflash.training.config import EngineOptions
    from vllm_dflash.training.engine import VerifierEngine
    from vllm_dflash.training.ranks import Failure

    options = EngineOptions(max_len=200, dtype="float32")
    engine = VerifierEngine(job["verifier"], job["drafter"], options, num_speculative_tokens=4)

    def call(*args: Any) -> Any:
        answer = engine.engine.collective_rpc(worker.run, args=args)[0]
        if isinstance(answer, Failure):
            raise answer.error()
        return answer

    call("start", "all" if job["everything"] else "decode", 1e-3)
    held = engine.engine.model_executor.driver_worker
    session = held.__dict__["_vllm_dflash_learning"]
    learner, inner = session.learner, session.source.model.model
    addresses = [t.data_ptr() for t in (inner._fused_kv_weight, inner.norm.weight)]
    torch.manual_seed(0)
    learned = {n for n, p in learner.drafter.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, weight in learner.ema.items():
            if name in learned:
                weight.add_(0.05 * torch.randn_like(weight))
    shared = inner.embed_tokens.weight.clone()
    before = differences(inner, learner.weights())
    call("swap")
    after = differences(inner, learner.weights())
    out = {
        "learned": sorted(learned),
        "before": before,
        "after": after,
        "same_addresses": addresses
        == [t.data_ptr() for t in (inner._fused_kv_weight, inner.norm.weight)],
        "embedding_kept": torch.equal(shared, inner.embed_tokens.weight),
    }
    Path(out_file).write_text(json.dumps(out))


if __name__ == "__main__":
    main(*sys.argv[1:3])
