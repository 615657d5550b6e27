// The sampler alone, for tests.
#include "bindings/bindings.h"
#include "sampling/sampler.h"

namespace sapwood::bindings {

void BindSampling(py::module_& m) {
  m.def(
      "sample_row",
      [](const py::array_t<float, py::array::c_style | py::array::forcecast>& logits, float temperature,
         int32_t top_k, float top_p, float min_p, uint64_t seed, uint32_t stream, int64_t position,
         const std::vector<int32_t>& banned) {
        SAPWOOD_REQUIRE(logits.ndim() == 1 && logits.size() > 0, "logits must be a non-empty f32 [vocab]");
        const int32_t vocab = static_cast<int32_t>(logits.size());
        std::vector<float> scratch(SamplerScratch(vocab));
        SamplingRow row{temperature, top_k, top_p, min_p, seed, stream, position, banned, true};
        SampleOutcome outcome = SampleRow(logits.data(), nullptr, vocab, row, scratch.data());
        return py::make_tuple(outcome.token, outcome.logprob, outcome.bad);
      },
      py::arg("logits"), py::kw_only(), py::arg("temperature"), py::arg("top_k"), py::arg("top_p"), py::arg("min_p"),
      py::arg("seed"), py::arg("stream"), py::arg("position"), py::arg("banned") = std::vector<int32_t>{});
  m.def("keyed_bits", &KeyedBits, py::arg("seed"), py::arg("stream"), py::arg("position"), py::arg("token"));
  m.def("keyed_gumbel", &KeyedGumbel, py::arg("bits"));
}

}  // namespace sapwood::bindings
