// Few tokens: every byte of the matrix is decoded in registers and used at once; memory is the limit.
#pragma once
#include "kernels.h"

namespace nf {
namespace NF_ISA {

constexpr int64_t kFewTokens = 8;

// Ask for what will be read after `p` has been.
template <int bytes> static inline __attribute__((always_inline)) void ask(const uint8_t *p, const Ahead &ahead) {
    for (int at = 0; at < bytes; at += 64) prefetch_far(p + ahead.far + at);
    if (ahead.again) {
        for (int at = 0; at < bytes; at += 64) prefetch_far(p + ahead.again + at);
    } else {
        for (int at = 0; at < bytes; at += 64) prefetch(p + kNear + at);
    }
}

// Results of 16 rows for one token, acc · row + bias → y; rows beyond the matrix left out.
static inline void finish(const Layout &l, int64_t block, Floats acc, Floats row, float *y, const float *bias) {
    const int64_t first = block * kRows, there = l.n - first < kRows ? l.n - first : kRows;
    if (there == kRows) {
        Vec::store_floats(y + first, Vec::fma(acc, row, bias ? Vec::load_floats(bias + first) : Vec::floats(0.0f)));
        return;
    }
    alignas(64) float out[16], b[16] = {};
    if (bias) __builtin_memcpy(b, bias + first, sizeof(float) * static_cast<size_t>(there));
    Vec::store_floats(out, Vec::fma(acc, row, Vec::load_floats(b)));
    __builtin_memcpy(y + first, out, sizeof(float) * static_cast<size_t>(there));
}

// What int8 sums of a row are multiplied by at the end.
static inline Floats row_factor(const Layout &l, int64_t block) {
    const Floats row = Vec::load_floats(l.row_scale + block * kRows);
    return l.member_kind == Members::group ? row : Vec::mul(row, Vec::floats(l.c1[0]));
}

// What a group's integer sums are multiplied by; parts that the format lacks are undefined.
struct Factors {
    Floats scale;  // scale · c1, or what there is of it
    Floats c1, c2, zero;
};

template <class T> static inline bool is_scaled(const Layout &l) { return l.scale_bytes != 0 || (T::members && !T::two); }

template <class T> static inline Factors factors(const Layout &l, const Meta &m, int s) {
    Factors f;
    if constexpr (T::two) f.c1 = m.c1[s], f.c2 = m.c2[s];
    if constexpr (T::members && !T::two) f.scale = l.scale_bytes ? Vec::mul(m.scale[s], m.c1[s]) : m.c1[s];
    else if (l.scale_bytes) f.scale = m.scale[s];
    if (l.zero_bytes) f.zero = m.zero[s];
    return f;
}

// acc + (group's integer sums) · (weight scale · activation scale)
template <class T> static inline Floats add_group(const Factors &f, bool scaled, bool zero, Ints p, Ints p2, float x_scale, int32_t x_sum,
                                                  Floats acc) {
    Floats sum = Vec::to_floats(p);
    if constexpr (T::two) {
        sum = Vec::fma(f.c2, Vec::to_floats(p2), Vec::mul(f.c1, sum));  // exact: below 2**24
    } else {
        if (zero) sum = Vec::fnma(f.zero, Vec::floats(static_cast<float>(x_sum)), sum);  // exact as well
    }
    const Floats x = Vec::floats(x_scale);
    return Vec::fma(sum, scaled ? Vec::mul(f.scale, x) : x, acc);
}

// The products of one tile, added to acc. `sub`: the groups of a tile, 0 if only the layout knows.
template <class T, int tokens, int sub>
static inline __attribute__((always_inline)) void dots(const typename T::Tables &tables, const Layout &l, const Meta &meta, const uint8_t *code,
                                                       const uint8_t *quads, const Acts &a, int64_t tile, const int64_t *token, Floats *acc) {
    constexpr int parts = sub == 1 || sub == 2 ? 2 : 4;  // sums a token, whatever the groups: their latencies overlap
    const int groups = sub ? sub : l.sub;
    Bytes w[16];
    T::template index<T::keyed>(code, quads, meta, w);
    Ints p[tokens][parts], p2[T::two ? tokens : 1][parts];
    const int8_t *x[tokens];
    for (int i = 0; i < tokens; i++) {
        x[i] = a.codes + (tile * a.m + token[i]) * (4 * T::count);
        for (int q = 0; q < parts; q++) {
            const bool first = q * groups % parts == 0;
            p[i][q] = Vec::kBiased && first ? Vec::all(a.start + (tile * groups + q * groups / parts) * a.m + token[i]) : Vec::ints(0);
            if constexpr (T::two) p2[i][q] = p[i][q];
        }
    }
#pragma GCC unroll 16
    for (int j = 0; j < T::count; j++) {
        const int q = j * parts / T::count;
        const Bytes level = tables.level(meta, j, w[j]);
        for (int i = 0; i < tokens; i++) p[i][q] = Vec::dot(p[i][q], level, x[i] + 4 * j);
        if constexpr (T::two) {
            const Bytes level2 = tables.level2(w[j]);
            for (int i = 0; i < tokens; i++) p2[i][q] = Vec::dot(p2[i][q], level2, x[i] + 4 * j);
        }
    }
    for (int i = 0; i < tokens; i++) {
        for (int s = 0; s < groups; s++) {
            const int from = s * parts / groups, to = (s + 1) * parts / groups;
            const int64_t g = (tile * groups + s) * a.m + token[i];
            Ints sum = p[i][from], sum2 = p2[T::two ? i : 0][from];
            for (int q = from + 1; q < to; q++) {
                sum = Vec::add(sum, p[i][q]);
                if constexpr (T::two) sum2 = Vec::add(sum2, p2[i][q]);
            }
            acc[i] = add_group<T>(factors<T>(l, meta, s), is_scaled<T>(l), l.zero_bytes != 0, sum, sum2, a.scale[g], a.sum[g], acc[i]);
        }
    }
}

template <class T, int tokens, int sub> static void block_of_rows(const typename T::Tables &tables, const MemberTables &members,
                                                                  const Layout &l, const Acts &a, int64_t block, const int64_t *token,
                                                                  Floats *acc) {
    constexpr int code_bytes = 64 * stored_vectors(T::codes);
    const uint8_t *code = l.codes_of(block), *quads = l.quads_of(block);
    const uint8_t *entry = l.meta_stream + block * l.metas() * l.meta_bytes;
    const Ahead ahead = l.ahead;
    const int meta_bytes = l.meta_bytes;
    Meta meta;
    int64_t left = 0;
    for (int i = 0; i < tokens; i++) acc[i] = Vec::floats(0.0f);
    for (int64_t t = 0; t < l.tiles; t++, left--) {
        if (left == 0) {
            if (meta_bytes) {
                load_meta<T::members, T::two, sub>(l, members, entry, meta);
                for (int at = 0; at < meta_bytes; at += 64) prefetch(entry + kNear + at);
                entry += meta_bytes;
            }
            left = l.tiles_per_block;
        }
        ask<code_bytes>(code, ahead);
        dots<T, tokens, sub>(tables, l, meta, code, quads, a, t, token, acc);
        code += code_bytes;
        if constexpr (T::quad) {
            quads += 32;
            prefetch(quads + kNear);
        }
    }
}

template <class T> static void few_tokens(const Layout &l, const Acts &a, float *y, int64_t ldy, const float *bias, int64_t from, int64_t to) {
    const typename T::Tables tables(l, Vec::kBiased);
    const MemberTables members(l);
    const auto one = l.sub == 1 ? block_of_rows<T, 1, 1> : l.sub == 2 ? block_of_rows<T, 1, 2> : block_of_rows<T, 1, 4>;
    for (int64_t block = from; block < to; block++) {
        const Floats row = row_factor(l, block);
        int64_t m = 0;
        if constexpr (Vec::kTokens > 1) {
            for (; a.m - m > 1; m += Vec::kTokens) {  // the last tokens are repeated to make the number full
                int64_t token[Vec::kTokens];
                Floats acc[Vec::kTokens];
                for (int i = 0; i < Vec::kTokens; i++) token[i] = m + i < a.m ? m + i : a.m - 1;
                block_of_rows<T, Vec::kTokens, 0>(tables, members, l, a, block, token, acc);
                for (int i = 0; i < Vec::kTokens && m + i < a.m; i++) finish(l, block, acc[i], row, y + (m + i) * ldy, bias);
            }
        }
        for (; m < a.m; m++) {
            Floats acc;
            one(tables, members, l, a, block, &m, &acc);
            finish(l, block, acc, row, y + m * ldy, bias);
        }
    }
}

}  // namespace NF_ISA
}  // namespace nf
