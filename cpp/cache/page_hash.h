// The chained 128-bit hash of a page: what a page's bytes depend on (namespace and every key up to its end), as a
// name that other processes can compute too. Used by events, HashPages and the flat table.
//
// Two 64-bit lanes absorb two keys at a time; each absorption is a bijection of the lane (xor, then the MurmurHash3
// 64-bit finaliser), so a lane never loses what it has seen; lanes use different constants and are crossed once a
// page. Not cryptographic: a caller who must keep tenants apart gives each its own namespace.
#pragma once

#include <cstdint>

#include "cache/cache_manager.h"

namespace sapwood {

// MurmurHash3's 64-bit finaliser (Austin Appleby, public domain): a bijection that mixes every bit into every other.
inline uint64_t MixBits(uint64_t x) {
  x ^= x >> 33;
  x *= 0xff51afd7ed558ccdULL;
  x ^= x >> 33;
  x *= 0xc4ceb9fe1a85ec53ULL;
  return x ^ (x >> 33);
}

// The chain's state before the first page of a namespace.
inline PageHash SeedHash(uint64_t ns) {
  return {MixBits(ns ^ 0x9e3779b97f4a7c15ULL), MixBits(ns + 0xd1b54a32d192ed03ULL)};
}

// The hash of the page whose keys are keys[0, page_size), following the page (or seed) hashed `previous`.
inline PageHash NextHash(const PageHash& previous, const int32_t* keys, int32_t page_size) {
  uint64_t lo = previous.lo, hi = previous.hi;
  for (int32_t i = 0; i < page_size; i += 2) {
    const uint64_t second = i + 1 < page_size ? static_cast<uint32_t>(keys[i + 1]) : 0;
    const uint64_t pair = static_cast<uint32_t>(keys[i]) | second << 32;
    lo = MixBits(lo ^ pair);
    hi = MixBits((hi ^ 0x8cb92ba72f3d8dd7ULL) + pair);
  }
  return {lo + (hi << 1 | hi >> 63), MixBits(hi ^ lo)};
}

}  // namespace sapwood
