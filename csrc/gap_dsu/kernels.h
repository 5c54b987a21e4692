// gap_dsu on the CPU, both layouts; compiled once for every instruction set.
#include "common/dsu.h"

template <class T>
void pool_planes(const Shape& s, const Map<const T>& x, Acc<T>* y) {
    using A = Acc<T>;
    constexpr int N = kLanes<A>;
    const int64_t HW = s.HW();
    parallel(s.B * s.C, HW, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const T* plane = x.at(i / s.C, i % s.C, 0);
            Vec<A> totals[4] = {};  // four sums that do not wait for each other
            int64_t p = 0;
            for (; p + 4 * N <= HW; p += 4 * N) {
                for (int k = 0; k < 4; ++k) totals[k] += load<A>(plane + p + k * N);
            }
            for (; p < HW; p += N) totals[0] += load<A>(plane + p, HW - p);
            y[i] = sum<A, N>((totals[0] + totals[1]) + (totals[2] + totals[3])) / A(HW);
        }
    });
}

template <class T>
void pool_rows(const Shape& s, const Map<const T>& x, Acc<T>* y) {
    using A = Acc<T>;
    const RowRuns runs(s);
    const Scratch<A> totals(s.B * runs.count * s.C, A(0));
    parallel(s.B * runs.count, runs.rows * s.W * s.C, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t b = i / runs.count, first = i % runs.count * runs.rows;
            const int64_t last = std::min(s.H, first + runs.rows);
            A* total = &totals[i * s.C];
            for (int64_t p = first * s.W; p < last * s.W; ++p) {
                const T* pixel = x.at(b, 0, p);
                for (int64_t c = 0; c < s.C; c += kLanes<A>) {
                    store<A>(total + c, load<A>(total + c, s.C - c) + load<A>(pixel + c, s.C - c), s.C - c);
                }
            }
        }
    });
    add_runs(s, runs.count, s.C, totals.get(), y);
    for (int64_t i = 0; i < s.B * s.C; ++i) y[i] /= A(s.HW());
}

template <class A>
void forward(const GapDsuForward<A>& a) {
    const DsuStep<A> step(a.dsu);
    const int64_t size = a.dsu.M() * a.dsu.C;
    dsu_forward(a.dsu, a.y, a.h, a.c, step);
    for (int64_t i = 0; i < size; i += kLanes<A>) {
        const Vec<A> context = load<A>(&step.context[i], size - i);
        store<A>(a.new_c + i, context, size - i);
        store<A>(a.new_h + i, activate<A>(a.dsu.activation, context), size - i);
    }
}

template <class A>
void backward(const GapDsuBackward<A>& a) {
    const DsuStep<A> step(a.dsu);
    const int64_t size = a.dsu.M() * a.dsu.C;
    dsu_forward(a.dsu, a.y, a.h, a.c, step);
    const Scratch<A> grad_context(size);
    for (int64_t i = 0; i < size; i += kLanes<A>) {
        Vec<A> grad = {};
        if (a.grad_new_c) grad += load<A>(a.grad_new_c + i, size - i);
        if (a.grad_new_h) {
            const Vec<A> context = load<A>(&step.context[i], size - i);
            grad += load<A>(a.grad_new_h + i, size - i) * activation_slope<A>(a.dsu.activation, context);
        }
        store<A>(&grad_context[i], grad, size - i);
    }
    dsu_backward(a.dsu, a.y, a.h, a.c, step, grad_context.get(), a.grads, a.grad_y, a.grad_h, a.grad_c);
    for (int64_t i = 0; a.grad_of_y && i < size; ++i) a.grad_y[i] += a.grad_of_y[i];
}
