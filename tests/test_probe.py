"Minimal pairs: the same everywhere, each sentence proven, each pair a word apart; verdicts that a loop over pixels confirms."
import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from barleria_nb.data import Letterbox, normalise, tokenize
from barleria_nb.probe import KINDS, Pair, answer_pairs, answered, judge, minimal_pairs, probe, probe_table, yardsticks
from barleria_nb.shapes import COLOURS, SCENES, SHAPES, SIDE, VOCABULARY, records, resolve
from common import line

HASH = "5201f93b53e1329630d3cc96d1b7ba6c6e2ae2003a0dd516c48f81eb67b0ea2a"
FIRST = 100_001  # image id of the first val scene
OPPOSITES = {frozenset(p) for p in (("left", "right"), ("leftmost", "rightmost"), ("top", "bottom"), ("topmost", "bottommost"), ("small", "large"), ("biggest", "smallest"),
                                    ("largest", "smallest"), ("above", "below"))}
ALLOWED = dict(side={"left", "right", "leftmost", "rightmost", "top", "bottom", "topmost", "bottommost"}, colour=set(COLOURS), size={"small", "large", "biggest", "largest", "smallest"},
               relation={"left", "right", "above", "below"}, shape=set(SHAPES), mirror={"left", "right", "leftmost", "rightmost"})


@pytest.fixture(scope="module")
def pairs(): return minimal_pairs("val", 20)


def key(pair): return pair.kind, pair.scene.image_id, pair.sentences, pair.targets


def of(pairs, kind): return [p for p in pairs if p.kind == kind]


def turned(ann): return ann | dict(bbox=[SIDE - ann["bbox"][0] - ann["bbox"][2], *ann["bbox"][1:]])


class Table(nn.Module):
    "A model that has learnt the answers by heart: a mask for each picture and sentence, at the square's own resolution."

    def __init__(self, pairs, masks, length=17):
        super().__init__()
        self.known, self.calls, self.inner = {}, [], nn.Dropout(.5)
        for p, two in zip(pairs, masks):
            ids = tokenize(list(p.sentences), length).ids
            for half, mask in enumerate(two): self.known[self.name(normalise(p.image(half)[None])[0], ids[half])] = torch.as_tensor(np.ascontiguousarray(mask))

    @staticmethod
    def name(image, ids): return image.numpy().tobytes(), tuple(ids.tolist())

    def forward(self, images, ids, words):
        self.calls.append((len(ids), self.training, self.inner.training, torch.is_inference_mode_enabled()))
        return torch.stack([20. * self.known[self.name(i, w)] - 10 for i, w in zip(images, ids)])[:, None]


def truths(pairs): return [[p.truth(h) for h in (0, 1)] for p in pairs]
def largest(pairs): return [[p.things(h)[p.biggest] for h in (0, 1)] for p in pairs]


# ---------------------------------------------------------------- the pairs

def test_the_same_everywhere(pairs):
    assert {k: len(of(pairs, k)) for k in KINDS} == dict.fromkeys(KINDS, 20)
    said = "\n".join(f"{kind} {image} {' | '.join(sentences)} {targets}" for kind, image, sentences, targets in map(key, pairs))
    assert hashlib.sha256(said.encode()).hexdigest() == HASH
    assert [key(p) for p in minimal_pairs(n=20)] == [key(p) for p in pairs]


def test_fewer_pairs_are_the_first_ones_and_kinds_do_not_meddle(pairs):
    some = minimal_pairs("val", 7, ("mirror", "side"))
    assert [key(p) for p in some] == [key(p) for k in ("side", "mirror") for p in of(pairs, k)[:7]]
    assert [key(p) for p in minimal_pairs("val", 3, "shape")] == [key(p) for p in of(pairs, "shape")[:3]]
    for k in KINDS: assert len({p.scene.image_id for p in of(pairs, k)}) == 20  # one from a scene


@pytest.mark.parametrize("split", ["val", "testA", "testB"])
def test_each_sentence_means_its_thing_and_no_other(split, pairs):
    first = dict(val=100_001, testA=200_001, testB=300_001)[split]
    for p in pairs if split == "val" else minimal_pairs(split, 6):
        scene, _, anns, _ = records(split, p.scene.image_id - first)
        assert np.array_equal(scene.image, p.scene.image)
        for half, s in enumerate(p.sentences):
            shown = [turned(a) for a in anns] if p.kind == "mirror" and half else anns
            assert resolve(s, shown) == [anns[p.targets[half]]["id"]], (p, s)
            assert set(s.split()) <= set(VOCABULARY)
            assert np.array_equal(p.truth(half)[:, ::-1] if p.kind == "mirror" and half else p.truth(half), scene.things[p.targets[half]].mask)


def test_one_word_apart(pairs):
    for p in pairs:
        a, b = (s.split() for s in p.sentences)
        assert len(a) == len(b)
        changed = [{x, y} for x, y in zip(a, b) if x != y]
        assert len(changed) == 1 and changed[0] <= ALLOWED[p.kind]
        if p.kind not in ("colour", "shape"): assert changed[0] in OPPOSITES
        assert (p.targets[0] == p.targets[1]) == (p.kind == "mirror")


def test_relations_are_said_of_a_landmark_and_sides_are_not(pairs):
    for p in pairs:
        related = any(cue in s for s in p.sentences for cue in (" left of ", " right of ", " above ", " below "))
        assert related == (p.kind == "relation")


def test_margins_hold_without_the_grammar(pairs):
    "A box moved by three pixels changes no meaning of side, relation or mirror; a tenth more or less area none of size."
    for p in pairs:
        _, _, anns, _ = records("val", p.scene.image_id - FIRST)
        for half, s in enumerate(p.sentences):
            if p.kind == "mirror" and half: continue
            wanted = anns[p.targets[half]]["id"]
            for a in anns:
                rest = [b for b in anns if b is not a]
                if p.kind == "size" and set(s.split()) & {"biggest", "largest", "smallest"}:
                    for f in (.9, 1.1): assert resolve(s, rest + [a | dict(area=a["area"] * f)]) == [wanted]
                if p.kind in ("side", "mirror"):
                    for dx, dy in ((3, 0), (-3, 0), (0, 3), (0, -3)):
                        x, y, w, h = a["bbox"]
                        assert resolve(s, rest + [a | dict(bbox=[x + dx, y + dy, w, h])]) == [wanted]


def test_mirror_truth_is_exact(pairs):
    for p in of(pairs, "mirror"):
        assert np.array_equal(p.image(1), p.image(0)[:, ::-1]) and np.array_equal(p.truth(1), p.truth(0)[:, ::-1])
        assert np.array_equal(p.things(1)[:, :, ::-1], p.things(0)) and p.image(1).flags.c_contiguous
        swap = dict(left="right", right="left", leftmost="rightmost", rightmost="leftmost")
        assert p.sentences[1].split() == [swap.get(w, w) for w in p.sentences[0].split()] and p.sentences[0] != p.sentences[1]
        assert p.targets[0] == p.targets[1] != p.biggest
        _, _, anns, _ = records("val", p.scene.image_id - FIRST)
        assert resolve(p.sentences[1], anns) != [anns[p.targets[0]]["id"]]  # the word matters
    for p in pairs:
        if p.kind != "mirror": assert np.array_equal(p.image(0), p.image(1))


def test_as_many_as_there_are():
    found = minimal_pairs("testA", SCENES["testA"] + 5, "colour")
    assert 100 <= len(found) <= SCENES["testA"] and found[-1].scene.image_id <= 200_000 + SCENES["testA"]


# ---------------------------------------------------------------- verdicts

def slow_answered(mask, things):
    "By loops."
    best, which = 0, None
    for k, t in enumerate(things):
        both = sum(bool(a) and bool(b) for a, b in zip(mask.ravel(), t.ravel()))
        either = sum(bool(a) or bool(b) for a, b in zip(mask.ravel(), t.ravel()))
        if both and both / either > best: best, which = both / either, k
    return which


def test_answered_agrees_with_a_loop():
    rng = np.random.default_rng(0)
    for _ in range(60):
        owner, mask = rng.integers(-1, 3, (5, 6)), rng.random((5, 6)) < rng.choice([0, .1, .5])
        things = [owner == k for k in range(3)]
        assert answered(mask, things) == slow_answered(mask, things)
    assert answered(np.zeros((2, 2), bool), [np.zeros((2, 2), bool)]) is None
    assert answered(np.ones((2, 2), int), [np.eye(2, dtype=bool), np.eye(2, dtype=bool)]) == 0  # the first of two alike


def test_verdicts_by_hand(pairs):
    "One pair of each kind and every way to answer."
    for kind in KINDS:
        p, empty = of(pairs, kind)[4], np.zeros((SIDE, SIDE), bool)
        ways = [*range(len(p.scene.things)), None]
        for x in ways:
            for y in ways:
                masks = [empty if k is None else p.things(h)[k] for h, k in enumerate((x, y))]
                r = judge([p], [masks])[kind]
                hits = (x == p.targets[0]) + (y == p.targets[1])
                wanted = dict(n=1, right=hits == 2, one=hits == 1, none=((x is None) + (y is None)) / 2, biggest=((x == p.biggest) + (y == p.biggest)) / 2, mIoU=hits / 2)
                wanted |= dict(agreement=float(x == y)) if kind == "mirror" else dict(same=x == y and x is not None)
                assert r == wanted


def test_oracle_and_blind_through_the_model_road(pairs):
    "At the square's own resolution nothing is lost, so a model that knows the answers must get what the masks themselves get."
    oracle, blind = (probe(Table(pairs, masks), pairs, size=SIDE) for masks in (truths(pairs), largest(pairs)))
    yards = yardsticks(pairs)
    assert oracle == yards["truth"] and blind == yards["largest thing"]
    assert list(oracle) == ["side", "colour", "size", "relation", "shape", "all", "mirror"]
    for kind, r in oracle.items(): assert (r["right"], r["one"], r["none"], r["mIoU"]) == (1, 0, 0, 1) and r["n"] == (100 if kind == "all" else 20)
    for kind, r in blind.items():
        assert (r["right"], r["none"], r["biggest"]) == (0, 0, 1)
        assert r["mIoU"] == pytest.approx(r["one"] / 2)
        assert r["agreement" if kind == "mirror" else "same"] == 1
    for kind in KINDS: assert ("same" in oracle[kind], "agreement" in oracle[kind]) == (kind != "mirror", kind == "mirror")


def test_a_random_thing_is_the_mean_over_all_ways_to_answer(pairs):
    for p in (of(pairs, "side")[0], of(pairs, "relation")[3], of(pairs, "mirror")[1]):
        expected = yardsticks([p])["random thing"]
        ways = [judge([p], [(x, y)])[p.kind] for x in p.things(0) for y in p.things(1)]
        assert len(ways) == len(p.scene.things) ** 2 and expected[p.kind].keys() == ways[0].keys()
        for k, v in expected[p.kind].items(): assert np.mean([w[k] for w in ways]) == pytest.approx(v)
    several = yardsticks(pairs)["random thing"]
    assert several["side"]["same"] == pytest.approx(np.mean([1 / len(p.scene.things) for p in of(pairs, "side")]))


def test_silent_answers_are_no_thing(pairs):
    r = judge(pairs, [np.zeros((2, SIDE, SIDE), bool)] * len(pairs))
    for kind, row in r.items():
        assert (row["right"], row["one"], row["none"], row["biggest"], row["mIoU"]) == (0, 0, 1, 0, 0)
        assert row["agreement"] == 1 if kind == "mirror" else row["same"] == 0


def test_all_is_made_of_the_kinds_without_the_mirror(pairs):
    few = of(pairs, "mirror")[:3]
    assert list(judge(few, truths(few))) == ["mirror"]
    some = of(pairs, "side")[:1] + of(pairs, "shape")[:3] + few
    r = judge(some[::-1], largest(some)[::-1])
    assert r["all"]["n"] == 4 and r["all"]["one"] == pytest.approx((r["side"]["one"] + 3 * r["shape"]["one"]) / 4)


# ---------------------------------------------------------------- asking

class Small(nn.Module):
    "A random model that reads both picture and words, one item at a time as far as the numbers go."

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.see, self.drop, self.norm = nn.Embedding(49408, 8), nn.Conv2d(3, 8, 4, 4), nn.Dropout(.5), nn.BatchNorm2d(8)
        self.norm.eval()  # frozen, as towers are

    def forward(self, images, ids, words):
        spoken = (self.words(ids) * words[..., None]).sum(1)
        return (self.drop(self.norm(self.see(images))) * spoken[:, :, None, None]).sum(1, keepdim=True)


def test_batches_do_not_matter(pairs):
    few = [p for p in pairs if p.kind in ("side", "mirror")][::4]
    model = Small()
    whole = answer_pairs(model, few, size=32, batch=1000)
    for b in (1, 3, 7):
        for x, y in zip(answer_pairs(model, few, size=32, batch=b), whole): assert (x != y).mean() < 1e-3
    one = [answer_pairs(model, [p], size=32)[0] for p in few]
    assert np.mean([x != y for x, y in zip(one, whole)]) < 1e-3
    assert all(m.shape == (2, SIDE, SIDE) and m.dtype == bool for m in whole) and .05 < np.mean(whole) < .95


def test_batches_of_a_table_are_exact(pairs):
    masks = truths(pairs[:9])
    for b in (1, 4, 64):
        model = Table(pairs[:9], masks)
        assert np.array_equal(answer_pairs(model, pairs[:9], size=SIDE, batch=b), masks)
        assert [c[0] for c in model.calls] == [min(b, 18 - k) for k in range(0, 18, b)]


def test_modes_are_put_back_and_nothing_is_recorded(pairs):
    model = Table(pairs[:2], truths(pairs[:2]))
    for top, inner in ((True, True), (True, False), (False, True), (False, False)):
        model.training, model.inner.training = top, inner
        probe(model, pairs[:2], size=SIDE)
        assert (model.training, model.inner.training) == (top, inner)
    assert {c[1:] for c in model.calls} == {(False, False, True)}
    model.train(), model.inner.eval()
    model.known.clear()
    with pytest.raises(KeyError): probe(model, pairs[:2], size=SIDE)
    assert model.training and not model.inner.training
    probe(lambda images, ids, words: images[:, :1], pairs[:2], size=32)  # a plain function will do


def test_the_threshold_is_used_and_the_way_back_is_the_letterboxs(pairs):
    few, seen = pairs[:3], []
    half = lambda images, ids, words: torch.zeros(len(ids), 1, 8, 8)
    assert not np.any(answer_pairs(half, few, size=32, threshold=.51)) and np.all(answer_pairs(half, few, size=32, threshold=.49))
    def ramp(images, ids, words):
        seen.append((images, ids, words))
        return torch.linspace(-3, 3, 16).expand(len(ids), 1, 16, 16)
    got = answer_pairs(ramp, few, size=48)
    want = Letterbox(SIDE, SIDE, 48).inverse(torch.linspace(-3, 3, 16).expand(16, 16).sigmoid()) > .35
    for m in got: assert np.array_equal(m, [want.numpy()] * 2)
    images, ids, words = seen[0]
    tokens = tokenize([s for p in few for s in p.sentences])
    assert images.shape == (6, 3, 48, 48) and torch.equal(ids, tokens.ids) and torch.equal(words, tokens.words)
    assert torch.equal(images[4], normalise(Letterbox(SIDE, SIDE, 48).image(few[2].image(0))[None])[0])


# ---------------------------------------------------------------- the table

def test_table(pairs):
    yards = yardsticks(pairs)
    rows = [l.split() for l in probe_table(yards).splitlines()]
    assert rows[0] == ["%", "n", "right", "one", "same", "none", "biggest", "mIoU", "agreement"] and len(rows) == 1 + 7 * 3
    assert rows[3] == ["truth", "20", "100.0", "0.0", "0.0", "0.0", f"{100 * yards['truth']['side']['biggest']:.1f}", "100.0", "–"]
    assert [r[0] for r in rows[1::3]] == ["side", "colour", "size", "relation", "shape", "all", "mirror"]
    assert len({len(l) for l in probe_table(yards).splitlines()}) == 1
    part = probe_table(dict(full=yards["truth"], half={"side": yards["truth"]["side"]}))
    assert sum("half" in l for l in part.splitlines()) == 1


# ---------------------------------------------------------------- mistakes

def test_mistakes_in_what_is_asked_for():
    line(lambda: minimal_pairs("train"), "train", "val, testA, testB")
    line(lambda: minimal_pairs("testa", 1), "testa", "Did you mean", "testA")
    line(lambda: minimal_pairs(["val"], 1), "val")
    line(lambda: minimal_pairs(None, 1), "None")
    line(lambda: minimal_pairs("val", 1, "colur"), "colur", "Did you mean colour")
    line(lambda: minimal_pairs("val", 1, ["side", 3]), "3", "mirror")
    line(lambda: minimal_pairs("val", 1, []), "kind")
    line(lambda: minimal_pairs("val", 1, 3), "3")
    for n in (0, -1, 1.5, "2", True, None, float("nan")): line(lambda: minimal_pairs("val", n), repr(n), "1 or more")


def test_mistakes_in_pairs_and_masks(pairs):
    for f in (lambda p: probe(None, p, size=64), lambda p: judge(p, []), yardsticks, lambda p: answer_pairs(None, p, size=64)):
        line(lambda: f([]), "no pair", "minimal_pairs")
        line(lambda: f(["a"]), "str")
        line(lambda: f(None), "NoneType")
        line(lambda: f(pairs[0]), "Pair")
    for bad in (truths(pairs[:1]), [t[:1] for t in truths(pairs[:2])], truths(pairs[:3]), [None, None], None, 3, []): line(lambda: judge(pairs[:2], bad), "2 pairs", "two masks")
    line(lambda: judge(pairs[:1], np.zeros((1, 2, 5, 5), bool)), "own size")
    line(lambda: judge(pairs[:1], np.zeros((1, 2, SIDE, SIDE))), "0 and 1")
    line(lambda: probe_table({}), "no result")


def test_mistakes_in_asking(pairs):
    few, ask = pairs[:2], lambda **k: answer_pairs(Small(), few, **dict(size=32) | k)
    for t in (-.1, 1.1, float("nan")): line(lambda: ask(threshold=t), t)
    for b in (0, -3, 2.5, True, None): line(lambda: ask(batch=b), repr(b))
    line(lambda: ask(length=4), "word pieces", "larger length")
    line(lambda: ask(length=2), "2")
    line(lambda: ask(size=0), "0")
    for bad in (torch.zeros(4, 16, 16), torch.zeros(4, 2, 16, 16), torch.zeros(3, 1, 16, 16), torch.zeros(4, 1, 16, 8), None, torch.zeros(4, 1, 0, 0)):
        line(lambda: answer_pairs(lambda images, ids, words: bad, few, size=32), "(4, 1, h, h)")
    line(lambda: answer_pairs(lambda *a: torch.full((4, 1, 8, 8), float("nan")), few, size=32), "not finite")
    odd = replace(few[0], scene=replace(few[0].scene, image=few[0].scene.image[:50]))
    line(lambda: answer_pairs(Small(), [odd], size=32), "128×128")
    assert isinstance(odd, Pair)
