// Receives head and result events from executor.cc, hands them to the loop's reader (engine's add_reader on fd()).
#include "program/completion.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "base/check.h"

namespace sapwood {

CompletionQueue::CompletionQueue() : fd_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) {
  if (fd_ < 0) {
    throw CapacityError(StrCat("eventfd: ", std::strerror(errno), "; raise the limit on open files (ulimit -n)"));
  }
}

CompletionQueue::~CompletionQueue() { close(fd_); }

void CompletionQueue::Post(ExecutorEvent event) {
  const std::lock_guard lock(mutex_);
  const bool was_empty = events_.empty();
  events_.push_back(std::move(event));
  // One write per wake-up of the loop. Under the lock, so that "readable" and "not empty" never differ.
  if (was_empty) {
    const uint64_t one = 1;
    [[maybe_unused]] const ssize_t n = write(fd_, &one, sizeof one);
  }
}

std::vector<ExecutorEvent> CompletionQueue::Drain() {
  const std::lock_guard lock(mutex_);
  uint64_t count;
  [[maybe_unused]] const ssize_t n = read(fd_, &count, sizeof count);  // EAGAIN when there was nothing: fine
  return std::exchange(events_, {});
}

}  // namespace sapwood
