"""The picture tokeniser of MARS (Sec. 3.3: "VQ-GAN", 16x down-sampling, 8,192 codes).

A picture becomes a small grid of integers, each the index of the nearest vector in a learned codebook, and the grid
becomes a picture again. Names and shapes of all parameters are those of open-muse's VQGAN (taming's architecture),
so `vqgan-f16-8192-laion` loads as it is. The GAN that trains it is the last class of this file.

Shapes: B batch, C channels, H, W pixels, h = H / factor and w = W / factor the latent grid, D code width,
V number of codes, N = B * h * w latent vectors.
"""

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import distributed as dist
from torch import nn

from checkpoint import load_pickled, load_tensors, read_json, save_folder


@dataclass(frozen=True)
class VQGANConfig:
    """Sec. 3.3, with open-muse's field names; the defaults are `vqgan-f16-8192-laion`."""
    resolution: int = 256                        # side at which `attn_resolutions` is counted; any size can be encoded
    num_channels: int = 3                        # RGB
    hidden_channels: int = 128                   # width of the first level
    channel_mult: tuple[int, ...] = (1, 1, 2, 2, 4)  # width of each level; every level but one halves the picture
    num_res_blocks: int = 2                      # residual blocks per level (the decoder has one more)
    attn_resolutions: tuple[int, ...] = (16,)    # levels with attention, by their side at `resolution`
    no_attn_mid_block: bool = False              # leave out the attention in the middle
    z_channels: int = 256                        # width on the outer side of the 1x1 convolutions round the codebook
    num_embeddings: int = 8192                   # V
    quantized_embed_dim: int = 256               # D
    dropout: float = 0.0                         # in the residual blocks
    resample_with_conv: bool = True              # a convolution at each change of resolution
    commitment_cost: float = 0.25                # from 0 to 1: weight of the commitment loss (beta of VQ-VAE)
    signed_pixels: bool = False                  # True: taming's own checkpoints, whose pixels lie in [-1, 1]
    patches: bool = False                        # Not in the paper: PatchEncoder and PatchDecoder
    normalize_codes: bool = False                # Not in the paper: codes on the unit sphere, as in ViT-VQGAN

    def __post_init__(self):
        whole = lambda v: type(v) is int and v > 0
        checks = {int: ("a whole number above 0", whole), bool: ("true or false", lambda v: type(v) is bool),
                  float: ("a number from 0 to 1", lambda v: type(v) in (int, float) and 0 <= v <= 1),
                  tuple: ("a list of whole numbers above 0", lambda v: type(v) is tuple and all(map(whole, v)))}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):  # JSON has no tuples
                object.__setattr__(self, field.name, value := tuple(value))
            expected, check = checks[type(field.default)]
            if not check(value):
                raise ValueError(f"{field.name} is {value!r}, expected {expected}")
        if not self.channel_mult:
            raise ValueError("channel_mult is empty, expected at least one level")
        if self.patches and self.z_channels != self.num_channels * self.factor ** 2:
            raise ValueError(f"z_channels is {self.z_channels}, expected {self.num_channels * self.factor ** 2}: "
                             "with patches, every value of a cell")
        if not self.patches and self.hidden_channels % 32:
            raise ValueError(f"hidden_channels is {self.hidden_channels}, expected a multiple of 32 (group norm)")

    @property
    def factor(self) -> int:
        """Pixels per code along a side."""
        return 2 ** (len(self.channel_mult) - 1)

    @classmethod
    def from_dict(cls, values: dict) -> "VQGANConfig":
        """From a config.json, ours or open-muse's: a key is a field, or known to be free of meaning, or an error."""
        ignored = {"num_resolutions", "reduction_factor", "latent_size"}  # open-muse derives these from the others
        optional = {"decoder_res_blocks", "extra_mid_res_blocks", "decoder_hidden_channels", "decoder_channel_mult"}
        known = {field.name for field in fields(cls)}
        for key, value in values.items():
            if key in known or key in ignored or key.startswith("_"):
                continue
            if key not in optional or value is not None:
                raise ValueError(f'{key} = {value!r} is not supported, expected the keys {", ".join(sorted(known))}')
        return cls(**{key: value for key, value in values.items() if key in known})


# --- open-muse's convolutional encoder and decoder ---

def group_norm(channels: int) -> nn.GroupNorm:
    """Sec. 3.3 (taming): group norm of 32 groups, as everywhere in that codec."""
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResBlock(nn.Module):
    """Sec. 3.3 (taming): two 3x3 convolutions round a bypass."""

    def __init__(self, c_in: int, c_out: int, dropout: float):
        super().__init__()
        self.norm1 = group_norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = group_norm(c_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):  # (B, C_in, H, W)
        y = self.conv1(F.silu(self.norm1(x)))  # (B, C_out, H, W)
        y = self.conv2(self.dropout(F.silu(self.norm2(y))))
        return y + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Sec. 3.3 (taming): attention of one head over all positions."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = group_norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):  # (B, C, H, W)
        y = self.norm(x)
        q, k, v = (layer(y).flatten(2).transpose(1, 2)[:, None] for layer in (self.q, self.k, self.v))  # (B, 1, HW, C)
        y = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)  # (B, C, H, W)
        return x + self.proj_out(y)


class Resample(nn.Module):
    """Sec. 3.3 (taming): half or twice the resolution. The one-sided padding is taming's."""

    def __init__(self, channels: int, config: VQGANConfig, up: bool):
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(channels, channels, 3, *((1, 1) if up else (2, 0))) if config.resample_with_conv else None

    def forward(self, x):  # (B, C, H, W)
        if self.up:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")  # (B, C, 2H, 2W)
            return x if self.conv is None else self.conv(x)
        return F.avg_pool2d(x, 2) if self.conv is None else self.conv(F.pad(x, (0, 1, 0, 1)))  # (B, C, H/2, W/2)


class Level(nn.Module):
    """Sec. 3.3 (taming): the blocks at one resolution, and the way to the next."""

    def __init__(self, config: VQGANConfig, c_in: int, c_out: int, blocks: int, level: int, up: bool):
        super().__init__()
        side = config.resolution // 2 ** level  # what decides on attention, whatever the size of the actual input
        self.block = nn.ModuleList(ResBlock(c_in if i == 0 else c_out, c_out, config.dropout) for i in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(c_out) for _ in range(blocks if side in config.attn_resolutions else 0))
        if level != (0 if up else len(config.channel_mult) - 1):
            self.add_module("upsample" if up else "downsample", Resample(c_out, config, up))
        self.resample = "upsample" if up else "downsample"

    def forward(self, x):  # (B, C_in, H, W)
        for i, block in enumerate(self.block):
            x = block(x)  # (B, C_out, H, W)
            if self.attn:
                x = self.attn[i](x)
        return getattr(self, self.resample)(x) if hasattr(self, self.resample) else x


class Middle(nn.Module):
    """Sec. 3.3 (taming): two residual blocks with attention between them, at the latent resolution."""

    def __init__(self, config: VQGANConfig, channels: int):
        super().__init__()
        self.block_1 = ResBlock(channels, channels, config.dropout)
        self.attn_1 = nn.Identity() if config.no_attn_mid_block else AttnBlock(channels)
        self.block_2 = ResBlock(channels, channels, config.dropout)

    def forward(self, x):  # (B, C, h, w)
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Sec. 3.3 (taming): pixels to latents. Group norm and attention let every code depend on the whole picture."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        widths = [config.hidden_channels * m for m in config.channel_mult]
        self.conv_in = nn.Conv2d(config.num_channels, config.hidden_channels, 3, padding=1)
        self.down = nn.ModuleList(Level(config, c_in, c_out, config.num_res_blocks, level, up=False) for level, (
            c_in, c_out) in enumerate(zip([config.hidden_channels] + widths, widths)))
        self.mid = Middle(config, widths[-1])
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.z_channels, 3, padding=1)

    def forward(self, x):  # (B, 3, H, W)
        x = self.conv_in(x)  # (B, C, H, W)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))  # (B, z_channels, h, w)


class Decoder(nn.Module):
    """Sec. 3.3 (taming): latents to pixels, the encoder's mirror image with one more block per level."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        widths = [config.hidden_channels * m for m in config.channel_mult]
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(config, widths[-1])
        self.up = nn.ModuleList(Level(config, c_in, c_out, config.num_res_blocks + 1, level, up=True) for level, (
            c_in, c_out) in enumerate(zip(widths[1:] + widths[-1:], widths)))
        self.norm_out = group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], config.num_channels, 3, padding=1)

    def forward(self, x):  # (B, z_channels, h, w)
        x = self.mid(self.conv_in(x))  # (B, C, h, w)
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))  # (B, 3, H, W)


# --- an encoder that sees one cell at a time, for small models ---

class PatchBlock(nn.Module):
    """Not in the paper: a residual block that starts as the identity and sees `kernel` x `kernel` cells."""

    def __init__(self, channels: int, hidden: int, kernel: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, hidden, kernel, padding=kernel // 2)
        self.conv2 = nn.Conv2d(hidden, channels, 1)
        nn.init.zeros_(self.conv2.weight), nn.init.zeros_(self.conv2.bias)

    def forward(self, x):  # (B, C, h, w)
        y = x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + 1e-6)  # each position by itself, unlike group norm
        return x + self.conv2(F.silu(self.conv1(y)))


class PatchEncoder(nn.Module):
    """Not in the paper: a code depends on the factor x factor pixels of its own cell and on nothing else.

    Equal cells get equal codes wherever they stand. A small language model learns such codes in minutes; to it the
    codes of `Encoder`, each a function of the whole picture, are nearly noise. Everything starts as the identity.
    """

    def __init__(self, config: VQGANConfig):
        super().__init__()
        self.factor = config.factor
        hidden = config.hidden_channels * config.channel_mult[-1]
        self.colour1 = nn.Conv2d(config.num_channels, 32, 1)  # a map of colours, one for all pixels: it tells a
        self.colour2 = nn.Conv2d(32, config.num_channels, 1)  # background from a thing after few pictures
        nn.init.zeros_(self.colour2.weight), nn.init.zeros_(self.colour2.bias)
        self.block = nn.ModuleList(PatchBlock(config.z_channels, hidden, 1) for _ in range(config.num_res_blocks))

    def forward(self, x):  # (B, 3, H, W)
        x = x.to(memory_format=torch.channels_last)  # 1x1 convolutions take half the time so, on a CPU
        x = x + self.colour2(F.silu(self.colour1(4 * x - 2)))
        x = F.pixel_unshuffle(x, self.factor).to(memory_format=torch.channels_last)  # (B, C, h, w)
        for block in self.block:
            x = block(x)
        return x  # (B, z_channels, h, w)


class PatchDecoder(nn.Module):
    """Not in the paper: each cell is painted from its own code and those beside it. All work is at (h, w): fast."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        self.factor = config.factor
        hidden = config.hidden_channels * config.channel_mult[-1]
        self.block = nn.ModuleList(PatchBlock(config.z_channels, hidden, 1 if i % 2 else 3)
                                   for i in range(config.num_res_blocks))
        self.conv_out = nn.Conv2d(config.z_channels, config.z_channels, 1)
        nn.init.dirac_(self.conv_out.weight), nn.init.zeros_(self.conv_out.bias)

    def forward(self, x):  # (B, z_channels, h, w)
        x = x.to(memory_format=torch.channels_last)
        for block in self.block:
            x = block(x)
        return F.pixel_shuffle(self.conv_out(x), self.factor)  # (B, 3, H, W)


# --- the codebook ---

class Codebook(nn.Module):
    """Sec. 3.3: V vectors of width D; a latent vector is replaced by the nearest of them."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        self.normalize = config.normalize_codes
        self.embedding = nn.Embedding(config.num_embeddings, config.quantized_embed_dim)
        nn.init.uniform_(self.embedding.weight, -1 / config.num_embeddings, 1 / config.num_embeddings)

    def lookup(self, codes):  # (B, h, w)
        z_q = self.embedding(codes)  # (B, h, w, D)
        z_q = F.normalize(z_q, dim=-1) if self.normalize else z_q
        return z_q.permute(0, 3, 1, 2)  # (B, D, h, w)

    @torch.no_grad()
    def nearest(self, z, rows: int = 1024):  # (B, D, h, w)
        """argmin over e of |z - e|^2 = |z|^2 - 2 z.e + |e|^2; |z|^2 decides nothing. `rows` bounds the memory."""
        codebook = F.normalize(self.embedding.weight, dim=-1) if self.normalize else self.embedding.weight  # (V, D)
        squares = codebook.square().sum(dim=1)  # (V,)
        z_flat = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])  # (N, D)
        codes = [torch.addmm(squares, part, codebook.T, alpha=-2).argmin(dim=1) for part in z_flat.split(rows)]
        return torch.cat(codes).view(z.shape[0], *z.shape[2:])  # (B, h, w)


class VQGAN(nn.Module):
    """Sec. 3.3: pixels in [0, 1] to codes and back."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        self.config = config
        self.encoder = PatchEncoder(config) if config.patches else Encoder(config)
        self.decoder = PatchDecoder(config) if config.patches else Decoder(config)
        self.quantize = Codebook(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.quantized_embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.quantized_embed_dim, config.z_channels, 1)
        if config.patches:
            nn.init.orthogonal_(self.quant_conv.weight), nn.init.zeros_(self.quant_conv.bias)
            self.post_quant_conv.weight.data.copy_(self.quant_conv.weight.data.transpose(0, 1))
            nn.init.zeros_(self.post_quant_conv.bias)

    @property
    def factor(self) -> int:
        """P, pixels a side of one code's cell."""
        return self.config.factor

    @torch.no_grad()
    def initialise(self, batches, most: int = 50_000):
        """Not in the paper: starts a per-cell codec (`patches`) from pictures instead of from noise, so that a laptop
        needs minutes. batches: pixels (B, 3, H, W) in [0, 1], read until `most` distinct cells are found. The 1x1
        convolutions round the codebook become the principal components of these cells, each counted once however
        common; the codebook is filled with their latents, drawn at random where there are more than codes."""
        if not self.config.patches:
            raise ValueError("initialise() is for a codec with patches, expected patches = true in its configuration")
        found = {}
        for pixels in batches:
            cells = F.pixel_unshuffle(pixels, self.factor).permute(0, 2, 3, 1).flatten(0, 2)  # (N, C)
            found.update((cell.tobytes(), cell) for cell in (cells * 255).round().byte().cpu().numpy())
            if len(found) >= most:
                break
        device = self.quant_conv.weight.device
        cells = torch.from_numpy(np.stack(list(found.values()))).to(device) / 255  # (N, C)
        mean = cells.mean(dim=0)
        axes = torch.linalg.eigh((cells - mean).T @ (cells - mean)).eigenvectors.T.flip(0)  # (C, C), largest first
        axes = axes[:self.config.quantized_embed_dim]  # (D, C)
        self.quant_conv.weight.copy_(axes[:, :, None, None]), self.quant_conv.bias.copy_(-axes @ mean)
        self.post_quant_conv.weight.copy_(axes.T[:, :, None, None]), self.post_quant_conv.bias.copy_(mean)
        latents = (cells - mean) @ axes.T  # (N, D)
        rows = latents[torch.randperm(len(latents)).to(device)][:self.config.num_embeddings]
        self.quantize.embedding.weight[:len(rows)] = rows

    def latents(self, pixels):  # (B, 3, H, W)
        channels, factor = self.config.num_channels, self.factor
        if pixels.ndim != 4 or pixels.shape[1] != channels or any(n % factor or not n for n in pixels.shape[2:]):
            raise ValueError(f"pixels have shape {tuple(pixels.shape)}, expected (B, {channels}, H, W) "
                             f"with H and W multiples of {factor}")
        pixels = 2 * pixels - 1 if self.config.signed_pixels else pixels
        z = self.quant_conv(self.encoder(pixels))  # (B, D, h, w)
        return F.normalize(z, dim=1) if self.config.normalize_codes else z

    def paint(self, z_q):  # (B, D, h, w)
        pixels = self.decoder(self.post_quant_conv(z_q))  # (B, 3, H, W)
        return (pixels + 1) / 2 if self.config.signed_pixels else pixels

    @torch.no_grad()
    def encode(self, pixels):  # (B, 3, H, W)
        return self.quantize.nearest(self.latents(pixels))  # (B, h, w)

    def decode(self, codes):  # (B, h, w)
        """Pixels as the decoder gives them, not clamped: the caller clamps to [0, 1] before it makes a file of them."""
        return self.paint(self.quantize.lookup(codes))  # (B, 3, H, W)

    def forward(self, pixels):  # (B, 3, H, W)
        """-> reconstruction, z, z_q, codes. Gradients pass the quantisation as if it were not there."""
        z = self.latents(pixels)  # (B, D, h, w)
        codes = self.quantize.nearest(z)  # (B, h, w)
        z_q = self.quantize.lookup(codes)  # (B, D, h, w)
        return self.paint(z + (z_q - z).detach()), z, z_q, codes

    def save_pretrained(self, folder, dtype: torch.dtype = torch.float32) -> None:
        """Writes config.json and model.safetensors, each beside its place and renamed."""
        save_folder(folder, self, {name: tensor.to(dtype) for name, tensor in self.state_dict().items()})

    @classmethod
    def from_pretrained(cls, folder, device="cpu") -> "VQGAN":
        """From a folder of ours or of open-muse, from one that holds taming's `last.ckpt`, or from a MARS folder that
        keeps its codec in `vqgan`; float32 whatever the file holds. All hold a config.json in open-muse's fields;
        taming's says `signed_pixels`."""
        folder = Path(folder)
        folder = folder / "vqgan" if (folder / "vqgan").is_dir() else folder
        if not folder.is_dir():
            raise ValueError(f"{folder}: not found, expected a VQGAN folder with config.json and model.safetensors")
        values = read_json(folder / "config.json")
        try:
            config = VQGANConfig.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{folder / 'config.json'}: not a VQGAN configuration: {error}") from None
        with torch.device("meta"):
            vqgan = cls(config)
        pickled = [folder / name for name in ("pytorch_model.bin", "last.ckpt") if (folder / name).is_file()]
        if pickled and not (folder / "model.safetensors").is_file():
            load_pickled(pickled[0], vqgan, device, unused="loss.")
        else:
            load_tensors(folder / "model.safetensors", vqgan, device)
        return vqgan.float().eval()


# --- training ---

@dataclass(frozen=True)
class VQGANTraining:
    """Sec. 3.3 takes its VQ-GAN as given; these are the settings to train one, VQ-GAN's own by default."""
    l1: float = 1.0                    # weight of the absolute error
    l2: float = 0.0                    # weight of the squared error
    codebook: float = 1.0              # weight of the codebook loss (with the commitment loss in it)
    gan: float = 0.8                   # weight of the GAN; 0 trains without a discriminator
    disc_start: int = 10_000           # steps before the GAN begins; until then it costs nothing
    disc_channels: int = 64            # width of the discriminator's first layer
    foreground: float = 0.0            # Not in the paper: weight of what differs from the picture's median colour
    unquantized: int = 0               # Not in the paper: first steps without codebook, then filled from a batch
    ema: float = 0.0                   # Not in the paper: decay of averages that replace the codebook's gradient; 0 off
    restart_every: int = 0             # Not in the paper: steps without use after which a code is restarted; 0 never
    restart_until: int = 0             # Not in the paper: the step of the last restart


class Discriminator(nn.Sequential):
    """Sec. 3.3 (taming): the PatchGAN of pix2pix, which judges patches of about 70 pixels. Batch norm keeps no
    running averages: as in taming, it is only ever used with the statistics of the batch."""

    def __init__(self, num_channels: int, width: int):
        layers = [nn.Conv2d(num_channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for c_in, c_out, stride in ((width, 2 * width, 2), (2 * width, 4 * width, 2), (4 * width, 8 * width, 1)):
            layers += [nn.Conv2d(c_in, c_out, 4, stride=stride, padding=1, bias=False),
                       nn.BatchNorm2d(c_out, track_running_stats=False), nn.LeakyReLU(0.2)]
        super().__init__(*layers, nn.Conv2d(8 * width, 1, 4, padding=1))
        for layer in self:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.02)


def over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """Not in the paper: the tensor summed over torchrun's processes, each with its share of a batch; alone, itself."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


class VQGANLoss(nn.Module):
    """Sec. 3.3 (VQ-GAN): reconstruction, codebook and commitment losses and, from `disc_start` on, a hinge GAN.

    Not as in VQ-GAN: no perceptual loss (LPIPS), as it needs a downloaded network. One optimiser serves `vqgan` and
    this module together: the generator's term gives the discriminator no gradient, the discriminator's term gives
    the generator none. The averages of the codebook live in this module's state_dict, not in the codec's. Several
    processes count their codes together; the discriminator's batch norm and weight are each process's own (taming).
    """

    def __init__(self, config: VQGANConfig, training: VQGANTraining):
        super().__init__()
        self.t = training
        self.discriminator = Discriminator(config.num_channels, training.disc_channels) if training.gan else None
        self.register_buffer("usage", torch.zeros(config.num_embeddings))  # uses since the last restart
        self.register_buffer("ema_count", torch.zeros(config.num_embeddings))
        self.register_buffer("ema_sum", torch.zeros(config.num_embeddings, config.quantized_embed_dim))

    def forward(self, vqgan: VQGAN, pixels, step: int):  # (B, 3, H, W)
        """-> the loss to back-propagate, and its parts and the state of the codebook as floats."""
        t = self.t
        if step < t.unquantized:
            reconstruction, codes = vqgan.paint(vqgan.latents(pixels)), None
            codebook_loss = pixels.new_zeros(())
        else:
            if self.training and step == t.unquantized > 0:
                self.restart(vqgan.quantize, vqgan.latents(pixels), self.usage == 0)  # nothing is in use yet: all
            reconstruction, z, z_q, codes = vqgan(pixels)  # (B, 3, H, W), (B, D, h, w) twice, (B, h, w)
            codebook_loss = vqgan.config.commitment_cost * F.mse_loss(z, z_q.detach())
            if not t.ema:
                codebook_loss = codebook_loss + F.mse_loss(z_q, z.detach())
        error = reconstruction - pixels  # (B, 3, H, W)
        weight = self.foreground_weight(pixels)  # (B, 1, H, W)
        rec_loss = (weight * (t.l1 * error.abs() + t.l2 * error.square())).mean()
        loss = rec_loss + t.codebook * codebook_loss
        logs = {"rec": rec_loss.item(), "codebook": codebook_loss.item()}
        if self.discriminator is not None and step >= t.disc_start:
            gan_loss, gan_logs = self.gan(pixels, reconstruction, rec_loss, vqgan.decoder.conv_out.weight)
            loss, logs = loss + gan_loss, logs | gan_logs
        mse = (reconstruction.detach().clamp(0, 1) - pixels).square().mean()
        logs |= {"loss": loss.item(), "psnr": -10 * mse.clamp_min(1e-10).log10().item()}
        if codes is not None:
            logs |= self.count(vqgan.quantize, z.detach(), codes, step)
        return loss, logs

    def foreground_weight(self, pixels):  # (B, 3, H, W)
        """Not in the paper: 1 plus `foreground` times the distance from the picture's own median colour, scaled to a
        mean of 1. Wide plain backgrounds otherwise outvote the few pixels that tell one object from another. The
        median is that of one pixel in 16, to save time."""
        median = pixels[:, :, ::4, ::4].flatten(2).median(dim=2).values[:, :, None, None]  # (B, 3, 1, 1)
        weight = 1 + self.t.foreground * (pixels - median).abs().amax(dim=1, keepdim=True)  # (B, 1, H, W)
        processes = dist.get_world_size() if dist.is_initialized() else 1
        return weight / over_processes(weight.mean()) * processes

    def gan(self, pixels, reconstruction, rec_loss, last_layer):
        """VQ-GAN, Eq. (6) and (7): the generator's term weighs as much at the decoder's last layer as `rec_loss`."""
        frozen = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        g_loss = -torch.func.functional_call(self.discriminator, frozen, (reconstruction,)).mean()
        rec_norm, g_norm = (torch.autograd.grad(term, last_layer, retain_graph=True)[0].norm()
                            for term in (rec_loss, g_loss))
        adaptive = (rec_norm / (g_norm + 1e-4)).clamp(0, 1e4).detach()
        real, fake = self.discriminator(pixels), self.discriminator(reconstruction.detach())
        d_loss = (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
        logs = {"generator": g_loss.item(), "discriminator": d_loss.item(), "adaptive": adaptive.item()}
        return self.t.gan * adaptive * g_loss + d_loss, logs

    @torch.no_grad()
    def count(self, codebook: Codebook, z, codes, step: int):
        """Count what this batch used; in training also move the averages and restart what nothing uses."""
        z_flat = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])  # (N, D)
        counts = over_processes(torch.bincount(codes.flatten(), minlength=len(self.usage)).float())  # (V,)
        sums = over_processes(torch.zeros_like(self.ema_sum).index_add_(0, codes.flatten(), z_flat))  # (V, D)
        if self.training:
            self.usage += counts
            if self.t.ema:
                self.ema_count.lerp_(counts, 1 - self.t.ema)
                self.ema_sum.lerp_(sums, 1 - self.t.ema)
                mean = self.ema_sum / self.ema_count.clamp_min(1e-5)[:, None]  # (V, D)
                mean = F.normalize(mean, dim=1) if codebook.normalize else mean
                codebook.embedding.weight.copy_(torch.where(counts[:, None] > 0, mean, codebook.embedding.weight))
            if self.t.restart_every and (step + 1) % self.t.restart_every == 0:
                if step < self.t.restart_until:
                    self.restart(codebook, z, self.usage == 0)
                self.usage.zero_()
        p = counts / counts.sum()
        return {"usage": (counts > 0).float().mean().item(), "perplexity": torch.special.entr(p).sum().exp().item()}

    @torch.no_grad()
    def restart(self, codebook: Codebook, z, dead):  # (B, D, h, w), (V,)
        """Not in the paper: put dead codes where latents of this batch are worst served, drawn by their distance.
        Of several processes the first draws, from its share of the batch."""
        z_flat = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])  # (N, D)
        if dead.all():
            error = torch.ones(len(z_flat))  # (N,)
        else:
            error = (z - codebook.lookup(codebook.nearest(z))).square().sum(dim=1).flatten().cpu()  # (N,)
        z_flat, where = z_flat.unique(dim=0, return_inverse=True)  # each distinct latent once
        error = torch.zeros(len(z_flat)).scatter_(0, where.cpu(), error)
        n = min(int(dead.sum()), int((error > 0).sum()))
        if n > 0:
            rows = dead.nonzero()[:n, 0]  # (n,)
            new = z_flat[torch.multinomial(error, n).to(z.device)]  # (n, D)
            codebook.embedding.weight[rows], self.ema_sum[rows], self.ema_count[rows] = new, new, 1.0
        if dist.is_initialized():
            for tensor in (codebook.embedding.weight, self.ema_sum, self.ema_count):
                dist.broadcast(tensor, 0)
