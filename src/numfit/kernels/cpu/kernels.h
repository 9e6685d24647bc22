// What every instruction set provides, and how work is handed to it. One table of functions per translation unit.
#pragma once
#include "dispatch.h"
#include "layout.h"

namespace nf {

// Activations of m tokens, laid out for the kernels of one (tile, sub, column) geometry:
// int8: codes [tiles][m][tile], scale, sum and start (−kBias · sum) of each group [groups][m]; exact: fp32 [tiles][m][tile].
struct Acts {
    int64_t m = 0;
    int8_t *codes = nullptr;
    float *scale = nullptr;
    int32_t *sum = nullptr, *start = nullptr;
    float *exact = nullptr;
};

// The cache of one key/value head, fp16, and how it is looked at. Keys are transposed in blocks, so that a vector holds the
// same dimension of neighbouring positions and a score needs no sum across a vector.
constexpr int kKeyBlock = 32;
struct Attention {
    const uint16_t *keys;    // [positions / kKeyBlock][dim][kKeyBlock]
    const uint16_t *values;  // [positions][dim]
    int64_t dim;             // a multiple of 16
    int64_t window;          // a token sees itself and the window - 1 before it; 0: all before it
    float scale, softcap;    // softcap 0: none
};

struct Kernels {
    const char *name;
    // Tokens [from, to): permute and pad x, quantize to int8 with one scale per group (absmax / 127, nearest, ties to even).
    void (*quantize)(const Layout &, const float *x, int64_t ldx, const Acts &, int64_t from, int64_t to);
    // Row blocks [from, to) of y [m][ldy] = x · Wᵀ + bias. y holds only the `n` rows that exist. Thread-safe.
    void (*apply_int8)(const Layout &, const Acts &, float *y, int64_t ldy, const float *bias, int64_t from, int64_t to);
    void (*apply_exact)(const Layout &, const Acts &, float *y, int64_t ldy, const float *bias, int64_t from, int64_t to);
    // A plain read of `bytes` bytes (whole lines), prefetched; returns a sum of what was read.
    int64_t (*read)(const uint8_t *p, int64_t bytes);
    // Pieces of a decoder (ops.inc); see decoder.cpp for what they are used for.
    struct Ops {
        void (*rms_norm)(const float *x, const float *gain, float eps, float *out, int64_t n);  // x may be out
        // gate = act(gate) · up; activation 0: SiLU, 1: GELU (tanh)
        void (*gated)(float *gate, const float *up, int activation, int64_t n);
        void (*add)(float *x, const float *y, int64_t n);                        // x += y
        void (*softcap)(float *x, float cap, int64_t n);                         // x = cap · tanh(x / cap)
        // rotate the halves of one head: a · cos - b · sin and b · cos + a · sin; cosine, sine [2 · half]
        void (*rotate)(float *head, const float *cosine, const float *sine, int64_t half);
        void (*to_half)(const float *x, uint16_t *out, int64_t n);
        int64_t (*attend_scratch)(int64_t rows, int64_t dim);  // floats that attend() needs for rows = heads · tokens
        // `heads` query heads that share a key/value head, for tokens at position, position + 1, …, whose own keys and values
        // are in the cache: out = softmax(scale · q · keys) · values. Head h of token t at q + t · ldq + h · dim; out alike.
        void (*attend)(const Attention &, const float *q, int64_t ldq, int64_t heads, int64_t tokens, int64_t position,
                       float *scratch, float *out, int64_t ldo);
    } ops;
};

const Kernels &kernels();          // of the instruction set in use
NF_DECLARE_TABLES(Kernels, kernels)

// pool.cpp. Calls body(i) for i in [0, count), each once, on up to `nf_threads()` threads, the caller among them. Chunks are
// claimed one by one from a shared counter; the caller waits only for chunks that somebody has claimed, so a worker that the
// system does not run holds nobody up. Not re-entrant: from inside a body it runs serially. What a body throws first is thrown
// again here when all are done.
void parallel(int64_t count, void (*body)(void *, int64_t), void *state);
template <class F> void parallel(int64_t count, const F &body) {
    parallel(count, [](void *f, int64_t i) { (*static_cast<const F *>(f))(i); }, const_cast<F *>(&body));
}

// For the handlers of the C interface: what was thrown, as a sentence in `error` and the value to return. `what` completes
// "there is not enough memory ". (api.cpp)
int caught(char *error, const char *what) noexcept;

// Memory for one piece of work of the calling thread, aligned to a line; what it held before is lost. (apply.cpp)
void *aligned_work(size_t bytes);

// apply.cpp. Several matrices on the same input, in one go: activations are prepared once per geometry, row blocks of all
// jobs are claimed together. Bit-identical for any number of threads.
struct Job {
    const Layout *linear;
    float *y;
    int64_t ldy;
    const float *bias;
};
void apply_many(const Job *jobs, int count, const float *x, int64_t m, int64_t ldx, bool exact);
void gather_row(const Layout &, int64_t row, float *out);  // decoded, exact; out [k]

}  // namespace nf
