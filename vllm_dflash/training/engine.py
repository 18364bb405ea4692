"""The verifier's engine for training and evaluation: generation and feature extraction.

The engine core runs in this process (workers too, unless vLLM's own executor spreads them): requests then
reach the scheduler in one go, so the composition of every batch, and with it every bit of the features, is
the same on each run.
"""

from __future__ import annotations

import difflib
import gc
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from vllm_dflash.checkpoint import save_drafter
from vllm_dflash.config import DrafterConfig
from vllm_dflash.processes import start_guard
from vllm_dflash.serving.draft_limits import rotary_positions
from vllm_dflash.training.config import EngineOptions, SamplingOptions
from vllm_dflash.training.prefixes import Piece, parts, pieces_of
from vllm_dflash.training.ranks import Failure
from vllm_dflash.training.replies import MarkedReplies, ParsedReplies, ToMessage
from vllm_dflash.training.responses import GenerationRequest, GenerationResult
from vllm_dflash.verifier import Verifier

#: The engine's drafter only holds a place in the seam, so the smallest draft length will do.
_SEAT_TOKENS = 1
#: GiB of KV cache where the verifier runs on a CPU.
CPU_KV_GIB = "2"
#: What the commands say themselves.
_GIVEN = {
    "model": "VERIFIER",
    "speculative_config": "DRAFTER",
    "worker_extension_cls": "the command",
}


def fit_max_len(
    options: EngineOptions,
    hf_config: Any,
    drafter: DrafterConfig,
    num_speculative_tokens: int = _SEAT_TOKENS,
) -> EngineOptions:
    """Lowers ``max_len`` to what the positions of the verifier and the drafter allow beside a draft.

    Behind the drafter's nothing is drafted when it is served: there is nothing to learn or to count.

    Raises:
        ValueError: the positions do not even hold one token and a draft.
    """
    text = hf_config.get_text_config()
    of_verifier = getattr(text, "max_position_embeddings", None)
    known = [int(n) for n in (of_verifier, rotary_positions(drafter)) if n]
    if not known:
        return options
    room = min(known) - num_speculative_tokens - 2
    if room < 1:
        raise ValueError(
            f"max_position_embeddings is {min(known)}, which leaves no room for a token beside a draft of "
            f"{num_speculative_tokens}; use another drafter, or mend its config.json"
        )
    return replace(options, max_len=min(options.max_len, room))


def cut_sentence(max_len: int, asked: int) -> str:
    """What to tell users whose ``max_len`` was lowered."""
    return (
        f"conversations are cut to {max_len} tokens, not {asked}: more do not fit in the positions of the "
        "verifier and the drafter"
    )


def check_engine_args(given: Mapping[str, Any], *, asynchronous: bool = False) -> None:
    """Checks the names in ``--engine-args``; imports vLLM if there are any.

    Args:
        given: names and values.
        asynchronous: whether they are for vLLM's asynchronous engine, which has a few more.

    Raises:
        ValueError: one that vLLM does not know, or that the command sets by other means.
    """
    if not given:
        return
    for name in given:
        if name in _GIVEN:
            raise ValueError(
                f"--engine-args has {name!r}, which {_GIVEN[name]} decides; leave it out"
            )
    # vLLM sets its logger up when it is imported.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm import AsyncEngineArgs, EngineArgs

    known = [f.name for f in fields(AsyncEngineArgs if asynchronous else EngineArgs)]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name.replace("-", "_"), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "; they are spelled with underscores"
            raise ValueError(f"--engine-args has {name!r}, which vLLM's engine does not know{hint}")


def _check_lora(options: EngineOptions) -> None:
    if options.extra.get("enable_lora"):
        raise ValueError(
            "enable_lora is set, but a drafter is trained for one set of weights; merge the adapter into "
            "the verifier (peft: merge_and_unload, save_pretrained) and train with the merged folder. The "
            "drafter serves beside the unmerged verifier and its adapter"
        )


def check_engine(
    hf_config: Any, options: EngineOptions, num_speculative_tokens: int = _SEAT_TOKENS
) -> None:
    """Looks for what vLLM would refuse when the engine starts.

    Raises:
        ValueError: ``--engine-args`` that are unknown or cannot be followed, or ranks that the verifier's
            heads cannot be spread over.
    """
    check_engine_args(options.extra)
    _check_lora(options)
    limit, needed = options.extra.get("max_model_len"), options.max_len + num_speculative_tokens + 2
    if isinstance(limit, int) and limit < needed:
        raise ValueError(
            f"--engine-args has max_model_len {limit}, below what --max-len ({options.max_len}) and a draft "
            f"need ({needed}); leave it out"
        )
    heads = getattr(hf_config.get_text_config(), "num_attention_heads", None) or 0
    if isinstance(heads, int) and heads % options.ranks:
        raise ValueError(
            f"--tensor-parallel-size is {options.ranks}, but the verifier has {heads} attention heads, "
            "which it does not divide"
        )


def check_block(options: EngineOptions, drafter: DrafterConfig) -> None:
    """ValueError when no conversation can hold a token of a prompt and a whole block."""
    block_size = drafter.known_block_size("it decides how long a conversation must be")
    if options.max_len <= block_size:
        raise ValueError(
            f"--max-len is {options.max_len} (lowered to the verifier's positions where it was more), but a "
            f"block has {block_size} tokens; more is needed than that"
        )


def _set_prefix_caching(engine_args: Any) -> None:
    """Leaves prefix caching to vLLM where its CPU backend has it, with blocks that lose little."""
    if engine_args.create_model_config().is_hybrid:
        # What vLLM's CPU backend lacks; see speculative_config._check_prefix_caching.
        engine_args.enable_prefix_caching = bool(engine_args.enable_prefix_caching)
    elif engine_args.block_size is None:
        # vLLM's own are of 128 tokens there; multiples of 32 are fast.
        engine_args.block_size = 32


@dataclass
class Generated:
    """What requests brought so far.

    Attributes:
        tokens: of all, unfinished requests included.
        finished: requests.
        finished_tokens: theirs.
    """

    tokens: int = 0
    finished: int = 0
    finished_tokens: int = 0

    def expected(self, requests: int, most: int) -> tuple[int, float]:
        """The tokens so far, and about how many so many requests bring in all: as many each as the finished
        ones did, or ``most`` while there are none."""
        mean = self.finished_tokens / self.finished if self.finished else most
        return self.tokens, requests * mean


class VerifierEngine:
    """vLLM with the verifier and a drafter in the dflash seat."""

    def __init__(
        self,
        verifier: Verifier | str,
        drafter: str | Path,
        options: EngineOptions,
        num_speculative_tokens: int = _SEAT_TOKENS,
        memory: Mapping[str, Any] | None = None,
    ) -> None:
        """Starts the engine.

        Args:
            verifier: the model.
            drafter: folder of the drafter in the seat.
            options: how the engine runs.
            num_speculative_tokens: of that drafter.
            memory: ``EngineArgs`` that say what the engine may take of a GPU; ``options.extra`` wins.
        """
        self.verifier = Verifier.of(verifier)
        _check_lora(options)
        start_guard()
        #: Ours and vLLM's own changes of the environment end with the engine.
        self._environment = dict(os.environ)
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        if options.ranks > 1:
            # A worker forked from this process, which has computed, can hang in its first OpenMP region.
            os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        from vllm import EngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.llm_engine import LLMEngine

        on_cpu = current_platform.is_cpu()
        if on_cpu:
            # vLLM would keep a core for its front end, which idles while we train.
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", CPU_KV_GIB)
        args = {
            **self.verifier.engine_args(),
            "dtype": options.dtype,
            # The proposer is not called for batches that end closer than this to the limit.
            "max_model_len": options.max_len + num_speculative_tokens + 2,
            "max_num_seqs": options.max_num_seqs,
            "max_num_batched_tokens": options.max_num_batched_tokens,
            "enforce_eager": on_cpu if options.enforce_eager is None else options.enforce_eager,
            "tensor_parallel_size": options.tensor_parallel_size,
            # The learner needs room beside the engine.
            **(memory or {"gpu_memory_utilization": 0.6}),
            # Only text is read here: no memory for pictures, and no tower.
            "language_model_only": True,
            # Nothing runs beside the host on a CPU.
            "async_scheduling": False if on_cpu else None,
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
            "worker_extension_cls": "vllm_dflash.training.worker.WorkerExtension",
            "speculative_config": {
                "method": "dflash",
                "model": str(drafter),
                "num_speculative_tokens": num_speculative_tokens,
                # It drafts nothing, or all there is, to count what is accepted.
                "dflash_draft_length": "fixed",
            },
            **options.extra,
        }
        engine_args = EngineArgs(**args)
        if on_cpu:
            _set_prefix_caching(engine_args)
        self.engine = LLMEngine.from_engine_args(engine_args)
        self._recording = False
        #: Of the last generator.
        self.generated = Generated()
        self.draft(False)

    @cached_property
    def tokenizer(self) -> Any:
        """The engine's tokenizer, with the server's chat template or its own code for chats."""
        from vllm_dflash.serving.frontend.prompts import served_tokenizer

        config, template = self.engine.vllm_config, self.verifier.chat_template
        return self.verifier.with_template(served_tokenizer(config, self.engine.renderer, template))

    @cached_property
    def to_message(self) -> ToMessage:
        """How the server splits replies: by the parser that is named or that vLLM takes by itself."""
        config = self.engine.vllm_config
        parser = self.verifier.reasoning_parser or config.structured_outputs_config.reasoning_parser
        if not parser:
            return MarkedReplies(self.tokenizer)
        return ParsedReplies(parser, self.tokenizer, config.model_config)

    def call(self, command: str, *args: Any) -> Any:
        """A command of the workers' ``TrainingSession``; the first rank's answer."""
        return self.call_ranks(command, *args)[0]

    def call_ranks(self, command: str, *args: Any) -> list[Any]:
        """A command of the workers' ``TrainingSession``; the answers of all ranks that train together.

        Raises:
            ValueError: what the command raised on any rank.
        """
        return self._ask("vllm_dflash", command, *args)

    def call_own(self, command: str, *args: Any) -> list[Any]:
        """:meth:`call_ranks` of this engine alone, also where several train together: for what its requests
        bring."""
        return self._ask("vllm_dflash_own", command, *args)

    def join(self, ports: tuple[int, int], replica: int, replicas: int) -> None:
        """Has this engine's ranks train with those of other engines, which must join too.

        Args:
            ports: free ones on this machine.
            replica: number of this engine.
            replicas: how many there are.
        """
        self.engine.collective_rpc("vllm_dflash_join", args=(ports, replica, replicas))

    def register(
        self,
        examples: Sequence[tuple[str, list[int], list[bool], str]],
        owners: Mapping[str, int],
    ) -> None:
        """Tells the workers about examples (key, token ids, loss mask, source), and which ranks own them."""
        self.call("register", list(examples), dict(owners))

    def _ask(self, method: str, *args: Any) -> list[Any]:
        answers = self.engine.collective_rpc(method, args=args)
        for answer in answers:
            if isinstance(answer, Failure):
                raise answer.error()
        return answers

    def draft(self, enabled: bool) -> None:
        """Whether the drafter in the engine drafts; while it does not, requests are decoded plainly."""
        client: Any = self.engine.engine_core
        client.engine_core.scheduler.drafting = enabled
        self.call_own("drafting", enabled)

    @property
    def kv_block_size(self) -> int:
        """Tokens in a block of the KV cache: what cached prefixes are made of."""
        cache = self.engine.vllm_config.cache_config
        # vLLM 0.31 has no blocks of another size for cached prefixes.
        return int(vars(cache).get("hash_block_size") or cache.block_size)

    def record_responses(
        self, folder: Path, layers: Sequence[int], final_states: bool, max_len: int
    ) -> None:
        """From now on features are recorded while responses are generated, and kept in a folder.

        Args:
            folder: keeps what a killed run recorded, too.
            layers: the verifier layers of the features.
            final_states: whether to record those too, for the kl loss.
            max_len: to which examples are cut.
        """
        cache = self.engine.vllm_config.cache_config
        self.call(
            "record_responses",
            str(folder),
            sorted(set(layers)),
            final_states,
            max_len,
            self.kv_block_size,
            int(cache.num_gpu_blocks or 0),
        )
        self._recording = True

    def _run(self, requests: Iterable[tuple[str, Sequence[int], Any]]) -> Iterator[Any]:
        pending = {}  # tokens so far
        generated = self.generated
        for key, token_ids, params in requests:
            self.engine.add_request(key, {"prompt_token_ids": list(token_ids)}, params)
            pending[key] = 0
        try:
            while self.engine.has_unfinished_requests():
                outputs: list[Any] = self.engine.step()
                for output in outputs:
                    key, num_tokens = output.request_id, len(output.outputs[0].token_ids)
                    generated.tokens += num_tokens - pending[key]
                    pending[key] = num_tokens
                    if output.finished:
                        del pending[key]
                        generated.finished += 1
                        generated.finished_tokens += num_tokens
                        yield output
        finally:
            if pending:
                self.engine.abort_request(list(pending))

    def generator(
        self, sampling: SamplingOptions
    ) -> Callable[[list[GenerationRequest]], Iterator[GenerationResult]]:
        """A generate function for ``training.responses.regenerate``."""
        from vllm import SamplingParams

        self.generated = Generated()
        params = SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_tokens,
            detokenize=False,
        )

        def generate(requests: list[GenerationRequest]) -> Iterator[GenerationResult]:
            for output in self._run((r.key, r.prompt_token_ids, params) for r in requests):
                done = output.outputs[0]
                yield GenerationResult(
                    output.request_id, list(done.token_ids), str(done.finish_reason)
                )

        def generate_recorded(requests: list[GenerationRequest]) -> Iterator[GenerationResult]:
            prompts = {r.key: list(r.prompt_token_ids) for r in requests}
            self.call_own("watch_responses", prompts, sampling.max_tokens)
            try:
                for result in generate(requests):
                    self.call_own("take_response", result.key, result.token_ids)
                    yield result
            finally:
                self.call_own("end_responses")

        return generate_recorded if self._recording else generate

    def extract(self, examples: Mapping[str, Sequence[int]]) -> Iterator[tuple[str, str | None]]:
        """Runs whole conversations through the verifier once; their features go to the worker's store.

        A prefix of several conversations is computed for the first of them, and read from the KV cache by the
        others. The last token's features are not needed, no block can be anchored behind it.

        Yields:
            Each key as it finishes, with None or the reason why its features cannot be used. One whose prefix
            turns out to be unusable comes again.
        """
        # What is left of earlier requests must not decide what is computed now: a resumed run lacks it.
        shared = self.engine.reset_prefix_cache()
        pieces = pieces_of(examples, self.kv_block_size if shared else None)
        failed = set()
        for key, problem in self._extract(examples, pieces):
            if problem is not None:
                failed.add(key)
            if problem is None or pieces[key].parent is None:
                yield key, problem
        if not failed:
            return
        # A prefix is missing, or vLLM found more of it in the cache than was meant.
        again = {
            key: ids
            for key, ids in examples.items()
            if pieces[key].parent is not None
            and failed.intersection(at for at, _ in parts(pieces, key))
        }
        yield from self._extract(again, pieces_of(again, None))

    def _extract(
        self, examples: Mapping[str, Sequence[int]], pieces: Mapping[str, Piece]
    ) -> Iterator[tuple[str, str | None]]:
        from vllm import SamplingParams

        def requests() -> Iterator[tuple[str, Sequence[int], Any]]:
            for key, ids in examples.items():
                piece = pieces[key]
                if piece.end > piece.start:
                    params = SamplingParams(temperature=0.0, max_tokens=1, detokenize=False)
                    params.skip_reading_prefix_cache = piece.parent is None
                    yield key, ids[:-1], params

        self.call_own("watch", dict(pieces))
        try:
            for output in self._run(requests()):
                key = output.request_id
                problems = (f.get(key) for f in self.call_own("collect", {key: pieces[key].end}))
                yield key, next((p for p in problems if p is not None), None)
            for key, piece in pieces.items():
                if piece.end == piece.start:
                    yield key, None
        finally:
            self.call_own("flush")

    def close(self) -> None:
        """Stops the engine, frees what it and the workers' sessions held, and restores the environment."""
        import torch

        self.engine.engine_core.shutdown()
        del self.engine
        gc.collect()
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
        _restore(self._environment)


def _restore(environment: Mapping[str, str]) -> None:
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)


def seat_drafter(config: DrafterConfig) -> DrafterConfig:
    """The one-layer drafter that sits in the engine while another is trained: same taps, no size."""
    return config.with_(
        hidden_size=config.target_hidden_size or config.hidden_size,
        num_hidden_layers=1,
        layer_types=None,
        sliding_window=None,
        draft_vocab_size=None,
        draft_block_size=_SEAT_TOKENS + 1,
        sample_from_anchor=False,
        causal=None,
        head=None,
        intermediate_size=64,
    )


def write_seat(config: DrafterConfig, path: Path) -> Path:
    """Saves :func:`seat_drafter` with random weights in a folder, and returns that."""
    import torch

    from vllm_dflash.modeling.drafter import Drafter

    seat = seat_drafter(config)
    drafter = Drafter(seat)
    drafter.init_weights(generator=torch.Generator().manual_seed(0))
    save_drafter(path, seat, drafter.state_dict())
    return path
