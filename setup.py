"""Compiles the extensions into the wheel; how is in ``vllm_dflash/ops/build.py``.

``VLLM_DFLASH_BUILD=auto`` (default) installs without them where something is missing, ``require``
fails, ``off`` does not compile. See docs/user/install.md.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
PACKAGE = "vllm_dflash"


def _build_module():
    """``vllm_dflash.ops.build`` without its package, which imports torch."""
    spec = importlib.util.spec_from_file_location("_build", ROOT / PACKAGE / "ops" / "build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


build = _build_module()


class BuildExtensions(build_ext):
    """Compiles what can be; the distribution then has just these extensions."""

    def run(self) -> None:
        package = (ROOT if self.inplace else Path(self.build_lib)) / PACKAGE
        try:
            record = build.install(ROOT / "csrc", package, Path(self.build_temp), os.environ)
        except build.BuildError as error:
            way_out = f"({build.ENV_BUILD}=auto without {build.ENV_CUDA}=1 installs without it)"
            raise CompileError(f"{error}\n{way_out}") from error
        self.extensions = [e for e in self.extensions if e.name.rpartition(".")[2] in record.built]
        self.distribution.ext_modules = self.extensions
        self._report(record)

    def _report(self, record) -> None:
        lines = [
            f"built {name} against torch {built.torch} {' '.join(built.codes)}".rstrip()
            for name, built in record.built.items()
        ]
        lines += [f"left out {name}: {reason}" for name, reason in record.left_out.items()]
        lines += [f"WITHOUT {name}: {reason}" for name, reason in record.failed.items()]
        if record.failed:
            lines.append(
                "What failed is compiled on first use, else Triton or PyTorch takes its place; "
                f"`vllm-dflash env` tells. {build.ENV_BUILD}=require makes it an error."
            )
        rule = "=" * 100
        text = "\n".join((rule, *(f"vllm-dflash: {line}" for line in lines), rule))
        print(text, file=sys.stderr, flush=True)


class BuildPython(build_py):
    """Takes ``csrc`` along: where nothing could be compiled at install, it can be at run time."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / PACKAGE / "csrc"
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(ROOT / "csrc", target)


class BuildWheel(bdist_wheel):
    """One wheel for every Python, and for every platform if nothing was compiled."""

    def initialize_options(self) -> None:
        super().initialize_options()
        self.py_limited_api = "cp310"

    @property
    def root_is_pure(self) -> bool:
        # Asked again once the extensions are built: only then it is known whether there are any.
        return not self.distribution.has_ext_modules()

    @root_is_pure.setter
    def root_is_pure(self, value: bool | None) -> None:
        pass


setup(
    ext_modules=[
        Extension(f"{PACKAGE}.{name}", sources=[], py_limited_api=True)
        for name in (build.CPP, build.CUDA)
    ],
    cmdclass={"build_ext": BuildExtensions, "build_py": BuildPython, "bdist_wheel": BuildWheel},
)
