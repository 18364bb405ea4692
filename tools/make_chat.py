"""Free-chat prompts for the second parity workload (benchmarks/data/chat.jsonl holds out others).

python tools/make_chat.py OUT.jsonl [--num 320] [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import random
from itertools import product
from pathlib import Path

ASKS = (
    "What is {}?|Explain {} to a child.|Why does {} matter?|Give me five facts about {}.|Write a short "
    "paragraph about {}.|What are common mistakes people make with {}?|How did {} change over the last "
    "century?|Write a friendly note to a friend about {}.|Tell me a short story about {}.|What should a "
    "beginner know about {}?"
).split("|")
TOPICS = (
    "gardening|volcanoes|public libraries|sourdough bread|chess|migrating birds|train travel|honey bees|the "
    "moon|recycling|jazz music|coral reefs|writing letters|mountain weather|coffee|ancient Rome|solar power|"
    "learning to swim|city parks|maps|robots|tea ceremonies|thunderstorms|budgeting|photography|folk tales|"
    "the human heart|marathon running|glass making|whales|board games|desert plants"
).split("|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--num", type=int, default=320)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    pairs = list(product(ASKS, TOPICS))
    random.Random(args.seed).shuffle(pairs)
    rows = [
        {"source": "chat", "messages": [{"role": "user", "content": ask.format(topic)}]}
        for ask, topic in pairs[: args.num]
    ]
    args.output.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
