"""Where drafting ends, by configuration; engines are in test_drafter_positions.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_dflash import ops
from vllm_dflash.serving.draft_limits import position_limit, rotary_positions
from vllm_dflash.serving.worker.drafter_model import _without
from vllm_dflash.training.config import EngineOptions
from vllm_dflash.training.engine import fit_max_len

ROPE: dict[str, Any] = {"rope_theta": 1e4}


@pytest.mark.parametrize(
    ("rope", "rows"),
    [
        ({"rope_type": "default"}, 96),
        ({"rope_type": "linear", "factor": 2.5}, 240),
        ({"rope_type": "linear", "factor": 1.3}, 125),
        ({"rope_type": "ntk", "factor": 4.0}, 96),
        ({"rope_type": "dynamic", "factor": 4.0}, 96),
        ({"rope_type": "dynamic", "alpha": 3.0, "factor": 2.0}, 96),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 64),
        ({"rope_type": "yarn", "factor": 1.7, "original_max_position_embeddings": 33}, 57),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
            96,
        ),
    ],
    ids=lambda value: value["rope_type"] if isinstance(value, dict) else "",
)
def test_rows_are_those_of_vllms_table(rope, rows) -> None:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    given = ROPE | rope
    config = SimpleNamespace(max_position_embeddings=96, rope_parameters=given)
    with set_current_vllm_config(VllmConfig()):
        table = get_rope(32, 96, True, given, torch.float32).cos_sin_cache
    assert rotary_positions(config) == rows == table.shape[0]


def test_the_least_limit_counts() -> None:
    def limit(server: int, own: int | None, rows: int | None) -> int:
        hf_config = SimpleNamespace(max_position_embeddings=rows)
        draft = SimpleNamespace(max_model_len=own, hf_config=hf_config)
        return position_limit(SimpleNamespace(draft_model_config=draft), server)

    assert limit(300, 300, 300) == 300
    assert limit(300, 200, 300) == 200  # max_model_len of the speculative configuration
    assert limit(300, 200, 512) == 200  # a table that vLLM made longer than the drafter's own limit
    assert limit(300, 300, 100) == 100
    assert limit(300, None, None) == 300


def test_context_beyond_is_not_stored() -> None:
    beyond = torch.tensor([False, True, False])
    slots = torch.tensor([5, 6, 7])
    left = torch.tensor([5, ops.PAD_SLOT, 7])
    assert torch.equal(_without(slots, beyond), left)
    per_layer = _without([slots, slots + 1], beyond)
    assert [x.tolist() for x in per_layer] == [[5, -1, 7], [6, -1, 8]]
    assert _without(None, beyond) is None
    assert slots.tolist() == [5, 6, 7]


def test_training_ends_where_the_positions_end() -> None:
    def fitted(drafter: int, verifier: int, tokens: int = 7) -> int:
        text = SimpleNamespace(max_position_embeddings=verifier)
        hf_config = SimpleNamespace(get_text_config=lambda: text)
        config = SimpleNamespace(max_position_embeddings=drafter, rope_parameters={})
        options = EngineOptions(max_len=160)
        return fit_max_len(options, hf_config, config, tokens).max_len  # type: ignore[arg-type]

    assert fitted(512, 512) == 160
    assert fitted(100, 512) == 91
    assert fitted(512, 100) == 91
    with pytest.raises(ValueError, match="max_position_embeddings is 9, which leaves no room"):
        fitted(9, 512)
