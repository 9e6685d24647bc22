// The vector operations of the kernels on AVX-512 (VNNI, VBMI). vec_portable.h is the definition; every file beside it
// provides the same names with the same results, bit for bit.
#pragma once
#include <immintrin.h>

#include "layout.h"

namespace nf {
namespace NF_ISA {  // one a translation unit: nothing compiled for one processor may be linked into another

struct Vec {
    using Bytes = __m512i;   // 16 lanes of 4 bytes
    using Ints = __m512i;    // 16 int32
    using Floats = __m512;   // 16 fp32
    static constexpr bool kBiased = true;  // dot() takes unsigned weights: tables are shifted by kBias
    static constexpr int kTokens = 4;      // that a matrix-vector kernel serves at once

    static constexpr bool kSixBits = true;  // a lookup takes any index of six bits, at the price of four

    static Bytes load(const uint8_t *p) {
        Bytes v = _mm512_loadu_si512(p);
        asm("" : "+v"(v));  // or GCC loads it again for each instruction that can read memory
        return v;
    }
    static void store(uint8_t *p, Bytes a) { _mm512_storeu_si512(p, a); }
    template <int n> static Bytes shift_right(Bytes a) { return n ? _mm512_srli_epi16(a, n) : a; }
    template <int n> static Bytes shift_left(Bytes a) { return n ? _mm512_slli_epi16(a, n) : a; }
    static Bytes mask(uint8_t m) { return _mm512_set1_epi8(static_cast<char>(m)); }
    static Bytes select(Bytes m, Bytes a, Bytes b) { return _mm512_ternarylogic_epi32(a, m, b, 0xE2); }

    // Table of 1 << log bytes; only the low `log` bits of an index count (its length may be padded by repetition).
    template <int log> struct Table { Bytes part[log <= 6 ? 1 : log == 7 ? 2 : 4]; };
    template <int log> static Table<log> table(const uint8_t *bytes) {
        constexpr int size = 1 << log;
        alignas(64) uint8_t all[size < 64 ? 64 : size];
        for (size_t i = 0; i < sizeof all; i++) all[i] = bytes[i % size];
        Table<log> t;
        for (size_t i = 0; i < sizeof t.part / 64; i++) t.part[i] = _mm512_load_si512(all + 64 * i);
        return t;
    }
    template <int log> static Bytes lookup(const Table<log> &t, Bytes index) {
        if constexpr (log <= 6) {
            return _mm512_permutexvar_epi8(index, t.part[0]);
        } else if constexpr (log == 7) {
            return _mm512_permutex2var_epi8(t.part[0], index, t.part[1]);
        } else {
            Bytes low = _mm512_permutex2var_epi8(t.part[0], index, t.part[1]);
            Bytes high = _mm512_permutex2var_epi8(t.part[2], index, t.part[3]);
            return _mm512_mask_blend_epi8(_mm512_movepi8_mask(index), low, high);
        }
    }
    // b where the lane's bit of `lanes` is set
    static Bytes blend(Ints lanes, Bytes a, Bytes b) { return _mm512_mask_blend_epi32(_mm512_test_epi32_mask(lanes, lanes), a, b); }

    // 16 words of 16 bits → each lane's low (high) byte in all its bytes
    static void quads(const uint8_t *p, Bytes &low, Bytes &high) {
        Bytes words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
        low = _mm512_shuffle_epi8(words, _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0));
        high = _mm512_shuffle_epi8(words, _mm512_set4_epi32(0x0d0d0d0d, 0x09090909, 0x05050505, 0x01010101));
    }

    static Ints ints(int32_t a) { return _mm512_set1_epi32(a); }
    static Ints all(const int32_t *p) { return _mm512_set1_epi32(*p); }
    static Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
    // sum + four products of each lane: weights (unsigned if kBiased) by the same four activations for all lanes
    static Ints dot(Ints sum, Bytes w, const int8_t *x) {
        int32_t four;
        __builtin_memcpy(&four, x, 4);
        return _mm512_dpbusd_epi32(sum, w, _mm512_set1_epi32(four));
    }
    static Ints load_ints(const int32_t *p) { return _mm512_loadu_si512(p); }
    static void store_ints(int32_t *p, Ints a) { _mm512_storeu_si512(p, a); }

    static Floats floats(float a) { return _mm512_set1_ps(a); }
    static Floats to_floats(Ints a) { return _mm512_cvtepi32_ps(a); }
    static Floats load_floats(const float *p) { return _mm512_loadu_ps(p); }
    static void store_floats(float *p, Floats a) { _mm512_storeu_ps(p, a); }
    static Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
    static Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
    static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
    static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
    static Floats fnma(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }

    // 16 numbers of a meta stream
    static Ints load_u8(const uint8_t *p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))); }
    static Floats load_half(const uint8_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p))); }
    static Floats load_bf16(const uint8_t *p) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p))), 16));
    }
    static Floats load_e8m0(const uint8_t *p) {
        Ints bits = _mm512_slli_epi32(load_u8(p), 23);
        return _mm512_castsi512_ps(_mm512_max_epi32(bits, ints(0x00400000)));
    }
    static Floats load_tiny(const uint8_t *p) {  // bits << 7 as fp16: e4m3 · 2**-8, e3m3 · 2**-12
        return _mm512_cvtph_ps(_mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))), 7));
    }
    // 16 nibbles: lane i is nibble i / 2 of dword i % 2. Bits above the low four of the result are undefined.
    static Ints nibbles(const uint8_t *p) {
        int64_t both;
        __builtin_memcpy(&both, p, 8);
        const Ints shifts = _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28);
        return _mm512_srlv_epi32(_mm512_set1_epi64(both), shifts);
    }
    // table[index] for 16 (low four bits) or 32 (low five bits) entries
    static Ints pick16(const int32_t *t, Ints i) { return _mm512_permutexvar_epi32(i, load_ints(t)); }
    static Ints pick32(const int32_t *t, Ints i) { return _mm512_permutex2var_epi32(load_ints(t), i, load_ints(t + 16)); }
    static Floats pick16(const float *t, Ints i) { return _mm512_permutexvar_ps(i, load_floats(t)); }
    static Floats pick32(const float *t, Ints i) { return _mm512_permutex2var_ps(load_floats(t), i, load_floats(t + 16)); }
    // table[offset + byte `n` of the index, low `log` bits]
    template <int log, int n> static Floats pick(const float *t, Bytes index, Ints offset) {
        Ints i = _mm512_srli_epi32(index, 8 * n);
        if constexpr (log <= 4) return pick16(t, i);
        if constexpr (log == 5) return pick32(t, i);
        if constexpr (log == 6) {  // two lookups cost a tenth of a gather
            const __mmask16 upper = _mm512_test_epi32_mask(i, ints(32));
            return _mm512_mask_blend_ps(upper, pick32(t, i), pick32(t + 32, i));
        }
        i = _mm512_and_si512(i, ints((1 << (log < 8 ? log : 8)) - 1));
        return _mm512_i32gather_ps(_mm512_add_epi32(i, offset), t, 4);
    }
};

// Not the intrinsics: GCC 12 takes a function that only prefetches for one that does nothing, and leaves its calls out.
static inline void prefetch(const uint8_t *p) { asm volatile("prefetcht0 %0" : : "m"(*p)); }
static inline void prefetch_far(const uint8_t *p) { asm volatile("prefetcht1 %0" : : "m"(*p)); }

}  // namespace NF_ISA
}  // namespace nf
