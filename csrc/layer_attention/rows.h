// layer_attention on channels_last maps, in runs of rows, a pixel's channels at a time; the value map and its gradient
// are passes of their own, light_update's.
#include "light_update/rows.h"

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
            for (int i = 0; i < kVectors; ++i) {
                fetch_ahead<6>(from + i * N);
                sums[i] += load<A>(weight + i * N) * load<A>(from + i * N);
            }
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
    const bool past = go_past_caches(s, s.C, a.scale ? a.out : a.o);
    parallel(tasks, a.layers * runs.rows * s.W * s.C, [&](int64_t begin, int64_t end) {
        const Scratch<A> o(s.W * pitch);
        for (int64_t k = begin; k < end; ++k) {
            const auto [b, first, last] = runs.run(k);
            RunningMoments<A> moments{&totals[k * s.C], &deviations[k * s.C]};
            for (int64_t i = first; i < last; ++i) {
                std::fill_n(o.get(), s.W * pitch, A(0));
                for (int64_t j = 0; j < s.W; ++j) {
                    add_pixel<T>(a.values, a.weights + b * a.layers * s.C, a.layers, s.C, b, i * s.W + j,
                                 &o[j * pitch]);
                }
                if (a.scale) {
                    fold_pixels<A>(o.get(), pitch, s.W, s.C, a.x.at(b, 0, i * s.W), a.x.pixel, a.scale, a.shift, true,
                                   past, a.out.at(b, 0, i * s.W), a.out.pixel, static_cast<T*>(nullptr), 0,
                                   static_cast<A*>(nullptr), static_cast<A*>(nullptr));
                } else {
                    finish_pixels<A>(o.get(), pitch, s.W, s.C, past, a.o.at(b, 0, i * s.W), a.o.pixel, moments);
                }
            }
        }
    });
    if (!a.scale) merge_runs(s, runs, totals.get(), deviations.get(), a.mean, a.var);
}

template <class T>
void backward_rows(const LayerAttentionBackward<T>& a) {
    using A = Acc<T>;
    constexpr int N = kLanes<A>;
    const Shape& s = a.shape;
    const RowRuns runs(s);
    const int64_t tasks = s.B * runs.count, pitch = round_up(s.C, N), vectors = a.layers * s.C;
    const Scratch<A> partials(tasks * vectors, A(0));
    const bool past = go_past_caches(s, s.C, a.grad_o, a.grad_value);
    parallel(tasks, (2 * a.layers + a.later) * runs.rows * s.W * s.C, [&](int64_t begin, int64_t end) {
        const Scratch<A> grad(s.W * pitch), value_grad(s.W * pitch);
        for (int64_t k = begin; k < end; ++k) {
            const auto [b, first, last] = runs.run(k);
            const A keep = a.keep ? a.keep[b] : A(1);
            const A* own_weights = a.weights + (b * a.layers + a.layers - 1) * s.C;
            for (int64_t i = first; i < last; ++i) {
                for (int64_t j = 0; j < s.W; ++j) {
                    const int64_t p = i * s.W + j;
                    const T *grad_out = a.grad_out.at(b, 0, p), *o = a.o.at(b, 0, p);
                    for (int64_t c = 0; c < s.C; c += N) {
                        const int64_t n = s.C - c;
                        fetch_ahead<4>(grad_out + c);
                        fetch_ahead<4>(o + c);
                        const auto scale = load<A>(a.scale + c, n);
                        const NormVectors<A> of{
                            keep * scale,           load<A>(a.mean + c, n),  scale,
                            load<A>(a.bias + c, n), load<A>(a.slope + c, n), load<A>(a.offset + c, n)};
                        const auto g = of.gradient(load<A>(grad_out + c, n), load<A>(o + c, n));
                        write<0, A>(past, a.grad_o.at(b, 0, p) + c, g, n);
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
                            fetch_ahead<2>(value + c);
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
                        write<0, A>(past, to + c, load<A>(&value_grad[j * pitch + c]), s.C - c);
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
