"""The losses that train the image tokenizer (VQ-GAN, arXiv 2012.09841; MARS, Sec. 3.3, takes its own as given).

Shapes: B batch, C channels, H, W pixels, (h, w) latent grid, d width of an entry, V entries, N = B * h * w latents.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from config import setting
from vqgan import VQGAN


@dataclass(frozen=True, kw_only=True)
class VQGANLossConfig:
    """Sec. 3.3 takes its VQ-GAN as given; these are the weights of the losses that train one."""
    gan: float = setting(0.8, "weight of the GAN; 0: none", least=0, most=100)
    gan_start: int = setting(10_000, "steps before the GAN begins; until then it costs nothing", least=0)
    disc_channels: int = setting(64, "width of the discriminator's first layer", least=1, most=1024)
    warm_up: int = setting(0, "first steps without codebook, which is then filled from a batch; ours", least=0)
    ema: float = setting(0.0, "decay of the averages that replace the codebook's gradient; 0: off", least=0,
                         most=0.9999)
    restart_every: int = setting(0, "steps without use after which an entry is restarted; 0: never; ours", least=0)


class Discriminator(nn.Sequential):
    """Sec. 3.3 (taming): the PatchGAN of pix2pix, which judges patches of about 70 pixels. Batch norm keeps no
    running averages: as in taming, it only ever uses the statistics of the batch."""

    def __init__(self, num_channels: int, width: int):
        layers = [nn.Conv2d(num_channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for c_in, c_out, stride in ((width, 2 * width, 2), (2 * width, 4 * width, 2), (4 * width, 8 * width, 1)):
            layers += [nn.Conv2d(c_in, c_out, 4, stride=stride, padding=1, bias=False),
                       nn.BatchNorm2d(c_out, track_running_stats=False), nn.LeakyReLU(0.2)]
        super().__init__(*layers, nn.Conv2d(8 * width, 1, 4, padding=1))
        for layer in self:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.02)


class VQGANLoss(nn.Module):
    """Sec. 3.3 (VQ-GAN): reconstruction, codebook and commitment losses and, from `gan_start` on, a hinge GAN.

    Not as in VQ-GAN: no perceptual loss (LPIPS), as it needs a downloaded network. One optimiser serves the image
    tokenizer and the discriminator: the term of each gives the other no gradient. `logs` holds the parts of the last
    loss and the state of the codebook, as floats.
    """

    def __init__(self, vqgan: VQGAN, settings: VQGANLossConfig):
        super().__init__()
        self.vqgan, self.settings, self.logs = vqgan, settings, {}
        V, d = vqgan.config.num_embeddings, vqgan.config.quantized_embed_dim
        self.discriminator = Discriminator(vqgan.config.num_channels, settings.disc_channels) if settings.gan else None
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self.register_buffer("usage", torch.zeros(V))                                   # uses since the last restart
        self.register_buffer("ema_count", torch.zeros(V))
        self.register_buffer("ema_sum", torch.zeros(V, d))

    def forward(self, pixels: Tensor) -> Tensor:                                        # (B, 3, H, W)
        """-> the loss to back-propagate."""
        s, step = self.settings, int(self.step)
        if step < s.warm_up:
            reconstruction = self.vqgan.decode_latents(self.vqgan.latents(pixels))      # (B, 3, H, W)
            codebook_loss = pixels.new_zeros(())
        else:
            if step == s.warm_up > 0:
                self.restart(self.vqgan.latents(pixels).detach(), self.usage == 0)      # all: none is in use
            reconstruction, z, z_q, tokens = self.vqgan(pixels)
            codebook_loss = self.vqgan.config.commitment_cost * F.mse_loss(z, z_q.detach())
            if not s.ema:
                codebook_loss = codebook_loss + F.mse_loss(z_q, z.detach())
        rec_loss = F.l1_loss(reconstruction, pixels)
        mse = F.mse_loss(reconstruction.detach().clamp(0, 1), pixels)
        self.logs = {"rec": rec_loss.item(), "codebook": codebook_loss.item(),
                     "psnr": -10 * mse.clamp_min(1e-10).log10().item()}
        loss = rec_loss + codebook_loss
        if self.discriminator is not None and step >= s.gan_start:
            loss = loss + self.gan(pixels, reconstruction, rec_loss)
        if step >= s.warm_up:
            self.count(z.detach().float(), tokens)
        self.step += 1
        return loss

    def gan(self, pixels: Tensor, reconstruction: Tensor, rec_loss: Tensor) -> Tensor:
        """VQ-GAN, Eq. (6) and (7): the generator's term weighs as much at the decoder's last layer as `rec_loss`."""
        last_layer = self.vqgan.decoder.conv_out.weight
        frozen = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        g_loss = -torch.func.functional_call(self.discriminator, frozen, (reconstruction,)).mean()
        rec_norm, g_norm = (torch.autograd.grad(term, last_layer, retain_graph=True)[0].norm()
                            for term in (rec_loss, g_loss))
        adaptive = (rec_norm / (g_norm + 1e-4)).clamp(0, 1e4).detach()
        real, fake = self.discriminator(pixels), self.discriminator(reconstruction.detach())
        d_loss = (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
        self.logs |= {"generator": g_loss.item(), "discriminator": d_loss.item(), "adaptive": adaptive.item()}
        return self.settings.gan * adaptive * g_loss + d_loss

    @torch.no_grad()
    def count(self, z: Tensor, tokens: Tensor) -> None:                                 # (B, d, h, w), (B, h, w)
        """Counts what this batch used, over all processes, moves the averages, and restarts what nothing uses."""
        s, entries = self.settings, self.vqgan.quantize.embedding.weight                # (V, d)
        counts = torch.bincount(tokens.flatten(), minlength=len(entries)).float()       # (V,)
        sums = torch.zeros_like(self.ema_sum).index_add_(0, tokens.flatten(), z.movedim(1, -1).flatten(0, -2))
        if distributed.is_initialized():
            distributed.all_reduce(counts)
            distributed.all_reduce(sums)                                                # (V, d)
        self.usage += counts
        if s.ema:
            self.ema_count.lerp_(counts, 1 - s.ema)
            self.ema_sum.lerp_(sums, 1 - s.ema)
            mean = self.ema_sum / self.ema_count.clamp_min(1e-5)[:, None]
            entries.copy_(torch.where(counts[:, None] > 0, mean, entries))
        if s.restart_every and (int(self.step) + 1) % s.restart_every == 0:
            self.restart(z, self.usage == 0)
            self.usage.zero_()
        self.logs |= {"usage": (counts > 0).float().mean().item(),
                      "perplexity": torch.special.entr(counts / counts.sum()).sum().exp().item()}

    @torch.no_grad()
    def restart(self, z: Tensor, dead: Tensor) -> None:                                 # (B, d, h, w), (V,)
        """Not in the paper: puts unused entries where latents of this batch are served worst, drawn by their error.
        Of several processes the first draws, from its part of the batch."""
        codebook, z = self.vqgan.quantize, z.float()
        error = (z - codebook.lookup(codebook.nearest(z))).square().sum(dim=1).flatten()              # (N,)
        z_flat, where = z.movedim(1, -1).flatten(0, -2).unique(dim=0, return_inverse=True)
        error = torch.ones_like(error) if dead.all() else error
        error = torch.zeros(len(z_flat), device=z.device).scatter_(0, where, error)     # of each distinct latent
        n = min(int(dead.sum()), int((error > 0).sum()))
        if n > 0:
            rows, new = dead.nonzero()[:n, 0], z_flat[torch.multinomial(error, n)]      # (n,), (n, d)
            codebook.embedding.weight[rows], self.ema_sum[rows], self.ema_count[rows] = new, new, 1.0
        if distributed.is_initialized():
            for tensor in (codebook.embedding.weight, self.ema_sum, self.ema_count):
                distributed.broadcast(tensor, 0)
