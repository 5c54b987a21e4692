// A 3x3 filter sliding along the rows of an NCHW map. It adds up the three rows that it covers first, for each of its
// columns where the pixels lie, and shifts these sums to meet at a pixel: two shifts a vector, however many maps and
// rows went in, and no load that lies between the vectors of a row. Included inside an instruction set's namespace.
// Whatever a row's loop calls is inlined by force: else GCC keeps filters and sums in memory.

// Calls body with the lanes of a map's vectors, half of them where a row is so short that the rest would idle, and with
// the vectors of a row where these are 1, 2 or 4 and the kernel can hold so many, kMost, in registers; else with 0.
template <class A, int kMost, class Body>
void on_width(int64_t W, const Body& body) {
    constexpr std::integral_constant<int, kLanes<A>> lanes{};
    if constexpr (lanes() > 8) {
        if (W <= 8) return body(std::integral_constant<int, 8>{}, std::integral_constant<int, 1>{});
    }
    switch (ceil_div(W, lanes())) {
        case 1:
            return body(lanes, std::integral_constant<int, 1>{});
        case 2:
            return body(lanes, std::integral_constant<int, 2>{});
        case 4:
            return body(lanes, std::integral_constant<int, kMost >= 4 ? 4 : 0>{});
        default:
            return body(lanes, std::integral_constant<int, 0>{});
    }
}

// What the filter's columns add up to.
template <class A, int N>
struct Columns {
    Vec<A, N> left = {}, middle = {}, right = {};

    // Adds one row's pixels, times its three taps.
    DLA_INLINE inline void add(const Vec<A, N>* taps, Vec<A, N> v) {
        left += taps[0] * v;
        middle += taps[1] * v;
        right += taps[2] * v;
    }
};

// A row of a map with those above and below, of K vectors each, in registers; zeros outside of the map.
template <class A, int N, int K>
struct Window {
    Vec<A, N> above[K] = {}, here[K] = {}, below[K] = {};

    // Moves one row down; at(j, n) gives the n numbers from column j on of the row that comes from below.
    template <class At>
    DLA_INLINE inline void move(const Cut<N>& row, const At& at) {
#pragma GCC unroll 4
        for (int k = 0; k < K; ++k) {
            above[k] = here[k];
            here[k] = below[k];
            below[k] = at(k * N, row.template size<K>(k));
        }
    }
    DLA_INLINE inline void add_to(Columns<A, N>& columns, const Vec<A, N>* taps, int k) const {
        columns.add(taps, above[k]);
        columns.add(taps + 3, here[k]);
        columns.add(taps + 6, below[k]);
    }
};

// The same in memory, for rows of any length; zeros is a row of them.
template <class T>
struct RowsAround {
    const T *above, *here, *below;

    RowsAround(const T* map, int64_t i, int64_t H, int64_t pitch, const T* zeros)
        : above(i > 0 ? map + (i - 1) * pitch : zeros),
          here(map + i * pitch),
          below(i + 1 < H ? map + (i + 1) * pitch : zeros) {}

    template <class A, int N>
    DLA_INLINE inline void add_to(Columns<A, N>& columns, const Vec<A, N>* taps, int64_t j, int64_t n) const {
        columns.add(taps, load_once<A, N>(above + j, n));
        columns.add(taps + 3, load_once<A, N>(here + j, n));
        columns.add(taps + 6, load_once<A, N>(below + j, n));
    }
};

// A vector of a filtered row: a pixel takes the left column's sum from its left neighbour, the right one's from its
// right neighbour; left and right are the columns of the vectors beside.
template <class A, int N>
DLA_INLINE inline Vec<A, N> meet(Vec<A, N> left, const Columns<A, N>& here, Vec<A, N> right) {
    return concat<A, N, N - 1>(left, here.left) + here.middle + concat<A, N, 1>(here.right, right);
}

// Calls put(j, n, v) with the vectors of a filtered row. columns_at(j, n) is called for one after the other, and what
// it gives beyond n comes from zeros.
template <class A, int N, class ColumnsAt, class Put>
DLA_INLINE inline void slide_row(const Cut<N>& row, const ColumnsAt& columns_at, const Put& put) {
    Vec<A, N> left = {};
    Columns<A, N> here;
    row.each([&](int64_t j, int64_t n) DLA_INLINE {
        const Columns<A, N> next = columns_at(j, n);
        if (j > 0) put(j - N, N, meet<A, N>(left, here, next.right));
        left = here.left;
        here = next;
    });
    put(row.last(), row.last_size(), meet<A, N>(left, here, Vec<A, N>{}));
}

// The same of K vectors that are there at once.
template <class A, int N, int K, class Put>
DLA_INLINE inline void slide_row(const Cut<N>& row, const Columns<A, N>* columns, const Put& put) {
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) {
        const Vec<A, N> left = k > 0 ? columns[k - 1].left : Vec<A, N>{};
        const Vec<A, N> right = k + 1 < K ? columns[k + 1].right : Vec<A, N>{};
        put(k * N, row.template size<K>(k), meet<A, N>(left, columns[k], right));
    }
}
