// layer_attention on the CPU, both layouts; compiled once for every instruction set. Each value map is read once, a
// piece at a time, while the sum over the layers stays in the caches.
#include "common/fold.h"
#include "common/moments.h"
#include "layer_attention/vectors.h"
#include "light_update/filter_gradients.h"

// What o's gradient is made of, for one vector.
template <class A>
struct NormVectors {
    Vec<A> factor, mean, scale, bias, slope, offset;

    Vec<A> gradient(Vec<A> grad_out, Vec<A> o) const {
        const Vec<A> centred = o - mean, normed = centred * scale + bias;
        return (normed <= 0 ? Vec<A>{} : factor * grad_out) + slope * centred + offset;
    }
};

#include "layer_attention/planes.h"
#include "layer_attention/rows.h"
