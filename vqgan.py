"""The image tokenizer of MARS (Sec. 3.3, Tokenization: a VQ-GAN, 16x down-sampling, 8,192 entries).

An image becomes a small grid of image tokens, each the index of the nearest entry of a learned codebook, and the grid
becomes an image again. Names and shapes of all parameters are those of open-muse's VQGAN (taming's architecture), so
`vqgan-f16-8192-laion` loads as it is. vqgan_loss.py trains it.

Shapes: B batch, C channels, H, W pixels, h = H / factor and w = W / factor the latent grid, d width of an entry,
V entries of the codebook, N = B * h * w latent vectors.
"""
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoint import load_pickled, load_tensors, save_folder
from config import check, from_json, setting
from files import read_json


@dataclass(frozen=True, kw_only=True)
class VQGANConfig:
    """Sec. 3.3, with open-muse's field names; the defaults are `vqgan-f16-8192-laion`."""
    resolution: int = setting(256, "side at which `attn_resolutions` is counted; any size can be encoded", least=1)
    num_channels: int = setting(3, "RGB", least=1, most=4)
    hidden_channels: int = setting(128, "width of the first level", least=1, most=2**14)
    channel_mult: tuple[int, ...] = setting((1, 1, 2, 2, 4), "width of each level, in hidden_channels; every level but "
                                            "one halves the image", least=1, most=64)
    num_res_blocks: int = setting(2, "residual blocks a level (the decoder has one more)", least=1, most=64)
    attn_resolutions: tuple[int, ...] = setting((16,), "levels with attention, by their side at `resolution`", least=1)
    no_attn_mid_block: bool = setting(False, "leave out the attention in the middle")
    z_channels: int = setting(256, "width on the outer side of the 1x1 convolutions around the codebook", least=1)
    num_embeddings: int = setting(8192, "V", least=1, most=2**20)
    quantized_embed_dim: int = setting(256, "d", least=1)
    commitment_cost: float = setting(0.25, "weight of the commitment loss (beta of VQ-VAE)", least=0, most=100)
    signed_pixels: bool = setting(False, "True: taming's own checkpoints, whose pixels lie in [-1, 1]")
    norm_groups: int = setting(32, "groups of the group norms", least=1)
    stem: int = setting(1, "pixels a side that are folded into channels before any convolution; ours", least=1, most=16)
    local_encoder: bool = setting(False, "a token sees little more than its own pixels, see `Encoder`; ours")

    def __post_init__(self):
        check(self)
        if not 1 <= len(self.channel_mult) <= 8:
            raise ValueError(f"channel_mult is {self.channel_mult}, expected one to eight levels")
        if self.hidden_channels % self.norm_groups:
            raise ValueError(f"hidden_channels is {self.hidden_channels}, expected a multiple of the "
                             f"{self.norm_groups} norm_groups")

    @property
    def factor(self) -> int:
        """Pixels a token, along a side."""
        return self.stem * 2 ** (len(self.channel_mult) - 1)

    @classmethod
    def from_dict(cls, values: dict, where="config.json") -> "VQGANConfig":
        """From a config.json, ours or open-muse's. Raises ValueError, one line, for a key that is neither a field nor
        known to change nothing here."""
        known, computed = {field.name for field in fields(cls)}, {"num_resolutions", "reduction_factor", "latent_size"}
        fixed = {"dropout": 0, "resample_with_conv": True, "decoder_res_blocks": None, "extra_mid_res_blocks": None,
                 "decoder_hidden_channels": None, "decoder_channel_mult": None}
        for key, value in values.items():
            if not (key in known | computed or key.startswith("_") or (key in fixed and value == fixed[key])):
                raise ValueError(f"{where}: {key} = {value!r} is not supported, expected the keys "
                                 + ", ".join(sorted(known)))
        given = {key: value for key, value in values.items() if key in known}
        return from_json(cls, asdict(cls()) | given, where)


# ----------------------------------------------------------------------------- encoder and decoder (taming)

class PositionNorm(nn.GroupNorm):
    """Not in the paper: a norm over the channels of each position by itself. Group norm also mixes all positions."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.movedim(1, -1)                                                            # (B, H, W, C)
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps).movedim(-1, 1)


def norm(channels: int, config: VQGANConfig) -> nn.GroupNorm:
    """Sec. 3.3 (taming): group norm; a local encoder has a norm of each position instead."""
    return (PositionNorm if config.local_encoder else nn.GroupNorm)(config.norm_groups, channels, eps=1e-6)


def conv(c_in: int, c_out: int, config: VQGANConfig) -> nn.Conv2d:
    """Sec. 3.3 (taming): a 3x3 convolution that keeps the resolution; 1x1 in a local encoder."""
    kernel = 1 if config.local_encoder else 3
    return nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2)


class ResBlock(nn.Module):
    """Sec. 3.3 (taming): two convolutions around a bypass."""

    def __init__(self, c_in: int, c_out: int, config: VQGANConfig):
        super().__init__()
        self.norm1, self.conv1 = norm(c_in, config), conv(c_in, c_out, config)
        self.norm2, self.conv2 = norm(c_out, config), conv(c_out, c_out, config)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:                                             # (B, C_in, H, W)
        y = self.conv1(F.silu(self.norm1(x)))                                           # (B, C_out, H, W)
        y = self.conv2(F.silu(self.norm2(y)))
        return y + self.nin_shortcut(x)


class AttnBlock(nn.Module):
    """Sec. 3.3 (taming): attention of one head over all positions."""

    def __init__(self, channels: int, config: VQGANConfig):
        super().__init__()
        self.norm = norm(channels, config)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:                                             # (B, C, H, W)
        y = self.norm(x)
        q, k, v = (layer(y).flatten(2).transpose(1, 2)[:, None] for layer in (self.q, self.k, self.v))  # (B, 1, HW, C)
        y = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(y)


class Resample(nn.Module):
    """Sec. 3.3 (taming): half or twice the resolution. The one-sided padding is taming's."""

    def __init__(self, channels: int, up: bool):
        super().__init__()
        self.up, stride, padding = up, 1 if up else 2, 1 if up else 0
        self.conv = nn.Conv2d(channels, channels, 3, stride, padding)

    def forward(self, x: Tensor) -> Tensor:                                             # (B, C, H, W)
        if self.up:
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))        # (B, C, 2H, 2W)
        return self.conv(F.pad(x, (0, 1, 0, 1)))                                        # (B, C, H/2, W/2)


class Level(nn.Module):
    """Sec. 3.3 (taming): the blocks at one resolution, and the way to the next."""

    def __init__(self, config: VQGANConfig, c_in: int, c_out: int, level: int, up: bool):
        super().__init__()
        side = config.resolution // 2 ** level       # it decides on attention, whatever the size of the actual input
        attention = side in config.attn_resolutions and not config.local_encoder
        last = level == (0 if up else len(config.channel_mult) - 1)
        blocks = config.num_res_blocks + up          # the decoder has one more
        self.block = nn.ModuleList(ResBlock(c_in if i == 0 else c_out, c_out, config) for i in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(c_out, config) if attention else nn.Identity() for _ in range(blocks))
        self.resample = "upsample" if up else "downsample"
        self.add_module(self.resample, nn.Identity() if last else Resample(c_out, up))

    def forward(self, x: Tensor) -> Tensor:                                             # (B, C_in, H, W)
        for block, attn in zip(self.block, self.attn):
            x = attn(block(x))                                                          # (B, C_out, H, W)
        return getattr(self, self.resample)(x)


class Middle(nn.Module):
    """Sec. 3.3 (taming): two residual blocks with attention between them, at the latent resolution."""

    def __init__(self, config: VQGANConfig, channels: int):
        super().__init__()
        attention = not (config.no_attn_mid_block or config.local_encoder)
        self.block_1 = ResBlock(channels, channels, config)
        self.attn_1 = AttnBlock(channels, config) if attention else nn.Identity()
        self.block_2 = ResBlock(channels, channels, config)

    def forward(self, x: Tensor) -> Tensor:                                             # (B, C, h, w)
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Sec. 3.3 (taming): pixels to latents. Group norm and attention let every token depend on the whole image.

    Not in the paper, both off by default. local_encoder: only the convolutions that halve the image see a
    neighbour, so that equal parts of two images become equal tokens, which a small language model learns sooner; the
    decoder sees the whole image either way. stem: the first convolution works on stem x stem pixels at once.
    """

    def __init__(self, config: VQGANConfig):
        super().__init__()
        widths, self.stem = [config.hidden_channels * m for m in config.channel_mult], config.stem
        self.conv_in = conv(config.num_channels * config.stem ** 2, config.hidden_channels, config)
        self.down = nn.ModuleList(Level(config, c_in, c_out, level, up=False) for level, (c_in, c_out)
                                  in enumerate(zip([config.hidden_channels, *widths], widths)))
        self.mid = Middle(config, widths[-1])
        self.norm_out, self.conv_out = norm(widths[-1], config), conv(widths[-1], config.z_channels, config)

    def forward(self, x: Tensor) -> Tensor:                                             # (B, 3, H, W)
        x = self.conv_in(F.pixel_unshuffle(x, self.stem))                               # (B, C, H, W), less the stem
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))                        # (B, z_channels, h, w)


class Decoder(nn.Module):
    """Sec. 3.3 (taming): latents to pixels, the encoder's mirror image with one more block a level."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        config = replace(config, local_encoder=False)
        widths, self.stem = [config.hidden_channels * m for m in config.channel_mult], config.stem
        self.conv_in = conv(config.z_channels, widths[-1], config)
        self.mid = Middle(config, widths[-1])
        self.up = nn.ModuleList(Level(config, c_in, c_out, level, up=True) for level, (c_in, c_out)
                                in enumerate(zip([*widths[1:], widths[-1]], widths)))
        self.norm_out = norm(widths[0], config)
        self.conv_out = conv(widths[0], config.num_channels * config.stem ** 2, config)

    def forward(self, x: Tensor) -> Tensor:                                             # (B, z_channels, h, w)
        x = self.mid(self.conv_in(x))                                                   # (B, C, h, w)
        for level in reversed(self.up):
            x = level(x)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(x))), self.stem)      # (B, 3, H, W)


# ----------------------------------------------------------------------------- codebook and image tokenizer

class Codebook(nn.Module):
    """Sec. 3.3: V entries of width d; a latent vector is replaced by the nearest of them."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        V = config.num_embeddings
        # from_pretrained: filling an nn.Embedding with noise on the meta device would import torch._dynamo, 2 seconds
        self.embedding = nn.Embedding.from_pretrained(torch.empty(V, config.quantized_embed_dim), freeze=False)
        nn.init.uniform_(self.embedding.weight, -1 / V, 1 / V)

    def lookup(self, tokens: Tensor) -> Tensor:                                         # (B, h, w)
        """Image tokens -> their entries."""
        return self.embedding(tokens).movedim(-1, 1)                                    # (B, d, h, w)

    @torch.no_grad()
    def nearest(self, z: Tensor, rows: int = 1024) -> Tensor:                           # (B, d, h, w)
        """argmin over e of |z - e|^2 = |z|^2 - 2 z.e + |e|^2; |z|^2 decides nothing. `rows` bounds the memory."""
        codebook = self.embedding.weight.float()                                        # (V, d)
        squares = codebook.square().sum(dim=1)                                          # (V,)
        z_flat = z.float().movedim(1, -1).flatten(0, -2)                                # (N, d)
        tokens = [torch.addmm(squares, part, codebook.T, alpha=-2).argmin(dim=1) for part in z_flat.split(rows)]
        return torch.cat(tokens).view(z.shape[0], *z.shape[2:])                         # (B, h, w)


class VQGAN(nn.Module):
    """Sec. 3.3: pixels in [0, 1] to image tokens and back."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        self.config, self.factor = config, config.factor           # pixels a token, along a side
        self.encoder, self.decoder, self.quantize = Encoder(config), Decoder(config), Codebook(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.quantized_embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.quantized_embed_dim, config.z_channels, 1)

    def latents(self, pixels: Tensor) -> Tensor:                                        # (B, 3, H, W)
        """Pixels -> what the codebook is asked for. Raises ValueError, one line, for another shape than it can take."""
        channels, factor = self.config.num_channels, self.factor
        if pixels.ndim != 4 or pixels.shape[1] != channels or any(n % factor or not n for n in pixels.shape[2:]):
            raise ValueError(f"pixels have shape {tuple(pixels.shape)}, expected (B, {channels}, H, W) "
                             f"with H and W multiples of {factor}")
        pixels = 2 * pixels - 1 if self.config.signed_pixels else pixels
        return self.quant_conv(self.encoder(pixels))                                    # (B, d, h, w)

    def decode_latents(self, z_q: Tensor) -> Tensor:                                    # (B, d, h, w)
        """Latents, of the codebook or not -> pixels."""
        pixels = self.decoder(self.post_quant_conv(z_q))                                # (B, 3, H, W)
        return (pixels + 1) / 2 if self.config.signed_pixels else pixels

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:                                         # (B, 3, H, W)
        """Pixels -> image tokens from 0 to V - 1."""
        return self.quantize.nearest(self.latents(pixels))                              # (B, h, w)

    def decode(self, tokens: Tensor) -> Tensor:                                         # (B, h, w)
        """Image tokens -> pixels as the decoder gives them: the caller clamps them to [0, 1]."""
        return self.decode_latents(self.quantize.lookup(tokens))                        # (B, 3, H, W)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:         # (B, 3, H, W)
        """-> reconstruction, z, z_q, tokens. The gradient passes the quantisation as if it were not there (the
        straight-through estimator)."""
        z = self.latents(pixels)                                                        # (B, d, h, w)
        tokens = self.quantize.nearest(z)                                               # (B, h, w)
        z_q = self.quantize.lookup(tokens)                                              # (B, d, h, w)
        return self.decode_latents(z + (z_q - z).detach()), z, z_q, tokens

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors."""
        save_folder(folder, self)

    @classmethod
    def from_pretrained(cls, folder: str | Path, device="cpu") -> "VQGAN":
        """From a folder of ours or of open-muse, from one with taming's `last.ckpt`, or from a MARS folder that keeps
        its image tokenizer in `vqgan`. float32, whatever the file holds. Raises ValueError, one line, for a bad one."""
        folder = Path(folder)
        folder = folder / "vqgan" if (folder / "vqgan").is_dir() else folder
        path, label = folder / "model.safetensors", folder / "config.json"
        with torch.device("meta"):
            vqgan = cls(VQGANConfig.from_dict(read_json(label), label))
        pickled = [folder / name for name in ("pytorch_model.bin", "last.ckpt") if (folder / name).is_file()]
        if pickled and not path.is_file():
            load_pickled(pickled[0], vqgan, device, unused="loss.")
        else:
            load_tensors(path, vqgan, device)
        return vqgan.float().eval()
