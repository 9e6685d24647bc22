// The kernels of one instruction set. This file is compiled once for each, with -DNF_ISA=<name> and the compiler's flags for
// it, and exports one table of functions. Only plain loops and intrinsics here: an inline function of the standard library
// compiled for one processor could be linked into the code for another.
//
// int8 results are the same bits on every instruction set, for every number of threads and of tokens: sums of a group are
// integers; groups are added in order by one fused multiply-add each, acc = fma(P, weight scale · activation scale, acc).
#include "kernels.h"
#include "vec.h"
#include "tile.h"
#include "quantize.h"
#include "gemv.h"
#include "gemm.h"
#include "exact.h"
#include "ops.inc"

namespace nf {
namespace NF_ISA {

// The kinds of tiles that are compiled. `log` is rounded up to the next one that is here.
template <class F> bool with_tile(const Layout &l, F &&f) {
    using M = Members;
    int log = 4;
    while (1 << log < l.entries) log++;
    switch (l.member_kind) {
        case M::none:
            switch (l.codes) {
                case Codes::b2: return f(Tile<Codes::b2, M::none, 4>{});
                case Codes::b3: return f(Tile<Codes::b3, M::none, 4>{});
                case Codes::b4: return f(Tile<Codes::b4, M::none, 4>{});
                case Codes::b5: return f(Tile<Codes::b5, M::none, 5>{});
                case Codes::b6: return f(Tile<Codes::b6, M::none, 6>{});
                case Codes::b8: return f(Tile<Codes::b8, M::none, 8>{});
                case Codes::triple: return f(Tile<Codes::triple, M::none, 6>{});
            }
            return false;
        case M::quad:
            switch (l.codes) {
                case Codes::b2: return f(Tile<Codes::b2, M::quad, 4>{});
                case Codes::b3: return f(Tile<Codes::b3, M::quad, 4>{});
                case Codes::b4: return f(Tile<Codes::b4, M::quad, 5>{});
                case Codes::b5: return f(Tile<Codes::b5, M::quad, 6>{});
                default: return false;
            }
        case M::group:
            if (l.two_lane) return f(Tile<Codes::b4, M::group, 4, true>{});
            switch (l.codes) {
                case Codes::b2: return log <= 6 ? f(Tile<Codes::b2, M::group, 6>{}) : f(Tile<Codes::b2, M::group, 8>{});
                case Codes::b3: return log <= 6 ? f(Tile<Codes::b3, M::group, 6>{}) : f(Tile<Codes::b3, M::group, 8>{});
                case Codes::b4:
                    return log <= 6 ? f(Tile<Codes::b4, M::group, 6>{}) : log <= 8 ? f(Tile<Codes::b4, M::group, 8>{})
                                                                                   : f(Tile<Codes::b4, M::group, 9>{});
                case Codes::b5: return log <= 8 ? f(Tile<Codes::b5, M::group, 8>{}) : f(Tile<Codes::b5, M::group, 9>{});
                case Codes::b6: return log <= 8 ? f(Tile<Codes::b6, M::group, 8>{}) : f(Tile<Codes::b6, M::group, 9>{});
                case Codes::b8: return f(Tile<Codes::b8, M::group, 9>{});
                default: return false;
            }
    }
    return false;
}

static void apply_int8(const Layout &l, const Acts &x, float *y, int64_t ldy, const float *bias, int64_t from, int64_t to) {
    with_tile(l, [&](auto tile) {
        using T = decltype(tile);
        if (x.m <= kFewTokens) few_tokens<T>(l, x, y, ldy, bias, from, to);
        else many_tokens<T>(l, x, y, ldy, bias, from, to);
        return true;
    });
}

static void apply_exact(const Layout &l, const Acts &x, float *y, int64_t ldy, const float *bias, int64_t from, int64_t to) {
    with_tile(l, [&](auto tile) {
        exact_tokens<decltype(tile)>(l, x, y, ldy, bias, from, to);
        return true;
    });
}

static int64_t read(const uint8_t *p, int64_t bytes) {
    Ints sum[4] = {Vec::ints(0), Vec::ints(0), Vec::ints(0), Vec::ints(0)};
    for (int64_t i = 0; i + 256 <= bytes; i += 256) {
        for (int j = 0; j < 4; j++) {
            prefetch_far(p + i + kFar + 64 * j);
            prefetch(p + i + kNear + 64 * j);
            sum[j] = Vec::add(sum[j], Vec::load_ints(reinterpret_cast<const int32_t *>(p + i + 64 * j)));
        }
    }
    alignas(64) int32_t out[16];
    Vec::store_ints(out, Vec::add(Vec::add(sum[0], sum[1]), Vec::add(sum[2], sum[3])));
    int64_t total = 0;
    for (int i = 0; i < 16; i++) total += out[i];
    return total;
}

}  // namespace NF_ISA

NF_DEFINE_TABLE(Kernels, kernels, NF_ISA::quantize, NF_ISA::apply_int8, NF_ISA::apply_exact, NF_ISA::read, NF_ISA::ops())

}  // namespace nf
