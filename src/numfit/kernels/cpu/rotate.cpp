// Side terms: the C interface of rotate.h, checks, and how rows are dealt out.
#include "rotate.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <vector>

#include "kernels.h"

namespace nf {
namespace {

constexpr int64_t kAlone = 1 << 15;  // numbers below which threads cost more than they save

const Rotators &rotators() { return NF_CHOSEN_TABLE(rotators); }

int fail(char *error, const char *why) {
    std::snprintf(error, NF_ERROR, "%s", why);
    return 1;
}

// Runs [from, to) of `count` items, on threads where there is enough to do.
template <class F> void share(int64_t count, int64_t work, int64_t chunk, const F &body) {
    if (work < kAlone) {
        body(0, count);
    } else {
        parallel((count + chunk - 1) / chunk, [&](int64_t i) { body(i * chunk, std::min(count, (i + 1) * chunk)); });
    }
}

}  // namespace

bool fits_together(const Turn &t) { return t.m >= 1 && t.m % 2 && t.cols >= 1 && t.cols == t.m * t.n && !(t.n & (t.n - 1)); }

void rotate_rows(const Turn &t, const float *x, int64_t ldx, int64_t rows, float *out, int64_t ldo) {
    const Rotators &r = rotators();
    const int64_t step = std::max<int64_t>(1, kAlone / t.cols);
    share(rows, rows > 1 ? rows * t.cols : 0, step, [&](int64_t from, int64_t to) {
        float *work = static_cast<float *>(aligned_work(static_cast<size_t>(t.cols) * sizeof(float)));
        for (int64_t row = from; row < to; row++) r.turn(t, x + row * ldx, out + row * ldo, work);
    });
}

void add_lowrank(const float *x, int64_t ldx, int64_t tokens, int64_t cols, const float *a, const float *b, int64_t rank, int64_t rows,
                 float *y, int64_t ldy) {
    const Rotators &r = rotators();
    float *inner = static_cast<float *>(aligned_work(static_cast<size_t>(tokens * rank) * sizeof(float)));
    if (tokens == 1) {  // ranks, then rows, are shared out
        share(rank, rank * cols, std::max<int64_t>(1, kAlone / cols), [&](int64_t from, int64_t to) {
            r.dots(a + from * cols, to - from, cols, x, inner + from);
        });
        share(rows, rank * rows, std::max<int64_t>(64, kAlone / rank / 64 * 64), [&](int64_t from, int64_t to) {
            r.add(b + from, rank, rows, inner, to - from, y + from);
        });
        return;
    }
    share(tokens, tokens * rank * (rows + cols), 1, [&](int64_t from, int64_t to) {
        for (int64_t t = from; t < to; t++) {
            r.dots(a, rank, cols, x + t * ldx, inner + t * rank);
            r.add(b, rank, rows, inner + t * rank, rows, y + t * ldy);
        }
    });
}

bool indices_within(const int32_t *index, int64_t count, int64_t cols) {
    return std::all_of(index, index + count, [cols](int32_t i) { return i >= 0 && i < cols; });
}

void add_sparse(const float *x, int64_t ldx, int64_t tokens, const int32_t *index, const float *value, int64_t count, int64_t rows,
                float *y, int64_t ldy) {
    const int64_t chunk = std::max<int64_t>(16, kAlone / (count * std::max<int64_t>(1, tokens)));
    share(rows, tokens * rows * count, chunk, [&](int64_t from, int64_t to) {
        for (int64_t t = 0; t < tokens; t++) {
            const float *in = x + t * ldx;
            for (int64_t row = from; row < to; row++) {
                const int32_t *at = index + row * count;
                const float *v = value + row * count;
                float sum = 0;
                for (int64_t j = 0; j < count; j++) sum += v[j] * in[at[j]];
                y[t * ldy + row] += sum;
            }
        }
    });
}

}  // namespace nf

using namespace nf;

NF_API int nf_rotate(const void *x, int kind, int64_t rows, int64_t cols, const float *signs, const float *mixing, int64_t m, int back,
                     float *out, char *error) try {
    const Turn t = {cols, m, m < 1 ? 0 : cols / m, signs, mixing, back != 0};
    if (rows < 0 || !fits_together(t) || (kind != 0 && kind != 1)) return fail(error, "the parts of this rotation do not fit together");
    if (kind == 1) {
        const auto *half = static_cast<const uint16_t *>(x);
        share(rows, rows > 1 ? rows * cols : 0, std::max<int64_t>(1, kAlone / cols), [&](int64_t from, int64_t to) {
            for (int64_t i = from * cols; i < to * cols; i++) {
                const uint32_t word = static_cast<uint32_t>(half[i]) << 16;
                std::memcpy(out + i, &word, 4);
            }
        });
        x = out;
    }
    rotate_rows(t, static_cast<const float *>(x), cols, rows, out, cols);
    return 0;
} catch (...) {
    return caught(error, "to rotate this tensor");
}

NF_API int nf_add_lowrank(const float *x, int64_t tokens, int64_t cols, const float *a, const float *b, int64_t rank, int64_t rows,
                          float *y, int64_t ldy, char *error) try {
    if (tokens < 0 || cols < 1 || rank < 1 || rows < 1 || ldy < rows) {
        return fail(error, "the parts of this low-rank term do not fit together");
    }
    add_lowrank(x, cols, tokens, cols, a, b, rank, rows, y, ldy);
    return 0;
} catch (...) {
    return caught(error, "for this low-rank term");
}

NF_API int nf_add_sparse(const float *x, int64_t tokens, int64_t cols, const int32_t *index, const float *value, int64_t count,
                         int64_t rows, float *y, int64_t ldy, char *error) try {
    if (tokens < 0 || cols < 1 || count < 1 || rows < 1 || ldy < rows) {
        return fail(error, "the parts of these sparse corrections do not fit together");
    }
    if (!indices_within(index, rows * count, cols)) return fail(error, "a sparse correction points out of its row");
    if (tokens < 4) {
        add_sparse(x, cols, tokens, index, value, count, rows, y, ldy);
        return 0;
    }
    // many tokens: kSide of them side by side, so that every correction is a load of neighbours
    const Rotators &r = rotators();
    std::vector<float> beside(static_cast<size_t>(cols + 1) * kSide);
    float *x16 = beside.data() + (64 - reinterpret_cast<uintptr_t>(beside.data()) % 64) % 64 / sizeof(float);  // whole lines
    for (int64_t first = 0; first < tokens; first += kSide) {
        const int64_t here = std::min<int64_t>(kSide, tokens - first);
        for (int64_t k = 0; k < cols; k++) {
            for (int64_t t = 0; t < here; t++) x16[k * kSide + t] = x[(first + t) * cols + k];
        }
        share(rows, rows * count * kSide, std::max<int64_t>(16, kAlone / count), [&](int64_t from, int64_t to) {
            float sum[kSide][kSide];  // of as many rows, so that whole lines of y are written
            for (int64_t row = from; row < to; row += kSide) {
                const int64_t high = std::min<int64_t>(kSide, to - row);
                for (int64_t i = 0; i < high; i++) {
                    r.sparse(x16, index + (row + i) * count, value + (row + i) * count, count, sum[i]);
                }
                for (int64_t t = 0; t < here; t++) {
                    for (int64_t i = 0; i < high; i++) y[(first + t) * ldy + row + i] += sum[i][t];
                }
            }
        });
    }
    return 0;
} catch (...) {
    return caught(error, "for these sparse corrections");
}
