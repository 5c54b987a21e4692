// light_update on NCHW maps, one plane at a time and row by row, so that every map is one stream. A vector's neighbours
// come from the vectors beside it: no load crosses cache lines, and the filters meet no edge. What passes over a plane
// twice lies in accumulators between, small enough for the first two caches.
// Bands are inlined, else what their callbacks hold would be read anew at every row, and loops over taps and vectors
// unrolled early: later, their arrays would stay in memory.

// Calls body with the lanes of a plane's vectors, half of them where a row is so short that the rest would idle, and
// with how many vectors of a row go side by side.
template <class A, class Body>
void on_width(int64_t W, const Body& body) {
    constexpr std::integral_constant<int, kLanes<A>> lanes{};
    if constexpr (lanes() > 8) {
        if (W <= 8) return body(std::integral_constant<int, 8>{}, std::integral_constant<int, 1>{});
    }
    if (W <= lanes()) return body(lanes, std::integral_constant<int, 1>{});
    if (W <= 2 * lanes()) return body(lanes, std::integral_constant<int, 2>{});
    body(lanes, std::integral_constant<int, 4>{});
}

// K vectors of a row from column j on, and what lies beside them; zeros outside of the row. A map is fetched ahead.
template <class A, int N, int K>
struct Band {
    Vec<A, N> vectors[K + 2];

    template <class T>
    __attribute__((always_inline)) inline Band(const T* row, int64_t j, int64_t W, int64_t room, bool of_map) {
        vectors[0] = j > 0 ? load<A, N>(row + j - N) : Vec<A, N>{};
#pragma GCC unroll 8
        for (int k = 0; k <= K; ++k) {
            const int64_t from = j + k * N;
            if (of_map && k < K) fetch_ahead(row + from);
            vectors[k + 1] = from < W ? load<A, N>(row + from, W - from, room - from) : Vec<A, N>{};
        }
    }

    Vec<A, N> left(int k) const { return concat<A, N, N - 1>(vectors[k], vectors[k + 1]); }
    Vec<A, N> middle(int k) const { return vectors[k + 1]; }
    Vec<A, N> right(int k) const { return concat<A, N, 1>(vectors[k + 1], vectors[k + 2]); }
};

// The K vectors from column j on of o = filter_x over x + (filter_carried over carried, or factor * carried), each to
// put(i, j, vector); returns their sum.
template <class T, int N, int K, Carry kCarry, class A = Acc<T>, class Put>
__attribute__((always_inline)) inline A forward_band(const T* x, const T* carried, int64_t H, int64_t W, int64_t j,
                                                     const A* filter_x, const A* filter_carried, const Put& put) {
    using V = Vec<A, N>;
    V fx[9], fc[9];
#pragma GCC unroll 9
    for (int t = 0; t < 9; ++t) {
        fx[t] = broadcast<A, N>(filter_x[t]);
        fc[t] = broadcast<A, N>(filter_carried[t]);
    }
    // Each row of the input is read once and adds to three rows of the output, held in registers.
    V above[K] = {}, here[K] = {}, total = {};
    const auto finish_row = [&](int64_t i) {
#pragma GCC unroll 8
        for (int k = 0; k < K; ++k) {
            if (j + k * N >= W) break;
            put(i, j + k * N, above[k]);
            total += keep_lanes<A, N>(above[k], W - j - k * N);
        }
    };
    for (int64_t i = 0; i < H; ++i) {
        V below[K] = {};
        const auto add_row = [&](const T* map, const V* f) {
            const Band<A, N, K> row(map + i * W, j, W, (H - i) * W, true);
#pragma GCC unroll 8
            for (int k = 0; k < K; ++k) {
                const V left = row.left(k), middle = row.middle(k), right = row.right(k);
                below[k] += f[0] * left + f[1] * middle + f[2] * right;
                here[k] += f[3] * left + f[4] * middle + f[5] * right;
                above[k] += f[6] * left + f[7] * middle + f[8] * right;
            }
        };
        add_row(x, fx);
        if constexpr (kCarry == Carry::filtered) add_row(carried, fc);
        if constexpr (kCarry == Carry::scaled) {
            const Band<A, N, K> row(carried + i * W, j, W, (H - i) * W, true);
#pragma GCC unroll 8
            for (int k = 0; k < K; ++k) here[k] += fc[4] * row.middle(k);
        }
        if (i > 0) finish_row(i - 1);
#pragma GCC unroll 8
        for (int k = 0; k < K; ++k) {
            above[k] = here[k];
            here[k] = below[k];
        }
    }
    finish_row(H - 1);
    return sum<A, N>(total);
}

template <class T, int N, int K, Carry kCarry>
void forward_planes_of(const LightUpdateForward<T>& a) {
    using A = Acc<T>;
    const auto [B, C, H, W] = a.shape;
    const int64_t o_pitch = round_up(W, N);
    parallel(B * C, 4 * H * W, [&, C = C, H = H, W = W](int64_t begin, int64_t end) {
        const Scratch<A> o(H * o_pitch);
        for (int64_t i = begin; i < end; ++i) {
            const int64_t b = i / C, c = i % C;
            A filter_x[9], filter_carried[9];
            for (int t = 0; t < 9; ++t) {
                filter_x[t] = x_filter(a, b, c, t);
                filter_carried[t] = carried_filter(a, b, c, t);
            }
            const auto put = [to = o.get(), o_pitch](int64_t i, int64_t j, Vec<A, N> v) {
                store<A, N>(to + i * o_pitch + j, v);
            };
            A total = 0;
            for (int64_t j = 0; j < W; j += K * N) {
                total += forward_band<T, N, K, kCarry>(a.x.at(b, c, 0), a.carried.at(b, c, 0), H, W, j, filter_x,
                                                       filter_carried, put);
            }
            if (a.scale) {
                a.mean[i] = total / A(H * W);
                a.out_mean[i] = fold_plane<A, N>(o.get(), o_pitch, H, W, a.x.at(b, c, 0), a.scale[c], a.shift[c], false,
                                                 a.out.at(b, c, 0), a.o ? a.o.at(b, c, 0) : nullptr) /
                                A(H * W);
            } else {
                finish_plane<A, N>(o.get(), o_pitch, H, W, total, a.o.at(b, c, 0), a.mean[i], a.var[i]);
            }
        }
    });
}

// Both maps' gradients, and the products for the filters' ones: products[t] = sum of x times the output's gradient
// shifted by tap t. grad has a row of zeros above and below.
template <class T, int N, Carry kCarry, class A = Acc<T>>
void backward_plane(const A* grad, int64_t pitch, const T* x, const T* carried, const T* grad_out, A residual,
                    T* grad_x, T* grad_carried, int64_t H, int64_t W, const A* filter_x, const A* filter_carried,
                    A* products) {
    using V = Vec<A, N>;
    V fx[9], fc[9], px[9] = {}, pc[9] = {};
#pragma GCC unroll 9
    for (int t = 0; t < 9; ++t) {
        fx[t] = broadcast<A, N>(filter_x[t]);
        fc[t] = broadcast<A, N>(filter_carried[t]);
    }
    for (int64_t i = 0; i < H; ++i) {
        for (int64_t j = 0; j < W; j += N) {
            V g[9];  // the gradient around a pixel, in the order of the taps it met
#pragma GCC unroll 3
            for (int dy = 0; dy < 3; ++dy) {
                const Band<A, N, 1> row(grad + (i + 1 - dy) * pitch, j, pitch, pitch, false);
                g[3 * dy] = row.right(0);
                g[3 * dy + 1] = row.middle(0);
                g[3 * dy + 2] = row.left(0);
            }
            const int64_t p = i * W + j, room = (H - i) * W - j;
            fetch_ahead(x + p);
            if (grad_x) fetch_ahead_to_write(grad_x + p);
            const V at_x = load<A, N>(x + p, W - j, room);
            V of_x = load<A, N>(grad_out + p, W - j, room) + residual;
#pragma GCC unroll 9
            for (int t = 0; t < 9; ++t) {
                of_x += fx[t] * g[t];
                px[t] += at_x * g[t];
            }
            if (grad_x) store<A, N>(grad_x + p, of_x, W - j);
            if constexpr (kCarry != Carry::none) {
                fetch_ahead(carried + p);
                if (grad_carried) fetch_ahead_to_write(grad_carried + p);
                const V at_carried = load<A, N>(carried + p, W - j, room);
                V of_carried = fc[4] * g[4];
                pc[4] += at_carried * g[4];
#pragma GCC unroll 9
                for (int t = 0; kCarry == Carry::filtered && t < 9; ++t) {
                    if (t == 4) continue;
                    of_carried += fc[t] * g[t];
                    pc[t] += at_carried * g[t];
                }
                if (grad_carried) store<A, N>(grad_carried + p, of_carried, W - j);
            }
        }
    }
#pragma GCC unroll 9
    for (int t = 0; t < 9; ++t) {
        products[t] = sum<A, N>(px[t]);
        products[9 + t] = sum<A, N>(pc[t]);
    }
}

template <class T, int N, Carry kCarry>
void backward_planes_of(const LightUpdateBackward<T>& a) {
    using A = Acc<T>;
    const auto [B, C, H, W] = a.shape;
    const int64_t pitch = round_up(W, N);
    parallel(B * C, 8 * H * W, [&, C = C, H = H, W = W](int64_t begin, int64_t end) {
        const Scratch<A> memory((H + 2) * pitch, A(0));
        A* grad = memory.get() + pitch;
        for (int64_t k = begin; k < end; ++k) {
            const int64_t b = k / C, c = k % C;
            const T *grad_out = a.grad_out.at(b, c, 0), *grad_o = a.grad_o ? a.grad_o.at(b, c, 0) : nullptr;
            const T* o = a.o.at(b, c, 0);
            const A factor = a.factor[k], slope = a.slope[c], mean = a.mean[c], offset = a.offset[k];
            for (int64_t i = 0; i < H; ++i) {
                for (int64_t j = 0; j < W; j += N) {
                    const int64_t p = i * W + j, room = (H - i) * W - j;
                    fetch_ahead(grad_out + p);
                    fetch_ahead(o + p);
                    Vec<A, N> g = factor * load<A, N>(grad_out + p, W - j, room) +
                                  slope * (load<A, N>(o + p, W - j, room) - mean) + offset;
                    if (grad_o) g += load<A, N>(grad_o + p, W - j, room);
                    store<A, N>(&grad[i * pitch + j], keep_lanes<A, N>(g, W - j));
                }
            }
            A filter_x[9], filter_carried[9];
            for (int t = 0; t < 9; ++t) {
                filter_x[t] = x_filter(a, b, c, t);
                filter_carried[t] = carried_filter(a, b, c, t);
            }
            const T *x = a.x.at(b, c, 0), *carried = a.carried ? a.carried.at(b, c, 0) : nullptr;
            T* grad_x = a.grad_x ? a.grad_x.at(b, c, 0) : nullptr;
            T* grad_carried = a.grad_carried ? a.grad_carried.at(b, c, 0) : nullptr;
            A products[kProducts];
            backward_plane<T, N, kCarry>(grad, pitch, x, carried, grad_out, a.residual[k], grad_x, grad_carried, H, W,
                                         filter_x, filter_carried, products);
            for (int t = 0; t < kProducts; ++t) a.products[(b * kProducts + t) * C + c] = products[t];
        }
    });
}
