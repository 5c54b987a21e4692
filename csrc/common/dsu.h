// The Dynamic Sharing Unit (Eq. 7, 8, 9) and its gradient. Included inside an instruction set's namespace.
#include "common/linear.h"
#include "common/math.h"

// What a step computes on its way. The backward computes it again: it is small, and saved for every pair of layers it
// would grow with the square of a stage's depth.
template <class A>
struct DsuStep {
    Scratch<A> reduced_y;  // [M, R], after the ReLU
    Scratch<A> reduced_h;  // [B, R], in the split form after the ReLU
    Scratch<A> gates;      // [M, 3C]: the sigmoids and the tanh
    Scratch<A> context;    // [M, C]
    Scratch<A> from_h;     // [B, 3C], h's part of the gates in the split form

    explicit DsuStep(const Dsu<A>& d)
        : reduced_y(d.M() * d.R),
          reduced_h(d.B * d.R),
          gates(d.M() * 3 * d.C),
          context(d.M() * d.C),
          from_h(d.joint ? 0 : d.B * 3 * d.C) {}
};

// A vector's activation takes as long as so many elements that are read and written.
constexpr int64_t kActivation = 16;

template <class A>
inline Vec<A> activate(Activation activation, Vec<A> c) {
    switch (activation) {
        case Activation::tanh:
            return tanh(c);
        case Activation::relu:
            return c <= 0 ? Vec<A>{} : c;
        case Activation::sigmoid:
            return sigmoid<A>(c);
        default:
            return c;
    }
}

// The activation's derivative at c.
template <class A>
inline Vec<A> activation_slope(Activation activation, Vec<A> c) {
    const Vec<A> value = activate<A>(activation, c);
    switch (activation) {
        case Activation::tanh:
            return A(1) - value * value;
        case Activation::relu:
            return c <= 0 ? Vec<A>{} : Vec<A>{} + A(1);
        case Activation::sigmoid:
            return value * (A(1) - value);
        default:
            return Vec<A>{} + A(1);
    }
}

// Calls body(samples) for all samples: with a part of them on each thread, from step to step without the others, where
// there are enough and the weights fit in the cache of each; else with all at once, and body's own loops divide them.
template <class A, class Body>
void over_samples(const Dsu<A>& d, const Body& body) {
    constexpr int64_t kRows = 16, kWeightBytes = 1 << 19;
    const int64_t weights = 5 * d.C * d.R;
    if (d.M() < kRows || weights * static_cast<int64_t>(sizeof(A)) > kWeightBytes) return body(Rows{0, d.B, d.B});
    parallel(d.B, d.T * (weights / 8 + kActivation * d.C),
             [&](int64_t begin, int64_t end) { body(Rows{begin, end, d.B}); });
}

// The elements of these samples in [M, C]: calls body(i, n) with the n numbers from i on.
template <class A, class Body>
void each_vector(const Dsu<A>& d, const Rows& samples, int64_t work, const Body& body) {
    const Rows of = samples.times(d.T * d.C);
    each_vector<A>(of.count(), work, [&](int64_t i, int64_t n) { body(of.begin + i, n); });
}

// Of these samples of y [M, C], h and c [B, C]: the step's insides and the new context.
template <class A>
void dsu_forward(const Dsu<A>& d, const Rows& samples, const A* y, const A* h, const A* c, const DsuStep<A>& step) {
    constexpr const A* kNone = nullptr;
    const int64_t C = d.C, R = d.R;
    const Rows rows = samples.times(d.T);
    linear(samples, R, C, h, d.reduce_h, kNone, 1, !d.joint, step.reduced_h.get());
    linear(rows, R, C, y, d.reduce_y, d.joint ? step.reduced_h.get() : kNone, d.T, true, step.reduced_y.get());
    if (!d.joint) linear(samples, 3 * C, R, step.reduced_h.get(), d.expand_h, kNone, 1, false, step.from_h.get());
    linear(rows, 3 * C, R, step.reduced_y.get(), d.expand_y, d.joint ? kNone : step.from_h.get(), d.T, false,
           step.gates.get());
    parallel(rows.count(), kActivation * C, [&](int64_t begin, int64_t end) {
        for (int64_t m = rows.begin + begin; m < rows.begin + end; ++m) {
            A* gates = &step.gates[m * 3 * C];
            for (int64_t j = 0; j < C; j += kLanes<A>) {
                const int64_t n = C - j;
                A *at_input = gates + d.input() + j, *at_forget = gates + d.forget() + j;
                A* at_candidate = gates + d.candidate() + j;
                const Vec<A> i = sigmoid<A>(load<A>(at_input, n)), f = sigmoid<A>(load<A>(at_forget, n));
                const Vec<A> candidate = tanh(load<A>(at_candidate, n));
                store<A>(at_input, i, n);
                store<A>(at_forget, f, n);
                store<A>(at_candidate, candidate, n);
                store<A>(&step.context[m * C + j], f * load<A>(c + m / d.T * C + j, n) + i * candidate, n);
            }
        }
    });
}

// A ReLU's gradient, where grad holds that of its output.
template <class A>
void through_relu(int64_t size, const A* output, A* grad) {
    each_vector<A>(size, 1, [&](int64_t i, int64_t n) {
        store<A>(grad + i, load<A>(output + i, n) <= 0 ? Vec<A>{} : load<A>(grad + i, n), n);
    });
}

// grad_context [M, C], in total -> grad_y [M, C], grad_h and grad_c [B, C], and those of the weights, in grads.
template <class A>
void dsu_backward(const Dsu<A>& d, const A* y, const A* h, const A* c, const DsuStep<A>& step, const A* grad_context,
                  const Dsu<A>& grads, A* grad_y, A* grad_h, A* grad_c) {
    const int64_t B = d.B, C = d.C, M = d.M(), R = d.R;
    const Scratch<A> grad_gates(M * 3 * C), grad_c_rows(M * C);
    parallel(M, kActivation * C, [&](int64_t begin, int64_t end) {
        for (int64_t m = begin; m < end; ++m) {
            const A* gates = &step.gates[m * 3 * C];
            A* to = &grad_gates[m * 3 * C];
            for (int64_t j = 0; j < C; j += kLanes<A>) {
                const int64_t n = C - j;
                const Vec<A> i = load<A>(gates + d.input() + j, n), f = load<A>(gates + d.forget() + j, n);
                const Vec<A> candidate = load<A>(gates + d.candidate() + j, n);
                const Vec<A> grad = load<A>(grad_context + m * C + j, n), before = load<A>(c + m / d.T * C + j, n);
                store<A>(to + d.input() + j, grad * candidate * i * (A(1) - i), n);
                store<A>(to + d.forget() + j, grad * before * f * (A(1) - f), n);
                store<A>(to + d.candidate() + j, grad * i * (A(1) - candidate * candidate), n);
                store<A>(&grad_c_rows[m * C + j], grad * f, n);
            }
        }
    });
    add_rows(B, d.T, C, grad_c_rows.get(), grad_c);

    add_rows(1, M, 3 * C, grad_gates.get(), grads.expand_y.bias);
    product(3 * C, R, M, grad_gates.get(), 1, 3 * C, step.reduced_y.get(), R, grads.expand_y.weight, R);
    const Scratch<A> grad_reduced(M * R);
    product(M, R, 3 * C, grad_gates.get(), 3 * C, 1, d.expand_y.weight, R, grad_reduced.get(), R);
    through_relu(M * R, step.reduced_y.get(), grad_reduced.get());
    product(R, C, M, grad_reduced.get(), 1, R, y, C, grads.reduce_y.weight, grads.reduce_y.pitch);
    product(M, C, R, grad_reduced.get(), R, 1, d.reduce_y.weight, d.reduce_y.pitch, grad_y, C);

    // h's branch sees the sums over the T rows that share an h.
    const Scratch<A> grad_reduced_h(B * R);
    if (d.joint) {
        add_rows(B, d.T, R, grad_reduced.get(), grad_reduced_h.get());
    } else {
        add_rows(1, M, R, grad_reduced.get(), grads.reduce_y.bias);
        const Scratch<A> grad_from_h(B * 3 * C);
        add_rows(B, d.T, 3 * C, grad_gates.get(), grad_from_h.get());
        std::copy_n(grads.expand_y.bias, 3 * C, grads.expand_h.bias);
        product(3 * C, R, B, grad_from_h.get(), 1, 3 * C, step.reduced_h.get(), R, grads.expand_h.weight, R);
        product(B, R, 3 * C, grad_from_h.get(), 3 * C, 1, d.expand_h.weight, R, grad_reduced_h.get(), R);
        through_relu(B * R, step.reduced_h.get(), grad_reduced_h.get());
        add_rows(1, B, R, grad_reduced_h.get(), grads.reduce_h.bias);
    }
    product(R, C, B, grad_reduced_h.get(), 1, R, h, C, grads.reduce_h.weight, grads.reduce_h.pitch);
    product(B, C, R, grad_reduced_h.get(), R, 1, d.reduce_h.weight, d.reduce_h.pitch, grad_h, C);
}
