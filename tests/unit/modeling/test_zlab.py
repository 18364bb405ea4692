"""A drafter in z-lab's format under inference as z-lab describes it: Transformers' Qwen3 parts, a cache that
grows by accepted tokens, features by Transformers. Written from that description."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3MLP,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
    rotate_half,
)

from helpers import tiny
from helpers.parity import Reference

MAX_TOKENS = 48


class Layer(nn.Module):
    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        heads, groups, dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        attention: Any = nn.Module()
        for name, width in (("q_proj", heads), ("k_proj", groups), ("v_proj", groups)):
            setattr(attention, name, nn.Linear(config.hidden_size, width * dim, bias=False))
        attention.o_proj = nn.Linear(heads * dim, config.hidden_size, bias=False)
        attention.q_norm = Qwen3RMSNorm(dim, config.rms_norm_eps)
        attention.k_norm = Qwen3RMSNorm(dim, config.rms_norm_eps)
        self.self_attn, self.mlp, self.head_dim = attention, Qwen3MLP(config), dim
        self.input_layernorm = Qwen3RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, config.rms_norm_eps)
        #: Keys ``[G, T, D]`` and values of the context.
        self.cache: tuple[Tensor, Tensor] | None = None

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(len(x), -1, self.head_dim).transpose(0, 1)

    def forward(self, x: Tensor, context: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Block states ``[B, H]``; ``context`` has the new tokens, angles are theirs and the block's."""
        attention = self.self_attn
        new, normed = len(context), self.input_layernorm(x)
        states = torch.cat((context, normed))
        keys = attention.k_norm(self._heads(attention.k_proj(states)))
        values = self._heads(attention.v_proj(states))
        queries = attention.q_norm(self._heads(attention.q_proj(normed)))
        keys = keys * cos + rotate_half(keys) * sin
        queries = queries * cos[new:] + rotate_half(queries) * sin[new:]
        if self.cache is not None:
            keys = torch.cat((self.cache[0], keys), dim=1)
            values = torch.cat((self.cache[1], values), dim=1)
        # The block's own are computed anew in the next step, when its features are known.
        self.cache = keys[:, : -len(x)], values[:, : -len(x)]
        out = nn.functional.scaled_dot_product_attention(
            queries[None], keys[None], values[None], enable_gqa=True
        )[0]
        x = x + attention.o_proj(out.transpose(0, 1).flatten(1))
        return x + self.mlp(self.post_attention_layernorm(x))


class ZlabDrafter(nn.Module):
    """Reads a folder by the published names only."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        raw = json.loads((folder / "config.json").read_text())
        assert raw["architectures"] == ["DFlashDraftModel"]
        own = raw["dflash_config"]
        self.block_size, self.mask = raw["block_size"], own["mask_token_id"]
        self.target_layer_ids = own["target_layer_ids"]
        config = Qwen3Config(**raw)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.fc = nn.Linear(
            len(self.target_layer_ids) * config.hidden_size, config.hidden_size, bias=False
        )
        self.hidden_norm = Qwen3RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.norm = Qwen3RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = Qwen3RotaryEmbedding(config)
        self.load_state_dict(load_file(folder / "model.safetensors"))

    def forward(self, block: Tensor, features: Tensor, start: int) -> Tensor:
        """``[B, H]`` of an embedded block behind features ``[T, F]`` of new tokens, from ``start``."""
        positions = torch.arange(start, start + len(features) + len(block))[None]
        cos, sin = (a[0] for a in self.rotary_emb(block, positions))
        context = self.hidden_norm(self.fc(features))
        for layer in self.layers:
            block = layer(block, context, cos, sin)
        return self.norm(block)


@pytest.mark.parametrize("num_layers", [1, 3])
@torch.no_grad()
def test_the_published_loop_drafts_the_same(verifier, prompts, tmp_path, num_layers) -> None:
    path = tiny.make_drafter(tmp_path / "drafter", verifier, num_hidden_layers=num_layers)
    drafter, ours = ZlabDrafter(path), Reference(verifier, path)
    target = AutoModelForCausalLM.from_pretrained(verifier, dtype=torch.float32)
    embedding, head = target.model.embed_tokens, target.lm_head
    rng, compared = random.Random(0), 0
    for prompt in prompts[:4]:
        for layer in drafter.layers:
            layer.cache = None
        ids = target.generate(
            torch.tensor([prompt]), max_new_tokens=MAX_TOKENS, do_sample=False, eos_token_id=-1
        )
        states = target(ids, output_hidden_states=True).hidden_states
        features = torch.cat([states[i + 1][0] for i in drafter.target_layer_ids], dim=-1)
        text, seen, anchor = ids[0].tolist(), 0, len(prompt)
        while anchor < len(text):
            block = torch.tensor([text[anchor]] + [drafter.mask] * (drafter.block_size - 1))
            hidden = drafter(embedding(block), features[seen:anchor], seen)
            drafts = head(hidden[1:]).argmax(-1).tolist()
            wanted, lead = ours.draft(text[anchor], anchor, features, len(drafts))
            for k, (a, b) in enumerate(zip(drafts, wanted, strict=True)):
                assert a == b or lead[k] < 1e-4, (drafts, wanted, lead)
            compared += len(drafts)
            # As if any number of them had been accepted.
            seen, anchor = anchor, anchor + rng.randint(1, drafter.block_size)
    assert compared > 200
