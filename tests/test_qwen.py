"""Claims about loading Qwen: the original implementations' outputs, tensor by tensor (paper Sec. 3.3)."""
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import qwen
from checkpoint import fingerprint
from files import read_json, write_json
from mars import MARS, MARSConfig
from scale import SIZES, count_parameters

GOLDEN = Path(__file__).parent / "golden"
ALL = pytest.mark.parametrize("kind", ["qwen", "qwen2", "qwen2-transformers5", "qwen3"])


def language(folder: Path) -> MARS:
    return MARS.from_qwen(folder, 0, dtype=torch.float32)


@ALL
@torch.no_grad()
def test_logits_are_those_of_the_original_implementation(kind):
    expected = load_file(GOLDEN / kind / "expected.safetensors")
    assert (language(GOLDEN / kind)(expected["tokens"]) - expected["logits"]).abs().max() < 1e-4


@ALL
@torch.no_grad()
def test_text_only_forward_of_the_grown_mars_equals_qwen_bit_for_bit(kind):
    tokens = load_file(GOLDEN / kind / "expected.safetensors")["tokens"]
    alone = language(GOLDEN / kind)
    grown = MARS.from_qwen(GOLDEN / kind, 64, dtype=torch.float32, route_output=True)
    assert torch.equal(grown(tokens)[..., :640], alone(tokens))
    assert torch.equal(grown.blocks[1].visual_ffn.gate_up.weight, alone.blocks[1].ffn.gate_up.weight)
    torch.testing.assert_close(grown.visual_embedding.weight[5], alone.text_embedding.weight.mean(0))


@ALL
def test_a_grown_qwen_saves_loads_and_trains(kind, tmp_path):
    model = MARS.from_qwen(GOLDEN / kind, 64, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    tokens = torch.randint(0, 700, (2, 9), generator=torch.Generator().manual_seed(0))
    assert torch.equal(MARS.from_pretrained(tmp_path)(tokens), model(tokens))
    model.freeze_language()
    model.loss(tokens, tokens[..., None]).backward()
    assert all((p.grad is None) != p.requires_grad for p in model.parameters())


def test_weights_can_be_loaded_in_bfloat16():
    model = MARS.from_qwen(GOLDEN / "qwen3", 64)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(torch.arange(5)[None]).dtype == torch.float32


@ALL
def test_a_single_file_loads_as_its_shards_do(kind, tmp_path):
    shutil.copy(GOLDEN / kind / "config.json", tmp_path)
    save_file(tensors_of(GOLDEN / kind), tmp_path / "model.safetensors")
    assert fingerprint(language(tmp_path)) == fingerprint(language(GOLDEN / kind))


def test_large_tensors_come_in_parts_that_fit_and_fill_them_whole(monkeypatch):
    whole = fingerprint(language(GOLDEN / "qwen3"))
    monkeypatch.setattr(qwen, "PART", 1000)                                    # 7 rows of the embedding
    assert fingerprint(language(GOLDEN / "qwen3")) == whole


# ----------------------------------------------------------------------------- the real sizes

def test_qwen_7b_has_exactly_the_published_parameters():
    _, fields = qwen.read_layout(GOLDEN / "qwen-7b")
    assert MARSConfig(**fields, image_vocab=8192) == SIZES["qwen-7b"]
    language_side, visual = count_parameters(SIZES["qwen-7b"])
    assert language_side == 7_721_324_544 and 2 * language_side == 15_442_649_088       # the index's total_size
    assert visual == 32 * (4096 * 12_288 + 12_288 + 3 * 4096 * 11_008) + 2 * 8200 * 4096 == 6_006_702_080


PUBLISHED = {                                                      # of Qwen3's config.json: width, ffn, layers, total
    "qwen3-0.6b": (1024, 3072, 28, 596_049_920), "qwen3-1.7b": (2048, 6144, 28, 1_720_574_976)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_qwen3_has_exactly_the_published_parameters(name, tmp_path):
    D, F, L, total = PUBLISHED[name]
    write_json(tmp_path / "config.json", read_json(GOLDEN / "qwen3" / "config.json") | {
        "hidden_size": D, "intermediate_size": F, "num_hidden_layers": L, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936, "max_position_embeddings": 40_960})
    _, fields = qwen.read_layout(tmp_path)
    assert MARSConfig(**fields, image_vocab=8192) == SIZES[name]
    attention = D * (16 + 2 * 8) * 128 + 16 * 128 * D + 2 * 128
    assert 151_936 * D + L * (attention + 3 * D * F + 2 * D) + D == total == count_parameters(SIZES[name])[0]


def test_every_tensor_of_the_real_index_has_its_place():
    layout, fields = qwen.read_layout(GOLDEN / "qwen-7b")
    index = read_json(GOLDEN / "qwen-7b" / "model.safetensors.index.json")["weight_map"]
    table = qwen.tensor_table(layout, fields["layers"], fields["tie_embeddings"])
    assert len(index) == 259 and set(table) == set(index)
    with torch.device("meta"):
        ours = {name for name, _ in MARS(MARSConfig(**fields)).named_parameters()}
    assert {name for name, _ in table.values()} == ours and len(table) == len(ours) + 32          # gate and up


# ----------------------------------------------------------------------------- folders for tests

def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder."""
    return {name: tensor for path in folder.glob("model*.safetensors") for name, tensor in load_file(path).items()}


def write_random(folder: Path, config: dict, shards: int) -> None:
    """A folder of bfloat16 weights, random by tensor, with the names and shapes of a published config.json."""
    write_json(folder / "config.json", config)
    layout, fields = qwen.read_layout(folder)
    with torch.device("meta"):
        ours = MARS(MARSConfig(**fields)).state_dict()
    q, kv = fields["heads"] * fields["head_width"], fields["kv_heads"] * fields["head_width"]
    rows = {"q": q, "k": kv, "v": kv, "gate": fields["ffn_width"], "up": fields["ffn_width"]}
    table = list(qwen.tensor_table(layout, fields["layers"], fields["tie_embeddings"]).items())
    generator, weight_map = random.Random(0), {}
    for i in range(shards):
        tensors = {}
        for theirs, (name, part) in table[i * len(table) // shards:(i + 1) * len(table) // shards]:
            height, *rest = ours[name].shape
            tensors[theirs] = torch.full((rows.get(part, height), *rest), generator.gauss(0, 0.02),
                                         dtype=torch.bfloat16)
        save_file(tensors, folder / f"model-{i}.safetensors")
        weight_map |= dict.fromkeys(tensors, f"model-{i}.safetensors")
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts kilobytes on Linux")
def test_loading_peaks_at_no_more_than_a_tenth_above_the_model(tmp_path):
    """In a process of its own: 0.3 GB of parameters."""
    config = read_json(GOLDEN / "qwen-7b" / "config.json") | {
        "hidden_size": 512, "num_attention_heads": 4, "intermediate_size": 2752, "num_hidden_layers": 6}
    write_random(tmp_path, config, shards=8)
    program = ("import resource, sys; from mars import MARS;"
               "peak = lambda: 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
               "before, model = peak(), MARS.from_qwen(sys.argv[1]);"
               "print(sum(p.nbytes for p in model.parameters()), peak() - before)")
    result = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=GOLDEN.parents[1],
                            capture_output=True, text=True, check=True)
    size, peak = map(int, result.stdout.split())
    assert size > 2.5e8 and peak < 1.1 * size, (size, peak)


# ----------------------------------------------------------------------------- weights that people have today

@pytest.fixture
def folder(tmp_path):
    """Copies a golden folder; then changes its config.json and tensors (None: left out)."""
    def copy(kind: str, config: dict = {}, tensors: dict = {}) -> Path:
        out = tmp_path / kind
        shutil.copytree(GOLDEN / kind, out)
        write_json(out / "config.json", {key: value for key, value in (
            read_json(out / "config.json") | config).items() if value is not ...})
        if tensors:
            found = {name: t for name, t in (tensors_of(out) | tensors).items() if t is not None}
            for path in out.glob("model*"):
                path.unlink()
            save_file(found, out / "model.safetensors")
        return out
    return copy


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_tied_embeddings_that_are_also_stored_are_left_alone(kind, folder):
    found = language(folder(kind, tensors={"lm_head.weight": torch.zeros(640, 64)}))
    assert fingerprint(found) == fingerprint(language(GOLDEN / kind))


def test_embeddings_resized_to_the_tokenizers_length_load(folder):
    rows = tensors_of(GOLDEN / "qwen3")["model.embed_tokens.weight"][:613].clone()
    model = language(folder("qwen3", {"vocab_size": 613}, {"model.embed_tokens.weight": rows}))
    assert model(torch.arange(9)[None]).shape == (1, 9, 613)


@pytest.mark.parametrize("config", [
    {"rope_theta": ..., "rope_scaling": ..., "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
     "dtype": "bfloat16", "torch_dtype": ..., "layer_types": ["full_attention"] * 2},
    {"rope_scaling": {"type": "default"}}, {"sliding_window": 4096}, {"quantization_config": None},
    {"use_sliding_window": None}], ids=str)
def test_other_ways_to_write_the_same_qwen3_are_the_same(config, folder):
    assert fingerprint(language(folder("qwen3", config))) == fingerprint(language(GOLDEN / "qwen3"))


def test_a_single_file_comes_before_the_index_of_other_weights(folder):
    path = folder("qwen3", tensors={"model.norm.weight": torch.full((64,), 0.5)})
    for old in (GOLDEN / "qwen3").glob("model*"):
        shutil.copy(old, path)
    assert language(path).norm.weight.unique().tolist() == [0.5]


def test_a_head_width_in_qwen2s_config_is_read(folder):
    assert language(folder("qwen2", {"head_dim": 16})).config == language(GOLDEN / "qwen2").config


@pytest.mark.skipif(sys.platform == "win32", reason="links need a right on Windows")
def test_the_cache_of_huggingface_hub_with_its_links_is_read(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshots" / "main").mkdir(parents=True)
    for path in (GOLDEN / "qwen2").iterdir():
        shutil.copy(path, tmp_path / "blobs" / path.name[::-1])
        (tmp_path / "snapshots" / "main" / path.name).symlink_to(Path("..", "..", "blobs", path.name[::-1]))
    assert fingerprint(language(tmp_path / "snapshots" / "main")) == fingerprint(language(GOLDEN / "qwen2"))


# ----------------------------------------------------------------------------- what is refused

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}

REFUSED = {
    "qwen3": [
        ({"rope_scaling": YARN}, "rope_scaling is {'rope_type': 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling is {'type': 'linear'"),
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn'"),
        ({"rope_scaling": {"factor": 4.0}}, "rope_scaling is {'factor': 4.0}, expected the default"),
        ({"rope_parameters": YARN | {"rope_theta": 1e6}}, "rope_parameters is {'rope_type': 'yarn'"),
        ({"rope_theta": ..., "rope_parameters": {"full_attention": {}}}, "rope_theta is 'missing'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, expected 1.0"),
        ({"use_sliding_window": True}, "use_sliding_window is True, expected False"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is ['full_attention', 'sliding"),
        ({"layer_types": 2}, "layer_types is 2"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
        ({"attention_bias": True}, "attention_bias is True, expected False"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config is {'quant_method': 'fp8'}"),
        ({"model_type": "qwen3_moe"}, "model_type is 'qwen3_moe', expected one of 'qwen', 'qwen2', 'qwen3'"),
        ({"model_type": ["qwen3"]}, "model_type is ['qwen3'], expected one of"),
        ({"rms_norm_eps": ...}, "rms_norm_eps is 'missing', expected a finite number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, expected a finite number"),
        ({"rope_theta": True}, "rope_theta is True, expected a finite number"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers is 2.0, expected a whole number"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0, expected 1 or more"),
        ({"head_dim": "16"}, "head_dim is '16', expected a whole number"),
        ({"vocab_size": None}, "vocab_size is None, expected a whole number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1, expected true or false"),
        ({"tie_word_embeddings": False}, "tensor 'lm_head.weight' is missing"),
        ({"vocab_size": 600}, "model.embed_tokens.weight is (640, 64), expected (600, 64)"),
        ({"head_dim": ...}, "self_attn.q_proj.weight is (128, 64), expected (64, 64)"),
        ({"num_hidden_layers": 3}, "tensor 'model.layers.2.input_layernorm.weight' is missing")],
    "qwen": [
        ({"no_bias": False}, "no_bias is False, expected True"),
        ({"rotary_pct": 0.5}, "rotary_pct is 0.5, expected 1.0"),
        ({"kv_channels": 32}, "transformer.h.0.attn.c_attn.bias is (192,), expected (384,)"),
        ({"rotary_emb_base": ...}, "rotary_emb_base is 'missing'"),
        ({"intermediate_size": 351}, "mlp.c_proj.weight is (64, 176), expected (64, 175)")],
}


@pytest.mark.parametrize("kind, config, message", [(kind, *case) for kind in REFUSED for case in REFUSED[kind]])
def test_a_config_that_mars_would_compute_wrong_is_refused_by_name(kind, config, message, folder, tmp_path):
    refused(folder(kind, config), message)


@pytest.mark.parametrize("tensors, message", [
    ({"model.norm.weight": None}, "tensor 'model.norm.weight' is missing"),
    ({"extra": torch.zeros(2)}, "model.safetensors: tensor 'extra' is not one that MARS knows"),
    ({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}, "self_attn.q_proj.bias' is not one that MARS knows"),
    ({"model.norm.weight": torch.zeros(3)}, "model.norm.weight is (3,), expected (64,)"),
    ({"model.norm.weight": torch.zeros(64, dtype=torch.int8)}, "model.norm.weight is torch.int8, expected float32"),
    ({"model.norm.weight": torch.zeros(64).to(torch.float8_e5m2)}, "model.norm.weight is torch.float8_e5m2, expected"),
    ({"model.norm.weight": torch.full((64,), float("inf"))}, "model.norm.weight holds NaN or infinity")])
def test_tensors_that_do_not_fit_are_refused_by_name(tensors, message, folder):
    refused(folder("qwen3", tensors=tensors), message)


def index(change):
    def apply(folder: Path) -> None:
        content = read_json(folder / "model.safetensors.index.json")
        change(content)
        write_json(folder / "model.safetensors.index.json", content)
    return apply


def leave_by(path: str):
    """The first shard is outside the folder, and the index says so."""
    def apply(folder: Path) -> None:
        first = "model-00001-of-00002.safetensors"
        shutil.move(folder / first, folder.parent / first)
        place = path.format(outside=folder.parent / first, name=first)
        index(lambda content: content["weight_map"].update({
            name: place for name, file in content["weight_map"].items() if file == first}))(folder)
        if place == first:
            (folder / first).symlink_to(folder.parent / first)
    return apply


def truncate(folder: Path) -> None:
    path = folder / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


BAD = {
    "no folder": (shutil.rmtree, "config.json: not found"),
    "no weights": (lambda f: [p.unlink() for p in f.glob("model*")], "found neither model.safetensors nor"),
    "missing shard": (lambda f: (f / "model-00002-of-00002.safetensors").unlink(), "-00002.safetensors: not found"),
    "shard is a folder": (lambda f: (f / "model-00002-of-00002.safetensors").unlink() or
                          (f / "model-00002-of-00002.safetensors").mkdir(), "-00002.safetensors: a folder"),
    "truncated shard": (truncate, "model-00001-of-00002.safetensors: not a whole safetensors file"),
    "parent": (leave_by("../{name}"), "is in '../model-00001-of-00002.safetensors', expected a file of this folder"),
    "absolute": (leave_by("{outside}"), "expected a file of this folder"),
    "link": (leave_by("{name}"), "expected a file of this folder"),
    "no text": (index(lambda c: c["weight_map"].update({"lm_head.weight": None})), "lm_head.weight is in None"),
    "no map": (index(lambda c: c.update(weight_map=[])), "weight_map is missing or no object"),
    "too much": (index(lambda c: c["weight_map"].update(more="model-00001-of-00002.safetensors")),
                 "disagree about 'more'"),
    "too little": (index(lambda c: c["weight_map"].pop("lm_head.weight")), "disagree about 'lm_head.weight'"),
}


@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.skipif(
    sys.platform == "win32" and case == "link", reason="links need a right on Windows")) for case in BAD])
def test_a_bad_folder_is_refused_in_one_line(case, folder):
    breaks, message = BAD[case]
    path = folder("qwen")
    breaks(path)
    refused(path, message)


def refused(path: Path, message: str) -> None:
    with pytest.raises(ValueError) as error:
        language(path)
    assert message in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)
