// The floating-point mode of every thread that computes: round to nearest, denormals kept, exceptions masked.
//
// Threads inherit the mode of whoever starts them, and a host process may have set flush-to-zero (torch does on
// request): the same tile would then give other bits on other threads. So workers set it once, and the thread that
// calls in has it set for the time of the call.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace sapwood {

inline constexpr uint32_t kFpMode = 0x1F80;  // MXCSR's reset value

#if defined(__x86_64__)
inline uint32_t GetFpMode() { return _mm_getcsr(); }
inline void SetFpMode(uint32_t mode) { _mm_setcsr(mode); }
#else
inline uint32_t GetFpMode() { return kFpMode; }
inline void SetFpMode(uint32_t) {}
#endif

class ScopedFpMode {
 public:
  ScopedFpMode() : saved_(GetFpMode()) { SetFpMode(kFpMode); }
  ~ScopedFpMode() { SetFpMode(saved_); }
  ScopedFpMode(const ScopedFpMode&) = delete;
  ScopedFpMode& operator=(const ScopedFpMode&) = delete;

 private:
  uint32_t saved_;
};

}  // namespace sapwood
