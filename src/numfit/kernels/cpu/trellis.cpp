// Encoding and decoding trellises: the C interface of trellis.h, and how tiles are dealt out.
//
// Tail-biting in its cheap form: the cheapest free path over the weights on both sides of the seam says in which state the
// circle closes; one path over all weights starts and ends there. Streams of a few bits are searched exhaustively.
#include "trellis.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "kernels.h"

namespace nf {

constexpr int kExhaustive = 12;  // bits of the longest stream of which every one is tried; at least L - k

const TrellisKernels &trellis_kernels() { return NF_CHOSEN_TABLE(trellis); }

namespace {

int refuse(char *error, const char *format, long long a = 0, long long b = 0) {
    std::snprintf(error, NF_ERROR, format, a, b);
    return 1;
}

bool possible(const nf_trellis *c) { return c && c->k >= 2 && c->k <= 4 && c->bits >= 2 * c->k && c->bits - c->k >= 4 && c->bits <= kTrellisBits; }

// A tile: where it lies and how large it is.
struct Tile {
    int64_t row, col;
    int rows, cols;
    int weights() const { return rows * cols; }
};

Tile tile_at(int64_t rows, int64_t cols, int64_t index) {
    const int64_t strips = (cols + kTileCols - 1) / kTileCols, r = index / strips * kTileRows, c = index % strips * kTileCols;
    return {r, c, static_cast<int>(std::min<int64_t>(kTileRows, rows - r)), static_cast<int>(std::min<int64_t>(kTileCols, cols - c))};
}

int64_t tiles_of(int64_t rows, int64_t cols) {
    return (rows + kTileRows - 1) / kTileRows * ((cols + kTileCols - 1) / kTileCols);
}

// States of a circle of n symbols, in the order of weights.
void states_of(const uint8_t *symbols, int n, int k, int bits, uint16_t *state) {
    uint32_t s = 0;
    for (int i = (bits + k - 1) / k - 1; i > 0; i--) s = s << k | symbols[(n - 1 + i) % n];
    for (int p = n - 1; p >= 0; p--) {
        s = s << k | symbols[p];
        state[p] = static_cast<uint16_t>(s & ((1u << bits) - 1));
    }
}

int cost_of(int k, int w, int level) {
    const auto clamp = [](int x) { return std::max(-32768, std::min(32767, x)); };
    int d = clamp(w - level);
    for (int i = 2; i < k; i++) d = clamp(2 * d);
    return (d * d + 16384) >> 15;
}

void exhaust(const nf_trellis &code, const int16_t *w, int n, uint8_t *symbols) {
    uint16_t state[kTrellisBits];
    uint8_t trial[kTrellisBits];
    int64_t best = INT64_MAX;
    for (uint32_t all = 0; all < 1u << (n * code.k); all++) {
        for (int p = 0; p < n; p++) trial[p] = static_cast<uint8_t>(all >> (p * code.k) & ((1u << code.k) - 1));
        states_of(trial, n, code.k, code.bits, state);
        int64_t cost = 0;
        for (int p = 0; p < n; p++) cost += cost_of(code.k, w[p], code.table[state[p]]);
        if (cost < best) best = cost, std::copy(trial, trial + n, symbols);
    }
}

int16_t to_int16(float x) {  // to the nearest, ties to even
    x = x > 32767.0f ? 32767.0f : x < -32767.0f ? -32767.0f : x;
    return static_cast<int16_t>(std::nearbyint(x));
}

void encode_tile(const nf_trellis &code, const TrellisCosts &costs, const int16_t *w, int n, uint8_t *symbols) {
    const int k = code.k;
    if (n * k <= kExhaustive) {
        exhaust(code, w, n, symbols);
        return;
    }
    int16_t time[kTileWeights], seam[2 * kTileWeights];
    uint16_t overlap[2 * kTileWeights + 1];
    std::reverse_copy(w, w + n, time);
    const int64_t most = costs.overlaps * (2 * kTileWeights + 1) + 64;
    auto *scratch = static_cast<uint16_t *>(aligned_work(static_cast<size_t>(most) * sizeof(uint16_t)));
    const auto path = trellis_kernels().path;
    const int h = (48 + k - 1) / k + 8;
    for (int i = 0; i < 2 * h; i++) seam[i] = time[(i + n * h - h) % n];  // short circles several times over
    path(costs, seam, 2 * h, -1, -1, scratch, overlap);
    const int32_t closing = overlap[h];
    path(costs, time, n, closing, closing, scratch, overlap);
    for (int p = 0; p < n; p++) symbols[p] = static_cast<uint8_t>(overlap[n - p] & ((1 << k) - 1));
}

}  // namespace
}  // namespace nf

using namespace nf;

NF_API int nf_trellis_encode(const nf_trellis *code, const float *w, int64_t rows, int64_t cols, int64_t ldw, const float *inverse,
                             uint8_t *symbols, int8_t *values, int64_t ld, char *error) try {
    if (!possible(code) || !code->table || (values && !code->levels)) return refuse(error, "there is no such trellis");
    if (rows < 0 || cols < 0 || ldw < cols || ld < cols) return refuse(error, "rows of %lld weights and %lld symbols are too short", ldw, ld);
    TrellisCosts costs = {code->k, code->bits, int64_t{1} << (code->bits - code->k), 0, nullptr};
    costs.stride = costs.overlaps + kTablePad;
    std::vector<int16_t> table(static_cast<size_t>(costs.stride) << code->k);
    for (int64_t j = 0; j < 1 << code->k; j++) {
        std::copy_n(code->table + j * costs.overlaps, costs.overlaps, table.data() + j * costs.stride);
    }
    costs.table = table.data();
    parallel(tiles_of(rows, cols), [&](int64_t i) {
        const Tile t = tile_at(rows, cols, i);
        int16_t v[kTileWeights];
        uint8_t best[kTileWeights];
        uint16_t state[kTileWeights];
        for (int p = 0; p < t.weights(); p++) {
            const int64_t r = t.row + p / t.cols;
            v[p] = to_int16(w[r * ldw + t.col + p % t.cols] * inverse[r]);
        }
        encode_tile(*code, costs, v, t.weights(), best);
        if (values) states_of(best, t.weights(), code->k, code->bits, state);
        for (int p = 0; p < t.weights(); p++) {
            const int64_t at = (t.row + p / t.cols) * ld + t.col + p % t.cols;
            symbols[at] = best[p];
            if (values) values[at] = code->levels[state[p]];
        }
    });
    return 0;
} catch (...) {
    return caught(error, "to encode this tensor");
}

NF_API int nf_trellis_decode(const nf_trellis *code, const uint8_t *symbols, int64_t rows, int64_t cols, int8_t *values, char *error) try {
    if (!possible(code) || !code->levels) return refuse(error, "there is no such trellis");
    const int64_t tiles = tiles_of(rows, cols), chunk = 16;
    parallel((tiles + chunk - 1) / chunk, [&](int64_t c) {
        for (int64_t i = c * chunk; i < std::min(tiles, (c + 1) * chunk); i++) {
            const Tile t = tile_at(rows, cols, i);
            uint8_t own[kTileWeights];
            uint16_t state[kTileWeights];
            for (int p = 0; p < t.weights(); p++) own[p] = symbols[(t.row + p / t.cols) * cols + t.col + p % t.cols];
            states_of(own, t.weights(), code->k, code->bits, state);
            for (int p = 0; p < t.weights(); p++) values[(t.row + p / t.cols) * cols + t.col + p % t.cols] = code->levels[state[p]];
        }
    });
    return 0;
} catch (...) {
    return caught(error, "to decode this tensor");
}

// -- matrices for the kernels ---------------------------------------------------------------------------------------------------

namespace nf {
namespace {

// Bit i of the result is the parity of byte & masks[i].
uint64_t affine(const uint32_t *masks, int shift) {
    uint64_t matrix = 0;
    for (int i = 0; i < 8; i++) matrix |= static_cast<uint64_t>(masks[i] >> shift & 255) << (8 * (7 - i));
    return matrix;
}

bool antisymmetric(const nf_trellis_matrix &m, uint32_t change) {
    const uint32_t count = 1u << (m.hashed ? m.hashed : m.bits);
    for (uint32_t i = 0; i < count; i++) {
        if (m.levels[i ^ change] != -m.levels[i]) return false;
    }
    return true;
}

// How kernels find levels: the table that is looked up in, and the linear map (bit i of an index from masks[i]) that leads there.
void find_levels(const nf_trellis_matrix &m, TrellisLevels &t) {
    using K = TrellisLevels;
    uint32_t masks[8] = {};
    const int width = m.hashed ? m.hashed : m.bits;
    for (int i = 0; i < width; i++) masks[i] = m.hashed ? m.masks[width - 1 - i] : 1u << i;
    uint32_t change = 0;  // what is added to an index to negate its level
    for (uint32_t c = 1u << width; --c > 0 && !change;) change = antisymmetric(m, c) ? c : 0;
    std::vector<uint32_t> order;  // index of the full table for each entry
    if (change && width > 6) {
        int sign = 0;  // the bit that tells an index from its opposite
        while (!(change >> sign & 1)) sign++;
        const uint32_t negative = masks[sign];
        uint32_t folded[8] = {};
        int n = 0;
        for (int i = 0; i < width; i++) {
            if (i != sign) folded[n++] = masks[i] ^ (change >> i & 1 ? negative : 0);
        }
        std::copy_n(folded, 7, masks);
        masks[7] = negative;
        for (uint32_t e = 0; e < 1u << (width - 1); e++) order.push_back((e >> sign << (sign + 1)) | (e & ((1u << sign) - 1)));
        t.kind = width == 7 ? K::few_signed : K::many_signed;
    } else {
        for (uint32_t e = 0; e < 1u << width; e++) order.push_back(e);
        t.kind = width <= 6 ? K::few : K::many;
    }
    for (size_t i = 0; i < sizeof t.table; i++) t.table[i] = static_cast<uint8_t>(128 + m.levels[order[i % order.size()]]);
    t.low = affine(masks, 0), t.high = affine(masks, 8);
    t.windows = m.bits > 8 ? 2 : t.low == 0x0102040810204080u ? 0 : 1;
    for (uint32_t s = 0; s < 1u << m.bits; s++) {
        uint32_t index = s;
        if (m.hashed) {
            index = 0;
            for (int i = 0; i < m.hashed; i++) index = index << 1 | (__builtin_popcount(s & m.masks[i]) & 1);
        }
        t.state[s] = static_cast<uint8_t>(128 + m.levels[index]);
    }
}

// Levels of a tile of n weights, 128 + level.
void decode_tile(const TrellisLayout &t, const uint8_t *stream, int n, uint8_t *out) {
    uint8_t symbols[kTileWeights];
    uint16_t state[kTileWeights];
    for (int p = 0; p < n; p++) {
        const int bit = p * t.k;
        uint32_t two = stream[bit / 8];
        if (bit % 8 + t.k > 8) two |= static_cast<uint32_t>(stream[bit / 8 + 1]) << 8;
        symbols[p] = static_cast<uint8_t>(two >> bit % 8 & ((1u << t.k) - 1));
    }
    states_of(symbols, n, t.k, t.bits, state);
    for (int p = 0; p < n; p++) out[p] = t.state[state[p]];
}

// A short tile decoded into the places of a whole one.
void decode_short(const TrellisLayout &t, const uint8_t *stream, int rows, int cols, uint8_t *out) {
    uint8_t levels[kTileWeights];
    decode_tile(t, stream, rows * cols, levels);
    std::memset(out, 128, kTileWeights);
    for (int r = 0; r < rows; r++) std::copy_n(levels + r * cols, cols, out + kTileCols * r);
}

}  // namespace

void gather_trellis(const Layout &l, int64_t row, float *out) {
    const TrellisLayout &t = *l.trellis;
    const int64_t tile = row / kTileRows;
    const int r = static_cast<int>(row % kTileRows);
    const float scale = l.row_scale[row];
    uint8_t levels[kTileWeights];
    for (int64_t c = 0; c < l.k; c++) {
        const int64_t s = c / kTileCols;
        if (c % kTileCols == 0) {
            if (tile >= t.whole) {
                std::copy_n(t.bottom + s * kTileWeights, kTileWeights, levels);
            } else if (s >= t.strips) {
                std::copy_n(t.side + tile * kTileWeights, kTileWeights, levels);
            } else {  // the four windows of the row
                const uint8_t *stream = t.stream + (tile * t.strips + s) * t.tile_bytes;
                for (int i = 0; i < kTileCols; i++) {
                    const int64_t bit = (kTileCols * r + i) * t.k;
                    uint32_t three = 0;
                    for (int b = 0; b < 3; b++) three |= static_cast<uint32_t>(stream[(bit / 8 + b) % t.tile_bytes]) << (8 * b);
                    levels[kTileCols * r + i] = t.state[three >> bit % 8 & ((1u << t.bits) - 1)];
                }
            }
        }
        out[c] = scale * (static_cast<float>(levels[kTileCols * r + c % kTileCols] - 128) * l.c1[0]);
    }
}

}  // namespace nf

NF_API nf_linear *nf_trellis_repack(const nf_trellis_matrix *m, char *error) try {
    const nf_trellis some = m ? nf_trellis{m->k, m->bits, nullptr, nullptr} : nf_trellis{};
    if (!m || !possible(&some) || !m->levels || !m->codes || !m->scale || m->hashed < 0 || m->hashed > 8 || (m->hashed && !m->masks) ||
        (!m->hashed && m->bits != 8)) {
        return refuse(error, "there is no such trellis"), nullptr;
    }
    if (m->rows < 1 || m->cols < 1) return refuse(error, "a matrix of %lld rows and %lld columns is empty", m->rows, m->cols), nullptr;
    for (int i = 0; i < 1 << (m->hashed ? m->hashed : m->bits); i++) {
        if (m->levels[i] == -128) return refuse(error, "a level is -128, and they begin at -127"), nullptr;
    }
    for (int64_t r = 0; r < m->rows; r++) {
        if (!std::isfinite(m->scale[r])) return refuse(error, "the scale of row %lld is NaN or Inf; the file is damaged", r), nullptr;
    }
    std::unique_ptr<nf_linear, void (*)(nf_linear *)> linear(new nf_linear(), nf_free);
    nf_linear &l = *linear;
    l.n = m->rows, l.k = m->cols, l.bits = m->k, l.members = 1;
    l.block = l.unit = m->cols, l.scale_kind = NF_ROW, l.has_member = l.has_zero = false;
    l.codes = Codes::b8, l.member_kind = Members::none, l.width = 8;
    l.tile = l.group = 64, l.sub = 1, l.tiles = (l.k + 63) / 64, l.tiles_per_block = l.tiles;
    l.row_blocks = (l.n + kTileRows - 1) / kTileRows;
    l.code_bytes = l.quad_bytes = l.scale_bytes = l.member_bytes = l.zero_bytes = l.meta_bytes = 0;
    l.two_lane = false, l.entries = 0, l.zero_shift = 0, l.rounding = 0;
    std::fill(l.c1, l.c1 + 32, m->level);
    std::fill(l.c2, l.c2 + 32, 0.0f);

    TrellisLayout t = {};
    find_levels(*m, t);
    t.k = m->k, t.bits = m->bits, t.tile_bytes = 32 * m->k;
    t.strips = l.k / kTileCols, t.tail = l.k % kTileCols, t.whole = l.n / kTileRows, t.rest = l.n % kTileRows;
    const int64_t all = t.strips + (t.tail != 0), side = t.side_bytes(kTileRows);
    const int64_t below = t.rest ? t.strips * t.strip_bytes(t.rest) + t.side_bytes(t.rest) : 0;
    t.original_bytes = t.whole * side + below;
    int64_t size = 0;
    const auto room = [&](int64_t bytes) { return size += (bytes + 127) / 64 * 64, size - (bytes + 127) / 64 * 64; };
    const int64_t at_scale = room(l.row_blocks * kTileRows * 4), at_layout = room(sizeof(TrellisLayout));
    const int64_t at_side = room(t.tail ? t.whole * kTileWeights : 0), at_bottom = room(t.rest ? all * kTileWeights : 0);
    const int64_t at_originals = room(t.original_bytes), at_stream = room(t.whole * t.strips * t.tile_bytes + 64);
    l.arena = arena_alloc(size, &l.huge);
    if (!l.arena) return refuse(error, "there is no memory for %lld bytes", size), nullptr;
    l.arena_bytes = size;
    auto *base = static_cast<uint8_t *>(l.arena);
    l.row_scale = reinterpret_cast<float *>(base + at_scale);
    std::copy_n(m->scale, l.n, l.row_scale);
    t.stream = base + at_stream, t.originals = base + at_originals;
    t.side = t.tail ? base + at_side : nullptr, t.bottom = t.rest ? base + at_bottom : nullptr;

    const int64_t whole_bytes = t.strips * t.tile_bytes, row_bytes = whole_bytes + side;
    parallel(t.whole, [&](int64_t r) {
        const uint8_t *from = m->codes + r * row_bytes;
        std::copy_n(from, whole_bytes, base + at_stream + r * whole_bytes);
        if (!t.tail) return;
        std::copy_n(from + whole_bytes, side, base + at_originals + r * side);
        decode_short(t, from + whole_bytes, kTileRows, static_cast<int>(t.tail), base + at_side + r * kTileWeights);
    });
    if (t.rest) {
        const uint8_t *from = m->codes + t.whole * row_bytes;
        std::copy_n(from, below, base + at_originals + t.whole * side);
        for (int64_t s = 0; s < all; s++) {
            const int cols = static_cast<int>(s < t.strips ? kTileCols : t.tail);
            decode_short(t, from + s * t.strip_bytes(t.rest), static_cast<int>(t.rest), cols, base + at_bottom + s * kTileWeights);
        }
    }
    l.trellis = new (base + at_layout) TrellisLayout(t);
    static const char *const kinds[] = {"64 levels", "64 levels and a sign", "128 levels and a sign", "256 levels"};
    l.kernel = std::to_string(m->k) + "-bit trellis of " + std::to_string(m->bits) + "-bit states, " + kinds[t.kind];
    return linear.release();
} catch (...) {
    return caught(error, "to pack this matrix"), nullptr;
}

NF_API int nf_trellis_unpack(const nf_linear *l, uint8_t *codes, char *error) {
    if (!l || !l->trellis) return refuse(error, "the matrix has no trellis");
    const TrellisLayout &t = *l->trellis;
    const int64_t whole_bytes = t.strips * t.tile_bytes, side = t.side_bytes(kTileRows);
    for (int64_t r = 0; r < t.whole; r++) {
        codes = std::copy_n(t.stream + r * whole_bytes, whole_bytes, codes);
        codes = std::copy_n(t.originals + r * side, side, codes);
    }
    std::copy_n(t.originals + t.whole * side, t.original_bytes - t.whole * side, codes);
    return 0;
}
