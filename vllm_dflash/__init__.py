"""vllm-dflash: train, serve and keep fresh DFlash drafters inside stock vLLM."""

__version__ = "0.1.0"
