// Small matrix products of the recurrent state. Every element is summed by one thread in a fixed order. Included inside
// an instruction set's namespace.

// Calls body(i, n) with the n numbers from i on, at most a vector, for all of `size`; about `work` elements each.
template <class A, class Body>
void each_vector(int64_t size, int64_t work, const Body& body) {
    constexpr int L = kLanes<A>;
    parallel(ceil_div(size, L), L * work, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin * L; i < std::min(size, end * L); i += L) body(i, std::min<int64_t>(L, size - i));
    });
}

// Rows [begin, end) of so many, `all`, on which alone depends how each is summed.
struct Rows {
    int64_t begin, end, all;

    int64_t count() const { return end - begin; }
    Rows times(int64_t n) const { return {n * begin, n * end, n * all}; }
};

// The form of linear() for few rows: dot products, which read a filter where it lies.
template <class A>
void linear_of_few_rows(const Rows& of, int64_t N, int64_t K, const A* x, const Linear<A>& layer, const A* base,
                        int64_t rows_per_base, bool relu, A* out) {
    // The sums, a vector of each row and one of a filter fill the registers: 32 of 64 bytes, else 16.
    constexpr int L = kLanes<A>, kRows = DLA_VECTOR_BYTES == 64 ? 4 : 3, kColumns = 4;
    constexpr int kSome = L < kColumns ? L : kColumns;  // columns that are finished at a time
    const int64_t tiles = ceil_div(of.count(), kRows), whole = K / L * L;
    parallel(tiles * ceil_div(N, kColumns), kRows * kColumns * K / 8, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
            // All rows under a few filters, which stay in the cache, before the next ones.
            const int64_t m0 = of.begin + task % tiles * kRows, n0 = task / tiles * kColumns;
            // Beyond the edge the last row or column is computed again, and not stored.
            const A *rows[kRows], *filters[kColumns];
            for (int i = 0; i < kRows; ++i) rows[i] = x + std::min(m0 + i, of.end - 1) * K;
            for (int j = 0; j < kColumns; ++j) filters[j] = layer.weight + std::min(n0 + j, N - 1) * layer.pitch;
            Vec<A> sums[kRows][kColumns] = {};
            // Inlined, or the sums would leave the registers. Of a vector of x the first lanes may be left out.
            const auto add = [&](int64_t k, auto n, auto left_out) DLA_INLINE {
                Vec<A> v[kRows];
                for (int i = 0; i < kRows; ++i) v[i] = drop_lanes<A>(load<A>(rows[i] + k, n), left_out);
                for (int j = 0; j < kColumns; ++j) {
                    const Vec<A> w = load<A>(filters[j] + k, n);
                    for (int i = 0; i < kRows; ++i) sums[i][j] += v[i] * w;
                }
            };
            constexpr std::integral_constant<int64_t, L> kFull;
            constexpr std::integral_constant<int64_t, 0> kNone;
            for (int64_t k = 0; k < whole; k += L) add(k, kFull, kNone);
            if (whole < K && K < L) {
                add(0, K, kNone);
            } else if (whole < K) {
                add(K - L, kFull, L - (K - whole));  // the last vector, but for what the one before had of it
            }
            // Unrolled: the sums then stay in registers.
#pragma GCC unroll 4
            for (int i = 0; i < kRows; ++i) {
                const int64_t m = m0 + i;
                if (m >= of.end) break;
                A found[kColumns];
                sum_each<A>(sums[i][0], sums[i][1], sums[i][2], sums[i][3], found);
                for (int j = 0; j < kColumns; j += kSome) {
                    const int64_t at = n0 + j, n = N - at;
                    if (n <= 0) break;
                    auto value = load<A, kSome>(found + j);
                    if (layer.bias) value += load<A, kSome>(layer.bias + at, n);
                    if (base) value += load<A, kSome>(base + m / rows_per_base * N + at, n);
                    if (relu) value = value <= 0 ? decltype(value){} : value;
                    store<A, kSome>(out + m * N + at, value, n);
                }
            }
        }
    });
}

// So many rows pay for turning the filters.
constexpr int64_t kManyRows = 96;

// That for many rows: no sum is spread over the lanes of a vector.
template <class A>
void linear_of_many_rows(const Rows& of, int64_t N, int64_t K, const A* x, const Linear<A>& layer, const A* base,
                         int64_t rows_per_base, bool relu, A* out) {
    // The sums, two vectors of filters and a number fill 16 registers.
    constexpr int L = kLanes<A>, kRows = 6, kColumns = 2 * L;
    const int64_t parts = ceil_div(of.count(), kManyRows);
    parallel(parts * ceil_div(N, kColumns), kManyRows * kColumns * K / 8, [&](int64_t begin, int64_t end) {
        const Scratch<A> filters(K * kColumns, A(0));  // [K, kColumns]
        for (int64_t task = begin; task < end; ++task) {
            const int64_t n0 = task / parts * kColumns, n = std::min<int64_t>(kColumns, N - n0);
            if (task == begin || task % parts == 0) {
                for (int64_t j = 0; j < n; ++j) {
                    const A* filter = layer.weight + (n0 + j) * layer.pitch;
                    for (int64_t k = 0; k < K; ++k) filters[k * kColumns + j] = filter[k];
                }
            }
            const int64_t first = of.begin + task % parts * kManyRows, last = std::min(of.end, first + kManyRows);
            for (int64_t m0 = first; m0 < last; m0 += kRows) {
                const A* rows[kRows];  // beyond the edge the last one is computed again, and not stored
                for (int i = 0; i < kRows; ++i) rows[i] = x + std::min(m0 + i, last - 1) * K;
                Vec<A> sums[kRows][2] = {};
                for (int64_t k = 0; k < K; ++k) {
                    const Vec<A> w0 = load<A>(&filters[k * kColumns]), w1 = load<A>(&filters[k * kColumns + L]);
                    for (int i = 0; i < kRows; ++i) {
                        sums[i][0] += rows[i][k] * w0;
                        sums[i][1] += rows[i][k] * w1;
                    }
                }
                // Constant bounds: the sums then stay in registers.
                for (int i = 0; i < kRows; ++i) {
                    const int64_t m = m0 + i;
                    for (int v = 0; v < 2; ++v) {
                        const int64_t at = n0 + v * L, lanes = N - at;
                        if (m >= last || lanes <= 0) continue;
                        Vec<A> value = sums[i][v];
                        if (layer.bias) value += load<A>(layer.bias + at, lanes);
                        if (base) value += load<A>(base + m / rows_per_base * N + at, lanes);
                        if (relu) value = value <= A(0) ? Vec<A>{} : value;
                        store<A>(out + m * N + at, value, lanes);
                    }
                }
            }
        }
    });
}

// These rows of out [M, N] = x [M, K] W^T + bias, plus base [M / rows_per_base, N] where given; W [N, K].
template <class A>
void linear(const Rows& of, int64_t N, int64_t K, const A* x, const Linear<A>& layer, const A* base,
            int64_t rows_per_base, bool relu, A* out) {
    (of.all < kManyRows ? linear_of_few_rows<A> : linear_of_many_rows<A>)(of, N, K, x, layer, base, rows_per_base, relu,
                                                                          out);
}

// out [M, N] = a B, where a(m, k) = a[m * row + k * column], B [K, N] and out have rows `pitch` apart.
template <class A>
void product(int64_t M, int64_t N, int64_t K, const A* a, int64_t row, int64_t column, const A* b, int64_t b_pitch,
             A* out, int64_t out_pitch) {
    constexpr int L = kLanes<A>, kRows = 6, kVectors = 2;
    const int64_t columns = ceil_div(N, kVectors * L);
    parallel(ceil_div(M, kRows) * columns, kRows * kVectors * L * K / 8, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
            const int64_t m0 = task / columns * kRows, n0 = task % columns * kVectors * L;
            const A* rows[kRows];
            for (int i = 0; i < kRows; ++i) rows[i] = a + std::min(m0 + i, M - 1) * row;
            // Beyond the last whole tile, that of the last columns is computed whole and its new ones are stored.
            const int64_t from = std::max<int64_t>(0, std::min(n0, N - kVectors * L));
            const auto run = [&](auto lanes0, auto lanes1) __attribute__((always_inline)) {
                Vec<A> sums[kRows][kVectors] = {};
                for (int64_t k = 0; k < K; ++k) {
                    const A* at = b + k * b_pitch + from;
                    const Vec<A> v0 = load<A>(at, lanes0), v1 = load<A>(at + L, lanes1);
                    for (int i = 0; i < kRows; ++i) {
                        const A factor = rows[i][k * column];
                        sums[i][0] += factor * v0;
                        sums[i][1] += factor * v1;
                    }
                }
                for (int i = 0; i < kRows; ++i) {
                    if (m0 + i >= M) continue;
                    A found[kVectors * L];
                    store<A>(found, sums[i][0]);
                    store<A>(found + L, sums[i][1]);
                    std::copy_n(found + (n0 - from), std::min<int64_t>(kVectors * L, N - n0),
                                out + (m0 + i) * out_pitch + n0);
                }
            };
            // Full vectors as a constant: no check inside the loop, and the sums stay in registers.
            constexpr std::integral_constant<int64_t, L> kFull;
            if (N >= kVectors * L) {
                run(kFull, kFull);
            } else {
                run(std::min<int64_t>(L, N), std::max<int64_t>(0, N - L));
            }
        }
    });
}

// out [groups, N] = sums of M rows each of x [groups * M, N].
template <class A>
void add_rows(int64_t groups, int64_t M, int64_t N, const A* x, A* out) {
    constexpr int L = kLanes<A>;
    const int64_t vectors = ceil_div(N, L);
    parallel(groups * vectors, M * L, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
            const int64_t g = task / vectors, i = task % vectors * L, n = N - i;
            Vec<A> total = {};
            for (int64_t m = g * M; m < (g + 1) * M; ++m) total += load<A>(x + m * N + i, n);
            store<A>(out + g * N + i, total, n);
        }
    });
}
