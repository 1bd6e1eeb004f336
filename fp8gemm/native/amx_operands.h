// What both kernels for AMX are made of: the shapes of tiles, x in parts of bf16, scales that are added to exponents.

#pragma once

#include "avx512_bf16.h"

BEGIN_TARGET(TARGET_AMX)
namespace {
namespace amx {

constexpr int64_t STEP = 32;  // elements along k of a tile

// Tiles 0 to 3 are sums; the operands are 4 and 5, of which `height` rows are used as those of sums, and 6 and 7.
struct alignas(64) Shapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_in_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {};

    explicit Shapes(int64_t height) {
        for (int i = 0; i < 8; ++i) rows[i] = uint8_t(i < 6 ? height : 16);
    }
};

INLINE void zero_sums() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

// The upper 16 bits of two vectors of 16 fp32.
INLINE __m512i upper_halves(__m512 first, __m512 second) {
    const __m512i odd = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25,
                                         23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    return _mm512_permutex2var_epi16(_mm512_castps_si512(first), odd, _mm512_castps_si512(second));
}

// Truncates `value` to its first 8 significant bits, a bf16; `rest` is exact, and zero for infinity and NaN.
INLINE __m512 cut(__m512 value, __m512& rest) {
    __mmask16 special = _mm512_fpclass_ps_mask(value, 0x99), nan = _mm512_fpclass_ps_mask(value, 0x81);
    __m512i bits = _mm512_and_si512(_mm512_castps_si512(value), _mm512_set1_epi32(int(0xFFFF0000)));
    bits = _mm512_mask_or_epi32(bits, nan, bits, _mm512_set1_epi32(0x00400000));
    rest = _mm512_maskz_sub_ps(_mm512_knot(special), value, _mm512_castsi512_ps(bits));
    return _mm512_castsi512_ps(bits);
}

// Up to 32 elements of a token: their bf16 parts, with zeros from `count` on.
INLINE void split(const uint8_t* x, int64_t type, int64_t count, __m512i* out) {
    uint32_t mask = count >= STEP ? ~0u : (1u << larger<int64_t>(count, 0)) - 1;
    if (type == BF16) {
        out[0] = _mm512_maskz_loadu_epi16(mask, x);
        return;
    }
    __m512 low, high;
    if (type == FP16) {
        __m512i half = _mm512_maskz_loadu_epi16(mask, x);
        low = _mm512_cvtph_ps(_mm512_castsi512_si256(half));
        high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1));
    } else {
        low = _mm512_maskz_loadu_ps(__mmask16(mask), x);
        high = _mm512_maskz_loadu_ps(__mmask16(mask >> 16), x + 64);
    }
    for (int64_t part = 0; part < parts(type); ++part) {
        __m512 low_rest, high_rest;
        out[part] = upper_halves(cut(low, low_rest), cut(high, high_rest));
        low = low_rest, high = high_rest;
    }
}

// Whether e4m3 values times this are exact and normal as bf16: a power of two from 2^-117 to 2^118, as MX scales are.
INLINE bool folds(float scale) {
    uint32_t bits = bits_of(scale);
    return (bits & 0x807FFFFF) == 0 && bits >= (127 - 117) << 23 && bits <= (127 + 118) << 23;
}

}  // namespace amx
}  // namespace
END_TARGET
