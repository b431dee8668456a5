"""The SiT against a plain re-implementation, and every public form of its checkpoints."""

import argparse

import pytest
import torch
from ba_solver.bas_core import CheckpointError, SiT, SiTConfig, load_sit, save_sit
from ba_solver.bas_core.sit import SIT_SIZES, sincos_position_table, sit_config_from_state_dict
from problems import NULL, noise, small_sit
from reference import naive_position_table, naive_sit
from safetensors.torch import save_file

EXACT = {"rtol": 1e-11, "atol": 1e-11}


def inputs(config: SiTConfig, dtype=torch.float64):
    x = noise(3, config.in_channels, config.input_size, config.input_size, dtype=dtype)
    return x, torch.tensor([0.0, 0.4, 1.0], dtype=dtype), torch.tensor([0, 2, NULL])


# --- the network ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"patch_size": 4, "in_channels": 4, "depth": 1},
        {"patch_size": 8, "input_size": 16},
        {"hidden_size": 24, "num_heads": 3, "mlp_ratio": 2.0},
        {"learn_sigma": True},
    ],
    ids=str,
)
def test_it_computes_what_the_public_network_computes(changes):
    sit = small_sit(**changes)
    x, t, y = inputs(sit.config)
    expected = naive_sit(sit.state_dict(), x, t, y, sit.config.num_heads)
    assert expected.shape[1] == x.shape[1] * (2 if sit.config.learn_sigma else 1)
    torch.testing.assert_close(sit(x, t, y), expected[:, : x.shape[1]], **EXACT)
    assert expected.std() > 0.1


def test_it_agrees_in_float32_too():
    sit = small_sit(dtype=torch.float32)
    x, t, y = inputs(sit.config, torch.float32)
    torch.testing.assert_close(sit(x, t, y), naive_sit(sit.state_dict(), x, t, y, 2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float64])
def test_the_answer_has_the_states_precision(weights):
    sit = small_sit()
    x, t, y = inputs(sit.config)
    exact, got = sit(x, t, y), sit.to(weights)(x.float(), t.float(), y)
    assert got.dtype == torch.float32
    assert (got - exact).norm() < {torch.bfloat16: 0.05}.get(weights, 1e-5) * exact.norm()


@pytest.mark.parametrize(("width", "side"), [(8, 4), (16, 3), (12, 1)])
def test_the_position_table_is_maes(width, side):
    got = sincos_position_table(width, side, side)
    torch.testing.assert_close(got.double(), naive_position_table(width, side), rtol=0, atol=1e-7)


def test_an_initialised_network_is_silent_and_trainable():
    """The published initialisation: v = 0 at the start, whatever comes in; the output layer has a gradient."""
    torch.manual_seed(0)
    sit = SiT(small_sit().config).initialize_weights()
    x, t, y = inputs(sit.config, torch.float32)
    v = sit(x, t, y)
    assert torch.equal(v, torch.zeros_like(x))
    (v - x).square().mean().backward()
    assert sit.final_layer.linear.weight.grad.abs().max() > 0
    assert not sit.pos_embed.requires_grad


@pytest.mark.parametrize("learn_sigma", [False, True])
def test_both_time_conventions_describe_one_flow(learn_sigma):
    """The original SiT's has t = 1 at the data and v = data - noise: our v at t is minus its v at 1 - t."""
    ours = small_sit(learn_sigma=learn_sigma)
    theirs = small_sit(learn_sigma=learn_sigma, convention="data_at_one")
    x, t, y = inputs(ours.config)
    expected = -naive_sit(theirs.state_dict(), x, 1 - t, y, 2)[:, : x.shape[1]]
    torch.testing.assert_close(theirs(x, t, y), expected, **EXACT)
    torch.testing.assert_close(theirs(x, t, y), -ours(x, 1 - t, y), **EXACT)


# --- configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("S/8", (12, 384, 6, 8)),
        ("B/4", (12, 768, 12, 4)),
        ("SiT-L/2", (24, 1024, 16, 2)),
        ("XL/2", (28, 1152, 16, 2)),
    ],
)
def test_published_sizes_have_names(name, expected):
    config = SiTConfig.named(name, input_size=64, in_channels=16)
    assert (config.depth, config.hidden_size, config.num_heads, config.patch_size) == expected
    assert (config.input_size, config.in_channels, config.num_classes) == (64, 16, 1000)


@pytest.mark.parametrize("name", ["XXL/2", "XL", "XL/3", "", "S-2"])
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match=rf"S, B, L or XL.*got '{name}'"):
        SiTConfig.named(name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 0}, "depth must be at least 1; got 0"),
        ({"input_size": 7}, "input_size must be a multiple of patch_size 2; got 7"),
        ({"hidden_size": 30, "num_heads": 3}, "hidden_size must be a multiple of 4 and of num_heads 3; got 30"),
        ({"hidden_size": 32, "num_heads": 3}, "hidden_size must be a multiple of 4 and of num_heads 3; got 32"),
        ({"convention": "backwards"}, "one of noise_at_one, data_at_one; got 'backwards'"),
    ],
)
def test_impossible_configurations_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        SiTConfig(**changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": noise(2, 4, 8, 8)}, r"x must be \[B, 3, 8, 8\].*got \(2, 4, 8, 8\)"),
        ({"x": noise(2, 3, 8, 4)}, r"got \(2, 3, 8, 4\)"),
        ({"x": noise(3, 8, 8)}, r"got \(3, 8, 8\)"),
        ({"t": torch.tensor(0.5)}, r"t must be \[2\], one value a sample; got \(\)"),
        ({"y": torch.zeros(3, dtype=torch.long)}, r"y must be \[2\], one value a sample; got \(3,\)"),
    ],
)
def test_wrong_inputs_are_refused(change, message):
    given = {"x": noise(2, 3, 8, 8), "t": torch.zeros(2), "y": torch.zeros(2, dtype=torch.long)} | change
    with pytest.raises(ValueError, match=message):
        small_sit()(**given)


@pytest.mark.parametrize("size", SIT_SIZES)
def test_sizes_are_read_off_a_checkpoint(size):
    """Heads leave no trace in the weights: the published number for the width is taken."""
    expected = SiTConfig.named(f"{size}/2", depth=2)
    assert sit_config_from_state_dict(SiT(expected, device="meta").state_dict()) == expected


def test_what_weights_cannot_tell_may_be_told():
    state = small_sit(hidden_size=64, num_heads=4, mlp_ratio=3.0).state_dict()
    assert sit_config_from_state_dict(state).num_heads == 1, "one head per 64 channels, where nothing is published"
    told = sit_config_from_state_dict(state, convention="data_at_one", num_heads=4)
    assert (told.num_heads, told.convention, told.mlp_ratio) == (4, "data_at_one", 3.0)


# --- checkpoints ------------------------------------------------------------------------------------------------------

EMA, MODEL = small_sit(1, torch.float32), small_sit(2, torch.float32)
ema, model = EMA.state_dict(), MODEL.state_dict()
prefixed = {f"module.{name}": tensor for name, tensor in ema.items()}
projectors = {f"projectors.0.{i}.weight": torch.ones(3, 3) for i in (0, 2)}
arguments = argparse.Namespace(model="SiT-XL/2", legacy=False, cfg=1.5, sizes=[1, 2], name=None)


@pytest.mark.parametrize(
    ("content", "options", "expected"),
    [
        ({"ema": ema, "model": model}, {}, EMA),
        ({"ema": ema, "model": model}, {"weights": "model"}, MODEL),
        ({"model": model}, {}, MODEL),
        ({"ema": ema}, {"weights": "model"}, EMA),
        (ema, {}, EMA),
        (prefixed, {}, EMA),
        ({"ema": prefixed}, {}, EMA),
        ({"ema": ema | projectors}, {}, EMA),
        ({"ema": prefixed | {f"module.{name}": tensor for name, tensor in projectors.items()}}, {}, EMA),
        ({"model": model, "ema": ema, "args": arguments, "opt": {"state": {}, "lr": [1e-4]}, "steps": 400}, {}, EMA),
    ],
    ids=["ema", "model on demand", "model", "ema alone", "bare", "module.", "ema, module.", "projectors",
         "module.projectors", "args"],
)  # fmt: skip
def test_public_forms_load(tmp_path, content, options, expected):
    path = tmp_path / "sit.pt"
    torch.save(content, path)
    sit = load_sit(path, num_heads=2, **options)
    x, t, y = inputs(EMA.config, torch.float32)
    torch.testing.assert_close(sit(x, t, y), expected(x, t, y))
    assert not sit.training and not any(p.requires_grad for p in sit.parameters())


def test_doubled_output_channels_mean_the_original_sit(tmp_path):
    """Its convention is taken, unless the other is asked for."""
    original = small_sit(3, torch.float32, learn_sigma=True, convention="data_at_one")
    torch.save({"ema": original.state_dict()}, tmp_path / "sit.pt")
    x, t, y = inputs(original.config, torch.float32)
    found = load_sit(tmp_path / "sit.pt", num_heads=2)
    assert found.config == original.config
    torch.testing.assert_close(found(x, t, y), original(x, t, y))
    other = load_sit(tmp_path / "sit.pt", "noise_at_one", 2)
    torch.testing.assert_close(other(x, 1 - t, y), -original(x, t, y))


def test_public_safetensors_load(tmp_path):
    save_file(prefixed, tmp_path / "sit.safetensors")
    sit = load_sit(tmp_path / "sit.safetensors", num_heads=2)
    x, t, y = inputs(EMA.config, torch.float32)
    torch.testing.assert_close(sit(x, t, y), EMA(x, t, y))


def test_our_own_form_keeps_everything(tmp_path):
    original = small_sit(4, torch.float32, learn_sigma=True, hidden_size=24, num_heads=3, mlp_ratio=2.5)
    save_sit(tmp_path / "sit.safetensors", original.state_dict(), original.config, {"seed": 7})
    again = load_sit(tmp_path / "sit.safetensors")
    assert again.config == original.config
    for name, tensor in original.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    half = load_sit(tmp_path / "sit.safetensors", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pos_embed": None}, "no SiT checkpoint: tensor 'pos_embed' is missing"),
        ({"pos_embed": torch.zeros(1, 15, 16)}, "square number of tokens; got 15"),
        ({"blocks.1.attn.qkv.bias": None}, r"1 missing \(first 'blocks.1.attn.qkv.bias'\)"),
        ({"blocks.1.extra": torch.zeros(1)}, r"1 unknown \(first 'blocks.1.extra'\)"),
        ({"blocks.0.mlp.fc2.bias": torch.zeros(3)}, r"'blocks.0.mlp.fc2.bias'.*must be \(16,\); got \(3,\)"),
        ({"blocks.0.mlp.fc2.bias": torch.full((16,), torch.nan)}, "'blocks.0.mlp.fc2.bias'.*not finite"),
        ({"blocks.one.bias": torch.zeros(1)}, "sit.pt"),
    ],
    ids=["no table", "odd table", "missing", "unknown", "shape", "nan", "name"],
)
def test_what_is_no_sit_is_refused(tmp_path, change, message):
    state = {name: tensor for name, tensor in (ema | change).items() if tensor is not None}
    torch.save({"ema": state}, tmp_path / "sit.pt")
    with pytest.raises(CheckpointError, match=message):
        load_sit(tmp_path / "sit.pt", num_heads=2)


def test_a_number_of_heads_that_does_not_fit_is_refused(tmp_path):
    torch.save(ema, tmp_path / "sit.pt")
    with pytest.raises(CheckpointError, match=r"sit.pt.*num_heads 3; got 16"):
        load_sit(tmp_path / "sit.pt", num_heads=3)


def test_attention_is_the_function_that_was_given():
    seen = []

    def attention(q, k, v):
        seen.append(q.shape)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    plain = small_sit()
    other = SiT(plain.config, dtype=torch.float64, attention=attention)
    other.load_state_dict(plain.state_dict())
    given = noise(2, 3, 8, 8), torch.tensor([0.3, 0.7]).double(), torch.tensor([0, 1])
    torch.testing.assert_close(other(*given), plain(*given))
    assert seen == [(2, 2, 16, 8)] * 2
