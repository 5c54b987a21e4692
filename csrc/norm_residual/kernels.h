// norm_residual on the CPU, both layouts; compiled once for every instruction set.

// out = x + keep * act((o - mean) * scale + bias) for one vector.
template <class A, int N = kLanes<A>>
inline Vec<A, N> normalise(Vec<A, N> o, Vec<A, N> mean, Vec<A, N> scale, Vec<A, N> bias, bool relu) {
    const Vec<A, N> n = (o - mean) * scale + bias;
    return relu ? (n <= 0 ? Vec<A, N>{} : n) : n;  // a NaN passes, as in torch
}

template <class T>
void forward_planes(const NormResidualForward<T>& a) {
    using A = Acc<T>;
    constexpr int N = kLanes<A>;
    const int64_t HW = a.shape.HW(), C = a.shape.C;
    parallel(a.shape.B * C, HW, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t b = i / C, c = i % C;
            const auto mean = broadcast(a.mean[c]), scale = broadcast(a.scale[c]), bias = broadcast(a.bias[c]);
            const auto keep = broadcast(a.keep ? a.keep[b] : A(1));
            const T *x = a.x.at(b, c, 0), *o = a.o.at(b, c, 0);
            T* out = a.out.at(b, c, 0);
            Vec<A> total = {};
            for (int64_t p = 0; p < HW; p += N) {
                const int64_t n = HW - p;
                const auto normed = normalise<A>(load<A>(o + p, n), mean, scale, bias, a.relu);
                const auto value = load<A>(x + p, n) + keep * normed;
                store<A>(out + p, value, n);
                total += keep_lanes<A>(value, n);
            }
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
    parallel(s.B * runs.count, runs.rows * s.W * s.C, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t b = i / runs.count, first = i % runs.count * runs.rows;
            const int64_t last = std::min(s.H, first + runs.rows);
            const auto keep = broadcast(a.keep ? a.keep[b] : A(1));
            A* total = totals.get() + i * s.C;
            for (int64_t p = first * s.W; p < last * s.W; ++p) {
                const T *x = a.x.at(b, 0, p), *o = a.o.at(b, 0, p);
                T* out = a.out.at(b, 0, p);
                for (int64_t c = 0; c < s.C; c += N) {
                    const int64_t n = s.C - c;
                    const auto normed = normalise<A>(load<A>(o + c, n), load<A>(a.mean + c, n), load<A>(a.scale + c, n),
                                                     load<A>(a.bias + c, n), a.relu);
                    const auto value = load<A>(x + c, n) + keep * normed;
                    store<A>(out + c, value, n);
                    store<A>(total + c, load<A>(total + c, n) + value, n);
                }
            }
        }
    });
    add_runs(s, runs.count, s.C, totals.get(), a.y);
    for (int64_t i = 0; i < s.B * s.C; ++i) a.y[i] /= A(s.HW());
}

// The gradients of one vector; the sums are those of NormResidualBackward.
template <class A>
struct GradientSums {
    Vec<A> grad = {}, grad_normed = {}, grad_keep = {};
};

template <class T, int N = kLanes<Acc<T>>, class A = Acc<T>>
inline void backward_vector(const NormResidualBackward<T>& a, const T* grad_out, const T* o, T* grad_x, T* grad_o,
                            int64_t n, Vec<A> grad_y, Vec<A> mean, Vec<A> scale, Vec<A> bias, Vec<A> keep,
                            GradientSums<A>& sums) {
    const auto g = keep_lanes<A>(load<A>(grad_out, n) + grad_y, n);
    if (grad_x) store<A>(grad_x, g, n);
    const auto centred = keep_lanes<A>(load<A>(o, n) - mean, n);
    const auto normed = centred * scale + bias;
    auto grad = g * keep;
    if (a.relu) grad = normed <= 0 ? Vec<A>{} : grad;
    sums.grad += grad;
    sums.grad_normed += grad * centred;
    if (a.grad_keep) sums.grad_keep += g * (a.relu ? (normed <= 0 ? Vec<A>{} : normed) : normed);
    if (grad_o) store<A>(grad_o, grad * scale, n);
}

template <class T>
void backward_planes(const NormResidualBackward<T>& a) {
    using A = Acc<T>;
    constexpr int N = kLanes<A>;
    const int64_t HW = a.shape.HW(), C = a.shape.C;
    parallel(a.shape.B * C, HW, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t b = i / C, c = i % C;
            const auto mean = broadcast(a.mean[c]), scale = broadcast(a.scale[c]), bias = broadcast(a.bias[c]);
            const auto keep = broadcast(a.keep ? a.keep[b] : A(1));
            const auto grad_y = broadcast(a.grad_y ? a.grad_y[i] / A(HW) : A(0));
            const T *grad_out = a.grad_out.at(b, c, 0), *o = a.o.at(b, c, 0);
            T* grad_x = a.grad_x ? a.grad_x.at(b, c, 0) : nullptr;
            T* grad_o = a.grad_o ? a.grad_o.at(b, c, 0) : nullptr;
            GradientSums<A> sums;
            for (int64_t p = 0; p < HW; p += N) {
                backward_vector<T>(a, grad_out + p, o + p, grad_x ? grad_x + p : nullptr, grad_o ? grad_o + p : nullptr,
                                   HW - p, grad_y, mean, scale, bias, keep, sums);
            }
            a.grad[i] = sum<A, N>(sums.grad);
            a.grad_normed[i] = sum<A, N>(sums.grad_normed);
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
    const Scratch<A> grads(tasks * s.C, A(0)), grads_normed(tasks * s.C, A(0));
    const Scratch<A> grads_keep(a.grad_keep ? tasks * s.C : 0, A(0));
    parallel(tasks, runs.rows * s.W * s.C, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t b = i / runs.count, first = i % runs.count * runs.rows;
            const int64_t last = std::min(s.H, first + runs.rows);
            const auto keep = broadcast(a.keep ? a.keep[b] : A(1));
            const A* grad_y = a.grad_y ? a.grad_y + b * s.C : nullptr;
            for (int64_t p = first * s.W; p < last * s.W; ++p) {
                const T *grad_out = a.grad_out.at(b, 0, p), *o = a.o.at(b, 0, p);
                T* grad_x = a.grad_x ? a.grad_x.at(b, 0, p) : nullptr;
                T* grad_o = a.grad_o ? a.grad_o.at(b, 0, p) : nullptr;
                for (int64_t c = 0; c < s.C; c += N) {
                    const int64_t n = s.C - c, j = i * s.C + c;
                    GradientSums<A> sums;
                    backward_vector<T>(a, grad_out + c, o + c, grad_x ? grad_x + c : nullptr,
                                       grad_o ? grad_o + c : nullptr, n,
                                       grad_y ? load<A>(grad_y + c, n) / A(s.HW()) : Vec<A>{}, load<A>(a.mean + c, n),
                                       load<A>(a.scale + c, n), load<A>(a.bias + c, n), keep, sums);
                    store<A>(&grads[j], load<A>(&grads[j], n) + sums.grad, n);
                    store<A>(&grads_normed[j], load<A>(&grads_normed[j], n) + sums.grad_normed, n);
                    if (a.grad_keep) store<A>(&grads_keep[j], load<A>(&grads_keep[j], n) + sums.grad_keep, n);
                }
            }
        }
    });
    add_runs(s, runs.count, s.C, grads.get(), a.grad);
    add_runs(s, runs.count, s.C, grads_normed.get(), a.grad_normed);
    if (a.grad_keep) add_runs(s, runs.count, s.C, grads_keep.get(), a.grad_keep);
}
