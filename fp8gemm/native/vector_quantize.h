// The quantizer. This is included once per instruction set, inside its namespace, after panels.h.

// The largest finite magnitude; as integers, floats have the same order.
template <class Bits>
INLINE Bits largest_magnitude(const uint8_t* address, int64_t count, Bits infinity) {
    const Bits* x = reinterpret_cast<const Bits*>(address);
    constexpr Bits magnitude_bits = Bits(~Bits(0)) >> 1;
    Bits largest = 0;
    for (int64_t i = 0; i < count; ++i) {
        Bits magnitude = x[i] & magnitude_bits;
        magnitude = magnitude < infinity ? magnitude : Bits(0);
        largest = largest < magnitude ? magnitude : largest;
    }
    return largest;
}

// amax [blocks along k] of rows [first, last).
void amax_rows(const Quantization& q, int64_t first, int64_t last, float* amax) {
    memset(amax, 0, size_t(q.blocks()) * 4);
    for (int64_t row = first; row < last; ++row)
        for (int64_t b = 0; b < q.blocks(); ++b) {
            int64_t count = smaller(q.cols, q.k - b * q.cols);
            const uint8_t* x = q.x_row(row) + b * q.cols * size_of(q.x_type);
            float largest;
            if (q.x_type == FP32) largest = float_of(largest_magnitude<uint32_t>(x, count, 0x7F800000));
            else if (q.x_type == BF16) largest = from_bf16(largest_magnitude<uint16_t>(x, count, 0x7F80));
            else largest = from_fp16(largest_magnitude<uint16_t>(x, count, 0x7C00));
            amax[b] = larger(amax[b], largest);
        }
}

void cast_rows(const Quantization& q, int64_t first, int64_t last) {
    constexpr int64_t BUFFER = 512;
    float buffer[BUFFER];
    for (int64_t row = first; row < last; ++row)
        for (int64_t k = 0; k < q.k;) {
            int64_t end = smaller(smaller(k + BUFFER, q.k), (k / q.cols + 1) * q.cols);
            float scale = q.scale[row / q.rows * q.blocks() + k / q.cols];
            copy(q.x_row(row) + k * size_of(q.x_type), q.x_type, buffer, end - k);
            uint8_t* data = q.data + row * q.data_stride + k;
            for (int64_t i = 0; i < end - k; ++i) data[i] = to_e4m3(buffer[i], scale);
            k = end;
        }
}
