// Sweeps and coordinate descent for one instruction set; compiled once for each, like isa.cpp and under the same restrictions.
#include "sweep.h"
#include "lanes.h"

namespace nf {
namespace NF_ISA {

// Rounding the lanes of some rows: their scales, zero points and members, looked up when the block or the unit changes.
struct Rounding {
    const nf_lattice &l;
    int64_t row;
    int count;
    int64_t block = -1, unit = -1;
    V scale = {}, zero = {};
    I member = {};  // of each lane
    I row_blocks = {};  // where a lane's row begins among scales
    bool small;  // all lanes have the same short tables
    V thresholds[2], levels[2], codes[2];

    Rounding(const nf_lattice &lattice, int64_t first, int rows) : l(lattice), row(first), count(rows) {
        for (int i = 0; i < W; i++) row_blocks[i] = static_cast<int32_t>((row_of(i) - row) * l.blocks);
        small = kPicks && l.entries <= 2 * W && (!l.member || l.one_member);
        if (!small) return;
        const int64_t from = l.member ? static_cast<int64_t>(member_at(0)) * l.entries : 0;
        keep(l.thresholds + from, thresholds), keep(l.levels + from, levels), keep(l.codes + from, codes);
    }
    void keep(const float *table, V *out) const {
        float numbers[2 * W] = {};
        for (int i = 0; i < l.entries; i++) numbers[i] = table[i];
        out[0] = load(numbers), out[1] = load(numbers + W);
    }

    int64_t row_of(int lane) const { return row + (lane < count ? lane : count - 1); }
    int32_t member_at(int64_t place) const { return l.member[place] < l.members ? l.member[place] : l.members - 1; }

    void to_block(int64_t b) {
        if (b == block) return;
        block = b;
        const int64_t first = l.one_scale ? 0 : row * l.blocks + b;
        scale = l.one_scale ? splat(l.scale[0]) : gather(l.scale + first, row_blocks);
        if (l.zero) zero = l.one_scale ? splat(l.zero[0]) : gather(l.zero + first, row_blocks);
    }
    void to_unit(int64_t u) {
        if (u == unit || !l.member || small) return;
        unit = u;
        for (int i = 0; i < W; i++) member[i] = member_at(l.one_member ? 0 : row_of(i) * l.units + u);
    }
    void set_unit(int64_t u, I chosen) {
        unit = u, member = chosen;
        for (int i = 0; i < count; i++) l.member[row_of(i) * l.units + u] = static_cast<uint8_t>(chosen[i]);
    }
    // Index of the nearest level in the tables: the number of thresholds below x / scale + zero.
    I place(V x, I m) const {
        V u = x / scale;
        if (l.zero) u = u + zero;
        I at = first(m);
        for (int step = l.entries / 2; step; step /= 2) at += (u > find(l.thresholds, thresholds, at + (step - 1))) & step;
        return at;
    }
    V value(I place) const {
        V level = find(l.levels, levels, place);
        if (l.zero) level = level - zero;
        return level * scale;
    }
    V code(I place) const { return find(l.codes, codes, place); }  // as a whole number
    // Least and largest value.
    V low() const { return value(first(member)); }
    V high() const { return value(first(member) + (l.entries - 1)); }

private:
    I first(I m) const { return small ? I{} : m * l.entries; }
    V find(const float *table, const V *kept, I index) const { return small ? pick(kept, index) : gather(table, index); }
};

static inline V choose(I mask, V a, V b) { return number((bits(a) & mask) | (bits(b) & ~mask)); }

// rows → columns side by side [n][W], and back into the rows that exist
static void read(const float *from, int64_t stride, const Rounding &g, int64_t n, float *to) {
    const float *runs[W];
    for (int i = 0; i < W; i++) runs[i] = from + g.row_of(i) * stride;
    side_by_side(runs, n, false, to);
}
// `to`: fp32, or codes of a byte
static inline void write_row(V v, float *to) { store(to, v); }
static inline void write_row(V v, uint8_t *to) { store_bytes(to, __builtin_convertvector(v, I)); }
template <class T> static void write(const float *from, int64_t n, const Rounding &g, T *to, int64_t stride) {
    const int64_t whole = g.count == W ? n - n % W : 0;
    for (int64_t j = 0; j < whole; j += W) {
        V tile[W];
        for (int i = 0; i < W; i++) tile[i] = load(from + (j + i) * W);
        transpose(tile);
        for (int i = 0; i < W; i++) write_row(tile[i], to + (g.row + i) * stride + j);
    }
    for (int64_t j = whole; j < n; j++) {
        for (int i = 0; i < g.count; i++) to[(g.row + i) * stride + j] = static_cast<T>(from[j * W + i]);
    }
}

// x[j] += e · a[j] for the columns j of [from, to)
static inline void add(float *x, V e, const float *a, int64_t from, int64_t to) {
    for (int64_t j = from; j < to; j++) store(x + j * W, load(x + j * W) + e * a[j]);
}
static inline void subtract(float *x, V e, const float *a, int64_t from, int64_t to) {
#pragma GCC unroll 4
    for (int64_t j = from; j < to; j++) store(x + j * W, load(x + j * W) - e * a[j]);
}

static int64_t end_of_unit(const int64_t *unit, int64_t from, int64_t stop) {
    int64_t to = from + 1;
    while (to < stop && unit[to] == unit[from]) to++;
    return to;
}

// -- sweep ------------------------------------------------------------------------------------------------------------

static int64_t sweep_scratch(int64_t width) { return 2 * 6 * width * W * 4; }

// The member whose own sweep over the unit has the least sum of squares; ties: the lower index.
static I best_member(const Rounding &g, const nf_panel &p, const float *x, int64_t from, int64_t to, float *trial) {
    V best = {};
    I chosen = {};
    for (int m = 0; m < g.l.members; m++) {
        for (int64_t i = from; i < to; i++) store(trial + i * W, load(x + i * W));
        V cost = {};
        for (int64_t i = from; i < to; i++) {
            const V now = load(trial + i * W);
            const V e = (now - g.value(g.place(now, splat(m)))) / p.u[i * p.ldu + i];
            cost = cost + e * e;
            subtract(trial, e, p.u + i * p.ldu, i + 1, to);
        }
        const I better = m == 0 ? splat(-1) : cost < best;
        best = choose(better, cost, best);
        chosen = (splat(m) & better) | (chosen & ~better);
    }
    return chosen;
}

// W rows of a panel, columns side by side.
struct Strip {
    Rounding g;
    float *x, *error, *trial, *original, *before, *codes;

    Strip(const nf_lattice &l, const nf_panel &p, int64_t row, int count, float *base) : g(l, row, count) {
        const int64_t n = p.width * W;
        x = base, error = base + n, trial = base + 2 * n, original = base + 3 * n, before = base + 4 * n, codes = base + 5 * n;
        read(p.w, p.ldw, g, p.width, x);
        if (p.r) read(p.original, p.width, g, p.width, original);
    }
    // Rounds column i: what the columns behind it are to pay for.
    V round(const nf_panel &p, int64_t i) {
        g.to_block(p.block[i]);
        if (g.l.choose && (i == p.start || p.unit[i] != p.unit[i - 1])) {
            g.set_unit(p.unit[i], best_member(g, p, x, i, end_of_unit(p.unit, i, p.stop), trial));
        }
        g.to_unit(p.unit[i]);
        const V now = load(x + i * W);
        const I place = g.place(now, g.member);
        store(codes + i * W, g.code(place));  // and out at the end: rows a power of two apart share their places in the cache
        const V e = (now - g.value(place)) / p.u[i * p.ldu + i];
        store(error + i * W, e);
        if (p.before) store(before + i * W, smaller(larger(now, g.low()), g.high()));
        return e;
    }
    void pass_on(const nf_panel &p, int64_t i, V e) {
        subtract(x, e, p.u + i * p.ldu, i + 1, p.width);
        if (!p.before) return;
        const V cut = load(before + i * W);
        if (p.p) add(x, cut, p.p + i * p.ldp, i + 1, p.width);
        if (p.r) add(x, load(original + i * W) - cut, p.r + i * p.ldr, i + 1, p.width);
    }
    void finish(const nf_panel &p) const {
        const int64_t swept = p.stop - p.start;
        write(x + p.stop * W, p.width - p.stop, g, p.w + p.stop, p.ldw);
        write(codes + p.start * W, swept, g, p.codes + p.start, p.ldc);
        write(error + p.start * W, swept, g, p.error + p.start, p.width);
        if (p.before) write(before + p.start * W, swept, g, p.before + p.start, p.width);
    }
};

// Up to 2 W rows: two strips in turn, since rounding a column is one long chain of operations.
static void sweep(const nf_lattice &l, const nf_panel &p, int64_t row, int count, void *scratch) {
    float *base = static_cast<float *>(scratch);
    Strip one(l, p, row, count < W ? count : W, base);
    if (count <= W) {
        for (int64_t i = p.start; i < p.stop; i++) one.pass_on(p, i, one.round(p, i));
        return one.finish(p);
    }
    Strip two(l, p, row + W, count - W, base + 6 * p.width * W);
    for (int64_t i = p.start; i < p.stop; i++) {
        const V e = one.round(p, i), f = two.round(p, i);
        one.pass_on(p, i, e);
        two.pass_on(p, i, f);
    }
    one.finish(p);
    two.finish(p);
}

// -- descent ----------------------------------------------------------------------------------------------------------

static int64_t descend_scratch(int64_t width) { return 9 * width * W * 4; }

// What is known of the columns of a run, side by side: gradients, values and codes, now or after a trial.
struct Columns {
    float *gradient, *q, *code;  // codes as whole numbers
};

struct Step {
    V q, code, gain;
};

static inline V gain_of(V step, V gradient, float h) { return step * (2.0f * gradient + step * h); }

// The best code of a column; `stay`: the old one remains where nothing is gained.
static Step coordinate(const Rounding &g, const nf_run &r, const Columns &old, V gradient, int64_t j, I member, bool stay) {
    const V q = load(old.q + j * W);
    const float h = r.h[j * r.ldh + j];
    const I place = g.place(q - gradient / h, member);
    Step s = {g.value(place), g.code(place), {}};
    if (stay) {
        const I moves = gain_of(s.q - q, gradient, h) < splat(-r.margin * h) * q * q;
        s.q = choose(moves, s.q, q), s.code = choose(moves, s.code, load(old.code + j * W));
    }
    s.gain = gain_of(s.q - q, gradient, h);
    return s;
}

// The columns of a unit under every member; the present one where none is better.
static void descend_unit(Rounding &g, const nf_run &r, const Columns &now, const float *w, int64_t from, int64_t to,
                         const Columns &trial, const Columns &best) {
    bool live = false;
    V size = {};
    for (int64_t j = from; j < to; j++) {
        const float h = r.h[j * r.ldh + j];
        const V q = load(now.q + j * W);
        live |= h > 0;
        size = size + h * (q * q);
    }
    if (!live) return;
    g.to_unit(r.unit[from]);
    const I present = g.member;
    I chosen = present;
    V least = {};
    for (int m = -1; m < g.l.members; m++) {  // -1: the present member, whose codes may stay
        for (int64_t j = from; j < to; j++) store(trial.gradient + j * W, load(now.gradient + j * W));
        V total = {};
        for (int64_t j = from; j < to; j++) {
            if (!(r.h[j * r.ldh + j] > 0)) {  // the loss does not see this input: the nearest level
                V q = load(now.q + j * W), code = load(now.code + j * W);
                if (m >= 0) {
                    const I place = g.place(load(w + j * W), splat(m));
                    q = g.value(place), code = g.code(place);
                }
                store(trial.q + j * W, q), store(trial.code + j * W, code);
                continue;
            }
            const Step s = coordinate(g, r, now, load(trial.gradient + j * W), j, m < 0 ? present : splat(m), m < 0);
            total = total + s.gain;
            add(trial.gradient, s.q - load(now.q + j * W), r.h + j * r.ldh, j + 1, to);
            store(trial.q + j * W, s.q), store(trial.code + j * W, s.code);
        }
        const I better = m < 0 ? splat(-1) : (total < least - r.margin * size) & (present != splat(m));
        least = choose(better, total, least);
        chosen = m < 0 ? present : (splat(m) & better) | (chosen & ~better);
        for (int64_t j = from; j < to; j++) {
            store(best.q + j * W, choose(better, load(trial.q + j * W), load(best.q + j * W)));
            store(best.code + j * W, choose(better, load(trial.code + j * W), load(best.code + j * W)));
        }
    }
    for (int64_t j = from; j < to; j++) {
        add(now.gradient, load(best.q + j * W) - load(now.q + j * W), r.h + j * r.ldh, to, r.width);
        store(now.q + j * W, load(best.q + j * W)), store(now.code + j * W, load(best.code + j * W));
    }
    g.set_unit(r.unit[from], chosen);
}

static void descend(const nf_lattice &l, const nf_run &r, int64_t row, int count, void *scratch) {
    Rounding g(l, row, count);
    const int64_t n = r.width * W;
    float *base = static_cast<float *>(scratch);
    const Columns now = {base, base + n, base + 2 * n}, trial = {base + 3 * n, base + 4 * n, base + 5 * n};
    const Columns best = {nullptr, base + 6 * n, base + 7 * n};
    float *w = base + 8 * n;
    read(r.gradient, r.width, g, r.width, now.gradient);
    read(r.q, r.ldw, g, r.width, now.q);
    if (l.choose) read(r.w, r.ldw, g, r.width, w);
    for (int i = 0; i < W; i++) {
        const uint8_t *codes = r.codes + g.row_of(i) * r.ldc;
        for (int64_t j = 0; j < r.width; j++) now.code[j * W + i] = codes[j];
    }
    for (int64_t j = 0; j < r.width;) {
        g.to_block(r.block[j]);
        if (l.choose) {
            const int64_t to = end_of_unit(r.unit, j, r.width);
            descend_unit(g, r, now, w, j, to, trial, best);
            j = to;
            continue;
        }
        g.to_unit(r.unit[j]);
        if (r.h[j * r.ldh + j] > 0) {
            const Step s = coordinate(g, r, now, load(now.gradient + j * W), j, g.member, true);
            add(now.gradient, s.q - load(now.q + j * W), r.h + j * r.ldh, j + 1, r.width);
            store(now.q + j * W, s.q), store(now.code + j * W, s.code);
        }
        j++;
    }
    write(now.q, r.width, g, r.q, r.ldw);
    write(now.code, r.width, g, r.codes, r.ldc);
}

}  // namespace NF_ISA

NF_DEFINE_TABLE(Sweepers, sweepers, 2 * NF_ISA::W, NF_ISA::W, NF_ISA::sweep_scratch, NF_ISA::descend_scratch, NF_ISA::sweep, NF_ISA::descend)

}  // namespace nf
