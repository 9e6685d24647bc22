// Applying matrices of trellis codes (trellis.h): a row of tiles at a time, 64 rows, strip by strip of four columns. A strip becomes
// four vectors of 16 rows × 4 columns, which is what the kernels of other formats multiply too.
#pragma once
#include "exact.h"
#include "trellis.h"

namespace nf {
namespace NF_ISA {

constexpr int kParts = kTileRows / kRows;  // row blocks of a tile
constexpr int kStrips = 16;                // strips of 64 columns, which share a scale of activations
using Bytewise = Tile<Codes::b8, Members::none, 8>;  // the tile that the products of gemm.h see
constexpr uint8_t kFlip = Vec::kBiased ? 0 : 0x80;   // from 128 + level to what dot() takes

static inline Bytes flipped(Bytes levels) {
#if defined(__AVX512F__)
    return _mm512_xor_si512(levels, _mm512_set1_epi8(static_cast<char>(0x80)));
#else
    alignas(64) uint8_t bytes[64];
    Vec::store(bytes, levels);
    for (int i = 0; i < 64; i++) bytes[i] ^= 0x80;
    return Vec::load(bytes);
#endif
}

#if defined(__AVX512VBMI__) && defined(__GFNI__)
// The four vectors of a tile. Qword q of block b starts at byte (8 b + q) k of the circle: one permutation brings each qword its
// bytes, one multishift cuts eight windows of eight bits out of it, an affine map turns windows into indices.
template <int k, TrellisLevels::Kind kind, int windows> struct Decoder {
    __m512i spread[k == 2 ? 4 : 2], low_shifts, high_shifts, low, high, table[kind == TrellisLevels::many ? 4 : 2];
    const uint8_t *base = nullptr;

    explicit Decoder(const TrellisLayout &t) {
        alignas(64) uint8_t bytes[64];
        for (int b = 0; b < (k == 2 ? 4 : 2); b++) {
            for (int i = 0; i < 64; i++) {
                int at = (k == 2 ? 16 * b : 0) + i / 8 * k + i % 8;  // in what is loaded for the block
                if (k == 3 && b == 1 && at >= 24) at += 8;          // the last block: 24 bytes, eight of the next tile, the first bytes
                bytes[i] = static_cast<uint8_t>(at & 63);
            }
            spread[b] = _mm512_load_si512(bytes);
        }
        for (int i = 0; i < 64; i++) bytes[i] = static_cast<uint8_t>(i % 8 * k);
        low_shifts = _mm512_load_si512(bytes);
        high_shifts = _mm512_add_epi8(low_shifts, _mm512_set1_epi8(8));
        low = _mm512_set1_epi64(static_cast<long long>(t.low));
        high = _mm512_set1_epi64(static_cast<long long>(t.high));
        for (size_t i = 0; i < sizeof table / 64; i++) table[i] = _mm512_load_si512(t.table + 64 * i);
    }

    template <int b> Bytes part(const uint8_t *p) const {
        __m512i bytes;
        if constexpr (k == 2) {
            bytes = _mm512_loadu_si512(p);
        } else if constexpr (b < 3) {
            bytes = _mm512_loadu_si512(p + 8 * k * b);
        } else {  // around the seam
            const __m256i first = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
            const __m256i last = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p + 24 * k));
            bytes = _mm512_inserti64x4(_mm512_castsi256_si512(last), first, 1);
        }
        bytes = _mm512_permutexvar_epi8(spread[k == 2 ? b : b == 3 && k == 3], bytes);
        __m512i index = _mm512_multishift_epi64_epi8(low_shifts, bytes);
        if constexpr (windows > 0) index = _mm512_gf2p8affine_epi64_epi8(index, low, 0);
        if constexpr (windows > 1) {
            index = _mm512_xor_si512(index, _mm512_gf2p8affine_epi64_epi8(_mm512_multishift_epi64_epi8(high_shifts, bytes), high, 0));
        }
        if constexpr (kind == TrellisLevels::few) return _mm512_permutexvar_epi8(index, table[0]);
        const __mmask64 negative = _mm512_movepi8_mask(index);
        if constexpr (kind == TrellisLevels::few_signed) {
            const __m512i level = _mm512_permutexvar_epi8(index, table[0]);
            return _mm512_mask_sub_epi8(level, negative, _mm512_setzero_si512(), level);  // 256 − (128 + level)
        } else {
            const __m512i level = _mm512_permutex2var_epi8(table[0], index, table[1]);
            if constexpr (kind == TrellisLevels::many_signed) {
                return _mm512_mask_sub_epi8(level, negative, _mm512_setzero_si512(), level);
            } else {
                return _mm512_mask_blend_epi8(negative, level, _mm512_permutex2var_epi8(table[2], index, table[3]));
            }
        }
    }
    void open(const uint8_t *p) { base = p; }
    template <int b> Bytes get() const { return part<b>(base); }
};

template <class F> static void with_decoder(const TrellisLayout &t, F &&f) {
    const auto kinds = [&](auto k, auto windows) {
        using K = TrellisLevels;
        constexpr int bits = decltype(k)::n, w = decltype(windows)::n;
        const auto with = [&](auto &&decoder) { f(decoder); };
        switch (t.kind) {
            case K::few: return with(Decoder<bits, K::few, w>(t));
            case K::few_signed: return with(Decoder<bits, K::few_signed, w>(t));
            case K::many_signed: return with(Decoder<bits, K::many_signed, w>(t));
            case K::many: return with(Decoder<bits, K::many, w>(t));
        }
    };
    const auto widths = [&](auto k) {
        if (t.windows == 0 && t.kind == TrellisLevels::many_signed) {
            Decoder<decltype(k)::n, TrellisLevels::many_signed, 0> decoder(t);
            f(decoder);
        } else {
            t.windows == 2 ? kinds(k, Count<2>{}) : kinds(k, Count<1>{});
        }
    };
    t.k == 2 ? widths(Count<2>{}) : t.k == 3 ? widths(Count<3>{}) : widths(Count<4>{});
}
#else
// The four vectors of a tile through a table of all states: correct everywhere.
template <int k> struct Decoder {
    const uint8_t *state;
    uint32_t mask;
    alignas(64) uint8_t levels[kTileWeights];

    explicit Decoder(const TrellisLayout &t) : state(t.state), mask((1u << t.bits) - 1) {}
    void open(const uint8_t *p) {
        uint8_t circle[32 * k + 8];
        __builtin_memcpy(circle, p, 32 * k);
        __builtin_memcpy(circle + 32 * k, p, 8);
        for (int q = 0; q < kTileWeights / 8; q++) {  // eight symbols fill k bytes
            uint64_t window;
            __builtin_memcpy(&window, circle + q * k, 8);
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
            window = __builtin_bswap64(window);
#endif
            for (int i = 0; i < 8; i++) levels[8 * q + i] = state[window >> (i * k) & mask] ^ kFlip;
        }
    }
    template <int b> Bytes get() const { return Vec::load(levels + 64 * b); }
};

template <class F> static void with_decoder(const TrellisLayout &t, F &&f) {
    const auto with = [&](auto &&decoder) { f(decoder); };
    t.k == 2 ? with(Decoder<2>(t)) : t.k == 3 ? with(Decoder<3>(t)) : with(Decoder<4>(t));
}
#endif

// Tiles that were decoded beforehand.
struct Decoded {
    const uint8_t *base = nullptr;
    void open(const uint8_t *p) { base = p; }
    template <int b> Bytes get() const { return kFlip ? flipped(Vec::load(base + 64 * b)) : Vec::load(base + 64 * b); }
};

// The strips [from, to) of a row of tiles: f(decoder, strip) with a decoder opened there.
template <class D, class F> static inline void each_strip(const TrellisLayout &t, D &decoder, int64_t row, int64_t from, int64_t to, F &&f) {
    Decoded decoded;
    const int64_t stop = row < t.whole ? (to < t.strips ? to : t.strips) : from;
    const uint8_t *p = t.stream + (row * t.strips + from) * t.tile_bytes;
    for (int64_t s = from; s < stop; s++, p += t.tile_bytes) {
        t.k > 2 ? ask<128>(p, t.ahead) : ask<64>(p, t.ahead);
        decoder.open(p);
        f(decoder, s);
    }
    for (int64_t s = stop; s < to; s++) {
        decoded.open(row < t.whole ? t.side + row * kTileWeights : t.bottom + s * kTileWeights);
        f(decoded, s);
    }
}

static inline int64_t all_strips(const TrellisLayout &t) { return t.strips + (t.tail != 0); }

static inline void finish_part(const Layout &l, int64_t row, int part, Floats acc, float *y, const float *bias) {
    const int64_t block = row * kParts + part;
    if (block * kRows < l.n) finish(l, block, acc, row_factor(l, block), y, bias);
}

template <int tokens, class D> static void row_of_tiles(const Layout &l, D &decoder, const Acts &a, int64_t row, const int64_t *token,
                                                       Floats (*acc)[kParts]) {
    const TrellisLayout &t = *l.trellis;
    for (int i = 0; i < tokens; i++) {
        for (int b = 0; b < kParts; b++) acc[i][b] = Vec::floats(0.0f);
    }
    for (int64_t g = 0; g < l.tiles; g++) {
        Ints sum[tokens][kParts];
        const int8_t *x[tokens];
        for (int i = 0; i < tokens; i++) {
            x[i] = a.codes + (g * a.m + token[i]) * 64;
            for (int b = 0; b < kParts; b++) sum[i][b] = Vec::kBiased ? Vec::all(a.start + g * a.m + token[i]) : Vec::ints(0);
        }
        const int64_t from = g * kStrips, there = all_strips(t), to = from + kStrips < there ? from + kStrips : there;
        each_strip(t, decoder, row, from, to, [&](const auto &d, int64_t s) __attribute__((always_inline)) {
            const Bytes w[kParts] = {d.template get<0>(), d.template get<1>(), d.template get<2>(), d.template get<3>()};
            for (int i = 0; i < tokens; i++) {
                for (int b = 0; b < kParts; b++) sum[i][b] = Vec::dot(sum[i][b], w[b], x[i] + 4 * (s - from));
            }
        });
        for (int i = 0; i < tokens; i++) {
            const Floats scale = Vec::floats(a.scale[g * a.m + token[i]]);
            for (int b = 0; b < kParts; b++) acc[i][b] = Vec::fma(Vec::to_floats(sum[i][b]), scale, acc[i][b]);
        }
    }
}

static void trellis_few(const Layout &l, const Acts &a, float *y, int64_t ldy, const float *bias, int64_t from, int64_t to) {
    with_decoder(*l.trellis, [&](auto &decoder) {
        for (int64_t row = from; row < to; row++) {
            int64_t m = 0;
            if constexpr (Vec::kTokens > 1) {
                for (; a.m - m > 1; m += Vec::kTokens) {  // the last tokens are repeated to make the number full
                    int64_t token[Vec::kTokens];
                    Floats acc[Vec::kTokens][kParts];
                    for (int i = 0; i < Vec::kTokens; i++) token[i] = m + i < a.m ? m + i : a.m - 1;
                    row_of_tiles<Vec::kTokens>(l, decoder, a, row, token, acc);
                    for (int i = 0; i < Vec::kTokens && m + i < a.m; i++) {
                        for (int b = 0; b < kParts; b++) finish_part(l, row, b, acc[i][b], y + (m + i) * ldy, bias);
                    }
                }
            }
            for (; m < a.m; m++) {
                Floats acc[1][kParts];
                row_of_tiles<1>(l, decoder, a, row, &m, acc);
                for (int b = 0; b < kParts; b++) finish_part(l, row, b, acc[0][b], y + m * ldy, bias);
            }
        }
    });
}

static void trellis_many(const Layout &l, const Acts &a, float *y, int64_t ldy, const float *bias, int64_t from, int64_t to) {
    constexpr int kTurns = kBlocks / kParts;  // rows of tiles that take turns at a run of columns
    struct Work {
        Run<Bytewise> run[kParts];
        alignas(64) float sums[kBlocks][kSums][16];
    };
    auto *work = static_cast<Work *>(aligned_work(sizeof(Work)));
    const TileConfig config(l.group);
    with_decoder(*l.trellis, [&](auto &decoder) {
        for (int64_t r0 = from; r0 < to; r0 += kTurns) {
            const int rows = static_cast<int>(to - r0 < kTurns ? to - r0 : kTurns);
            for (int64_t first = 0; first < a.m; first += kSums) {
                const int64_t tokens = a.m - first < kSums ? a.m - first : kSums;
                __builtin_memset(work->sums, 0, sizeof(work->sums[0]) * static_cast<size_t>(rows * kParts));
                for (int64_t t0 = 0; t0 < l.tiles; t0 += kRun) {
                    const int count = static_cast<int>(l.tiles - t0 < kRun ? l.tiles - t0 : kRun);
                    const int64_t start = t0 * kStrips, there = all_strips(*l.trellis);
                    const int64_t stop = start + count * kStrips < there ? start + count * kStrips : there;
                    for (int r = 0; r < rows; r++) {
                        each_strip(*l.trellis, decoder, r0 + r, start, stop, [&](const auto &d, int64_t s) __attribute__((always_inline)) {
                            const int t = static_cast<int>((s - start) / kStrips), j = static_cast<int>((s - start) % kStrips);
                            const Bytes w[kParts] = {d.template get<0>(), d.template get<1>(), d.template get<2>(), d.template get<3>()};
                            for (int b = 0; b < kParts; b++) {
                                Vec::store(work->run[b].first[t][j], kBiasedRun == Vec::kBiased ? w[b] : flipped(w[b]));
                            }
                        });
                        for (int64_t s = stop; s < start + count * kStrips; s++) {  // beyond the columns: activations are zero
                            for (int b = 0; b < kParts; b++) {
                                Vec::store(work->run[b].first[(s - start) / kStrips][(s - start) % kStrips], Vec::mask(0));
                            }
                        }
                        multiply<Bytewise, false, false>(l, work->run, kParts, t0, count, a, first, tokens, work->sums + r * kParts);
                    }
                }
                for (int64_t m = 0; m < tokens; m++) {
                    for (int b = 0; b < rows * kParts; b++) {
                        finish_part(l, r0 + b / kParts, b % kParts, Vec::load_floats(work->sums[b][m]), y + (first + m) * ldy, bias);
                    }
                }
            }
        }
    });
}

static void trellis_int8(const Layout &l, const Acts &a, float *y, int64_t ldy, const float *bias, int64_t from, int64_t to) {
    a.m <= kFewTokens ? trellis_few(l, a, y, ldy, bias, from, to) : trellis_many(l, a, y, ldy, bias, from, to);
}

// Exact activations. Column c of a row is added to partial sum c % 4, as in exact.h.
static void trellis_exact(const Layout &l, const Acts &a, float *y, int64_t ldy, const float *bias, int64_t from, int64_t to) {
    constexpr int64_t kTokensAtATime = 64;
    struct Work {
        alignas(64) float w[kParts][64][16];  // 64 columns of a row of tiles
        alignas(64) float sums[kTokensAtATime][kParts][4][16];
        alignas(64) uint8_t bytes[64];
    };
    auto *work = static_cast<Work *>(aligned_work(sizeof(Work)));
    with_decoder(*l.trellis, [&](auto &decoder) {
        for (int64_t row = from; row < to; row++) {
            for (int64_t first = 0; first < a.m; first += kTokensAtATime) {
                const int64_t tokens = a.m - first < kTokensAtATime ? a.m - first : kTokensAtATime;
                __builtin_memset(work->sums, 0, sizeof(work->sums[0]) * static_cast<size_t>(tokens));
                for (int64_t g = 0; g < l.tiles; g++) {
                    const int64_t start = g * kStrips, there = all_strips(*l.trellis);
                    const int64_t stop = start + kStrips < there ? start + kStrips : there;
                    const auto spread = [&](int b, int64_t s, Bytes levels) {
                        Vec::store(work->bytes, levels);
                        float *w = work->w[b][4 * (s - start)];
                        for (int c = 0; c < 4; c++) {
                            for (int r = 0; r < 16; r++) w[16 * c + r] = static_cast<float>(static_cast<int>(work->bytes[4 * r + c] ^ kFlip) - 128);
                        }
                    };
                    each_strip(*l.trellis, decoder, row, start, stop, [&](const auto &d, int64_t s) {
                        spread(0, s, d.template get<0>());
                        spread(1, s, d.template get<1>());
                        spread(2, s, d.template get<2>());
                        spread(3, s, d.template get<3>());
                    });
                    for (int64_t m = 0; m < tokens; m++) {
                        const float *x = a.exact + (g * a.m + first + m) * 64;
                        for (int b = 0; b < kParts; b++) {
                            Floats acc[4];
                            for (int q = 0; q < 4; q++) acc[q] = Vec::load_floats(work->sums[m][b][q]);
                            for (int64_t c = 0; c < 4 * (stop - start); c += 4) {
                                for (int q = 0; q < 4; q++) acc[q] = Vec::fma(Vec::load_floats(work->w[b][c + q]), Vec::floats(x[c + q]), acc[q]);
                            }
                            for (int q = 0; q < 4; q++) Vec::store_floats(work->sums[m][b][q], acc[q]);
                        }
                    }
                }
                for (int64_t m = 0; m < tokens; m++) {
                    for (int b = 0; b < kParts; b++) {
                        Floats acc[4];
                        for (int q = 0; q < 4; q++) acc[q] = Vec::load_floats(work->sums[m][b][q]);
                        finish_part(l, row, b, Vec::add(Vec::add(acc[0], acc[1]), Vec::add(acc[2], acc[3])), y + (first + m) * ldy, bias);
                    }
                }
            }
        }
    });
}

}  // namespace NF_ISA
}  // namespace nf
