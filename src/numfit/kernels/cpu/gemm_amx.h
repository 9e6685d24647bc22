// Many tokens on AMX, included by gemm.h inside its namespace: a decoded tile of 16 rows is a B tile as it stands, 16 tokens are
// an A tile. The integer sums of a group come out through memory and are scaled and added as everywhere else: for 16 rows, 16
// tokens and a group, 16 cycles of the tile unit and 48 vector operations, of which a core executes one a cycle while its tile
// unit is in use. So these bind, as long as tiles are stored to and loaded from lines that are in the first cache level. Hence
// squares of 64 tokens and 64 rows: their fp32 sums (16 KB) stay there, while codes and weights of one group after the other
// pass by, and each line of those is read once from the second level.

constexpr bool kBiasedRun = false;  // both factors are signed here

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

// Integer sums of one group for 32 tokens and 32 rows: tile 2 i + j for tokens [16 i, 16 i + 16) and rows of block j of a pair.
using Products = int32_t[4][16][16];

// 32 tokens and a pair of blocks of rows.
template <class T> struct Spot {
    const Run<T> *run[2];
    float (*sums[2])[16];
    int64_t token;
    bool tall, wide;  // whether there are tiles for i = 1, for j = 1
    bool new_x, new_w;  // whether tokens, rows are others than those of the spot before
};

// What the products of a spot, once they are there, are to be multiplied by.
template <class T> struct Pending {
    const Spot<T> *spot = nullptr;
    const Factors *factors[2];
    const float *x_scale;
    const int32_t *x_sum;
};

template <class T, bool scaled, bool zero>
static inline __attribute__((always_inline)) void add_tile(const Pending<T> &p, const Products *products, int q) {
    const int i = q / 2, j = q % 2;
    if (!p.spot || (i && !p.spot->tall) || (j && !p.spot->wide)) return;
    const Factors f = *p.factors[j];
    float (*sums)[16] = p.spot->sums[j] + 16 * i;
    const float *x_scale = p.x_scale + 16 * i;
    const int32_t *x_sum = p.x_sum + 16 * i;
#pragma GCC unroll 16
    for (int t = 0; t < 16; t++) {
        const Ints one = Vec::load_ints(products[0][q][t]), two = T::two ? Vec::load_ints(products[T::two][q][t]) : one;
        Vec::store_floats(sums[t], add_group<T>(f, scaled, zero, one, two, x_scale[t], zero ? x_sum[t] : 0, Vec::load_floats(sums[t])));
    }
}

// All four products of a spot; between(0 … 3) is other work for the vector units, spread so that a tile is not stored before the
// tile unit is done with it. What is not new is still in tiles 4 and 5, 6 and 7.
template <class T, class F> static inline __attribute__((always_inline))
void start_products(const Spot<T> &spot, bool new_x, bool new_w, const int8_t *x, int64_t stride, const uint8_t *w0, const uint8_t *w1,
                    Products &out, const F &between) {
    const bool tall = spot.tall;
    if (new_x) _tile_loadd(4, x, stride);
    if (new_w) _tile_loadd(6, w0, 64);
    _tile_zero(0);
    _tile_dpbssd(0, 4, 6);
    if (new_w) _tile_loadd(7, w1, 64);
    _tile_zero(1);
    _tile_dpbssd(1, 4, 7);
    between(0);
    if (tall) {
        if (new_x) _tile_loadd(5, x + 16 * stride, stride);
        _tile_zero(2);
        _tile_dpbssd(2, 5, 6);
        _tile_zero(3);
        _tile_dpbssd(3, 5, 7);
    }
    _tile_stored(0, out[0], 64);
    between(1);
    _tile_stored(1, out[1], 64);
    between(2);
    if (tall) _tile_stored(2, out[2], 64);
    between(3);
    if (tall) _tile_stored(3, out[3], 64);
}

static inline __attribute__((always_inline)) void prefetch_lines(const void *p, int from, int to) {
#pragma GCC unroll 16
    for (int i = from; i < to; i++) {  // not the intrinsic: GCC 12 takes a function that only prefetches for one that does nothing
        asm volatile("prefetcht0 %0" : : "m"(static_cast<const char *>(p)[64 * i]));
    }
}

// sums of `blocks` blocks of rows + tokens [first, first + tokens) times their runs, which start at tile `t0`
template <class T, bool scaled, bool zero> static void multiply(const Layout &l, const Run<T> *run, int blocks, int64_t t0, int count,
                                                                const Acts &a, int64_t first, int64_t tokens, float (*sums)[kSums][16]) {
    alignas(64) Products products[2][T::two ? 2 : 1];
    const int64_t stride = l.tile, group = l.group;
    asm volatile("" ::: "memory");  // tile loads do not say to the compiler what they read
    for (int64_t m = 0; m < tokens; m += 64) {
        Spot<T> spot[4];
        int spots = 0;
        for (int64_t i = m; i < tokens && i < m + 64; i += 32) {
            for (int j = 0; j < blocks; j += 2) {
                const int one = i > m && blocks > 2 ? 2 - j : j;  // there and back: what was just loaded is used again
                const int two = one + 1 < blocks ? one + 1 : one;
                spot[spots++] = {{run + one, run + two}, {sums[one] + i, sums[two] + i}, first + i, tokens - i > 16, two > one,
                                 j == 0, j > 0 || i == m};
            }
        }
        Pending<T> pending[2];
        int turn = 0;
        for (int t = 0; t < count; t++) {
            const int8_t *tile = a.codes + (t0 + t) * a.m * stride;
            const int next = t + 1 < count ? t + 1 : 0;
            const int8_t *soon = next ? tile + a.m * stride : tile - (t * a.m - 64) * stride;
            for (int s = 0; s < l.sub; s++, tile += group) {
                const int64_t place = ((t0 + t) * l.sub + s) * a.m;
                const int vector = s * static_cast<int>(group / 4), entry = t * l.sub + s;
                for (int k = 0; k < spots; k++, turn ^= 1) {
                    const Spot<T> &here = spot[k];
                    const Run<T> &one = *here.run[0], &two = *here.run[1];
                    const int64_t at = place + here.token;
                    pending[turn] = {&here, {one.group + entry, two.group + entry}, a.scale + at, a.sum + at};
                    const int8_t *soon_x = soon + (here.token + 16 * (k % 2)) * stride;
                    const uint8_t *soon_w = here.run[k / 2]->first[next][0];
                    const auto add = [&](int q) __attribute__((always_inline)) {
                        add_tile<T, scaled, zero>(pending[turn ^ 1], products[turn ^ 1], q);
                        if (s == 0) prefetch_lines(soon_x, 4 * q, 4 * q + 4), prefetch_lines(soon_w, 4 * q, 4 * q + 4);
                    };
                    const int8_t *x = tile + here.token * stride;
                    Products *out = products[turn];
                    if constexpr (T::two) {
                        start_products(here, here.new_x, true, x, stride, one.first[t][vector], two.first[t][vector], out[0],
                                       [&](int q) __attribute__((always_inline)) { if (q % 2 == 0) add(q / 2); });
                        start_products(here, false, true, x, stride, one.second[t][vector], two.second[t][vector], out[1],
                                       [&](int q) __attribute__((always_inline)) { if (q % 2 == 0) add(2 + q / 2); });
                    } else {
                        start_products(here, here.new_x, here.new_w, x, stride, one.first[t][vector], two.first[t][vector], out[0], add);
                    }
                }
            }
        }
        for (int q = 0; q < 4; q++) add_tile<T, scaled, zero>(pending[turn ^ 1], products[turn ^ 1], q);
    }
}
