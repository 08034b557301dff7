"""What is minimised: the VAE's objective and the diffusion objective, as modules whose forward returns the loss.

A module, so that one `accelerator.prepare` wraps model and loss together on any number of devices.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.autoencoder import AutoencoderKLCogVideoX
from ..schedulers.noise import add_noise, signal_and_noise, to_velocity

__all__ = ["DiffusionObjective", "Objective", "VAEObjective", "loss_by_bucket", "stratified_timesteps"]


_LEVELS = 10  # ranges of timesteps whose typical loss is followed
_PACE = 0.03  # share of the newest batch in it


class Objective(nn.Module):
    """A model and what it minimises: the forward returns {"loss": scalar, ...}."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


class VAEObjective(Objective):
    """l1_weight * mean |x - x'| + mean (x - x')^2 + kl_weight * mean KL(q(z|x) || N(0, 1)), per element.

    The reconstruction and KL terms of the paper's VAE loss (section 2.1); the perceptual and adversarial terms need weights of
    other networks and are not part of it. The absolute error outweighs the square long before the end of a training, and asks for
    medians: without it (0) the last part of a training gives means, which PSNR rewards.
    """

    def __init__(self, vae: AutoencoderKLCogVideoX, kl_weight: float, l1_weight: float = 1.0) -> None:
        super().__init__(vae)
        self.kl_weight, self.l1_weight = kl_weight, l1_weight

    model: AutoencoderKLCogVideoX

    def forward(self, video: Tensor) -> dict[str, Tensor]:
        """video (B, 3, F, H, W) in [-1, 1] -> scalars: loss and its parts."""
        posterior = self.model.encode(video).latent_dist
        reconstruction = self.model.decode(posterior.sample()).sample.float()
        l1, mse = F.l1_loss(reconstruction, video), F.mse_loss(reconstruction, video)
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return {"loss": self.l1_weight * l1 + mse + self.kl_weight * kl, "l1": l1, "mse": mse, "kl": kl}


class DiffusionObjective(Objective):
    """v-prediction: || v_theta(x_t, t, text) - v ||^2 with x_t = a x_0 + s eps, v = a eps - s x_0, a^2 = abar_t, s^2 = 1 - abar_t.

    Equal to the original's x_0 error weighted by 1 / (1 - abar_t). abar has zero terminal SNR.

    `balance` b weighs a sample by L_t^-b, L_t being the typical loss at its timestep (`observe`), with the weights' mean at 1. At 0 all
    count as they are; at 1 all timesteps contribute alike, as under the learned uncertainty of "Analyzing and Improving the Training
    Dynamics of Diffusion Models" (arXiv 2312.02696, section 2.2), so that what cannot be known at the noisiest ones drowns out nothing.
    """

    def __init__(self, transformer: nn.Module, alphas_cumprod: Tensor, balance: float = 0.0) -> None:
        super().__init__(transformer)
        self.alphas_cumprod = alphas_cumprod
        self.balance = balance
        self.register_buffer("typical_loss", torch.ones(_LEVELS))

    typical_loss: Tensor

    def forward(
        self,
        latents: Tensor,
        text: Tensor,
        timesteps: Tensor,
        noise: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        extra: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """latents, noise (B, F, C, H, W), already scaled; text (B, L, D); timesteps (B,) -> loss (scalar), per_sample (B,).

        `extra` (B, F, C', H, W) joins the noised latents on the channel axis: the image of an image-to-video model.
        """
        alpha, sigma = signal_and_noise(self.alphas_cumprod, timesteps, latents)
        velocity = to_velocity(latents, noise, alpha, sigma)
        noised = add_noise(latents, noise, alpha, sigma)
        seen = noised if extra is None else torch.cat([noised, extra], dim=2)
        prediction = self.model(seen, text, timesteps, image_rotary_emb=rotary, return_dict=False)[0]
        per_sample = (prediction.float() - velocity).square().flatten(1).mean(1)
        weights = self.typical_loss**-self.balance
        loss = ((weights / weights.mean())[self._level(timesteps)] * per_sample).mean()
        return {"loss": loss, "per_sample": per_sample}

    def _level(self, timesteps: Tensor) -> Tensor:
        """Which of the equal ranges of timesteps each one (B,) lies in."""
        return timesteps * _LEVELS // len(self.alphas_cumprod)

    @torch.no_grad()
    def observe(self, per_sample: Tensor, timesteps: Tensor) -> None:
        """Move the typical losses towards those of one batch, (B,) each."""
        level = self._level(timesteps)
        sums, counts = (torch.zeros_like(self.typical_loss).index_add_(0, level, v) for v in (per_sample, torch.ones_like(per_sample)))
        seen = counts > 0
        self.typical_loss[seen] = self.typical_loss[seen].lerp(sums[seen] / counts[seen], _PACE)


def stratified_timesteps(count: int, train_timesteps: int, generator: torch.Generator) -> Tensor:
    """`count` timesteps, one drawn uniformly in each of `count` equal intervals of [0, T), in random order.

    Explicit uniform sampling (paper section 2.3) for one process: interval i belongs to sample i instead of rank i.
    """
    edges = torch.arange(count)[torch.randperm(count, generator=generator)]
    fraction = (edges + torch.rand(count, generator=generator)) / count
    return (fraction * train_timesteps).long().clamp_(max=train_timesteps - 1)


def loss_by_bucket(per_sample: Tensor, timesteps: Tensor, train_timesteps: int, buckets: int = 5) -> Mapping[str, float]:
    """Mean loss of the samples in each of `buckets` equal timestep ranges, as {"loss_t0": ..., "loss_t200": ...}."""
    width = train_timesteps // buckets
    index = (timesteps // width).clamp_(max=buckets - 1)
    return {f"loss_t{b * width}": per_sample[index == b].mean().item() for b in range(buckets) if (index == b).any()}
