#include "kernel_headers.h"

#if defined(__x86_64__)
#include <immintrin.h>
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avxvnni"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avxvnni")
#endif
#define JAXINFER_AVXVNNI
namespace jaxinfer {
namespace avx2vnni {
namespace {
#include "simd_avx2.inc"
#include "kernels.inc"
}  // namespace
}  // namespace avx2vnni
#ifdef __clang__
#pragma clang attribute pop
#endif

const Kernels kAvx2Vnni = {"avx2-vnni", avx2vnni::attention_block, avx2vnni::attention_call, avx2vnni::mlp_block, avx2vnni::matmul_call, avx2vnni::argmax_call, avx2vnni::sample_call, avx2vnni::sketch_call, avx2vnni::head_argmax, avx2vnni::read_call};

}  // namespace jaxinfer
#endif
