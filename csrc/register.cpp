// Python.h first: it sets feature macros that the standard headers read.
#include <Python.h>

#include <torch/library.h>

// One schema per op. Implementations register themselves beside their code (csrc/cpu/<op>.cpp); fake tensors and
// autograd are registered in Python (kernels/r1fast_kernels/<op>.py).
TORCH_LIBRARY(r1fast, m) {
  m.def(
      "selective_logprobs(Tensor logits_TV, Tensor target_ids_T, float temperature, bool with_entropy) "
      "-> (Tensor logprobs_T, Tensor entropy_T, Tensor stats_T2)");
}

// `import r1fast_kernels._C` only has to load this library: the block above runs then.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
