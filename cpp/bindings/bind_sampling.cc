// The sampler alone, for tests.
#include <tuple>

#include "bindings/bindings.h"
#include "sampling/sampler.h"

namespace sapwood::bindings {
namespace {

using Logits = py::array_t<float, py::array::c_style | py::array::forcecast>;

int32_t VocabOf(const Logits& logits) {
  SAPWOOD_REQUIRE(logits.ndim() == 1 && logits.size() > 0, "logits must be a non-empty f32 [vocab]");
  return static_cast<int32_t>(logits.size());
}

// What a row's spans look into.
struct Adjustments {
  std::vector<int32_t> banned;
  std::vector<uint32_t> mask;
  std::vector<Occurrence> occurred;
  std::vector<TokenBias> logit_bias;
  float repetition, frequency, presence;

  Adjustments(std::vector<int32_t> banned_, std::vector<uint32_t> mask_,
              const std::vector<std::tuple<int32_t, int32_t, bool>>& occurred_, float repetition_, float frequency_,
              float presence_, const std::vector<std::tuple<int32_t, float>>& logit_bias_)
      : banned(std::move(banned_)), mask(std::move(mask_)), repetition(repetition_), frequency(frequency_),
        presence(presence_) {
    for (const auto& [token, count, in_prompt] : occurred_) occurred.push_back({token, count, in_prompt});
    for (const auto& [token, bias] : logit_bias_) logit_bias.push_back({token, bias});
  }

  // Throws where they make no row of this vocabulary.
  void Into(SamplingRow& row, int32_t vocab) const {
    row.banned = banned;
    row.mask = mask;
    row.occurred = occurred;
    row.repetition = repetition;
    row.frequency = frequency;
    row.presence = presence;
    row.logit_bias = logit_bias;
    RequireValid(row, vocab);
  }
};

}  // namespace

void BindSampling(py::module_& m) {
  py::class_<Adjustments>(m, "Adjustments")
      .def(py::init<std::vector<int32_t>, std::vector<uint32_t>, std::vector<std::tuple<int32_t, int32_t, bool>>, float,
                    float, float, std::vector<std::tuple<int32_t, float>>>(),
           py::kw_only(), py::arg("banned") = py::tuple(), py::arg("mask") = py::tuple(),
           py::arg("occurred") = py::tuple(), py::arg("repetition") = 1.0f, py::arg("frequency") = 0.0f,
           py::arg("presence") = 0.0f, py::arg("logit_bias") = py::tuple());
  m.def(
      "sample_row",
      [](const Logits& logits, float temperature, int32_t top_k, float top_p, float min_p, uint64_t seed,
         uint32_t stream, int64_t position, const Adjustments& adjustments) {
        const int32_t vocab = VocabOf(logits);
        SamplingRow row{temperature, top_k, top_p, min_p, seed, stream, position, {}, true};
        adjustments.Into(row, vocab);
        std::vector<float> scratch(SamplerScratch(vocab));
        SampleOutcome outcome = SampleRow(logits.data(), nullptr, vocab, row, scratch.data());
        return py::make_tuple(outcome.token, outcome.logprob, outcome.bad);
      },
      py::arg("logits"), py::kw_only(), py::arg("temperature"), py::arg("top_k"), py::arg("top_p"), py::arg("min_p"),
      py::arg("seed"), py::arg("stream"), py::arg("position"),
      py::arg("adjustments") = Adjustments({}, {}, {}, 1.0f, 0.0f, 0.0f, {}));
  m.def(
      "adjusted_logits",
      [](const Logits& logits, const Adjustments& adjustments) {
        const int32_t vocab = VocabOf(logits);
        SamplingRow row{};
        adjustments.Into(row, vocab);
        std::vector<float> scratch(SamplerScratch(vocab));
        Logits out(vocab);
        AdjustedLogits(logits.data(), vocab, row, scratch.data(), out.mutable_data());
        return out;
      },
      py::arg("logits"), py::arg("adjustments"));
  m.def("keyed_bits", &KeyedBits, py::arg("seed"), py::arg("stream"), py::arg("position"), py::arg("token"));
  m.def("keyed_gumbel", &KeyedGumbel, py::arg("bits"));
}

}  // namespace sapwood::bindings
