// refresh_gates on the CPU; compiled once for every instruction set.
#include "common/dsu.h"

// One step of these samples' prior layers, from their features as they are now, y = features * gates.
template <class A>
void refresh(const RefreshGates<A>& a, const Rows& samples, A* y, const DsuStep<A>& step) {
    each_vector(a.dsu, samples, 1, [&](int64_t i, int64_t n) {
        store<A>(y + i, load<A>(a.features + i, n) * load<A>(a.gates + i, n), n);
    });
    dsu_forward(a.dsu, samples, y, a.h, a.c, step);
}

// What gates a layer: the new context, or the new hidden state.
template <class A>
inline Vec<A> new_gate(const RefreshGates<A>& a, Vec<A> context) {
    return a.of_context ? context : activate<A>(a.dsu.activation, context);
}

template <class A>
void forward(const RefreshGatesForward<A>& a) {
    const DsuStep<A> step(a.dsu);
    const Scratch<A> y(a.dsu.M() * a.dsu.C);
    over_samples(a.dsu, [&](const Rows& samples) {
        refresh(a, samples, y.get(), step);
        each_vector(a.dsu, samples, kActivation, [&](int64_t i, int64_t n) {
            store<A>(a.out + i, load<A>(a.gates + i, n) * new_gate(a, load<A>(&step.context[i], n)), n);
        });
    });
}

template <class A>
void backward(const RefreshGatesBackward<A>& a) {
    const int64_t size = a.dsu.M() * a.dsu.C;
    const DsuStep<A> step(a.dsu);
    const Scratch<A> y(size), grad_context(size), grad_y(size);
    over_samples(a.dsu, [&](const Rows& samples) {
        refresh(a, samples, y.get(), step);
        each_vector(a.dsu, samples, kActivation, [&](int64_t i, int64_t n) {
            const Vec<A> context = load<A>(&step.context[i], n);
            Vec<A> grad = load<A>(a.grad + i, n) * load<A>(a.gates + i, n);
            if (!a.of_context) grad *= activation_slope<A>(a.dsu.activation, context);
            store<A>(&grad_context[i], grad, n);
        });
    });
    dsu_backward(a.dsu, y.get(), a.h, a.c, step, grad_context.get(), a.grads, grad_y.get(), a.grad_h, a.grad_c);
    each_vector<A>(size, kActivation, [&](int64_t i, int64_t n) {
        const Vec<A> of_y = load<A>(&grad_y[i], n), d = new_gate(a, load<A>(&step.context[i], n));
        store<A>(a.grad_features + i, of_y * load<A>(a.gates + i, n), n);
        store<A>(a.grad_gates + i, load<A>(a.grad + i, n) * d + of_y * load<A>(a.features + i, n), n);
    });
}
