// From tensors to what kernels take, and the choice of the element type.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <vector>

#include "common/types.h"

namespace dla {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Shape shape_of(const Tensor& x) {
    const Shape s{x.size(0), x.size(1), x.size(2), x.size(3)};
    STD_TORCH_CHECK(s.HW() > 0, "a map must have at least one pixel, got ", s.H, " x ", s.W);
    return s;
}

// The distance between neighbouring pixels, or 0 where rows do not follow each other without gaps.
inline int64_t pixel_stride(const Tensor& x) {
    const int64_t H = x.size(2), W = x.size(3);
    if (W == 1) return H == 1 ? 1 : x.stride(2);
    return H == 1 || x.stride(2) == W * x.stride(3) ? x.stride(3) : 0;
}

// A single pixel or a single channel has both layouts; the one with the longer vectors is taken.
inline bool is_channels_last(const Tensor& x) {
    return x.size(1) > 1 && x.stride(1) == 1 && (x.size(2) * x.size(3) == 1 || pixel_stride(x) > 1);
}

inline bool is_planar(const Tensor& x) { return pixel_stride(x) == 1 && !is_channels_last(x); }

// x itself where its strides are those of a Map in this layout, else a copy in it.
inline Tensor in_layout(const Tensor& x, bool channels_last) {
    if (x.numel() == 0 || (channels_last ? is_channels_last(x) : is_planar(x))) return x;
    using torch::headeronly::MemoryFormat;
    if (!channels_last) return torch::stable::contiguous(x);
    if (x.size(2) * x.size(3) > 1) return torch::stable::contiguous(x, MemoryFormat::ChannelsLast);
    // One pixel: every dense layout is channels_last, but torch may keep the strides it finds.
    return torch::stable::contiguous(x);
}

inline std::optional<Tensor> in_layout(const std::optional<Tensor>& x, bool channels_last) {
    return x ? std::optional<Tensor>(in_layout(*x, channels_last)) : std::nullopt;
}

inline std::vector<Tensor> in_layout(const std::vector<Tensor>& maps, bool channels_last) {
    std::vector<Tensor> done;
    for (const Tensor& map : maps) done.push_back(in_layout(map, channels_last));
    return done;
}

// x as it is where a kernel can walk it, else a copy: the only copies of maps are made here and in in_layout.
inline Tensor walkable(const Tensor& x) {
    return x.numel() == 0 || is_channels_last(x) || is_planar(x) ? x : torch::stable::contiguous(x);
}

template <class T>
Map<T> map_of(const Tensor& x) {
    T* data;
    if constexpr (std::is_const_v<T>) {
        data = static_cast<T*>(x.const_data_ptr());
    } else {
        data = static_cast<T*>(x.mutable_data_ptr());
    }
    return {data, x.stride(0), x.stride(1), pixel_stride(x)};
}

// The same, null for an empty tensor and where there is none.
template <class T>
Map<T> map_if(const Tensor& x) {
    return x.numel() > 0 ? map_of<T>(x) : Map<T>{};
}

template <class T>
Map<T> map_if(const std::optional<Tensor>& x) {
    return x ? map_if<T>(*x) : Map<T>{};
}

// Vectors and weights: small, and contiguous from here on.
inline Tensor dense(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

inline std::optional<Tensor> dense(const std::optional<Tensor>& x) {
    return x ? std::optional<Tensor>(dense(*x)) : std::nullopt;
}

template <class A>
const A* data_of(const Tensor& x) {
    return static_cast<const A*>(x.const_data_ptr());
}

template <class A>
const A* data_of(const std::optional<Tensor>& x) {
    return x ? data_of<A>(*x) : nullptr;
}

template <class A>
A* mutable_data_of(const Tensor& x) {
    return static_cast<A*>(x.mutable_data_ptr());
}

// Uninitialised, on the device of `like` and of its dtype, or the given one. torch::stable::new_empty looks the op up
// by its name at every call, and the many tensors of an op on small maps took as long as its kernel.
inline Tensor new_tensor(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                         std::optional<ScalarType> of = std::nullopt) {
    int32_t dtype, layout, device, index;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(like.get(), &layout));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
    if (of) dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(*of));
    AtenTensorHandle made;
    if (aoti_torch_aten_new_empty(like.get(), sizes.data(), static_cast<int64_t>(sizes.size()), &dtype, &layout,
                                  &device, index, nullptr, &made) == TORCH_SUCCESS) {
        return Tensor(made);
    }
    return torch::stable::new_empty(like, sizes, of);  // which says why it cannot
}

inline Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> sizes) {
    return new_tensor(like, {sizes.begin(), sizes.size()}, std::nullopt);
}

// Uninitialised, of the dtype of recurrent state beside the map.
inline Tensor new_state(const Tensor& map, std::initializer_list<int64_t> sizes) {
    const auto dtype = map.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    return new_tensor(map, {sizes.begin(), sizes.size()}, dtype);
}

// Uninitialised, of the sizes, the layout and the dtype of x.
inline Tensor new_like(const Tensor& x) {
    return x.is_contiguous() ? new_tensor(x, x.sizes()) : torch::stable::empty_like(x);
}

// A map like this one, or the empty tensor that stands for one that is not needed.
inline Tensor map_or_empty(bool need, const Tensor& like) { return need ? new_like(like) : new_tensor(like, {0}); }

// Calls body with a null pointer to the map's element type, of which the two 16-bit ones have names of their own on
// every device.
template <class BFloat16Type, class HalfType, class Body>
void on_dtype_of(const Tensor& x, const Body& body) {
    switch (x.scalar_type()) {
        case ScalarType::Float:
            return body(static_cast<float*>(nullptr));
        case ScalarType::Double:
            return body(static_cast<double*>(nullptr));
        case ScalarType::BFloat16:
            return body(static_cast<BFloat16Type*>(nullptr));
        case ScalarType::Half:
            return body(static_cast<HalfType*>(nullptr));
        default:
            STD_TORCH_CHECK(false, "a map must be float32, float64, bfloat16 or float16");
    }
}

template <class Body>
void on_dtype(const Tensor& x, const Body& body) {
    on_dtype_of<BFloat16, Half>(x, body);
}

}  // namespace dla
