// The vector operations of the kernels on AVX2 (with AVX-VNNI where the translation unit is compiled for it): each vector of
// vec_portable.h is two registers.
#pragma once
#include <immintrin.h>

#include "layout.h"

namespace nf {
namespace NF_ISA {  // one a translation unit: nothing compiled for one processor may be linked into another

struct Vec {
    struct Bytes { __m256i a, b; };
    using Ints = Bytes;
    struct Floats { __m256 a, b; };
    static constexpr bool kBiased = true;
    static constexpr int kTokens = 2;
    static constexpr bool kSixBits = false;

    static __m256i load256(const void *p) { return _mm256_loadu_si256(static_cast<const __m256i *>(p)); }
    static __m128i load128(const void *p) { return _mm_loadu_si128(static_cast<const __m128i *>(p)); }
    static void store256(void *p, __m256i a) { _mm256_storeu_si256(static_cast<__m256i *>(p), a); }

    static Bytes load(const uint8_t *p) { return {load256(p), load256(p + 32)}; }
    static void store(uint8_t *p, Bytes v) { store256(p, v.a), store256(p + 32, v.b); }
    template <int n> static Bytes shift_right(Bytes v) { return n ? Bytes{_mm256_srli_epi16(v.a, n), _mm256_srli_epi16(v.b, n)} : v; }
    template <int n> static Bytes shift_left(Bytes v) { return n ? Bytes{_mm256_slli_epi16(v.a, n), _mm256_slli_epi16(v.b, n)} : v; }
    static Bytes mask(uint8_t m) { return {_mm256_set1_epi8(static_cast<char>(m)), _mm256_set1_epi8(static_cast<char>(m))}; }
    static __m256i choose(__m256i m, __m256i x, __m256i y) { return _mm256_or_si256(_mm256_and_si256(m, x), _mm256_andnot_si256(m, y)); }
    static Bytes select(Bytes m, Bytes x, Bytes y) { return {choose(m.a, x.a, y.a), choose(m.b, x.b, y.b)}; }

    template <int log> struct Table { __m256i part[1 << (log - 4)]; };  // sixteen bytes each, in both halves
    template <int log> static Table<log> table(const uint8_t *bytes) {
        Table<log> t;
        for (int i = 0; i < 1 << (log - 4); i++) t.part[i] = _mm256_broadcastsi128_si256(load128(bytes + 16 * i));
        return t;
    }
    // A tree over the bits above the low four: `low` holds these, the sign of bit 4 + level decides between neighbours.
    template <int log> static __m256i lookup256(const __m256i *part, __m256i low, __m256i index) {
        if constexpr (log == 4) {
            return _mm256_shuffle_epi8(part[0], low);
        } else {
            __m256i x = lookup256<log - 1>(part, low, index), y = lookup256<log - 1>(part + (1 << (log - 5)), low, index);
            return _mm256_blendv_epi8(x, y, _mm256_slli_epi16(index, 8 - log));
        }
    }
    template <int log> static Bytes lookup(const Table<log> &t, Bytes index) {
        const __m256i nibble = _mm256_set1_epi8(15);
        return {lookup256<log>(t.part, _mm256_and_si256(index.a, nibble), index.a),
                lookup256<log>(t.part, _mm256_and_si256(index.b, nibble), index.b)};
    }
    static Bytes blend(Ints lanes, Bytes x, Bytes y) {
        const __m256i none = _mm256_setzero_si256();
        return {_mm256_blendv_epi8(y.a, x.a, _mm256_cmpeq_epi32(lanes.a, none)), _mm256_blendv_epi8(y.b, x.b, _mm256_cmpeq_epi32(lanes.b, none))};
    }
    static void quads(const uint8_t *p, Bytes &low, Bytes &high) {
        __m256i a = _mm256_cvtepu16_epi32(load128(p)), b = _mm256_cvtepu16_epi32(load128(p + 16));
        const __m256i first = _mm256_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c, 0, 0x04040404, 0x08080808, 0x0c0c0c0c);
        const __m256i second = _mm256_add_epi8(first, _mm256_set1_epi8(1));
        low = {_mm256_shuffle_epi8(a, first), _mm256_shuffle_epi8(b, first)};
        high = {_mm256_shuffle_epi8(a, second), _mm256_shuffle_epi8(b, second)};
    }

    static Ints ints(int32_t v) { return {_mm256_set1_epi32(v), _mm256_set1_epi32(v)}; }
    static Ints all(const int32_t *p) { return ints(*p); }
    static Ints add(Ints x, Ints y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
    static Ints dot(Ints sum, Bytes w, const int8_t *x) {
        int32_t four;
        __builtin_memcpy(&four, x, 4);
        const __m256i v = _mm256_set1_epi32(four);
#ifdef __AVXVNNI__
        return {_mm256_dpbusd_avx_epi32(sum.a, w.a, v), _mm256_dpbusd_avx_epi32(sum.b, w.b, v)};
#else
        // vpmaddubsw would saturate (255 · 127 · 2): even and odd bytes apart, in 16 bits, are exact for every table
        const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8), odd = _mm256_srai_epi16(v, 8);
        const __m256i byte = _mm256_set1_epi16(255);
        auto half = [&](__m256i s, __m256i u) {
            s = _mm256_add_epi32(s, _mm256_madd_epi16(_mm256_and_si256(u, byte), even));
            return _mm256_add_epi32(s, _mm256_madd_epi16(_mm256_srli_epi16(u, 8), odd));
        };
        return {half(sum.a, w.a), half(sum.b, w.b)};
#endif
    }
    static Ints load_ints(const int32_t *p) { return {load256(p), load256(p + 8)}; }
    static void store_ints(int32_t *p, Ints v) { store256(p, v.a), store256(p + 8, v.b); }

    static Floats floats(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
    static Floats to_floats(Ints v) { return {_mm256_cvtepi32_ps(v.a), _mm256_cvtepi32_ps(v.b)}; }
    static Floats load_floats(const float *p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
    static void store_floats(float *p, Floats v) { _mm256_storeu_ps(p, v.a), _mm256_storeu_ps(p + 8, v.b); }
    static Floats mul(Floats x, Floats y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
    static Floats sub(Floats x, Floats y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
    static Floats add(Floats x, Floats y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
    static Floats fma(Floats x, Floats y, Floats z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
    static Floats fnma(Floats x, Floats y, Floats z) { return {_mm256_fnmadd_ps(x.a, y.a, z.a), _mm256_fnmadd_ps(x.b, y.b, z.b)}; }

    static __m128i load64(const void *p) { return _mm_loadl_epi64(static_cast<const __m128i *>(p)); }
    static Ints load_u8(const uint8_t *p) { return {_mm256_cvtepu8_epi32(load64(p)), _mm256_cvtepu8_epi32(load64(p + 8))}; }
    static Floats load_half(const uint8_t *p) { return {_mm256_cvtph_ps(load128(p)), _mm256_cvtph_ps(load128(p + 16))}; }
    static Floats load_bf16(const uint8_t *p) {
        return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load128(p)), 16)),
                _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load128(p + 16)), 16))};
    }
    static Floats load_e8m0(const uint8_t *p) {
        const Ints v = load_u8(p);
        const __m256i least = _mm256_set1_epi32(0x00400000);
        return {_mm256_castsi256_ps(_mm256_max_epi32(_mm256_slli_epi32(v.a, 23), least)),
                _mm256_castsi256_ps(_mm256_max_epi32(_mm256_slli_epi32(v.b, 23), least))};
    }
    static Floats load_tiny(const uint8_t *p) {
        const __m256i words = _mm256_slli_epi16(_mm256_cvtepu8_epi16(load128(p)), 7);
        return {_mm256_cvtph_ps(_mm256_castsi256_si128(words)), _mm256_cvtph_ps(_mm256_extracti128_si256(words, 1))};
    }
    static Ints nibbles(const uint8_t *p) {
        int64_t both;
        __builtin_memcpy(&both, p, 8);
        const __m256i v = _mm256_set1_epi64x(both), shifts = _mm256_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12);
        return {_mm256_srlv_epi32(v, shifts), _mm256_srlv_epi32(v, _mm256_add_epi32(shifts, _mm256_set1_epi32(16)))};
    }
    template <int n> static Ints low_bits(Ints i) {
        const __m256i m = _mm256_set1_epi32(n - 1);
        return {_mm256_and_si256(i.a, m), _mm256_and_si256(i.b, m)};
    }
    static Ints gather(const int32_t *t, Ints i) { return {_mm256_i32gather_epi32(t, i.a, 4), _mm256_i32gather_epi32(t, i.b, 4)}; }
    static Floats gather(const float *t, Ints i) { return {_mm256_i32gather_ps(t, i.a, 4), _mm256_i32gather_ps(t, i.b, 4)}; }
    template <class T> static auto pick16(const T *t, Ints i) { return gather(t, low_bits<16>(i)); }
    template <class T> static auto pick32(const T *t, Ints i) { return gather(t, low_bits<32>(i)); }
    template <int log, int n> static Floats pick(const float *t, Bytes index, Ints offset) {
        const Ints i = low_bits<(1 << (log < 8 ? log : 8))>({_mm256_srli_epi32(index.a, 8 * n), _mm256_srli_epi32(index.b, 8 * n)});
        return gather(t, log > 5 ? add(i, offset) : i);
    }
};

// Not the intrinsics: GCC 12 takes a function that only prefetches for one that does nothing, and leaves its calls out.
static inline void prefetch(const uint8_t *p) { asm volatile("prefetcht0 %0" : : "m"(*p)); }
static inline void prefetch_far(const uint8_t *p) { asm volatile("prefetcht1 %0" : : "m"(*p)); }

}  // namespace NF_ISA
}  // namespace nf
