// Trellis codes for one instruction set; compiled once for each, like isa.cpp and under the same restrictions. Kernels are in
// trellis_apply.h; here is the Viterbi algorithm.
//
// Costs are 16-bit and saturate; the least of a step is taken away in the next one. Every operation is an integer one that is
// the same on all instruction sets, and the first of equal candidates wins, so paths are the same everywhere.
#include "trellis.h"
#include "vec.h"
#include "tile.h"
#include "trellis_apply.h"

namespace nf {
namespace NF_ISA {

// Sixteen costs at a time: the definition, in plain C++.
#if !defined(__AVX2__)
struct Lanes16 {
    static constexpr int W = 16;
    struct V { uint16_t at[W]; };
    template <class F> static V each(F f) { V r; for (int i = 0; i < W; i++) r.at[i] = static_cast<uint16_t>(f(i)); return r; }
    static int clamp(int x) { return x < -32768 ? -32768 : x > 32767 ? 32767 : x; }
    static V splat(int x) { return each([&](int) { return x; }); }
    static void store(uint16_t *p, const V &v) { for (int i = 0; i < W; i++) p[i] = v.at[i]; }
    // ((clamp(v - t) · 2**doublings, clamped)² + 2**14) >> 15
    template <int doublings> static V cost(const V &v, const int16_t *t) {
        return each([&](int i) {
            int d = clamp(static_cast<int16_t>(v.at[i]) - t[i]);
            for (int j = 0; j < doublings; j++) d = clamp(2 * d);
            return (d * d + 16384) >> 15;
        });
    }
    template <int k> static V expand(const uint16_t *p) { return each([&](int i) { return p[i >> k]; }); }
    static V plus(const V &a, const V &b) { return each([&](int i) { return a.at[i] + b.at[i] > 65535 ? 65535 : a.at[i] + b.at[i]; }); }
    static V minus(const V &a, const V &b) { return each([&](int i) { return a.at[i] < b.at[i] ? 0 : a.at[i] - b.at[i]; }); }
    static V least(const V &a, const V &b) { return each([&](int i) { return a.at[i] < b.at[i] ? a.at[i] : b.at[i]; }); }
    static int least_of(const V &a) {
        int m = a.at[0];
        for (int i = 1; i < W; i++) m = a.at[i] < m ? a.at[i] : m;
        return m;
    }
};
using Wide = Lanes16;
#else
struct Lanes16 {
    static constexpr int W = 16;
    using V = __m256i;
    static V splat(int x) { return _mm256_set1_epi16(static_cast<int16_t>(x)); }
    static void store(uint16_t *p, V v) { _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), v); }
    template <int doublings> static V cost(V v, const int16_t *t) {
        V d = _mm256_subs_epi16(v, _mm256_loadu_si256(reinterpret_cast<const __m256i *>(t)));
        for (int j = 0; j < doublings; j++) d = _mm256_adds_epi16(d, d);
        return _mm256_mulhrs_epi16(d, d);
    }
    template <int k> static V expand(const uint16_t *p) {
        if constexpr (k == 2) {
            long long four;
            __builtin_memcpy(&four, p, 8);
            return _mm256_shuffle_epi8(_mm256_set1_epi64x(four), _mm256_setr_epi64x(0x0100010001000100, 0x0302030203020302, 0x0504050405040504,
                                                                                  0x0706070607060706));
        } else if constexpr (k == 3) {
            int two;
            __builtin_memcpy(&two, p, 4);
            return _mm256_shuffle_epi8(_mm256_set1_epi32(two), _mm256_setr_epi64x(0x0100010001000100, 0x0100010001000100, 0x0302030203020302,
                                                                                 0x0302030203020302));
        } else {
            return _mm256_set1_epi16(static_cast<int16_t>(*p));
        }
    }
    static V plus(V a, V b) { return _mm256_adds_epu16(a, b); }
    static V minus(V a, V b) { return _mm256_subs_epu16(a, b); }
    static V least(V a, V b) { return _mm256_min_epu16(a, b); }
    static int least_of(V a) {
        const __m128i half = _mm_min_epu16(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
        return _mm_cvtsi128_si32(_mm_minpos_epu16(half)) & 0xffff;
    }
};
#if defined(__AVX512BW__)
struct Wide {
    static constexpr int W = 32;
    using V = __m512i;
    static V splat(int x) { return _mm512_set1_epi16(static_cast<int16_t>(x)); }
    static void store(uint16_t *p, V v) { _mm512_storeu_si512(p, v); }
    template <int doublings> static V cost(V v, const int16_t *t) {
        V d = _mm512_subs_epi16(v, _mm512_loadu_si512(t));
        for (int j = 0; j < doublings; j++) d = _mm512_adds_epi16(d, d);
        return _mm512_mulhrs_epi16(d, d);
    }
    template <int k> static V expand(const uint16_t *p) {
        alignas(64) static constexpr auto index = [] {
            struct { uint16_t at[32]; } r{};
            for (int i = 0; i < 32; i++) r.at[i] = static_cast<uint16_t>(i >> k);
            return r;
        }();
        const V few = _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
        return _mm512_permutexvar_epi16(_mm512_load_si512(index.at), few);
    }
    static V plus(V a, V b) { return _mm512_adds_epu16(a, b); }
    static V minus(V a, V b) { return _mm512_subs_epu16(a, b); }
    static V least(V a, V b) { return _mm512_min_epu16(a, b); }
    static int least_of(V a) { return Lanes16::least_of(_mm256_min_epu16(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1))); }
};
#else
using Wide = Lanes16;
#endif
#endif

// One step: cost of every overlap after it, less `taken`. Returns the least.
template <class L, int k> static int step(const TrellisCosts &c, int16_t w, const uint16_t *from, uint16_t *to, int taken) {
    using V = typename L::V;
    const V v = L::splat(w), off = L::splat(taken);
    V least = L::splat(-1);
    const int64_t run = c.overlaps >> k;  // overlaps that share their newest symbol
    for (int64_t x = 0; x < c.overlaps; x += L::W) {
        V best = L::splat(-1);
#pragma GCC unroll 16
        for (int64_t j = 0; j < 1 << k; j++) {  // the oldest symbol, which this step forgets
            const V path = L::template expand<k>(from + j * run + (x >> k));
            best = L::least(best, L::plus(path, L::template cost<k - 2>(v, c.table + j * c.stride + x)));
        }
        best = L::minus(best, off);
        L::store(to + x, best);
        least = L::least(least, best);
    }
    return L::least_of(least);
}

static inline int clamp16(int x) { return x < -32768 ? -32768 : x > 32767 ? 32767 : x; }

template <class L, int k> static void walk(const TrellisCosts &c, const int16_t *v, int64_t steps, int32_t start, int32_t end, uint16_t *costs,
                                           uint16_t *overlap) {
    for (int64_t x = 0; x < c.overlaps; x++) costs[x] = start < 0 || x == start ? 0 : 65535;
    int taken = 0;
    for (int64_t t = 0; t < steps; t++) taken = step<L, k>(c, v[t], costs + t * c.overlaps, costs + (t + 1) * c.overlaps, taken);
    if (end < 0) {
        end = 0;
        const uint16_t *last = costs + steps * c.overlaps;
        for (int32_t x = 1; x < c.overlaps; x++) end = last[x] < last[end] ? x : end;
    }
    overlap[steps] = static_cast<uint16_t>(end);
    const int64_t run = c.overlaps >> k;
    for (int64_t t = steps - 1; t >= 0; t--) {
        const int64_t x = overlap[t + 1];
        int best = 1 << 30;
        int64_t chosen = 0;
        for (int64_t j = 0; j < 1 << k; j++) {
            int d = clamp16(v[t] - c.table[j * c.stride + x]);
            for (int i = 0; i < k - 2; i++) d = clamp16(2 * d);
            int cost = costs[t * c.overlaps + j * run + (x >> k)] + ((d * d + 16384) >> 15);
            cost = cost > 65535 ? 65535 : cost;
            if (cost < best) best = cost, chosen = j * run + (x >> k);
        }
        overlap[t] = static_cast<uint16_t>(chosen);
    }
}

static void path(const TrellisCosts &c, const int16_t *v, int64_t steps, int32_t start, int32_t end, uint16_t *costs, uint16_t *overlap) {
    if (c.overlaps >= Wide::W) {
        const auto run = c.k == 2 ? walk<Wide, 2> : c.k == 3 ? walk<Wide, 3> : walk<Wide, 4>;
        run(c, v, steps, start, end, costs, overlap);
    } else {  // L = 8, k = 4; never fewer than 16
        const auto run = c.k == 2 ? walk<Lanes16, 2> : c.k == 3 ? walk<Lanes16, 3> : walk<Lanes16, 4>;
        run(c, v, steps, start, end, costs, overlap);
    }
}

}  // namespace NF_ISA

NF_DEFINE_TABLE(TrellisKernels, trellis, NF_ISA::path, NF_ISA::trellis_int8, NF_ISA::trellis_exact)

}  // namespace nf
