"""Claims about loading Qwen: the original implementations' outputs, tensor by tensor and id by id."""
import base64
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mars
import qwen
from mars import MARS, PRESETS, MARSConfig, count_parameters, forecast
from tokenizer import QwenTokenizer, load_tokenizer

GOLDEN = Path(__file__).parent / "golden"
BOTH = pytest.mark.parametrize("kind", ["qwen", "qwen2"])


@BOTH
@torch.no_grad()
def test_logits_are_those_of_the_original_implementation(kind):
    expected = load_file(GOLDEN / kind / "expected.safetensors")
    model = MARS.from_qwen(GOLDEN / kind, codes=0, dtype=torch.float32)
    assert (model(expected["tokens"]) - expected["logits"]).abs().max() < 1e-4


@BOTH
@torch.no_grad()
def test_text_only_forward_of_the_grown_mars_equals_qwen_bit_for_bit(kind):
    tokens = load_file(GOLDEN / kind / "expected.safetensors")["tokens"]
    alone = MARS.from_qwen(GOLDEN / kind, codes=0, dtype=torch.float32)
    grown = MARS.from_qwen(GOLDEN / kind, codes=64, dtype=torch.float32, route_output=True)
    assert torch.equal(grown(tokens)[..., :640], alone(tokens))
    assert torch.equal(grown.blocks[1].visual_ffn.up.weight, alone.blocks[1].ffn.up.weight)
    torch.testing.assert_close(grown.visual_embedding.weight[5], alone.text_embedding.weight.mean(0))


@BOTH
@torch.no_grad()
def test_a_grown_qwen_saves_loads_trains_and_draws(kind, tmp_path):
    model = MARS.from_qwen(GOLDEN / kind, codes=64, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    tokens = torch.randint(0, 700, (2, 9), generator=torch.Generator().manual_seed(0))
    assert torch.equal(MARS.from_pretrained(tmp_path)(tokens), model(tokens))
    model.freeze_language()
    with torch.enable_grad():
        model.loss(tokens, torch.ones_like(tokens).bool()).backward()
    assert all((p.grad is None) != p.requires_grad for p in model.parameters())


def test_weights_can_be_loaded_in_bfloat16():
    model = MARS.from_qwen(GOLDEN / "qwen2", codes=64)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(torch.arange(5)[None]).dtype == torch.float32


def test_a_single_file_loads_as_its_shards_do(tmp_path):
    tensors = {name: tensor for path in (GOLDEN / "qwen2").glob("model-*.safetensors")
               for name, tensor in load_file(path).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(GOLDEN / "qwen2" / "config.json", tmp_path)
    tokens = torch.arange(9)[None]
    single = MARS.from_qwen(tmp_path, codes=0, dtype=torch.float32)
    assert torch.equal(single(tokens), MARS.from_qwen(GOLDEN / "qwen2", codes=0, dtype=torch.float32)(tokens))


# ----------------------------------------------------------------------------- the real sizes

def test_the_real_config_has_exactly_the_published_parameters():
    _, fields = qwen.read_layout(GOLDEN / "qwen-7b")
    config = MARSConfig(**fields, codes=8192)
    assert config == PRESETS["qwen-7b"]
    language, visual = count_parameters(config)
    assert language == 7_721_324_544 and 2 * language == 15_442_649_088            # the index's total_size
    assert visual == 32 * (4096 * 12_288 + 12_288 + 3 * 4096 * 11_008) + 2 * 8200 * 4096 == 6_006_702_080


def test_every_tensor_of_the_real_index_has_its_place():
    layout, fields = qwen.read_layout(GOLDEN / "qwen-7b")
    index = json.loads((GOLDEN / "qwen-7b" / "model.safetensors.index.json").read_text())["weight_map"]
    table = qwen.tensor_table(layout, fields["layers"], fields["tie_embeddings"])
    assert len(index) == 259 and set(table) == set(index)
    with torch.device("meta"):
        ours = {name for name, _ in MARS(MARSConfig(**fields)).named_parameters()}
    assert {name for name, _ in table.values()} == ours and len(table) == len(ours)


def test_forecast_agrees_with_the_known_figures():
    """120 GB, 17 (--shard), 51 and 15 (ZeRO) a GPU with W_O routed, 6.54 billion trainable; 13.5 GB of logits."""
    config = MARSConfig(**{**vars(PRESETS["qwen-7b"]), "route_output": True})
    assert [round(size / 1e9, 1) for size in forecast(config).values()] == [120.1, 16.9, 51.4, 15.0, 13.5, 1.1]
    assert count_parameters(config)[1] == 6_543_572_992
    assert count_parameters(PRESETS["qwen-7b"])[1] == 6_006_702_080


@BOTH
def test_a_written_random_folder_loads_and_the_command_says_what_it_cost(kind, tmp_path, capsys):
    qwen.main([str(GOLDEN / kind / "config.json"), str(tmp_path / "random"), "--layers", "2", "--shards", "3"])
    mars.main(["--from-qwen", str(tmp_path / "random"), "--codes", "64", "--out", str(tmp_path / "mars")])
    printed = capsys.readouterr().out
    assert "language side" in printed and "GB at the peak" in printed
    assert MARS.from_pretrained(tmp_path / "mars").config.layers == 2


def test_loading_peaks_at_no_more_than_a_tenth_above_the_model(tmp_path):
    """In a process of its own, beside one that only imports the same modules: 0.3 GB of parameters."""
    config = json.loads((GOLDEN / "qwen-7b" / "config.json").read_text())
    config |= {"hidden_size": 512, "num_attention_heads": 4, "intermediate_size": 2752, "num_hidden_layers": 6}
    qwen.write_random(tmp_path / "qwen", config, shards=8, seed=0)
    program = ("import resource, sys, torch; from pathlib import Path; from mars import MARS;"
               "model = MARS.from_qwen(Path(sys.argv[1])) if len(sys.argv) > 1 else None;"
               "size = sum(p.nbytes for p in model.parameters()) if model else 0;"
               "print(size, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)")
    run = lambda *arguments: [int(n) for n in subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=GOLDEN.parents[1], capture_output=True, text=True,
        check=True).stdout.split()]
    (_, base), (size, peak) = run(), run(str(tmp_path / "qwen"))
    assert size > 2.5e8 and peak - base < 1.1 * size, (size, peak - base)


# ----------------------------------------------------------------------------- bad folders

def bad_config(**change):
    def apply(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({k: v for k, v in (config | change).items() if v is not ...}))
    return apply


def bad_shard(change):
    def apply(folder):
        path = folder / "model-00002-of-00002.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        index["weight_map"] = {n: f for n, f in index["weight_map"].items() if f != path.name or n in tensors}
        index["weight_map"] |= {name: path.name for name in tensors}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return apply


def truncated(folder):
    path = folder / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


BAD = {
    "missing shard": (lambda f: (f / "model-00002-of-00002.safetensors").unlink(), "no such shard"),
    "truncated shard": (truncated, "model-00001-of-00002.safetensors: not a whole safetensors file"),
    "missing tensor": (bad_shard(lambda t: t.pop("transformer.ln_f.weight")), "'transformer.ln_f.weight' is missing"),
    "unexpected tensor": (bad_shard(lambda t: t.update(extra=torch.zeros(2))), "'extra' is not one that MARS knows"),
    "other shape": (bad_shard(lambda t: t.update({"transformer.ln_f.weight": torch.zeros(3)})),
                    "transformer.ln_f.weight is (3,), expected (64,)"),
    "no weights": (lambda f: [p.unlink() for p in f.glob("model*")], "found neither model.safetensors nor"),
    "field missing": (bad_config(rotary_emb_base=...), "field 'rotary_emb_base' is missing"),
    "unknown type": (bad_config(model_type="llama"), "model_type is 'llama', expected one of 'qwen', 'qwen2'"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: not found"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_folder_is_refused_in_one_line(case, tmp_path):
    breaks, message = BAD[case]
    shutil.copytree(GOLDEN / "qwen", tmp_path / "qwen")
    breaks(tmp_path / "qwen")
    with pytest.raises(ValueError) as error:
        MARS.from_qwen(tmp_path / "qwen")
    assert message in str(error.value) and str(tmp_path) in str(error.value) and "\n" not in str(error.value)


# ----------------------------------------------------------------------------- the tokenizer

def qwen_folders():
    """The real ranks where they are at hand, and everywhere a trimmed file: those that occur in the golden texts."""
    places = [Path(os.environ.get("QWEN_DIR", ".")), GOLDEN.parents[2] / "shared" / "qwen-7b"]
    found = [place for place in places if (place / "qwen.tiktoken").is_file()][:1]
    skip = pytest.mark.skip("set QWEN_DIR to a folder with qwen.tiktoken")
    return [GOLDEN / "qwen-7b-trimmed", *(found or [pytest.param(None, marks=skip)])]


@pytest.mark.parametrize("folder", qwen_folders(), ids=["trimmed", "real"])
def test_real_ranks_give_the_published_ids(folder):
    pytest.importorskip("tiktoken")
    tokenizer = QwenTokenizer.from_pretrained(folder)
    for case in json.loads((GOLDEN / "qwen_tokenizer.json").read_text()):
        assert tokenizer.encode(case["text"], special=True) == case["ids"], case["text"]
    assert tokenizer.eos == 151_643 and len(tokenizer) == 151_851


@pytest.fixture
def small(tmp_path) -> Path:
    """All 256 bytes and a few merges, in both families' files."""
    pytest.importorskip("tiktoken")
    merges = [b"re", b"red", "红".encode()[:2], "红".encode(), "色".encode()[:2], "色".encode(), "红色".encode()]
    ranks = [bytes([i]) for i in range(256)] + merges
    lines = (base64.b64encode(token) + b" %d" % i for i, token in enumerate(ranks))
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "qwen.tiktoken").write_bytes(b"\n".join(lines))
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    letter = {i: chr(i) if i in printable else chr(next(others)) for i in range(256)}
    (tmp_path / "two").mkdir()
    vocabulary = {"".join(letter[byte] for byte in token): i for i, token in enumerate(ranks)}
    (tmp_path / "two" / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "two" / "merges.txt").write_text("#version: 0.2\n")
    return tmp_path


def test_both_file_formats_give_the_same_ids_and_every_text_comes_back(small):
    one, two = (QwenTokenizer.from_pretrained(small / name) for name in ("one", "two"))
    for text in ("red 红色", "naïve 🐈\n", "", "<|endoftext|>"):
        assert one.encode(text) == two.encode(text) and one.decode(one.encode(text)) == text
    two.save_pretrained(small / "copy")
    assert load_tokenizer(small / "copy").encode("red 红色") == one.encode("red 红色")
    assert one.encode("red") == [257] and one.encode("红色") == [262]
    assert one.encode("e\u0301") == one.encode("\u00e9")                            # NFC


def test_control_tokens_are_read_only_where_asked_for_and_half_a_character_decodes(small):
    tokenizer = QwenTokenizer.from_pretrained(small / "one")
    for text in ("<|endoftext|>", "<|im_start|>", "<img>"):
        assert max(tokenizer.encode(text)) < tokenizer.eos
    assert tokenizer.encode("<|endoftext|>", special=True) == [tokenizer.eos]
    assert tokenizer.decode([*tokenizer.encode("红"), tokenizer.eos]) == "红"
    assert tokenizer.decode(tokenizer.encode("红色")[:1] + [228]) == "红色\ufffd"


def test_bad_tokenizer_files_are_named(small):
    (small / "one" / "qwen.tiktoken").write_bytes(b"IQ== 0\nnot a line")
    with pytest.raises(ValueError, match="qwen.tiktoken, line 2: expected"):
        QwenTokenizer.from_pretrained(small / "one")
    (small / "two" / "merges.txt").unlink()
    with pytest.raises(ValueError, match="merges.txt: not found"):
        QwenTokenizer.from_pretrained(small / "two")
