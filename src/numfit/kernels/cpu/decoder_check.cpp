// The checks of decoder_check.h.
#include "decoder_check.h"

#include "layout.h"

namespace nf {
namespace {

bool fits(const nf_decoder_linear *list, int32_t count, int64_t rows, int64_t cols) {
    int64_t total = 0;
    for (int32_t i = 0; i < count; i++) {
        const auto &w = list[i];
        if (w.cols != cols || w.rows < 1 || (w.packed == nullptr) == (w.dense == nullptr)) return false;
        if (w.packed && (w.packed->n != w.rows || w.packed->k != w.cols)) return false;
        if (w.dense && (w.dense_kind < NF_DENSE_FP32 || w.dense_kind > NF_DENSE_BF16)) return false;
        total += w.rows;
    }
    return total == rows;
}

// Everything that a matrix has beside its weights.
bool sound(const nf_decoder_linear &w) {
    if (w.dense) return !w.rotation && !w.terms;
    if (w.rotation && (!w.rotation->signs || !w.rotation->mixing || w.rotation->m < 1 || !fits_together(turn_of(w, false))))
        return false;
    if (!w.terms) return true;
    const auto &t = *w.terms;
    if (t.rank < 0 || t.sparse < 0 || (t.rank && (!t.a || !t.b)) || (t.sparse && (!t.index || !t.value))) return false;
    return indices_within(t.index, w.rows * t.sparse, w.cols);
}

}  // namespace

const char *complaint(const nf_decoder_spec &s) {
    const int64_t counts[] = {s.layers, s.heads, s.kv_heads, s.head_dim, s.hidden, s.ffn, s.vocab};
    for (int64_t count : counts)
        if (count < 1 || count > 1 << 24) return "a count of the decoder's description is not positive, or absurd";
    if (s.heads % s.kv_heads) return "the query heads of the decoder cannot share its key/value heads evenly";
    if (s.head_dim % 16) return "the decoder's head dimension is not a multiple of 16";
    if (s.rotary < 0 || s.rotary % 2 || s.rotary > s.head_dim) return "the rotated dimensions are not an even part of a head";
    if (s.activation != NF_SILU && s.activation != NF_GELU_TANH) return "the decoder's activation is unknown";
    if (s.ropes < 0 || !s.layer || !s.final_norm) return "the decoder's description is incomplete";
    const int64_t inner = s.heads * s.head_dim;
    for (int64_t i = 0; i < s.layers; i++) {
        const auto &l = s.layer[i];
        if (!l.linears || !l.input_norm || !l.ffn_norm || !l.q_norm != !l.k_norm) return "a layer's description is incomplete";
        if (l.rope >= s.ropes || l.window < 0) return "a layer's rotation or window is out of range";
        const auto *at = l.linears;
        if (!fits(at, l.qkv, inner + 2 * s.kv_heads * s.head_dim, s.hidden)) return "a layer's q, k, v have the wrong shape";
        if (!fits(at += l.qkv, l.o, s.hidden, inner)) return "a layer's attention output has the wrong shape";
        if (!fits(at += l.o, l.gate_up, 2 * s.ffn, s.hidden)) return "a layer's gate and up have the wrong shape";
        if (!fits(at + l.gate_up, l.down, s.hidden, s.ffn)) return "a layer's down has the wrong shape";
    }
    if (!fits(&s.embedding, 1, s.vocab, s.hidden)) return "the decoder's embedding has the wrong shape";
    if (!fits(&s.head, 1, s.vocab, s.hidden)) return "the decoder's output layer has the wrong shape";
    bool whole = sound(s.embedding);
    each_linear(s, [&](const nf_decoder_linear &w) { whole = whole && sound(w); });
    return whole ? nullptr : "the rotation or the side terms of a matrix do not fit it";
}

}  // namespace nf
