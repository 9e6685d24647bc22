// What a decoder is told of its model, checked before anything is built on it. (decoder_check.cpp)
#pragma once
#include "decoder.h"
#include "rotate.h"

namespace nf {

// The first thing that does not fit together in a description, as a sentence; null where all does.
const char *complaint(const nf_decoder_spec &s);

// What turns the input of a matrix that has a rotation.
inline Turn turn_of(const nf_decoder_linear &w, bool back) {
    const nf_decoder_rotation &r = *w.rotation;
    return {w.cols, r.m, w.cols / r.m, r.signs, r.mixing, back};
}

// body(matrix) for all matrices of the layers and the output layer.
template <class F> void each_linear(const nf_decoder_spec &s, const F &body) {
    for (int64_t i = 0; i < s.layers; i++) {
        const auto &l = s.layer[i];
        for (int32_t j = 0; j < l.qkv + l.o + l.gate_up + l.down; j++) body(l.linears[j]);
    }
    body(s.head);
}

}  // namespace nf
