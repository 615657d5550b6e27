// What cuda/common/ptx_sm90.cuh has for compute capability 9.0, on the CPU. As late as the hardware may be, so is it here:
//   - a box that TMA copies is NaN in its place until somebody has waited for its mbarrier;
//   - a product of wgmma is made when its group is waited for, from what a's registers and b's memory hold then; until
//     then d is NaN. A product that no WgmmaFence came before since the last wait ends the launch with an error, as does
//     an mbarrier that nobody has initialised.
// It does not know of proxies: a missing AsyncProxyFence or MbarrierInitFence goes unnoticed. Nor does it ask that the
// four warps of a warp group go together.
#pragma once

#include "emulator.h"

#define __grid_constant__

struct alignas(64) CUtensorMap {
  const unsigned char* base;
  uint64_t dims[4], strides[3];
  uint32_t box[4];
};

namespace emulator {

void MbarrierInit(const void* barrier, int arrivals);
void MbarrierArrive(const void* barrier, int bytes);
void MbarrierWait(const void* barrier, int parity);
void TmaLoad(void* shared, const CUtensorMap& map, const void* barrier, const int (&at)[4]);
void NamedBarrier(int id, int threads, bool wait);
void Wgmma(float* d, int columns, const uint32_t* a, uint64_t b, bool transposed, bool accumulate);
void WgmmaFence();
void WgmmaCommit();
void WgmmaWait(int groups_left);

}  // namespace emulator

namespace sapwood_cuda {

struct TensorBox {
  const void* base;
  uint64_t dims[4];
  uint64_t strides[3];
  uint32_t box[4];
};

inline int EncodeTensorMap(CUtensorMap* map, const TensorBox& t) {
  bool right = reinterpret_cast<uintptr_t>(t.base) % 16 == 0 && t.box[0] * 2 == 128;
  for (const uint64_t dim : t.dims) right = right && dim > 0 && dim <= uint64_t{1} << 32;
  for (const uint64_t stride : t.strides) right = right && stride % 16 == 0 && stride < uint64_t{1} << 40;
  for (const uint32_t rows : t.box) right = right && rows > 0 && rows <= 256;
  if (!right) return cudaErrorInvalidConfiguration;
  map->base = static_cast<const unsigned char*>(t.base);
  std::copy_n(t.dims, 4, map->dims);
  std::copy_n(t.strides, 3, map->strides);
  std::copy_n(t.box, 4, map->box);
  return 0;
}

inline void MbarrierInit(uint64_t* barrier, int arrivals) { ::emulator::MbarrierInit(barrier, arrivals); }
inline void MbarrierInitFence() {}
inline void MbarrierArrive(uint64_t* barrier) { ::emulator::MbarrierArrive(barrier, 0); }
inline void MbarrierArriveExpect(uint64_t* barrier, int bytes) { ::emulator::MbarrierArrive(barrier, bytes); }
inline void MbarrierWait(uint64_t* barrier, int parity) { ::emulator::MbarrierWait(barrier, parity); }
inline void TmaLoad(void* shared, const CUtensorMap& map, uint64_t* barrier, int c0, int c1, int c2, int c3) {
  ::emulator::TmaLoad(shared, map, barrier, {c0, c1, c2, c3});
}

inline void NamedBarrierSync(int id, int threads) { ::emulator::NamedBarrier(id, threads, true); }
inline void NamedBarrierArrive(int id, int threads) { ::emulator::NamedBarrier(id, threads, false); }
inline void AsyncProxyFence() {}
template <int kRegisters>
void GiveUpRegisters() {}
template <int kRegisters>
void ClaimRegisters() {}

inline uint64_t MatrixDescriptor(const void* shared, int leading_bytes, int stride_bytes) {
  return uint64_t{1} << 62 | static_cast<uint64_t>(stride_bytes >> 4) << 32 |
         static_cast<uint64_t>(leading_bytes >> 4) << 16 | (SharedAddress(shared) & 0x3ffff) >> 4;
}
inline void WgmmaFence() { ::emulator::WgmmaFence(); }
inline void WgmmaCommit() { ::emulator::WgmmaCommit(); }
template <int kLeft, int kCount>
void WgmmaWait(float (&)[kCount]) {
  ::emulator::WgmmaWait(kLeft);
}
template <bool kTransposed, int kCount>
void Wgmma(float (&d)[kCount], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  ::emulator::Wgmma(d, 2 * kCount, a, b, kTransposed, accumulate);
}

}  // namespace sapwood_cuda
