// Rows of a weight, decoded. This is included once per instruction set, inside its namespace, after panels.h, and needs
// decode_in_order: IN_ORDER codes -> vectors of their values.

// IN_ORDER codes, of which `count` exist; the others are zeros.
INLINE void decode_some(const uint8_t* codes, int64_t count, Vec* out) {
    if (count >= IN_ORDER) return decode_in_order(codes, out);
    uint8_t last[IN_ORDER] = {};
    memcpy(last, codes, size_t(count));
    decode_in_order(last, out);
}

void look_up_rows(const Lookup& l, int64_t first, int64_t last) {
    int64_t blocks = ceil_div(larger<int64_t>(l.k, 1), l.cols);
    for (int64_t i = first; i < last; ++i) {
        int64_t row = l.ids ? l.ids[i] : i;
        const uint8_t* codes = l.data + row * l.data_stride;
        uint8_t* out = l.out + i * l.k * size_of(l.out_type);
        for (int64_t k = 0; k < l.k;) {
            int64_t end = smaller(l.k, (k / l.cols + 1) * l.cols);
            float scale = l.scale[row / l.rows * blocks + k / l.cols];
            for (; k < end; k += IN_ORDER) {
                Vec w[IN_ORDER / LANES];
                float values[IN_ORDER];
                int64_t count = smaller<int64_t>(end - k, IN_ORDER);
                decode_some(codes + k, count, w);
                for (int j = 0; j < IN_ORDER / LANES; ++j) w[j] *= scale;
                memcpy(values, w, sizeof values);
                if (l.out_type == FP32) memcpy(out + k * 4, values, size_t(count) * 4);
                else if (l.out_type == BF16 && count == IN_ORDER)
                    for (int64_t j = 0; j < IN_ORDER; ++j) reinterpret_cast<uint16_t*>(out)[k + j] = to_bf16(values[j]);
                else
                    for (int64_t j = 0; j < count; ++j) store_number(out, k + j, l.out_type, values[j]);
            }
            k = end;
        }
    }
}
