// Vectors of one instruction set: DLA_VECTOR_BYTES wide where nothing else is said. Included by each_isa.h inside that
// set's namespace, several times, hence without an include guard.

template <class A, int N>
struct VectorOf {
    typedef A type __attribute__((vector_size(N * sizeof(A))));
};
template <class A>
constexpr int kLanes = DLA_VECTOR_BYTES / sizeof(A);
template <class A, int N = kLanes<A>>
using Vec = typename VectorOf<A, N>::type;

template <class To, class From>
inline To bit_cast(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

template <class A, int N = kLanes<A>>
inline Vec<A, N> broadcast(A value) {
    return value - Vec<A, N>{};  // one instruction, where a loop over the lanes may be one for each of them
}

// Asks for what a loop over so many streams comes to some vectors later, to read or to write. The hardware does so by
// itself, but stops at every page, and a loop of many instructions does not reach its next page in time. What is on its
// way of all streams together counts: with less memory waits, with more the first cache has no room. What is read once
// for long then leaves the caches first, and what a network comes back to stays there. Always inlined: GCC takes a call
// of a function that does nothing else for one without an effect.
constexpr int64_t kOnTheWay = 9216;  // bytes
template <int kStreams, class T>
DLA_INLINE inline void fetch_ahead(const T* p) {
    __builtin_prefetch(reinterpret_cast<const char*>(p) + kOnTheWay / kStreams, 0, 0);
}
template <int kStreams, class T>
DLA_INLINE inline void fetch_ahead_to_keep(const T* p) {
    __builtin_prefetch(reinterpret_cast<const char*>(p) + kOnTheWay / kStreams);
}
template <int kStreams, class T>
DLA_INLINE inline void fetch_ahead_to_write(const T* p) {
    __builtin_prefetch(reinterpret_cast<const char*>(p) + kOnTheWay / kStreams, 1);
}

// N numbers of type T from memory of any alignment, as accumulators.
template <class A, int N = kLanes<A>, class T>
inline Vec<A, N> load(const T* p) {
    if constexpr (std::is_same_v<T, A>) {
        Vec<A, N> v;
        std::memcpy(&v, p, sizeof(v));
        return v;
    } else if constexpr (std::is_same_v<T, BFloat16>) {
        Vec<uint16_t, N> bits;
        std::memcpy(&bits, p, sizeof(bits));
        return bit_cast<Vec<A, N>>(__builtin_convertvector(bits, Vec<uint32_t, N>) << 16);
    } else {
        static_assert(std::is_same_v<T, Half>);
#if DLA_F16C
        if constexpr (N == 8) {
            return bit_cast<Vec<A, N>>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
        }
#endif
#if DLA_VECTOR_BYTES == 64
        if constexpr (N == 16) {
            return bit_cast<Vec<A, N>>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
        }
#endif
        Vec<A, N> v;
        for (int i = 0; i < N; ++i) v[i] = static_cast<A>(p[i]);
        return v;
    }
}

// The reverse, rounding to nearest even.
template <class A, int N = kLanes<A>, class T>
inline void store(T* p, Vec<A, N> v) {
    if constexpr (std::is_same_v<T, A>) {
        std::memcpy(p, &v, sizeof(v));
    } else if constexpr (std::is_same_v<T, BFloat16>) {
        const auto bits = bit_cast<Vec<uint32_t, N>>(v);
        const auto rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
        const auto nan = Vec<uint32_t, N>{} + 0x7FC0u;  // rounding could carry a NaN's payload into an infinity
        const auto low = __builtin_convertvector(v != v ? nan : rounded, Vec<uint16_t, N>);
        std::memcpy(p, &low, sizeof(low));
    } else {
        static_assert(std::is_same_v<T, Half>);
#if DLA_F16C
        if constexpr (N == 8) {
            const __m128i bits = _mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bits);
            return;
        }
#endif
#if DLA_VECTOR_BYTES == 64
        if constexpr (N == 16) {
            const __m256i bits = _mm512_cvtps_ph(bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bits);
            return;
        }
#endif
        for (int i = 0; i < N; ++i) p[i] = static_cast<T>(static_cast<float>(v[i]));
    }
}

// n of N numbers. Moves of constant size, halving: the branches go the same way in every row of a map.
template <int N, class T>
inline void copy_some(T* to, const T* from, int64_t n) {
    if constexpr (N > 1) {
        if (n & (N / 2)) {
            std::memcpy(static_cast<void*>(to), from, N / 2 * sizeof(T));
            to += N / 2;
            from += N / 2;
        }
        copy_some<N / 2>(to, from, n);
    }
}

// Which of the lanes are among the first n.
template <class A, int N = kLanes<A>>
inline auto first_lanes(int64_t n) {
    using I = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
    Vec<I, N> lane;
    for (int i = 0; i < N; ++i) lane[i] = i;
    return lane < static_cast<I>(n);
}

// Bits for the first n of up to 16 numbers.
inline uint16_t first_bits(int64_t n) { return static_cast<uint16_t>((1u << n) - 1u); }

// The first n of N numbers, 0 <= n < N; zeros for the others, whose memory is not touched. As bits, whatever the type.
template <int N, class T>
inline void load_some(T* to, const T* p, int64_t n) {
#if DLA_VECTOR_BYTES == 64
    if constexpr (sizeof(T) * N == 64 && sizeof(T) == 4) {
        return _mm512_storeu_si512(to, _mm512_maskz_loadu_epi32(first_bits(n), p));
    } else if constexpr (sizeof(T) * N == 64 && sizeof(T) == 8) {
        return _mm512_storeu_si512(to, _mm512_maskz_loadu_epi64(static_cast<__mmask8>(first_bits(n)), p));
    } else if constexpr (sizeof(T) * N == 32 && sizeof(T) == 4) {
        return _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                                   _mm256_maskz_loadu_epi32(static_cast<__mmask8>(first_bits(n)), p));
    } else if constexpr (sizeof(T) * N == 32 && sizeof(T) == 2) {
        return _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_maskz_loadu_epi16(first_bits(n), p));
    }
#elif DLA_VECTOR_BYTES == 32
    if constexpr (sizeof(T) * N == 32 && sizeof(T) == 4) {
        const auto mask = bit_cast<__m256i>(first_lanes<float>(n));
        return _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                                   _mm256_maskload_epi32(reinterpret_cast<const int*>(p), mask));
    } else if constexpr (sizeof(T) * N == 32 && sizeof(T) == 8) {
        const auto mask = bit_cast<__m256i>(first_lanes<double>(n));
        return _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                                   _mm256_maskload_epi64(reinterpret_cast<const long long*>(p), mask));
    }
#endif
    std::memset(static_cast<void*>(to), 0, N * sizeof(T));
    copy_some<N>(to, p, n);
}

template <int N, class T>
inline void store_some(T* p, const T* from, int64_t n) {
#if DLA_VECTOR_BYTES == 64
    if constexpr (sizeof(T) * N == 64 && sizeof(T) == 4) {
        return _mm512_mask_storeu_epi32(p, first_bits(n), _mm512_loadu_si512(from));
    } else if constexpr (sizeof(T) * N == 64 && sizeof(T) == 8) {
        return _mm512_mask_storeu_epi64(p, static_cast<__mmask8>(first_bits(n)), _mm512_loadu_si512(from));
    } else if constexpr (sizeof(T) * N == 32 && sizeof(T) == 4) {
        return _mm256_mask_storeu_epi32(p, static_cast<__mmask8>(first_bits(n)),
                                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    } else if constexpr (sizeof(T) * N == 32 && sizeof(T) == 2) {
        return _mm256_mask_storeu_epi16(p, first_bits(n), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    }
#elif DLA_VECTOR_BYTES == 32
    if constexpr (sizeof(T) * N == 32 && sizeof(T) == 4) {
        const auto mask = bit_cast<__m256i>(first_lanes<float>(n));
        return _mm256_maskstore_epi32(reinterpret_cast<int*>(p), mask,
                                      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    } else if constexpr (sizeof(T) * N == 32 && sizeof(T) == 8) {
        const auto mask = bit_cast<__m256i>(first_lanes<double>(n));
        return _mm256_maskstore_epi64(reinterpret_cast<long long*>(p), mask,
                                      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    }
#endif
    copy_some<N>(p, from, n);
}

template <class A, int N = kLanes<A>, class T>
inline Vec<A, N> load(const T* p, int64_t n) {
    if (n >= N) return load<A, N>(p);
    T some[N];
    load_some<N>(some, p, n);
    return load<A, N>(some);
}

template <class A, int N = kLanes<A>, class T>
inline void store(T* p, Vec<A, N> v, int64_t n) {
    if (n >= N) return store<A, N>(p, v);
    T some[N];
    store<A, N>(some, v);
    store_some<N>(p, some, n);
}

// Writes the first n of N numbers of a result, past the caches or into them, then fetched ahead as one of kStreams;
// none says not to.
template <int kStreams, class A, int N = kLanes<A>, class T>
DLA_INLINE inline void write(bool past, T* p, Vec<A, N> v, int64_t n) {
#if DLA_MULTI_ISA
    if constexpr (N * sizeof(T) >= sizeof(__m128i)) {
        if (past) {
            T numbers[N];
            store<A, N>(numbers, v);
#pragma GCC unroll 4
            for (int i = 0; i < N; i += sizeof(__m128i) / sizeof(T)) {
                if (i >= n) break;
                __m128i some;
                std::memcpy(&some, numbers + i, sizeof(some));
                _mm_stream_si128(reinterpret_cast<__m128i*>(p + i), some);
            }
            return;
        }
    }
#endif
    if constexpr (kStreams > 0) fetch_ahead_to_write<kStreams>(p);
    store<A, N>(p, v, n);
}

// v in the first n lanes, zero in the others, whatever they hold.
template <class A, int N = kLanes<A>>
inline Vec<A, N> keep_lanes(Vec<A, N> v, int64_t n) {
    if (n >= N) return v;
    return first_lanes<A, N>(n) ? v : Vec<A, N>{};
}

// v without the first n lanes.
template <class A, int N = kLanes<A>>
inline Vec<A, N> drop_lanes(Vec<A, N> v, int64_t n) {
    if (n <= 0) return v;
    return first_lanes<A, N>(n) ? Vec<A, N>{} : v;
}

// load(p, n), once: GCC would read memory anew for every product with the vector.
template <class A, int N = kLanes<A>, class T>
DLA_INLINE inline Vec<A, N> load_once(const T* p, int64_t n = N) {
    Vec<A, N> v = load<A, N>(p, n);
#if DLA_MULTI_ISA
    asm("" : "+v"(v));
#endif
    return v;
}

// p, of which GCC then does not know that it has read from there.
template <class T>
DLA_INLINE inline const T* read_anew(const T* p) {
#if DLA_MULTI_ISA
    asm("" : "+r"(p));
#endif
    return p;
}

// Numbers in vectors: whole ones, then a tail, whose length, and masks made of it, no loop works out anew.
template <int N>
struct Cut {
    int64_t whole, tail;

    explicit Cut(int64_t n) : whole(n / N * N), tail(n - whole) {}

    // Calls body(i, n) for the n numbers from i on, one vector after the other.
    template <class Body>
    DLA_INLINE inline void each(const Body& body) const {
        for (int64_t i = 0; i < whole; i += N) body(i, N);
        if (tail > 0) body(whole, tail);
    }
    int64_t last() const { return tail > 0 ? whole : whole - N; }
    int64_t last_size() const { return tail > 0 ? tail : N; }
    // Of vector k, where there are K of them: all but the last are known to be whole.
    template <int K>
    DLA_INLINE inline int64_t size(int k) const {
        return k + 1 < K ? N : last_size();
    }
};

// v as a map of type T keeps it.
template <class T, class A, int N = kLanes<A>>
inline Vec<A, N> as_kept(Vec<A, N> v) {
    if constexpr (std::is_same_v<T, A>) {
        return v;
    } else {
        T kept[N];
        store<A, N>(kept, v);
        return load<A, N>(kept);
    }
}

// These lanes of a and, counted on, of b.
template <int... I, class V>
inline V lanes_of(V a, V b) {
#ifdef __clang__
    return __builtin_shufflevector(a, b, I...);
#else
    using Lane = std::conditional_t<sizeof(a[0]) == 8, int64_t, int32_t>;
    return __builtin_shuffle(a, b, Vec<Lane, sizeof...(I)>{I...});
#endif
}

template <int kFrom, class V, int... I>
inline V concat_lanes(V a, V b, std::integer_sequence<int, I...>) {
    return lanes_of<I + kFrom...>(a, b);
}

// The lanes of a from kFrom on, then the first ones of b.
template <class A, int N, int kFrom>
inline Vec<A, N> concat(Vec<A, N> a, Vec<A, N> b) {
    return concat_lanes<kFrom>(a, b, std::make_integer_sequence<int, N>{});
}

template <class A, int N = kLanes<A>>
inline A sum(Vec<A, N> v) {
    if constexpr (N == 1) {
        return v[0];
    } else {
        Vec<A, N / 2> halves[2];
        std::memcpy(halves, &v, sizeof(v));
        return sum<A, N / 2>(halves[0] + halves[1]);
    }
}

// In every four lanes a0 + a1, b0 + b1, a2 + a3, b2 + b3.
template <class V, int... I>
inline V add_neighbours(V a, V b, std::integer_sequence<int, I...>) {
    constexpr int N = sizeof...(I);
    return lanes_of<I / 2 * 2 + I % 2 * N...>(a, b) + lanes_of<I / 2 * 2 + I % 2 * N + 1 ...>(a, b);
}

// In every four lanes a0 + a2, a1 + a3, b0 + b2, b1 + b3.
template <class V, int... I>
inline V add_pairs(V a, V b, std::integer_sequence<int, I...>) {
    constexpr int N = sizeof...(I);
    return lanes_of<I / 4 * 4 + I % 2 + I % 4 / 2 * N...>(a, b) +
           lanes_of<I / 4 * 4 + I % 2 + I % 4 / 2 * N + 2 ...>(a, b);
}

// to [4] = the sum of each of four vectors.
template <class A, int N = kLanes<A>>
inline void sum_each(Vec<A, N> a, Vec<A, N> b, Vec<A, N> c, Vec<A, N> d, A* to) {
    if constexpr (N < 4) {
        to[0] = sum<A, N>(a), to[1] = sum<A, N>(b), to[2] = sum<A, N>(c), to[3] = sum<A, N>(d);
    } else {
        constexpr std::make_integer_sequence<int, N> kAll;
        const auto fours = add_pairs(add_neighbours(a, b, kAll), add_neighbours(c, d, kAll), kAll);
        Vec<A, 4> total = {}, parts[N / 4];
        std::memcpy(parts, &fours, sizeof(fours));
        for (int i = 0; i < N / 4; ++i) total += parts[i];
        store<A, 4>(to, total);
    }
}

// A long sum over vectors, in four parts that do not wait for each other.
template <class A, int N = kLanes<A>>
struct LongSum {
    Vec<A, N> parts[4] = {};

    DLA_INLINE inline void add(Vec<A, N> v) {
        const Vec<A, N> next = parts[0] + v;
        parts[0] = parts[1];
        parts[1] = parts[2];
        parts[2] = parts[3];
        parts[3] = next;
    }

    A total() const { return sum<A, N>((parts[0] + parts[1]) + (parts[2] + parts[3])); }
};
