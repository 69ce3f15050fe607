// The one inner loop of everything here: a block of accumulators, rows from one operand (one 4-byte unit broadcast at a
// time), lanes from the other. A unit is a float, a pair of bfloat16 or four bytes; `Mac` says what multiplying means.
#pragma once

#include "lanes.h"

namespace {

struct MacFloat {
  typedef Floats Sum;
  INLINE Floats step(Floats sum, Floats b, const float* a) { return sum + b * *a; }
};

#if defined(__AVX512BF16__) && defined(__AVX512F__)
#define REWIRE_PAIRS 1
struct MacPair {
  typedef Floats Sum;
  INLINE Floats step(Floats sum, Floats b, const float* a) {
    __m512i unit = _mm512_set1_epi32(int32_t(*reinterpret_cast<const AnyBits*>(a)));
    return reinterpret_cast<Floats>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(unit),
                                                     reinterpret_cast<__m512bh>(b)));
  }
};
#endif

// Four unsigned bytes of a (activations) by four signed bytes of b (weights), summed exactly.
struct MacQuad {
  typedef Ints Sum;
  INLINE Ints step(Ints sum, Floats b, const float* a) {
    int32_t unit = int32_t(*reinterpret_cast<const AnyBits*>(a));
#if defined(__AVX512VNNI__) && defined(__AVX512F__)
    return reinterpret_cast<Ints>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum), _mm512_set1_epi32(unit),
                                                      reinterpret_cast<__m512i>(b)));
#else
    Ints bytes = reinterpret_cast<Ints>(b);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) sum += ((bytes << (24 - 8 * i)) >> 24) * ((unit >> (8 * i)) & 255);
    return sum;
#endif
  }
};

// Accumulator shapes that fill the registers: NARROW vectors beside each other times as many rows as fit.
#if defined(__AVX512F__)
constexpr int WIDE = 2, WIDE_ROWS = 12, ONE_ROWS = 16;
#elif defined(__AVX2__)
constexpr int WIDE = 2, WIDE_ROWS = 6, ONE_ROWS = 8;
#elif defined(__aarch64__)
constexpr int WIDE = 4, WIDE_ROWS = 6, ONE_ROWS = 12;
#else
constexpr int WIDE = 2, WIDE_ROWS = 4, ONE_ROWS = 8;
#endif

// sums[r][c] += a(r, s) * b(s, c) for all steps s. a(r, s) lies at a[r * a_row + s] (BY_ROW) or a[s * a_row + r].
template <class Mac, int ROWS, int COLUMNS, bool BY_ROW>
INLINE void accumulate(typename Mac::Sum (&sums)[ROWS][COLUMNS], const float* a, ptrdiff_t a_row, const float* b,
                       ptrdiff_t b_row, ptrdiff_t steps) {
  for (ptrdiff_t s = 0; s < steps; ++s) {
    Floats lanes[COLUMNS];
#pragma GCC unroll 4
    for (int c = 0; c < COLUMNS; ++c) lanes[c] = load(b + s * b_row + c * LANES);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      const float* unit = BY_ROW ? a + r * a_row + s : a + s * a_row + r;
#pragma GCC unroll 4
      for (int c = 0; c < COLUMNS; ++c) sums[r][c] = Mac::step(sums[r][c], lanes[c], unit);
    }
  }
}

// Calls work.template run<rows>(first) over `count` rows in blocks of MOST, 4, 3, 2 and 1.
template <int MOST, class Work>
INLINE void in_blocks(Work& work, int count) {
  int first = 0;
  for (; first + MOST <= count; first += MOST) work.template run<MOST>(first);
  for (; first + 4 <= count; first += 4) work.template run<4>(first);
  switch (count - first) {
    case 3: work.template run<3>(first); break;
    case 2: work.template run<2>(first); break;
    case 1: work.template run<1>(first); break;
  }
}

}  // namespace
