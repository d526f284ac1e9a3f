"""Claims about the weights that ship, and about the README that shows them."""
import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import corpus
import evaluate
import generate
import recipes
import world
from checker import check
from data import psnr
from generate import TINY, Painter
from mars import MARS, is_visual

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def painter() -> Painter:
    return Painter.from_pretrained(TINY)


def command(*arguments, folder):
    """Runs a program of the repository from another folder, in a process of its own."""
    return subprocess.run([sys.executable, ROOT / arguments[0], *arguments[1:]], cwd=folder, capture_output=True,
                          text=True, timeout=120)


def test_a_prompt_becomes_the_right_picture_within_ten_seconds_of_a_cold_process(tmp_path):
    started = time.perf_counter()
    done = command("generate.py", "a red circle above a blue square", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - started < 10
    image = Image.open(tmp_path / "out.png")
    assert image.size == (96, 96)
    assert check(image, world.parse("a red circle above a blue square"))["all"]


def test_the_same_command_gives_the_same_bytes(tmp_path):
    for name in ("a.png", "b.png"):
        assert command("generate.py", "蓝色方形", "--seed", "3", "-o", name, folder=tmp_path).returncode == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_picture_is_described_by_a_caption_that_is_true_of_it(tmp_path):
    scene = world.Scene((world.Thing("red", "circle", "solid", "large", 1, 1),), "white", ())
    world.render(scene).save(tmp_path / "scene.png")
    done = command("generate.py", "--caption", "scene.png", folder=tmp_path)
    assert done.returncode == 0 and world.holds(world.parse(done.stdout), world.claim_of(scene)), done.stdout + done.stderr


@pytest.mark.parametrize("arguments, message", [
    ([""], "the prompt is empty"),
    (["red " * 600], "tokens; at most"),
    (["x", "--weights", "nowhere"], "nowhere: not found"),
    (["x", "-o", "file/out.png"], "file/out.png: cannot write the picture"),
    (["--caption", "file"], "file: not a whole image file"),
])
def test_bad_input_ends_in_one_clear_line_and_exit_code_2(tmp_path, monkeypatch, capsys, arguments, message):
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        generate.main(arguments)
    line, = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and message in line


@pytest.mark.parametrize("change, message", [
    (lambda folder: (folder / "model.safetensors").write_bytes(b"half"), "not a whole safetensors file"),
    (lambda folder: (folder / "tokenizer.model").unlink(), "tokenizer.model: no such file"),
    (lambda folder: (folder / "config.json").write_text("{"), "config.json: not JSON"),
    (lambda folder: (folder / "config.json").write_text(
        (folder / "config.json").read_text().replace('"layers": 4', '"layers": 3')), "expected no such tensor"),
    (lambda folder: (folder / "vqgan" / "config.json").unlink(), "config.json: not found"),
])
def test_a_bad_weights_folder_is_named_in_one_line(tmp_path, change, message):
    for path in TINY.rglob("*"):
        if path.is_file():
            target = tmp_path / path.relative_to(TINY)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    change(tmp_path)
    with pytest.raises(ValueError) as error:
        Painter.from_pretrained(tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_weights_weigh_less_than_45_mb():
    assert sum(path.stat().st_size for path in TINY.rglob("*") if path.is_file()) < 45e6


def test_shipped_text_logits_are_those_of_the_language_part_alone(painter):
    """The language model is what is left without the visual side: same weights, same bits."""
    model = painter.model
    config = type(model.config)(**{**vars(model.config), "codes": 0})
    language = MARS(config).eval()
    language.load_state_dict({n: t for n, t in model.state_dict().items() if not is_visual(n)})
    rng = random.Random(0)
    for _ in range(5):
        tokens = torch.tensor([painter.tokenizer.encode(corpus.document(rng))])
        assert torch.equal(model(tokens)[..., :model.vocabulary.text], language(tokens))


def test_report_is_of_the_size_that_is_asked_for():
    report = json.loads((TINY / "report.json").read_text())
    whole = {(row["split"], row["language"]): row for row in report["rows"]
             if row["task"] == "drawing" and row["what"] == "all"}
    for split in ("seen pairs", "unseen combinations", "held-out pairs"):
        assert whole[split, "both"]["n"] >= 300 and whole[split, "zh"]["n"] * 2 == whole[split, "both"]["n"]


def test_fresh_samples_agree_with_the_shipped_report(painter):
    """40 new prompts: as many right as the report says, within 4 standard deviations."""
    report = json.loads((TINY / "report.json").read_text())
    expected = next(row["share"] for row in report["rows"] if (row["task"], row["split"], row["language"],
                    row["what"]) == ("drawing", "seen pairs", "both", "all"))
    asked = evaluate.questions("train", 40, seed=77)
    found = evaluate.accuracy(painter.paint([text for _, text, _ in asked]), [text for _, text, _ in asked])["all"]
    assert abs(found - expected) < 4 * (expected * (1 - expected) / 40 + 1e-3) ** 0.5


def test_a_title_becomes_a_page_whose_pictures_show_their_steps(tmp_path):
    title = "how to draw a red circle above a blue square"
    done = command("generate.py", "--recipe", title, "-o", "page.md", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    steps = recipes.parse_steps(done.stdout.split("\nwrote")[0])
    assert recipes.agrees(title, steps) and "page-1.png" in (tmp_path / "page.md").read_text()
    for k, claim in enumerate(recipes.claims(steps), 1):
        assert check(Image.open(tmp_path / f"page-{k}.png"), claim)["all"]


def test_the_cascade_is_3_db_nearer_to_the_large_picture_than_bicubic_scaling():
    upscaler, scenes = Painter.from_pretrained(TINY / "stage3"), evaluate.questions("train", 64, seed=9)
    small, large = ([world.render(scene, cell) for scene, _, _ in scenes] for cell in (16, 32))
    ours = upscaler.upscale(small, [text for _, text, _ in scenes])
    bicubic = [image.resize(true.size, Image.Resampling.BICUBIC) for image, true in zip(small, large)]
    assert psnr(ours, large) >= psnr(bicubic, large) + 3


def test_of_eight_captions_the_one_whose_picture_is_likeliest_is_more_often_true(painter):
    scenes = [scene for scene, _, _ in evaluate.questions("train", 24, seed=6, things=2)]
    images = [world.render(scene) for scene in scenes]

    def true(texts) -> int:
        return sum(map(evaluate.is_exact, texts, scenes))
    assert true(painter.describe(images, best_of=8)) >= max(true(painter.describe(images)) + 3, 20)


# ----------------------------------------------------------------------------- the README

def test_what_the_readme_says_of_the_runs_and_of_their_weights_is_what_was_measured():
    runs = json.loads((ROOT / "results" / "training.json").read_text())          # the last line of each run's metrics
    loss = {stage: f"loss {run['loss of the last 100 steps']:.3f}" for stage, run in runs.items() if "vqgan" not in stage}
    one, two, round2, last = ({(row["task"], row["split"], row["language"], row["what"]): row["share"]
                       for row in json.loads(path.read_text())["rows"]}
                      for path in (*(ROOT / "results" / f"{name}.json" for name in ("stage1", "stage2", "stage2-again")),
                                    TINY / "report.json"))
    asked, flat = ("drawing", "seen pairs", "both", "all"), " ".join(README.split())
    said = [f"PSNR {runs['vqgan']['psnr']:.1f} dB", f"{loss['text']}, questions {100 * runs['text']['look_up']:.1f}%",
            f"{loss['stage1']}, {100 * one[asked]:.1f}% of 300", f"{loss['stage2']}, {100 * two[asked]:.1f}% of 300",
            f"{loss['stage2, again']}, {100 * round2[asked]:.1f}% of 300", f"{loss['joint']} |",
            f"of which {100 * last[asked]:.0f}% of square pictures are right",
            f"PSNR {runs['vqgan, cascade']['psnr']:.1f} dB", f"{loss['stage3']}, "]
    said += [f"| `{stage}`{again} | {run['step'] + 1:,} |" for name, run in runs.items()
             for stage, _, again in [name.partition(",")] for again in ["," * bool(again) + again]]
    wide = [100 * share for (task, _, language, what), share in last.items()
            if "x" in task and (language, what) == ("both", "all")]
    said.append(f"{min(wide):.0f}% to {max(wide):.0f}% of the time, against {100 * last[asked]:.0f}%")
    said.append(f"no size is more than {100 * last[asked] - min(wide):.1f} points behind")
    assert 100 * last[asked] - min(wide) <= 5
    now = [f"{100 * round2[task, split, 'both', what]:.0f}%" for task, split, what in (
        ("drawing", "unseen combinations", "all"), ("drawing", "held-out pairs", "all"), ("captioning", "seen pairs", "exact"),
        ("captioning, best of 8", "seen pairs", "exact"))]
    said.append("{} of unseen combinations and {} of held-out pairs right, captions {}, best of 8 {}".format(*now))
    assert not [text for text in said if text not in flat]
    greedy, best = (last[task, "seen pairs", "both", "exact"] for task in ("captioning", "captioning, best of 8"))
    assert f"is right {100 * greedy:.0f}% of the time" in flat and f"{100 * best:.0f}% are exact" in flat


def test_readme_shows_what_the_best_of_eight_gains():
    rows = [row for row in json.loads((ROOT / "results" / "best-of-8.json").read_text())["rows"]
            if row["language"] == "both" and row["task"] in ("drawing", "best of 8")]
    assert evaluate.show(rows) in README
    share = {(row["task"], row["split"]): row["share"] for row in rows if row["what"] == "all"}
    at = {key: round(100 * value) for key, value in share.items()}
    assert "of new combinations {} in a hundred are right, not {}; of known pairs {}, not {}; both gains are within".format(
        *(at[task, split] for split in ("unseen combinations", "seen pairs") for task in ("best of 8", "drawing"))
        ) in " ".join(README.split())
    low = {(row["task"], row["split"]): row["low"] for row in rows if row["what"] == "all"}
    assert all(low["best of 8", split] < share["drawing", split] for split in ("seen pairs", "unseen combinations"))
    assert share["best of 8", "held-out pairs"] == 0


def test_readme_shows_the_shipped_report_of_the_cascade():
    rows = json.loads((TINY / "report.json").read_text())["cascade"]
    assert evaluate.show_cascade(rows) in README
    assert [(row["heads"], row["best_of"], row["verify"]) for row in rows] == [
        (1, 4, False), (1, 1, False), (4, 1, False), (16, 1, False), (16, 1, True)]
    best, one, *ahead, verified = rows
    assert all(one["passes"] / row["passes"] >= 0.8 * row["heads"] for row in ahead)
    assert all(verified[key] == one[key] for key in ("psnr", "right", "drawn_upscaled_right"))
    flat = " ".join(README.split())
    assert one["psnr"] >= one["psnr_bicubic"] + 3
    for text in (f"comes {one['psnr'] - one['psnr_bicubic']:.1f} dB nearer than bicubic scaling",
                 f"would allow {one['psnr_codec'] - one['psnr']:.1f} more", f"{100 * one['right']:.0f}% of the renders",
                 "{:.0f}% of the drawings stay right, with 16 {:.0f}%".format(
                     *(100 * row["drawn_upscaled_right"] for row in ahead)),
                 f"and {100 * one['drawn_upscaled_right']:.0f}% of the drawings, of which {100 * one['drawn_right']:.0f}%",
                 f"then {100 * best['right']:.0f}% of the renders and {100 * best['drawn_upscaled_right']:.0f}% of the drawings",
                 f"in {one['passes'] / verified['passes']:.1f} times fewer passes",
                 "save passes ({:.1f} and {:.1f} times fewer) and time ({:.1f} and {:.1f} times less)".format(
                     *(one[key] / row[key] for key in ("passes", "seconds") for row in ahead))):
        assert text in flat, text


def test_readme_shows_the_shipped_report_of_recipes():
    report = json.loads((TINY / "joint" / "report.json").read_text())
    assert all(row["n"] >= 100 for row in report["rows"] if row["language"] == "both")
    assert evaluate.show(report["rows"], evaluate.RECIPE_KEYS) in README


def test_readme_says_what_nano_reaches():
    plain, guided = ({(row["split"], row["what"]): row for row in
                      json.loads((ROOT / "results" / f"{name}.json").read_text())["rows"] if row["language"] == "both"}
                     for name in ("nano", "nano-guidance"))
    seen, held_out = (plain[split, "all"] for split in ("seen pairs", "held-out pairs"))
    assert plain["seen pairs", "exact"]["share"] == 1 and seen["n"] == 200
    assert seen["share"] >= 0.8 and held_out["share"] >= 0.7
    percent, flat = (lambda row, *keys: [f"{100 * row[key]:.0f}%" for key in keys]), " ".join(README.split())
    bounds = "share", "low", "high"
    for text in ("all captions are right, and {} of pictures all-correct, {} to {} with".format(*percent(seen, *bounds)),
                 "that no caption ever named, {}, {} to {}.".format(*percent(held_out, *bounds)),
                 "of five times as many steps, reaches {} with visual experts".format(*percent(seen, "share")),
                 "`nano` draws {} of held-out pairs".format(*percent(held_out, "share")),
                 "`nano` is right {} of the time at 2".format(*percent(guided["seen pairs", "all"], "share")),
                 "With guidance 2 it is {} and {}".format(
                     *(percent(guided[split, "all"], "share")[0] for split in ("seen pairs", "held-out pairs")))):
        assert text in flat, text


def test_readme_shows_the_shipped_report():
    report = json.loads((TINY / "report.json").read_text())
    assert evaluate.show(report["rows"]) in README


@pytest.mark.parametrize("page", ["README.md", "docs/paper.md", "notebooks/README.md"])
def test_every_file_function_test_and_link_that_a_page_names_exists(page):
    path, text = ROOT / page, (ROOT / page).read_text()
    sources = {path.name: path.read_text() for path in ROOT.glob("*.py")}
    tests = "\n".join(path.read_text() for path in ROOT.glob("tests/*.py"))
    for name in re.findall(r"`(\w+\.py)`", text):
        assert name in sources, name
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}(" in tests, name
    for line in re.findall(r"^\|.*`\w+\.py` `.*$", text, re.M):               # | ... | `file.py` `name`, `name` | ...
        file = None
        for name in re.findall(r"`(\w[\w.]*)`", line):
            if name in sources:
                file = name
            elif file and not name.startswith("test_"):
                last = re.escape(name.split(".")[-1])
                assert re.search(rf"(class|def) {last}\b|^ *(self\.)?{last}\b.*[:=]", sources[file], re.M), (file, name)
    for link in re.findall(r"\]\((?!http|#)([^)#]+)\)", text):
        assert (path.parent / link).exists(), link
    headings = [re.sub(r"[^\w -]", "", line.lstrip("# ")).lower().replace(" ", "-")
                for line in text.splitlines() if line.startswith("#")]
    for anchor in re.findall(r"\]\(#([\w-]+)\)", text):
        assert anchor in headings, anchor


def test_every_command_of_the_readme_is_understood():
    """Flags and presets of each printed command exist; the two first commands run in full elsewhere."""
    seen = 0
    for block in re.findall(r"```bash\n(.*?)```", README, re.S):
        for line in block.strip().splitlines():
            for part in line.split("&&"):
                words = re.findall(r'"[^"]*"|\S+', part.partition(" #")[0].strip())
                programs = [i for i, word in enumerate(words) if word.endswith(".py")]
                if words[0] in ("python", "torchrun") and programs:
                    arguments = [word.strip('"') for word in words[programs[0] + 1:]]
                    __import__(words[programs[0]][:-3]).parse_arguments(arguments)
                    seen += 1
    assert seen >= 20
