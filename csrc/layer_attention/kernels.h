// layer_attention on the CPU, both layouts; compiled once for every instruction set. Each value map is read once, a
// piece at a time, while the sum over the layers stays in the caches. A piece is a block of planes of one sample,
// so that also of small maps some kilobytes follow each other.
#include "common/fold.h"
#include "common/moments.h"
#include "layer_attention/vectors.h"
#include "light_update/filter_gradients.h"
#include "light_update/planes.h"
#include "light_update/rows.h"

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
// of weights * maps: each vector to finish(c)(p, count, v), in order. o takes what is summed so far.
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
                for (int i = 0; i < count(); ++i) totals[i] += v * load<A>(planes.maps[i] + p, some);
            });
            for (int i = 0; i < count(); ++i) sums[(m + i) * streams.C + c] = sum<A>(totals[i]);
        }
    });
}

// o [C] += the sum over the maps of weights [count, C] * one pixel's channels.
template <class T, class A = Acc<T>>
void add_pixel(const Map<const T>* maps, const A* weights, int64_t count, int64_t C, int64_t b, int64_t p, A* o) {
    constexpr int N = kLanes<A>, kVectors = 4;
    int64_t c = 0;
    for (; c + kVectors * N <= C; c += kVectors * N) {
        Vec<A> sums[kVectors];
        for (int i = 0; i < kVectors; ++i) sums[i] = load<A>(o + c + i * N);
        for (int64_t m = 0; m < count; ++m) {
            const T* from = maps[m].at(b, 0, p) + c;
            const A* weight = weights + m * C + c;
            for (int i = 0; i < kVectors; ++i) sums[i] += load<A>(weight + i * N) * load<A>(from + i * N);
        }
        for (int i = 0; i < kVectors; ++i) store<A>(o + c + i * N, sums[i]);
    }
    for (; c < C; c += N) {
        auto sum_of = load<A>(o + c);
        for (int64_t m = 0; m < count; ++m) {
            sum_of += load<A>(weights + m * C + c, C - c) * load<A>(maps[m].at(b, 0, p) + c, C - c);
        }
        store<A>(o + c, sum_of);
    }
}

// One plane of the layer's own value map, and o = weight * that, as the map keeps it; returns its sum. zeros [W].
template <int N, int K, class T, class A = Acc<T>>
A value_plane(const LayerAttentionForward<T>& a, int64_t b, int64_t c, A weight, const T* zeros, A* o) {
    const T* x = a.x.at(b, c, 0);
    T* value = a.value.at(b, c, 0);
    const A* filter = a.value_weight + c * 9;
    const auto weights = broadcast<A, N>(weight);
    Vec<A, N> total = {};
    filter_plane<T, N, K, Carry::none, 2>(x, x, a.shape.H, a.shape.W, filter, filter, zeros,
                                          [&](int64_t p, int64_t n, Vec<A, N> v) DLA_INLINE {
                                              fetch_ahead_to_write<2>(value + p);
                                              store<A, N>(value + p, v, n);
                                              store<A, N>(o + p, weights * as_kept<T, A, N>(v), n);
                                              total += keep_lanes<A, N>(v, n);
                                          });
    return sum<A, N>(total);
}

template <int kWidth, int K, class T>
void forward_planes_of(const LayerAttentionForward<T>& a) {
    using A = Acc<T>;
    const int64_t HW = a.shape.HW(), C = a.shape.C, pitch = round_up(HW, kLanes<A>);
    const PlaneBlocks blocks(a.shape, pitch, sizeof(A));
    parallel(a.shape.B * blocks.per_sample, a.layers * blocks.planes * HW, [&](int64_t begin, int64_t end) {
        const Scratch<A> sums(blocks.planes * pitch, A(0));  // a plane ends in zeros
        const Scratch<T> zeros(a.shape.W, T(0));
        blocks.each(begin, end, [&](int64_t b, int64_t first, int64_t last) {
            const A* weights = a.weights + b * a.layers * C;
            A* o = sums.get();
            for (int64_t c = first; c < last; ++c, o += pitch) {
                const A weight = weights[(a.layers - 1) * C + c];
                a.pooled[b * C + c] = value_plane<kWidth, K>(a, b, c, weight, zeros.get(), o) / A(HW);
            }
            const auto finish = [&](int64_t c, const auto& sum_up) DLA_INLINE {
                if (a.scale) {
                    const T* x = a.x.at(b, c, 0);
                    T* out = a.out.at(b, c, 0);
                    const auto scale = broadcast(a.scale[c]), shift = broadcast(a.shift[c]);
                    sum_up([&](int64_t p, int64_t n, Vec<A> v) DLA_INLINE {
                        fetch_ahead_to_write<6>(out + p);
                        store<A>(out + p, folded<A>(load<A>(x + p, n), v, scale, shift, true), n);
                    });
                    return;
                }
                T* to = a.o.at(b, c, 0);
                LongSum<A> total;
                sum_up([&](int64_t p, int64_t n, Vec<A> v) DLA_INLINE {
                    fetch_ahead_to_write<6>(to + p);
                    store<A>(to + p, v, n);
                    total.add(keep_lanes<A>(as_kept<T, A>(v), n));
                });
                const A mean = total.total() / A(HW);
                a.mean[b * C + c] = mean;
                a.var[b * C + c] = squared_deviations(to, HW, mean) / A(HW);
            };
            add_planes<T>({a.values, a.layers - 1, weights, C, b}, first, last, HW, sums.get(), pitch, finish);
        });
    });
}

template <class T>
void forward_planes(const LayerAttentionForward<T>& a) {
    on_width<Acc<T>>(a.shape.W, [&](auto lanes, auto k) { forward_planes_of<lanes(), k()>(a); });
}

// In channels_last the value map is a pass of its own.
template <class T>
void forward_rows(const LayerAttentionForward<T>& a) {
    using A = Acc<T>;
    constexpr int N = kLanes<A>;
    const Shape& s = a.shape;
    const Scratch<A> ones(s.B * s.C, A(1)), var(s.B * s.C);
    LightUpdateForward<T> value{};
    value.attention = ones.get();
    value.value_weight = a.value_weight;
    value.shape = s;
    value.x = a.x;
    value.o = a.value;
    value.mean = a.pooled;
    value.var = var.get();
    forward_rows_of<T, Carry::none>(value);
    const RowRuns runs(s);
    const int64_t tasks = s.B * runs.count, pitch = round_up(s.C, N);
    const Scratch<A> totals(tasks * s.C, A(0)), deviations(tasks * s.C, A(0));
    parallel(tasks, a.layers * runs.rows * s.W * s.C, [&](int64_t begin, int64_t end) {
        const Scratch<A> o(s.W * pitch);
        for (int64_t k = begin; k < end; ++k) {
            const int64_t b = k / runs.count, first = k % runs.count * runs.rows;
            const int64_t last = std::min(s.H, first + runs.rows);
            RunningMoments<A> moments{&totals[k * s.C], &deviations[k * s.C]};
            for (int64_t i = first; i < last; ++i) {
                std::fill_n(o.get(), s.W * pitch, A(0));
                for (int64_t j = 0; j < s.W; ++j) {
                    add_pixel<T>(a.values, a.weights + b * a.layers * s.C, a.layers, s.C, b, i * s.W + j,
                                 &o[j * pitch]);
                }
                if (a.scale) {
                    fold_pixels<A>(o.get(), pitch, s.W, s.C, a.x.at(b, 0, i * s.W), a.x.pixel, a.scale, a.shift, true,
                                   a.out.at(b, 0, i * s.W), a.out.pixel, static_cast<T*>(nullptr), 0,
                                   static_cast<A*>(nullptr), static_cast<A*>(nullptr));
                } else {
                    finish_pixels<A>(o.get(), pitch, s.W, s.C, a.o.at(b, 0, i * s.W), a.o.pixel, moments);
                }
            }
        }
    });
    if (!a.scale) merge_runs(s, runs, totals.get(), deviations.get(), a.mean, a.var);
}

// What o's gradient is made of, for one vector.
template <class A>
struct NormVectors {
    Vec<A> factor, mean, scale, bias, slope, offset;

    Vec<A> gradient(Vec<A> grad_out, Vec<A> o) const {
        const Vec<A> centred = o - mean, normed = centred * scale + bias;
        return (normed <= 0 ? Vec<A>{} : factor * grad_out) + slope * centred + offset;
    }
};

// A plane of x's gradient and the products for value_weight's, from the layers' part of the value map's gradient,
// grad [HW].
template <int N, int K, class T, class A = Acc<T>>
void value_plane_backward(const LayerAttentionBackward<T>& a, int64_t b, int64_t c, const A* grad,
                          const GradientRows<A>& rows) {
    const int64_t C = a.shape.C, H = a.shape.H, W = a.shape.W;
    const auto of_mean = broadcast<A, N>(a.grad_pooled ? a.grad_pooled[b * C + c] / A(H * W) : A(0));
    const T *grad_out = a.grad_out.at(b, c, 0), *read = a.grad_read ? a.grad_read.at(b, c, 0) : nullptr;
    A products[kProducts] = {};
    filter_plane_backward<T, N, K, Gradient::passing, 2>(
        rows, a.x.at(b, c, 0), a.grad_x ? a.grad_x.at(b, c, 0) : nullptr, H, W, a.value_weight + c * 9, products,
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
                             const auto g = of.gradient(load<A>(grad_out + p, n), load<A>(o + p, n));
                             store<A>(grad_o + p, g, n);
                             store<A>(grad + p, keep_lanes<A>(g, n));
                             store<A>(value_grad + p, own_weight * g);
                         });
                     }
                     dot_planes<T>(grads.get(), pitch, {a.values, a.layers, weights, C, b}, first, last, HW,
                                   a.products + b * a.layers * C);
                     if (!a.x) return;
                     add_planes<T>(
                         {a.later_grads, a.later, a.later_weights + b * a.later * C, C, b}, first, last, HW,
                         value_grads.get(), pitch, [&](int64_t c, const auto& sum_up) DLA_INLINE {
                             A* of_value = value_grads.get() + (c - first) * pitch;
                             sum_up([&](int64_t p, int64_t, Vec<A> v) DLA_INLINE { store<A>(of_value + p, v); });
                             value_plane_backward<kWidth, K>(a, b, c, of_value, rows);
                         });
                 });
             });
}

template <class T>
void backward_planes(const LayerAttentionBackward<T>& a) {
    on_width<Acc<T>>(a.shape.W, [&](auto lanes, auto k) { backward_planes_of<lanes(), k() <= 2 ? k() : 0>(a); });
}

template <class T>
void backward_rows(const LayerAttentionBackward<T>& a) {
    using A = Acc<T>;
    constexpr int N = kLanes<A>;
    const Shape& s = a.shape;
    const RowRuns runs(s);
    const int64_t tasks = s.B * runs.count, pitch = round_up(s.C, N), vectors = a.layers * s.C;
    const Scratch<A> partials(tasks * vectors, A(0));
    parallel(tasks, (2 * a.layers + a.later) * runs.rows * s.W * s.C, [&](int64_t begin, int64_t end) {
        const Scratch<A> grad(s.W * pitch), value_grad(s.W * pitch);
        for (int64_t k = begin; k < end; ++k) {
            const int64_t b = k / runs.count, first = k % runs.count * runs.rows;
            const int64_t last = std::min(s.H, first + runs.rows);
            const A keep = a.keep ? a.keep[b] : A(1);
            const A* own_weights = a.weights + (b * a.layers + a.layers - 1) * s.C;
            for (int64_t i = first; i < last; ++i) {
                for (int64_t j = 0; j < s.W; ++j) {
                    const int64_t p = i * s.W + j;
                    const T *grad_out = a.grad_out.at(b, 0, p), *o = a.o.at(b, 0, p);
                    for (int64_t c = 0; c < s.C; c += N) {
                        const int64_t n = s.C - c;
                        const auto scale = load<A>(a.scale + c, n);
                        const NormVectors<A> of{
                            keep * scale,           load<A>(a.mean + c, n),  scale,
                            load<A>(a.bias + c, n), load<A>(a.slope + c, n), load<A>(a.offset + c, n)};
                        const auto g = of.gradient(load<A>(grad_out + c, n), load<A>(o + c, n));
                        store<A>(a.grad_o.at(b, 0, p) + c, g, n);
                        store<A>(&grad[j * pitch + c], g);
                        store<A>(&value_grad[j * pitch + c], load<A>(own_weights + c, n) * g);
                    }
                }
                for (int64_t m = 0; m < a.layers; ++m) {
                    A* products = &partials[k * vectors + m * s.C];
                    for (int64_t j = 0; j < s.W; ++j) {
                        const T* value = a.values[m].at(b, 0, i * s.W + j);
                        for (int64_t c = 0; c < s.C; c += N) {
                            const int64_t n = s.C - c;
                            const auto product = load<A>(&grad[j * pitch + c]) * load<A>(value + c, n);
                            store<A>(products + c, load<A>(products + c, n) + product, n);
                        }
                    }
                }
                if (!a.x) continue;
                for (int64_t j = 0; j < s.W; ++j) {
                    add_pixel<T>(a.later_grads, a.later_weights + b * a.later * s.C, a.later, s.C, b, i * s.W + j,
                                 &value_grad[j * pitch]);
                }
                for (int64_t j = 0; j < s.W; ++j) {
                    T* to = a.grad_value.at(b, 0, i * s.W + j);
                    for (int64_t c = 0; c < s.C; c += N) {
                        store<A>(to + c, load<A>(&value_grad[j * pitch + c]), s.C - c);
                    }
                }
            }
        }
    });
    add_runs(s, runs.count, vectors, partials.get(), a.products);
    if (!a.x) return;
    // From here on as light_update's without a carry: o's gradient is there, in o's place.
    const int64_t size = s.B * s.C;
    const Scratch<A> zeros(size, A(0)), ones(size, A(1)), of_mean(size, A(0));
    for (int64_t i = 0; a.grad_pooled && i < size; ++i) of_mean[i] = a.grad_pooled[i] / A(s.HW());
    LightUpdateBackward<T> of_value{};
    of_value.attention = ones.get();
    of_value.value_weight = a.value_weight;
    of_value.shape = s;
    of_value.grad_out = a.grad_out;
    of_value.grad_o = a.grad_read;
    of_value.o = {a.grad_value.data, a.grad_value.batch, a.grad_value.channel, a.grad_value.pixel};
    of_value.offset = of_mean.get();
    of_value.residual = zeros.get();
    of_value.slope = ones.get();
    of_value.mean = zeros.get();
    of_value.x = a.x;
    of_value.grad_x = a.grad_x;
    of_value.products = a.value_products;
    backward_rows_of<T, Carry::none>(of_value);
}
