"""Puts what :mod:`vllm_dflash.serving.seams` lists in its place, if vLLM looks as expected there.

Where it does not, one warning names the place and stock vLLM stays. Nothing of vLLM is replaced elsewhere.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.util
import inspect
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from vllm_dflash.options import DRAFTER_ARCH, HEAD_ARCH
from vllm_dflash.serving.seams import SEAMS, Seam

logger = logging.getLogger("vllm.vllm_dflash")
_PATCHED = "_vllm_dflash_patched"
_STAYS = "stock behaviour stays there"


def _owner(seam: Seam, module: ModuleType) -> Any:
    """What has the attribute: the module, or a class in it; None if that is missing."""
    owner: Any = module
    for part in seam.attribute.split(".")[:-1]:
        owner = getattr(owner, part, None)
    return owner


def problem(seam: Seam, module: ModuleType) -> str | None:
    """What is wrong with a seam in this vLLM, None if it is as expected."""
    target = getattr(_owner(seam, module), seam.attribute.rpartition(".")[2], None)
    if target is None:
        return f"{seam.name} is missing"
    try:
        have = inspect.signature(target).parameters
    except (TypeError, ValueError):
        return None
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in have.values()):
        return None  # ours, once patched, or another plugin's wrapper
    lost = [p for p in seam.parameters if p not in have]
    return f"{seam.name} has no parameter {', '.join(lost)}" if lost else None


def load(text: str) -> Any:
    """What ``module:attribute`` names."""
    module, _, name = text.partition(":")
    return getattr(importlib.import_module(module), name)


def _apply(seam: Seam, module: ModuleType) -> None:
    """Patches once. Never raises: that would fail vLLM's own import of the module."""
    done: set[str] = module.__dict__.setdefault(_PATCHED, set())
    if seam.name in done:
        return
    done.add(seam.name)
    # A subclass that is put in the place of a class has rows for what it overrides.
    more = [
        found for s in SEAMS if s.when == "class" and s.ours == seam.ours and (found := _problem(s))
    ]
    wrong = [found for found in (problem(seam, module), *more) if found]
    if wrong:
        logger.warning("vllm-dflash: %s in this vLLM; %s", "; ".join(wrong), _STAYS)
        return
    try:
        ours, name = load(seam.ours), seam.attribute.rpartition(".")[2]
        owner = _owner(seam, module)
        setattr(owner, name, ours if inspect.isclass(ours) else ours(getattr(owner, name)))
    except Exception:
        logger.exception("vllm-dflash cannot patch %s; %s", seam.name, _STAYS)


# ---- right after an import ----


class _PostImport(importlib.abc.MetaPathFinder):
    """Patches a module right after vLLM imports it.

    Finds nothing itself: it asks the other finders and wraps the loader they return.
    """

    def __init__(self, seams: dict[str, list[Seam]]) -> None:
        self.seams = seams

    def find_spec(self, fullname, path=None, target=None):
        seams = self.seams.get(fullname)
        if seams is None:
            return None
        for finder in sys.meta_path:
            # Two of ours (installed twice) would ask each other for ever.
            if isinstance(finder, _PostImport) or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                break
        else:
            return None
        if spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            for seam in seams:
                _apply(seam, module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a package above it is absent
        return False


def install() -> list[str]:
    """Registers the drafter classes and hooks every ``import`` seam; returns the modules this vLLM lacks.

    Where a module is absent nothing is patched at all, since half a plugin is worse than none.
    """
    seams = [seam for seam in SEAMS if seam.when == "import"]
    missing = [module for module in dict.fromkeys(s.module for s in seams) if not _exists(module)]
    if missing:
        return missing
    from vllm import ModelRegistry

    ModelRegistry.register_model(
        DRAFTER_ARCH, "vllm_dflash.serving.worker.drafter_model:DrafterModel"
    )
    ModelRegistry.register_model(
        HEAD_ARCH, "vllm_dflash.serving.worker.dflash2_model:HeadDrafterModel"
    )
    pending: dict[str, list[Seam]] = {}
    for seam in seams:
        module = sys.modules.get(seam.module)
        if module is not None and not getattr(module.__spec__, "_initializing", False):
            _apply(seam, module)
        else:
            pending.setdefault(seam.module, []).append(seam)
    if pending:
        sys.meta_path.insert(0, _PostImport(pending))
    return []


# ---- later ----


def apply(when: str) -> None:
    """Puts the module-wide seams of a kind (such as ``cpu``) in place, once."""
    for seam in SEAMS:
        if seam.when == when:
            _apply(seam, importlib.import_module(seam.module))


@functools.cache
def _problem(seam: Seam) -> str | None:
    """:func:`problem` of a class or object seam; objects of modules not loaded are none of vLLM's."""
    module = sys.modules.get(seam.module)
    return None if module is None else problem(seam, module)


def specialise(thing: Any, ours: str, *args: Any) -> bool:
    """Makes the class of one of vLLM's objects a subclass of ours, by a row of the table.

    Args:
        thing: changed; vLLM's class stays as it is.
        ours: as in the table: a class, or a function that gets the object's class and ``args`` and returns a
            subclass.

    Returns:
        Whether it is one now. False, with a warning, where this vLLM does not look as expected.
    """
    rows = [seam for seam in SEAMS if seam.ours == ours and seam.when == "class"]
    if not rows:
        raise LookupError(f"{ours} is not in the table of seams")
    cls = type(thing)
    done = getattr(cls, _PATCHED, ())
    if ours in done:
        return True
    wrong = [found for seam in rows if (found := _problem(seam))]
    if wrong:
        logger.warning("vllm-dflash: %s in this vLLM; %s", "; ".join(wrong), _STAYS)
        return False
    made = load(ours)
    if not inspect.isclass(made):
        made = made(cls, *args)
        setattr(made, _PATCHED, (*done, ours))
    thing.__class__ = made
    return True


def _check_row(name: str) -> None:
    rows = [s for s in SEAMS if s.when == "object" and s.attribute.rpartition(".")[2] == name]
    if not rows:
        raise LookupError(f"{name} is not in the table of seams")
    wrong = [found for seam in rows if (found := _problem(seam))]
    if wrong:
        raise RuntimeError(f"vllm-dflash: {'; '.join(wrong)} in this vLLM")


def replace(owner: Any, name: str, value: Any) -> None:
    """Replaces an attribute of one object, by a row of the table; for good.

    Raises:
        RuntimeError: this vLLM does not look as expected.
    """
    _check_row(name)
    setattr(owner, name, value)


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """:func:`replace` for the while."""
    _check_row(name)
    own = vars(owner)
    had, before = name in own, own.get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if had:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


def probe() -> dict[str, str]:
    """State of every seam in the installed vLLM, by name: ``ok`` or why not.

    For ``vllm-dflash env``. It imports the runners, so it is not for serving processes.
    """
    out: dict[str, str] = {}
    for seam in SEAMS:
        try:
            found = problem(seam, importlib.import_module(seam.module))
        except Exception as error:  # an import can fail in any way; the point is to report it
            found = f"import failed: {type(error).__name__}: {error}"
        if found or seam.name not in out:
            out[seam.name] = found or "ok"
    return out
