// What the kernels include, before any instruction set is named: an inline function of a header compiled for a newer CPU could be the
// one that the linker keeps for all.
#pragma once
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <type_traits>

#include "ahead.h"
#include "arena.h"
#include "kernels.h"
#include "pool.h"

// Kernels keep sums in registers only where they are inlined into the loop that owns these.
#define INLINE static inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))
#ifdef __clang__
#define UNROLLED _Pragma("unroll")
#else
#define UNROLLED _Pragma("GCC unroll 8")
#endif
#define INLINE_MEMBER static __attribute__((always_inline))
