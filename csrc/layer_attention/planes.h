// layer_attention on NCHW maps, plane by plane: the value map and its gradient pass in the layer's own passes. A piece
// is a block of planes of one sample, so that also of small maps some kilobytes follow each other.
#include "light_update/planes.h"

// The maps of a sample and their weights [count, C].
template <class T, class A = Acc<T>>
struct Streams {
    const Map<const T>* maps;
    int64_t count;
    const A* weights;
    int64_t C, b;
};

// Blocks of planes of one sample, whose sums take 64 KiB.
struct PlaneBlocks {
    int64_t C, planes, per_sample;

    PlaneBlocks(const Shape& s, int64_t pitch, int64_t bytes)
        : C(s.C),
          planes(std::clamp<int64_t>((1 << 16) / std::max<int64_t>(1, pitch * bytes), 1, s.C)),
          per_sample(ceil_div(s.C, planes)) {}

    // Calls body(b, first, last) with the planes of each block.
    template <class Body>
    void each(int64_t begin, int64_t end, const Body& body) const {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t first = i % per_sample * planes;
            body(i / per_sample, first, std::min(C, first + planes));
        }
    }
};

// Calls body(m, count, closes) for the maps from m on, up to four of them, and says which are the last; without a map
// once with none. More streams than the hardware follows, or than a set of the cache has ways, would run into each
// other, and one alone leaves memory idle at every new plane.
template <class Body>
inline void by_four(int64_t maps, const Body& body) {
    int64_t m = 0;
    for (; m + 4 < maps; m += 4) body(m, std::integral_constant<int, 4>{}, std::false_type{});
    switch (maps - m) {
        case 0:
            return body(m, std::integral_constant<int, 0>{}, std::true_type{});
        case 1:
            return body(m, std::integral_constant<int, 1>{}, std::true_type{});
        case 2:
            return body(m, std::integral_constant<int, 2>{}, std::true_type{});
        case 3:
            return body(m, std::integral_constant<int, 3>{}, std::true_type{});
        default:
            return body(m, std::integral_constant<int, 4>{}, std::true_type{});
    }
}

// Where up to four planes of maps lie.
template <class T, int kMaps>
struct Planes {
    const T* maps[kMaps + 1];

    Planes(const Streams<T>& streams, int64_t m, int64_t c) {
        for (int i = 0; i < kMaps; ++i) maps[i] = streams.maps[m + i].at(streams.b, c, 0);
    }
};

// The planes from first on of o [n], `pitch` apart and readable up to a whole vector beyond, plus the sum over the maps
// of weights * maps. o takes what is summed so far; the last maps join in finish(c, sum_up), once for each plane, where
// sum_up(put) calls put(p, n, v) with the n pixels from p on, in order.
template <class T, class A = Acc<T>, class Finish>
void add_planes(const Streams<T>& streams, int64_t first, int64_t last, int64_t n, A* o, int64_t pitch,
                const Finish& finish) {
    by_four(streams.count, [&](int64_t m, auto count, auto closes) DLA_INLINE {
        A* at = o;
        for (int64_t c = first; c < last; ++c, at += pitch) {
            const Planes<T, count()> planes(streams, m, c);
            Vec<A> weights[count() + 1];
            for (int i = 0; i < count(); ++i) weights[i] = broadcast(streams.weights[(m + i) * streams.C + c]);
            const auto sum_up = [&](const auto& put) DLA_INLINE {
                Cut<kLanes<A>>(n).each([&](int64_t p, int64_t some) DLA_INLINE {
                    auto total = load<A>(at + p);
                    for (int i = 0; i < count(); ++i) {
                        fetch_ahead<count() + 2>(planes.maps[i] + p);
                        total += weights[i] * load<A>(planes.maps[i] + p, some);
                    }
                    put(p, some, total);
                });
            };
            if constexpr (closes()) {
                finish(c, sum_up);
            } else {
                sum_up([&](int64_t p, int64_t, Vec<A> v) DLA_INLINE { store<A>(at + p, v); });
            }
        }
    });
}

// The sums of each plane of g [n], `pitch` apart and zeros up to a whole vector beyond, times each map's: [count, C].
template <class T, class A = Acc<T>>
void dot_planes(const A* g, int64_t pitch, const Streams<T>& streams, int64_t first, int64_t last, int64_t n, A* sums) {
    by_four(streams.count, [&](int64_t m, auto count, auto) DLA_INLINE {
        constexpr int N = kLanes<A>;
        const A* at = g;
        for (int64_t c = first; c < last; ++c, at += pitch) {
            Vec<A> totals[count() + 1] = {};
            const Planes<T, count()> planes(streams, m, c);
            Cut<N>(n).each([&](int64_t p, int64_t some) DLA_INLINE {
                const auto v = load<A>(at + p);
                for (int i = 0; i < count(); ++i) {
                    fetch_ahead<count() + 1>(planes.maps[i] + p);
                    totals[i] += v * load<A>(planes.maps[i] + p, some);
                }
            });
            for (int i = 0; i < count(); ++i) sums[(m + i) * streams.C + c] = sum<A>(totals[i]);
        }
    });
}

// One plane of the layer's own value map, and o = weight * that, as the map keeps it; returns its sum. zeros [W].
template <int N, int K, class T, class A = Acc<T>>
A value_plane(const LayerAttentionForward<T>& a, int64_t b, int64_t c, A weight, bool past, const T* zeros, A* o) {
    const T* x = a.x.at(b, c, 0);
    T* value = a.value.at(b, c, 0);
    const A* filter = a.value_weight + c * 9;
    const auto weights = broadcast<A, N>(weight);
    Vec<A, N> total = {};
    filter_plane<T, N, K, Carry::none, 2>(x, x, a.shape.H, a.shape.W, filter, filter, zeros, nullptr,
                                          [&](int64_t p, int64_t n, Vec<A, N> v) DLA_INLINE {
                                              write<2, A, N>(past, value + p, v, n);
                                              store<A, N>(o + p, weights * as_kept<T, A, N>(v), n);
                                              total += keep_lanes<A, N>(v, n);
                                          });
    return sum<A, N>(total);
}

// The planes from first on of o, with the prior maps in: written as the map keeps them, and their moments, or folded. A
// function of its own, as it does not depend on how the value map was filtered.
template <class T, class A = Acc<T>>
void finish_planes(const LayerAttentionForward<T>& a, int64_t b, int64_t first, int64_t last, bool past, A* o,
                   int64_t pitch) {
    const int64_t HW = a.shape.HW(), C = a.shape.C;
    const auto finish = [&](int64_t c, const auto& sum_up) DLA_INLINE {
        if (a.scale) {
            const T* x = a.x.at(b, c, 0);
            T* out = a.out.at(b, c, 0);
            const auto scale = broadcast(a.scale[c]), shift = broadcast(a.shift[c]);
            sum_up([&](int64_t p, int64_t n, Vec<A> v) DLA_INLINE {
                write<6, A>(past, out + p, folded<A>(load<A>(x + p, n), v, scale, shift, true), n);
            });
            return;
        }
        T* to = a.o.at(b, c, 0);
        A* again = o + (c - first) * pitch;
        LongSum<A> total;
        sum_up([&](int64_t p, int64_t n, Vec<A> v) DLA_INLINE {
            write<6, A>(past, to + p, v, n);
            v = as_kept<T, A>(v);
            if (past) store<A>(again + p, v);
            total.add(keep_lanes<A>(v, n));
        });
        const A mean = total.total() / A(HW);
        a.mean[b * C + c] = mean;
        a.var[b * C + c] = (past ? squared_deviations(again, HW, mean) : squared_deviations(to, HW, mean)) / A(HW);
    };
    add_planes<T>({a.values, a.layers - 1, a.weights + b * a.layers * C, C, b}, first, last, HW, o, pitch, finish);
}

template <int kWidth, int K, class T>
void forward_planes_of(const LayerAttentionForward<T>& a) {
    using A = Acc<T>;
    const int64_t HW = a.shape.HW(), C = a.shape.C, pitch = round_up(HW, kLanes<A>);
    const PlaneBlocks blocks(a.shape, pitch, sizeof(A));
    const bool past = a.scale ? go_past_caches(a.shape, a.shape.W, a.value, a.out)
                              : go_past_caches(a.shape, a.shape.W, a.value, a.o, a.layers + 2);
    parallel(a.shape.B * blocks.per_sample, a.layers * blocks.planes * HW, [&](int64_t begin, int64_t end) {
        const Scratch<A> sums(blocks.planes * pitch, A(0));  // a plane ends in zeros
        const Scratch<T> zeros(a.shape.W, T(0));
        blocks.each(begin, end, [&](int64_t b, int64_t first, int64_t last) {
            const A* own_weights = a.weights + ((b + 1) * a.layers - 1) * C;
            A* o = sums.get();
            for (int64_t c = first; c < last; ++c, o += pitch) {
                a.pooled[b * C + c] = value_plane<kWidth, K>(a, b, c, own_weights[c], past, zeros.get(), o) / A(HW);
            }
            finish_planes(a, b, first, last, past, sums.get(), pitch);
        });
    });
}

template <class T>
void forward_planes(const LayerAttentionForward<T>& a) {
    on_width<Acc<T>, kForwardVectors>(a.shape.W, [&](auto lanes, auto k) { forward_planes_of<lanes(), k()>(a); });
}

// The planes from first on of the value map's gradient, grads, plus what the later layers say of it.
template <class T, class A = Acc<T>>
void add_later_planes(const LayerAttentionBackward<T>& a, int64_t b, int64_t first, int64_t last, A* grads,
                      int64_t pitch) {
    const int64_t C = a.shape.C;
    add_planes<T>({a.later_grads, a.later, a.later_weights + b * a.later * C, C, b}, first, last, a.shape.HW(), grads,
                  pitch, [&](int64_t c, const auto& sum_up) DLA_INLINE {
                      A* to = grads + (c - first) * pitch;
                      sum_up([&](int64_t p, int64_t, Vec<A> v) DLA_INLINE { store<A>(to + p, v); });
                  });
}

// A plane of x's gradient and the products for value_weight's, from the layers' part of the value map's gradient,
// grad [HW].
template <int N, int K, class T, class A = Acc<T>>
void value_plane_backward(const LayerAttentionBackward<T>& a, int64_t b, int64_t c, bool past, const A* grad,
                          const GradientRows<A>& rows) {
    const int64_t C = a.shape.C, H = a.shape.H, W = a.shape.W;
    const auto of_mean = broadcast<A, N>(a.grad_pooled ? a.grad_pooled[b * C + c] / A(H * W) : A(0));
    const T *grad_out = a.grad_out.at(b, c, 0), *read = a.grad_read ? a.grad_read.at(b, c, 0) : nullptr;
    A products[kProducts] = {};
    filter_plane_backward<T, N, K, Gradient::passing, 2>(
        rows, a.x.at(b, c, 0), a.grad_x ? a.grad_x.at(b, c, 0) : nullptr, H, W, a.value_weight + c * 9, products, past,
        [&](int64_t p, int64_t n) DLA_INLINE {
            Vec<A, N> g = load<A, N>(grad + p, n) + of_mean;
            if (read) g += load<A, N>(read + p, n);
            return keep_lanes<A, N>(g, n);
        },
        [&](int64_t p, int64_t n) DLA_INLINE { return load<A, N>(grad_out + p, n); });
    for (int t = 0; t < kProducts; ++t) a.value_products[(b * kProducts + t) * C + c] = products[t];
}

template <int kWidth, int K, class T>
void backward_planes_of(const LayerAttentionBackward<T>& a) {
    using A = Acc<T>;
    constexpr int N = kLanes<A>;
    const int64_t HW = a.shape.HW(), C = a.shape.C, pitch = round_up(HW, N);
    const PlaneBlocks blocks(a.shape, pitch, 2 * sizeof(A));
    const bool past = go_past_caches(a.shape, a.shape.W, a.grad_o, a.grad_x, a.layers + a.later + 5);
    parallel(a.shape.B * blocks.per_sample, (2 * a.layers + a.later + 9) * blocks.planes * HW,
             [&](int64_t begin, int64_t end) {
                 const Scratch<A> grads(blocks.planes * pitch), value_grads(blocks.planes * pitch);
                 const GradientRows<A> rows(a.shape.W, kWidth);
                 blocks.each(begin, end, [&](int64_t b, int64_t first, int64_t last) {
                     const A keep = a.keep ? a.keep[b] : A(1);
                     const A* weights = a.weights + b * a.layers * C;
                     A *grad = grads.get(), *value_grad = value_grads.get();
                     for (int64_t c = first; c < last; ++c, grad += pitch, value_grad += pitch) {
                         const NormVectors<A> of{broadcast(keep * a.scale[c]), broadcast(a.mean[c]),
                                                 broadcast(a.scale[c]),        broadcast(a.bias[c]),
                                                 broadcast(a.slope[c]),        broadcast(a.offset[c])};
                         const T *grad_out = a.grad_out.at(b, c, 0), *o = a.o.at(b, c, 0);
                         T* grad_o = a.grad_o.at(b, c, 0);
                         const auto own_weight = broadcast(weights[(a.layers - 1) * C + c]);
                         Cut<N>(HW).each([&](int64_t p, int64_t n) DLA_INLINE {
                             fetch_ahead<4>(grad_out + p);
                             fetch_ahead<4>(o + p);
                             const auto g = of.gradient(load<A>(grad_out + p, n), load<A>(o + p, n));
                             write<0, A>(past, grad_o + p, g, n);
                             store<A>(grad + p, keep_lanes<A>(g, n));
                             store<A>(value_grad + p, own_weight * g);
                         });
                     }
                     dot_planes<T>(grads.get(), pitch, {a.values, a.layers, weights, C, b}, first, last, HW,
                                   a.products + b * a.layers * C);
                     if (!a.x) return;
                     add_later_planes(a, b, first, last, value_grads.get(), pitch);
                     value_grad = value_grads.get();
                     for (int64_t c = first; c < last; ++c, value_grad += pitch) {
                         value_plane_backward<kWidth, K>(a, b, c, past, value_grad, rows);
                     }
                 });
             });
}

template <class T>
void backward_planes(const LayerAttentionBackward<T>& a) {
    on_width<Acc<T>, kBackwardVectors>(a.shape.W, [&](auto lanes, auto k) { backward_planes_of<lanes(), k()>(a); });
}
