// Many tokens: a run of tiles is decoded once into the first-level cache and multiplied by all tokens; arithmetic is the limit.
#pragma once
#include "gemv.h"

namespace nf {
namespace NF_ISA {

constexpr int kRun = 16;       // tiles decoded at a time: 16 KB of int8
constexpr int kStep = 4;       // tokens that share a load of weights

// A decoded run of tiles of 16 rows.
template <class T> struct Run {
    alignas(64) uint8_t first[kRun][16][64];
    alignas(64) uint8_t second[T::two ? kRun : 1][16][64];
    struct Group { Floats scale, c1, c2, zero; } group[kRun * 4];
    bool scaled;
};

// Where decoding of a block of rows stands.
struct Cursor {
    const uint8_t *code, *entry;
    int64_t left = 0;
    Meta meta;
};

template <class T> static void decode_run(const typename T::Tables &tables, const MemberTables &members, const Layout &l, int count,
                                          Cursor &at, Run<T> &run) {
    for (int t = 0; t < count; t++, at.left--) {
        if (at.left == 0) {
            if (l.meta_bytes) {
                load_meta<T::members, T::two>(l, members, at.entry, at.meta);
                at.entry += l.meta_bytes;
            }
            at.left = l.tiles_per_block;
        }
        Bytes w[16];
        T::index(at.code, at.meta, w);
#pragma GCC unroll 16
        for (int j = 0; j < T::count; j++) {
            Vec::store(run.first[t][j], tables.level(at.meta, j, w[j]));
            if constexpr (T::two) Vec::store(run.second[t][j], tables.level2(w[j]));
        }
        for (int s = 0; s < l.sub; s++) {
            auto &g = run.group[t * l.sub + s];
            g.scale = Vec::floats(1.0f);
            run.scaled = group_scale<T>(l, at.meta, s, &g.scale);
            if constexpr (T::two) g.c1 = at.meta.c1[s], g.c2 = at.meta.c2[s];
            if (l.zero_bytes) g.zero = at.meta.zero[s];
        }
        at.code += l.code_bytes;
    }
}

template <class T> static inline Floats add_run_group(const Layout &l, const Run<T> &run, int g, Ints p, Ints p2, float x_scale,
                                                      int32_t x_sum, Floats acc) {
    Meta m;  // the same arithmetic as for few tokens
    const auto &group = run.group[g];
    if constexpr (T::two) m.c1[0] = group.c1, m.c2[0] = group.c2;
    if (l.zero_bytes) m.zero[0] = group.zero;
    return add_group<T>(l, m, 0, run.scaled, group.scale, p, p2, x_scale, x_sum, acc);
}

#if defined(__AMX_INT8__)
#include "gemm_amx.h"
#else
// Tokens [token, token + kStep) of the run that starts at tile `t0`.
template <class T> static void multiply(const Layout &l, const Run<T> &run, int64_t t0, int count, const Acts &a, int64_t token,
                                        Floats *acc) {
    const int bias = Vec::kBiased ? l.bias : 0, bias2 = Vec::kBiased ? l.bias2 : 0;
    const int per_group = T::count / l.sub;
    const int64_t last = a.m - 1;
    int64_t who[kStep];
    for (int i = 0; i < kStep; i++) who[i] = token + i < last ? token + i : last;
    for (int t = 0; t < count; t++) {
        const int8_t *x[kStep];
        for (int i = 0; i < kStep; i++) x[i] = a.codes + ((t0 + t) * a.m + who[i]) * l.tile;
        for (int s = 0; s < l.sub; s++) {
            const int64_t g = ((t0 + t) * l.sub + s) * a.m;
            Ints p[kStep], p2[kStep];
            for (int i = 0; i < kStep; i++) {
                p[i] = Vec::ints(-bias * a.sum[g + who[i]]);
                if constexpr (T::two) p2[i] = Vec::ints(-bias2 * a.sum[g + who[i]]);
            }
            for (int j = s * per_group; j < (s + 1) * per_group; j++) {
                const Bytes w = Vec::load(run.first[t][j]);
                for (int i = 0; i < kStep; i++) p[i] = Vec::dot(p[i], w, x[i] + 4 * j);
                if constexpr (T::two) {
                    const Bytes w2 = Vec::load(run.second[t][j]);
                    for (int i = 0; i < kStep; i++) p2[i] = Vec::dot(p2[i], w2, x[i] + 4 * j);
                }
            }
            for (int i = 0; i < kStep; i++) {
                acc[i] = add_run_group<T>(l, run, t * l.sub + s, p[i], p2[i], a.scale[g + who[i]], a.sum[g + who[i]], acc[i]);
            }
        }
    }
}

template <class T> static void many_tokens(const Layout &l, const Acts &a, float *y, int64_t ldy, const float *bias, int64_t from, int64_t to) {
    const typename T::Tables tables(l, Vec::kBiased);
    const MemberTables members(l);
    Run<T> run;
    // sums of the block so far: [tokens][16], at most kSums tokens at a time
    constexpr int64_t kSums = 512;
    alignas(64) float sums[kSums][16];
    for (int64_t block = from; block < to; block++) {
        const Floats row = row_factor(l, block);
        for (int64_t first = 0; first < a.m; first += kSums) {
            const int64_t end = first + kSums < a.m ? first + kSums : a.m;
            Cursor at;
            at.code = l.code_stream + block * l.tiles * l.code_bytes;
            at.entry = l.meta_stream + block * l.metas() * l.meta_bytes;
            for (int64_t t0 = 0; t0 < l.tiles; t0 += kRun) {
                const int count = static_cast<int>(l.tiles - t0 < kRun ? l.tiles - t0 : kRun);
                decode_run<T>(tables, members, l, count, at, run);
                for (int64_t m = first; m < end; m += kStep) {
                    Floats acc[kStep];
                    for (int i = 0; i < kStep; i++) {
                        acc[i] = t0 && m + i < end ? Vec::load_floats(sums[m - first + i]) : Vec::floats(0.0f);
                    }
                    multiply<T>(l, run, t0, count, a, m, acc);
                    for (int i = 0; i < kStep && m + i < end; i++) {
                        if (t0 + count < l.tiles) Vec::store_floats(sums[m - first + i], acc[i]);
                        else finish(l, block, acc[i], row, y + (m + i) * ldy, bias);
                    }
                }
            }
        }
    }
}
#endif

}  // namespace NF_ISA
}  // namespace nf
