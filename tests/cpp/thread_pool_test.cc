// ThreadPool: every tile exactly once, whatever the sizes; sleep and wake-up; use from within a tile.
#include "program/thread_pool.h"

#include <gtest/gtest.h>
#include <sched.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <limits>
#include <numeric>
#include <thread>
#include <vector>

#include "base/check.h"
#include "base/huge_buffer.h"
#include "program/fp_mode.h"

namespace sapwood {
namespace {

double CpuSeconds() {
  rusage usage;
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<double>(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
         1e-6 * static_cast<double>(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec);
}

// Waits until n threads have arrived. False after ten seconds: a failure is better than a hang.
class Rendezvous {
 public:
  explicit Rendezvous(int32_t n) : n_(n) {}
  bool Arrive() {
    ++arrived_;
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(10);
    // Spinning first: who yields on a busy machine comes back when the other has done all the work.
    for (int64_t spins = 0; arrived_.load() < n_; ++spins) {
      if (spins < 20'000) continue;
      if (std::chrono::steady_clock::now() > end) return false;
      std::this_thread::yield();
    }
    return true;
  }

 private:
  const int32_t n_;
  std::atomic<int32_t> arrived_{0};
};

TEST(ThreadPool, EveryTileExactlyOnce) {
  for (int32_t threads : {1, 2, 3, 8}) {
    ThreadPool pool(threads);
    EXPECT_EQ(pool.num_threads(), threads);
    for (int64_t tiles : {0, 1, 2, 3, 7, 64, 1000, 20000}) {
      // Plain ints: the thread sanitizer sees two threads on one tile, and a missing barrier.
      std::vector<int32_t> hits(tiles);
      std::atomic<int32_t> bad_thread{0};
      pool.ParallelFor(tiles, [&](int64_t tile, int32_t thread) {
        ++hits[tile];
        if (thread < 0 || thread >= threads) ++bad_thread;
      });
      EXPECT_EQ(bad_thread, 0);
      for (int64_t t = 0; t < tiles; ++t) ASSERT_EQ(hits[t], 1) << t << " of " << tiles << ", threads " << threads;
    }
  }
}

TEST(ThreadPool, RunsCoverEveryTileOnce) {
  for (int32_t threads : {1, 2, 3, 8}) {
    ThreadPool pool(threads);
    for (int64_t tiles : {0, 1, 2, 3, 7, 64, 1000, 20000}) {
      for (int64_t max_run : {1, 4, 1000}) {
        std::vector<int32_t> hits(tiles);
        std::atomic<int32_t> bad{0};
        pool.ParallelForRuns(tiles, max_run, [&](int64_t begin, int64_t end, int32_t thread) {
          if (begin >= end || end - begin > max_run || thread < 0 || thread >= threads) ++bad;
          for (int64_t tile = begin; tile < end; ++tile) ++hits[tile];
        });
        EXPECT_EQ(bad, 0);
        for (int64_t t = 0; t < tiles; ++t) ASSERT_EQ(hits[t], 1) << t << " of " << tiles << ", threads " << threads;
      }
    }
  }
}

// A thread walks through its share in order; the share of one that is stuck in a tile is taken from its end.
TEST(ThreadPool, RunsAreContiguousAndStolen) {
  ThreadPool pool(2);
  constexpr int64_t kTiles = 1000;
  Rendezvous both(2);
  std::vector<std::vector<int64_t>> begins(2);
  std::atomic<int64_t> done{0};
  pool.ParallelForRuns(kTiles, 4, [&](int64_t begin, int64_t end, int32_t thread) {
    if (begins[thread].empty()) both.Arrive();
    begins[thread].push_back(begin);
    done += end - begin;
    // The worker stays in its first run until all else is done.
    while (thread == 1 && begins[1].size() == 1 && done < kTiles) std::this_thread::yield();
  });
  EXPECT_EQ(begins[1], std::vector<int64_t>{kTiles / 2});
  ASSERT_GT(begins[0].size(), 2u);
  EXPECT_EQ(begins[0].front(), 0);
  // One break where its own half ends, the others where it stole again: half of what was left, so a few.
  int32_t breaks = 0;
  for (size_t i = 1; i < begins[0].size(); ++i) {
    if (begins[0][i] <= begins[0][i - 1] || begins[0][i] > begins[0][i - 1] + 4) ++breaks;
  }
  EXPECT_GE(breaks, 1);
  EXPECT_LE(breaks, 12);
}

// Many short jobs back to back, with pauses that land before, in and after the workers' spin: a worker that takes a
// tile of the job before, or misses a wake-up, shows as a wrong sum or a hang.
TEST(ThreadPool, ManyShortJobs) {
  for (int32_t threads : {2, 4}) {
    ThreadPool pool(threads);
    std::vector<int64_t> out(64);
    for (int64_t job = 0; job < 30000; ++job) {
      const int64_t tiles = 1 + job * 7 % 61;
      pool.ParallelFor(tiles, [&](int64_t tile, int32_t) { out[tile] = job + tile; });
      for (int64_t t = 0; t < tiles; ++t) ASSERT_EQ(out[t], job + t);
      if (job % 397 == 0) std::this_thread::sleep_for(std::chrono::microseconds(job % 3 * 60));
    }
  }
}

TEST(ThreadPool, ParkedWorkersAreWoken) {
  ThreadPool pool(3);
  for (int round = 0; round < 3; ++round) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));  // all asleep
    Rendezvous all(3);  // only three threads at once can finish it
    std::vector<int32_t> by(3, -1);
    std::atomic<int32_t> met{0};
    pool.ParallelFor(3, [&](int64_t tile, int32_t thread) {
      by[tile] = thread;
      met += all.Arrive();
    });
    ASSERT_EQ(met, 3) << "a worker slept on";
    std::sort(by.begin(), by.end());
    EXPECT_EQ(by, (std::vector<int32_t>{0, 1, 2}));
  }
}

// Two threads claim as fast as they can, for several of the scheduler's time slices: on a busy machine, too, they run
// at the same time for a while.
TEST(ThreadPool, NoTileTwiceUnderContention) {
  ThreadPool pool(2);
  constexpr int64_t kTiles = 2'000'000;
  for (int round = 0; round < 4; ++round) {
    std::vector<int32_t> hits(kTiles);
    std::vector<int32_t> started(2);
    Rendezvous both(2);
    pool.ParallelFor(kTiles, [&](int64_t tile, int32_t thread) {
      if (!started[thread]) {
        started[thread] = 1;
        both.Arrive();
      }
      ++hits[tile];
    });
    ASSERT_EQ(std::count(hits.begin(), hits.end(), 1), kTiles);
  }
}

// Runs of one tile, so that the two meet at the ends of each other's shares thousands of times.
TEST(ThreadPool, NoTileTwiceWhereRunsAreStolen) {
  ThreadPool pool(2);
  for (int64_t job = 0; job < 3000; ++job) {
    const int64_t tiles = 2 + job % 61;
    std::vector<int32_t> hits(tiles);
    pool.ParallelForRuns(tiles, 1, [&](int64_t begin, int64_t, int32_t thread) {
      ++hits[begin];
      // The worker is slower, then faster: shares run out first on one side, then on the other.
      for (int64_t i = 0; i < (thread == 1) * (job % 3) * 50; ++i) hits[begin] += i < 0;
    });
    ASSERT_EQ(std::count(hits.begin(), hits.end(), 1), tiles) << job;
  }
}

// A slow tile does not hold back the others' work, and the caller waits for it, long enough to go to sleep.
TEST(ThreadPool, CallerWaitsForTheLastTile) {
  ThreadPool pool(2);
  for (int round = 0; round < 3; ++round) {
    Rendezvous both(2);
    std::vector<int32_t> done(200);
    std::vector<int32_t> started(2);
    pool.ParallelFor(200, [&](int64_t tile, int32_t thread) {
      if (!started[thread]) {
        started[thread] = 1;
        both.Arrive();
        if (thread == 1) std::this_thread::sleep_for(std::chrono::milliseconds(5));
      }
      done[tile] = 1;
    });
    ASSERT_EQ(std::accumulate(done.begin(), done.end(), 0), 200);
  }
}

TEST(ThreadPool, NestedRunsInline) {
  for (int32_t threads : {1, 2}) {
    ThreadPool pool(threads);
    std::vector<std::vector<int32_t>> hits(20, std::vector<int32_t>(10));
    std::atomic<int32_t> moved{0};
    pool.ParallelFor(20, [&](int64_t outer, int32_t outer_thread) {
      pool.ParallelFor(10, [&](int64_t inner, int32_t inner_thread) {
        ++hits[outer][inner];
        moved += inner_thread != outer_thread;
      });
    });
    EXPECT_EQ(moved, 0);
    for (const auto& row : hits) EXPECT_EQ(row, std::vector<int32_t>(10, 1));
    int32_t after = 0;  // and the pool is not left in the nested state
    pool.ParallelFor(1, [&](int64_t, int32_t) { ++after; });
    EXPECT_EQ(after, 1);
  }
}

TEST(ThreadPool, TwoCallersAreRefused) {
  ThreadPool pool(2);
  std::atomic<bool> inside{false}, release{false};
  std::thread other([&] {
    pool.ParallelFor(2, [&](int64_t, int32_t) {
      inside = true;
      while (!release) std::this_thread::yield();
    });
  });
  while (!inside) std::this_thread::yield();
  EXPECT_THROW(pool.ParallelFor(2, [](int64_t, int32_t) {}), InternalError);
  release = true;
  other.join();
  int32_t sum = 0;
  pool.ParallelFor(1, [&](int64_t, int32_t) { ++sum; });
  EXPECT_EQ(sum, 1);
}

TEST(ThreadPool, TwoPoolsNest) {
  ThreadPool a(2), b(2);
  std::vector<std::vector<int32_t>> hits(4, std::vector<int32_t>(50));
  for (int64_t outer = 0; outer < 4; ++outer) {
    a.ParallelFor(1, [&](int64_t, int32_t) { b.ParallelFor(50, [&](int64_t i, int32_t) { ++hits[outer][i]; }); });
  }
  for (const auto& row : hits) EXPECT_EQ(row, std::vector<int32_t>(50, 1));
}

TEST(ThreadPool, ParkedWorkersUseNoCpu) {
  for (int32_t threads : {UsableCpus(), UsableCpus() + 3}) {
    ThreadPool pool(threads);
    pool.ParallelFor(100, [](int64_t, int32_t) {});
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    const double before = CpuSeconds();
    std::this_thread::sleep_for(std::chrono::milliseconds(200));
    EXPECT_LT(CpuSeconds() - before, 0.02) << threads << " threads";
  }
}

TEST(ThreadPool, WorkersCarryTheNicenessAndTheFpMode) {
  const uint32_t saved = GetFpMode();
#if defined(__x86_64__)
  SetFpMode(saved | 0x8040);  // flush to zero: workers inherit it unless they set their own
#endif
  ThreadPool pool(2, 5);
  std::atomic<int32_t> arrived{0};
  std::vector<int> nice(2);
  std::vector<uint32_t> mode(2);
  pool.ParallelFor(2, [&](int64_t, int32_t thread) {
    nice[thread] = getpriority(PRIO_PROCESS, static_cast<id_t>(syscall(SYS_gettid)));
    mode[thread] = GetFpMode();
    ++arrived;
    while (arrived.load() < 2) std::this_thread::yield();
  });
  SetFpMode(saved);
  EXPECT_EQ(nice[1], 5);
  EXPECT_EQ(mode[1] & 0xffc0u, kFpMode);
  EXPECT_EQ(nice[0], getpriority(PRIO_PROCESS, static_cast<id_t>(syscall(SYS_gettid)))) << "the caller's is left alone";
}

TEST(ThreadPool, StartsAndStops) {
  for (int i = 0; i < 50; ++i) {
    ThreadPool pool(3);
    if (i % 2 == 0) pool.ParallelFor(5, [](int64_t, int32_t) {});
  }
  EXPECT_THROW(ThreadPool(0), InvalidArgument);
}

TEST(ThreadPool, UsableCpusFollowsTheAffinityMask) {
  cpu_set_t all, one;
  ASSERT_EQ(sched_getaffinity(0, sizeof all, &all), 0);
  EXPECT_GE(UsableCpus(), 1);
  EXPECT_LE(UsableCpus(), CPU_COUNT(&all));
  CPU_ZERO(&one);
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (CPU_ISSET(cpu, &all)) {
      CPU_SET(cpu, &one);
      break;
    }
  }
  ASSERT_EQ(sched_setaffinity(0, sizeof one, &one), 0);
  EXPECT_EQ(UsableCpus(), 1);
  ASSERT_EQ(sched_setaffinity(0, sizeof all, &all), 0);
}

TEST(HugeBuffer, ZeroedAlignedAndMovable) {
  for (size_t bytes : {size_t{1}, size_t{4096}, (size_t{2} << 20) - 1, size_t{2} << 20, (size_t{5} << 20) + 123}) {
    HugeBuffer buffer(bytes);
    ASSERT_NE(buffer.data(), nullptr);
    EXPECT_EQ(buffer.size(), bytes);
    if (bytes >= size_t{2} << 20) {
      EXPECT_EQ(reinterpret_cast<uintptr_t>(buffer.data()) % (size_t{2} << 20), 0u);
    }
    auto* p = static_cast<unsigned char*>(buffer.data());
    EXPECT_EQ(p[0], 0);
    EXPECT_EQ(p[bytes - 1], 0);
    p[bytes - 1] = 7;
    HugeBuffer moved(std::move(buffer));
    EXPECT_EQ(buffer.data(), nullptr);
    EXPECT_EQ(static_cast<unsigned char*>(moved.data())[bytes - 1], 7);
    moved = HugeBuffer();
    EXPECT_EQ(moved.data(), nullptr);
  }
  EXPECT_EQ(HugeBuffer(0).data(), nullptr);
  EXPECT_THROW(HugeBuffer(std::numeric_limits<size_t>::max() - 10), CapacityError);
}

}  // namespace
}  // namespace sapwood
