// Attention over a packed cache: checks, division into pieces, and putting the pieces together. See attend.h.
#include "attend.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <new>
#include <vector>

#include "kernels.h"

namespace nf {
namespace {

const Attenders &attenders() { return NF_CHOSEN_TABLE(attenders); }

bool power_of_two(int64_t n) { return n > 0 && !(n & (n - 1)); }

constexpr int64_t kMost = int64_t{1} << 24;  // of each size: then no product of two of them overflows

const char *problem(const nf_stream &s, int64_t dim, int64_t block) {
    if (s.bits != 2 && s.bits != 3 && s.bits != 4 && s.bits != 8) return "codes have 2, 3, 4 or 8 bits here";
    if (s.bits == 8 && s.levels) return "codes of 8 bits are levels themselves here";
    if (!power_of_two(s.row) || s.row < 32 || s.row > 256) return "rows have 32, 64, 128 or 256 values here";
    if (!power_of_two(s.group) || s.group < 16 || s.group > s.row) return "groups are powers of two from 16 to the row here";
    if (s.channel ? block % s.row != 0 : s.row != dim) return "rows do not fit the heads, or the blocks";
    if (s.unit && (s.unit < 64 || s.row % s.unit || !s.levels || !s.member || s.members < 1)) return "members are shared by 64 or more here";
    if (s.unit && (s.member_bits < 1 || s.member_bits > 8)) return "members have 1 to 8 bits";
    if (!s.unit && s.members > 1) return "members without a unit";
    if (!s.codes || !s.scale) return "a plane is null";
    return nullptr;
}

// Whether all blocks have the planes that the stream has.
bool whole(const nf_stream &s, int64_t blocks) {
    for (int64_t i = 0; i < blocks; i++) {
        if (!s.codes[i] || !s.scale[i] || (s.low && !s.low[i]) || (s.unit && !s.member[i])) return false;
    }
    return true;
}

// What `take` in attend_isa.cpp takes, roundings included.
int64_t stream_scratch(const nf_stream &s, int64_t dim, int64_t block) {
    const int64_t rows = s.channel ? block / s.row * dim : block, groups = rows * (s.row / s.group);
    return 4 * groups + 32 + 3 * 32 + (s.unit ? rows * s.row / kLine * 32 + 64 : 0);
}

}  // namespace

int64_t piece_scratch(const nf_stream &keys, const nf_stream &values, int64_t queries, int64_t dim, int64_t width, int64_t block) {
    return stream_scratch(keys, dim, block) + stream_scratch(values, width, block) + block + 8 * 128 + 128 + queries * 288 + width + 6 * 32;
}

}  // namespace nf

using namespace nf;

NF_API int nf_attend(const nf_stream *keys, const nf_stream *values, int64_t heads, int64_t queries, int64_t dim, int64_t width,
                     int64_t tokens, int64_t block, const float *q, const float *bias, const float *mask, int64_t mask_heads,
                     float *most, float *sum, float *out, char *error) try {
    const char *what = keys && values && q && most && sum && out ? nullptr : "an array of attention is null";
    for (int64_t size : {heads, queries, dim, width, tokens, block}) {
        if (size < 1 || size > kMost) what = "a size of attention is not positive, or absurd";
    }
    if (!what && mask && (mask_heads < 1 || heads % mask_heads)) what = "the heads of a mask do not divide the heads";
    if (!what) what = problem(*keys, dim, block);
    if (!what) what = problem(*values, width, block);
    if (!what && (dim % 16 || width % 16 || tokens % 16 || block % kLine)) {
        what = "heads and tokens come in sixteens here, blocks in lines";
    }
    if (!what && ((keys->channel && tokens % keys->row) || (values->channel && tokens % values->row))) what = "the tokens end within a row";
    if (what) return std::snprintf(error, NF_ERROR, "%s", what), 1;
    const int64_t blocks = (tokens + block - 1) / block, splits = (blocks + kSplit - 1) / kSplit, pieces = heads * splits;
    if (!whole(*keys, blocks) || !whole(*values, blocks)) return std::snprintf(error, NF_ERROR, "a block has no plane"), 1;
    if (static_cast<double>(pieces) * static_cast<double>(queries * (width + 2)) > 0x1p42) throw std::bad_alloc();
    const int64_t need = piece_scratch(*keys, *values, queries, dim, width, block);
    std::vector<float> partial(static_cast<size_t>(pieces * queries * (width + 2)));
    parallel(pieces, [&](int64_t i) {
        const int64_t head = i / splits, split = i % splits;
        float *own = partial.data() + i * queries * (width + 2);
        Piece p = {keys, values, head, queries, dim, width, split * kSplit, std::min(blocks, (split + 1) * kSplit), tokens, block,
                   q + head * queries * dim, bias ? bias + head * queries : nullptr,
                   mask ? mask + head / mask_heads * tokens : nullptr, own, own + queries, own + 2 * queries,
                   static_cast<float *>(aligned_work(static_cast<size_t>(need) * sizeof(float)))};
        attenders().attend(p);
    });
    parallel(heads, [&](int64_t head) {  // the pieces of a head, in their order
        for (int64_t r = 0; r < queries; r++) {
            const float *first = partial.data() + head * splits * queries * (width + 2);
            const int64_t step = queries * (width + 2);
            float top = first[r];
            for (int64_t s = 1; s < splits; s++) top = std::max(top, first[s * step + r]);
            float total = 0.0f, *to = out + (head * queries + r) * width;
            for (int64_t d = 0; d < width; d++) to[d] = 0.0f;
            for (int64_t s = 0; s < splits; s++) {
                const float *own = first + s * step, factor = std::exp(own[r] - top);
                total += own[queries + r] * factor;
                for (int64_t d = 0; d < width; d++) to[d] += own[2 * queries + r * width + d] * factor;
            }
            most[head * queries + r] = top, sum[head * queries + r] = total;
        }
    });
    return 0;
} catch (...) {
    return caught(error, "to attend to so many tokens");
}
