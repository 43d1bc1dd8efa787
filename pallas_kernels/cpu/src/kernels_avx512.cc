#include "kernel_headers.h"

#if defined(__x86_64__)
#include <immintrin.h>
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")
#endif

namespace jaxinfer {
namespace avx512 {
namespace {
#include "simd_avx512.inc"
#include "kernels.inc"
}  // namespace
}  // namespace avx512
#ifdef __clang__
#pragma clang attribute pop
#endif

const Kernels kAvx512 = {"avx512-vnni", avx512::attention_block, avx512::attention_call, avx512::mlp_block, avx512::matmul_call, avx512::argmax_call, avx512::sample_call, avx512::sketch_call, avx512::head_argmax, avx512::read_call};

}  // namespace jaxinfer
#endif
