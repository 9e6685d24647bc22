// Planes of a file → the layout of the kernels (layout.h), and back. Plain code: it runs once a matrix.
#include "repack.h"
#include "trellis.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>

namespace nf {

Spans::Spans(const Layout &l) : block(l.block), unit(l.unit), k(l.k) {
    span = l.member_kind == Members::group ? std::min(block, unit) : block;
    padded = (span + l.group - 1) / l.group * l.group;
    per_block = (std::min(block, k) + span - 1) / span;
}

int64_t Spans::count() const {
    const int64_t blocks = (k + block - 1) / block, tail = k - (blocks - 1) * block;
    return (blocks - 1) * per_block + (tail + span - 1) / span;
}

int64_t Spans::length(int64_t s) const {
    const int64_t begin = start(s), end = std::min(k, std::min(begin + span, s / per_block * block + block));
    return end - begin;
}

// Where a column of a tile of triples stands: three vectors hold columns 3i, 3i + 1, 3i + 2 of twelve.
static int64_t within(const Layout &l, int64_t offset) {
    return l.codes == Codes::triple ? offset / 12 * 12 + offset % 3 * 4 + offset % 12 / 3 : offset;
}

int64_t position_of(const Layout &l, const Spans &spans, int64_t column) {
    const int64_t inside = column % spans.block;
    const int64_t s = column / spans.block * spans.per_block + inside / spans.span;
    return s * spans.padded + within(l, inside % spans.span);
}

namespace {

// A field of bits of one lane byte: stored vector, shift, width, and where these bits belong in the code.
struct Field { int vector, shift, bits, at; };

// Fields that make up the code of vector j; returns their number.
int fields(Codes codes, int j, Field *f) {
    switch (codes) {
        case Codes::b2: f[0] = {j / 4, 2 * (j % 4), 2, 0}; return 1;
        case Codes::b3: {
            const int base = j / 8 * 3, i = j % 8;
            if (i == 2) { f[0] = {base, 6, 2, 0}, f[1] = {base + 2, 6, 1, 2}; return 2; }
            if (i == 5) { f[0] = {base + 1, 6, 2, 0}, f[1] = {base + 2, 7, 1, 2}; return 2; }
            f[0] = {base + i / 3, 3 * (i % 3), 3, 0};
            return 1;
        }
        case Codes::b4: f[0] = {j / 2, 4 * (j % 2), 4, 0}; return 1;
        case Codes::b5: f[0] = {j / 2, 4 * (j % 2), 4, 0}, f[1] = {8 + j / 8, j % 8, 1, 4}; return 2;
        case Codes::b6: f[0] = {j / 2, 4 * (j % 2), 4, 0}, f[1] = {8 + j / 4, 2 * (j % 4), 2, 4}; return 2;
        case Codes::b8: f[0] = {j, 0, 8, 0}; return 1;
        case Codes::triple: {
            const int base = j / 3 * 2;
            f[2] = {base, 5, 1, 5};  // the shared bit
            if (j % 3 == 0) f[0] = {base, 0, 5, 0}, f[1] = f[2];
            if (j % 3 == 1) f[0] = {base + 1, 0, 5, 0}, f[1] = f[2];
            if (j % 3 == 2) { f[0] = {base, 6, 2, 0}, f[1] = {base + 1, 5, 3, 2}; return 3; }
            return 2;
        }
    }
    return 0;
}

int stored(Codes c) {
    switch (c) {
        case Codes::b2: return 4;
        case Codes::b3: return 6;
        case Codes::b4: return 8;
        case Codes::b5: return 10;
        case Codes::b6: return 12;
        case Codes::b8: return 16;
        case Codes::triple: return 8;
    }
    return 0;
}

// Where the bits of the code at each position of a tile lie, relative to lane r's bytes at 4 r.
struct Places {
    struct Place { int count, offset[3], shift[3], mask[3], at[3], quad; } of[64];  // quad: where its bit of quads lies, or -1
    explicit Places(const Layout &l) {
        for (int p = 0; p < l.tile; p++) {
            Field f[3];
            Place &place = of[p];
            place.count = fields(l.codes, p / 4, f);
            for (int i = 0; i < place.count; i++) {
                place.offset[i] = 64 * f[i].vector + p % 4, place.shift[i] = f[i].shift, place.mask[i] = (1 << f[i].bits) - 1;
                place.at[i] = f[i].at;
            }
            place.quad = l.member_kind == Members::quad ? p / 4 : -1;  // a word of 16 bits a row
        }
        quad_at = l.bits;
    }
    int quad_at;  // where that bit belongs in the code
    uint32_t read(const uint8_t *tile, const uint8_t *quads, int r, int64_t p) const {
        const Place &place = of[p];
        uint32_t code = 0;
        for (int i = 0; i < place.count; i++) {
            code |= static_cast<uint32_t>(tile[place.offset[i] + 4 * r] >> place.shift[i] & place.mask[i]) << place.at[i];
        }
        if (place.quad >= 0) code |= static_cast<uint32_t>(quads[2 * r + place.quad / 8] >> place.quad % 8 & 1) << quad_at;
        return code;
    }
    void write(uint8_t *tile, uint8_t *quads, int r, int64_t p, uint32_t code) const {
        const Place &place = of[p];
        for (int i = 0; i < place.count; i++) {
            tile[place.offset[i] + 4 * r] |=
                static_cast<uint8_t>((code >> place.at[i] & static_cast<uint32_t>(place.mask[i])) << place.shift[i]);
        }
        if (place.quad >= 0) quads[2 * r + place.quad / 8] |= static_cast<uint8_t>((code >> quad_at & 1) << place.quad % 8);
    }
};

}  // namespace

namespace {

bool refuse(char *error, const char *format, long long a = 0, long long b = 0) {
    std::snprintf(error, NF_ERROR, format, a, b);
    return false;
}

bool choose(const nf_matrix &m, Layout &l, char *error) {
    if (m.rows < 1 || m.cols < 1) return refuse(error, "a kernel needs at least one row and one column");
    if (m.rows > INT32_MAX || m.cols > INT32_MAX) return refuse(error, "a matrix of %lld x %lld is too large", m.rows, m.cols);
    if (m.bits < 1 || m.bits > 8) return refuse(error, "codes of %lld bits have no kernel", m.bits);
    if (m.block < 1 || m.members < 1 || (m.member && m.unit < 1)) return refuse(error, "blocks and units need at least one weight");
    if (m.scale_kind < NF_ROW || m.scale_kind > NF_E3M3) return refuse(error, "unknown kind of scale %lld", m.scale_kind);
    if (m.scale_kind == NF_ROW && m.block < m.cols) return refuse(error, "one scale a row does not go with blocks");
    if (m.zero && (m.member || m.members > 1)) return refuse(error, "zero points and members exclude each other");
    if (!m.member && m.members != 1) return refuse(error, "%lld grids without a member index", m.members);
    l.n = m.rows, l.k = m.cols, l.bits = m.bits, l.members = m.members;
    l.block = std::min(m.block, m.cols), l.unit = m.member ? std::min(m.unit, l.block) : l.block;
    l.scale_kind = static_cast<nf_scale>(m.scale_kind);
    l.has_member = m.member != nullptr, l.has_zero = m.zero != nullptr;
    l.width = m.bits, l.tile = 64, l.member_kind = Members::none;
    int index = 0;
    while (1 << index < m.members) index++;
    bool triple = false;
    if (l.has_member) {
        const bool pair = m.members == 2;
        if (pair && l.unit == 4 && m.bits >= 2 && m.bits <= 5) {
            l.member_kind = Members::quad;
        } else if (pair && l.unit == 3 && m.bits == 5 && l.block >= 48) {
            triple = true;
        } else if (l.unit >= 16 && m.bits != 1 && m.bits != 7 && m.members <= 32 && (m.members << m.bits) <= kEntries) {
            l.member_kind = Members::group;
        } else if (m.bits + index <= 8) {
            l.width = m.bits + index;
        } else {
            return refuse(error, "%lld members of %lld-bit codes have no kernel", m.members, m.bits);
        }
    }
    const int64_t span = l.member_kind == Members::group ? l.unit : l.block;
    static const Codes packed[] = {Codes::b2, Codes::b2, Codes::b2, Codes::b3, Codes::b4, Codes::b5, Codes::b6, Codes::b8, Codes::b8};
    l.codes = triple ? Codes::triple : packed[l.width];
    l.tile = triple ? 48 : 64;
    l.group = triple ? 48 : span <= 16 ? 16 : span <= 32 ? 32 : 64;
    l.sub = l.tile / l.group;
    const Spans spans(l);
    const int64_t last = spans.count() - 1;
    const int64_t used = last * spans.padded + (spans.length(last) + l.group - 1) / l.group * l.group;
    l.tiles = (used + l.tile - 1) / l.tile;
    const bool per_row = l.scale_kind == NF_ROW && l.member_kind != Members::group && !l.has_zero;
    l.tiles_per_block = per_row ? l.tiles : l.sub > 1 ? 1 : spans.padded / l.tile;
    l.row_blocks = (l.n + kRows - 1) / kRows;
    l.code_bytes = 64 * stored(l.codes);
    l.quad_bytes = l.member_kind == Members::quad ? 32 : 0;
    l.scale_bytes = l.scale_kind == NF_ROW ? 0 : l.scale_kind <= NF_BF16 ? 32 : 16;
    l.member_bytes = l.member_kind != Members::group ? 0 : l.members <= 16 ? 8 : 16;
    l.zero_bytes = l.has_zero ? 16 : 0;
    l.meta_bytes = per_row ? 0 : l.sub * (l.scale_bytes + l.member_bytes + l.zero_bytes);
    return true;
}

bool allocate(Layout &l, bool identity, char *error) {
    const int64_t code = l.row_blocks * l.tiles * l.code_bytes, quad = l.row_blocks * l.tiles * l.quad_bytes, meta = l.row_blocks * l.metas() * l.meta_bytes;
    const int64_t row = l.row_blocks * kRows * 4, map = identity ? 0 : l.positions() * 4;
    const auto line = [](int64_t n) { return (n + 63) / 64 * 64; };
    // kernels load whole vectors: the streams are followed by a few lines that nobody uses
    l.arena_bytes = line(code) + line(quad) + line(meta + 64) + line(row) + line(map) + 64;
    l.arena = arena_alloc(l.arena_bytes, &l.huge);
    if (!l.arena) return refuse(error, "there is no memory for %lld bytes of weights", l.arena_bytes);
    auto *p = static_cast<uint8_t *>(l.arena);
    l.code_stream = p;
    l.quad_stream = p += line(code);
    l.meta_stream = p += line(quad);
    l.row_scale = reinterpret_cast<float *>(p += line(meta + 64));
    if (!identity) l.column = reinterpret_cast<int32_t *>(p + line(row));
    return true;
}

uint32_t stream_code(const uint8_t *row, int64_t index, int bits) {
    const int64_t bit = index * bits;
    uint32_t value = row[bit / 8];
    if (bit % 8 + bits > 8) value |= static_cast<uint32_t>(row[bit / 8 + 1]) << 8;
    return value >> (bit % 8) & ((1u << bits) - 1);
}

// The entry of a span: `what` 0 scales, 1 members, 2 zero points, of its sub-group.
uint8_t *meta_entry(const Layout &l, int64_t row, int64_t s, int what) {
    const int64_t entry = l.sub > 1 ? s / l.sub : s, sub = l.sub > 1 ? s % l.sub : 0;
    uint8_t *p = l.meta_stream + (row / kRows * l.metas() + entry) * l.meta_bytes + sub * (l.meta_bytes / l.sub);
    return p + (what > 0 ? l.scale_bytes : 0) + (what > 1 ? l.member_bytes : 0);
}

void write_member(const Layout &l, uint8_t *p, int r, uint8_t value) {
    if (l.member_bytes == 16) p[r] = value;
    else p[4 * (r % 2) + r / 4] |= static_cast<uint8_t>(value << (r / 2 % 2 * 4));  // nibble r / 2 of dword r % 2
}
uint8_t read_member(const Layout &l, const uint8_t *p, int r) {
    return l.member_bytes == 16 ? p[r] : p[4 * (r % 2) + r / 4] >> (r / 2 % 2 * 4) & 15;
}

// A scale word that no encoder writes and that the kernels would read as something else.
bool odd_scale(nf_scale kind, const uint8_t *p) {
    uint16_t word = 0;
    std::memcpy(&word, p, kind <= NF_BF16 ? 2 : 1);
    return (kind == NF_E4M3 && word >= 0x7f) || (kind == NF_E3M3 && word > 63) || (kind == NF_E8M0 && word == 255);
}

bool pack_rows(const nf_matrix &m, Layout &l, const Spans &spans, const Places &places, const bool *finite, int64_t block,
               const int64_t *positions) {
    const int64_t row_bytes = (l.k * l.bits + 7) / 8, blocks = (l.k + l.block - 1) / l.block;
    const int64_t units_per_block = l.has_member ? (l.block + l.unit - 1) / l.unit : 0;
    const int64_t tail = l.k - (blocks - 1) * l.block;
    const int64_t units = l.has_member ? (blocks - 1) * units_per_block + (tail + l.unit - 1) / l.unit : 0;
    const bool merged = l.has_member && l.member_kind != Members::group;
    const int word = l.scale_bytes / kRows;
    const float power = l.scale_kind == NF_E4M3 ? 256.0f : l.scale_kind == NF_E3M3 ? 4096.0f : 1.0f;
    bool fine = true;
    for (int r = 0; r < kRows; r++) {
        const int64_t row = block * kRows + r;
        if (row >= l.n) {
            l.row_scale[row] = 0;
            continue;
        }
        float factor = m.parent ? m.parent[row] : 1.0f;
        if (l.scale_kind == NF_ROW) factor = static_cast<const float *>(m.scale)[row] * factor;
        l.row_scale[row] = factor * power;
        const uint8_t *codes = m.codes + row * row_bytes;
        uint8_t *tiles = l.code_stream + block * l.tiles * l.code_bytes, *quads = l.quad_stream + block * l.tiles * l.quad_bytes;
        for (int64_t c = 0; c < l.k; c++) {
            uint32_t code = stream_code(codes, c, l.bits), full = code;
            if (l.has_member) {
                const uint8_t member = m.member[row * units + c / l.block * units_per_block + c % l.block / l.unit];
                fine = fine && member < l.members;
                full |= static_cast<uint32_t>(member) << l.bits;
                if (merged) code = full;
            }
            fine = fine && finite[full % kEntries];
            const int64_t tile = positions[c] / l.tile;
            places.write(tiles + tile * l.code_bytes, quads + tile * l.quad_bytes, r, positions[c] % l.tile, code);
        }
        for (int64_t s = 0; s < spans.count(); s++) {
            const int64_t b = s / spans.per_block;
            if (word) {
                const uint8_t *from = static_cast<const uint8_t *>(m.scale) + (row * blocks + b) * word;
                fine = fine && !odd_scale(l.scale_kind, from);
                std::memcpy(meta_entry(l, row, s, 0) + r * word, from, static_cast<size_t>(word));
            }
            if (l.member_bytes) write_member(l, meta_entry(l, row, s, 1), r, m.member[row * units + s]);
            if (l.zero_bytes) meta_entry(l, row, s, 2)[r] = m.zero[row * blocks + b];
        }
    }
    return fine;
}

}  // namespace

nf_linear *repack(const nf_matrix &m, char *error) {
    std::unique_ptr<nf_linear, void (*)(nf_linear *)> linear(new nf_linear(), nf_free);
    Layout &l = *linear;
    if (!choose(m, l, error)) return nullptr;
    float levels[kEntries];
    bool finite[kEntries];  // codes for Inf and NaN stand for no number: no encoder writes them
    for (int i = 0; i < (m.members << m.bits); i++) {
        finite[i] = std::isfinite(m.levels[i]);
        levels[i] = finite[i] ? m.levels[i] : 0.0f;
    }
    build_tables(l, levels);
    const Spans spans(l);
    std::unique_ptr<int64_t[]> positions(new int64_t[static_cast<size_t>(l.k)]);
    bool identity = true;
    for (int64_t c = 0; c < l.k; c++) {
        positions[c] = position_of(l, spans, c);
        identity = identity && positions[c] == c;
    }
    if (!allocate(l, identity, error)) return nullptr;
    if (!identity) {
        std::fill(l.column, l.column + l.positions(), -1);
        for (int64_t c = 0; c < l.k; c++) l.column[positions[c]] = static_cast<int32_t>(c);
    }
    const Places places(l);
    std::unique_ptr<bool[]> fine(new bool[static_cast<size_t>(l.row_blocks)]);
    parallel(l.row_blocks, [&](int64_t block) { fine[block] = pack_rows(m, l, spans, places, finite, block, positions.get()); });
    if (!std::all_of(fine.get(), fine.get() + l.row_blocks, [](bool f) { return f; })) {
        return refuse(error, "the planes hold a code, a member or a scale that stands for no number; the file is damaged"), nullptr;
    }
    describe(l, linear->kernel);
    return linear.release();
}

void unpack_row(const Layout &l, int64_t row, uint8_t *codes, uint8_t *scale, uint8_t *member, uint8_t *zero) {
    const Spans spans(l);
    const Places places(l);
    const int64_t block = row / kRows;
    const int r = static_cast<int>(row % kRows), word = l.scale_bytes / kRows;
    const uint8_t *tiles = l.codes_of(block), *quads = l.quads_of(block);
    const int64_t units_per_block = l.has_member ? (l.block + l.unit - 1) / l.unit : 0;
    for (int64_t c = 0; (codes || member) && c < l.k; c++) {
        const int64_t p = position_of(l, spans, c);
        const uint32_t code = places.read(tiles + p / l.tile * l.code_bytes, quads + p / l.tile * l.quad_bytes, r, p % l.tile);
        if (codes) codes[c] = static_cast<uint8_t>(code & ((1u << l.bits) - 1));
        if (member && l.member_kind != Members::group) {
            member[c / l.block * units_per_block + c % l.block / l.unit] = static_cast<uint8_t>(code >> l.bits);
        }
    }
    for (int64_t s = 0; s < spans.count(); s++) {
        const int64_t b = s / spans.per_block;
        if (scale && word) std::memcpy(scale + b * word, meta_entry(l, row, s, 0) + r * word, static_cast<size_t>(word));
        if (member && l.member_bytes) member[s] = read_member(l, meta_entry(l, row, s, 1), r);
        if (zero && l.zero_bytes) zero[b] = meta_entry(l, row, s, 2)[r];
    }
}

static float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

static float from_half(uint32_t h) {
    const uint32_t sign = (h & 0x8000u) << 16, exponent = h >> 10 & 31, mantissa = h & 1023;
    if (exponent == 0) return (sign ? -0x1p-24f : 0x1p-24f) * static_cast<float>(mantissa);
    return from_bits(sign | (exponent == 31 ? 255u : exponent + 112) << 23 | mantissa << 13);
}

// As the kernels read it: e4m3 and e3m3 without the power of two that is in the row's scale.
static float scale_value(nf_scale kind, const uint8_t *p, int r) {
    uint16_t word;
    switch (kind) {
        case NF_FP16: std::memcpy(&word, p + 2 * r, 2); return from_half(word);
        case NF_BF16: std::memcpy(&word, p + 2 * r, 2); return from_bits(static_cast<uint32_t>(word) << 16);
        case NF_E8M0: return from_bits(p[r] ? static_cast<uint32_t>(p[r]) << 23 : 0x00400000u);
        case NF_U8: return p[r];
        default: return from_half(static_cast<uint32_t>(p[r]) << 7);
    }
}

void gather_row(const Layout &l, int64_t row, float *out) {
    if (l.trellis) return gather_trellis(l, row, out);
    const Spans spans(l);
    const Places places(l);
    const int r = static_cast<int>(row % kRows);
    const uint8_t *tiles = l.codes_of(row / kRows), *quads = l.quads_of(row / kRows);
    for (int64_t s = 0; s < spans.count(); s++) {
        float scale = l.row_scale[row], c1 = 0, c2 = 0;
        uint32_t high = 0;
        if (l.scale_bytes) scale = scale_value(l.scale_kind, meta_entry(l, row, s, 0), r) * scale;
        if (l.member_bytes) {
            const int member = read_member(l, meta_entry(l, row, s, 1), r);
            c1 = l.c1[member], c2 = l.c2[member];
            high = l.two_lane ? 0 : static_cast<uint32_t>(member) << l.bits;
        }
        const float zero = l.zero_bytes ? static_cast<float>(meta_entry(l, row, s, 2)[r] - l.zero_shift) : 0.0f;
        const int64_t first = spans.start(s), length = spans.length(s);
        for (int64_t i = 0; i < length; i++) {
            const int64_t p = s * spans.padded + within(l, i);
            const uint32_t code = high | places.read(tiles + p / l.tile * l.code_bytes, quads + p / l.tile * l.quad_bytes, r, p % l.tile);
            float level = l.two_lane ? c1 * l.levels[code] + c2 * l.levels[16 + code] : l.levels[code];
            if (l.zero_bytes) level -= zero;
            out[first + i] = scale * level;
        }
    }
}

}  // namespace nf
