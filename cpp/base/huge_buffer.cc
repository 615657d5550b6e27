#include "base/huge_buffer.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <utility>

#include "base/check.h"

namespace sapwood {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

size_t RoundUp(size_t n, size_t to) { return (n + to - 1) / to * to; }

}  // namespace

HugeBuffer::HugeBuffer(size_t bytes) : size_(bytes) {
  if (bytes == 0) return;
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  // Below one huge page the advice could only waste memory: a norm's few KB would occupy 2 MiB.
  const bool huge = bytes >= kHugePage;
  mapped_ = RoundUp(bytes, page);
  const size_t reserve = huge ? mapped_ + kHugePage : mapped_;
  void* base = bytes > SIZE_MAX / 2 ? MAP_FAILED
                                    : mmap(nullptr, reserve, PROT_READ | PROT_WRITE,
                                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) {
    throw CapacityError(StrCat("cannot map ", bytes, " bytes: ", std::strerror(bytes > SIZE_MAX / 2 ? ENOMEM : errno),
                               "; a smaller KV pool or model is needed"));
  }
  data_ = base;
  if (!huge) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(base);
  const uintptr_t aligned = RoundUp(begin, kHugePage);
  if (aligned > begin) munmap(base, aligned - begin);
  const uintptr_t end = begin + reserve, used_end = aligned + mapped_;
  if (end > used_end) munmap(reinterpret_cast<void*>(used_end), end - used_end);
  data_ = reinterpret_cast<void*>(aligned);
  madvise(data_, mapped_, MADV_HUGEPAGE);  // an older kernel or a setting may refuse: slower, not wrong
}

HugeBuffer::~HugeBuffer() {
  if (data_ != nullptr) munmap(data_, mapped_);
}

HugeBuffer::HugeBuffer(HugeBuffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)),
      mapped_(std::exchange(other.mapped_, 0)) {}

HugeBuffer& HugeBuffer::operator=(HugeBuffer&& other) noexcept {
  if (this != &other) {
    HugeBuffer old(std::move(*this));
    data_ = std::exchange(other.data_, nullptr);
    size_ = std::exchange(other.size_, 0);
    mapped_ = std::exchange(other.mapped_, 0);
  }
  return *this;
}

}  // namespace sapwood
