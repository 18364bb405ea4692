"""Damaged and senseless config.json files: an error of one line that a person can read, or a drafter."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
from typer.testing import CliRunner

from helpers import tiny
from vllm_dflash.cli import app
from vllm_dflash.config import DrafterConfig

NAN, HUGE = float("nan"), 10**30
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 1.5, -0.5, "", "abc", "64", [], {}, [1], [[1]], {"a": 1}, [None], ["x"],
    10**6, 2**31, 2**63, HUGE, -HUGE, 1e308, NAN, float("inf"), float("-inf"), [0, 1, 2.5], [True], ["0"],
    "\x00", "x" * 5000, [1] * 1000, "sliding_attention", ["sliding_attention", "full_attention"], "yarn",
    {"rope_type": "yarn"}, {"rope_type": None}, {"type": "linear", "factor": "2"}, {"rope_theta": NAN},
    {"rope_type": ["a"]}, {"full_attention": {"rope_theta": 1e4}}, "gemma3_text", "gpt_oss", "deepseek_v3",
]  # fmt: skip
EXTRA = (
    "layer_types sliding_window use_sliding_window max_window_layers rope_scaling rope_theta model_type "
    "partial_rotary_factor draft_vocab_size target_hidden_size num_target_layers is_causal architectures "
    "quantization_config attention_bias torch_dtype speculators_model_type speculators_config "
    "dflash_config.causal dflash_config.use_swa dflash_config.swa_window_size dflash_config.block_size "
    "dflash_config.attention_sink_bias dflash_config.attention_value_scale hidden_act is_neox_style "
    "dflash_config.sample_from_anchor eagle_aux_hidden_state_layer_ids transformer_layer_config.is_causal"
).split()


def paths(raw: dict[str, Any], before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in raw.items():
        yield (*before, key)
        if isinstance(value, dict):
            yield from paths(value, (*before, key))


def mutated(raw: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    raw = copy.deepcopy(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        extra = rng.random() < 0.3
        path = tuple(rng.choice(EXTRA).split(".")) if extra else rng.choice(list(paths(raw)))
        place: Any = raw
        for key in path[:-1]:
            place = place.get(key) if isinstance(place, dict) else None
        if not isinstance(place, dict):
            continue
        if rng.random() < 0.2:
            place.pop(path[-1], None)
        else:
            place[path[-1]] = copy.deepcopy(rng.choice(VALUES))
    return raw


@pytest.fixture(scope="module")
def drafters(models, verifier):
    return [
        tiny.make_drafter(models / f"fuzz-{fmt}", verifier, fmt=fmt)
        for fmt in ("zlab", "speculators")
    ]


def test_every_damaged_config_is_read_or_refused_in_one_line(drafters) -> None:
    rng = random.Random(0)
    bases = [json.loads((d / "config.json").read_text()) for d in drafters]
    read = 0
    for n in range(1000):
        raw = mutated(bases[n % 2], rng)
        try:
            config = DrafterConfig.from_dict(raw)
        except ValueError as error:
            text = str(error)
            assert text.strip(), raw
            assert "\n" not in text, text
            assert len(text) < 600, text
        else:
            read += 1
            assert config.rope_theta > 0
            assert config.dtype in ("bfloat16", "float16", "float32")
    assert 200 < read < 800


@pytest.mark.thorough
def test_inspect_ends_in_one_line(drafters, verifier) -> None:
    """Whatever the file says, with the weights beside it."""
    rng, runner = random.Random(1), CliRunner()
    for n in range(120):
        folder = drafters[n % 2]
        good = (folder / "config.json").read_text()
        (folder / "config.json").write_text(json.dumps(mutated(json.loads(good), rng)))
        try:
            result = runner.invoke(app, ["inspect", str(folder), str(verifier)])
        finally:
            (folder / "config.json").write_text(good)
        if result.exit_code:
            assert isinstance(result.exception, (ValueError, OSError)), result.exception
            assert len(str(result.exception)) < 800, result.exception


def test_config_nested_without_end(drafters, tmp_path) -> None:
    (tmp_path / "config.json").write_text("[" * 200_000)
    with pytest.raises(ValueError, match="nested too deeply"):
        DrafterConfig.from_pretrained(tmp_path)
