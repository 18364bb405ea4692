"""What a server does in its idle time: rounds of extraction, training and comparison, in short slices.

Everything here runs on the engine core's thread, between its steps. Nothing of vLLM is known here: the engine
is what :class:`Engine` says.
"""

from __future__ import annotations

import json
import logging
import random
import shutil
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

from vllm_dflash.learning.gate import MIN_CONVERSATIONS, Counts, Verdict, judge
from vllm_dflash.learning.replay import (
    Conversation,
    Reservoir,
    ShardReader,
    Shards,
    as_example,
    describe,
)
from vllm_dflash.learning.versions import GIVEN, Versions, hand_over

logger = logging.getLogger("vllm.vllm_dflash")

#: Passes over each conversation, as many as ``train`` makes by default.
PASSES = 6
#: Training steps, of one conversation each, between two comparisons.
ROUND_STEPS = 96
#: Held-out conversations that a comparison looks at, the latest and a sample, and tokens of their responses.
COMPARED, COMPARED_TOKENS = 64, 128
#: Drafts before the served acceptance says anything, and the share of the expected one below which a version
#: goes back: the two count the same, but on other conversations.
_LIVE_DRAFTS, _LIVE_SHARE = 400, 0.6
#: Tokens of a conversation that one step of the engine computes: at least, and before its speed is known.
_FEWEST_TOKENS, _FIRST_TOKENS = 16, 64
#: How often a conversation gives way to clients' requests before another one is taken.
_ATTEMPTS = 3
#: Conversations of another server that are taken in at once.
_ARRIVALS = 64
#: Sources told apart, and what the others are called.
_SOURCES, _OTHER = 32, "(other)"
#: What is counted, see ``serving/frontend/learning_metrics.py``.
_FIGURES = (
    "captured", "duplicates", "unusable", "extracted", "not_extracted", "steps", "anchors",
    "skipped_sequences", "slices", "comparisons", "promotions", "rollbacks", "not_written",
    "gave_way",
)  # fmt: skip


class Engine(Protocol):
    """What learning needs of the engine core."""

    def call(self, command: str, *args: Any) -> Any:
        """A command of the workers' sessions; the first rank's answer."""

    def submit(self, key: str, token_ids: Sequence[int]) -> None:
        """Adds a request that computes the features of these tokens; :meth:`Learning.extracted` follows."""


@dataclass(frozen=True)
class Settings:
    """How a server learns.

    Attributes:
        slice_ms: how long a request may have to wait for a slice of training, about.
        share: of the time of a server that is never idle, for learning.
        tokens: most tokens of the conversations kept, by what their features take.
        trains: False leaves training to another server.
        source: folder of the server whose conversations come, and which gets the versions.
    """

    slice_ms: float
    share: float
    tokens: int
    trains: bool = True
    source: Path | None = None


class Learning:
    """A drafter that follows its server's traffic.

    Args:
        versions: keeps the drafters.
        engine: of the server.
        settings: how it learns.
        shards: keeps conversations on disk, where that is asked for.
        reader: of another server's conversations, which come as ``arrivals``.
        usable: whether the engine can run a conversation.
        clock: seconds.
    """

    def __init__(
        self,
        versions: Versions,
        engine: Engine,
        settings: Settings,
        shards: Shards | None = None,
        reader: ShardReader | None = None,
        usable: Callable[[Conversation], bool] = lambda _: True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.versions, self.engine, self.settings = versions, engine, settings
        self.shards, self.reader = shards, reader
        self.replay = Reservoir(settings.tokens)
        self.held_out = Reservoir(settings.tokens // 4, seed=1)
        #: Conversations of another server, put here by a thread.
        self.arrivals: SimpleQueue[Conversation] = SimpleQueue()
        self.paused, self.failed = False, ""
        self.figures: dict[str, float] = dict.fromkeys(_FIGURES, 0)
        self.figures |= {"seconds": 0.0, "longest_slice_seconds": 0.0}
        self.last: Verdict | None = None
        self._clock, self._usable = clock, usable
        self._owed = 0.0
        self._not_compared = 0
        #: Until when conversations were learned from before a restart, and visits that are to come.
        self._learned_until, self._credit = versions.learned()
        self._latest = self._learned_until
        self._features: set[str] = set()
        #: The request that is under way.
        self.waiting: str | None = None
        self._complete = True
        self._submitted, self._submitted_tokens = 0.0, 0
        #: Tokens of it that one step of the engine computes, so that a step takes no longer than a slice.
        self.chunk = _FIRST_TOKENS
        self._broken: set[str] = set()
        #: The version that another server was given last, and the command for it.
        self._handed: tuple[Path, Path] | None = None
        self._served: dict[str, Counts] = {}
        self._first: dict[str, tuple[int, int]] = {}
        self._live = [0, 0]
        self._expected = 0.0
        #: Set where a command has been left.
        self.commanded = False
        #: The version before the one promoted last, while it is on trial; and what came since.
        self._trial: int | None = None
        self._since: set[str] = set()
        self._sources: set[str] = set()
        #: Drafts verified, and tokens of them accepted, by version and source.
        self._by_source: dict[tuple[int, str], list[int]] = {}
        self._random = random.Random(0)
        self._steps = int((versions.history or [{}])[-1].get("steps", 0))
        self._rounds = self._run()
        if shards is not None:
            for conversation in shards.read():  # the latest that there is room for
                self._keep(conversation, conversation.time > self._learned_until)

    # -- what the engine core tells --------------------------------------------------------------

    def finished(self, conversation: Conversation) -> None:
        """A request has finished, and may be learned from."""
        if not self.settings.trains:
            self.figures["captured"] += 1  # another server takes what it can use
        elif self.failed or not self._keep(conversation):
            return
        if self.shards is not None:
            self.shards.put(conversation)

    def _keep(self, conversation: Conversation, to_learn: bool = True) -> bool:
        if self._named(conversation.source) != conversation.source:
            conversation = replace(conversation, source=_OTHER)
        if not self._usable(conversation):
            self.figures["unusable"] += 1
            return False
        out = conversation.held_out
        if out:
            conversation = conversation.head(COMPARED_TOKENS)
        if not (self.held_out if out else self.replay).add(conversation):
            self.figures["duplicates"] += 1
            return False
        self.figures["captured"] += 1
        if out:
            self._since.add(conversation.key)
        elif to_learn:
            # No more than what is kept can be visited.
            self._credit = min(self._credit + PASSES, PASSES * len(self.replay))
            self._latest = max(self._latest, conversation.time)
        return True

    def extracted(self, key: str, complete: bool = True) -> None:
        """A request of :meth:`Engine.submit` has ended; not complete if it gave way to a client's."""
        if self.waiting != key:
            return
        self.waiting, self._complete = None, complete
        took = self._clock() - self._submitted
        if complete and took > 0:
            # Small parts have more steps to a token: with each conversation it comes nearer to what fits.
            fit = int(self._submitted_tokens * self.settings.slice_ms / 1000 / took)
            self.chunk = max(_FEWEST_TOKENS, fit)

    def stepped(self, seconds: float) -> None:
        """A step of the engine was for nothing but our request."""
        self._longest(seconds)

    def _longest(self, seconds: float) -> None:
        longest = max(self.figures["longest_slice_seconds"], seconds)
        self.figures["longest_slice_seconds"] = longest

    def _named(self, source: str) -> str:
        """What a source counts as: clients name them, and there may be any number."""
        if source not in self._sources:
            if len(self._sources) >= _SOURCES:
                return _OTHER
            self._sources.add(source)
        return source

    def verified(self, proposed: int, accepted: int, source: str = "") -> None:
        """A draft of the drafter was verified, of a request from this source."""
        if not proposed:
            return
        self._live[0] += 1
        self._live[1] += accepted > 0
        counts = self._by_source.setdefault((self.versions.promoted, self._named(source)), [0, 0])
        counts[0] += 1
        counts[1] += accepted

    def owe(self, seconds: float) -> bool:
        """The engine has worked for so long; whether a slice is due on a busy server."""
        share = self.settings.share
        self._owed += seconds * share / (1 - share)
        if self._owed < self.settings.slice_ms / 1000:
            return False
        # What was not used up is not saved for later.
        self._owed = 0.0
        return True

    # -- slices ----------------------------------------------------------------------------------

    def slice(self) -> bool:
        """Does a little; False if there is nothing to do.

        Whatever goes wrong ends the learning, says so, and leaves the server as it is.
        """
        started = self._clock()
        worked = self._safely(self._work)
        if worked:
            took = self._clock() - started
            self.figures["slices"] += 1
            self.figures["seconds"] += took
            self._longest(took)
        return worked

    def attend(self) -> None:
        """Between two steps of an engine that has work: what must not wait until it has none."""
        if self.waiting is None and (self.commanded or self._decided()):
            self._safely(self._hurry)

    def _safely(self, do: Callable[[], bool | None]) -> bool:
        if self.failed:
            return False
        try:
            return bool(do())
        except Exception as error:
            self.failed = f"{type(error).__name__}: {error}"
            logger.exception(
                "vllm-dflash stops learning; the server goes on with version %d of its drafter",
                self.versions.promoted,
            )
            return False

    def _work(self) -> bool:
        self._hurry()
        for _ in range(min(self.arrivals.qsize(), _ARRIVALS)):
            arrived = self.arrivals.get()
            self._keep(arrived, arrived.time > self._learned_until)
        return not self.paused and next(self._rounds)

    def _hurry(self) -> None:
        self.commanded = False
        self._obey()
        if self.waiting is None and self._trial is not None and self._decided():
            (drafts, hits), before, self._trial = self._live, self._trial, None
            if not self._bad():
                return
            reason = (
                f"{hits / drafts:.0%} of first draft tokens accepted, {self._expected:.0%} expected"
            )
            self._go_to(before, "rolled back", {"reason": reason})

    def _decided(self) -> bool:
        """Whether live drafts say that a version must go, or, where nobody compares again, may stay."""
        enough = self._trial is not None and self._live[0] >= _LIVE_DRAFTS
        return enough and (self._bad() or not self.settings.trains)

    def _bad(self) -> bool:
        drafts, hits = self._live
        return hits < _LIVE_SHARE * self._expected * drafts

    def _job(self, command: str, *args: Any) -> Generator[bool, None, Any]:
        self.engine.call(command, *args)
        while True:
            result = self.engine.call("advance", self.settings.slice_ms / 1000)
            yield True
            if result is not None:
                return result

    def _run(self) -> Iterator[bool]:
        if GIVEN not in self.versions.there():
            yield from self._write(self.versions.path(GIVEN))
        while not self.settings.trains:
            yield False
        while True:
            yield from self._watch_live()
            steps = min(ROUND_STEPS - self._not_compared, self._credit, len(self.replay))
            if steps:
                yield from self._learn(steps)
            elif self._not_compared < ROUND_STEPS:
                yield False
            else:
                self._not_compared = 0
                yield from self._compare()

    def _learn(self, steps: int) -> Generator[bool, None, None]:
        # The latest half and the sample of what was before weigh as much as their tokens.
        everything = sorted(self.replay, key=lambda c: c.key)
        plan = self._random.sample(everything, steps)
        yield from self._extract(plan)
        keys = [c.key for c in plan if c.key in self._features]
        steps_done = [(self._steps + i, [key]) for i, key in enumerate(keys)]
        metrics = (yield from self._job("learn", steps_done)) if steps_done else []
        # Those that gave way to clients come again.
        visited = sum(c.key in self._features or c.key in self._broken for c in plan)
        self._credit = max(0, self._credit - visited)
        self._not_compared += visited
        self._steps += visited
        self.figures["steps"] += len(steps_done)
        self.figures["anchors"] += sum(m["anchors"] for m in metrics)
        self.figures["skipped_sequences"] += sum(len(m["bad"]) for m in metrics)

    def _extract(self, conversations: Sequence[Conversation]) -> Generator[bool, None, None]:
        """Computes the features that are missing, one conversation at a time."""
        kept = {c.key for r in (self.replay, self.held_out) for c in r}
        self._broken &= kept
        if not self._features <= kept:
            self._features &= kept
            self.engine.call("keep", sorted(self._features))
        for conversation in conversations:
            key, rows = conversation.key, len(conversation.token_ids) - 1
            if key in self._features or key in self._broken:
                continue
            self.engine.call("register", [as_example(conversation)])
            self._complete = False
            for _ in range(_ATTEMPTS):
                self.engine.call("watch", {key: (None, 0, rows)})
                self.waiting = key
                self._submitted, self._submitted_tokens = self._clock(), rows
                self.engine.submit(key, conversation.token_ids[:-1])
                yield True
                while self.waiting is not None:
                    yield False
                if self._complete:
                    break
                self.figures["gave_way"] += 1
            if not self._complete:
                # Too long for the gaps between requests; others may be short enough.
                self.engine.call("collect", {key: rows})  # which forgets what was recorded of it
                continue
            failed = self.engine.call("collect", {key: rows})
            if failed:
                self.figures["not_extracted"] += 1
                self._broken.add(key)
                logger.warning("vllm-dflash does not learn from a request: %s", failed[key])
                continue
            self.figures["extracted"] += 1
            self._features.add(key)

    # -- the gate --------------------------------------------------------------------------------

    def _compared(self) -> list[Conversation]:
        recent = self.held_out.recent()
        all_ = sorted(self.held_out, key=lambda c: (c.key in recent, c.time, c.key))
        latest = all_[-COMPARED // 2 :]
        older = all_[: -COMPARED // 2]
        # Always the same ones of the older, so that the served drafter's counts are there.
        return sorted(older, key=lambda c: c.key)[: COMPARED // 2] + latest

    def _count(
        self, which: str, conversations: Sequence[Conversation]
    ) -> Generator[bool, None, dict[str, tuple[int, int, int]]]:
        yield from self._extract(conversations)
        keys = [c.key for c in conversations if c.key in self._features]
        if not keys:
            return {}
        return (yield from self._job("count", which, keys))

    def _compare(self) -> Generator[bool, None, None]:
        conversations = self._compared()
        self._since &= {c.key for c in self.held_out}
        if len(conversations) < MIN_CONVERSATIONS:
            self.last = judge({c.key: (0, 0) for c in conversations}, {}, {})
            return
        missing = [c for c in conversations if c.key not in self._served]
        if missing:
            self._remember((yield from self._count("served", missing)))
        keys = {c.key for c in conversations}
        self._served = before = {k: n for k, n in self._served.items() if k in keys}
        self._first = {k: n for k, n in self._first.items() if k in keys}
        counted = yield from self._count("candidate", conversations)
        after = {k: (drafts, accepted) for k, (drafts, accepted, _) in counted.items()}
        recent = self.held_out.recent()
        groups: dict[str, list[str]] = {}
        for c in conversations:
            groups.setdefault(f"source {c.source!r}", []).append(c.key)
            age = "recent" if c.key in recent else "earlier"
            groups.setdefault(f"{age} traffic", []).append(c.key)
        self.figures["comparisons"] += 1
        self.last = verdict = judge(before, after, groups)
        if verdict.better:
            yield from self._promote(verdict, counted)
        elif verdict.worse:
            logger.info("vllm-dflash discards what it learned: %s", verdict.reason)
            self.engine.call("restore")
            self.versions.note_learned(self._latest, self._credit)
        yield True

    def _remember(self, counted: Mapping[str, tuple[int, int, int]]) -> None:
        for key, (drafts, accepted, first) in counted.items():
            self._served[key] = (drafts, accepted)
            self._first[key] = (drafts, first)

    def _write(self, path: Path) -> Generator[bool, None, None]:
        self.engine.call("write", str(path))
        while not (done := self.engine.call("written", self.settings.slice_ms / 1000)):
            yield True
        if done is not True:
            raise OSError(done)

    def _promote(
        self, verdict: Verdict, counted: Mapping[str, tuple[int, int, int]]
    ) -> Generator[bool, None, None]:
        before = self.versions.promoted
        figures = {
            "tau_before": verdict.tau_before,
            "tau_after": verdict.tau_after,
            "steps": self._steps,
            "conversations": len(self.replay),
            "held_out": len(counted),
        }
        number = self.versions.next_number()
        try:
            yield from self._write(self.versions.path(number))
        except OSError as error:
            # The candidate is still there, and is compared again after the next steps.
            logger.warning("vllm-dflash: version %d cannot be written: %s", number, error)
            self.figures["not_written"] += 1
            return
        self.engine.call("swap")
        self.versions.switch(number, "promoted", figures)
        self.versions.note_learned(self._latest, self._credit)
        self._serving(counted)
        self._trial = before
        self.figures["promotions"] += 1
        self._hand_over(number, {**figures, "first_token": self._expected})
        logger.info("vllm-dflash: version %d of the drafter serves: %s", number, verdict.reason)

    def _hand_over(self, number: int, figures: dict[str, Any]) -> None:
        """To the server whose conversations these are, in the place of what it has not taken yet."""
        source = self.settings.source
        if source is None:
            return
        try:
            if self._handed is not None and self._handed[1].exists():
                self._handed[1].unlink(missing_ok=True)
                shutil.rmtree(self._handed[0], ignore_errors=True)
            self._handed = hand_over(self.versions.path(number), source, **figures)
        except OSError as error:
            logger.warning(
                "vllm-dflash: version %d is not handed over to %s: %s", number, source, error
            )

    def _serving(self, counted: Mapping[str, tuple[int, int, int]]) -> None:
        """Another drafter serves, with these counts."""
        there = set(self.versions.there())
        self._by_source = {k: n for k, n in self._by_source.items() if k[0] in there}
        self._served, self._first, self._live, self._trial = {}, {}, [0, 0], None
        self._since = set()
        self._remember(counted)
        drafts = sum(n for n, _ in self._first.values())
        self._expected = sum(hits for _, hits in self._first.values()) / max(drafts, 1)

    def _watch_live(self) -> Generator[bool, None, None]:
        """Sends a version back that does worse than the one before it on conversations since."""
        if self._trial is None:
            return
        version = self._trial
        new = [c for c in self.held_out if c.key in self._since]
        if len(new) < 2 * MIN_CONVERSATIONS:
            return
        served = yield from self._count("served", new)
        self._remember(served)
        earlier = yield from self._count(str(self.versions.path(version)), new)
        verdict = judge(
            {k: n[:2] for k, n in served.items()}, {k: n[:2] for k, n in earlier.items()}, {}
        )
        if verdict.better:
            reason = f"the version before does better: {verdict.reason}"
            self._go_to(version, "rolled back", {"reason": reason})
        self._trial, self._since = None, set()
        yield True

    def _go_to(self, version: int, event: str, figures: dict[str, Any]) -> None:
        self.versions.check(version)
        self.engine.call("load", str(self.versions.path(version)))
        # What was under way is of the drafter before.
        self._rounds, self._not_compared = self._run(), 0
        self._serving({})
        self.versions.switch(version, event, figures)
        self.figures["rollbacks"] += event == "rolled back"
        self._hand_over(version, {**figures, "first_token": 0.0})
        logger.warning(
            "vllm-dflash: version %d of the drafter serves, %s: %s", version, event, figures
        )

    # -- commands and figures --------------------------------------------------------------------

    def _obey(self) -> None:
        """Carries out what ``vllm-dflash learn`` has left, in its order."""
        folder = self.versions.folder / "commands"
        for file in sorted(folder.glob("*.json")) if folder.is_dir() else []:
            if self.waiting is not None:
                return  # they come when its features are there
            text = file.read_text()
            file.unlink(missing_ok=True)
            try:
                self._carry_out(json.loads(text))
            except (ValueError, TypeError, KeyError, OSError) as error:
                logger.warning("vllm-dflash learn: %s", error)

    def _carry_out(self, command: Mapping[str, Any]) -> None:
        name, version = command["command"], command.get("version")
        if name in ("pause", "resume"):
            self.paused = name == "pause"
            return
        if name == "rollback":
            version = self.versions.previous()
        if name not in ("promote", "rollback") or version is None:
            raise ValueError(f"{name} {version} cannot be done")
        learned, before = command.get("figures"), self.versions.promoted
        event = "rolled back" if name == "rollback" else "promoted"
        try:
            self._go_to(int(version), event, learned or {"reason": "by hand"})
        except ValueError:
            if learned:  # nobody else would remove it
                shutil.rmtree(self.versions.path(int(version)), ignore_errors=True)
            raise
        if learned:  # by another server; it is on trial here
            self._trial, self._expected = before, float(learned["first_token"])
            self.figures["promotions"] += 1

    def status(self) -> dict[str, Any]:
        """Everything there is to see, as plain values."""
        state = "failed" if self.failed else "paused" if self.paused else "learning"
        drafts, hits = self._live
        shards, readers = self.shards, (self.shards, self.reader)
        return {
            "state": state,
            "error": self.failed,
            "version": self.versions.promoted,
            "history": self.versions.history[-20:],
            "replay": describe(self.replay),
            "held_out": describe(self.held_out),
            "to_learn": self._credit,
            "last_comparison": self.last.reason if self.last else "",
            "served": [
                {"version": v, "source": s, "drafts": n, "accepted_tokens": a}
                for (v, s), (n, a) in sorted(self._by_source.items())
            ],
            "first_token_accepted": hits / drafts if drafts else None,
            "written_dropped": shards.dropped if shards else 0,
            "written_damaged": sum(r.damaged for r in readers if r is not None),
            **self.figures,
        }
