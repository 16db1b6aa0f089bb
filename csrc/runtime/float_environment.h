// Round to nearest with denormals for the life of the object, whatever the caller has set
// (torch.set_flush_denormal, fesetround). One per thread that computes what must be sound; costs a
// few nanoseconds.
#pragma once

#if defined(PYROBUST_X86)
#include <xmmintrin.h>
#else
#include <cfenv>
#endif

namespace pyrobust {

class DefaultFloatEnvironment {
 public:
  DefaultFloatEnvironment(const DefaultFloatEnvironment&) = delete;
  DefaultFloatEnvironment& operator=(const DefaultFloatEnvironment&) = delete;

#if defined(PYROBUST_X86)
  DefaultFloatEnvironment() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~DefaultFloatEnvironment() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#else
  DefaultFloatEnvironment() {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultFloatEnvironment() { std::fesetenv(&saved_); }

 private:
  std::fenv_t saved_;
#endif
};

}  // namespace pyrobust
