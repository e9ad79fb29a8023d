// The AVX-512 unit on an x86 processor that has AVX2 at best: included before its sources, this gives the intrinsics that
// they use by their definitions in Intel's manual (Software Developer's Manual, volume 2). One is chosen here:
// _mm512_rcp14_ps may be any reciprocal to a relative error of 2^-14; this one has its last nine bits cut off.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#define __AVX512F__ 1  // after the compiler's header, which would take it for its own

namespace emulated {

#define EACH(V, element) \
  V result{};            \
  for (int i = 0; i < int(sizeof(V) / sizeof(result[0])); ++i) \
    if (mask >> i & 1) result[i] = element; \
  return result

// the second operand where either is NaN
inline __m512 min_ps(__mmask16 mask, __m512 a, __m512 b) { EACH(__m512, a[i] < b[i] ? a[i] : b[i]); }
inline __m512 max_ps(__mmask16 mask, __m512 a, __m512 b) { EACH(__m512, a[i] > b[i] ? a[i] : b[i]); }
inline __m512d min_pd(__mmask8 mask, __m512d a, __m512d b) { EACH(__m512d, a[i] < b[i] ? a[i] : b[i]); }
inline __m512d max_pd(__mmask8 mask, __m512d a, __m512d b) { EACH(__m512d, a[i] > b[i] ? a[i] : b[i]); }
inline __m512 sqrt_ps(__mmask16 mask, __m512 x) { EACH(__m512, std::sqrt(x[i])); }
inline __m512d sqrt_pd(__mmask8 mask, __m512d x) { EACH(__m512d, std::sqrt(x[i])); }
inline __m512 fmadd_ps(__mmask16 mask, __m512 a, __m512 b, __m512 c) { EACH(__m512, std::fma(a[i], b[i], c[i])); }
inline __m512d cvtps_pd(__mmask8 mask, __m256 x) { EACH(__m512d, double(x[i])); }

inline float rcp14(float x) {
  float result = 1 / x;
  uint32_t bits;
  std::memcpy(&bits, &result, 4);
  if (std::isnormal(result)) bits &= ~0x1ffu;
  std::memcpy(&result, &bits, 4);
  return result;
}
inline __m512 rcp14_ps(__mmask16 mask, __m512 x) { EACH(__m512, rcp14(x[i])); }

// x · 2^floor(n)
template <class T>
T scalef(T x, T n) {
  if (n != n || x != x) return x + n;
  if (n - n != 0) return n > 0 ? x * n : (x - x == 0 ? x * 0 : T(NAN));
  return std::ldexp(x, int(std::floor(std::fmax(std::fmin(n, T(1 << 20)), T(-(1 << 20))))));
}
inline __m512 scalef_ps(__mmask16 mask, __m512 x, __m512 n) { EACH(__m512, scalef(x[i], n[i])); }
inline __m512d scalef_pd(__mmask8 mask, __m512d x, __m512d n) { EACH(__m512d, scalef(x[i], n[i])); }

// memory that the mask leaves out is not touched
inline __m512 loadu_ps(__mmask16 mask, const float* source) { EACH(__m512, source[i]); }
inline __m512d loadu_pd(__mmask8 mask, const double* source) { EACH(__m512d, source[i]); }
template <class T, class V, class M>
void storeu(T* target, M mask, V x) {
  for (int i = 0; i < int(sizeof(V) / sizeof(T)); ++i)
    if (mask >> i & 1) target[i] = x[i];
}
inline void stream(__m512i* target, __m512i x) {
  if (reinterpret_cast<uintptr_t>(target) % 64) std::abort();  // the processor faults
  std::memcpy(target, &x, 64);
}

typedef int32_t Words __attribute__((vector_size(64)));
typedef uint64_t Pairs __attribute__((vector_size(64)));
inline __m512i permutexvar(__mmask16 mask, __m512i index, __m512i table) {
  const Words at = (Words)index, of = (Words)table;
  const auto pick = [&]() { EACH(Words, of[at[i] & 15]); };
  return (__m512i)pick();
}
inline __m512i mul_epu32(__mmask8, __m512i a, __m512i b) {
  return (__m512i)(((Pairs)a & 0xffffffff) * ((Pairs)b & 0xffffffff));
}
template <class V>
unsigned test(__m512i a, __m512i b) {
  const V both = (V)a & (V)b;
  unsigned mask = 0;
  for (int i = 0; i < int(sizeof(V) / sizeof(both[0])); ++i) mask |= unsigned(both[i] != 0) << i;
  return mask;
}

#undef EACH

}  // namespace emulated

#define _mm512_maskz_min_ps emulated::min_ps
#define _mm512_maskz_max_ps emulated::max_ps
#define _mm512_maskz_min_pd emulated::min_pd
#define _mm512_maskz_max_pd emulated::max_pd
#define _mm512_maskz_sqrt_ps emulated::sqrt_ps
#define _mm512_maskz_sqrt_pd emulated::sqrt_pd
#define _mm512_maskz_fmadd_ps emulated::fmadd_ps
#define _mm512_maskz_cvtps_pd emulated::cvtps_pd
#define _mm512_maskz_rcp14_ps emulated::rcp14_ps
#define _mm512_maskz_scalef_ps emulated::scalef_ps
#define _mm512_maskz_scalef_pd emulated::scalef_pd
#define _mm512_maskz_loadu_ps emulated::loadu_ps
#define _mm512_maskz_loadu_pd emulated::loadu_pd
#define _mm512_mask_storeu_ps emulated::storeu
#define _mm512_mask_storeu_pd emulated::storeu
#define _mm512_stream_si512 emulated::stream
#define _mm512_maskz_permutexvar_epi32 emulated::permutexvar
#define _mm512_maskz_mul_epu32 emulated::mul_epu32
#define _mm512_test_epi32_mask emulated::test<emulated::Words>
#define _mm512_test_epi64_mask emulated::test<emulated::Pairs>
