// The messages, the loop's BatchBuilder, and for executors written in Python a RowTable and the device's PlanPacker.
#include <limits>

#include "batch/batch_builder.h"
#include "batch/plan_packer.h"
#include "batch/row_table.h"
#include "batch/shared_prefix.h"
#include "bindings/bindings.h"
#include "program/sample_rows.h"
#include "sampling/sampler.h"

namespace sapwood::bindings {
namespace {

const char* PhaseName(RowPhase phase) {
  switch (phase) {
    case RowPhase::kFree: return "free";
    case RowPhase::kExtend: return "extend";
    case RowPhase::kDecode: return "decode";
    case RowPhase::kHeld: return "held";
    case RowPhase::kPaused: return "paused";
    case RowPhase::kDone: return "done";
  }
  return "?";
}

RowSpec MakeSpec(uint64_t ns, const Ints& tokens, int64_t prompt_len, int64_t max_len, int64_t min_len,
                 float temperature, int32_t top_k, float top_p, float min_p, uint64_t seed, uint32_t stream,
                 int32_t rope_mode, bool return_logprob, std::vector<int32_t> stop_ids,
                 const std::optional<Ints>& keys, bool masked) {
  RowSpec spec;
  spec.ns = ns;
  spec.masked = masked;
  auto view = View(tokens);
  spec.tokens.assign(view.begin(), view.end());
  if (keys) {
    auto key_view = View(*keys);
    spec.keys.assign(key_view.begin(), key_view.end());
  }
  spec.stop_ids = std::move(stop_ids);
  RowInit& init = spec.init;
  init.prompt_len = prompt_len;
  init.max_len = max_len;
  init.min_len = min_len;
  init.temperature = temperature;
  init.top_k = top_k;
  init.top_p = top_p;
  init.min_p = min_p;
  init.seed = seed;
  init.stream = stream;
  init.rope_mode = rope_mode;
  init.return_logprob = return_logprob;
  return spec;
}

py::tuple AdmittedTuple(const Admitted& a) { return py::make_tuple(a.row, a.gen, a.cached_len); }

// [L] arrays of SamplingRow's fields, by their names in cuda/sampling/params.h; banned ids as banned_indptr, banned_ids.
py::dict SamplingDict(const StepBatch& batch, const RowTable& rows) {
  std::vector<float> temperature, top_p, min_p;
  std::vector<int32_t> top_k, want_logprob, banned_indptr{0}, banned_ids;
  std::vector<uint64_t> seed;
  std::vector<uint32_t> stream;
  std::vector<int64_t> position;
  for (size_t l = 0; l < batch.logit_src.size(); ++l) {
    const SamplingRow row = SamplingOf(batch, rows, static_cast<int32_t>(l));
    temperature.push_back(row.temperature);
    top_p.push_back(row.top_p);
    min_p.push_back(row.min_p);
    top_k.push_back(row.top_k);
    want_logprob.push_back(row.want_logprob);
    seed.push_back(row.seed);
    stream.push_back(row.stream);
    position.push_back(row.position);
    banned_ids.insert(banned_ids.end(), row.banned.begin(), row.banned.end());
    banned_indptr.push_back(static_cast<int32_t>(banned_ids.size()));
  }
  py::dict out;
  out["temperature"] = Copy<float>(temperature);
  out["top_p"] = Copy<float>(top_p);
  out["min_p"] = Copy<float>(min_p);
  out["top_k"] = Copy<int32_t>(top_k);
  out["want_logprob"] = Copy<int32_t>(want_logprob);
  out["seed"] = Copy<uint64_t>(seed);
  out["stream"] = Copy<uint32_t>(stream);
  out["position"] = Copy<int64_t>(position);
  out["banned_indptr"] = Copy<int32_t>(banned_indptr);
  out["banned_ids"] = Copy<int32_t>(banned_ids);
  return out;
}

// Bytes that can be used in place.
bool IsBytes(const py::array& a) {
  return a.ndim() == 1 && a.dtype().equal(py::dtype::of<uint8_t>()) && (a.flags() & py::array::c_style) != 0;
}

// Prepare's arrays for a Python executor. The RowTable stays on this side.
py::dict PreparedDict(const StepPlan& plan, const StepBatch& batch, const RowTable& rows) {
  py::dict out;
  out["tokens"] = Copy<int32_t>(batch.tokens);
  out["positions"] = Copy<int64_t>(batch.positions);
  out["token_segment"] = Copy<int32_t>(batch.token_segment);
  out["logit_src"] = Copy<int32_t>(batch.logit_src);
  out["logit_segment"] = Copy<int32_t>(batch.logit_segment);
  std::vector<int32_t> logit_rows;
  for (const int32_t segment : batch.logit_segment) logit_rows.push_back(batch.segments[segment].row);
  out["logit_rows"] = Copy<int32_t>(logit_rows);
  out["logit_masked"] = Copy<uint8_t>(batch.logit_masked);
  out["skipped_items"] = batch.skipped_items;
  py::list segments, slots, tables, copies;
  for (const Segment& s : batch.segments) {
    segments.append(py::make_tuple(s.row, s.item, s.q_begin, s.q_len, s.kv_len, s.rope_mode));
  }
  const int32_t page_size = rows.groups()[0].page_size;
  for (size_t g = 0; g < rows.groups().size(); ++g) {
    slots.append(Copy<int64_t>(batch.slots[g]));
    py::list group_tables;
    for (size_t s = 0; s < batch.segments.size(); ++s) {
      const int64_t num_pages = (batch.segments[s].kv_len + page_size - 1) / page_size;
      group_tables.append(Copy<int32_t>(std::span<const PageId>(batch.page_tables[g][s], num_pages)));
    }
    tables.append(group_tables);
  }
  for (const PageCopy& copy : plan.copies) copies.append(py::make_tuple(copy.group, copy.src, copy.dst));
  out["segments"] = segments;
  out["slots"] = slots;
  out["page_tables"] = tables;
  out["copies"] = copies;
  out["sampling"] = SamplingDict(batch, rows);
  return out;
}

// (indptr, segments, lens), as attention_plan takes them.
py::tuple PrefixArrays(const std::vector<SharedPrefix>& prefixes, int64_t chunk_len) {
  std::vector<int32_t> indptr{0}, segments, lens;
  for (const SharedPrefix& prefix : prefixes) {
    segments.insert(segments.end(), prefix.segments.begin(), prefix.segments.end());
    indptr.push_back(static_cast<int32_t>(segments.size()));
    lens.push_back(static_cast<int32_t>(prefix.chunks * chunk_len));
  }
  return py::make_tuple(Copy<int32_t>(indptr), Copy<int32_t>(segments), Copy<int32_t>(lens));
}

py::tuple SharedPrefixArrays(const py::array_t<PageId, py::array::c_style>& page_table,
                             const py::array_t<int64_t, py::array::c_style>& tokens, int64_t page_size,
                             int64_t chunk_len) {
  SAPWOOD_REQUIRE(page_table.ndim() == 2 && tokens.ndim() == 1 && tokens.shape(0) == page_table.shape(0),
                  "find_shared_prefixes: page_table must be [segments, pages] and tokens [segments], got ",
                  page_table.ndim(), " and ", tokens.ndim(), " dimensions, ", page_table.size(), " and ", tokens.size(),
                  " elements");
  SAPWOOD_REQUIRE(page_size > 0 && chunk_len > 0, "find_shared_prefixes: page_size and chunk_len must be positive, got ",
                  page_size, " and ", chunk_len);
  const int64_t width = page_table.shape(1);
  std::vector<PrefixReader> readers;
  for (int64_t s = 0; s < tokens.shape(0); ++s) {
    const int64_t num_tokens = tokens.data()[s];
    SAPWOOD_REQUIRE(num_tokens <= width * page_size, "find_shared_prefixes: tokens of segment ", s, " must be at most ",
                    width * page_size, ", which page_table has room for, got ", num_tokens);
    if (num_tokens > 0) {
      readers.push_back({static_cast<int32_t>(s), page_table.data() + s * width, num_tokens});
    }
  }
  return PrefixArrays(FindSharedPrefixes(std::move(readers), page_size, chunk_len), chunk_len);
}

}  // namespace

void BindBatch(py::module_& m) {
  m.def("find_shared_prefixes", &SharedPrefixArrays, py::arg("page_table").noconvert(), py::arg("tokens").noconvert(),
        py::arg("page_size"), py::arg("chunk_len"));
  m.attr("FINISHED_STOP") = static_cast<int>(kFinishedStop);
  m.attr("FINISHED_LENGTH") = static_cast<int>(kFinishedLength);
  m.attr("HELD") = static_cast<int>(kHeld);
  m.attr("BAD_LOGITS") = static_cast<int>(kBadLogits);
  m.attr("SKIPPED") = static_cast<int>(kSkipped);

  py::class_<StepPlan, std::shared_ptr<StepPlan>>(m, "StepPlan")
      .def_readonly("step_id", &StepPlan::step_id)
      .def_property_readonly("num_items", [](const StepPlan& p) { return p.items.size(); })
      .def_property_readonly("num_tokens",
                             [](const StepPlan& p) {
                               int64_t n = 0;
                               for (const PlanItem& item : p.items) n += item.q_len;
                               return n;
                             })
      .def_readonly("mask_rows", &StepPlan::mask_rows)
      .def("items",
           [](const StepPlan& p) {
             py::list out;
             for (const PlanItem& i : p.items) {
               out.append(py::make_tuple(i.row, i.gen, ItemKindName(i.kind), i.q_len, i.logit_from));
             }
             return out;
           })
      .def("serialize",
           [](const StepPlan& p) {
             auto bytes = p.Serialize();
             return py::bytes(reinterpret_cast<const char*>(bytes.data()), bytes.size());
           })
      .def_static("deserialize", [](const py::bytes& data) {
        std::string_view view = data;
        return std::make_shared<StepPlan>(
            StepPlan::Deserialize(reinterpret_cast<const uint8_t*>(view.data()), view.size()));
      });

  py::class_<StepResult, std::shared_ptr<StepResult>>(m, "StepResult")
      .def_readonly("step_id", &StepResult::step_id)
      .def("items",
           [](const StepResult& r) {
             py::list out;
             for (const ResultItem& i : r.items) {
               out.append(py::make_tuple(i.row, i.gen, i.n, i.token_begin, static_cast<int>(i.flags)));
             }
             return out;
           })
      .def_readonly("tokens", &StepResult::tokens)
      .def_readonly("logprobs", &StepResult::logprobs)
      .def_readonly("num_tokens", &StepResult::num_tokens)
      .def_readonly("num_kv", &StepResult::num_kv)
      .def_readonly("num_logit_rows", &StepResult::num_logit_rows)
      // An executor in Python knows the times.
      .def_readwrite("start_ns", &StepResult::start_ns)
      .def_readwrite("head_ns", &StepResult::head_ns)
      .def_readwrite("done_ns", &StepResult::done_ns)
      .def_readonly("error", &StepResult::error);

  py::class_<BuiltStep>(m, "BuiltStep")
      .def_readonly("plan", &BuiltStep::plan)
      .def_readonly("blocked", &BuiltStep::blocked)
      .def_readonly("num_extend_tokens", &BuiltStep::num_extend_tokens)
      .def_readonly("num_decode_rows", &BuiltStep::num_decode_rows)
      .def_readonly("num_resume_rows", &BuiltStep::num_resume_rows)
      .def_readonly("num_kv", &BuiltStep::num_kv)
      .def_readonly("num_logit_rows", &BuiltStep::num_logit_rows);

  py::class_<BatchBuilder>(m, "BatchBuilder")
      .def(py::init<CacheManager*, int32_t>(), py::arg("cache"), py::arg("max_rows"), py::keep_alive<1, 2>())
      .def_property_readonly("num_free_rows", &BatchBuilder::num_free_rows)
      .def(
          "admit",
          [](BatchBuilder& b, uint64_t ns, const Ints& tokens, int64_t prompt_len, int64_t max_len, int64_t min_len,
             float temperature, int32_t top_k, float top_p, float min_p, uint64_t seed, uint32_t stream,
             int32_t rope_mode, bool return_logprob, std::vector<int32_t> stop_ids, const std::optional<Ints>& keys,
             bool masked) {
            return AdmittedTuple(b.Admit(MakeSpec(ns, tokens, prompt_len, max_len, min_len, temperature, top_k, top_p,
                                                  min_p, seed, stream, rope_mode, return_logprob, std::move(stop_ids),
                                                  keys, masked)));
          },
          py::arg("ns"), py::arg("tokens"), py::kw_only(), py::arg("prompt_len"), py::arg("max_len"),
          py::arg("min_len") = 0, py::arg("temperature") = 1.0f, py::arg("top_k") = 0, py::arg("top_p") = 1.0f,
          py::arg("min_p") = 0.0f, py::arg("seed") = 0, py::arg("stream") = 0, py::arg("rope_mode") = 0,
          py::arg("return_logprob") = false, py::arg("stop_ids") = std::vector<int32_t>{},
          py::arg("keys") = py::none(), py::arg("masked") = false)
      .def(
          "admit_fork",
          [](BatchBuilder& b, int32_t parent, int64_t at, uint64_t ns, const Ints& tokens, int64_t prompt_len,
             int64_t max_len, int64_t min_len, float temperature, int32_t top_k, float top_p, float min_p,
             uint64_t seed, uint32_t stream, int32_t rope_mode, bool return_logprob, std::vector<int32_t> stop_ids,
             const std::optional<Ints>& keys, bool masked) {
            return AdmittedTuple(b.AdmitFork(
                parent, at,
                MakeSpec(ns, tokens, prompt_len, max_len, min_len, temperature, top_k, top_p, min_p, seed, stream,
                         rope_mode, return_logprob, std::move(stop_ids), keys, masked)));
          },
          py::arg("parent"), py::arg("at"), py::arg("ns"), py::arg("tokens"), py::kw_only(), py::arg("prompt_len"),
          py::arg("max_len"), py::arg("min_len") = 0, py::arg("temperature") = 1.0f, py::arg("top_k") = 0,
          py::arg("top_p") = 1.0f, py::arg("min_p") = 0.0f, py::arg("seed") = 0, py::arg("stream") = 0,
          py::arg("rope_mode") = 0, py::arg("return_logprob") = false, py::arg("stop_ids") = std::vector<int32_t>{},
          py::arg("keys") = py::none(), py::arg("masked") = false)
      .def("begin_step", &BatchBuilder::BeginStep, py::arg("step_id"))
      .def("add_decodes", &BatchBuilder::AddDecodes)
      .def("add_extend", &BatchBuilder::AddExtend, py::arg("row"), py::arg("max_tokens"))
      .def("end_step", &BatchBuilder::EndStep)
      .def("commit",
           [](BatchBuilder& b, const StepResult& result) {
             Committed c = b.Commit(result);
             return py::make_tuple(c.rows, c.tokens, std::vector<int>(c.flags.begin(), c.flags.end()), c.logprobs);
           })
      .def("mask_posted", &BatchBuilder::MaskPosted, py::arg("row"), py::arg("position"))
      .def("pause", &BatchBuilder::Pause)
      .def("resume", &BatchBuilder::Resume)
      .def("release", &BatchBuilder::Release, py::arg("row"), py::arg("keep") = true, py::arg("failed") = false)
      .def("pending_prefix",
           [](const BatchBuilder& b, uint64_t ns, const Ints& keys) { return b.PendingPrefix(ns, View(keys)); })
      .def("phase", [](const BatchBuilder& b, int32_t row) { return PhaseName(b.phase(row)); })
      .def("gen", &BatchBuilder::gen)
      .def("num_tokens", &BatchBuilder::num_tokens)
      .def("tokens", [](const BatchBuilder& b, int32_t row) { return Copy<int32_t>(b.tokens(row)); })
      .def("planned_len", &BatchBuilder::planned_len)
      .def("cached_len", &BatchBuilder::cached_len)
      .def("in_flight", &BatchBuilder::in_flight)
      .def("valid", &BatchBuilder::valid)
      .def(
          "pages",
          [](const BatchBuilder& b, int32_t row, int group) { return Copy<int32_t>(b.pages(row, group)); },
          py::arg("row"), py::arg("group") = 0)
      .def("check_invariants", &BatchBuilder::CheckInvariants);

  // `prepare`, and `sample` or `commit`, are one step: the batch prepared last is what is committed to.
  struct PyRowTable {
    RowTable rows;
    StepBatch batch;
  };
  py::class_<PyRowTable>(m, "RowTable")
      .def(py::init([](std::vector<KvGroup> groups, int32_t max_rows, int32_t vocab_size) {
             return std::make_unique<PyRowTable>(PyRowTable{RowTable(std::move(groups), max_rows, vocab_size), {}});
           }),
           py::arg("groups"), py::arg("max_rows"), py::arg("vocab_size") = 0)
      .def(
          "post_mask",
          [](PyRowTable& t, int32_t row, uint32_t gen, int64_t position, const MaskWords& bits) {
            t.rows.PostMask(row, gen, position, View(bits));
          },
          py::arg("row"), py::arg("gen"), py::arg("position"), py::arg("bits"))
      .def("prepare",
           [](PyRowTable& t, const StepPlan& plan) {
             t.rows.ApplyRowOps(plan);
             t.rows.Prepare(plan, &t.batch);
             return PreparedDict(plan, t.batch, t.rows);
           })
      .def(
          "sample",
          [](PyRowTable& t, const StepPlan& plan, const py::dict&,
             const py::array_t<float, py::array::c_style | py::array::forcecast>& logits) {
            SAPWOOD_REQUIRE(t.batch.step_id == plan.step_id, "sample: the step prepared last is ", t.batch.step_id,
                            ", not ", plan.step_id);
            SAPWOOD_REQUIRE(logits.ndim() == 2 && logits.shape(0) == static_cast<int64_t>(t.batch.logit_src.size()),
                            "sample: logits must be [", t.batch.logit_src.size(), ", vocab] f32");
            std::vector<SampledToken> sampled(t.batch.logit_src.size());
            const int32_t vocab = static_cast<int32_t>(logits.shape(1));
            std::vector<float> scratch(SamplerScratch(vocab));
            for (size_t l = 0; l < sampled.size(); ++l) {
              sampled[l] = SampleLogitRow(t.batch, t.rows, static_cast<int32_t>(l), logits.data() + l * vocab, nullptr,
                                          vocab, scratch.data());
            }
            return FinishStep(plan, t.batch, sampled, &t.rows);
          },
          py::arg("plan"), py::arg("prepared"), py::arg("logits"))
      .def(
          "commit",
          [](PyRowTable& t, const StepPlan& plan, const py::array_t<int32_t>& tokens, const py::array_t<float>& logprobs,
             const py::array_t<int32_t>& bad, const py::array_t<bool>& held) {
            SAPWOOD_REQUIRE(t.batch.step_id == plan.step_id, "commit: the step prepared last is ", t.batch.step_id,
                            ", not ", plan.step_id);
            const auto num_rows = static_cast<int64_t>(t.batch.logit_src.size());
            SAPWOOD_REQUIRE(tokens.ndim() == 1 && tokens.shape(0) == num_rows && logprobs.ndim() == 1 &&
                                logprobs.shape(0) == num_rows && bad.ndim() == 1 && bad.shape(0) == num_rows,
                            "commit: tokens, logprobs and bad must be [", num_rows, "]");
            SAPWOOD_REQUIRE(held.ndim() == 1 && (held.shape(0) == num_rows || held.shape(0) == 0),
                            "commit: held must be [", num_rows, "] or left out");
            std::vector<SampledToken> sampled(num_rows);
            for (int64_t l = 0; l < num_rows; ++l) {
              SAPWOOD_REQUIRE(!t.batch.logit_masked[l] || held.shape(0) > 0, "commit: logit row ", l, " is to be drawn "
                              "under a mask; say by `held` whether it was there");
              sampled[l] = {tokens.at(l), logprobs.at(l), bad.at(l) != 0, held.shape(0) > 0 && held.at(l)};
              SAPWOOD_REQUIRE(t.batch.logit_masked[l] || !sampled[l].held, "commit: logit row ", l, " needs no mask, "
                              "`held` says that it is late");
            }
            return FinishStep(plan, t.batch, sampled, &t.rows);
          },
          py::arg("plan"), py::arg("tokens"), py::arg("logprobs"), py::arg("bad"),
          py::arg("held") = py::array_t<bool>(0))
      // What an executor reports of a step that raised: no items, only why.
      .def_static(
          "fail",
          [](const StepPlan& plan, std::string error) {
            auto result = std::make_shared<StepResult>();
            result->step_id = plan.step_id;
            result->error = std::move(error);
            return result;
          },
          py::arg("plan"), py::arg("error"));

  py::class_<PackedPlan>(m, "PackedPlan")
      .def_readonly("step_id", &PackedPlan::step_id)
      .def_readonly("sequence", &PackedPlan::sequence)
      .def_readonly("num_bytes", &PackedPlan::num_bytes)
      .def_property_readonly("num_items", [](const PackedPlan& p) { return p.q_lens.size(); })
      .def_readonly("num_tokens", &PackedPlan::num_tokens)
      .def_readonly("num_logit_rows", &PackedPlan::num_logit_rows)
      .def_readonly("max_q_len", &PackedPlan::max_q_len)
      .def_readonly("max_kv_bound", &PackedPlan::max_kv_bound)
      .def_readonly("any_logprob", &PackedPlan::any_logprob)
      .def_readonly("any_banned", &PackedPlan::any_banned)
      .def_property_readonly("q_lens", [](const PackedPlan& p) { return Copy<int32_t>(p.q_lens); })
      .def_property_readonly("kv_bounds", [](const PackedPlan& p) { return Copy<int64_t>(p.kv_bounds); })
      .def_property_readonly("copies", [](const PackedPlan& p) {
        py::list copies;
        for (const PageCopy& copy : p.copies) copies.append(py::make_tuple(copy.group, copy.src, copy.dst));
        return copies;
      })
      .def_property_readonly("num_masked", [](const PackedPlan& p) { return p.masked.size(); })
      .def_property_readonly("masked", [](const PackedPlan& p) {
        py::list masked;
        for (const MaskedLogitRow& m : p.masked) {
          masked.append(py::make_tuple(m.logit_row, m.row, m.gen, m.position, m.query));
        }
        return masked;
      });

  py::class_<PackedMasks>(m, "PackedMasks")
      .def_readonly("num_bytes", &PackedMasks::num_bytes)
      .def_readonly("num_held", &PackedMasks::num_held)
      .def_readonly("num_masks", &PackedMasks::num_masks)
      .def_readonly("mask_index", &PackedMasks::mask_index)
      .def_readonly("masks", &PackedMasks::masks);

  const auto writeable = [](py::array& out) -> std::span<uint8_t> {
    SAPWOOD_REQUIRE(IsBytes(out) && out.writeable(), "out must be a writeable, contiguous uint8 array, got ",
                    std::string(py::str(out.dtype())), " of ", out.ndim(), " dimensions");
    return {static_cast<uint8_t*>(out.mutable_data()), static_cast<size_t>(out.size())};
  };
  py::class_<PlanPacker>(m, "PlanPacker")
      .def(py::init<std::vector<KvGroup>, int32_t, int32_t, int32_t, int32_t>(), py::arg("groups"), py::arg("max_rows"),
           py::kw_only(), py::arg("max_pages"), py::arg("max_stop_ids"), py::arg("vocab_size"))
      .def("bytes_needed", &PlanPacker::BytesNeeded, py::arg("plan"))
      .def_property_readonly("result_bytes", &PlanPacker::ResultBytes)
      .def(
          "pack",
          [writeable](PlanPacker& packer, const StepPlan& plan, py::array& out) {
            return packer.Pack(plan, writeable(out));
          },
          py::arg("plan"), py::arg("out"))
      .def(
          "post_mask",
          [](PlanPacker& packer, int32_t row, uint32_t gen, int64_t position, const MaskWords& bits) {
            packer.PostMask(row, gen, position, View(bits));
          },
          py::arg("row"), py::arg("gen"), py::arg("position"), py::arg("bits"))
      .def("masks_posted", &PlanPacker::MasksPosted, py::arg("packed"))
      .def("mask_bytes", &PlanPacker::MaskBytes, py::arg("packed"))
      .def(
          "pack_masks",
          [writeable](PlanPacker& packer, const PackedPlan& packed, py::array& out) {
            return packer.PackMasks(packed, writeable(out));
          },
          py::arg("packed"), py::arg("out"))
      .def("drop_masks", &PlanPacker::DropMasks, py::arg("plan"), py::arg("result"))
      .def_property_readonly("num_masks", &PlanPacker::num_masks)
      .def(
          "shared_prefixes",
          [](const PlanPacker& packer, const StepPlan& plan, int64_t chunk_len) {
            return PrefixArrays(packer.SharedPrefixes(plan, chunk_len), chunk_len);
          },
          py::arg("plan"), py::arg("chunk_len"))
      .def("fail", &PlanPacker::Fail, py::arg("plan"));
  m.def(
      "finish_packed",
      [](const StepPlan& plan, const py::array& block, int64_t sequence) {
        SAPWOOD_REQUIRE(IsBytes(block), "result_block must be a contiguous uint8 array, got ",
                        std::string(py::str(block.dtype())), " of ", block.ndim(), " dimensions");
        return FinishPacked(plan, {static_cast<const uint8_t*>(block.data()), static_cast<size_t>(block.size())},
                            sequence);
      },
      py::arg("plan"), py::arg("result_block"), py::arg("sequence") = 0);
}

}  // namespace sapwood::bindings
