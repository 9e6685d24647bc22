// Fitting and encoding: the C interface of encode.h, the tables of its kernels, and how blocks are dealt out.
#include "encode.h"

#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "kernels.h"

namespace nf {
namespace {

constexpr int64_t kChunk = 1 << 15;  // weights that a thread claims at a time

const Encoders &encoders() { return NF_CHOSEN_TABLE(encoders); }

int32_t pattern(float f) {
    int32_t i;
    std::memcpy(&i, &f, sizeof i);
    return i;
}

float number(int32_t i) {
    float f;
    std::memcpy(&f, &i, sizeof f);
    return f;
}

// A ranker and what it points to.
struct Ranked {
    std::vector<float> levels, tables;
    Ranker ranker;
};

// Fills the tables of `bits` wide buckets, or says that some bucket is crossed by two thresholds.
bool fill(Ranked &to, int shift, int first, int count, int bits) {
    Ranker &r = to.ranker;
    const int steps = r.ranks - 1, size = 1 << (bits + r.negative);
    std::vector<float> tables(3 * static_cast<size_t>(size), 0.0f);
    float *edge = tables.data(), *low = edge + size, *high = low + size;
    const auto rank = [&](float u) {
        int k = 0;
        while (k < steps && u > r.thresholds[k]) k++;
        return k;
    };
    for (int negative = 0; negative <= r.negative; negative++) {
        for (int b = first; b < first + count; b++) {
            float from = b == first ? 0.0f : number(b << shift);
            float to_ = b == first + count - 1 ? INFINITY : number(((b + 1) << shift) - 1);
            if (negative) std::swap(from, to_), from = -from, to_ = -to_;
            const int below = rank(from), above = rank(to_);
            if (above > below + 1) return false;
            const int at = (b & ((1 << bits) - 1)) | negative << bits;
            edge[at] = above > below ? r.thresholds[below] : INFINITY;
            low[at] = r.levels[below], high[at] = r.levels[above];
        }
    }
    if (!r.negative) low[(first + count) & ((1 << bits) - 1)] = r.levels[steps];  // the entry after the last
    to.tables = std::move(tables);
    r.shift = shift, r.first = first, r.count = count, r.bits = bits, r.size = size;
    r.least = number(first << shift), r.most = number(((first + count) << shift) - 1);
    r.edge = to.tables.data(), r.low = r.edge + size, r.high = r.low + size;
    return true;
}

// How the levels of one grid are found: `ranks` levels and one threshold fewer, of which those at +inf do not count.
void prepare(Ranked &to, const float *levels, const float *thresholds, int ranks, bool negative) {
    Ranker &r = to.ranker;
    r.levels = levels, r.thresholds = thresholds, r.ranks = ranks, r.negative = negative;
    while (r.ranks > 1 && std::isinf(thresholds[r.ranks - 2])) r.ranks--;
    float least = INFINITY, most = 0;
    for (int k = 0; k < r.ranks - 1; k++) {
        const float t = std::fabs(thresholds[k]);
        if (t > 0 && t < least) least = t;
        if (t > most) most = t;
    }
    if (most == 0) return;
    for (int shift = 23; shift > 8; shift--) {
        const int first = pattern(least) >> shift, count = (pattern(most) >> shift) - first + 1;
        int bits = negative ? 4 : 5;
        while (1 << bits < count + 1) bits++;
        if (1 << (bits + negative) > kBuckets || fill(to, shift, first, count, bits)) return;
    }
}

struct Free {
    void operator()(void *p) const { std::free(p); }
};
using Scratch = std::unique_ptr<float, Free>;

Scratch scratch(int64_t n, int lanes) {
    const int64_t floats = 2 * n * lanes;
    void *p = std::aligned_alloc(64, static_cast<size_t>((floats * 4 + 63) / 64 * 64));
    if (!p) throw std::bad_alloc();
    return Scratch(static_cast<float *>(p));
}

int fail(char *message, const char *what) {
    std::snprintf(message, NF_ERROR, "%s", what);
    return 1;
}

constexpr int64_t kMost = int64_t{1} << 44;  // weights: more than a machine holds, and no product of sizes overflows

bool countable(int64_t rows, int64_t cols) {
    return rows >= 0 && cols >= 0 && cols <= kMost && (cols == 0 || rows <= kMost / cols);
}

bool sound(const nf_search &s) {
    const bool tabled = s.ranks > 0 && s.ranks <= 256 && s.levels && (s.thresholds || s.ranks == 1);
    return s.members > 0 && s.members <= 256 && (s.affine ? s.members == 1 : tabled) && s.tops && s.block > 0 &&
           s.block <= kMost && s.unit >= 0 && s.unit <= kMost && !(s.unit && (s.each || s.affine)) &&
           (s.candidates > 0 ? s.factors != nullptr : s.candidates == 0 && s.unit > 0) && s.promising >= 0 &&
           (s.promising < s.candidates || s.candidates == 0) && s.rounding >= NF_FREE && s.rounding <= NF_OCP_CEIL;
}

// The search with its rankers, which stay at their places.
struct Prepared {
    std::vector<Ranked> ranked;
    std::vector<Ranker> rankers;
    Search search;
    explicit Prepared(const nf_search &s) : ranked(s.affine ? 0 : s.members), search{s, nullptr} {
        for (size_t m = 0; m < ranked.size(); m++) {
            prepare(ranked[m], s.levels + m * s.ranks, s.thresholds + m * (s.ranks - 1), s.ranks, !s.mirrored);
            rankers.push_back(ranked[m].ranker);
        }
        search.rankers = rankers.data();
    }
};

// Pointers of the lanes of one group.
struct Lanes {
    const float *w[16], *h[16];
    float parent[16], *scale[16], *error[16], *zero[16];
    uint8_t *member[16];
};

// Runs body(group) over `count` blocks of n weights, whose pointers set(i, lane, lanes) gives. A group of fewer blocks than lanes
// is filled up with copies of its last, whose results are dropped.
template <class Set, class Body>
void over_blocks(int64_t count, int64_t n, bool weighted, bool parented, const Set &set, const Body &body) {
    const int lanes = encoders().lanes;
    const int64_t chunk = (kChunk / n + lanes - 1) / lanes * lanes, step = chunk > lanes ? chunk : lanes;
    std::atomic<bool> exhausted{false};
    parallel((count + step - 1) / step, [&](int64_t c) {
        try {
            const Scratch memory = scratch(n, lanes);
            Lanes l = {};
            const int64_t end = (c + 1) * step < count ? (c + 1) * step : count;
            for (int64_t i = c * step; i < end; i += lanes) {
                const int used = static_cast<int>(end - i < lanes ? end - i : lanes);
                for (int lane = 0; lane < lanes; lane++) set(i + (lane < used ? lane : used - 1), lane, l);
                body(Group{used, n, l.w, weighted ? l.h : nullptr, parented ? l.parent : nullptr, l.scale, l.error, l.zero, l.member,
                           memory.get()});
            }
        } catch (const std::bad_alloc &) {
            exhausted = true;
        }
    });
    if (exhausted) throw std::bad_alloc();
}

}  // namespace
}  // namespace nf

using namespace nf;

NF_API int nf_fit(const nf_search *search, const float *w, int64_t rows, int64_t cols, const float *h, const float *parent,
                  float *scale, float *error, uint8_t *member, float *zero, char *message) try {
    if (!search || !sound(*search) || !countable(rows, cols) || cols < 1) {
        return fail(message, "the parts of this search do not fit together");
    }
    if (rows == 0) return 0;
    const bool chosen = !search->each && !search->affine && (search->members > 1 || search->unit);
    if (!w || !scale || (search->each && !error) || (search->affine && !zero) || (chosen && !member)) {
        return fail(message, "an array of this search is null");
    }
    const Prepared prepared(*search);
    const Search &s = prepared.search;
    const int64_t whole = cols / s.block, tail = cols - whole * s.block, blocks = whole + (tail > 0);
    const auto units_of = [&](int64_t n) { return s.unit ? (n + s.unit - 1) / s.unit : 1; };
    const int64_t block_units = units_of(s.block), units = whole * block_units + (tail ? units_of(tail) : 0);
    const int results = s.each ? s.members : 1;
    const auto run = [&](int64_t count, int64_t start, int64_t n) {  // `count` blocks of n weights a row, from block `start` on
        if (count == 0 || n == 0) return;
        const auto set = [&](int64_t i, int lane, Lanes &l) {
            const int64_t row = i / count, b = start + i % count;
            l.w[lane] = w + row * cols + b * s.block;
            if (h) l.h[lane] = h + b * s.block;
            if (parent) l.parent[lane] = parent[row];
            l.scale[lane] = scale + (row * blocks + b) * results;
            if (error) l.error[lane] = error + (row * blocks + b) * results;
            if (zero) l.zero[lane] = zero + row * blocks + b;
            if (member) l.member[lane] = member + row * units + b * block_units;
        };
        over_blocks(rows * count, n, h, parent, set, [&](const Group &g) { encoders().fit(s, g); });
    };
    run(whole, 0, s.block);
    run(tail > 0, whole, tail);
    return 0;
} catch (...) {
    return caught(message, "to fit this tensor");
}

NF_API int nf_row_errors(const nf_search *search, const float *w, int64_t rows, int64_t cols, const float *h, const float *scales,
                         const float *zeros, float *out, char *message) try {
    if (!search || !sound(*search) || !countable(rows, cols) || cols < 1) {
        return fail(message, "the parts of this search do not fit together");
    }
    if (rows == 0 || search->candidates == 0) return 0;
    if (!w || !scales || !out) return fail(message, "an array of this search is null");
    const Prepared prepared(*search);
    const Search &s = prepared.search;
    const int64_t results = static_cast<int64_t>(s.unit ? 1 : s.members) * s.candidates;
    const auto set = [&](int64_t i, int lane, Lanes &l) {
        l.w[lane] = w + i * cols;
        l.h[lane] = h;
        l.error[lane] = out + i * results;
    };
    over_blocks(rows, cols, h, false, set, [&](const Group &g) { encoders().row_errors(s, g, scales, zeros, g.error); });
    return 0;
} catch (...) {
    return caught(message, "to fit this tensor");
}

NF_API int nf_encode(const nf_codes *how, const float *w, int64_t rows, int64_t cols, uint8_t *out, char *message) try {
    if (!how || how->members < 1 || how->members > 256 || how->ranks < 1 || how->ranks > 256 || how->block < 1 ||
        how->block > kMost || how->unit < 1 || how->unit > how->block || !countable(rows, cols)) {
        return fail(message, "the parts of this encoding do not fit together");
    }
    if (rows == 0 || cols == 0) return 0;
    const nf_codes &f = *how;
    if (!w || !out || !f.codes || !f.scale || (f.ranks > 1 && !f.thresholds)) {
        return fail(message, "an array of this encoding is null");
    }
    std::vector<Ranked> grids(f.members);
    for (int m = 0; m < f.members; m++) {
        grids[m].levels.assign(f.codes + m * f.ranks, f.codes + (m + 1) * f.ranks);  // a code instead of a level
        prepare(grids[m], grids[m].levels.data(), f.thresholds + m * (f.ranks - 1), f.ranks, true);
    }
    const Encoders &e = encoders();
    const int64_t blocks = (cols + f.block - 1) / f.block, tail = cols - (blocks - 1) * f.block;
    const int64_t block_units = (f.block + f.unit - 1) / f.unit, units = (blocks - 1) * block_units + (tail + f.unit - 1) / f.unit;
    const bool shared = !f.member || f.one_member;                // one member for all
    const bool mixed = !shared && f.unit < 16 && f.members <= 4;  // units too short to go one by one
    const auto encode_block = [&](int64_t row, int64_t b, std::vector<uint8_t> &other) {
        const int64_t n = b == blocks - 1 ? tail : f.block, at = f.one_scale ? 0 : row * blocks + b;
        const float *from = w + row * cols + b * f.block, scale = f.scale[at], *zero = f.zero ? f.zero + at : nullptr;
        uint8_t *to = out + row * cols + b * f.block;
        if (shared) return e.encode(grids[f.member ? f.member[0] % f.members : 0].ranker, from, n, scale, zero, to);
        const uint8_t *member = f.member + row * units + b * block_units;
        if (!mixed) {
            for (int64_t j = 0; j < n; j += f.unit) {
                const int64_t count = j + f.unit < n ? f.unit : n - j;
                e.encode(grids[member[j / f.unit] % f.members].ranker, from + j, count, scale, zero, to + j);
            }
            return;
        }
        e.encode(grids[0].ranker, from, n, scale, zero, to);  // all weights under every member, then each unit's own
        other.resize(n);
        for (int m = 1; m < f.members; m++) {
            e.encode(grids[m].ranker, from, n, scale, zero, other.data());
            for (int64_t u = 0, j = 0; j < n; u++) {
                const uint8_t keep = member[u] == m ? 0 : 0xff;
                for (const int64_t end = j + f.unit < n ? j + f.unit : n; j < end; j++) to[j] = (to[j] & keep) | (other[j] & ~keep);
            }
        }
    };
    const int64_t step = kChunk / cols > 1 ? kChunk / cols : 1;
    std::atomic<bool> exhausted{false};
    parallel((rows + step - 1) / step, [&](int64_t c) {
        try {
            std::vector<uint8_t> other;
            const int64_t end = (c + 1) * step < rows ? (c + 1) * step : rows;
            for (int64_t row = c * step; row < end; row++) {
                for (int64_t b = 0; b < blocks; b++) encode_block(row, b, other);
            }
        } catch (const std::bad_alloc &) {
            exhausted = true;
        }
    });
    if (exhausted) throw std::bad_alloc();
    return 0;
} catch (...) {
    return caught(message, "to encode this tensor");
}
