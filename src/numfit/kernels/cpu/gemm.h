// Many tokens: a run of tiles is decoded once into the first-level cache and multiplied by all tokens; arithmetic is the limit.
#pragma once
#include "gemv.h"

namespace nf {
namespace NF_ISA {

#if defined(__AMX_INT8__)
constexpr int kRun = 16;       // tiles decoded at a time: 16 KB of int8
#else
constexpr int kRun = 8;        // … 8 KB, of which two take part at once
#endif
constexpr int kBlocks = 8;     // blocks of rows that take turns at a run, while its activations stay in the second cache level
constexpr int kTogether = 4;   // of them, decoded at a time
constexpr int64_t kSums = 512;  // tokens at a time
constexpr int64_t kAhead = 16;  // tokens whose results are asked for before they are written

// A decoded run of tiles of 16 rows.
template <class T> struct Run {
    alignas(64) uint8_t first[kRun][16][64];
    alignas(64) uint8_t second[T::two ? kRun : 1][16][64];
    Factors group[kRun * 4];
    uint8_t apart[1024];  // lest the same tiles of neighbouring runs compete for the same places of a cache
};

// Where decoding of a block of rows stands.
struct Cursor {
    const uint8_t *code, *quads, *entry;
    int64_t left = 0;
    Meta meta;
    Cursor(const Layout &l, int64_t block)
        : code(l.codes_of(block)), quads(l.quads_of(block)), entry(l.meta_stream + block * l.metas() * l.meta_bytes) {}
    Cursor() = default;
    void step(const Layout &l) { code += l.code_bytes, quads += l.quad_bytes; }
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
        for (int line = 0; line < 64 * stored_vectors(T::codes); line += 64) {  // of the next run
            prefetch_far(at.code + kRun * l.code_bytes + line);
        }
        Bytes w[16];
        T::template index<T::keyed>(at.code, at.quads, at.meta, w);
#pragma GCC unroll 16
        for (int j = 0; j < T::count; j++) {
            Vec::store(run.first[t][j], tables.level(at.meta, j, w[j]));
            if constexpr (T::two) Vec::store(run.second[t][j], tables.level2(w[j]));
        }
        for (int s = 0; s < l.sub; s++) run.group[t * l.sub + s] = factors<T>(l, at.meta, s);
        at.step(l);
    }
}

#if defined(__AMX_INT8__)
#include "gemm_amx.h"
#else
constexpr bool kBiasedRun = Vec::kBiased;
// Tokens and blocks of rows that are multiplied at once, as registers allow: a load of activations serves all blocks (or both lanes),
// one of weights all tokens.
#if defined(__AVX512F__)
constexpr int kStep = 6, kAtOnce = 2;
#else
constexpr int kStep = 4, kAtOnce = 1;
#endif

struct TileConfig {  // nothing to set up here
    explicit TileConfig(int) {}
    ~TileConfig() {}
};

// sums of `blocks` blocks of rows + tokens [token, token + kStep) times their runs, which start at tile `t0`; of these tokens `there`
// are wanted.
template <class T, bool scaled, bool zero, int blocks>
static void multiply_step(const Layout &l, const Run<T> *run, int64_t t0, int count, const Acts &a, int64_t token, int64_t there,
                          float (*const *sums)[16]) {
    const int per_group = T::count / l.sub;
    int64_t who[kStep];
    Floats acc[blocks][kStep];
    for (int i = 0; i < kStep; i++) {
        who[i] = i < there ? token + i : token;
        for (int b = 0; b < blocks; b++) acc[b][i] = i < there ? Vec::load_floats(sums[b][i]) : Vec::floats(0.0f);
    }
    for (int t = 0; t < count; t++) {
        const int8_t *x[kStep];
        for (int i = 0; i < kStep; i++) x[i] = a.codes + ((t0 + t) * a.m + who[i]) * l.tile;
        for (int s = 0; s < l.sub; s++) {
            const int64_t g = ((t0 + t) * l.sub + s) * a.m;
            Ints p[blocks][kStep], p2[blocks][kStep];
            for (int b = 0; b < blocks; b++) {
                for (int i = 0; i < kStep; i++) {
                    p[b][i] = Vec::kBiased ? Vec::all(a.start + g + who[i]) : Vec::ints(0);
                    if constexpr (T::two) p2[b][i] = p[b][i];
                }
            }
            for (int j4 = s * per_group; j4 < (s + 1) * per_group; j4 += 4) {
#pragma GCC unroll 4
                for (int j = j4; j < j4 + 4; j++) {
                    Bytes w[blocks], w2[blocks];
                    for (int b = 0; b < blocks; b++) {
                        w[b] = Vec::load(run[b].first[t][j]);
                        if constexpr (T::two) w2[b] = Vec::load(run[b].second[t][j]);
                    }
                    for (int i = 0; i < kStep; i++) {
                        for (int b = 0; b < blocks; b++) {
                            p[b][i] = Vec::dot(p[b][i], w[b], x[i] + 4 * j);
                            if constexpr (T::two) p2[b][i] = Vec::dot(p2[b][i], w2[b], x[i] + 4 * j);
                        }
                    }
                }
            }
            for (int b = 0; b < blocks; b++) {
                const Factors &f = run[b].group[t * l.sub + s];
                for (int i = 0; i < kStep; i++) {
                    acc[b][i] = add_group<T>(f, scaled, zero, p[b][i], p2[b][i], a.scale[g + who[i]], a.sum[g + who[i]], acc[b][i]);
                }
            }
        }
    }
    for (int b = 0; b < blocks; b++) {
        for (int i = 0; i < kStep && i < there; i++) Vec::store_floats(sums[b][i], acc[b][i]);
    }
}

// sums of `blocks` blocks of rows + tokens [first, first + tokens) times their runs, which start at tile `t0`
template <class T, bool scaled, bool zero> static void multiply(const Layout &l, const Run<T> *run, int blocks, int64_t t0, int count,
                                                                const Acts &a, int64_t first, int64_t tokens, float (*sums)[kSums][16]) {
    constexpr int most = T::two ? 1 : kAtOnce;
    for (int b = 0; b < blocks; b += most) {
        const bool all = blocks - b >= most;
        for (int64_t m = 0; m < tokens; m += kStep) {
            float(*const at[2])[16] = {sums[b] + m, sums[b + all * (most - 1)] + m};
            (all ? multiply_step<T, scaled, zero, most> : multiply_step<T, scaled, zero, 1>)(l, run + b, t0, count, a, first + m, tokens - m, at);
        }
    }
}
#endif

template <class T> static void many_tokens(const Layout &l, const Acts &a, float *y, int64_t ldy, const float *bias, int64_t from, int64_t to) {
    const typename T::Tables tables(l, kBiasedRun);
    const MemberTables members(l);
    const TileConfig config(l.group);
    struct Work {
        Run<T> run[kTogether];
        Cursor at[kBlocks];
        alignas(64) float sums[kBlocks][kSums][16];
    };
    auto *work = static_cast<Work *>(aligned_work(sizeof(Work)));
    const auto product = is_scaled<T>(l) ? l.zero_bytes ? multiply<T, true, true> : multiply<T, true, false>
                                         : l.zero_bytes ? multiply<T, false, true> : multiply<T, false, false>;
    for (int64_t b0 = from; b0 < to; b0 += kBlocks) {
        const int blocks = static_cast<int>(to - b0 < kBlocks ? to - b0 : kBlocks);
        for (int64_t first = 0; first < a.m; first += kSums) {
            const int64_t tokens = a.m - first < kSums ? a.m - first : kSums;
            for (int b = 0; b < blocks; b++) work->at[b] = Cursor(l, b0 + b);
            __builtin_memset(work->sums, 0, sizeof(work->sums[0]) * static_cast<size_t>(blocks));
            for (int64_t t0 = 0; t0 < l.tiles; t0 += kRun) {
                const int count = static_cast<int>(l.tiles - t0 < kRun ? l.tiles - t0 : kRun);
                for (int b = 0; b < blocks; b += kTogether) {
                    const int wide = blocks - b < kTogether ? blocks - b : kTogether;
                    for (int i = 0; i < wide; i++) decode_run<T>(tables, members, l, count, work->at[b + i], work->run[i]);
                    product(l, work->run, wide, t0, count, a, first, tokens, work->sums + b);
                }
            }
            for (int64_t m = 0; m < tokens; m++) {  // a token's results lie side by side
                const int64_t ahead = m + kAhead < tokens ? m + kAhead : m;  // … and those of the next in another page
                const float *there = y + (first + ahead) * ldy + b0 * kRows;
                for (int b = 0; b < blocks; b++) prefetch_far(reinterpret_cast<const uint8_t *>(there + b * kRows));
                for (int b = 0; b < blocks; b++) {
                    finish(l, b0 + b, Vec::load_floats(work->sums[b][m]), row_factor(l, b0 + b), y + (first + m) * ldy, bias);
                }
            }
        }
    }
}

}  // namespace NF_ISA
}  // namespace nf
