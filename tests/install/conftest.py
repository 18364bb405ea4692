"""One wheel with the extension, one without, for all tests here."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers import installs


@pytest.fixture
def tree(tmp_path) -> Path:
    return installs.copy_tree(tmp_path / "tree")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    tree = installs.copy_tree(folder / "tree")
    wheel, _ = installs.pip_wheel(
        tree, folder, "--no-build-isolation", VLLM_DFLASH_BUILD="require", VLLM_DFLASH_CUDA="auto"
    )
    assert wheel is not None
    return wheel


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory) -> Path:
    """Folder with the package as the wheel installs it."""
    return installs.unpack(wheel, tmp_path_factory.mktemp("installed"))


@pytest.fixture(scope="session")
def no_compiler(tmp_path_factory) -> Path:
    """A PATH with nothing on it."""
    return tmp_path_factory.mktemp("empty-path")


@pytest.fixture(scope="session")
def pure(tmp_path_factory, no_compiler) -> tuple[Path, str]:
    """A wheel built where there is no compiler, and what pip printed."""
    folder = tmp_path_factory.mktemp("pure")
    tree = installs.copy_tree(folder / "tree")
    wheel, output = installs.pip_wheel(tree, folder, "--no-build-isolation", PATH=no_compiler)
    assert wheel is not None
    return wheel, output


@pytest.fixture(scope="session")
def pure_installed(pure, tmp_path_factory) -> Path:
    return installs.unpack(pure[0], tmp_path_factory.mktemp("pure-installed"))
