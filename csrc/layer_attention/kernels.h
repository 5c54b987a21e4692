// layer_attention on the CPU, both layouts; compiled once for every instruction set. Each value map is read once, a
// piece at a time, while the sum over the layers stays in the first cache.
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
            finish_plane<A, N>(o.get(), pitch, 1, HW, total, a.out.at(i / C, i % C, 0), a.mean[i], a.var[i]);
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
                finish_pixels<A>(o.get(), pitch, s.W, s.C, a.out.at(b, 0, i * s.W), a.out.pixel, moments);
            }
        }
    });
    merge_runs(s, runs, totals.get(), deviations.get(), a.mean, a.var);
}

template <class T>
void backward_planes(const LayerAttentionBackward<T>& a) {
    using A = Acc<T>;
    constexpr int N = kLanes<A>;
    const int64_t HW = a.shape.HW(), C = a.shape.C;
    parallel(a.shape.B * C, 2 * a.layers * HW, [&](int64_t begin, int64_t end) {
        const Scratch<A> grad(round_up(HW, N));
        for (int64_t i = begin; i < end; ++i) {
            const int64_t b = i / C, c = i % C;
            const auto of_o = OutputGradient<A>::of(a.grad_mean, a.grad_var, a.mean, i, HW);
            const T *grad_o = a.grad_o.at(b, c, 0), *o = a.o ? a.o.at(b, c, 0) : nullptr;
            for (int64_t p = 0; p < HW; p += N) {
                auto g = load<A>(grad_o + p, HW - p) + of_o.offset;
                if (o) g += of_o.slope * (load<A>(o + p, HW - p) - of_o.mean);
                store<A>(&grad[p], keep_lanes<A>(g, HW - p));
            }
            for (int64_t m = 0; m < a.layers; ++m) {
                const int64_t at = (b * a.layers + m) * C + c;
                const auto weight = broadcast(a.weights[at]);
                const T* value = a.values[m].at(b, c, 0);
                T* grad_value = a.grad_values ? a.grad_values[m].at(b, c, 0) : nullptr;
                Vec<A> product = {};
                for (int64_t p = 0; p < HW; p += N) {
                    const auto g = load<A>(&grad[p]);
                    product += g * load<A>(value + p, HW - p);
                    if (grad_value) store<A>(grad_value + p, weight * g, HW - p);
                }
                a.products[at] = sum<A, N>(product);
            }
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
    parallel(tasks, 2 * a.layers * runs.rows * s.W * s.C, [&](int64_t begin, int64_t end) {
        const Scratch<A> grad(s.W * pitch);
        OutputGradients<A> of_o(s.C);
        for (int64_t k = begin; k < end; ++k) {
            const int64_t b = k / runs.count, first = k % runs.count * runs.rows;
            const int64_t last = std::min(s.H, first + runs.rows);
            of_o.take_sample(a, b);
            for (int64_t i = first; i < last; ++i) {
                for (int64_t j = 0; j < s.W; ++j) {
                    const int64_t p = i * s.W + j;
                    of_o.pixel(a.grad_o.at(b, 0, p), a.o ? a.o.at(b, 0, p) : nullptr, s.C, &grad[j * pitch]);
                }
                for (int64_t m = 0; m < a.layers; ++m) {
                    const A* weights = a.weights + (b * a.layers + m) * s.C;
                    A* products = &partials[k * vectors + m * s.C];
                    for (int64_t j = 0; j < s.W; ++j) {
                        const T* value = a.values[m].at(b, 0, i * s.W + j);
                        T* grad_value = a.grad_values ? a.grad_values[m].at(b, 0, i * s.W + j) : nullptr;
                        for (int64_t c = 0; c < s.C; c += N) {
                            const int64_t n = s.C - c;
                            const auto g = load<A>(&grad[j * pitch + c]);
                            store<A>(products + c, load<A>(products + c, n) + g * load<A>(value + c, n), n);
                            if (grad_value) store<A>(grad_value + c, load<A>(weights + c, n) * g, n);
                        }
                    }
                }
            }
        }
    });
    add_runs(s, runs.count, vectors, partials.get(), a.products);
}
