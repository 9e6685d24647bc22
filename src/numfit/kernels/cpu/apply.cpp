// Applying matrices to activations: prepare the activations, share out blocks of rows.
#include <algorithm>
#include <cstring>
#include <memory>
#include <new>

#include "trellis.h"

namespace nf {
namespace {

// Memory for prepared activations, kept between calls: one set a calling thread. In huge pages, like weights: many tokens go
// through it with large strides.
struct Scratch {
    std::unique_ptr<void, void (*)(void *)> memory{nullptr, arena_free};
    size_t size = 0;
    uint8_t *get(size_t bytes) {
        if (bytes > size) {
            bool huge;
            memory.reset();
            size = 0;
            memory.reset(arena_alloc(static_cast<int64_t>(bytes), &huge));
            if (!memory) throw std::bad_alloc();
            size = bytes;
        }
        return static_cast<uint8_t *>(memory.get());
    }
};

bool same_geometry(const Layout &a, const Layout &b) {
    return a.k == b.k && a.tile == b.tile && a.sub == b.sub && a.tiles == b.tiles && (a.column == nullptr) == (b.column == nullptr) &&
           (!a.column || !std::memcmp(a.column, b.column, static_cast<size_t>(a.positions()) * sizeof(int32_t)));
}

Acts prepare(const Layout &l, const float *x, int64_t m, int64_t ldx, bool exact) {
    thread_local Scratch scratch;
    Acts a;
    a.m = m;
    const int64_t positions = l.positions() * m, groups = l.groups() * m;
    if (exact) {
        a.exact = reinterpret_cast<float *>(scratch.get(static_cast<size_t>(positions) * sizeof(float)));
    } else {
        // AMX loads 16 tokens, whether they are there or not: that much room behind everything
        const int64_t codes = (positions + 1024 + 63) / 64 * 64, words = (groups + 16) * 4;
        uint8_t *p = scratch.get(static_cast<size_t>(codes + 3 * words));
        a.codes = reinterpret_cast<int8_t *>(p);
        a.scale = reinterpret_cast<float *>(p + codes);
        a.sum = reinterpret_cast<int32_t *>(p + codes + words);
        a.start = reinterpret_cast<int32_t *>(p + codes + 2 * words);
    }
    const Kernels &k = kernels();
    const int64_t step = std::max<int64_t>(m < 256 ? 1 : 16, 16384 / l.k);
    if (m <= step) k.quantize(l, x, ldx, a, 0, m);
    else parallel((m + step - 1) / step, [&](int64_t i) { k.quantize(l, x, ldx, a, i * step, std::min(m, (i + 1) * step)); });
    return a;
}

}  // namespace

void *aligned_work(size_t bytes) {
    thread_local Scratch scratch;
    return scratch.get(bytes);
}

// Chunks of row blocks: small enough that threads end together, large enough that a chunk is a long ascending read.
void apply_many(const Job *jobs, int count, const float *x, int64_t m, int64_t ldx, bool exact) {
    if (m == 0) return;
    const Kernels &k = kernels();
    for (int first = 0; first < count;) {
        const Layout &l = *jobs[first].linear;
        int end = first + 1;
        int64_t blocks = l.row_blocks;
        while (end < count && same_geometry(l, *jobs[end].linear)) blocks += jobs[end++].linear->row_blocks;
        const Acts a = prepare(l, x, m, ldx, exact);
        const int64_t work = l.positions() * kRows * m;  // multiplications of a block
        const int64_t most = m > 8 ? 8 : (int64_t{1} << 22) / work;  // many tokens: gemm.h has eight blocks take turns
        const int64_t threads = nf_threads(), least = m > 8 && blocks >= 4 * threads ? 2 : 1;  // pairs of blocks share loads
        const int64_t chunk = std::max(least, std::min(blocks / (8 * threads), most));
        const auto body = [&](int64_t i) {
            int64_t from = i * chunk, to = std::min(blocks, from + chunk);
            for (int j = first; j < end && to > 0; j++) {
                const int64_t mine = jobs[j].linear->row_blocks;
                if (from < mine) {
                    const Job &job = jobs[j];
                    const bool trellis = job.linear->trellis != nullptr;
                    const auto apply = trellis ? (exact ? trellis_kernels().apply_exact : trellis_kernels().apply_int8)
                                               : (exact ? k.apply_exact : k.apply_int8);
                    apply(*job.linear, a, job.y, job.ldy, job.bias, std::max<int64_t>(from, 0), std::min(to, mine));
                }
                from -= mine, to -= mine;
            }
        };
        if (blocks * work < 1 << 16) {
            for (int64_t i = 0; i * chunk < blocks; i++) body(i);
        } else {
            parallel((blocks + chunk - 1) / chunk, body);
        }
        first = end;
    }
}

}  // namespace nf
