// What the FFI handlers hand to the kernels: plain views of arrays. Nothing here depends on an instruction set or on XLA.
#pragma once
#include <cstdint>

namespace jaxinfer {

// How numbers are stored.
// f8: e4m3 without infinities. i4: two 4-bit levels a byte.
enum class Cell : int32_t { f32, bf16, f16, i8, u8, f8, i4 };
// How a weight is stored: floats, int8 levels, or two 4-bit levels a byte (see pallas_kernels/qtensor.py).
enum class Format : int32_t { f32, bf16, i8, i4 };

// A weight [outputs, inputs]: row o holds what output o reads. Scales [outputs, groups]. Blocked: levels in blocks of 32 outputs, see
// levels.inc; the last block is filled up, rows past the outputs are read and not used.
struct Linear {
  Format format = Format::f32;
  bool blocked = false;
  int64_t outputs = 0, inputs = 0;
  const void* values = nullptr;
  const void* scales = nullptr;  // null for floats
  Cell scale_cell = Cell::f32;
  const void* zeros = nullptr;  // null: symmetric; f16, bf16 or f32: a minimum per group; i8 or u8: a zero point per group
  Cell zero_cell = Cell::f32;
  int64_t group = 0;         // inputs per scale; 0: one scale a row
  int64_t input_group = -1;  // inputs that share an int8 scale; 0: all of them; -1: inputs stay floats
  const float* bias = nullptr;
};

enum class NormKind : int32_t { rms, rms_offset, layer, none };

struct Norm {
  NormKind kind = NormKind::rms;
  const float* scale = nullptr;
  const float* bias = nullptr;
  float eps = 0;
};

// Keys and values [rows, kv_heads, tokens, head_dim]; those of 8 bits have float32 scales [rows, kv_heads, tokens].
struct Cache {
  Cell cell = Cell::f32;
  void *k = nullptr, *v = nullptr;
  float *k_scale = nullptr, *v_scale = nullptr;
  // 4 bits, see pallas_kernels/layer_cache.py; all bfloat16: of values [rows, kv_heads, tokens], of keys [rows, kv_heads, tokens / 32,
  // head_dim], and the keys of the newest 32 tokens as they are, [rows, kv_heads, 32, head_dim]
  uint16_t *k_steps = nullptr, *k_lows = nullptr, *v_steps = nullptr, *v_lows = nullptr, *recent = nullptr;
  int64_t rows = 0, tokens = 0;
};

// What attention has beside scores and a causal mask, see pallas_kernels/attention/terms.py; null: none.
struct Terms {
  bool causal = true;
  const int32_t* lengths = nullptr;  // [batch]
  const float *sinks = nullptr, *slopes = nullptr;  // [heads]
  const float* relative = nullptr;   // [heads, 2 reach + 1]
  int64_t reach = 0;
};

struct AttentionCall {
  int64_t batch = 0, tokens = 0, embed = 0, heads = 0, kv_heads = 0, head_dim = 0, rotary_half = 0;
  const float* x = nullptr;         // [batch, tokens, embed]
  const float* residual = nullptr;  // like x, or null
  const int32_t* positions = nullptr;  // [batch, tokens]; null: 0, 1, 2, ...
  const int32_t* rows = nullptr;       // [batch]; null: 0, 1, 2, ...
  const uint8_t* write = nullptr;      // [batch, tokens]; null: all
  const float *cos = nullptr, *sin = nullptr;  // [batch, tokens, rotary_half]
  const int32_t* window = nullptr;             // a scalar; null: none
  Norm norm;
  const float *q_norm = nullptr, *k_norm = nullptr;  // [head_dim]
  Linear qkv[3];
  int parts = 0;
  Linear out;
  float scale = 1, soft_cap = 0;  // soft_cap 0: none
  Terms terms;
  Cache cache;
  float* y = nullptr;  // [batch, tokens, out.outputs]
  // Attention alone: queries [batch, tokens, heads, head_dim] instead of x, nothing is written, and y is like q.
  const float* q = nullptr;
  int threads = 1;
};

enum class Activation : int32_t { silu, gelu, gelu_tanh, relu };

struct MlpCall {
  int64_t rows = 0, embed = 0, width = 0;
  const float* x = nullptr;
  const float* residual = nullptr;
  Norm norm;
  Linear up[2];  // gate and up, or one of them joined (2 width outputs), or the one matrix of an ungated MLP
  int parts = 0;
  bool gated = false;
  Activation activation = Activation::silu;
  Linear down;
  float* y = nullptr;
  int threads = 1;
};

struct MatmulCall {
  int64_t rows = 0;
  const float* x = nullptr;
  const float* residual = nullptr;
  Norm norm;
  Linear w;
  float* y = nullptr;
  int threads = 1;
};

struct ArgmaxCall {
  int64_t rows = 0, columns = 0;
  const float* x = nullptr;
  int32_t* y = nullptr;
  float* largest = nullptr;
  int threads = 1;
};

// The knobs of each row as in pallas_kernels.sampling.sample.
struct SampleCall {
  int64_t rows = 0, columns = 0;
  const float *x = nullptr, *temperature = nullptr, *top_p = nullptr, *min_p = nullptr;
  const int32_t *top_k = nullptr, *steps = nullptr;
  const uint32_t* seeds = nullptr;
  int32_t* y = nullptr;
  int threads = 1;
};

// A sketch of a float or int8 weight, see sketch.inc. blocks: [blocks of 32 outputs, groups of 32 inputs, 704]; numbers: [blocks, 3, 32].
struct SketchCall {
  Linear w;
  uint8_t* blocks = nullptr;
  float* numbers = nullptr;
  int threads = 1;
};

// The first `limit` outputs of norm(x) w^T: which one is the largest, and how large it is; looked: how many blocks of w were read.
struct HeadCall {
  int64_t rows = 0, limit = 0;
  const float* x = nullptr;
  Norm norm;
  Linear w;
  const uint8_t* blocks = nullptr;
  const float* numbers = nullptr;
  int32_t* y = nullptr;
  float* largest = nullptr;
  int32_t* looked = nullptr;
  int threads = 1;
};

// One instruction set's kernels.
struct Kernels {
  const char* name;
  void (*attention_block)(const AttentionCall&);
  void (*attention)(const AttentionCall&);
  void (*mlp_block)(const MlpCall&);
  void (*matmul)(const MatmulCall&);
  void (*argmax)(const ArgmaxCall&);
  void (*sample)(const SampleCall&);
  void (*sketch)(const SketchCall&);
  void (*head_argmax)(const HeadCall&);
  int64_t (*read)(const void* data, int64_t bytes, int threads);  // reads all of it; returns a sum so that it cannot be left out
};

}  // namespace jaxinfer
