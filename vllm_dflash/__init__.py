"""vllm-dflash: train, serve and keep fresh DFlash drafters inside stock vLLM."""

from importlib.metadata import PackageNotFoundError, version

try:
    #: Of the installed package; its home is pyproject.toml.
    __version__ = version("vllm-dflash")
except PackageNotFoundError:  # a source tree on the path of a Python that has not installed it
    __version__ = "0+source"
