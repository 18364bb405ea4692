"""The DFlash drafter in plain PyTorch, to be read beside arXiv 2602.06036, section 3.

Parameter names are those of the public checkpoints, so a state dict *is* a checkpoint. The
verifier's token embedding and lm_head are shared and frozen: callers pass embedded block tokens in
and apply lm_head to what comes out.

Shape suffixes: T context tokens (packed over sequences), A anchors (packed), B draft block size,
H drafter hidden size, F features (L target layers x verifier hidden), N query heads, G KV heads,
D head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vllm_dflash.config import DrafterConfig
from vllm_dflash.modeling.attention import attend
from vllm_dflash.modeling.blocks import BlockLayout
from vllm_dflash.modeling.dflash2 import CandidateSelector, FactoredSelector, GroupedConv


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight.float(), self.eps).to(x.dtype)


class RotaryEmbedding(nn.Module):
    """Rotary position embedding over the first ``rotary_dim`` elements of each head.

    Scaled variants (yarn, llama3, linear, ...) take their frequencies from transformers'
    ``ROPE_INIT_FUNCTIONS``, which vLLM's ``get_rope`` agrees with.
    """

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        rope = config.rope_parameters
        self.is_neox_style = config.is_neox_style
        self.rotary_dim = int(config.head_dim * rope.get("partial_rotary_factor", 1.0))
        self.scaling = 1.0
        kind = rope.get("rope_type", "default")
        if kind == "default":
            exponent = torch.arange(0, self.rotary_dim, 2, dtype=torch.float32) / self.rotary_dim
            inv_freq = 1.0 / config.rope_theta**exponent
        else:
            from transformers import Qwen3Config
            from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

            if kind not in ROPE_INIT_FUNCTIONS:
                raise ValueError(
                    f"drafter config: rope_type {kind!r} is unknown; known: "
                    f"{sorted(['default', *ROPE_INIT_FUNCTIONS])}"
                )
            hf_config = Qwen3Config(
                hidden_size=config.hidden_size,
                num_attention_heads=config.num_attention_heads,
                head_dim=config.head_dim,
                max_position_embeddings=config.max_position_embeddings,
                rope_parameters={**rope, "rope_theta": config.rope_theta},
            )
            inv_freq, self.scaling = ROPE_INIT_FUNCTIONS[kind](hf_config, torch.device("cpu"))
        # Not a buffer: module.to(torch.bfloat16) would round it, and angles grow with position.
        self.inv_freq: Tensor = inv_freq

    def cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """fp32 cosines and sines ``[*positions, rotary_dim / 2]`` of integer positions."""
        angles = positions.unsqueeze(-1).float() * self.inv_freq.to(positions.device)
        return angles.cos() * self.scaling, angles.sin() * self.scaling

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotates ``x[..., heads, D]`` by angles ``[..., rotary_dim / 2]``."""
        cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
        rotated, rest = x[..., : self.rotary_dim].float(), x[..., self.rotary_dim :]
        if self.is_neox_style:
            first, second = rotated.chunk(2, dim=-1)
            out = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        else:
            first, second = rotated[..., ::2], rotated[..., 1::2]
            out = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1)
            out = out.flatten(-2)
        return torch.cat((out.to(x.dtype), rest), dim=-1) if rest.shape[-1] else out.to(x.dtype)


class Attention(nn.Module):
    """Draft attention with KV injection: queries come from the block only, keys and values from
    the context features and from the block (paper, eq. 3)."""

    def __init__(self, config: DrafterConfig, layer_idx: int) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.window, self.causal = config.layer_window(layer_idx), config.layer_causal(layer_idx)
        hidden, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(hidden, self.num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden, self.num_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden, self.num_kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, hidden, bias=bias)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def keys_values(
        self, x: Tensor, rope: RotaryEmbedding, cos_sin: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """``x[..., H]`` to keys and values ``[..., G, D]``; used for context and block alike."""
        shape = (*x.shape[:-1], self.num_kv_heads, self.head_dim)
        k = self.k_norm(self.k_proj(x).view(shape))
        return rope(k, *cos_sin), self.v_proj(x).view(shape)

    def forward(
        self,
        x_ABH: Tensor,
        context: Tensor,
        rope: RotaryEmbedding,
        block_cos_sin: tuple[Tensor, Tensor],
        context_cos_sin: tuple[Tensor, Tensor],
        layout: BlockLayout,
    ) -> Tensor:
        k_ctx_TGD, v_ctx_TGD = self.keys_values(context, rope, context_cos_sin)
        k_blk, v_blk = self.keys_values(x_ABH, rope, block_cos_sin)
        q_shape = (*x_ABH.shape[:-1], self.num_heads, self.head_dim)
        q = rope(self.q_norm(self.q_proj(x_ABH).view(q_shape)), *block_cos_sin)
        outputs = []
        for chunk in layout.chunks:
            keys = torch.cat((k_ctx_TGD[chunk.context], k_blk[chunk.anchors].flatten(0, 1)))
            values = torch.cat((v_ctx_TGD[chunk.context], v_blk[chunk.anchors].flatten(0, 1)))
            bias = layout.bias(
                chunk, self.window, self.causal, self.num_heads // self.num_kv_heads, values.dtype
            )
            out = attend(
                q[chunk.anchors].flatten(0, 1).transpose(0, 1),
                keys.transpose(0, 1),
                values.transpose(0, 1),
                bias,
            )
            outputs.append(out.transpose(0, 1).flatten(1))
        return self.o_proj(torch.cat(outputs).view(*x_ABH.shape[:-1], -1))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        if config.hidden_act != "silu":
            raise ValueError(
                f"drafter config: hidden_act {config.hidden_act!r} cannot be trained; only 'silu'"
            )
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Pre-norm transformer layer; the context passes only through its K/V projections."""

    def __init__(self, config: DrafterConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer_idx)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.checkpoint_mlp = False
        self.attention_conv = self.mlp_conv = None
        if config.head is not None:
            self.attention_conv = GroupedConv(config.hidden_size, config.head)
            self.mlp_conv = GroupedConv(config.hidden_size, config.head)

    def forward(self, x_ABH: Tensor, *attention_args) -> Tensor:
        normed = self.input_layernorm(x_ABH)
        if self.attention_conv is None:
            x_ABH = x_ABH + self.self_attn(normed, *attention_args)
        else:
            normed, kernels = self.attention_conv.prepare(normed)
            y_ABH = self.self_attn(normed, *attention_args)
            x_ABH = x_ABH + self.attention_conv.finish(y_ABH, kernels)
        normed = self.post_attention_layernorm(x_ABH)
        if self.checkpoint_mlp and torch.is_grad_enabled():
            return x_ABH + checkpoint(
                self._mlp, normed, use_reentrant=False, preserve_rng_state=False
            )
        return x_ABH + self._mlp(normed)

    def _mlp(self, normed: Tensor) -> Tensor:
        if self.mlp_conv is None:
            return self.mlp(normed)
        normed, kernels = self.mlp_conv.prepare(normed)
        return self.mlp_conv.finish(self.mlp(normed), kernels)


class Drafter(nn.Module):
    """DFlash drafter; without embedding and lm_head, unless its width is not the verifier's.

    Args:
        factored: a selector's codebooks are projections of the verifier's tables (to learn), not tables.

    Raises:
        ValueError: the configuration asks for arithmetic that is served but not trained here
            (attention sinks, value scales, an activation other than SiLU).
    """

    def __init__(self, config: DrafterConfig, factored: bool = False) -> None:
        super().__init__()
        if config.serve_only:
            raise ValueError(
                f"drafters with {sorted(config.serve_only)} are served but cannot be trained here"
            )
        self.config = config
        self.fc = nn.Linear(config.num_features, config.hidden_size, bias=False)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.layers = nn.ModuleList(
            DecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rope = RotaryEmbedding(config)
        self.embed_tokens: nn.Embedding | None = None
        self.lm_head: nn.Linear | None = None
        if config.has_own_vocab_weights:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
            self.lm_head = nn.Linear(config.hidden_size, config.logits_vocab_size, bias=False)
        self.candidate_selector: CandidateSelector | FactoredSelector | None = None
        if config.head is not None:
            make: type = FactoredSelector if factored else CandidateSelector
            rows = config.verifier_hidden_size if factored else config.vocab_size
            self.candidate_selector = make(rows, config.hidden_size, config.head.selector_rank)

    def init_weights(self, std: float = 0.02, generator: torch.Generator | None = None) -> None:
        """Normal weights, unit norms, zero biases; a head that changes nothing.

        Beside a head all others are as without one.
        """
        of_head: set[nn.Module] = set()
        for module in self.modules():
            if isinstance(module, (GroupedConv, CandidateSelector, FactoredSelector)):
                of_head.update(module.modules())
                module.init_neutral()
        for module in self.modules():
            if module in of_head:
                continue
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=std, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=std, generator=generator)
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)

    def checkpoint_mlps(self, enabled: bool) -> None:
        """Whether training keeps nothing of the MLPs, but computes them again in the backward pass."""
        for layer in self.layers:
            layer.checkpoint_mlp = enabled  # type: ignore[assignment]

    @torch.no_grad()
    def init_vocab_weights(self, embedding_VH: Tensor, lm_head_VH: Tensor) -> None:
        """Own embedding and lm_head from the verifier's: their principal components. A selector's codebooks
        are made of those too.

        Args:
            embedding_VH: the verifier's token embedding.
            lm_head_VH: its output projection, of the draft vocabulary.
        """
        if isinstance(self.candidate_selector, FactoredSelector):
            self.candidate_selector.init_projections(embedding_VH, lm_head_VH)
        if self.embed_tokens is not None and self.lm_head is not None:
            width = self.config.hidden_size
            self.embed_tokens.weight.copy_(principal_components(embedding_VH, width))
            self.lm_head.weight.copy_(principal_components(lm_head_VH, width))

    def forward(
        self,
        block_embeds_ABH: Tensor,
        features_TF: Tensor,
        context_positions_T: Tensor,
        layout: BlockLayout,
    ) -> Tensor:
        """Final hidden states ``[A, B, H]`` of every block slot, ready for lm_head.

        Args:
            block_embeds_ABH: embedded blocks, the anchor token first, mask tokens after it.
            features_TF: verifier features of the context tokens, packed over sequences.
            context_positions_T: int64 position of each context token in its sequence.
            layout: which anchors see which context tokens.
        """
        context = self.hidden_norm(self.fc(features_TF))
        block_cos_sin = self.rope.cos_sin(layout.block_positions_AB)
        context_cos_sin = self.rope.cos_sin(context_positions_T)
        x_ABH = block_embeds_ABH
        for layer in self.layers:
            x_ABH = layer(x_ABH, context, self.rope, block_cos_sin, context_cos_sin, layout)
        return self.norm(x_ABH)


def principal_components(rows_VH: Tensor, width: int) -> Tensor:
    """Rows in the ``width`` directions in which they are longest ``[V, width]``, float32; zeros beyond H."""
    rows_VH = rows_VH.float()
    _, directions = torch.linalg.eigh(rows_VH.T @ rows_VH)
    kept = rows_VH @ directions.flip(-1)[:, :width]
    return nn.functional.pad(kept, (0, width - kept.shape[-1]))
