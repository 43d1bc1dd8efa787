#include "kernel_headers.h"

namespace jaxinfer {
namespace plain {
namespace {
#include "simd_generic.inc"
#include "kernels.inc"
}  // namespace
}  // namespace plain

const Kernels kPlain = {"plain", plain::attention_block, plain::attention_call, plain::mlp_block, plain::matmul_call, plain::argmax_call, plain::sample_call, plain::sketch_call, plain::head_argmax, plain::read_call};

}  // namespace jaxinfer
