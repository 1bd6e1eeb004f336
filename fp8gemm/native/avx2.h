// AVX2: vectors of 8 fp32.

#pragma once

#include "levels.h"
#include "problems.h"

BEGIN_TARGET(TARGET_AVX2)
namespace {
namespace avx2 {

constexpr int LANES = 8, STEP = LANES, TOKENS = 3, CODES = 2 * LANES;
using Vec = float __attribute__((vector_size(LANES * 4)));
using Element = float;
using Operand = Vec;

INLINE Vec multiply_add(Vec sum, Operand a, Operand b) { return sum + a * b; }  // becomes fma where there is one

// A code's bits, moved to an fp16's, have 2^-8 of its value; subnormals convert to fp32 at full speed.
INLINE void decode_step(const uint8_t* codes, Operand* out) {
    const __m256i largest = _mm256_set1_epi16(0x3F80);
    __m256i half = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    half = _mm256_and_si256(_mm256_slli_epi16(half, 7), _mm256_set1_epi16(short(0xBF80)));
    __m256i nan = _mm256_cmpeq_epi16(_mm256_and_si256(half, largest), largest);
    half = _mm256_or_si256(half, _mm256_slli_epi16(nan, 10));
    out[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(half)) * 256.0f;
    out[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1)) * 256.0f;
}

#include "vector_product.h"
#include "vector_quantize.h"
#include "vector_lookup.h"

const Kernel kernel = {NAMES[AVX2], block_tokens, plan, pack, panel};
const Quantizer quantizer = {amax_rows, cast_rows, look_up_rows};

}  // namespace avx2
}  // namespace
END_TARGET
