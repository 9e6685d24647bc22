// The vector operations of the kernels in plain C++: the definition of what the other vec_*.h provide. Correct everywhere,
// fast nowhere (performance.md section 5).
#pragma once
#include <cstring>

#include "layout.h"

namespace nf {
namespace NF_ISA {  // one a translation unit: nothing compiled for one processor may be linked into another

static inline float half_to_float(uint16_t h) {
    uint32_t sign = (h & 0x8000u) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023u, bits;
    if (exponent == 31) {
        bits = sign | 0x7f800000u | mantissa << 13;
    } else if (exponent) {
        bits = sign | (exponent + 112) << 23 | mantissa << 13;
    } else {
        float value = static_cast<float>(mantissa) * 0x1p-24f;
        std::memcpy(&bits, &value, 4);
        bits |= sign;
    }
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

struct Vec {
    struct Bytes { uint8_t at[64]; };
    struct Ints { int32_t at[16]; };
    struct Floats { float at[16]; };
    static constexpr bool kBiased = true;
    static constexpr int kTokens = 1;
    static constexpr bool kSixBits = false;

    template <class F> static Bytes bytes(F f) { Bytes r; for (int i = 0; i < 64; i++) r.at[i] = static_cast<uint8_t>(f(i)); return r; }
    template <class F> static Ints each(F f) { Ints r; for (int i = 0; i < 16; i++) r.at[i] = f(i); return r; }
    template <class F> static Floats eachf(F f) { Floats r; for (int i = 0; i < 16; i++) r.at[i] = f(i); return r; }

    static Bytes load(const uint8_t *p) { Bytes r; std::memcpy(r.at, p, 64); return r; }
    static void store(uint8_t *p, const Bytes &a) { std::memcpy(p, a.at, 64); }
    // Shifts may leak bits between the two bytes of a word: whoever uses them ignores the bits beyond those that it asked for.
    template <int n> static Bytes shift_right(const Bytes &a) { return bytes([&](int i) { return a.at[i] >> n; }); }
    template <int n> static Bytes shift_left(const Bytes &a) { return bytes([&](int i) { return a.at[i] << n; }); }
    static Bytes mask(uint8_t m) { return bytes([&](int) { return m; }); }
    static Bytes select(const Bytes &m, const Bytes &a, const Bytes &b) {
        return bytes([&](int i) { return (m.at[i] & a.at[i]) | (~m.at[i] & b.at[i]); });
    }

    template <int log> struct Table { uint8_t at[1 << log]; };
    template <int log> static Table<log> table(const uint8_t *p) { Table<log> t; std::memcpy(t.at, p, sizeof t.at); return t; }
    template <int log> static Bytes lookup(const Table<log> &t, const Bytes &index) {
        return bytes([&](int i) { return t.at[index.at[i] & ((1 << log) - 1)]; });
    }
    static Bytes blend(const Ints &lanes, const Bytes &a, const Bytes &b) {
        return bytes([&](int i) { return lanes.at[i / 4] ? b.at[i] : a.at[i]; });
    }
    static void quads(const uint8_t *p, Bytes &low, Bytes &high) {
        low = bytes([&](int i) { return p[i / 4 * 2]; });
        high = bytes([&](int i) { return p[i / 4 * 2 + 1]; });
    }

    static Ints ints(int32_t a) { return each([&](int) { return a; }); }
    static Ints all(const int32_t *p) { return ints(*p); }
    static Ints add(const Ints &a, const Ints &b) { return each([&](int i) { return a.at[i] + b.at[i]; }); }
    static Ints dot(const Ints &sum, const Bytes &w, const int8_t *x) {
        return each([&](int i) {
            const uint8_t *v = w.at + 4 * i;
            return sum.at[i] + v[0] * x[0] + v[1] * x[1] + v[2] * x[2] + v[3] * x[3];
        });
    }
    static Ints load_ints(const int32_t *p) { return each([&](int i) { return p[i]; }); }
    static void store_ints(int32_t *p, const Ints &a) { std::memcpy(p, a.at, 64); }

    static Floats floats(float a) { return eachf([&](int) { return a; }); }
    static Floats to_floats(const Ints &a) { return eachf([&](int i) { return static_cast<float>(a.at[i]); }); }
    static Floats load_floats(const float *p) { Floats r; std::memcpy(r.at, p, 64); return r; }
    static void store_floats(float *p, const Floats &a) { std::memcpy(p, a.at, 64); }
    static Floats mul(const Floats &a, const Floats &b) { return eachf([&](int i) { return a.at[i] * b.at[i]; }); }
    static Floats sub(const Floats &a, const Floats &b) { return eachf([&](int i) { return a.at[i] - b.at[i]; }); }
    static Floats add(const Floats &a, const Floats &b) { return eachf([&](int i) { return a.at[i] + b.at[i]; }); }
    static Floats fma(const Floats &a, const Floats &b, const Floats &c) { return eachf([&](int i) { return __builtin_fmaf(a.at[i], b.at[i], c.at[i]); }); }
    static Floats fnma(const Floats &a, const Floats &b, const Floats &c) { return eachf([&](int i) { return __builtin_fmaf(-a.at[i], b.at[i], c.at[i]); }); }

    static Ints load_u8(const uint8_t *p) { return each([&](int i) { return p[i]; }); }
    static uint16_t word(const uint8_t *p, int i) { uint16_t w; std::memcpy(&w, p + 2 * i, 2); return w; }
    static float from_bits(uint32_t bits) { float f; std::memcpy(&f, &bits, 4); return f; }
    static Floats load_half(const uint8_t *p) { return eachf([&](int i) { return half_to_float(word(p, i)); }); }
    static Floats load_bf16(const uint8_t *p) { return eachf([&](int i) { return from_bits(static_cast<uint32_t>(word(p, i)) << 16); }); }
    static Floats load_e8m0(const uint8_t *p) { return eachf([&](int i) { return from_bits(p[i] ? static_cast<uint32_t>(p[i]) << 23 : 0x00400000u); }); }
    static Floats load_tiny(const uint8_t *p) { return eachf([&](int i) { return half_to_float(static_cast<uint16_t>(p[i] << 7)); }); }
    static Ints nibbles(const uint8_t *p) {
        uint32_t two[2];
        std::memcpy(two, p, 8);
        return each([&](int i) { return static_cast<int32_t>(two[i % 2] >> (i / 2 * 4)); });
    }
    static Ints pick16(const int32_t *t, const Ints &i) { return each([&](int n) { return t[i.at[n] & 15]; }); }
    static Ints pick32(const int32_t *t, const Ints &i) { return each([&](int n) { return t[i.at[n] & 31]; }); }
    static Floats pick16(const float *t, const Ints &i) { return eachf([&](int n) { return t[i.at[n] & 15]; }); }
    static Floats pick32(const float *t, const Ints &i) { return eachf([&](int n) { return t[i.at[n] & 31]; }); }
    template <int log, int n> static Floats pick(const float *t, const Bytes &index, const Ints &offset) {
        return eachf([&](int i) { return t[(index.at[4 * i + n] & ((1 << (log < 8 ? log : 8)) - 1)) + (log > 5 ? offset.at[i] : 0)]; });
    }
};

static inline void prefetch(const uint8_t *) {}
static inline void prefetch_far(const uint8_t *) {}

}  // namespace NF_ISA
}  // namespace nf
