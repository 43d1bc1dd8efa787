// The doors from XLA (typed FFI) and from Python (ctypes). What an array must be is checked here, before a kernel runs.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>
#include <string>

#include "kernels.h"
#include "xla/ffi/api/ffi.h"

namespace jaxinfer {
namespace {

namespace ffi = xla::ffi;
using Integers = ffi::Span<const int64_t>;
using Numbers = ffi::Span<const float>;

// Collects the first thing that is wrong. Every call makes dozens of checks, sixty calls a token: a message that is put together
// comes as a function, and no string is made for one that holds.
struct Check {
  std::string problem;
  bool ok() const { return problem.empty(); }
  void require(bool condition, const char* what) {
    if (!condition && problem.empty()) problem = what;
  }
  template <class What>
  void require(bool condition, const What& what) {
    if (!condition && problem.empty()) problem = what();
  }
  ffi::Error error(const char* op) const { return ffi::Error::InvalidArgument(std::string("jaxinfer ") + op + ": " + problem); }
};

std::string written(ffi::Span<const int64_t> dims) {
  std::string out = "[";
  for (int64_t d : dims) out += (out.size() > 1 ? ", " : "") + std::to_string(d);
  return out + "]";
}

// An operand or result; one that is left out, or has no elements, stands for None.
struct Array {
  const char* name;
  ffi::DataType type;
  ffi::Span<const int64_t> dims;
  void* data;
  int64_t size;

  bool given() const { return size > 0; }
  template <class T>
  T* as() const {
    return given() ? static_cast<T*>(data) : nullptr;
  }
  // Whether it is of `type_` and has the shape, where it is given.
  void check(Check& check, ffi::DataType type_, std::initializer_list<int64_t> shape) const {
    if (!given()) return;
    bool same = type == type_ && dims.size() == shape.size();
    if (same) same = std::memcmp(dims.begin(), shape.begin(), shape.size() * sizeof(int64_t)) == 0;
    check.require(same, [&] {
      return std::string(name) + " has the wrong dtype or shape " + written(dims) + ", expected " + written(ffi::Span<const int64_t>(shape.begin(), shape.size()));
    });
  }
};

// The operands of a call, by their place among all that it could have. Most calls leave half of them out, and XLA and this file do
// something for each that is given: the last integer has a bit for each place that is taken.
class Operands {
 public:
  Operands(Check& check, const ffi::RemainingArgs& args, const Integers& integers, size_t most_integers, size_t most) : args_(args) {
    const bool counted = integers.size() == most_integers + 1;
    given_ = counted ? static_cast<uint64_t>(integers[most_integers]) : 0;
    check.require(counted && given_ >> most == 0 && static_cast<size_t>(__builtin_popcountll(given_)) == args.size(),
                  "the library and its caller are of different versions");
  }
  Array get(Check& check, size_t place, const char* name) const {
    const Array none{name, ffi::DataType::INVALID, {}, nullptr, 0};
    if (!(given_ >> place & 1)) return none;
    const auto buffer = args_.get<ffi::AnyBuffer>(__builtin_popcountll(given_ & ((uint64_t{1} << place) - 1)));
    if (buffer.has_error()) {
      check.require(false, [&] { return std::string("operand ") + name + " is missing"; });
      return none;
    }
    return Array{name, buffer->element_type(), buffer->dimensions(), buffer->untyped_data(), static_cast<int64_t>(buffer->element_count())};
  }

 private:
  const ffi::RemainingArgs& args_;
  uint64_t given_;
};

bool cell_of(ffi::DataType type, Cell* cell) {
  switch (type) {
    case ffi::DataType::F32: *cell = Cell::f32; return true;
    case ffi::DataType::BF16: *cell = Cell::bf16; return true;
    case ffi::DataType::F16: *cell = Cell::f16; return true;
    case ffi::DataType::S8: *cell = Cell::i8; return true;
    case ffi::DataType::U8: *cell = Cell::u8; return true;
    case ffi::DataType::F8E4M3FN: *cell = Cell::f8; return true;
    default: return false;
  }
}

// A weight is four operands (values, scales, zeros, bias) and three integers (inputs that share a scale; that share an input scale; outputs).
// Values are [outputs, inputs], or in blocks [blocks, words, 32, 4] with scales [blocks, groups * 32].
constexpr size_t kWeightOperands = 4, kWeightIntegers = 3;

Linear linear(Check& check, const Operands& operands, size_t first, const Integers& integers, size_t at) {
  const int64_t group = integers[at], input_group = integers[at + 1];
  const Array values = operands.get(check, first, "values"), scales = operands.get(check, first + 1, "scales");
  const Array zeros = operands.get(check, first + 2, "zeros"), bias = operands.get(check, first + 3, "bias");
  Linear w;
  w.blocked = values.dims.size() == 4;
  w.outputs = integers[at + 2];
  check.require(w.blocked || (values.dims.size() == 2 && values.dims[0] == w.outputs), "a weight must be [outputs, inputs] or [blocks, words, 32, 4]");
  if (!check.ok()) return w;
  const int64_t blocks = values.dims[0];
  check.require(!w.blocked || (values.dims[2] == 32 && values.dims[3] == 4 && (w.outputs + 31) / 32 == blocks),
                "a weight in blocks must be [blocks, words, 32, 4] with as many blocks as its outputs fill");
  if (!check.ok()) return w;
  w.inputs = w.blocked ? values.dims[1] * 4 : values.dims[1];
  w.values = values.data;
  bias.check(check, ffi::DataType::F32, {w.outputs});
  w.bias = bias.as<float>();
  switch (values.type) {
    case ffi::DataType::F32:
    case ffi::DataType::BF16:
      check.require(!w.blocked, "blocks are of int8 or int4 levels");
      w.format = values.type == ffi::DataType::F32 ? Format::f32 : Format::bf16;
      return w;
    case ffi::DataType::S8: w.format = Format::i8; break;
    case ffi::DataType::U8:
      w.format = Format::i4;
      w.inputs *= 2;
      check.require(group > 0, "int4 weights need a group");
      break;
    default: check.require(false, "weights must be float32, bfloat16, int8 or packed int4"); return w;
  }
  w.group = group;
  w.input_group = input_group;
  const bool power = group >= 32 && (group & (group - 1)) == 0;
  check.require(group == 0 || (power && w.inputs % group == 0), "weight groups must be powers of two from 32 on that divide the inputs");
  check.require(input_group < 0 || input_group % 32 == 0, "input groups must be multiples of 32");
  if (!check.ok()) return w;
  const int64_t groups = group > 0 ? w.inputs / group : 1;
  check.require(scales.given() && cell_of(scales.type, &w.scale_cell) && w.scale_cell <= Cell::f16, "scales must be float32, bfloat16 or float16");
  const auto per_group = [&](const Array& a) { w.blocked ? a.check(check, a.type, {blocks, groups * 32}) : a.check(check, a.type, {w.outputs, groups}); };
  per_group(scales);
  w.scales = scales.data;
  if (zeros.given()) {
    check.require(w.format == Format::i4 && cell_of(zeros.type, &w.zero_cell) && w.zero_cell <= Cell::u8, "zeros belong to int4 weights, as floats or 8-bit integers");
    per_group(zeros);
    w.zeros = zeros.data;
  }
  return w;
}

const Kernels* kernels(Check& check, int64_t level) {
  const Kernels* const* usable = usable_kernels();
  for (int64_t i = 0; usable[i]; ++i)
    if (i == level) return usable[i];
  check.require(false, [&] { return "instruction set " + std::to_string(level) + " is not there"; });
  return nullptr;
}

// Runs a kernel; memory that cannot be had is an error like others.
template <class Call>
ffi::Error run(const char* op, void (*kernel)(const Call&), const Call& call) {
  try {
    kernel(call);
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, std::string("jaxinfer ") + op + ": no memory for its intermediate results");
  }
  return ffi::Error::Success();
}

// A cache is seven arrays: k, v, their scales, and of 4 bits their minima and the newest keys; those that its cells do not have are empty.
constexpr size_t kCacheArrays = 7;
const char* const kCacheNames[kCacheArrays] = {"cache k", "cache v", "k scales", "v scales", "k minima", "v minima", "newest keys"};
size_t cache_arrays(Cell cell) { return cell == Cell::i4 ? 7 : cell == Cell::i8 || cell == Cell::f8 ? 4 : 2; }

Cache cache_of(Check& check, const Array (&in)[kCacheArrays], int64_t kv_heads, int64_t head_dim) {
  Cache c;
  const Array& k = in[0];
  check.require(cell_of(k.type, &c.cell), "a cache must be float32, bfloat16, float16, float8_e4m3fn, int8 or packed int4");
  if (c.cell == Cell::u8) c.cell = Cell::i4;
  const bool four = c.cell == Cell::i4;
  const int64_t width = four ? head_dim / 2 : head_dim;
  check.require(k.dims.size() == 4 && k.dims[1] == kv_heads && k.dims[3] == width && !(four && head_dim % 2),
                [&] { return "the cache must be [rows, kv heads, tokens, head_dim], got " + written(k.dims); });
  if (!check.ok()) return c;
  const int64_t rows = c.rows = k.dims[0], tokens = c.tokens = k.dims[2];
  in[1].check(check, k.type, {rows, kv_heads, tokens, width});
  for (size_t i = 1; i < kCacheArrays; ++i)
    check.require(in[i].given() == (k.given() && i < cache_arrays(c.cell)), [&] { return std::string(kCacheNames[i]) + " do not belong to the cache"; });
  c.k = k.data, c.v = in[1].data;
  if (!four) {
    for (size_t i : {2, 3}) in[i].check(check, ffi::DataType::F32, {rows, kv_heads, tokens});
    c.k_scale = in[2].as<float>(), c.v_scale = in[3].as<float>();
    return c;
  }
  check.require(tokens % 32 == 0, [&] { return "a cache of 4 bits holds whole groups of 32 tokens, got " + std::to_string(tokens); });
  for (size_t i : {2, 4}) in[i].check(check, ffi::DataType::BF16, {rows, kv_heads, tokens / 32, head_dim});
  for (size_t i : {3, 5}) in[i].check(check, ffi::DataType::BF16, {rows, kv_heads, tokens});
  in[6].check(check, ffi::DataType::BF16, {rows, kv_heads, 32, head_dim});
  c.k_steps = in[2].as<uint16_t>(), c.v_steps = in[3].as<uint16_t>(), c.k_lows = in[4].as<uint16_t>(), c.v_lows = in[5].as<uint16_t>();
  c.recent = in[6].as<uint16_t>();
  return c;
}

// Four operands: lengths, sinks, slopes, relative.
constexpr size_t kTerms = 4;
Terms terms_of(Check& check, const Operands& operands, size_t first, bool causal, int64_t batch, int64_t heads) {
  const Array lengths = operands.get(check, first, "lengths"), sinks = operands.get(check, first + 1, "sinks");
  const Array slopes = operands.get(check, first + 2, "slopes"), relative = operands.get(check, first + 3, "relative");
  Terms t;
  if (!check.ok()) return t;
  lengths.check(check, ffi::DataType::S32, {batch});
  sinks.check(check, ffi::DataType::F32, {heads});
  slopes.check(check, ffi::DataType::F32, {heads});
  if (relative.given()) {
    check.require(relative.dims.size() == 2 && relative.dims[1] % 2 == 1, "relative must be [heads, 2 reach + 1]");
    if (!check.ok()) return t;
    relative.check(check, ffi::DataType::F32, {heads, relative.dims[1]});
    t.reach = relative.dims[1] / 2;
  }
  t.causal = causal;
  t.lengths = lengths.as<int32_t>(), t.sinks = sinks.as<float>(), t.slopes = slopes.as<float>(), t.relative = relative.as<float>();
  return t;
}

// Operands: x, residual, positions, rows, write, cos, sin, window; a cache; norm, its bias, norms of q and k; terms; weights of q, k, v, out.
// integers: level, threads, head_dim, query heads per kv head, norm kind, parts of qkv, causal, then those of q, k, v and out, see
// linear. numbers: eps, scale, soft cap (0: none). Here and below a last integer says which operands are given, see Operands.
ffi::Error AttentionBlock(ffi::RemainingArgs args, ffi::RemainingRets rets, Integers integers, Numbers numbers) {
  constexpr size_t kFirst = 8, kNorms = kFirst + kCacheArrays, kFirstTerm = kNorms + 4, kWeights = kFirstTerm + kTerms;
  Check check;
  const Operands operands(check, args, integers, 7 + 4 * kWeightIntegers, kWeights + 4 * kWeightOperands);
  check.require(numbers.size() == 3, "it has three numbers");
  if (!check.ok()) return check.error("attention_block");
  const char* const names[kFirstTerm] = {"x",      "residual",    "positions",   "rows",        "write",       "cos",         "sin",
                                         "window", kCacheNames[0], kCacheNames[1], kCacheNames[2], kCacheNames[3], kCacheNames[4], kCacheNames[5],
                                         kCacheNames[6], "norm", "norm bias", "q norm", "k norm"};
  Array in[kFirstTerm];
  for (size_t i = 0; i < kFirstTerm; ++i) in[i] = operands.get(check, i, names[i]);
  const auto &x = in[0], &residual = in[1], &positions = in[2], &rows = in[3], &write = in[4], &cos = in[5], &sin = in[6], &window = in[7];
  const ffi::DataType f32 = ffi::DataType::F32, s32 = ffi::DataType::S32;
  AttentionCall c;
  check.require(x.dims.size() == 3 && x.type == f32, "x must be float32 [batch, tokens, embed]");
  if (!check.ok()) return check.error("attention_block");
  c.batch = x.dims[0], c.tokens = x.dims[1], c.embed = x.dims[2];
  const Kernels* const table = kernels(check, integers[0]);
  c.threads = static_cast<int>(integers[1]);
  c.head_dim = integers[2];
  const int64_t group = integers[3];
  c.norm.kind = static_cast<NormKind>(integers[4]);
  c.parts = static_cast<int>(integers[5]);
  check.require(c.parts >= 1 && c.parts <= 3 && c.head_dim > 0 && group > 0, "bad integers");
  if (!check.ok()) return check.error("attention_block");
  int64_t columns = 0;
  for (int p = 0; p < c.parts; ++p) {
    c.qkv[p] = linear(check, operands, kWeights + kWeightOperands * p, integers, 7 + kWeightIntegers * p);
    check.require(c.qkv[p].inputs == c.embed, "qkv must have as many inputs as x");
    columns += c.qkv[p].outputs;
  }
  c.out = linear(check, operands, kWeights + 3 * kWeightOperands, integers, 7 + 3 * kWeightIntegers);
  check.require(columns > 0 && columns % ((group + 2) * c.head_dim) == 0, "qkv is not made of whole heads");
  if (!check.ok()) return check.error("attention_block");
  c.kv_heads = columns / ((group + 2) * c.head_dim);
  c.heads = group * c.kv_heads;
  check.require(c.out.inputs == c.heads * c.head_dim, "out must have an input for each number of the heads");
  c.terms = terms_of(check, operands, kFirstTerm, integers[6] != 0, c.batch, c.heads);
  residual.check(check, f32, {c.batch, c.tokens, c.out.outputs});
  positions.check(check, s32, {c.batch, c.tokens});
  rows.check(check, s32, {c.batch});
  write.check(check, ffi::DataType::PRED, {c.batch, c.tokens});
  check.require(cos.dims.size() == 3 || !cos.given(), "cos must be [batch, tokens, half]");
  if (!check.ok()) return check.error("attention_block");
  c.rotary_half = cos.given() ? cos.dims[2] : 0;
  cos.check(check, f32, {c.batch, c.tokens, c.rotary_half});
  sin.check(check, f32, {c.batch, c.tokens, c.rotary_half});
  check.require(cos.given() == sin.given() && 2 * c.rotary_half <= c.head_dim, "cos and sin must have at most half a head");
  check.require(!window.given() || (window.type == s32 && window.size == 1), "window must be one int32");
  for (size_t i : {0, 1}) in[kNorms + i].check(check, f32, {c.embed});
  for (size_t i : {2, 3}) in[kNorms + i].check(check, f32, {c.head_dim});
  c.norm.scale = in[kNorms].as<float>(), c.norm.bias = in[kNorms + 1].as<float>();
  c.q_norm = in[kNorms + 2].as<float>(), c.k_norm = in[kNorms + 3].as<float>();
  c.x = x.as<float>(), c.residual = residual.as<float>();
  c.positions = positions.as<int32_t>(), c.rows = rows.as<int32_t>(), c.write = write.as<uint8_t>();
  c.cos = cos.as<float>(), c.sin = sin.as<float>(), c.window = window.as<int32_t>();
  c.norm.eps = numbers[0], c.scale = numbers[1], c.soft_cap = numbers[2];

  check.require(rets.size() >= 3 && rets.size() <= 1 + kCacheArrays, "it returns y and a cache");
  if (!check.ok()) return check.error("attention_block");
  // the results of an aliased cache are its operands; a copy is needed only where XLA did not donate them
  Array out[kCacheArrays];
  const bool fresh = !in[kFirst].given();
  for (size_t i = 0; i < kCacheArrays; ++i) {
    const auto result = i + 1 < rets.size() ? rets.get<ffi::AnyBuffer>(i + 1) : rets.get<ffi::AnyBuffer>(1);
    const Array& from = in[kFirst + i];
    const bool there = i + 1 < rets.size();
    check.require(!result.has_error(), "it returns y and a cache");
    if (!check.ok()) return check.error("attention_block");
    out[i] = Array{kCacheNames[i], (*result)->element_type(), (*result)->dimensions(), (*result)->untyped_data(), there ? static_cast<int64_t>((*result)->element_count()) : 0};
    check.require(fresh || from.size == out[i].size, "the cache that comes back must be like the one given");
    if (check.ok() && from.given() && from.data != out[i].data) {
      check.require(from.type == out[i].type, "the cache that comes back must be like the one given");
      if (check.ok()) std::memcpy(out[i].data, from.data, (*result)->size_bytes());
    }
  }
  c.cache = cache_of(check, out, c.kv_heads, c.head_dim);
  const auto y = rets.get<ffi::AnyBuffer>(0);
  check.require(!y.has_error() && (*y)->element_type() == f32 && static_cast<int64_t>((*y)->element_count()) == c.batch * c.tokens * c.out.outputs,
                "y has the wrong shape");
  check.require(rows.given() || c.cache.rows == c.batch, "without row ids the cache must have as many rows as x");
  check.require(!fresh || (c.cache.tokens == c.tokens && c.cache.cell != Cell::i4), "a fresh cache must have as many tokens as x, not of 4 bits");
  if (!check.ok()) return check.error("attention_block");
  if (fresh) c.positions = nullptr, c.rows = nullptr, c.write = nullptr;
  c.y = static_cast<float*>((*y)->untyped_data());
  return run("attention_block", table->attention_block, c);
}

// Operands: q, positions, rows, window; a cache; terms. integers: level, threads, causal. numbers: scale, soft cap (0: none).
ffi::Error Attention(ffi::RemainingArgs args, ffi::Result<ffi::Buffer<ffi::DataType::F32>> y, Integers integers, Numbers numbers) {
  constexpr size_t kFirst = 4, kFirstTerm = kFirst + kCacheArrays;
  Check check;
  const Operands operands(check, args, integers, 3, kFirstTerm + kTerms);
  check.require(numbers.size() == 2, "it has two numbers");
  if (!check.ok()) return check.error("attention");
  const Array q = operands.get(check, 0, "q"), positions = operands.get(check, 1, "positions");
  const Array rows = operands.get(check, 2, "rows"), window = operands.get(check, 3, "window");
  Array in[kCacheArrays];
  for (size_t i = 0; i < kCacheArrays; ++i) in[i] = operands.get(check, kFirst + i, kCacheNames[i]);
  check.require(q.dims.size() == 4 && q.type == ffi::DataType::F32 && in[0].dims.size() == 4 && in[0].dims[1] > 0, "q must be float32 [batch, tokens, heads, head_dim], and a cache of 4 axes");
  const Kernels* const table = kernels(check, integers[0]);
  if (!check.ok()) return check.error("attention");
  AttentionCall c;
  c.batch = q.dims[0], c.tokens = q.dims[1], c.heads = q.dims[2], c.head_dim = q.dims[3], c.kv_heads = in[0].dims[1];
  c.threads = static_cast<int>(integers[1]);
  check.require(c.heads % c.kv_heads == 0, "the heads of q must be a multiple of the cache's");
  c.cache = cache_of(check, in, c.kv_heads, c.head_dim);
  c.terms = terms_of(check, operands, kFirstTerm, integers[2] != 0, c.batch, c.heads);
  positions.check(check, ffi::DataType::S32, {c.batch, c.tokens});
  rows.check(check, ffi::DataType::S32, {c.batch});
  check.require(rows.given() || c.cache.rows == c.batch, "without row ids the cache must have as many rows as q");
  check.require(!window.given() || (window.type == ffi::DataType::S32 && window.size == 1), "window must be one int32");
  check.require(static_cast<int64_t>(y->element_count()) == q.size, "y must be like q");
  if (!check.ok()) return check.error("attention");
  c.q = q.as<float>(), c.positions = positions.as<int32_t>(), c.rows = rows.as<int32_t>(), c.window = window.as<int32_t>();
  c.scale = numbers[0], c.soft_cap = numbers[1];
  c.y = y->typed_data();
  return run("attention", table->attention, c);
}

// integers: level, threads, norm kind, activation, gated, parts of up, then those of gate, up and down. numbers: eps.
ffi::Error MlpBlock(ffi::RemainingArgs args, ffi::Result<ffi::Buffer<ffi::DataType::F32>> y, Integers integers, Numbers numbers) {
  Check check;
  const Operands operands(check, args, integers, 6 + 3 * kWeightIntegers, 4 + 3 * kWeightOperands);
  check.require(numbers.size() == 1, "it has one number");
  if (!check.ok()) return check.error("mlp_block");
  const ffi::DataType f32 = ffi::DataType::F32;
  const Array x = operands.get(check, 0, "x"), residual = operands.get(check, 1, "residual");
  const Array norm = operands.get(check, 2, "norm"), norm_bias = operands.get(check, 3, "norm bias");
  MlpCall c;
  const Kernels* const table = kernels(check, integers[0]);
  check.require(x.dims.size() == 3 && x.type == f32 && integers[5] >= 1 && integers[5] <= 2, "x must be float32 [batch, tokens, embed]");
  if (!check.ok()) return check.error("mlp_block");
  c.rows = x.dims[0] * x.dims[1], c.embed = x.dims[2];
  c.threads = static_cast<int>(integers[1]);
  c.norm.kind = static_cast<NormKind>(integers[2]);
  c.activation = static_cast<Activation>(integers[3]);
  c.gated = integers[4] != 0;
  c.parts = static_cast<int>(integers[5]);
  for (int p = 0; p < c.parts; ++p) {
    c.up[p] = linear(check, operands, 4 + kWeightOperands * p, integers, 6 + kWeightIntegers * p);
    check.require(c.up[p].inputs == c.embed, "gate and up must have as many inputs as x");
  }
  c.down = linear(check, operands, 12, integers, 6 + 2 * kWeightIntegers);
  c.width = c.down.inputs;
  const bool joined = c.gated && c.parts == 1;
  check.require(c.gated || c.parts == 1, "an ungated MLP has one weight before its activation");
  for (int p = 0; p < c.parts; ++p) check.require(c.up[p].outputs == (joined ? 2 : 1) * c.width, "gate and up must have as many outputs as down has inputs");
  check.require(!joined || !c.up[0].blocked || c.width % 32 == 0, "gate and up in one array of blocks must have whole blocks each");
  norm.check(check, f32, {c.embed});
  norm_bias.check(check, f32, {c.embed});
  residual.check(check, f32, {x.dims[0], x.dims[1], c.down.outputs});
  check.require(static_cast<int64_t>(y->element_count()) == c.rows * c.down.outputs, "y has the wrong shape");
  if (!check.ok()) return check.error("mlp_block");
  c.norm.scale = norm.as<float>(), c.norm.bias = norm_bias.as<float>(), c.norm.eps = numbers[0];
  c.x = x.as<float>(), c.residual = residual.as<float>(), c.y = y->typed_data();
  return run("mlp_block", table->mlp_block, c);
}

// Operands: x, residual, norm, its bias, weight. integers: level, threads, norm kind, then those of the weight. numbers: eps.
ffi::Error Matmul(ffi::RemainingArgs args, ffi::Result<ffi::Buffer<ffi::DataType::F32>> y, Integers integers, Numbers numbers) {
  Check check;
  const Operands operands(check, args, integers, 3 + kWeightIntegers, 4 + kWeightOperands);
  check.require(numbers.size() == 1, "it has one number");
  if (!check.ok()) return check.error("quant_matmul");
  const ffi::DataType f32 = ffi::DataType::F32;
  const Array x = operands.get(check, 0, "x"), residual = operands.get(check, 1, "residual");
  const Array norm = operands.get(check, 2, "norm"), norm_bias = operands.get(check, 3, "norm bias");
  const Kernels* const table = kernels(check, integers[0]);
  MatmulCall c;
  c.threads = static_cast<int>(integers[1]);
  c.norm.kind = static_cast<NormKind>(integers[2]);
  c.w = linear(check, operands, 4, integers, 3);
  check.require(x.dims.size() == 2 && x.type == f32 && x.dims[1] == c.w.inputs, "x must be float32 [rows, inputs]");
  if (!check.ok()) return check.error("quant_matmul");
  c.rows = x.dims[0];
  norm.check(check, f32, {c.w.inputs});
  norm_bias.check(check, f32, {c.w.inputs});
  residual.check(check, f32, {c.rows, c.w.outputs});
  check.require(static_cast<int64_t>(y->element_count()) == c.rows * c.w.outputs, "y has the wrong shape");
  if (!check.ok()) return check.error("quant_matmul");
  c.norm.scale = norm.as<float>(), c.norm.bias = norm_bias.as<float>(), c.norm.eps = numbers[0];
  c.x = x.as<float>(), c.residual = residual.as<float>(), c.y = y->typed_data();
  return run("quant_matmul", table->matmul, c);
}

// integers: level, threads.
ffi::Error Argmax(ffi::Buffer<ffi::DataType::F32> x, ffi::Result<ffi::Buffer<ffi::DataType::S32>> ids, ffi::Result<ffi::Buffer<ffi::DataType::F32>> largest,
                  Integers integers) {
  Check check;
  const auto dims = x.dimensions();
  check.require(integers.size() == 3 && dims.size() == 2 && dims[1] > 0, "x must be [rows, columns]");
  const Kernels* const table = check.ok() ? kernels(check, integers[0]) : nullptr;
  check.require(static_cast<int64_t>(ids->element_count()) == dims[0] && ids->element_count() == largest->element_count(), "one result a row");
  if (!check.ok()) return check.error("argmax");
  return run("argmax", table->argmax,
             ArgmaxCall{dims[0], dims[1], x.typed_data(), ids->typed_data(), largest->typed_data(), static_cast<int>(integers[1])});
}

// integers: level, threads. Operands: logits, temperature, top_k, top_p, min_p, seeds, steps.
ffi::Error Sample(ffi::RemainingArgs args, ffi::Result<ffi::Buffer<ffi::DataType::S32>> ids, Integers integers) {
  Check check;
  const Operands operands(check, args, integers, 2, 7);
  if (!check.ok()) return check.error("sample");
  const ffi::DataType f32 = ffi::DataType::F32, s32 = ffi::DataType::S32;
  const Array x = operands.get(check, 0, "logits");
  const Array temperature = operands.get(check, 1, "temperature"), top_k = operands.get(check, 2, "top_k");
  const Array top_p = operands.get(check, 3, "top_p"), min_p = operands.get(check, 4, "min_p");
  const Array seeds = operands.get(check, 5, "seeds"), steps = operands.get(check, 6, "steps");
  const Kernels* const table = kernels(check, integers[0]);
  check.require(x.dims.size() == 2 && x.type == f32 && x.given(), "logits must be float32 [rows, vocabulary]");
  if (!check.ok()) return check.error("sample");
  SampleCall c;
  c.rows = x.dims[0], c.columns = x.dims[1];
  for (const Array& a : {temperature, top_p, min_p}) a.check(check, f32, {c.rows});
  for (const Array& a : {top_k, steps}) a.check(check, s32, {c.rows});
  seeds.check(check, ffi::DataType::U32, {c.rows});
  for (const Array& a : {temperature, top_k, top_p, min_p, seeds, steps}) check.require(a.given(), "every row needs all of its knobs");
  check.require(static_cast<int64_t>(ids->element_count()) == c.rows, "one result a row");
  if (!check.ok()) return check.error("sample");
  c.x = x.as<float>(), c.temperature = temperature.as<float>(), c.top_p = top_p.as<float>(), c.min_p = min_p.as<float>();
  c.top_k = top_k.as<int32_t>(), c.steps = steps.as<int32_t>(), c.seeds = seeds.as<uint32_t>();
  c.y = ids->typed_data(), c.threads = static_cast<int>(integers[1]);
  return run("sample", table->sample, c);
}

constexpr int64_t kSketchBytes = 704, kSketchNumbers = 3, kSketchRows = 2;  // of a group of a block, of a row; inputs at most (sketch.inc)

// Operands: x, norm, its bias, limit, blocks and numbers of the sketch, weight. integers: level, threads, norm kind, then those of the weight.
// numbers: eps. Results: ids, largest, looked.
ffi::Error HeadArgmax(ffi::RemainingArgs args, ffi::Result<ffi::Buffer<ffi::DataType::S32>> ids, ffi::Result<ffi::Buffer<ffi::DataType::F32>> largest,
                      ffi::Result<ffi::Buffer<ffi::DataType::S32>> looked, Integers integers, Numbers numbers) {
  Check check;
  const Operands operands(check, args, integers, 3 + kWeightIntegers, 6 + kWeightOperands);
  check.require(numbers.size() == 1, "it has one number");
  if (!check.ok()) return check.error("head_argmax");
  const ffi::DataType f32 = ffi::DataType::F32;
  const Array x = operands.get(check, 0, "x"), norm = operands.get(check, 1, "norm"), norm_bias = operands.get(check, 2, "norm bias");
  const Array limit = operands.get(check, 3, "limit"), blocks = operands.get(check, 4, "blocks"), of_rows = operands.get(check, 5, "numbers");
  const Kernels* const table = kernels(check, integers[0]);
  HeadCall c;
  c.threads = static_cast<int>(integers[1]);
  c.norm.kind = static_cast<NormKind>(integers[2]);
  c.w = linear(check, operands, 6, integers, 3);
  check.require(c.w.format != Format::i4 && !c.w.bias, "a head with a sketch has float or int8 weights and no bias");
  check.require(x.dims.size() == 2 && x.type == f32 && x.dims[1] == c.w.inputs && x.dims[0] <= kSketchRows, "x must be float32 [rows, inputs] with at most 2 rows");
  if (!check.ok()) return check.error("head_argmax");
  c.rows = x.dims[0];
  const int64_t count = (c.w.outputs + 31) / 32, groups = (c.w.inputs + 31) / 32;
  norm.check(check, f32, {c.w.inputs});
  norm_bias.check(check, f32, {c.w.inputs});
  limit.check(check, ffi::DataType::S32, {});
  blocks.check(check, ffi::DataType::U8, {count, groups, kSketchBytes});
  of_rows.check(check, f32, {count, kSketchNumbers, 32});
  check.require(limit.given() && blocks.given() && of_rows.given(), "it needs a limit and a sketch");
  for (int64_t size : {static_cast<int64_t>(ids->element_count()), static_cast<int64_t>(largest->element_count()), static_cast<int64_t>(looked->element_count())})
    check.require(size == c.rows, "one result a row");
  if (!check.ok()) return check.error("head_argmax");
  c.limit = std::max<int64_t>(0, std::min<int64_t>(*limit.as<int32_t>(), c.w.outputs));
  c.norm.scale = norm.as<float>(), c.norm.bias = norm_bias.as<float>(), c.norm.eps = numbers[0];
  c.x = x.as<float>(), c.blocks = blocks.as<uint8_t>(), c.numbers = of_rows.as<float>();
  c.y = ids->typed_data(), c.largest = largest->typed_data(), c.looked = looked->typed_data();
  return run("head_argmax", table->head_argmax, c);
}

}  // namespace
}  // namespace jaxinfer

#define JAXINFER_EXPORT extern "C" __attribute__((visibility("default")))
#define JAXINFER_HANDLER(name, binding)                                       \
  JAXINFER_EXPORT XLA_FFI_Error* name(XLA_FFI_CallFrame* frame) {             \
    static auto* const handler = (binding).release();                         \
    return handler->Call(frame);                                              \
  }

JAXINFER_HANDLER(jaxinfer_attention_block, xla::ffi::Ffi::Bind()
                                               .RemainingArgs()
                                               .RemainingRets()
                                               .Attr<xla::ffi::Span<const int64_t>>("integers")
                                               .Attr<xla::ffi::Span<const float>>("numbers")
                                               .To(jaxinfer::AttentionBlock))
JAXINFER_HANDLER(jaxinfer_attention, xla::ffi::Ffi::Bind()
                                         .RemainingArgs()
                                         .Ret<xla::ffi::Buffer<xla::ffi::DataType::F32>>()
                                         .Attr<xla::ffi::Span<const int64_t>>("integers")
                                         .Attr<xla::ffi::Span<const float>>("numbers")
                                         .To(jaxinfer::Attention))
JAXINFER_HANDLER(jaxinfer_mlp_block, xla::ffi::Ffi::Bind()
                                         .RemainingArgs()
                                         .Ret<xla::ffi::Buffer<xla::ffi::DataType::F32>>()
                                         .Attr<xla::ffi::Span<const int64_t>>("integers")
                                         .Attr<xla::ffi::Span<const float>>("numbers")
                                         .To(jaxinfer::MlpBlock))
JAXINFER_HANDLER(jaxinfer_quant_matmul, xla::ffi::Ffi::Bind()
                                            .RemainingArgs()
                                            .Ret<xla::ffi::Buffer<xla::ffi::DataType::F32>>()
                                            .Attr<xla::ffi::Span<const int64_t>>("integers")
                                            .Attr<xla::ffi::Span<const float>>("numbers")
                                            .To(jaxinfer::Matmul))
JAXINFER_HANDLER(jaxinfer_argmax, xla::ffi::Ffi::Bind()
                                      .Arg<xla::ffi::Buffer<xla::ffi::DataType::F32>>()
                                      .Ret<xla::ffi::Buffer<xla::ffi::DataType::S32>>()
                                      .Ret<xla::ffi::Buffer<xla::ffi::DataType::F32>>()
                                      .Attr<xla::ffi::Span<const int64_t>>("integers")
                                      .To(jaxinfer::Argmax))

JAXINFER_HANDLER(jaxinfer_sample, xla::ffi::Ffi::Bind()
                                      .RemainingArgs()
                                      .Ret<xla::ffi::Buffer<xla::ffi::DataType::S32>>()
                                      .Attr<xla::ffi::Span<const int64_t>>("integers")
                                      .To(jaxinfer::Sample))
JAXINFER_HANDLER(jaxinfer_head_argmax, xla::ffi::Ffi::Bind()
                                           .RemainingArgs()
                                           .Ret<xla::ffi::Buffer<xla::ffi::DataType::S32>>()
                                           .Ret<xla::ffi::Buffer<xla::ffi::DataType::F32>>()
                                           .Ret<xla::ffi::Buffer<xla::ffi::DataType::S32>>()
                                           .Attr<xla::ffi::Span<const int64_t>>("integers")
                                           .Attr<xla::ffi::Span<const float>>("numbers")
                                           .To(jaxinfer::HeadArgmax))

// The name of a usable instruction set, the best first, or null past the last.
JAXINFER_EXPORT const char* jaxinfer_instruction_set(int level) {
  const jaxinfer::Kernels* const* usable = jaxinfer::usable_kernels();
  for (int i = 0; usable[i]; ++i)
    if (i == level) return usable[i]->name;
  return nullptr;
}
// Reads `bytes` bytes with `threads` threads.
JAXINFER_EXPORT int64_t jaxinfer_read(const void* data, int64_t bytes, int threads) { return jaxinfer::usable_kernels()[0]->read(data, bytes, threads); }
// Makes the sketch of a head, see types.h. scale_cell, group: of int8 levels.
JAXINFER_EXPORT void jaxinfer_sketch(int level, int threads, jaxinfer::Format format, bool blocked, int64_t outputs, int64_t inputs, const void* values,
                                     const void* scales, jaxinfer::Cell scale_cell, int64_t group, uint8_t* blocks, float* numbers) {
  jaxinfer::SketchCall c;
  c.w.format = format, c.w.blocked = blocked, c.w.outputs = outputs, c.w.inputs = inputs, c.w.values = values;
  c.w.scales = scales, c.w.scale_cell = scale_cell, c.w.group = group;
  c.blocks = blocks, c.numbers = numbers, c.threads = threads;
  jaxinfer::usable_kernels()[level]->sketch(c);
}
// What this library was built from.
JAXINFER_EXPORT const char* jaxinfer_sources() { return JAXINFER_SOURCES; }
JAXINFER_EXPORT int jaxinfer_ffi_minor() { return XLA_FFI_API_MINOR; }
