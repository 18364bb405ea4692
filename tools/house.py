"""Figures of the house: files, lines, constants, ``Any``s, patches outside the table, import circles.

``python tools/house.py`` prints them for each package; ``--check`` fails on an import circle, an arrow back
up and a patch of vLLM outside the table. It reads the source only and needs nothing installed.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PACKAGE = "vllm_dflash"
#: From the ground up: a part imports itself and those before it. A part is a module, or a folder with all
#: that has no part of its own. Imports inside functions count, those for type checkers do not.
ORDER = (
    "__init__", "options", "bounds", "renamed", "settings", "files", "config", "config_formats",
    "checkpoint", "guard", "processes", "environment", "modeling", "draft_length", "ops", "serving",
    "serving.worker.features", "serving.worker", "serving.worker.v1", "serving.worker.v2",
    "serving.engine_core", "serving.frontend",
    "verifier", "cpu_dtype", "bench.engine_process", "training", "learning", "bench", "plugin", "cli",
)  # fmt: skip
#: Arrows that are left out: doors of a class to the files that read and write it, by an import when called.
DOORS = {
    "config": {
        "config_formats",
        "checkpoint",
    },  # DrafterConfig.from_dict, .from_pretrained, .to_dict
}
#: The only files that may put something in the place of something of vLLM's.
TABLE = ("serving/seams.py", "serving/patching.py")
#: Objects of others than vLLM.
NOT_VLLM = ("tokenizer.apply_chat_template",)


class Module:
    """One file.

    Attributes:
        name: dotted, without the package's own name; ``__init__`` for the package itself.
        part: the entry of ``ORDER`` that it belongs to, or its folder.
    """

    def __init__(self, root: Path, path: Path) -> None:
        self.path = path.relative_to(root).as_posix()
        parts = self.path.removesuffix(".py").removesuffix("/__init__").split("/")
        self.name = ".".join(parts)
        above = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
        self.part = next((name for name in above if name in ORDER), parts[0])
        text = path.read_text()
        self.num_lines, self.tree = text.count("\n"), ast.parse(text)

    def imports(self, known: set[str]) -> set[str]:
        """Modules of the package that it imports, in functions too."""
        out = set()
        for node in _walk_at_runtime(self.tree):
            if isinstance(node, ast.Import):
                names = [a.name for a in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{a.name}" for a in node.names]
                names = [n if _ours(n) in known else node.module for n in names]
            else:
                continue
            out |= {_ours(n) for n in names if n.partition(".")[0] == PACKAGE}
        return (out & known) - {self.name} - DOORS.get(self.name, set())

    def num_constants(self) -> int:
        """Numbers, or collections of them, that a name of the module stands for."""
        values = [n.value for n in self.tree.body if isinstance(n, (ast.Assign, ast.AnnAssign))]
        return sum(v is not None and _is_number(v) for v in values)

    def num_any(self) -> int:
        """How often something is annotated with ``Any``."""
        return sum(isinstance(n, ast.Name) and n.id == "Any" for n in ast.walk(self.tree))

    def patches(self) -> Iterator[str]:
        """Places that put a function or class in the place of another object's: ``file:line target``.

        Classes of instances that are changed, and attributes of anything but ``self`` and ``cls`` that
        become something callable: defined in the file, a lambda, a partial or bound function.
        """
        holders = [n for n in ast.walk(self.tree) if not isinstance(n, ast.ClassDef)]
        children = [c for n in holders for c in ast.iter_child_nodes(n)]
        made = {n.name: n for n in children if isinstance(n, _DEFINITIONS)}
        nodes = [n for n in ast.walk(self.tree) if isinstance(n, (ast.Assign, ast.AnnAssign))]
        makers = [n for n in nodes if n.value and _makes_callable(n.value, made)]
        local = {
            ast.unparse(n.targets[0] if isinstance(n, ast.Assign) else n.target) for n in makers
        }
        for node in ast.walk(self.tree):
            pairs: list[tuple[ast.expr, ast.expr]] = []
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr":
                pairs = [(node.args[0], node.args[2])]
            elif isinstance(node, ast.Assign):
                pairs = [(t, v) for t, v in _pairs(node) if isinstance(t, ast.Attribute)]
            for target, value in pairs:
                name = ast.unparse(target)
                own = name.count(".") <= 1 and name.partition(".")[0] in ("self", "cls")
                named = isinstance(value, ast.Name) and (value.id in made or value.id in local)
                callable_ = not own and (named or _makes_callable(value, made))
                if (callable_ or name.endswith(".__class__")) and name not in NOT_VLLM:
                    yield f"{self.path}:{node.lineno} {name}"


_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def _pairs(node: ast.Assign) -> Iterator[tuple[ast.expr, ast.expr]]:
    for target in node.targets:
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            yield from zip(target.elts, node.value.elts, strict=True)
        else:
            yield target, node.value


def _makes_callable(value: ast.expr, made: dict[str, Any]) -> bool:
    """Whether it is a lambda, or a call that makes a function: partial, MethodType, a wrapper in the file."""
    if not isinstance(value, ast.Call):
        return isinstance(value, ast.Lambda)
    name = ast.unparse(value.func).rpartition(".")[2]
    maker = made.get(name)
    body = maker.body if isinstance(maker, ast.FunctionDef) else []
    return name in ("partial", "MethodType") or any(isinstance(n, ast.FunctionDef) for n in body)


def _walk_at_runtime(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _walk_at_runtime(child)


def _ours(name: str) -> str:
    return name.removeprefix(PACKAGE).removeprefix(".") or "__init__"


def _is_number(node: ast.expr) -> bool:
    if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
        return any(_is_number(n) for n in node.elts)
    if isinstance(node, ast.BinOp):
        return _is_number(node.left) and _is_number(node.right)
    if isinstance(node, ast.UnaryOp):
        return _is_number(node.operand)
    return isinstance(node, ast.Constant) and type(node.value) in (int, float)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import one another, by way of others too."""
    reach = {name: set(found) for name, found in graph.items()}
    for by in graph:
        for name in graph:
            if by in reach[name]:
                reach[name] |= reach[by]
    found = {frozenset(m for m in reach[n] if n in reach[m]) for n in graph if n in reach[n]}
    return sorted(sorted(ring) for ring in found)


def main() -> int:
    """Prints the figures; with ``--check`` what must not be, and 1 if there is any."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail on what must not be")
    parser.add_argument("root", nargs="?", type=Path, default=Path(__file__).parents[1] / PACKAGE)
    args = parser.parse_args()
    modules = {m.name: m for m in (Module(args.root, p) for p in sorted(args.root.rglob("*.py")))}
    known = set(modules)
    graph = {m.name: m.imports(known) for m in modules.values()}
    rank = {part: i for i, part in enumerate(ORDER)}
    missing = sorted({m.part for m in modules.values()} - set(rank))
    up = [
        f"{a} -> {b}"
        for a, found in sorted(graph.items())
        for b in sorted(found)
        if not missing and rank[modules[b].part] > rank[modules[a].part]
    ]
    outside = [p for m in modules.values() if m.path not in TABLE for p in m.patches()]
    report = {
        "not in ORDER": missing,
        "import circle": [" ".join(ring) for ring in circles(graph)],
        "arrow back up": up,
        "patch outside the table": outside,
    }
    if args.check:
        wrong = [f"{title}: {one}" for title, found in report.items() for one in found]
        print("\n".join(wrong) or "the house is in order")
        return 1 if wrong else 0
    row = "{:<13}{:>6}{:>8}{:>11}{:>6}{:>9}"
    print(row.format("package", "files", "lines", "constants", "Any", "patches"))
    folders = {
        m.name: m.path.rpartition("/")[0].partition("/")[0] or "(root)" for m in modules.values()
    }
    for name in [*sorted(set(folders.values())), "all"]:
        members = [m for m in modules.values() if name in ("all", folders[m.name])]
        paths = {m.path for m in members}
        figures = [(m.num_lines, m.num_constants(), m.num_any()) for m in members]
        patches = sum(p.partition(":")[0] in paths for p in outside)
        print(row.format(name, len(members), *map(sum, zip(*figures, strict=True)), patches))
    for title, found in report.items():
        print(f"{title}: {len(found)}", *found, sep="\n  ")
    return 0


if __name__ == "__main__":
    sys.exit(main())
