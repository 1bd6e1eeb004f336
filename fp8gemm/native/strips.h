// What panels of every instruction set are made of. This is included once per instruction set, inside its namespace,
// which defines:
//
//   Vec, LANES           a vector of fp32 sums: of one token with LANES rows of the weight
//   Element, GRAIN       an element of x and of a decoded weight; each lane multiplies GRAIN of them at a time
//   CHUNK                the most codes of a row that are decoded before they are multiplied
//   FACTOR               decoded weights times this are the weight's values
//   store                rounds sums to the type of out

constexpr int64_t MOST_ROWS = 512;  // of a panel

// Chunks of about the same size: what a pass over all tokens costs, a short one costs as well.
INLINE int64_t chunks(const Problem& p) { return larger<int64_t>(1, ceil_div(p.k, CHUNK)); }
INLINE int64_t chunk_size(const Problem& p) { return larger<int64_t>(64, round_up(ceil_div(p.k, chunks(p)), 64)); }

// Lines that will be used next, `left` of rows of `width` bytes, of which `burst` are fetched at a time.
struct Ahead {
    const uint8_t* row;
    int64_t stride, width, left = 0, burst = 0, column = 0;

    // All will have been fetched after `times` calls of fetch, and at most a burst of what follows.
    INLINE void spread(int64_t times) { burst = ceil_div(left, larger<int64_t>(times, 1)); }
    template <bool TO_STORE = false> INLINE void fetch() {
        if (left <= 0) return;
        left -= burst;
        for (int64_t lines = burst; lines > 0; --lines) {
            TO_STORE ? __builtin_prefetch(row + column, 1) : __builtin_prefetch(row + column, 0, 2);
            column += 64;
            if (column >= width) column = 0, row += stride;
        }
    }
};

// What comes after a strip, fetched while it is multiplied.
struct Next {
    Ahead codes, tokens;

    INLINE void spread(int64_t times) { codes.spread(times), tokens.spread(times); }
    INLINE void fetch() { codes.fetch(), tokens.fetch(); }
};

// Copied by memcpy instead, a tile's sums would all be kept in memory by gcc, and copied in parts.
using UnalignedVec [[gnu::aligned(4), gnu::may_alias]] = Vec;
INLINE Vec floats(const float* address) { return *reinterpret_cast<const UnalignedVec*>(address); }
INLINE void put(float* address, Vec vector) { *reinterpret_cast<UnalignedVec*>(address) = vector; }

// `count` elements of x: bf16 as they are; those of any type as fp32.
INLINE void copy(const uint8_t* x, int64_t, uint16_t* out, int64_t count) { memcpy(out, x, size_t(count) * 2); }
INLINE void copy(const uint8_t* x, int64_t type, float* out, int64_t count) {
    if (type == FP32) memcpy(out, x, size_t(count) * 4);
    else if (type == BF16) for (int64_t i = 0; i < count; ++i) out[i] = load_number(x, i, BF16);
    else for (int64_t i = 0; i < count; ++i) out[i] = load_number(x, i, FP16);
}

// Units of GRAIN elements along k that are summed from zero, and where their factors are if scales vary along k.
struct Segment { int32_t units, factor; };

// A strip of one chunk: decoded, and where its sums are added up. `row` is its first in the panel; `out` is null before
// the last chunk, of which the sums are complete.
struct Strip {
    Element* w;
    const Segment *segments, *end;
    const float* factors;
    float* sums;
    int64_t row, rows;
    bool first;
    uint8_t* out;
};

// Where the strip's sums with some tokens will be stored; nowhere before the last chunk.
INLINE Ahead out_ahead(const Problem& p, const Strip& strip, int64_t token, int64_t tokens) {
    if (!strip.out) return {nullptr, 0, 0};
    const int64_t stride = p.out_stride * size_of(p.out_type), width = strip.rows * size_of(p.out_type);
    return {strip.out + token * stride, stride, width, tokens * ceil_div(width, 64)};
}

// What the sums of each row become: times factor and scale, plus bias. Where there is none, it is -0, which changes no
// sum.
struct Ending {
    float factor, scale[MOST_ROWS], bias[MOST_ROWS];

    Ending(const Problem& p, int64_t row, int64_t rows) : factor(p.scales_vary_along_k() ? 1.0f : FACTOR) {
        const float* scales = p.scale_row(row);
        if (p.rows == 1 && p.blocks == 1) memcpy(scale, scales, size_t(rows) * 4);
        else for (int64_t r = 0; r < rows; ++r) scale[r] = p.scales_vary_along_k() ? 1.0f : *p.scale_row(row + r);
        if (p.bias) copy(p.bias + row * size_of(p.bias_type), p.bias_type, bias, rows);
        else for (int64_t r = 0; r < rows; ++r) bias[r] = -0.0f;
    }
    INLINE Vec of(const float* sums, int64_t row) const {
        return floats(sums) * factor * floats(scale + row) + floats(bias + row);
    }
};

template <int64_t TYPE>
INLINE void finish_as(const Ending& ending, int64_t first, const float* sums, int64_t stride, int64_t tokens,
                      int64_t rows, uint8_t* out, int64_t out_stride) {
    for (; tokens > 0; --tokens, sums += stride, out += out_stride) {
        int64_t r = 0;
        for (; rows - r >= LANES; r += LANES) store(out + r * size_of(TYPE), TYPE, ending.of(sums + r, first + r));
        if (r == rows) continue;
        float values[LANES];
        const Vec last = ending.of(sums + r, first + r);
        memcpy(values, &last, sizeof values);
        for (int64_t i = 0; i < rows - r; ++i) store_number(out, r + i, TYPE, values[i]);
    }
}

// out [tokens][rows] from sums [tokens][stride], rounded; `first` is the row's place in `ending`.
NOINLINE void finish(const Problem& p, const Ending& ending, int64_t first, const float* sums, int64_t stride,
                     int64_t tokens, int64_t rows, uint8_t* out) {
    int64_t out_stride = p.out_stride * size_of(p.out_type);
    auto* finish_type = p.out_type == FP32 ? finish_as<FP32> : p.out_type == BF16 ? finish_as<BF16> : finish_as<FP16>;
    finish_type(ending, first, sums, stride, tokens, rows, out, out_stride);
}
