// A filter slid along the channels: queries and keys of layer attention. Included inside an instruction set's
// namespace.

// C numbers with zeros around them, so that a filter of K taps meets no end; readable a whole vector beyond.
template <class A>
struct PaddedRow {
    int64_t C, K;
    Scratch<A> memory;

    PaddedRow(int64_t C, int64_t K) : C(C), K(K), memory(C + K + kLanes<A>, A(0)) {}
    A* get() const { return memory.get() + K / 2; }
    void take(const A* from) const { std::copy_n(from, C, get()); }

    // The filter over the row for the channels from c on; `reversed` for the gradient. A tap that is not finite does
    // not reach the zeros around.
    Vec<A> filtered(const A* filter, bool reversed, int64_t c) const {
        Vec<A> total = {};
        for (int64_t j = 0; j < K; ++j) {
            const int64_t from = c + j - K / 2;  // the channel in the first lane
            const Vec<A> product = broadcast(filter[reversed ? K - 1 - j : j]) * load<A>(memory.get() + c + j);
            total += drop_lanes<A>(keep_lanes<A>(product, C - from), -from);
        }
        return total;
    }

    // partial [K] += the gradient of the filter, given that of its output.
    void add_filter_gradient(const PaddedRow& of_output, A* partial) const {
        const A* grad = of_output.get();
        for (int64_t j = 0; j < K; ++j) {
            Vec<A> total = {};
            for (int64_t c = 0; c < C; c += kLanes<A>) {
                // Lanes beyond C may meet what is not finite.
                total += keep_lanes<A>(load<A>(grad + c) * load<A>(memory.get() + c + j), C - c);
            }
            partial[j] += sum<A>(total);
        }
    }
};

// The sum of a [n] times b [n].
template <class A>
inline A dot(const A* a, const A* b, int64_t n) {
    Vec<A> total = {};
    for (int64_t i = 0; i < n; i += kLanes<A>) total += load<A>(a + i, n - i) * load<A>(b + i, n - i);
    return sum<A>(total);
}
