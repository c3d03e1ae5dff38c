"Scores: counted in whole numbers, on the image's own pixels, whatever the order, the batch size or the number of workers."
import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from barleria_nb.core import BarleriaError
from barleria_nb.data import Letterbox, RefSet, decode_mask
from barleria_nb.metrics import (_alike, _counted, Scores, above, counts, evaluate, grid_ceiling, iou, largest_object_baseline, mean_iou, overall_iou, precision_at,
                                 random_object_baseline)

SHARED = Path(__file__).resolve().parents[2] / "shared"
settings.register_profile("calm", deadline=None, max_examples=60)
settings.load_profile("calm")

sides = st.integers(1, 12)
two_masks = st.tuples(sides, sides).flatmap(lambda s: st.tuples(hnp.arrays(bool, s), hnp.arrays(bool, s)))
pairs = st.tuples(st.integers(0, 200), st.integers(0, 200)).map(lambda p: (min(p), max(p)))
records = st.dictionaries(st.integers(0, 1000), pairs, min_size=1, max_size=40).map(lambda d: [(k, *v) for k, v in d.items()])


# ---------------------------------------------------------------- counting

@given(two_masks)
def test_counts_agree_with_a_loop_over_pixels(masks):
    p, t = masks
    both = sum(bool(a) and bool(b) for a, b in zip(p.ravel(), t.ravel()))
    either = sum(bool(a) or bool(b) for a, b in zip(p.ravel(), t.ravel()))
    assert counts(p, t) == counts(t, p) == counts(torch.from_numpy(p), t.astype(np.uint8)) == (both, either)
    assert all(type(n) is int for n in counts(p, t))
    assert 0 <= iou(both, either) <= 1 and (iou(both, either) == 1) == bool((p == t).all())


def test_counts_refuse_what_is_not_a_mask():
    ones = np.ones((2, 3), np.uint8)
    for bad in (ones * 2, ones * 255, ones.astype(np.float32), -ones.astype(np.int8)):
        with pytest.raises(BarleriaError, match="0 and 1"): counts(bad, ones)
        with pytest.raises(BarleriaError, match="0 and 1"): counts(ones, bad)
    with pytest.raises(BarleriaError, match="own size"): counts(ones, ones.T)
    assert counts(ones[:, ::-1], ones) == (6, 6)  # a mirrored array is a mask


boxes = st.tuples(st.integers(0, 20), st.integers(0, 20), st.integers(1, 20), st.integers(1, 20))

@given(st.lists(boxes, min_size=1, max_size=4))
def test_parts_that_overlap_are_united(found):
    polygons, truth = [], np.zeros((40, 40), bool)
    for x, y, w, h in found:
        polygons.append([x, y, x + w, y, x + w, y + h, x, y + h])
        truth[y:y + h, x:x + w] = True
    mask = decode_mask(polygons, 40, 40)
    assert mask.max() == 1
    assert counts(mask, truth) == (truth.sum(), truth.sum())


# ---------------------------------------------------------------- the three scores

def test_thresholds_are_exact_for_every_small_fraction():
    for U in range(1, 61):
        for I in range(U + 1):
            for k in range(5, 10): assert above(I, U, k) == (Fraction(I, U) > Fraction(k, 10)), (I, U, k)


def test_the_boundary_is_not_above():
    assert not above(3, 5, 6) and not above(6, 10, 6) and above(61, 100, 6)
    assert precision_at(6, [(3, 5)]) == 0 and precision_at(5, [(3, 5)]) == 1
    large = 10**15  # where I / U in floating point could not tell
    assert above(6 * large + 1, 10 * large, 6) and not above(6 * large, 10 * large, 6)


def test_two_empty_masks_agree():
    nothing = np.zeros((3, 3), bool)
    assert counts(nothing, nothing) == (0, 0)
    assert Scores([(1, 0, 0)]).summary() == {"mIoU": 1, "oIoU": 1, **{f"Pr@0.{k}": 1 for k in range(5, 10)}, "n": 1}
    assert overall_iou([(0, 0), (1, 4)]) == .25  # adds no pixel to either sum


def test_nothing_to_score_is_an_error():
    for f in (mean_iou, overall_iou, lambda p: precision_at(5, p), lambda p: Scores(p).summary()):
        with pytest.raises(BarleriaError, match="nothing to score"): f([])
    for k in (.5, -1, 10, "5"):
        with pytest.raises(BarleriaError, match="tenths"): precision_at(k, [(1, 2)])


@given(records)
def test_summary_agrees_with_numpy(found):
    I, U = np.array([r[1] for r in found], float), np.array([r[2] for r in found], float)
    each = np.where(U > 0, I / np.maximum(U, 1), 1)
    s = Scores(found).summary()
    assert s["n"] == len(found)
    assert s["mIoU"] == pytest.approx(each.mean(), abs=1e-12)
    assert s["oIoU"] == pytest.approx(I.sum() / U.sum() if U.sum() else 1, abs=1e-12)
    hits = [s[f"Pr@0.{k}"] for k in range(5, 10)]
    assert hits == sorted(hits, reverse=True)
    assert hits == [np.mean([Fraction(i, u) > Fraction(k, 10) if u else True for _, i, u in found]) for k in range(5, 10)]


# ---------------------------------------------------------------- records

@given(records, st.randoms(use_true_random=False), st.integers(1, 5))
def test_order_workers_and_repeats_do_not_matter(found, random, workers):
    whole = Scores(found, "x")
    shuffled = random.sample(found, len(found)) + random.choices(found, k=3)  # padded, as samplers do
    parts = [Scores(shuffled[w::workers], "x") for w in range(workers)]
    merged = sum(parts, Scores(protocol="x"))
    assert merged == whole and merged.records == whole.records and merged.summary() == whole.summary()


def test_contradictions_and_impossible_counts_are_refused():
    scores = Scores([(7, 1, 4)], "one")
    scores.add(7, 1, 4)
    assert len(scores) == 1
    with pytest.raises(BarleriaError, match="sentence 7 .*two runs"): scores.add(7, 2, 4)
    with pytest.raises(BarleriaError, match="two runs"): scores + Scores([(7, 1, 5)], "one")
    with pytest.raises(BarleriaError, match="report them apart"): scores + Scores([(8, 1, 5)], "two")
    for I, U in ((-1, 3), (4, 3), (2.7, 3.9), (float("nan"), 3), (None, 3), ("1", 3)):
        with pytest.raises(BarleriaError, match="cannot be"): scores.add(9, I, U)
        with pytest.raises(BarleriaError, match="cannot be"): mean_iou([(I, U)])
    assert Scores([("b", 1, 2), (3, 1, 2), ("a", 1, 2)]).records == [(3, 1, 2), ("a", 1, 2), ("b", 1, 2)]
    assert scores.records == [(7, 1, 4)]
    assert Scores(json.loads(json.dumps(scores.records)), "one") == scores


# ---------------------------------------------------------------- a model against the truth

SIZES = ((40, 64), (64, 40), (64, 64), (31, 57), (90, 130))


@pytest.fixture(scope="module")
def refset(tmp_path_factory):
    "Five images of odd sizes, each with a bright box, a dark box and a third one that no sentence means."
    folder, rng = tmp_path_factory.mktemp("boxes"), np.random.default_rng(3)
    (folder / "images").mkdir()
    images, notes, refs = [], [], []
    for i, (h, w) in enumerate(SIZES):
        picture = rng.integers(90, 150, (h, w, 3)).astype(np.uint8)
        for j, value in enumerate((250, 5, 200)):
            top, left, a, b = int(rng.integers(0, h // 2)), j * w // 3, h // 3 + j, w // 4 + 1
            if j < 2: picture[top:top + a, left:left + b] = value
            box = [left, top, left + b, top, left + b, top + a, left, top + a]
            notes.append(dict(id=10 * i + j, image_id=i, category_id=1, segmentation=[box], area=a * b, bbox=[left, top, b, a], iscrowd=0))
            said = [dict(sent_id=100 * i + 10 * j + k, sent=s) for k, s in enumerate(["bright box", "the bright one", "white"][:3 - j] if j == 0 else ["dark box"])]
            if j < 2: refs.append(dict(ref_id=10 * i + j, ann_id=10 * i + j, image_id=i, category_id=1, split="val", sentences=said, file_name=f"{i}.png"))
        Image.fromarray(picture).save(folder / "images" / f"{i}.png")
        images.append(dict(id=i, file_name=f"{i}.png", height=h, width=w))
    (folder / "instances.json").write_text(json.dumps(dict(images=images, annotations=notes, categories=[dict(id=1, name="box")])))
    (folder / "refs.json").write_text(json.dumps(refs))
    return RefSet.read(folder)


def brightness(images, ids, words):
    "Logits from brightness, negated for short sentences; element by element, so that no batch can change a bit."
    sign = torch.where(words.sum(1) > 4, 1., -1.)[:, None, None]
    return (3 * sign * images[:, 0, ::4, ::4])[:, None]


def test_every_sentence_once_and_no_batch_matters(refset):
    one = evaluate(brightness, refset, size=64, batch=1, progress=False)
    assert [r[0] for r in one.records] == sorted(s.sent_id for r in refset for s in r.sentences)
    for batch in (3, 64): assert evaluate(brightness, refset, size=64, batch=batch, progress=False) == one
    backward = RefSet(refset.root, refset.refs[::-1], refset.name)
    assert evaluate(brightness, backward, size=64, batch=4, progress=False) == one
    assert refset.name in one.protocol and "0.35" in one.protocol and "64 px" in one.protocol


def test_scores_are_counted_at_the_own_resolution(refset):
    everything = evaluate(lambda images, ids, words: torch.full((len(ids), 1, 16, 16), 9.), refset, size=64, progress=False)
    nothing = evaluate(lambda images, ids, words: torch.full((len(ids), 1, 16, 16), -9.), refset, size=64, progress=False)
    for ref in refset:
        area = int(refset.mask(ref).sum())
        for s in ref.sentences:
            assert everything.pairs[s.sent_id] == (area, ref.height * ref.width)
            assert nothing.pairs[s.sent_id] == (0, area)


def test_the_threshold_is_one_of_the_probability(refset):
    half = lambda images, ids, words: torch.zeros(len(ids), 1, 16, 16)  # sigmoid is one half everywhere
    assert evaluate(half, refset, size=64, threshold=.5001, progress=False).summary()["mIoU"] == 0
    assert evaluate(half, refset, size=64, threshold=.4999, progress=False).summary()["mIoU"] > 0


def test_a_model_is_left_as_it_was(refset):
    class Net(torch.nn.Module):
        def forward(self, images, ids, words):
            assert not self.training and not torch.is_grad_enabled()
            return images[:, :1, ::4, ::4]
    for training in (True, False):
        net = Net().train(training)
        evaluate(net, refset, size=32, progress=False)
        assert net.training is training
    for broken in (float("nan"), float("inf")):
        with pytest.raises(BarleriaError, match="not finite"):
            evaluate(lambda images, ids, words: torch.full((len(ids), 1, 8, 8), broken), refset, size=32, progress=False)


def test_odd_answers_are_refused(refset):
    for shape in ((1, 8, 4), (1, 0, 0), (8, 8), (2, 8, 8)):
        with pytest.raises(BarleriaError, match="are needed"): evaluate(lambda images, ids, words: torch.zeros(len(ids), *shape), refset, size=32, progress=False)
    with pytest.raises(BarleriaError, match="tuple"): evaluate(lambda images, ids, words: (images,), refset, size=32, progress=False)
    for threshold in (float("nan"), -1, 35):
        with pytest.raises(BarleriaError, match="probability"): evaluate(brightness, refset, size=32, threshold=threshold, progress=False)


def test_baselines_on_odd_records(refset, tmp_path):
    "An object of no image and a repeated one change nothing; an image without objects is told."
    content = json.loads((refset.root / "instances.json").read_text())
    content["annotations"] += [dict(id=901, image_id=float("inf")), dict(content["annotations"][0]), "x", dict(id=902, image_id=0.5)]
    (tmp_path / "instances.json").write_text(json.dumps(content))
    (tmp_path / "images").symlink_to(refset.root / "images")
    odd = RefSet(tmp_path, refset.refs, refset.name)
    assert random_object_baseline(odd) == random_object_baseline(refset)
    assert largest_object_baseline(odd) == largest_object_baseline(refset)
    (tmp_path / "instances.json").write_text(json.dumps(dict(content, annotations=[])))
    for baseline in (random_object_baseline, largest_object_baseline):
        with pytest.raises(BarleriaError, match="no object on image 0"): baseline(odd)
    with pytest.raises(BarleriaError, match="nothing to score"): random_object_baseline(RefSet(tmp_path, []))


def test_cut_sentences_are_told(refset):
    assert "sentences cut" in evaluate(brightness, refset, size=32, length=4, progress=False).protocol
    assert "cut" not in evaluate(brightness, refset, size=32, progress=False).protocol


def test_baselines_by_hand(refset):
    largest, chance = largest_object_baseline(refset), random_object_baseline(refset)
    objects = {}
    for note in json.loads((refset.root / "instances.json").read_text())["annotations"]: objects.setdefault(note["image_id"], []).append(note["segmentation"])
    expected = []
    for ref in refset:
        truth = refset.mask(ref) > 0
        masks = [decode_mask(s, ref.height, ref.width) > 0 for s in objects[ref.image_id]]
        assert len(masks) == 3
        big = max(masks, key=lambda m: m.sum())
        each = [(m & truth).sum() / (m | truth).sum() for m in masks]
        for s in ref.sentences:
            assert largest.pairs[s.sent_id] == ((big & truth).sum(), (big | truth).sum())
            expected.append(np.mean(each))
    assert chance["mIoU"] == pytest.approx(np.mean(expected), abs=1e-12)
    assert chance["n"] == len(largest) == len(expected)


def test_ceiling_falls_with_the_stride_and_is_one_without_resizing(refset):
    native = RefSet(refset.root, [r for r in refset if (r.height, r.width) == (64, 64)])
    assert grid_ceiling(native, 64, 1).summary()["mIoU"] == 1
    strided = [grid_ceiling(refset, 64, s, .5).summary()["mIoU"] for s in (2, 4, 16)]
    assert strided == sorted(strided, reverse=True) and strided[0] > .85
    for stride in (7, 0, -4, 3.7, float("nan"), float("inf")):
        with pytest.raises(BarleriaError, match="divide"): grid_ceiling(refset, 64, stride)


@pytest.mark.parametrize("size, stride", [(64, 4), (56, 3.5)])
def test_ceiling_is_what_a_perfect_learner_of_the_target_scores(refset, size, stride):
    "`evaluate` with the target as probabilities must give the very records of `grid_ceiling`; 3.5 is the stride of patches of 14 pixels."
    kept = np.floor(np.arange(int(size / stride)) * stride).astype(int)
    order = [(r, s) for r in refset for s in r.sentences]
    at = iter(order)

    def oracle(images, ids, words):
        grids = [torch.from_numpy(Letterbox(r.height, r.width, size).mask(refset.mask(r))[np.ix_(kept, kept)]) for r, _ in (next(at) for _ in ids)]
        return torch.logit(torch.stack(grids)[:, None].double(), eps=1e-12)  # float64: sigmoid gives the target back

    got, ceiling = evaluate(oracle, refset, size=size, batch=4, progress=False), grid_ceiling(refset, size, stride)
    for (id, I, U), (jd, J, V) in zip(got.records, ceiling.records):
        assert id == jd and abs(I - J) <= 1 and abs(U - V) <= 1  # a pixel may lie on the threshold itself


# ---------------------------------------------------------------- real photographs

def test_published_predictions_get_their_published_iou():
    top = SHARED / "data" / "refcoco-sample"
    if not (top / "extra" / "published_predictions_testA.json").exists(): pytest.skip(f"{top} is missing: published predictions to compare with")
    refset = RefSet.read(top)
    refs = {r.ref_id: r for r in refset}
    found = json.loads((top / "extra" / "published_predictions_testA.json").read_text())
    assert len(found) == 10
    for record in found:
        ref = refs[record["ref_id"]]
        pred = decode_mask(record["segmentation"], ref.height, ref.width)
        published = next(v for k, v in record.items() if "iou" in k.lower())
        assert iou(*counts(pred, refset.mask(ref))) == pytest.approx(published, abs=.005), record["ref_id"]


def test_groups_of_one_size_and_a_bounded_number_of_pixels():
    class R:
        def __init__(self, h, w): self.height, self.width = h, w
    refs = [R(4, 5), R(5, 4), R(4, 5), R(4, 5), R(9, 9)]
    assert list(_alike(refs)) == [[0, 2, 3], [1], [4]] and list(_alike(refs, 40)) == [[0, 2], [3], [1], [4]]
    g = torch.Generator().manual_seed(1)
    a, b = (torch.rand(6, 7, 9, generator=g) > .5 for _ in range(2))
    assert [tuple(p) for p in _counted(a, b)] == [counts(x, y) for x, y in zip(a, b)]
