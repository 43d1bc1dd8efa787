// The kernels of each instruction set that this library was built for.
#pragma once
#include "types.h"

// Compilers that know the instructions of tiles; Linux gives their registers to a process that asks.
#if defined(__x86_64__) && defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define JAXINFER_HAS_AMX 1
#else
#define JAXINFER_HAS_AMX 0
#endif

namespace jaxinfer {

#if JAXINFER_HAS_AMX
extern const Kernels kAmx;
#endif
#if defined(__x86_64__)
extern const Kernels kAvx512Bf16, kAvx512, kAvx2Vnni, kAvx2;
#elif defined(__aarch64__)
extern const Kernels kNeonDot;
#endif
extern const Kernels kPlain;

// What this CPU can run, the best first, ended by null.
const Kernels* const* usable_kernels();

}  // namespace jaxinfer
