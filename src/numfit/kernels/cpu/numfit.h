// The C interface of numfit's CPU library. Python reaches it through ctypes (numfit/native.py); nothing here knows torch.
//
// Conventions: matrices are row-major and dense; `y[m][n] = sum_k x[m][k] * w[n][k]`; functions that can fail return 0 on
// success and otherwise (NF_NO_MEMORY where that was it) write one sentence into `error` (at least NF_ERROR bytes). Sizes are
// checked by the caller in Python as well; the library checks again whatever could make it touch memory that is not its own.
#pragma once
#include <stdint.h>

#if defined(_WIN32)
#define NF_API extern "C" __declspec(dllexport)
#else
#define NF_API extern "C" __attribute__((visibility("default")))
#endif

enum { NF_ERROR = 256, NF_ABI = 2, NF_NO_MEMORY = 2 };

// How a block's scale is stored (numfit/formats/scale.py). ROW: one fp32 per row, already multiplied by its parent.
enum nf_scale { NF_ROW = 0, NF_FP16 = 1, NF_BF16 = 2, NF_E8M0 = 3, NF_E4M3 = 4, NF_U8 = 5, NF_E3M3 = 6 };

// A quantized matrix as the file has it, except that only the codes are still a bit stream.
typedef struct {
    int64_t rows, cols;     // N, K
    int32_t bits;           // of a code, 1 … 8
    int32_t members;        // grids in `levels`
    int64_t block;          // weights that share a scale; `cols` for a whole row
    int64_t unit;           // weights that share a member; at most `block`; ignored where `member` is null
    int32_t scale_kind;     // enum nf_scale
    int32_t reserved;
    const uint8_t *codes;   // [rows][ceil(cols * bits / 8)], least significant bit first
    const void *scale;      // words [rows][blocks] of 1 or 2 bytes (e3m3: low six bits); fp32 [rows] for NF_ROW
    const float *parent;    // [rows], multiplied onto every scale of the row; null for ones
    const uint8_t *member;  // [rows][units], units restart at every block; null where there is one grid
    const uint8_t *zero;    // [rows][blocks] in code units; null for none
    const float *levels;    // [members][1 << bits]
} nf_matrix;

typedef struct nf_linear nf_linear;  // a matrix in the layout of the kernels, see layout.h
typedef struct nf_acts nf_acts;      // activations, quantized or padded for one layout

NF_API int nf_abi(void);
NF_API const char *nf_isa_names(void);               // comma-separated, best last: those this machine can run
NF_API const char *nf_isa(void);                     // the one in use
NF_API int nf_set_isa(const char *name, char *error);  // for tests and benchmarks
NF_API void nf_set_threads(int threads);             // workers used by later calls, at least 1
NF_API int nf_threads(void);

NF_API nf_linear *nf_repack(const nf_matrix *matrix, char *error);  // null on failure
NF_API void nf_free(nf_linear *linear);
NF_API int64_t nf_linear_bytes(const nf_linear *linear);            // all memory that it holds
NF_API const char *nf_linear_kernel(const nf_linear *linear);       // e.g. "4-bit two-lane fp16", for people
NF_API double nf_linear_rounding(const nf_linear *linear);          // largest |int8 level - level| / max level; 0: exact
NF_API int nf_huge_pages(const nf_linear *linear);                  // whether the system was asked for huge pages with success

// y [m][ldy] = x · Wᵀ (+ bias [rows], or null). x fp32 [m][ldx]. mode 0: int8 activations; 1: exact (fp32 activations).
NF_API int nf_apply(const nf_linear *linear, const float *x, int64_t m, int64_t ldx, float *y, int64_t ldy,
                    const float *bias, int mode, char *error);
// The same for bf16 x and y (bit patterns); sums are fp32.
NF_API int nf_apply_bf16(const nf_linear *linear, const uint16_t *x, int64_t m, int64_t ldx, uint16_t *y, int64_t ldy,
                         const float *bias, int mode, char *error);
// Decoded rows, bit for bit what the format defines: out fp32 [count][cols].
NF_API int nf_gather(const nf_linear *linear, const int64_t *rows, int64_t count, float *out, char *error);
// The way back: codes uint8 [count][cols], scale words, member [count][units], zero [count][blocks]; null where not wanted.
NF_API int nf_unpack(const nf_linear *linear, const int64_t *rows, int64_t count, uint8_t *codes, void *scale,
                     uint8_t *member, uint8_t *zero, char *error);
// A plain read of `bytes` bytes in huge pages, prefetched: the roof of benchmarks.
NF_API void *nf_arena(int64_t bytes);
NF_API void nf_arena_free(void *arena);
NF_API int64_t nf_read_stream(const void *arena, int64_t bytes);
