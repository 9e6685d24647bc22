// The loop over the layers of a decoder (decoder.h). Matrices are apply_many's business and the rest is Ops' (kernels.h); what
// is left here is the order of things, the cache, and who works on what.
//
// Tokens are taken up to kChunk at a time. With one token everything between the matrices is done by the calling thread, since
// waking others would take longer; with more, tokens are shared out. No result depends on the number of threads, nor on how
// the tokens were cut into calls.
#include "decoder.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "decoder_check.h"
#include "kernels.h"
#include "rotate.h"

namespace {

constexpr int64_t kChunk = 512;     // tokens
constexpr int64_t kSpread = 1 << 16;  // multiply-adds of attention that are worth a second thread
constexpr int64_t kRows = 48;       // query rows of an attention job, about
constexpr int64_t kPositions = 1 << 24;  // the most that can be reserved
constexpr double kMost = 0x1p42;    // numbers of a cache or a table: more than a machine holds, and no product of sizes overflows

int fail(char *error, const char *sentence) {
    std::snprintf(error, NF_ERROR, "%s", sentence);
    return 1;
}

// Memory in huge pages that cleans up after itself.
struct Arena {
    void *data = nullptr;
    int64_t bytes = 0;
    Arena() = default;
    Arena(const Arena &) = delete;
    Arena &operator=(const Arena &) = delete;
    ~Arena() { release(); }
    void release() {
        if (data) nf::arena_free(data);
        data = nullptr, bytes = 0;
    }
    bool allocate(int64_t wanted) {
        release();
        bool huge;
        data = nf::arena_alloc(wanted, &huge);
        bytes = data ? wanted : 0;
        return data != nullptr;
    }
    void swap(Arena &other) { std::swap(data, other.data), std::swap(bytes, other.bytes); }
};

// Row `row` of a dense matrix.
void dense_row(const nf_decoder_linear &w, int64_t row, float *out) {
    const auto *words = static_cast<const uint16_t *>(w.dense) + row * w.cols;
    if (w.dense_kind == NF_DENSE_FP32) {
        std::memcpy(out, static_cast<const float *>(w.dense) + row * w.cols, static_cast<size_t>(w.cols) * sizeof(float));
        return;
    }
    const bool half = w.dense_kind == NF_DENSE_FP16;
    for (int64_t i = 0; i < w.cols; i++) {
        const uint32_t word = words[i], magnitude = word & 0x7fffu;
        const uint32_t bits = half ? magnitude << 13 : word << 16;
        float value;
        std::memcpy(&value, &bits, 4);
        if (half) value *= magnitude < 0x7c00u ? 0x1p112f : INFINITY;  // subnormal numbers come out right
        out[i] = half && word & 0x8000u ? -value : value;
    }
}

struct Layer : nf_decoder_layer {
    std::vector<nf_decoder_linear> own;  // the lists, one after the other
    const nf_decoder_linear *list(int which) const {
        const int32_t counts[] = {qkv, o, gate_up, down};
        const nf_decoder_linear *at = own.data();
        for (int i = 0; i < which; i++) at += counts[i];
        return at;
    }
};

}  // namespace

struct nf_decoder : nf_decoder_spec {
    std::vector<Layer> stack;
    std::mutex busy;
    int64_t length = 0;
    int64_t reserved = 0, capacity = 0; // positions that the tables are known for, and the same in whole blocks of keys
    Arena cache;                        // [layers][kv_heads]{keys, values}[capacity · head_dim] fp16
    std::vector<float> cosine, sine;    // [ropes][capacity][rotary]
    int64_t room = 0;                   // tokens that the work space holds
    Arena work;
    float *x, *normed, *qkv, *mixed, *wide;  // [room][…]: hidden, hidden, queries keys values, heads · head_dim, 2 · ffn
    float *turned;                      // [room][widest input that is rotated]
    int64_t widest = 0;                 // 0: none is
    std::vector<nf::Job> jobs;          // of one call
    std::vector<float> scratch;         // of attention, a piece for each thread

    int64_t qkv_width() const { return (heads + 2 * kv_heads) * head_dim; }
    int64_t plane() const { return capacity * head_dim; }
    uint16_t *keys(int64_t layer_index, int64_t head_index) const {
        return static_cast<uint16_t *>(cache.data) + (layer_index * kv_heads + head_index) * 2 * plane();
    }
    uint16_t *values(int64_t layer_index, int64_t head_index) const { return keys(layer_index, head_index) + plane(); }
};

namespace {

// ---- pieces ----

// body(token) for each of m, in parallel where there is more than one.
template <class F> void each_token(int64_t m, F &&body) {
    constexpr int64_t some = 8;
    if (m == 1) return body(0);
    nf::parallel((m + some - 1) / some, [&](int64_t part) {
        for (int64_t t = part * some; t < std::min(m, (part + 1) * some); t++) body(t);
    });
}

// y [m][ldy] = x [m][ldx] · Wᵀ for a dense matrix: for output layers that were kept, so plain code.
void apply_dense(const nf_decoder_linear &w, const float *x, int64_t m, int64_t ldx, float *y, int64_t ldy) {
    constexpr int64_t some = 64, lanes = 16;
    nf::parallel((w.rows + some - 1) / some, [&](int64_t part) {
        std::vector<float> row(static_cast<size_t>(w.cols));
        for (int64_t r = part * some; r < std::min(w.rows, (part + 1) * some); r++) {
            dense_row(w, r, row.data());
            for (int64_t t = 0; t < m; t++) {
                float sum[lanes] = {}, total = 0;
                const float *in = x + t * ldx;
                int64_t c = 0;
                for (; c + lanes <= w.cols; c += lanes)
                    for (int64_t j = 0; j < lanes; j++) sum[j] += in[c + j] * row[static_cast<size_t>(c + j)];
                for (; c < w.cols; c++) sum[c % lanes] += in[c] * row[static_cast<size_t>(c)];
                for (float part_sum : sum) total += part_sum;
                y[t * ldy + r] = total + (w.bias ? w.bias[r] : 0.0f);
            }
        }
    });
}

// The packed matrices of a list that have one rotation (or none), whose turned input x is, and what adds to them.
void apply_turned(nf_decoder &d, const nf_decoder_linear *list, int32_t count, const nf_decoder_rotation *rotation,
                  const float *x, int64_t m, int64_t ldx, float *y, int64_t ldy, bool exact) {
    auto each = [&](auto &&body) {
        float *at = y;
        for (int32_t i = 0; i < count; at += list[i].rows, i++)
            if (list[i].packed && list[i].rotation == rotation) body(list[i], at);
    };
    d.jobs.clear();
    each([&](const nf_decoder_linear &w, float *at) { d.jobs.push_back({w.packed, at, ldy, w.bias}); });
    nf::apply_many(d.jobs.data(), static_cast<int>(d.jobs.size()), x, m, ldx, exact);
    each([&](const nf_decoder_linear &w, float *at) {
        if (!w.terms) return;
        const auto &t = *w.terms;
        if (t.rank) nf::add_lowrank(x, ldx, m, w.cols, t.a, t.b, t.rank, w.rows, at, ldy);
        if (t.sparse) nf::add_sparse(x, ldx, m, t.index, t.value, t.sparse, w.rows, at, ldy);
    });
}

// The outputs of a list side by side. ldy ≥ their sum. Each rotation in it turns the input once.
void apply_list(nf_decoder &d, const nf_decoder_linear *list, int32_t count, const float *x, int64_t m, int64_t ldx, float *y,
                int64_t ldy, bool exact) {
    float *at = y;
    for (int32_t i = 0; i < count; at += list[i].rows, i++) {
        const nf_decoder_linear &w = list[i];
        if (w.dense) {
            apply_dense(w, x, m, ldx, at, ldy);
            continue;
        }
        auto same = [&](const nf_decoder_linear &other) { return other.packed && other.rotation == w.rotation; };
        if (std::any_of(list, list + i, same)) continue;  // done with the first of its kind
        if (w.rotation) nf::rotate_rows(nf::turn_of(w, false), x, ldx, m, d.turned, w.cols);
        apply_turned(d, list, count, w.rotation, w.rotation ? d.turned : x, m, w.rotation ? w.cols : ldx, y, ldy, exact);
    }
}

// A row of the embedding as format and side terms define it, in their order of operations (formats/side.py).
void embed(const nf_decoder &d, int64_t token, float *out) {
    const nf_decoder_linear &w = d.embedding;
    if (w.packed) nf::gather_row(*w.packed, token, out);
    else dense_row(w, token, out);
    if (w.terms) {
        const auto &t = *w.terms;
        for (int64_t j = 0; j < t.rank; j++)
            for (int64_t i = 0; i < w.cols; i++) out[i] += t.b[j * w.rows + token] * t.a[j * w.cols + i];
        for (int64_t j = token * t.sparse; j < (token + 1) * t.sparse; j++) out[t.index[j]] += t.value[j];
    }
    if (w.rotation) nf::rotate_rows(nf::turn_of(w, true), out, w.cols, 1, out, w.cols);
    for (int64_t i = 0; i < d.hidden; i++) out[i] *= d.embedding_scale;
}

// Head norms, rotation, and keys and values into the cache, for one token.
void prepare_heads(const nf_decoder &d, const nf::Kernels::Ops &ops, int64_t index, int64_t position, float *row) {
    const Layer &l = d.stack[static_cast<size_t>(index)];
    const int64_t dim = d.head_dim;
    if (l.q_norm)
        for (int64_t h = 0; h < d.heads + d.kv_heads; h++)
            ops.rms_norm(row + h * dim, h < d.heads ? l.q_norm : l.k_norm, d.eps, row + h * dim, dim);
    if (l.rope >= 0) {
        const size_t at = static_cast<size_t>((l.rope * d.capacity + position) * d.rotary);
        for (int64_t h = 0; h < d.heads + d.kv_heads; h++)
            ops.rotate(row + h * dim, d.cosine.data() + at, d.sine.data() + at, d.rotary / 2);
    }
    constexpr int64_t block = nf::kKeyBlock;
    uint16_t half[1024];
    for (int64_t h = 0; h < d.kv_heads; h++) {
        const float *key = row + (d.heads + h) * dim, *value = key + d.kv_heads * dim;
        uint16_t *to = d.keys(index, h) + position / block * block * dim + position % block;
        for (int64_t from = 0; from < dim; from += 1024) {
            const int64_t part = std::min<int64_t>(1024, dim - from);
            ops.to_half(key + from, half, part);
            for (int64_t i = 0; i < part; i++) to[(from + i) * block] = half[i];
        }
        ops.to_half(value, d.values(index, h) + position * dim, dim);
    }
}

// Attention of m tokens from `position` on: jobs of one key/value head and some tokens each, the longest first.
void attention(nf_decoder &d, const nf::Kernels::Ops &ops, int64_t index, int64_t m, int64_t position) {
    const int64_t dim = d.head_dim, group = d.heads / d.kv_heads, width = d.qkv_width(), inner = d.heads * dim;
    const int64_t some = std::min(m, std::max<int64_t>(1, kRows / group));
    const int64_t parts = (m + some - 1) / some, jobs = parts * d.kv_heads, piece = ops.attend_scratch(group * some, dim);
    const int64_t seats = m * d.heads * (position + m) * dim < kSpread ? 1 : std::min<int64_t>(jobs, nf_threads());
    if (static_cast<int64_t>(d.scratch.size()) < piece * seats) d.scratch.resize(static_cast<size_t>(piece * seats));
    std::atomic<int64_t> next{0};
    auto work = [&](int64_t seat) {
        for (int64_t i; (i = next.fetch_add(1)) < jobs;) {
            const int64_t h = i % d.kv_heads, t = (parts - 1 - i / d.kv_heads) * some;
            const nf::Attention a{d.keys(index, h), d.values(index, h), dim, d.stack[static_cast<size_t>(index)].window,
                                  d.attention_scale, d.attention_softcap};
            ops.attend(a, d.qkv + t * width + h * group * dim, width, group, std::min(some, m - t), position + t,
                       d.scratch.data() + seat * piece, d.mixed + t * inner + h * group * dim, inner);
        }
    };
    if (seats == 1) work(0);
    else nf::parallel(seats, work);
}

// One chunk through all layers: d.x [m][hidden] is what the output layer takes, before the last norm.
void run_layers(nf_decoder &d, const nf::Kernels::Ops &ops, int64_t m, int64_t position, bool exact) {
    const int64_t hidden = d.hidden, width = d.qkv_width(), inner = d.heads * d.head_dim, ffn = d.ffn;
    auto normalise = [&](const float *gain) {
        each_token(m, [&](int64_t t) { ops.rms_norm(d.x + t * hidden, gain, d.eps, d.normed + t * hidden, hidden); });
    };
    auto join = [&](const float *gain) {  // x += d.normed, normalised before where there is a gain
        each_token(m, [&](int64_t t) {
            float *y = d.normed + t * hidden;
            if (gain) ops.rms_norm(y, gain, d.eps, y, hidden);
            ops.add(d.x + t * hidden, y, hidden);
        });
    };
    for (int64_t i = 0; i < d.layers; i++) {
        const Layer &l = d.stack[static_cast<size_t>(i)];
        normalise(l.input_norm);
        apply_list(d, l.list(0), l.qkv, d.normed, m, hidden, d.qkv, width, exact);
        each_token(m, [&](int64_t t) { prepare_heads(d, ops, i, position + t, d.qkv + t * width); });
        attention(d, ops, i, m, position);
        apply_list(d, l.list(1), l.o, d.mixed, m, inner, d.normed, hidden, exact);
        join(l.post_attention_norm);
        normalise(l.ffn_norm);
        apply_list(d, l.list(2), l.gate_up, d.normed, m, hidden, d.wide, 2 * ffn, exact);
        each_token(m, [&](int64_t t) { ops.gated(d.wide + t * 2 * ffn, d.wide + t * 2 * ffn + ffn, d.activation, ffn); });
        apply_list(d, l.list(3), l.down, d.wide, m, 2 * ffn, d.normed, hidden, exact);
        join(l.post_ffn_norm);
    }
}

void finish(nf_decoder &d, const nf::Kernels::Ops &ops, int64_t from, int64_t m, bool exact, float *logits) {
    each_token(m, [&](int64_t t) {
        ops.rms_norm(d.x + (from + t) * d.hidden, d.final_norm, d.eps, d.normed + t * d.hidden, d.hidden);
    });
    apply_list(d, &d.head, 1, d.normed, m, d.hidden, logits, d.vocab, exact);
    if (d.logit_softcap > 0) each_token(m, [&](int64_t t) { ops.softcap(logits + t * d.vocab, d.logit_softcap, d.vocab); });
}

bool make_room(nf_decoder &d, int64_t tokens) {
    if (tokens <= d.room) return true;
    auto lines = [](int64_t floats) { return (floats + 15) / 16 * 16; };
    const int64_t parts[] = {lines(d.hidden * tokens), lines(d.hidden * tokens), lines(d.qkv_width() * tokens),
                             lines(d.heads * d.head_dim * tokens), lines(2 * d.ffn * tokens), lines(d.widest * tokens)};
    int64_t total = 0;
    for (int64_t part : parts) total += part;
    d.room = 0;
    if (!d.work.allocate(total * 4)) return false;
    float *at = static_cast<float *>(d.work.data), **places[] = {&d.x, &d.normed, &d.qkv, &d.mixed, &d.wide, &d.turned};
    for (int i = 0; i < 6; at += parts[i], i++) *places[i] = at;
    d.room = tokens;
    return true;
}

}  // namespace

nf_decoder *nf_decoder_create(const nf_decoder_spec *spec, char *error) try {
    if (!spec) return fail(error, "the decoder's description is incomplete"), nullptr;
    if (const char *sentence = nf::complaint(*spec)) return fail(error, sentence), nullptr;
    auto d = std::make_unique<nf_decoder>();
    static_cast<nf_decoder_spec &>(*d) = *spec;
    d->stack.resize(static_cast<size_t>(spec->layers));
    for (int64_t i = 0; i < spec->layers; i++) {
        Layer &l = d->stack[static_cast<size_t>(i)];
        static_cast<nf_decoder_layer &>(l) = spec->layer[i];
        l.own.assign(l.linears, l.linears + l.qkv + l.o + l.gate_up + l.down);
    }
    nf::each_linear(*spec, [&](const nf_decoder_linear &w) { d->widest = std::max(d->widest, w.rotation ? w.cols : 0); });
    return d.release();
} catch (...) {
    return nf::caught(error, "for the decoder"), nullptr;
}

void nf_decoder_free(nf_decoder *d) { delete d; }

int64_t nf_decoder_length(const nf_decoder *d) { return d ? d->length : 0; }

int64_t nf_decoder_bytes(const nf_decoder *d) {
    if (!d) return 0;
    return d->cache.bytes + d->work.bytes + static_cast<int64_t>((d->cosine.size() + d->sine.size() + d->scratch.size()) * 4);
}

int nf_decoder_reserve(nf_decoder *d, int64_t positions, const float *cosine, const float *sine, char *error) try {
    if (!d) return fail(error, "there is no decoder");
    std::lock_guard<std::mutex> guard(d->busy);
    if (positions < 1 || positions > kPositions) return fail(error, "the number of positions is not positive, or absurd");
    if (positions <= d->reserved) return 0;
    if (d->ropes && d->rotary && (!cosine || !sine)) return fail(error, "the decoder's rotary tables are missing");
    const int64_t wanted = (positions + nf::kKeyBlock - 1) / nf::kKeyBlock * nf::kKeyBlock, old = d->plane();
    const double per_position = static_cast<double>(d->layers * d->kv_heads) * static_cast<double>(2 * d->head_dim);
    if (static_cast<double>(d->ropes) * static_cast<double>(d->rotary * wanted) > kMost ||
        per_position * static_cast<double>(wanted) > kMost) {
        return fail(error, "there is not enough memory for the key/value cache");
    }
    std::vector<float> tables[2];
    const float *given[] = {cosine, sine};
    for (int i = 0; i < 2 && d->rotary; i++) {
        tables[i].resize(static_cast<size_t>(d->ropes * wanted * d->rotary));
        for (int32_t r = 0; r < d->ropes; r++)
            std::copy_n(given[i] + r * positions * d->rotary, positions * d->rotary, tables[i].data() + r * wanted * d->rotary);
    }
    Arena grown;
    const int64_t planes = d->layers * d->kv_heads * 2, plane = wanted * d->head_dim;
    if (!grown.allocate(planes * plane * 2)) return fail(error, "there is not enough memory for the key/value cache");
    if (d->length)
        for (int64_t i = 0; i < planes; i++)
            std::copy_n(static_cast<uint16_t *>(d->cache.data) + i * old, old, static_cast<uint16_t *>(grown.data) + i * plane);
    d->cache.swap(grown);
    d->cosine.swap(tables[0]), d->sine.swap(tables[1]);
    d->capacity = wanted, d->reserved = positions;
    return 0;
} catch (...) {
    return nf::caught(error, "for the decoder's tables");
}

int nf_decoder_forward(nf_decoder *d, const int64_t *tokens, int64_t count, int64_t start, int mode, int all, float *logits,
                       char *error) try {
    if (!d || !tokens || !logits) return fail(error, "the decoder, its tokens or the place for its logits are missing");
    std::lock_guard<std::mutex> guard(d->busy);
    if (count < 1) return fail(error, "there are no tokens to run the decoder on");
    if (start < 0 || start > d->length) return fail(error, "the tokens do not follow on what the decoder has seen");
    if (count > d->reserved - start) return fail(error, "the decoder has no room for so many positions; reserve more");
    for (int64_t i = 0; i < count; i++)
        if (tokens[i] < 0 || tokens[i] >= d->vocab) return fail(error, "a token is outside the decoder's vocabulary");
    if (!make_room(*d, std::min(count, kChunk))) return fail(error, "there is not enough memory for the decoder's work space");
    const auto &ops = nf::kernels().ops;
    d->length = start;
    for (int64_t done = 0; done < count; done += kChunk) {
        const int64_t m = std::min(kChunk, count - done);
        each_token(m, [&](int64_t t) { embed(*d, tokens[done + t], d->x + t * d->hidden); });
        run_layers(*d, ops, m, start + done, mode != 0);
        d->length = start + done + m;
        if (all) finish(*d, ops, 0, m, mode != 0, logits + done * d->vocab);
        else if (done + m == count) finish(*d, ops, m - 1, 1, mode != 0, logits);
    }
    return 0;
} catch (...) {
    return nf::caught(error, "for the decoder's work space");
}
