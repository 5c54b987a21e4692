// Which maps are written past the caches.
#pragma once

#include <atomic>
#include <cstdint>

#include "common/shape.h"

namespace dla {

// Bytes that the caches are taken to hold, of which tests set less. What lies further back has left them.
inline std::atomic<int64_t> cache_bytes{1 << 25};

// Whether the results of an op, a map or two, are written past the caches: no line of theirs is then read before it is
// written, and none drives out another. That is done in wholes of 16 bytes, for `run` numbers at a time, which in
// channels_last must be whole lines. A result is read again only after `passing` maps.
template <class T>
bool go_past_caches(const Shape& s, int64_t run, const Map<T>& a, const Map<T>& b = {}, int64_t passing = 1) {
    constexpr int64_t size = sizeof(T);
    const auto fits = [=](const Map<T>& map) {
        const bool channels_last = map.channel == 1;
        const int64_t other = channels_last ? map.pixel : map.channel;
        const int64_t from = reinterpret_cast<intptr_t>(map.data) | map.batch * size | other * size | run * size;
        return from % (channels_last ? 64 : 16) == 0;
    };
    return passing * s.B * s.C * s.HW() * size > cache_bytes.load(std::memory_order_relaxed) && fits(a) && fits(b);
}

}  // namespace dla
