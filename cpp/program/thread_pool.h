// A pool of compute threads for one executor: tiles are claimed dynamically, threads spin briefly, then park.
//
// Dynamic claiming because the event loop preempts one of the cores: a static split would stall both on it.
// A tile is the unit of work and of rounding, so results do not depend on the number of threads, nor on the runs.
#pragma once

#include <cstdint>
#include <memory>

namespace sapwood {

// Cores this process may use: the affinity mask, cut to the cgroup CPU quota (v2 and v1), at least 1.
int32_t UsableCpus();

class ThreadPool {
 public:
  // num_threads counts the calling thread: num_threads - 1 workers are started. nice: their scheduling niceness.
  explicit ThreadPool(int32_t num_threads, int32_t nice = 0);
  ~ThreadPool();

  int32_t num_threads() const;

  // fn(context, tile, thread) for every tile in [0, num_tiles), on the caller and the workers; returns when
  // all are done. Not reentrant. fn must not throw.
  using TileFn = void (*)(void* context, int64_t tile, int32_t thread);
  void ParallelFor(int64_t num_tiles, TileFn fn, void* context);

  template <typename F>
  void ParallelFor(int64_t num_tiles, F&& f) {
    ParallelFor(
        num_tiles,
        [](void* c, int64_t tile, int32_t thread) { (*static_cast<std::remove_reference_t<F>*>(c))(tile, thread); },
        &f);
  }

  // The same for tiles that go well together with the next one: fn(context, begin, end, thread) for runs that cover
  // [0, num_tiles), of up to max_run. A thread walks through a share of its own, in order and in ever shorter runs,
  // then takes the last half of what another has left. num_tiles < 2^32.
  using RunFn = void (*)(void* context, int64_t begin, int64_t end, int32_t thread);
  void ParallelForRuns(int64_t num_tiles, int64_t max_run, RunFn fn, void* context);

  template <typename F>
  void ParallelForRuns(int64_t num_tiles, int64_t max_run, F&& f) {
    ParallelForRuns(
        num_tiles, max_run,
        [](void* c, int64_t begin, int64_t end, int32_t thread) {
          (*static_cast<std::remove_reference_t<F>*>(c))(begin, end, thread);
        },
        &f);
  }

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace sapwood
