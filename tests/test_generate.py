"""Claims about sampling (Sec. 3.1, Eq. 1 and 2 as a sampler), the pipeline and the command, on tiny random models."""
import itertools
import json
import math
from collections import Counter

import pytest
import torch
from PIL import Image

import generate
import sampling as sampler
from checkpoint import fingerprint
from data import captioning, decode_each, joint, prompt, text_to_image
from generate import GenerateConfig, Pipeline, keep_best, load_stage, unknown_words, write_page
from images import to_image
from mars import MARS, MARSConfig
from sampling import (Sampling, generate_image_tokens, generate_text, guide, log_likelihood, may_follow, noise,
                      probabilities, race)
from step import for_sampling
from tokenizer import TextTokenizer, Vocabulary
from vqgan import VQGAN, VQGANConfig

CAPTIONS = [[3, 41, 7], [5, 6, 7, 8, 9, 10], [1]]
LANGUAGE = MARSConfig(width=16, heads=2, kv_heads=1, head_width=8, ffn_width=24, layers=2, max_seq_len=96,
                      text_vocab=42)
VQ = VQGANConfig(resolution=8, hidden_channels=8, channel_mult=(1, 1), num_res_blocks=1, z_channels=4, norm_groups=4,
                 attn_resolutions=(), num_embeddings=16, quantized_embed_dim=4)


def tiny(k=1, image_vocab=16, language=LANGUAGE, **changes):
    """A MARS of K heads whose visual side has moved away from its start; head 1 is the same for every K."""
    g = torch.Generator().manual_seed(0)
    model = MARS.grow(MARS(language).initialise(g), image_vocab=image_vocab, noise=1.0, generator=g, **changes)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=g))
    model = MARS.grow(model, k=k, generator=g)
    with torch.no_grad():
        for p in model.nktp_heads.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=g))
    return model.eval()


def prompts_of(model, captions, sampling):
    unconditional = [None] * len(captions) if sampling.guidance != 1 else []
    return [prompt(caption, model.vocabulary) for caption in [*captions, *unconditional]]


def sample(model, captions, sampling, seeds, shape=(3, 3)):
    tokens, passes = generate_image_tokens(model, prompts_of(model, captions, sampling), shape, sampling, seeds)
    return tokens.flatten(1).tolist(), passes


@torch.no_grad()
def by_hand(model, caption, sampling, seed, length=9):
    """Head 1 alone, a whole forward pass a token, no cache, no padding."""
    v, tokens = model.vocabulary, []
    for t in range(length):
        rows = [ids + [v.text + token for token in tokens] for ids in prompts_of(model, [caption], sampling)]
        logits = torch.stack([model(torch.tensor([ids]))[0, -1:, v.text:v.text + v.image] for ids in rows])
        logits = guide(logits, sampling.guidance) if len(rows) == 2 else logits
        tokens.append(int(race(probabilities(logits, sampling), noise(seed, t, v.image))))
    return tokens


# ----------------------------------------------------------------------------- one token

def test_guidance_moves_away_from_what_is_likely_without_a_caption():
    logits = torch.tensor([[1.0, 2.0, 0.0], [0.0, 2.0, 1.0]])
    assert guide(logits, 3.0).tolist() == [[3.0, 2.0, -2.0]]
    assert guide(logits, 1.0).tolist() == [[1.0, 2.0, 0.0]]


def test_temperature_top_k_and_top_p_leave_what_they_say():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]])                 # probabilities 0.032, 0.644, 0.087, 0.237
    left = lambda **how: probabilities(logits, Sampling(**dict(temperature=1) | how))[0].nonzero().flatten().tolist()
    assert left(temperature=0) == [1] and left() == [0, 1, 2, 3]
    assert left(top_k=2) == left(top_p=0.7) == [1, 3] and left(top_p=0.6) == [1]
    assert probabilities(torch.zeros(1, 9), Sampling(top_k=2)).count_nonzero() == 2           # ties too
    torch.testing.assert_close(probabilities(logits, Sampling(temperature=2.0)), (logits / 2).softmax(-1))


def test_the_race_is_won_with_the_probability_of_the_token():
    """20,000 races: each fraction within 5 standard deviations."""
    p, n = torch.tensor([0.5, 0.3, 0.2, 0.0]), 20_000
    found = torch.bincount(race(p, torch.stack([noise(seed, 3, 4) for seed in range(n)])), minlength=4) / n
    assert ((found - p).abs() <= 5 * (p * (1 - p) / n).sqrt()).all()
    assert not torch.equal(noise(0, 1, 4), noise(1, 0, 4)) and torch.equal(noise(2**63, 1, 4), noise(2**63, 1, 4))


# ----------------------------------------------------------------------------- many tokens

@pytest.mark.parametrize("temperature, guidance, top_k", [
    (0.0, 1.0, 0), (0.0, 1.7, 0), (0.7, 1.0, 0), (0.7, 1.7, 0), (1.0, 1.0, 5)])
def test_every_draft_window_and_batch_gives_the_tokens_of_whole_forward_passes(temperature, guidance, top_k):
    how = dict(temperature=temperature, guidance=guidance, top_k=top_k)
    expected = [by_hand(tiny(), caption, Sampling(**how), seed) for seed, caption in enumerate(CAPTIONS, 7)]
    assert temperature == 0 or len(set(map(tuple, expected))) == 3
    for K, k in [(1, 1), (1, 0), (1, 2), (1, 4), (1, 64), (4, 1), (4, 0), (4, 2), (4, 4)]:
        model, settings = tiny(K), Sampling(k=k, **how)
        assert sample(model, CAPTIONS, settings, [7, 8, 9])[0] == expected, (K, k)
        for i, caption in enumerate(CAPTIONS):
            assert sample(model, [caption], settings, [7 + i])[0] == expected[i:i + 1], (K, k)


@pytest.mark.parametrize("K, k, batch, passes", [
    (1, 1, 1, 20), (1, 4, 1, 1 + 5), (1, 16, 1, 1 + 2), (3, 0, 1, 1 + 7), (3, 1, 1, 20), (1, 0, 2, 20),
    (1, 4, 2, 1 + 5)])
def test_drafts_that_are_right_save_forward_passes(K, k, batch, passes):
    """All heads are sure of token 3: heads draft it, and so does the repetition of the last certain token."""
    model, sure = tiny(K), torch.nn.functional.one_hot(torch.tensor(3), 16) * 1e4
    logits_of = lambda states, k, tokens: sure.expand(*states.shape[:2], 16)
    tokens, used = sampler.decode(model, [prompt([1], model.vocabulary)] * batch, logits_of, 20, Sampling(k=k),
                                  list(range(batch)), images=True)
    assert tokens.tolist() == [[3] * 20] * batch and used == passes


def test_by_default_tokens_are_drafted_where_that_is_faster():
    drafts = lambda K, batch, device, **how: sampler.count_drafts(Sampling(**how), K, batch, torch.device(device))
    assert [drafts(1, 1, "cpu"), drafts(1, 1, "cuda"), drafts(1, 2, "cuda")] == [0, 15, 0]
    assert [drafts(4, 1, "cpu"), drafts(4, 1, "cuda"), drafts(4, 2, "cuda")] == [3, 3, 0]
    assert drafts(1, 2, "cpu", k=8) == 7 and drafts(4, 2, "cpu", unverified=True) == 3


@torch.no_grad()
def test_weights_laid_out_for_sampling_are_the_same_weights_in_another_order_of_memory():
    model, tokens = tiny(2), torch.tensor([prompt([1, 2], Vocabulary(42, 16))])
    before, states = model(tokens), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    after = for_sampling(model.freeze_language())
    assert after is model and model.blocks[0].attention.visual_qkv.weight.t().is_contiguous()
    assert all(torch.equal(tensor, states[name]) for name, tensor in model.state_dict().items())
    assert {p.requires_grad for p in (model.vision_head.weight, model.text_head.weight)} == {True, False}
    torch.testing.assert_close(model(tokens), before)


@pytest.mark.parametrize("K, k, passes", [(3, 0, 3), (4, 0, 3), (4, 2, 5), (9, 0, 1), (16, 0, 1), (2, 1, 9)])
def test_k_heads_unverified_give_k_tokens_a_forward_pass(K, k, passes):
    model = tiny(K)
    tokens, used = sample(model, CAPTIONS, Sampling(k=k, unverified=True), [0, 1, 2])
    assert used == passes == math.ceil(9 / (k or K)) and {len(row) for row in tokens} == {9}


@torch.no_grad()
def test_unverified_tokens_are_those_of_their_own_heads():
    model, v, seeds = tiny(2), Vocabulary(42, 16), range(8)
    rows, _ = sample(model, [CAPTIONS[0]] * 8, Sampling(temperature=1, unverified=True), list(seeds),
                     (1, 4))
    for seed, tokens in zip(seeds, rows):
        for t in range(4):
            before = [v.text + token for token in tokens[:t // 2 * 2]]
            h = model.hidden(torch.tensor([prompt(CAPTIONS[0], v) + before]))[0, -1]
            assert tokens[t] == race(model.vision_head(model.head(h, 1 + t % 2))[:16].softmax(-1), noise(seed, t, 16))


@torch.no_grad()
def test_heads_draft_from_the_state_that_the_last_certain_token_was_sampled_from():
    model, kept = tiny(3), []
    v, start = model.vocabulary, prompt(CAPTIONS[0], model.vocabulary)

    def logits_of(states, k, tokens):
        if k == 3:
            h = model.hidden(torch.tensor([start + [v.text + token for token in tokens[0, :-1].tolist()]]))
            torch.testing.assert_close(states, h[:, -1:], atol=1e-5, rtol=1e-5)
            kept.append(tokens.shape[1])
        return model.vision_head(model.head(states, k))[..., :16]
    sampler.decode(model, [start], logits_of, 40, Sampling(), [0], images=True)
    assert {b - a for a, b in zip(kept, kept[1:])} >= {1, 2}                   # also after drafts that stayed


def statistic(model, found, length):
    """Chi-square of sampled sequences against the product of head 1's probabilities, and its 99.9% quantile."""
    v, expected = model.vocabulary, {}
    for tokens in itertools.product(range(v.image), repeat=length):
        rows = torch.tensor([prompt([1, 2], v) + [v.text + token for token in tokens]])
        p = model(rows)[0, -length - 1:-1, v.text:v.text + v.image].softmax(-1)
        expected[tokens] = math.prod(p[t, token].item() for t, token in enumerate(tokens)) * len(found)
    counts, cells = Counter(map(tuple, found)), [(tokens, e) for tokens, e in expected.items() if e >= 5]
    pairs = [(counts[tokens], e) for tokens, e in cells]
    pairs.append((len(found) - sum(n for n, _ in pairs), len(found) - sum(e for _, e in pairs) + 1e-6))
    df = len(pairs) - 1
    return sum((n - e) ** 2 / e for n, e in pairs), df * (1 - 2 / (9 * df) + 3.09 * (2 / (9 * df)) ** 0.5) ** 3


@torch.no_grad()
def test_tokens_are_distributed_as_head_1_says_and_unverified_ones_are_not():
    model = tiny(3, image_vocab=4)
    for how, seeds in ((dict(k=1), 3000), (dict(k=3), 3000), (dict(unverified=True), 3000)):
        settings = Sampling(temperature=1, **how)
        found, _ = sample(model, [[1, 2]] * seeds, settings, list(range(seeds)), (1, 3))
        chi_square, limit = statistic(model, found, 3)
        assert (chi_square < limit) != settings.unverified, (settings, chi_square, limit)
    singly = [sample(model, [[1, 2]], Sampling(), [seed], (1, 3))[0][0] for seed in range(20)]
    assert singly == sample(model, [[1, 2]] * 20, Sampling(k=1), list(range(20)), (1, 3))[0]


def test_settings_that_the_model_has_no_heads_for_are_refused():
    for K, how in ((4, dict(k=5)), (1, dict(unverified=True))):
        with pytest.raises(ValueError, match="heads"):
            sample(tiny(K), CAPTIONS[:1], Sampling(**how), [0])
    with pytest.raises(ValueError, match="a prompt has 90 tokens, expected at most 87: 9 follow"):
        sample(tiny(), [[1] * 89], Sampling(), [0])


# ----------------------------------------------------------------------------- text, and text with images

class Letters:
    """A stand-in for a tokenizer of 40 tokens, two fewer than the model has rows."""
    eos = 1

    def __len__(self):
        return 40


def test_every_training_sequence_is_one_that_the_grammar_allows():
    v = Vocabulary(text=42, image=16)
    opening, closing = v.special("<multi_images>"), v.special("</multi_images>")
    for n in (1, 2, 3):
        written = joint([], [5, 6, 7], [torch.arange(3).view(1, 3)] * n, v, eos=1).tokens
        for t, id in enumerate(written):
            assert any(id in ids for ids in may_follow(written[:t], v, Letters(), 3, 3, 8)), (t, id)
    assert may_follow(written[:-2], v, Letters(), 3, 3, 8) == [range(closing, closing + 1)]       # no fourth image
    assert may_follow([5] * 8, v, Letters(), 3, 3, 8) == [range(1, 2), range(opening, opening + 1)]      # text is full
    assert [may_follow([5] * n, v, Letters(), 3, 0, 8) for n in (7, 8)] == [[range(40)], [range(1, 2)]]


def test_whatever_the_weights_only_what_the_layout_allows_is_sampled():
    """Nearly uniform sampling: all endings come up, and every one is a whole text with whole images."""
    pages = generate_text(tiny(), CAPTIONS * 30, Letters(), 6, Sampling(temperature=50.0), list(range(90)), (2, 2), 2)
    for text, tokens in pages:
        assert len(text) <= 6 and all(id in range(40) and id != 1 for id in text)
        assert tokens.shape[1:] == (2, 2) and all(token in range(16) for token in tokens.flatten().tolist())
    assert {len(tokens) for _, tokens in pages} == {0, 1, 2} and max(len(text) for text, _ in pages) == 6


@torch.no_grad()
def test_text_with_images_equals_whole_forward_passes_alone_and_in_a_batch():
    model, settings = tiny(), Sampling(temperature=2.0)
    v, seeds, found = model.vocabulary, [12, 13, 14], []
    batch = generate_text(model, CAPTIONS, Letters(), 6, settings, seeds, (2, 2), 2)
    for seed, title, (text, tokens) in zip(seeds, CAPTIONS, batch):
        written = []
        while not written or written[-1] not in (1, v.special("</multi_images>")):
            logits = model(torch.tensor([[*title, *written]]))[0, -1]
            left = torch.full_like(logits, -torch.inf)
            for ids in may_follow(written, v, Letters(), 4, 2, 6):
                left[ids.start:ids.stop] = logits[ids.start:ids.stop]
            written.append(int(race(probabilities(left, settings), noise(seed, len(written), v.size))))
        assert written == (joint([], text, tokens, v, 1).tokens[:-1] if len(tokens) else [*text, 1])
        (alone, images), = generate_text(model, [title], Letters(), 6, settings, [seed], (2, 2), 2)
        assert alone == text and torch.equal(images, tokens)
        found.append((len(text), len(tokens)))
    assert len(set(found)) > 1, found                                          # rows end at different times


def test_captions_stop_at_the_end_of_text(monkeypatch):
    model, decode, lengths = tiny(), sampler.decode, []
    with torch.no_grad():
        model.text_head.weight[1] = 3 * model.text_head.weight.abs().sum(0)    # the end is often likely
    monkeypatch.setattr(sampler, "decode", lambda *a, **k: lengths.append((r := decode(*a, **k))[0].shape[1]) or r)
    rows = [ids for ids, _ in generate_text(model, CAPTIONS, Letters(), 30, Sampling(), [0, 1, 2])]
    assert lengths == [max(map(len, rows)) + 1] and lengths[0] < 30 and not any(1 in ids for ids in rows)


@torch.no_grad()
def test_the_likelihood_of_a_caption_and_of_an_image_is_the_sum_over_its_tokens():
    model, captions = tiny(), [[1, 2, 3], [4, 5]]
    tokens, v = torch.randint(0, 16, (2, 2, 2), generator=torch.Generator().manual_seed(0)), model.vocabulary
    sequences = [captioning(ids, image, v, eos=0) for ids, image in zip(captions, tokens)]
    sequences += [text_to_image(ids, image, v) for ids, image in zip(captions, tokens)]
    for sequence, found in zip(sequences, log_likelihood(model, sequences)):
        log_p = model(torch.tensor([sequence.tokens])).log_softmax(-1)[0]
        expected = sum(log_p[t - 1, sequence.tokens[t]] for t, asked in enumerate(sequence.is_target) if asked)
        assert found == pytest.approx(float(expected), rel=1e-5)


def test_the_best_of_several_is_chosen_for_each_item():
    made = [["a0", "b0"], ["a1", "b1"], ["a2", "b2"]]
    scores = {"a0": 1.0, "a1": 3.0, "a2": 2.0, "b0": 5.0, "b1": 4.0, "b2": 4.0}
    assert keep_best(3, made.__getitem__, lambda items: [scores[item] for item in items]) == ["a1", "b0"]
    assert keep_best(1, made.__getitem__, None) == ["a0", "b0"]


# ----------------------------------------------------------------------------- the pipeline

@pytest.fixture(scope="module")
def tokenizer():
    return TextTokenizer.train(["red apple", "a green apple", "红苹果", "1. woman\n2. rocket", "64x128"] * 5, 400)


@pytest.fixture(scope="module")
def vqgan():
    torch.manual_seed(0)
    model = VQGAN(VQ).eval()
    torch.nn.init.normal_(model.quantize.embedding.weight)
    return model


@pytest.fixture(scope="module")
def make(tokenizer, vqgan):
    """A function: a Pipeline of random weights with some changes of the configuration."""
    language = MARSConfig(**{**vars(LANGUAGE), "text_vocab": len(tokenizer) + 3, "max_seq_len": 400})
    return lambda **changes: Pipeline(tiny(language=language, image_tokenizer=fingerprint(vqgan), **changes), vqgan,
                                      tokenizer)


@pytest.fixture(scope="module")
def folder(make, tmp_path_factory):
    """Weights as train.py writes them, stage3 and joint inside, with the names that they know."""
    top = tmp_path_factory.mktemp("weights")
    for path, changes in ((top, {}), (top / "joint", {}), (top / "stage3", dict(k=4, sizes=((8, 8),), long_side=16))):
        pipeline = make(**changes)
        pipeline.model.save_pretrained(path)
        pipeline.tokenizer.save_pretrained(path)
    pipeline.vqgan.save_pretrained(top / "vqgan")
    (top / "names.txt").write_text("red apple\ngreen apple\nblue car\n红苹果\n", encoding="utf-8")
    return top


def pixels(images):
    return [image.tobytes() for image in images]


def test_an_image_is_the_same_in_every_batch_and_another_with_another_seed(make, monkeypatch):
    pipeline = make()
    four = pixels(pipeline.text_to_image(["red apple"] * 4, seeds=[5, 6, 7, 8]))
    assert len(set(four)) == 4 and pixels(pipeline.text_to_image(["red apple"], seeds=[7])) == four[2:3]
    by_default = pipeline.text_to_image(["red apple"] * 2)
    assert pixels(by_default) == pixels(pipeline.text_to_image(["red apple"] * 2, seeds=[0, 1]))
    monkeypatch.setattr(generate, "BATCH", 3)
    assert pixels(pipeline.text_to_image(["red apple"] * 4, seeds=[5, 6, 7, 8])) == four


def test_guidance_puts_unconditional_prompts_behind_the_captions(make, monkeypatch):
    pipeline, seen = make(), []
    generate_tokens = generate.generate_image_tokens
    monkeypatch.setattr(generate, "generate_image_tokens", lambda model, prompts, *a: seen.append(prompts) or
                        generate_tokens(model, prompts, *a))
    pipeline.text_to_image(["red apple", "红苹果"], Sampling(guidance=2.0))
    v, encode = pipeline.vocabulary, pipeline.tokenizer.encode
    assert seen[0] == [prompt(encode("red apple"), v), prompt(encode("红苹果"), v), prompt(None, v), prompt(None, v)]


def test_the_best_image_is_the_one_that_makes_its_prompt_likeliest(make):
    pipeline, settings = make(), Sampling(temperature=3.0)
    best, = pipeline.text_to_image(["red apple"], settings, [4], best_of=3)
    caption, v = pipeline.tokenizer.encode("red apple"), pipeline.vocabulary
    seeds = [4 + generate.SPACING * j for j in range(3)]
    tokens, _ = generate_image_tokens(pipeline.model, [prompt(caption, v)] * 3, (4, 4), settings, seeds)
    scores = log_likelihood(pipeline.model, [captioning(caption, image, v, pipeline.tokenizer.eos) for image in tokens])
    chosen = max(range(3), key=scores.__getitem__)
    assert chosen != 0 and pixels([best]) == pixels(decode_each(pipeline.vqgan, tokens[chosen:chosen + 1]))


def test_captions_are_the_greedy_ones_and_of_several_the_one_that_makes_its_image_likeliest(make, monkeypatch):
    pipeline, scores = make(), []
    images = pipeline.text_to_image(["red apple"] * 2)
    texts = pipeline.caption_images(images)
    assert texts == [pipeline.caption_images([image])[0] for image in images]
    assert pipeline.caption_images(images, best_of=1, seed=3) == texts
    keep = lambda n, make, score: scores.extend(map(score, map(make, range(n)))) or keep_best(n, make, score)
    monkeypatch.setattr(generate, "keep_best", keep)
    best = pipeline.caption_images(images, best_of=3)
    chosen = [max(range(3), key=lambda j: scores[j][i]) for i in range(2)]
    assert [text for text, j in zip(texts, chosen) if j == 0] == [text for text, j in zip(best, chosen) if j == 0]
    assert best != texts


def test_stage_3_enlarges_every_image_of_a_batch_by_its_own_size_and_prompt(make):
    pipeline = make(k=4, sizes=((8, 8), (8, 16)), long_side=16)
    images = [Image.effect_noise(size, 90).convert("RGB") for size in ((8, 8), (16, 8), (20, 19))]
    larger = pipeline.super_resolve(images, ["red apple", "红苹果", "apple"])
    assert [image.size for image in larger] == [(16, 16), (32, 16), (16, 16)]
    assert pixels(pipeline.super_resolve(images[1:2], ["红苹果"])) == pixels(larger[1:2])
    with pytest.raises(ValueError, match="another stage, expected those of train.py stage1 or stage2"):
        pipeline.text_to_image(["red apple"])
    with pytest.raises(ValueError, match="expected those of train.py stage3"):
        make().super_resolve(images, ["a"] * 3)


def test_only_trained_sizes_are_sampled_and_each_is_named_in_the_prompt(make):
    pipeline = make(sizes=((8, 8), (8, 16)))
    assert pipeline.text_to_image(["red apple"], size=(8, 16))[0].size == (16, 8)
    assert pipeline._layout((8, 16)) == (pipeline.tokenizer.encode(" 8x16"), (4, 8)) and make()._layout((8, 8))[0] == []
    with pytest.raises(ValueError, match="size is 16x8, expected one that .* height x width: 8x8, 8x16"):
        pipeline.text_to_image(["red apple"], size=(16, 8))


def test_a_film_has_a_frame_a_forward_pass_and_ends_with_the_image(make):
    pipeline, steps = make(), []
    image, = pipeline.text_to_image(["red apple"], Sampling(k=1), on_tokens=steps.append)
    frames = pipeline.film(steps)
    assert len(frames) == 16 and pixels(frames[-1:]) == pixels([image])
    for t, frame in enumerate(frames, 1):
        grey = [frame.getpixel((2 * x + 1, 2 * y + 1)) == (211, 211, 211) for y in range(4) for x in range(4)]
        assert grey[t:] == [True] * (16 - t) and not any(grey[:t])


def test_reconstruction_is_what_the_image_tokenizer_leaves(make):
    pipeline, image = make(), Image.effect_noise((8, 12), 90).convert("RGB")
    found, = pipeline.reconstruct([image])
    inside = pipeline.vqgan.encode(generate.to_pixels(image)[None])
    assert found.size == image.size and pixels([found]) == pixels([to_image(pipeline.vqgan.decode(inside).detach()[0])])


def test_a_page_has_each_step_above_its_image_or_the_text_as_it_is(tmp_path):
    images = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    write_page(tmp_path / "a page.md", "how to  make it", "1. woman\n2. rocket", images)
    assert (tmp_path / "a page.md").read_text(encoding="utf-8") == (
        "# how to make it\n\n1. woman\n\n   ![image 1](a%20page-1.png)\n\n2. rocket\n\n   ![image 2](a%20page-2.png)\n")
    assert Image.open(tmp_path / "a page-2.png").size == (256, 256)
    write_page(tmp_path / "b.md", "cake", "1. 鸡蛋\n2. flour", images[:1])
    assert (tmp_path / "b.md").read_text(encoding="utf-8") == "# cake\n\n1. 鸡蛋\n2. flour\n\n![image 1](b-1.png)\n"


# ----------------------------------------------------------------------------- folders

def test_a_stage_takes_the_image_tokenizer_around_it_only_if_it_was_trained_with_it(folder, make, tmp_path):
    assert load_stage(folder / "joint")[1].config == VQ
    inner = tmp_path / "stage2"
    pipeline = make()
    pipeline.model.save_pretrained(inner)
    pipeline.tokenizer.save_pretrained(inner)
    for path in (tmp_path / "vqgan", inner / "vqgan"):                       # around it, then its own
        other = VQGAN(VQ)
        torch.nn.init.normal_(other.quantize.embedding.weight)
        other.save_pretrained(path)
        with pytest.raises(ValueError, match="vqgan: another image tokenizer than the one that .*stage2 was trained"):
            load_stage(inner)
    config = json.loads((inner / "config.json").read_text(encoding="utf-8"))
    (inner / "config.json").write_text(json.dumps(config | {"image_tokenizer": ""}), encoding="utf-8")
    load_stage(inner)                                                        # nothing is known: its own will do
    language = MARS(LANGUAGE)
    language.save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match="text: a language model alone"):
        load_stage(tmp_path / "text")


def test_captions_and_recipes_fit_into_what_the_model_can_read(make):
    pipeline = make()
    short = Pipeline(MARS.grow(pipeline.model, max_seq_len=24), pipeline.vqgan, pipeline.tokenizer)
    assert len(short.caption_images(short.text_to_image(["a"]))) == 1                     # 4 tokens of it at most
    with pytest.raises(ValueError, match="a prompt has [0-9]+ tokens"):
        short.interleaved(["how to make it"])


def test_a_pipeline_of_parts_that_do_not_fit_is_refused(make, vqgan):
    pipeline = make()
    with pytest.raises(ValueError, match="the text and image tokenizers have"):
        Pipeline(tiny(), vqgan, pipeline.tokenizer)


# ----------------------------------------------------------------------------- the command

def run(folder, *arguments):
    generate.main([*map(str, arguments), "--weights", str(folder)])


def refused(capsys, *arguments) -> str:
    """The last line on stderr of a command that ends in exit code 2."""
    with pytest.raises(SystemExit) as end:
        generate.main(list(map(str, arguments)))
    assert end.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_image_k_of_a_grid_is_the_same_for_any_number_of_images(folder, tmp_path, capsys):
    cells = []
    for num, seed in ((3, 5), (1, 7)):
        run(folder, "red apple", "--num", num, "--seed", seed, "--scale", 1, "-o", tmp_path / "grid.png")
        grid = Image.open(tmp_path / "grid.png")
        cells.append([grid.crop((10 * i, 0, 10 * i + 8, 8)) for i in range(num)])
    assert pixels(cells[0][2:]) == pixels(cells[1]) and len(set(pixels(cells[0]))) == 3
    assert capsys.readouterr().out == f"wrote {tmp_path / 'grid.png'}\n" * 2
    run(folder, "red apple", "红苹果", "--num", 2, "-o", tmp_path / "grid.png")
    assert Image.open(tmp_path / "grid.png").size == (256 * 2 + 2, 256 * 2 + 2)


def test_every_mode_writes_what_it_says(folder, tmp_path, capsys):
    run(folder, "red apple", "--film", tmp_path / "film.gif", "-o", tmp_path / "out.png")
    film = Image.open(tmp_path / "film.gif")
    assert film.n_frames > 2 and film.size == (256, 256)
    run(folder, "--caption", tmp_path / "out.png")
    run(folder / "stage3", "--upscale", tmp_path / "out.png", "--prompt", "red apple", "--scale", 1, "-o",
        tmp_path / "large.png")
    assert Image.open(tmp_path / "large.png").size == (16, 16)
    run(folder, "red apple", "--upscale", "--unverified", "--scale", 1, "-o", tmp_path / "both.png")
    assert Image.open(tmp_path / "both.png").size == (16, 16)
    run(folder / "joint", "--recipe", "how to make it", "--temperature", 5, "-o", tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text(encoding="utf-8").startswith("# how to make it\n")
    assert capsys.readouterr().out.endswith(f"wrote {tmp_path / 'page.md'}\n")


def test_words_that_the_weights_do_not_know_are_named_with_the_nearest_names(folder, tmp_path, capsys):
    names = ["red apple", "green apple", "blue car", "红苹果"]
    assert unknown_words("A Picture of the RED apple", names) == unknown_words("画一个红苹果", names) == ([], [])
    unknown, nearest = unknown_words("a red aple, please", names)
    assert unknown == ["aple"] and nearest[0] == "red apple" and len(nearest) == 3
    assert unknown_words("绿苹果", names)[0] == ["绿"] and unknown_words("绿苹果", names)[1][0] == "红苹果"
    run(folder, "red dog", "-o", tmp_path / "out.png")
    assert "does not know dog; it knows red apple" in capsys.readouterr().err and (tmp_path / "out.png").is_file()
    run(folder, "red apple", "-o", tmp_path / "out.png")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("arguments, message", [
    ("--caption x.png --num 5", "--num does nothing with --caption"),
    ("--caption x.png --guidance 3", "--guidance does nothing with --caption"),
    ("--recipe cake --k 3", "--k does nothing with --recipe"),
    ("--upscale x.png --prompt cat --size 8x8", "--size does nothing with --upscale"),
    ("cat --prompt dog", "--prompt does nothing with a prompt"),
    ("--upscale x.png", "--prompt is missing"),
    ("cat --caption x.png", "one of them"), ("", "one of them"), ("--upscale a.png b.png --prompt c", "one of them"),
    ("cat --seed -1", "--seed is -1"), (f"cat --seed {2**63}", "--seed is"),
    ("cat --temperature 1e-40", "at least 0.01"), ("cat --top-p 0", "--top-p is 0.0"),
    ("cat --guidance nan", "a finite number"), ("cat --size 8xx8", "expected HxW"),
    ("cat --film f.gif --num 2", "--film shows one image"), ("--recipe cake -o x.png", "ends in .md"),
    ("cat --device nosuch", "device 'nosuch'"), ("--caption nosuch.png", "nosuch.png")])
def test_flags_that_a_mode_does_not_use_and_bad_values_are_refused_in_one_line(arguments, message, capsys):
    assert message in refused(capsys, *arguments.split())


@pytest.mark.parametrize("text, message", [(" ", "the prompt is ''"), ("\udcff", "UTF-8"),
                                           ("红" * 500, "a prompt has 50")])
def test_bad_prompts_are_refused_in_one_line(folder, text, message, capsys):
    assert message in refused(capsys, text, "--weights", folder)


def test_the_command_line_has_every_setting_once():
    assert GenerateConfig(prompts=("a",), guidance=2.0).guidance == 2.0
    used = {name for names in generate.USED.values() for name in names.split()} | {*generate.USED, "weights", "device"}
    assert used == {field.name for field in GenerateConfig.__dataclass_fields__.values()}
