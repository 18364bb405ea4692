"""Prompts of verifiers that vLLM's server renders with code of its own instead of a Jinja template."""

from __future__ import annotations

import asyncio
import copy
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

# vLLM reads it when it is first imported, which may be here.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


class ServerPrompts:
    """Chats as vLLM's server turns them into token ids, by the server's own renderer.

    For verifiers without a Jinja template that says it: Mistral's official tokenizers, DeepSeek from V3.2 on,
    Kimi K3, Inkling, and gpt-oss, whose template the server leaves aside for Harmony.

    Args:
        vllm_config: the engine's ``VllmConfig``.
        renderer: vLLM's renderer for it.
        chat_template: the server's ``--chat-template``, for renderers that take one.
    """

    def __init__(self, vllm_config: Any, renderer: Any, chat_template: str | None = None) -> None:
        from vllm.renderers.online_renderer import OnlineRenderer
        from vllm.utils.mistral import is_mistral_tokenizer

        self._online = OnlineRenderer(
            vllm_config.model_config,
            renderer,
            request_logger=None,
            chat_template=chat_template,
            chat_template_content_format="auto",
            # Tools are rendered whether or not a parser reads the calls.
            enable_auto_tools=True,
        )
        self._eos = renderer.get_tokenizer().eos_token_id
        self._is_mistral = is_mistral_tokenizer(renderer.get_tokenizer())
        #: gpt-oss, rendered by Harmony, which always asks for a reply.
        self.is_harmony = bool(self._online.use_harmony)

    def __call__(
        self,
        messages: Iterable[dict],
        tools: Iterable[dict] | None,
        chat_template_kwargs: Mapping[str, Any],
        *,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Token ids of a chat.

        Args:
            messages: in OpenAI's format.
            tools: the request's.
            chat_template_kwargs: the request's.
            add_generation_prompt: ask for a reply; if not, the chat ends with one.

        Raises:
            ValueError: the server refuses the chat.
        """
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.entrypoints.serve.engine.protocol import ErrorResponse

        # Mistral's code prints a reply at the end only as one to go on with, without its end.
        prefix = self._is_mistral and not add_generation_prompt
        make: Any = ChatCompletionRequest
        request = make(
            messages=[_sent(message) for message in messages],
            tools=list(tools or ()) or None,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=prefix,
            **self._fields(chat_template_kwargs),
        )
        # In a thread: whoever calls may have a loop that runs, as notebooks do.
        with ThreadPoolExecutor(1) as thread:
            rendered = thread.submit(asyncio.run, self._online.render_chat(request)).result()
        if isinstance(rendered, ErrorResponse):
            raise ValueError(rendered.error.message)
        prompt: Any = rendered[1][0]
        return [*prompt["prompt_token_ids"], *([self._eos] if prefix else [])]

    def _fields(self, chat_template_kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The request's fields for what a template would be given."""
        kwargs, fields = dict(chat_template_kwargs), {}
        if (self._is_mistral or self.is_harmony) and "reasoning_effort" in kwargs:
            # They read the request's own field only, by which vLLM switches thinking itself.
            effort = fields["reasoning_effort"] = kwargs.pop("reasoning_effort")
            if kwargs.get("enable_thinking") == (effort != "none"):
                del kwargs["enable_thinking"]
        return fields | {"chat_template_kwargs": kwargs or None}


def _sent(message: dict) -> dict:
    """A message as a client sends it: the arguments of calls are JSON text. vLLM may change it."""
    message = copy.deepcopy(message)
    for call in message.get("tool_calls", ()):
        arguments = call["function"].get("arguments", {})
        if not isinstance(arguments, str):
            call["function"]["arguments"] = json.dumps(arguments, ensure_ascii=False)
    return message


def served_tokenizer(vllm_config: Any, renderer: Any, chat_template: str | None = None) -> Any:
    """vLLM's tokenizer of a model; if the server renders its chats with code of its own, that is the
    tokenizer's attribute ``server_prompts``.

    Args: as for :class:`ServerPrompts`.
    """
    from vllm.renderers.hf import HfRenderer

    tokenizer = renderer.get_tokenizer()
    if not isinstance(renderer, HfRenderer):
        # vLLM keeps it for whoever asks next, and may copy what hangs on it.
        tokenizer = copy.copy(tokenizer)
    elif vllm_config.model_config.hf_config.model_type != "gpt_oss":
        return tokenizer
    tokenizer.server_prompts = ServerPrompts(vllm_config, renderer, chat_template)
    return tokenizer


def load_served_tokenizer(engine_args: Mapping[str, Any], chat_template: str | None = None) -> Any:
    """The same without an engine, for ``EngineArgs`` that say what is loaded."""
    from vllm import EngineArgs
    from vllm.config import VllmConfig
    from vllm.renderers import renderer_from_config

    # Only text is read here: no processor of pictures is loaded.
    model_config = EngineArgs(**engine_args, language_model_only=True).create_model_config()
    # As vLLM's own render server: no kernel is needed, so none is looked for.
    model_config.quantization = None
    config = VllmConfig(model_config=model_config)
    return served_tokenizer(config, renderer_from_config(config), chat_template)
