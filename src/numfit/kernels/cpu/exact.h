// Exact activations: weights decoded to the fp32 values that the format defines, products and sums in fp32.
#pragma once
#include "gemm.h"

namespace nf {
namespace NF_ISA {

constexpr int kExactRun = 4;     // tiles decoded at a time: 16 KB of fp32
constexpr int kExactTokens = 4;  // that share a load of weights; with four partial sums each, 16 accumulators

template <int count> struct Count { static constexpr int n = count; };

// Column p of a row block is added to partial sum p % 4, which hides the latency of the additions; the order depends neither on
// the number of tokens nor of threads.
template <class T> static void exact_tokens(const Layout &l, const Acts &a, float *y, int64_t ldy, const float *bias, int64_t from, int64_t to) {
    const MemberTables members(l);
    alignas(64) float w[kExactRun][64 * 16];
    constexpr int64_t kExactSums = 128;
    alignas(64) float sums[kExactSums][4][16];
    for (int64_t block = from; block < to; block++) {
        const Floats row = Vec::load_floats(l.row_scale + block * kRows);
        for (int64_t first = 0; first < a.m; first += kExactSums) {
            const int64_t end = first + kExactSums < a.m ? first + kExactSums : a.m;
            Cursor at(l, block);
            Floats effective[4] = {row, row, row, row};
            for (int64_t t0 = 0; t0 < l.tiles; t0 += kExactRun) {
                const int count = static_cast<int>(l.tiles - t0 < kExactRun ? l.tiles - t0 : kExactRun);
                for (int t = 0; t < count; t++, at.left--) {
                    if (at.left == 0) {
                        if (l.meta_bytes) {
                            load_meta<T::members, T::two>(l, members, at.entry, at.meta);
                            at.entry += l.meta_bytes;
                            if (l.scale_bytes) {
                                for (int s = 0; s < l.sub; s++) effective[s] = Vec::mul(at.meta.scale[s], row);
                            }
                        }
                        at.left = l.tiles_per_block;
                    }
                    T::exact(l, l.levels, at.meta, effective, at.code, at.quads, w[t]);
                    at.step(l);
                }
                for (int64_t m = first; m < end; m += kExactTokens) {
                    Floats acc[kExactTokens][4];
                    int64_t who[kExactTokens];
                    for (int i = 0; i < kExactTokens; i++) {
                        who[i] = m + i < a.m ? m + i : a.m - 1;
                        for (int q = 0; q < 4; q++) {
                            acc[i][q] = t0 && m + i < end ? Vec::load_floats(sums[m - first + i][q]) : Vec::floats(0.0f);
                        }
                    }
                    const auto columns = [&](auto tokens) {
                        for (int t = 0; t < count; t++) {
                            const float *x[kExactTokens];
                            for (int i = 0; i < tokens.n; i++) x[i] = a.exact + ((t0 + t) * a.m + who[i]) * l.tile;
                            for (int p = 0; p < 4 * T::count; p += 4) {
                                for (int q = 0; q < 4; q++) {
                                    const Floats v = Vec::load_floats(w[t] + 16 * (p + q));
                                    for (int i = 0; i < tokens.n; i++) acc[i][q] = Vec::fma(v, Vec::floats(x[i][p + q]), acc[i][q]);
                                }
                            }
                        }
                    };
                    if (end - m == 1) columns(Count<1>{});
                    else columns(Count<kExactTokens>{});
                    for (int i = 0; i < kExactTokens && m + i < end; i++) {
                        if (t0 + count < l.tiles) {
                            for (int q = 0; q < 4; q++) Vec::store_floats(sums[m - first + i][q], acc[i][q]);
                        } else {
                            finish(l, block, Vec::add(Vec::add(acc[i][0], acc[i][1]), Vec::add(acc[i][2], acc[i][3])), Vec::floats(1.0f),
                                   y + (m + i) * ldy, bias);
                        }
                    }
                }
            }
        }
    }
}

}  // namespace NF_ISA
}  // namespace nf
