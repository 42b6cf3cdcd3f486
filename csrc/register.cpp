// Python.h first: it sets feature macros that the standard headers read.
#include <Python.h>

// `import r1fast_kernels._C` only has to load this library: the TORCH_LIBRARY_IMPL blocks beside the code of each op
// (csrc/cpu/<op>.cpp) run then. Schemas, fake tensors and autograd stand in Python (kernels/r1fast_kernels/<op>.py),
// so that the package also works where this library is not built.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
