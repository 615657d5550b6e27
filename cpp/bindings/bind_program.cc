// ProgramBuilder, WeightStore, CpuRunner: what python/sapwood/program/native.py lowers a recorded model to.
#include "bindings/bindings.h"
#include "bindings/py_runner.h"
#include "program/cpu_runner.h"

namespace sapwood::bindings {
namespace {

DType ParseAct(const std::string& name) {
  const DType act = ParseDType(name);
  SAPWOOD_REQUIRE(act != DType::kF16, "act must be float32 or bfloat16, got float16 (convert it to bfloat16)");
  return act;
}

SegmentKind ParseSegment(const std::string& name) {
  if (name == "forward") return SegmentKind::kForward;
  if (name == "head") return SegmentKind::kHead;
  if (name == "sample") return SegmentKind::kSample;
  throw InvalidArgument(StrCat("segment must be forward, head or sample, got \"", name, "\""));
}

SlotKind ParseSlotKind(const std::string& name) {
  if (name == "linear") return SlotKind::kLinear;
  if (name == "gate_up") return SlotKind::kGateUp;
  if (name == "table") return SlotKind::kTable;
  if (name == "vector") return SlotKind::kVector;
  if (name == "f32") return SlotKind::kF32;
  throw InvalidArgument(StrCat("slot kind must be linear, gate_up, table, vector or f32, got \"", name, "\""));
}

WeightFormat ParseFormat(const std::string& name) {
  for (WeightFormat format : {WeightFormat::kAct, WeightFormat::kInt8, WeightFormat::kInt4}) {
    if (name == WeightFormatName(format)) return format;
  }
  throw InvalidArgument(StrCat("weight format must be act, int8 or int4, got \"", name, "\""));
}

// What a weight [n][k] becomes when it is quantised and read back.
py::array_t<float> QuantizedWeight(py::array_t<float, py::array::c_style | py::array::forcecast> weight,
                                   const std::string& format_name, const std::string& isa) {
  SAPWOOD_REQUIRE(weight.ndim() == 2, "weight must be [n, k], got ", weight.ndim(), " dimensions");
  const WeightFormat format = ParseFormat(format_name);
  SAPWOOD_REQUIRE(format != WeightFormat::kAct, "format must be int8 or int4, got act");
  const int64_t n = weight.shape(0), k = weight.shape(1);
  py::array_t<float> out({n, k});
  std::vector<uint8_t> panel(PackedBytes(format, DType::kF32, kPanel, k));
  for (int64_t first = 0; first < n; first += kPanel) {
    const float* rows[kPanel];
    for (int64_t i = 0; i < kPanel; ++i) rows[i] = first + i < n ? weight.data(first + i, 0) : nullptr;
    Kernels(ParseIsa(isa.c_str())).quantize_panel(format, rows, k, panel.data());
    for (int64_t i = 0; i < std::min<int64_t>(kPanel, n - first); ++i) {
      ReadQuantizedRow(format, panel.data(), k, i, out.mutable_data(first + i, 0));
    }
  }
  return out;
}

py::bytes Bytes(const std::vector<uint8_t>& data) {
  return py::bytes(reinterpret_cast<const char*>(data.data()), data.size());
}

class PyCpuRunner : public PyRunner {
 public:
  PyCpuRunner(std::shared_ptr<CpuRunner> runner, Isa isa) : PyRunner(runner), cpu_(std::move(runner)), isa_(isa) {}
  CpuRunner* operator->() { return cpu_.get(); }
  Isa isa() const { return isa_; }

 private:
  std::shared_ptr<CpuRunner> cpu_;
  Isa isa_;
};

}  // namespace

void BindProgram(py::module_& m) {
  m.def("isa_levels", [] {
    std::vector<std::string> out;
    for (Isa isa : {Isa::kScalar, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16}) {
      if (IsaSupported(isa)) out.emplace_back(IsaName(isa));
    }
    return out;
  });
  m.def("best_isa", [] { return IsaName(BestIsa()); });
  m.def("usable_cpus", &UsableCpus);
  m.def("quantized_weight", &QuantizedWeight, py::arg("weight"), py::arg("format"), py::arg("isa") = "auto");

  py::class_<Program>(m, "ProgramBuilder")
      .def(py::init([](const std::string& act, int32_t vocab_size) {
             Program program;
             program.act = ParseAct(act);
             program.vocab_size = vocab_size;
             return program;
           }),
           py::arg("act"), py::arg("vocab_size"))
      .def("value",
           [](Program& p, const std::string& dtype, const std::string& rows, int64_t cols) {
             SAPWOOD_REQUIRE(rows == "T" || rows == "L", "value rows must be T or L, got \"", rows, "\"");
             const DType type = dtype == "q8" ? DType::kQ8 : ParseDType(dtype);
             p.values.push_back({type, rows == "T" ? RowSym::kT : RowSym::kL, cols});
             return p.values.size() - 1;
           })
      .def("slot", [](Program& p) { return p.num_weight_slots++; })
      .def("node", [](Program& p, const std::string& op, const std::string& segment, std::vector<int32_t> inputs,
                      std::vector<int32_t> outputs, std::vector<int32_t> weights, std::vector<int64_t> ints,
                      std::vector<double> floats, std::string name) {
        p.nodes.push_back({ParseOp(op), ParseSegment(segment), std::move(inputs), std::move(outputs),
                           std::move(weights), std::move(ints), std::move(floats), std::move(name)});
      });

  py::class_<WeightStore, std::shared_ptr<WeightStore>>(m, "WeightStore")
      .def(py::init([](const std::string& act, int32_t num_slots, const std::string& isa) {
             return std::make_shared<WeightStore>(ParseAct(act), num_slots, ParseIsa(isa.c_str()));
           }),
           py::arg("act"), py::arg("num_slots"), py::arg("isa") = "auto")
      .def_property_readonly("total_bytes", &WeightStore::total_bytes)
      .def(
          "fill",
          [](WeightStore& store, int32_t slot, const std::string& kind,
             const std::vector<std::tuple<uintptr_t, std::string, int64_t, int64_t, int64_t>>& parts,
             float dummy_scale, int32_t num_threads, const std::string& format_name) {
            const WeightFormat format = ParseFormat(format_name);
            std::vector<SlotPart> slot_parts;
            for (const auto& [address, dtype, rows, cols, stride] : parts) {
              slot_parts.push_back({reinterpret_cast<const void*>(address), ParseDType(dtype), rows, cols, stride});
            }
            const SlotKind slot_kind = ParseSlotKind(kind);
            py::gil_scoped_release release;
            if (num_threads <= 0) num_threads = UsableCpus();
            ThreadPool pool(num_threads);
            store.Fill(slot, slot_kind, slot_parts, &pool, dummy_scale, format);
          },
          py::arg("slot"), py::arg("kind"), py::arg("parts"), py::kw_only(), py::arg("dummy_scale") = 0.0f,
          py::arg("num_threads") = 0, py::arg("format") = "act")
      .def("alias", &WeightStore::Alias, py::arg("slot"), py::arg("of"));

  py::class_<PyCpuRunner, PyRunner>(m, "CpuRunner")
      .def(py::init([](const Program& program, std::shared_ptr<WeightStore> weights, std::vector<KvGroup> groups,
                       std::vector<int32_t> num_pages, int32_t num_kv_heads, int32_t head_dim, int32_t max_step_tokens,
                       int32_t num_threads, int32_t nice, const std::string& isa, bool int8_kv, bool debug) {
             CpuRunnerConfig config;
             config.groups = std::move(groups);
             config.num_pages = std::move(num_pages);
             config.num_kv_heads = num_kv_heads;
             config.head_dim = head_dim;
             config.max_step_tokens = max_step_tokens;
             config.num_threads = num_threads;
             config.nice = nice;
             config.isa = ParseIsa(isa.c_str());
             config.int8_kv = int8_kv;
             config.debug = debug;
             const Isa level = config.isa;
             return std::make_unique<PyCpuRunner>(
                 std::make_shared<CpuRunner>(program, std::move(weights), std::move(config)), level);
           }),
           py::arg("program"), py::arg("weights"), py::arg("groups"), py::arg("num_pages"), py::kw_only(),
           py::arg("num_kv_heads"), py::arg("head_dim"), py::arg("max_step_tokens"), py::arg("num_threads") = 0,
           py::arg("nice") = 0, py::arg("isa") = "auto", py::arg("int8_kv") = false,
           py::arg("debug") = false)
      .def_property_readonly("kv_bytes", [](PyCpuRunner& r) { return r->kv_bytes(); })
      .def_property_readonly("num_threads", [](PyCpuRunner& r) { return r->pool().num_threads(); })
      .def_property_readonly("isa", [](PyCpuRunner& r) { return IsaName(r.isa()); })
      .def("tap_logits", [](PyCpuRunner& r, bool on) { r->TapLogits(on); })
      .def("take_logits",
           [](PyCpuRunner& r) {
             py::list out;
             for (const LogitTap& tap : r->TakeLogits()) {
               out.append(py::make_tuple(tap.step_id, tap.row, tap.gen, tap.position, Copy<float>(tap.logits)));
             }
             return out;
           })
      .def(
          "read_kv",
          [](PyCpuRunner& r, int32_t group, int32_t layer, PageId page, int32_t offset) {
            return Bytes(r->ReadKv(group, layer, page, offset));
          },
          py::arg("group"), py::arg("layer_in_group"), py::arg("page"), py::arg("offset"))
      .def("poison_kv", [](PyCpuRunner& r) { r->PoisonKv(); })
      .def("stop_after", [](PyCpuRunner& r, const std::string& node) { r->StopAfter(node); })
      .def("dump", [](PyCpuRunner& r, const std::string& node) { return Bytes(r->Dump(node)); })
      .def("time_nodes", [](PyCpuRunner& r, bool on) { r->TimeNodes(on); })
      .def("node_times", [](PyCpuRunner& r) {
        py::list out;
        for (const NodeTime& t : r->NodeTimes()) out.append(py::make_tuple(t.name, t.calls, t.total_ns));
        return out;
      });
}

}  // namespace sapwood::bindings
