#include "kernel_headers.h"

#if defined(__aarch64__)
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif
#include <arm_neon.h>
#define JAXINFER_DOTPROD
namespace jaxinfer {
namespace neon {
namespace {
#include "simd_generic.inc"
#include "kernels.inc"
}  // namespace
}  // namespace neon
#ifdef __clang__
#pragma clang attribute pop
#endif

const Kernels kNeonDot = {"neon-dotprod", neon::attention_block, neon::attention_call, neon::mlp_block, neon::matmul_call, neon::argmax_call, neon::sample_call, neon::sketch_call, neon::head_argmax, neon::read_call};

}  // namespace jaxinfer
#endif
