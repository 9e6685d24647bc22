// A decoder-only language model in one description: what Llama, Mistral, Qwen2, Qwen3, Gemma3 and their like have in common.
//
//     x = embedding[token] · embedding_scale
//     per layer:  x += [post_attention_norm] o(attention(rotate([q_norm] q), rotate([k_norm] k), v)),  q, k, v of input_norm(x)
//                 x += [post_ffn_norm] down(act(gate) · up),                                           gate, up of ffn_norm(x)
//     logits = [softcap] head(final_norm(x))
//
// What stands in brackets is there where its pointer is not null. Norms are RMS norms whose gains are given as they multiply
// (1 + weight where a model has it so). Everything that a description points to must outlive the decoder.
#pragma once
#include "numfit.h"

enum nf_dense { NF_DENSE_FP32 = 0, NF_DENSE_FP16 = 1, NF_DENSE_BF16 = 2 };
enum nf_activation { NF_SILU = 0, NF_GELU_TANH = 1 };

// A rotation of inputs (rotate.h). Matrices that share an input and point to the same rotation have it turned once.
typedef struct {
    int64_t m;              // the odd factor of cols
    const float *signs;     // [cols]
    const float *mixing;    // [m][m]
} nf_decoder_rotation;

// Terms that add to a packed matrix: y += (x · Aᵀ) · Bᵀ, y += x · Sᵀ, in this order, with x as it was turned.
typedef struct {
    int64_t rank, sparse;   // 0: there is no such term
    const float *a, *b;     // [rank][cols], [rank][rows]
    const int32_t *index;   // [rows][sparse]
    const float *value;     // [rows][sparse]
} nf_decoder_terms;

// One matrix: packed, or else dense.
typedef struct {
    const nf_linear *packed;
    const void *dense;      // [rows][cols]
    int32_t dense_kind;     // enum nf_dense
    int32_t reserved;
    int64_t rows, cols;
    const float *bias;      // [rows], or null
    const nf_decoder_rotation *rotation;  // of a packed matrix: what it holds goes with turned inputs; null: none
    const nf_decoder_terms *terms;        // of a packed matrix, or null
} nf_decoder_linear;

// Matrices that share their input stand in one list, and their outputs side by side: q, k, v as three matrices or as one.
typedef struct {
    int32_t qkv, o, gate_up, down;     // how many matrices each list has; the lists follow each other in `linears`
    const nf_decoder_linear *linears;
    const float *input_norm, *ffn_norm;                  // [hidden]
    const float *post_attention_norm, *post_ffn_norm;    // [hidden], or null
    const float *q_norm, *k_norm;                        // [head_dim], or null; both or neither
    int32_t rope;           // which table rotates queries and keys; -1: none
    int32_t reserved;
    int64_t window;         // a token sees itself and the window - 1 before it; 0: everything
} nf_decoder_layer;

typedef struct {
    int64_t layers, heads, kv_heads, head_dim, hidden, ffn, vocab;
    int64_t rotary;         // dimensions of a head that are rotated, the first ones; even
    int32_t ropes;          // tables
    int32_t activation;     // enum nf_activation
    float eps, embedding_scale, attention_scale;
    float attention_softcap, logit_softcap;  // 0: none
    int32_t reserved;
    const nf_decoder_layer *layer;           // [layers]
    const float *final_norm;                 // [hidden]
    nf_decoder_linear embedding, head;       // [vocab][hidden]; may be the same matrix
} nf_decoder_spec;

typedef struct nf_decoder nf_decoder;

NF_API nf_decoder *nf_decoder_create(const nf_decoder_spec *spec, char *error);  // null on failure
NF_API void nf_decoder_free(nf_decoder *decoder);
// Make room for so many positions, at most 2^24; what is in the cache stays. cosine, sine: [ropes][positions][rotary], copied.
NF_API int nf_decoder_reserve(nf_decoder *decoder, int64_t positions, const float *cosine, const float *sine, char *error);
NF_API int64_t nf_decoder_length(const nf_decoder *decoder);     // positions in the cache
NF_API int64_t nf_decoder_bytes(const nf_decoder *decoder);      // cache, tables and work space; weights not counted
// Run `count` tokens that stand at `start` ≤ length and after it, within the reserved positions; what the cache held from `start`
// on is forgotten.
// logits: [vocab] of the last token, or, with `all`, [count][vocab]. mode as for nf_apply. One call at a time.
NF_API int nf_decoder_forward(nf_decoder *decoder, const int64_t *tokens, int64_t count, int64_t start, int mode, int all,
                              float *logits, char *error);
