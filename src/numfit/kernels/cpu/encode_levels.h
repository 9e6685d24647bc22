// Finding the nearest level of many numbers at once: what the encoders of encode_isa.cpp are built on.
#pragma once
#include "encode.h"
#include "lanes.h"

namespace nf {
namespace NF_ISA {

// Nearest level by comparing with every threshold.
struct Chain {
    const float *levels, *thresholds;
    int steps;
    explicit Chain(const Ranker &r) : levels(r.levels), thresholds(r.thresholds), steps(r.ranks - 1) {}
    V operator()(V u) const {
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
        const I place = shifted(bits(smaller(larger(negative ? magnitude(u) : u, least), most)), shift);
        return negative ? (place & mask) | (shifted(bits(u), sign) & sign_mask) : place;
    }
};

// Nearest level by its bucket's one threshold, in tables of any size. Without negative numbers the level above it is the next entry.
template <bool negative> struct Table {
    Buckets<negative> bucket;
    const float *edge, *low, *high;
    explicit Table(const Ranker &r) : bucket(r), edge(r.edge), low(r.low), high(r.high) {}
    V operator()(V u) const {
        if (negative) {
            const I i = bucket(u);
            return u > gather(edge, i) ? gather(high, i) : gather(low, i);
        }
        const I i = bucket(u), place = i & bucket.mask;
        return gather(low, (u > gather(edge, place) ? i + 1 : i) & bucket.mask);
    }
};

#if defined(__AVX512F__)
// The same in tables of 32 entries, which are two registers each.
template <bool negative> struct Registers {
    Buckets<negative> bucket;
    V edge[2], low[2], high[2];
    explicit Registers(const Ranker &r) : bucket(r) {
        for (int i = 0; i < 2; i++) edge[i] = load(r.edge + i * W), low[i] = load(r.low + i * W), high[i] = load(r.high + i * W);
    }
    V operator()(V u) const {
        const I i = bucket(u);
        if (negative) return u > pick(edge, i) ? pick(high, i) : pick(low, i);
        return pick(low, u > pick(edge, i) ? i + 1 : i);
    }
};
#endif

// Levels 0, step … top by arithmetic, for numbers that are not negative.
struct Uniform {
    float step, inverse, top;
    bool exact;  // dividing by a power of two is multiplying
    explicit Uniform(const Search &s)
        : step(s.step), inverse(1.0f / s.step), top(s.levels[s.ranks - 1]), exact((bits(splat(s.step))[0] & 0x7fffff) == 0) {}
    V operator()(V u) const {
        const V steps = exact ? u * inverse : u / step;
        return clamp(ceiling(steps - 0.5f) * step, 0.0f, top);
    }
};

// Integers 0 … top, shifted by the zero points.
struct Affine {
    V zero;
    float top;
    V operator()(V u) const { return clamp(nearest(u) + zero, 0.0f, top) - zero; }
};

// Calls f(rank) with what finds the levels of `r` fastest here.
template <class F> static inline void with_ranks(const Ranker &r, F &&f) {
#if defined(__AVX512F__)
    if (r.count && r.size == 32) return r.negative ? f(Registers<true>(r)) : f(Registers<false>(r));
#endif
    if (r.count == 0 || r.ranks <= kChain) return f(Chain(r));
    return r.negative ? f(Table<true>(r)) : f(Table<false>(r));
}

}  // namespace NF_ISA
}  // namespace nf
