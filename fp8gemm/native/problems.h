// The problems, as library.py passes them, and what an instruction set implements for each.

#pragma once

#include "numbers.h"

namespace {

// x [m, k], data [n, k], scale [ceil(n / rows), ceil(k / cols)], bias [n] or null, out [m, n]; types are as in Type,
// strides in elements. library.py fills in this struct, field by field.
struct Problem {
    const uint8_t *x, *data;
    const float* scale;
    const uint8_t* bias;
    uint8_t* out;
    int64_t x_type, bias_type, out_type, x_stride, data_stride, out_stride, m, n, k, rows, cols;
    int64_t blocks;  // along k; not divided anew for each row
    int64_t nans;    // whether some code may be NaN: where this is 0, decoding is faster

    bool lacks_operands() const { return m && n && (!out || !scale || (k && (!x || !data))); }
    bool scales_vary_along_k() const { return cols < k; }
    const float* scale_row(int64_t row) const { return scale + (rows == 1 ? row : row / rows) * blocks; }
    float bias_at(int64_t row) const { return bias ? load_number(bias, row, bias_type) : 0.0f; }
    const uint8_t* data_row(int64_t row) const { return data + row * data_stride; }
    const uint8_t* x_row(int64_t token) const { return x + token * x_stride * size_of(x_type); }
    uint8_t* out_row(int64_t token) const { return out + token * out_stride * size_of(out_type); }
};

// Tokens [start, start + count) of a problem, packed in a kernel's own order at `packed`.
struct Tokens { int64_t start, count; uint8_t* packed; };
// Rows [start, start + count) of the weight; `next` are the rows to prefetch meanwhile, or null.
struct Rows { int64_t start, count; const uint8_t* next; };
// The number of tokens packed at a time, the number of rows of a panel (the unit of work), and the memory for both.
struct Plan { int64_t pack_unit, panel_rows, packed_bytes, scratch_bytes; };

// An instruction set's product: `pack` packs units [first, last) of the tokens, `panel` computes some rows of out.
struct Kernel {
    const char* name;
    int64_t (*block_tokens)(const Problem&);
    Plan (*plan)(const Problem&, int64_t tokens, int threads);
    void (*pack)(const Problem&, Tokens, int64_t first, int64_t last);
    void (*panel)(const Problem&, Tokens, Rows, uint8_t* scratch);
};

// x [n, k] of any type -> data [n, k] and scale [ceil(n / rows), ceil(k / cols)], as fp8gemm/numerics.py defines it.
struct Quantization {
    const uint8_t* x;
    uint8_t* data;
    float* scale;
    int64_t x_type, x_stride, data_stride, n, k, rows, cols, ue8m0;

    int64_t blocks() const { return ceil_div(k, cols); }
    const uint8_t* x_row(int64_t row) const { return x + row * x_stride * size_of(x_type); }
};

// out [m, k] of any type: rows ids[0], ids[1], ... of data * scale, or all rows in order if ids is null.
struct Lookup {
    const int64_t* ids;
    const uint8_t* data;
    const float* scale;
    uint8_t* out;
    int64_t out_type, data_stride, m, n, k, rows, cols;
};

struct Quantizer {
    void (*amax)(const Quantization&, int64_t first, int64_t last, float* amax);
    void (*cast)(const Quantization&, int64_t first, int64_t last);
    void (*look_up)(const Lookup&, int64_t first, int64_t last);
};

}  // namespace
