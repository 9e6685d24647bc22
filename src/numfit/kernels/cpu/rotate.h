// Side terms of a matrix on its inputs and outputs: rotations, low-rank terms, sparse corrections (numfit/formats/side.py).
//
// Rotations are the bits of numfit/formats/rotation.py, whose arithmetic is a fixed order of single fp32 operations. The sums of
// the other two have an order of their own here, the same for every instruction set and number of threads.
#pragma once
#include "dispatch.h"
#include "numfit.h"

// Rows of x [rows][cols] turned: out [rows][cols]. cols = m · n with n the largest power of two in it.
// kind 0: x is fp32; 1: bf16. back 0: out = x · Rᵀ, 1: out = x · R. signs [cols]; mixing [m][m] is D. out may be x where that is fp32.
NF_API int nf_rotate(const void *x, int kind, int64_t rows, int64_t cols, const float *signs, const float *mixing, int64_t m, int back,
                     float *out, char *error);

// y [tokens][ldy] += (x · Aᵀ) · Bᵀ: x [tokens][cols], a [rank][cols], b [rank][rows] (B transposed).
NF_API int nf_add_lowrank(const float *x, int64_t tokens, int64_t cols, const float *a, const float *b, int64_t rank, int64_t rows,
                          float *y, int64_t ldy, char *error);

// y [tokens][ldy] += x · Sᵀ: row r of S has value[r][j] in column index[r][j], j < count. Indices are checked.
NF_API int nf_add_sparse(const float *x, int64_t tokens, int64_t cols, const int32_t *index, const float *value, int64_t count,
                         int64_t rows, float *y, int64_t ldy, char *error);

namespace nf {

struct Turn {
    int64_t cols, m, n;
    const float *signs, *mixing;
    bool back;
};

// What the C functions do, for callers that have their rows at a distance and their indices checked. Nothing is allocated that
// the calling thread does not keep for the next time; one row is turned by the calling thread alone.
bool fits_together(const Turn &);
void rotate_rows(const Turn &, const float *x, int64_t ldx, int64_t rows, float *out, int64_t ldo);  // back to back: out may be x
void add_lowrank(const float *x, int64_t ldx, int64_t tokens, int64_t cols, const float *a, const float *b, int64_t rank, int64_t rows,
                 float *y, int64_t ldy);
bool indices_within(const int32_t *index, int64_t count, int64_t cols);
void add_sparse(const float *x, int64_t ldx, int64_t tokens, const int32_t *index, const float *value, int64_t count, int64_t rows,
                float *y, int64_t ldy);

// One table of functions per instruction set.
struct Rotators {
    const char *name;
    void (*turn)(const Turn &, const float *x, float *out, float *work);  // one row; work [cols], aligned; x may be out, not work
    void (*dots)(const float *a, int64_t rank, int64_t cols, const float *x, float *out);               // out[j] = a[j] · x
    void (*add)(const float *b, int64_t rank, int64_t ldb, const float *t, int64_t count, float *y);    // y += Σ_j t[j] · b[j]
    // one sparse row on kSide tokens: out[t] = Σ_j value[j] · x[index[j]][t]
    void (*sparse)(const float *x, const int32_t *index, const float *value, int64_t count, float *out);
};

constexpr int kSide = 16;  // tokens side by side

NF_DECLARE_TABLES(Rotators, rotators)

}  // namespace nf
