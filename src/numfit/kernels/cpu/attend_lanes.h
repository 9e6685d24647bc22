// Sixteen lanes of fp32 or int32 and what attention over a packed cache does with them: fused multiply-add, look-ups in tables
// of 16 and 32 levels, sums, and taking codes apart. One implementation of each for every instruction set, same results.
#pragma once
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors of 64 bytes stay within one file, whose functions are all static
#endif

#include "soft.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace nf {
namespace NF_ISA {

typedef float F __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));
typedef float LooseF __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint8_t B16 __attribute__((vector_size(16), aligned(1), may_alias));
typedef uint16_t H16 __attribute__((vector_size(32), aligned(1), may_alias));
typedef int32_t LooseI __attribute__((vector_size(64), aligned(1), may_alias));

static inline F load(const float *p) { return *reinterpret_cast<const LooseF *>(p); }
static inline void store(float *p, F v) { *reinterpret_cast<LooseF *>(p) = v; }
static inline F splat(float f) { return f - F{}; }

static inline F fma(F a, F b, F c) {
#if defined(__AVX512F__)
    return F(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c)));
#elif defined(__FMA__)
    union { F v; __m256 h[2]; } x = {a}, y = {b}, z = {c};
    for (int i = 0; i < 2; i++) z.h[i] = _mm256_fmadd_ps(x.h[i], y.h[i], z.h[i]);
    return z.v;
#elif defined(__aarch64__)
    union { F v; float32x4_t h[4]; } x = {a}, y = {b}, z = {c};
    for (int i = 0; i < 4; i++) z.h[i] = vfmaq_f32(z.h[i], x.h[i], y.h[i]);
    return z.v;
#else
    for (int i = 0; i < 16; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#endif
}

// t[index & 15]
static inline F pick16(const float *t, I index) {
#if defined(__AVX512F__)
    return F(_mm512_permutexvar_ps(__m512i(index), _mm512_loadu_ps(t)));
#elif defined(__AVX2__)
    const __m256 low = _mm256_loadu_ps(t), high = _mm256_loadu_ps(t + 8);
    union { I v; __m256i h[2]; } i = {index};
    union { F v; __m256 h[2]; } out;
    for (int n = 0; n < 2; n++) {
        out.h[n] = _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, i.h[n]), _mm256_permutevar8x32_ps(high, i.h[n]),
                                    _mm256_castsi256_ps(_mm256_slli_epi32(i.h[n], 28)));
    }
    return out.v;
#else
    F out;
    for (int n = 0; n < 16; n++) out[n] = t[index[n] & 15];
    return out;
#endif
}

// t[index], index below 32
static inline F pick32(const float *t, I index) {
#if defined(__AVX512F__)
    return F(_mm512_permutex2var_ps(_mm512_loadu_ps(t), __m512i(index), _mm512_loadu_ps(t + 16)));
#else
    const F low = pick16(t, index), high = pick16(t + 16, index);
    return (index & 16) != 0 ? high : low;
#endif
}

static inline float sum(F v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps(__m512(v));  // the order of sum_of
#else
    alignas(64) float lane[16];
    store(lane, v);
    return sum_of(lane);
#endif
}

// fp16 → fp32
static inline void widen(const uint16_t *from, float *to, int64_t n) {
    int64_t i = 0;
#if defined(__AVX512F__)
    for (; i + 16 <= n; i += 16) _mm512_storeu_ps(to + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(from + i))));
#elif defined(__F16C__)
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from + i))));
#endif
    for (; i < n; i++) {
        const uint32_t h = from[i], sign = (h & 0x8000u) << 16, exponent = h >> 10 & 31, mantissa = h & 1023u;
        const float tiny = static_cast<float>(mantissa) * 0x1p-24f;
        to[i] = from_bits(sign | (exponent ? (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13 : to_bits(tiny)));
    }
}

// Sixteen unsigned numbers as int32.
static inline I widened(const uint8_t *p) {
#if defined(__AVX512F__)
    return I(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))));
#elif defined(__AVX2__)
    union { I v; __m256i h[2]; } out;
    for (int i = 0; i < 2; i++) out.h[i] = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p + 8 * i)));
    return out.v;
#else
    return __builtin_convertvector(*reinterpret_cast<const B16 *>(p), I);
#endif
}
static inline I widened(const uint16_t *p) {
#if defined(__AVX512F__)
    return I(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p))));
#elif defined(__AVX2__)
    union { I v; __m256i h[2]; } out;
    for (int i = 0; i < 2; i++) out.h[i] = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p + 8 * i)));
    return out.v;
#else
    return __builtin_convertvector(*reinterpret_cast<const H16 *>(p), I);
#endif
}

// Sixteen lanes of `bits` bytes, and no byte more.
template <int bits> static inline I lanes(const uint8_t *p) {
    if constexpr (bits == 4) {
        return *reinterpret_cast<const LooseI *>(p);
    } else if constexpr (bits == 2) {
        return widened(reinterpret_cast<const uint16_t *>(p));
    } else {
#if defined(__AVX512VBMI__)
        alignas(64) static const uint8_t place[64] = {0,  1,  2,  63, 3,  4,  5,  63, 6,  7,  8,  63, 9,  10, 11, 63, 12, 13, 14, 63, 15, 16,
                                                      17, 63, 18, 19, 20, 63, 21, 22, 23, 63, 24, 25, 26, 63, 27, 28, 29, 63, 30, 31, 32, 63,
                                                      33, 34, 35, 63, 36, 37, 38, 63, 39, 40, 41, 63, 42, 43, 44, 63, 45, 46, 47, 63};
        const __m512i line = _mm512_maskz_loadu_epi8(0xffffffffffffULL, p);
        return I(_mm512_permutexvar_epi8(_mm512_load_si512(place), line));
#else
        I out;
        for (int l = 0; l < 16; l++) out[l] = p[3 * l] | p[3 * l + 1] << 8 | p[3 * l + 2] << 16;
        return out;
#endif
    }
}

}  // namespace NF_ISA
}  // namespace nf
