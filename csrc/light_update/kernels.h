// light_update on the CPU, compiled once for every instruction set.
#include "common/fold.h"
#include "common/moments.h"
#include "light_update/filter_gradients.h"
#include "light_update/planes.h"
#include "light_update/rows.h"
#include "light_update/vectors.h"

// Calls body with the way the carry enters as a constant.
template <class Args, class Body>
void on_carry(const Args& a, const Body& body) {
    if (!a.carry_scale) return body(std::integral_constant<Carry, Carry::none>{});
    if (!a.carry_weight) return body(std::integral_constant<Carry, Carry::scaled>{});
    body(std::integral_constant<Carry, Carry::filtered>{});
}

template <class T>
void forward(const LightUpdateForward<T>& a, bool channels_last) {
    on_carry(a, [&](auto carry) {
        if (channels_last) return forward_rows_of<T, carry()>(a);
        on_width<Acc<T>, kForwardVectors>(a.shape.W,
                                          [&](auto lanes, auto k) { forward_planes_of<T, lanes(), k(), carry()>(a); });
    });
}

template <class T>
void backward(const LightUpdateBackward<T>& a, bool channels_last) {
    on_carry(a, [&](auto carry) {
        if (channels_last) return backward_rows_of<T, carry()>(a);
        on_width<Acc<T>, kBackwardVectors>(
            a.shape.W, [&](auto lanes, auto k) { backward_planes_of<T, lanes(), k(), carry()>(a); });
    });
}
