"""Regeneration of responses: what is asked, what is trained on, and restarts after a kill."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenization import build_tokenizer, conversation_of, masked_text

from vllm_dflash.bench.prompts import _request
from vllm_dflash.training import responses
from vllm_dflash.training.conversations import Conversation, load_conversations
from vllm_dflash.training.responses import GenerationResult, regenerate
from vllm_dflash.training.tokenization import prompt_token_ids, split_turns

TOKENIZER = build_tokenizer("chatml")
FINGERPRINT = {"model": "tiny", "seed": 0, "stop": ("a", "b")}
END = TOKENIZER.eos_token_id


class Verifier:
    """A deterministic stand-in for the engine: the reply depends on the prompt alone.

    Attributes:
        asked: Keys of all requests, one list a round.
        dies_after: Number of results after which the process is killed.
        results: By key, what to answer instead: (token ids, finish reason), or None for nothing.
    """

    def __init__(self, dies_after=None, results=None, tokenizer=TOKENIZER, reply="the cat {}"):
        self.asked: list[list[str]] = []
        self.prompts: dict[str, list[int]] = {}
        self.dies_after = dies_after
        self.results = results or {}
        self.tokenizer = tokenizer
        self.reply = reply
        self.num_results = 0

    def __call__(self, requests):
        self.asked.append([request.key for request in requests])
        for request in reversed(requests):  # an engine finishes in its own order
            self.prompts[request.key] = request.prompt_token_ids
            if self.num_results == self.dies_after:
                raise KeyboardInterrupt
            token_ids, reason = self.default(request.prompt_token_ids), "stop"
            if request.key in self.results:
                if self.results[request.key] is None:
                    continue
                token_ids, reason = self.results[request.key]
            self.num_results += 1
            yield GenerationResult(request.key, token_ids, reason)

    def default(self, prompt):
        text = self.reply.format(sum(prompt) % 97)
        return [*self.tokenizer.encode(text, add_special_tokens=False), END]

    @property
    def num_asked(self) -> int:
        return sum(map(len, self.asked))


def run(conversations, verifier, folder, tokenizer=TOKENIZER, **changes):
    options = {"fingerprint": FINGERPRINT, "max_len": 1000} | changes
    path = Path(folder) / "responses.jsonl"
    return regenerate(conversations, tokenizer, verifier, path, **options)


def logged_lines(folder) -> list[dict]:
    lines = (Path(folder) / "responses.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def many(num: int = 4) -> list[Conversation]:
    """Conversations of one to three turns, every other one ending with the user."""
    out = []
    for number in range(num):
        texts = [f"{role} {number} {i}" for i in range(3) for role in ("ask", "say")]
        length = 2 + 2 * (number % 3) - number % 2
        out.append(conversation_of(*texts[:length], id=f"c{number}"))
    return out


def test_request_gets_one_response_with_its_earlier_turns_as_context(tmp_path):
    conversation = conversation_of("hi", "old reply", "go on")
    verifier = Verifier()
    (example,), rejected = run([conversation], verifier, tmp_path)

    assert (verifier.asked, rejected) == ([["c#0"]], [])
    prompt = prompt_token_ids(TOKENIZER, conversation)
    assert verifier.prompts["c#0"] == prompt
    assert "old reply" in TOKENIZER.decode(prompt)
    response = verifier.default(prompt)
    assert example.token_ids == (*prompt, *response)
    assert example.loss_mask == (False,) * len(prompt) + (True,) * len(response)


def test_every_turn_is_regenerated_on_the_regenerated_history(tmp_path):
    conversation = conversation_of("hi", "old 1", "go on", "old 2", "more", "old 3")
    verifier = Verifier()
    (example,), rejected = run([conversation], verifier, tmp_path)

    assert (verifier.asked, rejected) == ([["c#0"], ["c#1"], ["c#2"]], [])
    assert "old" not in TOKENIZER.decode(example.token_ids)
    replies = [
        TOKENIZER.decode(verifier.default(verifier.prompts[f"c#{n}"])[:-1]) for n in range(3)
    ]
    assert masked_text(TOKENIZER, example) == "".join(f"{reply}<|im_end|>" for reply in replies)
    # Each prompt is the server's own for a client that sends the replies back.
    served = conversation_of("hi", replies[0], "go on", replies[1], "more")
    assert verifier.prompts["c#2"] == prompt_token_ids(TOKENIZER, served)


def logged_trajectory(num_requests: int) -> list[dict]:
    """What a server logs of an agent: each request repeats what went before, its replies without thinking."""
    messages: list[dict] = [{"role": "user", "content": "hi"}]
    rows = []
    for number in range(num_requests):
        function = {"name": "look_up", "arguments": json.dumps({"page": number})}
        call = {"id": f"call{number}", "type": "function", "function": function}
        reply = {"role": "assistant", "content": f"old {number}"}
        reply |= {"tool_calls": [call]} if number < num_requests - 1 else {}
        choices = [{"message": reply | {"reasoning": f"hm {number}"}, "finish_reason": "stop"}]
        rows.append({"request": {"messages": list(messages)}, "response": {"choices": choices}})
        result = {"role": "tool", "content": f"found {number}", "tool_call_id": f"call{number}"}
        messages += [reply, result]
    return rows


def load_rows(folder, rows) -> list[Conversation]:
    path = Path(folder) / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    conversations, rejected = load_conversations(path)
    assert rejected == []
    return conversations


def test_each_logged_request_is_asked_as_it_was_sent(tmp_path):
    tokenizer = build_tokenizer("qwen3")
    rows = logged_trajectory(5)
    conversations = load_rows(tmp_path, rows)
    sent = load_rows(tmp_path, [{"request": row["request"]} for row in rows])
    verifier = Verifier(tokenizer=tokenizer)
    examples, rejected = run(conversations, verifier, tmp_path, tokenizer)

    keys = [f"{conversation.id}#0" for conversation in conversations]
    assert (verifier.asked, rejected) == ([keys], [])
    expected = [prompt_token_ids(tokenizer, conversation) for conversation in sent]
    assert [verifier.prompts[key] for key in keys] == expected
    assert [example.loss_mask.index(True) for example in examples] == list(map(len, expected))


@pytest.mark.parametrize("as_prompt", [False, True])
def test_chats_logged_turn_by_turn_cost_one_response_a_row(tmp_path, as_prompt):
    texts = ["hi", "old 1", "go on", "old 2", "more", "old 3"]
    rows = []
    for num in (2, 4, 6):
        *prompt, reply = [dict(message) for message in conversation_of(*texts[:num]).messages]
        logged = {"request": {"messages": prompt}, "response": {"choices": [{"message": reply}]}}
        # TRL's format, which also says what is prompt and what is response.
        row = {"system": "Be brief", "prompt": prompt, "completion": [reply]}
        rows.append(row if as_prompt else logged)
    verifier = Verifier()
    examples, _ = run(load_rows(tmp_path, rows), verifier, tmp_path)
    assert verifier.num_asked == len(examples) == 3
    assert "old 2" in TOKENIZER.decode(examples[2].token_ids)
    assert "old 3" not in TOKENIZER.decode(examples[2].token_ids)


def test_on_policy_a_logged_request_has_the_one_turn_that_was_generated(tmp_path):
    tokenizer = build_tokenizer("qwen3")
    conversations = load_rows(tmp_path, logged_trajectory(3))
    for number, conversation in enumerate(conversations):
        # The history would be printed with empty thinking, which nobody generated.
        (turn,) = split_turns(tokenizer, conversation, frozenset({END}))
        text = tokenizer.decode(turn.response_ids)
        assert text.startswith(f"<think>\nhm {number}\n</think>\n\nold {number}")


def test_a_logged_request_that_ends_with_a_reply_asks_for_the_next_one(tmp_path):
    messages = list(conversation_of("hi", "old").messages)
    (conversation,) = load_rows(tmp_path, [{"request": {"messages": messages}}])
    verifier = Verifier()
    run([conversation], verifier, tmp_path)
    assert verifier.prompts == {f"{conversation.id}#0": prompt_token_ids(TOKENIZER, conversation)}
    with pytest.raises(ValueError, match="no assistant turn"):
        split_turns(TOKENIZER, conversation, frozenset({END}))
    assert _request(conversation).messages == tuple(messages)  # benchmarks ask the same


def test_thinking_that_the_history_drops_gives_one_example_a_turn(tmp_path):
    tokenizer = build_tokenizer("qwen3")
    verifier = Verifier(tokenizer=tokenizer, reply="<think>\nhm\n</think>\n\nthe cat {}")
    conversation = conversation_of("hi", "old", "go on", "old")
    examples, _ = run([conversation], verifier, tmp_path, tokenizer)
    assert [example.id for example in examples] == ["c#0", "c#1"]
    for example in examples:
        assert masked_text(tokenizer, example).startswith("<think>\nhm\n</think>\n\nthe cat")
        prompt = example.token_ids[: example.loss_mask.index(True)]
        assert "<think>" not in tokenizer.decode(prompt)


def test_sampled_tokens_are_never_tokenized_again(tmp_path):
    # Letter by letter, as sampling may spell what the tokenizer merges.
    spelled = [TOKENIZER.convert_tokens_to_ids(letter) for letter in "thecat"] + [END]
    assert TOKENIZER.encode("thecat", add_special_tokens=False) != spelled[:-1]
    verifier = Verifier(results={"c#0": (spelled, "stop")})
    conversation = conversation_of("hi", "old", "go on", "old")
    first, second = run([conversation], verifier, tmp_path)[0]
    # The template tokenizes the history its own way, so the second turn cannot extend the first.
    assert list(first.token_ids[first.loss_mask.index(True) :]) == spelled
    assert list(second.token_ids[: second.loss_mask.index(True)]) == verifier.prompts["c#1"]


def test_a_round_is_asked_at_once_and_progress_ends_complete(tmp_path):
    conversations, reports = many(6), []
    verifier = Verifier()
    examples, rejected = run(
        conversations, verifier, tmp_path, on_progress=lambda *report: reports.append(report)
    )
    assert rejected == []
    assert [example.id for example in examples] == [f"c{n}#0" for n in range(6)]
    assert [len(keys) for keys in verifier.asked] == [6, 2, 1]
    assert reports[0] == (0, 9)
    assert reports[-1] == (9, 9)
    assert [done for done, _ in reports] == sorted(done for done, _ in reports)


def test_progress_follows_dialogues_that_end_early(tmp_path):
    conversations = [conversation_of("hi", "old", "go on", "old", id=f"c{n}") for n in range(3)]
    reports = []
    verifier = Verifier(results={"c1#0": ([], "stop"), "c2#0": ([END, END], "stop")})
    run(conversations, verifier, tmp_path, on_progress=lambda *report: reports.append(report))
    # An engine's order: c2's reply has no text to go on behind, c1 gets none, c0 goes on.
    assert reports == [(0, 6), (1, 5), (1, 3), (2, 3), (2, 3), (3, 3)]


def test_progress_visits_one_dialogue_a_result(tmp_path, monkeypatch):
    visits = [0]

    class Counted(responses._Dialog):
        def __getattribute__(self, name):
            visits[0] += 1
            return super().__getattribute__(name)

    monkeypatch.setattr(responses, "_Dialog", Counted)
    counts = []
    for num in (10, 40):
        visits[0] = 0
        asked = [conversation_of("hi", id=f"c{n}") for n in range(num)]
        run(asked, Verifier(), tmp_path / str(num), on_progress=lambda *report: None)
        counts.append(visits[0])
    assert counts[1] == 4 * counts[0]


# ---- restarts ----


@settings(max_examples=15)
@given(dies_after=st.integers(0, 8))
def test_killed_run_continues_and_ends_as_if_never_killed(dies_after):
    conversations = many(6)
    with tempfile.TemporaryDirectory() as whole, tempfile.TemporaryDirectory() as folder:
        expected = run(conversations, Verifier(), whole)
        with pytest.raises(KeyboardInterrupt):
            run(conversations, Verifier(dies_after=dies_after), folder)
        assert len(logged_lines(folder)) == 1 + dies_after
        verifier = Verifier()
        assert run(conversations, verifier, folder) == expected
        assert verifier.num_asked == 9 - dies_after
        # What is complete is not generated again.
        verifier = Verifier()
        assert run(conversations, verifier, folder) == expected
        assert verifier.num_asked == 0


def test_each_response_is_on_disk_before_the_next_one_is_asked_for(tmp_path):
    num_lines = []

    def generate(requests):
        for result in Verifier()(requests):
            yield result
            num_lines.append(len(logged_lines(tmp_path)))

    run(many(6), generate, tmp_path)
    assert num_lines == list(range(2, 11))


@settings(max_examples=40)
@given(data=st.data())
def test_file_cut_anywhere_by_a_kill_is_continued(data):
    conversations = many(4)
    with tempfile.TemporaryDirectory() as folder:
        expected = run(conversations, Verifier(), folder)
        path = Path(folder) / "responses.jsonl"
        complete = path.read_bytes()
        cut = data.draw(st.integers(0, len(complete)))
        path.write_bytes(complete[:cut])

        verifier = Verifier()
        assert run(conversations, verifier, folder) == expected
        num_kept = max(complete[:cut].count(b"\n") - 1, 0)
        assert verifier.num_asked == complete.count(b"\n") - 1 - num_kept
        lines = logged_lines(folder)  # every line is whole again
        assert lines[0] == {"fingerprint": {"model": "tiny", "seed": 0, "stop": ["a", "b"]}}
        assert len({line["key"] for line in lines[1:]}) == len(lines) - 1


def test_damaged_line_in_the_middle_costs_only_its_response(tmp_path):
    expected = run(many(4), Verifier(), tmp_path)
    path = tmp_path / "responses.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2] = b'{"key": "c1#0", "tok\x00\n'
    path.write_bytes(b"".join(lines))
    verifier = Verifier()
    assert run(many(4), verifier, tmp_path) == expected
    assert verifier.num_asked == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 1}, "seed was 0, is 1"),
        ({"stop": ()}, r"stop was \['a', 'b'\], is \[\]"),
        ({"temperature": 1.0}, "temperature was None, is 1.0"),
    ],
)
def test_other_settings_are_refused_and_leave_the_file_alone(tmp_path, changes, words):
    run(many(), Verifier(), tmp_path)
    before = (tmp_path / "responses.jsonl").read_bytes()
    verifier = Verifier()
    with pytest.raises(ValueError, match=rf"differently: {words}\. Use another run folder"):
        run(many(), verifier, tmp_path, fingerprint=FINGERPRINT | changes)
    assert verifier.asked == []
    assert (tmp_path / "responses.jsonl").read_bytes() == before


@pytest.mark.parametrize("line", ["{}", "[]", "hello", '{"fingerprint": 3}'])
def test_file_of_something_else_is_refused(tmp_path, line):
    path = tmp_path / "responses.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match="is no log of responses"):
        run(many(), Verifier(), tmp_path)
    assert path.read_text() == line + "\n"


def test_response_to_another_prompt_is_generated_again(tmp_path):
    run([conversation_of("hi"), conversation_of("same", id="d")], Verifier(), tmp_path)
    changed = [conversation_of("other"), conversation_of("same", id="d")]
    for num_asked in (1, 0):  # and the new line counts from then on
        verifier = Verifier()
        (example, _), _ = run(changed, verifier, tmp_path)
        assert verifier.num_asked == num_asked
        prompt = prompt_token_ids(TOKENIZER, changed[0])
        assert list(example.token_ids) == prompt + verifier.default(prompt)


# ---- what cannot be trained on ----


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (([], "stop"), "gave 0 tokens, finish reason 'stop'"),
        (([5, 6, 7], "abort"), "gave 3 tokens, finish reason 'abort'"),
        (None, "gave no response"),
        (([END], "stop"), "only 1 response tokens"),
    ],
)
def test_unusable_result_rejects_its_conversation_only(tmp_path, result, reason):
    conversations = [conversation_of("hi", id="bad", line=3), conversation_of("hi", id="good")]
    examples, (reject,) = run(conversations, Verifier(results={"bad#0": result}), tmp_path)
    assert [example.id for example in examples] == ["good#0"]
    assert reject.line == 3
    assert reason in reject.reason


@pytest.mark.parametrize("result", [([], "stop"), ([5, 6], "abort"), None])
def test_failed_response_is_tried_again_by_the_next_run(tmp_path, result):
    run(many(4), Verifier(results={"c1#0": result}), tmp_path)
    verifier = Verifier()
    _, rejected = run(many(4), verifier, tmp_path)
    assert rejected == []
    assert verifier.asked == [["c1#0"]]


def test_failure_of_a_later_turn_keeps_the_turns_before_it(tmp_path):
    conversation = conversation_of("hi", "old", "go on", "old")
    (example,), rejected = run([conversation], Verifier(results={"c#1": ([], "stop")}), tmp_path)
    assert rejected == []
    assert masked_text(TOKENIZER, example).count("<|im_end|>") == 1


def test_tool_call_in_the_data_ends_the_regeneration(tmp_path):
    call = {"type": "function", "function": {"name": "look_up", "arguments": "{}"}}
    messages = (
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "found"},
        {"role": "assistant", "content": "old"},
    )
    verifier = Verifier()
    (example,), _ = run([Conversation("c", messages, "test")], verifier, tmp_path)
    assert verifier.asked == [["c#0"]]
    assert "found" not in TOKENIZER.decode(example.token_ids)


def test_reply_without_text_ends_the_regeneration(tmp_path):
    verifier = Verifier(results={"c#0": ([END, END], "stop")})
    conversation = conversation_of("hi", "old", "go on", "old")
    (example,), _ = run([conversation], verifier, tmp_path)
    assert verifier.asked == [["c#0"]]
    assert masked_text(TOKENIZER, example) == "<|im_end|><|im_end|>"


def test_prompt_that_fills_max_len_is_not_generated(tmp_path):
    conversation = conversation_of("hi")
    num_prompt_tokens = len(prompt_token_ids(TOKENIZER, conversation))
    verifier = Verifier()
    for room, num_examples in ((1, 0), (2, 1)):
        max_len = num_prompt_tokens + room
        examples, rejected = run([conversation], verifier, tmp_path, max_len=max_len)
        assert (len(examples), len(rejected)) == (num_examples, 1 - num_examples)
        assert verifier.num_asked == num_examples
    assert len(examples[0].token_ids) == num_prompt_tokens + 2


def test_conversation_that_the_template_refuses_is_rejected(tmp_path):
    tokenizer = build_tokenizer("gemma")
    conversations = [conversation_of("hi", system="Be brief", id="bad"), conversation_of("hi")]
    verifier = Verifier(tokenizer=tokenizer)
    examples, (reject,) = run(conversations, verifier, tmp_path, tokenizer)
    assert [example.id for example in examples] == ["c#0"]
    assert "System role not supported" in reject.reason
    assert json.loads(reject.row)["id"] == "bad"


def test_answer_to_no_question_is_a_broken_engine(tmp_path):
    def generate(requests):
        yield GenerationResult("other#0", [1, 2], "stop")

    with pytest.raises(RuntimeError, match="'other#0', which nobody is waiting for"):
        run([conversation_of("hi")], generate, tmp_path)


outcomes = st.sampled_from(["ok", "empty", "abort", "missing", "short"])


@settings(max_examples=40)
@given(outcome=st.lists(outcomes, min_size=1, max_size=6), max_len=st.integers(20, 120))
def test_every_conversation_is_either_trained_on_or_rejected(outcome, max_len):
    answers = {"empty": ([], "stop"), "abort": ([5, 6], "abort"), "missing": None}
    answers["short"] = ([END], "stop")
    results = {f"c{n}#0": answers[what] for n, what in enumerate(outcome) if what != "ok"}
    conversations = many(len(outcome))
    with tempfile.TemporaryDirectory() as folder:
        examples, rejected = run(conversations, Verifier(results=results), folder, max_len=max_len)
    trained = {example.id.rpartition("#")[0] for example in examples}
    refused = [json.loads(reject.row)["id"] for reject in rejected]
    assert sorted([*trained, *refused]) == [f"c{n}" for n in range(len(outcome))]
    assert all(len(example.token_ids) <= max_len for example in examples)
    assert all(example.num_response_tokens >= 2 for example in examples)
