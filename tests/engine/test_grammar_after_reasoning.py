"""Structured output of a verifier that thinks first: the grammar begins where thinking ends, in a block."""

from __future__ import annotations

import re
from typing import Any

import pytest

from helpers import reasoning_parser, tiny

pytestmark = [pytest.mark.engine, pytest.mark.long]
REGEX = "(cat|dog) [a-z]{3,9} [0-9]{2}"


def served(trained, prompts, folder, **more: Any) -> dict[str, Any]:
    engine = {
        "model": str(trained.verifier),
        "max_model_len": 192,
        "max_num_seqs": 8,
        "reasoning_parser": "by_token",
        "reasoning_parser_plugin": reasoning_parser.__file__,
        **more.pop("engine", {}),
    }
    params = {"temperature": 0.0, "max_tokens": 48, "structured_outputs": {"regex": REGEX}}
    run = {"name": "json", "prompts": prompts, "params": [params] * len(prompts)}
    return tiny.engine_job({"engine": engine, "runs": [run], "features": False, **more}, folder)


def answers(out: dict[str, Any]) -> list[list[int]]:
    return [outputs[0]["token_ids"] for outputs in out["runs"]["json"]["outputs"]]


def end_of_reasoning(answer: list[int]) -> int | None:
    return next((i for i, t in enumerate(answer) if t in reasoning_parser.ENDS), None)


def ended_inside(out: dict[str, Any], prompts: list[list[int]]) -> int:
    """Drafts whose accepted tokens hold the end of the reasoning and were drafted beyond it."""
    found = 0
    for draft in out["drafts"]:
        number = int(draft["key"].rpartition(":")[2])
        begin = draft["anchor"] - len(prompts[number]) + 1
        follows = answers(out)[number][begin:]
        end = end_of_reasoning(draft["drafts"])
        if end is not None and end < len(draft["drafts"]) - 1:
            right = draft["drafts"][: end + 1] == follows[: end + 1]
            found += right and end_of_reasoning(answers(out)[number]) == begin + end
    return found


@pytest.fixture(scope="module")
def plain(trained, prompts, tmp_path_factory) -> list[list[int]]:
    """The answers without a drafter; most think and then obey."""
    out = served(trained, prompts, tmp_path_factory.mktemp("plain"))
    tokenizer, obeyed = tiny.make_tokenizer(), 0
    for answer, (output,) in zip(answers(out), out["runs"]["json"]["outputs"], strict=True):
        end = end_of_reasoning(answer)
        if end is not None and output["finish"] == "stop":
            text = tokenizer.decode(answer[end + 1 :], skip_special_tokens=True)
            assert re.fullmatch(REGEX, text), text
            obeyed += end > 0
    assert obeyed > 3
    return answers(out)


@pytest.mark.parametrize("random", [False, True], ids=["all", "any length"])
def test_greedy_output_is_the_verifiers(random, plain, trained, prompts, tmp_path) -> None:
    length = "auto" if random else "fixed"
    drafter = {"method": "dflash", "model": str(trained.drafter), "dflash_draft_length": length}
    out = served(
        trained,
        prompts,
        tmp_path,
        engine={"speculative_config": drafter},
        random_lengths=random,
        record=str(tmp_path / "record.safetensors"),
    )
    assert answers(out) == plain
    assert ended_inside(out, prompts) > 0
    assert "failed to advance" not in out["log"].lower()
