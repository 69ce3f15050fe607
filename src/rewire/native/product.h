// A linear layer with everything that belongs to it in one pass: activation(x @ weight.T + bias) + residual.
//
// The weight is packed once into panels of PANEL outputs: [panel][unit][PANEL], a unit being one float, two bfloat16
// or four int8 of one output. int8 activations are quantised row by row with a zero point of their own, so each panel
// ends with the sums of its weights, which take the zero point out again.
#pragma once

#include "activation.h"
#include "attention.h"

namespace {

constexpr int PANEL = WIDE * LANES;

INLINE int64_t inputs_per_unit(int32_t type) { return type == FLOAT32 ? 1 : type == BFLOAT16 ? 2 : 4; }
INLINE int64_t units_of(int64_t inputs, int32_t type) {
  return (inputs + inputs_per_unit(type) - 1) / inputs_per_unit(type);
}
INLINE int64_t panel_units(int64_t inputs, int32_t type) {  // in 4-byte units, the sums of int8 weights included
  return (units_of(inputs, type) + (type == INT8)) * PANEL;
}

int64_t panels(int64_t outputs) { return (outputs + PANEL - 1) / PANEL; }
int64_t packed_bytes(int64_t outputs, int64_t inputs, int32_t type) {
  return panels(outputs) * panel_units(inputs, type) * 4;
}

// ---------------------------------------------------------------- packing a weight, once

INLINE float absolute(float value) { return value < 0 ? -value : value; }
INLINE int32_t nearest_int(float value) { return int32_t(value < 0 ? value - 0.5f : value + 0.5f); }

INLINE float scale_of(const float* row, int64_t inputs) {
  float most = 0;
  for (int64_t i = 0; i < inputs; ++i) most = absolute(row[i]) > most ? absolute(row[i]) : most;
  return most == 0 ? 1.0f : most / 127.0f;
}

INLINE uint32_t packed_unit(const float* row, int64_t first, int64_t inputs, int32_t type, float scale) {
  uint32_t unit = 0;
  if (type == FLOAT32) __builtin_memcpy(&unit, row + first, 4);
  for (int i = 0; type == BFLOAT16 && i < 2 && first + i < inputs; ++i)
    unit |= uint32_t(narrow_one(row[first + i])) << (16 * i);
  for (int i = 0; type == INT8 && i < 4 && first + i < inputs; ++i)
    unit |= uint32_t(uint8_t(int8_t(nearest_int(row[first + i] / scale)))) << (8 * i);
  return unit;
}

void pack(const float* weight, int64_t outputs, int64_t inputs, int32_t type, void* packed, float* scales) {
  int64_t units = units_of(inputs, type), per_unit = inputs_per_unit(type);
  for (int64_t o = 0; o < panels(outputs) * PANEL; ++o) {
    uint32_t* place = static_cast<uint32_t*>(packed) + o / PANEL * panel_units(inputs, type) + o % PANEL;
    const float* row = weight + o * inputs;
    float scale = type == INT8 && o < outputs ? scale_of(row, inputs) : 1.0f;
    if (type == INT8 && o < outputs) scales[o] = scale;
    int32_t sum = 0;
    for (int64_t u = 0; u < units; ++u) {
      uint32_t unit = o < outputs ? packed_unit(row, u * per_unit, inputs, type, scale) : 0;
      place[u * PANEL] = unit;
      for (int i = 0; i < 4; ++i) sum += int8_t(unit >> (8 * i));
    }
    if (type == INT8) place[units * PANEL] = uint32_t(sum);
  }
}

// ---------------------------------------------------------------- bringing the rows of x into the weight's type

struct Rows {  // of x, as 4-byte units; int8: with scale and zero point of each row
  const float* units;
  ptrdiff_t row;
  const float* scales;
  const float* zeros;
};

// Rows that lie a multiple of 2 KiB apart share so few places of the first cache that they drive each other out.
INLINE bool is_crowded(int64_t row_bytes) { return row_bytes % 2048 == 0; }
INLINE int64_t spread(int64_t units) { return is_crowded(units * 4) ? units + 16 : units; }

template <class T>
INLINE void extent(const T* row, int64_t inputs, float& least, float& most) {
  Floats low = Floats{}, high = Floats{};  // 0 always has a code of its own
  int64_t i = 0;
  for (; i + LANES <= inputs; i += LANES) {
    Floats value = Element<T>::get(row + i);
    low = smaller(value, low), high = larger(value, high);
  }
  if (i < inputs) {
    Floats value = get_some(row + i, int(inputs - i));
    low = smaller(value, low), high = larger(value, high);
  }
  most = largest_of(high), least = -largest_of(-low);
}

INLINE void store_bytes(uint8_t* to, Ints value) {
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(value)));
#else
  for (int i = 0; i < LANES; ++i) to[i] = uint8_t(value[i]);
#endif
}

// One row to bytes: x is about scale * (byte - zero).
template <class T>
INLINE void quantise(const T* row, int64_t inputs, uint8_t* to, int64_t padded, float& scale, float& zero) {
  float least, most;
  extent(row, inputs, least, most);
  float range = most - least;
  scale = range > 0 ? range / 255.0f : 1.0f;
  float inverse = 1.0f / scale;
  zero = float(nearest_int(-least * inverse));
  Floats offset = all(zero + 12582912.0f);  // rounds to nearest, as in exp2_of
  for (int64_t i = 0; i < inputs; i += LANES) {
    Floats value = i + LANES <= inputs ? Element<T>::get(row + i) : get_some(row + i, int(inputs - i));
    Ints code = reinterpret_cast<Ints>(value * inverse + offset) - 0x4b400000;
    code = code < 0 ? Ints{} : code > 255 ? all_ints(255) : code;
    if (i + LANES <= padded) store_bytes(to + i, code);
    else for (int64_t j = i; j < padded; ++j) to[j] = uint8_t(code[j - i]);
  }
}

template <class T>
INLINE Rows quantised_rows(const ProductTask& task, char* scratch) {
  const Product& job = *task.job;
  int64_t units = spread(units_of(job.inputs, INT8)), count = task.last - task.first;
  float* scales = reinterpret_cast<float*>(scratch);
  float* zeros = scales + count;
  float* bytes = zeros + count;
  int64_t padded = units_of(job.inputs, INT8) * 4;
  const T* x = static_cast<const T*>(job.x) + task.first * job.x_row;
  for (int64_t r = 0; r < count; ++r)
    quantise(x + r * job.x_row, job.inputs, reinterpret_cast<uint8_t*>(bytes + r * units), padded, scales[r],
             zeros[r]);
  return {bytes, units, scales, zeros};
}

INLINE Rows paired_rows(const ProductTask& task, char* scratch) {
  const Product& job = *task.job;
  int64_t units = spread(units_of(job.inputs, BFLOAT16)), count = task.last - task.first;
  float* copy = reinterpret_cast<float*>(scratch);
  if (job.type == BFLOAT16) {
    const uint16_t* x = static_cast<const uint16_t*>(job.x) + task.first * job.x_row;
    if (job.inputs % 2 == 0 && job.x_row % 2 == 0 && !is_crowded(job.x_row * 2))
      return {reinterpret_cast<const float*>(x), job.x_row / 2, nullptr, nullptr};
    copy_pairs(x, job.x_row, count, job.inputs, copy, units);
  } else {
    const float* x = static_cast<const float*>(job.x) + task.first * job.x_row;
    for (int64_t r = 0; r < count; ++r) {
      uint16_t* row = reinterpret_cast<uint16_t*>(copy + r * units);
      int64_t i = 0;
      for (; i + LANES <= job.inputs; i += LANES) narrow(row + i, load(x + r * job.x_row + i));
      for (; i < job.inputs; ++i) row[i] = narrow_one(x[r * job.x_row + i]);
      if (job.inputs % 2) row[job.inputs] = 0;
    }
  }
  return {copy, units, nullptr, nullptr};
}

template <class T>
INLINE Rows float_rows(const ProductTask& task, char* scratch) {
  const Product& job = *task.job;
  const T* x = static_cast<const T*>(job.x) + task.first * job.x_row;
  if (Element<T>::exact && !is_crowded(job.x_row * 4))
    return {reinterpret_cast<const float*>(x), job.x_row, nullptr, nullptr};
  float* copy = reinterpret_cast<float*>(scratch);
  int64_t units = spread(job.inputs);
  for (int64_t r = 0; r < task.last - task.first; ++r)
    for (int64_t i = 0; i < job.inputs; i += LANES) {
      int count = int(at_most(job.inputs - i, LANES));
      put_some(copy + r * units + i, get_some(x + r * job.x_row + i, count), count);
    }
  return {copy, units, nullptr, nullptr};
}

int64_t product_scratch(const Product* job, int64_t rows) {
  return rows * (spread(units_of(job->inputs, job->weight_type)) * 4 + 8) + 64;
}

// ---------------------------------------------------------------- the product

INLINE Floats as_floats(Floats sum) { return sum; }
INLINE Floats as_floats(Ints sum) { return __builtin_convertvector(sum, Floats); }

// Sums of one block of rows and one panel, on their way out.
struct Block {
  const ProductTask* task;
  const Rows* x;
  const float* weight_sums;  // of the panel; read for int8 alone
  int64_t first, rows, column;
  float sums[WIDE_ROWS][WIDE][LANES];
};

// The finish of one vector of outputs, for all rows of the block.
template <class Out, int KIND>
INLINE void finish_column(const Block& block, int c, int count) {
  const Product& job = *block.task->job;
  int64_t column = block.column + c * LANES, first = block.task->first + block.first;
  bool is_scaled = block.x->scales != nullptr;
  Floats bias = job.bias ? get_some(job.bias + column, count) : Floats{};
  Floats scale = is_scaled ? get_some(job.scales + column, count) : Floats{};
  Ints weights = {};
  if (is_scaled) __builtin_memcpy(&weights, block.weight_sums + c * LANES, sizeof weights);
  Floats offset = as_floats(weights) * scale;
  const Out* residual = job.residual ? static_cast<const Out*>(job.residual) + first * job.residual_row + column : nullptr;
  Out* out = static_cast<Out*>(job.out) + first * job.out_row + column;
  for (int r = 0; r < block.rows; ++r) {
    Floats sum = load(block.sums[r][c]);
    if (is_scaled) sum = (sum * scale - offset * block.x->zeros[block.first + r]) * block.x->scales[block.first + r];
    sum = activated<Element<Out>::exact, KIND>(sum + bias);
    if (residual) sum += get_some(residual + r * job.residual_row, count);
    put_some(out + r * job.out_row, sum, count);
  }
}

template <class Out, int KIND>
void finish(const Block& block) {
  for (int c = 0; c < WIDE; ++c) {
    int64_t left = block.task->job->outputs - block.column - c * LANES;
    if (left >= LANES) finish_column<Out, KIND>(block, c, LANES);
    else if (left > 0) finish_column<Out, KIND>(block, c, int(left));
  }
}

typedef void (*Finish)(const Block&);

template <class Out>
Finish finish_for(int32_t activation) {
  switch (activation) {
    case GELU: return finish<Out, GELU>;
    case GELU_TANH: return finish<Out, GELU_TANH>;
    case QUICK_GELU: return finish<Out, QUICK_GELU>;
    case RELU: return finish<Out, RELU>;
    case SILU: return finish<Out, SILU>;
    default: return finish<Out, NONE>;
  }
}

template <class Mac>
struct Panel {
  Block& block;
  Finish finish;
  const float* weight;
  int64_t units;

  template <int ROWS>
  inline void run(int first) {
    typename Mac::Sum sums[ROWS][WIDE] = {};
    const Rows& x = *block.x;
    accumulate<Mac, ROWS, WIDE, true>(sums, x.units + first * x.row, x.row, weight, PANEL, units);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < WIDE; ++c) store(block.sums[r][c], as_floats(sums[r][c]));
    block.first = first, block.rows = ROWS;
    finish(block);
  }
};

template <class Mac>
void multiply(const ProductTask& task, const Rows& x) {
  const Product& job = *task.job;
  int64_t units = units_of(job.inputs, job.weight_type);
  Block block;
  block.task = &task, block.x = &x;
  Finish last = job.out_type == FLOAT32 ? finish_for<float>(job.activation) : finish_for<uint16_t>(job.activation);
  for (int64_t p = task.panel; p < task.panel_end; ++p) {
    const float* weight = static_cast<const float*>(job.weight) + p * panel_units(job.inputs, job.weight_type);
    block.column = p * PANEL, block.weight_sums = weight + units * PANEL;
    Panel<Mac> panel{block, last, weight, units};
    in_blocks<WIDE_ROWS>(panel, int(task.last - task.first));
  }
}

void run_product(const ProductTask* task, char* scratch) {
  const Product& job = *task->job;
  if (job.weight_type == INT8)
    multiply<MacQuad>(*task, job.type == FLOAT32 ? quantised_rows<float>(*task, scratch)
                                                 : quantised_rows<uint16_t>(*task, scratch));
  else if (job.weight_type == FLOAT32)
    multiply<MacFloat>(*task, job.type == FLOAT32 ? float_rows<float>(*task, scratch)
                                                  : float_rows<uint16_t>(*task, scratch));
#if defined(REWIRE_PAIRS)
  else multiply<MacPair>(*task, paired_rows(*task, scratch));
#endif
}

}  // namespace
