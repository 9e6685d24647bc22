// Attention over packed keys and values for one instruction set; compiled once for each, like isa.cpp and under the same
// restrictions. Two primitives do all of it, whatever rows are:
//
//     dot          y[row] = Σ_j x[j] · value[row][j]      keys of tokens; values of channels
//     accumulate   y[j] += Σ_row a[row] · value[row][j]   keys of channels; values of tokens
//
// Codes of b < 8 bits: sixteen lanes hold eight codes each, in b bytes; lane l, shift k is value 8l + k of a line. Levels are
// looked up in sixteen floats, which AVX-512 has an instruction for and which costs no more than converting an integer. Codes of
// 8 bits are converted; vector k, lane l is value 16k + l.
#include "attend.h"
#include "attend_lanes.h"

namespace nf {
namespace NF_ISA {

template <int n> struct Number { static constexpr int value = n; };

// Written out, so that an array indexed by k is registers from the start.
#define NF_EIGHT(step) step(0) step(1) step(2) step(3) step(4) step(5) step(6) step(7)

// How the lines of one block of a stream are read.
template <int bits, int tables> struct Lines {  // tables: 0 codes are levels, 1 one table, 2 a table for each half of a line
    static constexpr int kBits = bits;
    typedef uint32_t U __attribute__((vector_size(64)));
    const nf_stream &s;
    const uint8_t *codes;
    const float *table;  // 16 floats, the levels repeated
    const float *both;   // [lines][32], tables == 2

    // Vector k of a line's codes (8 bits: from memory; else from its lanes w), as numbers.
    template <int k> inline F value(const uint8_t *p, U w, const float *t, int32_t zero) const {
        if constexpr (bits == 8) {
            return __builtin_convertvector(widened(p + 16 * k) - zero, F);
        } else {
            const I c = I(w >> (k * bits));
            const I half = {0, 0, 0, 0, 0, 0, 0, 0, 16, 16, 16, 16, 16, 16, 16, 16};
            if constexpr (tables == 2) return pick32(t, (c & 15) | half);
            else if constexpr (tables == 1) return pick16(t, c);
            else return __builtin_convertvector((c & ((1 << bits) - 1)) - zero, F);
        }
    }
    // f(Number<k>, values) for the eight vectors of line i
    template <class Each> inline void each(int64_t i, const Each &f) const {
        const uint8_t *p = codes + i * 16 * bits;
        U w = {};
        if constexpr (bits < 8) w = U(lanes<bits>(p));
        const float *t = tables == 2 ? both + 32 * i : table;
        const int32_t zero = s.zero;
#define NF_STEP(k) f(Number<k>{}, value<k>(p, w, t, zero));
        NF_EIGHT(NF_STEP)
#undef NF_STEP
    }
};

// Which group of a line a lane (bits < 8) or a vector (8 bits) belongs to, and how lines and rows lie to one another.
struct Shape {
    int64_t per_line;  // groups of a line, at least 1
    int64_t parts;     // lines of a row, at least 1
    int64_t row, group;
    I lane_group;
    explicit Shape(const nf_stream &s) : row(s.row), group(s.group) {
        per_line = group < kLine ? kLine / group : 1;
        parts = row > kLine ? row / kLine : 1;
        for (int l = 0; l < 16; l++) lane_group[l] = static_cast<int32_t>(8 * l / (group < kLine ? group : kLine));
    }
    int64_t base(int64_t line) const { return line * kLine / group; }  // first group of a line
};

// Scales and lows of a block's `rows` rows, as floats.
static void read_groups(const nf_stream &s, int64_t block, int64_t head, int64_t capacity, int64_t rows, float *scale, float *low) {
    const int64_t groups = s.row / s.group, at = head * capacity * groups;
    widen(s.scale[block] + at, scale, rows * groups);
    if (low) widen(s.low[block] + at, low, rows * groups);
}

// Tables of the lines of a block: [lines][32].
static void read_members(const nf_stream &s, int64_t block, int64_t head, int64_t capacity, int64_t rows, float *both) {
    const int64_t units = s.row / s.unit, bytes = (units * s.member_bits + 7) / 8, lines = rows * s.row / kLine;
    const uint8_t *from = s.member[block] + head * capacity * bytes;
    const auto table = [&](int64_t value) {
        const int64_t r = value / s.row, u = value % s.row / s.unit, bit = u * s.member_bits;
        const uint8_t *p = from + r * bytes + bit / 8;
        const int pair = bit % 8 + s.member_bits > 8 ? p[0] | p[1] << 8 : p[0];
        const int m = pair >> (bit % 8) & ((1 << s.member_bits) - 1);
        return s.levels + (m < s.members ? m : 0) * kLevels;
    };
    for (int64_t i = 0; i < lines; i++) {
        store(both + 32 * i, load(table(i * kLine)));
        store(both + 32 * i + 16, load(table(i * kLine + kLine / 2)));
    }
}

// Calls f(lines) with what reads the block.
template <class Call>
static inline void with_lines(const nf_stream &s, int64_t block, int64_t head, int64_t capacity, const float *both, const Call &f) {
    const uint8_t *codes = s.codes[block] + head * capacity * (s.row * s.bits / 8);
    const auto go = [&](auto b, auto t) { f(Lines<decltype(b)::value, decltype(t)::value>{s, codes, s.levels, both}); };
    const auto bits = [&](auto t) {
        if (s.bits == 4) go(Number<4>{}, t);
        else if (s.bits == 3) go(Number<3>{}, t);
        else go(Number<2>{}, t);
    };
    if (s.bits == 8) go(Number<8>{}, Number<0>{});
    else if (s.unit) bits(Number<2>{});
    else if (s.levels) bits(Number<1>{});
    else bits(Number<0>{});
}

// x [row] → the order in which `each` gives values, with its sums by lane: out [parts][8][16], sums [parts][16]. Rows shorter than
// a line are repeated.
static void arrange(const nf_stream &s, const Shape &shape, const float *x, float *out, float *sums) {
    for (int64_t part = 0; part < shape.parts; part++) {
        for (int l = 0; l < 16; l++) {
            float total = 0.0f;
            for (int k = 0; k < 8; k++) {
                const int64_t j = (part * kLine + (s.bits == 8 ? 16 * k + l : 8 * l + k)) & (s.row - 1);
                out[(part * 8 + k) * 16 + l] = x[j];
                total += x[j];
            }
            sums[part * 16 + l] = total;
        }
    }
}

// y[row] = Σ_j x[j] · value[row][j]
template <class L>
static void dot(const L &lines, const nf_stream &s, const Shape &shape, int64_t rows, const float *scale, const float *low, const float *x,
                const float *sums, float *y) {
    const int64_t count = rows * s.row / kLine;
    if constexpr (L::kBits == 8) {  // groups are whole vectors
        const int64_t n = s.row / 16;
        int shift = 4;  // group = 1 << shift
        while (int64_t{1} << shift < s.group) shift++;
        for (int64_t i = 0; i < count; i++) {
            F acc[8];
            const float *xs = x + i % shape.parts * 128;
            lines.each(i, [&](auto number, F v) {
                constexpr int k = decltype(number)::value;
                const int64_t g = (i * kLine + 16 * k) >> shift;
                acc[k] = v * load(xs + 16 * k) * splat(scale[g]);
                if (low) acc[k] = fma(splat(low[g]), load(xs + 16 * k), acc[k]);
            });
            if (n >= 8) {
                const float part = sum(((acc[0] + acc[1]) + (acc[2] + acc[3])) + ((acc[4] + acc[5]) + (acc[6] + acc[7])));
                const int64_t row = i / shape.parts;
                y[row] = i % shape.parts ? y[row] + part : part;
                continue;
            }
            for (int r = 0; r < 8 / n; r++) {  // rows of a line: two or four
                F total = acc[r * n];
                for (int k = 1; k < n; k++) total = total + acc[r * n + k];
                y[i * 8 / n + r] = sum(total);
            }
        }
        return;
    }
    for (int64_t i = 0; i < count; i++) {
        const float *xs = x + i % shape.parts * 128;
        F acc[2] = {};
        lines.each(i, [&](auto number, F v) {
            constexpr int k = decltype(number)::value;
            acc[k % 2] = fma(v, load(xs + 16 * k), acc[k % 2]);
        });
        const F factor = pick16(scale + shape.base(i), shape.lane_group);
        F total = (acc[0] + acc[1]) * factor;
        if (low) total = fma(pick16(low + shape.base(i), shape.lane_group), load(sums + i % shape.parts * 16), total);
        if (s.row >= kLine) {
            const int64_t row = i / shape.parts;
            const float part = sum(total);
            y[row] = i % shape.parts ? y[row] + part : part;
        } else {
            const int64_t n = kLine / s.row, width = 16 / n;  // rows of a line, lanes of a row
            for (int64_t r = 0; r < n; r++) {
                float part = 0.0f;
                for (int64_t l = 0; l < width; l++) part += total[r * width + l];
                y[i * n + r] = part;
            }
        }
    }
}

// y[j] += Σ_row a[row] · value[row][j] for rows of one block; work [2 · groups of all rows].
template <class L>
static void accumulate(const L &lines, const nf_stream &s, const Shape &shape, int64_t rows, const float *scale, const float *low,
                       const float *a, float *work, float *y) {
    const int64_t groups = s.row / s.group, lines_of_rows = rows * s.row / kLine;
    float *by_scale = work, *by_low = work + rows * groups + 16;
    if (groups == 1) {
        for (int64_t r = 0; r < rows; r++) by_scale[r] = a[r] * scale[r];
        for (int64_t r = 0; r < rows && low; r++) by_low[r] = a[r] * low[r];
    } else {
        for (int64_t r = 0; r < rows; r++)
            for (int64_t g = r * groups; g < (r + 1) * groups; g++) by_scale[g] = a[r] * scale[g];
        for (int64_t r = 0; r < rows && low; r++)
            for (int64_t g = r * groups; g < (r + 1) * groups; g++) by_low[g] = a[r] * low[g];
    }
    int shift = 4;  // group = 1 << shift
    while (int64_t{1} << shift < s.group) shift++;
    constexpr bool bytes = L::kBits == 8;
    for (int64_t part = 0; part < shape.parts; part++) {
        F acc[8] = {}, rest[8] = {};  // rest: the lows, by lane, or by vector for 8 bits
        for (int64_t i = part; i < lines_of_rows; i += shape.parts) {
            if constexpr (bytes) {
                lines.each(i, [&](auto number, F v) {
                    constexpr int k = decltype(number)::value;
                    const int64_t g = (i * kLine + 16 * k) >> shift;
                    acc[k] = fma(v, splat(by_scale[g]), acc[k]);
                    if (low) rest[k] = rest[k] + splat(by_low[g]);
                });
            } else {
                const int64_t base = (i * kLine) >> shift;
                const F factor = pick16(by_scale + base, shape.lane_group);
                lines.each(i, [&](auto number, F v) {
                    constexpr int k = decltype(number)::value;
                    acc[k] = fma(v, factor, acc[k]);
                });
                if (low) rest[0] = rest[0] + pick16(by_low + base, shape.lane_group);
            }
        }
        alignas(64) float total[8 * 16];
#define NF_STEP(k) store(total + 16 * k, acc[k] + rest[bytes ? k : 0]);
        NF_EIGHT(NF_STEP)
#undef NF_STEP
        for (int k = 0; k < 8; k++)
            for (int l = 0; l < 16; l++) y[(part * kLine + (bytes ? 16 * k + l : 8 * l + k)) & (s.row - 1)] += total[16 * k + l];
    }
}

constexpr float kNone = -1e30f;  // no token seen

static float *take(float *&scratch, int64_t n) {
    float *p = scratch;
    scratch += (n + 31) / 16 * 16;  // vectors may be read beyond the end
    return p;
}

// Numbers of the rows of a block, read once for all queries.
struct Rows {
    const nf_stream &s;
    Shape shape;
    int64_t capacity;  // rows of a block
    float *scale, *low, *both, *work;
    Rows(const nf_stream &stream, int64_t dim, int64_t block, float *&scratch) : s(stream), shape(stream) {
        capacity = s.channel ? block / s.row * dim : block;
        const int64_t groups = capacity * (s.row / s.group);
        scale = take(scratch, groups), work = take(scratch, 2 * groups + 32);
        low = s.low ? take(scratch, groups) : nullptr;
        both = s.unit ? take(scratch, capacity * s.row / kLine * 32 + 32) : nullptr;
    }
    void read(int64_t block, int64_t head, int64_t rows) {
        read_groups(s, block, head, capacity, rows, scale, low);
        if (s.unit) read_members(s, block, head, capacity, rows, both);
    }
};

static void attend(const Piece &p) {
    float *scratch = p.scratch;
    Rows keys(*p.keys, p.dim, p.block, scratch), values(*p.values, p.width, p.block, scratch);
    float *score = take(scratch, p.block), *x = take(scratch, 8 * 128), *sums = take(scratch, 128);
    float *arranged = take(scratch, p.queries * 2 * 128), *arranged_sums = take(scratch, p.queries * 32);
    float *row_y = take(scratch, p.width);
    const nf_stream &k = *p.keys, &v = *p.values;
    for (int64_t r = 0; r < p.queries; r++) {
        p.most[r] = kNone, p.sum[r] = 0.0f;
        for (int64_t d = 0; d < p.width; d++) p.out[r * p.width + d] = 0.0f;
        if (!k.channel) arrange(k, keys.shape, p.q + r * p.dim, arranged + r * 256, arranged_sums + r * 32);
    }
    for (int64_t block = p.first; block < p.last; block++) {
        const int64_t left = p.tokens - block * p.block, count = left < p.block ? left : p.block;
        keys.read(block, p.head, k.channel ? count / k.row * p.dim : count);
        values.read(block, p.head, v.channel ? count / v.row * p.width : count);
        for (int64_t r = 0; r < p.queries; r++) {
            const float *q = p.q + r * p.dim;
            with_lines(k, block, p.head, keys.capacity, keys.both, [&](auto lines) {
                if (!k.channel) {
                    dot(lines, k, keys.shape, count, keys.scale, keys.low, arranged + r * 256, arranged_sums + r * 32, score);
                    return;
                }
                for (int64_t i = 0; i < count; i++) score[i] = 0.0f;
                const int64_t groups = k.row / k.group;
                for (int64_t w = 0; w < count / k.row; w++) {  // windows of tokens
                    auto window = lines;
                    window.codes += w * p.dim * (k.row * k.bits / 8);
                    if (window.both) window.both += w * p.dim * k.row / kLine * 32;
                    accumulate(window, k, keys.shape, p.dim, keys.scale + w * p.dim * groups,
                               keys.low ? keys.low + w * p.dim * groups : nullptr, q, keys.work, score + w * k.row);
                }
            });
            const float bias = p.bias ? p.bias[r] : 0.0f;
            const float *mask = p.mask ? p.mask + block * p.block : nullptr;
            F top = splat(p.most[r]);
            for (int64_t i = 0; i < count; i += 16) {
                F s = load(score + i) + splat(bias);
                if (mask) {  // what is masked out counts for nothing, even a NaN; any other NaN stays one
                    const F added = load(mask + i);
                    s = s + added;
                    s = (added <= splat(kNone)) | (s < splat(kNone)) ? splat(kNone) : s;
                }
                store(score + i, s);
                top = s > top ? s : top;
            }
            float now = top[0];
            for (int l = 1; l < 16; l++) now = top[l] > now ? top[l] : now;
            alignas(64) float lane[32] = {};
            for (int64_t i = 0; i < count; i++) score[i] = exponential(score[i] - now);
            if (now == kNone)
                for (int64_t i = 0; i < count; i++) score[i] *= 0.0f;  // all of them masked, or NaN, which stays
            for (int64_t i = 0; i < count; i += 16)
                for (int l = 0; l < 16; l++) lane[l] += score[i + l];
            const float kept = p.most[r] == now ? 1.0f : exponential(p.most[r] - now);
            p.sum[r] = p.sum[r] * kept + sum(load(lane));
            p.most[r] = now;
            float *out = p.out + r * p.width;
            if (kept != 1.0f)
                for (int64_t d = 0; d < p.width; d++) out[d] *= kept;
            with_lines(v, block, p.head, values.capacity, values.both, [&](auto lines) {
                if (!v.channel) {
                    accumulate(lines, v, values.shape, count, values.scale, values.low, score, values.work, out);
                    return;
                }
                const int64_t groups = v.row / v.group;
                for (int64_t w = 0; w < count / v.row; w++) {
                    auto window = lines;
                    window.codes += w * p.width * (v.row * v.bits / 8);
                    if (window.both) window.both += w * p.width * v.row / kLine * 32;
                    arrange(v, values.shape, score + w * v.row, x, sums);
                    dot(window, v, values.shape, p.width, values.scale + w * p.width * groups,
                        values.low ? values.low + w * p.width * groups : nullptr, x, sums, row_y);
                    for (int64_t d = 0; d < p.width; d++) out[d] += row_y[d];
                }
            });
        }
    }
}

}  // namespace NF_ISA

NF_DEFINE_TABLE(Attenders, attenders, NF_ISA::attend)

}  // namespace nf
