// Products of few tokens, with lanes along K: codes are decoded in registers and multiplied there. This is included
// once per instruction set, inside its namespace, after panels.h; it needs, in addition:
//
//   CODES          codes that are decoded at a time
//   decode_codes   CODES codes -> PARTS operands, in the order that is the fastest
//   place          which of these elements a code becomes; x is packed in the same order
//   FEW            the most tokens for which this is faster than panels
//   together       how many rows are multiplied at a time, for a number of tokens and whether scales vary along k
//   multiply_add   also of two operands, element by element
//   sum            adds the lanes of a vector

constexpr int PARTS = CODES / WIDTH;
constexpr int64_t SPAN = 128 * WIDTH;  // elements along k after which sums start again, as in panels
constexpr int64_t FETCHED = 512;       // bytes ahead in each stream

// Chains of sums that do not wait for each other: with few of them, multiplications would.
constexpr int chains(int rows, int count) { return rows * count < 8 ? 2 : 1; }

template <int COUNT, bool NANS, int TOGETHER, int CHAINS>
INLINE void add_codes(Vec (*sums)[COUNT][CHAINS], const uint8_t* const* codes, int64_t k, int64_t ahead,
                      const Element* x) {
    Operand w[TOGETHER][PARTS];
#pragma GCC unroll 8
    for (int r = 0; r < TOGETHER; ++r) {
        decode_codes<NANS>(codes[r] + k, w[r]);
        __builtin_prefetch(codes[r] + k + ahead);
    }
#pragma GCC unroll 8
    for (int t = 0; t < COUNT; ++t)
#pragma GCC unroll 4
        for (int i = 0; i < PARTS; ++i) {
            Operand token = load(x + t * CODES + i * WIDTH);
#pragma GCC unroll 8
            for (int r = 0; r < TOGETHER; ++r)
                sums[r][t][i % CHAINS] = multiply_add(sums[r][t][i % CHAINS], w[r][i], token);
        }
}

// out [TOGETHER] -> [COUNT], MOST_ROWS apart: the sums of each of `rows`. Blocks along k are multiples of CODES.
template <int COUNT, bool NANS, int TOGETHER>
INLINE void dot_rows(const Problem& p, const Element* x, const int64_t* rows, float* const* out) {
    constexpr int CHAINS = chains(TOGETHER, COUNT);
    const uint8_t* codes[TOGETHER];
    uint8_t last[TOGETHER][CODES];
    const uint8_t* lasts[TOGETHER];
    const float* scales[TOGETHER];
    Vec total[TOGETHER][COUNT];
    bool vary = p.scales_vary_along_k();
    int64_t whole = p.k / CODES * CODES;
    for (int r = 0; r < TOGETHER; ++r) {
        codes[r] = p.data_row(rows[r]), scales[r] = p.scale_row(rows[r]);
        for (int t = 0; t < COUNT; ++t) total[r][t] = Vec{};
    }
    for (int64_t k = 0, block = 0, block_end = p.cols; k < p.k;) {
        Vec sums[TOGETHER][COUNT][CHAINS];
        for (int r = 0; r < TOGETHER; ++r)
            for (int t = 0; t < COUNT; ++t)
                for (int i = 0; i < CHAINS; ++i) sums[r][t][i] = Vec{};
        int64_t stop = smaller(smaller(p.k, k + SPAN), block_end);
        for (; k < smaller(stop, whole); k += CODES)
            add_codes<COUNT, NANS, TOGETHER, CHAINS>(sums, codes, k, FETCHED, x + k * COUNT);
        if (k < stop) {
            memset(last, 0, sizeof last);
            for (int r = 0; r < TOGETHER; ++r) memcpy(last[r], codes[r] + k, size_t(stop - k)), lasts[r] = last[r];
            add_codes<COUNT, NANS, TOGETHER, CHAINS>(sums, lasts, 0, 0, x + k * COUNT);
            k = stop;
        }
        for (int r = 0; r < TOGETHER; ++r) {
            float scale = vary ? scales[r][block] : 1.0f;
            for (int t = 0; t < COUNT; ++t) {
                if constexpr (CHAINS == 2) sums[r][t][0] += sums[r][t][1];
                total[r][t] += vary ? sums[r][t][0] * FACTOR * scale : sums[r][t][0];
            }
        }
        if (k == block_end) ++block, block_end += p.cols;
    }
    for (int r = 0; r < TOGETHER; ++r)
        for (int t = 0; t < COUNT; ++t) out[r][t * MOST_ROWS] = sum(total[r][t]);
}

// sums [COUNT][MOST_ROWS]. Rows that are multiplied together are far from each other: each is part of a stream of its
// own, which the processor recognizes and fetches ahead; neighbours within one page of memory it does not.
template <int COUNT, bool NANS, int TOGETHER>
NOINLINE void dot_panel(const Problem& p, const Element* x, Rows rows, float* sums) {
    int64_t stream = ceil_div(rows.count, TOGETHER);
    for (int64_t i = 0; i < stream; ++i) {
        int64_t row[TOGETHER];
        float* out[TOGETHER];
        for (int r = 0; r < TOGETHER; ++r) {
            int64_t index = smaller(r * stream + i, rows.count - 1);
            row[r] = rows.start + index, out[r] = sums + index;
        }
        dot_rows<COUNT, NANS, TOGETHER>(p, x, row, out);
    }
}

template <int COUNT> INLINE void dot_panel_of(const Problem& p, Tokens tokens, Rows rows, float* sums) {
    if constexpr (COUNT > 1)
        if (tokens.count < COUNT) return dot_panel_of<COUNT - 1>(p, tokens, rows, sums);
    const Element* x = reinterpret_cast<const Element*>(tokens.packed);
    constexpr int UNIFORM = together(COUNT, false), VARYING = together(COUNT, true);
    bool vary = p.scales_vary_along_k();
    if (p.nans && !DECODES_NANS)
        (vary ? dot_panel<COUNT, !DECODES_NANS, VARYING> : dot_panel<COUNT, !DECODES_NANS, UNIFORM>)(p, x, rows, sums);
    else (vary ? dot_panel<COUNT, false, VARYING> : dot_panel<COUNT, false, UNIFORM>)(p, x, rows, sums);
}

// Scales that many rows share multiply the tokens instead of the sums, once for all of these rows: their dots need no
// totals then. Only tokens in fp32, which are rounded as any fp32 product is.
constexpr int64_t BAND = 32;
bool scales_tokens(const Problem& p) { return sizeof(Element) == 4 && p.scales_vary_along_k() && p.rows >= BAND; }

// Packed tokens times FACTOR and the scales of one band of rows. False if some product is not a normal number: it would
// have lost bits, or overflowed where the sum does not.
bool scale_tokens(const Problem& p, const float* scales, Tokens tokens, Element* scaled) {
    const Element* x = reinterpret_cast<const Element*>(tokens.packed);
    uint32_t lost = 0;
    for (int64_t block = 0, i = 0; block < p.blocks; ++block) {
        const float scale = scales[block] * FACTOR;
        for (int64_t end = smaller(round_up(p.k, CODES), (block + 1) * p.cols) * tokens.count; i < end; ++i) {
            float product = float(x[i]) * scale;
            scaled[i] = Element(product);
            lost |= uint32_t(x[i] != 0) & uint32_t((bits_of(product) >> 23 & 0xFF) - 1 >= 254);
        }
    }
    return !lost;
}

// Fetches what the streams of `count` rows begin with, which nothing else fetches ahead.
INLINE void fetch_streams(const Problem& p, int64_t row, int64_t count) {
    for (int64_t stream = ceil_div(count, 4), i = 0; i < count; i += stream)
        for (int64_t k = 0; k < FETCHED; k += 64) __builtin_prefetch(p.data_row(row + i) + k);
}

int64_t dots_tokens(const Problem&) { return FEW; }

Plan dots_plan(const Problem& p, int64_t tokens, int threads) {
    constexpr int64_t TASK = 1 << 20;  // bytes of a task: its streams start without having been fetched
    int64_t rows = smaller(ceil_div(TASK, larger<int64_t>(p.k, 1)), ceil_div(p.n, 4 * threads));
    int64_t packed = tokens * round_up(p.k, CODES) * int64_t(sizeof(Element));
    return {1, smaller(round_up(rows, 4), MOST_ROWS), packed, scales_tokens(p) ? packed : 0};
}

// Packed: [groups of CODES][tokens][CODES].
void dots_pack(const Problem& p, Tokens tokens, int64_t first, int64_t end) {
    for (int64_t t = first; t < end; ++t)
        for (int64_t k = 0; k < p.k; k += CODES) {
            Element group[CODES] = {}, *out = reinterpret_cast<Element*>(tokens.packed) + k * tokens.count + t * CODES;
            copy(p.x_row(tokens.start + t) + k * size_of(p.x_type), p.x_type, group, smaller<int64_t>(CODES, p.k - k));
#pragma GCC unroll 64
            for (int i = 0; i < CODES; ++i) out[place(i)] = group[i];
        }
}

// Scratch: tokens times scales.
void dots_panel(const Problem& p, Tokens tokens, Rows rows, uint8_t* scratch) {
    float sums[FEW * MOST_ROWS];
    const Tokens scaled = {tokens.start, tokens.count, scratch};
    Problem unscaled = p;  // one scale for all of k, which the tokens have
    unscaled.cols = p.k;
    int64_t end = rows.start + rows.count;
    for (int64_t row = rows.start, band_end; row < end; row = band_end) {
        band_end = scales_tokens(p) ? smaller(end, (row / p.rows + 1) * p.rows) : end;
        if (band_end < end) fetch_streams(p, band_end, smaller(end - band_end, p.rows));
        bool fits = scales_tokens(p) && scale_tokens(p, p.scale_row(row), tokens, reinterpret_cast<Element*>(scratch));
        dot_panel_of<FEW>(fits ? unscaled : p, fits ? scaled : tokens, {row, band_end - row, nullptr},
                          sums + (row - rows.start));
    }
    uint8_t* out = p.out_row(tokens.start) + rows.start * size_of(p.out_type);
    finish(p, Ending(p, rows.start, rows.count), 0, sums, MOST_ROWS, tokens.count, rows.count, out);
}

const Kernel dots = {NAME, dots_tokens, dots_plan, dots_pack, dots_panel};
