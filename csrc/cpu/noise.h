// Standard normal noise, the same as unigen_fast/reference/random.py draws, a vector of Philox blocks at a time.
#pragma once

#include "../formulas/philox.h"
#include "rows.h"

namespace unigen::cpu::UNIGEN_ISA_NAMESPACE {

// 64-bit lanes, of which Philox uses the low halves; the high ones hold what is left of earlier products
using Words = RawVec<double>::ubits;
constexpr int kLanes = kVectorBytes / 8;
constexpr int kGroups = 2;                      // independent vectors of blocks hide the latency of multiplication
constexpr int kNormals = 4 * kLanes * kGroups;  // drawn at a time

UNIGEN_INLINE Words multiply_low(Words a, Words b) {
#if defined(__AVX512F__)
  return (Words)_mm512_maskz_mul_epu32(-1, (__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Words)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (Words)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffff) * (b & 0xffffffff);
#endif
}

// a[0], b[0], a[1], b[1], …
template <class T>
UNIGEN_INLINE void store_interleaved(T* target, Vec<T> a, Vec<T> b) {
  typename Vec<T>::Bits low, high;
  for (int i = 0; i < Vec<T>::size; ++i) {
    low[i] = i / 2 + (i % 2) * Vec<T>::size;
    high[i] = low[i] + Vec<T>::size / 2;
  }
  store(target, Vec<T>(__builtin_shuffle(a.v, b.v, low)));
  store(target + Vec<T>::size, Vec<T>(__builtin_shuffle(a.v, b.v, high)));
}

// Box-Muller of integers in [0, 2^24): two normals for each pair of lanes
template <class T>
UNIGEN_INLINE void store_normals(T* target, Vec<T> radial, Vec<T> angular) {
  using V = Vec<T>;
  const V radius = sqrt(constant<V>(-2) * log_normal((radial + constant<V>(1)) * constant<V>(0x1p-24)));
  const CosSin<T> angle(angular);
  store_interleaved(target, radius * angle.cos, radius * angle.sin);
}

UNIGEN_INLINE void convert_and_store_normals(float* target, RawVec<float>::bits radial, RawVec<float>::bits angular) {
  typedef RawVec<float>::type Raw;
  store_normals(target, Vec<float>(__builtin_convertvector(radial, Raw)), Vec<float>(__builtin_convertvector(angular, Raw)));
}
UNIGEN_INLINE void convert_and_store_normals(double* target, RawVec<float>::bits radial, RawVec<float>::bits angular) {
  for (int half = 0; half < 2; ++half) {
    Vec<double> r, a;
    for (int i = 0; i < kLanes; ++i) {
      r.v[i] = radial[half * kLanes + i];
      a.v[i] = angular[half * kLanes + i];
    }
    store_normals(target + half * 2 * kLanes, r, a);
  }
}

// normals of kLanes · kGroups blocks of 4
template <class T>
UNIGEN_NOINLINE void draw(uint64_t block, uint64_t seed, uint64_t offset, T* target) {
  Words c0[kGroups], c1[kGroups], c2[kGroups], c3[kGroups];
  for (int g = 0; g < kGroups; ++g) {
    Words index;
    for (int i = 0; i < kLanes; ++i) index[i] = g * kLanes + i;
    c0[g] = index + block;
    c1[g] = c0[g] >> 32;
    c2[g] = Words{} + uint32_t(offset);
    c3[g] = Words{} + (offset >> 32);
  }
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  const Words multiplier0 = Words{} + kPhiloxMultiplier0, multiplier1 = Words{} + kPhiloxMultiplier1;
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    for (int g = 0; g < kGroups; ++g) {
      const Words p0 = multiply_low(c0[g], multiplier0), p1 = multiply_low(c2[g], multiplier1);
      c0[g] = (p1 >> 32) ^ c1[g] ^ k0;
      c1[g] = p1;
      c2[g] = (p0 >> 32) ^ c3[g] ^ k1;
      c3[g] = p0;
    }
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
  }
  for (int g = 0; g < kGroups; ++g) {
    // the upper 24 bits of words 0 and 2, side by side; likewise of 1 and 3
    const Words upper = Words{} + 0xffffff00u;
    const Words radial = ((c0[g] & upper) >> 8) | ((c2[g] & upper) << 24);
    const Words angular = ((c1[g] & upper) >> 8) | ((c3[g] & upper) << 24);
    convert_and_store_normals(target + 4 * kLanes * g, (RawVec<float>::bits)radial, (RawVec<float>::bits)angular);
  }
}

// Noise at any place of a tensor of `total` elements. Short stretches are served from a window drawn ahead.
template <class T>
class Noise {
 public:
  Noise(const int64_t* rng_state, int64_t total) : seed_(rng_state[0]), offset_(rng_state[1]), total_(total) {}

  // n <= kChunk normals from index `first` on; valid until the next call
  UNIGEN_INLINE const T* at(int64_t first, int64_t n) {
    if (first < begin_ || first + n > end_) refill(first, n);
    return window_ + (first - begin_);
  }

 private:
  static constexpr int kShort = 64, kWindow = kChunk<T>;

  UNIGEN_NOINLINE void refill(int64_t first, int64_t n) {
    begin_ = first / 4 * 4;
    const int64_t until = n < kShort ? smaller(total_, begin_ + kWindow) : first + n;
    for (end_ = begin_; end_ < until; end_ += kNormals) draw(uint64_t(end_) / 4, seed_, offset_, window_ + (end_ - begin_));
  }

  uint64_t seed_, offset_;
  int64_t total_, begin_ = 0, end_ = 0;
  alignas(kVectorBytes) T window_[kWindow + 4 + kNormals];
};

}  // namespace unigen::cpu::UNIGEN_ISA_NAMESPACE
