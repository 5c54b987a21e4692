// light_update on channels_last maps: vectors of channels, runs of rows. A window of three rows in accumulators, small
// enough for the second cache, moves down the run; the maps themselves are read in order, once.

// Three rows of W + 2 pixels, the first and the last of them zero; row i lies at row(i), any i >= -1.
template <class A>
struct RowWindow {
    int64_t W, pitch;  // pitch: between pixels
    Scratch<A> memory;

    RowWindow(int64_t W, int64_t pitch) : W(W), pitch(pitch), memory(3 * (W + 2) * pitch, A(0)) {}
    A* row(int64_t i) const { return memory.get() + ((i + 1) % 3 * (W + 2) + 1) * pitch; }
    void clear(int64_t i) const { std::fill_n(row(i), W * pitch, A(0)); }
};

template <class A, class T>
void fill(const RowWindow<A>& window, const Map<const T>& x, int64_t b, int64_t i, const Shape& s) {
    if (i < 0 || i >= s.H) return window.clear(i);
    for (int64_t j = 0; j < s.W; ++j) {
        const T* from = x.at(b, 0, i * s.W + j);
        A* to = window.row(i) + j * window.pitch;
        for (int64_t c = 0; c < s.C; c += kLanes<A>) {
            fetch_ahead<4>(from + c);
            store<A>(to + c, load<A>(from + c, s.C - c));
        }
    }
}

// The combined filters of a sample, [18, pitch].
template <class A, class Args>
void fill_filters(const Args& a, int64_t b, int64_t pitch, A* filters) {
    for (int t = 0; t < 9; ++t) {
        for (int64_t c = 0; c < a.shape.C; ++c) {
            filters[t * pitch + c] = x_filter(a, b, c, t);
            filters[(9 + t) * pitch + c] = carried_filter(a, b, c, t);
        }
    }
}

// Adds one row of a filter's output, for the channels from c on: o [W, pitch] += filter over rows i - 1, i, i + 1.
template <class A>
void filter_row(const RowWindow<A>& window, int64_t i, int64_t c, const A* filters, A* o) {
    const int64_t W = window.W, pitch = window.pitch;
    Vec<A> f[9];
    for (int t = 0; t < 9; ++t) f[t] = load<A>(filters + t * pitch + c);
    const A* rows[3] = {window.row(i - 1) + c, window.row(i) + c, window.row(i + 1) + c};
    // Each pixel is read once and adds to three pixels of the output, held in registers.
    Vec<A> left = {}, here = load<A>(o + c);
    for (int64_t j = 0; j < W; ++j) {
        Vec<A> right = j + 1 < W ? load<A>(o + (j + 1) * pitch + c) : Vec<A>{};
        for (int dy = 0; dy < 3; ++dy) {
            const Vec<A> v = load<A>(rows[dy] + j * pitch);
            right += f[3 * dy] * v;
            here += f[3 * dy + 1] * v;
            left += f[3 * dy + 2] * v;
        }
        if (j > 0) store<A>(o + (j - 1) * pitch + c, left);
        left = here;
        here = right;
    }
    store<A>(o + (W - 1) * pitch + c, left);
}

template <class T, Carry kCarry>
void forward_rows_of(const LightUpdateForward<T>& a) {
    using A = Acc<T>;
    constexpr int N = kLanes<A>;
    const Shape& s = a.shape;
    const RowRuns runs(s);
    const int64_t tasks = s.B * runs.count, pitch = round_up(s.C, N);
    // The second are squared deviations, or where BatchNorm is folded the sums of out.
    const Scratch<A> totals(tasks * s.C, A(0)), deviations(tasks * s.C, A(0));
    const bool past = go_past_caches(s, s.C, a.o, a.out);
    parallel(tasks, 4 * runs.rows * s.W * s.C, [&](int64_t begin, int64_t end) {
        const RowWindow<A> x(s.W, pitch), carried(kCarry == Carry::filtered ? s.W : 0, pitch);
        const Scratch<A> o(s.W * pitch), filters(18 * pitch, A(0));
        for (int64_t k = begin; k < end; ++k) {
            const auto [b, first, last] = runs.run(k);
            fill_filters(a, b, pitch, filters.get());
            RunningMoments<A> moments{&totals[k * s.C], &deviations[k * s.C]};
            for (int64_t i = first - 1; i <= last; ++i) {
                fill(x, a.x, b, i, s);
                if constexpr (kCarry == Carry::filtered) fill(carried, a.carried, b, i, s);
                const int64_t row = i - 1;  // the one whose neighbours are all there now
                if (row < first) continue;
                for (int64_t j = 0; j < s.W; ++j) {
                    const T* prior = kCarry == Carry::scaled ? a.carried.at(b, 0, row * s.W + j) : nullptr;
                    for (int64_t c = 0; c < s.C; c += N) {
                        Vec<A> value = {};
                        if constexpr (kCarry == Carry::scaled) {
                            value = load<A>(&filters[(9 + 4) * pitch + c]) * load<A>(prior + c, s.C - c);
                        }
                        store<A>(&o[j * pitch + c], value);
                    }
                }
                for (int64_t c = 0; c < s.C; c += N) {
                    filter_row(x, row, c, filters.get(), o.get());
                    if constexpr (kCarry == Carry::filtered) {
                        filter_row(carried, row, c, &filters[9 * pitch], o.get());
                    }
                }
                if (a.scale) {
                    fold_pixels<A>(o.get(), pitch, s.W, s.C, a.x.at(b, 0, row * s.W), a.x.pixel, a.scale, a.shift,
                                   false, past, a.out.at(b, 0, row * s.W), a.out.pixel,
                                   a.o ? a.o.at(b, 0, row * s.W) : nullptr, a.o.pixel, moments.total,
                                   moments.deviations);
                } else {
                    finish_pixels<A>(o.get(), pitch, s.W, s.C, past, a.o.at(b, 0, row * s.W), a.o.pixel, moments);
                }
            }
        }
    });
    if (!a.scale) return merge_runs(s, runs, totals.get(), deviations.get(), a.mean, a.var);
    add_runs(s, runs.count, s.C, totals.get(), a.mean);
    add_runs(s, runs.count, s.C, deviations.get(), a.out_mean);
    for (int64_t i = 0; i < s.B * s.C; ++i) {
        a.mean[i] /= A(s.HW());
        a.out_mean[i] /= A(s.HW());
    }
}

// One row of a map's gradient and of its products with the output's gradient, for the channels from c on. The gradient
// takes the map's place in x [W, pitch].
template <bool kFiltered, class A>
void backward_row(const RowWindow<A>& grad, int64_t i, int64_t c, const A* filters, A* x, A* products) {
    const int64_t W = grad.W, pitch = grad.pitch;
    constexpr int kFirst = kFiltered ? 0 : 4, kLast = kFiltered ? 9 : 5;
    Vec<A> f[9], sums[9], g[9];  // g: the gradient around a pixel, in the order of the taps it met
    for (int t = kFirst; t < kLast; ++t) {
        f[t] = load<A>(filters + t * pitch + c);
        sums[t] = Vec<A>{};
    }
    const A* rows[3] = {grad.row(i + 1) + c, grad.row(i) + c, grad.row(i - 1) + c};
    for (int dy = 0; dy < 3; ++dy) {
        g[3 * dy + 1] = load<A>(rows[dy] - pitch);
        g[3 * dy] = load<A>(rows[dy]);
    }
    for (int64_t j = 0; j < W; ++j) {
        for (int dy = 0; dy < 3; ++dy) {
            g[3 * dy + 2] = g[3 * dy + 1];
            g[3 * dy + 1] = g[3 * dy];
            g[3 * dy] = load<A>(rows[dy] + (j + 1) * pitch);
        }
        const Vec<A> at_x = load<A>(x + j * pitch + c);
        Vec<A> of_x = {};
        for (int t = kFirst; t < kLast; ++t) {
            of_x += f[t] * g[t];
            sums[t] += at_x * g[t];
        }
        store<A>(x + j * pitch + c, of_x);
    }
    for (int t = kFirst; t < kLast; ++t) {
        A* product = products + t * pitch + c;
        store<A>(product, load<A>(product) + sums[t]);
    }
}

// The same for all channels, between the maps and a row of accumulators: maps are read and written in order. What is
// given of the gradient, `direct` plus `constant` [C], is added; direct may be null.
template <bool kFiltered, class T, class A = Acc<T>>
void backward_row_of(const RowWindow<A>& grad, const Shape& s, int64_t b, int64_t i, const Map<const T>& x, bool past,
                     const Map<T>& grad_x, const Map<const T>& direct, const A* constant, const A* filters, A* row,
                     A* products) {
    constexpr int N = kLanes<A>;
    for (int64_t j = 0; j < s.W; ++j) {
        const T* from = x.at(b, 0, i * s.W + j);
        for (int64_t c = 0; c < s.C; c += N) {
            fetch_ahead<4>(from + c);
            store<A>(row + j * grad.pitch + c, load<A>(from + c, s.C - c));
        }
    }
    for (int64_t c = 0; c < s.C; c += N) backward_row<kFiltered>(grad, i, c, filters, row, products);
    for (int64_t j = 0; grad_x && j < s.W; ++j) {
        T* to = grad_x.at(b, 0, i * s.W + j);
        const T* more = direct ? direct.at(b, 0, i * s.W + j) : nullptr;
        for (int64_t c = 0; c < s.C; c += N) {
            Vec<A> g = load<A>(row + j * grad.pitch + c);
            if (more) g += load<A>(more + c, s.C - c) + load<A>(constant + c, s.C - c);
            write<0, A>(past, to + c, g, s.C - c);
        }
    }
}

// The gradient of o at one pixel -> to [C], written in whole vectors.
template <class T, class A = Acc<T>>
void output_gradient(const LightUpdateBackward<T>& a, int64_t b, int64_t p, A* to) {
    const int64_t C = a.shape.C;
    const T *grad_out = a.grad_out.at(b, 0, p), *grad_o = a.grad_o ? a.grad_o.at(b, 0, p) : nullptr;
    const T* o = a.o.at(b, 0, p);
    const A *factor = a.factor ? a.factor + b * C : nullptr, *offset = a.offset + b * C;
    for (int64_t c = 0; c < C; c += kLanes<A>) {
        const int64_t n = C - c;
        fetch_ahead<4>(grad_out + c);
        fetch_ahead<4>(o + c);
        Vec<A> g = load<A>(a.slope + c, n) * (load<A>(o + c, n) - load<A>(a.mean + c, n)) + load<A>(offset + c, n);
        if (factor) g += load<A>(factor + c, n) * load<A>(grad_out + c, n);
        if (grad_o) {
            fetch_ahead<4>(grad_o + c);
            g += load<A>(grad_o + c, n);
        }
        store<A>(to + c, g);
    }
}

template <class T, Carry kCarry>
void backward_rows_of(const LightUpdateBackward<T>& a) {
    using A = Acc<T>;
    const Shape& s = a.shape;
    const RowRuns runs(s);
    const int64_t tasks = s.B * runs.count, pitch = round_up(s.C, kLanes<A>);
    const Scratch<A> partials(tasks * kProducts * s.C);
    const bool past = go_past_caches(s, s.C, a.grad_x, a.grad_carried);
    parallel(tasks, 8 * runs.rows * s.W * s.C, [&](int64_t begin, int64_t end) {
        const RowWindow<A> grad(s.W, pitch);
        const Scratch<A> filters(18 * pitch, A(0)), products(kProducts * pitch), buffer(s.W * pitch);
        for (int64_t k = begin; k < end; ++k) {
            const auto [b, first, last] = runs.run(k);
            fill_filters(a, b, pitch, filters.get());
            std::fill_n(products.get(), kProducts * pitch, A(0));
            for (int64_t i = first - 1; i <= last; ++i) {
                if (i < 0 || i >= s.H) grad.clear(i);
                for (int64_t j = 0; i >= 0 && i < s.H && j < s.W; ++j) {
                    const int64_t p = i * s.W + j;
                    output_gradient(a, b, p, grad.row(i) + j * pitch);
                }
                const int64_t row = i - 1;  // the one whose neighbours are all there now
                if (row < first) continue;
                backward_row_of<true, T>(grad, s, b, row, a.x, past, a.grad_x, a.grad_out, a.residual + b * s.C,
                                         filters.get(), buffer.get(), products.get());
                if constexpr (kCarry != Carry::none) {
                    backward_row_of<kCarry == Carry::filtered, T>(grad, s, b, row, a.carried, past, a.grad_carried, {},
                                                                  static_cast<const A*>(nullptr), &filters[9 * pitch],
                                                                  buffer.get(), &products[9 * pitch]);
                }
            }
            for (int t = 0; t < kProducts; ++t) {
                std::copy_n(&products[t * pitch], s.C, &partials[(k * kProducts + t) * s.C]);
            }
        }
    });
    add_runs(s, runs.count, kProducts * s.C, partials.get(), a.products);
}
