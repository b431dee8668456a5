"""REPA files trained with `--qk-norm`: read, and computed as timm's attention with `norm_layer=nn.LayerNorm` does."""

import math

import pytest
import torch
from ba_solver.bas_core import CheckpointError, load_sit, save_sit
from ba_solver.bas_core.sit import sit_config_from_state_dict
from problems import NULL, noise, small_sit

SIZES = {"hidden_size": 24, "num_heads": 3, "depth": 2}


def naive_normed(vector, weight, bias):
    mean = sum(vector) / len(vector)
    variance = sum((value - mean) ** 2 for value in vector) / len(vector)
    return (vector - mean) / math.sqrt(variance + 1e-5) * weight + bias


def naive_attention(w, x, heads):
    """Token by token and head by head: x [N, D]."""
    count, width = x.shape
    size = width // heads
    joined = x @ w["qkv.weight"].T + w["qkv.bias"]
    out = torch.zeros_like(x)
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        q, k, v = (joined[:, i * width : (i + 1) * width][:, part] for i in range(3))
        q = [naive_normed(row, w["q_norm.weight"], w["q_norm.bias"]) for row in q]
        k = [naive_normed(row, w["k_norm.weight"], w["k_norm.bias"]) for row in k]
        for i in range(count):
            scores = torch.stack([q[i] @ k[j] / math.sqrt(size) for j in range(count)])
            shares = scores.exp() / scores.exp().sum()
            out[i, part] = sum(share * row for share, row in zip(shares, v, strict=True))
    return out @ w["proj.weight"].T + w["proj.bias"]


def test_attention_is_the_naive_one():
    attention = small_sit(5, qk_norm=True, **SIZES).blocks[0].attn
    x = noise(2, 5, 24)
    got = attention(x)
    for row, expected in zip(got, x, strict=True):
        torch.testing.assert_close(row, naive_attention(attention.state_dict(), expected, 3), rtol=1e-10, atol=1e-10)
    assert got.std() > 0.01


def test_the_norms_matter():
    """Without them the same weights compute something else, or the test above would show little."""
    normed, plain = small_sit(5, qk_norm=True, **SIZES), small_sit(6, **SIZES)
    state = {name: value for name, value in normed.state_dict().items() if "_norm." not in name}
    plain.load_state_dict(state)
    x, t, y = noise(2, 3, 8, 8), torch.tensor([0.3, 0.9], dtype=torch.float64), torch.tensor([0, NULL])
    assert (normed(x, t, y) - plain(x, t, y)).norm() > 1e-3 * plain(x, t, y).norm()


def test_public_files_are_read_and_tell_their_heads(tmp_path):
    sit = small_sit(5, torch.float32, qk_norm=True, **SIZES)
    state = sit.state_dict()
    assert {"blocks.1.attn.q_norm.weight", "blocks.1.attn.k_norm.bias"} < state.keys()
    assert state["blocks.0.attn.q_norm.weight"].shape == (8,)
    assert sit_config_from_state_dict(state) == sit.config
    projectors = {"projectors.0.0.weight": torch.ones(3, 3)}
    torch.save({"ema": {f"module.{name}": value for name, value in (state | projectors).items()}}, tmp_path / "repa.pt")
    loaded = load_sit(tmp_path / "repa.pt")
    x, t, y = noise(2, 3, 8, 8, dtype=torch.float32), torch.tensor([0.3, 0.9]), torch.tensor([0, NULL])
    assert loaded.config == sit.config
    torch.testing.assert_close(loaded(x, t, y), sit(x, t, y))


def test_our_own_files_keep_them(tmp_path):
    sit = small_sit(5, torch.float32, qk_norm=True, **SIZES)
    save_sit(tmp_path / "sit.safetensors", sit.state_dict(), sit.config)
    loaded = load_sit(tmp_path / "sit.safetensors")
    assert loaded.config == sit.config
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in sit.state_dict().items())


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"q_norm.bias": None, "k_norm.bias": None}, {}, r"missing \(first 'blocks.0.attn.k_norm.bias'\)"),
        ({"k_norm.weight": None}, {}, r"1 missing \(first 'blocks.0.attn.k_norm.weight'\)"),
        ({"q_norm.weight": torch.ones(7)}, {}, r"q_norm.weight' of .* must be \(24,\); got \(7,\)"),
        ({}, {"num_heads": 4}, r"q_norm.* of .* must be \(6,\); got \(8,\)"),
    ],
    ids=["no bias, as RMSNorm has it", "half", "another size", "other heads"],
)
def test_norms_of_another_kind_are_named(change, options, message, tmp_path):
    state = small_sit(5, torch.float32, qk_norm=True, **SIZES).state_dict()
    state |= {f"blocks.0.attn.{name}": value for name, value in change.items()}
    torch.save({"ema": {name: value for name, value in state.items() if value is not None}}, tmp_path / "repa.pt")
    with pytest.raises(CheckpointError, match=message):
        load_sit(tmp_path / "repa.pt", **options)
