// Zeroed memory for what is streamed every step: packed weights and the KV pool.
//
// Large buffers are aligned to 2 MiB and advised to use huge pages, which is worth up to a factor of two in bandwidth
// on a busy machine. Pages are touched lazily: an unused part of the pool costs address space only.
#pragma once

#include <cstddef>

namespace sapwood {

// Owns one anonymous mapping. Movable; thread safety as for plain memory.
class HugeBuffer {
 public:
  HugeBuffer() = default;
  // bytes == 0 gives null data. Throws CapacityError when the system refuses the memory.
  explicit HugeBuffer(size_t bytes);
  ~HugeBuffer();
  HugeBuffer(HugeBuffer&& other) noexcept;
  HugeBuffer& operator=(HugeBuffer&& other) noexcept;
  HugeBuffer(const HugeBuffer&) = delete;
  HugeBuffer& operator=(const HugeBuffer&) = delete;

  void* data() const { return data_; }
  size_t size() const { return size_; }  // as asked for

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
  size_t mapped_ = 0;
};

}  // namespace sapwood
