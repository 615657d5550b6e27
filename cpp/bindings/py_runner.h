// A runner as Python holds it: handed over to an Executor once, yet still reachable for taps and dumps.
#pragma once

#include <memory>

#include "base/check.h"
#include "program/runner.h"

namespace sapwood::bindings {

// Forwards to a runner shared by the Executor and the Python object that made it.
class SharedRunner : public Runner {
 public:
  explicit SharedRunner(std::shared_ptr<Runner> inner) : inner_(std::move(inner)) {}
  void CopyPages(std::span<const PageCopy> copies) override { inner_->CopyPages(copies); }
  void Forward(const StepBatch& batch, const RowTable& rows) override { inner_->Forward(batch, rows); }
  void Head(const StepBatch& batch, const RowTable& rows, std::span<SampledToken> out) override {
    inner_->Head(batch, rows, out);
  }
  int32_t vocab_size() const override { return inner_->vocab_size(); }

 private:
  std::shared_ptr<Runner> inner_;
};

class PyRunner {
 public:
  explicit PyRunner(std::shared_ptr<Runner> runner) : runner_(std::move(runner)) {}
  virtual ~PyRunner() = default;
  PyRunner(PyRunner&&) = default;

  // An Executor runs it on a thread of its own, so two executors must not share one.
  std::unique_ptr<Runner> HandOver() {
    SAPWOOD_REQUIRE(!handed_over_, "this runner already belongs to an Executor; make another one");
    handed_over_ = true;
    return std::make_unique<SharedRunner>(runner_);
  }

 protected:
  std::shared_ptr<Runner> runner_;

 private:
  bool handed_over_ = false;
};

}  // namespace sapwood::bindings
