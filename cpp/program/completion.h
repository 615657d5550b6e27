// The way back from the executor's thread to the event loop: a queue whose eventfd is readable while it holds events.
#pragma once

#include <mutex>
#include <vector>

#include "program/executor.h"

namespace sapwood {

// Thread safety: all methods, from any thread. Post and Drain never block on the other side for longer than a move.
class CompletionQueue {
 public:
  CompletionQueue();  // throws CapacityError when no file descriptor is left
  ~CompletionQueue();
  CompletionQueue(const CompletionQueue&) = delete;
  CompletionQueue& operator=(const CompletionQueue&) = delete;

  void Post(ExecutorEvent event);
  // Everything posted so far, in order; the descriptor is not readable afterwards.
  std::vector<ExecutorEvent> Drain();
  int fd() const { return fd_; }

 private:
  int fd_;
  std::mutex mutex_;
  std::vector<ExecutorEvent> events_;
};

}  // namespace sapwood
