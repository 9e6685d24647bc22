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

    int64_t row_of(int lane) const { return row + (lane < count ? lane : count - 1); }

    void to_block(int64_t b) {
        if (b == block) return;
        block = b;
        for (int i = 0; i < W; i++) {
            const int64_t at = l.one_scale ? 0 : row_of(i) * l.blocks + b;
            scale[i] = l.scale[at];
            if (l.zero) zero[i] = l.zero[at];
        }
    }
    void to_unit(int64_t u) {
        if (u == unit || !l.member) return;
        unit = u;
        for (int i = 0; i < W; i++) member[i] = l.member[l.one_member ? 0 : row_of(i) * l.units + u] % l.members;
    }
    void set_unit(int64_t u, I chosen) {
        unit = u, member = chosen;
        for (int i = 0; i < count; i++) l.member[row_of(i) * l.units + u] = static_cast<uint8_t>(chosen[i]);
    }
    // Index of the nearest level in the tables: the number of thresholds below x / scale + zero.
    I place(V x, I m) const {
        V u = x / scale;
        if (l.zero) u = u + zero;
        I at = m * l.entries;
        for (int step = l.entries / 2; step; step /= 2) at += (u > gather(l.thresholds, at + (step - 1))) & step;
        return at;
    }
    V value(I place) const {
        V level = gather(l.levels, place);
        if (l.zero) level = level - zero;
        return level * scale;
    }
    I code(I place) const { return __builtin_convertvector(gather(l.codes, place), I); }
    // Least and largest value.
    V low() const { return value(member * l.entries); }
    V high() const { return value(member * l.entries + (l.entries - 1)); }
};

static inline V choose(I mask, V a, V b) { return number((bits(a) & mask) | (bits(b) & ~mask)); }

// rows → columns side by side [n][W], and back into the rows that exist
static void read(const float *from, int64_t stride, const Rounding &g, int64_t n, float *to) {
    const float *runs[W];
    for (int i = 0; i < W; i++) runs[i] = from + g.row_of(i) * stride;
    side_by_side(runs, n, false, to);
}
static void write(const float *from, int64_t n, const Rounding &g, float *to, int64_t stride) {
    for (int64_t j = 0; j < n; j += W) {
        const int columns = n - j < W ? static_cast<int>(n - j) : W;
        V tile[W];
        for (int i = 0; i < W; i++) tile[i] = i < columns ? load(from + (j + i) * W) : V{};
        transpose(tile);
        for (int i = 0; i < g.count; i++) {
            float *row = to + g.row_of(i) * stride + j;
            if (columns == W) store(row, tile[i]);
            else for (int c = 0; c < columns; c++) row[c] = tile[i][c];
        }
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

static int64_t sweep_scratch(int64_t width) { return 5 * width * W * 4; }

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

static void sweep(const nf_lattice &l, const nf_panel &p, int64_t row, int count, void *scratch) {
    Rounding g = {l, row, count};
    float *x = static_cast<float *>(scratch), *error = x + p.width * W, *trial = error + p.width * W;
    float *original = trial + p.width * W, *before = original + p.width * W;
    read(p.w, p.ldw, g, p.width, x);
    if (p.r) read(p.original, p.width, g, p.width, original);
    for (int64_t i = p.start; i < p.stop; i++) {
        g.to_block(p.block[i]);
        if (l.choose && (i == p.start || p.unit[i] != p.unit[i - 1])) {
            g.set_unit(p.unit[i], best_member(g, p, x, i, end_of_unit(p.unit, i, p.stop), trial));
        }
        g.to_unit(p.unit[i]);
        const V now = load(x + i * W);
        const I place = g.place(now, g.member), code = g.code(place);
        for (int k = 0; k < count; k++) p.codes[(row + k) * p.ldc + i] = static_cast<uint8_t>(code[k]);
        const V e = (now - g.value(place)) / p.u[i * p.ldu + i];
        store(error + i * W, e);
        subtract(x, e, p.u + i * p.ldu, i + 1, p.width);
        if (!p.before) continue;
        const V cut = smaller(larger(now, g.low()), g.high());
        store(before + i * W, cut);
        if (p.p) add(x, cut, p.p + i * p.ldp, i + 1, p.width);
        if (p.r) add(x, load(original + i * W) - cut, p.r + i * p.ldr, i + 1, p.width);
    }
    const int64_t swept = p.stop - p.start;
    write(x + p.stop * W, p.width - p.stop, g, p.w + p.stop, p.ldw);
    write(error + p.start * W, swept, g, p.error + p.start, p.width);
    if (p.before) write(before + p.start * W, swept, g, p.before + p.start, p.width);
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
    Step s = {g.value(place), gather(g.l.codes, place), {}};
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
                    q = g.value(place), code = gather(g.l.codes, place);
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
    Rounding g = {l, row, count};
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
    for (int i = 0; i < count; i++) {
        uint8_t *codes = r.codes + (row + i) * r.ldc;
        for (int64_t j = 0; j < r.width; j++) codes[j] = static_cast<uint8_t>(now.code[j * W + i]);
    }
}

}  // namespace NF_ISA

NF_DEFINE_TABLE(Sweepers, sweepers, NF_ISA::W, NF_ISA::sweep_scratch, NF_ISA::descend_scratch, NF_ISA::sweep, NF_ISA::descend)

}  // namespace nf
