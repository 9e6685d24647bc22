// Attention over a quantized KV cache: a few queries against keys and values that stay packed.
//
//     value = scale[group] · level[member][code] + low[group]
//
// A row of values is the head of one token, or one channel over some tokens. Rows of a block lie one behind the other, each a
// whole number of bytes, so that a block is one stream of values whatever its rows are; work goes by lines of 128 values. Rows
// have 32, 64, 128, 256, … values. numfit/kvcache/attention.py is the reference; results differ from it by rounding in fp32,
// and not at all between instruction sets or numbers of threads.
#pragma once
#include "dispatch.h"
#include "numfit.h"

typedef struct {
    int32_t bits;      // of a code: 2, 3, 4, 8
    int32_t channel;   // 1: rows run along time
    int64_t row;       // values of a row
    int64_t group;     // values that share a scale (and a low); divides the row
    int64_t unit;      // values that share a member; 0 where there is one
    int32_t members, member_bits;
    int32_t zero;      // subtracted from codes where there are no levels
    int32_t reserved;
    const float *levels;            // [members][16], or null: codes are levels
    const uint8_t *const *codes;    // of each block: [heads][rows][row · bits / 8]
    const uint16_t *const *scale;   // fp16 [heads][rows][row / group]
    const uint16_t *const *low;     // the same, or null
    const uint8_t *const *member;   // [heads][rows][bytes of row / unit members], or null
} nf_stream;

// softmax(q · keys + bias + mask) · values over the first `tokens` tokens, a multiple of 16, in blocks of `block`, unnormalised.
// q [heads][queries][dim]; bias [heads][queries], added to all scores, or null; mask [heads / mask_heads][tokens], added, or null.
// Out: most [heads][queries] (the largest score), sum [heads][queries] and out [heads][queries][width], both relative to it.
// A NaN score makes sum and out of its query NaN, unless the mask is -1e30 or less there.
NF_API int nf_attend(const nf_stream *keys, const nf_stream *values, int64_t heads, int64_t queries, int64_t dim, int64_t width,
                     int64_t tokens, int64_t block, const float *q, const float *bias, const float *mask, int64_t mask_heads,
                     float *most, float *sum, float *out, char *error);

namespace nf {

constexpr int kLine = 128;      // values worked on together
constexpr int kSplit = 8;       // blocks of one piece of work: fixed, so that sums do not depend on threads
constexpr int64_t kLevels = 16;

// Some blocks of one head. Scores and numbers of all rows of a block are written to scratch.
struct Piece {
    const nf_stream *keys, *values;
    int64_t head, queries, dim, width, first, last, tokens, block;  // blocks [first, last)
    const float *q, *bias, *mask;                                   // of this head
    float *most, *sum, *out;                                        // of this piece
    float *scratch;
};
int64_t piece_scratch(const nf_stream &keys, const nf_stream &values, int64_t queries, int64_t dim, int64_t width, int64_t block);

struct Attenders {
    const char *name;
    void (*attend)(const Piece &);
};
NF_DECLARE_TABLES(Attenders, attenders)

}  // namespace nf
