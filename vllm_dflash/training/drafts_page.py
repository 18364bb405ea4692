"""``vllm-dflash eval --html``: the responses, marked with what each draft brought."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from vllm_dflash.files import atomic_write
from vllm_dflash.serving.chat import token_texts
from vllm_dflash.training.tokenization import Example

#: Conversations of a page; their text is to be read, not counted.
MOST_CONVERSATIONS = 8
#: Characters of the conversation shown before each response.
_CONTEXT = 400
_GENERATOR = '<meta name="generator" content="vllm-dflash eval">'
_HEAD = """<!doctype html>
<meta charset="utf-8">
{generator}
<title>Drafts of {drafter}</title>
<style>
body {{ font: 15px/1.7 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em }}
body {{ color: #222; background: #fff }}
pre {{ font: 14px/1.8 monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 0 1.5em }}
.context {{ color: #888 }}
.a {{ background: #bfe3c0 }} .b {{ background: #bcd7f2 }}
.own {{ border-bottom: 2px solid #d2691e }}
td {{ padding: 0 .6em }} td.long {{ width: 20em }} .bar {{ background: #7fb77e; height: .8em }}
</style>
<h1>Where drafts end</h1>
<p>Drafter {drafter}, verifier {verifier}. tau {tau:.2f}: tokens that a step of the verifier
yields (1 without a drafter), over {drafts} drafts of {tokens} tokens in {conversations} conversations; the
page shows {shown} of these.</p>
<p>Marked in <span class="a">one</span> or the <span class="b">other</span> colour, step by step: draft
tokens that were accepted. <span class="own">Underlined</span>: the token that the verifier put behind
them, where the draft went wrong or was over. Hover over a step for its count.</p>
"""


def is_page(path: Path) -> bool:
    """Whether a file is such a page, for ``claim_file``."""
    with path.open("rb") as file:
        return _GENERATOR.encode() in file.read(400)


def write_page(
    path: Path, result: dict[str, Any], examples: Sequence[Example], tokenizer: Any
) -> None:
    """Writes the page of an evaluation.

    Args:
        path: the HTML file; needs nothing beside it.
        result: what ``evaluate`` returns, with ``offline.delivered``: for each conversation the tokens that
            its steps delivered, in their order.
        examples: the conversations.
        tokenizer: the verifier's.
    """
    offline = result["offline"]
    shown = [e for e in examples if e.id in offline["delivered"]][:MOST_CONVERSATIONS]
    parts = [
        _HEAD.format(
            generator=_GENERATOR,
            drafter=escape(str(result["drafter"])),
            verifier=escape(str(result["verifier"])),
            tau=offline["tau"],
            drafts=offline["num_drafts"],
            tokens=result["num_speculative_tokens"],
            conversations=len(offline["delivered"]),
            shown=len(shown),
        ),
        _positions(offline["position_rates"]),
    ]
    for number, example in enumerate(shown, start=1):
        delivered = offline["delivered"][example.id]
        tau = sum(delivered) / len(delivered) if delivered else 1.0
        source = f", {escape(example.source)}" if example.source else ""
        parts.append(f"<h2>Conversation {number}{source}: tau {tau:.2f}</h2>\n")
        parts += _responses(example, delivered, result["num_speculative_tokens"], tokenizer)
    atomic_write(path, "".join(parts))


def _positions(rates: Sequence[float]) -> str:
    rows = "".join(
        f'<tr><td>{k}<td>{rate:.0%}<td class="long">'
        f'<div class="bar" style="width:{100 * rate:.1f}%"></div>\n'
        for k, rate in enumerate(rates, start=1)
    )
    return f"<table><tr><td>draft token<td colspan=2>drafts accepted up to it\n{rows}</table>\n"


def _responses(
    example: Example, delivered: Sequence[int], num_draft_tokens: int, tokenizer: Any
) -> Iterator[str]:
    pieces = token_texts(tokenizer, example.token_ids)
    mask = [*example.loss_mask, False]
    steps = iter(delivered)
    at = 0
    while any(mask[at:]):
        start = mask.index(True, at)
        end = mask.index(False, start)
        context = "".join(pieces[at:start])
        if len(context) > _CONTEXT:
            context = f"... {context[-_CONTEXT:]}"
        yield f'<pre><span class="context">{escape(context)}</span>{escape(pieces[start])}'
        at = start + 1
        step = 0
        while at < end:
            count = next(steps)
            # At the end of a response the last token that a step delivers may be a draft's, too.
            drafted, own = pieces[at : at + count - 1], pieces[at + count - 1]
            yield (
                f'<span title="{count - 1} of {num_draft_tokens} draft tokens">'
                f'<span class="{"ab"[step % 2]}">{escape("".join(drafted))}</span>'
                f'<span class="own">{escape(own)}</span></span>'
            )
            at, step = at + count, step + 1
        yield "</pre>\n"
