"""Layer attention written out, under the names and in the structure of the authors' DLA and MRLA code."""

import torch
from torch import nn

from dla.attention import kernel_size


class Projections(nn.Module):
    def __init__(self, channels, head_dim, init_cell=None):
        super().__init__()
        k = kernel_size(channels)
        self.heads = channels // head_dim
        self.Wq = nn.Conv1d(1, 1, k, padding=k // 2, bias=False)
        self.Wk = nn.Conv1d(1, 1, k, padding=k // 2, bias=False)
        self.Wv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.init_cell = init_cell

    def made_of(self, x):
        y = x.mean((2, 3))[:, None]
        return self.Wq(y), self.Wk(y), self.Wv(x)

    def light(self, x):
        q, k, v = self.made_of(x)
        scores = (q * k).view(len(x), self.heads, -1).sum(-1)
        scores = torch.sigmoid(scores / (x.shape[1] / self.heads) ** 0.5)
        return v * scores.repeat_interleave(x.shape[1] // self.heads, dim=1)[..., None, None]

    def base(self, x, keys, values):
        q, k, v = self.made_of(x)
        if not self.init_cell:
            k, v = torch.cat([keys, k], 1), torch.cat([values, v[:, None]], 1)
        else:
            v = v[:, None]
        scores = (q * k).view(*k.shape[:2], self.heads, -1).sum(-1) / (x.shape[1] / self.heads) ** 0.5
        weights = scores.softmax(1).repeat_interleave(x.shape[1] // self.heads, dim=2)[..., None, None]
        return (weights * v).sum(1), k, v


class Light(nn.Module):
    """An attention and its lambda; the authors give the inner one one of two names."""

    def __init__(self, channels, head_dim, inner):
        super().__init__()
        self.add_module(inner, Projections(channels, head_dim))
        self.lambda_t = nn.Parameter(torch.randn(channels, 1, 1))
        self.inner = inner

    def forward(self, x, carried):
        return getattr(self, self.inner).light(x) + self.lambda_t * carried


class Base(nn.Module):
    def __init__(self, channels, head_dim, inner, init_cell):
        super().__init__()
        self.add_module(inner, Projections(channels, head_dim, init_cell))
        self.inner = inner
        self.init_cell = init_cell

    def forward(self, x, keys, values):
        return getattr(self, self.inner).base(x, keys, values)


class Residual(nn.Module):
    """A basic or a bottleneck block, without what follows it."""

    def __init__(self, in_channels, channels, stride=1, basic=False, se=False):
        super().__init__()
        width = channels if basic else channels // 4
        shapes = [(in_channels, width, 3, stride), (width, width, 3, 1)]
        if not basic:
            shapes = [(in_channels, width, 1, 1), (width, width, 3, stride), (width, channels, 1, 1)]
        for i, (a, b, kernel, step) in enumerate(shapes, 1):
            self.add_module(f"conv{i}", nn.Conv2d(a, b, kernel, step, kernel // 2, bias=False))
            self.add_module(f"bn{i}", nn.BatchNorm2d(b))
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )
        self.se = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.Sigmoid()) if se else None
        self.eca = None
        self.depth = len(shapes)

    def residual(self, x):
        out = x
        for i in range(1, self.depth + 1):
            out = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(out))
            out = self.relu(out) if i < self.depth else out
        out = out if self.se is None else self.se(out)
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(out + shortcut), shortcut


class DlaLBlock(Residual):
    def forward(self, x):
        return self.residual(x)


class DlaBBlock(Residual):
    def forward(self, x):
        return self.residual(x)[0]


class DropPath(nn.Module):
    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        if not self.training:
            return x
        kept = x.new_empty(len(x), 1, 1, 1).bernoulli_(1 - self.drop_prob)
        return x * kept / (1 - self.drop_prob)


class MrlaLBlock(Residual):
    def __init__(self, in_channels, channels, stride=1, head_dim=32, drop_path=0.0, **kwargs):
        super().__init__(in_channels, channels, stride, **kwargs)
        self.mrla = Light(channels, head_dim, "mrla")
        self.bn_mrla = nn.BatchNorm2d(channels)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x):
        x, shortcut = self.residual(x)
        return x + self.drop_path(self.bn_mrla(self.mrla(x, shortcut)))


class MrlaBBlock(Residual):
    def __init__(self, in_channels, channels, stride=1, head_dim=32, init_cell=False, relu=True, **kwargs):
        super().__init__(in_channels, channels, stride, **kwargs)
        self.mrla = Base(channels, head_dim, "mrla", init_cell)
        self.bn_mrla = nn.BatchNorm2d(channels)
        self.drop_path = nn.Identity()
        self.relus = relu  # one of the authors' files leaves it out

    def forward(self, x, keys, values):
        x, _ = self.residual(x)
        o, keys, values = self.mrla(x, keys, values)
        o = self.bn_mrla(o)
        return x + self.drop_path(o.relu() if self.relus else o), keys, values


class Branch(nn.Module):
    def __init__(self, channels, reduction):
        super().__init__()
        reduced = channels // reduction
        self.seq = nn.Sequential(nn.Linear(channels, reduced), nn.ReLU(inplace=True), nn.Linear(reduced, 3 * channels))


class Dsu(nn.Module):
    def __init__(self, channels, reduction):
        super().__init__()
        self.w_ih = nn.ModuleList([Branch(channels, reduction)])
        self.w_hh = nn.ModuleList([Branch(channels, reduction)])

    def forward(self, y, h, c):
        i, f, candidate = (self.w_ih[0].seq(y) + self.w_hh[0].seq(h)).chunk(3, 1)
        c = f.sigmoid() * c + i.sigmoid() * candidate.tanh()
        return c.sigmoid(), c


class Attended(nn.Module):
    """The layer attention that stands beside a DLA block."""

    def __init__(self, attention, channels, drop_path=0.0):
        super().__init__()
        self.layer_attention = attention
        self.bn_layer_attention = nn.BatchNorm2d(channels)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()


class DlaLStage(nn.Module):
    def __init__(self, blocks, channels, reduction=4, filter_name="excite", inner="layer_attention", drop_path=0.0):
        super().__init__()
        self.layers = nn.Sequential(*blocks)
        self.attention = nn.Sequential(
            *(Attended(Light(channels, 32, inner), channels, drop_path) for _ in self.layers)
        )
        self.lstm = Dsu(channels, reduction)
        self.add_module(filter_name, nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False))
        self.filter_name = filter_name

    def forward(self, x):
        h = c = None
        for layer, attention in zip(self.layers, self.attention, strict=True):
            x, shortcut = layer(x)
            y = x.mean((2, 3))
            h, c = self.lstm(y, *((torch.zeros_like(y),) * 2 if h is None else (h, c)))
            # The authors give the refresh the first sample's state.
            gate = self.lstm(shortcut.mean((2, 3)), h[0], c[0])[0]
            carried = shortcut * gate[..., None, None] + getattr(self, self.filter_name)(shortcut)
            attended = attention.bn_layer_attention(attention.layer_attention(x, carried))
            x = x + attention.drop_path(attended)
        return x


class DlaBStage(nn.Module):
    def __init__(self, blocks, channels, reduction=4):
        super().__init__()
        self.layers = nn.ModuleList(blocks)
        self.attention = nn.Sequential(
            *(Attended(Base(channels, 32, "layer_attention", i == 0), channels) for i in range(len(self.layers)))
        )
        self.lstm = Dsu(channels, reduction)

    def forward(self, x):
        h = c = keys = values = None
        for layer, attention in zip(self.layers, self.attention, strict=True):
            x = layer(x)
            y = x.mean((2, 3))
            h, c = self.lstm(y, *((torch.zeros_like(y),) * 2 if h is None else (h, c)))
            if keys is not None:
                # The authors give the refresh the first sample's state.
                keys = torch.stack([k * self.lstm(k, h[0], c[0])[0] for k in keys.unbind(1)], 1)
                gates = torch.stack([self.lstm(v.mean((2, 3)), h[0], c[0])[0] for v in values.unbind(1)], 1)
                values = values * gates[..., None, None]
            o, keys, values = attention.layer_attention(x, keys, values)
            x = x + attention.drop_path(attention.bn_layer_attention(o).relu())
        return x


class Chain(nn.ModuleList):
    """MRLA-B's blocks as the authors' networks run them."""

    def forward(self, x):
        keys = values = None
        for block in self:
            x, keys, values = block(x, keys, values)
        return x


class Network(nn.Module):
    """Two stages of two blocks each between a stem and a classifier."""

    def __init__(self, kind, channels=(32, 64), **kwargs):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        a, b = channels

        def blocks(cls, in_channels, out, stride, starts=False, **more):
            first, second = ({"init_cell": True}, {"init_cell": False}) if starts else ({}, {})
            return [cls(in_channels, out, stride, **first, **more), cls(out, out, **second, **more)]

        def stage(in_channels, out, stride):
            match kind:
                case "dla_l":
                    return DlaLStage(blocks(DlaLBlock, in_channels, out, stride), out, **kwargs)
                case "dla_b":
                    return DlaBStage(blocks(DlaBBlock, in_channels, out, stride), out, **kwargs)
                case "mrla_l":
                    return nn.Sequential(*blocks(MrlaLBlock, in_channels, out, stride, **kwargs))
                case "mrla_b":
                    return Chain(blocks(MrlaBBlock, in_channels, out, stride, True, **kwargs))

        self.stages = nn.ModuleList([stage(16, a, 1), stage(a, b, 2)])
        self.fc = nn.Linear(b, 5)

    def forward(self, x):
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.fc(x.mean((2, 3)))
