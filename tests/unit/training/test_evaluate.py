"""What eval says: rows that are not used, and an engine that drafts otherwise. No engine is started."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from helpers import tiny
from vllm_dflash.bench.prompts import load_prompts
from vllm_dflash.training.config import EngineOptions, EvalConfig, SamplingOptions
from vllm_dflash.training.conversations import Conversation, Rejected
from vllm_dflash.training.evaluate import disagreement, serving_spec
from vllm_dflash.training.prepare import prepare_examples
from vllm_dflash.training.replies import MarkedReplies
from vllm_dflash.verifier import Verifier


def figures(tau: float, drafts: int = 465) -> dict:
    return {"tau": tau, "num_drafts": drafts}


@pytest.mark.parametrize("engine", [2.0, 1.97, 2.03])
def test_two_percent_are_ties(engine) -> None:
    assert disagreement(figures(2.0), figures(engine)) is None


@pytest.mark.parametrize("engine", [1.012, 1.95, 2.05])
def test_more_is_said_in_one_line(engine) -> None:
    said = disagreement(figures(2.0), figures(engine, 1035))
    assert said["relative"] == pytest.approx(engine / 2 - 1)
    text = said["message"]
    assert "\n" not in text
    for part in (f"{abs(engine / 2 - 1):.1%}", "2.000", f"{engine:.3f}", "465", "1035"):
        assert part in text
    assert "mask embedding" in text


def test_bench_says_which_rows_it_does_not_use(tmp_path, verifier) -> None:
    data, said = tmp_path / "rows.jsonl", []
    data.write_text('{"messages": [{"role": "user", "content": "hello"}]}\nnot json\n')
    assert len(load_prompts(str(verifier), str(data), {}, 10, say=said.append)) == 1
    assert said[0] == "1 of 2 rows is rejected:"
    assert said[1].endswith("(row 2)")
    assert "not JSON" in said[1]


def test_prompts_are_counted_after_rendering(tmp_path, verifier) -> None:
    """A row that the chat template refuses is replaced by the next."""
    data, said = tmp_path / "rows.jsonl", []
    rows = ["hello", "no", "again", "more"]
    data.write_text(
        "".join(json.dumps({"messages": [{"role": "user", "content": r}]}) + "\n" for r in rows)
    )
    template = "{% if messages[0]['content'] == 'no' %}{{ raise_exception('refused') }}{% endif %}"
    template += tiny.CHAT_TEMPLATE
    source = Verifier(str(verifier), chat_template=template)
    prompts = load_prompts(source, str(data), {}, 2, say=said.append)
    assert len(prompts) == 2
    assert said[0] == "1 of 3 rows is rejected:"


def test_it_is_served_as_a_server_would() -> None:
    """Of an engine's many settings only these are not vLLM's own."""
    given = EngineOptions(dtype="bfloat16", max_len=100, max_num_seqs=3)
    config = EvalConfig(Verifier("v"), "d", "rows.jsonl", engine=given)
    spec = serving_spec(config, 7, Path("log"))
    own = {"dtype": "bfloat16", "max_model_len": 109, "tensor_parallel_size": 1}
    assert spec.engine_args == {"model": "v", **own}
    assert set(spec.env) == {"VLLM_CPU_KVCACHE_SPACE"}
    eager = replace(given, extra={"enforce_eager": True, "tensor_parallel_size": 2})
    spec = serving_spec(replace(config, engine=eager), 7, Path("log"))
    assert spec.engine_args["enforce_eager"]
    assert spec.engine_args["tensor_parallel_size"] == 2


class NoTemplate:
    """An engine whose tokenizer has no chat template."""

    def __init__(self) -> None:
        self.tokenizer = tiny.make_tokenizer()
        self.tokenizer.chat_template = None
        self.to_message = MarkedReplies(self.tokenizer)

    def generator(self, sampling):
        return lambda requests: iter(())


@pytest.mark.parametrize("keep", [True, False])
def test_no_file_is_named_that_does_not_stay(tmp_path, keep) -> None:
    conversation = Conversation(
        id="a", line=1, source="s", messages=({"role": "user", "content": "hello"},)
    )
    rejected = tmp_path / "rejected.jsonl" if keep else None
    with pytest.raises(ValueError, match="none of the 1 conversations can be used") as error:
        prepare_examples(
            NoTemplate(), Verifier("v"), [conversation], [Rejected(2, "not JSON", "x")],
            on_policy=False, sampling=SamplingOptions(), max_len=100,
            responses_path=tmp_path / "responses.jsonl", rejected_path=rejected,
        )  # fmt: skip
    assert ("rejected.jsonl" in str(error.value)) == keep
    assert (tmp_path / "rejected.jsonl").exists() == keep
    if keep:
        assert len(rejected.read_text().splitlines()) == 2
