// Attention over packed keys and values for one instruction set; compiled once for each, like isa.cpp and under the same
// restrictions. Two primitives do all of it, whatever rows are:
//
//     dot          y[row] = Σ_j x[j] · value[row][j]      keys of tokens; values of channels
//     accumulate   y[j] += Σ_row a[row] · value[row][j]   keys of channels; values of tokens
//
// Codes of b < 8 bits: sixteen lanes hold eight codes each, in b bytes; lane l, shift k is value 8l + k of a line. Levels are
// looked up in sixteen floats, which AVX-512 has an instruction for and which costs no more than converting an integer. Codes of
// 8 bits are converted; vector k, lane l is value 16k + l.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors of 64 bytes stay within this file, whose functions are all static
#endif

#include "attend.h"
#include "soft.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace nf {
namespace NF_ISA {

typedef float F __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));
typedef float LooseF __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint8_t B16 __attribute__((vector_size(16), aligned(1), may_alias));
typedef uint16_t H16 __attribute__((vector_size(32), aligned(1), may_alias));
typedef int32_t LooseI __attribute__((vector_size(64), aligned(1), may_alias));

static inline F load(const float *p) { return *reinterpret_cast<const LooseF *>(p); }
static inline void store(float *p, F v) { *reinterpret_cast<LooseF *>(p) = v; }
static inline F splat(float f) { return f - F{}; }

static inline F fma(F a, F b, F c) {
#if defined(__AVX512F__)
    return F(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c)));
#elif defined(__FMA__)
    union { F v; __m256 h[2]; } x = {a}, y = {b}, z = {c};
    for (int i = 0; i < 2; i++) z.h[i] = _mm256_fmadd_ps(x.h[i], y.h[i], z.h[i]);
    return z.v;
#elif defined(__aarch64__)
    union { F v; float32x4_t h[4]; } x = {a}, y = {b}, z = {c};
    for (int i = 0; i < 4; i++) z.h[i] = vfmaq_f32(z.h[i], x.h[i], y.h[i]);
    return z.v;
#else
    for (int i = 0; i < 16; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#endif
}

// t[index & 15]
static inline F pick16(const float *t, I index) {
#if defined(__AVX512F__)
    return F(_mm512_permutexvar_ps(__m512i(index), _mm512_loadu_ps(t)));
#elif defined(__AVX2__)
    const __m256 low = _mm256_loadu_ps(t), high = _mm256_loadu_ps(t + 8);
    union { I v; __m256i h[2]; } i = {index};
    union { F v; __m256 h[2]; } out;
    for (int n = 0; n < 2; n++) {
        out.h[n] = _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, i.h[n]), _mm256_permutevar8x32_ps(high, i.h[n]),
                                    _mm256_castsi256_ps(_mm256_slli_epi32(i.h[n], 28)));
    }
    return out.v;
#else
    F out;
    for (int n = 0; n < 16; n++) out[n] = t[index[n] & 15];
    return out;
#endif
}

// t[index], index below 32
static inline F pick32(const float *t, I index) {
#if defined(__AVX512F__)
    return F(_mm512_permutex2var_ps(_mm512_loadu_ps(t), __m512i(index), _mm512_loadu_ps(t + 16)));
#else
    const F low = pick16(t, index), high = pick16(t + 16, index);
    return (index & 16) != 0 ? high : low;
#endif
}

static inline float sum(F v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps(__m512(v));  // the order of sum_of
#else
    alignas(64) float lane[16];
    store(lane, v);
    return sum_of(lane);
#endif
}

// fp16 → fp32
static inline void widen(const uint16_t *from, float *to, int64_t n) {
    int64_t i = 0;
#if defined(__AVX512F__)
    for (; i + 16 <= n; i += 16) _mm512_storeu_ps(to + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(from + i))));
#elif defined(__F16C__)
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from + i))));
#endif
    for (; i < n; i++) {
        const uint32_t h = from[i], sign = (h & 0x8000u) << 16, exponent = h >> 10 & 31, mantissa = h & 1023u;
        const float tiny = static_cast<float>(mantissa) * 0x1p-24f;
        to[i] = from_bits(sign | (exponent ? (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13 : to_bits(tiny)));
    }
}

// Sixteen unsigned numbers as int32.
static inline I widened(const uint8_t *p) {
#if defined(__AVX512F__)
    return I(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))));
#elif defined(__AVX2__)
    union { I v; __m256i h[2]; } out;
    for (int i = 0; i < 2; i++) out.h[i] = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p + 8 * i)));
    return out.v;
#else
    return __builtin_convertvector(*reinterpret_cast<const B16 *>(p), I);
#endif
}
static inline I widened(const uint16_t *p) {
#if defined(__AVX512F__)
    return I(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p))));
#elif defined(__AVX2__)
    union { I v; __m256i h[2]; } out;
    for (int i = 0; i < 2; i++) out.h[i] = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p + 8 * i)));
    return out.v;
#else
    return __builtin_convertvector(*reinterpret_cast<const H16 *>(p), I);
#endif
}

// Sixteen lanes of `bits` bytes, and no byte more.
template <int bits> static inline I lanes(const uint8_t *p) {
    if constexpr (bits == 4) {
        return *reinterpret_cast<const LooseI *>(p);
    } else if constexpr (bits == 2) {
        return widened(reinterpret_cast<const uint16_t *>(p));
    } else {
#if defined(__AVX512VBMI__)
        alignas(64) static const uint8_t place[64] = {0,  1,  2,  63, 3,  4,  5,  63, 6,  7,  8,  63, 9,  10, 11, 63, 12, 13, 14, 63, 15, 16,
                                                      17, 63, 18, 19, 20, 63, 21, 22, 23, 63, 24, 25, 26, 63, 27, 28, 29, 63, 30, 31, 32, 63,
                                                      33, 34, 35, 63, 36, 37, 38, 63, 39, 40, 41, 63, 42, 43, 44, 63, 45, 46, 47, 63};
        const __m512i line = _mm512_maskz_loadu_epi8(0xffffffffffffULL, p);
        return I(_mm512_permutexvar_epi8(_mm512_load_si512(place), line));
#else
        I out;
        for (int l = 0; l < 16; l++) out[l] = p[3 * l] | p[3 * l + 1] << 8 | p[3 * l + 2] << 16;
        return out;
#endif
    }
}

template <int n> struct Number { static constexpr int value = n; };

// Written out, so that an array indexed by k is registers from the start.
#define NF_EIGHT(step) step(0) step(1) step(2) step(3) step(4) step(5) step(6) step(7)

// How the lines of one block of a stream are read.
template <int bits, int tables> struct Lines {  // tables: 0 codes are levels, 1 one table, 2 a table for each half of a line
    static constexpr int kBits = bits;
    typedef uint32_t U __attribute__((vector_size(64)));
    const nf_stream &s;
    const uint8_t *codes;
    const float *table;  // 16 floats, the levels repeated
    const float *both;   // [lines][32], tables == 2

    // Vector k of a line's codes (8 bits: from memory; else from its lanes w), as numbers.
    template <int k> inline F value(const uint8_t *p, U w, const float *t, int32_t zero) const {
        if constexpr (bits == 8) {
            return __builtin_convertvector(widened(p + 16 * k) - zero, F);
        } else {
            const I c = I(w >> (k * bits));
            const I half = {0, 0, 0, 0, 0, 0, 0, 0, 16, 16, 16, 16, 16, 16, 16, 16};
            if constexpr (tables == 2) return pick32(t, (c & 15) | half);
            else if constexpr (tables == 1) return pick16(t, c);
            else return __builtin_convertvector((c & ((1 << bits) - 1)) - zero, F);
        }
    }
    // f(Number<k>, values) for the eight vectors of line i
    template <class Each> inline void each(int64_t i, const Each &f) const {
        const uint8_t *p = codes + i * 16 * bits;
        U w = {};
        if constexpr (bits < 8) w = U(lanes<bits>(p));
        const float *t = tables == 2 ? both + 32 * i : table;
        const int32_t zero = s.zero;
#define NF_STEP(k) f(Number<k>{}, value<k>(p, w, t, zero));
        NF_EIGHT(NF_STEP)
#undef NF_STEP
    }
};

// Which group of a line a lane (bits < 8) or a vector (8 bits) belongs to, and how lines and rows lie to one another.
struct Shape {
    int64_t per_line;  // groups of a line, at least 1
    int64_t parts;     // lines of a row, at least 1
    int64_t row, group;
    I lane_group;
    explicit Shape(const nf_stream &s) : row(s.row), group(s.group) {
        per_line = group < kLine ? kLine / group : 1;
        parts = row > kLine ? row / kLine : 1;
        for (int l = 0; l < 16; l++) lane_group[l] = static_cast<int32_t>(8 * l / (group < kLine ? group : kLine));
    }
    int64_t base(int64_t line) const { return line * kLine / group; }  // first group of a line
};

// Scales and lows of a block's `rows` rows, as floats.
static void read_groups(const nf_stream &s, int64_t block, int64_t head, int64_t capacity, int64_t rows, float *scale, float *low) {
    const int64_t groups = s.row / s.group, at = head * capacity * groups;
    widen(s.scale[block] + at, scale, rows * groups);
    if (low) widen(s.low[block] + at, low, rows * groups);
}

// Tables of the lines of a block: [lines][32].
static void read_members(const nf_stream &s, int64_t block, int64_t head, int64_t capacity, int64_t rows, float *both) {
    const int64_t units = s.row / s.unit, bytes = (units * s.member_bits + 7) / 8, lines = rows * s.row / kLine;
    const uint8_t *from = s.member[block] + head * capacity * bytes;
    const auto table = [&](int64_t value) {
        const int64_t r = value / s.row, u = value % s.row / s.unit, bit = u * s.member_bits;
        const uint8_t *p = from + r * bytes + bit / 8;
        const int pair = bit % 8 + s.member_bits > 8 ? p[0] | p[1] << 8 : p[0];
        const int m = pair >> (bit % 8) & ((1 << s.member_bits) - 1);
        return s.levels + (m < s.members ? m : 0) * kLevels;
    };
    for (int64_t i = 0; i < lines; i++) {
        store(both + 32 * i, load(table(i * kLine)));
        store(both + 32 * i + 16, load(table(i * kLine + kLine / 2)));
    }
}

// Calls f(lines) with what reads the block.
template <class Call>
static inline void with_lines(const nf_stream &s, int64_t block, int64_t head, int64_t capacity, const float *both, const Call &f) {
    const uint8_t *codes = s.codes[block] + head * capacity * (s.row * s.bits / 8);
    const auto go = [&](auto b, auto t) { f(Lines<decltype(b)::value, decltype(t)::value>{s, codes, s.levels, both}); };
    const auto bits = [&](auto t) {
        if (s.bits == 4) go(Number<4>{}, t);
        else if (s.bits == 3) go(Number<3>{}, t);
        else go(Number<2>{}, t);
    };
    if (s.bits == 8) go(Number<8>{}, Number<0>{});
    else if (s.unit) bits(Number<2>{});
    else if (s.levels) bits(Number<1>{});
    else bits(Number<0>{});
}

// x [row] → the order in which `each` gives values, with its sums by lane: out [parts][8][16], sums [parts][16]. Rows shorter than
// a line are repeated.
static void arrange(const nf_stream &s, const Shape &shape, const float *x, float *out, float *sums) {
    for (int64_t part = 0; part < shape.parts; part++) {
        for (int l = 0; l < 16; l++) {
            float total = 0.0f;
            for (int k = 0; k < 8; k++) {
                const int64_t j = (part * kLine + (s.bits == 8 ? 16 * k + l : 8 * l + k)) & (s.row - 1);
                out[(part * 8 + k) * 16 + l] = x[j];
                total += x[j];
            }
            sums[part * 16 + l] = total;
        }
    }
}

// y[row] = Σ_j x[j] · value[row][j]
template <class L>
static void dot(const L &lines, const nf_stream &s, const Shape &shape, int64_t rows, const float *scale, const float *low, const float *x,
                const float *sums, float *y) {
    const int64_t count = rows * s.row / kLine;
    if constexpr (L::kBits == 8) {  // groups are whole vectors
        const int64_t n = s.row / 16;
        int shift = 4;  // group = 1 << shift
        while (int64_t{1} << shift < s.group) shift++;
        for (int64_t i = 0; i < count; i++) {
            F acc[8];
            const float *xs = x + i % shape.parts * 128;
            lines.each(i, [&](auto number, F v) {
                constexpr int k = decltype(number)::value;
                const int64_t g = (i * kLine + 16 * k) >> shift;
                acc[k] = v * load(xs + 16 * k) * splat(scale[g]);
                if (low) acc[k] = fma(splat(low[g]), load(xs + 16 * k), acc[k]);
            });
            if (n >= 8) {
                const float part = sum(((acc[0] + acc[1]) + (acc[2] + acc[3])) + ((acc[4] + acc[5]) + (acc[6] + acc[7])));
                const int64_t row = i / shape.parts;
                y[row] = i % shape.parts ? y[row] + part : part;
                continue;
            }
            for (int r = 0; r < 8 / n; r++) {  // rows of a line: two or four
                F total = acc[r * n];
                for (int k = 1; k < n; k++) total = total + acc[r * n + k];
                y[i * 8 / n + r] = sum(total);
            }
        }
        return;
    }
    for (int64_t i = 0; i < count; i++) {
        const float *xs = x + i % shape.parts * 128;
        F acc[2] = {};
        lines.each(i, [&](auto number, F v) {
            constexpr int k = decltype(number)::value;
            acc[k % 2] = fma(v, load(xs + 16 * k), acc[k % 2]);
        });
        const F factor = pick16(scale + shape.base(i), shape.lane_group);
        F total = (acc[0] + acc[1]) * factor;
        if (low) total = fma(pick16(low + shape.base(i), shape.lane_group), load(sums + i % shape.parts * 16), total);
        if (s.row >= kLine) {
            const int64_t row = i / shape.parts;
            const float part = sum(total);
            y[row] = i % shape.parts ? y[row] + part : part;
        } else {
            const int64_t n = kLine / s.row, width = 16 / n;  // rows of a line, lanes of a row
            for (int64_t r = 0; r < n; r++) {
                float part = 0.0f;
                for (int64_t l = 0; l < width; l++) part += total[r * width + l];
                y[i * n + r] = part;
            }
        }
    }
}

// y[j] += Σ_row a[row] · value[row][j] for rows of one block; work [2 · groups of all rows].
template <class L>
static void accumulate(const L &lines, const nf_stream &s, const Shape &shape, int64_t rows, const float *scale, const float *low,
                       const float *a, float *work, float *y) {
    const int64_t groups = s.row / s.group, lines_of_rows = rows * s.row / kLine;
    float *by_scale = work, *by_low = work + rows * groups + 16;
    if (groups == 1) {
        for (int64_t r = 0; r < rows; r++) by_scale[r] = a[r] * scale[r];
        for (int64_t r = 0; r < rows && low; r++) by_low[r] = a[r] * low[r];
    } else {
        for (int64_t r = 0; r < rows; r++)
            for (int64_t g = r * groups; g < (r + 1) * groups; g++) by_scale[g] = a[r] * scale[g];
        for (int64_t r = 0; r < rows && low; r++)
            for (int64_t g = r * groups; g < (r + 1) * groups; g++) by_low[g] = a[r] * low[g];
    }
    int shift = 4;  // group = 1 << shift
    while (int64_t{1} << shift < s.group) shift++;
    constexpr bool bytes = L::kBits == 8;
    for (int64_t part = 0; part < shape.parts; part++) {
        F acc[8] = {}, rest[8] = {};  // rest: the lows, by lane, or by vector for 8 bits
        for (int64_t i = part; i < lines_of_rows; i += shape.parts) {
            if constexpr (bytes) {
                lines.each(i, [&](auto number, F v) {
                    constexpr int k = decltype(number)::value;
                    const int64_t g = (i * kLine + 16 * k) >> shift;
                    acc[k] = fma(v, splat(by_scale[g]), acc[k]);
                    if (low) rest[k] = rest[k] + splat(by_low[g]);
                });
            } else {
                const int64_t base = (i * kLine) >> shift;
                const F factor = pick16(by_scale + base, shape.lane_group);
                lines.each(i, [&](auto number, F v) {
                    constexpr int k = decltype(number)::value;
                    acc[k] = fma(v, factor, acc[k]);
                });
                if (low) rest[0] = rest[0] + pick16(by_low + base, shape.lane_group);
            }
        }
        alignas(64) float total[8 * 16];
#define NF_STEP(k) store(total + 16 * k, acc[k] + rest[bytes ? k : 0]);
        NF_EIGHT(NF_STEP)
#undef NF_STEP
        for (int k = 0; k < 8; k++)
            for (int l = 0; l < 16; l++) y[(part * kLine + (bytes ? 16 * k + l : 8 * l + k)) & (s.row - 1)] += total[16 * k + l];
    }
}

constexpr float kNone = -1e30f;  // no token seen

static float *take(float *&scratch, int64_t n) {
    float *p = scratch;
    scratch += (n + 31) / 16 * 16;  // vectors may be read beyond the end
    return p;
}

// Numbers of the rows of a block, read once for all queries.
struct Rows {
    const nf_stream &s;
    Shape shape;
    int64_t capacity;  // rows of a block
    float *scale, *low, *both, *work;
    Rows(const nf_stream &stream, int64_t dim, int64_t block, float *&scratch) : s(stream), shape(stream) {
        capacity = s.channel ? block / s.row * dim : block;
        const int64_t groups = capacity * (s.row / s.group);
        scale = take(scratch, groups), work = take(scratch, 2 * groups + 32);
        low = s.low ? take(scratch, groups) : nullptr;
        both = s.unit ? take(scratch, capacity * s.row / kLine * 32 + 32) : nullptr;
    }
    void read(int64_t block, int64_t head, int64_t rows) {
        read_groups(s, block, head, capacity, rows, scale, low);
        if (s.unit) read_members(s, block, head, capacity, rows, both);
    }
};

static void attend(const Piece &p) {
    float *scratch = p.scratch;
    Rows keys(*p.keys, p.dim, p.block, scratch), values(*p.values, p.width, p.block, scratch);
    float *score = take(scratch, p.block), *x = take(scratch, 8 * 128), *sums = take(scratch, 128);
    float *arranged = take(scratch, p.queries * 2 * 128), *arranged_sums = take(scratch, p.queries * 32);
    float *row_y = take(scratch, p.width);
    const nf_stream &k = *p.keys, &v = *p.values;
    for (int64_t r = 0; r < p.queries; r++) {
        p.most[r] = kNone, p.sum[r] = 0.0f;
        for (int64_t d = 0; d < p.width; d++) p.out[r * p.width + d] = 0.0f;
        if (!k.channel) arrange(k, keys.shape, p.q + r * p.dim, arranged + r * 256, arranged_sums + r * 32);
    }
    for (int64_t block = p.first; block < p.last; block++) {
        const int64_t left = p.tokens - block * p.block, count = left < p.block ? left : p.block;
        keys.read(block, p.head, k.channel ? count / k.row * p.dim : count);
        values.read(block, p.head, v.channel ? count / v.row * p.width : count);
        for (int64_t r = 0; r < p.queries; r++) {
            const float *q = p.q + r * p.dim;
            with_lines(k, block, p.head, keys.capacity, keys.both, [&](auto lines) {
                if (!k.channel) {
                    dot(lines, k, keys.shape, count, keys.scale, keys.low, arranged + r * 256, arranged_sums + r * 32, score);
                    return;
                }
                for (int64_t i = 0; i < count; i++) score[i] = 0.0f;
                const int64_t groups = k.row / k.group;
                for (int64_t w = 0; w < count / k.row; w++) {  // windows of tokens
                    auto window = lines;
                    window.codes += w * p.dim * (k.row * k.bits / 8);
                    if (window.both) window.both += w * p.dim * k.row / kLine * 32;
                    accumulate(window, k, keys.shape, p.dim, keys.scale + w * p.dim * groups,
                               keys.low ? keys.low + w * p.dim * groups : nullptr, q, keys.work, score + w * k.row);
                }
            });
            const float bias = p.bias ? p.bias[r] : 0.0f;
            const float *mask = p.mask ? p.mask + block * p.block : nullptr;
            F top = splat(p.most[r]);
            for (int64_t i = 0; i < count; i += 16) {
                F s = load(score + i) + splat(bias);
                if (mask) {
                    s = s + load(mask + i);
                    s = s > splat(kNone) ? s : splat(kNone);
                }
                store(score + i, s);
                top = s > top ? s : top;
            }
            float now = top[0];
            for (int l = 1; l < 16; l++) now = top[l] > now ? top[l] : now;
            alignas(64) float lane[32] = {};
            for (int64_t i = 0; i < count; i++) score[i] = exponential(score[i] - now);
            if (now == kNone)
                for (int64_t i = 0; i < count; i++) score[i] = 0.0f;  // all of them masked
            for (int64_t i = 0; i < count; i += 16)
                for (int l = 0; l < 16; l++) lane[l] += score[i + l];
            const float kept = p.most[r] == now ? 1.0f : exponential(p.most[r] - now);
            p.sum[r] = p.sum[r] * kept + sum(load(lane));
            p.most[r] = now;
            float *out = p.out + r * p.width;
            if (kept != 1.0f)
                for (int64_t d = 0; d < p.width; d++) out[d] *= kept;
            with_lines(v, block, p.head, values.capacity, values.both, [&](auto lines) {
                if (!v.channel) {
                    accumulate(lines, v, values.shape, count, values.scale, values.low, score, values.work, out);
                    return;
                }
                const int64_t groups = v.row / v.group;
                for (int64_t w = 0; w < count / v.row; w++) {
                    auto window = lines;
                    window.codes += w * p.width * (v.row * v.bits / 8);
                    if (window.both) window.both += w * p.width * v.row / kLine * 32;
                    arrange(v, values.shape, score + w * v.row, x, sums);
                    dot(window, v, values.shape, p.width, values.scale + w * p.width * groups,
                        values.low ? values.low + w * p.width * groups : nullptr, x, sums, row_y);
                    for (int64_t d = 0; d < p.width; d++) out[d] += row_y[d];
                }
            });
        }
    }
}

}  // namespace NF_ISA

NF_DEFINE_TABLE(Attenders, attenders, NF_ISA::attend)

}  // namespace nf
