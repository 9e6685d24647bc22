// Many tokens on AMX, included by gemm.h inside its namespace: a decoded tile of 16 rows is a B tile as it stands, 16 tokens are
// an A tile. The integer sums of a group come out through memory and are scaled and added as everywhere else, which costs
// more than the products: 48 vector operations beside 16 cycles of the tile unit for 16 rows, tokens and 64 columns.

constexpr bool kBiasedRun = false;  // both factors are signed here
constexpr int kStep = 16;           // tokens of an A tile
constexpr int kRing = 4;            // groups under way between the tile unit and the vector units

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

template <class T, bool scaled, bool zero> static inline void scale_group(const Run<T> &run, int g, const float *x_scale,
                                                                         const int32_t *x_sum, const Ring<T> &ring, Floats *acc) {
    const Factors f = run.group[g];
#pragma GCC unroll 16
    for (int i = 0; i < kStep; i++) {
        const Ints p = Vec::load_ints(ring.sums[g % kRing][i]);
        const Ints p2 = T::two ? Vec::load_ints(ring.sums2[T::two ? g % kRing : 0][i]) : p;
        acc[i] = add_group<T>(f, scaled, zero, p, p2, x_scale[i], zero ? x_sum[i] : 0, acc[i]);
    }
}

// sums [16][16] + tokens [token, token + 16) times the run that starts at tile `t0`
template <class T, bool scaled, bool zero> static void multiply(const Layout &l, const Run<T> &run, int64_t t0, int count, const Acts &a,
                                                                int64_t token, float (*sums)[16]) {
    Ring<T> ring;
    Floats acc[kStep];
#pragma GCC unroll 16
    for (int i = 0; i < kStep; i++) acc[i] = Vec::load_floats(sums[i]);
    const int groups = count * l.sub;
    const auto x = [&](int g) { return a.codes + ((t0 + g / l.sub) * a.m + token) * l.tile; };
    const auto scale = [&](int g) __attribute__((always_inline)) {
        const int64_t place = (t0 * l.sub + g) * a.m + token;
        scale_group<T, scaled, zero>(run, g, a.scale + place, a.sum + place, ring, acc);
    };
    for (int g = 0; g < groups + 2; g += 2) {  // the tile unit is two groups ahead of the vector units
        if (g < groups) group_sums<T, 0>(l, run, g, x(g), ring);
        if (g + 1 < groups) group_sums<T, 1>(l, run, g + 1, x(g + 1), ring);
        if (g) scale(g - 2);
        if (g && g - 1 < groups) scale(g - 1);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kStep; i++) Vec::store_floats(sums[i], acc[i]);
}
