// The mean and variance of a map over H, W. The deviations are summed in a pass of their own over what still lies in
// the cache: no sum of squares, so nothing cancels. Included inside an instruction set's namespace.

// The sum of n numbers.
template <class T, class A = Acc<T>>
A plane_sum(const T* from, int64_t n) {
    LongSum<A> total;
    Cut<kLanes<A>>(n).each([&](int64_t i, int64_t some) DLA_INLINE {
        fetch_ahead_to_keep<1>(from + i);
        total.add(load<A>(from + i, some));
    });
    return total.total();
}

// The sum of (v - mean)^2 over n numbers.
template <class T, class A = Acc<T>>
A squared_deviations(const T* from, int64_t n, A mean) {
    LongSum<A> total;
    Cut<kLanes<A>>(n).each([&](int64_t i, int64_t some) DLA_INLINE {
        const Vec<A> centred = keep_lanes<A>(load<A>(from + i, some) - mean, some);
        total.add(centred * centred);
    });
    return total.total();
}

// Mean and squared deviations of channels_last pixels, gathered group by group (Chan's formula).
template <class A>
struct RunningMoments {
    A *total, *deviations;  // [C] each, zero at first
    int64_t count = 0;

    // Adds a group of `pixels` whose sum and squared deviations from its own mean are given.
    void add(int64_t c, int64_t n, int64_t pixels, Vec<A> group_total, Vec<A> group_deviations) const {
        const Vec<A> before = load<A>(total + c, n);
        Vec<A> between = {};
        if (count > 0) {
            const Vec<A> apart = group_total / A(pixels) - before / A(count);
            between = apart * apart * (A(count) * A(pixels) / A(count + pixels));
        }
        store<A>(deviations + c, load<A>(deviations + c, n) + group_deviations + between, n);
        store<A>(total + c, before + group_total, n);
    }
};

// o [pixels, C], `pitch` apart and readable up to a whole vector beyond C -> out, and the group joins `moments`.
template <class A, class T>
void finish_pixels(const A* o, int64_t pitch, int64_t pixels, int64_t C, bool past, T* out, int64_t out_pitch,
                   RunningMoments<A>& moments) {
    constexpr int N = kLanes<A>;
    for (int64_t c = 0; c < C; c += N) {
        Vec<A> total = {}, deviations = {};
        for (int64_t p = 0; p < pixels; ++p) total += load<A>(o + p * pitch + c);
        const Vec<A> mean = total / A(pixels);
        for (int64_t p = 0; p < pixels; ++p) {
            const Vec<A> value = load<A>(o + p * pitch + c);
            const Vec<A> centred = value - mean;
            deviations += centred * centred;
            write<0, A>(past, out + p * out_pitch + c, value, C - c);
        }
        moments.add(c, C - c, pixels, total, deviations);
    }
    moments.count += pixels;
}

// The moments of `runs` runs of rows, [B, runs, C] sums and squared deviations -> mean and variance [B, C].
template <class A>
void merge_runs(const Shape& s, const RowRuns& runs, const A* totals, const A* deviations, A* mean, A* var) {
    constexpr int N = kLanes<A>;
    for (int64_t i = 0; i < s.B * s.C; ++i) mean[i] = var[i] = 0;
    for (int64_t b = 0; b < s.B; ++b) {
        RunningMoments<A> moments{mean + b * s.C, var + b * s.C};
        for (int64_t k = 0; k < runs.count; ++k) {
            const int64_t pixels = (std::min(s.H, (k + 1) * runs.rows) - k * runs.rows) * s.W;
            const int64_t i = (b * runs.count + k) * s.C;
            for (int64_t c = 0; c < s.C; c += N) {
                const int64_t n = s.C - c;
                moments.add(c, n, pixels, load<A>(totals + i + c, n), load<A>(deviations + i + c, n));
            }
            moments.count += pixels;
        }
    }
    for (int64_t i = 0; i < s.B * s.C; ++i) {
        mean[i] /= A(s.HW());
        var[i] /= A(s.HW());
    }
}
