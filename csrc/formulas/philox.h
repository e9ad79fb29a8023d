// Philox4x32-10 (Salmon et al. 2011) as unigen_fast/reference/random.py draws it: element i takes word i % 4 of the block
// with counter (i / 4, offset) under the key seed. Uniforms have 24 bits, exact in fp32.
#pragma once

#include "number.h"

namespace unigen {

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u, kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u, kPhiloxWeyl1 = 0xBB67AE85u;

struct PhiloxBlock {
  uint32_t word[4];
};

UNIGEN_INLINE PhiloxBlock philox(uint64_t block, uint64_t seed, uint64_t offset) {
  uint32_t c0 = uint32_t(block), c1 = uint32_t(block >> 32), c2 = uint32_t(offset), c3 = uint32_t(offset >> 32);
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(kPhiloxMultiplier0) * c0, p1 = uint64_t(kPhiloxMultiplier1) * c2;
    c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
    c1 = uint32_t(p1);
    c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c3 = uint32_t(p0);
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
  }
  return {{c0, c1, c2, c3}};
}

// Box-Muller: radius sqrt(-2 log u), u = ((word >> 8) + 1) / 2^24 in (0, 1]; angle 2π (word >> 8) / 2^24. The pairs are
// words (0, 1) and (2, 3); the first normal of a pair takes the cosine, the second the sine.

}  // namespace unigen
