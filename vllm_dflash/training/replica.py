"""A replica's process: an engine that does what the trainer's process asks of it.

The two talk over a socket pair of their own, so that what vLLM prints cannot disturb them. The parent sends
the engine's arguments first, then one question at a time: ``(name, *args)``, a method of ``VerifierEngine``.
The answer is any number of ``(ITEM, value)``, for what comes one by one, and then ``(DONE, value)`` or
``(FAILED, Failure)``.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing
from multiprocessing.connection import Connection
from typing import Any

from vllm_dflash.training.config import SamplingOptions
from vllm_dflash.training.ranks import Failure
from vllm_dflash.training.responses import GenerationRequest, GenerationResult

ITEM, DONE, FAILED = "item", "done", "failed"
#: Ends what comes one by one; it has no answer of its own.
CANCEL = ("cancel",)


def generate(
    engine: Any, requests: list[GenerationRequest], sampling: SamplingOptions
) -> Iterator[GenerationResult]:
    """Responses to all requests as they are finished."""
    return engine.generator(sampling)(requests)


def serve(engine: Any, questions: queue.Queue[Any], send: Callable[[Any], None]) -> None:
    """Answers until None is asked.

    Args:
        engine: a ``VerifierEngine``.
        questions: in their order.
        send: takes the parts of the answers.
    """
    streams = {"generate": generate, "extract": type(engine).extract}
    while (question := questions.get()) is not None:
        if question == CANCEL:  # of what had ended
            continue
        name, *args = question
        answer = None
        try:
            if name in streams:
                with closing(streams[name](engine, *args)) as items:
                    for item in items:
                        send((ITEM, item))
                        if not questions.empty():
                            break
            else:
                answer = getattr(engine, name)(*args)
        except Exception as error:
            traceback.print_exc()
            send((FAILED, Failure(f"{type(error).__name__}: {error}", False)
                  if not isinstance(error, ValueError) else Failure(str(error), True)))  # fmt: skip
        else:
            send((DONE, answer))


def _listen(conn: Connection, questions: queue.Queue[Any]) -> None:
    try:
        while True:
            questions.put(conn.recv())
    except (EOFError, OSError):
        # The trainer's process is gone, whatever this one is waiting for.
        os._exit(1)


def main(fd: int) -> None:
    """Starts the engine, says so, and serves.

    Args:
        fd: the socket, inherited.
    """
    os.set_inheritable(fd, False)
    conn = Connection(fd)
    questions: queue.Queue[Any] = queue.Queue()
    threading.Thread(target=_listen, args=(conn, questions), daemon=True).start()
    verifier, drafter, options, memory = questions.get()
    from vllm_dflash.training.engine import VerifierEngine

    try:
        engine = VerifierEngine(verifier, drafter, options, memory=memory)
    except Exception as error:
        conn.send((FAILED, Failure(f"{type(error).__name__}: {error}", False)))
        raise
    conn.send((DONE, None))
    serve(engine, questions, conn.send)
    engine.close()


if __name__ == "__main__":
    main(int(sys.argv[1]))
