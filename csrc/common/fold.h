// Writing a block's output straight from o in inference, where BatchNorm is a scale and a shift: x + scale * o + shift,
// or x + ReLU(scale * o + shift). Included inside an instruction set's namespace.

template <class A, int N = kLanes<A>>
inline Vec<A, N> folded(Vec<A, N> x, Vec<A, N> o, Vec<A, N> scale, Vec<A, N> shift, bool relu) {
    const Vec<A, N> normed = scale * o + shift;
    return x + (relu ? (normed <= 0 ? Vec<A, N>{} : normed) : normed);
}

// Pixels of channels_last maps: o [pixels, C], `pitch` apart and readable up to a whole vector beyond C; x, out and
// o_out point to the first pixel, each with a stride of its own. Adds o and out to their totals [C], where given.
template <class A, class T>
void fold_pixels(const A* o, int64_t pitch, int64_t pixels, int64_t C, const T* x, int64_t x_pitch, const A* scale,
                 const A* shift, bool relu, bool past, T* out, int64_t out_pitch, T* o_out, int64_t o_pitch,
                 A* o_totals, A* out_totals) {
    const auto add = [&](A* totals, int64_t c, Vec<A> total) {
        if (totals) store<A>(totals + c, load<A>(totals + c, C - c) + total, C - c);
    };
    for (int64_t c = 0; c < C; c += kLanes<A>) {
        const int64_t n = C - c;
        const auto a = load<A>(scale + c, n), b = load<A>(shift + c, n);
        Vec<A> o_total = {}, out_total = {};
        for (int64_t p = 0; p < pixels; ++p) {
            const auto value = load<A>(o + p * pitch + c);
            const auto sum_of = folded<A>(load<A>(x + p * x_pitch + c, n), value, a, b, relu);
            o_total += value;
            out_total += sum_of;
            if (o_out) write<0, A>(past, o_out + p * o_pitch + c, value, n);
            write<0, A>(past, out + p * out_pitch + c, sum_of, n);
        }
        add(o_totals, c, o_total);
        add(out_totals, c, out_total);
    }
}
