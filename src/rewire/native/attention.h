// Attention of one head over one sequence, keys in blocks with a running maximum (Milakov and Gimelshein, "Online
// normalizer calculation for softmax", 2018; Dao et al., "FlashAttention", 2022).
//
// Scores are kept with one key per row and the queries in the lanes: maximum, exponential and sum then need nothing
// across lanes, keys and values are read where they lie, and only the queries (each once) are transposed.
#pragma once

#include "interface.h"
#include "tile.h"

namespace {

constexpr int QUERIES = WIDE * LANES;  // in one block

INLINE int64_t rounded_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }
INLINE int64_t at_most(int64_t value, int64_t most) { return value < most ? value : most; }

// Keys in one block, so that keys and scores stay near; a multiple of 4.
INLINE int64_t block_of_keys(int64_t length, int64_t width) {
  int64_t most = 4096 / width > 128 ? 128 : 4096 / width < 32 ? 32 : 4096 / width / 4 * 4;
  int64_t blocks = (length + most + most / 2 - 1) / (most + most / 2);
  return rounded_up((length + blocks - 1) / blocks, 4);
}

// Where things lie in a thread's scratch memory. Units are 4 bytes: a float or a pair of bfloat16.
struct AttentionSpace {
  int64_t units, columns;  // of a query or key row; of a value row, padded to whole vectors
  float *queries, *scores, *output, *keys, *values, *pairs, *bias;

  static int64_t bytes(int64_t length, int64_t width) {
    int64_t columns = rounded_up(width, LANES), most = 256, rows = rounded_up(length, 4) + LANES;
    return 4 * (QUERIES * columns * 2 + most * QUERIES * 3 + 2 * rows * columns + 16 * 16);
  }

  AttentionSpace(char* scratch, int64_t length, int64_t width, bool paired)
      : units(paired ? (width + 1) / 2 : width), columns(rounded_up(width, LANES)) {
    float* next = reinterpret_cast<float*>(scratch);
    int64_t rows = rounded_up(length, 4) + LANES;
    queries = next, next += QUERIES * columns;
    output = next, next += QUERIES * columns;
    scores = next, next += 256 * QUERIES;
    pairs = next, next += 256 * QUERIES;
    bias = next, next += 256 * QUERIES;
    keys = next, next += rows * columns;
    values = next;
  }
};

// ---------------------------------------------------------------- bringing the operands into place

// `count` rows of `units` 4-byte units to [units][QUERIES], missing rows as 0.
INLINE void transpose_units(const float* from, ptrdiff_t row, int count, int64_t units, float* to, float scale) {
  int last = count <= LANES ? LANES : QUERIES;  // a narrow block does not read the vectors beyond
  for (int first = 0; first < last; first += LANES) {
    int here = count - first < LANES ? count - first : LANES;
    int64_t unit = 0;
    for (; unit + LANES <= units; unit += LANES) {
      Floats square[LANES];
#pragma GCC unroll 16
      for (int r = 0; r < LANES; ++r) square[r] = r < here ? load(from + (first + r) * row + unit) : Floats{};
      transpose(square);
#pragma GCC unroll 16
      for (int c = 0; c < LANES; ++c)
        store(to + (unit + c) * QUERIES + first, scale == 1.0f ? square[c] : square[c] * scale);
    }
    for (; unit < units; ++unit)
      for (int r = 0; r < LANES; ++r) {
        float* place = to + unit * QUERIES + first + r;
        const float* value = from + (first + r) * row + unit;
        if (r >= here) *place = 0.0f;
        else if (scale == 1.0f) __builtin_memcpy(place, value, 4);  // a pair of bfloat16 is not a float
        else *place = *value * scale;
      }
  }
}

template <class T>
INLINE void copy_rows(const T* from, ptrdiff_t row, int64_t rows, int64_t width, float* to, int64_t to_row) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < width; c += LANES) store(to + r * to_row + c, get_some(from + r * row + c, int(width - c)));
}

// bfloat16 rows as pairs along the width, the odd one out padded with 0.
INLINE void copy_pairs(const uint16_t* from, ptrdiff_t row, int64_t rows, int64_t width, float* to, int64_t units) {
  for (int64_t r = 0; r < rows; ++r) {
    uint16_t* place = reinterpret_cast<uint16_t*>(to + r * units);
    __builtin_memcpy(place, from + r * row, size_t(width) * 2);
    if (width & 1) place[width] = 0;
  }
}

// bfloat16 rows as pairs of two rows each: unit c of pair r holds (from[2r][c], from[2r + 1][c]).
INLINE void pair_rows(const uint16_t* from, ptrdiff_t row, int64_t rows, int64_t width, float* to, int64_t to_row) {
  for (int64_t r = 0; r < rows; r += 2)
    for (int64_t c = 0; c < width; c += LANES) {
      const uint16_t* place = from + r * row + c;
      Floats low = get_some(place, int(width - c));
      Floats high = r + 1 < rows ? get_some(place + row, int(width - c)) : Floats{};
      Bits pair = (reinterpret_cast<Bits>(low) >> 16) | reinterpret_cast<Bits>(high);
      store(to + (r / 2) * to_row + c, reinterpret_cast<Floats>(pair));
    }
}

// ---------------------------------------------------------------- one block of queries by one block of keys

// scores[key][query] of COLUMNS vectors of queries.
template <class Mac, int COLUMNS>
struct Scores {
  const float* keys;
  ptrdiff_t key_row;
  const float* queries;
  float* scores;
  ptrdiff_t units;
  float factor;

  template <int ROWS>
  inline void run(int first) {
    typename Mac::Sum sums[ROWS][COLUMNS] = {};
    accumulate<Mac, ROWS, COLUMNS, true>(sums, keys + first * key_row, key_row, queries, QUERIES, units);
    float* place = scores + first * QUERIES;
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < COLUMNS; ++c) store(place + r * QUERIES + c * LANES, sums[r][c] * factor);
  }
};

// output[query][column] (+)= probabilities[key][query] * values[key][column], COLUMNS vectors of columns.
template <class Mac, int COLUMNS>
struct Weighted {
  const float* probabilities;
  const float* values;
  ptrdiff_t value_row;
  float* output;
  ptrdiff_t columns;
  ptrdiff_t steps;
  const float* decay;  // of each query's earlier sum; null: there is none yet

  template <int ROWS>
  inline void run(int first) {
    typename Mac::Sum sums[ROWS][COLUMNS] = {};
    float* place = output + first * columns;
    if (decay)
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < COLUMNS; ++c) sums[r][c] = load(place + r * columns + c * LANES) * decay[first + r];
    accumulate<Mac, ROWS, COLUMNS, false>(sums, probabilities + first, QUERIES, values, value_row, steps);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < COLUMNS; ++c) store(place + r * columns + c * LANES, sums[r][c]);
  }
};

// The running maximum (in units of log2 e) and sum of each query.
struct Running {
  Floats most[WIDE], sum[WIDE];
  float decay[QUERIES];
};

// Scores to unnormalised probabilities, in place, or as pairs of keys in `pairs`; `running` is brought up to date.
template <int COLUMNS, bool EXACT, bool PAIRED>
INLINE void softmax_block(float* scores, int keys, float* pairs, Running& running, bool is_first) {
#pragma GCC unroll 4
  for (int c = 0; c < COLUMNS; ++c) {
    float* column = scores + c * LANES;
    Floats most = is_first ? all(LOWEST) : running.most[c];
    for (int j = 0; j < keys; ++j) most = larger(load(column + j * QUERIES), most);
    Floats base = most == LOWEST ? Floats{} : most;
    Floats sum = Floats{};
    if (!is_first) {
      Floats decay = exp2_of<EXACT>(running.most[c] - base);
      store(running.decay + c * LANES, decay);
      sum = running.sum[c] * decay;
    }
    int j = 0;
    for (; j + 2 <= keys; j += 2) {
      Floats one = exp2_of<EXACT>(load(column + j * QUERIES) - base);
      Floats two = exp2_of<EXACT>(load(column + (j + 1) * QUERIES) - base);
      sum += one + two;
      if (PAIRED) store(pairs + (j / 2) * QUERIES + c * LANES, paired(one, two));
      else store(column + j * QUERIES, one), store(column + (j + 1) * QUERIES, two);
    }
    if (j < keys) {
      Floats one = exp2_of<EXACT>(load(column + j * QUERIES) - base);
      sum += one;
      if (PAIRED) store(pairs + (j / 2) * QUERIES + c * LANES, paired(one, Floats{}));
      else store(column + j * QUERIES, one);
    }
    running.most[c] = most, running.sum[c] = sum;
  }
}

template <class Mac, int COLUMNS>
INLINE void weigh(const float* probabilities, const float* values, ptrdiff_t value_row, float* output,
                  const AttentionSpace& space, int queries, int64_t steps, const float* decay, int64_t column) {
  constexpr int ROWS = COLUMNS == 1 ? ONE_ROWS : COLUMNS == WIDE ? WIDE_ROWS : 4;
  Weighted<Mac, COLUMNS> work{probabilities, values + column, value_row, output + column, space.columns, steps, decay};
  in_blocks<ROWS>(work, queries);
}

// All columns of the values, WIDE vectors at a time.
template <class Mac>
INLINE void weigh_all(const float* probabilities, const float* values, ptrdiff_t value_row,
                      const AttentionSpace& space, int queries, int64_t steps, const float* decay) {
  int64_t column = 0;
  for (; column + WIDE * LANES <= space.columns; column += WIDE * LANES)
    weigh<Mac, WIDE>(probabilities, values, value_row, space.output, space, queries, steps, decay, column);
  for (; column < space.columns; column += LANES)
    weigh<Mac, 1>(probabilities, values, value_row, space.output, space, queries, steps, decay, column);
}

// ---------------------------------------------------------------- one head of one sequence

struct Place {  // keys and values as the kernels read them
  const float* keys;
  ptrdiff_t key_row;
  const float* values;
  ptrdiff_t value_row;
};

INLINE void add_bias(const AttentionTask& task, float* scores, int64_t query, int queries, int64_t key, int keys) {
  const Attention& job = *task.job;
  for (int j = 0; j < keys; ++j) {
    const float* bias = job.bias + task.head * job.bias_head + query * job.bias_query + (key + j) * job.bias_key;
    float* row = scores + j * QUERIES;
    int i = 0;
    if (job.bias_query == 1)
      for (; i + LANES <= queries; i += LANES) store(row + i, load(row + i) + load(bias + i) * LOG2E);
    for (; i < queries; ++i) row[i] += bias[i * job.bias_query] * LOG2E;
  }
}

template <class T>
INLINE void write_rows(const AttentionTask& task, const AttentionSpace& space, const Running& running, int64_t query,
                       int queries) {
  const Attention& job = *task.job;
  float sums[QUERIES];
  for (int c = 0; c < WIDE; ++c) store(sums + c * LANES, running.sum[c]);
  T* out = static_cast<T*>(job.out) + (task.start + query) * job.out_row + task.head * job.out_head;
  for (int r = 0; r < queries; ++r) {
    float share = sums[r] == 0.0f ? 0.0f : 1.0f / sums[r];
    for (int64_t c = 0; c < job.width; c += LANES)
      put_some(out + r * job.out_row + c, load(space.output + r * space.columns + c) * share, int(job.width - c));
  }
}

template <class Mac, class T, int COLUMNS, bool PAIRED>
INLINE void attend_block(const AttentionTask& task, const AttentionSpace& space, const Place& place, int64_t query,
                         int queries, float factor) {
  const Attention& job = *task.job;
  int64_t block = block_of_keys(task.length, job.width);
  Running running = {};
  for (int64_t key = 0; key < task.length; key += block) {
    int keys = int(at_most(block, task.length - key));
    Scores<Mac, COLUMNS> scores{place.keys + key * place.key_row, place.key_row, space.queries, space.scores,
                                space.units, factor};
    constexpr int ROWS = COLUMNS == 1 ? ONE_ROWS : WIDE_ROWS;
    in_blocks<ROWS>(scores, keys);
    if (job.bias) add_bias(task, space.scores, query, queries, key, keys);
    softmax_block<COLUMNS, Element<T>::exact, PAIRED>(space.scores, keys, space.pairs, running, key == 0);
    const float* decay = key ? running.decay : nullptr;
    const float* values = place.values + (PAIRED ? key / 2 : key) * place.value_row;
    weigh_all<Mac>(PAIRED ? space.pairs : space.scores, values, place.value_row, space, queries,
                   PAIRED ? (keys + 1) / 2 : keys, decay);
  }
  write_rows<T>(task, space, running, query, queries);
}

// Where keys and values are read: in place where they are as the kernels want them and are read only once or lie close
// together, else from a copy.
template <class T, bool PAIRED>
INLINE Place prepare(const AttentionTask& task, const AttentionSpace& space) {
  const Attention& job = *task.job;
  int64_t kv_head = task.head / (job.heads / job.kv_heads), width = job.width;
  const T* k = static_cast<const T*>(job.k) + task.start * job.k_row + kv_head * job.k_head;
  const T* v = static_cast<const T*>(job.v) + task.start * job.v_row + kv_head * job.v_head;
  bool is_read_once = task.last - task.first <= QUERIES;
  Place place = {space.keys, space.columns, space.values, space.columns};
  if (PAIRED) {
    const uint16_t* pairs = reinterpret_cast<const uint16_t*>(k);
    if (is_read_once && width % 2 == 0 && job.k_row % 2 == 0 && job.k_row % 2048)  // see is_crowded in product.h
      place.keys = reinterpret_cast<const float*>(pairs), place.key_row = job.k_row / 2;
    else
      copy_pairs(pairs, job.k_row, task.length, width, space.keys, space.units), place.key_row = space.units;
    pair_rows(reinterpret_cast<const uint16_t*>(v), job.v_row, task.length, width, space.values, space.columns);
    return place;
  }
  bool is_float = Element<T>::exact;
  if (is_float && is_read_once && job.k_row % 1024) place.keys = reinterpret_cast<const float*>(k), place.key_row = job.k_row;
  else copy_rows(k, job.k_row, task.length, width, space.keys, space.columns);
  if (is_float && is_read_once && width % LANES == 0)
    place.values = reinterpret_cast<const float*>(v), place.value_row = job.v_row;
  else copy_rows(v, job.v_row, task.length, width, space.values, space.columns);
  return place;
}

// Scores are kept times log2 e, so that 2^x serves: the factor goes into the queries where they are floats, and is
// applied to the sums where rounding the queries once more would cost accuracy.
template <class Mac, class T, bool PAIRED>
INLINE void attend(const AttentionTask& task, char* scratch) {
  const Attention& job = *task.job;
  AttentionSpace space(scratch, task.length, job.width, PAIRED);
  Place place = prepare<T, PAIRED>(task, space);
  float factor = job.scale * LOG2E;
  for (int64_t query = task.first; query < task.last; query += QUERIES) {
    int queries = int(at_most(QUERIES, task.last - query));
    const T* q = static_cast<const T*>(job.q) + (task.start + query) * job.q_row + task.head * job.q_head;
    const float* rows = reinterpret_cast<const float*>(q);
    int64_t row = job.q_row;
    if (PAIRED && (job.width % 2 || job.q_row % 2)) {
      copy_pairs(reinterpret_cast<const uint16_t*>(q), row, queries, job.width, space.output, space.units);
      rows = space.output, row = space.units;
    } else if (PAIRED) {
      row /= 2;
    } else if (!Element<T>::exact) {
      copy_rows(q, row, queries, job.width, space.output, space.columns);
      rows = space.output, row = space.columns;
    }
    transpose_units(rows, row, queries, space.units, space.queries, PAIRED ? 1.0f : factor);
    float later = PAIRED ? factor : 1.0f;
    if (queries <= LANES) attend_block<Mac, T, 1, PAIRED>(task, space, place, query, queries, later);
    else attend_block<Mac, T, WIDE, PAIRED>(task, space, place, query, queries, later);
  }
}

int64_t attention_scratch(const Attention* job) {
  int64_t longest = 0;
  for (int64_t s = 0; s < job->sequences; ++s) {
    int64_t length = job->starts[s + 1] - job->starts[s];
    longest = length > longest ? length : longest;
  }
  return AttentionSpace::bytes(longest, job->width);
}

void run_attention(const AttentionTask* task, char* scratch) {
  if (task->job->type == FLOAT32) return attend<MacFloat, float, false>(*task, scratch);
#if defined(REWIRE_PAIRS)
  attend<MacPair, uint16_t, true>(*task, scratch);
#else
  attend<MacFloat, uint16_t, false>(*task, scratch);
#endif
}

}  // namespace
