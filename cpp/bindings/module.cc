// The extension module sapwood._core: registers the parts and maps the core's errors to Python's, once.
#include "bindings/bindings.h"

namespace sapwood::bindings {

DType ParseDType(const std::string& name) {
  if (name == "float32") return DType::kF32;
  if (name == "bfloat16") return DType::kBF16;
  if (name == "float16") return DType::kF16;
  throw InvalidArgument(StrCat("dtype must be float32, bfloat16 or float16, got \"", name, "\""));
}

}  // namespace sapwood::bindings

PYBIND11_MODULE(_core, m) {
  namespace py = pybind11;
  using namespace sapwood;
  m.doc() = "Sapwood's core: page pool, radix tree, batch builder, executor, CPU kernels, sampler.";
  m.attr("__version__") = SAPWOOD_VERSION;

  py::register_exception<InvalidArgument>(m, "InvalidArgument", PyExc_ValueError);
  py::register_exception<CapacityError>(m, "CapacityError", PyExc_RuntimeError);
  py::register_exception<InternalError>(m, "InternalError", PyExc_RuntimeError);

  bindings::BindCache(m);
  bindings::BindBatch(m);
  bindings::BindExecutor(m);
  bindings::BindProgram(m);
  bindings::BindSampling(m);
}
