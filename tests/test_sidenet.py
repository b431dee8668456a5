"""The SideNet against the official network written out, and what its configuration adds."""

import pytest
import torch
import torch.nn.functional as F
from ba_solver.bas_core import SideNet, SideNetConfig
from ba_solver.bas_core.sidenet import ARCHITECTURES, channel_norm
from ba_solver.bas_core.sit import sincos_position_table
from problems import NULL, labels, noise, randomise, small_sidenet, spread
from reference import naive_sidenet

EXACT = {"rtol": 1e-11, "atol": 1e-11}


def inputs(batch: int = 2, *, channels: int = 2, size: tuple[int, ...] = (4, 6), dtype=torch.float64):
    """x, v, t, h and cond for a one-anchor SideNet; steps of both directions."""
    x, v = (noise(batch, channels, *size, seed=seed, dtype=dtype) for seed in (0, 1))
    return (
        x,
        v,
        torch.linspace(0.3, 0.9, batch, dtype=dtype),
        torch.linspace(-0.2, 0.3, batch, dtype=dtype),
        labels(batch)[0],
    )


def second_anchor(x):
    """slope and span, of both signs."""
    return {"slope": noise(*x.shape, seed=2, dtype=x.dtype), "span": torch.linspace(0.25, -0.15, len(x), dtype=x.dtype)}


# --- the official network ---------------------------------------------------------------------------------------------


def official_shapes(channels: int, width: int, embedding: int, layers: int, classes: int) -> dict[str, tuple[int, ...]]:
    """PAPER.md section 5."""
    shapes = {"y_embedder.embedding_table.weight": (classes + 1, embedding)}
    for name, first in (("h_embedder.mlp", 256), ("t_embedder.mlp", 256), ("emb_fusion", 3 * embedding)):
        shapes |= {f"{name}.0.weight": (embedding, first), f"{name}.2.weight": (embedding, embedding)}
        shapes |= {f"{name}.0.bias": (embedding,), f"{name}.2.bias": (embedding,)}
    shapes |= {
        "input_conv.weight": (width, 2 * channels, 3, 3),
        "output_conv.weight": (channels, width, 3, 3),
        "output_conv.bias": (channels,),
    }
    for i in range(layers):
        inside = {"emb_proj.weight": (2 * width, embedding), "emb_proj.bias": (2 * width,)}
        if i == layers // 2:
            inside |= {"qkv.weight": (3 * width, width, 1, 1), "proj.weight": (width, width, 1, 1)}
        else:
            inside |= {f"conv{k}_dw.weight": (width, 1, 3, 3) for k in (1, 2)}
            inside |= {f"conv{k}_pw.weight": (width, width, 1, 1) for k in (1, 2)} | {"conv2_pw.bias": (width,)}
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in inside.items()}
    return shapes


def shapes_of(sidenet: SideNet) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in sidenet.state_dict().items()}


def test_the_default_network_has_the_official_names_and_sizes():
    sidenet = SideNet(SideNetConfig(), device="meta")
    assert shapes_of(sidenet) == official_shapes(4, 256, 256, 4, 1000)


@pytest.mark.parametrize(
    ("channels", "width", "embedding", "layers", "heads"),
    [(4, 16, 12, 4, 4), (2, 8, 8, 3, 2), (3, 12, 6, 1, 3), (4, 8, 8, 5, 4)],
)
def test_it_computes_what_the_official_network_computes(channels, width, embedding, layers, heads):
    config = SideNetConfig(channels, width, embedding, layers, num_classes=NULL, num_heads=heads)
    sidenet = randomise(SideNet(config, dtype=torch.float64))
    assert shapes_of(sidenet) == official_shapes(channels, width, embedding, layers, NULL)
    x, v, t, h, _ = inputs(3, channels=channels)
    for y in (torch.tensor([0, 2, 1]), torch.full((3,), NULL)):
        expected = naive_sidenet(sidenet.state_dict(), x, v, t, h, y, heads)
        torch.testing.assert_close(sidenet(x, v, t, h, y), expected, **EXACT)
        assert expected[h != 0].abs().mean() > 1e-3


def test_it_agrees_in_float32_too():
    sidenet = small_sidenet(dtype=torch.float32)
    x, v, t, h, y = inputs(dtype=torch.float32)
    expected = naive_sidenet(sidenet.state_dict(), x, v, t, h, y, 2)
    torch.testing.assert_close(sidenet(x, v, t, h, y), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_input_matters(architecture):
    """Each of state, velocity, time, step and class changes the answer; so do slope, span and scale where taken."""
    net = small_sidenet(anchors=2, cfg_input=True, architecture=architecture)
    x, v, t, h, y = inputs()
    given = {"x": x, "v": v, "t": t, "h": h, "cond": y, "scale": torch.full_like(t, 2.0), **second_anchor(x)}
    base = net(**given)
    for name, value in given.items():
        changed = net(**given | {name: (value + 1) % NULL if name == "cond" else value * 1.1})
        assert (changed - base).abs().amax((1, 2, 3)).min() > 1e-5, name


# --- the factor h, and the second anchor ------------------------------------------------------------------------------


@pytest.mark.parametrize("anchors", [1, 2])
@pytest.mark.parametrize("second", [False, True], ids=["one point", "two points"])
def test_the_change_of_velocity_is_proportional_to_small_steps(anchors, second):
    """Nothing at h = 0; a tenth of the step, a tenth of the change (with a second anchor: beyond the straight line)."""
    net = small_sidenet(anchors=anchors)
    x, v, t, _, y = inputs()
    more = second_anchor(x) if second and anchors == 2 else {}

    def change(h: float) -> torch.Tensor:
        return net(x, v, t, torch.full_like(t, h), y, **more)

    assert torch.equal(change(0.0), torch.zeros_like(x))
    for sign in (1, -1):
        ratio = change(sign * 1e-5) / change(sign * 1e-6)
        torch.testing.assert_close(ratio, torch.full_like(ratio, 10.0), rtol=1e-2, atol=0)


def test_a_two_anchor_network_is_the_straight_line_plus_a_term_that_vanishes_at_both_anchors():
    """v + slope h + h (h - d) / (|h| + |d|) S, with S read off at one state for many steps."""
    net = small_sidenet(anchors=2)
    x, v, t, _, y = inputs()
    second = second_anchor(x)
    d = second["span"]
    for c in (-0.5, 0.25, 0.5, 1.5):
        h = c * d
        factor = h * (h - d) / (h.abs() + d.abs())
        correction = net(x, v, t, h, y, **second) - second["slope"] * spread(h, x)
        network = net._network([x, v, second["slope"]], net._embedding(t, h, y, d, None))
        torch.testing.assert_close(correction, network * spread(factor, x), **EXACT)
    torch.testing.assert_close(net(x, v, t, d, y, **second), second["slope"] * spread(d, x), **EXACT)


def test_without_a_second_anchor_a_two_anchor_network_takes_the_one_anchor_form():
    """span 0 and slope 0, given or left out, are the same thing; also for some samples of a batch only."""
    net = small_sidenet(anchors=2)
    x, v, t, h, y = inputs()
    alone = net(x, v, t, h, y)
    zeros = {"slope": torch.zeros_like(x), "span": torch.zeros_like(t)}
    torch.testing.assert_close(net(x, v, t, h, y, **zeros), alone, **EXACT)
    mixed = second_anchor(x)
    mixed["slope"][0], mixed["span"][0] = 0, 0
    torch.testing.assert_close(net(x, v, t, h, y, **mixed)[0], alone[0], **EXACT)


@pytest.mark.parametrize("anchors", [1, 2])
def test_zero_output_silences_the_network(anchors):
    x, v, t, h, y = inputs()
    second = second_anchor(x) if anchors == 2 else {}
    line = second["slope"] * spread(h, x) if second else torch.zeros_like(x)
    assert torch.equal(small_sidenet(anchors=anchors).zero_output()(x, v, t, h, y, **second), line)


# --- sizes, video, conditions, precision ------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("size", [(4, 6), (5, 7), (3, 4), (1, 1)], ids=str)
@pytest.mark.parametrize("patch", [2, 3, 4])
def test_sizes_that_the_patch_does_not_divide_are_padded_at_the_far_edges(patch, size, architecture):
    """The answer is the top left part of the answer for the state with its last row and column repeated."""
    net = small_sidenet(patch_size=patch, architecture=architecture)
    x, v, t, h, y = inputs(size=size)
    padding = (0, -size[1] % patch, 0, -size[0] % patch)
    whole = net(F.pad(x, padding, mode="replicate"), F.pad(v, padding, mode="replicate"), t, h, y)
    torch.testing.assert_close(net(x, v, t, h, y), whole[..., : size[0], : size[1]], **EXACT)


def test_patches_are_channels_of_a_coarser_grid():
    """A patch-2 network is the official network on pixel-unshuffled planes."""
    net = small_sidenet(patch_size=2)
    x, v, t, h, y = inputs()
    state = net.state_dict()
    coarse = F.pixel_unshuffle(torch.cat([x, v], 1), 2).chunk(2, 1)
    expected = F.pixel_shuffle(naive_sidenet(state, *coarse, t, h, y, 2), 2)
    torch.testing.assert_close(net(x, v, t, h, y), expected, **EXACT)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("anchors", [1, 2])
def test_videos_are_answered_frame_by_frame(anchors, architecture):
    net = small_sidenet(anchors=anchors, patch_size=2, architecture=architecture)
    x, v, t, h, y = inputs(size=(3, 4, 5))
    second = second_anchor(x) if anchors == 2 else {}
    video = net(x, v, t, h, y, **second)
    for i in range(3):
        frame = {name: value[:, :, i] if value.ndim == 5 else value for name, value in second.items()}
        torch.testing.assert_close(video[:, :, i], net(x[:, :, i], v[:, :, i], t, h, y, **frame), **EXACT)


def test_the_first_velocity_leads_to_the_mean_in_any_size_and_every_frame():
    sidenet = small_sidenet(data_mean_size=3)
    sidenet.data_mean.copy_(torch.tensor([1.0, -2.0])[:, None, None].expand(2, 3, 3))
    sidenet.data_mean[:, 0, 0] += 5
    x, t = noise(2, 2, 3, 6, 9), torch.tensor(0.98)
    video = sidenet.analytic_velocity(x, t)
    reached = x - 0.98 * video  # x - t v: the data that v points to
    torch.testing.assert_close(reached, reached[:1, :, :1].expand_as(reached))
    assert reached[0, :, 0, 5, 8].tolist() == pytest.approx([1, -2]) and reached[
        0, :, 0, 0, 0
    ].tolist() == pytest.approx([6, 3])
    torch.testing.assert_close(sidenet.analytic_velocity(x[:, :, 1], t), video[:, :, 1])
    with pytest.raises(ValueError, match="Use a SideNet made for this model"):
        sidenet.analytic_velocity(noise(1, 3, 6, 9), t)
    with pytest.raises(ValueError, match="keeps no data mean"):
        small_sidenet().analytic_velocity(x, t)


def test_a_network_without_classes_has_no_class_table_and_ignores_what_it_is_given():
    net = small_sidenet(num_classes=0)
    x, v, t, h, y = inputs()
    assert not any(name.startswith("y_embedder") for name in net.state_dict())
    torch.testing.assert_close(net(x, v, t, h), net(x, v, t, h, y))


def test_tokens_compute_transformer_blocks_on_positions():
    """The transformer, rebuilt from its tensors with torch's own layers, on a grid that is not square."""
    net = small_sidenet(architecture="transformer", base_channels=8, num_layers=2)
    x, v, t, h, y = inputs()
    state, embedding = net.state_dict(), net._embedding(t, h, y, None, None)
    feature = F.conv2d(torch.cat([x, v], 1), state["input_conv.weight"], padding=1)
    tokens = feature.flatten(2).transpose(1, 2) + sincos_position_table(8, *x.shape[-2:]).double()

    def norm(tokens, style):
        scale, shift = style[:, None].chunk(2, -1)
        return F.rms_norm(tokens, (8,), eps=1e-5) * (1 + scale) + shift

    for i in range(2):
        part = {name.removeprefix(f"blocks.{i}."): value for name, value in state.items()}
        styles = F.linear(embedding, part["emb_proj.weight"], part["emb_proj.bias"]).chunk(2, -1)
        attention = torch.nn.MultiheadAttention(8, 2, batch_first=True, dtype=x.dtype)
        attention.load_state_dict(
            {
                "in_proj_weight": part["qkv.weight"],
                "in_proj_bias": torch.zeros(24),
                "out_proj.weight": part["proj.weight"],
                "out_proj.bias": part["proj.bias"],
            }
        )
        seen = norm(tokens, styles[0])
        tokens = tokens + attention(seen, seen, seen, need_weights=False)[0]
        hidden = F.gelu(F.linear(norm(tokens, styles[1]), part["fc1.weight"], part["fc1.bias"]), approximate="tanh")
        tokens = tokens + F.linear(hidden, part["fc2.weight"], part["fc2.bias"])
    feature = F.silu(F.rms_norm(tokens, (8,), eps=1e-5)).transpose(1, 2).unflatten(2, x.shape[-2:])
    expected = F.conv2d(feature, state["output_conv.weight"], state["output_conv.bias"], padding=1) * spread(h, x)
    torch.testing.assert_close(net(x, v, t, h, y), expected, **EXACT)


def test_a_token_network_can_be_trained_after_it_has_sampled():
    """What it keeps of a call under inference mode must not reach the next call's graph."""
    net = small_sidenet(architecture="transformer").requires_grad_(True)
    x, v, t, h, y = inputs(size=(3, 7))
    with torch.inference_mode():
        net(x, v, t, h, y)
    net(x, v, t, h, y).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32, torch.float64])
def test_the_answer_has_the_states_precision_whatever_the_weights(weights, architecture):
    """And is the float64 answer to the precision of the weights."""
    x, v, t, h, y = inputs()
    exact = small_sidenet(architecture=architecture)(x, v, t, h, y)
    got = small_sidenet(architecture=architecture).to(weights)(x.float(), v.float(), t.float(), h.float(), y)
    assert got.dtype == torch.float32
    assert (got - exact).norm() < {torch.bfloat16: 0.05}.get(weights, 1e-5) * exact.norm()


# --- configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_channels": 0}, "in_channels must be at least 1; got 0"),
        ({"base_channels": -4}, "base_channels must be at least 1; got -4"),
        ({"embedding_dim": 0}, "embedding_dim must be at least 1"),
        ({"num_layers": 0}, "num_layers must be at least 1"),
        ({"num_heads": 0}, "num_heads must be at least 1"),
        ({"patch_size": 0}, "patch_size must be at least 1"),
        ({"num_classes": -1}, "num_classes must not be negative; got -1"),
        ({"anchors": 3}, "anchors must be 1 or 2; got 3"),
        ({"anchors": 0}, "anchors must be 1 or 2; got 0"),
        ({"kernel_size": 2}, "kernel_size must be odd and positive; got 2"),
        ({"kernel_size": -1}, "kernel_size must be"),
        ({"architecture": "mlp"}, "architecture must be one of conv, transformer, local; got 'mlp'"),
        (
            {"architecture": "transformer", "base_channels": 6, "num_heads": 2},
            "base_channels must be a multiple of 4; got 6",
        ),
        ({"base_channels": 10, "num_heads": 4}, "base_channels must be a multiple of num_heads 4; got 10"),
    ],
)
def test_impossible_configurations_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        SideNetConfig(**changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"x": noise(2, 4, 4, 6), "v": noise(2, 4, 4, 6)},
            r"takes x of \[B, 2, H, W\].*got \(2, 4, 4, 6\).*made for this model",
        ),
        ({"x": noise(2, 2, 4), "v": noise(2, 2, 4)}, r"got \(2, 2, 4\)"),
        ({"v": noise(2, 2, 4, 4)}, r"v must have x's shape \(2, 2, 4, 6\); got \(2, 2, 4, 4\)"),
        ({"t": torch.zeros(3)}, r"t must be \[2\], one value a sample; got \(3,\)"),
        ({"h": torch.tensor(0.1)}, r"h must be \[2\], one value a sample; got \(\)"),
        ({"cond": torch.zeros(1, dtype=torch.long)}, r"cond must be \[2\]"),
        ({"cond": None}, "takes class indices up to 3.*got none"),
        ({"scale": None}, "takes the guidance scale as an input; got none"),
        ({"scale": torch.ones(3)}, r"scale must be \[2\]"),
    ],
)
def test_wrong_inputs_are_refused(change, message):
    x, v, t, h, y = inputs()
    given = {"x": x, "v": v, "t": t, "h": h, "cond": y, "scale": torch.ones(2)} | change
    with pytest.raises(ValueError, match=message):
        small_sidenet(cfg_input=True)(**given)


def test_norms_do_not_overflow_in_half_precision():
    """The square of 300 is more than float16 holds."""
    for dtype in (torch.float16, torch.bfloat16):
        normed = channel_norm(torch.full((1, 8, 2, 2), 300.0, dtype=dtype))
        torch.testing.assert_close(normed, torch.ones_like(normed), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("architecture", ["conv", "transformer"])
def test_attention_is_the_function_that_was_given(architecture):
    """And nothing else of the network changes."""
    seen = []

    def attention(q, k, v):
        seen.append(q.shape)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    plain = small_sidenet(architecture=architecture)
    other = SideNet(plain.config, dtype=torch.float64, attention=attention)
    other.load_state_dict(plain.state_dict())
    x, h = noise(2, 2, 4, 4), noise(2)
    given = x, x + 1, h, h, torch.tensor([0, 1])
    torch.testing.assert_close(other(*given), plain(*given))
    assert seen == [(2, 2, 16, 4)] * (3 if architecture == "transformer" else 1)
