// Many tokens on AMX, included by gemm.h inside its namespace: a decoded tile of 16 rows is a B tile as it stands, 16 tokens are
// an A tile. The integer sums of a group come out through memory and are scaled and added as everywhere else, which costs
// more than the products: 48 vector operations beside 16 cycles of the tile unit for 16 rows, tokens and 64 columns.

constexpr int kRing = 4;  // groups under way between the tile unit and the vector units

struct TileConfig {
    alignas(64) uint8_t bytes[64] = {};
    TileConfig(int group) {
        bytes[0] = 1;
        for (int t = 0; t < 8; t++) set(t, 16, 64);
        for (int t = 4; t < 6; t++) set(t, 16, group);      // A: 16 tokens
        for (int t = 6; t < 8; t++) set(t, group / 4, 64);  // B
        // not the intrinsic: GCC 12 believes that it reads eight bytes and drops stores of the others (its bug 114098)
        asm volatile("ldtilecfg %0" : : "m"(bytes));
    }
    ~TileConfig() { _tile_release(); }
    void set(int t, int rows, int width) {
        bytes[48 + t] = static_cast<uint8_t>(rows);
        bytes[16 + 2 * t] = static_cast<uint8_t>(width);
    }
};

template <class T> struct Ring {
    alignas(64) int32_t sums[kRing][16][16];
    alignas(64) int32_t sums2[T::two ? kRing : 1][16][16];
};

// out [16][16] = 16 tokens · 16 rows of one group. GCC's intrinsics want the numbers of tiles written out; two sets alternate.
template <int set> static inline void tile_product(const int8_t *x, int64_t stride, const uint8_t *w, int32_t *out) {
    if constexpr (set == 0) {
        _tile_zero(0);
        _tile_loadd(4, x, stride);
        _tile_loadd(6, w, 64);
        _tile_dpbssd(0, 4, 6);
        _tile_stored(0, out, 64);
    } else {
        _tile_zero(1);
        _tile_loadd(5, x, stride);
        _tile_loadd(7, w, 64);
        _tile_dpbssd(1, 5, 7);
        _tile_stored(1, out, 64);
    }
}

// Integer sums of group g of the run.
template <class T, int set> static inline void group_sums(const Layout &l, const Run<T> &run, int g, const int8_t *x, Ring<T> &ring) {
    const int t = g / l.sub, s = g % l.sub, offset = s * (l.group / 4);
    x += s * l.group;
    tile_product<set>(x, l.tile, run.first[t][offset], ring.sums[g % kRing][0]);
    if constexpr (T::two) tile_product<1 - set>(x, l.tile, run.second[t][offset], ring.sums2[g % kRing][0]);
}

template <class T> static inline void scale_group(const Layout &l, const Run<T> &run, int g, const float *x_scale, const int32_t *x_sum,
                                                  const Ring<T> &ring, Floats *acc) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {
        const Ints p = Vec::load_ints(ring.sums[g % kRing][i]);
        const Ints p2 = T::two ? Vec::load_ints(ring.sums2[T::two ? g % kRing : 0][i]) : p;
        acc[i] = add_run_group<T>(l, run, g, p, p2, x_scale[i], l.zero_bytes ? x_sum[i] : 0, acc[i]);
    }
}

template <class T> static void many_tokens(const Layout &l, const Acts &a, float *y, int64_t ldy, const float *bias, int64_t from, int64_t to) {
    const typename T::Tables tables(l, false);
    const MemberTables members(l);
    const TileConfig config(l.group);
    static thread_local Run<T> run;
    Ring<T> ring;
    constexpr int64_t kSums = 512;
    alignas(64) float sums[kSums][16];
    for (int64_t block = from; block < to; block++) {
        const Floats row = row_factor(l, block);
        for (int64_t first = 0; first < a.m; first += kSums) {
            const int64_t end = first + kSums < a.m ? first + kSums : a.m;
            Cursor at;
            at.code = l.code_stream + block * l.tiles * l.code_bytes;
            at.entry = l.meta_stream + block * l.metas() * l.meta_bytes;
            for (int64_t t0 = 0; t0 < l.tiles; t0 += kRun) {
                const int count = static_cast<int>(l.tiles - t0 < kRun ? l.tiles - t0 : kRun), groups = count * l.sub;
                decode_run<T>(tables, members, l, count, at, run);
                for (int64_t m = first; m < end; m += 16) {
                    Floats acc[16];
                    for (int i = 0; i < 16; i++) acc[i] = t0 ? Vec::load_floats(sums[m - first + i]) : Vec::floats(0.0f);
                    const auto x = [&](int g) { return a.codes + ((t0 + g / l.sub) * a.m + m) * l.tile; };
                    const auto scale = [&](int g) {
                        const int64_t place = (t0 * l.sub + g) * a.m + m;
                        scale_group<T>(l, run, g, a.scale + place, a.sum + place, ring, acc);
                    };
                    for (int g = 0; g < groups; g += 2) {  // two groups ahead of the vector units
                        group_sums<T, 0>(l, run, g, x(g), ring);
                        if (g) scale(g - 2);
                        if (g + 1 < groups) group_sums<T, 1>(l, run, g + 1, x(g + 1), ring);
                        if (g) scale(g - 1);
                    }
                    const int last = (groups - 1) / 2 * 2;
                    for (int g = last; g < groups; g++) scale(g);
                    for (int i = 0; i < 16 && m + i < end; i++) {
                        if (t0 + count < l.tiles) Vec::store_floats(sums[m - first + i], acc[i]);
                        else finish(l, block, acc[i], row, y + (m + i) * ldy, bias);
                    }
                }
            }
        }
    }
}
