// The exponential, and sums over sixteen lanes in one order: shared by what computes a softmax.
#pragma once
#include <stdint.h>

namespace nf {
namespace NF_ISA {

static inline float from_bits(uint32_t bits) {
    float x;
    __builtin_memcpy(&x, &bits, 4);
    return x;
}
static inline uint32_t to_bits(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    return bits;
}

// e to the x, relative error below 3e-7; exactly 0 below -87, finite for every finite x.
static inline float exponential(float x) {
    const float inside = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    const float shifted = inside * 1.44269504f + 12582912.0f;  // 1.5 · 2**23: the integer stands in the low bits
    const float whole = shifted - 12582912.0f;
    const float r = inside - whole * 0.693359375f + whole * 2.12194440e-4f;  // the first product is exact
    float p = 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const float e = p * from_bits((to_bits(shifted) << 23) + 0x3f800000u);
    return x < -87.0f ? 0.0f : e;
}

static inline float sum_of(const float (&lane)[16]) {
    float s[8];
    for (int i = 0; i < 8; i++) s[i] = lane[i] + lane[i + 8];
    return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
}

}  // namespace NF_ISA
}  // namespace nf
