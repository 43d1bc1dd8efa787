// The native kernels without Python: every format and block against plain loops in double, with random sizes, arrays of exactly the
// size that a kernel may read, and several callers at once. Meant for the sanitizers: scripts/test_native_sanitizers.sh.
//
//     driver [cases] [seed]       prints what failed, with its seed, and returns 1
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "ahead.h"
#include "cpu_driver.h"
#include "kernels.h"

using namespace jaxinfer;

namespace {

void test_matmul(const Kernels& kernels, Random& random, const std::string& name) {
  const int64_t inputs = random.coin() ? 32 * random.between(1, 70) : random.between(1, 90), outputs = random.between(1, 90);
  const int64_t rows = random.pick<int64_t>({1, 2, 3, 5, 9, 13, 34, 70, 260});
  const Weight w = make_weight(random, outputs, inputs, true);
  auto x = random.floats(rows * inputs);
  if (random.coin())
    for (int64_t i = 0; i < std::min<int64_t>(64, inputs); ++i) x[static_cast<size_t>(i)] = 0;
  const auto scale = random.floats(inputs), bias = random.floats(inputs), residual = random.floats(rows * outputs);
  const Bytes held = exact(x), scales = exact(scale), biases = exact(bias), residuals = exact(residual);
  Bytes y(rows * outputs * 4);
  // inputs that are rounded may fall to the other side of a half when they come out of a norm
  const bool rounded = w.view.format == Format::bf16 || (w.view.format != Format::f32 && w.view.input_group >= 0);
  const NormKind kind = rounded ? NormKind::none : random.pick({NormKind::none, NormKind::rms, NormKind::rms_offset, NormKind::layer});
  MatmulCall call;
  call.rows = rows, call.x = floats_of(held), call.w = w.view, call.y = reinterpret_cast<float*>(y.data.get());
  call.residual = random.coin() ? floats_of(residuals) : nullptr;
  call.norm = Norm{kind, floats_of(scales), random.coin() ? floats_of(biases) : nullptr, 1e-3f};
  call.threads = static_cast<int>(random.between(1, 4));
  kernels.matmul(call);
  std::vector<double> want;
  for (int64_t m = 0; m < rows; ++m) {
    const float* const row = x.data() + m * inputs;
    const std::vector<double> in = kind == NormKind::none ? std::vector<double>(row, row + inputs) : norm(call.norm, row, inputs);
    for (double v : multiply(w, in.data())) want.push_back(v + (call.residual ? residual[want.size()] : 0));
  }
  compare(name + " matmul " + std::to_string(rows) + "x" + std::to_string(inputs) + "x" + std::to_string(outputs) + " format " +
              std::to_string(static_cast<int>(w.view.format)),
          call.y, want, in_tiles(kernels, w, rows) ? 2e-2 : 1e-4);
}

void test_mlp(const Kernels& kernels, Random& random, const std::string& name) {
  MlpCall c;
  c.rows = random.pick<int64_t>({1, 2, 3, 9, 40, 270});
  c.embed = random.coin() ? 64 : random.between(1, 70);
  c.width = random.coin() ? 96 : random.between(1, 100);
  c.gated = random.coin();
  c.parts = c.gated && random.coin() ? 2 : 1;
  c.activation = random.pick({Activation::silu, Activation::gelu, Activation::gelu_tanh, Activation::relu});
  c.threads = static_cast<int>(random.between(1, 4));
  std::vector<Weight> ups;
  for (int p = 0; p < c.parts; ++p) {
    const bool joined = c.gated && c.parts == 1;
    ups.push_back(make_weight(random, c.width * (joined ? 2 : 1), c.embed, false, !joined || c.width % 32 == 0));
    c.up[p] = ups.back().view;
  }
  const Weight down = make_weight(random, random.between(1, 40), c.width, false);
  c.down = down.view;
  const auto x = random.floats(c.rows * c.embed), scale = random.floats(c.embed), bias = random.floats(c.embed),
             residual = random.floats(c.rows * c.down.outputs);
  const Bytes xs = exact(x), scales = exact(scale), biases = exact(bias), residuals = exact(residual);
  c.x = floats_of(xs);
  c.norm = Norm{random.pick({NormKind::rms, NormKind::rms_offset, NormKind::layer}), floats_of(scales), random.coin() ? floats_of(biases) : nullptr, 1e-5f};
  c.residual = random.coin() ? floats_of(residuals) : nullptr;
  Bytes y(c.rows * c.down.outputs * 4);
  c.y = reinterpret_cast<float*>(y.data.get());
  kernels.mlp_block(c);
  const auto act = [&](double v) {
    switch (c.activation) {
      case Activation::silu: return v / (1 + std::exp(-v));
      case Activation::gelu: return v * 0.5 * std::erfc(-v / std::sqrt(2.0));
      case Activation::gelu_tanh: return 0.5 * v * (1 + std::tanh(std::sqrt(2 / 3.14159265358979) * (v + 0.044715 * v * v * v)));
      default: return std::max(v, 0.0);
    }
  };
  std::vector<double> want;
  for (int64_t m = 0; m < c.rows; ++m) {
    const auto n = norm(c.norm, x.data() + m * c.embed, c.embed);
    std::vector<double> h;
    for (const Weight& up : ups) {
      const auto made = multiply(up, n.data());
      h.insert(h.end(), made.begin(), made.end());
    }
    std::vector<double> hidden(static_cast<size_t>(c.width));
    for (size_t i = 0; i < hidden.size(); ++i) hidden[i] = act(h[i]) * (c.gated ? h[i + hidden.size()] : 1);
    auto made = multiply(down, hidden.data());
    for (size_t o = 0; o < made.size(); ++o) want.push_back(made[o] + (c.residual ? residual[static_cast<size_t>(m) * made.size() + o] : 0));
  }
  bool halves = rounds_to_halves(down);
  for (const Weight& up : ups) halves = halves || rounds_to_halves(up);
  bool tiles = in_tiles(kernels, down, c.rows);
  for (const Weight& up : ups) tiles = tiles || in_tiles(kernels, up, c.rows);
  // inputs of bfloat16 weights are rounded: one that falls to the other side moves an output by 2^-9 of an input
  compare(name + " mlp_block " + std::to_string(c.rows) + " rows", c.y, want, tiles ? 3e-2 : halves ? 1e-2 : 1e-4);
}

void test_attention(const Kernels& kernels, Random& random, const std::string& name) {
  AttentionCall c;
  c.batch = random.between(1, 3);
  c.tokens = random.pick<int64_t>({1, 1, 2, 5, 21, 90});
  c.embed = random.between(1, 70);
  c.kv_heads = random.between(1, 3);
  const int64_t group = random.pick<int64_t>({1, 2, 3, 5, 9});
  c.heads = group * c.kv_heads;
  c.head_dim = random.pick<int64_t>({1, 10, 16, 32, 40, 64, 80});
  c.threads = static_cast<int>(random.between(1, 4));
  c.scale = 1 / std::sqrt(static_cast<float>(c.head_dim));
  c.soft_cap = random.coin() ? 5.0f : 0.0f;
  c.cache.rows = c.batch + random.below(2);
  c.cache.tokens = c.tokens + random.below(200);
  c.cache.cell = random.pick({Cell::f32, Cell::bf16, Cell::i8, Cell::f8, Cell::i4});
  const bool four = c.cache.cell == Cell::i4;
  if (four) c.head_dim += c.head_dim % 2, c.cache.tokens = (c.cache.tokens + 31) / 32 * 32;
  c.rotary_half = random.below(c.head_dim / 2 + 1);
  const int64_t columns = (c.heads + 2 * c.kv_heads) * c.head_dim, count = c.cache.rows * c.kv_heads * c.cache.tokens * c.head_dim;
  const Weight qkv = make_weight(random, columns, c.embed, false), out = make_weight(random, random.between(1, 40), c.heads * c.head_dim, false);
  c.qkv[0] = qkv.view, c.parts = 1, c.out = out.view;
  const auto x = random.floats(c.batch * c.tokens * c.embed), scale = random.floats(c.embed), qn = random.floats(c.head_dim), kn = random.floats(c.head_dim);
  std::vector<int32_t> positions, rows;
  const int64_t first = random.below(c.cache.tokens - c.tokens + 1);
  for (int64_t b = 0; b < c.batch; ++b) {
    rows.push_back(static_cast<int32_t>(c.cache.rows - 1 - b));
    for (int64_t t = 0; t < c.tokens; ++t) positions.push_back(static_cast<int32_t>(first + t));
  }
  const auto angle = random.floats(c.batch * c.tokens * c.rotary_half);
  std::vector<float> cos(angle.size()), sin(angle.size());
  for (size_t i = 0; i < angle.size(); ++i) cos[i] = std::cos(angle[i]), sin[i] = std::sin(angle[i]);
  const Bytes xs = exact(x), scales = exact(scale), qns = exact(qn), kns = exact(kn), ps = exact(positions), rs = exact(rows), cs = exact(cos), ss = exact(sin);
  const int32_t window_value = static_cast<int32_t>(random.between(1, 60));
  const Bytes window = exact(std::vector<int32_t>{window_value});
  c.window = random.coin() ? reinterpret_cast<const int32_t*>(window.data.get()) : nullptr;
  c.norm = Norm{NormKind::rms, floats_of(scales), nullptr, 1e-5f};
  const bool normed = random.coin();
  c.q_norm = normed ? floats_of(qns) : nullptr, c.k_norm = normed ? floats_of(kns) : nullptr;
  c.x = floats_of(xs), c.cos = floats_of(cs), c.sin = floats_of(ss);
  c.positions = reinterpret_cast<const int32_t*>(ps.data.get()), c.rows = reinterpret_cast<const int32_t*>(rs.data.get());
  // what is cached before this call; what lies past it is poison
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const int64_t cell = c.cache.cell == Cell::f32 ? 4 : c.cache.cell == Cell::bf16 ? 2 : 1, heads = c.cache.rows * c.kv_heads;
  std::vector<double> keys(static_cast<size_t>(count), NAN), values(keys);
  Bytes k(four ? count / 2 : count * cell), v(k.size), k_scale(heads * c.cache.tokens * 4), v_scale(k_scale.size);
  const int64_t groups = c.cache.tokens / 32;
  Bytes k_steps(heads * groups * c.head_dim * 2), k_lows(k_steps.size), v_steps(heads * c.cache.tokens * 2), v_lows(v_steps.size), recent(heads * 64 * c.head_dim);
  // numbers [heads, places, width] of 16 bits, of which the first `old` places are there
  const auto fill = [&](Bytes& into, int64_t places, int64_t width, int64_t old, float scale) {
    uint16_t* const to = reinterpret_cast<uint16_t*>(into.data.get());
    for (int64_t i = 0; i < heads * places * width; ++i) to[i] = to_bf16(i / width % places < old ? scale * (1 + random.normal() / 4) : nan);
  };
  if (four) {
    for (auto* side : {&k, &v})
      for (int64_t i = 0; i < side->size; ++i) side->data.get()[i] = static_cast<char>(random.below(256));
    fill(k_steps, groups, c.head_dim, first / 32, 0.2f), fill(k_lows, groups, c.head_dim, first / 32, -1.5f);
    fill(v_steps, c.cache.tokens, 1, first, 0.2f), fill(v_lows, c.cache.tokens, 1, first, -1.5f);
    fill(recent, 32, c.head_dim, first % 32, 1);
    const auto halves = [](const Bytes& b) { return reinterpret_cast<uint16_t*>(b.data.get()); };
    c.cache.k_steps = halves(k_steps), c.cache.k_lows = halves(k_lows), c.cache.v_steps = halves(v_steps), c.cache.v_lows = halves(v_lows);
    c.cache.recent = halves(recent);
  }
  for (int64_t i = 0; i < count && !four; ++i) {
    const bool old = i / c.head_dim % c.cache.tokens < first;
    const size_t at = static_cast<size_t>(i), token = static_cast<size_t>(i / c.head_dim);
    for (auto* side : {&k, &v}) {
      float stored = old ? random.normal() : nan;
      if (c.cache.cell == Cell::f32) {
        reinterpret_cast<float*>(side->data.get())[at] = stored;
      } else if (c.cache.cell == Cell::bf16) {
        const uint16_t h = old ? to_bf16(stored) : 0x7fc0;
        reinterpret_cast<uint16_t*>(side->data.get())[at] = h;
        stored = from_bf16(h);
      } else {
        const bool f8 = c.cache.cell == Cell::f8;
        uint8_t bits = static_cast<uint8_t>(random.below(256));
        if (f8 && (bits & 127) == 127) bits = 0;
        reinterpret_cast<uint8_t*>(side->data.get())[at] = bits;
        const float s = old ? f8 ? 0.003f : 0.01f : nan;
        reinterpret_cast<float*>((side == &k ? k_scale : v_scale).data.get())[token] = s;
        stored = (f8 ? from_f8(bits) : static_cast<float>(static_cast<int8_t>(bits))) * s;
      }
      (side == &k ? keys : values)[at] = stored;
    }
  }
  c.cache.k = k.data.get(), c.cache.v = v.data.get();
  if (cell == 1 && !four) c.cache.k_scale = reinterpret_cast<float*>(k_scale.data.get()), c.cache.v_scale = reinterpret_cast<float*>(v_scale.data.get());
  c.terms.causal = random.below(3) > 0;
  std::vector<int32_t> length_values;
  for (int64_t b = 0; b < c.batch; ++b) length_values.push_back(static_cast<int32_t>(random.below(4) ? random.between(0, first + c.tokens) : first + c.tokens));
  const auto slope_values = random.floats(c.heads), sink_values = random.floats(c.heads);
  c.terms.reach = random.below(4);
  const auto relative_values = random.floats(c.heads * (2 * c.terms.reach + 1));
  const Bytes lengths = exact(length_values), slopes = exact(slope_values), sinks = exact(sink_values), relative = exact(relative_values);
  if (!c.terms.causal || random.below(3) == 0) c.terms.lengths = reinterpret_cast<const int32_t*>(lengths.data.get());
  if (random.below(3) == 0) c.terms.slopes = floats_of(slopes);
  if (random.below(3) == 0) c.terms.sinks = floats_of(sinks);
  if (random.below(3) == 0) c.terms.relative = floats_of(relative);
  Bytes y(c.batch * c.tokens * c.out.outputs * 4);
  c.y = reinterpret_cast<float*>(y.data.get());
  kernels.attention_block(c);

  std::vector<std::vector<double>> raw;
  const auto turn = [&](double* head, const float* weight, size_t token) {
    if (weight) {
      std::vector<float> copy(head, head + c.head_dim);
      const auto n = norm(Norm{NormKind::rms, weight, nullptr, 1e-5f}, copy.data(), c.head_dim);
      std::copy(n.begin(), n.end(), head);
    }
    for (int64_t i = 0; i < c.rotary_half; ++i) {
      const size_t at = token * static_cast<size_t>(c.rotary_half) + static_cast<size_t>(i);
      const double a = head[i], b = head[i + c.rotary_half];
      head[i] = a * cos[at] - b * sin[at];
      head[i + c.rotary_half] = b * cos[at] + a * sin[at];
    }
  };
  const auto at_cache = [&](size_t token, int64_t kv, int64_t position) {
    return static_cast<size_t>(((rows[token / static_cast<size_t>(c.tokens)] * c.kv_heads + kv) * c.cache.tokens + position) * c.head_dim);
  };
  for (size_t token = 0; token < positions.size(); ++token) {
    const auto n = norm(c.norm, x.data() + static_cast<int64_t>(token) * c.embed, c.embed);
    raw.push_back(multiply(qkv, n.data()));
    for (int64_t h = 0; h < c.heads + c.kv_heads; ++h) turn(raw.back().data() + h * c.head_dim, h < c.heads ? c.q_norm : c.k_norm, token);
    for (int64_t kv = 0; kv < c.kv_heads; ++kv)
      for (int64_t i = 0; i < c.head_dim; ++i) {
        keys[at_cache(token, kv, positions[token]) + static_cast<size_t>(i)] = raw.back()[static_cast<size_t>((c.heads + kv) * c.head_dim + i)];
        values[at_cache(token, kv, positions[token]) + static_cast<size_t>(i)] = raw.back()[static_cast<size_t>((c.heads + c.kv_heads + kv) * c.head_dim + i)];
      }
  }
  if (four) {  // the levels that were chosen are those that are attended over; they are near what was to be stored
    const int64_t half = c.head_dim / 2, newest = (first + c.tokens - 1) / 32;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t channel = i % c.head_dim, token = i / c.head_dim, head = token / c.cache.tokens, position = token % c.cache.tokens;
      if (position >= first + c.tokens) continue;
      const auto level = [&](const Bytes& from) { return static_cast<uint8_t>(from.data.get()[token * half + channel % half]) >> (channel / half * 4) & 15; };
      const size_t at = static_cast<size_t>(i), group = static_cast<size_t>((head * groups + position / 32) * c.head_dim + channel);
      const double step = from_bf16(c.cache.k_steps[group]), near = level(k) * step + from_bf16(c.cache.k_lows[group]);
      const double exact_key = position / 32 == newest ? from_bf16(c.cache.recent[(head * 32 + position % 32) * c.head_dim + channel]) : near;
      const double value_step = from_bf16(c.cache.v_steps[token]), value = level(v) * value_step + from_bf16(c.cache.v_lows[token]);
      const bool fresh = position >= first && !std::isnan(keys[at]);
      const bool right = !fresh || (std::fabs(near - keys[at]) <= 0.6 * step + std::fabs(keys[at]) / 64 + 1e-3 && std::fabs(exact_key - keys[at]) <= 0.6 * step + std::fabs(keys[at]) / 64 + 1e-3 &&
                                    std::fabs(value - values[at]) <= 0.6 * value_step + std::fabs(values[at]) / 64 + 1e-3);
      if (!right) {
        std::fprintf(stderr, "FAILED %s int4 cache at %ld: key %g, %g for %g, value %g for %g\n", name.c_str(), static_cast<long>(i), near, exact_key, keys[at], value, values[at]);
        ++failures;
        break;
      }
      keys[at] = exact_key, values[at] = value;
    }
  }
  // an input of bfloat16 that falls to the other side moves a key
  const double doubt = rounds_to_halves(qkv) || in_tiles(kernels, qkv, c.batch * c.tokens) ? 1e-2 : 1e-4;
  for (int64_t i = 0; i < count && c.cache.cell == Cell::f8; ++i) {  // 3 bits of a fraction move scores: those that were chosen count
    const size_t at = static_cast<size_t>(i), token = static_cast<size_t>(i / c.head_dim);
    const int64_t position = i / c.head_dim % c.cache.tokens;
    if (position < first || position >= first + c.tokens || std::isnan(keys[at])) continue;
    for (auto* side : {&k, &v}) {
      double& held = (side == &k ? keys : values)[at];
      const double scale_of = (side == &k ? c.cache.k_scale : c.cache.v_scale)[token], stored = from_f8(static_cast<uint8_t>(side->data.get()[at])) * scale_of;
      if (!(std::fabs(stored - held) <= std::fabs(held) / 15 + scale_of / 500 + doubt)) {
        std::fprintf(stderr, "FAILED %s float8 cache at %ld: %g for %g\n", name.c_str(), static_cast<long>(i), stored, held);
        ++failures;
      }
      held = stored;
    }
  }
  std::vector<double> want, alone;
  std::vector<float> queries;
  for (size_t token = 0; token < positions.size(); ++token) {
    std::vector<double> attended(static_cast<size_t>(c.heads * c.head_dim));
    const int64_t position = positions[token], b = static_cast<int64_t>(token) / c.tokens;
    int64_t begin = c.window ? std::max<int64_t>(0, position - window_value + 1) : 0;
    int64_t end = c.terms.causal ? position + 1 : c.window ? position + window_value : first + c.tokens;
    if (c.terms.lengths) end = std::min<int64_t>(end, length_values[static_cast<size_t>(b)]);
    for (int64_t h = 0; h < c.heads; ++h) {
      std::vector<double> scores;
      double top = c.terms.sinks ? sink_values[static_cast<size_t>(h)] : -INFINITY, total = 0;
      for (int64_t j = begin; j < end; ++j) {
        double s = 0;
        for (int64_t i = 0; i < c.head_dim; ++i) s += raw[token][static_cast<size_t>(h * c.head_dim + i)] * keys[at_cache(token, h / group, j) + static_cast<size_t>(i)];
        s *= c.scale;
        if (c.soft_cap > 0) s = c.soft_cap * std::tanh(s / c.soft_cap);
        if (c.terms.slopes) s -= slope_values[static_cast<size_t>(h)] * std::fabs(static_cast<double>(j - position));
        const int64_t ahead = std::max(-c.terms.reach, std::min(c.terms.reach, j - position)) + c.terms.reach;
        if (c.terms.relative) s += relative_values[static_cast<size_t>(h * (2 * c.terms.reach + 1) + ahead)];
        scores.push_back(s);
        top = std::max(top, s);
      }
      if (c.terms.sinks) total = std::exp(sink_values[static_cast<size_t>(h)] - top);
      for (double& s : scores) total += s = std::exp(s - top);
      for (size_t j = 0; j < scores.size(); ++j)
        for (int64_t i = 0; i < c.head_dim; ++i)
          attended[static_cast<size_t>(h * c.head_dim + i)] += scores[j] / total * values[at_cache(token, h / group, begin + static_cast<int64_t>(j)) + static_cast<size_t>(i)];
    }
    const auto made = multiply(out, attended.data());
    want.insert(want.end(), made.begin(), made.end());
    alone.insert(alone.end(), attended.begin(), attended.end());
    for (int64_t i = 0; i < c.heads * c.head_dim; ++i) queries.push_back(static_cast<float>(raw[token][static_cast<size_t>(i)]));
  }
  // the newest keys are rounded to the cache's cells; with few keys they weigh much. Queries and keys in bfloat16 are off by 2^-8 of a score
  const int64_t every = c.batch * c.tokens;
  const bool halves = rounds_to_halves(qkv) || rounds_to_halves(out) || in_tiles(kernels, qkv, every) || in_tiles(kernels, out, every);
  compare(name + " attention_block cell " + std::to_string(static_cast<int>(c.cache.cell)) + " tokens " + std::to_string(c.tokens), c.y, want,
          c.cache.cell != Cell::f32 && !four ? 0.1 : halves ? 5e-2 : 1e-4);
  const Bytes qs = exact(queries);
  Bytes o(static_cast<int64_t>(queries.size()) * 4);
  c.q = floats_of(qs), c.x = nullptr, c.parts = 0, c.qkv[0] = c.out = Linear{};
  c.y = reinterpret_cast<float*>(o.data.get());
  kernels.attention(c);
  compare(name + " attention cell " + std::to_string(static_cast<int>(c.cache.cell)) + " tokens " + std::to_string(c.tokens), c.y, alone,
          c.cache.cell != Cell::f32 && !four ? 0.1 : halves ? 5e-2 : 1e-4);
}

void test_argmax(const Kernels& kernels, Random& random, const std::string& name) {
  const int64_t rows = random.between(1, 4), columns = random.between(1, 700);
  auto x = random.floats(rows * columns);
  for (float& v : x) v = std::round(v * 4);
  const Bytes held = exact(x);
  std::vector<int32_t> ids(static_cast<size_t>(rows));
  std::vector<float> largest(ids.size());
  kernels.argmax(ArgmaxCall{rows, columns, floats_of(held), ids.data(), largest.data(), 2});
  for (int64_t r = 0; r < rows; ++r) {
    const float* const row = x.data() + r * columns;
    if (ids[static_cast<size_t>(r)] != std::max_element(row, row + columns) - row) {
      std::fprintf(stderr, "FAILED %s argmax of %ld\n", name.c_str(), static_cast<long>(columns));
      ++failures;
    }
  }
}

// The largest logit by way of a sketch: the same bits as by way of all logits.
void test_head(const Kernels& kernels, Random& random, const std::string& name) {
  const int64_t inputs = random.coin() ? 32 * random.between(1, 20) : random.between(1, 90), outputs = random.between(1, 300);
  Weight w = make_weight(random, outputs, inputs, true);
  while (w.view.format == Format::i4) w = make_weight(random, outputs, inputs, true);
  w.view.bias = nullptr;
  const int64_t blocks = (outputs + 31) / 32, groups = (inputs + 31) / 32;
  Bytes sketch(blocks * groups * 704), numbers(blocks * 3 * 32 * 4);
  SketchCall make;
  make.w = w.view, make.threads = static_cast<int>(random.between(1, 4));
  make.blocks = reinterpret_cast<uint8_t*>(sketch.data.get()), make.numbers = reinterpret_cast<float*>(numbers.data.get());
  kernels.sketch(make);
  const int64_t rows = random.between(1, 2);
  auto x = random.floats(rows * inputs, random.pick({1.0f, 1e-3f, 1e4f}));
  if (random.below(8) == 0) x[static_cast<size_t>(random.below(inputs))] = random.pick({INFINITY, NAN});
  const auto scale = random.floats(inputs);
  const Bytes held = exact(x), scales = exact(scale);
  HeadCall c;
  c.rows = rows, c.limit = random.between(0, outputs), c.x = floats_of(held), c.w = w.view;
  c.norm = Norm{random.pick({NormKind::none, NormKind::rms, NormKind::layer}), floats_of(scales), nullptr, 1e-3f};
  c.blocks = make.blocks, c.numbers = make.numbers, c.threads = static_cast<int>(random.between(1, 4));
  std::vector<int32_t> ids(static_cast<size_t>(rows)), looked(ids.size());
  std::vector<float> largest(ids.size()), logits(static_cast<size_t>(outputs));
  c.y = ids.data(), c.largest = largest.data(), c.looked = looked.data();
  kernels.head_argmax(c);
  for (int64_t r = 0; r < rows; ++r) {
    MatmulCall all;
    all.rows = 1, all.x = c.x + r * inputs, all.norm = c.norm, all.w = c.w, all.y = logits.data(), all.threads = 1;
    kernels.matmul(all);
    const size_t at = static_cast<size_t>(r);
    int64_t best = 0;
    for (int64_t i = 0; i < c.limit; ++i)
      if (logits[static_cast<size_t>(i)] > logits[static_cast<size_t>(best)]) best = i;
    const bool none = c.limit == 0 || std::isnan(logits[static_cast<size_t>(best)]);
    if (ids[at] < 0 || ids[at] >= std::max<int64_t>(c.limit, 1) || looked[at] > blocks ||
        (!none && (ids[at] != best || largest[at] != logits[static_cast<size_t>(best)]))) {
      std::fprintf(stderr, "FAILED %s head of %ldx%ld format %d: %d, not %ld\n", name.c_str(), static_cast<long>(outputs), static_cast<long>(inputs),
                   static_cast<int>(w.view.format), ids[at], static_cast<long>(best));
      ++failures;
    }
  }
}

void test_sample(const Kernels& kernels, Random& random, const std::string& name) {
  const int64_t rows = random.between(1, 4), columns = random.between(1, 700), kind = random.between(0, 3);
  auto x = random.floats(rows * columns);
  for (float& v : x) {
    v *= 4;
    if (kind == 1) v = std::round(v);
    if (kind == 2 && random.between(0, 1)) v = -INFINITY;
    if (kind == 3 && random.between(0, 9) == 0) v = random.between(0, 1) ? NAN : INFINITY;
  }
  std::vector<float> temperature, top_p, min_p;
  std::vector<int32_t> top_k, steps;
  std::vector<uint32_t> seeds;
  for (int64_t r = 0; r < rows; ++r) {
    temperature.push_back(static_cast<float>(random.between(0, 3)) * 0.5f);
    top_k.push_back(static_cast<int32_t>(random.between(0, 3) ? random.between(1, columns) : 0));
    top_p.push_back(static_cast<float>(random.between(0, 4)) * 0.25f);
    min_p.push_back(static_cast<float>(random.between(0, 4)) * 0.25f);
    seeds.push_back(static_cast<uint32_t>(random.between(0, 1 << 30)));
    steps.push_back(static_cast<int32_t>(random.between(0, 1000)));
  }
  const Bytes held = exact(x);
  std::vector<int32_t> ids(static_cast<size_t>(rows), -1);
  SampleCall c;
  c.rows = rows, c.columns = columns, c.threads = 2;
  c.x = floats_of(held), c.temperature = temperature.data(), c.top_p = top_p.data(), c.min_p = min_p.data();
  c.top_k = top_k.data(), c.steps = steps.data(), c.seeds = seeds.data(), c.y = ids.data();
  kernels.sample(c);
  for (size_t r = 0; r < ids.size(); ++r) {
    const float* const row = x.data() + static_cast<int64_t>(r) * columns;
    bool right = ids[r] >= 0 && ids[r] < columns;
    if (right && kind != 3) {
      const double chosen = row[ids[r]], top = *std::max_element(row, row + columns), t = temperature[r];
      if (t == 0 || std::isinf(top)) {
        right = ids[r] == std::max_element(row, row + columns) - row;
      } else {
        std::vector<double> z(row, row + columns);
        std::sort(z.begin(), z.end(), std::greater<>());
        if (top_k[r] > 0) {
          const double least = z[static_cast<size_t>(top_k[r] - 1)];
          right = chosen >= least;
          while (z.back() < least) z.pop_back();
        }
        double total = 0, above = 0;
        for (double v : z) total += std::exp((v - top) / t);
        for (double v : z) above += v > chosen ? std::exp((v - top) / t) : 0;
        right = right && (chosen == top || above < total * top_p[r] + 1e-4 * total) && std::exp((chosen - top) / t) >= min_p[r] - 1e-4;
      }
    }
    if (!right) {
      std::fprintf(stderr, "FAILED %s sample of %ld\n", name.c_str(), static_cast<long>(columns));
      ++failures;
    }
  }
}

// What is asked for ahead of its time: a thread's own units, each line once, in their order; and which call comes after which.
void test_ahead() {
  std::vector<char> values(10 * 256), scales(10 * 64);
  Reads reads;
  reads.from[0] = values.data(), reads.bytes[0] = 256;
  reads.from[2] = scales.data(), reads.bytes[2] = 64;  // one without scales of its own has a gap
  reads.units = 10;
  const auto expect = [](bool holds, const char* what) {
    if (!holds) failures++, std::printf("ahead: %s\n", what);
  };
  for (const Lane lane : {Lane{0, 3}, Lane{1, 3}, Lane{2, 3}, Lane{11, 12}}) {
    const Range mine = share(10, 1, lane);
    Ahead ahead;
    ahead.add(reads, lane);
    ahead.add(values.data(), 100);
    expect(reads.begin(lane) == values.data() + 256 * mine.begin, "a share begins elsewhere");
    const int lines = static_cast<int>(5 * (mine.end - mine.begin));
    ahead.ask(lines);
    expect(ahead.count() == 2 && ahead.asked() == 0, "a share is over before its last line");
    ahead.ask(1);
    expect(ahead.asked() == 1, "a share has more lines than it is long");
    ahead.ask(2);
    expect(ahead.asked() == 2, "what comes after a share is not asked for");
    ahead.open(reads, lane);
    expect(ahead.count() == 1 && ahead.asked() == 0, "what is opened is not what is read now");
    ahead.ask(2);
    ahead.add(values.data(), 100);
    ahead.open(reads, lane);
    ahead.ask(lines - 2 + 1);
    expect(ahead.count() == 1 && ahead.asked() == 1, "what was asked for already is asked for again");
  }
  Ahead none;
  none.add(Reads{}, Lane{});
  none.ask(100);
  expect(none.count() == 0 && Reads{}.begin(Lane{}) == nullptr, "nothing is something");

  Reads calls[3];
  for (int i = 0; i < 3; ++i) calls[i].from[0] = values.data() + 512 * i, calls[i].bytes[0] = 64 * (i + 1), calls[i].units = i + 1;
  for (int i = 0; i < 3; ++i) expect(follows(calls[i]).units == 0, "a call that came for the first time is known");
  for (int i = 0; i < 6; ++i) {
    const Reads next = follows(calls[i % 3]), &want = calls[(i + 1) % 3];
    if (i >= 3) expect(next.from[0] == want.from[0] && next.bytes[0] == want.bytes[0] && next.units == want.units, "the next call is not known");
  }
  follows(calls[0]), follows(calls[2]);
  expect(follows(calls[0]).from[0] == calls[2].from[0], "a new order is not learned");
}

void run(uint64_t seed, int cases, const char* caller) {
  for (int i = 0; i < cases; ++i) {
    const Kernels* const* usable = usable_kernels();
    for (int level = 0; usable[level]; ++level) {
      Random random(seed + static_cast<uint64_t>(i));
      const std::string name = std::string(caller) + usable[level]->name + " seed " + std::to_string(seed + static_cast<uint64_t>(i));
      test_matmul(*usable[level], random, name);
      test_mlp(*usable[level], random, name);
      test_attention(*usable[level], random, name);
      test_argmax(*usable[level], random, name);
      test_head(*usable[level], random, name);
      test_sample(*usable[level], random, name);
    }
  }
}

}  // namespace

int main(int count, char** arguments) {
  const int cases = count > 1 ? std::atoi(arguments[1]) : 50;
  const uint64_t seed = count > 2 ? std::strtoull(arguments[2], nullptr, 10) : std::random_device()();
  std::printf("%d cases from seed %llu:", cases, static_cast<unsigned long long>(seed));
  for (int i = 0; usable_kernels()[i]; ++i) std::printf(" %s", usable_kernels()[i]->name);
  std::printf("\n");
  test_ahead();
  run(seed, cases, "");
  std::vector<std::thread> callers;  // as many devices call at once
  for (uint64_t t = 0; t < 3; ++t) callers.emplace_back([=] { run(seed + 1000 * (t + 1), cases / 5 + 1, "one of three callers, "); });
  for (std::thread& caller : callers) caller.join();
  std::printf(failures ? "%d failed\n" : "passed\n", failures.load());
  return failures ? 1 : 0;
}
