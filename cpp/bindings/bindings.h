// Shared by the binding files: how Python values become views of the core's, checked once.
//
// Only this folder includes pybind11. The core neither knows Python nor links it.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <span>
#include <vector>

#include "base/check.h"
#include "cache/kv_group.h"
#include "kernels/kernels.h"

namespace sapwood::bindings {

namespace py = pybind11;

// Token and key ids: a contiguous int32 array is used in place, anything else (a list of int) is converted.
using Ints = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;

inline std::span<const int32_t> View(const Ints& ids) {
  SAPWOOD_REQUIRE(ids.ndim() == 1, "token ids must be one-dimensional, got ", ids.ndim(), " dimensions");
  return {ids.data(), static_cast<size_t>(ids.size())};
}

// Masks: ceil(vocab / 32) words. No forcecast: int32 words, as grammar libraries make them, are to be viewed as uint32.
using MaskWords = py::array_t<uint32_t, py::array::c_style>;

inline std::span<const uint32_t> View(const MaskWords& words) {
  SAPWOOD_REQUIRE(words.ndim() == 1, "a mask must be one-dimensional, got ", words.ndim(), " dimensions");
  return {words.data(), static_cast<size_t>(words.size())};
}

// A fresh array that owns its elements.
template <typename T, typename Range>
py::array_t<T> Copy(const Range& values) {
  py::array_t<T> out(static_cast<py::ssize_t>(values.size()));
  std::copy(values.begin(), values.end(), out.mutable_data());
  return out;
}

DType ParseDType(const std::string& name);

void BindCache(py::module_& m);
void BindBatch(py::module_& m);
void BindExecutor(py::module_& m);
void BindProgram(py::module_& m);
void BindSampling(py::module_& m);

}  // namespace sapwood::bindings
