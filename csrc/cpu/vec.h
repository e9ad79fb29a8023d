// Vec<T>: the numbers of the formulas on a CPU, a vector register of float or double; and its elementary functions.
//
// GCC's vector extensions, so that one source serves every instruction set; intrinsics only where they say more than the
// language can (masked loads, min and max, 2^n). Everything that is compiled once per instruction set lives in a
// namespace of its own: the linker must never merge two versions of one function.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "../formulas/number.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define UNIGEN_PASTE(a, b) a##b
#define UNIGEN_JOIN(a, b) UNIGEN_PASTE(a, b)
#define UNIGEN_ISA_NAMESPACE UNIGEN_JOIN(isa_, UNIGEN_ISA)

namespace unigen::cpu::UNIGEN_ISA_NAMESPACE {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
struct RawVec;
template <>
struct RawVec<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef int32_t bits __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t ubits __attribute__((vector_size(kVectorBytes)));
};
template <>
struct RawVec<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef int64_t bits __attribute__((vector_size(kVectorBytes)));
  typedef uint64_t ubits __attribute__((vector_size(kVectorBytes)));
};

template <class T>
struct Mask {
  typename RawVec<T>::bits v;
};

template <class T>
struct Vec {
  using Raw = typename RawVec<T>::type;
  using Bits = typename RawVec<T>::bits;
  static constexpr int size = kVectorBytes / int(sizeof(T));

  Raw v;

  Vec() = default;
  UNIGEN_INLINE Vec(Raw raw) : v(raw) {}
  UNIGEN_INLINE explicit Vec(T x) : v(x - Raw{}) {}  // x - 0 is x, -0 too
};

// ---- operators -----------------------------------------------------------------------------------------------------

// clang-format off
template <class T> UNIGEN_INLINE Vec<T> operator+(Vec<T> a, Vec<T> b) { return a.v + b.v; }
template <class T> UNIGEN_INLINE Vec<T> operator-(Vec<T> a, Vec<T> b) { return a.v - b.v; }
template <class T> UNIGEN_INLINE Vec<T> operator*(Vec<T> a, Vec<T> b) { return a.v * b.v; }
template <class T> UNIGEN_INLINE Vec<T> operator/(Vec<T> a, Vec<T> b) { return a.v / b.v; }
template <class T> UNIGEN_INLINE Vec<T> operator-(Vec<T> a) { return -a.v; }
template <class T> UNIGEN_INLINE Mask<T> operator<(Vec<T> a, Vec<T> b) { return {a.v < b.v}; }
template <class T> UNIGEN_INLINE Mask<T> operator==(Vec<T> a, Vec<T> b) { return {a.v == b.v}; }
template <class T> UNIGEN_INLINE Vec<T> select(Mask<T> m, Vec<T> yes, Vec<T> no) { return m.v ? yes.v : no.v; }
// clang-format on

template <class T>
UNIGEN_INLINE bool any(Mask<T> m) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_test_epi32_mask((__m512i)m.v, (__m512i)m.v) != 0;
  else return _mm512_test_epi64_mask((__m512i)m.v, (__m512i)m.v) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_epi8((__m256i)m.v) != 0;
#elif defined(__SSE2__)
  return _mm_movemask_epi8((__m128i)m.v) != 0;
#else
  bool found = false;
  for (int i = 0; i < Vec<T>::size; ++i) found = found || m.v[i];
  return found;
#endif
}

template <class T>
UNIGEN_INLINE typename RawVec<T>::bits bits_of(Vec<T> x) {
  return (typename RawVec<T>::bits)x.v;
}
template <class T>
UNIGEN_INLINE Vec<T> from_bits(typename RawVec<T>::bits x) {
  return Vec<T>((typename RawVec<T>::type)x);
}

template <class T>
struct Format;  // of IEEE numbers
template <>
struct Format<float> {
  static constexpr int mantissa_bits = 23, bias = 127;
  static constexpr int32_t magnitude = 0x7fffffff, mantissa = 0x7fffff, one = 0x3f800000, root_half = 0x3f3504f3;
  static constexpr float shifter = 12582912.0f;  // 1.5 · 2^23: adding it rounds to an integer, kept in the low bits
  static constexpr float min_normal = 0x1p-126f;
};
template <>
struct Format<double> {
  static constexpr int mantissa_bits = 52, bias = 1023;
  static constexpr int64_t magnitude = 0x7fffffffffffffff, mantissa = 0xfffffffffffff, one = 0x3ff0000000000000,
                           root_half = 0x3fe6a09e667f3bcd;
  static constexpr double shifter = 6755399441055744.0;  // 1.5 · 2^52
  static constexpr double min_normal = 0x1p-1022;
};

template <class T>
UNIGEN_INLINE Vec<T> abs(Vec<T> x) {
  return from_bits<T>(bits_of(x) & Format<T>::magnitude);
}

// min and max give the second argument where either is NaN. (The masked forms of AVX-512, which compile to the plain ones:
// GCC 12 warns about the undefined value inside the latter.)

#if defined(__AVX512F__)
UNIGEN_INLINE Vec<float> min(Vec<float> a, Vec<float> b) { return Vec<float>(_mm512_maskz_min_ps(-1, a.v, b.v)); }
UNIGEN_INLINE Vec<float> max(Vec<float> a, Vec<float> b) { return Vec<float>(_mm512_maskz_max_ps(-1, a.v, b.v)); }
UNIGEN_INLINE Vec<double> min(Vec<double> a, Vec<double> b) { return Vec<double>(_mm512_maskz_min_pd(-1, a.v, b.v)); }
UNIGEN_INLINE Vec<double> max(Vec<double> a, Vec<double> b) { return Vec<double>(_mm512_maskz_max_pd(-1, a.v, b.v)); }
UNIGEN_INLINE Vec<float> sqrt(Vec<float> x) { return Vec<float>(_mm512_maskz_sqrt_ps(-1, x.v)); }
UNIGEN_INLINE Vec<double> sqrt(Vec<double> x) { return Vec<double>(_mm512_maskz_sqrt_pd(-1, x.v)); }
#elif defined(__AVX2__)
UNIGEN_INLINE Vec<float> min(Vec<float> a, Vec<float> b) { return Vec<float>(_mm256_min_ps(a.v, b.v)); }
UNIGEN_INLINE Vec<float> max(Vec<float> a, Vec<float> b) { return Vec<float>(_mm256_max_ps(a.v, b.v)); }
UNIGEN_INLINE Vec<double> min(Vec<double> a, Vec<double> b) { return Vec<double>(_mm256_min_pd(a.v, b.v)); }
UNIGEN_INLINE Vec<double> max(Vec<double> a, Vec<double> b) { return Vec<double>(_mm256_max_pd(a.v, b.v)); }
UNIGEN_INLINE Vec<float> sqrt(Vec<float> x) { return Vec<float>(_mm256_sqrt_ps(x.v)); }
UNIGEN_INLINE Vec<double> sqrt(Vec<double> x) { return Vec<double>(_mm256_sqrt_pd(x.v)); }
#elif defined(__SSE2__)
UNIGEN_INLINE Vec<float> min(Vec<float> a, Vec<float> b) { return Vec<float>(_mm_min_ps(a.v, b.v)); }
UNIGEN_INLINE Vec<float> max(Vec<float> a, Vec<float> b) { return Vec<float>(_mm_max_ps(a.v, b.v)); }
UNIGEN_INLINE Vec<double> min(Vec<double> a, Vec<double> b) { return Vec<double>(_mm_min_pd(a.v, b.v)); }
UNIGEN_INLINE Vec<double> max(Vec<double> a, Vec<double> b) { return Vec<double>(_mm_max_pd(a.v, b.v)); }
UNIGEN_INLINE Vec<float> sqrt(Vec<float> x) { return Vec<float>(_mm_sqrt_ps(x.v)); }
UNIGEN_INLINE Vec<double> sqrt(Vec<double> x) { return Vec<double>(_mm_sqrt_pd(x.v)); }
#else
template <class T>
UNIGEN_INLINE Vec<T> min(Vec<T> a, Vec<T> b) {
  return select(a < b, a, b);
}
template <class T>
UNIGEN_INLINE Vec<T> max(Vec<T> a, Vec<T> b) {
  return select(b < a, a, b);
}
template <class T>
UNIGEN_INLINE Vec<T> sqrt(Vec<T> x) {
  for (int i = 0; i < Vec<T>::size; ++i) x.v[i] = sizeof(T) == 4 ? T(::sqrtf(float(x.v[i]))) : T(::sqrt(double(x.v[i])));
  return x;
}
#endif

// the formulas' maximum and minimum, in one instruction: NaN in `x` stays
template <class T>
UNIGEN_INLINE Vec<T> maximum(Vec<T> x, Vec<T> bound) {
  return max(bound, x);
}
template <class T>
UNIGEN_INLINE Vec<T> minimum(Vec<T> x, Vec<T> bound) {
  return min(bound, x);
}

// ---- memory --------------------------------------------------------------------------------------------------------

// Lanes to load or store: all of them, or the first few. Lanes that are not loaded are 0.
template <class T>
struct Full {};
template <class T>
struct First {
  int count;
};

template <class T>
UNIGEN_INLINE Mask<T> lanes(First<T> first) {
  typename RawVec<T>::bits index;
  for (int i = 0; i < Vec<T>::size; ++i) index[i] = i;
  return {index < first.count};
}

template <class T>
UNIGEN_INLINE Vec<T> load(const T* source, Full<T> = {}) {
  Vec<T> x;
  __builtin_memcpy(&x, source, sizeof x);
  return x;
}
template <class T>
UNIGEN_INLINE void store(T* target, Vec<T> x, Full<T> = {}) {
  __builtin_memcpy(target, &x, sizeof x);
}

#if defined(__AVX512F__)
UNIGEN_INLINE Vec<float> load(const float* source, First<float> f) {
  return Vec<float>(_mm512_maskz_loadu_ps(__mmask16((1u << f.count) - 1), source));
}
UNIGEN_INLINE Vec<double> load(const double* source, First<double> f) {
  return Vec<double>(_mm512_maskz_loadu_pd(__mmask8((1u << f.count) - 1), source));
}
UNIGEN_INLINE void store(float* target, Vec<float> x, First<float> f) {
  _mm512_mask_storeu_ps(target, __mmask16((1u << f.count) - 1), x.v);
}
UNIGEN_INLINE void store(double* target, Vec<double> x, First<double> f) {
  _mm512_mask_storeu_pd(target, __mmask8((1u << f.count) - 1), x.v);
}
#elif defined(__AVX2__)
UNIGEN_INLINE Vec<float> load(const float* source, First<float> f) {
  return Vec<float>(_mm256_maskload_ps(source, (__m256i)lanes(f).v));
}
UNIGEN_INLINE Vec<double> load(const double* source, First<double> f) {
  return Vec<double>(_mm256_maskload_pd(source, (__m256i)lanes(f).v));
}
UNIGEN_INLINE void store(float* target, Vec<float> x, First<float> f) {
  _mm256_maskstore_ps(target, (__m256i)lanes(f).v, x.v);
}
UNIGEN_INLINE void store(double* target, Vec<double> x, First<double> f) {
  _mm256_maskstore_pd(target, (__m256i)lanes(f).v, x.v);
}
#else
template <class T>
UNIGEN_INLINE Vec<T> load(const T* source, First<T> f) {
  Vec<T> x(T(0));
  for (int i = 0; i < f.count; ++i) x.v[i] = source[i];
  return x;
}
template <class T>
UNIGEN_INLINE void store(T* target, Vec<T> x, First<T> f) {
  for (int i = 0; i < f.count; ++i) target[i] = x.v[i];
}
#endif

// The same past the caches, to a target aligned to kVectorBytes: its line is not read first. Other threads may read it
// after end_streams().
template <class T, class Lanes>
UNIGEN_INLINE void stream(T* target, Vec<T> x, Lanes lanes) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<Lanes, Full<T>>) return _mm512_stream_si512(reinterpret_cast<__m512i*>(target), (__m512i)x.v);
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<Lanes, Full<T>>) return _mm256_stream_si256(reinterpret_cast<__m256i*>(target), (__m256i)x.v);
#endif
  store(target, x, lanes);
}
UNIGEN_INLINE void end_streams() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// `now` in the lanes that count, `before` in the others
template <class T>
UNIGEN_INLINE Vec<T> keep(Full<T>, Vec<T> now, Vec<T>) {
  return now;
}
template <class T>
UNIGEN_INLINE Vec<T> keep(First<T> first, Vec<T> now, Vec<T> before) {
  return select(lanes(first), now, before);
}

// body(index, lanes) for the vectors of n elements, the last of them partial
template <class T, class Body>
UNIGEN_INLINE void for_vectors(int n, const Body& body) {
  int i = 0;
  for (; i + Vec<T>::size <= n; i += Vec<T>::size) body(i, Full<T>{});
  if (i < n) body(i, First<T>{n - i});
}

// The same with a third argument, below kWays, that two in succession do not share: so many chains of additions do not wait
// for one another.
template <class T, int kWays, class Body>
UNIGEN_INLINE void for_vectors_in_turn(int n, const Body& body) {
  constexpr int size = Vec<T>::size;
  int i = 0;
  for (; i + kWays * size <= n; i += kWays * size) {
#pragma GCC unroll 8
    for (int way = 0; way < kWays; ++way) body(i + way * size, Full<T>{}, way);
  }
#pragma GCC unroll 8
  for (int way = 0; way < kWays - 1; ++way) {
    if (i + size > n) break;
    body(i, Full<T>{}, way);
    i += size;
  }
  if (i < n) body(i, First<T>{n - i}, kWays - 1);
}

// ---- over the lanes ------------------------------------------------------------------------------------------------

UNIGEN_INLINE double lane_sum(Vec<double> x) {
#if defined(__AVX512F__)
  typedef double Half __attribute__((vector_size(32)));
  typedef double Quarter __attribute__((vector_size(16)));
  const Half h = __builtin_shufflevector(x.v, x.v, 0, 1, 2, 3) + __builtin_shufflevector(x.v, x.v, 4, 5, 6, 7);
  const Quarter q = __builtin_shufflevector(h, h, 0, 1) + __builtin_shufflevector(h, h, 2, 3);
  return q[0] + q[1];
#elif defined(__AVX2__)
  typedef double Half __attribute__((vector_size(16)));
  const Half h = __builtin_shufflevector(x.v, x.v, 0, 1) + __builtin_shufflevector(x.v, x.v, 2, 3);
  return h[0] + h[1];
#else
  return x.v[0] + x.v[1];
#endif
}

// the two halves of float lanes, as doubles
struct Halves {
  Vec<double> low, high;
};
UNIGEN_INLINE Halves widen(Vec<float> x) {
#if defined(__AVX512F__)
  // GCC 12 converts to 512 bits in two steps unless told otherwise
  return {Vec<double>(_mm512_maskz_cvtps_pd(-1, __builtin_shufflevector(x.v, x.v, 0, 1, 2, 3, 4, 5, 6, 7))),
          Vec<double>(_mm512_maskz_cvtps_pd(-1, __builtin_shufflevector(x.v, x.v, 8, 9, 10, 11, 12, 13, 14, 15)))};
#elif defined(__AVX2__)
  typedef RawVec<double>::type Wide;
  return {Vec<double>(__builtin_convertvector(__builtin_shufflevector(x.v, x.v, 0, 1, 2, 3), Wide)),
          Vec<double>(__builtin_convertvector(__builtin_shufflevector(x.v, x.v, 4, 5, 6, 7), Wide))};
#else
  typedef RawVec<double>::type Wide;
  return {Vec<double>(__builtin_convertvector(__builtin_shufflevector(x.v, x.v, 0, 1), Wide)),
          Vec<double>(__builtin_convertvector(__builtin_shufflevector(x.v, x.v, 2, 3), Wide))};
#endif
}

UNIGEN_INLINE double lane_sum(Vec<float> x) {
  const Halves halves = widen(x);
  return lane_sum(halves.low + halves.high);
}

// totals[i] += lane i
UNIGEN_INLINE void add_lanes(double* totals, Vec<double> x) { store(totals, load(totals) + x); }
UNIGEN_INLINE void add_lanes(double* totals, Vec<float> x) {
  const Halves halves = widen(x);
  add_lanes(totals, halves.low);
  add_lanes(totals + Vec<double>::size, halves.high);
}

// totals[i] *= lane i
UNIGEN_INLINE void scale_lanes(double* totals, Vec<double> x) { store(totals, load(totals) * x); }
UNIGEN_INLINE void scale_lanes(double* totals, Vec<float> x) {
  const Halves halves = widen(x);
  scale_lanes(totals, halves.low);
  scale_lanes(totals + Vec<double>::size, halves.high);
}

// NaN loses
template <class T>
UNIGEN_INLINE T lane_max(Vec<T> x) {
  typename Vec<T>::Bits index;
  for (int i = 0; i < Vec<T>::size; ++i) index[i] = i;
  for (int half = Vec<T>::size / 2; half; half /= 2) x = max(Vec<T>(__builtin_shuffle(x.v, index ^ half)), x);
  return x.v[0];
}

// For each of as many vectors as one has lanes: `combine` over its lanes, in the lane of its number.
template <class T, class Combine>
UNIGEN_INLINE Vec<T> over_lanes(Vec<T>* x, const Combine& combine) {
  typename Vec<T>::Bits index;
  for (int i = 0; i < Vec<T>::size; ++i) index[i] = i;
  for (int half = Vec<T>::size / 2; half; half /= 2) {
    // the vectors i and i + half in one: a lane's bit `half` says whose it is
    const auto upper = (index & half) != 0;
    for (int i = 0; i < half; ++i) {
      const auto a = x[i].v, b = x[i + half].v;
      x[i] = combine(Vec<T>(__builtin_shuffle(a, b, upper ? index - half + Vec<T>::size : index)),
                     Vec<T>(__builtin_shuffle(a, b, upper ? index + Vec<T>::size : index + half)));
    }
  }
  return x[0];
}

// ---- elementary functions ------------------------------------------------------------------------------------------

// polynomial by Horner's rule, highest coefficient first
template <class T>
UNIGEN_INLINE Vec<T> horner(Vec<T>, Vec<T> sum) {
  return sum;
}
template <class T, class... Rest>
UNIGEN_INLINE Vec<T> horner(Vec<T> x, Vec<T> sum, double next, Rest... rest) {
  return horner(x, sum * x + constant<Vec<T>>(next), rest...);
}

// x · 2^n for an integral n; `rounded` is n + Format::shifter
template <class T>
UNIGEN_INLINE Vec<T> scale_by_power(Vec<T> x, Vec<T> n, Vec<T> rounded) {
#if defined(__AVX512F__)
  (void)rounded;
  if constexpr (sizeof(T) == 4) return Vec<T>(_mm512_maskz_scalef_ps(-1, x.v, n.v));
  else return Vec<T>(_mm512_maskz_scalef_pd(-1, x.v, n.v));
#else
  // in two factors, as one of them may not be a number that T has
  (void)rounded;
  const Vec<T> shifter = constant<Vec<T>>(Format<T>::shifter);
  const Vec<T> first = n * constant<Vec<T>>(0.5) + shifter, second = (n - (first - shifter)) + shifter;
  const auto zero = bits_of(shifter) - Format<T>::bias;
  return x * from_bits<T>((bits_of(first) - zero) << Format<T>::mantissa_bits) *
         from_bits<T>((bits_of(second) - zero) << Format<T>::mantissa_bits);
#endif
}

// x = n log(2) + r, |r| <= log(2) / 2, and e^r - 1. Cephes' polynomial for float, Taylor's for double.
template <class T>
struct ReducedExp {
  Vec<T> n, rounded, minus_1_minus_r, minus_1;  // rounded: n + Format::shifter

  // beyond these bounds there is nothing new; NaN passes
  UNIGEN_INLINE ReducedExp(Vec<T> x, double low, double high) {
    using V = Vec<T>;
    constexpr bool wide = sizeof(T) == 8;
    x = max(constant<V>(low), min(constant<V>(high), x));
    rounded = x * constant<V>(1.44269504088896340736) + constant<V>(Format<T>::shifter);
    n = rounded - constant<V>(Format<T>::shifter);
    V r = x - n * constant<V>(wide ? 6.93145751953125e-1 : 0.693359375);
    r = r - n * constant<V>(wide ? 1.42860682030941723212e-6 : -2.12194440e-4);
    V p;
    if constexpr (wide) {
      p = horner(r, constant<V>(1.0 / 6227020800), 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880,
                 1.0 / 40320, 1.0 / 5040, 1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5);
    } else {
      p = horner(r, constant<V>(1.9875691500e-4), 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1,
                 5.0000001201e-1);
    }
    minus_1_minus_r = p * (r * r);
    minus_1 = minus_1_minus_r + r;
  }
};

template <class T>
UNIGEN_INLINE Vec<T> exp_up_to(double high, Vec<T> x) {
  const ReducedExp<T> e(x, sizeof(T) == 8 ? -746 : -105, high);
  return scale_by_power(e.minus_1 + constant<Vec<T>>(1), e.n, e.rounded);
}
template <class T>
UNIGEN_INLINE Vec<T> exp(Vec<T> x) {
  return exp_up_to(sizeof(T) == 8 ? 710 : 89, x);
}
template <class T>
UNIGEN_INLINE Vec<T> finite_exp(Vec<T> x) {
  return exp_up_to(sizeof(T) == 8 ? 709.7 : 88.7, x);
}

// 2^f for |f| <= 1/2: a minimax polynomial for float (relative error 2e-9), 1 at 0; Taylor's for double.
template <class T>
UNIGEN_INLINE Vec<T> exp2_polynomial(Vec<T> f) {
  using V = Vec<T>;
  if constexpr (sizeof(T) == 8) {
    return horner(f, constant<V>(1.3691488853904124e-12), 2.5678435993488196e-11, 4.4455382718708101e-10,
                  7.0549116208011209e-09, 1.0178086009239696e-07, 1.3215486790144305e-06, 1.5252733804059838e-05,
                  1.5403530393381606e-04, 1.3333558146428441e-03, 9.6181291076284769e-03, 5.5504108664821576e-02,
                  2.4022650695910069e-01, 6.9314718055994529e-01, 1);
  } else {
    return horner(f, constant<V>(1.5345811708e-4), 1.3399931217e-3, 9.6184889582e-3, 5.5503287770e-2, 2.4022646891e-1,
                  6.9314720574e-1, 1);
  }
}

// 2^x for x < 200, and 0 where that is so small that products of it would be denormal, which cost a hundred times as much.
template <class T>
UNIGEN_INLINE Vec<T> exp2_bounded(Vec<T> x) {
  using V = Vec<T>;
  constexpr bool wide = sizeof(T) == 8;
  constexpr double low = wide ? -800 : -90;
  const Mask<T> nothing = x < constant<V>(low);  // NaN is not
#if !defined(__AVX512F__)  // which scales without products, of which some would be denormal here
  x = max(constant<V>(low), x);
#endif
  const V rounded = x + constant<V>(Format<T>::shifter), n = rounded - constant<V>(Format<T>::shifter), f = x - n;
  return select(nothing, constant<V>(0), scale_by_power(exp2_polynomial(f), n, rounded));
}

#if defined(__AVX2__)
// c + a · b, the product not rounded
UNIGEN_INLINE Vec<float> plus_product(Vec<float> c, Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  return Vec<float>(_mm512_maskz_fmadd_ps(-1, a.v, b.v, c.v));
#else
  return Vec<float>(_mm256_fmadd_ps(a.v, b.v, c.v));
#endif
}

// 2^{j / size} for the lanes j, as bits, less j in the place where an exponent's fraction would stand: for any n, 2^{n / size}
// is the entry of n's low bits, plus n there.
#if defined(__AVX512F__)
constexpr int kFractionBits = 4;
constexpr int32_t kFractionalPowers[16] = {0x3f800000, 0x3f7daac3, 0x3f7b95c2, 0x3f79c3d3, 0x3f7837f0, 0x3f76f532,
                                           0x3f75fed7, 0x3f75583f, 0x3f7504f3, 0x3f7508a4, 0x3f75672a, 0x3f76248c,
                                           0x3f7744fd, 0x3f78ccdf, 0x3f7ac0c7, 0x3f7d257d};
#else
constexpr int kFractionBits = 3;
constexpr int32_t kFractionalPowers[8] = {0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7,
                                          0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7};
#endif

// e^x / 2^kHalvings where that is a normal number and not beyond 2^127. NaN passes.
template <int kHalvings>
UNIGEN_INLINE Vec<float> exp_by_table(Vec<float> x) {
  using V = Vec<float>;
  using Bits = RawVec<float>::bits;
  constexpr int shift = Format<float>::mantissa_bits - kFractionBits;
  const V log2_e = constant<V>(1.44269502162933349609375), rest = constant<V>(1.925963033500011e-8);
  const V shifter = constant<V>(Format<float>::shifter / (1 << kFractionBits));  // adding it rounds to n / size, kept as n
  const V rounded = plus_product(shifter, x, log2_e);
  const V f = plus_product(plus_product(shifter - rounded, x, log2_e), x, rest);
  Bits table;
  __builtin_memcpy(&table, kFractionalPowers, sizeof table);
  table -= kHalvings << Format<float>::mantissa_bits;
#if defined(__AVX512F__)
  const Bits entry = (Bits)_mm512_maskz_permutexvar_epi32(-1, (__m512i)bits_of(rounded), (__m512i)table);
  const V slope = horner(f, constant<V>(5.5502136763e-02), 2.4023428802e-01, 6.9314718267e-01);  // minimax, to 2e-9 of 2^f
#else
  const Bits entry = (Bits)_mm256_permutevar8x32_epi32((__m256i)table, (__m256i)bits_of(rounded));
  const V slope = horner(f, constant<V>(5.5496222874e-02), 2.4025762982e-01, 6.9314721426e-01);  // to 3e-8
#endif
  using UBits = RawVec<float>::ubits;  // of which sums wrap
  const V power = from_bits<float>((Bits)((UBits)entry + ((UBits)bits_of(rounded) << shift)));
  return power * f * slope + power;
}
#endif

// e^x for x <= 0, and 0 where that is no normal number: a denormal one costs a hundred times as much. NaN passes.
template <class T>
UNIGEN_INLINE Vec<T> exp_of_distance(Vec<T> x) {
  using V = Vec<T>;
#if defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    const V half = exp_by_table<1>(min(constant<V>(89), x));  // infinite beyond, once doubled
    return select(x < constant<V>(-86.6), constant<V>(0), half + half);
  }
#endif
  constexpr bool wide = sizeof(T) == 8;
  constexpr double low = wide ? -708 : -87;
  const ReducedExp<T> e(x, low, wide ? 710 : 89);
  return select(x < constant<V>(low), constant<V>(0), scale_by_power(e.minus_1 + constant<V>(1), e.n, e.rounded));
}

// e^-|x|, and 0 where that is no normal number. NaN passes.
template <class T>
UNIGEN_INLINE Vec<T> exp_of_minus_abs(Vec<T> x) {
  const Vec<T> y = from_bits<T>(bits_of(x) | ~Format<T>::magnitude);
#if defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return select(y < constant<Vec<T>>(-87), constant<Vec<T>>(0), exp_by_table<0>(y));
#endif
  return exp_of_distance(y);
}

// a number that is not negative, with the sign of another
template <class T>
UNIGEN_INLINE Vec<T> with_sign(Vec<T> x, Vec<T> sign) {
  return from_bits<T>(bits_of(x) | (bits_of(sign) & ~Format<T>::magnitude));
}

// 0 where x has a negative sign (-0 too), else 1
template <class T>
UNIGEN_INLINE Vec<T> heaviside(Vec<T> x) {
  return from_bits<T>(~(bits_of(x) >> (sizeof(T) * 8 - 1)) & bits_of(constant<Vec<T>>(1)));
}

// 1 / x, to a rounding, where both are finite: a division takes as long as ten multiplications, and 14 bits are at hand
template <class T>
UNIGEN_INLINE Vec<T> bounded_reciprocal(Vec<T> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    const Vec<T> first(_mm512_maskz_rcp14_ps(-1, x.v));
    return first + first * (constant<Vec<T>>(1) - x * first);
  }
#endif
  return constant<Vec<T>>(1) / x;
}

// the same for every x >= 0
template <class T>
UNIGEN_INLINE Vec<T> reciprocal(Vec<T> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) x = min(constant<Vec<T>>(0x1.fffffep127), x);  // infinity, but not NaN: infinity · 0
#endif
  return bounded_reciprocal(x);
}

// log(1 + f) - f, 1 + f in [sqrt(1/2), sqrt(2)]. Cephes' polynomial for float, fdlibm's for double.
template <class T>
UNIGEN_INLINE Vec<T> log_correction(Vec<T> f) {
  using V = Vec<T>;
  const V half_square = constant<V>(0.5) * f * f;
  if constexpr (sizeof(T) == 8) {
    const V s = f / (constant<V>(2) + f), z = s * s;
    const V r = z * horner(z, constant<V>(1.479819860511658591e-01), 1.531383769920937332e-01, 1.818357216161805012e-01,
                           2.222219843214978396e-01, 2.857142874366239149e-01, 3.999999999940941908e-01,
                           6.666666666666735130e-01);
    return s * (half_square + r) - half_square;
  } else {
    const V z = f * f;  // even and odd powers apart: half the time until it is there
    const V even = horner(z, constant<V>(7.0376836292e-2), 1.1676998740e-1, 1.4249322787e-1, 2.0000714765e-1,
                          3.3333331174e-1);
    const V odd = horner(z, constant<V>(-1.1514610310e-1), -1.2420140846e-1, -1.6668057665e-1, -2.4999993993e-1);
    return (odd * f + even) * (f * z) - half_square;
  }
}

// log(1 + f) + n log(2)
template <class T>
UNIGEN_INLINE Vec<T> log_from_parts(Vec<T> f, Vec<T> correction, Vec<T> n) {
  using V = Vec<T>;
  constexpr bool wide = sizeof(T) == 8;
  const V low = n * constant<V>(wide ? 1.90821492927058770002e-10 : -2.12194440e-4) + correction;
  return n * constant<V>(wide ? 6.93147180369123816490e-01 : 0.693359375) + (f + low);
}

// x = (1 + f) 2^n, 1 + f in [sqrt(1/2), sqrt(2)], of a positive, finite number that is not denormal
template <class T>
struct LogParts {
  Vec<T> f, n;

  UNIGEN_INLINE explicit LogParts(Vec<T> x) {
    using Bits = typename RawVec<T>::bits;
    using UBits = typename RawVec<T>::ubits;
    const Bits shifted = (Bits)((UBits)bits_of(x) + (Format<T>::one - Format<T>::root_half));  // of NaN it wraps
    const Bits exponent = (Bits)((UBits)shifted >> Format<T>::mantissa_bits);
    const Vec<T> shifter = constant<Vec<T>>(Format<T>::shifter);
    n = from_bits<T>(exponent + bits_of(shifter)) - (shifter + constant<Vec<T>>(Format<T>::bias));
    f = from_bits<T>((shifted & Format<T>::mantissa) + Format<T>::root_half) - constant<Vec<T>>(1);
  }
};

// log of a positive, finite number that is not denormal
template <class T>
UNIGEN_INLINE Vec<T> log_normal(Vec<T> x, Vec<T> scale_exponent = constant<Vec<T>>(0)) {
  const LogParts<T> parts(x);
  return log_from_parts(parts.f, log_correction(parts.f), parts.n + scale_exponent);
}

template <class T>
UNIGEN_INLINE Vec<T> log(Vec<T> x) {
  using V = Vec<T>;
  const V zero = constant<V>(0);
  constexpr int raise = Format<T>::mantissa_bits + 1;
  const Mask<T> denormal = x < constant<V>(Format<T>::min_normal);
  const V raised = select(denormal, x * constant<V>(T(int64_t(1) << raise)), x);
  V y = log_normal(raised, select(denormal, constant<V>(-raise), zero));
  y = select(x < constant<V>(HUGE_VAL), y, x);  // infinity and NaN
  y = select(x == zero, constant<V>(-HUGE_VAL), y);
  return select(x < zero, constant<V>(NAN), y);
}

// for -1 < x < inf
template <class T>
UNIGEN_INLINE Vec<T> log1p(Vec<T> x) {
  using V = Vec<T>;
  const V u = constant<V>(1) + x;
  const V lost = x - (u - constant<V>(1));  // what u was rounded by
  return log_normal(u) + lost / u;
}

// for x in [0, 1]. float: a minimax polynomial over the whole interval (relative error 5e-9), as accurate for small x.
template <class T>
UNIGEN_INLINE Vec<T> log1p_unit(Vec<T> x) {
  using V = Vec<T>;
  if constexpr (sizeof(T) == 4) {
    const V p = horner(x, constant<V>(-0.00331847534157), 0.0202045981939, -0.0576644703461, 0.106805582735, -0.153553979936,
                       0.196954011453, -0.249585875431, 0.333305113322, -0.49999932764);
    return x * x * p + x;
  } else {
    const V zero = constant<V>(0), one = constant<V>(1);
    const Mask<T> upper = constant<V>(0.41421356237309504880) < x;
    const V f = select(upper, constant<V>(0.5) * (x - one), x);
    return log_from_parts(f, log_correction(f), select(upper, one, zero));
  }
}

// cosine and sine of 2π·u / 2^24 for integers u in [0, 2^24): the octant is exact. Cephes' polynomials.
template <class T>
struct CosSin {
  Vec<T> cos, sin;

  UNIGEN_INLINE explicit CosSin(Vec<T> u) {
    using V = Vec<T>;
    constexpr int sign_bit = sizeof(T) * 8 - 1;
    const V shifter = constant<V>(Format<T>::shifter);
    const V rounded = u * constant<V>(0x1p-22) + shifter;  // quarter turns
    const V x = (u * constant<V>(0x1p-22) - (rounded - shifter)) * constant<V>(1.57079632679489661923);
    const V z = x * x;
    V s, c;
    if constexpr (sizeof(T) == 8) {
      s = horner(z, constant<V>(1.58962301576546568060e-10), -2.50507477628578072866e-8, 2.75573136213857245213e-6,
                 -1.98412698295895385996e-4, 8.33333333332211858878e-3, -1.66666666666666307295e-1);
      c = horner(z, constant<V>(-1.13585365213876817300e-11), 2.08757008419747316778e-9, -2.75573141792967388112e-7,
                 2.48015872888517045348e-5, -1.38888888888730564116e-3, 4.16666666666665929218e-2);
    } else {
      s = horner(z, constant<V>(-1.9515295891e-4), 8.3321608736e-3, -1.6666654611e-1);
      c = horner(z, constant<V>(2.443315711809948e-5), -1.388731625493765e-3, 4.166664568298827e-2);
    }
    s = s * z * x + x;
    c = c * z * z - constant<V>(0.5) * z + constant<V>(1);
    const auto quarter = bits_of(rounded);  // its two low bits count
    const Mask<T> odd = {(quarter & 1) != 0};
    cos = from_bits<T>(bits_of(select(odd, s, c)) ^ (((quarter + 1) & 2) << (sign_bit - 1)));
    sin = from_bits<T>(bits_of(select(odd, c, s)) ^ ((quarter & 2) << (sign_bit - 1)));
  }
};

}  // namespace unigen::cpu::UNIGEN_ISA_NAMESPACE

namespace unigen {
template <class T>
struct ScalarOf<cpu::UNIGEN_ISA_NAMESPACE::Vec<T>> {
  using type = T;
};

// of vectors, with one polynomial for both
template <class T>
struct ExpTerms<cpu::UNIGEN_ISA_NAMESPACE::Vec<T>> {
  using V = cpu::UNIGEN_ISA_NAMESPACE::Vec<T>;
  V minus_1, minus_1_minus_x;

  UNIGEN_INLINE explicit ExpTerms(V x) {
    using cpu::UNIGEN_ISA_NAMESPACE::bits_of;
    using Format = cpu::UNIGEN_ISA_NAMESPACE::Format<T>;
    constexpr bool wide = sizeof(T) == 8;
    const cpu::UNIGEN_ISA_NAMESPACE::ReducedExp<T> e(x, wide ? -700 : -80, wide ? 710 : 89);
    // e^x - 1 = 2 (2^m (e^r - 1) + (2^m - 1/2)), m = n - 1: 2^n may not be a number that T has
    const auto n = bits_of(e.rounded) - bits_of(constant<V>(Format::shifter));
    const V power = cpu::UNIGEN_ISA_NAMESPACE::from_bits<T>((n + (Format::bias - 1)) << Format::mantissa_bits);
    minus_1 = constant<V>(2) * (power * e.minus_1 + (power - constant<V>(0.5)));
    minus_1_minus_x = select(e.n == constant<V>(0), e.minus_1_minus_r, minus_1 - x);
  }
};
}  // namespace unigen
