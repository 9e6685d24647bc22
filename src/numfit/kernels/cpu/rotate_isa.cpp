// Side terms, the loops of one instruction set (see rotate.h). Compiled once for each, like encode_isa.cpp.
#include "rotate.h"
#include "lanes.h"

namespace nf {
namespace NF_ISA {

// Within a vector: (u, v) → (u + v, u − v) over lanes h apart. The partner's lane, plus or minus the own one.
template <int h> static inline V partner(V v) {
#if defined(__AVX512F__)
    if (h == 1) return V(_mm512_permute_ps(__m512(v), 0xb1));
    if (h == 2) return V(_mm512_permute_ps(__m512(v), 0x4e));
    if (h == 4) return V(_mm512_shuffle_f32x4(__m512(v), __m512(v), 0xb1));
    return V(_mm512_shuffle_f32x4(__m512(v), __m512(v), 0x4e));
#elif defined(__AVX2__)
    if (h == 1) return V(_mm256_permute_ps(__m256(v), 0xb1));
    if (h == 2) return V(_mm256_permute_ps(__m256(v), 0x4e));
    return V(_mm256_permute2f128_ps(__m256(v), __m256(v), 0x01));
#else
    return h == 1 ? V{v[1], v[0], v[3], v[2]} : V{v[2], v[3], v[0], v[1]};
#endif
}

template <int h> static inline V butterfly(V v) {
    I minus;
    for (int l = 0; l < W; l++) minus[l] = l & h ? INT32_MIN : 0;
    return partner<h>(v) + number(bits(v) ^ minus);
}

static inline V within(V v) {
    v = butterfly<1>(v);
    v = butterfly<2>(v);
    if (W > 4) v = butterfly<4>(v);
    if (W > 8) v = butterfly<8>(v);
    return v;
}

// Butterflies among `count` vectors (a power of two), the nearest first.
template <int count> static inline void among(V *v) {
    for (int h = 1; h < count; h *= 2) {
        for (int i = 0; i < count; i++) {
            if (i & h) continue;
            const V u = v[i], w = v[i + h];
            v[i] = u + w, v[i + h] = u - w;
        }
    }
}

// The first stages of `count` vectors in a row, on the way from `x` (times signs, or not) to `out`.
template <int count> static void first(const float *x, const float *signs, float *out, int64_t cols) {
    for (int64_t j = 0; j < cols; j += count * W) {
        V v[count];
        for (int i = 0; i < count; i++) {
            v[i] = load(x + j + i * W);
            if (signs) v[i] *= load(signs + j + i * W);
            v[i] = within(v[i]);
        }
        among<count>(v);
        for (int i = 0; i < count; i++) store(out + j + i * W, v[i]);
    }
}

// Stages h, 2h … of `count` vectors h apart.
template <int count> static void later(float *x, int64_t h, int64_t cols) {
    for (int64_t base = 0; base < cols; base += count * h) {
        for (int64_t j = base; j < base + h; j += W) {
            V v[count];
            for (int i = 0; i < count; i++) v[i] = load(x + j + i * h);
            among<count>(v);
            for (int i = 0; i < count; i++) store(x + j + i * h, v[i]);
        }
    }
}

// x [m][n] · signs (or not), then butterflies along n: to out, which may be x.
static void butterflies(const Turn &t, const float *x, const float *signs, float *out) {
    if (t.n < W) {  // short runs, one number at a time
        for (int64_t i = 0; i < t.cols; i++) out[i] = signs ? x[i] * signs[i] : x[i];
        for (int64_t h = 1; h < t.n; h *= 2) {
            for (int64_t i = 0; i < t.cols; i++) {
                if (i & h) continue;  // n divides every row of the m, so the bits of i are those within the run
                const float u = out[i], v = out[i + h];
                out[i] = u + v, out[i + h] = u - v;
            }
        }
        return;
    }
    int64_t h = t.n / W < 8 ? t.n : 8 * W;
    switch (h / W) {
        case 1: first<1>(x, signs, out, t.cols); break;
        case 2: first<2>(x, signs, out, t.cols); break;
        case 4: first<4>(x, signs, out, t.cols); break;
        default: first<8>(x, signs, out, t.cols);
    }
    for (; h * 8 <= t.n; h *= 8) later<8>(out, h, t.cols);
    if (h * 4 == t.n) later<4>(out, h, t.cols);
    if (h * 2 == t.n) later<2>(out, h, t.cols);
}

// `rows` rows of the product, `wide` vectors each: out[c] = Σ_a D[c, a] · x[a], a ascending, every operation rounded.
template <int rows, int wide>
static inline void mix_tile(const float *d, int64_t stride, int64_t step, int64_t m, const float *x, int64_t n, float *out) {
    V acc[rows][wide];
    for (int64_t a = 0; a < m; a++) {
        V v[wide];
        for (int i = 0; i < wide; i++) v[i] = load(x + a * n + i * W);
        for (int c = 0; c < rows; c++) {
            const V factor = splat(d[c * stride + a * step]);
            for (int i = 0; i < wide; i++) acc[c][i] = a ? acc[c][i] + factor * v[i] : factor * v[i];
        }
    }
    for (int c = 0; c < rows; c++) {
        for (int i = 0; i < wide; i++) store(out + c * n + i * W, acc[c][i]);
    }
}

// out [m][n] = D · x [m][n], or Dᵀ · x; not in place, unless m is 1.
static void mix(const Turn &t, const float *x, float *out) {
    const int64_t m = t.m, n = t.n, stride = t.back ? 1 : m, step = t.back ? m : 1;
    if (n < W) {
        for (int64_t c = 0; c < m; c++) {
            for (int64_t j = 0; j < n; j++) {
                float sum = t.mixing[c * stride] * x[j];
                for (int64_t a = 1; a < m; a++) sum = sum + t.mixing[c * stride + a * step] * x[a * n + j];
                out[c * n + j] = sum;
            }
        }
        return;
    }
    int64_t c = 0;
    for (; c + 4 <= m; c += 4) {
        const float *d = t.mixing + c * stride;
        int64_t j = 0;
        for (; j + 2 * W <= n; j += 2 * W) mix_tile<4, 2>(d, stride, step, m, x + j, n, out + c * n + j);
        for (; j < n; j += W) mix_tile<4, 1>(d, stride, step, m, x + j, n, out + c * n + j);
    }
    for (; c < m; c++) {
        for (int64_t j = 0; j < n; j += W) mix_tile<1, 1>(t.mixing + c * stride, stride, step, m, x + j, n, out + c * n + j);
    }
}

static void turn(const Turn &t, const float *x, float *out, float *work) {
    if (!t.back) {
        butterflies(t, x, t.signs, work);
        mix(t, work, out);
        return;
    }
    mix(t, x, work);
    butterflies(t, work, nullptr, work);
    for (int64_t i = 0; i < t.cols; i++) out[i] = work[i] * t.signs[i];
}

// Sums run in 16 lanes, whatever the width of vectors, which are added in pairs at the end.
constexpr int kLanes = 16;

static void dots(const float *a, int64_t rank, int64_t cols, const float *x, float *out) {
    constexpr int V16 = kLanes / W;
    for (int64_t j = 0; j < rank; j++, a += cols) {
        V sum[V16] = {};
        int64_t k = 0;
        for (; k + kLanes <= cols; k += kLanes) {
            for (int i = 0; i < V16; i++) sum[i] += load(a + k + i * W) * load(x + k + i * W);
        }
        float lane[kLanes];
        for (int i = 0; i < V16; i++) store(lane + i * W, sum[i]);
        for (int l = 0; k < cols; k++, l++) lane[l] += a[k] * x[k];
        for (int h = kLanes / 2; h; h /= 2) {
            for (int l = 0; l < h; l++) lane[l] += lane[l + h];
        }
        out[j] = lane[0];
    }
}

static void add(const float *b, int64_t rank, int64_t ldb, const float *t, int64_t count, float *y) {
    int64_t i = 0;
    for (; i + W <= count; i += W) {
        V sum = {};
        for (int64_t j = 0; j < rank; j++) sum += splat(t[j]) * load(b + j * ldb + i);
        store(y + i, load(y + i) + sum);
    }
    for (; i < count; i++) {
        float sum = 0;
        for (int64_t j = 0; j < rank; j++) sum += t[j] * b[j * ldb + i];
        y[i] += sum;
    }
}

static void sparse(const float *x, const int32_t *index, const float *value, int64_t count, float *out) {
    V sum[kSide / W] = {};
    for (int64_t j = 0; j < count; j++) {
        const V factor = splat(value[j]);
        for (int i = 0; i < kSide / W; i++) sum[i] += factor * load(x + index[j] * kSide + i * W);
    }
    for (int i = 0; i < kSide / W; i++) store(out + i * W, sum[i]);
}

}  // namespace NF_ISA

NF_DEFINE_TABLE(Rotators, rotators, NF_ISA::turn, NF_ISA::dots, NF_ISA::add, NF_ISA::sparse)

}  // namespace nf
