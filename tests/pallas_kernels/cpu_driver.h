// What the driver's cases are made of: arrays that end where they are allocated to, weights of every format with their values in double, and
// the plain arithmetic that results are compared with.
#pragma once
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels.h"

using namespace jaxinfer;

namespace {

std::atomic<int> failures{0};

// Bytes on the heap that end where the array ends.
struct Bytes {
  std::unique_ptr<char[]> data;
  int64_t size = 0;
  explicit Bytes(int64_t n = 0) : data(new char[static_cast<size_t>(n)]), size(n) {}
};
template <class T>
Bytes exact(const std::vector<T>& v) {
  Bytes out(static_cast<int64_t>(v.size() * sizeof(T)));
  if (!v.empty()) std::memcpy(out.data.get(), v.data(), v.size() * sizeof(T));
  return out;
}

uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
float from_bf16(uint16_t h) {
  const uint32_t bits = static_cast<uint32_t>(h) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
float from_f8(uint8_t bits) {
  const int exponent = bits >> 3 & 15, fraction = bits & 7;
  const float size = exponent ? std::ldexp(1.0f + static_cast<float>(fraction) / 8, exponent - 7) : std::ldexp(static_cast<float>(fraction), -9);
  return bits & 128 ? -size : size;
}
// small powers of two and simple fractions, exact in float16
uint16_t to_f16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x == 0) return 0;
  return static_cast<uint16_t>((bits >> 16 & 0x8000) | ((bits >> 23 & 255) - 112) << 10 | (bits >> 13 & 0x3ff));
}

struct Random {
  std::mt19937_64 engine;
  explicit Random(uint64_t seed) : engine(seed) {}
  int64_t below(int64_t n) { return static_cast<int64_t>(engine() % static_cast<uint64_t>(n)); }
  int64_t between(int64_t a, int64_t b) { return a + below(b - a + 1); }
  bool coin() { return engine() & 1; }
  float normal() { return std::normal_distribution<float>()(engine); }
  std::vector<float> floats(int64_t n, float scale = 1) {
    std::vector<float> v(static_cast<size_t>(n));
    for (float& x : v) x = normal() * scale;
    return v;
  }
  template <class T>
  T pick(std::initializer_list<T> from) {
    return from.begin()[below(static_cast<int64_t>(from.size()))];
  }
};

// A weight in some format with its values as doubles.
struct Weight {
  Linear view;
  std::vector<double> w;
  Bytes values, scales, zeros, bias;
  std::vector<float> bias_values;
};

// rows [outputs, row bytes], `cell` bytes moved as one -> [blocks, row bytes / cell, 32, cell]; rows of zeros fill up the last block
Bytes in_blocks(const Bytes& rows, int64_t outputs, int64_t cell) {
  const int64_t row = rows.size / outputs, blocks = (outputs + 31) / 32;
  Bytes out(blocks * 32 * row);
  std::memset(out.data.get(), 0, static_cast<size_t>(out.size));
  for (int64_t o = 0; o < outputs; ++o)
    for (int64_t at = 0; at < row; at += cell)
      std::memcpy(out.data.get() + o / 32 * 32 * row + at * 32 + o % 32 * cell, rows.data.get() + o * row + at, static_cast<size_t>(cell));
  return out;
}

// blocks: levels may be in blocks of 32 outputs.
Weight make_weight(Random& random, int64_t outputs, int64_t inputs, bool round_inputs, bool blocks = true) {
  Weight out;
  Linear& v = out.view;
  v.outputs = outputs, v.inputs = inputs;
  out.w.resize(static_cast<size_t>(outputs * inputs));
  v.format = inputs % 32 ? random.pick({Format::f32, Format::bf16}) : random.pick({Format::f32, Format::bf16, Format::i8, Format::i4});
  const auto whole = random.floats(outputs * inputs, 0.3f);
  if (v.format == Format::f32) {
    for (size_t i = 0; i < out.w.size(); ++i) out.w[i] = whole[i];
    out.values = exact(whole);
  } else if (v.format == Format::bf16) {
    std::vector<uint16_t> cells(whole.size());
    for (size_t i = 0; i < cells.size(); ++i) out.w[i] = from_bf16(cells[i] = to_bf16(whole[i]));
    out.values = exact(cells);
  } else {
    int64_t group = random.pick<int64_t>({32, 64, 128, 256});
    while (inputs % group) group /= 2;
    const bool four = v.format == Format::i4;
    v.group = four || random.coin() ? group : 0;
    v.input_group = round_inputs ? random.pick<int64_t>({-1, 0, 32, 64}) : -1;
    const int64_t size = v.group ? v.group : inputs, groups = inputs / size;
    std::vector<float> scale(static_cast<size_t>(outputs * groups)), minimum(scale.size());
    std::vector<uint8_t> point(scale.size());
    const int kind = four ? static_cast<int>(random.below(3)) : 0;
    for (size_t g = 0; g < scale.size(); ++g) {
      scale[g] = std::ldexp(1.0f + static_cast<float>(random.below(8)) / 8, static_cast<int>(random.between(-8, -5)));
      minimum[g] = -scale[g] * 7.5f;
      minimum[g] = std::ldexp(std::round(std::ldexp(minimum[g], 10)), -10);
      if (std::fabs(minimum[g]) < 0.001f) minimum[g] = -0.0625f;
      point[g] = static_cast<uint8_t>(random.below(16));
    }
    std::vector<int8_t> levels(out.w.size());
    for (int64_t o = 0; o < outputs; ++o)
      for (int64_t i = 0; i < inputs; ++i) {
        const size_t at = static_cast<size_t>(o * inputs + i), g = static_cast<size_t>(o * groups + i / size);
        const int level = static_cast<int>(four ? random.below(16) : random.between(-128, 127));
        levels[at] = static_cast<int8_t>(level);
        out.w[at] = kind == 1 ? static_cast<double>(level) * scale[g] + minimum[g] : (level - (kind == 2 ? point[g] : four ? 8 : 0)) * static_cast<double>(scale[g]);
      }
    if (four) {
      std::vector<uint8_t> packed(levels.size() / 2);
      for (int64_t o = 0; o < outputs; ++o)
        for (int64_t block = 0; block < inputs / 32; ++block)
          for (int j = 0; j < 16; ++j) {
            const int8_t* const from = levels.data() + o * inputs + block * 32 + j;
            packed[static_cast<size_t>(o * inputs / 2 + block * 16 + j)] = static_cast<uint8_t>(from[0] | from[16] << 4);
          }
      out.values = exact(packed);
    } else {
      out.values = exact(levels);
    }
    v.scale_cell = random.pick({Cell::f32, Cell::f16});
    const auto cells = [&](const std::vector<float>& from) {
      if (v.scale_cell == Cell::f32) return exact(from);
      std::vector<uint16_t> halves(from.size());
      for (size_t i = 0; i < from.size(); ++i) halves[i] = to_f16(from[i]);
      return exact(halves);
    };
    out.scales = cells(scale);
    v.scales = out.scales.data.get();
    if (kind == 1) out.zeros = cells(minimum), v.zero_cell = v.scale_cell, v.zeros = out.zeros.data.get();
    if (kind == 2) out.zeros = exact(point), v.zero_cell = Cell::u8, v.zeros = out.zeros.data.get();
    if (blocks && random.coin()) {
      v.blocked = true;
      out.values = in_blocks(out.values, outputs, 4);
      out.scales = in_blocks(out.scales, outputs, v.scale_cell == Cell::f32 ? 4 : 2);
      v.scales = out.scales.data.get();
      if (v.zeros) out.zeros = in_blocks(out.zeros, outputs, kind == 2 ? 1 : v.scale_cell == Cell::f32 ? 4 : 2), v.zeros = out.zeros.data.get();
    }
  }
  v.values = out.values.data.get();
  if (random.coin()) {
    out.bias_values = random.floats(outputs);
    out.bias = exact(out.bias_values);
    v.bias = reinterpret_cast<const float*>(out.bias.data.get());
  }
  return out;
}

// One row through a weight, its inputs rounded as the weight says.
std::vector<double> multiply(const Weight& w, const double* x) {
  const Linear& v = w.view;
  std::vector<double> rounded(x, x + v.inputs), y(static_cast<size_t>(v.outputs));
  if (v.format == Format::bf16)
    for (double& r : rounded) r = from_bf16(to_bf16(static_cast<float>(r)));
  if ((v.format == Format::i8 || v.format == Format::i4) && v.input_group >= 0) {
    const int64_t size = v.input_group ? v.input_group : v.inputs;
    for (int64_t at = 0; at < v.inputs; at += size) {
      float top = 0;
      for (int64_t i = at; i < std::min(at + size, v.inputs); ++i) top = std::max(top, std::fabs(static_cast<float>(x[i])));
      const float scale = top * (1.0f / 127);
      for (int64_t i = at; i < std::min(at + size, v.inputs); ++i)
        rounded[static_cast<size_t>(i)] = scale == 0 ? 0 : std::nearbyint(static_cast<float>(x[i]) / scale) * static_cast<double>(scale);
    }
  }
  for (int64_t o = 0; o < v.outputs; ++o) {
    double total = w.bias_values.empty() ? 0 : w.bias_values[static_cast<size_t>(o)];
    for (int64_t i = 0; i < v.inputs; ++i) total += w.w[static_cast<size_t>(o * v.inputs + i)] * rounded[static_cast<size_t>(i)];
    y[static_cast<size_t>(o)] = total;
  }
  return y;
}

// Whether inputs of the weight may be rounded to bfloat16.
bool rounds_to_halves(const Weight& w) {
  return w.view.format == Format::bf16 || (w.view.format != Format::f32 && w.view.input_group < 0);
}

// Whether these kernels multiply the weight's levels with so many inputs in tiles of bfloat16, and do not round inputs to int8 then.
bool in_tiles(const Kernels& kernels, const Weight& w, int64_t rows) {
  const bool levels = w.view.format == Format::i8 || w.view.format == Format::i4;
  return kernels.name == std::string("amx") && levels && rows >= (w.view.input_group < 0 ? 12 : 24);
}

void compare(const std::string& what, const float* got, const std::vector<double>& want, double tolerance) {
  double size = 1e-6, worst = 0;
  for (double x : want) size = std::max(size, std::fabs(x));
  for (size_t i = 0; i < want.size(); ++i) {
    const double error = std::fabs(got[i] - want[i]);
    worst = std::isnan(error) ? INFINITY : std::max(worst, error);
  }
  if (worst / size > tolerance) {
    std::fprintf(stderr, "FAILED %s: error %g of %g\n", what.c_str(), worst, size);
    ++failures;
  }
}

std::vector<double> norm(const Norm& n, const float* x, int64_t size) {
  double mean = 0, total = 0;
  if (n.kind == NormKind::layer)
    for (int64_t i = 0; i < size; ++i) mean += x[i] / static_cast<double>(size);
  for (int64_t i = 0; i < size; ++i) total += (x[i] - mean) * (x[i] - mean);
  std::vector<double> y(static_cast<size_t>(size));
  for (int64_t i = 0; i < size; ++i) {
    double v = (x[i] - mean) / std::sqrt(total / static_cast<double>(size) + n.eps);
    if (n.scale) v *= n.scale[i] + (n.kind == NormKind::rms_offset ? 1 : 0);
    y[static_cast<size_t>(i)] = v + (n.bias ? n.bias[i] : 0);
  }
  return y;
}

const float* floats_of(const Bytes& b) { return b.size ? reinterpret_cast<const float*>(b.data.get()) : nullptr; }

}  // namespace
