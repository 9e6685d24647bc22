// Vectors of W numbers for the encoders, by the compiler's own vector types: one source for every instruction set. What those
// types cannot say (rounding, tables, minima) stands here. Included by encode_isa.cpp and rotate_isa.cpp, once for each
// instruction set.
#pragma once
#include <stddef.h>
#include <stdint.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace nf {
namespace NF_ISA {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
typedef float V __attribute__((vector_size(4 * W)));
typedef int32_t I __attribute__((vector_size(4 * W)));
typedef float Loose __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef uint8_t Bytes __attribute__((vector_size(W), aligned(1), may_alias));

static inline V load(const float *p) { return *reinterpret_cast<const Loose *>(p); }
static inline void store(float *p, V v) { *reinterpret_cast<Loose *>(p) = v; }
static inline V splat(float f) { return f - V{}; }
static inline I splat(int32_t i) { return i - I{}; }
static inline I bits(V v) { return reinterpret_cast<I>(v); }
static inline V number(I i) { return reinterpret_cast<V>(i); }
static inline V magnitude(V v) { return number(bits(v) & 0x7fffffff); }
static inline void store_bytes(uint8_t *p, I v) { *reinterpret_cast<Bytes *>(p) = __builtin_convertvector(v, Bytes); }

static inline bool any(I mask) {
    int32_t all = 0;
    for (int l = 0; l < W; l++) all |= mask[l];
    return all != 0;
}

// Rounding to integers is exact: adding and subtracting 2^23 leaves what is smaller than that without its fraction.
static inline V nearest_by_sum(V v) {
    const V big = number((bits(v) & INT32_MIN) | bits(splat(8388608.0f)));
    const V whole = (v + big) - big;
    return magnitude(v) < 8388608.0f ? whole : v;
}

#if defined(__AVX512F__)
// (with masks of all lanes: the unmasked forms of GCC 12 warn about the undefined vector in them)
constexpr __mmask16 kAll = 0xffff;
static inline V smaller(V a, V b) { return V(_mm512_maskz_min_ps(kAll, __m512(a), __m512(b))); }
static inline V larger(V a, V b) { return V(_mm512_maskz_max_ps(kAll, __m512(a), __m512(b))); }
static inline I smaller(I a, I b) { return I(_mm512_maskz_min_epi32(kAll, __m512i(a), __m512i(b))); }
static inline I larger(I a, I b) { return I(_mm512_maskz_max_epi32(kAll, __m512i(a), __m512i(b))); }
static inline V nearest(V v) { return V(_mm512_maskz_roundscale_ps(kAll, __m512(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)); }
static inline V ceiling(V v) { return V(_mm512_maskz_roundscale_ps(kAll, __m512(v), _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC)); }
static inline V gather(const float *table, I index) {
    return V(_mm512_mask_i32gather_ps(_mm512_setzero_ps(), kAll, __m512i(index), table, 4));
}
#else
static inline V smaller(V a, V b) { return a < b ? a : b; }
static inline V larger(V a, V b) { return a > b ? a : b; }
static inline I smaller(I a, I b) { return a < b ? a : b; }
static inline I larger(I a, I b) { return a > b ? a : b; }
#if defined(__AVX2__)
static inline V nearest(V v) { return V(_mm256_round_ps(__m256(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)); }
static inline V ceiling(V v) { return V(_mm256_ceil_ps(__m256(v))); }
static inline V gather(const float *table, I index) { return V(_mm256_i32gather_ps(table, __m256i(index), 4)); }
#else
static inline V nearest(V v) { return nearest_by_sum(v); }
static inline V ceiling(V v) {
    const V whole = nearest_by_sum(v);
    return whole + (whole < v ? splat(1.0f) : V{});
}
static inline V gather(const float *table, I index) { return V{table[index[0]], table[index[1]], table[index[2]], table[index[3]]}; }
#endif
#endif

// Looking up in a table of 2 W numbers that are two registers; only the lowest bits of an index count.
#if defined(__AVX512F__)
constexpr bool kPicks = true;
static inline V pick(const V *t, I index) { return V(_mm512_permutex2var_ps(__m512(t[0]), __m512i(index), __m512(t[1]))); }
#elif defined(__AVX2__)
constexpr bool kPicks = true;
static inline V pick(const V *t, I index) {
    const __m256 low = _mm256_permutevar8x32_ps(__m256(t[0]), __m256i(index));
    const __m256 high = _mm256_permutevar8x32_ps(__m256(t[1]), __m256i(index));
    return V(_mm256_blendv_ps(low, high, __m256(I(index << 28))));  // bit 3 to where the sign is
}
#else
constexpr bool kPicks = false;  // there is no such instruction
static inline V pick(const V *t, I) { return t[0]; }
#endif

// A shift of all lanes: by a vector where there is such an instruction, as shifts by a register are two. (The operator will not do:
// the compiler sees that all counts are equal.)
#if defined(__AVX512F__)
typedef I Shift;
static inline Shift shift_by(int32_t count) { return splat(count); }
static inline I shifted(I v, Shift count) { return I(_mm512_srav_epi32(__m512i(v), __m512i(count))); }
#elif defined(__AVX2__)
typedef I Shift;
static inline Shift shift_by(int32_t count) { return splat(count); }
static inline I shifted(I v, Shift count) { return I(_mm256_srav_epi32(__m256i(v), __m256i(count))); }
#else
typedef int32_t Shift;
static inline Shift shift_by(int32_t count) { return count; }
static inline I shifted(I v, Shift count) { return v >> count; }
#endif

static inline V clamp(V v, float low, float high) { return smaller(larger(v, splat(low)), splat(high)); }

#if !defined(__AVX2__)
// Four numbers of v (0 … 3) and w (4 … 7). Clang lacks GCC's function for it, and GCC before 12 lacks Clang's.
template <int a, int b, int c, int d> static inline V picked(V v, V w) {
#if defined(__clang__)
    return __builtin_shufflevector(v, w, a, b, c, d);
#else
    return __builtin_shuffle(v, w, I{a, b, c, d});
#endif
}
#endif

// Rows become columns: 4 × 4 within the quarters of vectors, then the quarters among one another.
static inline void transpose(V *a) {
    V t[W];
    for (int g = 0; g < W; g += 4) {
#if defined(__AVX512F__)
        const __m512 ab = _mm512_unpacklo_ps(a[g], a[g + 1]), cd = _mm512_unpacklo_ps(a[g + 2], a[g + 3]);
        const __m512 ef = _mm512_unpackhi_ps(a[g], a[g + 1]), gh = _mm512_unpackhi_ps(a[g + 2], a[g + 3]);
        t[g] = V(_mm512_unpacklo_pd(__m512d(ab), __m512d(cd))), t[g + 1] = V(_mm512_unpackhi_pd(__m512d(ab), __m512d(cd)));
        t[g + 2] = V(_mm512_unpacklo_pd(__m512d(ef), __m512d(gh))), t[g + 3] = V(_mm512_unpackhi_pd(__m512d(ef), __m512d(gh)));
#elif defined(__AVX2__)
        const __m256 ab = _mm256_unpacklo_ps(a[g], a[g + 1]), cd = _mm256_unpacklo_ps(a[g + 2], a[g + 3]);
        const __m256 ef = _mm256_unpackhi_ps(a[g], a[g + 1]), gh = _mm256_unpackhi_ps(a[g + 2], a[g + 3]);
        t[g] = V(_mm256_unpacklo_pd(__m256d(ab), __m256d(cd))), t[g + 1] = V(_mm256_unpackhi_pd(__m256d(ab), __m256d(cd)));
        t[g + 2] = V(_mm256_unpacklo_pd(__m256d(ef), __m256d(gh))), t[g + 3] = V(_mm256_unpackhi_pd(__m256d(ef), __m256d(gh)));
#else
        const V ab = picked<0, 4, 1, 5>(a[0], a[1]), cd = picked<0, 4, 1, 5>(a[2], a[3]);
        const V ef = picked<2, 6, 3, 7>(a[0], a[1]), gh = picked<2, 6, 3, 7>(a[2], a[3]);
        t[0] = picked<0, 1, 4, 5>(ab, cd), t[1] = picked<2, 3, 6, 7>(ab, cd);
        t[2] = picked<0, 1, 4, 5>(ef, gh), t[3] = picked<2, 3, 6, 7>(ef, gh);
#endif
    }
    for (int k = 0; k < 4; k++) {
#if defined(__AVX512F__)
        const __m512 ab = _mm512_shuffle_f32x4(t[k], t[4 + k], 0x44), cd = _mm512_shuffle_f32x4(t[8 + k], t[12 + k], 0x44);
        const __m512 ef = _mm512_shuffle_f32x4(t[k], t[4 + k], 0xee), gh = _mm512_shuffle_f32x4(t[8 + k], t[12 + k], 0xee);
        a[k] = V(_mm512_shuffle_f32x4(ab, cd, 0x88)), a[4 + k] = V(_mm512_shuffle_f32x4(ab, cd, 0xdd));
        a[8 + k] = V(_mm512_shuffle_f32x4(ef, gh, 0x88)), a[12 + k] = V(_mm512_shuffle_f32x4(ef, gh, 0xdd));
#elif defined(__AVX2__)
        a[k] = V(_mm256_permute2f128_ps(t[k], t[4 + k], 0x20)), a[4 + k] = V(_mm256_permute2f128_ps(t[k], t[4 + k], 0x31));
#else
        a[k] = t[k];
#endif
    }
}

// The first `n` numbers of W runs side by side, out [n][W], and the largest magnitude of each run; `magnitudes` drops the signs.
// Every line of memory is read once, since runs a power of two apart share their places in the cache.
static inline V side_by_side(const float *const *runs, int64_t n, bool magnitudes, float *out) {
    const I keep = splat(magnitudes ? 0x7fffffff : -1);
    V most = {};
    for (int64_t j = 0; j < n; j += W) {
        const int count = n - j < W ? static_cast<int>(n - j) : W;
        V tile[W];
        for (int r = 0; r < W; r++) {
            if (count == W) {
                tile[r] = load(runs[r] + j);
            } else {
                tile[r] = V{};
                for (int i = 0; i < count; i++) tile[r][i] = runs[r][j + i];
            }
        }
        transpose(tile);
        for (int i = 0; i < W; i++) most = larger(most, magnitude(tile[i]));
        for (int i = 0; i < count; i++) store(out + (j + i) * W, number(bits(tile[i]) & keep));
    }
    return most;
}

}  // namespace NF_ISA
}  // namespace nf
