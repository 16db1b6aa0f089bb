// Preconditions of the native entry points. Dispatch code checks before any work; kernels never
// throw.
#pragma once

#include <sstream>
#include <stdexcept>

namespace pyrobust {

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

// The message says what is accepted and what was seen.
template <typename... Parts>
void check(bool condition, const Parts&... parts) {
  if (!condition) fail(parts...);
}

}  // namespace pyrobust
