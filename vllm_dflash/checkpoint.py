"""Drafter checkpoints on disk: read, check, save atomically. safetensors only, no code in pickles.

The one other file with weights is ``mask_embedding.pt``, which vLLM reads beside the safetensors where a
drafter's mask token has an embedding of its own; it is loaded as plain tensors (``weights_only``).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_dflash.config import CheckpointFormat, DrafterConfig, quoted
from vllm_dflash.config_formats import is_speculators, speculators_remarks
from vllm_dflash.files import atomic_folder, claim_folder

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS_FILE = "model.safetensors"
#: ``_read_mask_embedding`` in vLLM's qwen3_dflash.py; among the weights its tensor is MASK_EMBEDDING.
MASK_EMBEDDING_FILE, MASK_EMBEDDING = "mask_embedding.pt", "mask_embedding"
#: ModelOpt's name for what others put into ``quantization_config``; vLLM reads it beside config.json.
_QUANT_FILE = "hf_quant_config.json"
#: Where a drafter came from and what acceptance to expect of it; goes where its weights go.
TRAINING_FILE = "dflash_training.json"
#: Names that vLLM's DFlash model takes for others.
_RENAMED = {
    "midlayer.": "layers.0.",
    "encoder.output_norm_enc.": "hidden_norm.",
    "encoder.fc.": "fc.",
}
#: Tensors that a checkpoint may hold besides the drafter's own.
_OPTIONAL = ("embed_tokens.weight", "lm_head.weight", "d2t", "t2d")
#: Buffers that old exports hold and vLLM skips: they follow from the configuration.
_DERIVED = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")


def weight_bytes(model: str | Path) -> int | None:
    """Size of a model's weights on this machine, by their index or files; None if there are none (yet)."""
    folder = Path(model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(str(model), local_files_only=True))
        except (OSError, ValueError):  # not fetched yet, or no name of the hub
            return None
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        total = json.loads(index.read_text()).get("metadata", {}).get("total_size")
        if total:
            return int(total)
    for pattern in ("*.safetensors", "*.bin", "*.gguf"):
        sizes = [file.stat().st_size for file in folder.glob(pattern)]
        if sizes:
            return sum(sizes)
    return None


def local_folder(model: str | Path, revision: str | None = None) -> Path:
    """The folder of a checkpoint; what a hub name has that is not on this machine is fetched.

    Raises:
        ValueError: the hub has none of that name, or cannot be reached.
    """
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", MASK_EMBEDDING_FILE]
    try:
        return Path(snapshot_download(str(model), revision=revision, allow_patterns=wanted))
    except Exception as error:  # the hub's clients raise a dozen unrelated classes
        raise ValueError(
            f"the weights of drafter {model} are neither in a folder nor on the hub: {error}"
        ) from error


def read_config(model: str | Path, revision: str | None = None) -> dict[str, Any]:
    """Parsed ``config.json`` of a checkpoint folder or hub name.

    Raises:
        ValueError: the folder or the file is missing, or is not JSON.
    """
    path = Path(model)
    if not path.exists():
        if path.is_absolute() or str(model).startswith(".") or str(model).count("/") != 1:
            raise ValueError(f"drafter {model} does not exist: no such folder")
        from transformers import PretrainedConfig

        try:
            raw, _ = PretrainedConfig.get_config_dict(str(model), revision=revision)
        except OSError as error:
            raise ValueError(
                f"drafter {model} is neither a folder nor a hub model that can be reached: {error}"
            ) from error
        return raw
    file = path / "config.json"
    if not file.is_file():
        raise ValueError(f"{model} is not a drafter checkpoint: there is no {file}")
    try:
        raw = json.loads(file.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{file} is nested too deeply to be a configuration") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{file} holds a {type(raw).__name__}, not an object")
    return raw


def quantization(path: str | Path, raw: dict[str, Any]) -> str | None:
    """How a checkpoint's weights are quantised, None where they are not.

    Args:
        path: checkpoint folder, whose side file counts too; of a hub name only ``raw`` is looked at.
        raw: its parsed ``config.json``.
    """
    said = raw.get("quantization_config")
    file = Path(path) / _QUANT_FILE
    if not said and file.is_file():
        try:
            said = json.loads(file.read_text())
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not said:
        return None
    inner = said.get("quantization", said) if isinstance(said, dict) else {}
    name = inner.get("quant_algo") or inner.get("quant_method") if isinstance(inner, dict) else None
    return str(name or "quantised")


def weight_files(path: str | Path) -> list[Path]:
    """The safetensors files of a checkpoint folder; ValueError when there are none."""
    folder = Path(path)
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return files
    pickled = sorted([*folder.glob("*.bin"), *folder.glob("*.pt")])
    if pickled:
        raise ValueError(
            f"{path} has only pickled weights ({pickled[0].name}), which are not loaded because "
            "they can run code; convert them to safetensors"
        )
    raise ValueError(f"{path} has no *.safetensors weights")


def expected_shapes(config: DrafterConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor the drafter needs, as both public formats name them."""
    hidden, mlp = config.hidden_size, config.intermediate_size
    q, kv = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (hidden, config.num_features),
        "hidden_norm.weight": (hidden,),
        "norm.weight": (hidden,),
    }
    for i in range(config.num_hidden_layers):
        layer = {
            "self_attn.q_proj.weight": (q, hidden),
            "self_attn.k_proj.weight": (kv, hidden),
            "self_attn.v_proj.weight": (kv, hidden),
            "self_attn.o_proj.weight": (hidden, q),
            "self_attn.q_norm.weight": (config.head_dim,),
            "self_attn.k_norm.weight": (config.head_dim,),
            "mlp.gate_proj.weight": (mlp, hidden),
            "mlp.up_proj.weight": (mlp, hidden),
            "mlp.down_proj.weight": (hidden, mlp),
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
        }
        if config.attention_bias:
            for name, size in (("q", q), ("k", kv), ("v", kv), ("o", hidden)):
                layer[f"self_attn.{name}_proj.bias"] = (size,)
        if config.serve_only.get("attention_sink_bias"):
            layer["self_attn.attention_sink_bias"] = (config.num_attention_heads,)
        if config.head is not None:
            taps, rank = config.head.conv_kernel_size, config.head.selector_rank
            groups = hidden // config.head.conv_group_size
            for conv in ("attention_conv", "mlp_conv"):
                layer[f"{conv}.base_kernel"] = (2, taps, hidden)
                layer[f"{conv}.kernel_projection.weight"] = (2 * taps * groups, hidden)
            for book in ("predecessor", "successor"):
                shapes[f"candidate_selector.{book}_codebook"] = (config.vocab_size, rank)
            shapes["candidate_selector.hidden_projection.weight"] = (rank, hidden)
        shapes |= {f"layers.{i}.{name}": tuple(shape) for name, shape in layer.items()}
    if config.has_draft_vocab:
        shapes["d2t"] = (config.logits_vocab_size,)
        shapes["lm_head.weight"] = (config.logits_vocab_size, hidden)
    if config.has_own_vocab_weights:
        shapes["embed_tokens.weight"] = (config.vocab_size, hidden)
        shapes["lm_head.weight"] = (config.logits_vocab_size, hidden)
    return shapes


def _renamed(name: str) -> str:
    for old, new in _RENAMED.items():
        name = name.replace(old, new)
    return name


def check_weights(path: str | Path, config: DrafterConfig) -> None:
    """Compares a local checkpoint's tensors with its configuration, reading headers only.

    Does nothing for hub names: vLLM downloads those later, and loading checks them again.

    Raises:
        ValueError: a file that is cut short, a tensor that is missing, unknown or of another shape.
    """
    if not Path(path).is_dir():
        return
    from safetensors import SafetensorError, safe_open

    have: dict[str, tuple[int, ...]] = {}
    for file in weight_files(path):
        try:
            with safe_open(file, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118 - safe_open is not a dict
                    if not name.endswith(_DERIVED):
                        have[_renamed(name)] = tuple(handle.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{file} cannot be read ({error}); it is cut short or damaged, copy it again"
            ) from error
    want = expected_shapes(config)
    missing = sorted(set(want) - set(have))
    if missing:
        raise ValueError(f"{path} lacks {_some(missing)}, which its config.json implies")
    unknown = sorted(set(have) - set(want) - set(_OPTIONAL))
    if unknown:
        raise ValueError(f"{path} holds weights that no DFlash drafter has: {_some(unknown)}")
    wrong = [f"{n} is {have[n]}, not {want[n]}" for n in sorted(want) if have[n] != want[n]]
    if wrong:
        raise ValueError(f"{path} does not match its config.json: {_some(wrong)}")


def _some(items: list[str], most: int = 3) -> str:
    rest = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + rest


def computable_folder(path: str | Path, raw: dict[str, Any], revision: str | None = None) -> Path:
    """:func:`local_folder`; ValueError for quantised weights, with which nothing here can compute."""
    folder = local_folder(path, revision)
    how = quantization(folder, raw)
    if how is not None:
        raise ValueError(
            f"{path} is quantised ({how}); vLLM serves it, but training, evaluation and conversion need the "
            "checkpoint that it was made from"
        )
    return folder


def load_weights(path: str | Path, config: DrafterConfig) -> dict[str, Tensor]:
    """All tensors of a checkpoint folder or hub name, checked for shape and for non-finite values.

    An own embedding of the mask token, ``[hidden_size]``, is among them as ``mask_embedding``.
    """
    import torch
    from safetensors.torch import load_file

    path = local_folder(path)
    check_weights(path, config)
    weights: dict[str, Tensor] = {}
    for file in weight_files(path):
        tensors = load_file(file)
        weights |= {_renamed(n): t for n, t in tensors.items() if not n.endswith(_DERIVED)}
    mask_embedding = load_mask_embedding(path, config)
    if mask_embedding is not None:
        weights[MASK_EMBEDDING] = mask_embedding
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {name} has non-finite values; the checkpoint is broken")
    return weights


def load_mask_embedding(path: str | Path, config: DrafterConfig) -> Tensor | None:
    """The embedding ``[hidden_size]`` that a checkpoint folder gives its mask token, or None.

    Raises:
        ValueError: the file is damaged, of another width, or made for another mask token.
    """
    import pickle

    import torch

    file = Path(path) / MASK_EMBEDDING_FILE
    if not file.is_file():
        return None
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError) as error:
        raise ValueError(f"{file} cannot be read: {quoted(str(error))}; copy it again") from error
    if isinstance(state, dict):
        token = state.get("mask_token_id", config.mask_token_id)
        if token != config.mask_token_id:
            raise ValueError(
                f"{file} is of mask token {quoted(token)}, config.json says {config.mask_token_id}"
            )
        state = state.get("embedding")
    if not isinstance(state, torch.Tensor) or state.numel() != config.hidden_size:
        found = tuple(state.shape) if isinstance(state, torch.Tensor) else type(state).__name__
        raise ValueError(f"{file} holds {found}, not one embedding of {config.hidden_size} values")
    return state.reshape(-1)


def save_drafter(
    path: str | Path,
    config: DrafterConfig,
    weights: dict[str, Tensor],
    fmt: CheckpointFormat = "zlab",
    extra_files: dict[str, str] | None = None,
    cast: bool = True,
) -> None:
    """Writes a checkpoint that stock vLLM loads; atomic.

    Args:
        path: folder to write, or to replace if it is ours.
        config: the drafter.
        weights: tensors named as in :func:`expected_shapes`; ``lm_head.weight`` and ``d2t`` for a
            draft vocabulary, ``mask_embedding`` where the mask token has one of its own.
        fmt: ``zlab`` or ``speculators``.
        extra_files: further text files of the folder, by name.
        cast: store floating tensors in ``config.dtype``; else each in its own.

    Raises:
        ValueError: tensors that do not match the configuration or are not finite; a folder that holds
            something else than a drafter of ours.
    """
    import torch
    from safetensors.torch import save_file

    dtype = getattr(torch, config.dtype, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"drafter config: dtype is {config.dtype!r}; use 'bfloat16' or 'float32'")
    out = {}
    for name, tensor in weights.items():
        tensor = tensor.detach().cpu()
        if tensor.is_floating_point():
            tensor = tensor.to(dtype) if cast else tensor
            if not torch.isfinite(tensor).all():
                raise ValueError(f"refusing to save {name}: it has non-finite values")
        out[name] = tensor.contiguous()
    if config.has_draft_vocab:
        out["t2d"] = _draft_tokens(config, out.get("d2t"))
    mask_embedding = out.pop(MASK_EMBEDDING, None)
    raw = config.to_dict(fmt)
    with atomic_folder(path) as folder:
        (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
        if mask_embedding is not None:
            state = {"mask_token_id": config.mask_token_id, "embedding": mask_embedding}
            torch.save(state, folder / MASK_EMBEDDING_FILE)
        save_file(out, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        # safetensors writes 0600; the server that loads it may be another user.
        (folder / WEIGHTS_FILE).chmod((folder / "config.json").stat().st_mode & 0o777)
        for name, text in (extra_files or {}).items():
            (folder / name).write_text(text)
        check_weights(folder, config)


def _draft_tokens(config: DrafterConfig, d2t: Tensor | None) -> Tensor:
    """``t2d``: bool ``[vocab_size]``, which verifier tokens the draft vocabulary holds."""
    import torch

    size = config.logits_vocab_size
    if d2t is None or d2t.shape != (size,) or d2t.is_floating_point():
        found = "missing" if d2t is None else f"{d2t.dtype} {tuple(d2t.shape)}"
        raise ValueError(f"d2t is {found}; a draft vocabulary needs {size} integer offsets")
    tokens = torch.arange(size) + d2t
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= config.vocab_size or len(tokens.unique()) != size:
        raise ValueError(
            f"d2t maps to verifier tokens {low}..{high}, {len(tokens.unique())} of {size} "
            f"distinct; they must be distinct and below vocab_size ({config.vocab_size})"
        )
    t2d = torch.zeros(config.vocab_size, dtype=torch.bool)
    t2d[tokens] = True
    return t2d


def convert(
    source: str | Path, target: str | Path, fmt: CheckpointFormat, verifier: str | None = None
) -> tuple[DrafterConfig, list[str]]:
    """Rewrites a checkpoint in the other public format, its tensors bit for bit.

    Args:
        verifier: what the speculators format is to name, where the source does not.

    Returns:
        Its configuration, and what its readers will do otherwise than the source's.
    """
    claim_folder(Path(target), "drafter", "-o", inputs={"the drafter": source})
    raw = read_config(source)
    config = DrafterConfig.from_dict(raw)
    source = computable_folder(source, raw)
    if verifier is not None:
        config = config.with_(verifier=verifier)
    weights = load_weights(source, config)
    config = config.with_(dtype=str(weights["fc.weight"].dtype).removeprefix("torch."))
    training = Path(source) / TRAINING_FILE
    extra = {TRAINING_FILE: training.read_text()} if training.is_file() else {}
    save_drafter(target, config, weights, fmt, extra, cast=False)
    remarks = list(config.remarks)
    if fmt == "speculators" or is_speculators(raw):
        remarks += speculators_remarks(config)
        if MASK_EMBEDDING in weights:
            remarks.append(f"vLLM reads {MASK_EMBEDDING_FILE}, speculators does not")
    return config, list(dict.fromkeys(remarks))
