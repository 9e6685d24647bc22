// The hot loops of solvers: a panel of a GPTQ sweep, and a run of coordinate descent (numfit/solvers/sweep.py, descent.py).
//
// A lane is a row: rows do not depend on one another, so results depend neither on threads nor on the instruction set. Every step
// is the same fp32 operation as in the eager code, in the same order: results are the same bits.
#pragma once
#include "dispatch.h"
#include "numfit.h"

// What columns are rounded with (numfit/solvers/rounding.py).
typedef struct {
    int64_t rows, blocks, units;
    int32_t members, entries;  // entries: a power of two, at least the ranks of every member
    const float *thresholds;   // [members][entries], ascending, padded with +inf; the last of a member is not looked at
    const float *levels;       // [members][entries] by rank
    const float *codes;        // [members][entries] by rank, whole numbers
    const float *scale;        // effective; [rows][blocks], or one for all
    const float *zero;         // the same, or null
    uint8_t *member;           // [rows][units], one for all, or null
    int32_t one_scale, one_member;
    int32_t choose;            // units choose their member
    int32_t reserved;
} nf_lattice;

// Positions [start, stop) of a panel of `width` columns; what follows them in the panel is updated. w [rows][ldw] in place.
typedef struct {
    int64_t width, start, stop;
    float *w;
    int64_t ldw;
    const float *u, *p, *r;    // [width][ldu] (ldp, ldr); p and r or null
    int64_t ldu, ldp, ldr;
    const float *original;     // [rows][width], with r
    const int64_t *block, *unit;  // [width]
    uint8_t *codes;            // [rows][ldc]
    int64_t ldc;
    float *error, *before;     // [rows][width]; before: with p or r
} nf_panel;

NF_API int nf_sweep(const nf_lattice *lattice, const nf_panel *panel, char *message);

// Neighbouring columns of coordinate descent. gradient = (Q - W) H of these columns [rows][width], changed.
typedef struct {
    int64_t width;
    const float *h;            // [width][ldh]
    int64_t ldh;
    float *gradient;
    const float *w;            // [rows][ldw]
    float *q;                  // [rows][ldw], in place
    int64_t ldw;
    const int64_t *block, *unit;  // [width]
    uint8_t *codes;            // [rows][ldc], in place
    int64_t ldc;
    float margin;              // relative gain below which a code stays
} nf_run;

NF_API int nf_descend(const nf_lattice *lattice, const nf_run *run, char *message);

namespace nf {

// One table of functions per instruction set. Each works on `count` rows from `row` on, up to its lanes.
struct Sweepers {
    const char *name;
    int sweep_lanes, descend_lanes;
    int64_t (*sweep_scratch)(int64_t width);    // bytes
    int64_t (*descend_scratch)(int64_t width);
    void (*sweep)(const nf_lattice &, const nf_panel &, int64_t row, int count, void *scratch);
    void (*descend)(const nf_lattice &, const nf_run &, int64_t row, int count, void *scratch);
};

NF_DECLARE_TABLES(Sweepers, sweepers)

}  // namespace nf
