#include "kernel_headers.h"

#if defined(__x86_64__)
#include <immintrin.h>
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,avx2,fma,f16c")
#endif
#define JAXINFER_BF16
namespace jaxinfer {
namespace avx512bf16 {
namespace {
#include "simd_avx512.inc"
#include "kernels.inc"
}  // namespace
}  // namespace avx512bf16
#ifdef __clang__
#pragma clang attribute pop
#endif

const Kernels kAvx512Bf16 = {"avx512-bf16", avx512bf16::attention_block, avx512bf16::attention_call, avx512bf16::mlp_block, avx512bf16::matmul_call, avx512bf16::argmax_call, avx512bf16::sample_call, avx512bf16::sketch_call, avx512bf16::head_argmax, avx512bf16::read_call};

}  // namespace jaxinfer
#endif
