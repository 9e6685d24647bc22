// The layout of the kernels: what a matrix becomes when it is loaded ("R16", performance.md 4.1).
//
// Rows go in blocks of 16, columns in tiles of 64. A vector holds 16 dword lanes, one a row; the four bytes of a lane are
// four consecutive columns, which is what an int8 dot product sums, so a tile is 16 vectors of codes and the result of a
// row needs no horizontal sum. The same 16 vectors are, unchanged, a B tile of AMX. Codes of fewer than 8 bits share bytes:
//
//   4 bits  vector 2v in the low nibble of stored vector v, 2v + 1 in the high one
//   2 bits  vector 4v + p in bits 2p, 2p + 1
//   3 bits  eight vectors A … H in three stored ones: U = A | B << 3 | C[1:0] << 6, V = D | E << 3 | F[1:0] << 6,
//           W = G | H << 3 | C[2] << 6 | F[2] << 7
//   5, 6    the low four bits as above, then 2 (4) stored vectors with the upper bits: vector j in vector j / 8 (j / 4)
//           at bit j % 8 (2 (j % 4))
//   8       as they are (7-bit codes too)
//   triple  AMS units of three neighbours with 5-bit prefixes: three vectors A, B, C with columns k, k + 3, k + 6, k + 9
//           (k + 1 …, k + 2 …) in two: U = A | S << 5 | C[1:0] << 6, V = B | C[4:2] << 5, S the member; tiles of 48 columns
//
// AMS units of four neighbours are one lane: a stream of its own has 16 words of 16 bits for a tile, one a row, bit j the
// member of vector j ("quads"). What belongs to groups and blocks (scales, members, zero points) lies in another one,
// in the order in which the kernels read it, 16 rows side by side.
//
// A group is what shares an activation scale: min(64, block, unit) columns, 48 for triples. Groups that do not end with a
// multiple of their size are padded, by activations of zero; `column` then says which column stands where.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

#include "numfit.h"

namespace nf {

constexpr int kRows = 16;
constexpr int kEntries = 512;  // of a decode table: members << bits | code
constexpr int kFar = 4096, kNear = 512;  // bytes ahead in a stream: into the second and the first cache level
constexpr int kBias = 128;  // added to int8 levels where products take unsigned weights

struct TrellisLayout;  // trellis.h

// Where a matrix-vector kernel asks for codes: bytes ahead into the second cache level, and once more there or, if `again` is 0,
// into the first.
struct Ahead { int far, again; };
Ahead ahead_here();  // on this processor (memory.cpp)

enum class Codes { b2, b3, b4, b5, b6, b8, triple };
enum class Members { none, group, quad };  // how the member of a weight is found; triples carry their own

// What a linear layer is made of. Everything a kernel reads; built by repack.cpp.
struct Layout {
    int64_t n, k;           // rows and columns of the matrix
    int bits, members;      // as in the file
    int64_t block, unit;    // as in the file
    nf_scale scale_kind;
    bool has_member, has_zero;

    Codes codes;
    Members member_kind;
    int width;              // bits of a kernel code; more than `bits` where members were merged into the codes
    int tile;               // columns of a tile: 64, or 48 for triples
    int sub;                // groups in a tile
    int group;              // tile / sub
    int64_t tiles;          // a row
    int64_t tiles_per_block;  // tiles that share one entry of the meta stream; `tiles` where scales belong to the row
    int64_t row_blocks;     // of 16 rows
    int code_bytes;         // of a tile of 16 rows
    int quad_bytes;         // of its quads: 0 or 32
    int scale_bytes;        // of 16 scales: 0, 16 or 32
    int member_bytes;       // of 16 members: 0, 8 (nibbles, see repack.cpp) or 16
    int zero_bytes;         // of 16 zero points: 0 or 16
    int meta_bytes;         // of one entry: sub * (scale + member + zero)
    int32_t *column = nullptr;  // kernel position → column, -1 for padding; null if identity

    // decoding to int8: weight = scale · row · member_scale · (table − zero), or the two-lane sum
    bool two_lane;          // (c1 · table + c2 · table2): both tables hold one entry a code
    int entries;            // of `table`
    alignas(64) int8_t table[kEntries];
    alignas(64) int8_t table2[64];
    alignas(64) float c1[32], c2[32];  // factor of each member
    int zero_shift;         // subtracted from zero points: 128 where 8-bit codes had to be brought into int8
    double rounding;        // largest |table · c1 − level| over the largest level
    alignas(64) float levels[kEntries];  // exact, by member << bits | code

    // memory
    uint8_t *code_stream = nullptr;  // [row_blocks][tiles][code_bytes]
    uint8_t *quad_stream = nullptr;  // [row_blocks][tiles][quad_bytes]
    uint8_t *meta_stream = nullptr;  // [row_blocks][entries of the row][meta_bytes]
    float *row_scale = nullptr;      // [row_blocks * 16]; parent, or the scale itself for NF_ROW
    void *arena = nullptr;
    int64_t arena_bytes = 0;
    bool huge = false;
    Ahead ahead = ahead_here();
    TrellisLayout *trellis = nullptr;  // in the arena too; its blocks are of 64 rows, and streams are its own

    int64_t positions() const { return tiles * tile; }  // columns with padding
    int64_t groups() const { return tiles * sub; }
    const uint8_t *codes_of(int64_t row_block) const { return code_stream + row_block * tiles * code_bytes; }
    const uint8_t *quads_of(int64_t row_block) const { return quad_stream + row_block * tiles * quad_bytes; }
    int64_t metas() const { return meta_bytes ? (tiles + tiles_per_block - 1) / tiles_per_block : 0; }
};

// memory.cpp: 2 MiB-aligned memory, in huge pages where the system grants them (the largest single lever on decoding).
void *arena_alloc(int64_t bytes, bool *huge);
void arena_free(void *arena);

}  // namespace nf

struct nf_linear : nf::Layout {
    std::string kernel;
};
