// Any CPU: vectors of 4 fp32, as the compiler implements them.

#pragma once

#include "levels.h"
#include "problems.h"

namespace {
namespace portable {

constexpr const char* NAME = NAMES[PORTABLE];
constexpr int LANES = 4, VECTORS = 2, ROWS = VECTORS * LANES, TOKENS = 4, UNROLL = 1, GRAIN = 1;
constexpr int64_t CHUNK = 512, PANEL = 32;
constexpr bool IN_PLACE = false;
using Vec = float __attribute__((vector_size(LANES * 4)));
using Element = float;
using Operand = Vec;
using Weights = Operand;

INLINE Operand load(const Element* address) {
    Operand operand;
    memcpy(&operand, address, sizeof operand);
    return operand;
}
INLINE Operand broadcast(const Element* address) { return Operand{} + *address; }
INLINE Vec multiply_add(Vec sums, Operand a, Operand b) { return sums + a * b; }  // becomes fma where there is one

INLINE float sum(Vec vector) { return (vector[0] + vector[2]) + (vector[1] + vector[3]); }

INLINE void store(uint8_t* out, int64_t type, Vec y) {
    for (int i = 0; i < LANES; ++i) store_number(out, i, type, y[i]);
}

constexpr float FACTOR = 1.0f;
constexpr bool DECODES_NANS = true;
template <bool> INLINE void decode_strip(const uint8_t* codes, int64_t stride, Element* out) {
    for (int k = 0; k < 64; ++k)
        for (int r = 0; r < ROWS; ++r) out[k * ROWS + r] = tables.fp32[codes[r * stride + k]];
}

constexpr int CODES = 2 * LANES, FEW = 2, IN_ORDER = LANES;
constexpr int together(int, bool) { return 1; }
constexpr int place(int code) { return code; }
INLINE void decode_in_order(const uint8_t* codes, Vec* out) {
    const float* values = tables.fp32;
    *out = Vec{values[codes[0]], values[codes[1]], values[codes[2]], values[codes[3]]};
}
template <bool> INLINE void decode_codes(const uint8_t* codes, Operand* out) {
    for (int i = 0; i < CODES / LANES; ++i) decode_in_order(codes + i * LANES, out + i);
}

#include "tiles.h"

#include "panels.h"

#include "dots.h"
#include "vector_lookup.h"
#include "vector_quantize.h"

const Quantizer quantizer = {amax_rows, cast_rows, look_up_rows};

}  // namespace portable
}  // namespace
