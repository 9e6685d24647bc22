// Many tokens: a run of tiles is decoded once into the first-level cache and multiplied by all tokens; arithmetic is the limit.
#pragma once
#include "gemv.h"

namespace nf {
namespace NF_ISA {

constexpr int kRun = 16;       // tiles decoded at a time: 16 KB of int8
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
constexpr int kStep = 4;  // tokens that share a load of weights

struct TileConfig {  // nothing to set up here
    explicit TileConfig(int) {}
    ~TileConfig() {}
};

// sums [kStep][16] + tokens [token, token + kStep) times the run that starts at tile `t0`
template <class T, bool scaled, bool zero> static void multiply_step(const Layout &l, const Run<T> &run, int64_t t0, int count, const Acts &a,
                                                                int64_t token, float (*sums)[16]) {
    const int per_group = T::count / l.sub;
    int64_t who[kStep];
    Floats acc[kStep];
    for (int i = 0; i < kStep; i++) {
        who[i] = token + i < a.m ? token + i : a.m - 1;
        acc[i] = Vec::load_floats(sums[i]);
    }
    for (int t = 0; t < count; t++) {
        const int8_t *x[kStep];
        for (int i = 0; i < kStep; i++) x[i] = a.codes + ((t0 + t) * a.m + who[i]) * l.tile;
        for (int s = 0; s < l.sub; s++) {
            const int64_t g = ((t0 + t) * l.sub + s) * a.m;
            Ints p[kStep], p2[kStep];
            for (int i = 0; i < kStep; i++) {
                p[i] = Vec::kBiased ? Vec::all(a.start + g + who[i]) : Vec::ints(0);
                if constexpr (T::two) p2[i] = p[i];
            }
            for (int j = s * per_group; j < (s + 1) * per_group; j++) {
                const Bytes w = Vec::load(run.first[t][j]);
                for (int i = 0; i < kStep; i++) p[i] = Vec::dot(p[i], w, x[i] + 4 * j);
                if constexpr (T::two) {
                    const Bytes w2 = Vec::load(run.second[t][j]);
                    for (int i = 0; i < kStep; i++) p2[i] = Vec::dot(p2[i], w2, x[i] + 4 * j);
                }
            }
            const Factors &f = run.group[t * l.sub + s];
            for (int i = 0; i < kStep; i++) {
                acc[i] = add_group<T>(f, scaled, zero, p[i], p2[i], a.scale[g + who[i]], a.sum[g + who[i]], acc[i]);
            }
        }
    }
    for (int i = 0; i < kStep; i++) Vec::store_floats(sums[i], acc[i]);
}

// sums of `blocks` blocks of rows + tokens [first, first + tokens) times their runs, which start at tile `t0`
template <class T, bool scaled, bool zero> static void multiply(const Layout &l, const Run<T> *run, int blocks, int64_t t0, int count,
                                                                const Acts &a, int64_t first, int64_t tokens, float (*sums)[kSums][16]) {
    for (int b = 0; b < blocks; b++) {
        for (int64_t m = 0; m < tokens; m += kStep) multiply_step<T, scaled, zero>(l, run[b], t0, count, a, first + m, sums[b] + m);
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
