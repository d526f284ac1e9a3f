"""vqgan.py keeps its promises: it is open-muse's codec to the last code, its files are safe, its training is sound."""
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import world
from train import PRESETS
from vqgan import VQGAN, VQGANConfig, VQGANLoss, VQGANTraining

GOLDEN = Path(__file__).parent / "golden"
CONV = VQGANConfig(resolution=16, hidden_channels=32, channel_mult=(1, 1, 1), num_res_blocks=1, attn_resolutions=(4,),
                   z_channels=8, num_embeddings=32, quantized_embed_dim=4)
CELLS = VQGANConfig(resolution=16, hidden_channels=16, channel_mult=(1, 1, 1), num_res_blocks=1, attn_resolutions=(),
                    z_channels=48, num_embeddings=32, quantized_embed_dim=8, patches=True)
TRAINING = VQGANTraining(gan=0.0)
BOTH = pytest.mark.parametrize("config", [CONV, CELLS], ids=["convolutions", "cells"])


def codec(config: VQGANConfig, seed: int = 0) -> VQGAN:
    """A codec whose every weight is random, those that start at zero too, and whose codes are far apart."""
    torch.manual_seed(seed)
    vqgan = VQGAN(config)
    with torch.no_grad():
        for parameter in vqgan.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
        vqgan.quantize.embedding.weight.normal_()
    return vqgan


def pictures(n: int, side: int = 16, seed: int = 0) -> torch.Tensor:
    """Flat 4 x 4 cells of random colours."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, side // 4, side // 4, generator=generator).repeat_interleave(4, 2).repeat_interleave(4, 3)


def fit(vqgan: VQGAN, criterion: VQGANLoss, pixels, steps: int, lr: float = 2e-3) -> list[dict]:
    """The logs of a few training steps with one optimiser over both."""
    optimizer = torch.optim.AdamW([*vqgan.parameters(), *criterion.parameters()], lr=lr, weight_decay=0.0)
    history = []
    for step in range(steps):
        loss, logs = criterion(vqgan, pixels, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(logs)
    return history


# ----------------------------------------------------------------------------- open-muse's codec

def test_codes_and_pixels_are_those_of_open_muse():
    vqgan, expected = VQGAN.from_pretrained(GOLDEN / "vqgan"), load_file(GOLDEN / "vqgan" / "expected.safetensors")
    codes = vqgan.encode(expected["pixels"])
    assert codes.dtype == torch.int64 and torch.equal(codes.flatten(1), expected["codes"])
    with torch.no_grad():
        assert (vqgan.decode(codes) - expected["reconstruction"]).abs().max() < 1e-4


def test_default_config_has_exactly_the_shapes_of_vqgan_f16_8192():
    with torch.device("meta"):
        vqgan = VQGAN(VQGANConfig())
    shapes = {name: list(tensor.shape) for name, tensor in vqgan.state_dict().items()}
    assert shapes == json.loads((GOLDEN / "vqgan-f16-8192.shapes.json").read_text())
    assert vqgan.factor == 16


@BOTH
def test_pictures_need_not_be_square(config):
    vqgan = codec(config)
    codes = vqgan.encode(torch.rand(2, 3, 12, 20))
    assert codes.shape == (2, 3, 5) and vqgan.decode(codes).shape == (2, 3, 12, 20)


@BOTH
@pytest.mark.parametrize("shape", [(1, 3, 16, 18), (1, 3, 15, 16), (1, 1, 16, 16), (3, 16, 16), (1, 3, 0, 16)])
def test_a_size_that_does_not_fit_is_refused_in_one_line(config, shape):
    with pytest.raises(ValueError, match=r"^pixels have shape .*multiples of 4$"):
        codec(config).encode(torch.rand(shape))


@pytest.mark.parametrize("normalize", [False, True])
def test_nearest_code_equals_brute_force(normalize):
    vqgan = codec(replace(CONV, normalize_codes=normalize))
    z = torch.randn(3, 4, 5, 7)
    book, rows = vqgan.quantize.embedding.weight.detach(), z.permute(0, 2, 3, 1).reshape(-1, 4)
    if normalize:
        book, rows = (torch.nn.functional.normalize(x, dim=1) for x in (book, rows))
        z = rows.view(3, 5, 7, 4).permute(0, 3, 1, 2)
    brute = torch.cdist(rows, book).argmin(dim=1).view(3, 5, 7)
    assert torch.equal(vqgan.quantize.nearest(z), brute)
    assert torch.equal(vqgan.quantize.nearest(z, rows=4), brute)  # in parts of 4 rows


def test_normalized_codes_and_latents_lie_on_the_unit_sphere():
    vqgan = codec(replace(CONV, normalize_codes=True))
    _, z, z_q, _ = vqgan(pictures(2))
    assert torch.allclose(z.norm(dim=1), torch.ones(2, 4, 4)) and torch.allclose(z_q.norm(dim=1), torch.ones(2, 4, 4))


def test_gradients_pass_the_quantisation_as_if_it_were_not_there():
    vqgan = codec(CONV)
    reconstruction, z, z_q, _ = vqgan(pictures(2))
    through, = torch.autograd.grad(reconstruction.square().sum(), z, retain_graph=True)
    z_q = z_q.detach().requires_grad_()
    direct, = torch.autograd.grad(vqgan.paint(z_q).square().sum(), z_q)
    assert torch.allclose(through, direct, rtol=1e-3, atol=1e-5)


# ----------------------------------------------------------------------------- codecs of cells

def test_a_code_of_a_cell_depends_on_its_own_pixels_alone():
    pixels = torch.rand(1, 3, 16, 16)
    changed = pixels.clone()
    changed[:, :, 4:8, 8:12] = torch.rand(1, 3, 4, 4)
    for config, local in ((CELLS, True), (CONV, False)):
        vqgan = codec(config)
        moved = (vqgan.latents(pixels) - vqgan.latents(changed)).abs().amax(dim=1)[0] > 1e-5  # (h, w)
        assert moved[1, 2] and (moved.sum() == 1) == local


def test_initialise_makes_a_codec_that_loses_nothing_on_few_distinct_cells():
    palette = torch.rand(20, 3)
    pixels = palette[torch.randint(20, (30, 4, 4))].permute(0, 3, 1, 2)  # (B, 3, 4, 4)
    pixels = (pixels * 255).round() / 255
    pixels = pixels.repeat_interleave(4, 2).repeat_interleave(4, 3)  # (B, 3, 16, 16): at most 20 cells, 32 codes
    torch.manual_seed(0)
    vqgan = VQGAN(CELLS)
    vqgan.initialise(iter(pixels.split(10)))
    codes = vqgan.encode(pixels)
    assert len(codes.unique()) == len(pixels[:, :, ::4, ::4].permute(0, 2, 3, 1).reshape(-1, 3).unique(dim=0))
    with torch.no_grad():
        assert (vqgan.decode(codes) - pixels).abs().max() < 1e-3


def test_tiny_preset_tells_every_cell_of_the_rendered_world_apart_before_training():
    config, rng = PRESETS["tiny"].codec, random.Random(0)
    scenes = [world.sample_scene(rng, "any") for _ in range(120)]
    pixels = torch.from_numpy(np.stack([world.render(s) for s in scenes])).permute(0, 3, 1, 2) / 255  # (B, 3, 96, 96)
    torch.manual_seed(0)
    vqgan = VQGAN(config)
    vqgan.initialise(pixels.split(60))
    cells = torch.nn.functional.pixel_unshuffle(pixels, vqgan.factor).permute(0, 2, 3, 1).reshape(-1, config.z_channels)
    codes = vqgan.encode(pixels)
    kinds, kind = cells.unique(dim=0, return_inverse=True)
    assert len(kinds) == len(codes.unique()) == len(torch.stack([kind, codes.flatten()]).unique(dim=1).T)
    assert replace(PRESETS["nano"].codec, resolution=config.resolution) == config


def test_initialise_is_refused_for_convolutions():
    with pytest.raises(ValueError, match="^initialise.* expected patches = true"):
        codec(CONV).initialise([pictures(2)])


# ----------------------------------------------------------------------------- files

@BOTH
def test_saved_and_loaded_is_identical(config, tmp_path):
    vqgan = codec(config).eval()
    vqgan.save_pretrained(tmp_path / "mars" / "vqgan")
    assert sorted(p.name for p in (tmp_path / "mars" / "vqgan").iterdir()) == ["config.json", "model.safetensors"]
    for folder in (tmp_path / "mars", tmp_path / "mars" / "vqgan"):  # a MARS folder keeps its codec in vqgan/
        loaded = VQGAN.from_pretrained(folder)
        assert loaded.config == config and not loaded.training
        assert all(torch.equal(a, b) for a, b in zip(vqgan.state_dict().values(), loaded.state_dict().values()))
        assert torch.equal(loaded.encode(pictures(2)), vqgan.encode(pictures(2)))


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
    "not text": (break_file("config.json", lambda c: b"\xff\xfe\xfd"), r"config\.json: not JSON"),
    "word for number": (break_config(z_channels="8"), r"config\.json: .*z_channels is '8', expected a whole number"),
    "no levels": (break_config(channel_mult=[]), r"config\.json: .*channel_mult is empty"),
    "odd width": (break_config(hidden_channels=48), r"config\.json: .*48, expected a multiple of 32"),
    "cells of another size": (break_config(patches=True), r"config\.json: .*z_channels is 8, expected 48"),
    "unknown key": (break_config(use_ema=True), r"config\.json: .*use_ema = True is not supported, expected the keys"),
    "another decoder": (break_config(decoder_res_blocks=3), r"config\.json: .*decoder_res_blocks = 3 is not supported"),
    "other shape": (break_config(num_embeddings=33), r"quantize\.embedding\.weight is \(32, 4\), expected \(33, 4\)"),
    "missing tensor": (break_tensors(lambda t: t.pop("quant_conv.bias")), r"quant_conv\.bias is no such tensor, exp"),
    "extra tensor": (break_tensors(lambda t: t.update(x=torch.zeros(1))), r" x is \(1,\), expected no such tensor"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_folder_is_refused_in_one_line(case, tmp_path):
    breaks, message = BAD[case]
    codec(CONV).save_pretrained(tmp_path)
    breaks(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        VQGAN.from_pretrained(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_a_missing_folder_is_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere: not found, expected a VQGAN folder") as error:
        VQGAN.from_pretrained(tmp_path / "nowhere")
    assert "\n" not in str(error.value)


def test_a_config_of_open_muse_may_hold_keys_without_meaning():
    assert VQGANConfig.from_dict({"_class_name": "VQGANModel", "latent_size": 16, "decoder_res_blocks": None,
                                  "num_embeddings": 1024}) == VQGANConfig(num_embeddings=1024)


def test_weights_of_open_muse_and_of_taming_load_without_running_code(tmp_path):
    vqgan, pixels = codec(CONV).eval(), pictures(2)
    vqgan.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(vqgan.state_dict(), tmp_path / "pytorch_model.bin")                     # open-muse's
    assert torch.equal(VQGAN.from_pretrained(tmp_path).encode(pixels), vqgan.encode(pixels))
    (tmp_path / "pytorch_model.bin").unlink()
    rest = {"loss.logvar": torch.zeros(1)}
    torch.save({"state_dict": vqgan.state_dict() | rest, "epoch": 3}, tmp_path / "last.ckpt")     # taming's
    break_config(signed_pixels=True)(tmp_path)
    signed = VQGAN.from_pretrained(tmp_path)
    assert torch.equal(signed.encode(pixels), vqgan.encode(2 * pixels - 1))
    with torch.no_grad():
        codes = signed.encode(pixels)
        assert torch.equal(signed.decode(codes), (vqgan.decode(codes) + 1) / 2)


class Evil:
    """A pickle that would run code."""

    def __reduce__(self):
        return print, ("ran",)


def test_a_pickle_with_code_in_it_and_a_truncated_one_are_refused(tmp_path, capsys):
    vqgan = codec(CONV)
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
@pytest.mark.parametrize("training", [TRAINING, replace(TRAINING, ema=0.9)], ids=["gradient", "averages"])
def test_a_few_steps_reduce_the_loss(config, training):
    vqgan = codec(config)
    history = fit(vqgan, VQGANLoss(config, training), pictures(3), 15)
    assert history[-1]["rec"] < 0.8 * history[0]["rec"] and history[-1]["psnr"] > history[0]["psnr"]
    assert all(type(value) is float for logs in history for value in logs.values())


def test_no_codebook_takes_part_in_the_first_steps():
    vqgan = codec(CONV)
    criterion = VQGANLoss(CONV, replace(TRAINING, unquantized=2))
    before = vqgan.quantize.embedding.weight.detach().clone()
    history = fit(vqgan, criterion, pictures(8), 2)
    assert all(logs["codebook"] == 0 and "usage" not in logs for logs in history)
    assert torch.equal(vqgan.quantize.embedding.weight, before)
    latents = vqgan.latents(pictures(8)).detach().permute(0, 2, 3, 1).reshape(-1, 4)
    _, logs = criterion(vqgan, pictures(8), 2)  # now the codebook is filled with latents of this batch
    gap = torch.cdist(vqgan.quantize.embedding.weight.detach(), latents).amin(dim=1)
    assert logs["usage"] == 1.0 and gap.max() < 1e-3


def test_dead_codes_are_restarted_where_latents_are_badly_served_and_only_when_due():
    vqgan = codec(CONV)
    with torch.no_grad():
        vqgan.quantize.embedding.weight[8:] += 1e3  # no latent will ever choose these
    criterion = VQGANLoss(CONV, replace(TRAINING, restart_every=3, restart_until=6))
    weight = vqgan.quantize.embedding.weight
    for step in range(2):
        criterion(vqgan, pictures(8), step)
    assert (weight[8:] > 500).all()
    used = (criterion.usage > 0).nonzero().flatten()
    kept = weight[used].detach().clone()
    criterion(vqgan, pictures(8), 2)
    assert (weight < 500).all() and torch.equal(weight[used], kept) and criterion.usage.sum() == 0
    dead = torch.ones(32).index_fill(0, used, 0).bool()
    assert torch.equal(criterion.ema_sum[dead], weight[dead]) and (criterion.ema_count[dead] == 1).all()
    usage = criterion(vqgan, pictures(8), 3)[1]["usage"]
    assert usage > len(used) / 32
    with torch.no_grad():
        weight[8:] += 1e3
        criterion.usage.zero_()
    for step in (6, 7, 8):  # after restart_until
        criterion(vqgan, pictures(8), step)
    assert (weight[8:] > 500).all()


def test_averages_move_a_code_to_the_mean_of_its_latents_and_leave_unused_codes_alone():
    vqgan = codec(CONV)
    criterion = VQGANLoss(CONV, replace(TRAINING, ema=0.5))
    before = vqgan.quantize.embedding.weight.detach().clone()
    _, z, _, codes = vqgan(pictures(8))
    criterion(vqgan, pictures(8), 0)
    rows, codes = z.detach().permute(0, 2, 3, 1).reshape(-1, 4), codes.flatten()
    for code in range(CONV.num_embeddings):
        mean = rows[codes == code].mean(dim=0) if (codes == code).any() else before[code]
        assert torch.allclose(vqgan.quantize.embedding.weight[code], mean, atol=1e-5)


def test_evaluation_changes_nothing():
    vqgan, training = codec(CONV), replace(TRAINING, ema=0.9, restart_every=1, restart_until=9)
    criterion = VQGANLoss(CONV, training).eval()
    before = [t.clone() for t in (*vqgan.state_dict().values(), *criterion.state_dict().values())]
    criterion(vqgan, pictures(4), 0)
    assert all(map(torch.equal, before, (*vqgan.state_dict().values(), *criterion.state_dict().values())))


def test_resumed_training_is_the_same_training():
    training = VQGANTraining(ema=0.9, restart_every=2, restart_until=9, disc_start=1, disc_channels=4)

    def start():
        vqgan = codec(CONV)
        criterion = VQGANLoss(CONV, training)
        return vqgan, criterion, torch.optim.AdamW([*vqgan.parameters(), *criterion.parameters()], lr=1e-3)

    def go(vqgan, criterion, optimizer, steps):
        for step in steps:
            loss, _ = criterion(vqgan, pictures(4, seed=step, side=32), step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    whole = start()
    go(*whole, range(3))
    states, rng = [part.state_dict() for part in whole], torch.get_rng_state()
    states = torch.utils._pytree.tree_map(lambda x: x.clone() if torch.is_tensor(x) else x, states)
    go(*whole, range(3, 6))
    resumed = start()
    for part, state in zip(resumed, states):
        part.load_state_dict(state)
    torch.set_rng_state(rng)
    go(*resumed, range(3, 6))
    for a, b in zip(whole[:2], resumed[:2]):
        assert all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))


def gan(disc_start: int):
    """A codec, its criterion with a small discriminator, and pictures large enough for it."""
    vqgan = codec(CONV)
    return vqgan, VQGANLoss(CONV, VQGANTraining(disc_start=disc_start, disc_channels=4)), pictures(4, side=32)


def test_the_gan_costs_nothing_before_its_start():
    vqgan, criterion, pixels = gan(disc_start=1)
    criterion.discriminator.forward = None  # calling it would fail
    loss, logs = criterion(vqgan, pixels, 0)
    loss.backward()
    assert "discriminator" not in logs and all(p.grad is None for p in criterion.parameters())


def test_each_gan_term_moves_only_its_own_side():
    vqgan, criterion, pixels = gan(disc_start=0)
    reconstruction = vqgan(pixels)[0].detach()
    loss, logs = criterion(vqgan, pixels, 0)
    loss.backward()
    got = [p.grad.clone() for p in criterion.parameters()]
    d_loss = (torch.relu(1 - criterion.discriminator(pixels)).mean()
              + torch.relu(1 + criterion.discriminator(reconstruction)).mean()) / 2
    wanted = torch.autograd.grad(d_loss, list(criterion.parameters()))
    assert logs["discriminator"] == pytest.approx(d_loss.item(), rel=1e-4)
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in zip(got, wanted))
    grads = [p.grad.clone() for p in vqgan.parameters()]
    for parameter in vqgan.parameters():
        parameter.grad = None
    reconstruction = vqgan(pixels)[0]
    _, z, z_q, _ = vqgan(pixels)
    mse = torch.nn.functional.mse_loss
    (reconstruction - pixels).abs().mean().add(0.25 * mse(z, z_q.detach()) + mse(z_q, z.detach())).backward()
    plain = [p.grad for p in vqgan.parameters()]
    assert any(not torch.allclose(a, b, rtol=1e-2) for a, b in zip(grads, plain))  # the generator's term did reach it


def test_the_generators_term_weighs_as_much_as_the_reconstruction_at_the_last_layer():
    vqgan, criterion, pixels = gan(disc_start=0)
    last = vqgan.decoder.conv_out.weight
    reconstruction = vqgan(pixels)[0]
    rec_loss = (reconstruction - pixels).abs().mean()
    loss, logs = criterion.gan(pixels, reconstruction, rec_loss, last)
    norms = [torch.autograd.grad(term, last, retain_graph=True)[0].norm() for term in (loss, rec_loss)]
    assert norms[0] / norms[1] == pytest.approx(0.8, rel=0.05)  # the setting `gan`


def test_foreground_weight_prefers_what_differs_from_the_median_colour():
    pixels = torch.full((1, 3, 16, 16), 0.5)
    pixels[:, :, 4:8, 4:8], pixels[:, :, 8:12, 8:12] = 0.1, 1.0
    weight = VQGANLoss(CONV, replace(TRAINING, foreground=4.0)).foreground_weight(pixels)
    assert weight.mean() == pytest.approx(1.0) and weight[0, 0, 5, 5] / weight[0, 0, 0, 0] == pytest.approx(1 + 4 * 0.4)
    assert torch.equal(VQGANLoss(CONV, TRAINING).foreground_weight(pixels), torch.ones(1, 1, 16, 16))


def test_every_training_setting_changes_the_training():
    base = VQGANTraining(gan=0.0, ema=0.9, restart_every=2, restart_until=2)
    changes = dict(l1=0.5, l2=1.0, codebook=0.5, gan=0.5, foreground=2.0, unquantized=1, ema=0.5, restart_every=1,
                   restart_until=0)

    def result(training):
        torch.manual_seed(0)
        vqgan, criterion = codec(CONV), VQGANLoss(CONV, replace(training, disc_channels=4, disc_start=0))
        torch.manual_seed(1)
        fit(vqgan, criterion, pictures(2, side=32), 3)
        return torch.cat([p.detach().flatten() for p in vqgan.parameters()])

    plain = result(base)
    assert torch.equal(plain, result(base))  # and the same settings give the same training
    assert [name for name, value in changes.items() if torch.equal(plain, result(replace(base, **{name: value})))] == []
