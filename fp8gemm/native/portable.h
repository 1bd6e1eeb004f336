// Any CPU: vectors of 4 fp32, as the compiler implements them.

#pragma once

#include "levels.h"
#include "problems.h"

namespace {
namespace portable {

constexpr int LANES = 4, STEP = LANES, TOKENS = 2, CODES = LANES;
using Vec = float __attribute__((vector_size(LANES * 4)));
using Element = float;
using Operand = Vec;

INLINE Vec multiply_add(Vec sum, Operand a, Operand b) { return sum + a * b; }  // becomes fma where there is one

INLINE void decode_step(const uint8_t* codes, Operand* out) {
    for (int i = 0; i < CODES; ++i) out[0][i] = tables.fp32[codes[i]];
}

#include "vector_product.h"
#include "vector_quantize.h"
#include "vector_lookup.h"

const Kernel kernel = {NAMES[PORTABLE], block_tokens, plan, pack, panel};
const Quantizer quantizer = {amax_rows, cast_rows, look_up_rows};

}  // namespace portable
}  // namespace
