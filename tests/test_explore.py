"Looks agree with the model asked alone, pages draw whatever they are given, and the explorer survives bad input with one line."
import html
import io
import re
import struct
import subprocess
import sys
import zlib
from datetime import datetime

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from barleria_nb import explore
from barleria_nb.core import BarleriaError
from barleria_nb.explore import (ALL, COSINE, EXCHANGES, REMEMBERED, Explorer, _grouped, _on_image, _Page, _png, _short, blocks, effects, exchanges, look, look_figure, look_text, meaning,
                                 models_figure, models_text, tower_shares, uploaded)
from barleria_nb.backbones import Attention, rotate
from barleria_nb.data import Letterbox, _pieces
from barleria_nb.inference import Segmenter
from barleria_nb.metrics import counts, iou
from barleria_nb.model import build_model, config
from barleria_nb.shapes import VOCABULARY, records, resolve
from common import line

SENTENCE = "the large red circle on the left"


def segmenter(name):
    "A random model."
    return Segmenter(build_model(config(name, pretrained=False)).eval())


@pytest.fixture(scope="module")
def barleria(): return segmenter("barleria-tiny")


@pytest.fixture(scope="module")
def frozen(): return segmenter("frozen-tiny")


@pytest.fixture(scope="module")
def scene(): return records("val", 0)[0]


@pytest.fixture(scope="module")
def seen(barleria, scene): return look(barleria, scene, SENTENCE)


def cut(seen): return float(np.median(seen.probability))


# ---------------------------------------------------------------- sentences

@given(st.lists(st.sampled_from([*VOCABULARY, "zebra", "Red,", "…"]), max_size=9))
@settings(max_examples=60, deadline=None)
def test_any_words_have_a_meaning_or_none_and_exchanges_change_one_word(words):
    scene, _, anns, _ = records("val", 3)
    sentence = " ".join(words)
    k = meaning(scene, sentence)
    assert k is None or 0 <= k < len(scene.things)
    for was, now, other in exchanges(sentence, scene):
        a, b = sentence.split(), other.split()
        changed = [(x, y) for x, y in zip(a, b) if x != y]
        assert len(a) == len(b) and changed == [(was, now)] and now in EXCHANGES[re.sub(r"\W", "", was).lower()]


def test_meaning_is_that_of_resolve_for_sentences_of_the_grammar():
    for i in range(6):
        scene, _, anns, refs = records("val", i, "refshapesg")
        for ref in refs:
            for s in ref["sentences"]:
                assert anns[meaning(scene, s["sent"])]["id"] == ref["ann_id"] == resolve(s["sent"], anns)[0]
    assert meaning(None, SENTENCE) is None


def test_what_is_false_doubtful_or_contradicts_itself_means_nothing():
    scene, _, anns, _ = records("val", 0)  # its only yellow circle is at the right
    assert resolve("left yellow circle", anns) and resolve("red yellow circle", anns) and resolve("the left right circle", anns)
    for sentence in ("left yellow circle", "red yellow circle", "the left right circle", "the circle on the top left", "the circle next to the thing", "the star that is left of the thing"): assert meaning(scene, sentence) is None
    assert scene.things[meaning(scene, "the yellow circle")].colour == "yellow"


def test_exchanged_sentences_mean_another_thing_where_one_can(scene):
    found = {was: meaning(scene, s) for was, _, s in exchanges("the red circle on the right", scene)}
    assert set(found) == {"red", "circle", "right"} and found["right"] not in (None, meaning(scene, "the red circle on the right"))
    assert found["red"] is found["circle"] is None  # “on the right” is false or doubtful of the others


# ---------------------------------------------------------------- looks

@pytest.mark.parametrize("name", ["frozen-tiny", "snf-tiny", "lora-tiny", "etris-tiny", "barleria-noglobal-tiny", "dcris-tiny", "dcris-tinydino", "frozen-tinydino", "barleria-tinydino", "detris-tinydino"])
def test_every_place_of_every_method_can_be_looked_at(name, scene):
    s = segmenter(name)
    places = blocks(s)
    assert (COSINE in places) == (name in ("frozen-tiny", "snf-tiny", "lora-tiny"))
    for b in {places[0], places[-1], *(p for p in places if not p.startswith("head"))}:
        l = look(s, scene, "red circle", b)
        assert l.block == b and [h.word for h in l.heard] == ["‹start›", "red", "circle", "‹end›"]
        total = sum(h.map for h in l.heard)
        assert total.shape == (128, 128) and (abs(total) <= 4 if b == COSINE else (total <= 1 + 1e-5) & (total > 0)).all()
        if b.startswith(("head", "bridge")) or b.startswith("adapter") and name != "detris-tinydino": np.testing.assert_allclose(total, 1, atol=1e-5)  # words alone are heard there, but for DETRIS's adapters, which hear padding


def test_shares_of_a_tower_with_rotary_positions():
    torch.manual_seed(0)
    attn, z, words, rope = Attention(torch.nn.MultiheadAttention(12, 3, batch_first=True)), torch.randn(2, 5, 12), torch.randn(2, 4, 12), torch.randn(2, 9, 4)
    q, k, _ = (x.unflatten(-1, (3, 4)).transpose(1, 2) for x in attn.qkv(torch.cat((z, words), 1)))
    eye = torch.eye(9).expand(2, 3, -1, -1)
    told = torch.nn.functional.scaled_dot_product_attention(rotate(q, rope), rotate(k, rope), eye)[:, :, :5]
    torch.testing.assert_close(tower_shares(attn, z, words, rope=rope), told.mean(1)[0])


def test_one_call_of_the_model_and_the_same_answers_as_alone(barleria, scene, seen, monkeypatch):
    calls, forward = [], barleria.model.forward
    monkeypatch.setattr(barleria.model, "forward", lambda *args: calls.append(len(args[1])) or forward(*args))
    again = look(barleria, scene, SENTENCE)
    assert calls == [1 + len(again.dropped) + len(again.exchanged)] and len(again.dropped) == 7 and len(again.exchanged) == 4
    for sentence, p in [(SENTENCE, again.probability), *((v.sentence, v.probability) for v in again.dropped + again.exchanged)]:
        np.testing.assert_allclose(p, barleria(scene.image, sentence)[0].probability, atol=1e-5)


def test_a_small_batch_gives_the_same_look(barleria, scene, seen):
    few = look(Segmenter(barleria.model, batch=3), scene, SENTENCE)
    np.testing.assert_allclose([h.mean for h in few.heard], [h.mean for h in seen.heard], atol=1e-6)
    np.testing.assert_allclose(few.prior, seen.prior, atol=1e-5)


def test_hooks_leave_even_when_the_model_fails(barleria, scene, monkeypatch):
    monkeypatch.setattr(barleria.model.head, "forward", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError): look(barleria, scene, SENTENCE)
    assert not any(m._forward_hooks for m in barleria.model.modules())


def test_word_pieces_are_put_together(barleria, scene):
    words = _grouped(_pieces("Unbelievablyred, circle", 30))
    assert words[0][0] == "‹start›" and "".join(w for w, _ in words[1:-1]) == "unbelievablyred,circle" and [k for _, at in words for k in at] == list(range(sum(len(at) for _, at in words)))
    trained = Segmenter(build_model(config("frozen-tiny")).eval())
    assert look(trained, scene, "the purple zebra").unknown == ("zebra",) and look(trained, scene, SENTENCE).unknown == ()


@pytest.mark.parametrize("height,width", [(128, 128), (50, 90), (90, 50), (1, 40), (40, 1), (1, 1), (640, 3)])
def test_grids_land_on_their_patches(height, width):
    box = Letterbox(height, width, 64)
    grid = np.arange(64.).reshape(8, 8)
    found = _on_image(grid, box)
    for y in {0, height // 2, height - 1}:
        for x in {0, width // 2, width - 1}:  # a pixel's middle, in the square
            v, u = ((y + .5) * box.nh / height + box.top) / 8, ((x + .5) * box.nw / width + box.left) / 8
            assert found[y, x] == grid[int(v), int(u)]


def test_large_pictures_are_shrunk(frozen):
    l = look(frozen, np.zeros((1500, 3000, 3), np.uint8), "circle")
    assert l.image.shape == (224, 448, 3) and l.probability.shape == (224, 448) and l.truth is None and not l.dropped
    assert look(frozen, np.zeros((2, 9000, 3), np.uint8), "circle").image.shape == (1, 448, 3)


def test_words_that_clean_to_nothing_are_not_left_out(frozen, scene):
    assert [v.sentence for v in look(frozen, scene, "\x01 " * 200 + "red \x02 zebra").dropped] == ["zebra", "red"]
    assert not look(frozen, scene, "\x01 zebra").dropped


def test_mistakes_in_one_line(frozen, scene):
    line(lambda: look(frozen, scene, "  "), "is empty")
    line(lambda: look(frozen, scene, "the " * 300), "shorten it")
    line(lambda: look(frozen, scene, 7), "must be text")
    line(lambda: look(frozen, scene, SENTENCE, "head 1: cells read word"), "Did you mean", "head 1: cells read words")
    line(lambda: look(frozen, "none.png", SENTENCE), "missing")
    line(lambda: Explorer({}), "no model")
    line(lambda: Explorer({"a": frozen}, ()), "no scene")


# ---------------------------------------------------------------- pages

def test_effects_and_text_are_what_masks_say(seen):
    t = cut(seen)
    whole = seen.probability > t
    for (w, x, area), v in zip(effects(seen, t), seen.dropped):
        mask = v.probability > t
        assert w == v.was and x == 1 - iou(*counts(mask, whole)) and area == mask.sum() / whole.sum()
        assert f"{w}, effect {x:.2f}" in look_text(seen, t)
    assert f"{whole.sum():,} of {whole.size:,} pixels" in look_text(seen, t)
    assert all(area is None for *_, area in effects(seen, .999))


@pytest.mark.parametrize("shape", [(1, 300), (300, 1), (1, 1), (60, 200), (200, 60)])
@pytest.mark.parametrize("sentence", ["circle", "the <b>$\\frac{ circle", "人 left \ud83d", "a b c d e f g h i j k left"])
def test_any_picture_and_sentence_is_drawn(barleria, shape, sentence):
    l = look(barleria, np.random.default_rng(0).integers(0, 255, (*shape, 3), np.uint8), sentence)
    for figure in (look_figure(l, cut(l)), models_figure([l, l], 0.)): assert Image.open(io.BytesIO(_png(figure))).size[0] == 1000
    look_text(l).encode()


def test_names_are_cut_never_lost():
    assert _short("IMG_" * 20, 10) == "IMG_IMG_I…" and _short("triangle", 7) == "triang…" and _short("a\n b\x01", 9) == "a b" and _short("\u202e", 9) == ""


def test_an_empty_mask_has_nothing_to_lose(barleria, scene, monkeypatch):
    tables, said, l = [], [], look(barleria, scene, "the red circle on the right")
    monkeypatch.setattr(_Page, "table", lambda page, columns, rows, values: tables.append(np.array(values)))
    monkeypatch.setattr(_Page, "heading", lambda page, text, more="": said.append(more))
    models_figure([l, l], 1.), look_figure(l, 1.)
    dropped, followed = tables  # nobody stayed with nothing
    assert np.isnan(dropped).all() and (followed[:, 2] == 0).all() and any("nothing to lose" in s for s in said)
    assert "nothing to lose" in look_text(l, 1.) and "stayed" not in look_text(l, 1.)


def test_the_threshold_moves_the_page_and_models_must_be_asked_the_same(barleria, seen, scene):
    assert _png(look_figure(seen, cut(seen))) != _png(look_figure(seen, .99)) != b""
    other = look(barleria, scene, "circle")
    line(lambda: models_figure([seen, other]), "look at the same")
    line(lambda: models_figure([]), "look at the same")
    line(lambda: models_figure([seen, look(barleria, scene.image, SENTENCE)]), "look at the same")
    strange = look(barleria, scene, "circle At block 6: patches hear words: x")
    assert models_text([seen, strange]).count(" answers ") == 2 and "patches hear words: x” with" in models_text([strange])


# ---------------------------------------------------------------- uploads

def encoded(image, kind, **how):
    out = io.BytesIO()
    image.save(out, kind, **how)
    return out.getvalue()


def bomb(width, height):
    "A PNG of a few bytes that says it has many pixels."
    chunk = lambda name, data: struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_uploads_of_all_kinds():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8))
    for kind, mode in (("PNG", "RGB"), ("PNG", "RGBA"), ("PNG", "P"), ("PNG", "1"), ("JPEG", "CMYK"), ("GIF", "P"), ("WEBP", "RGB"), ("TIFF", "L")):
        pixels = uploaded(f"a.{kind}", encoded(picture.convert(mode), kind))
        assert pixels.shape == (20, 30, 3) and pixels.dtype == np.uint8


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n" + bytes(200), b"GIF89a" + b"\xff" * 40, b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%!PS-Adobe-3.0 EPSF", bomb(60_000, 60_000), bomb(10_000, 9500),
                                     bomb(2**31 - 1, 2**31 - 1), bomb(0, 5)])
@pytest.mark.filterwarnings("error")
def test_hostile_uploads_give_one_line(content): line(lambda: uploaded("évil\n<b>" * 50, content), "évil <b>")


def test_broken_uploads_give_one_line():
    good = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)), "PNG")
    rng = np.random.default_rng(1)
    for _ in range(60):
        bad = bytearray(good[:rng.integers(1, len(good))] if rng.random() < .5 else good)
        for at in rng.integers(0, len(bad), 8): bad[at] = rng.integers(256)
        try: assert uploaded("x.png", bytes(bad)).shape[2] == 3
        except BarleriaError as e: assert "\n" not in str(e) and "x.png" in str(e)


# ---------------------------------------------------------------- the explorer, without a browser

@pytest.fixture()
def explorer(barleria, frozen): return Explorer({"barleria": barleria, "frozen <i>": frozen}, range(3))


def message(e): return html.unescape(re.sub("<.*?>", "", e.message.value))
def alt(e): return html.unescape(re.search('alt="(.*?)"', e.page.value)[1])


def send(e, name, content): e.upload.value = ({"name": name, "type": "image/png", "size": len(content), "content": memoryview(content), "last_modified": datetime.now()},)


def test_each_control_changes_the_page(explorer, capfd):
    e, pages = explorer, {explorer.page.value}
    for widget, value in ((e.sentence, "the red square"), (e.block, "head 2: cells read words"), (e.model, "frozen <i>"), (e.model, ALL), (e.picture, "scene 2"), (e.threshold, .05), (e.model, "barleria")):
        widget.value = value
        pages.add(e.page.value)
        assert message(e) == "" and not e.errors.outputs
    assert len(pages) == 8 and alt(e) == look_text(e.looks[0], .05)
    assert capfd.readouterr() == ("", "")


def test_the_threshold_asks_no_model(explorer, monkeypatch):
    monkeypatch.setattr(explore, "look", lambda *args: 1 / 0)
    page = explorer.page.value
    explorer.threshold.value = .6
    assert explorer.page.value != page and not explorer.threshold.continuous_update


def test_errors_of_the_program_are_not_hidden(explorer, monkeypatch):
    monkeypatch.setattr(explore, "look", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError): explorer.sentence.value = "the green star"


def test_bad_input_leaves_the_page_and_says_why(explorer):
    e, page = explorer, explorer.page.value
    for sentence in ("", "   ", "left " * 400):
        e.sentence.value = sentence
        assert message(e) and "\n" not in message(e) and e.page.value == page
    said = message(e)
    e.threshold.value = .6  # another page for the last good sentence; the bad one stands in the box as before
    assert message(e) == said and e.page.value != page
    e.sentence.value = "red circle"
    assert message(e) == "" and e.page.value != page
    page = e.page.value
    send(e, "<script>alert(1)</script>.png", b"no")
    assert "<script>" not in e.message.value and "is not a picture" in message(e) and e.page.value == page and e.picture.value == "scene 0" and e.upload.value == ()


def test_a_picture_of_ones_own_and_back(explorer):
    e = explorer
    before = alt(e)
    for shade in (40, 200):  # the second takes the place of the first, which has the same name
        send(e, "mine.png", encoded(Image.new("RGB", (60, 40), (shade, 0, 0)), "PNG"))
        assert e.picture.value == "yours: mine.png" and len(e.picture.options) == 4 and "2,400 pixels" in alt(e) and e.looks[0].image[0, 0, 0] == shade and e.examples.disabled
    for name, shown in (("mine_very_long_" * 9, "mine_very_long_mine"), ("\x01", "the file")):
        send(e, name, encoded(Image.new("RGB", (60, 40)), "PNG"))
        assert e.picture.value.startswith(f"yours: {shown}")
    e.picture.value = "scene 0"
    assert alt(e) == before and e.examples.value == e.sentence.value


def test_examples_follow_the_picture_unless_something_was_written(explorer):
    e = explorer
    first = e.sentence.value
    assert first == e.examples.options[0]
    e.picture.value = "scene 1"
    assert e.sentence.value == e.examples.options[0] == e.examples.value != first
    e.sentence.value = "my own circle"
    assert e.examples.value is None
    e.picture.value = "scene 2"
    assert e.sentence.value == "my own circle" and "my own circle" in alt(e)
    e.examples.value = e.examples.options[-1]
    assert e.sentence.value == e.examples.options[-1] and f"“{e.sentence.value}”" in alt(e)


def test_what_was_asked_is_remembered_within_bounds(explorer, monkeypatch):
    e, asked = explorer, []
    real = look
    monkeypatch.setattr(explore, "look", lambda *args: asked.append(args[2]) or real(*args))
    for s in ("red circle", "blue circle", "red circle"): e.sentence.value = s
    assert asked == ["red circle", "blue circle"]
    e.known.update({k: None for k in range(60)})
    e.sentence.value = "black circle"
    assert len(e.known) == REMEMBERED


def test_text_from_outside_is_escaped(explorer):
    explorer.sentence.value = 'circle"><img src=x onerror=alert(1)>'
    assert "<img src=x" not in explorer.page.value + explorer.message.value and explorer.page.value.count("<img") == 1


def test_every_control_has_a_label(explorer):
    *controls, thumbnails = explorer.ui.children[0].children
    assert all(w.description for w in controls) and thumbnails.value.count("alt=") == 3


def test_the_module_needs_no_ipywidgets():
    code = """import sys; sys.modules["ipywidgets"] = None
from barleria_nb import explore
try: explore.Explorer({"a": None})
except explore.BarleriaError as e: print(e)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "the explorer needs ipywidgets, which is not installed; run `pip install ipywidgets`."
