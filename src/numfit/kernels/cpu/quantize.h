// Activations for the kernels: permuted and padded as the layout wants, int8 with one scale a group, or fp32 as they are.
#pragma once
#include "kernels.h"

namespace nf {
namespace NF_ISA {

// `count` positions of a tile of one token, padding as zero.
static inline void fetch(const Layout &l, const float *x, int64_t position, int count, float *out) {
    if (l.column) {
        for (int i = 0; i < count; i++) {
            const int32_t c = l.column[position + i];
            out[i] = c < 0 ? 0.0f : x[c];
        }
        return;
    }
    const int64_t there = l.k - position < count ? l.k - position : count;
    for (int i = 0; i < count; i++) out[i] = i < there ? x[position + i] : 0.0f;
}

// Scale absmax / 127, codes round(x · (127 / absmax)) to the nearest, ties to even. A group with NaN or Inf gets the scale NaN
// (its token's results are then NaN); one whose absmax is below 2**-120 counts as zero, since 127 / absmax must be finite.
static inline float quantize_group(const float *x, int n, int8_t *codes, int32_t *sum) {
    uint32_t most = 0;
    for (int i = 0; i < n; i++) {
        uint32_t bits;
        __builtin_memcpy(&bits, x + i, 4);
        bits &= 0x7fffffffu;
        most = bits > most ? bits : most;
    }
    float amax;
    __builtin_memcpy(&amax, &most, 4);
    if (most >= 0x7f800000u || !(amax >= 0x1p-120f)) {
        __builtin_memset(codes, 0, static_cast<size_t>(n));
        *sum = 0;
        return most >= 0x7f800000u ? __builtin_nanf("") : 0.0f;
    }
    const float inverse = 127.0f / amax;
    int32_t total = 0;
    for (int i = 0; i < n; i++) {
        // adding and taking away 1.5 · 2**23 rounds to the nearest integer, ties to even
        const float shifted = x[i] * inverse + 12582912.0f;
        int32_t code;
        __builtin_memcpy(&code, &shifted, 4);
        code -= 0x4B400000;
        codes[i] = static_cast<int8_t>(code);
        total += code;
    }
    *sum = total;
    return amax / 127.0f;
}

static void quantize(const Layout &l, const float *x, int64_t ldx, const Acts &a, int64_t from, int64_t to) {
    alignas(64) float part[64];
    for (int64_t t = 0; t < l.tiles; t++) {  // tokens of a tile lie side by side
        for (int64_t m = from; m < to; m++) {
            const int64_t place = (t * a.m + m) * l.tile;
            const float *source = part;
            if (!l.column && (t + 1) * l.tile <= l.k) source = x + m * ldx + t * l.tile;
            else fetch(l, x + m * ldx, t * l.tile, l.tile, part);
            if (a.exact) {
                __builtin_memcpy(a.exact + place, source, sizeof(float) * static_cast<size_t>(l.tile));
                continue;
            }
            for (int s = 0; s < l.sub; s++) {
                const int64_t g = (t * l.sub + s) * a.m + m;
                a.scale[g] = quantize_group(source + s * l.group, l.group, a.codes + place + s * l.group, a.sum + g);
                a.start[g] = -kBias * a.sum[g];
            }
        }
    }
}

}  // namespace NF_ISA
}  // namespace nf
