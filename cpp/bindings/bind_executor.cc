// Executor, its traces, and the runners that have no model.
#include "bindings/bindings.h"
#include "bindings/py_runner.h"
#include "program/executor.h"
#include "program/fake_runners.h"

namespace sapwood::bindings {

namespace {

// The last reference may go while a long step runs: joining it must not stop every other Python thread.
struct DeleteWithoutGil {
  void operator()(Executor* executor) const {
    const py::gil_scoped_release release;
    std::default_delete<Executor>()(executor);
  }
};

}  // namespace

void BindExecutor(py::module_& m) {
  py::class_<PyRunner>(m, "Runner");
  m.def(
      "checksum_runner",
      [](std::vector<KvGroup> groups, std::vector<int32_t> num_pages, int32_t vocab_size, uint64_t stall_seed,
         int32_t stall_us, int32_t bad_every, int32_t fail_every) {
        return PyRunner(MakeChecksumRunner(
            {std::move(groups), std::move(num_pages), vocab_size, stall_seed, stall_us, bad_every, fail_every}));
      },
      py::arg("groups"), py::arg("num_pages"), py::arg("vocab_size") = 1000, py::kw_only(), py::arg("stall_seed") = 0,
      py::arg("stall_us") = 0, py::arg("bad_every") = 0, py::arg("fail_every") = 0);
  m.def(
      "checksum_next_token",
      [](const std::vector<KvGroup>& groups, int32_t vocab_size, const Ints& tokens,
         const std::optional<MaskWords>& mask) {
        const auto view = View(tokens);
        const auto words = mask ? View(*mask) : std::span<const uint32_t>();
        SAPWOOD_REQUIRE(!mask || static_cast<int64_t>(words.size()) * 32 >= vocab_size, "mask: expected a bit for each "
                        "of ", vocab_size, " tokens, got ", words.size(), " words");
        return ChecksumNextToken(groups, vocab_size, view.data(), static_cast<int64_t>(view.size()), words);
      },
      py::arg("groups"), py::arg("vocab_size"), py::arg("tokens"), py::arg("mask") = py::none());
  m.def(
      "noop_runner",
      [](int32_t token, int32_t forward_us, int32_t head_us) {
        return PyRunner(MakeNoopRunner(token, forward_us, head_us));
      },
      py::arg("token"), py::arg("forward_us") = 0, py::arg("head_us") = 0);

  py::class_<StepTrace>(m, "StepTrace")
      .def_readonly("step_id", &StepTrace::step_id)
      .def_readonly("submit_ns", &StepTrace::submit_ns)
      .def_readonly("start_ns", &StepTrace::start_ns)
      .def_readonly("head_ns", &StepTrace::head_ns)
      .def_readonly("done_ns", &StepTrace::done_ns)
      .def_readonly("num_extend_items", &StepTrace::num_extend_items)
      .def_readonly("num_decode_items", &StepTrace::num_decode_items);

  py::class_<Executor, std::unique_ptr<Executor, DeleteWithoutGil>>(m, "Executor")
      .def(py::init([](PyRunner& runner, std::vector<KvGroup> groups, int32_t max_rows, int32_t trace_capacity,
                       int32_t recorder_capacity, int32_t nice) {
             ExecutorConfig config;
             config.groups = std::move(groups);
             config.max_rows = max_rows;
             config.trace_capacity = trace_capacity;
             config.recorder_capacity = recorder_capacity;
             config.nice = nice;
             return std::unique_ptr<Executor, DeleteWithoutGil>(
                 std::make_unique<Executor>(runner.HandOver(), std::move(config)).release());
           }),
           py::arg("runner"), py::arg("groups"), py::arg("max_rows"), py::kw_only(), py::arg("trace_capacity") = 0,
           py::arg("recorder_capacity") = 0, py::arg("nice") = 0)
      .def_property_readonly("queued", &Executor::queued)
      .def(
          "post_mask",
          [](Executor& e, int32_t row, uint32_t gen, int64_t position, const MaskWords& bits) {
            e.PostMask(row, gen, position, View(bits));
          },
          py::arg("row"), py::arg("gen"), py::arg("position"), py::arg("bits"))
      .def("submit", [](Executor& e, std::shared_ptr<StepPlan> plan) { e.Submit(std::move(plan)); })
      .def("drain",
           [](Executor& e) {
             std::vector<ExecutorEvent> events = e.Drain();
             py::list out(events.size());
             for (size_t i = 0; i < events.size(); ++i) {
               ExecutorEvent& event = events[i];
               const bool head = event.kind == ExecutorEvent::Kind::kHead;
               py::object result = py::none();
               if (!head) result = py::cast(std::make_shared<StepResult>(std::move(event.result)));
               out[i] = py::make_tuple(head ? "head" : "result", event.step_id, std::move(result));
             }
             return out;
           })
      .def("fileno", &Executor::fd)
      .def("wait_idle", &Executor::WaitIdle, py::call_guard<py::gil_scoped_release>())
      .def("shutdown", &Executor::Shutdown, py::call_guard<py::gil_scoped_release>())
      .def("take_trace", &Executor::TakeTrace)
      .def("recorded_plans", [](const Executor& e) {
        py::list out;
        for (const auto& bytes : e.RecordedPlans()) {
          out.append(py::bytes(reinterpret_cast<const char*>(bytes.data()), bytes.size()));
        }
        return out;
      });
}

}  // namespace sapwood::bindings
