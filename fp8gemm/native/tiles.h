// Tiles of a product: sums of some tokens with some rows of a decoded weight, in registers, with lanes along N. This is
// included once per instruction set by panels.h, inside the set's namespace, which defines:
//
//   Vec, LANES           a vector of fp32 sums: of one token with LANES rows of the weight
//   Element, GRAIN       an element of x and of a decoded weight; each lane multiplies GRAIN of them at a time
//   Operand              a vector of elements
//   Weights              LANES x GRAIN elements of a decoded weight: an operand, or several `parts`
//   load, broadcast      an operand from memory; one that stands for GRAIN elements of a token
//   multiply_add         sums plus the products of weights and such an operand
//   FACTOR               decoded weights times this are the weight's values
//   store                rounds sums to the type of out
//   TOKENS               TOKENS x VECTORS sums and their operands fill the registers
//   CHUNK, PANEL, IN_PLACE
//                        as panels.h says
//
// Sums are never added across lanes, and are stored contiguously.

constexpr int64_t RESTART = 256;    // elements along k after which sums start from zero: less is lost by rounding
constexpr int64_t MOST_ROWS = 512;  // of a panel of dots
constexpr int WIDTH = sizeof(Operand) / sizeof(Element);
// No power of two, at which all tokens would share few sets of the caches.
constexpr int64_t X_STRIDE = CHUNK + 64 / int64_t(sizeof(Element));

// Lines that come next, `left` of rows of `width` bytes, of which `burst` are fetched at a time.
struct Ahead {
    const uint8_t* row;
    int64_t stride, width, left = 0, burst = 0, column = 0;

    INLINE void fetch() {
        for (int64_t i = 0; i < burst && left > 0; ++i, --left) {
            __builtin_prefetch(row + column, 0, 2);
            column += 64;
            if (column >= width) column = 0, row += stride;
        }
    }
};

INLINE Vec floats(const float* address) {
    Vec vector;
    memcpy(&vector, address, sizeof vector);
    return vector;
}

template <class Several> INLINE Several load_all(const Element* address) {
    if constexpr (sizeof(Several) == sizeof(Operand)) return load(address);
    else {
        Several all;
        for (int i = 0; i < int(sizeof(Several) / sizeof(Operand)); ++i) all.parts[i] = load(address + i * WIDTH);
        return all;
    }
}

// `count` elements of x: bf16 as they are; those of any type as fp32.
INLINE void copy(const uint8_t* x, int64_t, uint16_t* out, int64_t count) { memcpy(out, x, size_t(count) * 2); }
INLINE void copy(const uint8_t* x, int64_t type, float* out, int64_t count) {
    if (type == FP32) memcpy(out, x, size_t(count) * 4);
    else if (type == BF16) for (int64_t i = 0; i < count; ++i) out[i] = load_number(x, i, BF16);
    else for (int64_t i = 0; i < count; ++i) out[i] = load_number(x, i, FP16);
}

// Units of GRAIN elements along k that are summed from zero, and where their factors are if scales vary along k.
struct Segment { int32_t units, factor; };

// Elements of tokens, which follow each other at `stride`.
struct Elements {
    const Element* first;
    int64_t stride;

    Elements from(int64_t token) const { return {first + token * stride, stride}; }
};

// Elements of COUNT tokens. Where these may be anywhere, three share a pointer, as addresses are a pointer plus once or
// twice a register.
template <int COUNT> struct Cursor {
    static constexpr int SHARED = IN_PLACE ? 3 : COUNT, POINTERS = (COUNT + SHARED - 1) / SHARED;
    const Element* pointers[POINTERS];
    const int64_t stride;

    INLINE explicit Cursor(Elements x) : stride(IN_PLACE ? x.stride : X_STRIDE) {
        for (int i = 0; i < POINTERS; ++i) pointers[i] = x.first + SHARED * i * stride;
    }
    INLINE Operand token(int t) const {
        return broadcast(pointers[t / SHARED] + t % SHARED * (IN_PLACE ? stride : X_STRIDE));
    }
    INLINE void advance() {
        for (int i = 0; i < POINTERS; ++i) pointers[i] += GRAIN;
    }
};

// Adds w, Weights [units][VECTORS], times x [COUNT] to sums [COUNT][PANEL], segment by segment; `factors`, unless
// null, multiply what each adds. The first segment's sums replace what is in memory if `first`.
template <int COUNT>
NOINLINE void multiply_tile(Elements elements, const Element* w, const Segment* segment, const Segment* end,
                            const float* factors, bool first, float* sums, Ahead& codes, Ahead& ahead) {
    Cursor<COUNT> x(elements);
    for (; segment < end; ++segment, first = false) {
        Vec added[COUNT][VECTORS];
        for (int t = 0; t < COUNT; ++t)
            for (int j = 0; j < VECTORS; ++j) added[t][j] = Vec{};
        for (int64_t unit = 0; unit < segment->units;) {
            codes.fetch(), ahead.fetch();
            for (int64_t stop = smaller<int64_t>(segment->units, unit + 16); unit < stop; ++unit) {
                Weights rows[VECTORS];
                for (int j = 0; j < VECTORS; ++j) rows[j] = load_all<Weights>(w + j * LANES * GRAIN);
#pragma GCC unroll 16
                for (int t = 0; t < COUNT; ++t) {
                    Operand token = x.token(t);
                    for (int j = 0; j < VECTORS; ++j) added[t][j] = multiply_add(added[t][j], rows[j], token);
                }
                w += ROWS * GRAIN, x.advance();
            }
        }
        const float* factor = factors ? factors + segment->factor * PANEL : nullptr;
#pragma GCC unroll 16
        for (int t = 0; t < COUNT; ++t)
            for (int j = 0; j < VECTORS; ++j) {
                float* kept = sums + t * PANEL + j * LANES;
                if (factor) added[t][j] = added[t][j] * FACTOR * floats(factor + j * LANES);
                if (!first) added[t][j] += floats(kept);
                memcpy(kept, &added[t][j], sizeof(Vec));
            }
    }
}

template <int COUNT, class... Arguments> INLINE void multiply_tile_of(int64_t count, Arguments&&... arguments) {
    if (count == COUNT) return multiply_tile<COUNT>(arguments...);
    if constexpr (COUNT > 1) multiply_tile_of<COUNT - 1>(count, arguments...);
}

// What the sums of each row become: times factor and scale, plus bias.
struct Ending {
    float factor, scale[MOST_ROWS], bias[MOST_ROWS];

    Ending(const Problem& p, int64_t row, int64_t rows) : factor(p.scales_vary_along_k() ? 1.0f : FACTOR) {
        const float* scales = p.scale_row(row);
        if (p.rows == 1 && p.blocks == 1) memcpy(scale, scales, size_t(rows) * 4);
        else for (int64_t r = 0; r < rows; ++r) scale[r] = p.scales_vary_along_k() ? 1.0f : *p.scale_row(row + r);
        if (p.bias) copy(p.bias + row * size_of(p.bias_type), p.bias_type, bias, rows);
    }
};

// out [tokens][rows] from sums [tokens][stride], rounded; `first` is the row's place in `ending`.
NOINLINE void finish(const Problem& p, const Ending& ending, int64_t first, const float* sums, int64_t stride,
                     int64_t tokens, int64_t rows, uint8_t* out) {
    for (; tokens > 0; --tokens, sums += stride, out += p.out_stride * size_of(p.out_type))
        for (int64_t r = 0; r < rows; r += LANES) {
            Vec y = floats(sums + r) * ending.factor * floats(ending.scale + first + r);
            if (p.bias) y += floats(ending.bias + first + r);
            if (rows - r >= LANES) {
                store(out + r * size_of(p.out_type), p.out_type, y);
                continue;
            }
            float values[LANES];
            memcpy(values, &y, sizeof values);
            for (int64_t i = 0; i < rows - r; ++i) store_number(out, r + i, p.out_type, values[i]);
        }
}
