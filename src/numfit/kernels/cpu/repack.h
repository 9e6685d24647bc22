// Building a layout from the planes of a file, and the way back.
#pragma once
#include "kernels.h"

namespace nf {

// Null and a sentence in `error` where there is no kernel for the matrix.
nf_linear *repack(const nf_matrix &matrix, char *error);
void unpack_row(const Layout &l, int64_t row, uint8_t *codes, uint8_t *scale, uint8_t *member, uint8_t *zero);

// tables.cpp: the decode tables of a family of grids.
void build_tables(Layout &l, const float *levels);
const char *describe(const Layout &l, std::string &out);

// Column bookkeeping. A span is what shares one entry of the meta stream: a unit inside a block, or a block.
struct Spans {
    int64_t block, unit;     // as in the file
    int64_t span;            // columns of a full span: min(block, unit)
    int64_t padded;          // positions of a span
    int64_t per_block;       // spans in a full block
    int64_t k;
    explicit Spans(const Layout &l);
    int64_t start(int64_t s) const { return s / per_block * block + s % per_block * span; }
    int64_t length(int64_t s) const;
    int64_t count() const;
};
int64_t position_of(const Layout &l, const Spans &spans, int64_t column);  // column → kernel position

}  // namespace nf
