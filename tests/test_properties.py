"What must hold for any input: masks and outlines, the letterbox and its way back, scores, tokens, hashes, orders, targets. Drawn by Hypothesis, the same draws in every run."
import json
from fractions import Fraction
from hashlib import sha256

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from open_clip.tokenizer import SimpleTokenizer
from pycocotools import mask as coco

from barleria_nb.core import BarleriaError, read_json, stable_hash, write_json
from barleria_nb.data import CLIP_MEAN, CLIP_STD, END, MAX_PIXELS, START, Letterbox, Ref, RefDataset, RefSet, Sentence, _rle, _run_lengths, decode_mask, normalise, tokenize
from barleria_nb.inference import Result, _record
from barleria_nb.loss import batch_iou, resize_target, text_to_pixel_loss
from barleria_nb.metrics import Scores, above, counts, iou, mean_iou, overall_iou, precision_at
from barleria_nb.training import EpochOrder, shuffled
from common import line


def few(n): return settings(max_examples=n, derandomize=True, deadline=None, database=None)


seeds = st.integers(0, 2**32 - 1)
sides = st.integers(1, 24)
masks = st.tuples(sides, sides).flatmap(lambda s: hnp.arrays(np.uint8, s, elements=st.integers(0, 1)))


# ---------------------------------------------------------------- masks and run lengths

@few(80)
@given(masks)
def test_every_form_of_a_mask_says_the_same(mask):
    "Compressed and plain run lengths, ours and COCO's; area and box by counting pixels, by COCO and as a `Result` tells them."
    (h, w), packed = mask.shape, coco.encode(np.asfortranarray(mask))
    plain = dict(size=[h, w], counts=_run_lengths(packed["counts"]))
    assert coco.frPyObjects(plain, h, w) == packed == _rle(plain, h, w)
    for form in (packed, plain, dict(packed, counts=packed["counts"].decode()), json.loads(json.dumps(plain))):
        back = decode_mask(form, h, w)
        assert back.dtype == np.uint8 and (back == mask).all()
    result = Result(np.zeros((h, w, 3), np.uint8), "a", mask.astype(np.float32), .5, False)
    told = _record(result, "a.png")
    assert (decode_mask(json.loads(json.dumps(told))["rle"], h, w) == mask).all()
    assert result.area == told["area"] == coco.area(packed) == mask.sum()
    assert told["box"] == result.box == (coco.toBbox(packed).tolist() if mask.any() else None)
    if mask.any():
        x, y, width, height = result.box
        assert mask[y:y + height, x:x + width].sum() == result.area
        assert all(edge.any() for edge in (mask[y], mask[y + height - 1], mask[:, x], mask[:, x + width - 1]))


runs = st.lists(st.integers(0, 40) | st.integers(0, 5_000_000), min_size=1, max_size=9).filter(lambda r: 0 < sum(r) <= MAX_PIXELS)


@few(80)
@given(runs, st.integers(-3, 3).filter(bool))
def test_long_runs(counts, slip):
    "Strings of long runs, with the differences of either sign, are read as COCO wrote them; one pixel too many or too few is refused."
    width = sum(counts)
    packed = coco.frPyObjects(dict(size=[1, width], counts=counts), 1, width)
    assert _run_lengths(packed["counts"]) == _run_lengths(packed["counts"].decode()) == counts
    assert coco.area(_rle(dict(packed), 1, width)) == sum(counts[1::2])
    if 0 < width + slip <= MAX_PIXELS: line(lambda: _rle(dict(packed, size=[1, width + slip]), 1, width + slip), "add up")


# ---------------------------------------------------------------- outlines

H, W = 30, 44
points = lambda x, y: st.lists(st.tuples(x, y), min_size=3, max_size=7).map(lambda found: [float(v) for p in found for v in p])
outlines = points(st.floats(-W, 2 * W), st.floats(-H, 2 * H)) | points(st.integers(0, W), st.integers(0, H))


def alone(part): return coco.decode(coco.frPyObjects([part], H, W))[:, :, 0]


@few(80)
@given(st.lists(outlines, min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_parts_are_united_in_any_order(parts, random):
    mask = decode_mask(parts, H, W)
    assert mask.shape == (H, W) and mask.dtype == np.uint8 and (mask == np.maximum.reduce([alone(p) for p in parts])).all()
    again = random.sample(parts, len(parts)) + random.choices(parts, k=2)
    assert (decode_mask(again, H, W) == mask).all()
    assert (decode_mask([np.reshape(p, (-1, 2)).tolist() for p in parts], H, W) == mask).all()  # points as pairs


@few(60)
@given(outlines)
def test_an_outline_paints_only_near_itself(part):
    x, y = np.array(part[::2]), np.array(part[1::2])
    rows, columns = np.nonzero(decode_mask([part], H, W))
    for found, edge in ((rows, y), (columns, x)): assert (found >= np.floor(edge.min()) - 1).all() and (found <= np.ceil(edge.max())).all()


@few(60)
@given(points(st.integers(0, 12), st.integers(0, 10)), st.integers(0, 12), st.integers(0, 10))
def test_a_moved_outline_paints_a_moved_mask(part, right, down):
    moved = (np.reshape(part, (-1, 2)) + [right, down]).ravel().tolist()
    assert (decode_mask([moved], H, W) == np.roll(decode_mask([part], H, W), (down, right), (0, 1))).all()


@few(60)
@given(st.tuples(*[st.floats(-3 * n, 4 * n) | st.sampled_from([-n - 1, -n - 1.01, 2 * n + 1, 2 * n + 1.01]) for n in (W, H)]))
def test_how_far_outside_is_too_far(point):
    "One image size and a pixel to either side."
    segmentation = [[*point, 3, 3, 20, 9]]
    if -W - 1 <= point[0] <= 2 * W + 1 and -H - 1 <= point[1] <= 2 * H + 1: decode_mask(segmentation, H, W)
    else: line(lambda: decode_mask(segmentation, H, W), "polygon 0", "far outside")


# ---------------------------------------------------------------- letterbox

thin, long = st.integers(1, 4), st.integers(1, 5000)
frames = st.tuples(st.integers(1, 60), st.integers(1, 60)) | st.tuples(thin, long) | st.tuples(long, thin) | st.sampled_from([(1, 1), (1, 5000), (5000, 1)])
boxes = st.builds(lambda frame, size: Letterbox(*frame, size), frames, st.integers(1, 96))


def inside(box):
    "Where the square holds the image."
    where = np.zeros((box.size, box.size), bool)
    where[box.top:box.top + box.nh, box.left:box.left + box.nw] = True
    return where


@few(120)
@given(boxes)
def test_an_image_of_any_shape_fits(box):
    "The longer side fills the square, the shorter one keeps the shape to half a pixel, the borders are equal to one pixel."
    longer = max(box.height, box.width)
    assert max(box.nh, box.nw) == box.size
    for n, fitted, border in ((box.height, box.nh, box.top), (box.width, box.nw, box.left)):
        assert fitted == 1 or 2 * abs(fitted * longer - n * box.size) <= longer
        assert fitted >= 1 and border >= 0 and box.size - fitted - 2 * border in (0, 1)
    assert inside(box).sum() == box.nh * box.nw


@few(60)
@given(boxes, st.integers(0, 255), seeds)
def test_the_border_stays_border(box, value, seed):
    "Whatever the image, the border is the mean colour and mask 0; an even image stays even up to its last pixel."
    where, mean = inside(box), np.round(255 * np.array(CLIP_MEAN))
    noise = np.random.default_rng(seed).integers(0, 256, (box.height, box.width, 3), np.uint8)
    for content in (noise, np.full_like(noise, value)):
        out, soft = box.image(content), box.mask(content[..., 0] > 127)
        assert out.dtype == np.uint8 and (out[~where] == mean).all()
        assert soft.dtype == np.float32 and (soft[~where] == 0).all() and soft.min() >= 0 and soft.max() <= 1 + 1e-6
    assert (out[where] == value).all() and np.allclose(soft[where], value > 127, atol=1e-6)


def grids(box, k, seed, n=1): return torch.from_numpy(np.random.default_rng(seed).random((n, -(-box.size // k), -(-box.size // k)), np.float32))


@few(80)
@given(boxes, st.sampled_from([1, 2, 3.5, 4]), seeds)
def test_the_way_back_reads_nothing_far_outside(box, k, seed):
    "Values more than one sample away from the image's place count for nothing, and no value comes out that did not go in."
    side = max(1, int(box.size / k))
    grid = torch.from_numpy(np.random.default_rng(seed).random((side, side), np.float32))
    back, spoilt, at = box.inverse(grid, k), grid.clone(), torch.arange(side) * k
    away = lambda first, n: (at < first - .5 - k - .01) | (at > first + n - .5 + k + .01)
    spoilt[away(box.top, box.nh)], spoilt[:, away(box.left, box.nw)] = 1e6, -1e6
    assert torch.equal(box.inverse(spoilt, k), back)
    assert back.shape == (box.height, box.width) and back.min() >= grid.min() - 1e-6 and back.max() <= grid.max() + 1e-6


@few(40)
@given(st.integers(1, 40), seeds)
def test_a_square_of_the_right_size_is_left_alone(n, seed):
    rng, box = np.random.default_rng(seed), Letterbox(n, n, n)
    image, mask = rng.integers(0, 256, (n, n, 3), np.uint8), rng.random((n, n)) < .5
    assert (box.image(image) == image).all() and (box.mask(mask) == mask).all()
    grid = torch.from_numpy(rng.random((n, n)))
    assert torch.allclose(box.inverse(grid), grid, atol=1e-12) and torch.equal(box.inverse(grid), box.inverse(grid, 1))


@few(40)
@given(st.integers(1, 12), st.integers(1, 5), seeds)
def test_samples_lie_on_their_pixels(cells, k, seed):
    grid = torch.from_numpy(np.random.default_rng(seed).random((cells, cells)))
    back = Letterbox(cells * k, cells * k, cells * k).inverse(grid)
    assert torch.allclose(back[::k, ::k], grid, atol=1e-12)


@few(60)
@given(boxes, st.sampled_from([1, 2, 4]), seeds)
def test_more_stays_more(box, k, seed):
    "There and back, a larger mask or grid is nowhere smaller, and what grows along an axis goes on growing."
    rng = np.random.default_rng(seed)
    small = rng.random((box.height, box.width)) < .3
    assert (box.mask(small) <= box.mask(small | (rng.random(small.shape) < .3)) + 1e-6).all()
    low, more = grids(box, k, seed, 2).double()
    assert (box.inverse(low + more, k) >= box.inverse(low, k) - 1e-12).all()
    for axis in (0, 1): assert (box.inverse(low.sort(axis)[0], k).diff(dim=axis) >= -1e-9).all()


@few(60)
@given(boxes, st.sampled_from([1, 2, 4]), seeds)
def test_rows_and_columns_are_treated_alike(box, k, seed):
    turned, grid = Letterbox(box.width, box.height, box.size), grids(box, k, seed)[0].double()
    mask = np.random.default_rng(seed).random((box.height, box.width)) < .5
    assert np.allclose(turned.mask(mask.T), box.mask(mask).T, atol=1e-5)
    assert torch.allclose(turned.inverse(grid.T, k), box.inverse(grid, k).T, atol=1e-12)


@few(30)
@given(boxes, st.integers(1, 4), seeds)
def test_grids_of_a_batch_do_not_touch_each_other(box, n, seed):
    together = box.inverse(grids(box, 1, seed, n))
    assert together.shape == (n, box.height, box.width) and torch.equal(together, torch.stack([box.inverse(g) for g in grids(box, 1, seed, n)]))


@few(80)
@given(frames, st.integers(1, 96), st.tuples(*[st.floats(0, 1)] * 4))
def test_areas_keep_their_share(frame, size, corners):
    "A rectangle's share of the image is its share of the place in the square, to a pixel along its edge; enlarged, it also comes back with its area."
    box, (h, w) = Letterbox(*frame, size), frame
    (y0, y1), (x0, x1) = (sorted((int(a * n), int(b * n))) for a, b, n in ((*corners[:2], h - 1), (*corners[2:], w - 1)))
    mask = np.zeros(frame, np.uint8)
    mask[y0:y1 + 1, x0:x1 + 1] = 1
    down, across = box.nh / h, box.nw / w  # of a pixel, in pixels of the square
    edge = (y1 + 1 - y0) * down + (x1 + 1 - x0) * across + 1
    soft = box.mask(mask)
    assert abs(soft.sum() - mask.sum() * down * across) <= edge
    if min(down, across) >= 1: assert abs(int((box.inverse(torch.from_numpy(soft), 1) > .5).sum()) - mask.sum()) <= 2 * (y1 + 1 - y0 + x1 + 1 - x0)


# ---------------------------------------------------------------- scores

small_pairs = st.tuples(st.integers(0, 60), st.integers(0, 60)).map(sorted).map(tuple)
huge_pairs = st.tuples(st.integers(0, 10**30), st.integers(0, 10**30)).map(sorted).map(tuple)
edges = st.tuples(st.integers(0, 9), st.integers(1, 10**20), st.integers(-1, 1)).map(lambda t: (max(0, t[0] * t[1] + t[2]), 10 * t[1]))  # at a threshold, one pixel below, one above
pairs = small_pairs | huge_pairs | edges
ids = st.integers(-10**6, 10**12) | st.text(max_size=6)
tables = st.dictionaries(ids, pairs, min_size=1, max_size=20)


def oracle(found):
    "Every metric in fractions."
    each = [Fraction(I, U) if U else Fraction(1) for I, U in found]
    I, U = (sum(column) for column in zip(*found))
    hits = {f"Pr@0.{k}": Fraction(sum(x > Fraction(k, 10) for x in each), len(each)) for k in range(5, 10)}
    return {"mIoU": sum(each) / len(each), "oIoU": Fraction(I, U) if U else Fraction(1), **hits}


@few(120)
@given(tables)
def test_scores_agree_with_fractions(table):
    "oIoU and every share to the last bit; mIoU to the rounding of its terms."
    found, s = list(table.values()), Scores((id, *p) for id, p in table.items()).summary()
    exact = oracle(found)
    assert s.pop("n") == len(found) and abs(Fraction(s["mIoU"]) - exact["mIoU"]) < Fraction(1, 10**15)
    assert {k: v for k, v in s.items() if k != "mIoU"} == {k: float(v) for k, v in exact.items() if k != "mIoU"}
    assert min(iou(*p) for p in found) - 1e-15 <= s["mIoU"] <= max(iou(*p) for p in found) + 1e-15


@few(80)
@given(st.integers(0, 9), st.integers(1, 10**30))
def test_a_threshold_is_not_above_itself(k, m):
    assert not above(k * m, 10 * m, k) and above(k * m + 1, 10 * m, k) and (k == 0 or not above(k * m - 1, 10 * m, k))
    assert precision_at(k, [(k * m, 10 * m), (k * m + 1, 10 * m)]) == .5


@few(80)
@given(tables, st.lists(st.integers(0, 3), min_size=20, max_size=20), st.randoms(use_true_random=False))
def test_scores_split_and_merged_in_any_way(table, shares, random):
    "By worker, in any order, some counted twice, sent as JSON: the same records, the same bits."
    rows = [(id, *p) for id, p in table.items()]
    whole, dealt = Scores(rows, "p"), list(zip(rows, shares))
    parts = [Scores((r for r, s in random.sample(dealt, len(dealt)) if s in (k, 3)), "p") for k in range(3)]
    parts = [Scores(json.loads(json.dumps(p.records)), "p") for p in parts]
    left, right = (parts[0] + parts[1]) + parts[2], parts[0] + (parts[2] + parts[1])
    assert left == right == whole and left.records == right.records == whole.records
    assert left.summary() == right.summary() == whole.summary() and repr(left) == repr(whole)


@few(60)
@given(st.lists(pairs, min_size=1, max_size=20))
def test_empty_answers_to_empty_truths(found):
    "Two empty masks are one sentence answered rightly, of no pixel."
    more = found + [(0, 0)]
    assert overall_iou(more) == overall_iou(found) and mean_iou([(0, 0)]) == overall_iou([(0, 0)]) == 1
    assert mean_iou(more) == pytest.approx((mean_iou(found) * len(found) + 1) / len(more), abs=1e-12)
    for k in range(10): assert precision_at(k, more) == float(Fraction(sum(above(*p, k) for p in found) + 1, len(more)))


@few(60)
@given(st.tuples(sides, sides).flatmap(lambda s: st.tuples(hnp.arrays(bool, s), hnp.arrays(bool, s))), st.integers(0, 24), st.integers(0, 24))
def test_counts_add_up_over_tiles(two, row, column):
    tiles = [(slice(a, b), slice(c, d)) for a, b in ((0, row), (row, None)) for c, d in ((0, column), (column, None))]
    found = [counts(two[0][t], two[1][t]) for t in tiles]
    assert counts(*two) == tuple(map(sum, zip(*found))) == (np.logical_and(*two).sum(), np.logical_or(*two).sum())


# ---------------------------------------------------------------- tokens

words = st.lists(st.sampled_from("the a red circle biggest left of small x triangle zebra 7 12th ! , it's".split()), min_size=1, max_size=12).map(" ".join)
texts = words | st.text(st.characters(), max_size=60) | st.text("&#;<>nbsp0x1\x1b[m \t\n\x00Ã\xa0️👍🏽", max_size=40)
lengths = st.integers(3, 77)
CLIPS = SimpleTokenizer()


def tokens_or_none(text, length):
    "None when the sentence is refused as empty."
    try: return tokenize([text], length)
    except BarleriaError as e:
        assert "is empty" in str(e) and "\n" not in str(e)
        return None


@few(150)
@given(texts, lengths)
def test_tokens_of_any_text(text, length):
    "Start, pieces, end, zeros; the mask marks what is no zero of padding; the very ids of CLIP's tokenizer; every length refuses the same sentences."
    tokens, whole = tokens_or_none(text, length), tokens_or_none(text, 1000)
    assert (tokens is None) == (whole is None)
    if tokens is None: return
    ids, n = tokens.ids[0], int(tokens.words.sum())
    assert tokens.ids.shape == tokens.words.shape == (1, length) and ids.dtype == torch.long and tokens.words.dtype == torch.bool
    assert 3 <= n <= length and torch.equal(tokens.words[0], torch.arange(length) < n)
    assert ids[0] == START and ids[n - 1] == END and (ids[n:] == 0).all() and ids.min() >= 0 and ids.max() <= END
    assert tokens.truncated == (int(whole.words.sum()) > length) and (n == length or not tokens.truncated)
    assert torch.equal(ids, CLIPS(text, length)[0])


@few(100)
@given(texts, lengths, lengths)
def test_a_shorter_length_keeps_the_first_pieces(text, one, other):
    short, long = (tokens_or_none(text, n) for n in sorted((one, other)))
    assume(short)
    n = int(short.words.sum())
    assert torch.equal(short.ids[0, :n - 1], long.ids[0, :n - 1]) and long.truncated <= short.truncated
    if not short.truncated: assert torch.equal(short.ids[short.words], long.ids[long.words])


@few(40)
@given(st.lists(words, min_size=1, max_size=5), lengths)
def test_sentences_do_not_touch_each_other(sentences, length):
    together, apart = tokenize(sentences, length), [tokenize(s, length) for s in sentences]
    assert torch.equal(together.ids, torch.cat([t.ids for t in apart])) and torch.equal(together.words, torch.cat([t.words for t in apart]))
    assert together.truncated == sum(t.truncated for t in apart)


@few(40)
@given(words, words, st.sampled_from([" ", "   ", "\n", "\t \n"]))
def test_blanks_and_capitals_do_not_count_and_words_stand_alone(a, b, blank):
    pieces = lambda text: tokenize(text, 100).ids[0, 1:].tolist()[:int(tokenize(text, 100).words.sum()) - 2]
    assert pieces(f"{blank}{a}{blank}{b}{blank}".upper()) == pieces(a) + pieces(b)


# ---------------------------------------------------------------- hashes, draws and orders

parts = st.integers() | st.text(max_size=8) | st.floats()


@few(80)
@given(st.lists(parts, max_size=5), parts)
def test_stable_hash(found, more):
    "Of the parts' texts, in their order; 64 bits."
    n = stable_hash(*found)
    assert type(n) is int and 0 <= n < 2**64 and n == stable_hash(*map(str, found)) == int(sha256("\x1f".join(map(str, found)).encode()).hexdigest()[:16], 16)
    if found: assert stable_hash(*found, more) != n  # of 2**64 values, none here meets another
    if "\x1f" not in "".join(map(str, found)) and str(found) != str(found[::-1]) and [*map(str, found)] != [*map(str, found[::-1])]: assert stable_hash(*found[::-1]) != n


def test_stable_hash_of_any_text(): assert stable_hash("\ud800") != stable_hash("\ud801")


@few(60)
@given(st.integers(0, 200), st.integers(-2**70, 2**70), st.lists(st.integers(0, 10**6), min_size=2, max_size=4, unique=True))
def test_orders(n, seed, epochs):
    "A permutation by seed and epoch alone: not by the epochs before, not by the random numbers around it, which it leaves alone."
    order, state = EpochOrder(n, seed), torch.get_rng_state()
    found = {}
    for e in epochs:
        order.set_epoch(e)
        found[e] = list(order)
        assert sorted(found[e]) == list(range(n)) and len(order) == n
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    for e in epochs[::-1]:
        order.set_epoch(e)
        other = EpochOrder(n, seed)
        other.set_epoch(e)
        assert list(order) == list(order) == list(other) == found[e]
    order.set_epoch(1)
    if n > 30: assert len({tuple(o) for o in found.values()}) == len(epochs) and len({tuple(o) for o in (order, EpochOrder(n, seed), EpochOrder(n, seed + 1))}) == 3


def by_hand(sizes):
    "A set of refs with so many sentences each, and no files."
    said = iter(range(sum(sizes)))
    return RefSet(".", [Ref(i, i, i, "train", "", 4, 4, tuple(Sentence(next(said), f"{i} thing {k}") for k in range(n)), [[0, 0, 2, 0, 2, 2]]) for i, n in enumerate(sizes)])


@few(40)
@given(st.lists(st.integers(1, 4), min_size=2, max_size=20), st.integers(0, 10**9))
def test_the_control_gives_every_ref_the_sentences_of_another(sizes, seed):
    data = by_hand(sizes)
    mixed = shuffled(data, seed)
    assert [r.ref_id for r in mixed] == [r.ref_id for r in data] and shuffled(data, seed).refs == mixed.refs
    assert all(a.sentences != b.sentences for a, b in zip(mixed, data))
    assert sorted(s.sent_id for r in mixed for s in r.sentences) == list(range(sum(sizes)))


@few(30)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=12), seeds, st.integers(0, 50), st.randoms(use_true_random=False))
def test_draws_of_sentences_hang_on_seed_epoch_and_ref_alone(sizes, seed, epoch, random):
    data = by_hand(sizes)
    mixed = RefSet(".", random.sample(data.refs, len(data)))
    drawn = []
    for part in (data, mixed):
        items = RefDataset(part, 8, train=True, seed=seed)
        items.set_epoch(epoch)
        drawn.append({ref.ref_id: s for ref, s in map(items.pair, range(len(items)))})
    assert drawn[0] == drawn[1] and all(drawn[0][r.ref_id] in r.sentences for r in data)
    scored = RefDataset(mixed, 8)
    assert sorted(scored.pair(i)[1].sent_id for i in range(len(scored))) == list(range(sum(sizes)))


# ---------------------------------------------------------------- targets, colours, files

@few(60)
@given(st.integers(1, 12), st.integers(1, 12), st.sampled_from([1, 2, 3.5, 4, 8]), st.integers(1, 3))
def test_a_target_is_the_mask_at_every_so_manieth_pixel(h, w, k, b):
    "At whole and half strides exactly the pixels 0, k, 2k … rounded down; values are copied, never mixed."
    assume(h * k % 1 == 0 and w * k % 1 == 0)
    mask = torch.rand(b, 1, int(h * k), int(w * k), generator=torch.Generator().manual_seed(h))
    rows, columns = ((torch.arange(n) * k).floor().long() for n in (h, w))
    assert torch.equal(resize_target(mask, (h, w)), mask[:, :, rows][..., columns])


@few(60)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(1, 40))
def test_targets_of_any_size(H, W, h, w):
    "In order, each within a pixel of its place; larger than the mask is refused."
    mask = (torch.arange(H)[:, None] * 100 + torch.arange(W))[None, None].float()
    if h > H or w > W:
        line(lambda: resize_target(mask, (h, w)), "no smaller")
        return
    target = resize_target(mask, (h, w))[0, 0].long()
    rows, columns = target[:, 0] // 100, target[0] % 100
    assert torch.equal(target, rows[:, None] * 100 + columns)
    for at, n, N in ((rows, h, H), (columns, w, W)): assert at[0] == 0 and (at.diff() >= 1).all() and ((at - torch.arange(n) * N / n).abs() <= 1 + 1e-4).all()
    if (h, w) == (H, W): assert torch.equal(target, mask[0, 0].long())


@few(40)
@given(st.integers(1, 3), st.integers(1, 8), st.integers(1, 8), st.sampled_from([1, 2, 4]), seeds)
def test_loss_and_overlap_agree_with_numpy(b, h, w, k, seed):
    rng = np.random.default_rng(seed)
    logits, mask = 4 * rng.standard_normal((b, 1, h, w)), rng.random((b, 1, h * k, w * k))
    p, t = 1 / (1 + np.exp(-logits)), mask[:, :, ::k, ::k]
    assert float(text_to_pixel_loss(torch.from_numpy(logits), torch.from_numpy(mask))) == pytest.approx(-(t * np.log(p) + (1 - t) * np.log(1 - p)).mean(), rel=1e-9)
    ours, truth = (x.reshape(b, -1) >= .35 for x in (p, t))
    assert batch_iou(torch.from_numpy(logits), torch.from_numpy(mask)).tolist() == pytest.approx((ours & truth).sum(1) / np.maximum((ours | truth).sum(1), 1))


@few(30)
@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 3), st.integers(1, 9).filter(lambda h: h != 3), st.integers(1, 9), st.just(3)))) # three rows would be taken for three channels
def test_colours_come_back(images):
    x = normalise(images)
    mean, std = (torch.tensor(c).view(3, 1, 1) for c in (CLIP_MEAN, CLIP_STD))
    assert x.dtype == torch.float32 and (((x * std + mean) * 255).round().movedim(1, 3).numpy() == images).all()


values = st.recursive(st.none() | st.booleans() | st.integers(-2**70, 2**70) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4), max_leaves=12)


@few(40)
@given(value=values)
def test_json_comes_back(tmp_path_factory, value):
    "What is written is read again, and writing it again gives the same bytes."
    path = tmp_path_factory.getbasetemp() / "value.json"
    write_json(path, value)
    first = path.read_bytes()
    assert read_json(path) == value
    write_json(path, read_json(path))
    assert path.read_bytes() == first
