"""vLLM's source read, not imported: what a dotted name is there. For versions that are not installed."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

Function = (ast.FunctionDef, ast.AsyncFunctionDef)
#: Bases that add no members.
_EMPTY_BASES = {"object", "ABC", "Protocol", "Generic", "NamedTuple"}
#: Around a type that is meant as such.
_TRANSPARENT = {"Optional", "ClassVar", "SkipValidation"}
_PROPERTIES = {"property", "cached_property"}


@dataclass(frozen=True)
class Parameters:
    """What a function or class can be called with, without ``self``."""

    positional: tuple[str, ...]
    keyword_only: tuple[str, ...] = ()
    required: frozenset[str] = frozenset()
    more_positional: bool = False
    more_keywords: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        return self.positional + self.keyword_only

    @classmethod
    def of(cls, node: ast.FunctionDef | ast.AsyncFunctionDef, bound: bool = False) -> Parameters:
        args = node.args
        ordered = [a.arg for a in (*args.posonlyargs, *args.args)]
        required = set(ordered[: len(ordered) - len(args.defaults)])
        only = [a.arg for a in args.kwonlyargs]
        required |= {n for n, d in zip(only, args.kw_defaults, strict=True) if d is None}
        ordered = ordered[1:] if bound else ordered
        return cls(
            tuple(ordered),
            tuple(only),
            frozenset(required & {*ordered, *only}),
            args.vararg is not None,
            args.kwarg is not None,
        )


@dataclass(frozen=True)
class Found:
    """What a name is bound to.

    Attributes:
        kind: ``module``, ``class``, ``function`` or ``value``.
        module: where it is defined.
        node: its statement, None of a module.
        function: around a value: its parameters may say the value's type.
        bound: a method, called without its first parameter.
    """

    kind: str
    module: Module
    node: Any = None
    function: Any = field(default=None, compare=False)
    bound: bool = False


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a body, also below ``if``, ``try`` and ``with``."""
    for node in body:
        yield node
        for part in ("body", "orelse", "finalbody"):
            if not isinstance(node, (*Function, ast.ClassDef)):
                yield from _statements(getattr(node, part, []))
        for handler in getattr(node, "handlers", []):
            yield from _statements(handler.body)


def targets(node: ast.stmt) -> list[ast.expr]:
    """What an assignment assigns to."""
    if isinstance(node, ast.Assign):
        return [
            t
            for x in node.targets
            for t in (x.elts if isinstance(x, (ast.Tuple, ast.List)) else [x])
        ]
    return [node.target] if isinstance(node, ast.AnnAssign) else []


class Module:
    """One file of the source."""

    def __init__(self, name: str, path: Path, text: str | None = None) -> None:
        self.name, self.path = name, path
        self.text = path.read_text() if text is None else text
        self.tree = ast.parse(self.text)

    @cached_property
    def package(self) -> str:
        return self.name if self.path.name == "__init__.py" else self.name.rpartition(".")[0]

    def _imported_from(self, node: ast.ImportFrom) -> str:
        base = node.module or ""
        if node.level:
            parts = self.package.split(".")
            base = ".".join([*parts[: len(parts) - node.level + 1], *base.split(".")])
        return base.rstrip(".")

    @cached_property
    def late_imports(self) -> frozenset[str]:
        """Dotted names that functions of this module import when they run."""
        return frozenset(
            f"{self._imported_from(node)}.{alias.name}"
            for top in ast.walk(self.tree)
            if isinstance(top, Function)
            for node in ast.walk(top)
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        )

    @cached_property
    def names(self) -> dict[str, Found | str]:
        """Top-level bindings; an import is the dotted name that it binds."""
        out: dict[str, Found | str] = {}
        for node in _statements(self.tree.body):
            if isinstance(node, ast.ImportFrom):
                base = self._imported_from(node)
                for alias in node.names:
                    out.setdefault(alias.asname or alias.name, f"{base}.{alias.name}")
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    first = alias.name.partition(".")[0]
                    out.setdefault(alias.asname or first, alias.name if alias.asname else first)
            else:
                for name, found in _definitions(self, node):
                    old = out.get(name)
                    if old is None or (isinstance(old, Found) and old.kind == "value"):
                        out[name] = found
        return out

    @cached_property
    def read_names(self) -> frozenset[str]:
        """Names that functions of this module read from its globals (or their own)."""
        return frozenset(
            n.id
            for top in ast.walk(self.tree)
            if isinstance(top, Function)
            for n in ast.walk(top)
            if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)
        )


def _definitions(
    module: Module, node: ast.stmt, in_class: bool = False
) -> Iterator[tuple[str, Found]]:
    if isinstance(node, ast.ClassDef):
        yield node.name, Found("class", module, node)
    elif isinstance(node, Function):
        marks = {ast.unparse(d).rpartition(".")[2] for d in node.decorator_list}
        if marks & _PROPERTIES:
            yield node.name, Found("value", module, node)
        elif "overload" not in marks:
            yield (
                node.name,
                Found("function", module, node, bound=in_class and "staticmethod" not in marks),
            )
    else:
        for target in targets(node):
            if isinstance(target, ast.Name):
                yield target.id, Found("value", module, node)


class Source:
    """A folder with the package ``vllm`` in it: ``site-packages`` or an unpacked wheel."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._modules: dict[str, Module | None] = {}
        self._members: dict[int, dict[str, Found]] = {}
        if self.module("vllm") is None:
            raise ValueError(f"{root} has no package vllm")

    @classmethod
    def installed(cls) -> Source:
        """Of the vLLM in this environment."""
        spec = importlib.util.find_spec("vllm")
        if spec is None or spec.origin is None:
            raise ValueError("no vLLM is installed")
        return cls(Path(spec.origin).parents[1])

    def module(self, name: str) -> Module | None:
        if name not in self._modules:
            path = self.root.joinpath(*name.split("."))
            files = (path / "__init__.py", path.with_suffix(".py"))
            file = next((f for f in files if f.is_file()), None)
            self._modules[name] = Module(name, file) if file else None
        return self._modules[name]

    def with_module(self, module: Module) -> Source:
        """The same source with another text in the place of a module's."""
        other = Source(self.root)
        other._modules = {**self._modules, module.name: module}
        return other

    # -- names -----------------------------------------------------------------------------------

    def resolve(self, path: str) -> Found | None:
        """What a path is: ``vllm.module.Class.attribute``, ``()`` behind a part for what a call gives.

        Attributes of values are followed where an annotation or a constructor tells the type.
        """
        return self.explain(path)[0]

    def explain(self, path: str) -> tuple[Found | None, str]:
        """As ``resolve``, and the part of the path that is there, with the next one missing."""
        first, *parts = path.split(".")
        module = self.module(first)
        found = Found("module", module) if module else None
        walked = first
        for part in parts:
            if found is None:
                break
            name = part.replace("()", "")
            after = self.member(found, name)
            if after is None:
                return None, f"{walked} has no {name}"
            for _ in range(part.count("()")):
                after = self.called(after) if after else None
            found, walked = after, f"{walked}.{part}"
        return found, walked if found else f"{walked} is unknown"

    def member(self, found: Found, name: str) -> Found | None:
        if found.kind == "module":
            return self._global(found.module, name)
        cls = found if found.kind == "class" else self.type_of(found)
        if cls is None or cls.kind != "class":
            return None
        for one in self.mro(cls):
            member = self.own_members(one).get(name)
            if member is not None:
                return self._value(member)
        return None

    def _global(self, module: Module, name: str, depth: int = 0) -> Found | None:
        bound = module.names.get(name)
        if isinstance(bound, Found):
            return self._value(bound)
        if bound is not None and bound.partition(".")[0] != "vllm":
            return Found("value", module)  # another package's
        if bound is not None and depth < 8:
            return self._import(bound, depth + 1)
        below = self.module(f"{module.name}.{name}")
        return Found("module", below) if below else None

    def _import(self, dotted: str, depth: int) -> Found | None:
        module = self.module(dotted)
        owner, _, name = dotted.rpartition(".")
        around = self.module(owner) if owner else None
        # A package may bind a name to something else than its submodule of that name.
        found = self._global(around, name, depth) if around and name in around.names else None
        return found or (Found("module", module) if module else None)

    def _value(self, found: Found) -> Found:
        """A name that is bound to a class or function is that."""
        if found.kind == "value" and found.function is None and isinstance(found.node, ast.Assign):
            expression = found.node.value
            if isinstance(expression, (ast.Name, ast.Attribute)):
                target = self._expression(expression, found)
                if target is not None and target.kind in ("class", "function"):
                    return target
        return found

    # -- classes ---------------------------------------------------------------------------------

    def mro(self, cls: Found) -> Iterator[Found]:
        """The class and those of its bases that are vLLM's."""
        yield cls
        for base in cls.node.bases:
            found = self._annotation(base, cls)
            if found is not None and found.kind == "class" and found.node is not cls.node:
                yield from self.mro(found)

    def is_closed(self, cls: Found) -> bool:
        """Whether every base is vLLM's, so that a member that is not found does not exist."""

        def known(base: ast.expr, cls: Found) -> bool:
            found = self._annotation(base, cls)
            return found is not None and found.kind == "class"

        return all(
            known(base, one)
            or ast.unparse(base).partition("[")[0].rpartition(".")[2] in _EMPTY_BASES
            for one in self.mro(cls)
            for base in one.node.bases
        )

    def own_members(self, cls: Found) -> dict[str, Found]:
        """Names of a class's body and those its methods set on ``self``."""
        members = self._members.get(id(cls.node))
        if members is None:
            members = {}
            for node in _statements(cls.node.body):
                for name, found in _definitions(cls.module, node, in_class=True):
                    members.setdefault(name, found)
            for method in [m for m in cls.node.body if isinstance(m, Function) and m.args.args]:
                own = method.args.args[0].arg
                for node in ast.walk(method):
                    for target in targets(node) if isinstance(node, ast.stmt) else ():
                        if (
                            isinstance(target, ast.Attribute)
                            and isinstance(target.value, ast.Name)
                            and target.value.id == own
                        ):
                            value = Found("value", cls.module, node, (method, cls))
                            members.setdefault(target.attr, value)
            self._members[id(cls.node)] = members
        return members

    # -- types -----------------------------------------------------------------------------------

    def called(self, found: Found) -> Found | None:
        """What calling a class or function gives, where that is vLLM's."""
        if found.kind == "class":
            return found
        if found.kind == "function" and found.node.returns is not None:
            return self._annotation(found.node.returns, found)
        return None

    def type_of(self, found: Found) -> Found | None:
        """The class of a value, None where the source does not say or it is not vLLM's."""
        node = found.node
        if isinstance(node, ast.AnnAssign):
            return self._annotation(node.annotation, found)
        if isinstance(node, Function):
            return self._annotation(node.returns, found) if node.returns else None
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], (ast.Name, ast.Attribute)):
            target = self._expression(node.value, found)
            return self.type_of(target) if target and target.kind == "value" else target
        return None

    def _annotation(self, node: ast.expr, where: Found) -> Found | None:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return self._annotation(ast.parse(node.value, mode="eval").body, where)
        if isinstance(node, ast.BinOp):
            left = self._annotation(node.left, where)
            return left if left and left.kind == "class" else self._annotation(node.right, where)
        if isinstance(node, ast.Subscript):
            name = ast.unparse(node.value).rpartition(".")[2]
            if name in _TRANSPARENT:
                return self._annotation(node.slice, where)
            return self._annotation(node.value, where)
        if isinstance(node, (ast.Name, ast.Attribute)):
            return self._expression(node, Found("value", where.module))
        return None

    def _expression(self, node: ast.expr, where: Found) -> Found | None:
        if isinstance(node, ast.Name):
            if where.function is not None:
                method, cls = where.function
                if node.id == method.args.args[0].arg:
                    return cls
                for argument in (*method.args.args, *method.args.kwonlyargs):
                    if argument.arg == node.id:
                        if argument.annotation is None:
                            return None
                        return self._annotation(argument.annotation, where)
            return self._global(where.module, node.id)
        if isinstance(node, ast.Attribute):
            owner = self._expression(node.value, where)
            return self.member(owner, node.attr) if owner else None
        if isinstance(node, ast.Call):
            function = self._expression(node.func, where)
            return self.called(function) if function else None
        return None

    # -- calls -----------------------------------------------------------------------------------

    def parameters(self, found: Found) -> Parameters | None:
        """Of a function, or of the constructor of a class; None of anything else."""
        if found.kind == "function":
            return Parameters.of(found.node, found.bound)
        if found.kind != "class":
            return None
        init = self.member(found, "__init__")
        if init is not None and init.kind == "function":
            return Parameters.of(init.node, bound=True)
        # A data class, or one like it: its annotated fields.
        fields: dict[str, bool] = {}
        for cls in reversed(list(self.mro(found))):
            for node in cls.node.body:
                if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
                    continue
                if not ast.unparse(node.annotation).rpartition(".")[2].startswith("ClassVar"):
                    fields[node.target.id] = node.value is None
        required = frozenset(name for name, needed in fields.items() if needed)
        return Parameters(tuple(fields), (), required, not self.is_closed(found))
