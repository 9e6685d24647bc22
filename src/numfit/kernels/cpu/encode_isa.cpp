// Fitting and encoding for one instruction set; compiled once for each, like isa.cpp and under the same restrictions.
//
// A lane is a block: W blocks lie side by side, so that scales, errors and the choice among them are plain vector arithmetic, no
// sum runs across lanes, and blocks of any length do. The cost is a transposition, once for all members and candidates.
#include "encode.h"
#include "lanes.h"

namespace nf {
namespace NF_ISA {

// -- levels -----------------------------------------------------------------------------------------------------------

// Nearest level by comparing with every threshold.
struct Chain {
    const float *levels, *thresholds;
    int steps;
    explicit Chain(const Ranker &r) : levels(r.levels), thresholds(r.thresholds), steps(r.ranks - 1) {}
    V operator()(V u, int) const {
        V q = splat(levels[0]);
        for (int k = 0; k < steps; k++) q = u > splat(thresholds[k]) ? splat(levels[k + 1]) : q;
        return q;
    }
};

// The bucket of each number, an index into the tables of its ranker.
template <bool negative> struct Buckets {
    V least, most;
    I mask, sign_mask;
    Shift shift, sign;
    explicit Buckets(const Ranker &r)
        : least(splat(r.least)), most(splat(r.most)), mask(splat((1 << r.bits) - 1)), sign_mask(splat(1 << r.bits)),
          shift(shift_by(r.shift)), sign(shift_by(31 - r.bits)) {}
    I operator()(V u) const {
        const I place = bits(smaller(larger(negative ? magnitude(u) : u, least), most)) >> shift;
        return negative ? (place & mask) | ((bits(u) >> sign) & sign_mask) : place;
    }
};

// Nearest level by its bucket's one threshold, in tables of any size. Without negative numbers the level above it is the next entry.
template <bool negative> struct Table {
    Buckets<negative> bucket;
    const float *edge, *low, *high;
    explicit Table(const Ranker &r) : bucket(r), edge(r.edge), low(r.low), high(r.high) {}
    V operator()(V u, int) const {
        if (negative) {
            const I i = bucket(u);
            return u > gather(edge, i) ? gather(high, i) : gather(low, i);
        }
        const I i = bucket(u), place = i & bucket.mask;
        return gather(low, (u > gather(edge, place) ? i + 1 : i) & bucket.mask);
    }
};

#if defined(__AVX512F__)
// The same in tables of 32 entries, which are two registers each; only the five lowest bits of an index count.
template <bool negative> struct Registers {
    Buckets<negative> bucket;
    V edge[2], low[2], high[2];
    explicit Registers(const Ranker &r) : bucket(r) {
        for (int i = 0; i < 2; i++) edge[i] = load(r.edge + i * W), low[i] = load(r.low + i * W), high[i] = load(r.high + i * W);
    }
    V operator()(V u, int) const {
        const I i = bucket(u);
        if (negative) return u > pick(edge, i) ? pick(high, i) : pick(low, i);
        return pick(low, u > pick(edge, i) ? i + 1 : i);
    }
    static V pick(const V *t, I i) { return V(_mm512_permutex2var_ps(__m512(t[0]), __m512i(i), __m512(t[1]))); }
};
#endif

// Levels 0, step … top by arithmetic, for numbers that are not negative.
struct Uniform {
    float step, inverse, top;
    bool exact;  // dividing by a power of two is multiplying
    explicit Uniform(const Search &s)
        : step(s.step), inverse(1.0f / s.step), top(s.levels[s.ranks - 1]), exact((bits(splat(s.step))[0] & 0x7fffff) == 0) {}
    V operator()(V u, int) const {
        const V steps = exact ? u * inverse : u / step;
        return clamp(ceiling(steps - 0.5f) * step, 0.0f, top);
    }
};

// Integers 0 … top shifted by the zero point of each candidate.
struct Affine {
    const V *zero;
    float top;
    V operator()(V u, int candidate) const { return clamp(nearest(u) + zero[candidate], 0.0f, top) - zero[candidate]; }
};

// Calls f(rank) with what finds the levels of `r` fastest here.
template <class F> static inline void with_ranks(const Ranker &r, F &&f) {
#if defined(__AVX512F__)
    if (r.count && r.size == 32) return r.negative ? f(Registers<true>(r)) : f(Registers<false>(r));
#endif
    if (r.count == 0 || r.ranks <= kChain) return f(Chain(r));
    return r.negative ? f(Table<true>(r)) : f(Table<false>(r));
}

// -- errors -----------------------------------------------------------------------------------------------------------

template <bool weighted, class Rank> static inline V squared(V w, const float *h, V inverse, const Rank &rank, int candidate) {
    const V u = w * inverse;
    const V d = rank(u, candidate) - u;
    return weighted ? d * d * load(h) : d * d;
}

// Squared errors, in units of the scales, of x, h [n][W] under P candidates.
template <int P, bool weighted, class Rank>
static void sum_columns(const float *x, const float *h, int64_t n, const Rank &rank, const V *inverse, V *out) {
    V total[P] = {};
    for (int64_t from = 0; from < n; from += kSection) {
        const int64_t to = from + kSection < n ? from + kSection : n;
        V part[P] = {};
        for (int64_t j = from; j < to; j++) {
            const V w = load(x + j * W);
            for (int p = 0; p < P; p++) part[p] += squared<weighted>(w, h + j * W, inverse[p], rank, p);
        }
        for (int p = 0; p < P; p++) total[p] += part[p];
    }
    for (int p = 0; p < P; p++) out[p] = total[p];
}

template <class Rank>
static void sums(const float *x, const float *h, int64_t n, const Rank &rank, const V *inverse, int candidates, V *out) {
    if (h) return candidates == 2 ? sum_columns<2, true>(x, h, n, rank, inverse, out) : sum_columns<1, true>(x, h, n, rank, inverse, out);
    return candidates == 2 ? sum_columns<2, false>(x, x, n, rank, inverse, out) : sum_columns<1, false>(x, x, n, rank, inverse, out);
}

// The error of one unit of `n` columns under one member.
template <bool weighted, class Rank>
static inline V unit_error(const float *x, const float *h, int64_t n, const Rank &rank, V inverse) {
    V total = squared<weighted>(load(x), h, inverse, rank, 0);
    for (int64_t j = 1; j < n; j++) total += squared<weighted>(load(x + j * W), h + j * W, inverse, rank, 0);
    return total;
}

// Errors of all units, each under its best member; where `choice` is given, that member [units][W].
template <bool weighted>
static V sum_units(const Search &s, const float *x, const float *h, int64_t n, V inverse, uint8_t *choice) {
    V total = {}, part = {};
    int64_t done = 0;
    for (int64_t from = 0; from < n; from += s.unit) {
        const int64_t count = from + s.unit < n ? s.unit : n - from;
        V best = {};
        I member = {};
        for (int m = 0; m < s.members; m++) {
            V error;
            with_ranks(s.rankers[m], [&](const auto &rank) {
                error = unit_error<weighted>(x + from * W, h + from * W, count, rank, inverse);
            });
            const I better = m == 0 ? splat(-1) : error < best;
            member = better ? splat(m) : member;
            best = better ? error : best;
        }
        if (choice) store_bytes(choice + done * W, member);
        part += best;
        if (++done % kSection == 0) total += part, part = V{};
    }
    return total + part;
}

static void errors_of(const Search &s, int m, const float *x, const float *h, int64_t n, const V *scale, const V *zero, int candidates,
                      V *out) {
    V inverse[2];
    for (int p = 0; p < candidates; p++) inverse[p] = 1.0f / scale[p];
    if (s.unit) {
        for (int p = 0; p < candidates; p++) {
            out[p] = h ? sum_units<true>(s, x, h, n, inverse[p], nullptr) : sum_units<false>(s, x, x, n, inverse[p], nullptr);
        }
    } else if (s.affine) {
        sums(x, h, n, Affine{zero, s.tops[0]}, inverse, candidates, out);
    } else if (s.step != 0) {
        sums(x, h, n, Uniform(s), inverse, candidates, out);
    } else {
        with_ranks(s.rankers[m], [&](const auto &rank) { sums(x, h, n, rank, inverse, candidates, out); });
    }
    for (int p = 0; p < candidates; p++) out[p] = out[p] * scale[p] * scale[p];
}

// -- scales -----------------------------------------------------------------------------------------------------------

// 2^e for e in -127 … 127.
static inline V power(I e) { return number(e > -127 ? (e + 127) << 23 : splat(0x00400000)); }

static inline I clamp_exponent(I e) { return smaller(larger(e, splat(-127)), splat(127)); }

// The OCP exponent of blocks with such largest magnitudes; see ocp_exponent in scale.py.
static I ocp(V amax, float top, bool ceil) {
    const V tiny = larger(amax, splat(0x1p-126f));
    I e;
    if (ceil) {
        const I b = bits(tiny / top);
        e = (b >> 23) - 126;
        e += (b & 0x7fffff) == 0 ? splat(-1) : I{};
        e = b > 0x007fffff ? e : b > 0x00400000 ? splat(-126) : splat(-127);
    } else {
        e = (bits(tiny) >> 23) - (bits(splat(top)) >> 23);
    }
    return clamp_exponent(amax > 0.0f ? e : splat(-127));
}

// The stored part of wanted scales; see to_stored in scale.py.
static V stored(const Search &s, V wanted, V parent, bool has_parent) {
    if (s.rounding == NF_FREE) return larger(wanted, splat(s.low));
    if (s.rounding == NF_POWER) {
        const I b = bits(larger(wanted, splat(0x1p-126f)));
        const V mantissa = number((b & 0x7fffff) | 0x3f000000);
        return power(clamp_exponent((b >> 23) - (mantissa >= 0.70710678f ? splat(126) : splat(127))));
    }
    constexpr float kDown = 0x1p-32f;  // so that 2^23 times the largest bf16 is still a number
    const V v = clamp(has_parent ? wanted / parent : wanted, s.low, s.high) * kDown;
    const I unit = larger((bits(v) & 0x7f800000) - (s.mantissa << 23), bits(splat(s.quantum * kDown)));
    const V big = number((unit + (23 << 23)) | 0x00400000);  // 1.5 · 2^23 units: its neighbours are one unit apart
    const V sum = v + big;
    V out = sum - big;
    if (s.even) out = clamp(out + ((bits(sum) & 1) != 0 ? number(unit) : V{}), s.least * kDown, s.most * kDown);
    return out * (1.0f / kDown);
}

struct Candidates {
    const Search &s;
    V amax, parent;
    bool has_parent;
    // Candidates [from, from + count) of a member: what is stored, and what that means.
    void operator()(int m, int from, int count, V *value, V *scale) const {
        const float top = s.tops[m];
        for (int p = 0; p < count; p++) {
            const float factor = s.factors[from + p];
            if (s.rounding >= NF_OCP_FLOOR) {
                const I base = ocp(amax, top, s.rounding == NF_OCP_CEIL);
                value[p] = scale[p] = power(clamp_exponent(base + static_cast<int32_t>(factor)));
            } else {
                value[p] = stored(s, amax / top * factor, parent, has_parent);
                scale[p] = has_parent && s.rounding != NF_FREE ? value[p] * parent : value[p];
            }
        }
    }
};

// -- the search -------------------------------------------------------------------------------------------------------

// Where blocks with these least errors cannot be improved any more: once `reach` of a magnitude `extent` is clipped, the square
// of what is missing is less than the error. The margins cover the roundings of both.
static inline bool hopeless(V extent, V reach, V share, V best) {
    const V missing = larger(extent * (1 - 0x1p-20f) - reach, V{});
    return !any(missing * missing * (1 - 1e-5f) * share <= best);
}

struct Blocks {
    float *x, *h;  // [n][W]
    V amax, top_h;
};

static void search_blocks(const Search &s, const Group &g, const Blocks &b, const Candidates &candidates, float *scratch) {
    const int members = s.unit ? 1 : s.members;
    V best = splat(__builtin_inff()), value_of_best = s.unit ? splat(1.0f) : V{}, scale_of_best = splat(1.0f);
    I member = {};
    V *errors = reinterpret_cast<V *>(scratch), *values = errors + members;
    if (s.each) {
        for (int m = 0; m < members; m++) errors[m] = best, values[m] = V{};
    }
    if (!s.each && members == 1 && s.candidates == 1) {  // nothing to choose
        candidates(0, 0, 1, &value_of_best, &scale_of_best);
    } else {
        for (int c = 0; c < s.candidates; c += 2) {
            const int count = c + 1 < s.candidates ? 2 : 1;
            bool open = c < s.unpruned;
            for (int m = 0; m < members; m++) {
                V value[2], scale[2], error[2];
                candidates(m, c, count, value, scale);
                if (c >= s.unpruned && hopeless(b.amax, scale[0] * s.tops[m], b.top_h, s.each ? errors[m] : best)) continue;
                open = true;
                errors_of(s, m, b.x, b.h, g.n, scale, nullptr, count, error);
                for (int p = 0; p < count; p++) {
                    if (s.each) {
                        const I better = error[p] < errors[m];
                        errors[m] = better ? error[p] : errors[m];
                        values[m] = better ? value[p] : values[m];
                    } else {  // equal errors: the lower member, its larger scale
                        const I better = (error[p] < best) | ((error[p] == best) & (splat(m) < member));
                        best = better ? error[p] : best;
                        value_of_best = better ? value[p] : value_of_best;
                        scale_of_best = better ? scale[p] : scale_of_best;
                        member = better ? splat(m) : member;
                    }
                }
            }
            if (!open) break;
        }
    }
    for (int l = 0; l < g.count; l++) {
        if (s.each) {
            for (int m = 0; m < members; m++) g.scale[l][m] = values[m][l], g.error[l][m] = errors[m][l];
        } else {
            if (s.candidates) g.scale[l][0] = value_of_best[l];
            else scale_of_best[l] = g.scale[l][0];
            if (!s.unit && s.members > 1) g.member[l][0] = static_cast<uint8_t>(member[l]);
        }
    }
    if (!s.unit) return;
    uint8_t *choice = reinterpret_cast<uint8_t *>(scratch);
    const V inverse = 1.0f / scale_of_best;
    if (b.h) sum_units<true>(s, b.x, b.h, g.n, inverse, choice);
    else sum_units<false>(s, b.x, b.x, g.n, inverse, choice);
    const int64_t units = (g.n + s.unit - 1) / s.unit;
    for (int l = 0; l < g.count; l++) {
        for (int64_t u = 0; u < units; u++) g.member[l][u] = choice[u * W + l];
    }
}

// Asymmetric integers: both ends shrink together (`_affine` in fit.py).
static void search_affine(const Search &s, const Group &g, const Blocks &b, V parent, bool has_parent) {
    V low = {}, high = {};
    for (int64_t j = 0; j < g.n; j++) {
        const V w = load(b.x + j * W);
        low = smaller(low, w), high = larger(high, w);
    }
    const float top = s.tops[0];
    const V extent = high - low;
    V best = splat(__builtin_inff()), value_of_best = {}, zero_of_best = {};
    for (int c = 0; c < s.candidates; c += 2) {
        const int count = c + 1 < s.candidates ? 2 : 1;
        V value[2], scale[2], zero[2], error[2];
        for (int p = 0; p < count; p++) {
            const float factor = s.factors[c + p];
            value[p] = stored(s, extent / top * factor, parent, has_parent);
            scale[p] = has_parent && s.rounding != NF_FREE ? value[p] * parent : value[p];
            zero[p] = clamp(nearest(-low * factor / scale[p]), 0.0f, top);
        }
        if (s.candidates == 1) {
            value_of_best = value[0], zero_of_best = zero[0];
            break;
        }
        // what both ends lack together is least as a sum of squares when they share it
        if (c >= s.unpruned && !b.h && hopeless(extent, scale[0] * top, splat(0.5f), best)) break;
        errors_of(s, 0, b.x, b.h, g.n, scale, zero, count, error);
        for (int p = 0; p < count; p++) {
            const I better = error[p] < best;
            best = better ? error[p] : best;
            value_of_best = better ? value[p] : value_of_best;
            zero_of_best = better ? zero[p] : zero_of_best;
        }
    }
    for (int l = 0; l < g.count; l++) g.scale[l][0] = value_of_best[l], g.zero[l][0] = zero_of_best[l];
}

static void fit(const Search &s, const Group &g) {
    Blocks b = {g.scratch, g.h ? g.scratch + g.n * W : nullptr, V{}, splat(1.0f)};
    float *rest = g.scratch + 2 * g.n * W;
    side_by_side(g.w, g.n, s.mirrored, b.x);
    if (g.h) side_by_side(g.h, g.n, false, b.h);
    const V parent = g.parent ? load(g.parent) : splat(1.0f);
    if (s.affine) return search_affine(s, g, b, parent, g.parent != nullptr);
    for (int64_t j = 0; j < g.n; j++) {
        const V w = magnitude(load(b.x + j * W));
        if (g.h) b.top_h = w > b.amax ? load(b.h + j * W) : b.top_h;
        b.amax = larger(b.amax, w);
    }
    search_blocks(s, g, b, Candidates{s, b.amax, parent, g.parent != nullptr}, rest);
}

static void row_errors(const Search &s, const Group &g, const float *scales, const float *zeros, float *const *out) {
    float *x = g.scratch, *h = g.h ? g.scratch + g.n * W : nullptr;
    side_by_side(g.w, g.n, s.mirrored, x);
    if (g.h) side_by_side(g.h, g.n, false, h);
    const int sets = s.unit ? 1 : s.members;
    for (int m = 0; m < sets; m++) {
        for (int c = 0; c < s.candidates; c += 2) {
            const int count = c + 1 < s.candidates ? 2 : 1, at = m * s.candidates + c;
            V scale[2], zero[2], error[2];
            for (int p = 0; p < count; p++) scale[p] = splat(scales[at + p]), zero[p] = splat(zeros ? zeros[at + p] : 0.0f);
            errors_of(s, m, x, h, g.n, scale, zero, count, error);
            for (int l = 0; l < g.count; l++) {
                for (int p = 0; p < count; p++) out[l][at + p] = error[p][l];
            }
        }
    }
}

// -- codes ------------------------------------------------------------------------------------------------------------

static void encode(const Ranker &r, const float *w, int64_t n, float scale, const float *zero, uint8_t *out) {
    with_ranks(r, [&](const auto &rank) {
        const auto codes = [&](V x) {
            V u = x / scale;
            if (zero) u = u + *zero;
            return __builtin_convertvector(rank(u, 0), I);  // "levels" are codes
        };
        int64_t j = 0;
        for (; j + W <= n; j += W) store_bytes(out + j, codes(load(w + j)));
        if (j == n) return;
        float last[W] = {};
        uint8_t found[W];
        for (int64_t i = j; i < n; i++) last[i - j] = w[i];
        store_bytes(found, codes(load(last)));
        for (int64_t i = j; i < n; i++) out[i] = found[i - j];
    });
}

}  // namespace NF_ISA

#define NF_NAME_(isa) isa##_encoders
#define NF_NAME(isa) NF_NAME_(isa)
#define NF_STRING_(isa) #isa
#define NF_STRING(isa) NF_STRING_(isa)
const Encoders *NF_NAME(NF_ISA)() {
    static const Encoders table = {NF_STRING(NF_ISA), NF_ISA::W, NF_ISA::fit, NF_ISA::row_errors, NF_ISA::encode};
    return &table;
}

}  // namespace nf
