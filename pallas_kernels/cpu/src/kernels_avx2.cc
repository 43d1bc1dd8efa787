#include "kernel_headers.h"

#if defined(__x86_64__)
#include <immintrin.h>
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

namespace jaxinfer {
namespace avx2 {
namespace {
#include "simd_avx2.inc"
#include "kernels.inc"
}  // namespace
}  // namespace avx2
#ifdef __clang__
#pragma clang attribute pop
#endif

const Kernels kAvx2 = {"avx2", avx2::attention_block, avx2::attention_call, avx2::mlp_block, avx2::matmul_call, avx2::argmax_call, avx2::sample_call, avx2::sketch_call, avx2::head_argmax, avx2::read_call};

}  // namespace jaxinfer
#endif
