// AVX-512: vectors of 16 fp32.

#pragma once

#include "levels.h"
#include "problems.h"

BEGIN_TARGET(TARGET_AVX512)
namespace {
namespace avx512 {

constexpr const char* NAME = NAMES[AVX512];
// Tiles of four vectors by six tokens load 10 operands for 24 fused multiply-adds, of which some CPUs start two in each
// cycle; with two vectors by twelve tokens it would be 14. What a tile loads stays in an L1 cache of 48 KB.
constexpr int LANES = 16, VECTORS = 4, ROWS = VECTORS * LANES, TOKENS = 6, UNROLL = 4, GRAIN = 1;
constexpr int64_t CHUNK = 128, PANEL = 128;
constexpr bool IN_PLACE = true;
using Vec = __m512;
using Element = float;
using Operand = Vec;
using Weights = Operand;

INLINE Operand load(const Element* address) { return _mm512_loadu_ps(address); }
INLINE Operand broadcast(const Element* address) { return _mm512_set1_ps(*address); }
INLINE Vec multiply_add(Vec sums, Operand a, Operand b) { return _mm512_fmadd_ps(a, b, sums); }

INLINE float sum(Vec vector) { return _mm512_reduce_add_ps(vector); }

INLINE void store(uint8_t* out, int64_t type, Vec y) {
    if (type == FP32) return _mm512_storeu_ps(out, y);
    __m256i half;
    if (type == FP16) half = _mm512_cvtps_ph(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    else {  // to nearest, ties to even; NaN stays NaN
        __m512i bits = _mm512_castps_si512(y);
        __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
        __mmask16 nan = _mm512_cmp_ps_mask(y, y, _CMP_UNORD_Q);
        rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
        half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), half);
}

// A code's bits, moved to an fp16's, have 2^-8 of its value; subnormals convert to fp32 at full speed. A NaN's bits
// become a number's, and are set apart where there may be some.
constexpr float FACTOR = 256.0f;
constexpr bool DECODES_NANS = false;
template <bool NANS> INLINE __m512i halves(__m512i shifted) {
    __m512i half = _mm512_and_si512(shifted, _mm512_set1_epi16(short(0xBF80)));
    if (!NANS) return half;
    const __m512i largest = _mm512_set1_epi16(0x3F80);
    __mmask32 nan = _mm512_cmpeq_epi16_mask(_mm512_and_si512(half, largest), largest);
    return _mm512_mask_blend_epi16(nan, half, _mm512_or_si512(half, _mm512_set1_epi16(0x7C00)));
}
INLINE Vec lower(__m512i half) { return _mm512_cvtph_ps(_mm512_castsi512_si256(half)); }
INLINE Vec upper(__m512i half) { return _mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1)); }

// Of 32 words of two codes: the first and the second code of each.
template <bool NANS> INLINE __m512i first_codes(__m512i words) {
    return halves<NANS>(_mm512_srai_epi16(_mm512_slli_epi16(words, 8), 1));
}
template <bool NANS> INLINE __m512i second_codes(__m512i words) { return halves<NANS>(_mm512_srai_epi16(words, 1)); }

// 4 vectors of 8 words in each 128 bits -> 4 vectors of two words from each, the first words of all before the second.
INLINE void transpose_four(__m512i a[4]) {
    const __m512i first = _mm512_unpacklo_epi16(a[0], a[1]), second = _mm512_unpackhi_epi16(a[0], a[1]);
    const __m512i third = _mm512_unpacklo_epi16(a[2], a[3]), fourth = _mm512_unpackhi_epi16(a[2], a[3]);
    a[0] = _mm512_unpacklo_epi32(first, third), a[1] = _mm512_unpackhi_epi32(first, third);
    a[2] = _mm512_unpacklo_epi32(second, fourth), a[3] = _mm512_unpackhi_epi32(second, fourth);
}

// 8 vectors of 8 words in each 128 bits -> 8 vectors of one word from each.
INLINE void transpose_words(__m512i a[8]) {
    __m512i b[8];
    transpose_four(a), transpose_four(a + 4);
    for (int i = 0; i < 4; ++i) {
        b[2 * i] = _mm512_unpacklo_epi64(a[i], a[i + 4]);
        b[2 * i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 4]);
    }
    for (int i = 0; i < 8; ++i) a[i] = b[i];
}

// 16 rows at a time: words of two codes, in each 128 bits those of 8 rows, and then of all 16 in each 256.
template <bool NANS> INLINE void decode_strip(const uint8_t* codes, int64_t stride, Element* out) {
    const __m512i in_half[2] = {_mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11),
                                _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15)};
    for (int vector = 0; vector < VECTORS; ++vector) {
        __m512i a[8], b[8];
        for (int i = 0; i < 8; ++i) {
            a[i] = _mm512_loadu_si512(codes + (vector * 16 + i) * stride);
            b[i] = _mm512_loadu_si512(codes + (vector * 16 + 8 + i) * stride);
        }
        transpose_words(a), transpose_words(b);
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i)
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half) {
                Element* to = out + (half * 32 + 2 * i) * ROWS + vector * 16;
                __m512i words = _mm512_permutex2var_epi64(a[i], in_half[half], b[i]);
                __m512i first = first_codes<NANS>(words), second = second_codes<NANS>(words);
                _mm512_storeu_ps(to, lower(first));
                _mm512_storeu_ps(to + ROWS, lower(second));
                _mm512_storeu_ps(to + 16 * ROWS, upper(first));
                _mm512_storeu_ps(to + 17 * ROWS, upper(second));
            }
    }
}

constexpr int CODES = 64, FEW = 8;
constexpr int together(int tokens, bool vary) { return tokens <= (vary ? 3 : 5) ? 4 : 2; }
constexpr int place(int code) { return code % 2 * 32 + code / 2; }
template <bool NANS> INLINE void decode_codes(const uint8_t* codes, Operand* out) {
    __m512i words = _mm512_loadu_si512(codes), first = first_codes<NANS>(words), second = second_codes<NANS>(words);
    out[0] = lower(first), out[1] = upper(first), out[2] = lower(second), out[3] = upper(second);
}

constexpr int IN_ORDER = 32;
INLINE void decode_in_order(const uint8_t* codes, Vec* out) {
    __m512i wide = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
    __m512i half = halves<true>(_mm512_slli_epi16(wide, 7));
    out[0] = lower(half) * FACTOR, out[1] = upper(half) * FACTOR;
}

#include "tiles.h"

#include "panels.h"

#include "dots.h"
#include "vector_lookup.h"
#include "vector_quantize.h"

const Quantizer quantizer = {amax_rows, cast_rows, look_up_rows};

}  // namespace avx512
}  // namespace
END_TARGET
