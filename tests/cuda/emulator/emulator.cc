#include "emulator.h"
#include "emulator_sm90.h"

#include <sys/mman.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <string>
#include <vector>

// Saves the callee-saved registers, leaves the stack in *from and goes on where the one of `to` was left.
extern "C" void SapwoodEmulatorSwitch(void** from, void* to);
asm(R"(
.text
.globl SapwoodEmulatorSwitch
.hidden SapwoodEmulatorSwitch
.type SapwoodEmulatorSwitch, @function
SapwoodEmulatorSwitch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

namespace emulator {
namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr int kMaxThreads = 1024;
constexpr size_t kMaxShared = 227 * 1024;  // of sm_90
constexpr unsigned char kPoison = 0xff;    // NaN as bf16 and f32

constexpr uint32_t kSharedWindow = 128;  // the address of dynamic shared memory

struct Copy {
  unsigned char* to;
  const unsigned char* from;
  int bytes, valid;
};

// Of wgmma, one warp's rows of it.
struct Product {
  float* d;
  int columns;
  const uint32_t* a;
  uint64_t b;
  bool transposed, accumulate;
};

struct Box {
  const CUtensorMap* map;
  unsigned char* to;
  int at[4];
};

struct Mbarrier {
  uint64_t phase = 0;
  int arrivals = 0, to_arrive = 0, waiting = 0;
  int64_t bytes = 0;       // announced, not copied
  std::vector<Box> boxes;  // on their way
};

struct Named {
  int threads = 0, arrived = 0;
};

// A fiber waits for a barrier (the Block, an Mbarrier, a Named) or an exchange (its Warp), or is among the machine's `ready`.
struct Fiber {
  void* stack_pointer = nullptr;
  Thread where;
  int index = 0;
  int place = 0;  // in the block's order
  bool done = false;
  bool waited = false;  // for the kernel before
  const void* waits_for = nullptr;
  const char* reason = "";
  std::vector<Copy> open_copies;
  std::vector<std::vector<Copy>> groups;
  bool fenced = false;
  std::vector<Product> open_products;
  std::vector<std::vector<Product>> product_groups;
  std::map<float*, std::vector<float>> sums;  // what d will be
};

struct Warp {
  uint64_t generation = 0;
  unsigned lanes = 0;  // that the block has
  unsigned arrived = 0;
  Exchange kind{};
  unsigned mask = 0;
  Deposits deposits[2];  // of this generation and the one before, which lanes may still be reading
};

struct Block {
  int num_threads = 0, num_live = 0, at_barrier = 0;
  int any = 0, all = 1, last_any = 0, last_all = 1;
  std::map<const void*, Mbarrier> mbarriers;
  Named named[16];
};

struct Machine {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Block block;
  Fiber* current = nullptr;
  std::vector<int> order;  // of the block's fibers
  std::array<uint64_t, kMaxThreads / 64> ready{};  // a bit for each place in the order: its fiber can run
  void* scheduler = nullptr;
  unsigned char* stacks = nullptr;
  alignas(128) unsigned char shared[kMaxShared];
  const std::function<void()>* kernel = nullptr;
  std::string error;  // of the running launch
  cudaError_t status = cudaSuccess;
  std::string text;
};

Machine& TheMachine() {
  static Machine machine;
  return machine;
}

void SetReady(Machine& m, const Fiber& fiber, bool ready) {
  const uint64_t bit = uint64_t{1} << (fiber.place % 64);
  uint64_t& word = m.ready[fiber.place / 64];
  word = ready ? word | bit : word & ~bit;
}

// Fibers first .. last - 1, where they wait for this.
void Wake(const void* what, size_t first, size_t last) {
  Machine& m = TheMachine();
  for (size_t i = first; i < std::min(last, m.fibers.size()); ++i) {
    if (m.fibers[i].waits_for != what) continue;
    m.fibers[i].waits_for = nullptr;
    SetReady(m, m.fibers[i], true);
  }
}

// From the current fiber to the first in order that can run, which goes as far ahead of the others as barriers and
// exchanges allow; to RunBlock where none can.
void SwitchToNext(Machine& m, void** stack_pointer) {
  const auto word = std::find_if(m.ready.begin(), m.ready.end(), [](uint64_t bits) { return bits != 0; });
  void* to = m.scheduler;
  if (word != m.ready.end()) {
    m.current = &m.fibers[m.order[(word - m.ready.begin()) * 64 + __builtin_ctzll(*word)]];
    to = m.current->stack_pointer;
  }
  SapwoodEmulatorSwitch(stack_pointer, to);
}

void Wait(const void* what, const char* reason) {
  Machine& m = TheMachine();
  Fiber& me = *m.current;
  me.waits_for = what;
  me.reason = reason;
  SetReady(m, me, false);
  SwitchToNext(m, &me.stack_pointer);
}

// Ends the launch: the fibers are left where they are.
[[noreturn]] void Give(const std::string& error) {
  Machine& m = TheMachine();
  const dim3 b = m.current->where.block;
  m.error = "thread " + std::to_string(m.current->index) + " of block (" + std::to_string(b.x) + ", " +
            std::to_string(b.y) + ", " + std::to_string(b.z) + "): " + error;
  void* nowhere;
  SapwoodEmulatorSwitch(&nowhere, m.scheduler);
  std::abort();
}

void OpenBarrier(Block& block) {
  block.last_any = block.any;
  block.last_all = block.all;
  block.any = 0;
  block.all = 1;
  block.at_barrier = 0;
  Wake(&block, 0, kMaxThreads);
}

void FiberMain() {
  Machine& m = TheMachine();
  (*m.kernel)();
  if (!m.current->waited) Give("ends without AwaitPredecessor: the next kernel might begin before the one before has ended");
  m.current->done = true;
  SetReady(m, *m.current, false);
  Block& block = m.block;
  if (--block.num_live > 0 && block.at_barrier == block.num_live) OpenBarrier(block);
  void* nowhere;
  SwitchToNext(m, &nowhere);
  std::abort();
}

// below: bytes of the stack to leave free above it. Stacks that all began alike would share a few lines of the caches.
void Prepare(Fiber& fiber, unsigned char* stack, size_t below) {
  // As Switch leaves it: six registers, then where to return to; the ABI wants rsp % 16 == 8 at a function's entry.
  auto* top = reinterpret_cast<void**>(stack + kStackBytes - below - 24);
  *top = nullptr;
  *--top = reinterpret_cast<void*>(&FiberMain);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
}

std::string Deadlock(const Machine& m) {
  std::string text = "threads wait for what will not come:";
  const char* last = nullptr;
  for (const Fiber& fiber : m.fibers) {
    if (fiber.done || (last != nullptr && std::string(last) == fiber.reason)) continue;
    last = fiber.reason;
    text += " thread " + std::to_string(fiber.index) + " at " + fiber.reason + ";";
  }
  return text;
}

void RunBlock(Machine& m) {
  m.ready.fill(0);
  for (size_t place = 0; place < m.order.size(); ++place) {
    m.fibers[m.order[place]].place = static_cast<int>(place);
    SetReady(m, m.fibers[m.order[place]], true);
  }
  SwitchToNext(m, &m.scheduler);
  if (m.error.empty() && m.block.num_live > 0) m.error = Deadlock(m);
}

}  // namespace

const Thread& Current() { return TheMachine().current->where; }
unsigned char* DynamicShared() { return TheMachine().shared; }
int Lane() { return TheMachine().current->index % 32; }

void Run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel) {
  Machine& m = TheMachine();
  const size_t num_threads = size_t{block.x} * block.y * block.z;
  if (num_threads == 0 || num_threads > kMaxThreads || shared_bytes > kMaxShared ||
      size_t{grid.x} * grid.y * grid.z == 0 || grid.y > 65535 || grid.z > 65535) {
    m.status = cudaErrorInvalidConfiguration;
    m.text = "the launch's grid, block or shared memory is larger than a device has";
    return;
  }
  if (m.stacks == nullptr) {
    void* const memory = mmap(nullptr, kStackBytes * kMaxThreads, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    m.stacks = static_cast<unsigned char*>(memory);
  }
  std::vector<int>& order = m.order;
  order.resize(num_threads);
  for (size_t i = 0; i < num_threads; ++i) order[i] = static_cast<int>(i);
  const char* const wanted = std::getenv("SAPWOOD_EMULATOR_ORDER");
  const std::string order_name = wanted == nullptr ? "ascending" : wanted;
  const bool shuffled = !order_name.empty() && order_name.find_first_not_of("0123456789") == std::string::npos;
  std::mt19937 random(shuffled ? std::stoul(order_name) : 0);
  if (order_name == "descending") std::reverse(order.begin(), order.end());

  m.kernel = &kernel;
  m.error.clear();
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x && m.error.empty(); ++x) {
        std::memset(m.shared, kPoison, shared_bytes);
        m.block = {};
        m.block.num_threads = m.block.num_live = static_cast<int>(num_threads);
        m.fibers.assign(num_threads, {});
        m.warps.assign((num_threads + 31) / 32, {});
        for (size_t i = 0; i < num_threads; ++i) {
          Fiber& fiber = m.fibers[i];
          fiber.index = static_cast<int>(i);
          const auto t = static_cast<unsigned>(i);
          fiber.where = {dim3(t % block.x, t / block.x % block.y, t / block.x / block.y), dim3(x, y, z), block, grid};
          m.warps[i / 32].lanes |= 1u << (i % 32);
          Prepare(fiber, m.stacks + i * kStackBytes, i % 16 * 256);
        }
        if (shuffled) std::shuffle(order.begin(), order.end(), random);
        RunBlock(m);
      }
    }
  }
  m.current = nullptr;
  if (!m.error.empty()) {
    m.status = cudaErrorLaunchFailure;
    m.text = m.error;
  }
}

void AwaitPredecessor() { TheMachine().current->waited = true; }

void Barrier() { BarrierReduce(0, false); }

int BarrierReduce(int value, bool all) {
  Block& block = TheMachine().block;
  block.any |= value != 0;
  block.all &= value != 0;
  if (++block.at_barrier == block.num_live) {
    OpenBarrier(block);
  } else {
    Wait(&block, "__syncthreads");
  }
  return all ? block.last_all : block.last_any;
}

const Deposits& Meet(Exchange kind, unsigned mask, const void* deposit, size_t bytes) {
  static constexpr const char* kNames[] = {"__syncwarp", "a shuffle", "a vote", "ldmatrix", "mma", "wgmma"};
  Machine& m = TheMachine();
  Warp& warp = m.warps[m.current->index / 32];
  const int lane = Lane();
  if (mask != (mask & warp.lanes) || !(mask >> lane & 1)) Give("a mask names lanes that are not there, or not the caller");
  if (warp.arrived != 0 && (warp.kind != kind || warp.mask != mask)) {
    Give(std::string("reaches ") + kNames[static_cast<int>(kind)] + " where others of its warp are at " +
         kNames[static_cast<int>(warp.kind)] + ", or with another mask");
  }
  warp.kind = kind;
  warp.mask = mask;
  warp.arrived |= 1u << lane;
  const uint64_t generation = warp.generation;
  if (bytes > 0) std::memcpy(warp.deposits[generation % 2][lane], deposit, bytes);
  if (warp.arrived == mask) {
    warp.arrived = 0;
    ++warp.generation;
    const size_t first = m.current->index / 32 * 32;
    Wake(&warp, first, first + 32);
  } else {
    Wait(&warp, kNames[static_cast<int>(kind)]);
  }
  return warp.deposits[generation % 2];
}

void CpAsync(void* shared, const void* global, int bytes, int valid_bytes) {
  auto* const to = static_cast<unsigned char*>(shared);
  if (reinterpret_cast<uintptr_t>(to) % bytes != 0 || reinterpret_cast<uintptr_t>(global) % bytes != 0) {
    Give("cp.async of " + std::to_string(bytes) + " bytes with an address that is not a multiple of them");
  }
  std::memset(to, kPoison, bytes);
  TheMachine().current->open_copies.push_back({to, static_cast<const unsigned char*>(global), bytes, valid_bytes});
}

void CpAsyncCommit() {
  Fiber& me = *TheMachine().current;
  me.groups.push_back(std::move(me.open_copies));
  me.open_copies.clear();
}

void CpAsyncWait(int groups_left) {
  Fiber& me = *TheMachine().current;
  const size_t arrive = me.groups.size() - std::min(me.groups.size(), static_cast<size_t>(groups_left));
  for (size_t i = 0; i < arrive; ++i) {
    for (const Copy& copy : me.groups[i]) {
      std::memcpy(copy.to, copy.from, copy.valid);
      std::memset(copy.to + copy.valid, 0, copy.bytes - copy.valid);
    }
  }
  me.groups.erase(me.groups.begin(), me.groups.begin() + static_cast<std::ptrdiff_t>(arrive));
}

// --- Compute capability 9.0 -----------------------------------------------------------------------------------------

namespace {

uint32_t Swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

unsigned char* AtSharedAddress(uint32_t address) {
  if (address < kSharedWindow || address - kSharedWindow >= kMaxShared) Give("an address outside shared memory");
  return TheMachine().shared + (address - kSharedWindow);
}

Mbarrier& Find(const void* barrier) {
  auto& all = TheMachine().block.mbarriers;
  const auto found = all.find(barrier);
  if (found == all.end()) Give("an mbarrier that nobody has initialised");
  return found->second;
}

void EndPhase(Mbarrier& barrier) {
  if (barrier.to_arrive > 0 || barrier.bytes != 0) return;
  ++barrier.phase;
  barrier.to_arrive = barrier.arrivals;
  Wake(&barrier, 0, kMaxThreads);
}

void Deliver(Mbarrier& barrier) {
  for (const Box& box : barrier.boxes) {
    const CUtensorMap& map = *box.map;
    const auto inside = [&](int dim, uint32_t i) {
      const int64_t at = int64_t{box.at[dim]} + i;
      return at >= 0 && static_cast<uint64_t>(at) < map.dims[dim];
    };
    uint32_t address = SharedAddress(box.to);
    for (uint32_t i3 = 0; i3 < map.box[3]; ++i3) {
      for (uint32_t i2 = 0; i2 < map.box[2]; ++i2) {
        for (uint32_t i1 = 0; i1 < map.box[1]; ++i1) {
          const bool row = inside(3, i3) && inside(2, i2) && inside(1, i1);
          for (uint32_t i0 = 0; i0 < map.box[0]; ++i0, address += 2) {
            uint16_t element = 0;
            if (row && inside(0, i0)) {
              std::memcpy(&element,
                          map.base + 2 * (int64_t{box.at[0]} + i0) + (box.at[1] + i1) * map.strides[0] +
                              (box.at[2] + i2) * map.strides[1] + (box.at[3] + i3) * map.strides[2],
                          2);
            }
            std::memcpy(AtSharedAddress(Swizzled(address)), &element, 2);
          }
        }
      }
    }
    barrier.bytes -= int64_t{2} * map.box[0] * map.box[1] * map.box[2] * map.box[3];
  }
  if (barrier.boxes.empty()) return;
  barrier.boxes.clear();
  EndPhase(barrier);
}

// What wgmma reads as b [16 k][columns]; transposed: rows in memory are k.
std::vector<float> ReadB(const Product& product) {
  const auto field = [&](int bit) { return static_cast<uint32_t>(product.b >> bit & 0x3fff) << 4; };
  const uint32_t start = field(0), leading = field(16), stride = field(32);
  if (product.b >> 62 != 1 || (product.b >> 49 & 7) != 0) Give("wgmma of another layout than 128-byte swizzle");
  std::vector<float> b(size_t{16} * product.columns);
  for (uint32_t n = 0; n < static_cast<uint32_t>(product.columns); ++n) {
    for (uint32_t k = 0; k < 16; ++k) {
      const uint32_t offset = product.transposed ? n % 64 * 2 + n / 64 * leading + k % 8 * 128 + k / 8 * stride
                                                 : n % 8 * 128 + n / 8 * stride + k * 2;
      uint16_t element;
      std::memcpy(&element, AtSharedAddress(Swizzled(start + offset)), 2);
      b[n * 16 + k] = BitCast<float>(uint32_t{element} << 16);
    }
  }
  return b;
}

struct Share {  // of a lane
  float* sums;
  const uint32_t* a;
};

// The 16 rows of a warp.
void Multiply(const Product& product, const Deposits& all) {
  Share lanes[32];
  for (int i = 0; i < 32; ++i) std::memcpy(&lanes[i], all[i], sizeof(Share));
  const std::vector<float> b = ReadB(product);
  for (int row = 0; row < 16; ++row) {
    float a[16];
    for (int k = 0; k < 16; ++k) {
      const uint32_t two = lanes[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2];
      a[k] = BitCast<float>((two >> (16 * (k % 2))) << 16);
    }
    for (int n = 0; n < product.columns; ++n) {
      float& to = lanes[row % 8 * 4 + n % 8 / 2].sums[n / 8 * 4 + row / 8 * 2 + n % 2];
      double sum = product.accumulate ? double{to} : 0.0;
      for (int k = 0; k < 16; ++k) sum += double{a[k]} * double{b[n * 16 + k]};
      to = static_cast<float>(sum);
    }
  }
}

}  // namespace

uint32_t SharedAddress(const void* shared) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(shared) - TheMachine().shared) + kSharedWindow;
}

void MbarrierInit(const void* barrier, int arrivals) {
  if (reinterpret_cast<uintptr_t>(barrier) % 8 != 0) Give("an mbarrier at an address that is not a multiple of 8");
  Mbarrier& made = TheMachine().block.mbarriers[barrier];
  made.arrivals = made.to_arrive = arrivals;
}

void MbarrierArrive(const void* barrier, int bytes) {
  Mbarrier& at = Find(barrier);
  if (at.to_arrive == 0) Give("arrives at an mbarrier more often than it expects in a phase");
  --at.to_arrive;
  at.bytes += bytes;
  EndPhase(at);
}

void MbarrierWait(const void* barrier, int parity) {
  Mbarrier& at = Find(barrier);
  while (at.phase % 2 == static_cast<uint64_t>(parity)) {
    Deliver(at);
    if (at.phase % 2 != static_cast<uint64_t>(parity)) break;
    ++at.waiting;
    Wait(&at, "an mbarrier");
    --at.waiting;
  }
}

void TmaLoad(void* shared, const CUtensorMap& map, const void* barrier, const int (&at)[4]) {
  if (SharedAddress(shared) % 1024 != 0) Give("TMA to an address that is not a multiple of 1024");
  Mbarrier& of = Find(barrier);
  std::memset(shared, kPoison, size_t{2} * map.box[0] * map.box[1] * map.box[2] * map.box[3]);
  of.boxes.push_back({&map, static_cast<unsigned char*>(shared), {at[0], at[1], at[2], at[3]}});
  if (of.waiting > 0) Deliver(of);
}

void NamedBarrier(int id, int threads, bool wait) {
  if (id < 1 || id > 15 || threads % 32 != 0) Give("a named barrier's id must be in 1..15, its threads whole warps");
  Named& at = TheMachine().block.named[id];
  if (at.arrived > 0 && at.threads != threads) Give("a named barrier of which others expect another number of threads");
  at.threads = threads;
  if (++at.arrived == threads) {
    at.arrived = 0;
    Wake(&at, 0, kMaxThreads);
  } else if (wait) {
    Wait(&at, "a named barrier");
  }
}

void Wgmma(float* d, int columns, const uint32_t* a, uint64_t b, bool transposed, bool accumulate) {
  Fiber& me = *TheMachine().current;
  if (!me.fenced) Give("wgmma without a fence since the last wait");
  const auto [sums, first] = me.sums.try_emplace(d, d, d + columns / 2);
  if (first) std::memset(d, kPoison, sizeof(float) * static_cast<size_t>(columns / 2));
  me.open_products.push_back({d, columns, a, b, transposed, accumulate});
}

void WgmmaFence() { TheMachine().current->fenced = true; }

void WgmmaCommit() {
  Fiber& me = *TheMachine().current;
  me.product_groups.push_back(std::move(me.open_products));
  me.open_products.clear();
}

void WgmmaWait(int groups_left) {
  Fiber& me = *TheMachine().current;
  me.fenced = false;
  while (me.product_groups.size() > static_cast<size_t>(groups_left)) {
    for (const Product& product : me.product_groups.front()) {
      const Share share{me.sums[product.d].data(), product.a};
      const Deposits& all = Meet(Exchange::kWgmma, 0xffffffffu, &share, sizeof(share));
      if (Lane() == 0) Multiply(product, all);
      Meet(Exchange::kWgmma, 0xffffffffu, nullptr, 0);
    }
    me.product_groups.erase(me.product_groups.begin());
  }
  const auto pending = [&](float* d) {
    for (const auto& group : me.product_groups) {
      for (const Product& product : group) {
        if (product.d == d) return true;
      }
    }
    return false;
  };
  for (auto i = me.sums.begin(); i != me.sums.end();) {
    if (pending(i->first)) {
      ++i;
      continue;
    }
    std::copy(i->second.begin(), i->second.end(), i->first);
    i = me.sums.erase(i);
  }
}

}  // namespace emulator

cudaError_t cudaGetLastError() {
  emulator::Machine& m = emulator::TheMachine();
  const cudaError_t status = m.status;
  m.status = cudaSuccess;
  return status;
}
const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaSuccess ? "cudaSuccess" : error == cudaErrorLaunchFailure ? "cudaErrorLaunchFailure" : "cudaErrorInvalidConfiguration";
}
const char* cudaGetErrorString(cudaError_t) { return emulator::TheMachine().text.c_str(); }
