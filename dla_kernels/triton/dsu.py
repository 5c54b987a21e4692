"""A step of the Dynamic Sharing Unit in Triton, forward and backward, over N rows: B samples, or their T layers each.

Both forms are one formula over branches. The joint form is a single branch that reads h and y, the split form one
branch for each of the two::

    s_j = ReLU(sum of v W1_j^T over what branch j reads + b1_j)
    z = sum over j of s_j W2_j^T + b2_j
    c' = sigmoid(f) c + sigmoid(i) tanh(c~),   h' = activation(c')

Small matrix products are all there is to it. Independent ones share a launch, see :func:`multiply`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dla_kernels.triton.maps import write_row_sums
from dla_kernels.triton.tuning import cdiv

#: Where the gates (c~, i, f) stand among the 3C rows of W2.
JOINT_ORDER, SPLIT_ORDER = (0, 1, 2), (2, 0, 1)

# A tile of a product: 16 is the least that tensor cores take, and rows and hidden units are few.
BLOCK_M, BLOCK_N, BLOCK_K = 16, 32, 32


class Branch(NamedTuple):
    """Views of one branch's weights, or of their gradients."""

    w1: dict[str, Tensor]  # by what it reads, "h" or "y": [R, C]
    b1: Tensor | None  # [R]
    w2: Tensor  # [3C, R]
    b2: Tensor  # [3C]


class Matrix(NamedTuple):
    """A matrix by its strides; every row stands for ``repeat`` rows that follow each other."""

    data: Tensor
    row: int
    column: int
    repeat: int


class Product(NamedTuple):
    """out [M, N] = the sum of left [M, K] right [K, N] over the terms, + bias [N], * (mask [M, N] > 0).

    Bias and mask are none or one, as a tuple: Triton 3.6 takes no None inside of another argument.
    """

    terms: tuple[tuple[Matrix, Matrix], ...]
    bias: tuple[Tensor, ...]
    mask: tuple[Matrix, ...]
    out: Matrix
    M: int
    N: int
    K: int


def branches(weights: Tensor, joint: bool, channels: int) -> list[Branch]:
    """The branches of the packed weights, as views."""
    c = channels
    if joint:
        r = (weights.numel() - 3 * c) // (5 * c)
        w1, w2, b2 = weights.split([2 * c * r, 3 * c * r, 3 * c])
        w1 = w1.view(r, 2 * c)
        return [Branch({"h": w1[:, :c], "y": w1[:, c:]}, None, w2.view(3 * c, r), b2)]
    r = (weights.numel() - 6 * c) // (8 * c + 2)
    parts = weights.split([r * c, r, 3 * c * r, 3 * c] * 2)
    return [
        Branch({source: w1.view(r, c)}, b1, w2.view(3 * c, r), b2)
        for source, (w1, b1, w2, b2) in (("y", parts[:4]), ("h", parts[4:]))
    ]


def matrix(t: Tensor, repeat: int = 1) -> Matrix:
    return Matrix(t, *t.stride(), repeat)


@triton.jit
def add_product(
    total, left, row_inside, left_k, right, column_inside, right_k, K, BLOCK_K: tl.constexpr
):  # fmt: skip
    """total [M, N] + left right; left [M] points at the rows' first elements, right [N] at those of the columns."""
    for start in range(0, K, BLOCK_K):
        k = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        a = tl.load(left[:, None] + k[None, :] * left_k, mask=row_inside[:, None] & (k < K)[None, :], other=0.0)
        b = tl.load(right[None, :] + k[:, None] * right_k, mask=(k < K)[:, None] & column_inside[None, :], other=0.0)
        total = dot(a, b, total)
    return total


@triton.jit
def dot(a, b, total):
    """In the precision of the state: never TF32 alone."""
    if total.dtype == tl.float64:
        return total + tl.sum(a[:, :, None] * b[None, :, :], 1)
    else:
        return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def _multiply(
    products, RELU: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    for i in tl.static_range(len(products)):
        if tl.program_id(1) == i:
            one = products[i]
            columns = tl.cdiv(one.N, BLOCK_N)
            if tl.program_id(0) < tl.cdiv(one.M, BLOCK_M) * columns:
                m = (tl.program_id(0) // columns * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
                n = (tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
                total = tl.zeros([BLOCK_M, BLOCK_N], one.out.data.dtype.element_ty)
                for j in tl.static_range(len(one.terms)):
                    left = one.terms[j][0]
                    right = one.terms[j][1]
                    total = add_product(
                        total, left.data + m // left.repeat * left.row, m < one.M, left.column,
                        right.data + n * right.column, n < one.N, right.row, one.K, BLOCK_K,
                    )  # fmt: skip
                inside = (m < one.M)[:, None] & (n < one.N)[None, :]
                for j in tl.static_range(len(one.bias)):
                    total += tl.load(one.bias[j] + n, mask=n < one.N, other=0.0)[None, :]
                if RELU:
                    total = tl.where(total < 0, 0.0, total)
                for j in tl.static_range(len(one.mask)):
                    mask = one.mask[j]
                    address = mask.data + m[:, None] * mask.row + n[None, :] * mask.column
                    total = tl.where(tl.load(address, mask=inside, other=0.0) <= 0, 0.0, total)
                tl.store(one.out.data + m[:, None] * one.out.row + n[None, :] * one.out.column, total, mask=inside)


def _warps(state: Tensor) -> int:
    """In float64 four warps would need twice the registers that a thread has."""
    return 8 if state.dtype == torch.float64 else 4


def multiply(products: Sequence[Product], relu: bool = False) -> None:
    """Independent products in one launch."""
    tiles = max(cdiv(p.M, BLOCK_M) * cdiv(p.N, BLOCK_N) for p in products)
    if tiles > 0:
        _multiply[(tiles, len(products))](
            tuple(products), RELU=relu, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K,
            num_warps=_warps(products[0].out.data),
        )  # fmt: skip


def product(left: Tensor, right: Tensor, out: Tensor, mask: Tensor | None = None) -> Product:
    """One term; ``out`` and ``mask`` may be views."""
    return Product(
        ((matrix(left), matrix(right)),), (), () if mask is None else (matrix(mask),), matrix(out), *out.shape,
        left.shape[1],
    )  # fmt: skip


def hidden_units(y: Tensor, h: Tensor, parts: Sequence[Branch]) -> list[Tensor]:
    """s [N, R] of every branch; y is [N, C], h [B, C]."""
    rows = {"y": matrix(y), "h": matrix(h, max(1, y.shape[0] // max(1, h.shape[0])))}
    s = [y.new_empty(y.shape[0], branch.w2.shape[1]) for branch in parts]
    multiply(
        [
            Product(
                tuple((rows[source], matrix(w1.t())) for source, w1 in branch.w1.items()),
                () if branch.b1 is None else (branch.b1,), (), matrix(out), *out.shape, y.shape[1],
            )
            for branch, out in zip(parts, s, strict=True)
        ],
        relu=True,
    )  # fmt: skip
    return s


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def tanh(x):
    """Of exponentials that cannot overflow."""
    e = tl.exp(-2 * tl.abs(x))
    return tl.where(x < 0, -1.0, 1.0).to(x.dtype) * (1 - e) / (1 + e)


@triton.jit
def activate(c, ACTIVATION: tl.constexpr):
    if ACTIVATION == 0:
        return c
    elif ACTIVATION == 1:
        return tanh(c)
    elif ACTIVATION == 2:
        return tl.where(c < 0, 0.0, c)
    else:
        return sigmoid(c)


@triton.jit
def activation_slope(c, ACTIVATION: tl.constexpr):
    if ACTIVATION == 0:
        return tl.full(c.shape, 1.0, c.dtype)
    elif ACTIVATION == 1:
        h = tanh(c)
        return 1 - h * h
    elif ACTIVATION == 2:
        return tl.where(c <= 0, 0.0, 1.0).to(c.dtype)
    else:
        h = sigmoid(c)
        return h * (1 - h)


@triton.jit
def gate_input(
    s, w2, b2, GATE: tl.constexpr, n, N, c, C, R, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr
):
    """z [rows, channels] of one of the three gates, the sum of all branches."""
    total = tl.zeros([BLOCK_N, BLOCK_C], s[0].dtype.element_ty)
    row = (GATE * C + c).to(tl.int64)
    for j in tl.static_range(len(s)):
        total = add_product(total, s[j] + n * R, n < N, 1, w2[j] + row * R, c < C, 1, R, BLOCK_K)
        total += tl.load(b2[j] + row, mask=c < C, other=0.0)[None, :]
    return total


@triton.jit
def step(
    s, w2, b2, prior, ORDER: tl.constexpr, n, N, c, C, R, T, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The gates tanh(c~), sigmoid(i), sigmoid(f), the prior context of every row's sample and the new one."""
    candidate = tanh(gate_input(s, w2, b2, ORDER[0], n, N, c, C, R, BLOCK_N, BLOCK_C, BLOCK_K))
    i = sigmoid(gate_input(s, w2, b2, ORDER[1], n, N, c, C, R, BLOCK_N, BLOCK_C, BLOCK_K))
    f = sigmoid(gate_input(s, w2, b2, ORDER[2], n, N, c, C, R, BLOCK_N, BLOCK_C, BLOCK_K))
    inside = (n < N)[:, None] & (c < C)[None, :]
    before = tl.load(prior + (n // T)[:, None] * C + c[None, :], mask=inside, other=0.0)
    return candidate, i, f, before, f * before + i * candidate


@triton.jit
def _step(
    s, w2, b2, prior, factor, hidden, context, gate, N, C, R, T, ORDER: tl.constexpr, ACTIVATION: tl.constexpr,
    OF_CONTEXT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) // tl.cdiv(C, BLOCK_C) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    c = tl.program_id(0) % tl.cdiv(C, BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    _, _, _, _, new = step(s, w2, b2, prior, ORDER, n, N, c, C, R, T, BLOCK_N, BLOCK_C, BLOCK_K)
    inside = (n < N)[:, None] & (c < C)[None, :]
    at = n[:, None] * C + c[None, :]
    if hidden is not None:
        tl.store(hidden + at, activate(new, ACTIVATION), mask=inside)
        tl.store(context + at, new, mask=inside)
    if gate is not None:
        value = new if OF_CONTEXT else activate(new, ACTIVATION)
        if factor is not None:
            value *= tl.load(factor + at, mask=inside, other=0.0)
        tl.store(gate + at, value, mask=inside)


@triton.jit
def _step_backward(
    s, w2, b2, prior, factor, grad_hidden, grad_context, grad_gate, grad_z, grad_prior, grad_factor, N, C, R, T,
    ORDER: tl.constexpr, ACTIVATION: tl.constexpr, OF_CONTEXT: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) // tl.cdiv(C, BLOCK_C) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    c = tl.program_id(0) % tl.cdiv(C, BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    candidate, i, f, before, new = step(
        s, w2, b2, prior, ORDER, n, N, c, C, R, T, BLOCK_N, BLOCK_C, BLOCK_K
    )  # fmt: skip
    inside = (n < N)[:, None] & (c < C)[None, :]
    at = n[:, None] * C + c[None, :]
    grad = tl.zeros([BLOCK_N, BLOCK_C], grad_z.dtype.element_ty)
    if grad_context is not None:
        grad += tl.load(grad_context + at, mask=inside, other=0.0)
    if grad_hidden is not None:
        grad += tl.load(grad_hidden + at, mask=inside, other=0.0) * activation_slope(new, ACTIVATION)
    if grad_gate is not None:
        of_gate = tl.load(grad_gate + at, mask=inside, other=0.0)
        if factor is not None:
            tl.store(grad_factor + at, of_gate * (new if OF_CONTEXT else activate(new, ACTIVATION)), mask=inside)
            of_gate *= tl.load(factor + at, mask=inside, other=0.0)
        grad += of_gate if OF_CONTEXT else of_gate * activation_slope(new, ACTIVATION)
    z = grad_z + n[:, None] * (3 * C) + c[None, :]
    tl.store(z + ORDER[0] * C, grad * i * (1 - candidate * candidate), mask=inside)
    tl.store(z + ORDER[1] * C, grad * candidate * i * (1 - i), mask=inside)
    tl.store(z + ORDER[2] * C, grad * before * f * (1 - f), mask=inside)
    tl.store(grad_prior + at, grad * f, mask=inside)


def _launch(kernel, s: list[Tensor], parts: list[Branch], rows: int, channels: int, layers: int, *tensors, **options):
    programs = cdiv(rows, BLOCK_M) * cdiv(channels, BLOCK_N)
    if programs > 0:
        kernel[(programs,)](
            tuple(s), tuple(p.w2 for p in parts), tuple(p.b2 for p in parts), *tensors, rows, channels,
            parts[0].w2.shape[1], layers, **options, ORDER=JOINT_ORDER if len(parts) == 1 else SPLIT_ORDER,
            BLOCK_N=BLOCK_M, BLOCK_C=BLOCK_N, BLOCK_K=BLOCK_K, num_warps=_warps(s[0]),
        )  # fmt: skip


class Step:
    """One step for rows y [N, C]; h and c are [B, C], N = B T. All dense."""

    def __init__(self, y: Tensor, h: Tensor, c: Tensor, weights: Tensor, joint: bool, activation: int):
        self.y, self.h, self.c, self.weights, self.joint = y, h, c, weights, joint
        self.layers = max(1, y.shape[0] // max(1, h.shape[0]))
        self.parts = branches(weights, joint, y.shape[1])
        self.activation = activation
        self.s = hidden_units(y, h, self.parts)

    def _run(self, kernel, *tensors, of_context: bool) -> None:
        _launch(
            kernel, self.s, self.parts, *self.y.shape, self.layers, self.c, *tensors, ACTIVATION=self.activation,
            OF_CONTEXT=of_context,
        )  # fmt: skip

    def state(self) -> tuple[Tensor, Tensor]:
        """h' and c'."""
        h, c = torch.empty_like(self.y), torch.empty_like(self.y)
        self._run(_step, None, h, c, None, of_context=True)
        return h, c

    def gate(self, of_context: bool, factor: Tensor | None = None) -> Tensor:
        """c' or h', times ``factor`` [N, C]."""
        gate = torch.empty_like(self.y)
        self._run(_step, factor, None, None, gate, of_context=of_context)
        return gate

    def backward(
        self,
        grad_weights: Tensor,
        grad_hidden: Tensor | None = None,
        grad_context: Tensor | None = None,
        grad_gate: Tensor | None = None,
        of_context: bool = True,
        factor: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The gradients of y [N, C], h and c [B, C] and of ``factor``; the weights' are written to ``grad_weights``."""
        rows, channels = self.y.shape
        grad_z, grad_c = self.y.new_empty(rows, 3 * channels), torch.empty_like(self.y)
        grad_factor = None if factor is None else torch.empty_like(factor)
        self._run(
            _step_backward, factor, grad_hidden, grad_context, grad_gate, grad_z, grad_c, grad_factor,
            of_context=of_context,
        )  # fmt: skip
        grad_s = [torch.empty_like(s) for s in self.s]
        multiply(
            [product(grad_z, p.w2, g, mask=s) for p, s, g in zip(self.parts, self.s, grad_s, strict=True)]
        )  # fmt: skip
        # h is one for all layers of a sample: what flows to it is added up while it is still narrow.
        per_sample = [self._over_layers(g) for g in grad_s]
        grad_y, grad_h = torch.empty_like(self.y), torch.empty_like(self.h)
        products, grad_parts = [], branches(grad_weights, self.joint, channels)
        for part, grads, s, of_rows, of_samples in zip(
            self.parts, grad_parts, self.s, grad_s, per_sample, strict=True
        ):  # fmt: skip
            products.append(product(grad_z.t(), s, grads.w2))
            if "y" in part.w1:
                products += [product(of_rows, part.w1["y"], grad_y), product(of_rows.t(), self.y, grads.w1["y"])]
            if "h" in part.w1:
                products += [product(of_samples, part.w1["h"], grad_h), product(of_samples.t(), self.h, grads.w1["h"])]
        multiply(products)
        summed = [(grad_z, g.b2) for g in grad_parts] + [
            (of_rows, g.b1) for of_rows, g in zip(grad_s, grad_parts, strict=True) if g.b1 is not None
        ]
        write_row_sums(*zip(*summed, strict=True))
        return grad_y, grad_h, self._over_layers(grad_c), grad_factor

    def _over_layers(self, t: Tensor) -> Tensor:
        return t if self.layers == 1 else t.view(-1, self.layers, t.shape[1]).sum(1)
