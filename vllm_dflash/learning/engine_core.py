"""Learning in vLLM's engine core: requests that finish are kept, idle time is used."""

from __future__ import annotations

import functools
import importlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vllm_dflash.draft_length.counters import DRAFTER
from vllm_dflash.files import lock_folder
from vllm_dflash.learning import worker
from vllm_dflash.learning.loop import Learning, Settings
from vllm_dflash.learning.replay import KEY, Conversation, ShardReader, Shards
from vllm_dflash.learning.versions import Versions
from vllm_dflash.options import Options
from vllm_dflash.serving.draft_stats import StatsFile
from vllm_dflash.serving.patching import specialise
from vllm_dflash.serving.verified import count_verified, source_of
from vllm_dflash.training.ranks import Failure

logger = logging.getLogger("vllm.vllm_dflash")
#: ``vllm_xargs`` of a request: whether it may be learned from, and where it comes from.
OPT_OUT, SOURCE = "dflash_learn", "dflash_source"
#: Tokens of a response that is worth keeping.
_MIN_RESPONSE = 8
#: Priority of our own requests, where the scheduler goes by that.
_LAST = 2**31 - 1
#: Conversations of another server that wait to be taken in.
_WAITING = 256
_POLL_SECONDS, _TELL_SECONDS = 0.5, 1.0
_DAY = 86400.0


def learning_core(cls: type) -> type:
    """A subclass of one of vLLM's engine core processes that learns while it has nothing to do."""

    class LearningCore(cls):  # type: ignore[valid-type,misc]
        _dflash_learning: Learning | None = None
        _dflash_status: StatsFile
        _dflash_lock: int | None = None
        _dflash_told = 0.0

        def add_request(self, request: Any, *args: Any, **kwargs: Any) -> None:
            # A long prompt of ours must not be in the way of a client's.
            learning = self._dflash_learning
            ours = request.request_id.startswith(KEY)
            if not ours and learning is not None and learning.waiting is not None:
                self.abort_requests([learning.waiting])
            super().add_request(request, *args, **kwargs)

        def prepare_learning(self) -> None:
            """Makes the learner, before vLLM sees how much memory is left."""
            options = Options.from_additional_config(self.vllm_config.additional_config)
            folder = Path(options.learn)
            # Held until this process ends, however it ends.
            self._dflash_lock = lock_folder(folder)
            if self._dflash_lock is None:
                raise ValueError(
                    f"another server learns in {folder}; give each a dflash_learn of its own"
                )
            CoreEngine(self).call("start", options.learn_weights, options.learn_lr)

        def release_reserved(self) -> None:
            """vLLM has laid out its memory, and has left room for what learning takes."""
            CoreEngine(self).call("release")

        def _process_input_queue(self) -> None:
            learning = self._dflash_learning
            if learning is None:
                learning = self._dflash_learning = start_learning(self)
                self._dflash_status = StatsFile(learning.versions.folder / "status.json")
            # Without work vLLM's own loop would sleep on, also behind requests that bring none (a question of
            # the front end, a command that wakes it).
            while self._may_learn() and not self.has_work() and not self._idle_state_callbacks:
                if not self.input_queue.empty():
                    self._handle_client_request(*self.input_queue.get())
                    continue
                worked = learning.slice()
                self._tell(learning, now=not worked)
                if not worked and not self.has_work():
                    self._handle_client_request(*self.input_queue.get())
            self._tell(learning)
            super()._process_input_queue()

        def _alone(self) -> bool:
            """Whether a request of ours is the only one."""
            return self.scheduler.get_num_unfinished_requests() == 1

        def _may_learn(self) -> bool:
            """Not while it shuts down, is paused or sleeps, whose memory is then elsewhere."""
            return self.is_running() and not self.is_scheduler_paused()

        def _tell(self, learning: Learning, now: bool = False) -> None:
            """Has the figures written, now or if the last ones are old."""
            if now or time.monotonic() - self._dflash_told >= _TELL_SECONDS:
                self._dflash_told = time.monotonic()
                status = learning.status()
                self._dflash_status.put(lambda: status)

        def _process_engine_step(self) -> bool:
            learning, started = self._dflash_learning, time.monotonic()
            alone = learning is not None and learning.waiting is not None and self._alone()
            executed = super()._process_engine_step()
            took = time.monotonic() - started
            if learning is None or not self._may_learn():
                return executed
            if alone:
                learning.stepped(took)
            learning.attend()
            if learning.settings.share and learning.owe(took):
                learning.slice()
            return executed

    LearningCore.__name__ = LearningCore.__qualname__ = cls.__name__
    LearningCore.__module__ = cls.__module__
    return LearningCore


class CoreEngine:
    """:class:`vllm_dflash.learning.loop.Engine` of vLLM's engine core."""

    def __init__(self, core: Any) -> None:
        self.core = core

    def call(self, command: str, *args: Any) -> Any:
        answers = self.core.model_executor.collective_rpc(worker.run, args=(command, *args))
        for answer in answers:
            if isinstance(answer, Failure):
                raise answer.error()
        if isinstance(answers[0], dict) and command == "collect":
            return {k: v for answer in answers for k, v in answer.items()}
        return answers[0]

    def submit(self, key: str, token_ids: Sequence[int]) -> None:
        from vllm import SamplingParams
        from vllm.v1.request import Request

        params = SamplingParams(temperature=0.0, max_tokens=1, detokenize=False)
        params.skip_reading_prefix_cache = True
        self.core.add_request(
            Request(
                key,
                list(token_ids),
                params,
                None,
                priority=_LAST,
                block_hasher=getattr(self.core, "request_block_hasher", None),
            )
        )


def start_learning(core: Any) -> Learning:
    """Makes the engine core's :class:`Learning`, and has the scheduler tell it what finishes."""
    config = core.vllm_config
    options = Options.from_additional_config(config.additional_config)
    folder = Path(options.learn)
    versions = Versions(folder)
    tokens = int(options.learn_gib * 2**30 / _feature_bytes(config))
    source = Path(options.learn_from) if options.learn_from else None
    settings = Settings(
        options.learn_slice_ms, options.learn_share, tokens, options.learn_weights != "none", source
    )
    shards = None
    if options.learn_store == "disk":
        limit = int(options.learn_disk_gib * 2**30)
        shards = Shards(folder / "conversations", limit, options.learn_days * _DAY)
    keeps = Keeps(options.learn_filter, config)
    reader = None
    if source is not None:
        reader = ShardReader(source / "conversations", options.learn_days * _DAY)
    learning = Learning(versions, CoreEngine(core), settings, shards, reader, usable=keeps.usable)
    scheduler = core.scheduler
    if specialise(scheduler, "vllm_dflash.learning.engine_core:capturing"):
        scheduler.learning, scheduler.keeps = learning, keeps
    count_verified(scheduler, _counter(learning, scheduler))
    _watch_folders(core, learning, keeps.hook)
    logger.info(
        "vllm-dflash learns in %s, from up to %d tokens of finished requests", folder, tokens
    )
    return learning


def _counter(learning: Learning, scheduler: Any) -> Callable[[str, int, int], None]:
    """Counts the drafter's drafts; looked-up ones say nothing of it."""

    def count(name: str, proposed: int, accepted: int) -> None:
        request = scheduler.requests[name]
        if source_of(request) == DRAFTER:
            params = request.sampling_params
            learning.verified(proposed, accepted, "" if _opted_out(params) else _traffic(params))

    return count


def _opted_out(params: Any) -> bool:
    return str((params.extra_args or {}).get(OPT_OUT, True)).lower() in ("false", "0", "no")


def _traffic(params: Any) -> str:
    """Where a request says that it comes from."""
    return str((params.extra_args or {}).get(SOURCE, ""))[:64]


def _feature_bytes(config: Any) -> int:
    """Of a token."""
    drafter = config.speculative_config.draft_model_config.hf_config
    layers = len(set(getattr(drafter, "dflash_config", {}).get("target_layer_ids", ()))) or 1
    size = config.model_config.get_hidden_size()
    return layers * size * config.model_config.dtype.itemsize


def _watch_folders(
    core: Any,
    learning: Learning,
    hook: Callable[[Conversation], Any] | None,
) -> None:
    """A thread that tells the engine core, also an idle one, of commands and another server's requests."""
    from vllm.v1.engine import EngineCoreRequestType

    commands, reader = learning.versions.folder / "commands", learning.reader

    def take_in(reader: ShardReader) -> None:
        if learning.failed or learning.arrivals.qsize() >= _WAITING:
            return
        for conversation in reader.read():
            kept = conversation if hook is None else hook(conversation)
            if kept is not None:
                learning.arrivals.put(kept)
            if learning.arrivals.qsize() >= _WAITING:
                return

    def watch() -> None:
        said = False
        while True:
            time.sleep(_POLL_SECONDS)
            try:
                if reader is not None:
                    take_in(reader)
            except Exception:  # of a shared disk, or of the user's hook
                if not said:
                    logger.exception("vllm-dflash does not learn from some of %s", reader)
                said = True
            if commands.is_dir() and any(commands.glob("*.json")):
                learning.commanded = True
            if learning.commanded or not learning.arrivals.empty():
                core.input_queue.put((EngineCoreRequestType.WAKEUP, None))

    threading.Thread(target=watch, name="dflash-learn-folders", daemon=True).start()


class Keeps:
    """Which requests are learned from, and what of them.

    Args:
        hook: ``module:function`` that gets a :class:`Conversation` and returns it, another one, or None to
            drop it; "" for none.
        config: vLLM's.
    """

    def __init__(self, hook: str, config: Any) -> None:
        tokens = config.speculative_config.num_speculative_tokens
        self.max_len = config.model_config.max_model_len - tokens - 2
        self.vocab_size = config.model_config.get_vocab_size()
        self.hook: Callable[[Conversation], Conversation | None] | None = None
        if hook:
            module, _, name = hook.partition(":")
            self.hook = getattr(importlib.import_module(module), name)

    def conversation(self, request: Any) -> Conversation | None:
        """Of a finished request; None if it is not to be learned from."""
        params, prompt = request.sampling_params, request.prompt_token_ids
        if params is None or not prompt or request.prompt_embeds is not None:
            return None
        if request.mm_features or request.lora_request is not None:
            return None
        if request.get_finished_reason() not in _complete():
            return None
        if _opted_out(params):
            return None
        if request.num_output_tokens < _MIN_RESPONSE:
            return None
        made = Conversation(
            tuple(request.all_token_ids[: self.max_len]),
            len(prompt),
            _traffic(params),
            time.time(),
        )
        return made if self.hook is None else self.hook(made)

    def usable(self, conversation: Conversation) -> bool:
        """Whether the engine can run it: from disk it may be of a server with other limits."""
        ids = conversation.token_ids
        return 1 < len(ids) <= self.max_len and min(ids) >= 0 and max(ids) < self.vocab_size


@functools.cache
def _complete() -> tuple[Any, ...]:
    from vllm.v1.engine import FinishReason

    return FinishReason.STOP, FinishReason.LENGTH


def _budget(scheduler: Any) -> int:
    """Tokens of a step: what clients' requests want of it, and of a conversation of ours what fits."""
    ours, whole = scheduler.learning.waiting, scheduler.max_num_scheduled_tokens
    if ours is None or not scheduler.scheduler_config.enable_chunked_prefill:
        return whole
    # Others that are to run: with the whole budget they are not kept out by ours.
    waiting = (*scheduler.waiting, *getattr(scheduler, "kv_holding_waiting", ()))
    if any(request.request_id != ours for request in waiting):
        return whole
    tokens = scheduler.learning.chunk
    if scheduler.has_mamba_layers:  # whose state is kept at the ends of blocks only
        tokens = max(tokens, scheduler.cache_config.block_size)
    for request in scheduler.running:
        if request.request_id != ours:
            wanted = request.num_tokens_with_spec + request.num_output_placeholders
            tokens += wanted - request.num_computed_tokens
    return min(whole, tokens)


def capturing(cls: type) -> type:
    """A subclass of one of vLLM's schedulers that tells what has finished."""

    class Capturing(cls):  # type: ignore[valid-type,misc]
        learning: Learning
        keeps: Keeps
        max_num_scheduled_tokens: int

        def schedule(self, *args: Any, **kwargs: Any) -> Any:
            # A step cannot be interrupted: with a long conversation of ours it would be a long wait.
            whole, self.max_num_scheduled_tokens = self.max_num_scheduled_tokens, _budget(self)
            try:
                return super().schedule(*args, **kwargs)
            finally:
                self.max_num_scheduled_tokens = whole

        def _free_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
            out = super()._free_request(request, *args, **kwargs)
            if request.request_id.startswith(KEY):
                complete = request.get_finished_reason() in _complete()
                self.learning.extracted(request.request_id, complete)
            elif not self.learning.failed:
                try:
                    conversation = self.keeps.conversation(request)
                    if conversation is not None:
                        self.learning.finished(conversation)
                except Exception:
                    # The user's hook can raise anything; the request has been answered.
                    logger.exception("vllm-dflash does not learn from a request")
            return out

    Capturing.__name__ = Capturing.__qualname__ = cls.__name__
    Capturing.__module__ = cls.__module__
    return Capturing
