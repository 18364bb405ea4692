"""The folder of a run: configuration, versions, metrics, curves, and the state to resume from."""

from __future__ import annotations

import json
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from vllm_dflash.checkpoint import atomic_write
from vllm_dflash.environment import versions


class RunFolder:
    """``<output>-run/``: everything about a run but the drafter itself.

    Args:
        path: the folder.
        config: what decides the result; a resumed run must have the same.

    Raises:
        ValueError: the folder holds a run with another configuration.
    """

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        file = path / "run.json"
        config = json.loads(json.dumps(config))
        if file.is_file():
            before = json.loads(file.read_text())["config"]
            differs = sorted(k for k in config | before if config.get(k) != before.get(k))
            if differs:
                key = differs[0]
                raise ValueError(
                    f"{path} holds a run with {key} = {before.get(key)!r}, not {config.get(key)!r}: "
                    "repeat its settings to resume it, or give another -o (or --restart to discard it)"
                )
        else:
            started = datetime.now().isoformat(timespec="seconds")
            run = {"config": config, "versions": versions(), "argv": sys.argv, "started": started}
            atomic_write(file, json.dumps(run, indent=2) + "\n")

    @property
    def started(self) -> datetime:
        """When the run was first started, in the local time of then."""
        file = self.path / "run.json"
        started = json.loads(file.read_text()).get("started")
        if started is None:  # a run of an older version
            return datetime.fromtimestamp(file.stat().st_mtime)
        return datetime.fromisoformat(started)

    @property
    def responses(self) -> Path:
        return self.path / "responses.jsonl"

    @property
    def rejected(self) -> Path:
        return self.path / "rejected.jsonl"

    @property
    def rejected_heldout(self) -> Path:
        return self.path / "rejected-heldout.jsonl"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    # -- state -----------------------------------------------------------------------------------

    def state(self) -> dict[str, Any] | None:
        """The newest complete state, None at the start of a run."""
        file = self.path / "state.json"
        if not file.is_file():
            return None
        state = json.loads(file.read_text())
        if not (self.path / state["file"]).is_file():
            raise ValueError(f"{file} names {state['file']}, which is gone; use --restart")
        return state

    def new_state_file(self, step: int) -> Path:
        """Where the learner writes the state of ``step``; :meth:`commit_state` makes it count."""
        return self.path / f"state-{step:08d}.safetensors"

    def commit_state(self, step: int, extra: dict[str, Any]) -> None:
        """Makes a written state the one to resume from and removes older ones."""
        file = self.new_state_file(step)
        atomic_write(
            self.path / "state.json", json.dumps({"step": step, "file": file.name, **extra})
        )
        for old in self.path.glob("state-*.safetensors"):
            if old != file:
                old.unlink()

    # -- metrics ---------------------------------------------------------------------------------

    def cut_metrics(self, step: int) -> None:
        """Drops the metrics of steps that will be run again."""
        if self.metrics.is_file():
            kept = [
                line
                for line in self.metrics.read_text().splitlines()
                if _parsed(line).get("step", step) < step
            ]
            atomic_write(self.metrics, "".join(line + "\n" for line in kept))

    def append_metrics(self, rows: list[dict[str, Any]]) -> None:
        with self.metrics.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    def read_metrics(self) -> list[dict[str, Any]]:
        if not self.metrics.is_file():
            return []
        return [_parsed(line) for line in self.metrics.read_text().splitlines() if line]

    def draw_curves(self) -> Path | None:
        """``curves.png``: loss, tau and per-position accuracy over steps; None without matplotlib."""
        rows = self.read_metrics()
        try:
            import matplotlib
        except ImportError:
            return None
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        steps = [r for r in rows if "loss" in r]
        evals = [r for r in rows if "tau" in r]
        if not steps:
            return None
        figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4))
        size = max(1, len(steps) // 200)
        groups = [steps[i : i + size] for i in range(0, len(steps), size)]
        at = [g[-1]["step"] for g in groups]
        left.plot(at, [sum(r["loss"] for r in g) / len(g) for g in groups])
        left.set(title="training loss", xlabel="step")
        taus = [1 + _ratio(g, "accepted", "anchors") for g in groups]
        middle.plot(at, taus, label="training, random anchors", alpha=0.6)
        if evals:
            middle.plot(
                [r["step"] for r in evals],
                [r["tau"] for r in evals],
                "o-",
                label="held out, as served",
            )
        middle.set(title="tau (tokens per verify step)", xlabel="step")
        middle.legend()
        for k in range(len(steps[-1]["right"])):
            accuracy = [
                sum(r["right"][k] for r in g) / max(sum(r["valid"][k] for r in g), 1)
                for g in groups
            ]
            right.plot(at, accuracy, label=f"{k + 1}")
        right.set(title="accuracy by draft position", xlabel="step", ylim=(0, 1))
        right.legend(ncol=2, fontsize=7)
        figure.tight_layout()
        path = self.path / "curves.png"
        figure.savefig(path, dpi=110)
        plt.close(figure)
        return path


def _parsed(line: str) -> dict[str, Any]:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        # The last line of a killed run may be cut short; its step is run again.
        return {}


def _ratio(rows: list[dict[str, Any]], top: str, bottom: str) -> float:
    return sum(r[top] for r in rows) / max(sum(r[bottom] for r in rows), 1)
