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

// Rows are transposed in words of two codes, 16 codes of each row at a time. In each 16 bytes, a vector then has four
// rows of the strip's first half and four of its second, which decoding separates.
template <bool> INLINE void decode_strip(const uint8_t* group, Element* out) {
    for (int quarter = 0; quarter < 4; ++quarter) {
        __m512i words[8];
        const uint8_t *from = group + quarter * 16, *second = from + 16 * 64;
        for (int i = 0; i < 4; ++i) {
            words[i] = avx512::quarters(from + i * 64, from + (i + 4) * 64, from + (i + 8) * 64, from + (i + 12) * 64);
            words[i + 4] = avx512::quarters(second + i * 64, second + (i + 4) * 64, second + (i + 8) * 64,
                                            second + (i + 12) * 64);
        }
        avx512::transpose_words(words);
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            Operand values[2];
            decode_register(words[i], values);
            Element* to = out + (quarter * 8 + i) * ROWS * GRAIN;
            _mm512_storeu_si512(to, (__m512i)values[0]);
            _mm512_storeu_si512(to + 32, (__m512i)values[1]);
        }
    }
}

constexpr int CODES = 64, FEW = 9;
constexpr int together(int tokens, bool vary) {
    if (vary) return tokens <= 4 ? 4 : 2;  // totals need as many registers as sums do
    return tokens <= 6 ? 4 : tokens <= 8 ? 3 : 2;
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
