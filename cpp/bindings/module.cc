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

  // The core's errors are the package's own (floor 0), so that a caller catches one family.
  const py::module_ errors = py::module_::import("sapwood.errors");
  m.attr("InvalidArgument") = errors.attr("InvalidRequest");
  m.attr("CapacityError") = errors.attr("CapacityError");
  m.attr("InternalError") = errors.attr("InternalError");
  py::register_exception_translator([](std::exception_ptr problem) {
    const auto raise = [](const char* name, const std::exception& error) {
      PyErr_SetString(py::module_::import("sapwood.errors").attr(name).ptr(), error.what());
    };
    try {
      if (problem) std::rethrow_exception(problem);
    } catch (const InvalidArgument& error) {
      raise("InvalidRequest", error);
    } catch (const CapacityError& error) {
      raise("CapacityError", error);
    } catch (const InternalError& error) {
      raise("InternalError", error);
    }
  });

  bindings::BindCache(m);
  bindings::BindBatch(m);
  bindings::BindExecutor(m);
  bindings::BindProgram(m);
  bindings::BindSampling(m);
}
