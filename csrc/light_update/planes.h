// light_update on NCHW maps, plane by plane and row by row, so that every map is one stream, fetched ahead.
#include "common/conv3x3.h"

// The vectors of a row that a filter holds in registers. Its backward has nine sums beside nine taps: with four vectors
// some would lie on the stack, which costs more than rows read from the first cache.
constexpr int kForwardVectors = 4, kBackwardVectors = 2;

template <class A, int N>
DLA_INLINE inline void broadcast_taps(const A* filter, Vec<A, N>* taps) {
#pragma GCC unroll 9
    for (int t = 0; t < 9; ++t) taps[t] = broadcast<A, N>(filter[t]);
}

// filter_x over x, plus filter_carried over carried, which is its tap in the middle alone where the carry is scaled:
// calls put(p, n, v) with the n pixels from p on, in order. zeros [W]; K as on_width says; kStreams is how many maps
// are read and written. A map that is not carried is not read. put may write over x where there is room to keep two of
// its rows, kept [2, W].
template <class T, int N, int K, Carry kCarry, int kStreams, class A = Acc<T>, class Put>
DLA_INLINE inline void filter_plane(const T* x, const T* carried, int64_t H, int64_t W, const A* filter_x,
                                    const A* filter_carried, const T* zeros, T* kept, const Put& put) {
    Vec<A, N> fx[9], fc[9];
    broadcast_taps<A, N>(filter_x, fx);
    if constexpr (kCarry != Carry::none) broadcast_taps<A, N>(filter_carried, fc);
    const Cut<N> cut(W);
    const auto add_scaled = [&](Columns<A, N>& columns, const T* from, int64_t n) DLA_INLINE {
        if constexpr (kCarry == Carry::scaled) {
            fetch_ahead<kStreams>(from);
            columns.middle += fc[4] * load<A, N>(from, n);
        }
    };
    if constexpr (K > 0) {
        Window<A, N, K> of_x, of_carried;
        const auto move = [&](int64_t i) DLA_INLINE {
#pragma GCC unroll 4
            for (int k = 0; k < K; ++k) {
                fetch_ahead<kStreams>(x + i * W + k * N);
                if constexpr (kCarry == Carry::filtered) fetch_ahead<kStreams>(carried + i * W + k * N);
            }
            const auto row_of = [&](const T* map) DLA_INLINE {
                return [=](int64_t j, int64_t n)
                           DLA_INLINE { return i < H ? load_once<A, N>(map + i * W + j, n) : Vec<A, N>{}; };
            };
            of_x.move(cut, row_of(x));
            if constexpr (kCarry == Carry::filtered) of_carried.move(cut, row_of(carried));
        };
        move(0);
        for (int64_t i = 0; i < H; ++i) {
            move(i + 1);
            if constexpr (kCarry == Carry::filtered && K > 2) {
                // Two filters do not fit in registers beside two windows of four vectors. Whole vectors on the stack,
                // read at every row, keep memory from being read ahead; one number for each tap does not.
                broadcast_taps<A, N>(read_anew(filter_x), fx);
                broadcast_taps<A, N>(read_anew(filter_carried), fc);
            }
            Columns<A, N> columns[K];
#pragma GCC unroll 4
            for (int k = 0; k < K; ++k) {
                of_x.add_to(columns[k], fx, k);
                if constexpr (kCarry == Carry::filtered) of_carried.add_to(columns[k], fc, k);
                add_scaled(columns[k], carried + i * W + k * N, cut.template size<K>(k));
            }
            slide_row<A, N, K>(cut, columns,
                               [&](int64_t j, int64_t n, Vec<A, N> v) DLA_INLINE { put(i * W + j, n, v); });
        }
    } else {
        for (int64_t i = 0; i < H; ++i) {
            RowsAround<T> of_x(x, i, H, W, zeros);
            const RowsAround<T> of_carried(carried, i, H, W, zeros);
            if (kept) {
                if (i > 0) of_x.above = kept + (i - 1) % 2 * W;
                std::memcpy(static_cast<void*>(kept + i % 2 * W), of_x.here, W * sizeof(T));
            }
            const auto columns_at = [&](int64_t j, int64_t n) DLA_INLINE {
                Columns<A, N> columns;
                fetch_ahead<kStreams>(of_x.here + j);
                of_x.add_to(columns, fx, j, n);
                if constexpr (kCarry == Carry::filtered) {
                    fetch_ahead<kStreams>(of_carried.here + j);
                    of_carried.add_to(columns, fc, j, n);
                }
                add_scaled(columns, of_carried.here + j, n);
                return columns;
            };
            slide_row<A, N>(cut, columns_at,
                            [&](int64_t j, int64_t n, Vec<A, N> v) DLA_INLINE { put(i * W + j, n, v); });
        }
    }
}

template <class T, int N, int K, Carry kCarry>
void forward_planes_of(const LightUpdateForward<T>& a) {
    using A = Acc<T>;
    using V = Vec<A, N>;
    const int64_t C = a.shape.C, H = a.shape.H, W = a.shape.W;
    const bool over_x = a.out.data == a.x.data;  // what it writes then lies in the cache
    const bool past = !over_x && go_past_caches(a.shape, W, a.o, a.out);
    parallel(a.shape.B * C, 4 * H * W, [&, C, H, W](int64_t begin, int64_t end) {
        const Scratch<T> zeros(W, T(0)), kept(past ? H * W : 0), kept_rows(over_x ? 2 * W : 0);
        for (int64_t k = begin; k < end; ++k) {
            const int64_t b = k / C, c = k % C;
            A filter_x[9], filter_carried[9];
            for (int t = 0; t < 9; ++t) {
                filter_x[t] = x_filter(a, b, c, t);
                filter_carried[t] = carried_filter(a, b, c, t);
            }
            const T *x = a.x.at(b, c, 0), *carried = kCarry == Carry::none ? x : a.carried.at(b, c, 0);
            T *o = a.o ? a.o.at(b, c, 0) : nullptr, *out = a.out ? a.out.at(b, c, 0) : nullptr;
            constexpr int kRead = kCarry == Carry::none ? 1 : 2;
            const auto filter = [&](auto written, const auto& put) DLA_INLINE {
                filter_plane<T, N, K, kCarry, kRead + written()>(x, carried, H, W, filter_x, filter_carried,
                                                                 zeros.get(), over_x ? kept_rows.get() : nullptr, put);
            };
            V total = {}, out_total = {};
            if (out) {
                const V scale = broadcast<A, N>(a.scale[c]), shift = broadcast<A, N>(a.shift[c]);
                filter(std::integral_constant<int, 2>{}, [&](int64_t p, int64_t n, V v) DLA_INLINE {
                    const V sum_of = folded<A, N>(load<A, N>(x + p, n), v, scale, shift, false);
                    write<kRead + 2, A, N>(past, out + p, sum_of, n);
                    if (o) write<kRead + 2, A, N>(past, o + p, v, n);
                    total += keep_lanes<A, N>(v, n);
                    out_total += keep_lanes<A, N>(sum_of, n);
                });
                a.out_mean[k] = sum<A, N>(out_total) / A(H * W);
                a.mean[k] = sum<A, N>(total) / A(H * W);
            } else {
                T* again = past ? kept.get() : o;
                filter(std::integral_constant<int, 1>{}, [&](int64_t p, int64_t n, V v) DLA_INLINE {
                    if (past) store<A, N>(again + p, v, n);
                    write<kRead + 1, A, N>(past, o + p, v, n);
                    total += keep_lanes<A, N>(v, n);
                });
                a.mean[k] = sum<A, N>(total) / A(H * W);
                a.var[k] = squared_deviations(again, H * W, a.mean[k]) / A(H * W);
            }
        }
    });
}

// Where o's gradient comes from: from gradient_at; so, to be kept in rows; from there.
enum class Gradient { passing, kept, ready };

// What the backward of a filter keeps of o's gradient, some rows or all, in whole vectors that end in zeros.
template <class A>
struct GradientRows {
    int64_t pitch, count;
    Scratch<A> memory;

    GradientRows(int64_t W, int64_t lanes, int64_t count = 4)
        : pitch(round_up(W, lanes)), count(count), memory((count + 1) * pitch, A(0)) {}
    A* zeros() const { return memory.get(); }
    A* row(int64_t i) const { return memory.get() + (1 + i % count) * pitch; }
};

// The gradient of a map that goes through a 3x3 filter, on top of more(p, n), and the products for the filter's own:
// for each tap the sum of the map times o's gradient. gradient_at(p, n) gives that, zeros beyond n; it is called once
// for every vector, some rows ahead of x, so that all kStreams maps are read and written side by side.
template <class T, int N, int K, Gradient kGradient, int kStreams, class A = Acc<T>, class GradientAt, class More>
DLA_INLINE inline void filter_plane_backward(const GradientRows<A>& rows, const T* x, T* grad_x, int64_t H, int64_t W,
                                             const A* filter, A* products, bool past, const GradientAt& gradient_at,
                                             const More& more) {
    using V = Vec<A, N>;
    const Cut<N> cut(W);
    V taps[9], sums[9] = {};  // from the last one on: a gradient goes through the filter the other way
#pragma GCC unroll 9
    for (int t = 0; t < 9; ++t) taps[t] = broadcast<A, N>(filter[8 - t]);
    const auto add_row = [&](Columns<A, N>& columns, int row, V g, V left, V here, V right) DLA_INLINE {
        columns.add(taps + 3 * row, g);
        sums[3 * row] += right * g;
        sums[3 * row + 1] += here * g;
        sums[3 * row + 2] += left * g;
    };
    const auto put = [&](int64_t p, int64_t n, V v) DLA_INLINE {
        if (!grad_x) return;
        write<kStreams, A, N>(past, grad_x + p, v + more(p, n), n);
    };
    if constexpr (K > 0) {
        Window<A, N, K> window;
        const auto next_row = [&](int64_t i) DLA_INLINE {
            const auto at = [&](int64_t j, int64_t n) DLA_INLINE {
                if (i >= H) return V{};
                if constexpr (kGradient == Gradient::ready) return load_once<A, N>(rows.row(i) + j);
                const V g = gradient_at(i * W + j, n);
                if constexpr (kGradient == Gradient::kept) store<A, N>(rows.row(i) + j, g);
                return g;
            };
            window.move(cut, at);
        };
        next_row(0);
        for (int64_t i = 0; i < H; ++i) {
            next_row(i + 1);
            V at[K];
#pragma GCC unroll 4
            for (int k = 0; k < K; ++k) {
                const T* from = x + i * W + k * N;
                fetch_ahead<kStreams>(from);
                at[k] = load_once<A, N>(from, cut.template size<K>(k));
            }
            Columns<A, N> columns[K];
#pragma GCC unroll 4
            for (int k = 0; k < K; ++k) {
                const V left = concat<A, N, N - 1>(k > 0 ? at[k - 1] : V{}, at[k]);
                const V right = concat<A, N, 1>(at[k], k + 1 < K ? at[k + 1] : V{});
                add_row(columns[k], 0, window.above[k], left, at[k], right);
                add_row(columns[k], 1, window.here[k], left, at[k], right);
                add_row(columns[k], 2, window.below[k], left, at[k], right);
            }
            slide_row<A, N, K>(cut, columns, [&](int64_t j, int64_t n, V v) DLA_INLINE { put(i * W + j, n, v); });
        }
    } else {
        const auto next_row = [&](int64_t i) DLA_INLINE {
            if (kGradient == Gradient::ready || i >= H) return;
            A* to = rows.row(i);
            cut.each([&](int64_t j, int64_t n) DLA_INLINE { store<A, N>(to + j, gradient_at(i * W + j, n)); });
        };
        next_row(0);
        next_row(1);
        for (int64_t i = 0; i < H; ++i) {
            next_row(i + 2);  // of what was only just stored a load would have to wait
            const A* gradients[3] = {i > 0 ? rows.row(i - 1) : rows.zeros(), rows.row(i),
                                     i + 1 < H ? rows.row(i + 1) : rows.zeros()};
            const T* row = x + i * W;
            V before = {}, here = load_once<A, N>(row, cut.whole > 0 ? N : cut.tail);
            const auto columns_at = [&](int64_t j, int64_t n) DLA_INLINE {
                fetch_ahead<kStreams>(row + j);
                const int64_t n_next = j == cut.last() ? 0 : j + N < cut.whole ? N : cut.tail;
                const V next = n_next > 0 ? load_once<A, N>(row + j + N, n_next) : V{};
                const V left = concat<A, N, N - 1>(before, here), right = concat<A, N, 1>(here, next);
                Columns<A, N> columns;
#pragma GCC unroll 3
                for (int dy = 0; dy < 3; ++dy) {
                    add_row(columns, dy, load_once<A, N>(gradients[dy] + j), left, here, right);
                }
                before = here;
                here = next;
                return columns;
            };
            slide_row<A, N>(cut, columns_at, [&](int64_t j, int64_t n, V v) DLA_INLINE { put(i * W + j, n, v); });
        }
    }
#pragma GCC unroll 9
    for (int t = 0; t < 9; ++t) products[8 - t] = sum<A, N>(sums[t]);
}

template <class T, int N, int K, Carry kCarry>
void backward_planes_of(const LightUpdateBackward<T>& a) {
    using A = Acc<T>;
    using V = Vec<A, N>;
    constexpr bool kFiltered = kCarry == Carry::filtered, kScaled = kCarry == Carry::scaled;
    constexpr int kStreams = kScaled ? 6 : 4;
    const int64_t C = a.shape.C, H = a.shape.H, W = a.shape.W;
    const bool past = go_past_caches(a.shape, W, a.grad_x, a.grad_carried);
    parallel(a.shape.B * C, 8 * H * W, [&, C, H, W](int64_t begin, int64_t end) {
        const GradientRows<A> rows(W, N, kFiltered ? H : 4);
        for (int64_t k = begin; k < end; ++k) {
            const int64_t b = k / C, c = k % C;
            A filter_x[9], filter_carried[9], products[kProducts] = {};
            for (int t = 0; t < 9; ++t) {
                filter_x[t] = x_filter(a, b, c, t);
                filter_carried[t] = carried_filter(a, b, c, t);
            }
            const T *grad_out = a.grad_out.at(b, c, 0), *grad_o = a.grad_o ? a.grad_o.at(b, c, 0) : nullptr;
            const T *o = a.o.at(b, c, 0), *carried = a.carried.at(b, c, 0);
            T* grad_x = a.grad_x ? a.grad_x.at(b, c, 0) : nullptr;
            T* grad_carried = a.grad_carried ? a.grad_carried.at(b, c, 0) : nullptr;
            const V factor = broadcast<A, N>(a.factor[k]), slope = broadcast<A, N>(a.slope[c]);
            const V mean = broadcast<A, N>(a.mean[c]), offset = broadcast<A, N>(a.offset[k]);
            const V residual = broadcast<A, N>(a.residual[k]), scale = broadcast<A, N>(filter_carried[4]);
            V of_scaled = {};
            const auto gradient_at = [&](int64_t p, int64_t n) DLA_INLINE {
                fetch_ahead<kStreams>(grad_out + p);
                fetch_ahead<kStreams>(o + p);
                V g = factor * load<A, N>(grad_out + p, n) + slope * (load<A, N>(o + p, n) - mean) + offset;
                if (grad_o) {
                    fetch_ahead<kStreams>(grad_o + p);
                    g += load<A, N>(grad_o + p, n);
                }
                g = keep_lanes<A, N>(g, n);
                if constexpr (kScaled) {
                    fetch_ahead<kStreams>(carried + p);
                    of_scaled += g * load<A, N>(carried + p, n);
                    if (grad_carried) write<kStreams, A, N>(past, grad_carried + p, scale * g, n);
                }
                return g;
            };
            filter_plane_backward<T, N, K, kFiltered ? Gradient::kept : Gradient::passing, kStreams>(
                rows, a.x.at(b, c, 0), grad_x, H, W, filter_x, products, past, gradient_at,
                [&](int64_t p, int64_t n) DLA_INLINE { return load<A, N>(grad_out + p, n) + residual; });
            if constexpr (kScaled) products[9 + 4] = sum<A, N>(of_scaled);
            if constexpr (kFiltered) {
                filter_plane_backward<T, N, K, Gradient::ready, 2>(rows, carried, grad_carried, H, W, filter_carried,
                                                                   products + 9, past, gradient_at,
                                                                   [&](int64_t, int64_t) DLA_INLINE { return V{}; });
            }
            for (int t = 0; t < kProducts; ++t) a.products[(b * kProducts + t) * C + c] = products[t];
        }
    });
}
