"""Claims about sampling (Sec. 3.1, read as a sampler), on random weights."""
import torch

from data import captioning, text_to_image
from generate import Sampling, draw, draw_codes, guide, log_likelihood, prefill, write_text

GREEDY = Sampling(cfg=1.0, temperature=0.0, top_k=0, top_p=1.0)
CAPTIONS = [[3, 41, 7], [5, 6, 7, 8, 9, 10], [1]]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_only_codes_are_drawn_and_the_size_sets_how_many(mars):
    codes = draw_codes(mars, CAPTIONS, 2, 3, Sampling(top_k=0, top_p=1.0, temperature=5.0), seeded())
    assert codes.shape == (3, 2, 3) and 0 <= codes.min() and codes.max() < mars.vocabulary.codes


def test_the_same_seed_draws_the_same_and_another_seed_another(mars):
    draws = [draw_codes(mars, CAPTIONS, 3, 3, Sampling(), seeded(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_guidance_scale_1_equals_no_guidance(mars):
    """The guided formula at scale 1 gives the conditional logits, so the short cut without it may be taken."""
    logits = torch.randn(6, 16, generator=seeded())
    torch.testing.assert_close(guide(logits, 1.0), logits[:3])
    nearly_one = Sampling(cfg=1.0 + 1e-6, temperature=0.0)
    assert torch.equal(draw_codes(mars, CAPTIONS, 3, 3, nearly_one), draw_codes(mars, CAPTIONS, 3, 3, GREEDY))


def test_guidance_moves_away_from_the_picture_without_a_caption():
    logits = torch.tensor([[1.0, 2.0, 0.0], [0.0, 2.0, 1.0]])
    assert guide(logits, 3.0).tolist() == [[3.0, 2.0, -2.0]]
    assert guide(logits, 0.0).tolist() == [[0.0, 2.0, 1.0]]


def test_batched_prompts_draw_what_each_draws_alone(mars):
    """Prompts of unlike length share a batch by padding at the left, and none notices."""
    together = draw_codes(mars, CAPTIONS, 3, 3, Sampling(cfg=2.0, temperature=0.0))
    for row, caption in enumerate(CAPTIONS):
        assert torch.equal(together[row], draw_codes(mars, [caption], 3, 3, Sampling(cfg=2.0, temperature=0.0))[0])


@torch.no_grad()
def test_cached_drawing_equals_drawing_with_the_whole_sequence_each_time(mars):
    special, V_t = mars.vocabulary.special, mars.vocabulary.text
    tokens = [*CAPTIONS[0], special("<img>")]
    for _ in range(6):
        logits = mars(torch.tensor([tokens]))[0, -1, V_t:V_t + mars.vocabulary.codes]
        tokens.append(V_t + logits.argmax().item())
    codes = draw_codes(mars, CAPTIONS[:1], 2, 3, GREEDY)
    assert (codes.flatten() + V_t).tolist() == tokens[-6:]


@torch.no_grad()
def test_prefill_gives_the_last_hidden_state_of_each_prompt(mars):
    hidden, cache = prefill(mars, CAPTIONS, more=4)
    assert cache.keys.shape[3] == 6 + 4
    for row, caption in enumerate(CAPTIONS):
        torch.testing.assert_close(hidden[row], mars.hidden(torch.tensor([caption]))[0, -1], atol=1e-5, rtol=1e-5)


def test_temperature_zero_takes_the_likeliest_and_top_k_and_top_p_cut_the_tail():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]]).repeat(2000, 1)
    assert set(draw(logits, GREEDY, None).tolist()) == {1}
    assert set(draw(logits, Sampling(temperature=1.0, top_k=2, top_p=1.0), seeded()).tolist()) == {1, 3}
    # probabilities 0.032, 0.644, 0.087, 0.237: a share of 0.7 is reached with the second
    assert set(draw(logits, Sampling(temperature=1.0, top_k=0, top_p=0.7), seeded()).tolist()) == {1, 3}
    assert set(draw(logits, Sampling(temperature=1.0, top_k=0, top_p=1.0), seeded()).tolist()) == {0, 1, 2, 3}


def test_without_cuts_tokens_are_drawn_from_the_softmax():
    """20,000 draws from four tokens: each share within 5 standard deviations (false alarm below 1e-5)."""
    logits = torch.tensor([[0.0, 1.0, -1.0, 0.5]])
    expected = (logits / 0.8).softmax(-1)[0]
    drawn = draw(logits.repeat(20_000, 1), Sampling(temperature=0.8, top_k=0, top_p=1.0), seeded())
    found = torch.bincount(drawn, minlength=4) / 20_000
    assert ((found - expected).abs() < 5 * (expected * (1 - expected) / 20_000).sqrt()).all()


def test_text_goes_on_with_text_alone_until_its_end(mars):
    eos = 1
    with torch.no_grad():
        mars.text_head.weight[eos] = 0
    rows = write_text(mars, CAPTIONS, eos, max_tokens=7)
    assert all(len(row) <= 7 and eos not in row and max(row, default=0) < mars.vocabulary.text for row in rows)
    tokens = list(CAPTIONS[0])
    for expected in rows[0]:
        tokens.append(mars(torch.tensor([tokens]))[0, -1, :mars.vocabulary.text].argmax().item())
        assert tokens[-1] == expected


@torch.no_grad()
def test_candidates_are_ranked_by_the_likelihood_of_their_caption_or_of_their_picture(mars):
    codes = torch.randint(0, 16, (2, 2, 2), generator=torch.Generator().manual_seed(0))
    captions, v = [[1, 2, 3], [4, 5]], mars.vocabulary
    written = log_likelihood(mars, [captioning(ids, picture, v, eos=0) for ids, picture in zip(captions, codes)])
    drawn = log_likelihood(mars, [text_to_image(ids, picture, v) for ids, picture in zip(captions, codes)])
    for i, caption in enumerate(captions):
        picture = [v.special("<img>"), *(v.text + codes[i].flatten()).tolist(), v.special("</img>")]
        for given, targets, found in ((picture, [*caption, 0], written), (caption, picture, drawn)):
            tokens = given + targets
            log_p = mars(torch.tensor([tokens])).log_softmax(-1)[0]
            expected = sum(log_p[t - 1, tokens[t]] for t in range(len(given), len(tokens)))
            torch.testing.assert_close(found[i], expected)
