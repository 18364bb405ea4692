"""Features recorded while responses are generated, kept on disk with the responses.

A request that reads a cached prefix computes no features for it: it takes those of the request that did
compute it, which is either still recorded or finished and kept.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from vllm_dflash.serving.features import BrokenFeatures, FeatureRecorder, Rows
from vllm_dflash.training.feature_store import SHARD_BYTES, FeatureStore
from vllm_dflash.training.plan import content_key
from vllm_dflash.training.prefixes import prefix_digests


class GeneratedFeatures:
    """What a worker records of responses.

    Args:
        recorder: sees the verifier's steps.
        store: keeps whole sequences under the content key of their tokens.
        layers: the verifier layers, ascending.
        max_len: to which examples are cut, in tokens.
        block_size: tokens in a block of the verifier's KV cache.
        num_blocks: of that cache; no more prefixes than these can be read from it.
    """

    def __init__(
        self,
        recorder: FeatureRecorder,
        store: FeatureStore,
        layers: Sequence[int],
        max_len: int,
        block_size: int,
        num_blocks: int,
    ) -> None:
        self.recorder, self.store, self.layers = recorder, store, layers
        self.max_len, self.block_size, self.num_blocks = max_len, block_size, num_blocks
        self._prompts: dict[str, list[int]] = {}
        #: The request or stored sequence that has the rows of a prefix, latest last.
        self._holders: OrderedDict[bytes, str] = OrderedDict()

    def watch(self, prompts: dict[str, list[int]], max_tokens: int) -> None:
        """Asks for the rows of requests that will be submitted.

        Args:
            prompts: token ids of each.
            max_tokens: most tokens of a response.
        """
        self._prompts = dict(prompts)
        # The last token has no row: nothing is anchored behind it.
        self.recorder.watch(
            {k: min(len(ids) + max_tokens, self.max_len) - 1 for k, ids in prompts.items()}
        )
        self.recorder.started, self.recorder.on_host = self._started, True

    def _started(self, key: str, first: int) -> Rows | None:
        """The rows of the cached prefix that a request reads, as the recorder asks for them."""
        digests = list(prefix_digests(self._prompts[key], self.block_size))
        holder = next((self._holders.get(d) for at, d in digests if at == first), None)
        self._hold(digests, key)
        if holder is None:
            return None
        if (rows := self.recorder.rows(holder, first)) is not None or holder not in self.store:
            return rows
        features, final = self.store.get(holder)
        return features[:first], None if final is None else final[:first]

    def _hold(self, digests: list[tuple[int, bytes]], holder: str) -> None:
        for _, digest in digests:
            self._holders[digest] = holder
            self._holders.move_to_end(digest)
        while len(self._holders) > self.num_blocks:
            self._holders.popitem(last=False)

    def take(self, key: str, response: Sequence[int]) -> None:
        """Keeps the features of a finished request, if all of them were recorded.

        Args:
            response: token ids of the response.

        Raises:
            BrokenFeatures: no features of a working verifier.
        """
        token_ids = [*self._prompts[key], *response][: self.max_len]
        try:
            features, final = self.recorder.take(key, len(token_ids) - 1, self.layers, token_ids)
        except BrokenFeatures:
            raise
        except ValueError:
            # Rows are missing or not finite: it is extracted with the others, and that names the reason.
            return
        content = content_key(token_ids)
        if content not in self.store:
            self.store.put(content, features.clone(), None if final is None else final.clone())
        self._hold(list(prefix_digests(token_ids[:-1], self.block_size)), content)

    def end(self) -> None:
        """Puts everything on disk; no request is watched any more."""
        self.store.flush()
        self.recorder.clear()
        self._prompts = {}
        # The next requests may bear the names of these.
        self._holders = OrderedDict((d, h) for d, h in self._holders.items() if h in self.store)
        self.recorder.started, self.recorder.on_host = None, False


class ReadFeatures:
    """In place of :class:`GeneratedFeatures` on the ranks that do not record.

    Hidden states are the same on every tensor parallel rank, so one records, and the others read its folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._store: FeatureStore | None = None

    @property
    def store(self) -> FeatureStore:
        if self._store is None:
            self._store = FeatureStore(SHARD_BYTES, self._folder)
        return self._store

    def watch(self, prompts: dict[str, list[int]], max_tokens: int) -> None:
        """Nothing to do here."""

    def take(self, key: str, response: Sequence[int]) -> None:
        """Nothing to do here."""

    def end(self) -> None:
        """What the recording rank is writing now is looked up when it is next asked for."""
        self._store = None
