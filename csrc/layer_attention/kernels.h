// layer_attention on the CPU, both layouts; compiled once for every instruction set. Each value map is read once, a
// piece at a time, while the sum over the layers stays in the first cache.
#include "common/fold.h"
#include "common/moments.h"

// o [HW] = sum over the layers of weights * values, for one channel; returns its sum.
template <class T, class A = Acc<T>>
A attend_plane(const LayerAttentionForward<T>& a, int64_t b, int64_t c, A* o) {
    constexpr int N = kLanes<A>;
    const int64_t HW = a.shape.HW(), C = a.shape.C;
    const A* weights = a.weights + b * a.layers * C + c;
    Vec<A> total;
    for (int64_t m = 0; m < a.layers; ++m) {
        const T* value = a.values[m].at(b, c, 0);
        const auto weight = broadcast(weights[m * C]);
        total = Vec<A>{};
        for (int64_t p = 0; p < HW; p += N) {
            const auto before = m > 0 ? load<A>(o + p) : Vec<A>{};
            const auto now = before + keep_lanes<A>(weight * load<A>(value + p, HW - p), HW - p);
            store<A>(o + p, now);
            total += now;
        }
    }
    return sum<A, N>(total);
}

template <class T>
void forward_planes(const LayerAttentionForward<T>& a) {
    using A = Acc<T>;
    constexpr int N = kLanes<A>;
    const int64_t HW = a.shape.HW(), C = a.shape.C, pitch = round_up(HW, N);
    parallel(a.shape.B * C, a.layers * HW, [&](int64_t begin, int64_t end) {
        const Scratch<A> o(pitch);
        for (int64_t i = begin; i < end; ++i) {
            const A total = attend_plane(a, i / C, i % C, o.get());
            const int64_t b = i / C, c = i % C;
            if (a.scale) {
                fold_plane<A, N>(o.get(), pitch, 1, HW, a.x.at(b, c, 0), a.scale[c], a.shift[c], true,
                                 a.out.at(b, c, 0), static_cast<T*>(nullptr));
            } else {
                finish_plane<A, N>(o.get(), pitch, 1, HW, total, a.o.at(b, c, 0), a.mean[i], a.var[i]);
            }
        }
    });
}

template <class T>
void forward_rows(const LayerAttentionForward<T>& a) {
    using A = Acc<T>;
    constexpr int N = kLanes<A>;
    const Shape& s = a.shape;
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
                for (int64_t m = 0; m < a.layers; ++m) {
                    const A* weights = a.weights + (b * a.layers + m) * s.C;
                    for (int64_t j = 0; j < s.W; ++j) {
                        const T* value = a.values[m].at(b, 0, i * s.W + j);
                        for (int64_t c = 0; c < s.C; c += N) {
                            const int64_t n = s.C - c;
                            const auto before = m > 0 ? load<A>(&o[j * pitch + c]) : Vec<A>{};
                            store<A>(&o[j * pitch + c], before + load<A>(weights + c, n) * load<A>(value + c, n));
                        }
                    }
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

template <class T>
void backward_planes(const LayerAttentionBackward<T>& a) {
    using A = Acc<T>;
    constexpr int N = kLanes<A>;
    const int64_t HW = a.shape.HW(), C = a.shape.C, pitch = round_up(HW, N);
    parallel(a.shape.B * C, (2 * a.layers + a.later) * HW, [&](int64_t begin, int64_t end) {
        const Scratch<A> grad(pitch), value_grad(pitch);
        for (int64_t i = begin; i < end; ++i) {
            const int64_t b = i / C, c = i % C;
            const A keep = a.keep ? a.keep[b] : A(1);
            const NormVectors<A> of{broadcast(keep * a.scale[c]), broadcast(a.mean[c]),  broadcast(a.scale[c]),
                                    broadcast(a.bias[c]),         broadcast(a.slope[c]), broadcast(a.offset[c])};
            const T *grad_out = a.grad_out.at(b, c, 0), *o = a.o.at(b, c, 0);
            T* grad_o = a.grad_o.at(b, c, 0);
            const auto own_weight = broadcast(a.weights[(b * a.layers + a.layers - 1) * C + c]);
            for (int64_t p = 0; p < HW; p += N) {
                const auto g = of.gradient(load<A>(grad_out + p, HW - p), load<A>(o + p, HW - p));
                store<A>(grad_o + p, g, HW - p);
                store<A>(&grad[p], keep_lanes<A>(g, HW - p));
                store<A>(&value_grad[p], own_weight * g);
            }
            for (int64_t m = 0; m < a.layers; ++m) {
                const T* value = a.values[m].at(b, c, 0);
                Vec<A> product = {};
                for (int64_t p = 0; p < HW; p += N) product += load<A>(&grad[p]) * load<A>(value + p, HW - p);
                a.products[(b * a.layers + m) * C + c] = sum<A, N>(product);
            }
            if (!a.grad_value) continue;
            for (int64_t l = 0; l < a.later; ++l) {
                const auto weight = broadcast(a.later_weights[(b * a.later + l) * C + c]);
                const T* later = a.later_grads[l].at(b, c, 0);
                for (int64_t p = 0; p < HW; p += N) {
                    store<A>(&value_grad[p], load<A>(&value_grad[p]) + weight * load<A>(later + p, HW - p));
                }
            }
            T* grad_value = a.grad_value.at(b, c, 0);
            for (int64_t p = 0; p < HW; p += N) store<A>(grad_value + p, load<A>(&value_grad[p]), HW - p);
        }
    });
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
                if (!a.grad_value) continue;
                for (int64_t l = 0; l < a.later; ++l) {
                    const A* weights = a.later_weights + (b * a.later + l) * s.C;
                    for (int64_t j = 0; j < s.W; ++j) {
                        const T* later = a.later_grads[l].at(b, 0, i * s.W + j);
                        for (int64_t c = 0; c < s.C; c += N) {
                            const int64_t n = s.C - c;
                            A* to = &value_grad[j * pitch + c];
                            store<A>(to, load<A>(to) + load<A>(weights + c, n) * load<A>(later + c, n));
                        }
                    }
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
}
