// vllm_dflash._C_cuda: the CUDA kernels of the ops whose schemas vllm_dflash._C defines.
#include <torch/csrc/stable/library.h>

#include "ops.h"

STABLE_TORCH_LIBRARY_IMPL(vllm_dflash, CUDA, m) {
  m.impl("build_block", TORCH_BOX(&vllm_dflash::cuda::build_block));
  m.impl("tap_hidden_states", TORCH_BOX(&vllm_dflash::cuda::tap_hidden_states));
  m.impl("store_context_kv", TORCH_BOX(&vllm_dflash::cuda::store_context_kv));
}

// For `import vllm_dflash._C_cuda`, as in csrc/bindings.cpp.
#if __has_include(<Python.h>)
#include <Python.h>

// PyMODINIT_FUNC, not a plain extern "C": everything else is built with hidden visibility.
PyMODINIT_FUNC PyInit__C_cuda(void) {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
#endif
