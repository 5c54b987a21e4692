// layer_attention's backward: o's gradient in registers, every value map and every later gradient read once.
#pragma once

#include "layer_attention/block.cuh"

namespace dla::layer_attention {

// What the gradient of a channel needs of its BatchNorm.
constexpr int kLines = 6;

// Bytes of shared memory: tables [lines + layers + later, channels], then what attention takes, and in its place for
// each warp the products of its channels.
template <class T, class A = Acc<T>>
inline int64_t backward_shared(const Backward<T>& a, const Plan& p, int channels) {
    const int64_t products = a.range.count * p.threads() / kWarp * (channels / p.teams);
    const int64_t scratch = attend_shared(a.attention, channels);
    return ((kLines + a.range.count + a.later_count) * channels + (products > scratch ? products : scratch)) *
           sizeof(A);
}

template <class T, class P>
__global__ void __launch_bounds__(kMaxThreads, sizeof(T) == 8 ? 1 : 2)
    backward(const __grid_constant__ Backward<T> a, const __grid_constant__ Plan plan) {
    using A = Acc<T>;
    const Shape& s = a.shape;
    const P p(plan, s);
    const int warp = threadIdx.x / kWarp, warps = plan.threads() / kWarp, width = plan.lanes * P::kChannels;
    A* const lines = shared_memory<A>();
    A* const weights = lines + kLines * p.channels;
    A* const later = weights + a.range.count * p.channels;
    A* const products = later + a.later_count * p.channels;  // [layers, warps, width]
    attend(a.attention, s, p.b, p.c0, p.channels, a.range, products, weights);

    for (int i = threadIdx.x; i < p.channels; i += blockDim.x) {
        const int64_t c = min(int64_t(p.c0 + i), s.C - 1);
        const A inverse_std = A(1) / sqrt(a.norm.var[c] + a.norm.eps), scale = a.norm.weight[c] * inverse_std;
        lines[i] = a.norm.mean[c];
        lines[p.channels + i] = scale;
        lines[2 * p.channels + i] = a.norm.bias[c];
        lines[3 * p.channels + i] = a.keep ? scale * a.keep[p.b] : scale;
        lines[4 * p.channels + i] = a.sum_weight ? -scale * inverse_std * a.sum_weight[c] / a.count : A(0);
        lines[5 * p.channels + i] = a.sum_bias ? -scale * a.sum_bias[c] / a.count : A(0);
    }
    for (int i = threadIdx.x; i < a.later_count * p.channels; i += blockDim.x) {
        const int j = i / p.channels;
        const int64_t c = min(int64_t(p.c0 + i % p.channels), s.C - 1);
        later[i] = a.later_weights[j][p.b * a.later_batch[j] + c];
    }
    for (int i = threadIdx.x; i < a.range.count * warps * width; i += blockDim.x) products[i] = 0;
    __syncthreads();

    A* own_products = nullptr;  // of the first lanes of a warp, which take the sums
    if (threadIdx.x % kWarp < plan.lanes) own_products = products + warp * width + p.lane * P::kChannels;
    const bool own = a.range.count > 0 && a.range.first + a.range.count == a.attention.layers;
    for (int step = 0; step < plan.steps; ++step) {
        const int at = p.at + step * p.stride * kDepth;
        A grad[kDepth][P::N];
        {
            A o[kDepth][P::N], factor[P::kChannels], more[P::kChannels];
            p.load_all(a.o, at, o);
            p.load_all(a.grad_out, at, grad);
            const auto each = [&](const auto& body) {
#pragma unroll
                for (int i = 0; i < kDepth; ++i) {
#pragma unroll
                    for (int e = 0; e < P::N; ++e) body(i, e, e % P::kChannels);
                }
            };
            p.load_channels(lines, more);
            each([&](int i, int e, int c) { o[i][e] -= more[c]; });
            p.load_channels(lines + p.channels, factor);
            p.load_channels(lines + 2 * p.channels, more);
            each([&](int i, int e, int c) { grad[i][e] = o[i][e] * factor[c] + more[c] > A(0) ? grad[i][e] : A(0); });
            p.load_channels(lines + 3 * p.channels, factor);
            each([&](int i, int e, int c) { grad[i][e] *= factor[c]; });
            p.load_channels(lines + 4 * p.channels, factor);
            p.load_channels(lines + 5 * p.channels, more);
            each([&](int i, int e, int c) {
                const bool inside = at + i * p.stride < p.end;
                grad[i][e] = inside ? grad[i][e] + (factor[c] * o[i][e] + more[c]) : A(0);
            });
        }
        if (a.grad_o) p.store_all(a.grad_o, at, grad);

        p.each_map(a.values, a.range.count, at, [&](int m, const A(&value)[kDepth][P::N]) {
            A sums[P::kChannels] = {};
#pragma unroll
            for (int i = 0; i < kDepth; ++i) {
#pragma unroll
                for (int e = 0; e < P::N; ++e) sums[e % P::kChannels] += grad[i][e] * value[i][e];
            }
            for (int offset = kWarp / 2; offset >= plan.lanes; offset /= 2) {
#pragma unroll
                for (int c = 0; c < P::kChannels; ++c) sums[c] += __shfl_xor_sync(kAllLanes, sums[c], offset);
            }
            if (own_products) {
                A* to = own_products + m * warps * width;
#pragma unroll
                for (int c = 0; c < P::kChannels; ++c) to[c] += sums[c];
            }
        });

        if (!a.grad_value && !a.after) continue;
        // The gradient of the layer's own value map takes the place of o's.
        A weight[P::kChannels] = {};
        if (own) p.load_channels(weights + (a.range.count - 1) * p.channels, weight);
#pragma unroll
        for (int i = 0; i < kDepth; ++i) {
#pragma unroll
            for (int e = 0; e < P::N; ++e) grad[i][e] *= weight[e % P::kChannels];
        }
        if (a.before) {
            A before[kDepth][P::N];
            p.template load_all<A>({a.before.data, a.before.batch, a.before.channel, a.before.pixel}, at, before);
#pragma unroll
            for (int i = 0; i < kDepth; ++i) {
#pragma unroll
                for (int e = 0; e < P::N; ++e) grad[i][e] += before[i][e];
            }
        }
        p.each_map(a.later, a.later_count, at, [&](int j, const A(&more)[kDepth][P::N]) {
            p.load_channels(later + j * p.channels, weight);
#pragma unroll
            for (int i = 0; i < kDepth; ++i) {
#pragma unroll
                for (int e = 0; e < P::N; ++e) grad[i][e] += weight[e % P::kChannels] * more[i][e];
            }
        });
        if (a.after) {
            p.store_all(a.after, at, grad);
        } else {
            p.store_all(a.grad_value, at, grad);
        }
    }

    __syncthreads();
    const int of_team = plan.team / kWarp;
    for (int i = threadIdx.x; i < a.range.count * p.channels; i += blockDim.x) {
        const int m = i / p.channels, channel = i % p.channels;
        const int64_t c = p.c0 + channel;
        if (c >= s.C) continue;
        const A* of = products + (m * warps + channel / width * of_team) * width + channel % width;
        A sum = 0;
        for (int w = 0; w < of_team; ++w) sum += of[w * width];
        a.parts[((int64_t(p.b) * plan.runs + p.run) * a.attention.layers + a.range.first + m) * s.C + c] = sum;
    }
}

// The parts of a head's products -> the weights and the gradients of q, k and gates: a block for each sample and head.
constexpr int kHeadThreads = 128;

template <class T>
__global__ void __launch_bounds__(kHeadThreads)
    head_gradients(const __grid_constant__ Backward<T> a, const __grid_constant__ Plan plan) {
    using A = Acc<T>;
    const auto& of = a.attention;
    const int64_t C = a.shape.C, heads = C / of.head_dim, b = blockIdx.x / heads, h = blockIdx.x % heads;
    const int layers = static_cast<int>(of.layers), lane = threadIdx.x % kWarp;
    A* const attention = shared_memory<A>();  // [layers]
    A* const grads = attention + layers;      // [layers]
    score(of, C, b, h, 1, {0, layers}, attention);
    const Softmax<A> softmax = softmax_of(attention, layers, 1, static_cast<const Softmax<A>*>(nullptr));
    __syncthreads();
    for (int m = threadIdx.x; m < layers; m += blockDim.x) attention[m] = softmax.weight(attention[m]);
    __syncthreads();

    const A root = sqrt(A(of.head_dim));
    for (int m = threadIdx.x / kWarp; m < layers; m += kHeadThreads / kWarp) {
        A grad = 0;
        for (int64_t j = lane; j < of.head_dim; j += kWarp) {
            const int64_t c = h * of.head_dim + j, at = (b * of.layers + m) * C + c;
            const A* part = a.parts + (b * plan.runs * of.layers + m) * C + c;
            A product = 0;
            for (int64_t run = 0; run < plan.runs; ++run) product += part[run * of.layers * C];
            a.grad_gates[at] = attention[m] * product;
            a.weights[at] = attention[m] * of.gates[at];
            grad += of.gates[at] * product;
        }
        grad = warp_sum(grad);
        if (lane == 0) grads[m] = grad;
    }
    __syncthreads();
    A mean = 0;
    for (int m = 0; m < layers; ++m) mean += attention[m] * grads[m];
    for (int64_t j = threadIdx.x; j < of.head_dim; j += blockDim.x) {
        const int64_t c = h * of.head_dim + j;
        const A q = of.q[b * C + c];
        A sum = 0;
        for (int m = 0; m < layers; ++m) {
            const int64_t at = (b * of.layers + m) * C + c;
            const A grad = attention[m] * (grads[m] - mean) / root;
            sum += grad * of.k[at];
            a.grad_k[at] = grad * q + (a.grad_key && m == layers - 1 ? a.grad_key[b * C + c] : A(0));
        }
        a.grad_q[b * C + c] = sum;
    }
}

}  // namespace dla::layer_attention
