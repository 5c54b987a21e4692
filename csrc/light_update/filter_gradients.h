// The last step of light_update's backward on the CPU: from the products of its maps to the filters.

// The nine taps of kLanes channels' filters, [C, 9] as they lie.
template <class A>
inline void load_taps(const A* filters, int64_t n, Vec<A>* taps) {
    for (int t = 0; t < 9; ++t) {
        taps[t] = Vec<A>{};
        for (int64_t i = 0; i < std::min<int64_t>(n, kLanes<A>); ++i) taps[t][i] = filters[i * 9 + t];
    }
}

template <class A>
inline void store_taps(A* filters, int64_t n, const Vec<A>* taps) {
    for (int t = 0; t < 9; ++t) {
        for (int64_t i = 0; i < std::min<int64_t>(n, kLanes<A>); ++i) filters[i * 9 + t] = taps[t][i];
    }
}

// The gradients of all filters and vectors, from the products [B, 18, C].
template <class A>
void filter_gradients(const LightUpdateWeights<A>& w, const Shape& s, const A* products,
                      const LightUpdateGradients<A>& to) {
    constexpr int N = kLanes<A>;
    parallel(ceil_div(s.C, N), 40 * s.B * N, [&](int64_t begin, int64_t end) {
        for (int64_t c = begin * N; c < std::min(end * N, s.C); c += N) {
            const int64_t n = s.C - c;
            Vec<A> value[9], carry[9], of_value[9] = {}, of_carry[9] = {}, of_scale = {};
            load_taps(w.value_weight + c * 9, n, value);
            if (w.carry_weight) load_taps(w.carry_weight + c * 9, n, carry);
            const Vec<A> scale = w.carry_scale ? load<A>(w.carry_scale + c, n) : Vec<A>{};
            for (int64_t b = 0; b < s.B; ++b) {
                const A *x = products + b * kProducts * s.C + c, *carried = x + 9 * s.C;
                const Vec<A> weight = load<A>(w.attention + b * s.C + c, n);
                Vec<A> of_attention = {};
                for (int t = 0; t < 9; ++t) {
                    const Vec<A> product = load<A>(x + t * s.C, n);
                    of_attention += value[t] * product;
                    of_value[t] += weight * product;
                }
                store<A>(to.attention + b * s.C + c, of_attention, n);
                if (!w.carry_scale) continue;
                const Vec<A> centre = load<A>(carried + 4 * s.C, n);
                if (w.gate) store<A>(to.gate + b * s.C + c, scale * centre, n);
                of_scale += w.gate ? load<A>(w.gate + b * s.C + c, n) * centre : centre;
                for (int t = 0; w.carry_weight && t < 9; ++t) {
                    const Vec<A> product = load<A>(carried + t * s.C, n);
                    of_scale += carry[t] * product;
                    of_carry[t] += scale * product;
                }
            }
            store_taps(to.value_weight + c * 9, n, of_value);
            if (w.carry_scale) store<A>(to.carry_scale + c, of_scale, n);
            if (w.carry_weight) store_taps(to.carry_weight + c * 9, n, of_carry);
        }
    });
}
