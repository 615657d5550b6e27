// The pool of compute threads: CpuRunner calls ParallelFor once per phase of a node, some hundred times a step.
//
// Protocol. A job is published under a new epoch together with an "open" bit and a count of joined workers, all in
// one atomic word. A worker joins by compare-and-swap while the job is open, claims tiles, and leaves. The caller works
// too, closes the job when no tile is left to claim, and waits for those who joined only: a worker that the event loop
// has preempted before it joined costs nothing. A job's fields may be read between join and leave.
//
// Tiles are claimed from one counter (ParallelFor), or in runs (ParallelForRuns): each thread has a share of them in a
// word of its own, and who has none left steals half of another's. A word is all there is to know of a share, so a thief
// who finds the value that he read may take from it, whatever happened meanwhile.
#include "program/thread_pool.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "base/check.h"
#include "program/fp_mode.h"

namespace sapwood {
namespace {

// Long enough to bridge the caller's work between two nodes, short enough not to be seen as load by an idle server.
constexpr int64_t kSpinNs = 40'000;
// More threads than cores: whoever spins keeps the one that has the work from running.
constexpr int64_t kSpinOversubscribedNs = 2'000;

constexpr uint64_t kOpen = uint64_t{1} << 31;
constexpr uint64_t kJoinedMask = kOpen - 1;

void FutexWait(std::atomic<uint32_t>* word, uint32_t expected) {
  static_assert(sizeof(std::atomic<uint32_t>) == 4 && std::atomic<uint32_t>::is_always_lock_free);
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), FUTEX_WAIT_PRIVATE, expected, nullptr, nullptr, 0);
}

void FutexWake(std::atomic<uint32_t>* word, int count) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), FUTEX_WAKE_PRIVATE, count, nullptr, nullptr, 0);
}

int64_t NowNs() {
  timespec ts;
  clock_gettime(CLOCK_MONOTONIC, &ts);
  return int64_t{ts.tv_sec} * 1'000'000'000 + ts.tv_nsec;
}

void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Spins until ready() or the time is over; says which. Now and then it yields: a kernel that preempts lazily
// (Linux >= 6.13) leaves the event loop, woken on this core by the head event, waiting for the next tick, 1 to 4 ms,
// while a thread that never enters the kernel spins. The head is hardly longer, and the plan would come late.
template <typename Ready>
bool SpinFor(int64_t ns, Ready ready) {
  const int64_t end = NowNs() + ns;
  do {
    for (int i = 0; i < 128; ++i) {
      if (ready()) return true;
      Pause();
    }
    sched_yield();
  } while (NowNs() < end);
  return ready();
}

// Which pool's tile this thread is inside of, so that a nested ParallelFor can run inline instead of deadlocking.
struct Inside {
  const void* pool = nullptr;
  int32_t thread = 0;
};
thread_local Inside t_inside;

class ScopedInside {
 public:
  ScopedInside(const void* pool, int32_t thread) : saved_(t_inside) { t_inside = {pool, thread}; }
  ~ScopedInside() { t_inside = saved_; }
  ScopedInside(const ScopedInside&) = delete;
  ScopedInside& operator=(const ScopedInside&) = delete;

 private:
  Inside saved_;
};

// CPUs' worth of quota of one cgroup v2 directory, or a negative number when it sets none.
double QuotaV2(const std::string& dir) {
  std::ifstream in(dir + "/cpu.max");
  std::string quota;
  double period = 0;
  if (!(in >> quota >> period) || quota == "max" || period <= 0) return -1;
  return std::atof(quota.c_str()) / period;
}

double QuotaV1(const std::string& dir) {
  std::ifstream quota_in(dir + "/cpu.cfs_quota_us"), period_in(dir + "/cpu.cfs_period_us");
  double quota = 0, period = 0;
  if (!(quota_in >> quota) || !(period_in >> period) || quota <= 0 || period <= 0) return -1;
  return quota / period;
}

// The smallest quota on the way from the process's own cgroup to the root of its hierarchy.
template <typename Quota>
double TightestQuota(const std::string& mount, std::string path, Quota quota) {
  double best = -1;
  for (;;) {
    const double q = quota(mount + path);
    if (q > 0 && (best < 0 || q < best)) best = q;
    const size_t slash = path.find_last_of('/');
    if (path.empty() || slash == std::string::npos) break;
    path.resize(slash);
  }
  return best;
}

double CgroupCpus() {
  double best = -1;
  const auto take = [&best](double q) {
    if (q > 0 && (best < 0 || q < best)) best = q;
  };
  // In a container's cgroup namespace the listed path may not exist under the mount; the mount's root then holds.
  take(QuotaV2("/sys/fs/cgroup"));
  take(QuotaV1("/sys/fs/cgroup/cpu"));
  take(QuotaV1("/sys/fs/cgroup/cpu,cpuacct"));
  std::ifstream in("/proc/self/cgroup");
  std::string line;  // "0::/path" (v2) or "3:cpu,cpuacct:/path" (v1)
  while (std::getline(in, line)) {
    const size_t a = line.find(':');
    const size_t b = a == std::string::npos ? a : line.find(':', a + 1);
    if (b == std::string::npos) continue;
    const std::string controllers = line.substr(a + 1, b - a - 1), path = line.substr(b + 1);
    if (controllers.empty()) {
      take(TightestQuota("/sys/fs/cgroup", path, QuotaV2));
      take(TightestQuota("/sys/fs/cgroup/unified", path, QuotaV2));
    } else if (("," + controllers + ",").find(",cpu,") != std::string::npos) {
      take(TightestQuota("/sys/fs/cgroup/" + controllers, path, QuotaV1));
      take(TightestQuota("/sys/fs/cgroup/cpu", path, QuotaV1));
    }
  }
  return best;
}

int32_t AffinityCpus() {
  // The mask's size is the kernel's, which may be larger than cpu_set_t: grow until it fits.
  for (int cpus = 1024; cpus <= 1 << 18; cpus *= 4) {
    cpu_set_t* set = CPU_ALLOC(cpus);
    if (set == nullptr) break;
    const size_t bytes = CPU_ALLOC_SIZE(cpus);
    const int rc = sched_getaffinity(0, bytes, set);
    const int32_t count = rc == 0 ? CPU_COUNT_S(bytes, set) : 0;
    CPU_FREE(set);
    if (rc == 0) return std::max(1, count);
  }
  return static_cast<int32_t>(std::max(1u, std::thread::hardware_concurrency()));
}

}  // namespace

int32_t UsableCpus() {
  const int32_t cpus = AffinityCpus();
  const double quota = CgroupCpus();
  if (quota <= 0) return cpus;
  // Rounded down: one thread more than the quota is throttled in the middle of a step, and all wait for it.
  return std::clamp(static_cast<int32_t>(quota + 1e-6), 1, cpus);
}

struct ThreadPool::Impl {
  int32_t num_threads = 1;
  int32_t nice = 0;
  int64_t spin_ns = kSpinNs;
  const pid_t pid = getpid();  // a forked child has this object, but not its threads
  std::vector<std::thread> workers;

  // The job. Written by the caller while no job is open and none has joined; read between join and leave.
  TileFn fn = nullptr;  // or run_fn
  RunFn run_fn = nullptr;
  void* context = nullptr;
  int64_t num_tiles = 0, max_run = 0;
  alignas(64) std::atomic<int64_t> next_tile{0};
  struct alignas(64) Share {
    std::atomic<uint64_t> left{0};  // begin << 32 | end
  };
  std::unique_ptr<Share[]> shares;  // [thread]
  // epoch << 32 | open << 31 | joined workers
  alignas(64) std::atomic<uint64_t> state{0};
  // The epoch again, as the word parked workers wait on (a join must not disturb them).
  alignas(64) std::atomic<uint32_t> epoch{0};
  std::atomic<int32_t> sleepers{0};
  std::atomic<uint32_t> caller_parked{0};
  std::atomic<bool> stop{false};
  std::atomic<bool> busy{false};

  static uint64_t Pack(int64_t begin, int64_t end) {
    return static_cast<uint64_t>(begin) << 32 | static_cast<uint64_t>(end);
  }
  static int64_t Begin(uint64_t left) { return static_cast<int64_t>(left >> 32); }
  static int64_t End(uint64_t left) { return static_cast<int64_t>(left & 0xffffffffu); }

  void Work(int32_t thread) {
    const ScopedInside inside(this, thread);
    if (run_fn != nullptr) {
      WalkShare(thread);
    } else {
      RunTiles(thread);
    }
  }

  void WalkShare(int32_t thread) {
    std::atomic<uint64_t>& mine = shares[thread].left;
    do {
      uint64_t left = mine.load(std::memory_order_relaxed);
      while (Begin(left) < End(left)) {
        const int64_t begin = Begin(left), end = End(left);
        const int64_t stop = begin + std::clamp<int64_t>((end - begin) / 2, 1, max_run);
        if (!mine.compare_exchange_weak(left, Pack(stop, end), std::memory_order_relaxed)) continue;
        run_fn(context, begin, stop, thread);
        left = mine.load(std::memory_order_relaxed);
      }
    } while (Steal(thread));
  }

  bool Steal(int32_t thread) {
    for (int32_t i = 1; i < num_threads; ++i) {
      std::atomic<uint64_t>& victim = shares[(thread + i) % num_threads].left;
      uint64_t left = victim.load(std::memory_order_relaxed);
      while (Begin(left) < End(left)) {
        const int64_t begin = Begin(left), end = End(left), middle = begin + (end - begin) / 2;
        if (!victim.compare_exchange_weak(left, Pack(begin, middle), std::memory_order_relaxed)) continue;
        shares[thread].left.store(Pack(middle, end), std::memory_order_relaxed);
        return true;
      }
    }
    return false;
  }

  void RunTiles(int32_t thread) {
    const TileFn f = fn;
    void* const c = context;
    const int64_t n = num_tiles;
    for (;;) {
      const int64_t tile = next_tile.fetch_add(1, std::memory_order_relaxed);
      if (tile >= n) return;
      f(c, tile, thread);
    }
  }

  bool TryJoin(uint32_t seen) {
    uint64_t s = state.load(std::memory_order_acquire);
    while (static_cast<uint32_t>(s >> 32) == seen && (s & kOpen) != 0) {
      if (state.compare_exchange_weak(s, s + 1, std::memory_order_acq_rel, std::memory_order_acquire)) return true;
    }
    return false;
  }

  void Leave() {
    const uint64_t before = state.fetch_sub(1, std::memory_order_seq_cst);
    if ((before & kOpen) == 0 && (before & kJoinedMask) == 1 &&
        caller_parked.exchange(0, std::memory_order_seq_cst) == 1) {
      FutexWake(&caller_parked, 1);
    }
  }

  // Returns the epoch that differs from `seen`.
  uint32_t AwaitEpoch(uint32_t seen) {
    const auto changed = [&] { return epoch.load(std::memory_order_acquire) != seen; };
    if (!SpinFor(spin_ns, changed)) {
      // sleepers before the re-check inside futex, epoch before sleepers in Publish: one of the two sees the other.
      sleepers.fetch_add(1, std::memory_order_seq_cst);
      while (epoch.load(std::memory_order_seq_cst) == seen) FutexWait(&epoch, seen);
      sleepers.fetch_sub(1, std::memory_order_seq_cst);
    }
    return epoch.load(std::memory_order_acquire);
  }

  void WorkerLoop(int32_t thread) {
    pthread_setname_np(pthread_self(), "sapwood-compute");
    if (nice != 0) setpriority(PRIO_PROCESS, static_cast<id_t>(syscall(SYS_gettid)), nice);
    SetFpMode(kFpMode);
    uint32_t seen = 0;
    for (;;) {
      seen = AwaitEpoch(seen);
      if (stop.load(std::memory_order_acquire)) return;
      if (!TryJoin(seen)) continue;
      Work(thread);
      Leave();
    }
  }

  void Publish(int wake) {
    const uint32_t e = epoch.load(std::memory_order_relaxed) + 1;
    state.store(uint64_t{e} << 32 | kOpen, std::memory_order_seq_cst);
    epoch.store(e, std::memory_order_seq_cst);
    if (sleepers.load(std::memory_order_seq_cst) > 0) FutexWake(&epoch, wake);
  }

  // fn or run_fn and what goes with it are set.
  void Run(int64_t tiles, void* c) {
    context = c;
    num_tiles = tiles;
    Publish(static_cast<int>(std::min<int64_t>(tiles, num_threads) - 1));
    Work(0);
    CloseAndWait();
  }

  // Whoever calls ParallelFor: inside of a tile of this pool, or the one caller there may be.
  struct Caller {
    Impl* const impl;
    const bool nested = t_inside.pool == impl;
    const bool alone = nested || impl->num_threads == 1;  // nested: its share of the outer job, so no one to wait for
    const int32_t thread = nested ? t_inside.thread : 0;
    const ScopedInside inside{impl, thread};

    explicit Caller(Impl* i) : impl(i) {
      SAPWOOD_CHECK(nested || !impl->busy.exchange(true, std::memory_order_acquire),
                    "ParallelFor called by two threads at once; a pool belongs to one executor");
    }
    ~Caller() {
      if (!nested) impl->busy.store(false, std::memory_order_release);
    }
    Caller(const Caller&) = delete;
    Caller& operator=(const Caller&) = delete;
  };

  void CloseAndWait() {
    state.fetch_and(~kOpen, std::memory_order_seq_cst);
    const auto left = [&] { return (state.load(std::memory_order_acquire) & kJoinedMask) == 0; };
    if (SpinFor(spin_ns, left)) return;
    while (!left()) {
      caller_parked.store(1, std::memory_order_seq_cst);
      if ((state.load(std::memory_order_seq_cst) & kJoinedMask) == 0) break;
      FutexWait(&caller_parked, 1);
    }
    caller_parked.store(0, std::memory_order_seq_cst);
  }
};

ThreadPool::ThreadPool(int32_t num_threads, int32_t nice) : impl_(std::make_unique<Impl>()) {
  SAPWOOD_REQUIRE(num_threads >= 1 && num_threads <= 4096, "num_threads must be in 1..4096, got ", num_threads,
                  "; UsableCpus() says ", UsableCpus());
  impl_->num_threads = num_threads;
  impl_->nice = nice;
  impl_->shares = std::make_unique<Impl::Share[]>(num_threads);
  if (num_threads > UsableCpus()) impl_->spin_ns = kSpinOversubscribedNs;
  impl_->workers.reserve(num_threads - 1);
  for (int32_t i = 1; i < num_threads; ++i) {
    impl_->workers.emplace_back([impl = impl_.get(), i] { impl->WorkerLoop(i); });
  }
}

ThreadPool::~ThreadPool() {
  if (getpid() != impl_->pid) {
    for (std::thread& w : impl_->workers) w.detach();
    return;
  }
  impl_->stop.store(true, std::memory_order_release);
  impl_->epoch.fetch_add(1, std::memory_order_seq_cst);
  FutexWake(&impl_->epoch, 1 << 30);
  for (std::thread& w : impl_->workers) w.join();
}

int32_t ThreadPool::num_threads() const { return impl_->num_threads; }

void ThreadPool::ParallelFor(int64_t num_tiles, TileFn fn, void* context) {
  if (num_tiles <= 0) return;
  const Impl::Caller caller(impl_.get());
  if (caller.alone || num_tiles == 1) {
    for (int64_t tile = 0; tile < num_tiles; ++tile) fn(context, tile, caller.thread);
    return;
  }
  impl_->fn = fn;
  impl_->run_fn = nullptr;
  impl_->next_tile.store(0, std::memory_order_relaxed);
  impl_->Run(num_tiles, context);
}

void ThreadPool::ParallelForRuns(int64_t num_tiles, int64_t max_run, RunFn fn, void* context) {
  SAPWOOD_CHECK(num_tiles < int64_t{1} << 32 && max_run > 0, num_tiles, " tiles in runs of ", max_run);
  if (num_tiles <= 0) return;
  const Impl::Caller caller(impl_.get());
  if (caller.alone || num_tiles == 1) {
    for (int64_t begin = 0; begin < num_tiles; begin += max_run) {
      fn(context, begin, std::min(num_tiles, begin + max_run), caller.thread);
    }
    return;
  }
  impl_->run_fn = fn;
  impl_->max_run = max_run;
  const int64_t threads = impl_->num_threads;
  for (int64_t t = 0; t < threads; ++t) {
    impl_->shares[t].left.store(Impl::Pack(num_tiles * t / threads, num_tiles * (t + 1) / threads),
                                std::memory_order_relaxed);
  }
  impl_->Run(num_tiles, context);
}

}  // namespace sapwood
