"""Drafts of the engine beside drafts of the plain PyTorch drafter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from helpers import tiny
from vllm_dflash.checkpoint import load_weights, read_config
from vllm_dflash.config import DrafterConfig
from vllm_dflash.modeling.blocks import BlockLayout
from vllm_dflash.modeling.drafter import Drafter

MAX_TOKENS = 40


def drafted(
    verifier: Path,
    drafter: Path,
    prompts: list,
    folder: Path,
    env=None,
    engine=None,
    runner="v1",
    max_tokens: int | list[int] = MAX_TOKENS,
    random_lengths=False,
    features=True,
    job=None,
    **speculative,
) -> dict[str, Any]:
    """Serves the prompts and records every draft with the features it was made from.

    Drafts all it can each step, unless ``random_lengths``: then it drafts for some requests, sometimes for
    none, and any number of tokens. An engine that could not be built gives its ``error``.

    Args:
        max_tokens: of all requests, or of each.
    """
    limits = max_tokens if isinstance(max_tokens, list) else [max_tokens] * len(prompts)
    if (env or {}).get("VLLM_PLUGINS") != "":
        speculative = {
            "dflash_draft_length": "auto" if random_lengths else "fixed",
            **speculative,
        }
    record = folder / f"features-{len(list(folder.glob('features-*')))}.safetensors"
    job = {
        **(job or {}),
        "engine": {
            "model": str(verifier),
            "max_model_len": 192,
            "max_num_seqs": 4,
            "enable_prefix_caching": False,
            "speculative_config": {"method": "dflash", "model": str(drafter), **speculative},
            **(engine or {}),
        },
        "record": str(record),
        "runner": runner,
        "random_lengths": random_lengths,
        "features": features,
        "runs": [
            {
                "name": "run",
                "prompts": prompts,
                "params": [
                    {"temperature": 0.0, "max_tokens": n, "ignore_eos": True} for n in limits
                ],
                "concurrency": 4,
            }
        ],
    }
    out = tiny.engine_job(job, folder, env=env)
    if "error" in out:
        return out
    outputs = [o[0]["token_ids"] for o in out["runs"]["run"]["outputs"]]
    out["sequences"] = {
        f"run:{i}": p + o for i, (p, o) in enumerate(zip(prompts, outputs, strict=True))
    }
    out["prompt_lens"] = {f"run:{i}": len(p) for i, p in enumerate(prompts)}
    out["features"] = load_file(record)
    out["max_model_len"] = job["engine"]["max_model_len"]
    return out


class Reference:
    """Drafts of ``modeling.Drafter`` for recorded features."""

    def __init__(self, verifier: Path, path: Path, first_k_norm: bool = False) -> None:
        self.config = DrafterConfig.from_dict(read_config(path))
        weights = load_weights(path, self.config)
        self.drafter = Drafter(self.config).float().eval()
        own = self.drafter.state_dict()
        self.drafter.load_state_dict({n: weights[n].float() for n in own})
        if first_k_norm:
            # What vLLM's own drafter does on the CPU: see serving/worker/drafter_model.py.
            first = self.drafter.layers[0].self_attn.k_norm.weight
            for layer in self.drafter.layers[1:]:
                norms_of_context(layer.self_attn, first)
        base = load_file(verifier / "model.safetensors")
        self.embedding = weights.get(
            "embed_tokens.weight", base["model.embed_tokens.weight"]
        ).float()
        if "mask_embedding" in weights:
            self.embedding[self.config.mask_token_id] = weights["mask_embedding"]
        tied = base.get("lm_head.weight", base["model.embed_tokens.weight"])
        tied = tied[: self.config.vocab_size]
        self.head = weights.get("lm_head.weight", tied).float()
        self.ids = None
        if self.config.has_draft_vocab:
            self.ids = weights["d2t"] + torch.arange(len(weights["d2t"]))

    @torch.no_grad()
    def draft(self, token: int, anchor: int, features_TF: torch.Tensor, count: int):
        """Tokens and the logit lead of each over the runner-up."""
        # The anchor's own output predicts nothing, unless the drafter was trained so.
        first = 0 if self.config.sample_from_anchor else 1
        layout = BlockLayout.build([[anchor]], [anchor], count + first)
        ids = torch.tensor([[token] + [self.config.mask_token_id] * (count + first - 1)])
        hidden = self.drafter(
            self.embedding[ids], features_TF[:anchor], layout.context_positions_T, layout
        )
        logits = hidden[0, first:] @ self.head.T
        if self.config.head is not None:
            return self._walk(token, hidden[0, first:], logits)
        top = logits.topk(2, dim=-1)
        tokens = top.indices[:, 0]
        tokens = tokens if self.ids is None else self.ids[tokens]
        return tokens.tolist(), (top.values[:, 0] - top.values[:, 1]).tolist()

    def _walk(self, token: int, hidden: torch.Tensor, logits: torch.Tensor):
        """By the selector, a token at a time; the lead is over the runner-up there, or over what no longer is
        a candidate."""
        selector, tokens, leads = self.drafter.candidate_selector, [], []
        count = self.config.head.selector_top_k
        for h, row in zip(hidden, logits, strict=True):
            values, ids = row.topk(count + 1)
            verifier_ids = ids if self.ids is None else self.ids[ids]
            scores = (values + selector(h, torch.tensor(token), verifier_ids))[:count]
            best = scores.topk(2)
            token = int(verifier_ids[best.indices[0]])
            tokens.append(token)
            # Behind an unsure token all others are.
            lead = min(float(best.values[0] - best.values[1]), float(values[-2] - values[-1]))
            leads.append(min([lead, *leads]))
        return tokens, leads


def norms_of_context(attention: Any, weight: torch.Tensor) -> None:
    """Makes an attention norm its context keys (2 dimensions of input) with another weight."""
    own = attention.keys_values

    def keys_values(x, *args):
        kept = attention.k_norm.weight
        if x.dim() == 2:
            attention.k_norm.weight = weight
        try:
            return own(x, *args)
        finally:
            attention.k_norm.weight = kept

    attention.keys_values = keys_values


def check_drafts(out: dict[str, Any], reference: Reference, count: int) -> int:
    """Compares every draft that the engine could use; returns how many tokens that were."""
    compared = 0
    for record in out["drafts"]:
        key, anchor = record["key"], record["anchor"]
        sequence, features = out["sequences"][key], out["features"][key]
        # Chunks of a prompt are drafted too, and thrown away; beyond the last token nothing is known.
        if anchor < out["prompt_lens"][key] or anchor > len(features):
            continue
        # Nor is a block of use that reaches over the engine's end: the cache has no room for it.
        if anchor + count >= out["max_model_len"]:
            continue
        if anchor < len(sequence):
            assert sequence[anchor] == record["token"]
        want, lead = reference.draft(record["token"], anchor, features, count)
        assert len(record["drafts"]) == count
        for k, (a, b) in enumerate(zip(record["drafts"], want, strict=True)):
            assert a == b or lead[k] < 1e-4, (record, want, lead)
        compared += count
    return compared
