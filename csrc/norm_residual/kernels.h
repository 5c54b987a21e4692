// norm_residual on the CPU, both layouts; compiled once for every instruction set.
#include "common/moments.h"

template <class A, int N = kLanes<A>>
inline Vec<A, N> rectify(Vec<A, N> v) {
    return v <= 0 ? Vec<A, N>{} : v;  // a NaN passes, as in torch
}

// x + keep * act((o - mean) * scale + bias), or act of the sum, for one vector.
template <class A>
inline Vec<A> add_normed(Vec<A> x, Vec<A> o, Vec<A> mean, Vec<A> scale, Vec<A> bias, Vec<A> keep, Relu relu) {
    Vec<A> normed = (o - mean) * scale + bias;
    if (relu == Relu::branch) normed = rectify<A>(normed);
    const Vec<A> sum = x + keep * normed;
    return relu == Relu::sum ? rectify<A>(sum) : sum;
}

// The mean and the variance of every plane, [B, C]: two passes over what lies in the cache by the second.
template <class T>
void moments_planes(const Map<const T>& o, const Shape& s, Acc<T>* mean, Acc<T>* var) {
    using A = Acc<T>;
    const int64_t HW = s.HW();
    parallel(s.B * s.C, HW, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const T* from = o.at(i / s.C, i % s.C, 0);
            mean[i] = plane_sum(from, HW) / A(HW);
            var[i] = squared_deviations(from, HW, mean[i]) / A(HW);
        }
    });
}

// The same of a channels_last map, row by row.
template <class T>
void moments_rows(const Map<const T>& o, const Shape& s, Acc<T>* mean, Acc<T>* var) {
    using A = Acc<T>;
    constexpr int N = kLanes<A>;
    const RowRuns runs(s);
    const int64_t tasks = s.B * runs.count;
    const Scratch<A> totals(tasks * s.C, A(0)), deviations(tasks * s.C, A(0));
    parallel(tasks, runs.rows * s.W * s.C, [&](int64_t begin, int64_t end) {
        for (int64_t k = begin; k < end; ++k) {
            const auto [b, first, last] = runs.run(k);
            RunningMoments<A> moments{&totals[k * s.C], &deviations[k * s.C]};
            for (int64_t i = first; i < last; ++i) {
                const T* row = o.at(b, 0, i * s.W);
                for (int64_t c = 0; c < s.C; c += N) {
                    const int64_t n = s.C - c;
                    Vec<A> total = {}, squares = {};
                    for (int64_t j = 0; j < s.W; ++j) {
                        fetch_ahead_to_keep<1>(row + j * o.pixel + c);
                        total += load<A>(row + j * o.pixel + c, n);
                    }
                    const Vec<A> centre = total / A(s.W);
                    for (int64_t j = 0; j < s.W; ++j) {
                        const Vec<A> centred = load<A>(row + j * o.pixel + c, n) - centre;
                        squares += centred * centred;
                    }
                    moments.add(c, n, s.W, total, squares);
                }
                moments.count += s.W;
            }
        }
    });
    merge_runs(s, runs, totals.get(), deviations.get(), mean, var);
}

template <class T>
void forward_planes(const NormResidualForward<T>& a) {
    using A = Acc<T>;
    constexpr int N = kLanes<A>;
    const int64_t HW = a.shape.HW(), C = a.shape.C;
    const bool past = go_past_caches(a.shape, HW, a.out);
    parallel(a.shape.B * C, HW, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t b = i / C, c = i % C;
            const auto mean = broadcast(a.mean[c]), scale = broadcast(a.scale[c]), bias = broadcast(a.bias[c]);
            const auto keep = broadcast(a.keep ? a.keep[b] : A(1));
            const T *x = a.x.at(b, c, 0), *o = a.o.at(b, c, 0);
            T* out = a.out.at(b, c, 0);
            Vec<A> total = {};
            Cut<N>(HW).each([&, relu = a.relu](int64_t p, int64_t n) DLA_INLINE {
                const auto residual = x ? load<A>(x + p, n) : Vec<A>{};
                const auto value = add_normed<A>(residual, load<A>(o + p, n), mean, scale, bias, keep, relu);
                write<0, A>(past, out + p, value, n);
                total += keep_lanes<A>(value, n);
            });
            a.y[i] = sum<A, N>(total) / A(HW);
        }
    });
}

template <class T>
void forward_rows(const NormResidualForward<T>& a) {
    using A = Acc<T>;
    constexpr int N = kLanes<A>;
    const Shape& s = a.shape;
    const RowRuns runs(s);
    const Scratch<A> totals(s.B * runs.count * s.C, A(0));
    const bool past = go_past_caches(s, s.C, a.out);
    parallel(s.B * runs.count, runs.rows * s.W * s.C, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const auto [b, first, last] = runs.run(i);
            const auto keep = broadcast(a.keep ? a.keep[b] : A(1));
            A* total = totals.get() + i * s.C;
            for (int64_t p = first * s.W; p < last * s.W; ++p) {
                const T *x = a.x.at(b, 0, p), *o = a.o.at(b, 0, p);
                T* out = a.out.at(b, 0, p);
                for (int64_t c = 0; c < s.C; c += N) {
                    const int64_t n = s.C - c;
                    if (x) fetch_ahead<3>(x + c);
                    fetch_ahead<3>(o + c);
                    const auto residual = x ? load<A>(x + c, n) : Vec<A>{};
                    const auto value = add_normed<A>(residual, load<A>(o + c, n), load<A>(a.mean + c, n),
                                                     load<A>(a.scale + c, n), load<A>(a.bias + c, n), keep, a.relu);
                    write<0, A>(past, out + c, value, n);
                    store<A>(total + c, load<A>(total + c, n) + value, n);
                }
            }
        }
    });
    add_runs(s, runs.count, s.C, totals.get(), a.y);
    for (int64_t i = 0; i < s.B * s.C; ++i) a.y[i] /= A(s.HW());
}

// What a vector's gradients take from its channels.
template <class A>
struct ChannelVectors {
    Vec<A> mean, scale, bias, slope, offset;
};

template <class A>
struct GradientSums {
    Vec<A> grad = {}, grad_normed = {}, grad_keep = {};
};

// The gradients of one vector; the pointers stand where it begins, the sums are those of NormResidualBackward.
template <class T, class A = Acc<T>>
inline void backward_vector(const T* grad_out, const T* o, const T* out, T* grad_x, T* grad_o, bool past, int64_t n,
                            Vec<A> grad_y, const ChannelVectors<A>& of, Vec<A> keep, Relu relu, GradientSums<A>& sums) {
    Vec<A> g = load<A>(grad_out, n) + grad_y;
    if (relu == Relu::sum) g = load<A>(out, n) <= 0 ? Vec<A>{} : g;
    g = keep_lanes<A>(g, n);
    if (grad_x) write<0, A>(past, grad_x, g, n);
    const Vec<A> centred = keep_lanes<A>(load<A>(o, n) - of.mean, n);
    const Vec<A> normed = centred * of.scale + of.bias;
    Vec<A> grad = g * keep;
    if (relu == Relu::branch) grad = normed <= 0 ? Vec<A>{} : grad;
    sums.grad += grad;
    sums.grad_normed += grad * centred;
    sums.grad_keep += g * (relu == Relu::branch ? rectify<A>(normed) : normed);
    if (grad_o) write<0, A>(past, grad_o, grad * of.scale + of.slope * centred + of.offset, n);
}

template <class T>
void backward_planes(const NormResidualBackward<T>& a) {
    using A = Acc<T>;
    constexpr int N = kLanes<A>;
    const int64_t HW = a.shape.HW(), C = a.shape.C;
    const bool past = go_past_caches(a.shape, HW, a.grad_x, a.grad_o);
    parallel(a.shape.B * C, HW, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t b = i / C, c = i % C;
            const ChannelVectors<A> of{broadcast(a.mean[c]), broadcast(a.scale[c]), broadcast(a.bias[c]),
                                       broadcast(a.slope ? a.slope[c] : A(0)),
                                       broadcast(a.offset ? a.offset[c] : A(0))};
            const auto keep = broadcast(a.keep ? a.keep[b] : A(1));
            const auto grad_y = broadcast(a.grad_y ? a.grad_y[i] / A(HW) : A(0));
            const T *grad_out = a.grad_out.at(b, c, 0), *o = a.o.at(b, c, 0), *out = a.out.at(b, c, 0);
            T* grad_x = a.grad_x ? a.grad_x.at(b, c, 0) : nullptr;
            T* grad_o = a.grad_o ? a.grad_o.at(b, c, 0) : nullptr;
            GradientSums<A> sums;
            // What the sums have read, the gradients' pass reads again.
            const auto fetch = [last = bool(a.grad_o)](const T* from)
                                   DLA_INLINE { last ? fetch_ahead<4>(from) : fetch_ahead_to_keep<4>(from); };
            Cut<N>(HW).each([&, relu = a.relu](int64_t p, int64_t n) DLA_INLINE {
                fetch(grad_out + p);
                fetch(o + p);
                if (relu == Relu::sum) fetch(out + p);
                backward_vector<T>(grad_out + p, o + p, out + p, grad_x ? grad_x + p : nullptr,
                                   grad_o ? grad_o + p : nullptr, past, n, grad_y, of, keep, relu, sums);
            });
            if (a.grad) a.grad[i] = sum<A, N>(sums.grad);
            if (a.grad_normed) a.grad_normed[i] = sum<A, N>(sums.grad_normed);
            if (a.grad_keep) a.grad_keep[i] = sum<A, N>(sums.grad_keep);
        }
    });
}

template <class T>
void backward_rows(const NormResidualBackward<T>& a) {
    using A = Acc<T>;
    constexpr int N = kLanes<A>;
    const Shape& s = a.shape;
    const RowRuns runs(s);
    const int64_t tasks = s.B * runs.count;
    // For every run the sums that are wanted, [3, tasks, C].
    A* const wanted[3] = {a.grad, a.grad_normed, a.grad_keep};
    const Scratch<A> partials(3 * tasks * s.C, A(0));
    const bool past = go_past_caches(s, s.C, a.grad_x, a.grad_o);
    parallel(tasks, runs.rows * s.W * s.C, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const auto [b, first, last] = runs.run(i);
            const auto keep = broadcast(a.keep ? a.keep[b] : A(1));
            const A* grad_y = a.grad_y ? a.grad_y + b * s.C : nullptr;
            for (int64_t p = first * s.W; p < last * s.W; ++p) {
                const T *grad_out = a.grad_out.at(b, 0, p), *o = a.o.at(b, 0, p), *out = a.out.at(b, 0, p);
                T *grad_x = a.grad_x.at(b, 0, p), *grad_o = a.grad_o.at(b, 0, p);
                for (int64_t c = 0; c < s.C; c += N) {
                    const int64_t n = s.C - c;
                    const auto load_or_zero = [&](const A* from) { return from ? load<A>(from + c, n) : Vec<A>{}; };
                    const ChannelVectors<A> of{load<A>(a.mean + c, n), load<A>(a.scale + c, n), load<A>(a.bias + c, n),
                                               load_or_zero(a.slope), load_or_zero(a.offset)};
                    GradientSums<A> sums;
                    backward_vector<T>(grad_out + c, o + c, out + c, a.grad_x ? grad_x + c : nullptr,
                                       a.grad_o ? grad_o + c : nullptr, past, n, load_or_zero(grad_y) / A(s.HW()), of,
                                       keep, a.relu, sums);
                    const Vec<A> found[3] = {sums.grad, sums.grad_normed, sums.grad_keep};
                    for (int k = 0; k < 3; ++k) {
                        if (!wanted[k]) continue;
                        A* partial = &partials[(k * tasks + i) * s.C + c];
                        store<A>(partial, load<A>(partial, n) + found[k], n);
                    }
                }
            }
        }
    });
    for (int k = 0; k < 3; ++k) {
        if (wanted[k]) add_runs(s, runs.count, s.C, &partials[k * tasks * s.C], wanted[k]);
    }
}
