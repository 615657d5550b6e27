"""The machine's ceilings: how fast it can read memory and multiply, at 1 .. all usable threads.

    python bench/machine.py [--json] [--threads 1 2] [--repeats 7]

read    GB/s (1e9 bytes) of reading a buffer far larger than the caches, each thread its own part: what decoding one row
        can at best stream its weights with
fp32    GFLOP/s of fused multiply-adds
bf16    GFLOP/s of bf16 dot products into fp32 (AVX512_BF16); a multiply and an add are two operations
int8    GOP/s of u8 x s8 dot products into int32 (AVX512_VNNI or AVX_VNNI)
fp32_avx2, int8_avx2
        the same at level AVX2, whatever wider the CPU has: 256-bit fused multiply-adds, and u8 x s8 by VPMADDUBSW,
        VPMADDWD and VPADDD, without the two instructions that make a signed weight unsigned

Medians over --repeats, and the best beside them. The arithmetic runs in registers, the instructions are chosen at run
time; one that this CPU lacks is reported so. AMX units are not measured. Needs a C++20 compiler, as the package's own
build does; without one only reading is measured, through numpy, and the output says so.

The other benchmarks import `ceilings`, and put their results beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

BUFFER_BYTES: Final = 512 << 20
KINDS: Final = ("read", "fp32", "bf16", "int8", "fp32_avx2", "int8_avx2")
UNITS: Final = ("GB/s", "GFLOP/s", "GFLOP/s", "GOP/s", "GFLOP/s", "GOP/s")

SOURCE: Final = r"""
// argv: buffer bytes, repeats, thread counts...; one line "kind threads value" each time; "kind absent" where the CPU
// lacks the instruction.
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <thread>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

using Clock = std::chrono::steady_clock;
constexpr int64_t kIters = 1 << 14;      // of an arithmetic loop, between looks at the clock
constexpr double kSeconds = 0.05;        // how long one measurement of arithmetic takes
constexpr double kSums = 12;             // independent sums in such a loop
volatile float g_one = 1.0f;             // what the compiler must not know
std::atomic<int64_t> g_sink{0};

using Arith = void (*)();                          // kIters turns
using Read = uint64_t (*)(const char*, size_t);    // a multiple of 1024 bytes, 64-byte aligned

uint64_t ReadPlain(const char* data, size_t size) {
  const uint64_t* p = reinterpret_cast<const uint64_t*>(data);
  uint64_t sums[16] = {};
  for (size_t i = 0; i < size / 8; i += 16) {
    for (int j = 0; j < 16; ++j) sums[j] += p[i + j];
  }
  uint64_t total = 0;
  for (uint64_t s : sums) total += s;
  return total;
}

void FmaPlain() {
  float sums[64], a = g_one, b = g_one;
  for (float& s : sums) s = a;
  for (int64_t i = 0; i < kIters; ++i) {
    for (float& s : sums) s = s * a + b;
  }
  float total = 0;
  for (float s : sums) total += s;
  g_sink += static_cast<int64_t>(total != 0);
}

#if defined(__x86_64__)
__attribute__((target("avx512f"))) uint64_t ReadAvx512(const char* data, size_t size) {
  __m512i sums[8];
  for (__m512i& s : sums) s = _mm512_setzero_si512();
  for (size_t i = 0; i < size; i += 512) {
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) sums[j] = _mm512_xor_si512(sums[j], _mm512_load_si512(data + i + 64 * j));
  }
  for (int j = 1; j < 8; ++j) sums[0] = _mm512_xor_si512(sums[0], sums[j]);
  return static_cast<uint64_t>(_mm512_reduce_add_epi64(sums[0]));
}

__attribute__((target("avx2"))) uint64_t ReadAvx2(const char* data, size_t size) {
  __m256i sums[8];
  for (__m256i& s : sums) s = _mm256_setzero_si256();
  for (size_t i = 0; i < size; i += 256) {
    const __m256i* p = reinterpret_cast<const __m256i*>(data + i);
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) sums[j] = _mm256_xor_si256(sums[j], _mm256_load_si256(p + j));
  }
  alignas(32) uint64_t parts[4];
  for (int j = 1; j < 8; ++j) sums[0] = _mm256_xor_si256(sums[0], sums[j]);
  _mm256_store_si256(reinterpret_cast<__m256i*>(parts), sums[0]);
  return parts[0] + parts[1] + parts[2] + parts[3];
}

// Twelve independent sums: as many as the longest latency (6) times the widest issue (2). In assembly, because GCC 12
// spills such sums when they are written with intrinsics.
#define ZERO(r) "vxorps %%xmm" #r ", %%xmm" #r ", %%xmm" #r "\n\t"
#define SUM(op, reg, r) op " %%" reg "14, %%" reg "15, %%" reg #r "\n\t"
#define MADD_SUM(op, reg, r)                                                                                           \
  "vpmaddubsw %%" reg "14, %%" reg "15, %%" reg "12\n\tvpmaddwd %%" reg "14, %%" reg "12, %%" reg "12\n\t"             \
  op " %%" reg "12, %%" reg #r ", %%" reg #r "\n\t"
#define ARITH(name, step, op, reg)                                                                                     \
  void name() {                                                                                                        \
    int64_t n = kIters;                                                                                                \
    asm volatile(ZERO(0) ZERO(1) ZERO(2) ZERO(3) ZERO(4) ZERO(5) ZERO(6) ZERO(7) ZERO(8) ZERO(9) ZERO(10) ZERO(11)     \
                 ZERO(14) ZERO(15) "1:\n\t"                                                                            \
                 step(op, reg, 0) step(op, reg, 1) step(op, reg, 2) step(op, reg, 3) step(op, reg, 4) step(op, reg, 5) \
                 step(op, reg, 6) step(op, reg, 7) step(op, reg, 8) step(op, reg, 9) step(op, reg, 10)                 \
                 step(op, reg, 11)                                                                                     \
                 "dec %0\n\tjnz 1b\n\tvzeroupper"                                                                      \
                 : "+r"(n)                                                                                             \
                 :                                                                                                     \
                 : "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10",      \
                   "xmm11", "xmm12", "xmm14", "xmm15");                                                                \
  }
ARITH(FmaAvx512, SUM, "vfmadd231ps", "zmm")
ARITH(FmaAvx2, SUM, "vfmadd231ps", "ymm")
ARITH(Bf16Avx512, SUM, "vdpbf16ps", "zmm")
ARITH(Int8Avx512, SUM, "vpdpbusd", "zmm")
ARITH(Int8AvxVnni, SUM, "%{vex%} vpdpbusd", "ymm")
ARITH(Int8Avx2, MADD_SUM, "vpaddd", "ymm")
#endif

// Seconds from the moment all threads are there until the last is done.
double Together(int num_threads, const std::function<void(int)>& work) {
  std::atomic<int> ready{0};
  std::atomic<bool> go{false};
  std::vector<std::thread> threads;
  for (int t = 0; t < num_threads; ++t) {
    threads.emplace_back([&, t] {
      ++ready;
      while (!go) std::this_thread::yield();
      work(t);
    });
  }
  while (ready < num_threads) std::this_thread::yield();
  const auto begin = Clock::now();
  go = true;
  for (std::thread& thread : threads) thread.join();
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

void MeasureRead(Read read, size_t size, int repeats, const std::vector<int>& counts) {
  size = size / (1 << 21) * (1 << 21);
  char* data = static_cast<char*>(std::aligned_alloc(1 << 21, size));
  if (data == nullptr) {
    std::fprintf(stderr, "no memory for a buffer of %zu bytes\n", size);
    std::exit(1);
  }
  madvise(data, size, MADV_HUGEPAGE);  // a wish: small pages cost a few percent
  const int most = *std::max_element(counts.begin(), counts.end());
  Together(most, [&](int t) {
    const size_t part = size / most / 1024 * 1024;
    std::fill(data + t * part, t + 1 == most ? data + size : data + (t + 1) * part, static_cast<char>(t + 1));
  });
  for (int r = 0; r < repeats; ++r) {
    for (int n : counts) {
      const size_t part = size / n / 1024 * 1024;
      const double seconds = Together(n, [&](int t) { g_sink += static_cast<int64_t>(read(data + t * part, part)); });
      std::printf("read %d %.6g\n", n, 1e-9 * static_cast<double>(part) * n / seconds);
    }
  }
  std::free(data);
}

void MeasureArith(const char* kind, Arith turn, double ops_per_iter, int repeats, const std::vector<int>& counts) {
  if (turn == nullptr) {
    std::printf("%s absent\n", kind);
    return;
  }
  for (int r = 0; r < repeats; ++r) {
    for (int n : counts) {
      std::vector<double> rates(n);
      Together(n, [&](int t) {
        turn();  // wake wide units and the clock up
        const auto begin = Clock::now();
        double seconds = 0;
        int64_t turns = 0;
        for (; seconds < kSeconds; ++turns) {
          turn();
          seconds = std::chrono::duration<double>(Clock::now() - begin).count();
        }
        rates[t] = 1e-9 * ops_per_iter * kIters * static_cast<double>(turns) / seconds;
      });
      double total = 0;
      for (double rate : rates) total += rate;
      std::printf("%s %d %.6g\n", kind, n, total);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) return 2;
  const size_t size = std::strtoull(argv[1], nullptr, 10);
  const int repeats = std::atoi(argv[2]);
  std::vector<int> counts;
  for (int i = 3; i < argc; ++i) counts.push_back(std::atoi(argv[i]));
  Read read = ReadPlain;
  Arith fp32 = FmaPlain, bf16 = nullptr, int8 = nullptr, fp32_avx2 = nullptr, int8_avx2 = nullptr;
  double fp32_ops = 2 * 64, int8_ops = 0;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) {
    read = ReadAvx512, fp32 = FmaAvx512, fp32_ops = 2 * 16 * kSums;
  } else if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    read = ReadAvx2, fp32 = FmaAvx2, fp32_ops = 2 * 8 * kSums;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) fp32_avx2 = FmaAvx2, int8_avx2 = Int8Avx2;
  if (__builtin_cpu_supports("avx512bf16")) bf16 = Bf16Avx512;
  if (__builtin_cpu_supports("avx512vnni")) {
    int8 = Int8Avx512, int8_ops = 2 * 64 * kSums;
  } else if (HAS_AVXVNNI) {
    int8 = Int8AvxVnni, int8_ops = 2 * 32 * kSums;
  }
#endif
  MeasureRead(read, size, repeats, counts);
  MeasureArith("fp32", fp32, fp32_ops, repeats, counts);
  MeasureArith("bf16", bf16, 2 * 32 * kSums, repeats, counts);
  MeasureArith("int8", int8, int8_ops, repeats, counts);
  MeasureArith("fp32_avx2", fp32_avx2, 2 * 8 * kSums, repeats, counts);
  MeasureArith("int8_avx2", int8_avx2, 2 * 32 * kSums, repeats, counts);
  return 0;
}
"""


@dataclasses.dataclass(frozen=True)
class Rate:
    """One ceiling in its kind's unit: median and best over the repeats."""

    median: float
    best: float


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What one machine can do, by number of threads; `rates` lacks a kind that this CPU has no instruction for.

    cpu      the CPU's name
    method   "c++", or "numpy" where no compiler was found: then read alone is known
    rates    kind of KINDS -> threads -> Rate
    """

    cpu: str
    method: str
    rates: Mapping[str, Mapping[int, Rate]]

    def median(self, kind: str, threads: int | None = None) -> float | None:
        """The median rate with so many threads (None = the most measured); None where the kind was not measured."""
        by_threads = self.rates.get(kind)
        return by_threads[max(by_threads) if threads is None else threads].median if by_threads else None

    def as_json(self) -> dict[str, Any]:
        return {
            "cpu": self.cpu,
            "method": self.method,
            **{
                kind: {str(n): dataclasses.asdict(rate) for n, rate in self.rates[kind].items()}
                if kind in self.rates
                else None
                for kind in KINDS
            },
        }


def num_usable_cpus() -> int:
    """CPUs this process may run on."""
    return len(os.sched_getaffinity(0))


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return "unknown CPU"


def cpu_flags() -> frozenset[str]:
    """The kernel's names of this CPU's features; empty where it does not say."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return frozenset(line.partition(":")[2].split())
    except OSError:
        pass
    return frozenset()


def thread_counts(most: int) -> list[int]:
    """1, 2, 4, ... and `most`."""
    return sorted({n for n in (1 << i for i in range(most.bit_length())) if n < most} | {most})


def find_compiler() -> str | None:
    """A C++ compiler: $CXX, c++, g++ or clang++."""
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    return next((path for name in names if name and (path := shutil.which(name))), None)


def measure_compiled(compiler: str, counts: Sequence[int], repeats: int, buffer_bytes: int) -> str:
    """Compile SOURCE in a temporary folder and run it; what it printed. RuntimeError, with the compiler's words, where
    either fails."""
    with tempfile.TemporaryDirectory(prefix="sapwood-machine-") as folder:
        source, program = Path(folder) / "machine.cc", Path(folder) / "machine"
        source.write_text(SOURCE)
        # The kernel knows this feature; compilers learned its name late.
        define = f"-DHAS_AVXVNNI={int('avx_vnni' in cpu_flags())}"
        command = [compiler, "-std=c++20", "-O3", "-pthread", define, "-o", str(program), str(source)]
        for step in (command, [str(program), str(buffer_bytes), str(repeats), *map(str, counts)]):
            done = subprocess.run(step, capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"{' '.join(step)}: exit status {done.returncode}\n{done.stderr[:2000]}")
    return done.stdout


def measure_numpy(counts: Sequence[int], repeats: int, buffer_bytes: int) -> str:
    """Reading alone, as sums of int64 in as many threads (numpy sums without the GIL), in the program's format."""
    data = np.ones(buffer_bytes // 8, np.int64)
    lines = []
    for _ in range(repeats):
        for n in counts:
            parts = np.array_split(data, n)
            threads = [threading.Thread(target=part.sum) for part in parts]
            begin = time.perf_counter()
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            lines.append(f"read {n} {data.nbytes / (time.perf_counter() - begin) / 1e9}")
    return "\n".join(lines)


def parse(printed: str) -> dict[str, dict[int, Rate]]:
    """Rates from lines "kind threads value"; kinds that are "absent" are left out."""
    values: dict[str, dict[int, list[float]]] = {}
    for line in printed.splitlines():
        kind, threads, *value = line.split()
        if threads != "absent":
            values.setdefault(kind, {}).setdefault(int(threads), []).append(float(value[0]))
    return {
        kind: {n: Rate(statistics.median(v), max(v)) for n, v in by_threads.items()}
        for kind, by_threads in values.items()
    }


@functools.cache
def ceilings(threads: tuple[int, ...] | None = None, repeats: int = 5, buffer_bytes: int = BUFFER_BYTES) -> Ceilings:
    """Measure, once a process: later calls return the same. threads None = 1, 2, 4, ... and all usable CPUs.

    Takes a few seconds of all cores, and as long to compile. RuntimeError where the compiler is there but fails.
    """
    counts = list(threads) if threads is not None else thread_counts(num_usable_cpus())
    compiler = find_compiler()
    measure: Callable[..., str] = measure_numpy if compiler is None else functools.partial(measure_compiled, compiler)
    rates = parse(measure(counts, repeats, buffer_bytes))
    return Ceilings(cpu_name(), "numpy" if compiler is None else "c++", rates)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", help="thread counts (default 1, 2, 4, ... and all)")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--buffer-mb", type=int, default=BUFFER_BYTES >> 20, help="MiB that are read")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    args = parser.parse_args()
    if args.repeats < 1 or args.buffer_mb < 2 or min(args.threads or [1]) < 1:
        parser.error("--repeats and --threads must be at least 1, --buffer-mb at least 2")
    found = ceilings(tuple(args.threads) if args.threads else None, args.repeats, args.buffer_mb << 20)
    if args.json:
        print(json.dumps(found.as_json()))
        return 0
    print(f"{found.cpu}, {num_usable_cpus()} usable CPUs; median (best) of {args.repeats}")
    if found.method == "numpy":
        print("no C++ compiler found (CXX, c++, g++, clang++): reading alone, through numpy, which may be slower")
    for kind, unit in zip(KINDS, UNITS, strict=True):
        if kind in found.rates:
            row = "   ".join(f"{n}: {r.median:8.1f} ({r.best:.1f})" for n, r in sorted(found.rates[kind].items()))
            print(f"{kind:9s} {unit:8s} by threads   {row}")
        else:
            print(f"{kind:9s} {'not measured' if found.method == 'numpy' else 'not on this CPU'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
