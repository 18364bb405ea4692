"""The page of ``eval --html``: every token of a response once, in the group of the step that delivered it."""

from __future__ import annotations

import re
from html import unescape

from helpers import tiny
from vllm_dflash.serving.frontend.chat import token_texts
from vllm_dflash.training.drafts_page import is_page, write_page
from vllm_dflash.training.tokenization import Example


def example(key: str, text: str, responses: list[tuple[int, int]]) -> tuple[Example, list[int]]:
    ids = tiny.make_tokenizer()(text)["input_ids"]
    mask = [any(a <= p < b for a, b in responses) for p in range(len(ids))]
    return Example(id=key, token_ids=tuple(ids), loss_mask=tuple(mask), source="chat"), ids


def test_page(tmp_path) -> None:
    tokenizer = tiny.make_tokenizer()
    text = "the cat <b>sat & ran</b> on the mat, the red dog ran on the mat and so on"
    one, ids = example("a", text, [(4, 12), (15, 17)])
    other, _ = example("b", text, [(2, 3)])
    unusable, _ = example("c", text, [(2, 9)])
    offline = {"tau": 2.0, "num_drafts": 4, "position_rates": [0.75, 0.25]}
    # Behind the first token of each response: 7 in steps of 3, 1 and 3, then 1.
    result = {
        "drafter": "my<drafter>",
        "verifier": "v",
        "num_speculative_tokens": 2,
        "offline": offline | {"delivered": {"a": [3, 1, 3, 1], "b": []}},
    }
    page = tmp_path / "page.html"
    write_page(page, result, [one, other, unusable], tokenizer)
    assert is_page(page)
    html = page.read_text()
    assert "my&lt;drafter&gt;" in html
    assert "<b>sat" not in html
    assert html.count("<h2>") == 2
    pieces = [tokenizer.decode([i]) for i in ids]
    steps = [
        (title, unescape(drafted), unescape(own))
        for title, drafted, own in re.findall(
            r'<span title="(\d) of 2 draft tokens"><span class="[ab]">(.*?)</span>'
            r'<span class="own">(.*?)</span>',
            html,
            re.DOTALL,
        )
    ]
    groups = [(5, 8), (8, 9), (9, 12), (16, 17)]
    assert steps == [(str(b - a - 1), "".join(pieces[a : b - 1]), pieces[b - 1]) for a, b in groups]
    shown = "".join(
        unescape(re.sub(r"<[^>]+>", "", p))
        for p in re.findall(r"<pre>(.*?)</pre>", html, re.DOTALL)
    )
    assert shown == "".join(pieces[:17] + pieces[:3])


def test_a_character_of_several_tokens_is_whole() -> None:
    tokenizer = tiny.make_tokenizer()
    text = "a \u00e9\u20ac b"
    ids = tokenizer(text)["input_ids"]
    texts = token_texts(tokenizer, ids)
    assert "".join(texts) == text
    assert len(texts) == len(ids)
    assert "" in texts


def test_another_page_is_not_ours(tmp_path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<!doctype html><title>mine</title>")
    assert not is_page(page)
