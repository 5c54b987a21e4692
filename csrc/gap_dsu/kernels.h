// gap_dsu on the CPU, both layouts; compiled once for every instruction set.
#include "common/dsu.h"
#include "common/moments.h"

template <class T>
void pool_planes(const Shape& s, const Map<const T>& x, Acc<T>* y) {
    using A = Acc<T>;
    const int64_t HW = s.HW();
    parallel(s.B * s.C, HW, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            y[i] = plane_sum(x.at(i / s.C, i % s.C, 0), HW) / A(HW);
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
            const auto [b, first, last] = runs.run(i);
            A* total = &totals[i * s.C];
            for (int64_t p = first * s.W; p < last * s.W; ++p) {
                const T* pixel = x.at(b, 0, p);
                for (int64_t c = 0; c < s.C; c += kLanes<A>) {
                    fetch_ahead<4>(pixel + c);
                    store<A>(total + c, load<A>(total + c, s.C - c) + load<A>(pixel + c, s.C - c), s.C - c);
                }
            }
        }
    });
    add_runs(s, runs.count, s.C, totals.get(), y);
    for (int64_t i = 0; i < s.B * s.C; ++i) y[i] /= A(s.HW());
}

// A step's new context and hidden state of these samples, [B, C]; either may be null.
template <class A>
void read_state(const Dsu<A>& dsu, const Rows& samples, const DsuStep<A>& step, A* h, A* c) {
    each_vector(dsu, samples, kActivation, [&](int64_t i, int64_t n) {
        const Vec<A> context = load<A>(&step.context[i], n);
        if (c) store<A>(c + i, context, n);
        if (h) store<A>(h + i, activate<A>(dsu.activation, context), n);
    });
}

template <class A>
void forward(const GapDsuForward<A>& a) {
    const DsuStep<A> step(a.dsu);
    over_samples(a.dsu, [&](const Rows& samples) {
        dsu_forward(a.dsu, samples, a.y, a.h, a.c, step);
        read_state(a.dsu, samples, step, a.new_h, a.new_c);
        if (!a.carried) return;
        dsu_forward(a.dsu, samples, a.carried, a.new_h, a.new_c, step);
        read_state(a.dsu, samples, step, a.of_context ? nullptr : a.gate, a.of_context ? a.gate : nullptr);
    });
}

// The gradient of a step's context, [B, C], from those of its hidden state and of itself; either may be null.
template <class A>
void context_gradient(const Dsu<A>& dsu, const DsuStep<A>& step, const A* grad_h, const A* grad_c, A* grad) {
    const int64_t size = dsu.M() * dsu.C;
    each_vector<A>(size, kActivation, [&](int64_t i, int64_t n) {
        Vec<A> g = grad_c ? load<A>(grad_c + i, n) : Vec<A>{};
        if (grad_h) {
            g += load<A>(grad_h + i, n) * activation_slope<A>(dsu.activation, load<A>(&step.context[i], n));
        }
        store<A>(grad + i, g, n);
    });
}

template <class A>
void add(const A* more, int64_t size, A* to) {
    for (int64_t i = 0; more && i < size; ++i) to[i] += more[i];
}

template <class A>
void backward(const GapDsuBackward<A>& a) {
    const DsuStep<A> step(a.dsu);
    const int64_t size = a.dsu.M() * a.dsu.C;
    const Scratch<A> grad_context(size);
    if (!a.carried) {
        over_samples(a.dsu, [&](const Rows& samples) { dsu_forward(a.dsu, samples, a.y, a.h, a.c, step); });
        context_gradient(a.dsu, step, a.grad_new_h, a.grad_new_c, grad_context.get());
        dsu_backward(a.dsu, a.y, a.h, a.c, step, grad_context.get(), a.grads, a.grad_y, a.grad_h, a.grad_c);
        return add(a.grad_of_y, size, a.grad_y);
    }
    const DsuStep<A> gating(a.dsu);
    const Scratch<A> new_h(size), new_c(size);
    over_samples(a.dsu, [&](const Rows& samples) {
        dsu_forward(a.dsu, samples, a.y, a.h, a.c, step);
        read_state(a.dsu, samples, step, new_h.get(), new_c.get());
        dsu_forward(a.dsu, samples, a.carried, new_h.get(), new_c.get(), gating);
    });
    // First back through the carry's step, which adds to the gradients of the new state and of the weights.
    const Scratch<A> grad_new_h(size), grad_new_c(size), first_weights(a.size);
    context_gradient(a.dsu, gating, a.of_context ? nullptr : a.grad_gate, a.of_context ? a.grad_gate : nullptr,
                     grad_context.get());
    dsu_backward(a.dsu, a.carried, new_h.get(), new_c.get(), gating, grad_context.get(), a.grads, a.grad_carried,
                 grad_new_h.get(), grad_new_c.get());
    std::copy_n(a.grad_weights, a.size, first_weights.get());
    add(a.grad_new_h, size, grad_new_h.get());
    add(a.grad_new_c, size, grad_new_c.get());
    context_gradient(a.dsu, step, grad_new_h.get(), grad_new_c.get(), grad_context.get());
    dsu_backward(a.dsu, a.y, a.h, a.c, step, grad_context.get(), a.grads, a.grad_y, a.grad_h, a.grad_c);
    add(first_weights.get(), a.size, a.grad_weights);
    add(a.grad_of_y, size, a.grad_y);
}
