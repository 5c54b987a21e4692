// exp, sigmoid and tanh of vectors. Included inside an instruction set's namespace.

template <class A, class F>
inline Vec<A> each_lane(Vec<A> x, const F& f) {
    for (int i = 0; i < kLanes<A>; ++i) x[i] = f(x[i]);
    return x;
}

inline Vec<double> exp(Vec<double> x) {
    return each_lane<double>(x, [](double v) { return std::exp(v); });
}

// 2^n times the Taylor polynomial of degree 7 around 0 for what is left, at most ln 2 / 2 = 0.35: the first term left
// out is 0.35^8 / 8! = 6e-9, a tenth of an ulp. Beyond +-87 the result, or its inverse, would leave the normal numbers.
inline Vec<float> exp(Vec<float> x) {
    using V = Vec<float>;
    using I = Vec<int32_t>;
    const V clamped = x > 87.0f ? V{} + 87.0f : x < -87.0f ? V{} - 87.0f : x;
    const V scaled = clamped * 1.44269504f;  // 1 / ln 2
    const I n = __builtin_convertvector(scaled < 0.0f ? scaled - 0.5f : scaled + 0.5f, I);
    const V whole = __builtin_convertvector(n, V);
    // ln 2 in two parts, the first of few enough bits that its product is exact
    const V r = (clamped - whole * 0.693359375f) + whole * 2.12194440e-4f;
    V p = V{} + 1.0f / 5040;
    for (const float factor : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = p * r + factor;
    const V result = p * bit_cast<V>((n + 127) << 23);
    return x != x ? x : result;
}

template <class A>
inline Vec<A> sigmoid(Vec<A> x) {
    return A(1) / (A(1) + exp(-x));
}

inline Vec<double> tanh(Vec<double> x) {
    return each_lane<double>(x, [](double v) { return std::tanh(v); });
}

// Near 0, where the quotient would lose digits, the Taylor polynomial: the first term left out is below 1e-9 of x.
inline Vec<float> tanh(Vec<float> x) {
    const Vec<float> square = x * x;
    const Vec<float> near =
        x + x * square *
                (-1.0f / 3 + square * (2.0f / 15 + square * (-17.0f / 315 +
                                                             square * (62.0f / 2835 - square * (1382.0f / 155925)))));
    const Vec<float> far = 1.0f - 2.0f / (1.0f + exp(x + x));
    return square < 0.0625f ? near : far;
}
