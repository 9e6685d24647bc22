// Side terms: the C interface of rotate.h, checks, and how rows are dealt out.
#include "rotate.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <new>
#include <vector>

#include "kernels.h"

namespace nf {
namespace {

constexpr int64_t kAlone = 1 << 15;  // numbers below which threads cost more than they save

const Rotators &rotators() {
    static const std::vector<const Rotators *> all = {
        portable_rotators(),
#ifdef NF_HAVE_AVX2
        avx2_rotators(),
#endif
#ifdef NF_HAVE_AVXVNNI
        avxvnni_rotators(),
#endif
#ifdef NF_HAVE_AVX512
        avx512_rotators(),
#endif
#ifdef NF_HAVE_AMX
        amx_rotators(),
#endif
#ifdef NF_HAVE_NEON
        neon_rotators(),
#endif
    };
    for (const Rotators *r : all) {
        if (std::strcmp(r->name, kernels().name) == 0) return *r;
    }
    return *all[0];
}

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
}  // namespace nf

using namespace nf;

NF_API int nf_rotate(const void *x, int kind, int64_t rows, int64_t cols, const float *signs, const float *mixing, int64_t m, int back,
                     float *out, char *error) try {
    if (rows < 0 || cols < 1 || m < 1 || cols % m || (cols / m & (cols / m - 1)) || (kind != 0 && kind != 1)) {
        return fail(error, "the parts of this rotation do not fit together");
    }
    const Turn t = {cols, m, cols / m, signs, mixing, back != 0};
    const Rotators &r = rotators();
    const int64_t step = std::max<int64_t>(1, kAlone / cols);
    share(rows, rows > 1 ? rows * cols : 0, step, [&](int64_t from, int64_t to) {
        float *work = static_cast<float *>(aligned_work(static_cast<size_t>(2 * cols + 16) * sizeof(float)));
        float *wide = work + (cols + 15) / 16 * 16;  // a row of bf16 in fp32
        for (int64_t row = from; row < to; row++) {
            const float *in = static_cast<const float *>(x) + row * cols;
            if (kind == 1) {
                const uint16_t *half = static_cast<const uint16_t *>(x) + row * cols;
                for (int64_t i = 0; i < cols; i++) {
                    const uint32_t word = static_cast<uint32_t>(half[i]) << 16;
                    std::memcpy(wide + i, &word, 4);
                }
                in = wide;
            }
            r.turn(t, in, out + row * cols, work);
        }
    });
    return 0;
} catch (const std::bad_alloc &) {
    return fail(error, "there is not enough memory to rotate this tensor");
}

NF_API int nf_add_lowrank(const float *x, int64_t tokens, int64_t cols, const float *a, const float *b, int64_t rank, int64_t rows,
                          float *y, int64_t ldy, char *error) try {
    if (tokens < 0 || cols < 1 || rank < 1 || rows < 1 || ldy < rows) {
        return fail(error, "the parts of this low-rank term do not fit together");
    }
    const Rotators &r = rotators();
    std::vector<float> inner(static_cast<size_t>(tokens * rank));
    if (tokens == 1) {  // one token: ranks, then rows, are shared out
        share(rank, rank * cols, std::max<int64_t>(1, kAlone / cols), [&](int64_t from, int64_t to) {
            r.dots(a + from * cols, to - from, cols, x, inner.data() + from);
        });
        share(rows, rank * rows, std::max<int64_t>(64, kAlone / rank / 64 * 64), [&](int64_t from, int64_t to) {
            r.add(b + from, rank, rows, inner.data(), to - from, y + from);
        });
        return 0;
    }
    share(tokens, tokens * rank * (rows + cols), 1, [&](int64_t from, int64_t to) {
        for (int64_t t = from; t < to; t++) {
            r.dots(a, rank, cols, x + t * cols, inner.data() + t * rank);
            r.add(b, rank, rows, inner.data() + t * rank, rows, y + t * ldy);
        }
    });
    return 0;
} catch (const std::bad_alloc &) {
    return fail(error, "there is not enough memory for this low-rank term");
}

NF_API int nf_add_sparse(const float *x, int64_t tokens, int64_t cols, const int32_t *index, const float *value, int64_t count,
                         int64_t rows, float *y, int64_t ldy, char *error) try {
    if (tokens < 0 || cols < 1 || count < 1 || rows < 1 || ldy < rows) {
        return fail(error, "the parts of these sparse corrections do not fit together");
    }
    bool outside = false;
    for (int64_t i = 0; i < rows * count; i++) outside |= static_cast<uint32_t>(index[i]) >= static_cast<uint64_t>(cols);
    if (outside) return fail(error, "a sparse correction points out of its row");
    if (tokens < 4) {
        for (int64_t t = 0; t < tokens; t++) {
            share(rows, rows * count, std::max<int64_t>(16, kAlone / count), [&](int64_t from, int64_t to) {
                for (int64_t row = from; row < to; row++) {
                    float sum = 0;
                    for (int64_t j = row * count; j < (row + 1) * count; j++) sum += value[j] * x[t * cols + index[j]];
                    y[t * ldy + row] += sum;
                }
            });
        }
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
} catch (const std::bad_alloc &) {
    return fail(error, "there is not enough memory for these sparse corrections");
}
