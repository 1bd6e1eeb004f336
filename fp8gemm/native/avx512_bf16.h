// AVX512_BF16 and VBMI: dot products of pairs of bf16, for x in bf16.

#pragma once

#include "avx512.h"

BEGIN_TARGET(TARGET_AVX512_BF16)
namespace {
namespace avx512_bf16 {

constexpr const char* NAME = NAMES[AVX512_BF16];
constexpr int LANES = 16, VECTORS = 2, ROWS = VECTORS * LANES, TOKENS = 12, UNROLL = 1, GRAIN = 2;
constexpr int64_t CHUNK = 512, PANEL = 128;
constexpr bool IN_PLACE = true;
using Vec = __m512;
using Element = uint16_t;
using Operand = __m512bh;
using Weights = Operand;

INLINE Operand load(const Element* address) { return (__m512bh)_mm512_loadu_si512(address); }
INLINE Operand broadcast(const Element* address) {
    int32_t pair;
    memcpy(&pair, address, sizeof pair);
    return (__m512bh)_mm512_set1_epi32(pair);
}
INLINE Vec multiply_add(Vec sums, Operand a, Operand b) { return _mm512_dpbf16_ps(sums, a, b); }

using avx512::sum;

INLINE void store(uint8_t* out, int64_t type, Vec y) {
    if (type == BF16) _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), (__m256i)_mm512_cvtneps_pbh(y));
    else avx512::store(out, type, y);
}

// Codes are decoded by tables of the upper and lower bytes of their values, NaN included. Words of two codes become
// pairs of bf16: those of the lower and of the upper 8 bytes of each 16.
constexpr float FACTOR = 1.0f;
constexpr bool DECODES_NANS = true;
INLINE void decode_register(__m512i code, Operand* out) {
    KEEP(code);  // it is used three times; gcc would load it as often
    const __m512i upper0 = _mm512_load_si512(tables.upper), upper1 = _mm512_load_si512(tables.upper + 64);
    const __m512i lower0 = _mm512_load_si512(tables.lower), lower1 = _mm512_load_si512(tables.lower + 64);
    __m512i upper = _mm512_permutex2var_epi8(upper0, code, upper1);
    __m512i lower = _mm512_permutex2var_epi8(lower0, code, lower1);
    upper = _mm512_ternarylogic_epi64(upper, code, _mm512_set1_epi8(char(0x80)), 0xF8);  // upper | code & sign
    out[0] = (__m512bh)_mm512_unpacklo_epi8(lower, upper);
    out[1] = (__m512bh)_mm512_unpackhi_epi8(lower, upper);
}

// 32 codes at each of two addresses.
INLINE __m512i codes_at(const uint8_t* a, const uint8_t* b) {
    const __m256i first = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a));
    const __m256i second = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b));
    return _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
}

// 16 rows at a time: their codes become vectors of 16 codes of rows i, i + 4, i + 8 and i + 12, and then of two words
// of two codes of each row, which decoding separates.
template <bool> INLINE void decode_strip(const uint8_t* codes, int64_t stride, Element* out) {
    for (int half = 0; half < 2; ++half, codes += 16 * stride, out += LANES * GRAIN) {
        __m512i quarters[4][4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const uint8_t *a = codes + i * stride, *b = a + 4 * stride, *c = b + 4 * stride, *d = c + 4 * stride;
            const __m512i ab0 = codes_at(a, b), ab1 = codes_at(a + 32, b + 32);
            const __m512i cd0 = codes_at(c, d), cd1 = codes_at(c + 32, d + 32);
            quarters[0][i] = _mm512_shuffle_i32x4(ab0, cd0, 0x88);
            quarters[1][i] = _mm512_shuffle_i32x4(ab0, cd0, 0xDD);
            quarters[2][i] = _mm512_shuffle_i32x4(ab1, cd1, 0x88);
            quarters[3][i] = _mm512_shuffle_i32x4(ab1, cd1, 0xDD);
        }
#pragma GCC unroll 4
        for (int quarter = 0; quarter < 4; ++quarter) {
            avx512::transpose_four(quarters[quarter]);
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                Operand values[2];
                decode_register(quarters[quarter][i], values);
                Element* to = out + (quarter * 8 + i * 2) * ROWS * GRAIN;
                _mm512_storeu_si512(to, (__m512i)values[0]);
                _mm512_storeu_si512(to + ROWS * GRAIN, (__m512i)values[1]);
            }
        }
    }
}

constexpr int CODES = 64, FEW = 8;
constexpr int together(int tokens, bool vary) {
    if (vary) return tokens <= 4 ? 4 : 2;  // totals need as many registers as sums do
    return tokens <= 6 ? 4 : 3;
}
constexpr int place(int code) { return code / 8 % 2 * 32 + code / 16 * 8 + code % 8; }
template <bool> INLINE void decode_codes(const uint8_t* codes, Operand* out) {
    decode_register(_mm512_loadu_si512(codes), out);
}

#include "tiles.h"

#include "panels.h"

#include "dots.h"

}  // namespace avx512_bf16
}  // namespace
END_TARGET
