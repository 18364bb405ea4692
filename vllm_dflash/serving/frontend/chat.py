"""How vLLM's server turns a chat into a prompt, and a reply into thinking and answer: its own parts of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

# vLLM reads it when it is first imported, which may be here.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


def served_template(tokenizer: Any, model_config: Any) -> str | dict[str, str] | None:
    """The chat template that the server takes: a processor's where no tools are given, the tokenizer's, or
    the one that vLLM brings for such models.

    Args:
        tokenizer: of transformers.
        model_config: vLLM's ``ModelConfig``, or what of it says where tokenizer and processor are.

    Returns:
        As transformers keeps templates: a dict where tools change the choice; None where there is none.
    """
    from vllm.renderers.hf import resolve_chat_template

    given = {"chat_template": None, "model_config": model_config}
    plain = resolve_chat_template(tokenizer, tools=None, **given)
    with_tools = resolve_chat_template(tokenizer, tools=[{}], **given)
    if plain is None or with_tools is None or plain == with_tools:
        return plain or with_tools
    return {"default": plain, "tool_use": with_tools}


def check_parser_name(name: str) -> None:
    """ValueError names vLLM's reasoning parsers if this is none of them."""
    from vllm.reasoning import ReasoningParserManager

    known = ReasoningParserManager.list_registered()
    if name not in known:
        raise ValueError(f"--reasoning-parser is {name!r}; vLLM has {', '.join(known)}")


class ReasoningSplit:
    """One of vLLM's reasoning parsers, used as the server uses it.

    Args:
        name: as for vLLM's ``--reasoning-parser``.
        tokenizer: the verifier's, with the server's chat template.
        model_config: the engine's ``ModelConfig``, for parsers that look at it.

    Raises:
        ValueError: vLLM has no such parser, or it cannot read this tokenizer's replies.
    """

    def __init__(self, name: str, tokenizer: Any, model_config: Any = None) -> None:
        check_parser_name(name)
        from vllm.parser.parser_manager import ParserManager

        hf_config = getattr(model_config, "hf_config", None)
        try:
            parser = ParserManager.get_parser(
                reasoning_parser_name=name,
                model_name=getattr(model_config, "model", None),
                is_harmony=getattr(hf_config, "model_type", None) == "gpt_oss",
            )
            assert parser is not None
            parser(tokenizer, model_config=model_config)
        except (TypeError, ValueError, KeyError, RuntimeError) as error:
            raise ValueError(f"--reasoning-parser {name} cannot be used here: {error}") from error
        self.parser, self.tokenizer, self.model_config = parser, tokenizer, model_config

    def __call__(
        self,
        prompt_ids: Sequence[int],
        token_ids: Sequence[int],
        text: Callable[[bool], str],
        tools: Sequence[dict] | None,
        chat_template_kwargs: dict[str, Any],
    ) -> tuple[str | None, str | None]:
        """Thinking and answer of a reply.

        Args:
            text: the reply's text, with its special tokens or without.
            tools: the request's.
            chat_template_kwargs: the request's.
        """
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

        # Only what parsers read: the question that was asked is in the prompt.
        make: Any = ChatCompletionRequest
        request = make(
            messages=[{"role": "user", "content": ""}],
            tools=list(tools) if tools else None,
            chat_template_kwargs=chat_template_kwargs,
        )
        parser = self.parser(
            self.tokenizer,
            request.tools,
            model_config=self.model_config,
            chat_template_kwargs=chat_template_kwargs,
        )
        request = parser.adjust_request(request)
        if hasattr(parser, "set_prompt_token_ids"):  # not in vLLM 0.31
            parser.set_prompt_token_ids(list(prompt_ids))
        reasoning, content, _ = parser.parse(
            text(not request.skip_special_tokens), request, model_output_token_ids=list(token_ids)
        )
        return reasoning, content


def token_texts(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """The text that each token adds; of a character in several tokens the last one has it."""
    from vllm.tokenizers.detokenizer_utils import detokenize_incrementally

    texts: list[str] = []
    tokens: list[str] | None = None
    prefix = read = 0
    for token_id in token_ids:
        new, text, prefix, read = detokenize_incrementally(
            tokenizer, [token_id], tokens, prefix, read
        )
        if tokens is None:
            tokens = []
        tokens += new
        texts.append(text)
    return texts
