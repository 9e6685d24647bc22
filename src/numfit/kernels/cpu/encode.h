// Fitting and encoding: what numfit/formats/search.py and codec.py compute eagerly, in one pass (see encode_isa.cpp).
//
// Every step is the same fp32 operation as there, so codes and the members of small units are the same bits, and errors differ
// only in the order in which a block's squares are summed. Here that order is the order of the columns, in runs of 32 whose sums
// are added in turn: results depend neither on threads nor on the instruction set.
#pragma once
#include "dispatch.h"
#include "numfit.h"

// How a wanted scale becomes a stored one (numfit/formats/scale.py).
enum nf_rounding {
    NF_FREE = 0,      // not at all: at least `low`, to find the parent of a row
    NF_FLOAT = 1,     // clamp to [low, high], nearest number of `mantissa` bits and multiple of `quantum`, ties to even
    NF_POWER = 2,     // the nearest power of two in the log domain
    NF_OCP_FLOOR = 3, // 2^(OCP exponent of the block + candidate)
    NF_OCP_CEIL = 4
};

typedef struct {
    int32_t members, ranks;   // grids, and levels of the longest; the others are padded with +inf thresholds
    const float *levels;      // [members][ranks], ascending
    const float *thresholds;  // [members][ranks - 1], ascending
    const float *tops;        // largest magnitude of each member; [1] where units are small
    int32_t mirrored;         // levels are the half that |w| rounds to
    int32_t affine;           // integers 0 … tops[0] with a zero point; no levels
    float step;               // the distance of all levels, or 0
    int32_t each;             // 1: the best scale of every member is wanted, 0: only that of the winner
    int64_t block, unit;      // weights that share a scale, and (0: the block) a member
    int32_t rounding;         // enum nf_rounding
    int32_t mantissa, even;   // even: stored words get a zero last bit, ties up
    float quantum, low, high;
    float least, most;        // limits of words with a zero last bit
    const float *factors;     // [candidates], descending: of the absmax scale, or exponents to add (NF_OCP_*)
    int32_t candidates;       // 0: `scale` is given and only members of units are chosen
    int32_t promising;        // the candidate tried first
    int32_t unpruned;         // candidates tried before any is ruled out by what it clips
} nf_search;

// Best parameters of all blocks of w [rows][cols] fp32, finite. h [cols]: importance, or null. parent [rows], or null.
// Out: scale [rows][blocks], the stored part (`each`: [rows][blocks][members], with `error` of the same shape);
// member [rows][units], not touched where there is one and units are blocks; zero [rows][blocks] (affine).
NF_API int nf_fit(const nf_search *search, const float *w, int64_t rows, int64_t cols, const float *h, const float *parent,
                  float *scale, float *error, uint8_t *member, float *zero, char *message);

// Errors of whole rows under given scales [sets][candidates] (and zeros, affine), which all rows share: out [rows][sets]
// [candidates]. A set is a member; there is one set where units are small or affine.
NF_API int nf_row_errors(const nf_search *search, const float *w, int64_t rows, int64_t cols, const float *h, const float *scales,
                         const float *zeros, float *out, char *message);

typedef struct {
    int32_t members, ranks;
    const float *thresholds;  // [members][ranks - 1], ascending, padded with +inf
    const uint8_t *codes;     // [members][ranks]
    int64_t block, unit;
    const float *scale;       // effective; [rows][blocks], or one for all
    const float *zero;        // the same, or null
    const uint8_t *member;    // [rows][units], one for all, or null
    int32_t one_scale, one_member;
} nf_codes;

// Codes of w [rows][cols] fp32, finite: out [rows][cols], one a byte. Nothing is done where there are no rows or no columns.
NF_API int nf_encode(const nf_codes *how, const float *w, int64_t rows, int64_t cols, uint8_t *out, char *message);

namespace nf {

constexpr int kSection = 32;    // columns (or units) summed before they are added to the whole
constexpr int kChain = 16;      // ranks that a chain of comparisons still finds fastest
constexpr int kBuckets = 1 << 12;

// How levels of one grid are found. Numbers fall into buckets by the upper bits of their pattern (magnitude >> shift, kept within
// [first, first + count)); each bucket is crossed by one threshold at most, so one comparison then decides.
struct Ranker {
    int ranks = 0;
    const float *levels = nullptr, *thresholds = nullptr;
    bool negative = false;                // whether there are negative numbers; their buckets are the second half of the tables
    int shift = 0, first = 0, count = 0;  // count 0: no such buckets
    float least = 0, most = 0;            // what magnitudes are brought between first
    int bits = 0, size = 0;               // the place of a bucket is its lowest bits; entries of a table, negative ones included
    const float *edge = nullptr, *low = nullptr, *high = nullptr;  // [size]: threshold, level up to it, level above it
};

struct Search : nf_search {
    const Ranker *rankers;
};

// Up to `lanes` blocks of `n` weights, side by side.
struct Group {
    int count;
    int64_t n;
    const float *const *w, *const *h;  // first weight of each; h null for equal importance
    const float *parent;               // of each, or null
    float *const *scale, *const *error, *const *zero;  // where results go, null where there are none
    uint8_t *const *member;
    float *scratch;  // for the weights and the importance of all lanes, aligned to 64 bytes
};

// One table of functions per instruction set.
struct Encoders {
    const char *name;
    int lanes;
    void (*fit)(const Search &, const Group &);
    void (*row_errors)(const Search &, const Group &, const float *scales, const float *zeros, float *const *out);
    // n weights that share a scale, a zero point (or null) and a member
    void (*encode)(const Ranker &, const float *w, int64_t n, float scale, const float *zero, uint8_t *out);
};

NF_DECLARE_TABLES(Encoders, encoders)

}  // namespace nf
