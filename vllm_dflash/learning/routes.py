"""HTTP routes of a server that learns: what ``vllm-dflash learn`` does, for those who reach the server only.

The ``vllm.endpoint_plugins`` entry point ``dflash_learn``: vLLM loads it where ``VLLM_PLUGINS`` names it, and
asks for the server's API key for every path below ``/v1``.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from fastapi import Body, FastAPI, HTTPException
from fastapi.responses import JSONResponse

from vllm_dflash.learning.control import read_status, send
from vllm_dflash.options import Options

PATH = "/v1/dflash/learn"


class LearningRoutes:
    """``GET /v1/dflash/learn`` is the status; below it, ``pause``, ``resume``, ``rollback`` and ``promote``
    take a POST, the last one with the body ``{"version": V}``.

    A command is answered with 200 once the engine core has taken it, with 202 before; 400 says what cannot be
    done, 404 that this server does not learn.
    """

    name = "dflash_learn"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._folder: Path | None = None

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        options = Options.from_additional_config(engine_client.vllm_config.additional_config)
        self._folder = Path(options.learn) if options.learn else None

    # Plain functions, which FastAPI runs in a thread: a command may wait for a step of the engine.
    def attach_router(self, app: FastAPI) -> None:
        @app.get(PATH)
        def learning() -> dict[str, Any]:
            return self._answer(lambda folder: read_status(folder))

        def command(name: str) -> Any:
            def steer(version: int | None = Body(None, embed=True)) -> JSONResponse:
                taken = self._answer(lambda folder: send(folder, name, version))
                return JSONResponse({"command": name, "taken": taken}, 200 if taken else 202)

            return steer

        for name in ("pause", "resume", "promote", "rollback"):
            app.post(f"{PATH}/{name}")(command(name))

    def _answer(self, ask: Any) -> Any:
        if self._folder is None:
            raise HTTPException(404, "this server does not learn")
        try:
            return ask(self._folder)
        except ValueError as error:
            raise HTTPException(400, str(error)) from error
