"""vqgan.py keeps its promises: it is open-muse's VQGAN to the last token, its files are safe, its training is sound."""
import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from vqgan import VQGAN, VQGANConfig
from vqgan_loss import VQGANLoss, VQGANLossConfig

GOLDEN = Path(__file__).parent / "golden"
SMALL = VQGANConfig(resolution=16, hidden_channels=32, channel_mult=(1, 1, 1), num_res_blocks=1, attn_resolutions=(4,),
                    z_channels=8, num_embeddings=32, quantized_embed_dim=4)
LOCAL = replace(SMALL, channel_mult=(1, 1), stem=2, local_encoder=True, norm_groups=8)         # of factor 4 as well
NO_GAN = VQGANLossConfig(gan=0.0)
BOTH = pytest.mark.parametrize("config", [SMALL, LOCAL], ids=["default", "local"])


def make(config: VQGANConfig = SMALL) -> VQGAN:
    """An image tokenizer whose every weight is random, those that start at zero too, with entries far apart."""
    torch.manual_seed(0)
    vqgan = VQGAN(config)
    with torch.no_grad():
        for parameter in vqgan.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
        vqgan.quantize.embedding.weight.normal_()
    return vqgan


def images(n: int, side: int = 16, seed: int = 0) -> torch.Tensor:
    """Flat 4 x 4 squares of random colours."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, side // 4, side // 4, generator=generator).repeat_interleave(4, 2).repeat_interleave(4, 3)


def steps(criterion: VQGANLoss, optimizer, batches) -> list[dict]:
    """The logs of a training step on each batch."""
    history = []
    for pixels in batches:
        loss = criterion(pixels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(criterion.logs)
    return history


def fit(criterion: VQGANLoss, batches) -> list[dict]:
    """The logs of training steps with a fresh optimiser."""
    return steps(criterion, torch.optim.AdamW(criterion.parameters(), lr=2e-3, weight_decay=0.0), batches)


# ----------------------------------------------------------------------------- open-muse's VQGAN

def test_tokens_and_pixels_are_those_of_open_muse():
    vqgan, expected = VQGAN.from_pretrained(GOLDEN / "vqgan"), load_file(GOLDEN / "vqgan" / "expected.safetensors")
    tokens = vqgan.encode(expected["pixels"])
    assert tokens.dtype == torch.int64 and torch.equal(tokens.flatten(1), expected["codes"])
    with torch.no_grad():
        assert (vqgan.decode(tokens) - expected["reconstruction"]).abs().max() < 1e-4


def test_default_config_has_exactly_the_shapes_of_vqgan_f16_8192():
    with torch.device("meta"):
        vqgan = VQGAN(VQGANConfig())
    shapes = {name: list(tensor.shape) for name, tensor in vqgan.state_dict().items()}
    assert shapes == json.loads((GOLDEN / "vqgan-f16-8192.shapes.json").read_text())
    assert vqgan.factor == 16


@BOTH
def test_images_need_not_be_square_and_a_stem_keeps_the_factor(config):
    vqgan = make(config)
    tokens = vqgan.encode(torch.rand(2, 3, 12, 20))
    assert vqgan.factor == 4 and tokens.shape == (2, 3, 5) and vqgan.decode(tokens).shape == (2, 3, 12, 20)


@BOTH
@pytest.mark.parametrize("shape", [(1, 3, 16, 18), (1, 3, 15, 16), (1, 1, 16, 16), (3, 16, 16), (1, 3, 0, 16)])
def test_a_size_that_does_not_fit_is_refused_in_one_line(config, shape):
    with pytest.raises(ValueError, match=r"^pixels have shape .*multiples of 4$"):
        make(config).encode(torch.rand(shape))


def test_nearest_entry_equals_brute_force():
    vqgan, z = make(), torch.randn(3, 4, 5, 7)
    rows = z.permute(0, 2, 3, 1).reshape(-1, 4)
    brute = torch.cdist(rows, vqgan.quantize.embedding.weight.detach()).argmin(dim=1).view(3, 5, 7)
    assert torch.equal(vqgan.quantize.nearest(z), brute)
    assert torch.equal(vqgan.quantize.nearest(z, rows=4), brute)                        # in parts of 4 rows


def test_gradients_pass_the_quantisation_as_if_it_were_not_there():
    vqgan = make()
    reconstruction, z, z_q, _ = vqgan(images(2))
    through, = torch.autograd.grad(reconstruction.square().sum(), z, retain_graph=True)
    z_q = z_q.detach().requires_grad_()
    direct, = torch.autograd.grad(vqgan.decode_latents(z_q).square().sum(), z_q)
    assert torch.allclose(through, direct, rtol=1e-3, atol=1e-5)


def test_a_local_encoder_sees_a_few_pixels_a_token_and_the_default_encoder_the_whole_image():
    pixels = images(1, side=32)
    for config, is_local in ((LOCAL, True), (replace(SMALL, resolution=32), False)):
        vqgan = make(config)
        changed = pixels.clone()
        changed[:, :, 16:20, 12:16] = torch.rand(1, 3, 4, 4)                            # the pixels of token (4, 3)
        moved = (vqgan.latents(pixels) - vqgan.latents(changed)).abs().amax(dim=1)[0] > 1e-6
        assert moved[4, 3]
        if is_local:                                              # only tokens whose windows reach into these pixels
            assert moved.sum() <= 4 and not moved[5:].any() and not moved[:, 4:].any() and not moved[:3].any()
            tokens = [vqgan.encode(x) for x in (pixels, changed)]
            assert torch.equal(tokens[0][0, 5:], tokens[1][0, 5:])
        else:
            assert moved.all()


def test_in_a_local_encoder_equal_parts_of_two_images_become_equal_tokens():
    vqgan, (a, b) = make(LOCAL), images(2, side=32).split(1)
    b[:, :, 8:24, 8:24] = a[:, :, :16, :16]
    assert torch.equal(vqgan.encode(a)[0, :3, :3], vqgan.encode(b)[0, 2:5, 2:5])


# ----------------------------------------------------------------------------- files

@BOTH
def test_saved_and_loaded_is_identical(config, tmp_path):
    vqgan = make(config).eval()
    vqgan.save_pretrained(tmp_path / "mars" / "vqgan")
    assert sorted(p.name for p in (tmp_path / "mars" / "vqgan").iterdir()) == ["config.json", "model.safetensors"]
    for folder in (tmp_path / "mars", tmp_path / "mars" / "vqgan"):      # MARS's folder has it in vqgan/
        loaded = VQGAN.from_pretrained(folder)
        assert loaded.config == config and not loaded.training
        assert all(torch.equal(a, b) for a, b in zip(vqgan.state_dict().values(), loaded.state_dict().values()))
        assert torch.equal(loaded.encode(images(2)), vqgan.encode(images(2)))


def break_file(name, change):
    """A way to break a saved folder: change the bytes of one file, or remove it (None)."""
    def apply(folder):
        content = change((folder / name).read_bytes())
        (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    return apply


def break_config(**values):
    """A way to break a saved folder: change the configuration."""
    return break_file("config.json", lambda content: json.dumps(json.loads(content) | values).encode())


def break_tensors(change):
    """A way to break a saved folder: change the dictionary of tensors."""
    def apply(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
    return apply


BAD = {
    "missing config": (break_file("config.json", lambda c: None), r"config\.json: not found, expected"),
    "missing weights": (break_file("model.safetensors", lambda c: None), r"model\.safetensors: not found, expected"),
    "truncated": (break_file("model.safetensors", lambda c: c[:-100]), r"model\.safetensors: not a whole safetensors"),
    "empty": (break_file("model.safetensors", lambda c: b""), r"model\.safetensors: not a whole safetensors"),
    "not JSON": (break_file("config.json", lambda c: c[:-5]), r"config\.json: not JSON"),
    "not an object": (break_file("config.json", lambda c: b"[1]"), r"config\.json: expected a JSON object"),
    "not text": (break_file("config.json", lambda c: b"\xff\xfe\xfd"), r"config\.json: not UTF-8"),
    "word for number": (break_config(z_channels="8"), r"config\.json: .*z_channels is '8', expected a whole number"),
    "true for number": (break_config(z_channels=True), r"z_channels is True, expected a whole number"),
    "no levels": (break_config(channel_mult=[]), r"channel_mult is \(\), expected one to eight levels"),
    "odd width": (break_config(hidden_channels=48), r"hidden_channels is 48, expected a multiple of the 32"),
    "huge": (break_config(num_embeddings=10**9), r"num_embeddings is 1000000000, expected 1 to"),
    "NaN": (break_config(commitment_cost=float("nan")), r"commitment_cost is nan, expected a finite number"),
    "unknown key": (break_config(use_ema=True), r"config\.json: .*use_ema = True is not supported, expected the keys"),
    "another decoder": (break_config(decoder_res_blocks=3), r"decoder_res_blocks = 3 is not supported"),
    "another resampling": (break_config(resample_with_conv=False), r"resample_with_conv = False is not supported"),
    "other shape": (break_config(num_embeddings=33), r"quantize\.embedding\.weight is \(32, 4\), expected \(33, 4\)"),
    "missing tensor": (break_tensors(lambda t: t.pop("quant_conv.bias")), r"quant_conv\.bias is no such tensor, exp"),
    "extra tensor": (break_tensors(lambda t: t.update(x=torch.zeros(1))), r" x is \(1,\), expected no such tensor"),
    "NaN weights": (break_tensors(lambda t: t["quant_conv.bias"].fill_(torch.nan)), r"quant_conv\.bias holds NaN"),
    "whole numbers": (break_tensors(lambda t: t.update({"quant_conv.bias": torch.ones(4).int()})), r"is torch\.int32"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_folder_is_refused_in_one_line(case, tmp_path):
    breaks, message = BAD[case]
    make().save_pretrained(tmp_path)
    breaks(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        VQGAN.from_pretrained(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_a_config_of_open_muse_may_hold_keys_that_change_nothing():
    assert VQGANConfig.from_dict({"_class_name": "VQGANModel", "latent_size": 16, "decoder_res_blocks": None,
                                  "dropout": 0.0, "resample_with_conv": True, "num_embeddings": 1024}) \
        == VQGANConfig(num_embeddings=1024)


class Callback:
    """An object of a class that no reader has, as Lightning keeps them in a checkpoint."""

    def __init__(self):
        self.monitor = "val/rec_loss"


def test_weights_of_open_muse_and_of_taming_load_without_running_code(tmp_path):
    vqgan, pixels = make().eval(), images(2)
    vqgan.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(vqgan.state_dict(), tmp_path / "pytorch_model.bin")                      # open-muse's
    assert torch.equal(VQGAN.from_pretrained(tmp_path).encode(pixels), vqgan.encode(pixels))
    (tmp_path / "pytorch_model.bin").unlink()
    content = {"state_dict": vqgan.state_dict() | {"loss.logvar": torch.zeros(1)}, "epoch": 3,
               "hyper_parameters": {"ddconfig": {"ch": 32}, "path": tmp_path}, "callbacks": {Callback: Callback()}}
    torch.save(content, tmp_path / "last.ckpt")                                         # Lightning's, of taming
    break_config(signed_pixels=True)(tmp_path)
    signed = VQGAN.from_pretrained(tmp_path)
    tokens = signed.encode(pixels)
    assert torch.equal(tokens, vqgan.encode(2 * pixels - 1))
    with torch.no_grad():
        assert torch.equal(signed.decode(tokens), (vqgan.decode(tokens) + 1) / 2)


class Evil:
    """A pickle that would run code."""

    def __reduce__(self):
        return print, ("ran",)


def test_a_pickle_with_code_in_it_and_a_cut_one_are_refused(tmp_path, capsys):
    vqgan = make()
    vqgan.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    path = tmp_path / "pytorch_model.bin"
    torch.save(vqgan.state_dict(), path)
    whole = path.read_bytes()
    torch.save(vqgan.state_dict() | {"evil": Evil()}, path)
    for content in (path.read_bytes(), whole[:len(whole) // 2], b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="pytorch_model.bin: not a whole file of tensors alone") as error:
            VQGAN.from_pretrained(tmp_path)
        assert "\n" not in str(error.value)
    assert "ran" not in capsys.readouterr().out


# ----------------------------------------------------------------------------- training

@BOTH
@pytest.mark.parametrize("settings", [NO_GAN, replace(NO_GAN, ema=0.9)], ids=["gradient", "averages"])
def test_a_few_steps_reduce_the_loss(config, settings):
    criterion = VQGANLoss(make(config), settings)
    history = fit(criterion, [images(3)] * 15)
    assert history[-1]["rec"] < 0.8 * history[0]["rec"] and history[-1]["psnr"] > history[0]["psnr"]
    assert all(type(value) is float for logs in history for value in logs.values()) and criterion.step == 15


def test_no_codebook_takes_part_in_the_warm_up_and_it_is_then_filled_from_a_batch():
    vqgan = make()
    criterion = VQGANLoss(vqgan, replace(NO_GAN, warm_up=2))
    before = vqgan.quantize.embedding.weight.detach().clone()
    history = fit(criterion, [images(8)] * 2)
    assert all(logs["codebook"] == 0 and "usage" not in logs for logs in history)
    assert torch.equal(vqgan.quantize.embedding.weight, before)
    latents = vqgan.latents(images(8)).detach().permute(0, 2, 3, 1).reshape(-1, 4)
    criterion(images(8))
    gap = torch.cdist(vqgan.quantize.embedding.weight.detach(), latents).amin(dim=1)
    assert criterion.logs["usage"] == 1.0 and gap.max() < 1e-3


def test_unused_entries_are_restarted_where_latents_are_badly_served_and_only_when_due():
    vqgan = make()
    weight = vqgan.quantize.embedding.weight
    with torch.no_grad():
        weight[8:] += 1e3                                         # no latent will ever choose these
    criterion = VQGANLoss(vqgan, replace(NO_GAN, restart_every=3))
    for _ in range(2):
        criterion(images(8))
    assert (weight[8:] > 500).all()
    used = (criterion.usage > 0).nonzero().flatten()
    kept = weight[used].detach().clone()
    criterion(images(8))
    assert (weight < 500).all() and torch.equal(weight[used], kept) and criterion.usage.sum() == 0
    dead = torch.ones(32).index_fill(0, used, 0).bool()
    assert torch.equal(criterion.ema_sum[dead], weight[dead]) and (criterion.ema_count[dead] == 1).all()
    criterion(images(8))
    assert criterion.logs["usage"] > len(used) / 32


def test_averages_move_an_entry_to_the_mean_of_its_latents_and_leave_unused_entries_alone():
    vqgan = make()
    before = vqgan.quantize.embedding.weight.detach().clone()
    _, z, _, tokens = vqgan(images(8))
    VQGANLoss(vqgan, replace(NO_GAN, ema=0.5))(images(8))
    rows, tokens = z.detach().permute(0, 2, 3, 1).reshape(-1, 4), tokens.flatten()
    for entry in range(32):
        mean = rows[tokens == entry].mean(dim=0) if (tokens == entry).any() else before[entry]
        assert torch.allclose(vqgan.quantize.embedding.weight[entry], mean, atol=1e-5)


def test_resumed_training_is_the_same_training():
    settings = VQGANLossConfig(ema=0.9, restart_every=2, gan_start=2, disc_channels=4, warm_up=1)
    batches = [images(4, side=32, seed=seed) for seed in range(6)]

    def start():
        criterion = VQGANLoss(make(), settings)
        return criterion, torch.optim.AdamW(criterion.parameters(), lr=1e-3)

    whole, resumed = start(), start()
    steps(*whole, batches[:3])
    states, rng = [copy.deepcopy(part.state_dict()) for part in whole], torch.get_rng_state()
    steps(*whole, batches[3:])
    for part, state in zip(resumed, states):
        part.load_state_dict(state)
    torch.set_rng_state(rng)
    steps(*resumed, batches[3:])
    assert all(map(torch.equal, whole[0].state_dict().values(), resumed[0].state_dict().values()))


def with_gan(gan_start: int) -> tuple[VQGANLoss, torch.Tensor]:
    """A loss with a small discriminator, and images large enough for it."""
    return VQGANLoss(make(), VQGANLossConfig(gan_start=gan_start, disc_channels=4)), images(4, side=32)


def test_the_gan_costs_nothing_before_its_start_and_then_begins():
    criterion, pixels = with_gan(gan_start=1)
    forward, criterion.discriminator.forward = criterion.discriminator.forward, None    # calling it would fail
    criterion(pixels).backward()
    assert "discriminator" not in criterion.logs and all(p.grad is None for p in criterion.discriminator.parameters())
    criterion.discriminator.forward = forward
    criterion(pixels).backward()
    assert "discriminator" in criterion.logs and all(p.grad is not None for p in criterion.discriminator.parameters())


def test_each_term_of_the_gan_moves_only_its_own_side():
    criterion, pixels = with_gan(gan_start=0)
    vqgan, discriminator = criterion.vqgan, criterion.discriminator
    reconstruction = vqgan(pixels)[0].detach()
    criterion(pixels).backward()
    d_loss = (F.relu(1 - discriminator(pixels)).mean() + F.relu(1 + discriminator(reconstruction)).mean()) / 2
    wanted = torch.autograd.grad(d_loss, list(discriminator.parameters()))
    assert criterion.logs["discriminator"] == pytest.approx(d_loss.item(), rel=1e-4)
    assert all(torch.allclose(p.grad, b, rtol=1e-3, atol=1e-6) for p, b in zip(discriminator.parameters(), wanted))
    got = [p.grad.clone() for p in vqgan.parameters()]
    reconstruction, z, z_q, _ = vqgan(pixels)
    plain_loss = F.l1_loss(reconstruction, pixels) + 0.25 * F.mse_loss(z, z_q.detach()) + F.mse_loss(z_q, z.detach())
    plain = torch.autograd.grad(plain_loss, list(vqgan.parameters()))
    assert any(not torch.allclose(a, b, rtol=1e-2) for a, b in zip(got, plain))  # the generator's term reached it


def test_the_generators_term_weighs_as_much_as_the_reconstruction_at_the_last_layer():
    criterion, pixels = with_gan(gan_start=0)
    last, reconstruction = criterion.vqgan.decoder.conv_out.weight, criterion.vqgan(pixels)[0]
    rec_loss = F.l1_loss(reconstruction, pixels)
    norms = [torch.autograd.grad(term, last, retain_graph=True)[0].norm()
             for term in (criterion.gan(pixels, reconstruction, rec_loss), rec_loss)]
    assert norms[0] / norms[1] == pytest.approx(0.8, rel=0.05)                          # the setting `gan`


def test_every_setting_of_the_loss_changes_the_training():
    base = VQGANLossConfig(gan=0.4, gan_start=0, disc_channels=4, ema=0.9, restart_every=2)
    changes = dict(gan=0.5, gan_start=2, disc_channels=8, warm_up=1, ema=0.5, restart_every=1)

    def result(settings):
        criterion = VQGANLoss(make(), settings)
        torch.manual_seed(1)
        fit(criterion, [images(2, side=32)] * 3)
        return torch.cat([p.detach().flatten() for p in criterion.vqgan.parameters()])

    plain = result(base)
    assert torch.equal(plain, result(base))                       # and the same settings give the same training
    assert [name for name, value in changes.items() if torch.equal(plain, result(replace(base, **{name: value})))] == []
