"""A generated reply as the message that a client sends back as history.

Behind a server with a reasoning parser a reply comes in two parts, thinking and answer, and a client sends
back the answer as ``content`` (and the thinking as ``reasoning``). The next turn's prompt depends on it: a
reply put back raw makes a prompt that no server ever sees.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_dflash.training.conversations import Conversation

#: ``</think>``, ``</seed:think>``, ``[/THINK]``, ``◁/think▷``... with or without a bar inside the bracket.
_END_MARKER = re.compile(
    r"(?P<open>[<\[◁]\|?)/(?P<name>(?:\w+:)?(?:think|thinking|thoughts?|reason|reasoning))"
    r"(?P<close>\|?[>\]▷])",
    re.IGNORECASE,
)
#: Tokens of a prompt that are looked at for an open start marker.
_PROMPT_END = 16


@dataclass(frozen=True)
class FinishedReply:
    """What the verifier answered.

    Attributes:
        conversation: with the messages before the reply (and those of the data after it).
        index: of the reply among the messages.
        prompt_ids: the prompt's token ids.
        token_ids: the reply's, the token that ended it included.
        finish_reason: vLLM's.
    """

    conversation: Conversation
    index: int
    prompt_ids: Sequence[int]
    token_ids: Sequence[int]
    finish_reason: str


#: Gives the assistant message of a reply; ValueError says why it cannot be put back.
ToMessage = Callable[[FinishedReply], dict]


class MarkedReplies:
    """Splits replies at the thinking markers that a tokenizer and its chat template show.

    It gives what vLLM's parsers of such markers give: thinking ends at the first end marker, and its start
    marker is in the reply or at the end of the prompt.

    Args:
        tokenizer: the verifier's, with the server's chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        template = getattr(tokenizer, "chat_template", None)
        texts = [str(template or ""), *_added_tokens(tokenizer)]
        found = {
            (f"{m['open']}{m['name']}{m['close']}", m[0])
            for text in texts
            for m in _END_MARKER.finditer(text)
        }
        #: Pairs of a start and an end marker.
        self.markers = sorted(found | {("<think>", "</think>")})
        vocabulary = tokenizer.get_vocab()
        self._end_ids = {end: vocabulary.get(end) for _, end in self.markers}

    def __call__(self, reply: FinishedReply) -> dict:
        ids = _without_stop_token(self.tokenizer, reply)
        text = _text(self.tokenizer, ids)
        reasoning = None
        for start, end in self.markers:
            if (end_id := self._end_ids[end]) is not None and end_id in ids:
                # A special token, perhaps, which the text does not show.
                at = ids.index(end_id)
                reasoning, ids = _text(self.tokenizer, ids[:at]), ids[at + 1 :]
                text = _text(self.tokenizer, ids)
            elif end in text:
                reasoning, _, text = text.partition(end)
            if reasoning is not None:
                reasoning = reasoning.partition(start)[2] if start in reasoning else reasoning
                break
        else:
            self._check_thinking_ended(reply, ids)
        if unknown := self._special_tokens(ids):
            raise ValueError(
                f"a reply holds special tokens ({', '.join(unknown[:3])}) that a server's parser reads; "
                "name the server's --reasoning-parser to go on behind such replies"
            )
        return _assistant(text, reasoning)

    def _check_thinking_ended(self, reply: FinishedReply, ids: list[int]) -> None:
        raw = _text(self.tokenizer, ids, special=True).lstrip()
        prompt_end = _text(self.tokenizer, reply.prompt_ids[-_PROMPT_END:], special=True).rstrip()
        for start, end in self.markers:
            if raw.startswith(start) or prompt_end.endswith(start):
                raise ValueError(f"a reply ended before its thinking did (no {end})")

    def _special_tokens(self, ids: list[int]) -> list[str]:
        """Tokens of a reply that its text leaves out, other than start markers."""
        if _text(self.tokenizer, ids, special=True) == _text(self.tokenizer, ids):
            return []
        starts = {start for start, _ in self.markers}
        # Of Mistral's SentencePiece ordinary pieces, too, print otherwise beside special tokens.
        added = [i for i in dict.fromkeys(ids) if _is_added(self.tokenizer, i)]
        shown = {i: _text(self.tokenizer, [i], special=True) for i in added}
        return [
            token
            for i, token in shown.items()
            if token and token not in starts and not _text(self.tokenizer, [i])
        ]


class ParsedReplies:
    """Splits replies with one of vLLM's reasoning parsers, as a server that names it does.

    Takes and raises what :class:`~vllm_dflash.serving.frontend.chat.ReasoningSplit` does.
    """

    def __init__(self, name: str, tokenizer: Any, model_config: Any = None) -> None:
        from vllm_dflash.serving.frontend.chat import ReasoningSplit

        self.tokenizer = tokenizer
        self.split = ReasoningSplit(name, tokenizer, model_config)

    def __call__(self, reply: FinishedReply) -> dict:
        ids = _without_stop_token(self.tokenizer, reply)
        reasoning, content = self.split(
            reply.prompt_ids,
            reply.token_ids,
            lambda special: _text(self.tokenizer, ids, special=special),
            reply.conversation.tools,
            reply.conversation.chat_template_kwargs,
        )
        return _assistant(content or "", reasoning)


def _assistant(content: str, reasoning: str | None) -> dict:
    if not content.strip():
        raise ValueError("a reply without text cannot be put back into the chat template")
    message = {"role": "assistant", "content": content}
    return message | ({"reasoning": reasoning} if reasoning else {})


def _without_stop_token(tokenizer: Any, reply: FinishedReply) -> list[int]:
    """The reply without the token that ended it, which vLLM's text leaves out, too."""
    ids = list(reply.token_ids)
    if reply.finish_reason == "stop" and ids and _is_added(tokenizer, ids[-1]):
        ids.pop()
    return ids


def _is_added(tokenizer: Any, token_id: int) -> bool:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return token_id in added or token_id in getattr(tokenizer, "all_special_ids", ())


def _added_tokens(tokenizer: Any) -> list[str]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return [*map(str, added.values()), *getattr(tokenizer, "all_special_tokens", ())]


def _text(tokenizer: Any, ids: Sequence[int], *, special: bool = False) -> str:
    # vLLM's detokenizer does not clean up spaces either, so this is the text a client gets. Mistral's
    # tokenizer never does.
    keeps = {"clean_up_tokenization_spaces": False}
    options = keeps if hasattr(tokenizer, "clean_up_tokenization_spaces") else {}
    return tokenizer.decode(list(ids), skip_special_tokens=not special, **options)
