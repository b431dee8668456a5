import torch
from ba_solver.training.backbones import Backbone


def my_model(device: torch.device, dtype: torch.dtype) -> Backbone:
    network = torch.nn.Conv2d(4, 4, 3, padding=1).to(device, dtype)  # your model here

    @torch.no_grad()
    def velocity(x, t, conditions, scale):
        """dx/dt at states x [N, 4, 32, 32] and times t [N], t = 1 noise and t = 0 data, so v = noise - data."""
        return x - network(x.to(dtype)).to(x.dtype) * (1 - t).view(-1, 1, 1, 1)

    return Backbone(
        name="my model",
        kind="python",
        fingerprint="my-model-1",  # anything that changes with the weights
        shape=(4, 32, 32),
        velocity=velocity,
        device=device,
        dtype=dtype,
    )
