// Fitting and encoding for one instruction set; compiled once for each, like isa.cpp and under the same restrictions.
//
// A lane is a block: W blocks lie side by side, so that scales, errors and the choice among them are plain vector arithmetic, no
// sum runs across lanes, and blocks of any length do. The cost is a transposition, once for all members and candidates.
#include "encode_levels.h"

namespace nf {
namespace NF_ISA {

// -- errors -----------------------------------------------------------------------------------------------------------

template <bool weighted, class Rank> static inline V squared(V w, const float *h, V inverse, const Rank &rank) {
    const V u = w * inverse;
    const V d = rank(u) - u;
    return weighted ? d * d * load(h) : d * d;
}

// What is known before a sum: the error that it must not exceed to matter. Sums only grow, and so does what is made of them by
// rounding multiplications; a sum that exceeds the limit in every lane can therefore stop where it is.
struct Limit {
    V scale, error;
    V of(V sum) const { return sum * scale * scale; }
    bool exceeded(V sum) const { return !any(of(sum) <= error); }
};

// Squared errors, in units of the scales, of x, h [n][W].
template <bool weighted, class Rank>
static V sum_columns(const float *x, const float *h, int64_t n, const Rank &rank, V inverse, const Limit &limit) {
    V total = {};
    for (int64_t from = 0; from < n; from += kSection) {
        const int64_t to = from + kSection < n ? from + kSection : n;
        V part = {};
#pragma GCC unroll 4
        for (int64_t j = from; j < to; j++) part += squared<weighted>(load(x + j * W), h + j * W, inverse, rank);
        total += part;
        if (limit.exceeded(total)) break;
    }
    return total;
}

template <class Rank> static V sum(const float *x, const float *h, int64_t n, const Rank &rank, V inverse, const Limit &limit) {
    return h ? sum_columns<true>(x, h, n, rank, inverse, limit) : sum_columns<false>(x, x, n, rank, inverse, limit);
}

// Members of units as they are chosen, one a lane: four of them are stored at a time.
struct Choices {
    uint8_t *const *to;  // null: they are not wanted
    int lanes;
    int64_t done;
    I four;
    void add(I member) {
        if (!to) return;
        four |= member << static_cast<int>(8 * (done++ % 4));
        if (done % 4 == 0) flush(4);
    }
    void flush(int count) {
        for (int l = 0; l < lanes; l++) {
            const int32_t bytes = four[l];
            __builtin_memcpy(to[l] + done - count, &bytes, static_cast<size_t>(count));
        }
        four = I{};
    }
    void end() {
        if (to && done % 4) flush(static_cast<int>(done % 4));
    }
};

// What finds the levels of every member: two of one kind that stay in registers, or any number of any kind.
template <class Rank> struct Two {
    Rank first, second;
    template <class F> void each(F &&f) const { f(0, first), f(1, second); }
};
struct Several {
    const Search &s;
    template <class F> void each(F &&f) const {
        for (int m = 0; m < s.members; m++) {
            with_ranks(s.rankers[m], [&](const auto &rank) { f(m, rank); });
        }
    }
};

// Errors of all units, each under its best member.
template <bool weighted, class Ranks>
static V sum_units(const float *x, const float *h, int64_t n, int64_t unit, const Ranks &ranks, V inverse, const Limit &limit,
                   Choices &choices) {
    V total = {}, part = {};
    int64_t done = 0;
    for (int64_t from = 0; from < n; from += unit) {
        const int64_t to = from + unit < n ? from + unit : n;
        V best = splat(__builtin_inff());
        I member = {};
        ranks.each([&](int m, const auto &rank) {
            V error = squared<weighted>(load(x + from * W), h + from * W, inverse, rank);
            for (int64_t j = from + 1; j < to; j++) error += squared<weighted>(load(x + j * W), h + j * W, inverse, rank);
            const I better = error < best;
            member = better ? splat(m) : member;
            best = better ? error : best;
        });
        choices.add(member);
        part += best;
        if (++done % kSection) continue;
        total += part, part = V{};
        if (!choices.to && limit.exceeded(total)) break;
    }
    choices.end();
    return total + part;
}

static V units(const Search &s, const float *x, const float *h, int64_t n, V inverse, const Limit &limit, Choices choices) {
    const auto run = [&](const auto &ranks) {
        return h ? sum_units<true>(x, h, n, s.unit, ranks, inverse, limit, choices)
                 : sum_units<false>(x, x, n, s.unit, ranks, inverse, limit, choices);
    };
#if defined(__AVX512F__)
    const Ranker *r = s.rankers;
    if (s.members == 2 && s.mirrored && r[0].count && r[0].size == 32 && r[1].count && r[1].size == 32) {
        return run(Two<Registers<false>>{Registers<false>(r[0]), Registers<false>(r[1])});
    }
#endif
    return run(Several{s});
}

// Errors of whole blocks under one candidate, or anything above `least` in all lanes.
static V error_of(const Search &s, int m, const float *x, const float *h, int64_t n, V scale, V zero, V least) {
    const V inverse = 1.0f / scale;
    const Limit limit = {scale, least};
    V total;
    if (s.unit) {
        total = units(s, x, h, n, inverse, limit, Choices{});
    } else if (s.affine) {
        total = sum(x, h, n, Affine{zero, s.tops[0]}, inverse, limit);
    } else if (s.step != 0) {
        total = sum(x, h, n, Uniform(s), inverse, limit);
    } else {
        with_ranks(s.rankers[m], [&](const auto &rank) { total = sum(x, h, n, rank, inverse, limit); });
    }
    return limit.of(total);
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

// A candidate: what is stored, and the scale that it stands for.
struct Candidate {
    V value, scale;
};

static Candidate candidate(const Search &s, V wanted, V parent, bool has_parent) {
    const V value = stored(s, wanted, parent, has_parent);
    return {value, has_parent && s.rounding != NF_FREE ? value * parent : value};
}

// -- the search -------------------------------------------------------------------------------------------------------

// Where blocks with these least errors cannot be improved any more: once `reach` of a magnitude `extent` is clipped, the square
// of what is missing is less than the error. The margins cover the roundings of both.
static inline bool hopeless(V extent, V reach, V share, V best) {
    const V missing = larger(extent * (1 - 0x1p-20f) - reach, V{});
    return !any(missing * missing * (1 - 1e-5f) * share <= best);
}

struct Blocks {
    float *x, *h;  // [n][W]
    V amax, top_h, parent;
    bool has_parent;

    // Candidate c of a member whose absmax scale is `base`.
    Candidate candidate(const Search &s, int m, int c, V base) const {
        if (s.rounding < NF_OCP_FLOOR) return NF_ISA::candidate(s, base * s.factors[c], parent, has_parent);
        const V scale = power(clamp_exponent(ocp(amax, s.tops[m], s.rounding == NF_OCP_CEIL) + static_cast<int32_t>(s.factors[c])));
        return {scale, scale};
    }
};

// The best of everything tried so far. Of equal errors the lower member is better, and then the earlier candidate.
struct Best {
    V error, value, scale;
    I member, candidate;
    explicit Best(float none) : error(splat(__builtin_inff())), value(splat(none)), scale(splat(1.0f)), member{}, candidate{} {}
    void take(V found, const Candidate &now, int m, int c) {
        const I earlier = (splat(m) < member) | ((splat(m) == member) & (splat(c) < candidate));
        const I better = (found < error) | ((found == error) & earlier);
        error = better ? found : error;
        value = better ? now.value : value;
        scale = better ? now.scale : scale;
        member = better ? splat(m) : member;
        candidate = better ? splat(c) : candidate;
    }
};

// Candidates in the order in which they are tried: first one that will do well, so that most others can be given up early.
static inline int nth(const Search &s, int i) { return i == 0 ? s.promising : i <= s.promising ? i - 1 : i; }

// Tries all candidates of the members [from, to).
static Best search_blocks(const Search &s, const Blocks &b, int64_t n, int from, int to) {
    Best best(s.unit ? 1.0f : 0.0f);
    for (int i = 0; i < s.candidates; i++) {
        const int c = nth(s, i);
        bool open = i < s.unpruned;
        for (int m = from; m < to; m++) {
            const Candidate now = b.candidate(s, m, c, b.amax / s.tops[m]);
            if (i >= s.unpruned && hopeless(b.amax, now.scale * s.tops[m], b.top_h, best.error)) continue;
            open = true;
            best.take(error_of(s, m, b.x, b.h, n, now.scale, V{}, best.error), now, m, c);
        }
        if (!open) break;
    }
    return best;
}

// Asymmetric integers: both ends shrink together (`_affine` in fit.py).
static void search_affine(const Search &s, const Group &g, const Blocks &b) {
    V low = {}, high = {};
    for (int64_t j = 0; j < g.n; j++) {
        const V w = load(b.x + j * W);
        low = smaller(low, w), high = larger(high, w);
    }
    const float top = s.tops[0];
    const V extent = high - low;
    Best best(0.0f);
    V zero = {};
    for (int i = 0; i < s.candidates; i++) {
        const int c = nth(s, i);
        const float factor = s.factors[c];
        const Candidate now = candidate(s, extent / top * factor, b.parent, b.has_parent);
        const V shift = clamp(nearest(-low * factor / now.scale), 0.0f, top);
        // what both ends lack together is least as a sum of squares when they share it
        if (i >= s.unpruned && !b.h && hopeless(extent, now.scale * top, splat(0.5f), best.error)) break;
        best.take(s.candidates == 1 ? V{} : error_of(s, 0, b.x, b.h, g.n, now.scale, shift, best.error), now, 0, c);
        zero = best.candidate == c ? shift : zero;
    }
    for (int l = 0; l < g.count; l++) g.scale[l][0] = best.value[l], g.zero[l][0] = zero[l];
}

static void fit(const Search &s, const Group &g) {
    Blocks b = {g.scratch, g.h ? g.scratch + g.n * W : nullptr, V{}, splat(1.0f), g.parent ? load(g.parent) : splat(1.0f),
                g.parent != nullptr};
    b.amax = side_by_side(g.w, g.n, s.mirrored, b.x);
    if (g.h) {
        side_by_side(g.h, g.n, false, b.h);
        for (int64_t j = g.n; j-- > 0;) b.top_h = magnitude(load(b.x + j * W)) == b.amax ? load(b.h + j * W) : b.top_h;
    }
    if (s.affine) return search_affine(s, g, b);
    if (s.each) {
        for (int m = 0; m < s.members; m++) {
            const Best best = search_blocks(s, b, g.n, m, m + 1);
            for (int l = 0; l < g.count; l++) g.scale[l][m] = best.value[l], g.error[l][m] = best.error[l];
        }
        return;
    }
    const int members = s.unit ? 1 : s.members;
    Best best(0.0f);
    if (s.candidates == 0) {
        for (int l = 0; l < W; l++) best.scale[l] = g.scale[l < g.count ? l : 0][0];
    } else if (members == 1 && s.candidates == 1) {  // nothing to choose
        best.take(V{}, b.candidate(s, 0, 0, b.amax / s.tops[0]), 0, 0);
    } else {
        best = search_blocks(s, b, g.n, 0, members);
    }
    for (int l = 0; l < g.count && s.candidates; l++) {
        g.scale[l][0] = best.value[l];
        if (members > 1) g.member[l][0] = static_cast<uint8_t>(best.member[l]);
    }
    if (!s.unit) return;
    const Limit none = {best.scale, splat(__builtin_inff())};
    units(s, b.x, b.h, g.n, 1.0f / best.scale, none, Choices{g.member, g.count, 0, I{}});
}

static void row_errors(const Search &s, const Group &g, const float *scales, const float *zeros, float *const *out) {
    float *x = g.scratch, *h = g.h ? g.scratch + g.n * W : nullptr;
    side_by_side(g.w, g.n, s.mirrored, x);
    if (g.h) side_by_side(g.h, g.n, false, h);
    const int sets = s.unit ? 1 : s.members;
    for (int m = 0; m < sets; m++) {
        for (int c = 0; c < s.candidates; c++) {
            const int at = m * s.candidates + c;
            const V error = error_of(s, m, x, h, g.n, splat(scales[at]), splat(zeros ? zeros[at] : 0.0f), splat(__builtin_inff()));
            for (int l = 0; l < g.count; l++) out[l][at] = error[l];
        }
    }
}

// -- codes ------------------------------------------------------------------------------------------------------------

static void encode(const Ranker &r, const float *w, int64_t n, float scale, const float *zero, uint8_t *out) {
    with_ranks(r, [&](const auto &rank) {
        const auto codes = [&](V x) {
            V u = x / scale;
            if (zero) u = u + *zero;
            return __builtin_convertvector(rank(u), I);  // "levels" are codes
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

NF_DEFINE_TABLE(Encoders, encoders, NF_ISA::W, NF_ISA::fit, NF_ISA::row_errors, NF_ISA::encode)

}  // namespace nf
