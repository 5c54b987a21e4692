// light_update on NCHW maps, one plane at a time: N lanes cover a piece of a row, a strip covers all rows. A vector's
// neighbours come from the vectors beside it, so that loads do not cross cache lines and the filters meet no edge. What
// passes over a plane twice lies in accumulators between, small enough for the first cache.
// While the filters slide over a plane the memory would be idle: the next one's maps are fetched then, backward those
// that the filters meet, for the others come in one stream before.
// Strips are inlined, else what their callbacks hold would be read anew at every row, and loops over taps unrolled
// early: later, their arrays would stay in memory.

// Calls body with the lanes of a plane's vectors: half of them where a row is so short that the rest would idle.
template <class A, class Body>
void on_lanes(int64_t W, const Body& body) {
    if constexpr (kLanes<A> > 8) {
        if (W <= 8) return body(std::integral_constant<int, 8>{});
    }
    body(std::integral_constant<int, kLanes<A>>{});
}

template <class A, int N>
struct Neighbours {
    Vec<A, N> left, middle, right;
};

// The vector at column j of a row with its neighbours, zeros outside of the row.
template <class A, int N, class T>
__attribute__((always_inline)) inline Neighbours<A, N> neighbours(const T* row, int64_t j, int64_t W, int64_t room) {
    using V = Vec<A, N>;
    const V before = j > 0 ? load<A, N>(row + j - N) : V{};
    const V at = load<A, N>(row + j, W - j, room - j);
    const V after = j + N < W ? load<A, N>(row + j + N, W - j - N, room - j - N) : V{};
    return {concat<A, N, N - 1>(before, at), at, concat<A, N, 1>(at, after)};
}

// The columns from j on of o = filter_x over x + (filter_carried over carried, or factor * carried), row i's vector
// to put(i, vector); returns their sum.
template <class T, int N, Carry kCarry, class A = Acc<T>, class Put, class Fetch>
__attribute__((always_inline)) inline A forward_strip(const T* x, const T* carried, int64_t H, int64_t W, int64_t j,
                                                      const A* filter_x, const A* filter_carried, const Put& put,
                                                      const Fetch& fetch_next) {
    using V = Vec<A, N>;
    V fx[9], fc[9];
#pragma GCC unroll 9
    for (int t = 0; t < 9; ++t) {
        fx[t] = broadcast<A, N>(filter_x[t]);
        fc[t] = broadcast<A, N>(filter_carried[t]);
    }
    // Each row of the input is read once and adds to three rows of the output, held in registers.
    V above = {}, here = {}, total = {};
    for (int64_t i = 0; i < H; ++i) {
        V below = {};
        fetch_next(i * W + j);
        const auto add_row = [&](const T* map, const V* f) {
            const auto [left, middle, right] = neighbours<A, N>(map + i * W, j, W, (H - i) * W);
            below += f[0] * left + f[1] * middle + f[2] * right;
            here += f[3] * left + f[4] * middle + f[5] * right;
            above += f[6] * left + f[7] * middle + f[8] * right;
        };
        add_row(x, fx);
        if constexpr (kCarry == Carry::filtered) add_row(carried, fc);
        if constexpr (kCarry == Carry::scaled) {
            here += fc[4] * load<A, N>(carried + i * W + j, W - j, (H - i) * W - j);
        }
        if (i > 0) {
            put(i - 1, above);
            total += above;
        }
        above = here;
        here = below;
    }
    put(H - 1, above);
    return sum<A, N>(keep_lanes<A, N>(total + above, W - j));
}

template <class T, int N, Carry kCarry>
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
            const auto fetch_next = [x = a.x.at(b, c, H * W), carried = a.carried.at(b, c, H * W),
                                     o = a.o.at(b, c, H * W), out = a.out.at(b, c, H * W)](int64_t p) {
                __builtin_prefetch(x + p);
                if (kCarry != Carry::none) __builtin_prefetch(carried + p);
                if (o) __builtin_prefetch(o + p, 1);
                if (out) __builtin_prefetch(out + p, 1);
            };
            A total = 0;
            for (int64_t j = 0; j < W; j += N) {
                const auto put = [to = o.get() + j, o_pitch](int64_t i, Vec<A, N> v) {
                    store<A, N>(to + i * o_pitch, v);
                };
                total += forward_strip<T, N, kCarry>(a.x.at(b, c, 0), a.carried.at(b, c, 0), H, W, j, filter_x,
                                                     filter_carried, put, fetch_next);
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

// The columns from j on of both maps' gradients, and of the products for the filters' ones:
// products[t] = sum of x times the output's gradient shifted by tap t. grad has a row of zeros above and below.
template <class T, int N, Carry kCarry, class A = Acc<T>, class Fetch>
__attribute__((always_inline)) inline void backward_strip(const A* grad, int64_t pitch, const T* x, const T* carried,
                                                          const T* grad_out, A residual, T* grad_x, T* grad_carried,
                                                          int64_t H, int64_t W, int64_t j, const A* filter_x,
                                                          const A* filter_carried, Vec<A, N>* products,
                                                          const Fetch& fetch_next) {
    using V = Vec<A, N>;
    V fx[9], fc[9], px[9], pc[9], g[9];  // g: the gradient around a pixel, in the order of the taps it met
#pragma GCC unroll 9
    for (int t = 0; t < 9; ++t) {
        fx[t] = broadcast<A, N>(filter_x[t]);
        fc[t] = broadcast<A, N>(filter_carried[t]);
        px[t] = products[t];
        pc[t] = products[9 + t];
    }
    const auto load_row = [&](int64_t i, V* to) {
        const auto [left, middle, right] = neighbours<A, N>(grad + i * pitch, j, pitch, pitch);
        to[0] = right;
        to[1] = middle;
        to[2] = left;
    };
    load_row(-1, g + 3);
    load_row(0, g);
    for (int64_t i = 0; i < H; ++i) {
#pragma GCC unroll 3
        for (int dx = 0; dx < 3; ++dx) {
            g[6 + dx] = g[3 + dx];
            g[3 + dx] = g[dx];
        }
        load_row(i + 1, g);
        const int64_t p = i * W + j, room = (H - i) * W - j;
        fetch_next(p);
        const V at_x = load<A, N>(x + p, W - j, room);
        V of_x = load<A, N>(grad_out + p, W - j, room) + residual;
#pragma GCC unroll 9
        for (int t = 0; t < 9; ++t) {
            of_x += fx[t] * g[t];
            px[t] += at_x * g[t];
        }
        if (grad_x) store<A, N>(grad_x + p, of_x, W - j);
        if constexpr (kCarry != Carry::none) {
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
#pragma GCC unroll 9
    for (int t = 0; t < 9; ++t) {
        products[t] = px[t];
        products[9 + t] = pc[t];
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
            const auto fetch_next = [=, HW = H * W](int64_t p) {
                p += HW;
                __builtin_prefetch(x + p);
                if (grad_x) __builtin_prefetch(grad_x + p, 1);
                if (kCarry == Carry::none) return;
                __builtin_prefetch(carried + p);
                if (grad_carried) __builtin_prefetch(grad_carried + p, 1);
            };
            Vec<A, N> products[kProducts] = {};
            for (int64_t j = 0; j < W; j += N) {
                backward_strip<T, N, kCarry>(grad, pitch, x, carried, grad_out, a.residual[k], grad_x, grad_carried, H,
                                             W, j, filter_x, filter_carried, products, fetch_next);
            }
            for (int t = 0; t < kProducts; ++t) a.products[(b * kProducts + t) * C + c] = sum<A, N>(products[t]);
        }
    });
}
