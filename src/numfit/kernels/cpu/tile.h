// Decoding a tile of 16 rows: stored bytes → 16 vectors of table indices → int8 levels or exact fp32 weights.
// One template over (how codes are packed, how members are found, size of the table) serves every format.
#pragma once
#include "layout.h"

namespace nf {
namespace NF_ISA {

using Bytes = Vec::Bytes;
using Ints = Vec::Ints;
using Floats = Vec::Floats;

template <int a, int b> inline Bytes shift(Bytes v) {  // bit a to bit b
    if constexpr (a < b) return Vec::shift_left<b - a>(v);
    else return Vec::shift_right<a - b>(v);
}

constexpr int code_bits(Codes c) {
    return c == Codes::b2 ? 2 : c == Codes::b3 ? 3 : c == Codes::b4 ? 4 : c == Codes::b5 ? 5 : c == Codes::b8 ? 8 : 6;
}
constexpr int vectors(Codes c) { return c == Codes::triple ? 12 : 16; }
constexpr int stored_vectors(Codes c) {
    return c == Codes::b2 ? 4 : c == Codes::b3 ? 6 : c == Codes::b4 ? 8 : c == Codes::b5 ? 10 : c == Codes::b6 ? 12
         : c == Codes::b8 ? 16 : 8;
}

// Codes of a tile; bits above code_bits are undefined. `keyed`: they stand where key_of() says.
template <Codes C, bool keyed = false, int j = 0> inline void unpack(const uint8_t *p, Bytes *c) {
    if constexpr (j < vectors(C)) {
        if constexpr (C == Codes::b2) {
            const Bytes v = Vec::load(p + 16 * j);
            c[j] = v, c[j + 1] = keyed ? v : shift<2, 0>(v), c[j + 2] = keyed ? v : shift<4, 0>(v), c[j + 3] = shift<6, 0>(v);
            unpack<C, keyed, j + 4>(p, c);
        } else if constexpr (C == Codes::b3) {
            const Bytes u = Vec::load(p + 24 * j), v = Vec::load(p + 24 * j + 64), w = Vec::load(p + 24 * j + 128);
            const Bytes two = Vec::mask(3), third = shift<6, keyed ? 4 : 2>(w);  // the upper bits of C; keyed, of F beside them
            c[j] = u, c[j + 1] = keyed ? u : shift<3, 0>(u), c[j + 2] = Vec::select(two, shift<6, 0>(u), third);
            c[j + 3] = v, c[j + 4] = keyed ? v : shift<3, 0>(v);
            c[j + 5] = Vec::select(two, shift<6, 0>(v), keyed ? third : shift<7, 2>(w));
            c[j + 6] = w, c[j + 7] = keyed ? w : shift<3, 0>(w);
            unpack<C, keyed, j + 8>(p, c);
        } else if constexpr (C == Codes::b8) {
            c[j] = Vec::load(p + 64 * j);
            unpack<C, keyed, j + 1>(p, c);
        } else if constexpr (C == Codes::triple) {
            const Bytes u = Vec::load(p + 128 * (j / 3)), v = Vec::load(p + 128 * (j / 3) + 64);
            c[j] = u;
            c[j + 1] = Vec::select(Vec::mask(0x1F), v, u);
            c[j + 2] = Vec::select(Vec::mask(3), shift<6, 0>(u), Vec::select(Vec::mask(0x1C), shift<5, 2>(v), u));
            unpack<C, keyed, j + 3>(p, c);
        } else {
            const Bytes v = Vec::load(p + 32 * j);
            c[j] = v, c[j + 1] = shift<4, 0>(v);
            if constexpr (C == Codes::b5) {
                const Bytes high = Vec::load(p + 512 + 64 * (j / 8)), low = Vec::mask(15);
                c[j] = Vec::select(low, c[j], shift<j % 8, 4>(high));
                c[j + 1] = Vec::select(low, c[j + 1], shift<j % 8 + 1, 4>(high));
            } else if constexpr (C == Codes::b6) {
                const Bytes high = Vec::load(p + 512 + 64 * (j / 4)), low = Vec::mask(15);
                c[j] = Vec::select(low, c[j], shift<2 * (j % 4), 4>(high));
                c[j + 1] = Vec::select(low, c[j + 1], shift<2 * (j % 4) + 2, 4>(high));
            }
            unpack<C, keyed, j + 2>(p, c);
        }
    }
}

template <Codes C, bool keyed, int j = 0> inline void insert_quads(Bytes low, Bytes high, Bytes *c) {
    if constexpr (j < vectors(C)) {
        constexpr int bits = code_bits(C);
        // keyed: the bits of two neighbours in one shift
        c[j] = Vec::select(Vec::mask((1 << bits) - 1), c[j], shift<keyed ? j % 8 & ~1 : j % 8, bits>(j < 8 ? low : high));
        insert_quads<C, keyed, j + 1>(low, high, c);
    }
}

// Where a lookup takes six bits of an index, whatever they are, tables are cheaper than shifts: one for each place at which
// codes stand in a byte. Which table vector j uses, and the code that an index means there.
template <Codes C> constexpr int key_of(int j) {
    if (C == Codes::b2) return j % 4 % 3;
    if (C == Codes::b3) return j % 8 == 2 ? 2 : j % 8 == 5 ? 3 : j % 8 % 3;
    return j % 2;
}
template <Codes C> constexpr int keyed_code(int key, int index) {
    if (C == Codes::b2) return index >> 2 * key & 3;
    if (C == Codes::b3) return key < 2 ? index >> 3 * key & 7 : (index & 3) | (index >> (key + 2) & 1) << 2;
    return (index & 15) | (index >> (4 + key) & 1) << 4;  // four bits and a quad's member
}

// What one entry of the meta stream says about the groups that follow, 16 rows side by side.
struct Meta {
    Floats scale[4];       // of each group; undefined where scales belong to the row
    Floats c1[4], c2[4];   // factors of the member
    Floats zero[4];
    Ints pattern[4];       // member << bits in every byte, for quarter q of a tile
    Ints second[4];        // not zero where the index exceeds 8 bits
};

inline Floats load_scale(nf_scale kind, const uint8_t *p) {
    switch (kind) {
        case NF_FP16: return Vec::load_half(p);
        case NF_BF16: return Vec::load_bf16(p);
        case NF_E8M0: return Vec::load_e8m0(p);
        case NF_U8: return Vec::to_floats(Vec::load_u8(p));
        default: return Vec::load_tiny(p);  // e4m3, e3m3: the power of two is in the row's scale
    }
}

// Constants of a matrix that decoding needs in tables of vector length.
struct MemberTables {
    alignas(64) int32_t pattern[32];
    alignas(64) int32_t second[32];
    explicit MemberTables(const Layout &l) {
        for (int m = 0; m < 32; m++) {
            const int index = m << l.bits;
            pattern[m] = static_cast<int32_t>((index & 255) * 0x01010101u);
            second[m] = index >> 8 & 1;
        }
    }
};

// `sub`: the groups of a tile, 0 if only the layout knows.
template <bool members, bool two_lane, int sub = 0>
static inline __attribute__((always_inline)) void load_meta(const Layout &l, const MemberTables &t, const uint8_t *p, Meta &m) {
    const int groups = sub ? sub : l.sub, quarter = 4 / groups;
    for (int s = 0; s < groups; s++) {
        if (l.scale_bytes) m.scale[s] = l.scale_kind == NF_FP16 ? Vec::load_half(p) : load_scale(l.scale_kind, p);
        p += l.scale_bytes;
        if constexpr (members) {
            const bool few = l.member_bytes == 8;
            const Ints i = few ? Vec::nibbles(p) : Vec::load_u8(p);
            m.c1[s] = few ? Vec::pick16(l.c1, i) : Vec::pick32(l.c1, i);
            if constexpr (two_lane) {
                m.c2[s] = few ? Vec::pick16(l.c2, i) : Vec::pick32(l.c2, i);
            } else {
                const Ints pattern = few ? Vec::pick16(t.pattern, i) : Vec::pick32(t.pattern, i);
                const Ints second = few ? Vec::pick16(t.second, i) : Vec::pick32(t.second, i);
                for (int q = s * quarter; q < (s + 1) * quarter; q++) m.pattern[q] = pattern, m.second[q] = second;
            }
            p += l.member_bytes;
        }
        if (l.zero_bytes) {
            m.zero[s] = Vec::to_floats(Vec::add(Vec::load_u8(p), Vec::ints(-l.zero_shift)));
            p += l.zero_bytes;
        }
    }
}

// A kind of tile. `log`: bits of a table index, at least 4; 9 means two tables of 256 entries.
template <Codes C, Members M, int log, bool two_lane = false> struct Tile {
    static constexpr Codes codes = C;
    static constexpr int count = vectors(C);
    static constexpr bool members = M == Members::group;
    static constexpr bool quad = M == Members::quad;
    static constexpr bool two = two_lane;
    static constexpr int part = log < 8 ? log : 8;
    static constexpr bool wide = log == 9;
    static constexpr bool keyed = Vec::kSixBits && ((M == Members::none && (C == Codes::b2 || C == Codes::b3)) ||
                                                    (M == Members::quad && C == Codes::b4));
    static constexpr int keys = C == Codes::b2 ? 3 : C == Codes::b3 ? 4 : 2;

    // Indices into the table, or into the one of their key.
    template <bool with_keys> static void index(const uint8_t *p, const uint8_t *quads, const Meta &m, Bytes *c) {
        unpack<C, with_keys>(p, c);
        if constexpr (M == Members::quad) {
            Bytes low, high;
            Vec::quads(quads, low, high);
            insert_quads<C, with_keys>(low, high, c);
        }
        if constexpr (members && !two_lane && C != Codes::b8) {
            const Bytes code = Vec::mask((1 << code_bits(C)) - 1);
            for (int j = 0; j < count; j++) c[j] = Vec::select(code, c[j], as_bytes(m.pattern[4 * j / count]));
        }
    }

    // int8 tables, shifted to unsigned where `biased`
    struct Tables {
        Vec::Table<keyed ? 6 : part> first[keyed ? keys : 1];
        Vec::Table<wide ? 8 : two_lane ? 4 : part> other;
        Tables(const Layout &l, bool biased) {
            alignas(64) uint8_t bytes[512];
            const int size = 1 << log;
            const int bias = biased ? kBias : 0;
            for (int i = 0; i < size; i++) bytes[i] = static_cast<uint8_t>(l.table[i & (l.entries - 1)] + bias);
            if constexpr (keyed) {
                uint8_t by_key[64];
                for (int key = 0; key < keys; key++) {
                    for (int i = 0; i < 64; i++) by_key[i] = bytes[keyed_code<C>(key, i)];
                    first[key] = Vec::template table<6>(by_key);
                }
            } else {
                first[0] = Vec::template table<part>(bytes);
            }
            if constexpr (wide) other = Vec::template table<8>(bytes + 256);
            if constexpr (two_lane) {
                for (int i = 0; i < 16; i++) bytes[i] = static_cast<uint8_t>(l.table2[i] + bias);
                other = Vec::template table<4>(bytes);
            }
        }
        Bytes level(const Meta &m, int j, Bytes index) const {
            if constexpr (wide) {
                return Vec::blend(m.second[4 * j / count], Vec::template lookup<8>(first[0], index), Vec::template lookup<8>(other, index));
            } else if constexpr (keyed) {
                return Vec::template lookup<6>(first[key_of<C>(j)], index);
            } else {
                return Vec::template lookup<part>(first[0], index);
            }
        }
        Bytes level2(Bytes index) const { return Vec::template lookup<4>(other, index); }
    };

    // Exact weights of a tile, scale · (level − zero) as the format defines them: fp32 [4 * count columns][16 rows].
    static void exact(const Layout &l, const float *levels, const Meta &m, const Floats *effective, const uint8_t *p, const uint8_t *quads,
                      float *out) {
        Bytes c[16];
        index<false>(p, quads, m, c);
        for (int j = 0; j < count; j++) {
            const int s = j * l.sub / count;
            four<0>(l, levels, m, effective[s], s, j, c[j], out + 64 * j);
        }
    }

private:
    static Bytes as_bytes(Ints v) {
        Bytes out;
        __builtin_memcpy(&out, &v, sizeof out);
        return out;
    }
    template <int n> static void four(const Layout &l, const float *levels, const Meta &m, Floats scale, int s, int j, Bytes c, float *out) {
        if constexpr (n < 4) {
            Floats v;
            if constexpr (two_lane) {  // c1 · i + c2 · (2**i − i): exact, since both products are short integers times a power of two
                v = Vec::fma(m.c1[s], Vec::template pick<4, n>(levels, c, Vec::ints(0)),
                             Vec::mul(m.c2[s], Vec::template pick<4, n>(levels + 16, c, Vec::ints(0))));
            } else {
                Ints offset = Vec::ints(0);
                if constexpr (wide) {  // 0 or 256
                    offset = m.second[4 * j / count];
                    for (int doubling = 0; doubling < 8; doubling++) offset = Vec::add(offset, offset);
                }
                v = Vec::template pick<log, n>(levels, c, offset);
                if (l.zero_bytes) v = Vec::sub(v, m.zero[s]);
            }
            Vec::store_floats(out + 16 * n, Vec::mul(scale, v));
            four<n + 1>(l, levels, m, scale, s, j, c, out);
        }
    }
};

}  // namespace NF_ISA
}  // namespace nf
