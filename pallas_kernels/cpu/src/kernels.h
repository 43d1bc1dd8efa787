// The kernels of each instruction set that this library was built for.
#pragma once
#include "types.h"

namespace jaxinfer {

#if defined(__x86_64__)
extern const Kernels kAvx512Bf16, kAvx512, kAvx2Vnni, kAvx2;
#elif defined(__aarch64__)
extern const Kernels kNeonDot;
#endif
extern const Kernels kPlain;

// What this CPU can run, the best first, ended by null.
const Kernels* const* usable_kernels();

}  // namespace jaxinfer
