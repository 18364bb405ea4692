"""The demo's traffic: reproducible, and held-out tickets share no name, item or problem with the others."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3] / "demo"))
import tickets

from vllm_dflash.training.conversations import load_conversations


def test_the_same_seed_gives_the_same_files(tmp_path):
    first = tickets.write(tmp_path / "a", 20, 5, seed=3)
    again = tickets.write(tmp_path / "b", 20, 5, seed=3)
    other = tickets.write(tmp_path / "c", 20, 5, seed=4)
    for one, two, three in zip(first, again, other, strict=True):
        assert one.read_bytes() == two.read_bytes() != three.read_bytes()


def test_held_out_content_is_fresh(tmp_path):
    texts = []
    for path in tickets.write(tmp_path, 300, 100, seed=0):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        texts.append(" ".join(row["messages"][-1]["content"] for row in rows))
    train, heldout = texts
    parts = [tickets.FIRST_NAMES, tickets.LAST_NAMES, tickets.ITEMS, tickets.PROBLEMS]
    for words in parts:
        kept = tickets._parts(words, heldout=True)
        assert kept
        assert not set(kept) & set(tickets._parts(words, heldout=False))
        assert all(word not in heldout for word in tickets._parts(tickets.LAST_NAMES, False))
        assert any(word in heldout for word in kept)
    assert all(name not in train for name in tickets._parts(tickets.LAST_NAMES, heldout=True))


def test_every_row_is_a_usable_request(tmp_path):
    path, _ = tickets.write(tmp_path, 30, 1, seed=0)
    conversations, rejected = load_conversations(path)
    assert len(conversations) == 30
    assert not rejected
    assert all(c.messages[-1]["role"] == "user" for c in conversations)
    assert {c.source for c in conversations} == {"tickets"}
