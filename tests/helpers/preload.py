"""What the fork server of ``warm.py`` imports: vLLM, as far as most engines do."""

import gc

import setproctitle
import vllm.compilation.backends
import vllm.entrypoints.openai.api_server
import vllm.model_executor.layers.quantization.online
import vllm.model_executor.models.qwen3
import vllm.renderers.hf
import vllm.v1.attention.backends.cpu_attn
import vllm.v1.engine.llm_engine
import vllm.v1.worker.cpu_worker  # noqa: F401

# It looks for the process's title once, and does not find it behind changes of the environment.
setproctitle.getproctitle()
# Else every collection of a fork, and vLLM asks for some, goes through all that was imported.
gc.freeze()
