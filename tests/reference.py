"""The paper's methods written out plainly, as PAPER.md states them: loops, no batching, nothing saved.

Written from the text and not from `bas_core`, with which the tests compare them.
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def combine(pair: list[Tensor], time: float, scale: float, interval: tuple[float, float]) -> Tensor:
    """Classifier-free guidance at one time, from the conditional and the unconditional velocity."""
    low, high = interval
    time = round(time, 9)  # edges are what people write, and not what rounding makes of a grid
    inside = (low, high) == (0, 1) or low < time <= high
    return pair[1] + scale * (pair[0] - pair[1]) if inside else pair[0]


def look(sidenet, near, far, time: float, classes) -> list[Tensor]:
    """The velocity of each branch at `time`, seen from one anchor (state, velocities, time) or from two."""
    x, pair, t = near
    out = []
    for branch, (v, y) in enumerate(zip(pair, classes, strict=True)):
        second = {}
        if sidenet.anchors == 2 and far is not None:
            span = t - far[2]
            second = {"slope": (far[1][branch] - v) / span, "span": x.new_full((len(x),), span)}
        now, step = x.new_full((len(x),), t), x.new_full((len(x),), t - time)
        out.append(v + sidenet(x, v, now, step, y, **second))
    return out


def naive_bi_anchor(model, sidenet, x: Tensor, times: list[float], rule, classes, guidance) -> Tensor:
    """PAPER.md section 2; a two-anchor SideNet as FEASIBILITY.md has it. Both branches are always evaluated."""
    nodes, weights = rule

    def backbone(x: Tensor, t: float):
        return x, [model(x, x.new_full((len(x),), t), y) for y in classes], t

    def integrate(x: Tensor, pairs, at: list[float]) -> Tensor:
        total = sum(w * combine(pair, t, *guidance) for w, pair, t in zip(weights, pairs, at, strict=True))
        return x + (at[-1] - at[0]) * total

    previous, left = None, backbone(x, times[0])
    for t, s in pairwise(times):
        at = [t + c * (s - t) for c in nodes[:-1]] + [s]
        forward = [left[1]] + [look(sidenet, left, previous, time, classes) for time in at[1:]]
        x_pred = integrate(left[0], forward, at)
        if s == times[-1]:
            return x_pred
        right = backbone(x_pred, s)
        refined = [left[1]]
        for c, time, early in zip(nodes[1:-1], at[1:-1], forward[1:-1], strict=True):
            if c > 0.5:
                refined.append(look(sidenet, right, left, time, classes))
            elif sidenet.anchors == 2:
                refined.append(look(sidenet, left, right, time, classes))
            else:
                refined.append(early)
        refined.append(right[1])
        previous = left
        left = (integrate(left[0], refined, at), right[1], s)
    raise AssertionError("unreachable")


def naive_single_anchor(model, sidenet, x: Tensor, times: list[float], rule, classes, guidance) -> Tensor:
    """PAPER.md section 2, single-anchor variant; guidance is decided by the anchor's time, as in the official files."""
    nodes, weights = rule
    for t, s in pairwise(times):
        now = torch.full((len(x),), t, dtype=x.dtype)
        pair = [model(x, now, y) for y in classes]
        total = torch.zeros_like(x)
        for c, w in zip(nodes, weights, strict=True):
            h = torch.full((len(x),), -c * (s - t), dtype=x.dtype)
            seen = [v + sidenet(x, v, now, h, y) for v, y in zip(pair, classes, strict=True)]
            total = total + w * combine(seen, t, *guidance)
        x = x + (s - t) * total
    return x


def naive_predictor_corrector(velocity, x: Tensor, times: list[float]) -> Tensor:
    """Adams-Bashforth 2 with variable steps predicts, one call, the trapezoid corrects; the last step only predicts."""
    v, earlier, earlier_step = velocity(x, times[0]), None, None
    for t, s in pairwise(times):
        step = s - t
        if earlier is None:
            predicted = x + step * v
        else:
            ratio = step / earlier_step
            predicted = x + step * ((1 + ratio / 2) * v - ratio / 2 * earlier)
        if s == times[-1]:
            return predicted
        there = velocity(predicted, s)
        x, earlier, v, earlier_step = x + step / 2 * (v + there), v, there, step
    raise AssertionError("unreachable")


# --- networks, from a state dict alone (PAPER.md section 5) -----------------------------------------------------------


def embed_scalar(w: dict[str, Tensor], name: str, t: Tensor) -> Tensor:
    """[cos, sin] of 128 frequencies, Linear, SiLU, Linear."""
    frequencies = torch.tensor([10000 ** (-i / 128) for i in range(128)], dtype=t.dtype)
    features = torch.cat([torch.cos(t[:, None] * frequencies), torch.sin(t[:, None] * frequencies)], 1)
    return perceptron(w, f"{name}.mlp", features)


def perceptron(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    hidden = F.silu(F.linear(x, w[f"{name}.0.weight"], w[f"{name}.0.bias"]))
    return F.linear(hidden, w[f"{name}.2.weight"], w[f"{name}.2.bias"])


def rms(x: Tensor) -> Tensor:
    return x / (x.pow(2).mean(1, keepdim=True) + 1e-5).sqrt()


def naive_sidenet(w: dict[str, Tensor], x: Tensor, v: Tensor, t: Tensor, h: Tensor, y: Tensor, heads: int) -> Tensor:
    """The official SideNet."""
    parts = [
        embed_scalar(w, "t_embedder", t),
        embed_scalar(w, "h_embedder", h),
        w["y_embedder.embedding_table.weight"][y],
    ]
    emb = perceptron(w, "emb_fusion", torch.cat(parts, 1))
    layers = 1 + max(int(name.split(".")[1]) for name in w if name.startswith("blocks."))
    f = F.conv2d(torch.cat([x, v], 1), w["input_conv.weight"], padding=1)
    batch, width, rows, columns = f.shape

    def styled(g: Tensor, block: str) -> Tensor:
        style = F.linear(emb, w[f"{block}.emb_proj.weight"], w[f"{block}.emb_proj.bias"])
        scale, shift = style[:, :width, None, None], style[:, width:, None, None]
        return g * (1 + scale) + shift

    for i in range(layers):
        block = f"blocks.{i}"
        if i == layers // 2:
            g = F.conv2d(styled(rms(f), block), w[f"{block}.qkv.weight"])
            q, k, value = g.reshape(batch, 3, heads, width // heads, rows * columns).unbind(1)
            weights = torch.softmax(q.transpose(-1, -2) @ k / math.sqrt(width // heads), -1)
            g = (value @ weights.transpose(-1, -2)).reshape(batch, width, rows, columns)
            f = f + F.conv2d(g, w[f"{block}.proj.weight"])
        else:
            g = F.conv2d(rms(f), w[f"{block}.conv1_dw.weight"], padding=1, groups=width)
            g = F.silu(styled(rms(F.conv2d(g, w[f"{block}.conv1_pw.weight"])), block))
            g = F.conv2d(g, w[f"{block}.conv2_dw.weight"], padding=1, groups=width)
            f = f + F.conv2d(g, w[f"{block}.conv2_pw.weight"], w[f"{block}.conv2_pw.bias"])
    out = F.conv2d(F.silu(rms(f)), w["output_conv.weight"], w["output_conv.bias"], padding=1)
    return h[:, None, None, None] * out


def naive_sit(w: dict[str, Tensor], x: Tensor, t: Tensor, y: Tensor, heads: int) -> Tensor:
    """The SiT network's raw output [B, output channels, H, W], in the checkpoint's own convention."""
    batch, _, height, _ = x.shape
    patch = w["x_embedder.proj.weight"].shape[-1]
    side = height // patch
    tokens = []
    for row in range(side):
        for column in range(side):
            square = x[:, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
            flat = w["x_embedder.proj.weight"].flatten(1)
            tokens.append(F.linear(square.flatten(1), flat, w["x_embedder.proj.bias"]))
    z = torch.stack(tokens, 1) + w["pos_embed"]
    width = z.shape[-1]
    c = F.silu(embed_scalar(w, "t_embedder", t) + w["y_embedder.embedding_table.weight"][y])

    def linear(name: str, value: Tensor) -> Tensor:
        return F.linear(value, w[f"{name}.weight"], w[f"{name}.bias"])

    def normed(value: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        centred = value - value.mean(-1, keepdim=True)
        return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + scale) + shift

    for i in range(1 + max(int(name.split(".")[1]) for name in w if name.startswith("blocks."))):
        block = f"blocks.{i}"
        style = linear(f"{block}.adaLN_modulation.1", c)[:, None].chunk(6, -1)
        q, k, v = linear(f"{block}.attn.qkv", normed(z, style[0], style[1])).chunk(3, -1)
        split = [part.reshape(batch, -1, heads, width // heads).transpose(1, 2) for part in (q, k, v)]
        weights = torch.softmax(split[0] @ split[1].transpose(-1, -2) / math.sqrt(width // heads), -1)
        z = z + style[2] * linear(f"{block}.attn.proj", (weights @ split[2]).transpose(1, 2).flatten(2))
        hidden = F.gelu(linear(f"{block}.mlp.fc1", normed(z, style[3], style[4])), approximate="tanh")
        z = z + style[5] * linear(f"{block}.mlp.fc2", hidden)
    shift, scale = linear("final_layer.adaLN_modulation.1", c)[:, None].chunk(2, -1)
    patches = linear("final_layer.linear", normed(z, shift, scale)).reshape(batch, side, side, patch, patch, -1)
    return torch.einsum("nhwpqc->nchpwq", patches).reshape(batch, -1, height, height)


def naive_position_table(width: int, side: int) -> Tensor:
    """MAE's table: for each token, sine and cosine of the column, then of the row."""
    quarter = width // 4
    table = []
    for row in range(side):
        for column in range(side):
            values = []
            for position in (column, row):
                angles = [position / 10000 ** (i / quarter) for i in range(quarter)]
                values += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            table.append(values)
    return torch.tensor(table, dtype=torch.float64)[None]
