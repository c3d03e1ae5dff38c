"Self-distillation of tiny-dino: its parts, its files, its resumption, and what ships."
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from barleria_nb.backbones import build_tiny_dino, load_tiny_clip, load_tiny_dino, tiny_dino
from barleria_nb.core import BarleriaError, asset, read_json, set_seed
from barleria_nb.data import normalise
from barleria_nb.distil import (HIDE, LIGHT, MOMENTUM, RATE, VIEW, DinoPretraining, Distillation, bridge, centre_probe, cross_entropy, effective_rank, entropy, hidden_patches,
                                linear_probe, pace, patch_features, patch_labels, patch_weights, pretrain_dino, probe_patches, readable, recall, sinkhorn, stand_out, tokens, views)
from barleria_nb.pretrain import HELD_OUT, KINDS, _draw_one, draw_pool, held_out_scenes, small_picture, thing_rows
from common import line


@pytest.fixture(scope="module")
def pools(): return [draw_pool(kind, 24, progress=False) for kind in KINDS]


def run(out, pools, **changes):
    return pretrain_dino(out, pools, **{**dict(steps=4, size=2, held_out=(8, 8, 8), every=1, progress=False), **changes})


def same(a, b): return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


# ---------------------------------------------------------------- parts

@settings(max_examples=30, deadline=None)
@given(st.integers(2, 40), st.integers(2, 12), st.integers(0, 2**32 - 1), st.sampled_from((.03, .1, 1.)))
def test_tokens_are_shared_out(n, k, seed, temperature):
    scores = torch.from_numpy(np.random.default_rng(seed).uniform(-1, 1, (n, k)))
    few, many = (sinkhorn(scores, temperature, r) for r in (3, 2000))
    for q in (few, many): assert torch.allclose(q.sum(1), torch.ones(n, dtype=q.dtype)) and (q >= 0).all()
    if temperature >= .1: assert torch.allclose(many.sum(0), torch.full((k,), n / k, dtype=many.dtype), rtol=1e-2)  # a small temperature takes longer
    assert torch.allclose(sinkhorn(scores + 5, temperature), few)  # only differences count
    order = torch.randperm(n)
    assert torch.allclose(sinkhorn(scores[order], temperature), few[order])


def test_a_constant_teacher_has_no_opinion():
    scores = torch.zeros(30, 6)
    scores[:, 2] = 1
    assert torch.allclose(sinkhorn(scores, .03), torch.full((30, 6), 1 / 6))


def test_cross_entropy_by_hand():
    target, scores = torch.tensor([[1., 0.], [.5, .5]]), torch.tensor([[.2, 0.], [0., 0.]])
    assert torch.allclose(cross_entropy(target, scores), torch.tensor([math.log(1 + math.exp(-2)), math.log(2)]), atol=1e-6)
    assert entropy(target) == pytest.approx(math.log(2) / 2, abs=1e-6)


def test_every_view_counts_alike(pools):
    hidden = hidden_patches(normalise(pools[0].images[:6]), np.random.default_rng(0))
    weights = patch_weights(hidden)
    parts = torch.zeros(6).index_add_(0, hidden.nonzero()[:, 0], weights)
    assert torch.allclose(parts, torch.full((6,), 1 / 6))


def test_the_teacher_follows():
    pupil = Distillation(build_tiny_dino(), 8)
    with torch.no_grad():
        for p in pupil.student.parameters(): p.normal_()
    before = [p.clone() for p in pupil.teacher.parameters()]
    pupil.follow(.9)
    for old, new, p in zip(before, pupil.teacher.parameters(), pupil.student.parameters()): assert torch.allclose(new, .9 * old + .1 * p, atol=1e-6)
    assert not any(p.requires_grad for p in pupil.teacher.parameters())


def test_what_is_hidden(pools):
    for kind in pools:
        x = normalise(kind.images)
        hidden = hidden_patches(x, np.random.default_rng(3))
        share = hidden.float().mean(1)
        assert hidden.shape == (24, 64) and share.min() >= HIDE[0] and share.max() < HIDE[1] + 9 / 64
        assert torch.equal(hidden, hidden_patches(x, np.random.default_rng(3))) and not torch.equal(hidden, hidden_patches(x, np.random.default_rng(4)))
    x = torch.zeros(1, 3, 64, 64)
    x[..., 24:32, 40:48] = 1.
    assert stand_out(x)[0].nonzero().tolist() == [[3 * 8 + 5]]


def test_a_hidden_patch_has_no_influence(pools):
    tower, x = build_tiny_dino().eval(), normalise(pools[0].images[:3])
    hidden = hidden_patches(x, np.random.default_rng(0))
    other = torch.where(hidden.view(3, 1, 8, 8).repeat_interleave(8, 2).repeat_interleave(8, 3), torch.randn_like(x), x)
    with torch.no_grad():
        a, b, c = tokens(tower, x, hidden, torch.zeros(96)), tokens(tower, other, hidden, torch.zeros(96)), tokens(tower, x)
        assert torch.allclose(a, b, atol=1e-5) and not torch.allclose(a, c, atol=1e-2)
        assert torch.allclose(c, tower.forward_features(x), atol=1e-5) and c.shape == (3, 69, 96)


def test_views_keep_colours(pools):
    images = pools[2].images
    x = views(images, np.random.default_rng(0))
    assert x.shape == (24, 3, 64, 64) and torch.equal(x, views(images, np.random.default_rng(0)))
    grey = np.full((50, 64, 64, 3), (200, 100, 50), np.uint8)
    y = views(grey, np.random.default_rng(1)) - normalise(grey[:1] * 0)
    ratio = (y / (normalise(grey[:1]) - normalise(grey[:1] * 0))).flatten(1)
    assert (ratio.amax(1) - ratio.amin(1)).max() < 1e-4  # one factor for all pixels and channels
    assert 1 - LIGHT <= ratio.min() < 1 < ratio.max() <= 1 + LIGHT and 0 < VIEW < 1


def test_the_pace():
    for steps in (1, 2, 24, 3500):
        lr, m = np.array([pace(s, steps) for s in range(steps)]).T
        assert 0 < lr.min() and lr.max() <= RATE and MOMENTUM <= m.min() and m.max() <= 1 and (np.diff(m) >= 0).all()


def test_a_batch_depends_on_seed_and_step_alone(pools):
    a, b, c = (DinoPretraining(pools, (8, 8, 8), 3, 9, seed) for seed in (0, 0, 1))
    assert all(torch.equal(x, y) for x, y in zip(a.batch(5), b.batch(5)))
    assert not torch.equal(a.batch(5)[0], b.batch(6)[0]) and not torch.equal(a.batch(5)[0], c.batch(5)[0])
    assert len(a.images) == 3 * 16 and a.batch(0)[0].shape == (6, 3, 64, 64)


# ---------------------------------------------------------------- files

def test_a_stopped_run_ends_like_one_that_was_not(tmp_path, pools):
    once = run(tmp_path / "once", pools)
    for stop in (1, 3): run(tmp_path / "parts", pools, stop=stop)
    assert (tmp_path / "parts" / "state.safetensors").exists()
    parts = run(tmp_path / "parts", pools)
    assert same(once, parts) and not (tmp_path / "parts" / "state.safetensors").exists()
    assert sorted(p.name for p in (tmp_path / "parts").iterdir()) == ["config.json", "log.jsonl", "model.safetensors"]
    before = (tmp_path / "once" / "model.safetensors").stat().st_mtime_ns
    assert same(run(tmp_path / "once", pools), once)  # finished: nothing is done
    assert (tmp_path / "once" / "model.safetensors").stat().st_mtime_ns == before
    line(lambda: run(tmp_path / "once", pools, seed=1), "another run", tmp_path / "once")


def test_broken_and_foreign_states_are_refused(tmp_path, pools):
    run(tmp_path, pools, stop=1)
    state = tmp_path / "state.safetensors"
    whole = state.read_bytes()
    line(lambda: run(tmp_path, pools, seed=1), "another run", state)
    for bad in (b"", whole[:100], whole[:-50], b"\xff" * 64):
        state.write_bytes(bad)
        line(lambda: run(tmp_path, pools), "not a whole", state)
    for meta in (None, {"barleria": "[]"}, {"barleria": "{}"}):
        save_file({"a": torch.zeros(1)}, state, meta)
        line(lambda: run(tmp_path, pools), "another run")


def test_settings_that_cannot_be(tmp_path, pools):
    for wrong in (dict(steps=0), dict(size=1), dict(every=0)): line(lambda: run(tmp_path, pools, **wrong), "give at least one step")
    line(lambda: run(tmp_path, pools, held_out=(8, 24, 8)), "leave some to learn from")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- what ships

@pytest.fixture(scope="module")
def shipped():
    try: folder = asset("tiny-dino/config.json").parent
    except BarleriaError: pytest.skip("data/tiny-dino is not there")
    return folder, load_tiny_dino(folder).eval()


@pytest.fixture(scope="module")
def judges():
    scenes = held_out_scenes(100)
    return scenes, np.stack([small_picture(s.image) for s in scenes])


def test_the_shipped_files(shipped):
    folder, _ = shipped
    assert {p.name for p in folder.iterdir()} >= {"model.safetensors", "config.json", "log.jsonl", "README.md"}
    assert sum(p.stat().st_size for p in folder.iterdir()) <= 8 * 10**6
    card, log = read_json(folder / "config.json"), [json.loads(l) for l in (folder / "log.jsonl").read_text().splitlines()]
    told = card["meta"]["settings"]
    assert card["meta"]["last"] == log[-1] and log[-1]["step"] + 1 == told["steps"] and [r["step"] for r in log] == sorted({r["step"] for r in log})
    assert told["pictures"] == list(KINDS.values()) and told["held_out"] == list(HELD_OUT)


def test_the_first_row_of_the_log_can_be_made_again(shipped, pools):
    folder, _ = shipped
    first_row, told = json.loads((folder / "log.jsonl").read_text().splitlines()[0]), read_json(folder / "config.json")["meta"]["settings"]
    kept = dict(zip(KINDS, (n - k for n, k in zip(KINDS.values(), HELD_OUT))))

    def picture(i):
        for kind, n in kept.items():
            if i < n: return _draw_one((kind, i))[0]
            i -= n

    class Lazy:
        def __len__(self): return sum(kept.values())
        def __getitem__(self, pick): return np.stack([picture(int(i)) for i in pick])

    first = DinoPretraining(pools, (8, 8, 8), told["size"], told["steps"], told["seed"])
    first.images = Lazy()
    for k, v in first.step(0).items(): assert v == pytest.approx(first_row[k], abs=2e-3), k


def test_the_tower_has_not_collapsed(shipped, judges):
    patches = patch_features(shipped[1], judges[1])
    assert effective_rank(patches.flatten(0, 1)) > 4
    spread = patches.flatten(0, 1).std(0)
    assert spread.median() > .1
    log = [json.loads(l) for l in (shipped[0] / "log.jsonl").read_text().splitlines()]
    for part in ("class", "patch"):
        assert log[-1][f"{part}_entropy"] > .5 and log[-1][f"{part}_loss"] < log[0][f"{part}_loss"] - .5


def test_it_knows_more_than_a_random_tower(shipped, judges):
    scenes, images = judges
    set_seed(0)
    labels, rows = patch_labels(scenes), np.stack([thing_rows(s.things) for s in scenes])
    mine, chance = patch_features(shipped[1], images), patch_features(build_tiny_dino().eval(), images)
    a, b = probe_patches(mine, labels), probe_patches(chance, labels)
    assert a["thing"][0] > b["thing"][0] + .02 and a["colour"][0] > b["colour"][0] + .04
    a, b = centre_probe(mine, rows), centre_probe(chance, rows)
    assert a["size"] > b["size"] + .08 and a["colour"] > b["colour"] + .04


def test_no_sentence_can_read_it_and_a_linear_map_can(shipped, judges):
    scenes, images = judges
    clip = load_tiny_clip(asset("tiny-clip/config.json").parent).eval()
    patches = patch_features(shipped[1], images)
    before = readable(F.normalize(patches, dim=-1)[50:], scenes[50:], clip)
    assert .4 < np.mean(list(before.values())) < .6
    after = readable(bridge(patches[:50], scenes[:50], clip)(patches[50:]), scenes[50:], clip)
    assert after["colour"][1] > .9 and after["both"][1] > .85


def test_it_runs_beside_the_text_tower(shipped):
    encoder = tiny_dino()
    x = torch.randn(2, 3, 64, 64)
    ids = torch.tensor([[49406, 320, 736, 49407], [49406, 320, 49407, 0]])
    with torch.no_grad(): seen = encoder(x, ids, ids > 0)
    assert torch.allclose(seen.taps[-1].flatten(2).transpose(1, 2), tokens(shipped[1], x)[:, 5:], atol=1e-4)


# ---------------------------------------------------------------- probes

def test_probes_find_what_is_there():
    g = torch.Generator().manual_seed(0)
    y = torch.arange(400) % 4
    x = torch.randn(400, 10, generator=g) + 3 * F.one_hot(y, 10)
    assert recall(linear_probe(x[:200], y[:200])(x[200:]), y[200:]) > .9
    noise = torch.randn(4000, 10, generator=g)
    assert recall(linear_probe(noise[:2000], torch.arange(2000) % 4)(noise[2000:]), torch.arange(2000) % 4) < .32
    always = F.one_hot(torch.zeros(200, dtype=torch.long), 4).float()
    assert recall(always, torch.tensor([0] * 197 + [1, 2, 3])) == pytest.approx(.25)  # the commonest class alone is chance


def test_labels_come_from_masks():
    scenes = held_out_scenes(3)
    labels = patch_labels(scenes)
    for b, s in enumerate(scenes):
        for n in (9, 27, 44):
            y, x = divmod(n, 8)
            cover = [t.mask[16 * y:16 * y + 16, 16 * x:16 * x + 16].mean() for t in s.things]
            assert labels["thing"][b, n] == (sum(cover) >= .5)
            best = s.things[int(np.argmax(cover))]
            expected = ["circle", "square", "triangle", "star", "cross", "diamond"].index(best.shape) if max(cover) >= .25 else -1
            assert labels["shape"][b, n] == expected
