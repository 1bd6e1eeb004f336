// AVX-512 and AMX on a CPU that has AVX2: SIMDe's functions under the names of the intrinsics, and those that its
// version 0.7.4, which Debian 12 has, lacks. What they do is defined in Intel's SDM, volume 2.

#pragma once

#include_next <immintrin.h>

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace emulated {

template <class To, class From> To bits(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

// The elements of a vector, and a vector of the elements that a function of the index gives.
template <class Number, class Vector> struct Lanes {
    static constexpr int COUNT = sizeof(Vector) / sizeof(Number);
    Number at[COUNT];

    explicit Lanes(const Vector& vector) { memcpy(at, &vector, sizeof at); }
    template <class Function> static Vector make(Function function) {
        Number numbers[COUNT];
        for (int i = 0; i < COUNT; ++i) numbers[i] = function(i);
        return bits<Vector>(numbers);
    }
};
using Floats = Lanes<float, __m512>;
using Words = Lanes<uint16_t, __m512i>;
using Bytes = Lanes<uint8_t, __m512i>;

template <class Mask, int COUNT, class Function> Mask mask_of(Function function) {
    Mask mask = 0;
    for (int i = 0; i < COUNT; ++i) mask |= Mask(function(i) ? Mask(1) << i : 0);
    return mask;
}

inline __mmask32 cmpeq_epi16_mask(__m512i a, __m512i b) {
    Words x(a), y(b);
    return mask_of<__mmask32, 32>([&](int i) { return x.at[i] == y.at[i]; });
}
inline __mmask64 cmpneq_epi8_mask(__m512i a, __m512i b) {
    Bytes x(a), y(b);
    return mask_of<__mmask64, 64>([&](int i) { return x.at[i] != y.at[i]; });
}

// Bits of `classes`: quiet NaN, +0, -0, +infinity, -infinity, subnormal, negative and finite, signaling NaN.
inline __mmask16 fpclass_ps_mask(__m512 vector, int classes) {
    Floats x(vector);
    return mask_of<__mmask16, 16>([&](int i) {
        uint32_t all = bits<uint32_t>(x.at[i]), magnitude = all & 0x7FFFFFFF;
        bool nan = magnitude > 0x7F800000, quiet = all & 0x00400000, negative = all >> 31;
        bool infinite = magnitude == 0x7F800000, zero = magnitude == 0, tiny = magnitude && magnitude < 0x00800000;
        int found = (nan && quiet) | (zero && !negative) << 1 | (zero && negative) << 2 | (infinite && !negative) << 3 |
                    (infinite && negative) << 4 | tiny << 5 | (negative && !nan && !infinite && !zero) << 6 |
                    (nan && !quiet) << 7;
        return found & classes;
    });
}

inline __m256i cvtepi32_epi16(__m512i vector) {
    Lanes<uint32_t, __m512i> x(vector);
    return Lanes<uint16_t, __m256i>::make([&](int i) { return uint16_t(x.at[i]); });
}
inline __m512 cvtph_ps(__m256i half) {
    Lanes<__m128i, __m256i> x(half);
    return Lanes<__m256, __m512>::make([&](int i) { return _mm256_cvtph_ps(x.at[i]); });
}
template <int ROUNDING> __m256i cvtps_ph(__m512 vector) {
    Lanes<__m256, __m512> x(vector);
    return Lanes<__m128i, __m256i>::make([&](int i) { return _mm256_cvtps_ph(x.at[i], ROUNDING & 7); });
}
inline float reduce_add_ps(__m512 vector) {
    Floats x(vector);
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; ++i) x.at[i] += x.at[i + half];
    return x.at[0];
}

template <class Number, class Vector> void store_some(void* address, uint64_t mask, const Vector& vector) {
    Lanes<Number, Vector> x(vector);
    for (int i = 0; i < x.COUNT; ++i)
        if (mask >> i & 1) memcpy(static_cast<Number*>(address) + i, x.at + i, sizeof(Number));
}
template <class Number, class Vector> Vector load_some(uint64_t mask, const void* address) {
    return Lanes<Number, Vector>::make([&](int i) {
        Number number{};
        if (mask >> i & 1) memcpy(&number, static_cast<const Number*>(address) + i, sizeof number);
        return number;
    });
}

// Arithmetic of bf16 takes subnormal numbers for zero, and rounds to none.
inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
inline float from_bf16(uint16_t half) { return flushed(bits<float>(uint32_t(half) << 16)); }
inline uint16_t to_bf16(float x) {
    uint32_t all = bits<uint32_t>(flushed(x));
    if (x != x) return uint16_t(all >> 16 | 0x40);
    return uint16_t((all + 0x7FFF + (all >> 16 & 1)) >> 16);
}
inline __m256bh cvtneps_pbh(__m512 vector) {
    Floats x(vector);
    return Lanes<uint16_t, __m256bh>::make([&](int i) { return to_bf16(x.at[i]); });
}
inline __m512bh cvtne2ps_pbh(__m512 upper, __m512 lower) {
    Floats high(upper), low(lower);
    return Lanes<uint16_t, __m512bh>::make([&](int i) { return to_bf16(i < 16 ? low.at[i] : high.at[i - 16]); });
}
inline __m512 dpbf16_ps(__m512 sums, __m512bh a, __m512bh b) {
    Floats sum(sums);
    Lanes<uint16_t, __m512bh> x(a), y(b);
    return Floats::make([&](int i) {
        float odd = flushed(std::fma(from_bf16(x.at[2 * i + 1]), from_bf16(y.at[2 * i + 1]), flushed(sum.at[i])));
        return flushed(std::fma(from_bf16(x.at[2 * i]), from_bf16(y.at[2 * i]), odd));
    });
}

struct Tile { uint8_t rows[16][64]; };
struct Tiles {
    bool configured = false;
    uint8_t heights[8];
    Tile tiles[8];

    Tile& operator[](int index) {
        if (!configured) fprintf(stderr, "a tile is used before its shape is set\n"), abort();
        return tiles[index];
    }
};
inline thread_local Tiles tiles;

// Tiles of up to 16 rows of 64 bytes, the shapes that the kernels use.
inline void tile_loadconfig(const void* address) {
    uint8_t config[64];
    memcpy(config, address, sizeof config);
    for (int i = 1; i < 16; ++i)
        if (config[i]) fprintf(stderr, "byte %d of the tiles' shapes is not zero\n", i), abort();
    for (int i = 0; i < 8; ++i)
        if (config[0] != 1 || config[16 + 2 * i] != 64 || config[17 + 2 * i] || !config[48 + i] || config[48 + i] > 16)
            fprintf(stderr, "tile %d is not of 1 to 16 rows of 64 bytes\n", i), abort();
    tiles.configured = true;
    memcpy(tiles.heights, config + 48, sizeof tiles.heights);
    memset(tiles.tiles, 0, sizeof tiles.tiles);
}
inline void tile_release() { tiles.configured = false; }
inline void tile_zero(int tile) { memset(&tiles[tile], 0, sizeof(Tile)); }
inline void tile_loadd(int tile, const void* address, int64_t stride) {
    tile_zero(tile);
    for (int r = 0; r < tiles.heights[tile]; ++r)
        memcpy(tiles[tile].rows[r], static_cast<const char*>(address) + r * stride, 64);
}
inline void tile_stored(int tile, void* address, int64_t stride) {
    for (int r = 0; r < tiles.heights[tile]; ++r)
        memcpy(static_cast<char*>(address) + r * stride, tiles[tile].rows[r], 64);
}
inline void tile_dpbf16ps(int sums, int a, int b) {
    static_assert(sizeof(float[16]) == 64);
    Tile &c = tiles[sums], &x = tiles[a], &y = tiles[b];
    if (tiles.heights[sums] != tiles.heights[a] || tiles.heights[b] != 16)
        fprintf(stderr, "tiles %d, %d and %d do not fit each other\n", sums, a, b), abort();
    float values[16][32], factors[16][32];
    for (int r = 0; r < 16; ++r)
        for (int i = 0; i < 32; ++i) {
            uint16_t half;
            memcpy(&half, x.rows[r] + 2 * i, 2), values[r][i] = from_bf16(half);
            memcpy(&half, y.rows[r] + 2 * i, 2), factors[r][i] = from_bf16(half);
        }
    for (int r = 0; r < 16; ++r)
        for (int n = 0; n < 16; ++n) {
            float even = 0.0f, odd = 0.0f, sum;
            for (int k = 0; k < 16; ++k) {
                even = flushed(std::fma(values[r][2 * k], factors[k][2 * n], even));
                odd = flushed(std::fma(values[r][2 * k + 1], factors[k][2 * n + 1], odd));
            }
            memcpy(&sum, c.rows[r] + 4 * n, 4);
            sum = flushed(flushed(sum) + flushed(even + odd));
            memcpy(c.rows[r] + 4 * n, &sum, 4);
        }
}

}  // namespace emulated

#undef _mm512_cmpeq_epi16_mask
#undef _mm512_cmpneq_epi8_mask
#undef _mm512_fpclass_ps_mask
#undef _mm512_cvtepi32_epi16
#undef _mm512_cvtph_ps
#undef _mm512_cvtps_ph
#undef _mm512_reduce_add_ps
#undef _mm512_knot
#undef _mm256_mask_storeu_epi16
#undef _mm512_mask_storeu_ps
#undef _mm512_maskz_loadu_epi8
#undef _mm512_maskz_loadu_epi16
#undef _mm512_maskz_loadu_ps
#undef _mm512_cvtneps_pbh
#undef _mm512_cvtne2ps_pbh
#undef _mm512_dpbf16_ps
#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _mm512_cmpeq_epi16_mask emulated::cmpeq_epi16_mask
#define _mm512_cmpneq_epi8_mask emulated::cmpneq_epi8_mask
#define _mm512_fpclass_ps_mask emulated::fpclass_ps_mask
#define _mm512_cvtepi32_epi16 emulated::cvtepi32_epi16
#define _mm512_cvtph_ps emulated::cvtph_ps
#define _mm512_cvtps_ph(vector, rounding) emulated::cvtps_ph<rounding>(vector)
#define _mm512_reduce_add_ps emulated::reduce_add_ps
#define _mm512_knot(mask) __mmask16(~(mask))
#define _mm256_mask_storeu_epi16 emulated::store_some<uint16_t>
#define _mm512_mask_storeu_ps emulated::store_some<float>
#define _mm512_maskz_loadu_epi8 emulated::load_some<uint8_t, __m512i>
#define _mm512_maskz_loadu_epi16 emulated::load_some<uint16_t, __m512i>
#define _mm512_maskz_loadu_ps emulated::load_some<float, __m512>
#define _mm512_cvtneps_pbh emulated::cvtneps_pbh
#define _mm512_cvtne2ps_pbh emulated::cvtne2ps_pbh
#define _mm512_dpbf16_ps emulated::dpbf16_ps
#define _tile_loadconfig emulated::tile_loadconfig
#define _tile_release emulated::tile_release
#define _tile_zero emulated::tile_zero
#define _tile_loadd emulated::tile_loadd
#define _tile_stream_loadd emulated::tile_loadd
#define _tile_stored emulated::tile_stored
#define _tile_dpbf16ps emulated::tile_dpbf16ps
