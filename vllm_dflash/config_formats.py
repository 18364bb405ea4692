"""``config.json`` of a drafter in both public formats: read as vLLM reads it, and written.

z-lab's file is a transformers config: keys that it lacks have the defaults of the class that its
``model_type`` names. A speculators file is taken as it stands
(``vllm/transformers_utils/configs/speculators/algos.py``), but for the causality of full layers: its own
trainer's, which vLLM 0.33 and older read otherwise.

Neither torch nor vLLM is imported here, and transformers only for a ``model_type`` other than qwen3.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import asdict, fields
from typing import Any

from vllm_dflash.config import (
    FULL,
    SLIDING,
    CandidateHead,
    CheckpointFormat,
    DrafterConfig,
    hidden_state_index,
    quoted,
    target_layer_id,
)

#: The architecture of plain DFlash drafters in vLLM's registry.
ARCHITECTURE = "DFlashDraftModel"
#: That of drafters with DFlash 2's head, in both formats.
HEAD_ARCHITECTURE = "DFlash2DraftModel"
#: Others that vLLM serves with method dflash or dspark, by what people call them.
_OTHER_KINDS = {
    "LiLiCorrDraftModel": "LiLiCorr",
    "XPressDraftModel": "XPress",
    "DFlashLagunaForCausalLM": "Laguna DFlash",
    "MuseGlimmerAssistantModel": "Muse Glimmer assistant",
    "DFlashMuseGlimmerAssistantModel": "Muse Glimmer assistant",
}
_SPECULATORS_KINDS = {"dspark": "DSpark", "xpress": "XPress"}
#: Keys of ``dflash_config`` that vLLM's DFlash classes read, and what they may be.
_DFLASH_KEYS = frozenset(
    "target_layer_ids mask_token_id causal sample_from_anchor use_swa swa_window_size "
    "use_aux_hidden_state attention_sink_bias attention_value_scale block_size".split()
)
#: Keys of DFlash 2's head: under ``dflash_config`` in z-lab's files, at the top in speculators'.
_HEAD_KEYS = tuple(f.name for f in fields(CandidateHead))
#: What z-lab's drafters say of verifiers that scale embeddings or logits, by the value that does nothing.
_SCALES = {"input_embedding_scale": 1.0, "output_multiplier": 1.0, "final_logit_softcapping": 0.0}
#: Keys of other kinds of drafters; one of them under a plain drafter's architecture means other arithmetic.
_FOREIGN_KEYS = {
    "markov_rank": "DSpark",
    "markov_head_type": "DSpark",
    "projector_type": "DSpark",
    "selector_rank": "DFlash 2",
    "selector_top_k": "DFlash 2",
    "conv_kernel_size": "DFlash 2",
}
#: Defaults of transformers' Qwen3Config.
_QWEN3 = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
_DTYPES = ("bfloat16", "float16", "float32")


class UnsupportedDrafter(ValueError):
    """A drafter of another kind: neither trained nor checked here, but perhaps served by vLLM."""


class AmbiguousConfig(ValueError):
    """Two places of the file contradict each other; vLLM reads one of them."""


# -- values ------------------------------------------------------------------------------------------


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return (_is_int(value) or isinstance(value, float)) and math.isfinite(value)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(_is_int(v) for v in value)


def _is_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


_INT = (_is_int, "a whole number")
_POSITIVE = (lambda v: _is_number(v) and v > 0, "a positive number")
_NUMBER = (_is_number, "a number")
_FLAG = (lambda v: isinstance(v, int) and v in (0, 1), "true or false")
_IDS = (_is_ids, "a list of layer ids")
_OBJECT = (lambda v: isinstance(v, dict), "an object")
_TEXT = (lambda v: isinstance(v, str), "a text")
_TEXTS = (_is_strings, "a list of texts")

#: What each key may be where it is given; null is as good as absent.
_LAYER_TYPES_OF: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        "head_dim max_position_embeddings sliding_window max_window_layers".split(),
        _INT,
    ),
    **dict.fromkeys("rms_norm_eps rope_theta".split(), _POSITIVE),
    **dict.fromkeys("partial_rotary_factor rotary_pct rotary_emb_fraction".split(), _NUMBER),
    **dict.fromkeys(
        "attention_bias use_sliding_window is_neox_style is_causal add_swa_attention_sink_bias".split(),
        _FLAG,
    ),
    "rope_parameters": _OBJECT,
    "rope_scaling": _OBJECT,
    "layer_types": _TEXTS,
    "hidden_act": _TEXT,
    "model_type": _TEXT,
    "dtype": _TEXT,
    "torch_dtype": _TEXT,
}
_TOP_TYPES = {
    **dict.fromkeys(
        "block_size num_target_layers target_hidden_size draft_vocab_size mask_token_id".split(),
        _INT,
    ),
    **dict.fromkeys(_HEAD_KEYS, _INT),
    **dict.fromkeys("sample_from_anchor sliding_window_non_causal".split(), _FLAG),
    "aux_hidden_state_layer_ids": _IDS,
    "eagle_aux_hidden_state_layer_ids": _IDS,
    "dflash_config": _OBJECT,
    "transformer_layer_config": _OBJECT,
    "quantization_config": _OBJECT,
    "speculators_config": _OBJECT,
    "speculators_model_type": _TEXT,
    "architectures": _TEXTS,
    "verifier": _TEXT,
    "dtype": _TEXT,
    "torch_dtype": _TEXT,
}
_DFLASH_TYPES = {
    **dict.fromkeys(("mask_token_id", "swa_window_size", "block_size", *_HEAD_KEYS), _INT),
    **dict.fromkeys(_SCALES, _NUMBER),
    **dict.fromkeys(
        "causal sample_from_anchor use_swa use_aux_hidden_state attention_sink_bias".split(), _FLAG
    ),
    "attention_value_scale": _NUMBER,
    "target_layer_ids": _IDS,
}
_ROPE_TYPES_OF = {
    **dict.fromkeys("rope_theta factor".split(), _POSITIVE),
    "partial_rotary_factor": (
        lambda v: _is_number(v) and 0 < v <= 1,
        "a number above 0, at most 1",
    ),
    "rope_type": (lambda v: v in _ROPE_TYPES, f"one of {', '.join(_ROPE_TYPES)}"),
}


def _check_types(raw: dict[str, Any], types: dict[str, Any], where: str = "") -> None:
    for key, (fits, wanted) in types.items():
        value = raw.get(key)
        if value is not None and not fits(value):
            raise ValueError(
                f"drafter config: {where}{key} is {quoted(value)}; it must be {wanted}"
            )


# -- reading -----------------------------------------------------------------------------------------


def read(raw: dict[str, Any]) -> DrafterConfig:
    """Reads either public format from a parsed ``config.json``.

    Raises:
        UnsupportedDrafter: another kind of drafter.
        ValueError: a key that is missing, of another type, out of range, or said twice and differently.
    """
    named = {k: _TOP_TYPES[k] for k in ("architectures", "speculators_model_type")}
    _check_types(raw, named)
    if is_speculators(raw):
        _check_speculators_kind(raw)
    else:
        _check_kind(raw)
    _check_types(raw, _TOP_TYPES)
    return _read_speculators(raw) if is_speculators(raw) else _read_zlab(raw)


def is_speculators(raw: dict[str, Any]) -> bool:
    """Whether a parsed ``config.json`` is of the speculators format."""
    return "speculators_model_type" in raw or "speculators_config" in raw


def _check_kind(raw: dict[str, Any]) -> None:
    """UnsupportedDrafter unless vLLM takes its DFlash or DFlash 2 class for this z-lab file."""
    architectures = raw.get("architectures") or []
    if ARCHITECTURE in architectures or HEAD_ARCHITECTURE in architectures:
        return
    name = architectures[0] if architectures else None
    if name is None:
        if "dflash_config" not in raw:
            raise ValueError(
                "config.json is not a DFlash drafter: it has neither dflash_config (z-lab's format) nor "
                "speculators_model_type, nor architectures"
            )
        return
    kind = "DSpark" if "DSpark" in name else _OTHER_KINDS.get(name)
    if kind is not None:
        raise UnsupportedDrafter(
            f"this is a {kind} drafter (architectures: {quoted(architectures)}), served by stock vLLM; only "
            "DFlash and DFlash 2 drafters are read here"
        )
    raise UnsupportedDrafter(
        f"config.json is not a DFlash drafter that vLLM knows: architectures is {quoted(architectures)}; for "
        f"a plain DFlash drafter it must be [{ARCHITECTURE!r}]"
    )


def _class_defaults(raw: dict[str, Any]) -> dict[str, Any]:
    """The file with the defaults of its ``model_type`` filled in, as transformers does it."""
    kind = raw.get("model_type")
    if kind in (None, "qwen3"):
        filled = {**_QWEN3, **raw}
        if filled["num_key_value_heads"] is None:
            filled["num_key_value_heads"] = filled["num_attention_heads"]
        # Qwen3Config drops the window, and keeps the layer types, where the flag is not set.
        if not filled["use_sliding_window"]:
            filled["sliding_window"] = None
        if filled.get("layer_types") is None and filled["sliding_window"] is not None:
            first, count = filled["max_window_layers"] or 0, filled["num_hidden_layers"] or 0
            kinds = [SLIDING if i >= first else FULL for i in range(min(count, _MOST_LAYERS))]
            filled["layer_types"] = kinds if SLIDING in kinds else None
        rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
        filled["rope_parameters"] = _standard_rope(raw, rope, 1e4)
        return filled
    try:
        from transformers import CONFIG_MAPPING
    except ImportError as error:
        raise ValueError(
            f"drafter config: model_type {quoted(kind)} has defaults that only transformers knows; install "
            "it (it comes with vLLM)"
        ) from error
    if kind not in CONFIG_MAPPING:
        raise UnsupportedDrafter(
            f"drafter config: model_type is {quoted(kind)}, which transformers does not know"
        )
    try:
        config = CONFIG_MAPPING[kind].from_dict(copy.deepcopy(raw))
    except Exception as error:
        # Each class has checks and errors of its own; what it refuses, vLLM cannot read either.
        raise ValueError(
            f"drafter config: transformers cannot read it as {kind!r}: {quoted(str(error))}"
        ) from error
    filled = {**raw, **config.to_dict()}
    rope = filled.get("rope_parameters") or {}
    nested = [k for k in rope if isinstance(rope[k], dict)]
    if nested:
        raise ValueError(
            f"drafter config: as a {kind!r} it has rotary parameters for each layer type "
            f"({', '.join(nested)}), which vLLM's DFlash layers do not know"
        )
    return filled


#: More than any drafter has; a limit, so that a wrong number ends in an error and not in endless work.
_MOST_LAYERS = 1024


def _standard_rope(raw: dict[str, Any], rope: Any, theta: float) -> dict[str, Any]:
    """``rope_parameters`` with its type, base and rotated share filled in as transformers does."""
    rope = dict(rope)
    rope.setdefault("rope_type", rope.get("type") or "default")
    rope.pop("type", None)
    rope.setdefault("rope_theta", raw["rope_theta"] if raw.get("rope_theta") is not None else theta)
    for name in ("partial_rotary_factor", "rotary_pct", "rotary_emb_fraction"):
        if raw.get(name) is not None:
            rope.setdefault("partial_rotary_factor", raw[name])
            break
    return rope


def _layer_fields(raw: dict[str, Any]) -> dict[str, Any]:
    """Fields shared by both formats: the Qwen3-style transformer layers."""
    required = (
        "hidden_size num_hidden_layers num_attention_heads intermediate_size vocab_size".split()
    )
    missing = [k for k in required if raw.get(k) is None]
    if missing:
        raise ValueError(f"drafter config: {', '.join(missing)} missing from config.json")
    if raw["num_hidden_layers"] > _MOST_LAYERS:
        raise ValueError(
            f"drafter config: num_hidden_layers is {quoted(raw['num_hidden_layers'])}; a drafter has few"
        )
    rope = raw["rope_parameters"]
    _check_types(rope, _ROPE_TYPES_OF, "rope_parameters.")
    if "mrope_section" in rope:
        raise UnsupportedDrafter(
            "drafter config: rope_parameters.mrope_section belongs to a multimodal verifier; drafters with "
            "other than plain positions are not read here"
        )
    for key, value in rope.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"drafter config: rope_parameters.{key} is {value}; give a number")
    if raw.get("hidden_act") not in (None, "silu"):
        raise ValueError(
            f"drafter config: hidden_act is {quoted(raw['hidden_act'])}; vLLM's DFlash layers know "
            "'silu' only"
        )
    heads = raw["num_attention_heads"]
    layer_types = raw.get("layer_types")
    given: dict[str, Any] = {k: raw.get(k) for k in ("rms_norm_eps", "max_position_embeddings")}
    for flag in ("attention_bias", "is_neox_style"):
        given[flag] = None if raw.get(flag) is None else bool(raw[flag])
    return {
        **{k: raw[k] for k in required},
        "num_key_value_heads": raw.get("num_key_value_heads") or heads,
        "head_dim": raw.get("head_dim") or raw["hidden_size"] // (heads or 1),
        "rope_parameters": rope,
        "layer_types": tuple(layer_types) if layer_types else None,
        "sliding_window": raw.get("sliding_window"),
        **{k: v for k, v in given.items() if v is not None},
    }


def _dtype(*places: dict[str, Any]) -> str:
    """The first dtype that one of the places states; bfloat16 where none does."""
    for raw in places:
        said = raw.get("dtype") or raw.get("torch_dtype")
        if said is not None:
            name = said.removeprefix("torch.")
            if name not in _DTYPES:
                raise ValueError(
                    f"drafter config: dtype is {quoted(said)}; known are {', '.join(_DTYPES)}"
                )
            return name
    return "bfloat16"


def _draft_vocab_size(raw: dict[str, Any], vocab_size: int) -> int | None:
    """None where the draft vocabulary is the whole one, which speculators writes out."""
    size = raw.get("draft_vocab_size")
    return None if size == vocab_size else size


def _same(what: str, values: dict[str, Any]) -> Any:
    """The one value that several places give, None where none does; ValueError where they differ."""
    given = {place: value for place, value in values.items() if value is not None}
    if len({str(v) for v in given.values()}) > 1:
        said = " and ".join(f"{place} says {quoted(value)}" for place, value in given.items())
        raise AmbiguousConfig(f"drafter config: {what} differs: {said}; make them agree")
    return next(iter(given.values()), None)


def _read_zlab(raw: dict[str, Any]) -> DrafterConfig:
    _check_types(raw, _LAYER_TYPES_OF)
    dflash = dict(raw.get("dflash_config") or {})
    _check_types(dflash, _DFLASH_TYPES, "dflash_config.")
    remarks = []
    # vLLM looks for this one first.
    has_head = HEAD_ARCHITECTURE in (raw.get("architectures") or ())
    of_head = (*_HEAD_KEYS, *_SCALES) if has_head else ()
    foreign = {
        _FOREIGN_KEYS[k]
        for k in sorted(set(_FOREIGN_KEYS).difference(of_head))
        if dflash.get(k) is not None
    }
    if foreign:
        raise UnsupportedDrafter(
            f"dflash_config has the keys {sorted(set(dflash) & set(_FOREIGN_KEYS))}: a {foreign.pop()} "
            f"drafter under the name of a plain one (architectures: {raw.get('architectures')}), which "
            "vLLM's plain DFlash class would serve wrongly"
        )
    unread = sorted(set(dflash) - _DFLASH_KEYS.union(of_head))
    if unread:
        remarks.append(f"dflash_config.{', '.join(unread)}: not read by vLLM, without effect")
    if not raw.get("architectures"):
        remarks.append(f"vLLM serves it only with architectures: [{ARCHITECTURE!r}] in config.json")
    if dflash.get("use_aux_hidden_state") not in (None, True):
        raise UnsupportedDrafter(
            "drafter config: dflash_config.use_aux_hidden_state is false; a drafter without verifier "
            "features is neither trained nor checked here"
        )
    filled = _class_defaults(raw)
    fields = _layer_fields(filled)
    if dflash.get("use_swa") and SLIDING not in (fields["layer_types"] or ()):
        fields["layer_types"] = (SLIDING,) * fields["num_hidden_layers"]
        # In vLLM use_swa leaves the causality of the layer types as they were: none sliding, so
        # bidirectional (_dflash_layer_causal).
        if dflash.get("causal") is None:
            dflash["causal"] = False
    if SLIDING in (fields["layer_types"] or ()):
        fields["sliding_window"] = dflash.get("swa_window_size", fields["sliding_window"])
    causal = filled.get("is_causal")
    if causal is None:
        causal = dflash.get("causal")
    sinks = dflash.get("attention_sink_bias", filled.get("add_swa_attention_sink_bias"))
    serve_only: dict[str, Any] = {"attention_sink_bias": True} if sinks else {}
    if dflash.get("attention_value_scale") is not None:
        serve_only["attention_value_scale"] = dflash["attention_value_scale"]
    head = None
    if has_head:
        missing = [k for k in _HEAD_KEYS if dflash.get(k) is None]
        if missing:
            raise ValueError(f"drafter config: dflash_config lacks {', '.join(missing)}")
        head = CandidateHead(**{k: dflash[k] for k in _HEAD_KEYS})
        for key, nothing in _SCALES.items():
            if dflash.get(key) not in (None, nothing):
                serve_only[key] = dflash[key]
    # vLLM's order of places.
    mask_token_id: Any = dflash.get("mask_token_id", raw.get("mask_token_id"))
    ids = _same(
        "target_layer_ids",
        {
            "eagle_aux_hidden_state_layer_ids (which vLLM reads, one less)": [
                target_layer_id(i) for i in raw.get("eagle_aux_hidden_state_layer_ids") or ()
            ]
            or None,
            "dflash_config.target_layer_ids": dflash.get("target_layer_ids"),
        },
    )
    for key, value in (("target_layer_ids", ids), ("mask_token_id", mask_token_id)):
        if value is None:
            raise ValueError(f"drafter config: dflash_config.{key} is missing")
    block_size = _same(
        "block_size",
        {"block_size": raw.get("block_size"), "dflash_config.block_size": dflash.get("block_size")},
    )
    return DrafterConfig(
        **fields,
        draft_block_size=block_size,
        target_layer_ids=tuple(ids),
        mask_token_id=mask_token_id,
        num_target_layers=raw.get("num_target_layers"),
        target_hidden_size=raw.get("target_hidden_size"),
        draft_vocab_size=_draft_vocab_size(raw, fields["vocab_size"]),
        causal=None if causal is None else bool(causal),
        sample_from_anchor=bool(dflash.get("sample_from_anchor")),
        head=head,
        verifier=raw.get("verifier"),
        dtype=_dtype(raw),
        serve_only=serve_only,
        remarks=tuple(remarks),
    )


def _check_speculators_kind(raw: dict[str, Any]) -> None:
    """UnsupportedDrafter for the other kinds of the speculators format."""
    kind = raw.get("speculators_model_type")
    if kind not in ("dflash", "dflash2"):
        name = _SPECULATORS_KINDS.get(str(kind))
        raise UnsupportedDrafter(
            f"drafter config: speculators_model_type is {quoted(kind)}"
            + (f", a {name} drafter" if name else "")
            + "; only 'dflash' and 'dflash2' drafters are read here (vLLM serves the kinds that it knows "
            "with classes of its own)"
        )


def _read_speculators(raw: dict[str, Any]) -> DrafterConfig:
    layer = raw.get("transformer_layer_config")
    if layer is None:
        raise ValueError("drafter config: transformer_layer_config is missing")
    _check_types(layer, _LAYER_TYPES_OF, "transformer_layer_config.")
    for key in ("aux_hidden_state_layer_ids", "mask_token_id"):
        if raw.get(key) is None:
            raise ValueError(f"drafter config: {key} is missing")
    said = (raw.get("speculators_config") or {}).get("verifier")
    if said is not None and not isinstance(said, dict):
        raise ValueError(
            f"drafter config: speculators_config.verifier is {quoted(said)}; it must be an object with "
            "name_or_path"
        )
    verifier = (said or {}).get("name_or_path")
    if verifier is not None and not isinstance(verifier, str):
        raise ValueError(
            "drafter config: speculators_config.verifier.name_or_path is "
            f"{quoted(verifier)}; it must be a text"
        )
    # To transformers the two are one setting, of which the later one counts; where it is there at all the
    # base is transformers' own, and else vLLM's.
    said_rope = [layer[k] for k in layer if k in ("rope_parameters", "rope_scaling")]
    rope = _standard_rope(layer, (said_rope or [None])[-1] or {}, 1e4 if said_rope else 1e6)
    fields = _layer_fields({**layer, "rope_parameters": rope})
    # The flag speaks of sliding layers; full ones are bidirectional whatever it says (speculators'
    # DFlashSpeculatorConfig). Absent it means what files had before it existed: bidirectional.
    said = raw.get("sliding_window_non_causal")
    non_causal = said is None or bool(said)
    kinds = fields["layer_types"] or (FULL,)
    causal = False if non_causal and SLIDING in kinds else None
    misread = not non_causal and FULL in kinds
    if layer.get("is_causal") is not None:
        causal, misread = bool(layer["is_causal"]), False
    block_size = raw.get("block_size")
    head = None
    if raw.get("speculators_model_type") == "dflash2":
        head = CandidateHead(**{k: raw[k] for k in _HEAD_KEYS if raw.get(k) is not None})
    return DrafterConfig(
        **fields,
        draft_block_size=8 if block_size is None else block_size,
        target_layer_ids=tuple(target_layer_id(i) for i in raw["aux_hidden_state_layer_ids"]),
        mask_token_id=raw["mask_token_id"],
        num_target_layers=raw.get("num_target_layers"),
        target_hidden_size=raw.get("target_hidden_size"),
        draft_vocab_size=_draft_vocab_size(raw, fields["vocab_size"]),
        causal=causal,
        sample_from_anchor=bool(raw.get("sample_from_anchor")),
        head=head,
        verifier=verifier,
        dtype=_dtype(raw, layer),
        remarks=(_FULL_LAYERS,) if misread else (),
    )


_FULL_LAYERS = (
    "its full-attention layers are bidirectional; vLLM 0.33 and older read them as causal from the "
    "speculators format unless this plugin serves it, and from z-lab's as they are"
)


def speculators_remarks(config: DrafterConfig) -> list[str]:
    """What vLLM and speculators do otherwise with a drafter in the speculators format."""
    remarks = []
    if len({config.layer_causal(i) for i in range(config.num_hidden_layers)}) > 1:
        remarks.append(_FULL_LAYERS)
    if SLIDING in (config.layer_types or ()):
        most = config.draft_block_size or "a block's tokens"
        remarks.append(
            f"its window of {config.sliding_window} tokens is counted from each draft token by vLLM and "
            f"here, from the anchor by speculators: up to {most} tokens of context less"
        )
    if config.has_own_vocab_weights:
        remarks.append(
            f"its width ({config.hidden_size}) is not its verifier's ({config.target_hidden_size}), which "
            "vLLM serves and speculators 0.9 cannot load"
        )
    return remarks


# -- writing -----------------------------------------------------------------------------------------


def write(config: DrafterConfig, fmt: CheckpointFormat) -> dict[str, Any]:
    """``config.json`` in the given format, loadable by stock vLLM.

    Raises:
        ValueError: an unknown format, or something that it cannot express.
    """
    if fmt == "zlab":
        return _write_zlab(config)
    if fmt == "speculators":
        return _write_speculators(config)
    raise ValueError(f"unknown checkpoint format {fmt!r}; use 'zlab' or 'speculators'")


def _write_layers(config: DrafterConfig) -> dict[str, Any]:
    out: dict[str, Any] = {
        "model_type": "qwen3",
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": {**config.rope_parameters, "rope_theta": config.rope_theta},
        "max_position_embeddings": config.max_position_embeddings,
        "hidden_act": config.hidden_act,
        "attention_bias": config.attention_bias,
        "tie_word_embeddings": False,
        "dtype": config.dtype,
    }
    if not config.is_neox_style:
        out["is_neox_style"] = False
    if config.layer_types is not None:
        config.check_windows()
        out["layer_types"] = list(config.layer_types)
        out["sliding_window"] = config.sliding_window
        # Without this flag transformers' Qwen3Config drops the window.
        out["use_sliding_window"] = SLIDING in config.layer_types
    return out


def _write_zlab(config: DrafterConfig) -> dict[str, Any]:
    dflash: dict[str, Any] = {
        "target_layer_ids": list(config.target_layer_ids),
        "mask_token_id": config.mask_token_id,
        **config.serve_only,
    }
    if config.causal is not None:
        dflash["causal"] = config.causal
    if config.sample_from_anchor:
        dflash["sample_from_anchor"] = True
    if config.head is not None:
        dflash |= asdict(config.head)
    out = {
        "architectures": [ARCHITECTURE if config.head is None else HEAD_ARCHITECTURE],
        **_write_layers(config),
        "dflash_config": dflash,
    }
    optional = {
        "block_size": config.draft_block_size,
        "num_target_layers": config.num_target_layers,
        "target_hidden_size": config.target_hidden_size,
        "draft_vocab_size": config.draft_vocab_size,
        "verifier": config.verifier,
    }
    return out | {k: v for k, v in optional.items() if v is not None}


def _write_speculators(config: DrafterConfig) -> dict[str, Any]:
    if config.serve_only:
        raise ValueError(
            f"the speculators format cannot express {sorted(config.serve_only)}; keep z-lab's"
        )
    block_size = config.known_block_size("the speculators format needs it")
    if config.verifier is None:
        raise ValueError(
            "the speculators format must name the verifier, whose embedding and lm_head its loader fills in "
            "(without, it drafts rubbish in silence); give --verifier"
        )
    if config.head is not None and config.has_draft_vocab:
        raise ValueError(
            "the speculators format has no DFlash 2 drafters of a draft vocabulary "
            f"({config.draft_vocab_size} of {config.vocab_size} tokens); keep z-lab's, or train without "
            "--draft-vocab"
        )
    kind = "dflash" if config.head is None else "dflash2"
    layers = range(config.num_hidden_layers)
    kinds = config.layer_types or (FULL,) * config.num_hidden_layers
    if any(config.layer_causal(i) for i in layers if kinds[i] == FULL):
        raise ValueError(
            "the speculators format has no causal full-attention layers (its own are bidirectional whatever "
            "the file says), and this drafter has them; keep the z-lab format"
        )
    sliding_causal = {config.layer_causal(i) for i in layers if kinds[i] == SLIDING}
    return {
        "architectures": ["DFlashSpeculator" if config.head is None else HEAD_ARCHITECTURE],
        "speculators_model_type": kind,
        **({} if config.head is None else asdict(config.head)),
        "speculators_version": "0.9.0",
        "speculators_config": {
            "algorithm": kind,
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {
                    "proposal_type": "greedy",
                    "speculative_tokens": config.num_speculative_tokens,
                    "verifier_accept_k": 1,
                    "accept_tolerance": 0.0,
                }
            ],
            "verifier": {"name_or_path": config.verifier, "architectures": []},
        },
        "transformer_layer_config": _write_layers(config),
        "block_size": block_size,
        "aux_hidden_state_layer_ids": [hidden_state_index(i) for i in config.target_layer_ids],
        "mask_token_id": config.mask_token_id,
        "draft_vocab_size": config.logits_vocab_size,
        "num_target_layers": config.num_target_layers,
        "target_hidden_size": config.target_hidden_size,
        "sample_from_anchor": config.sample_from_anchor,
        "sliding_window_non_causal": True not in sliding_causal,
        "tie_word_embeddings": False,
        "dtype": config.dtype,
    }
