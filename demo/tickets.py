"""The demo's traffic: support tickets that a server triages into JSON records.

    python demo/tickets.py OUT_DIR --train 700 --heldout 64 --seed 0

writes train.jsonl and heldout.jsonl, rows of ``{"id", "source", "messages"}`` as a server would log its
requests: a system prompt, two worked examples, the ticket. Held-out tickets are about other people,
cities, products and problems than the training ones: only the task is shared.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

SYSTEM = "You triage support tickets into JSON records."

FIRST_NAMES = (
    "Alice Omar Priya Jonas Mei Carlos Fatima Liam Sofia Noah Yuki Ivan Chloe Ahmed Grace Diego Hannah "
    "Tariq Elena Marcus Ingrid Pavel Amara Kenji Lucia Oscar Leila Bruno Nadia Felix Rosa Viktor Aisha "
    "Hugo Mina Stefan Zara Tomas Ines Walter Kira Samuel Dalia Erik Maya Rafael Olga Henry Selma Igor "
    "Paula Anton Bianca Dmitri Flora Gideon Helga Isaac Joanna Karim Lena Mateo Nina Otis Petra Quentin "
    "Rita Sergei Tessa Ugo Vera Wendy Xavier Yasmin Zoltan Agnes Boris Clara Dario Edith Ronan Talia Emil "
    "Greta Milo Astrid Cyrus Delia Ezra Freya Goran Hilda Ivo Judith Kofi Livia Magnus Noemi Orson Pilar"
).split()
LAST_NAMES = (
    "Nguyen Smith Garcia Patel Kowalski Okafor Tanaka Muller Rossi Larsen Haddad Johnson Silva Novak Cohen "
    "Dubois Andersen Bauer Castillo Demir Eriksson Fischer Gupta Horvat Ivanov Jensen Khan Lopez Moreau "
    "Nakamura Olsen Petrov Quinn Rahman Santos Takahashi Ueda Vargas Weber Xu Yilmaz Zhang Abbott Becker "
    "Cruz Dvorak Endo Ferrari Greco Hansen Ito Jovanovic Kelly Lindgren Mendes Nielsen Oliveira Popov "
    "Reyes Schmidt Torres Urban Virtanen Walsh Yamada Zimmer Aydin Berg Costa Diaz Carter Brooks Hughes "
    "Morgan Foster Bennett Parker Cooper Wright Turner"
).split()
KINDS = (
    "wireless foldable electric leather steel wooden portable blue red black large small ceramic cotton "
    "plastic digital garden travel kitchen outdoor"
).split()
ITEMS = (
    "headphones|grinder|shoes|lamp|case|bottle|backpack|chair|speaker|jacket|fryer|mouse|mat|"
    "toaster|boots|clock|stand|basket|kettle|strap|blanket|helmet|board|hose|pillow|cooker|"
    "watch|tool box|towel|radio|charger|tea set|tent|shredder|mixer|fan|monitor|rug|sleeve|"
    "coat|bowl|drill|light|bed|keyboard|goggles|vacuum|scale|mirror|shelf|wallet|umbrella|"
    "thermometer|printer|camera|notebook|bench|heater|scarf|bag"
).split("|")
PROBLEMS = (
    "arrived broken|never arrived|is the wrong color|stopped working after two days|was charged twice|is the "
    "wrong size|makes a loud noise|has a missing part|does not turn on|came with a scratch|smells of smoke|"
    "leaks water|gets too hot|has a torn seam|was delivered to my neighbor|lost its color|came without a "
    "manual|does not fit|has a loose screw|was already opened|runs too slow|has a cracked handle|shows an "
    "error|broke on the first day|has a dead battery|is covered in dust|bends too easily|came in a damaged "
    "box|has a sharp edge|is much too heavy|turned yellow|will not close|has a broken zipper|is not the one "
    "in the picture|came two weeks late|cannot be cleaned|wobbles|has the wrong plug|is missing a cable|"
    "stops after a minute"
).split("|")
ACTIONS = (
    "a refund|a replacement|a call back|store credit|a new part|a repair|a discount|a return label|an "
    "exchange|a new delivery date"
).split("|")
TEMPLATES = (
    "Hello, my name is {first} {last}. I ordered a {product} (order {order}) and it {problem}. I would like "
    "{action}.",
    "Hi, this is {first} {last}. The {product} from order {order} {problem}. Please send me {action}.",
    "Order {order}: the {product} {problem}. I am {first} {last} and I want {action}.",
    "Good morning. My {product} {problem}! Order number {order}. I expect {action}. {first} {last}",
    "I am writing about order {order}. The {product} I got {problem}, so I ask for {action}. Regards, "
    "{first} {last}",
)


def record(name: str, order: int, product: str, **labels: str | bool) -> dict:
    """One triaged ticket."""
    return {
        "ticket_status": "open",
        "ticket_language": "English",
        "customer_name": name,
        "order_number": order,
        "product_name": product,
        "problem_category": labels["category"],
        "problem_severity": labels["severity"],
        "customer_sentiment": labels["sentiment"],
        "requested_action": labels["action"],
        "assigned_department": labels["department"],
        "needs_human_review": labels["review"],
    }


EXAMPLES = (
    (
        "Hello, I am Nora Fields. I bought a travel mug (order 55120) and the lid is cracked. I would like a "
        "replacement.",
        record(
            "Nora Fields",
            55120,
            "travel mug",
            category="damaged item",
            severity="medium",
            sentiment="neutral",
            action="replacement",
            department="returns",
            review=False,
        ),
    ),
    (
        "Order 20418: my garden table never came and nobody answers! I want my money back now. Peter Okoro",
        record(
            "Peter Okoro",
            20418,
            "garden table",
            category="missing delivery",
            severity="high",
            sentiment="angry",
            action="refund",
            department="logistics",
            review=True,
        ),
    ),
)


def _parts(words: list[str], heldout: bool) -> list[str]:
    """A fifth of the words is kept for held-out tickets."""
    return [w for i, w in enumerate(words) if (i % 5 == 4) == heldout]


def ticket(rng: random.Random, heldout: bool) -> str:
    """One ticket's text."""
    return rng.choice(TEMPLATES).format(
        first=rng.choice(_parts(FIRST_NAMES, heldout)),
        last=rng.choice(_parts(LAST_NAMES, heldout)),
        product=f"{rng.choice(KINDS)} {rng.choice(_parts(ITEMS, heldout))}",
        problem=rng.choice(_parts(PROBLEMS, heldout)),
        action=rng.choice(ACTIONS),
        order=rng.randint(10000, 99999),
    )


def request(text: str) -> list[dict[str, str]]:
    """The chat request for one ticket."""
    messages = [{"role": "system", "content": SYSTEM}]
    for example, answer in EXAMPLES:
        messages.append({"role": "user", "content": example})
        messages.append({"role": "assistant", "content": json.dumps(answer, indent=2)})
    return [*messages, {"role": "user", "content": text}]


def write(folder: Path, num_train: int, num_heldout: int, seed: int) -> tuple[Path, Path]:
    """Writes both files; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, count, heldout in (("train", num_train, False), ("heldout", num_heldout, True)):
        rng = random.Random(f"{seed}/{name}")
        rows = [
            {
                "id": f"{name}-{i:04d}",
                "source": "tickets",
                "messages": request(ticket(rng, heldout)),
            }
            for i in range(count)
        ]
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        paths.append(path)
    return paths[0], paths[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=700)
    parser.add_argument("--heldout", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for path in write(args.folder, args.train, args.heldout, args.seed):
        print(path)


if __name__ == "__main__":
    main()
