// AVX2: vectors of 8 fp32.

#pragma once

#include "levels.h"
#include "problems.h"

BEGIN_TARGET(TARGET_AVX2)
namespace {
namespace avx2 {

constexpr const char* NAME = NAMES[AVX2];
// With more units in a pass, gcc moves sums to memory.
constexpr int LANES = 8, VECTORS = 2, ROWS = VECTORS * LANES, TOKENS = 6, UNROLL = 2, GRAIN = 1;
constexpr int64_t CHUNK = 512, PANEL = 128;
constexpr bool IN_PLACE = true;
using Vec = __m256;
using Element = float;
using Operand = Vec;
using Weights = Operand;

INLINE Operand load(const Element* address) { return _mm256_loadu_ps(address); }
INLINE Operand broadcast(const Element* address) { return _mm256_set1_ps(*address); }
INLINE Vec multiply_add(Vec sums, Operand a, Operand b) { return _mm256_fmadd_ps(a, b, sums); }

INLINE float sum(Vec vector) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(vector), _mm256_extractf128_ps(vector, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

INLINE void store(uint8_t* out, int64_t type, Vec y) {
    if (type == FP32) return _mm256_storeu_ps(reinterpret_cast<float*>(out), y);
    __m128i half;
    if (type == FP16) half = _mm256_cvtps_ph(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    else {  // to nearest, ties to even; NaN stays NaN
        __m256i bits = _mm256_castps_si256(y);
        __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
        __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(y, y, _CMP_UNORD_Q));
        rounded = _mm256_blendv_epi8(rounded, _mm256_or_si256(bits, _mm256_set1_epi32(0x400000)), nan);
        rounded = _mm256_srli_epi32(rounded, 16);
        half = _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), half);
}

// A code's bits, moved to an fp16's, have 2^-8 of its value; subnormals convert to fp32 at full speed. A NaN's bits
// become a number's, and are set apart where there may be some.
constexpr float FACTOR = 256.0f;
constexpr bool DECODES_NANS = false;
template <bool NANS> INLINE __m256i halves(__m256i shifted) {
    __m256i half = _mm256_and_si256(shifted, _mm256_set1_epi16(short(0xBF80)));
    if (!NANS) return half;
    const __m256i largest = _mm256_set1_epi16(0x3F80);
    __m256i nan = _mm256_cmpeq_epi16(_mm256_and_si256(half, largest), largest);
    return _mm256_or_si256(half, _mm256_slli_epi16(nan, 10));
}
INLINE Vec lower(__m256i half) { return _mm256_cvtph_ps(_mm256_castsi256_si128(half)); }
INLINE Vec upper(__m256i half) { return _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1)); }

// Of 16 words of two codes: the first and the second code of each.
template <bool NANS> INLINE __m256i first_codes(__m256i words) {
    return halves<NANS>(_mm256_srai_epi16(_mm256_slli_epi16(words, 8), 1));
}
template <bool NANS> INLINE __m256i second_codes(__m256i words) { return halves<NANS>(_mm256_srai_epi16(words, 1)); }

// 8 vectors of 8 words in each 128 bits -> 8 vectors of one word from each.
INLINE void transpose_words(__m256i a[8]) {
    __m256i b[8];
    for (int i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_epi16(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_epi16(a[i], a[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; ++j) {
            a[i + 2 * j] = _mm256_unpacklo_epi32(b[i + j], b[i + j + 2]);
            a[i + 2 * j + 1] = _mm256_unpackhi_epi32(b[i + j], b[i + j + 2]);
        }
    for (int i = 0; i < 4; ++i) {
        b[2 * i] = _mm256_unpacklo_epi64(a[i], a[i + 4]);
        b[2 * i + 1] = _mm256_unpackhi_epi64(a[i], a[i + 4]);
    }
    for (int i = 0; i < 8; ++i) a[i] = b[i];
}

INLINE __m256i codes_at(const uint8_t* address) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(address));
}

// Eight rows at a time are transposed in words of two codes: 32 codes of each, in two halves of 16.
template <bool NANS> INLINE void decode_strip(const uint8_t* codes, int64_t stride, Element* out) {
    for (int vector = 0; vector < VECTORS; ++vector)
        for (int half = 0; half < 2; ++half) {
            __m256i words[8];
            for (int i = 0; i < 8; ++i) words[i] = codes_at(codes + (vector * 8 + i) * stride + half * 32);
            transpose_words(words);
#pragma GCC unroll 8
            for (int i = 0; i < 8; ++i) {
                Element* to = out + (half * 32 + 2 * i) * ROWS + vector * 8;
                __m256i first = first_codes<NANS>(words[i]), second = second_codes<NANS>(words[i]);
                _mm256_storeu_ps(to, lower(first));
                _mm256_storeu_ps(to + ROWS, lower(second));
                _mm256_storeu_ps(to + 16 * ROWS, upper(first));
                _mm256_storeu_ps(to + 17 * ROWS, upper(second));
            }
        }
}

constexpr int CODES = 32, FEW = 8;
constexpr int together(int tokens, bool) { return tokens <= 2 ? 4 : tokens == 3 ? 3 : 2; }
constexpr int place(int code) { return code % 2 * 16 + code / 2; }
template <bool NANS> INLINE void decode_codes(const uint8_t* codes, Operand* out) {
    __m256i words = codes_at(codes), first = first_codes<NANS>(words), second = second_codes<NANS>(words);
    out[0] = lower(first), out[1] = upper(first), out[2] = lower(second), out[3] = upper(second);
}

constexpr int IN_ORDER = 16;
INLINE void decode_in_order(const uint8_t* codes, Vec* out) {
    __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    __m256i half = halves<true>(_mm256_slli_epi16(wide, 7));
    out[0] = lower(half) * FACTOR, out[1] = upper(half) * FACTOR;
}

#include "tiles.h"

#include "panels.h"

#include "dots.h"
#include "vector_lookup.h"
#include "vector_quantize.h"

const Quantizer quantizer = {amax_rows, cast_rows, look_up_rows};

}  // namespace avx2
}  // namespace
END_TARGET
