#include "kernel_headers.h"

#if JAXINFER_HAS_AMX
#include <immintrin.h>
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,amx-tile,amx-int8,amx-bf16,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,amx-tile,amx-int8,amx-bf16,avx2,fma,f16c")
#endif
#define JAXINFER_BF16
#define JAXINFER_AMX
namespace jaxinfer {
namespace amx {
namespace {
#include "simd_avx512.inc"
#include "kernels.inc"
}  // namespace
}  // namespace amx
#ifdef __clang__
#pragma clang attribute pop
#endif

const Kernels kAmx = {"amx", amx::attention_block, amx::attention_call, amx::mlp_block, amx::matmul_call, amx::argmax_call, amx::sample_call, amx::sketch_call, amx::head_argmax, amx::read_call};

}  // namespace jaxinfer
#endif
