// Trellis codes: tail-biting bit-shift trellises on tiles of 64 rows × 4 columns (numfit/formats/trellis.py defines them).
//
// Weight p = cols · row + col of a tile has a symbol of k bits at bits [p k, p k + k) of the tile's circular stream, and the state
// that decodes it is the L bits from p k on: newest symbol lowest, time running from the last weight to the first. Tiles at the
// edges of a matrix are short and circular in themselves.
#pragma once
#include "dispatch.h"
#include "kernels.h"

typedef struct {
    int32_t k;              // bits of a symbol, 2 … 4
    int32_t bits;           // of a state, L: 2 k … 12
    const int16_t *table;   // [1 << L] what a state decodes to, for costs: 8000 is one standard deviation
    const int8_t *levels;   // [1 << L] what it decodes to, for `values`; null where these are not wanted
} nf_trellis;

// The best symbols of w fp32 [rows][ldw], tile by tile, by squared error; inverse [rows] is 8000 over the deviation of a row.
// Out: symbols uint8 [rows][ld], values int8 [rows][ld] (levels of the states; or null). Bit-identical for every number of
// threads and every instruction set.
NF_API int nf_trellis_encode(const nf_trellis *code, const float *w, int64_t rows, int64_t cols, int64_t ldw, const float *inverse,
                             uint8_t *symbols, int8_t *values, int64_t ld, char *error);
// Symbols to levels: out int8 [rows][cols].
NF_API int nf_trellis_decode(const nf_trellis *code, const uint8_t *symbols, int64_t rows, int64_t cols, int8_t *values, char *error);

// A matrix as the file has it.
typedef struct {
    int64_t rows, cols;
    int32_t k, bits;         // of a symbol, of a state
    int32_t hashed;          // bits of the index, or 0: the index is the state
    int32_t reserved;
    const uint16_t *masks;   // [hashed], most significant bit of the index first
    const int8_t *levels;    // by index
    const uint8_t *codes;    // rows of tiles, each its tiles from left to right, each on whole bytes
    const float *scale;      // [rows]
    float level;             // what a level counts for
} nf_trellis_matrix;

// The layout of the kernels; everything in numfit.h but nf_unpack takes the result.
NF_API nf_linear *nf_trellis_repack(const nf_trellis_matrix *matrix, char *error);
// The codes as they were in the file.
NF_API int nf_trellis_unpack(const nf_linear *linear, uint8_t *codes, char *error);

namespace nf {

constexpr int kTileRows = 64, kTileCols = 4, kTileWeights = kTileRows * kTileCols;
constexpr int kTrellisBits = 12;  // largest L
constexpr int kTablePad = 96;     // entries behind each row of the table of costs: else its rows share their sets of the cache

// How a state becomes a level. Index bits are linear in the bits of a state; levels that are antisymmetric need half the table and
// a sign: index → level[index] or its negative.
struct TrellisLevels {
    enum Kind { few, few_signed, many_signed, many } kind;  // tables of 64, 64, 128 and 256; the sign is bit 7 of the index
    int windows;            // 0: the state is the index, 1: a map of its eight bits, 2: of more bits
    uint64_t low, high;     // matrices of vgf2p8affineqb for the low eight and the other bits of a state
    alignas(64) uint8_t table[256];              // 128 + level
    alignas(64) uint8_t state[1 << kTrellisBits];  // 128 + level of every state
};

// A matrix for the kernels. Whole tiles lie as in the file, where they are what an int8 dot product wants: 64 consecutive weights are
// 16 rows × 4 columns, the four columns of a row in one lane (layout.h). Short tiles are decoded, to 256 bytes each.
struct TrellisLayout : TrellisLevels {
    int k, bits;
    Ahead ahead = ahead_here();
    int64_t strips, tail;       // whole strips of four columns, columns of a last one
    int64_t whole, rest;        // whole rows of tiles, rows of a last one
    int64_t tile_bytes;         // 32 k
    const uint8_t *stream;      // [whole][strips][tile_bytes], and a line more
    const uint8_t *side;        // [whole][256]: the strip at the right, 128 + level; null where there is none
    const uint8_t *bottom;      // [strips and tail][256]: the row of tiles below
    const uint8_t *originals;   // the short tiles as in the file, one row of tiles after the other
    int64_t original_bytes;
    int64_t side_bytes(int64_t height) const { return (height * tail * k + 7) / 8; }
    int64_t strip_bytes(int64_t height) const { return (height * kTileCols * k + 7) / 8; }
};

void gather_trellis(const Layout &l, int64_t row, float *out);  // a decoded row

// Costs of states, in 2**k rows of 2**(L - k) by the oldest symbol.
struct TrellisCosts {
    int k, bits;
    int64_t overlaps;      // 2**(L - k): what neighbouring states share
    int64_t stride;        // overlaps + kTablePad
    const int16_t *table;
};

// One table of functions per instruction set.
struct TrellisKernels {
    const char *name;
    // Cheapest path for steps weights v, in the order of time. start, end: overlaps, or -1 where free. Out: overlap [steps + 1], the
    // last L - k bits before and after each step. costs: (steps + 1) · overlaps + 64 words of scratch, aligned to a line.
    void (*path)(const TrellisCosts &, const int16_t *v, int64_t steps, int32_t start, int32_t end, uint16_t *costs, uint16_t *overlap);
    // Rows of tiles [from, to) of y [m][ldy] = x · Wᵀ + bias, as apply_int8 and apply_exact of kernels.h.
    void (*apply_int8)(const Layout &, const Acts &, float *y, int64_t ldy, const float *bias, int64_t from, int64_t to);
    void (*apply_exact)(const Layout &, const Acts &, float *y, int64_t ldy, const float *bias, int64_t from, int64_t to);
};

const TrellisKernels &trellis_kernels();  // of the instruction set in use

NF_DECLARE_TABLES(TrellisKernels, trellis)

}  // namespace nf
