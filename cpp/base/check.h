// Errors and checks of the core.
//
// Three kinds of failure, three exception classes; bindings/module.cc maps each to its Python twin once:
//   InvalidArgument  the caller passed something wrong        -> sapwood.errors.InvalidRequest
//   CapacityError    a pool, table or queue is full            -> sapwood.errors.CapacityError
//   InternalError    a broken invariant, i.e. a bug of ours    -> sapwood.errors.InternalError
// A message names the argument, what was expected, what came, and where it helps, the remedy.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace sapwood {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};
class InvalidArgument : public Error {
 public:
  using Error::Error;
};
class CapacityError : public Error {
 public:
  using Error::Error;
};
class InternalError : public Error {
 public:
  using Error::Error;
};

// Concatenates anything that streams. Used to build messages from the same variables a check tests.
template <typename... Args>
std::string StrCat(const Args&... args) {
  std::ostringstream out;
  (out << ... << args);
  return out.str();
}

}  // namespace sapwood

// User error: SAPWOOD_REQUIRE(page_size > 0, "page_size must be positive, got ", page_size);
#define SAPWOOD_REQUIRE(cond, ...)                                          \
  do {                                                                      \
    if (!(cond)) throw ::sapwood::InvalidArgument(::sapwood::StrCat(__VA_ARGS__)); \
  } while (0)

// Bug of ours; always on. The message carries file:line.
#define SAPWOOD_CHECK(cond, ...)                                                               \
  do {                                                                                         \
    if (!(cond))                                                                               \
      throw ::sapwood::InternalError(                                                          \
          ::sapwood::StrCat(__FILE__, ":", __LINE__, ": check failed: " #cond " ", ##__VA_ARGS__)); \
  } while (0)

// As SAPWOOD_CHECK, in debug builds only.
#ifdef NDEBUG
#define SAPWOOD_DCHECK(cond, ...) \
  do {                            \
  } while (0)
#else
#define SAPWOOD_DCHECK(cond, ...) SAPWOOD_CHECK(cond, ##__VA_ARGS__)
#endif
