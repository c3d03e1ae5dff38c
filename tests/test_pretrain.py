"Pre-training of the tiny towers: its files, its resumption, and what ships."
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from barleria_nb.backbones import load_tiny_clip
from barleria_nb.core import BarleriaError, asset, read_json
from barleria_nb.data import normalise
from barleria_nb.pretrain import (AREA, FIRST, HELD_OUT, KINDS, LR, RELATIONS, SIDES, X, Y, Contrast, Most, Phrase, Region, Relation, batch_of, claim, draw_pool,
                                  encode_pictures, encode_words, flipped, fresh_towers, held_out_scenes, own_ids, pair_loss, pools_at, pretrain, probe_towers, rate,
                                  word_ids)
from barleria_nb.shapes import SIDE, VOCABULARY


@pytest.fixture(scope="module")
def pools(): return [draw_pool(kind, 24, progress=False) for kind in KINDS]


def run(out, pools, **changes):
    return pretrain(out, pools, **{**dict(steps=4, first=2, size=6, held_out=(8, 8, 8), every=1, progress=False), **changes})


things = st.tuples(st.integers(0, 7), st.integers(0, 5), st.integers(0, 1), st.floats(5, 123), st.floats(5, 123), st.floats(150, 1400))


def table(pictures): return np.stack([np.array([list(t) for t in p] + [[-1.] * 6] * (7 - len(p)), np.float32) for p in pictures])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(things, min_size=1, max_size=7), min_size=1, max_size=4), st.integers(0, 2**32 - 1))
def test_claims_are_true_or_false_or_neither(pictures, seed):
    rows, rng = table(pictures), np.random.default_rng(seed)
    for row in rows:
        c = claim(row, rng)
        true, false = c.truth(rows)
        assert true.shape == false.shape == (len(rows),) and not (true & false).any()
        assert set(c.words(rng)) <= set(VOCABULARY)
        order = rng.permutation(7)  # the slots of a table have no order (the first of two equals may win “largest”)
        if not isinstance(c, Most): assert all((a == b).all() for a, b in zip(c.truth(rows[:, order]), (true, false)))


@settings(max_examples=40, deadline=None)
@given(st.lists(things, min_size=2, max_size=7), st.integers(0, 2**32 - 1))
def test_a_mirrored_picture_makes_the_mirrored_claim_true(picture, seed):
    rows, rng = table([picture]), np.random.default_rng(seed)
    other = rows.copy()
    other[..., X] = np.where(rows[..., 0] >= 0, SIDE - rows[..., X], -1)
    a, b = Phrase(colour=int(rows[0, 0, 0])), Phrase(shape=int(rows[0, 1, 1]))
    for left, right in ((Region(a, "left"), Region(a, "right")), (Relation(a, b, "left of"), Relation(a, b, "to the right of"))):
        for x, y in zip(left.truth(rows), right.truth(other)): assert (x == y).all()
    for same in (Region(a, "top"), Relation(a, b, "above")):
        for x, y in zip(same.truth(rows), same.truth(other)): assert (x == y).all()
    assert set(SIDES) == {"left", "right", "top", "bottom"} and len(RELATIONS) == 6


def test_flips_move_things_with_their_pixels(pools):
    images, rows = pools[0]
    for seed in range(4):
        new = flipped(images, rows, np.random.default_rng(seed))
        for old, picture, before, after in zip(images, new.images, rows, new.rows):
            turned = [old, old[:, ::-1], old[::-1], old[::-1, ::-1]]
            which = [k for k, t in enumerate(turned) if (t == picture).all()]
            there = before[:, 0] >= 0
            mirrored = [before[there, X], SIDE - before[there, X]][which[0] % 2], [before[there, Y], SIDE - before[there, Y]][which[0] // 2]
            assert len(which) == 1 and np.allclose(after[there, X], mirrored[0]) and np.allclose(after[there, Y], mirrored[1])
            assert (after[~there] == -1).all() and (after[:, AREA] == before[:, AREA]).all()
    assert (images == draw_pool("scenes", 24, progress=False).images).all()  # the originals stay


def test_batches_depend_on_the_generator_alone(pools):
    a, b, c = (batch_of(pools_at(FIRST, *pools), np.random.default_rng((1, k)), 12) for k in (5, 5, 6))
    assert a.sentences == b.sentences and (a.images == b.images).all() and (a.true == b.true).all()
    assert a.sentences != c.sentences and a.true.shape == (12, 36) and not (a.true & a.false).any() and not (a.close & ~a.false).any()
    assert {w for s in batch_of(pools_at(FIRST, *pools), np.random.default_rng(0), 12, slips=1.).sentences for w in s.split()} == {"unknown"}


def test_what_is_undecided_has_no_gradient():
    logits = torch.randn(5, 7, requires_grad=True)
    true, false = torch.rand(5, 7) < .3, torch.rand(5, 7) < .5
    true[0, 0], false[0, 1] = True, True
    false &= ~true
    close = false & (torch.rand(5, 7) < .5)
    pair_loss(logits, true, false, close)[0].backward()
    assert (logits.grad[~(true | false)] == 0).all() and (logits.grad[true] < 0).all() and (logits.grad[false] > 0).all()
    assert logits.grad[true].abs().sum() <= .5 and logits.grad[false].abs().sum() <= .5


def test_pictures_and_sentences_do_not_see_each_other(pools):
    learner, images = Contrast(fresh_towers(3)).eval(), pools[0].images[:6]
    said = ["the red circle", "a star", "large blue one to the left of the small green square"]
    compare = lambda images, said: learner(encode_pictures(learner.model, normalise(images)), encode_words(learner.model, word_ids(said)))
    with torch.no_grad():
        whole, part = compare(images, said)
        for b, k in ((0, 1), (5, 2), (3, 0)):
            one, two = compare(images[b:b + 1], said[k:k + 1])
            assert torch.allclose(one[0, 0], whole[b, k], atol=1e-5) and torch.allclose(two[0, 0], part[b, k], atol=1e-4)


def test_a_stopped_run_ends_like_one_that_was_not(tmp_path, pools):
    once = run(tmp_path / "once", pools)
    for stop in (1, 3): run(tmp_path / "parts", pools, stop=stop)
    assert (tmp_path / "parts" / "state.safetensors").exists()
    parts = run(tmp_path / "parts", pools)
    assert all(torch.equal(a, b) for a, b in zip(once.state_dict().values(), parts.state_dict().values()))
    assert not (tmp_path / "parts" / "state.safetensors").exists()
    before = (tmp_path / "once" / "model.safetensors").stat().st_mtime_ns
    again = run(tmp_path / "once", pools)  # finished: nothing is done
    assert (tmp_path / "once" / "model.safetensors").stat().st_mtime_ns == before
    assert all(torch.equal(a, b) for a, b in zip(once.state_dict().values(), again.state_dict().values()))
    with pytest.raises(BarleriaError, match="another run"): run(tmp_path / "once", pools, seed=1)


def test_broken_and_foreign_states_are_refused(tmp_path, pools):
    run(tmp_path, pools, stop=2)
    state = tmp_path / "state.safetensors"
    whole = state.read_bytes()
    with pytest.raises(BarleriaError, match="another run"): run(tmp_path, pools, seed=1)
    for bad in (b"", whole[:100], whole[:-50], b"\xff" * 64):
        state.write_bytes(bad)
        with pytest.raises(BarleriaError, match="not a whole"): run(tmp_path, pools)
    for meta in (None, {"barleria": "[]"}, {"barleria": "{}"}):
        save_file({"a": torch.zeros(1)}, state, meta)
        with pytest.raises(BarleriaError, match="another run"): run(tmp_path, pools)
    state.write_bytes(whole)
    run(tmp_path, pools)


def test_the_learning_rate_never_leaves_its_range():
    for steps in (1, 2, 5, 24, 3000):
        rates = [rate(s, steps) for s in range(steps)]
        assert min(rates) > 0 and max(rates) <= LR + 1e-12
    assert max(rate(s, 3000) for s in range(3000)) == LR


# ---------------------------------------------------------------- what ships

@pytest.fixture(scope="module")
def shipped():
    try: folder = asset("tiny-clip/config.json").parent
    except BarleriaError: pytest.skip("data/tiny-clip is not there")
    return folder, load_tiny_clip(folder).eval()


def test_the_shipped_files(shipped):
    folder, model = shipped
    assert {p.name for p in folder.iterdir()} >= {"model.safetensors", "config.json", "log.jsonl", "README.md"}
    assert (folder / "model.safetensors").stat().st_size <= 8 * 10**6
    card, log = read_json(folder / "config.json"), [json.loads(l) for l in (folder / "log.jsonl").read_text().splitlines()]
    assert card["ids"] == own_ids() and card["meta"]["last"] == log[-1]
    told = card["meta"]["settings"]
    assert told["pictures"] == list(KINDS.values()) and told["held_out"] == list(HELD_OUT) and told["first"] == FIRST
    assert log[-1]["step"] + 1 == told["steps"] and [r["step"] for r in log] == sorted({r["step"] for r in log})


def test_the_shipped_towers_know_what_the_card_says(shipped):
    _, model = shipped
    known = probe_towers(model, held_out_scenes(40))
    assert min(known["auc"]["colour"]) > .9 and min(known["auc"]["shape"]) > .85 and min(known["auc"]["colour and shape"]) > .85
    assert known["place"]["colour"][0] > 2 * known["place"]["colour"][1]
    assert min(known["order"]["side"]) > .7  # left is not right


def test_unknown_words_say_nothing_new(shipped):
    _, model = shipped
    with torch.no_grad(): a, b, c = encode_words(model, word_ids(["the zebra", "the house", "the circle"]))
    assert torch.equal(a, b) and not torch.allclose(a, c, atol=1e-2)


@pytest.mark.long
def test_the_first_row_of_the_log_can_be_made_again(shipped):
    from barleria_nb.pretrain import Pretraining
    log = [json.loads(l) for l in (shipped[0] / "log.jsonl").read_text().splitlines()]
    pools = [draw_pool(kind, n, workers=2, progress=False) for kind, n in KINDS.items()]
    first = Pretraining(pools, HELD_OUT, 64, 3200, 0)
    row = first.step(0)
    for k, v in row.items(): assert np.isclose(v, log[0][k], atol=2e-3), k
    found = first.check(0)
    for k, v in log[0]["scenes"].items(): assert np.allclose(found["scenes"][k], v, atol=2e-2), k
    assert all(np.isclose(found[k], log[0][k], atol=2e-2) for k in found if k.startswith("val_"))
