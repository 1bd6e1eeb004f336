// Products of many tokens. This is included once per instruction set, inside its namespace, after strips.h. The
// namespace defines:
//
//   decode_strip         64 codes of each of ROWS rows, `stride` apart -> a decoded weight [64 / GRAIN][ROWS][GRAIN]
//   DECODES_NANS         whether it decodes NaN without being told
//   PANEL                the most rows of a panel
//   RESTART              elements along k after which sums start from zero
//   block_tokens         how many tokens are multiplied while a weight is decoded once
//   in_place             whether they are multiplied where they lie, instead of being packed
//   pack, pack_unit      packs units of so many tokens
//   room_for, packed_stride
//                        for how many tokens there must be room; elements of each in a chunk that is packed
//   multiply_strip       multiplies some decoded rows by all tokens
//
// A panel of the weight is decoded strip by strip, a chunk of codes of ROWS rows at a time, to the order in which they
// are multiplied, tile by tile. What is complete is stored to out at once. While a strip is multiplied, the codes of
// the next one are fetched, and a share of the next chunk of the tokens if they are too large to stay in the cache.
// The constants were measured with AVX2 on AMD Zen 3, with AVX512_BF16 on AMD Zen 4, with AVX-512 on Intel Emerald
// Rapids, with AMX on Intel Granite Rapids.

// Panels are smaller where there would be too few for all threads.
Plan plan(const Problem& p, int64_t tokens, int threads) {
    int64_t rows = smaller(PANEL, round_up(ceil_div(p.n, 8 * threads), ROWS));
    int64_t factors = p.scales_vary_along_k() ? PANEL * (CHUNK / smaller(p.cols, CHUNK) + 2) : 0;
    int64_t scratch = CHUNK * ROWS * int64_t(sizeof(Element)) + (room_for(tokens) * PANEL + factors) * 4;
    int64_t packed = in_place(p) ? 0 : room_for(tokens) * chunks(p) * packed_stride(p) * int64_t(sizeof(Element));
    return {pack_unit(tokens), rows, packed, scratch};
}

// Decodes `count` codes of `rows` rows, followed by zeros up to a multiple of 64 codes and of ROWS rows.
INLINE void decode(const uint8_t* codes, int64_t stride, int64_t rows, int64_t count, bool nans, Element* out) {
    alignas(64) uint8_t padded[ROWS * 64];
    for (int64_t k = 0; k < count; k += 64, out += 64 * ROWS) {
        const uint8_t* from = codes + k;
        int64_t from_stride = stride;
        if (rows < ROWS || count - k < 64) {
            memset(padded, 0, sizeof padded);
            for (int64_t r = 0; r < smaller<int64_t>(rows, ROWS); ++r)
                memcpy(padded + r * 64, from + r * stride, size_t(smaller<int64_t>(64, count - k)));
            from = padded, from_stride = 64;
        }
        nans && !DECODES_NANS ? decode_strip<!DECODES_NANS>(from, from_stride, out)
                              : decode_strip<false>(from, from_stride, out);
    }
}

// The segments of `count` elements from `chunk` on; returns their end. There is one if there are no elements.
INLINE Segment* cut(const Problem& p, int64_t chunk, int64_t count, Segment* segment) {
    int64_t first = chunk / p.cols, block = first, k = 0;
    do {
        int64_t stop = smaller(count, k / RESTART * RESTART + RESTART);
        int32_t factor = int32_t(block - first);
        if (p.scales_vary_along_k() && (block + 1) * p.cols - chunk <= stop) stop = ++block * p.cols - chunk;
        *segment++ = {int32_t(ceil_div(stop - k, GRAIN)), factor};
        k = stop;
    } while (k < count);
    return segment;
}

// While the strip from `row` on is multiplied: its share of the tokens' next chunk, which is the first one if another
// panel follows.
INLINE Ahead tokens_ahead(const Problem& p, Tokens tokens, Rows rows, int64_t row, int64_t following) {
    constexpr int64_t CACHED = 1 << 19;  // bytes: half of a large L2 cache
    const int64_t width = packed_stride(p) * int64_t(sizeof(Element));
    bool more = following < p.k, large = tokens.count * chunks(p) * width > CACHED;
    if (in_place(p) || !large || !(more || rows.next)) return {nullptr, 0, 0};
    int64_t share = ceil_div(tokens.count, ceil_div(rows.count, ROWS));
    int64_t first = smaller(tokens.count, row / ROWS * share), count = smaller(share, tokens.count - first);
    int64_t before = (more ? following / chunk_size(p) : 0) * room_for(tokens.count) + first;
    const uint8_t* start = tokens.packed + before * width;
    return {start, width, width, count * ceil_div(width, 64)};
}

// While the strip at `codes` is multiplied: the next strip, of this chunk, of the next one, or of another panel.
INLINE Ahead codes_ahead(const Problem& p, Rows rows, int64_t row, int64_t chunk, int64_t count, int64_t following) {
    Ahead next = {p.data_row(rows.start + row + ROWS) + chunk, p.data_stride, count};
    if (row + ROWS >= rows.count) {
        bool more = following < p.k;
        next.row = more ? p.data_row(rows.start) + following : rows.next;
        next.width = smaller(chunk_size(p), more ? p.k - following : p.k);
    }
    if (next.row) next.left = ceil_div(next.width, 64) * ROWS;
    return next;
}

// Scratch: a decoded strip, sums [strips][tokens][ROWS], factors [blocks of a chunk][PANEL].
void panel(const Problem& p, Tokens tokens, Rows rows, uint8_t* scratch) {
    Element* w = reinterpret_cast<Element*>(scratch);
    float *sums = reinterpret_cast<float*>(w + CHUNK * ROWS), *factors = sums + room_for(tokens.count) * PANEL;
    const Ending ending(p, rows.start, rows.count);
    bool vary = p.scales_vary_along_k();
    Segment segments[CHUNK / GRAIN + CHUNK / RESTART];
    int64_t size = chunk_size(p);
    for (int64_t chunk = 0, following; chunk < larger<int64_t>(p.k, 1); chunk = following) {
        int64_t count = smaller(size, p.k - chunk), block = chunk / p.cols;
        following = chunk + size;
        const Segment* end = cut(p, chunk, count, segments);
        for (int64_t r = 0; vary && r < rows.count; ++r) {
            const float* scales = p.scale_row(rows.start + r);
            for (int64_t b = block; b * p.cols < chunk + count; ++b) factors[(b - block) * PANEL + r] = scales[b];
        }
        for (int64_t row = 0; row < rows.count; row += ROWS) {
            int64_t first = rows.start + row, here = smaller<int64_t>(rows.count - row, ROWS);
            decode(p.data_row(first) + chunk, p.data_stride, here, count, p.nans, w);
            uint8_t* out = following < p.k ? nullptr : p.out_row(tokens.start) + first * size_of(p.out_type);
            const float* scales = vary ? factors + row : nullptr;
            // Sums that are not kept until the next chunk all have the same, cached place.
            float* strip_sums = size < p.k ? sums + row * room_for(tokens.count) : sums;
            Strip strip = {w, segments, end, scales, strip_sums, row, here, chunk == 0, out};
            multiply_strip(p, tokens, chunk, strip, ending, {codes_ahead(p, rows, row, chunk, count, following),
                                                             tokens_ahead(p, tokens, rows, row, following)});
        }
    }
}

const Kernel panels = {NAME, block_tokens, plan, pack, panel};
