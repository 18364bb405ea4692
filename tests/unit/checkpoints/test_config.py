"""Drafter configurations: ids, both formats, and agreement with what vLLM itself reads."""

from __future__ import annotations

import copy
import json
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from vllm_dflash.config import (
    FULL,
    SLIDING,
    CandidateHead,
    DrafterConfig,
    VerifierInfo,
    default_target_layer_ids,
    hidden_state_index,
    target_layer_id,
)
from vllm_dflash.config_formats import AmbiguousConfig, UnsupportedDrafter
from vllm_dflash.serving.frontend.speculative_config import mend_causality

PUBLIC = Path(__file__).parents[2] / "data" / "public_drafters"
#: Public drafters that are not DFlash or DFlash 2, and the word that names them.
OTHER_KINDS = {
    "angelslim-mrope": "architectures",
    "automodel-export": "architectures",
    "modelopt-dspark-projector": "DSpark",
    "muse-glimmer-30b-assistant": "MuseGlimmerAssistantModel",
    "nemotron-nvfp4-dspark": "DSpark",
    "redhat-qwen3.6-35b-a3b-speculator.dspark": "DSpark",
}
#: Their copies lack use_sliding_window, without which vLLM finds no window.
WITHOUT_WINDOW = {"gemma-4-31b-it-dflash", "qwen3.6-27b-dflash-nested"}
FORMATS = ("zlab", "speculators")
BASE = DrafterConfig(
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    intermediate_size=96,
    vocab_size=200,
    draft_block_size=8,
    target_layer_ids=(1, 3, 6),
    mask_token_id=199,
    num_target_layers=9,
    target_hidden_size=80,
    rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    verifier="some/verifier",
)
VERIFIER = VerifierInfo(80, 9, 200, pad_token_id=3, name="some/verifier")
SWA = {"layer_types": (SLIDING,) * 3, "sliding_window": 16}
VARIANTS = {
    "plain": {},
    "draft vocabulary": {"draft_vocab_size": 50},
    "sliding": SWA,
    "sliding, bidirectional": {**SWA, "causal": False},
    "mixed": {"layer_types": (FULL, SLIDING, FULL), "sliding_window": 16},
    "mixed, bidirectional": {
        "layer_types": (FULL, SLIDING, FULL),
        "sliding_window": 16,
        "causal": False,
    },
    "from the anchor": {"sample_from_anchor": True},
    "bias": {"attention_bias": True},
    "head": {"head": CandidateHead(3, 8, 24, 12)},
    "interleaved, partial rope": {
        "is_neox_style": False,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
        },
    },
    "linear rope": {
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
    },
}
MIXED = {"layer_types": (FULL, SLIDING, FULL), "sliding_window": 16}


def as_json(config: DrafterConfig, fmt: str) -> dict:
    return json.loads(json.dumps(config.to_dict(fmt)))  # type: ignore[arg-type]


def zlab(**changes) -> dict:
    """A z-lab config.json; ``dflash`` updates dflash_config, None removes a key."""
    raw = as_json(BASE, "zlab")
    raw["dflash_config"] |= changes.pop("dflash", {})
    raw |= changes
    return {k: v for k, v in raw.items() if v is not None}


# ---- ids ----


@pytest.mark.parametrize(
    ("layers", "ids"),
    [
        (36, (1, 9, 17, 25, 33)),
        (28, (1, 7, 13, 19, 25)),
        (30, (1, 8, 14, 20, 27)),
        (8, (1, 2, 3, 4, 5)),
        (7, (1, 2, 3, 4)),
        (5, (1, 2)),
        (4, (0, 1, 2, 3)),
        (3, (0, 1, 2)),
        (2, (0, 1)),
        (1, (0,)),
    ],
)
def test_default_target_layers(layers, ids):
    assert default_target_layer_ids(layers) == ids


@given(st.integers(1, 200), st.integers(1, 12))
def test_default_target_layers_exist_and_ascend(layers, count):
    ids = default_target_layer_ids(layers, count)
    assert 1 <= len(ids) <= count
    assert list(ids) == sorted(set(ids))
    assert ids[0] >= 0
    assert ids[-1] < layers
    if layers >= 2 * count + 3:
        assert len(ids) == count
        assert ids[-1] == layers - 3


@pytest.mark.parametrize(("layers", "count"), [(0, 5), (-1, 5), (4, 0)])
def test_default_target_layers_refuse(layers, count):
    with pytest.raises(ValueError, match=str(min(layers, count))):
        default_target_layer_ids(layers, count)


def test_hidden_state_ids_are_one_larger():
    assert hidden_state_index(0) == 1
    assert [target_layer_id(hidden_state_index(i)) for i in range(5)] == list(range(5))
    assert BASE.aux_hidden_state_layer_ids == (2, 4, 7)
    assert as_json(BASE, "zlab")["dflash_config"]["target_layer_ids"] == [1, 3, 6]
    assert as_json(BASE, "speculators")["aux_hidden_state_layer_ids"] == [2, 4, 7]


def test_derived_sizes():
    assert BASE.num_speculative_tokens == 7
    assert BASE.with_(sample_from_anchor=True).num_speculative_tokens == 8
    assert BASE.with_(sample_from_anchor=True, draft_block_size=1).num_speculative_tokens == 1
    assert BASE.num_features == 3 * 80
    assert BASE.with_(target_hidden_size=None).num_features == 3 * 64
    assert (BASE.logits_vocab_size, BASE.has_draft_vocab) == (200, False)
    small = BASE.with_(draft_vocab_size=50)
    assert (small.logits_vocab_size, small.has_draft_vocab) == (50, True)
    assert not BASE.with_(draft_vocab_size=200).has_draft_vocab


def test_layers():
    mixed = BASE.with_(**MIXED)
    assert [mixed.layer_window(i) for i in range(3)] == [None, 16, None]
    assert [mixed.layer_causal(i) for i in range(3)] == [False, True, False]
    assert [mixed.with_(causal=False).layer_causal(i) for i in range(3)] == [False] * 3
    assert [BASE.with_(causal=True).layer_causal(i) for i in range(3)] == [True] * 3


# ---- round trips ----


def behaviour(config: DrafterConfig) -> dict:
    """Everything that decides arithmetic and agreement with the verifier."""
    layers = range(config.num_hidden_layers)
    left_out = ("causal", "layer_types", "remarks")
    fields = {k: v for k, v in vars(config).items() if k not in left_out}
    fields["rope_parameters"] = {**config.rope_parameters, "rope_theta": config.rope_theta}
    windows = [config.layer_window(i) for i in layers]
    # A window that no layer uses decides nothing.
    fields["sliding_window"] = config.sliding_window if any(windows) else None
    fields |= {"windows": windows, "causal": [config.layer_causal(i) for i in layers]}
    return fields


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("name", VARIANTS)
def test_round_trip(name, fmt):
    config = BASE.with_(**VARIANTS[name])
    assert behaviour(DrafterConfig.from_dict(as_json(config, fmt))) == behaviour(config)


@pytest.mark.parametrize(
    "changes",
    [
        {"serve_only": {"attention_value_scale": 0.5}},
        {"causal": True},
        {**MIXED, "causal": True},
    ],
    ids=str,
)
def test_round_trip_of_what_only_zlab_has(changes):
    config = BASE.with_(**changes)
    assert DrafterConfig.from_dict(as_json(config, "zlab")) == config
    with pytest.raises(ValueError, match="z-lab"):
        config.to_dict("speculators")


def test_speculators_names_the_verifier_and_the_block():
    with pytest.raises(ValueError, match="--verifier"):
        BASE.with_(verifier=None).to_dict("speculators")
    with pytest.raises(ValueError, match="block_size"):
        BASE.with_(draft_block_size=None).to_dict("speculators")


def test_unknown_format():
    with pytest.raises(ValueError, match="'gguf'"):
        BASE.to_dict("gguf")  # type: ignore[arg-type]


@st.composite
def configs(draw) -> DrafterConfig:
    layers, kv = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    vocab = draw(st.integers(10, 300))
    anchor = draw(st.booleans())
    kinds = st.tuples(*[st.sampled_from((FULL, SLIDING))] * layers)
    types = draw(st.none() | kinds)
    ids = draw(st.sets(st.integers(0, 40), min_size=1, max_size=6))
    return DrafterConfig(
        hidden_size=draw(st.integers(1, 100)),
        num_hidden_layers=layers,
        num_attention_heads=kv * draw(st.integers(1, 4)),
        num_key_value_heads=kv,
        head_dim=2 * draw(st.integers(1, 64)),
        intermediate_size=draw(st.integers(1, 300)),
        vocab_size=vocab,
        draft_block_size=draw(st.integers(1 if anchor else 2, 32)),
        target_layer_ids=tuple(sorted(ids)),
        mask_token_id=draw(st.integers(0, vocab - 1)),
        num_target_layers=draw(st.none() | st.integers(41, 60)),
        target_hidden_size=draw(st.none() | st.integers(1, 99)),
        draft_vocab_size=draw(st.none() | st.integers(1, vocab - 1)),
        rms_norm_eps=draw(st.sampled_from((1e-6, 1e-5))),
        rope_parameters={"rope_type": "default", "rope_theta": draw(st.floats(1e3, 1e7))},
        max_position_embeddings=draw(st.integers(1, 10**6)),
        attention_bias=draw(st.booleans()),
        is_neox_style=draw(st.booleans()),
        layer_types=types,
        sliding_window=draw(st.integers(1, 64)) if SLIDING in (types or ()) else None,
        causal=draw(st.none() | st.booleans()),
        sample_from_anchor=anchor,
        verifier=draw(st.text(min_size=1)),
        dtype=draw(st.sampled_from(("bfloat16", "float32"))),
    )


@given(configs())
@settings(max_examples=60)
def test_round_trip_of_any_config(config):
    assert DrafterConfig.from_dict(as_json(config, "zlab")) == config
    full = [i for i in range(config.num_hidden_layers) if config.layer_window(i) is None]
    if not any(config.layer_causal(i) for i in full):
        again = DrafterConfig.from_dict(as_json(config, "speculators"))
        assert behaviour(again) == behaviour(config)


# ---- what vLLM derives from the same file ----


def vllm_reads(raw: dict, folder, monkeypatch, ours: DrafterConfig | None = None):
    """The configuration that vLLM's drafter classes get, and its per-layer decisions.

    With ``ours`` behind what the plugin mends in it.
    """
    from vllm.model_executor.models import qwen3_dflash
    from vllm.transformers_utils.config import get_config
    from vllm.transformers_utils.configs.eagle import EAGLEConfig
    from vllm.v1.worker.gpu.spec_decode.eagle.eagle3_utils import get_eagle3_aux_layers_from_config

    (folder / "config.json").write_text(json.dumps(raw))
    config = get_config(str(folder), trust_remote_code=False)
    if "speculators_model_type" not in raw:
        config = EAGLEConfig(config, method="dflash", model_type="eagle")
    if ours is not None:
        mend_causality(config, raw, ours)
    v2 = SimpleNamespace(use_v2_model_runner=True)
    monkeypatch.setattr(qwen3_dflash, "get_current_vllm_config", lambda: v2)
    qwen3_dflash.set_default_rope_theta(config, default_theta=1000000)
    spec = SimpleNamespace(draft_model_config=SimpleNamespace(hf_config=config))
    layers = [
        qwen3_dflash._resolve_layer_attention(config, i) for i in range(config.num_hidden_layers)
    ]
    fc = qwen3_dflash._get_dflash_fc_input_size(SimpleNamespace(speculative_config=spec))
    return config, layers, get_eagle3_aux_layers_from_config(spec), fc


def compare_with_vllm(raw: dict, folder, monkeypatch) -> None:
    config = DrafterConfig.from_dict(copy.deepcopy(raw))
    config.check_windows()
    theirs, layers, aux_layers, fc = vllm_reads(raw, folder, monkeypatch, config)
    ours = range(config.num_hidden_layers)
    assert theirs.architectures == [
        "DFlashDraftModel" if config.head is None else "DFlash2DraftModel"
    ]
    for key in ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k"):
        assert theirs.dflash_config.get(key) == getattr(config.head, key, None)
    for key, nothing in (
        ("input_embedding_scale", 1.0),
        ("output_multiplier", 1.0),
        ("final_logit_softcapping", 0.0),
    ):
        assert theirs.dflash_config.get(key, nothing) == config.serve_only.get(key, nothing)
    assert layers == [(config.layer_window(i), config.layer_causal(i)) for i in ours]
    assert aux_layers == config.aux_hidden_state_layer_ids
    assert fc == config.num_features
    mask = theirs.dflash_config.get("mask_token_id", getattr(theirs, "mask_token_id", None))
    assert mask == config.mask_token_id
    sinks = theirs.dflash_config.get(
        "attention_sink_bias", getattr(theirs, "add_swa_attention_sink_bias", False)
    )
    assert bool(sinks) == ("attention_sink_bias" in config.serve_only)
    assert theirs.dflash_config.get("sample_from_anchor", False) == config.sample_from_anchor
    vocab = getattr(theirs, "draft_vocab_size", None) or theirs.vocab_size
    assert vocab == config.logits_vocab_size
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert head_dim == config.head_dim
    assert getattr(theirs, "is_neox_style", True) == config.is_neox_style
    rope = {k: v for k, v in theirs.rope_parameters.items() if k != "type"}
    scaled = {"original_max_position_embeddings": config.max_position_embeddings}
    assert {**scaled, **rope} == {**scaled, **config.rope_parameters}
    same = "hidden_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size "
    same += "intermediate_size rms_norm_eps max_position_embeddings hidden_act attention_bias"
    for name in same.split():
        # A speculators file is taken as it stands, and some public copies lack keys.
        assert getattr(theirs, name, getattr(config, name)) == getattr(config, name), name


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("name", VARIANTS)
def test_vllm_reads_the_same_from_what_we_write(name, fmt, tmp_path, monkeypatch):
    config = BASE.with_(**VARIANTS[name])
    compare_with_vllm(as_json(config, fmt), tmp_path, monkeypatch)


def test_vllm_reads_the_same_from_mixed_layers(tmp_path, monkeypatch):
    compare_with_vllm(as_json(BASE.with_(**MIXED), "zlab"), tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "changes",
    [
        {"dflash": {"use_swa": True, "swa_window_size": 12}},
        {"dflash": {"use_swa": True, "swa_window_size": 12}, "layer_types": [FULL] * 3},
        {"dflash": {"use_swa": True, "swa_window_size": 12, "causal": True}},
        {"dflash": {"swa_window_size": 12}, "layer_types": [FULL, SLIDING, FULL]},
        {"dflash": {"causal": True}, "is_causal": False},
        {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
        {"use_sliding_window": True, "sliding_window": 24},
        {"head_dim": None},
        {"rope_parameters": None},
        {"rope_parameters": None, "rope_theta": 7e4, "partial_rotary_factor": 0.5},
        {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"draft_vocab_size": 200},
    ],
    ids=str,
)
def test_vllm_reads_the_same_from_public_zlab_variants(changes, tmp_path, monkeypatch):
    compare_with_vllm(zlab(**changes), tmp_path, monkeypatch)


@pytest.mark.parametrize("flag", [True, False, None])
def test_vllm_reads_the_same_causality_from_speculators(flag, tmp_path, monkeypatch):
    raw = as_json(BASE.with_(**SWA), "speculators")
    raw["sliding_window_non_causal"] = flag
    if flag is None:
        del raw["sliding_window_non_causal"]
    compare_with_vllm(raw, tmp_path, monkeypatch)


#: Edits of a z-lab file: a key (of dflash_config behind a dot) and what it may become; ABSENT removes it.
ABSENT = object()
ZLAB_EDITS: dict[str, tuple] = {
    "block_size": (ABSENT, 4),
    ".block_size": (8,),
    ".num_anchors": (64,),
    ".causal": (True, False, None),
    "is_causal": (True, False),
    "layer_types": (ABSENT, [FULL] * 3, [SLIDING] * 3, [SLIDING, SLIDING, FULL]),
    "sliding_window": (ABSENT, None, 16),
    "use_sliding_window": (ABSENT, True, False),
    "max_window_layers": (ABSENT, 0, 2, 3),
    ".use_swa": (True, False),
    ".swa_window_size": (12,),
    ".sample_from_anchor": (True, False),
    ".attention_sink_bias": (True, False),
    ".attention_value_scale": (0.5,),
    "model_type": ("gpt_oss", "minimax_m2", "llama", "qwen2", "qwen3_moe", "mistral", "gemma2"),
    "rope_parameters": (ABSENT, {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e5}),
    "rope_scaling": (
        {"type": "linear", "factor": 2.0},
        None,
        {"rope_type": "dynamic", "factor": 2.0},
    ),
    "rope_theta": (7e4, 500000),
    "rotary_dim": (16,),
    "partial_rotary_factor": (0.5,),
    "head_dim": (ABSENT, 16),
    "num_key_value_heads": (None, 4),
    "rms_norm_eps": (ABSENT, 1e-5),
    "hidden_act": (ABSENT,),
    "max_position_embeddings": (ABSENT, 512),
    "attention_bias": (ABSENT, True),
    "hidden_size": (ABSENT,),
    "intermediate_size": (ABSENT,),
    "num_attention_heads": (ABSENT,),
    "vocab_size": (ABSENT,),
    "draft_vocab_size": (None, 50, 200),
    "target_hidden_size": (ABSENT, 64),
    "eagle_aux_hidden_state_layer_ids": ([2, 4, 7], []),
    "is_neox_style": (False,),
    "tie_word_embeddings": (True,),
    "dtype": (ABSENT, "float32"),
    "final_logit_softcapping": (30.0,),
    "projector_type": (None,),
}
SPECULATORS_EDITS: dict[str, tuple] = {
    "sliding_window_non_causal": (ABSENT, True, False),
    "sample_from_anchor": (ABSENT, True),
    "draft_vocab_size": (None, 50),
    "target_hidden_size": (ABSENT, None),
    "dtype": (ABSENT, "float32"),
    "/layer_types": (ABSENT, [FULL] * 3, [SLIDING] * 3, [SLIDING, SLIDING, FULL]),
    "/sliding_window": (ABSENT, None, 16),
    "/use_sliding_window": (True, False),
    "/model_type": (ABSENT, "llama", "qwen3"),
    "/rope_parameters": (ABSENT, None, {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e5}),
    "/rope_theta": (7e4,),
    "/rope_scaling": (None, {"type": "linear", "factor": 2.0}),
    "/head_dim": (ABSENT, 16),
    "/attention_bias": (ABSENT, True),
    "/is_causal": (True, False),
}


def edited(raw: dict, edits: dict[str, tuple], rng: random.Random) -> tuple[dict, dict]:
    """A copy with one to five keys changed, and what was changed."""
    raw, what = copy.deepcopy(raw), {}
    for key in rng.sample(sorted(edits), rng.randint(1, 5)):
        value = rng.choice(edits[key])
        place = raw
        if key[0] in "./":
            place = raw["dflash_config" if key[0] == "." else "transformer_layer_config"]
        name = key.lstrip("./")
        if value is ABSENT:
            place.pop(name, None)
        else:
            place[name] = copy.deepcopy(value)
        what[key] = "absent" if value is ABSENT else value
    return raw, what


@pytest.mark.parametrize("part", range(10))
def test_vllm_reads_the_same_from_generated_variants(part, tmp_path, monkeypatch):
    """What vLLM refuses is refused, too; nothing else is, but for two places that contradict each other."""
    rng, seen = random.Random(part), Counter()
    for n in range(40):
        fmt = FORMATS[n % 2]
        edits = ZLAB_EDITS if fmt == "zlab" else SPECULATORS_EDITS
        raw, what = edited(as_json(BASE, fmt), edits, rng)
        try:
            compare_with_vllm(raw, tmp_path, monkeypatch)
            seen["equal"] += 1
        except AmbiguousConfig:
            seen["two places"] += 1
        except ValueError as error:
            try:
                vllm_reads(raw, tmp_path, monkeypatch)
            except Exception:  # each config class has errors of its own
                seen["refused by both"] += 1
            else:
                raise AssertionError(f"vLLM reads {what}, ours does not") from error
        except AssertionError as error:
            raise AssertionError(f"{fmt} {what}: {error}") from error
    assert seen["equal"] > 20, seen


@pytest.mark.parametrize("path", sorted(PUBLIC.glob("*.json")), ids=lambda p: p.stem)
def test_vllm_reads_the_same_from_public_drafters(path, tmp_path, monkeypatch):
    """Configurations of public drafters; those that another class of vLLM serves are named."""
    raw = json.loads(path.read_text())
    kind = OTHER_KINDS.get(path.stem)
    if kind is not None:
        with pytest.raises(UnsupportedDrafter, match=kind) as error:
            DrafterConfig.from_dict(raw)
        assert "unknown keys" not in str(error.value)
        return
    config = DrafterConfig.from_dict(raw)
    if path.stem in WITHOUT_WINDOW:
        with pytest.raises(ValueError, match="use_sliding_window"):
            config.check_windows()
        with pytest.raises(ValueError, match="window size"):
            vllm_reads(raw, tmp_path, monkeypatch)
        return
    compare_with_vllm(raw, tmp_path, monkeypatch)


def test_vllm_takes_the_draft_length_from_speculators():
    from vllm.transformers_utils.configs.speculators import SpeculatorsConfig

    spec = SpeculatorsConfig.extract_vllm_speculative_config(as_json(BASE, "speculators"))
    assert spec == {"method": "dflash", "num_speculative_tokens": BASE.num_speculative_tokens}


# ---- errors name key and value ----


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 0}, ["hidden_size", "0"]),
        ({"num_hidden_layers": "5"}, ["num_hidden_layers", "'5'"]),
        ({"vocab_size": True}, ["vocab_size", "True"]),
        ({"num_key_value_heads": 3}, ["num_attention_heads", "4", "num_key_value_heads", "3"]),
        ({"head_dim": 15}, ["head_dim", "15"]),
        ({"draft_block_size": 1}, ["block_size", "1"]),
        ({"draft_block_size": "16"}, ["block_size", "'16'"]),
        ({"draft_block_size": 0, "sample_from_anchor": True}, ["block_size", "0"]),
        ({"target_layer_ids": ()}, ["target_layer_ids", "[]"]),
        ({"target_layer_ids": (-1, 2)}, ["target_layer_ids", "[-1, 2]"]),
        ({"target_layer_ids": (3, 1)}, ["target_layer_ids", "[3, 1]", "ascending"]),
        ({"target_layer_ids": (1, 1)}, ["target_layer_ids", "[1, 1]", "distinct"]),
        ({"mask_token_id": 200}, ["mask_token_id", "200", "vocab_size"]),
        ({"mask_token_id": -1}, ["mask_token_id", "-1"]),
        ({"mask_token_id": None}, ["mask_token_id", "None"]),
        ({"draft_vocab_size": 201}, ["draft_vocab_size", "201", "200"]),
        ({"draft_vocab_size": 0}, ["draft_vocab_size", "0"]),
        ({"layer_types": ("linear_attention",) * 3}, ["layer_types", "linear_attention"]),
        ({"layer_types": (FULL,)}, ["layer_types", "1", "num_hidden_layers", "3"]),
        ({"sliding_window": 0}, ["sliding_window", "0"]),
    ],
    ids=str,
)
def test_invalid_values(changes, words):
    with pytest.raises(ValueError, match="drafter config") as error:
        BASE.with_(**changes)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dflash": {"mask_token_id": None}}, ["dflash_config.mask_token_id", "missing"]),
        ({"dflash": {"target_layer_ids": None}}, ["dflash_config.target_layer_ids", "missing"]),
        ({"dflash": {"use_aux_hidden_state": False}}, ["use_aux_hidden_state", "false"]),
    ],
    ids=str,
)
def test_invalid_zlab_files(changes, words):
    with pytest.raises(ValueError, match="drafter config") as error:
        DrafterConfig.from_dict(zlab(**changes))
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("speculators_model_type", "eagle3", ["speculators_model_type", "'eagle3'"]),
        ("transformer_layer_config", None, ["transformer_layer_config"]),
        ("aux_hidden_state_layer_ids", None, ["aux_hidden_state_layer_ids", "missing"]),
        ("aux_hidden_state_layer_ids", [0, 3], ["target_layer_ids", "[-1, 2]"]),
        ("mask_token_id", None, ["mask_token_id", "missing"]),
    ],
)
def test_invalid_speculators_files(key, value, words):
    with pytest.raises(ValueError, match="drafter config") as error:
        DrafterConfig.from_dict(as_json(BASE, "speculators") | {key: value})
    assert all(word in str(error.value) for word in words), str(error.value)


def test_not_a_drafter(tmp_path):
    with pytest.raises(ValueError, match="LlamaForCausalLM"):
        DrafterConfig.from_dict({"architectures": ["LlamaForCausalLM"]})
    with pytest.raises(ValueError, match=r"no .*config\.json"):
        DrafterConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        DrafterConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="list"):
        DrafterConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(as_json(BASE, "zlab")))
    assert DrafterConfig.from_pretrained(tmp_path) == BASE


# ---- agreement with the verifier ----


def test_fitting_verifier():
    BASE.check_verifier(VERIFIER)
    BASE.with_(num_target_layers=None).check_verifier(VERIFIER)


def test_a_mask_token_that_ends_texts_is_said():
    """As a public drafter of LongCat has; vLLM serves it, so it is not refused."""
    config = LlamaConfig(
        eos_token_id=[7, 199],
        hidden_size=80,
        num_attention_heads=4,
        num_hidden_layers=9,
        vocab_size=200,
    )
    info = VerifierInfo.from_hf_config(config, "some/verifier")
    assert any("mask token 199 is one that ends" in r for r in BASE.verifier_remarks(info))
    config.eos_token_id = 7
    assert BASE.verifier_remarks(VerifierInfo.from_hf_config(config)) == []
    config.eos_token_id = None
    assert BASE.verifier_remarks(VerifierInfo.from_hf_config(config)) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target_layer_ids": (1, 9), "num_target_layers": None}, ["[9]", "0..8"]),
        ({"target_hidden_size": None}, ["64", "80"]),
        ({"vocab_size": 201}, ["201", "200"]),
        # Its own embedding lacks a token that the verifier may write.
        ({"vocab_size": 199, "mask_token_id": 198}, ["199", "200"]),
        ({"mask_token_id": 3}, ["mask_token_id 3", "pad"]),
    ],
    ids=str,
)
def test_misfitting_verifier(changes, words):
    with pytest.raises(ValueError, match="some/verifier") as error:
        BASE.with_(**changes).check_verifier(VERIFIER)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_all_problems_are_named_at_once():
    with pytest.raises(ValueError, match=r"64.*; .*vocabulary"):
        BASE.with_(target_hidden_size=None, vocab_size=300).check_verifier(VERIFIER)


def test_for_verifier():
    from transformers import Qwen3Config

    hf = Qwen3Config(
        hidden_size=80,
        num_hidden_layers=36,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=24,
        intermediate_size=160,
        vocab_size=200,
        rms_norm_eps=1e-5,
        max_position_embeddings=777,
        rope_parameters={"rope_type": "yarn", "factor": 2.0, "rope_theta": 3e5},
        pad_token_id=3,
    )
    config = DrafterConfig.for_verifier(hf, mask_token_id=199, name="v", draft_vocab_size=200)
    assert config.target_layer_ids == (1, 9, 17, 25, 33)
    assert (config.hidden_size, config.head_dim, config.num_attention_heads) == (80, 24, 6)
    assert (config.num_key_value_heads, config.intermediate_size) == (2, 160)
    assert (config.num_target_layers, config.target_hidden_size) == (36, 80)
    assert (config.draft_block_size, config.num_hidden_layers) == (16, 5)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 3e5}
    assert (config.max_position_embeddings, config.rms_norm_eps) == (777, 1e-5)
    assert not config.has_draft_vocab
    with pytest.raises(ValueError, match="pad token"):
        DrafterConfig.for_verifier(hf, mask_token_id=3)
    with pytest.raises(ValueError, match=r"\[40\] do not exist"):
        DrafterConfig.for_verifier(hf, mask_token_id=199, target_layer_ids=(1, 40))


def test_for_verifier_with_rope_by_layer_type():
    text = SimpleNamespace(
        hidden_size=64,
        num_hidden_layers=9,
        num_attention_heads=4,
        vocab_size=200,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "mrope_section": [1, 2],
        },
    )
    multimodal = SimpleNamespace(get_text_config=lambda: text, pad_token_id=7)
    config = DrafterConfig.for_verifier(multimodal, mask_token_id=199)
    assert config.rope_theta == 1e6
    assert (config.num_key_value_heads, config.head_dim, config.intermediate_size) == (4, 16, 256)
    assert VerifierInfo.from_hf_config(multimodal).pad_token_id == 7
