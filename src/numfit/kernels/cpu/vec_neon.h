// The vector operations of the kernels on 64-bit Arm with the dot-product extension: each vector of vec_portable.h is four
// registers. Weights are signed here (sdot), so tables carry no bias.
#pragma once
#include <arm_neon.h>

#include "layout.h"

namespace nf {
namespace NF_ISA {  // one a translation unit: nothing compiled for one processor may be linked into another

struct Vec {
    struct Bytes { uint8x16_t r[4]; };
    struct Ints { int32x4_t r[4]; };
    struct Floats { float32x4_t r[4]; };
    static constexpr bool kBiased = false;
    static constexpr int kTokens = 1;
    static constexpr bool kSixBits = false;

    template <class T, class F> static T four(F f) { return {{f(0), f(1), f(2), f(3)}}; }

    static Bytes load(const uint8_t *p) { return four<Bytes>([&](int i) { return vld1q_u8(p + 16 * i); }); }
    static void store(uint8_t *p, Bytes v) { for (int i = 0; i < 4; i++) vst1q_u8(p + 16 * i, v.r[i]); }
    template <int n> static Bytes shift_right(Bytes v) {
        if constexpr (n == 0) return v;
        else return four<Bytes>([&](int i) { return vshrq_n_u8(v.r[i], n); });
    }
    template <int n> static Bytes shift_left(Bytes v) { return four<Bytes>([&](int i) { return vshlq_n_u8(v.r[i], n); }); }
    static Bytes mask(uint8_t m) { return four<Bytes>([&](int) { return vdupq_n_u8(m); }); }
    static Bytes select(Bytes m, Bytes a, Bytes b) { return four<Bytes>([&](int i) { return vbslq_u8(m.r[i], a.r[i], b.r[i]); }); }

    template <int log> struct Table { uint8x16_t part[1 << (log - 4)]; };
    template <int log> static Table<log> table(const uint8_t *bytes) {
        Table<log> t;
        for (int i = 0; i < 1 << (log - 4); i++) t.part[i] = vld1q_u8(bytes + 16 * i);
        return t;
    }
    template <int log> static Bytes lookup(const Table<log> &t, Bytes index) {
        return four<Bytes>([&](int i) {
            const uint8x16_t at = vandq_u8(index.r[i], vdupq_n_u8(static_cast<uint8_t>((1 << log) - 1)));
            if constexpr (log == 4) {
                return vqtbl1q_u8(t.part[0], at);
            } else if constexpr (log == 5) {
                return vqtbl2q_u8({{t.part[0], t.part[1]}}, at);
            } else {  // 64 at a time; an index beyond a table gives what was there before
                uint8x16_t out = vdupq_n_u8(0);
                for (int p = 0; p < 1 << (log - 6); p++) {
                    const uint8x16x4_t part = {{t.part[4 * p], t.part[4 * p + 1], t.part[4 * p + 2], t.part[4 * p + 3]}};
                    out = vqtbx4q_u8(out, part, vsubq_u8(at, vdupq_n_u8(static_cast<uint8_t>(64 * p))));
                }
                return out;
            }
        });
    }
    static Bytes blend(Ints lanes, Bytes a, Bytes b) {
        return four<Bytes>([&](int i) {
            return vbslq_u8(vreinterpretq_u8_u32(vtstq_s32(lanes.r[i], lanes.r[i])), b.r[i], a.r[i]);
        });
    }
    static void quads(const uint8_t *p, Bytes &low, Bytes &high) {
        for (int i = 0; i < 4; i++) {
            const uint32x4_t words = vmovl_u16(vld1_u16(reinterpret_cast<const uint16_t *>(p + 8 * i)));
            low.r[i] = vreinterpretq_u8_u32(vmulq_n_u32(vandq_u32(words, vdupq_n_u32(255)), 0x01010101u));
            high.r[i] = vreinterpretq_u8_u32(vmulq_n_u32(vshrq_n_u32(words, 8), 0x01010101u));
        }
    }

    static Ints ints(int32_t a) { return four<Ints>([&](int) { return vdupq_n_s32(a); }); }
    static Ints all(const int32_t *p) { return ints(*p); }
    static Ints add(Ints a, Ints b) { return four<Ints>([&](int i) { return vaddq_s32(a.r[i], b.r[i]); }); }
    static Ints dot(Ints sum, Bytes w, const int8_t *x) {
        int32_t bytes;
        __builtin_memcpy(&bytes, x, 4);
        const int8x16_t v = vreinterpretq_s8_s32(vdupq_n_s32(bytes));
        return four<Ints>([&](int i) { return vdotq_s32(sum.r[i], vreinterpretq_s8_u8(w.r[i]), v); });
    }
    static Ints load_ints(const int32_t *p) { return four<Ints>([&](int i) { return vld1q_s32(p + 4 * i); }); }
    static void store_ints(int32_t *p, Ints a) { for (int i = 0; i < 4; i++) vst1q_s32(p + 4 * i, a.r[i]); }

    static Floats floats(float a) { return four<Floats>([&](int) { return vdupq_n_f32(a); }); }
    static Floats to_floats(Ints a) { return four<Floats>([&](int i) { return vcvtq_f32_s32(a.r[i]); }); }
    static Floats load_floats(const float *p) { return four<Floats>([&](int i) { return vld1q_f32(p + 4 * i); }); }
    static void store_floats(float *p, Floats a) { for (int i = 0; i < 4; i++) vst1q_f32(p + 4 * i, a.r[i]); }
    static Floats mul(Floats a, Floats b) { return four<Floats>([&](int i) { return vmulq_f32(a.r[i], b.r[i]); }); }
    static Floats sub(Floats a, Floats b) { return four<Floats>([&](int i) { return vsubq_f32(a.r[i], b.r[i]); }); }
    static Floats add(Floats a, Floats b) { return four<Floats>([&](int i) { return vaddq_f32(a.r[i], b.r[i]); }); }
    static Floats fma(Floats a, Floats b, Floats c) { return four<Floats>([&](int i) { return vfmaq_f32(c.r[i], a.r[i], b.r[i]); }); }
    static Floats fnma(Floats a, Floats b, Floats c) { return four<Floats>([&](int i) { return vfmsq_f32(c.r[i], a.r[i], b.r[i]); }); }

    static Ints load_u8(const uint8_t *p) {
        const uint8x16_t v = vld1q_u8(p);
        const uint16x8_t a = vmovl_u8(vget_low_u8(v)), b = vmovl_u8(vget_high_u8(v));
        return {{vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(a))), vreinterpretq_s32_u32(vmovl_u16(vget_high_u16(a))),
                 vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(b))), vreinterpretq_s32_u32(vmovl_u16(vget_high_u16(b)))}};
    }
    static float32x4_t half4(uint16x4_t v) { return vcvt_f32_f16(vreinterpret_f16_u16(v)); }
    static uint16x4_t words4(const uint8_t *p) { return vld1_u16(reinterpret_cast<const uint16_t *>(p)); }
    static Floats load_half(const uint8_t *p) { return four<Floats>([&](int i) { return half4(words4(p + 8 * i)); }); }
    static Floats load_bf16(const uint8_t *p) {
        return four<Floats>([&](int i) { return vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(words4(p + 8 * i)), 16)); });
    }
    static Floats load_e8m0(const uint8_t *p) {
        const Ints v = load_u8(p);
        return four<Floats>([&](int i) {
            return vreinterpretq_f32_s32(vmaxq_s32(vshlq_n_s32(v.r[i], 23), vdupq_n_s32(0x00400000)));
        });
    }
    static Floats load_tiny(const uint8_t *p) {
        const Ints v = load_u8(p);
        return four<Floats>([&](int i) { return half4(vshl_n_u16(vmovn_u32(vreinterpretq_u32_s32(v.r[i])), 7)); });
    }
    static Ints nibbles(const uint8_t *p) {
        int32_t two[2];
        __builtin_memcpy(two, p, 8);
        const int32x4_t v = {two[0], two[1], two[0], two[1]};
        return four<Ints>([&](int i) {
            const int32x4_t shifts = {-8 * i, -8 * i, -8 * i - 4, -8 * i - 4};
            return vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(v), shifts));
        });
    }
    template <class V, class T> static V gather(const T *t, Ints at, int m) {
        int32_t i[16];
        T out[16];
        store_ints(i, at);
        for (int n = 0; n < 16; n++) out[n] = t[i[n] & m];
        V v;
        __builtin_memcpy(&v, out, 64);
        return v;
    }
    static Ints pick16(const int32_t *t, Ints i) { return gather<Ints>(t, i, 15); }
    static Ints pick32(const int32_t *t, Ints i) { return gather<Ints>(t, i, 31); }
    static Floats pick16(const float *t, Ints i) { return gather<Floats>(t, i, 15); }
    static Floats pick32(const float *t, Ints i) { return gather<Floats>(t, i, 31); }
    template <int log, int n> static Floats pick(const float *t, Bytes index, Ints offset) {
        Ints i = four<Ints>([&](int r) {
            const uint32x4_t v = vandq_u32(vshlq_u32(vreinterpretq_u32_u8(index.r[r]), vdupq_n_s32(-8 * n)),
                                           vdupq_n_u32((1u << (log < 8 ? log : 8)) - 1));
            return vreinterpretq_s32_u32(v);
        });
        return gather<Floats>(t, log > 5 ? add(i, offset) : i, 511);
    }
};

static inline void prefetch(const uint8_t *p) { __builtin_prefetch(p, 0, 3); }
static inline void prefetch_far(const uint8_t *p) { __builtin_prefetch(p, 0, 2); }

}  // namespace NF_ISA
}  // namespace nf
