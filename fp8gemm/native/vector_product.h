// Products by dot products along k. This is included once per instruction set, inside its namespace, which defines:
//
//   Vec, LANES           a vector of fp32 sums
//   Element, Operand     an element of a weight or of x, and STEP of them in the form in which they are multiplied
//   multiply_add         the sum with the products of two operands
//   CODES, decode_step   the number of codes that are decoded together, in order, to CODES / STEP operands
//   TOKENS               TOKENS x ROWS sums and their operands fill the registers

constexpr int ROWS = 4;

INLINE Operand load(const Element* address) {
    Operand operand;
    memcpy(&operand, address, sizeof operand);
    return operand;
}

INLINE float sum(Vec vector) {
    float lanes[LANES];
    memcpy(lanes, &vector, sizeof lanes);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    return lanes[0];
}

constexpr int64_t SPAN = 512;       // elements along k that are decoded at a time
constexpr int64_t PREFETCH = 4096;  // bytes ahead; half and double measured alike or slower

// Blocks along k start at multiples of STEP in packed rows, so that the padding of one is separate from the next.
INLINE int64_t padded_block(const Problem& p) {
    return p.scales_vary_along_k() ? round_up(p.cols, STEP) : round_up(p.k, CODES);
}
INLINE int64_t padded_k(const Problem& p) {
    return p.scales_vary_along_k() ? ceil_div(p.k, p.cols) * padded_block(p) : padded_block(p);
}

// CODES codes, of which `count` exist; the others are zeros.
INLINE void decode_some(const uint8_t* codes, int64_t count, Operand* out) {
    if (count >= CODES) return decode_step(codes, out);
    uint8_t last[CODES] = {};
    memcpy(last, codes, size_t(count));
    decode_step(last, out);
}

// Decodes `count` codes followed by zeros, CODES at a time, prefetching as many at `next`.
INLINE void decode(const uint8_t* codes, const uint8_t* next, Element* out, int64_t count) {
    for (int64_t i = 0; i < count; i += CODES) {
        Operand operands[CODES / STEP];
        if (CODES == 64 || i % 64 == 0) __builtin_prefetch(next + i);
        decode_some(codes + i, count - i, operands);
        memcpy(out + i, operands, sizeof operands);
    }
}

// The dot product of a row of the weight with one token, directly from the codes; blocks are multiples of CODES.
INLINE Vec dot_row(const Problem& p, int64_t row, const Element* x) {
    const uint8_t* codes = p.data_row(row);
    bool vary = p.scales_vary_along_k();
    Vec total{};
    const float* scales = p.scale_row(row);
    for (int64_t k = 0; k < p.k;) {
        int64_t end = vary ? smaller(p.k, k + p.cols) : p.k;
        float scale = vary ? *scales++ : 1.0f;
        Vec sums[CODES / STEP] = {};
        for (; k < end; k += CODES) {
            Operand w[CODES / STEP];
            __builtin_prefetch(codes + k + PREFETCH);
            decode_some(codes + k, end - k, w);
            for (int i = 0; i < CODES / STEP; ++i) sums[i] = multiply_add(sums[i], w[i], load(x + k + i * STEP));
        }
        for (int i = 0; i < CODES / STEP; ++i) total += sums[i] * scale;
    }
    return total;
}

// total[t][r] (+)= scale[r] * sum over span of w[r] x[t]; scale is null for 1.
template <int COUNT>
INLINE void dot(const Element* w, const Element* x, int64_t x_stride, int64_t span, const float* scale, Vec* total) {
    Vec sums[COUNT][ROWS];
    for (int t = 0; t < COUNT; ++t)
        for (int r = 0; r < ROWS; ++r) sums[t][r] = scale ? Vec{} : total[t * ROWS + r];
    for (int64_t k = 0; k < span; k += STEP) {
        Operand xs[COUNT];
        for (int t = 0; t < COUNT; ++t) xs[t] = load(x + t * x_stride + k);
        for (int r = 0; r < ROWS; ++r) {
            Operand ws = load(w + r * SPAN + k);
            for (int t = 0; t < COUNT; ++t) sums[t][r] = multiply_add(sums[t][r], ws, xs[t]);
        }
    }
    for (int t = 0; t < COUNT; ++t)
        for (int r = 0; r < ROWS; ++r)
            total[t * ROWS + r] = scale ? total[t * ROWS + r] + sums[t][r] * scale[r] : sums[t][r];
}

template <int COUNT>
INLINE void dot_at_most(int64_t count, const Element* w, const Element* x, int64_t x_stride, int64_t span,
                        const float* scale, Vec* total) {
    if (count >= COUNT) dot<COUNT>(w, x, x_stride, span, scale, total);
    else if constexpr (COUNT > 1) dot_at_most<COUNT - 1>(count, w, x, x_stride, span, scale, total);
}

int64_t block_tokens(const Problem&) { return 64; }

Plan plan(const Problem& p, int64_t tokens, int) {
    int64_t scratch = ROWS * (SPAN * int64_t(sizeof(Element)) + tokens * int64_t(sizeof(Vec)));
    return {1, 32, tokens * padded_k(p) * int64_t(sizeof(Element)), scratch};
}

// `count` elements of x: bf16 as they are; those of any type as fp32.
INLINE void copy(const uint8_t* x, int64_t, uint16_t* out, int64_t count) { memcpy(out, x, size_t(count) * 2); }
INLINE void copy(const uint8_t* x, int64_t type, float* out, int64_t count) {
    if (type == FP32) memcpy(out, x, size_t(count) * 4);
    else if (type == BF16) for (int64_t i = 0; i < count; ++i) out[i] = load_number(x, i, BF16);
    else for (int64_t i = 0; i < count; ++i) out[i] = load_number(x, i, FP16);
}

// Packed: [tokens][padded_k] elements.
void pack(const Problem& p, Tokens tokens, int64_t first, int64_t last) {
    int64_t block = padded_block(p);
    for (int64_t t = first; t < last; ++t) {
        const uint8_t* x = p.x_row(tokens.start + t);
        Element* out = reinterpret_cast<Element*>(tokens.packed) + t * padded_k(p);
        for (int64_t k = 0; k < p.k; k += smaller(p.cols, p.k), out += block) {
            int64_t count = smaller(p.cols, p.k - k);
            copy(x + k * size_of(p.x_type), p.x_type, out, count);
            memset(out + count, 0, size_t(block - count) * sizeof(Element));
        }
    }
}

// Sums of ROWS rows of the weight from `row` on with all tokens, before the lanes are added.
INLINE void sum_rows(const Problem& p, Tokens tokens, int64_t row, Element* w, Vec* total) {
    const Element* x = reinterpret_cast<const Element*>(tokens.packed);
    bool vary = p.scales_vary_along_k();
    int64_t rows = smaller<int64_t>(ROWS, p.n - row), x_stride = padded_k(p);
    for (int64_t i = 0; i < tokens.count * ROWS; ++i) total[i] = Vec{};
    for (int64_t k = 0, block = 0; k < p.k;) {
        int64_t end = vary ? smaller(p.k, (block + 1) * p.cols) : p.k;
        int64_t count = smaller(SPAN, end - k), span = round_up(count, STEP);
        const uint8_t* next = k + count < p.k ? p.data_row(row) + k + count : p.data_row(row + ROWS);
        float scale[ROWS] = {};
        memset(w + rows * SPAN, 0, size_t(ROWS - rows) * SPAN * sizeof(Element));
        for (int64_t r = 0; r < rows; ++r) {
            decode(p.data_row(row + r) + k, next + r * p.data_stride, w + r * SPAN, count);
            scale[r] = p.scale_row(row + r)[block];
        }
        for (int64_t t = 0; t < tokens.count; t += TOKENS)
            dot_at_most<TOKENS>(tokens.count - t, w, x + t * x_stride, x_stride, span, vary ? scale : nullptr,
                                total + t * ROWS);
        k += count, x += span;
        if (k == end) ++block;
    }
}

void panel(const Problem& p, Tokens tokens, Rows rows, uint8_t* scratch) {
    Vec* total = reinterpret_cast<Vec*>(scratch);
    Element* w = reinterpret_cast<Element*>(total + tokens.count * ROWS);
    const Element* x = reinterpret_cast<const Element*>(tokens.packed);
    bool alone = tokens.count == 1 && (!p.scales_vary_along_k() || p.cols % CODES == 0);
    for (int64_t row = rows.start; row < rows.start + rows.count; row += ROWS) {
        if (!alone) sum_rows(p, tokens, row, w, total);
        for (int64_t r = 0; r < ROWS && row + r < p.n; ++r) {
            if (alone) total[r] = dot_row(p, row + r, x);
            float scale = p.scales_vary_along_k() ? 1.0f : *p.scale_row(row + r), bias = p.bias_at(row + r);
            for (int64_t t = 0; t < tokens.count; ++t) {
                float y = sum(total[t * ROWS + r]) * scale;
                store_number(p.out_row(tokens.start + t), row + r, p.out_type, p.bias ? y + bias : y);
            }
        }
    }
}
