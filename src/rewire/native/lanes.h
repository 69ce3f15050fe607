// Vectors of as many 32-bit lanes as the instruction set has, written with the vector types of GCC and Clang.
//
// Compiled once per instruction set (see kernels.cpp). No standard library here: a function of it compiled for
// AVX-512 could be the one the linker keeps for everybody.
#pragma once

#include <stddef.h>
#include <stdint.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define MEMBER inline __attribute__((always_inline))

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint32_t Bits __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));
typedef float FloatsAnywhere __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint16_t HalvesAnywhere __attribute__((vector_size(LANES * 2), aligned(2), may_alias));
typedef uint32_t AnyBits __attribute__((aligned(1), may_alias));

INLINE Floats load(const float* from) { return *reinterpret_cast<const FloatsAnywhere*>(from); }
INLINE void store(float* to, Floats value) { *reinterpret_cast<FloatsAnywhere*>(to) = value; }
INLINE Floats all(float value) { return value - Floats{}; }
INLINE Ints all_ints(int32_t value) { return value - Ints{}; }
INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }
INLINE Floats smaller(Floats a, Floats b) { return a < b ? a : b; }

constexpr float LOG2E = 1.44269504088896341f;
constexpr float LOWEST = -__builtin_inff();

// A polynomial fitted to 2^r over [-1/2, 1/2]. EXACT: relative error 8e-8, half a unit in the last place; else 3e-6, which
// is far below what bfloat16 resolves.
template <bool EXACT>
INLINE Floats exp2_of_rest(Floats r) {
  Floats value;
  if (EXACT) {
    value = all(0x1.5c08e2p-10f);
    value = value * r + 0x1.3d0c52p-7f;
    value = value * r + 0x1.c6b6e6p-5f;
    value = value * r + 0x1.ebf918p-3f;
    value = value * r + 0x1.62e428p-1f;
    return value * r + 0x1.000002p+0f;
  }
  value = all(0x1.3997d2p-7f);
  value = value * r + 0x1.ca1440p-5f;
  value = value * r + 0x1.ec06dap-3f;
  value = value * r + 0x1.62e0dcp-1f;
  return value * r + 0x1.ffffe8p-1f;
}

// 2^x for x <= 127; 0 (or nearly so) below -126. A NaN stays one.
template <bool EXACT>
INLINE Floats exp2_of(Floats x) {
#if defined(__AVX512F__)
  // The maximum takes its second operand where one is a NaN.
  __m512 bounded = _mm512_max_ps(_mm512_set1_ps(-200.0f), reinterpret_cast<__m512>(x));
  __m512 whole = _mm512_roundscale_ps(bounded, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  Floats value = exp2_of_rest<EXACT>(reinterpret_cast<Floats>(bounded) - reinterpret_cast<Floats>(whole));
  return reinterpret_cast<Floats>(_mm512_scalef_ps(reinterpret_cast<__m512>(value), whole));
#else
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding it leaves round(x) in the low bits
  Floats bounded = x < -126.0f ? all(-126.0f) : x;
  Floats shifted = bounded + shift;
  Ints exponent = (reinterpret_cast<Ints>(shifted) << 23) + 0x3f800000;
  Floats value = exp2_of_rest<EXACT>(bounded - (shifted - shift)) * reinterpret_cast<Floats>(exponent);
  return x < -126.0f ? Floats{} : value;
#endif
}

// ---------------------------------------------------------------- bfloat16: the upper half of a float

INLINE Floats widen(const uint16_t* from) {
  Halves halves = *reinterpret_cast<const HalvesAnywhere*>(from);
  return reinterpret_cast<Floats>(__builtin_convertvector(halves, Bits) << 16);
}

INLINE float widen_one(uint16_t half) {
  uint32_t bits = uint32_t(half) << 16;
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

// Round to nearest, ties to even; the result in the low half of each lane.
INLINE Bits rounded(Floats value) {
  Bits bits = reinterpret_cast<Bits>(value);
  Bits nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return value == value ? nearest : (bits >> 16) | 0x40u;
}

INLINE void narrow(uint16_t* to, Floats value) {
#if defined(__AVX512BF16__) && defined(__AVX512F__)
  __m256bh halves = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(value));
  __builtin_memcpy(to, &halves, 32);
#else
  *reinterpret_cast<HalvesAnywhere*>(to) = __builtin_convertvector(rounded(value), Halves);
#endif
}

INLINE uint16_t narrow_one(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  if (value != value) return uint16_t((bits >> 16) | 0x40u);
  return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// Two rows of floats to pairs of bfloat16: lane i holds (low[i], high[i]).
INLINE Floats paired(Floats low, Floats high) {
#if defined(__AVX512BF16__) && defined(__AVX512F__)
  Bits lows = __builtin_convertvector(
      reinterpret_cast<Halves>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(low))), Bits);
  Bits highs = __builtin_convertvector(
      reinterpret_cast<Halves>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(high))), Bits);
  return reinterpret_cast<Floats>(lows | (highs << 16));
#else
  return reinterpret_cast<Floats>(rounded(low) | (rounded(high) << 16));
#endif
}

// ---------------------------------------------------------------- one element of either type

template <class T>
struct Element;

template <>
struct Element<float> {
  static constexpr bool exact = true;
  INLINE Floats get(const float* from) { return load(from); }
  INLINE void put(float* to, Floats value) { store(to, value); }
  INLINE float one(float value) { return value; }
  INLINE float make(float value) { return value; }
};

template <>
struct Element<uint16_t> {
  static constexpr bool exact = false;
  INLINE Floats get(const uint16_t* from) { return widen(from); }
  INLINE void put(uint16_t* to, Floats value) { narrow(to, value); }
  INLINE float one(uint16_t value) { return widen_one(value); }
  INLINE uint16_t make(float value) { return narrow_one(value); }
};

// Up to LANES elements; the rest of the vector is 0 when reading and left alone when writing.
template <class T>
INLINE Floats get_some(const T* from, int count) {
  if (count >= LANES) return Element<T>::get(from);
  float values[LANES] = {};
  for (int i = 0; i < count; ++i) values[i] = Element<T>::one(from[i]);
  return load(values);
}

template <class T>
INLINE void put_some(T* to, Floats value, int count) {
  if (count >= LANES) return Element<T>::put(to, value);
  float values[LANES];
  store(values, value);
  for (int i = 0; i < count; ++i) to[i] = Element<T>::make(values[i]);
}

INLINE float largest_of(Floats value) {
  float values[LANES];
  store(values, value);
  float largest = values[0];
  for (int i = 1; i < LANES; ++i) largest = values[i] > largest ? values[i] : largest;
  return largest;
}

// ---------------------------------------------------------------- transposing a square of vectors

#if defined(__clang__) || __GNUC__ >= 12
template <int STEP, int HALF, int... LANE>
struct Swap;

template <int... LANE>
struct Indices {};
template <int N, int... LANE>
struct Count : Count<N - 1, N - 1, LANE...> {};
template <int... LANE>
struct Count<0, LANE...> {
  typedef Indices<LANE...> type;
};

// Exchanges the off-diagonal STEP x STEP blocks of two rows that lie STEP apart.
template <int STEP, int... LANE>
INLINE void exchange(Floats& upper, Floats& lower, Indices<LANE...>) {
  Floats a = upper, b = lower;
  upper = __builtin_shufflevector(a, b, ((LANE & STEP) ? LANES + LANE - STEP : LANE)...);
  lower = __builtin_shufflevector(a, b, ((LANE & STEP) ? LANES + LANE : LANE + STEP)...);
}

template <int STEP>
INLINE void exchange_all(Floats (&rows)[LANES]) {
#pragma GCC unroll 16
  for (int r = 0; r < LANES; ++r)
    if (!(r & STEP)) exchange<STEP>(rows[r], rows[r + STEP], typename Count<LANES>::type());
}

INLINE void transpose(Floats (&rows)[LANES]) {
  exchange_all<1>(rows);
  exchange_all<2>(rows);
  if (LANES > 4) exchange_all<(LANES > 4 ? 4 : 1)>(rows);
  if (LANES > 8) exchange_all<(LANES > 8 ? 8 : 1)>(rows);
}
#else
INLINE void transpose(Floats (&rows)[LANES]) {
  float in[LANES][LANES];
  for (int r = 0; r < LANES; ++r) store(in[r], rows[r]);
  for (int r = 0; r < LANES; ++r)
    for (int c = 0; c < LANES; ++c) rows[r][c] = in[c][r];
}
#endif

}  // namespace
