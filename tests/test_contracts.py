"""Seven contracts, one matrix: every method keeps each of them on both tiny pairs of towers. Then the first steps of both papers' methods at full size, and bad input to the global network.

After a wanted change of a loss, `python tests/test_contracts.py` writes anew what no longer holds in tests/traces.json, and saved results must be rerun or marked."""
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load as load_bytes

import barleria_nb.model as assembly
from barleria_nb.backbones import TINY, DualEncoder, TextTower, build_tiny_clip, visual_tower
from barleria_nb.core import count
from barleria_nb.data import RefSet, tokenize
from barleria_nb.intertwine import Intertwine
from barleria_nb.loss import text_to_pixel_loss
from barleria_nb.model import (FORMAT, METHODS, build_model, config, configurations, ledger, load_tuned, put_tuned, read_about, save_tuned,
                               towers_hash, tuned_state)
from barleria_nb.shapes import make_refshapes
from barleria_nb.training import Loop, first_refs
from common import line

TRACES = Path(__file__).with_name("traces.json")
ALIKE = re.compile(r"dcris-d?[0-9]")  # these differ from `dcris` in sizes or blocks alone: counted below, not run
NAMES = [f"{m}-{towers}" for towers in ("tiny", "tinydino") for m in METHODS if not ALIKE.match(m)]
every = pytest.mark.parametrize("name", NAMES)
SAID = "the red circle", "small blue square on the left", "the topmost object above the biggest green thing"  # 5, 8 and 10 pieces
GARBAGE = tokenize(["one yellow triangle next to that thing is at the right of the bottom"]).ids[0, 1:12]


def tiny(name, **changes): return config(name, **{"pretrained": False, **changes})


def method(name): return name.rsplit("-", 1)[0]


def parameters(model):
    "Every parameter once, by the name it is saved under: LoRA's also stand in the towers."
    return {n: p for n, p in model.named_parameters(remove_duplicate=False) if not re.search(r"\.parametrizations\.\w+\.\d", n)}


def batch(size=64, length=17, said=SAID, seed=0, dtype=torch.float32):
    "Random pictures, sentences in words that the tiny tower knows, masks."
    (ids, words, cut), g = tokenize(list(said), length), torch.Generator().manual_seed(seed)
    assert not cut
    image, mask = torch.randn(len(said), 3, size, size, generator=g), (torch.rand(len(said), 1, size, size, generator=g) > .8).float()
    return image.to(dtype), ids, words, mask.to(dtype)


def shaken(name, seed=1):
    "A model none of whose tuned numbers, running statistics included, is where it was built; in evaluation mode."
    model, g = build_model(tiny(name), seed), torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # of dropout
    with torch.no_grad():
        for k in range(2): model(*batch(seed=k)[:3])  # moves the running statistics
        for p in model.parameters():
            if p.requires_grad: p += .02 * torch.randn(p.shape, generator=g)
    return model.eval()


def exact(name): return shaken(name).double()


def ask(model, inputs):
    with torch.no_grad(): return model(*inputs[:3])


def same(a, b, atol): torch.testing.assert_close(a, b, rtol=0, atol=atol)


def differ(a, b, by=.01): return bool((a - b).abs().max() > by)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return RefSet.read(make_refshapes(tmp_path_factory.mktemp("data") / "set", scenes=dict(train=6, val=2, testA=1, testB=1), workers=1, progress=False))


# ---------------------------------------------------------------- 1: at its identity setting a tuned model is the frozen one

SPEAKING = {  # the ways in which a method can change what the frozen model says
    "frozen": (), "full": ("towers",), "snf": ("flows",), "adapter": ("series",), "compacter": ("products",), "lora": ("weights",), "etris": ("bridges",), "etris-64": ("bridges",),
    "snf+etris": ("flows", "bridges"), "barleria-noglobal": ("flows", "guests"), "barleria": ("flows", "guests", "door"),
    "dcris": ("patches", "words"), "dcris-da": ("patches",), "dcris-ta": ("words",), "detris": ("patches", "convolved words"),
}
LAST = {  # by way: what must be zero for it to be silent, by name
    "flows": r"tuners\.\d\..*\.(mu|s|u)$", "series": r"tuners\.\d\.maps\.\w+\.2\.", "products": r"tuners\.\d\.maps\.\w+\.1\.(t|bias)$", "weights": r"\.additions\.\w+\.B$",
    "bridges": r"\.stages\.\d+\.(norm_out|text_out)\.", "patches": r"tuners\.0\.adapters\.\d+\.up\.", "words": r"tuners\.\d\.adapters\.\d+\.2\.",
    "convolved words": r"tuners\.1\.adapters\.\d+\.up\.", "door": r"^head\.side\.",
}


def frozen(model):
    "The configuration of the frozen method on the same towers, with the same head."
    return replace(tiny(f"frozen-{model.config.name.rsplit('-', 1)[1]}"), head=model.config.head)


def hush(model, ways):
    "Last maps at zero; guests behind closed masks; towers that have not moved."
    if "towers" in ways: model.encoder.load_state_dict(build_model(frozen(model)).encoder.state_dict())
    with torch.no_grad():
        for n, p in parameters(model).items():
            if any(re.search(LAST[way], n) for way in set(ways) & set(LAST)): p.zero_()
    for tuner in model.encoder.tuners:
        if "guests" in ways and isinstance(tuner, Intertwine): tuner.guests = closed(tuner)
    return model


def closed(tuner):
    "The same guests as keys that nobody may look at."
    def guests(i, v, t, ctx):
        nobody = torch.zeros_like(ctx.words)
        return Intertwine.guests(tuner, i, v, t, ctx)._replace(visual_mask=nobody, text_mask=nobody[:, :1])
    return guests


def still(model):
    "The frozen method with `model`'s head, less the side door."
    plain = build_model(frozen(model)).double().eval()
    plain.head.load_state_dict({n: t for n, t in model.head.state_dict().items() if not n.startswith("side.")})
    plain.encoder.padding = model.encoder.padding # of `etris-64`, which hears it
    return plain


@every
def test_1_identity(name):
    "All ways hushed: the frozen model, for numbers far from where they were built. Any one way open: not."
    ways, x = SPEAKING[method(name)], batch(dtype=torch.float64)
    plain = ask(still(exact(name)), x)
    same(ask(hush(exact(name), ways), x), plain, 1e-10)
    for way in ways: assert differ(ask(hush(exact(name), set(ways) - {way}), x), plain, 1e-4), way  # DenseCross's share is small
    assert plain.std() > .1 and differ(plain[:1], plain[1:])  # the head does tell inputs apart


def test_1_global_network_starts_silent():
    "As built, BarLeRIa is its No Global row bit for bit, and every part of that is drawn alike; a map that is not zero changes the answers."
    drawn, local = build_model(tiny("barleria-tiny"), 3), build_model(tiny("barleria-noglobal-tiny"), 3)
    for n, t in local.state_dict().items(): assert torch.equal(drawn.state_dict()[n], t), n
    local, x = shaken("barleria-noglobal-tiny"), batch()
    drawn.load_state_dict(tuned_state(local), strict=False)
    assert torch.equal(ask(drawn.eval(), x), ask(local, x))
    with torch.no_grad(): drawn.head.side.weight.normal_(0, .02, generator=torch.Generator().manual_seed(0))
    assert differ(ask(drawn, x), ask(local, x))


# ---------------------------------------------------------------- 2: only what is declared trains, and all of it

def declared(name):
    "By name, without asking `requires_grad`: what a method says it trains."
    if method(name) == "full": return lambda n: n.startswith(("encoder.visual.", "encoder.text.", "head.")) and n != "encoder.text.positions"
    return lambda n: n.startswith(("encoder.tuners.", "prior.", "gst.", "head."))


# Tensors whose gradient is zero whatever the numbers are: see `test_2_silent_numbers`. In 32 bits Adam blows their rounding errors up to whole steps, so whether they move says nothing.
SILENT = {"full": r"^encoder\.visual\.norm\.bias$", "dcris": r"tuners.*(\.0\.bias|\.k\.bias)$", "detris": r"tuners.*(\.0\.bias|\.k\.bias)$"}


def silent_tensors(model):
    "Names of the tensors without a gradient."
    first = SILENT.get(method(model.config.name).removesuffix("-da"))
    return {n for n in parameters(model) if first and re.search(first, n) and not re.search(r"tuners\.1\.adapters\.\d+\.0\.", n)} # the text adapters' first map is another .0.bias


def first_step(name, row):
    """The first step with a gradient: the sentence's kernel starts at zero (`prior` of the head), so nothing before it has one in step 0, and nothing before the side door in step 1, nor before what
    else starts at zero: LoRA's B, and in each adapter of Compacter a factor of the second map."""
    if name.startswith("head.projector.text."): return 0
    late = name.startswith(("prior.", "gst.")) or name.endswith(".A") or row == "compacter" and re.search(r"maps\.\w+\.(0\.(s|t|bias)|1\.s)$", name)
    return 2 if late else 1


@every
def test_2_only_the_declared_trains(name, data):
    "Four Adam steps from the start as built, through the whole model on pictures and sentences: frozen tensors and tables stay bit for bit, all else moves."
    loop = Loop(tiny(name, epochs=1, batch=4, lr=1e-3), data.split("train"))
    model, first = loop.model, {}
    mine, before, named = declared(name), {n: t.clone() for n, t in model.state_dict().items()}, parameters(model)
    trains = {n for n, p in named.items() if p.requires_grad}
    assert trains == {n for n in named if mine(n)}
    assert {id(p) for group in loop.optimiser.param_groups for p in group["params"]} == {id(named[n]) for n in trains}
    for step, loss, _ in loop.epoch(0):
        assert loss.isfinite() and model.head.training and not model.encoder.visual.training and not model.encoder.text.training
        for n, p in named.items():
            assert (p.grad is not None) == (n in trains) and (p.grad is None or bool(p.grad.isfinite().all())), n
            if n in trains and p.grad.any(): first.setdefault(n, step)
    silent, after = silent_tensors(model), model.state_dict()
    assert step == 3 and {n: k for n, k in first.items() if n not in silent} == {n: first_step(n, method(name)) for n in trains - silent}
    moved = {n for n in before if not torch.equal(before[n], after[n]) and not re.search(r"\.parametrizations\.\w+\.\d", n)}
    assert moved | silent == set(tuned_state(model))
    assert silent <= trains <= set(tuned_state(model)) and all(mine(n) for n in tuned_state(model))


def silent_numbers(model):
    """Name and slice of every number without a gradient, all for two reasons.

    Keys' biases add the same number to all scores of a softmax. A bias in front of a batch normalisation is a constant per channel, which it subtracts again while training; so does the neck's first one
    (behind a 1 × 1 convolution without a bias) with a bias on the last tap."""
    whole = silent_tensors(model)
    for n, p in parameters(model).items():
        third, half = len(p) // 3 if p.ndim else 0, len(p) // 2 if p.ndim else 0
        if p.requires_grad and n.endswith(("in_proj_bias", "qkv.bias")): yield n, slice(third, 2 * third)
        if p.requires_grad and n.endswith(".kv.bias"): yield n, slice(half)
        if n in whole: yield n, slice(None)


@every
def test_2_silent_numbers(name):
    "Shifted by random amounts, all at once, the silent numbers change no logit in training mode: their gradient is zero everywhere. Every other tensor's is not."
    model, x = exact(name).train(), batch(dtype=torch.float64)
    silent, named = list(silent_numbers(model)), parameters(model)
    assert silent_tensors(model) <= {n for n, _ in silent} and len(silent) >= 6  # three layers of a decoder, two attentions each
    torch.manual_seed(0)  # of dropout
    logits = model(*x[:3])
    text_to_pixel_loss(logits, x[3]).backward()
    grads = {n: p.grad.clone() for n, p in named.items() if p.requires_grad}
    for n, numbers in silent:
        assert grads[n][numbers].abs().max() < 1e-14, n
        grads[n][numbers] = 0
    assert {n for n, g in grads.items() if g.abs().max() < 1e-13} == silent_tensors(model)
    g = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for n, numbers in silent: named[n][numbers] += torch.randn(named[n][numbers].shape, generator=g, dtype=torch.float64)
    torch.manual_seed(0)
    same(ask(model, x), logits.detach(), 1e-9)


# ---------------------------------------------------------------- 3: what is saved restores the answers

def bits(t): return tuple(t.shape), t.detach().numpy().tobytes()


@every
def test_3_save_and_load(name, tmp_path):
    "In a model built by the file, and in one of another seed that already stands, the answers come back bit for bit; the file holds no frozen number, and no draw or clock."
    model, file, x = shaken(name), tmp_path / "deep" / "tuned.safetensors", batch()
    save_tuned(model, file, dict(score=.5))
    back, standing = load_tuned(file), build_model(tiny(name), 7).eval()
    assert differ(ask(standing, x), ask(model, x))
    put_tuned(standing, file)
    for other in (back, standing):
        assert not other.training and torch.equal(ask(other, x), ask(model, x))
        for n, t in model.state_dict().items(): assert torch.equal(other.state_dict()[n], t), n
    stored, frozen = load_bytes(file.read_bytes()), {n: p for n, p in parameters(model).items() if not p.requires_grad}
    assert stored.keys() == tuned_state(model).keys() and any("running_var" in n for n in stored) and not stored.keys() & frozen.keys()
    assert not {bits(t) for t in stored.values()} & {bits(p) for p in frozen.values() if len(p.unique()) > 1}  # nor under another name
    assert sum(t.numel() for t in stored.values()) == count(model)[0] + sum(b.numel() for part in (model.head, model.encoder.tuners) for b in part.buffers())
    assert read_about(file)["extra"] == dict(score=.5) and read_about(file)["format"] == FORMAT and read_about(file)["towers"] == towers_hash(model)
    first = file.read_bytes()
    save_tuned(back, file, dict(score=.5))
    assert file.read_bytes() == first and [p.name for p in file.parent.iterdir()] == [file.name]


# ---------------------------------------------------------------- 4: batch mates and padding do not matter

@pytest.mark.parametrize("name", [n for n in NAMES if "detris" not in n and "etris-64" not in n])  # these hear the padding, as released
def test_4_neither_batch_mates_nor_padding_matter(name):
    "Each sample alone and unpadded; in another order; among other mates; padded to the tower's whole length; with words where the padding is."
    model, (image, ids, words, _) = exact(name), batch(dtype=torch.float64)
    together, turn = ask(model, (image, ids, words)), torch.tensor([2, 0, 1])
    same(ask(model, (image[turn], ids[turn], words[turn])), together[turn], 1e-10)
    mates = batch(dtype=torch.float64, seed=5)
    for b, n in enumerate(words.sum(1)):
        one = slice(b, b + 1)
        same(ask(model, (image[one], ids[one, :n], words[one, :n])), together[one], 1e-10)
        crowd = [torch.cat((mine[one], theirs)) for mine, theirs in zip((image, ids, words), mates)]
        same(ask(model, crowd)[:1], together[one], 1e-10)
    wide = batch(dtype=torch.float64, length=TINY["context_length"])
    same(ask(model, wide), together, 1e-10)
    full = torch.where(words, ids, GARBAGE.repeat(2)[:17])
    assert not torch.equal(full, ids)
    same(ask(model, (image, full, words)), together, 1e-10)
    other = ids.clone()
    other[0, 2] = ids[1, 2]  # "small" for "red"
    assert differ(ask(model, (image, other, words))[0], together[0])  # a word of one's own does matter


# ---------------------------------------------------------------- 5: counts

@every
@pytest.mark.parametrize("positions", [False, True])
def test_5_ledger_counts_the_real_model(name, positions):
    "Part by part; with the position tables of both towers beside it where they train."
    c = replace(tiny(name), tuners=config(name, positions).tuners)
    model, l = build_model(c), ledger(c)
    assert count(model)[0] == l["backbone"] + l["positions"] + l["prior"] + l["head"] and sum(l["parts"].values()) == l["backbone"]
    assert l["head"] == count(model.head)[0] == count(model.head)[1] and l["towers"] == count(model.encoder)[1] - count(model.encoder.tuners)[1]
    tables = model.encoder.visual.positions.numel() + model.encoder.text.positions.numel()
    assert l["positions"] == (tables if positions and method(name) != "full" else 0) and l["prior"] == (96 * 96 + 96 if name == "barleria-tinydino" else 0)  # DINO's patches know no text


def linear(a, b): return a * b + b
def norm(a): return 2 * a


def parts(visual=768, text=512, joint=512, depth=12, texts=12, dim=144, queries=128, M=4, narrow=32, K=4):
    "The papers' formulas, written out: flows on both shortcuts of a block, two bottlenecks, the global network."
    flow = lambda d: 2 * d + K * (2 * d + 1)
    module = linear(dim, dim) + norm(dim) + linear(dim, 3 * dim) + 2 * linear(dim, dim) + norm(dim) + linear(dim, 4 * dim) + linear(4 * dim, dim)
    guests = {"Intertwine.to_visual": linear(text, narrow) + linear(narrow, visual), "Intertwine.to_text": linear(visual, narrow) + linear(narrow, text)}
    flows = {"SNF.flows.visual": depth * 2 * flow(visual), "SNF.flows.text": texts * 2 * flow(text)}
    beside = {"GST.queries": queries * dim, "GST.tokens": linear(visual, dim), "GST.joint": linear(joint, dim), "GST.fuse": M * linear(visual, dim), "GST.blocks": M * module}
    return {"frozen": {}, "snf": {"SNF.flows.visual": flows["SNF.flows.visual"]}, "barleria-noglobal": guests | flows, "barleria": guests | flows | beside}


PARTS = {
    "b16": parts(), "eva02-b16": parts(), "l14": parts(1024, 768, 768, 24),
    "tiny": parts(96, 96, 96, 6, 6, 48, 32),
}
PAPER = {  # BarLeRIa, Tables 4 and 5: 0.18 M, 0.39 M and 2.21 M on ViT-B/16
    "b16": {"frozen": 0, "snf": 184_416, "barleria-noglobal": 390_656, "barleria": 2_206_496},
    "eva02-b16": {"frozen": 0, "snf": 184_416, "barleria-noglobal": 390_656, "barleria": 2_206_496},
    "l14": {"frozen": 0, "snf": 491_712, "barleria-noglobal": 792_672, "barleria": 2_829_696},
}
HEADS = {"b16": (21_095_425, 22_671_361, 74_240), "eva02-b16": (21_095_425, 22_671_361, 74_240), "l14": (22_603_521, 24_179_457, 74_240)}  # as it is, as published, the side door
FULL = {"b16": (86_561_280, 63_388_672), "eva02-b16": (86_631_680, 63_388_672), "l14": (304_625_664, 123_591_168)}  # towers, less the words' position table


@pytest.mark.parametrize("backbone", PARTS)
@pytest.mark.parametrize("row", ["full", *parts()])
def test_5_counts_of_barleria(row, backbone):
    "Without making the weights: total and parts, the head live and as published."
    l = ledger(config(f"{row}-{backbone}"))
    if row != "full": assert l["parts"] == PARTS[backbone][row] and l["backbone"] == sum(l["parts"].values())
    assert (l["positions"], l["prior"]) == (0, 0)
    if backbone == "tiny": return
    door = HEADS[backbone][2] if row == "barleria" else 0  # published without it
    assert (l["head"] - door, l["head_published"] - door) == HEADS[backbone][:2]
    if row == "full": assert (*l["parts"].values(),) == FULL[backbone] and l["backbone"] == sum(FULL[backbone]) < l["towers"]
    else: assert l["backbone"] == PAPER[backbone][row]
    if row == "barleria" and backbone != "l14": assert sum(n for k, n in l["parts"].items() if k.startswith("GST.")) == 1_815_840
    if f"{row}-{backbone}" == "snf-b16": assert ledger(config("snf-b16", train_positions=True))["positions"] == 559_360


SIZES = {"etris-b16": 1_387_648, "etris-b14": 1_387_648, "etris-64-b16": 598_592, "snf+etris-b16": 1_572_064, "adapter-b14": 1_982_976, "compacter-b14": 1_622_080, "lora-b14": 1_572_864,
    "full-b14": 149_705_728, "dcris-b14": 2_694_048, "dcris-d128-64-b14": 2_694_048, "dcris-l14": 3_088_800, "dcris-da-b14": 2_297_376, "dcris-ta-b14": 396_672, "dcris-d64-64-b14": 1_912_848,
    "dcris-d128-128-b14": 3_087_648, "dcris-d256-128-b14": 4_832_064, "detris-b14": 2_715_696, **{f"dcris-{n}-b14": 449_008 * n for n in (1, 2, 3, 4, 5, 7, 8, 12)}}


@pytest.mark.parametrize("name", SIZES)
def test_5_counts_of_the_rivals_and_of_dcris(name):
    "What both papers print, to the last digit as far as it is known; the printed tables themselves are in test_papers.py."
    l = ledger(config(name))
    assert l["backbone"] == SIZES[name] and l["head"] == (21_619_713 if name == "dcris-l14" else 21_226_497 if name.endswith("-b14") else 21_095_425)
    assert l["head_published"] == l["head"] + 1_575_936  # queries and keys that never train
    if name == "dcris-b14": assert l["parts"] == {"DenseCross.adapters": 6 * 382_896, "TextAdapter.adapters": 6 * 66_112}


@pytest.mark.parametrize("name", [n for n in configurations() if ALIKE.match(n) and n.endswith(("-tiny", "-tinydino"))])
def test_5_rows_that_differ_in_size(name):
    "They are built, answer, and count what the ledger says."
    model = build_model(tiny(name))
    assert ask(model, batch()).shape == (3, 1, 32, 32) and count(model)[0] == ledger(model.config)["backbone"] + count(model.head)[0]
    n, where = re.search(r"dcris-([0-9]+)-tiny", name), model.encoder.tuners[0].positions
    assert len(where) == len(model.encoder.tuners[1].positions) == (int(n[1]) if n else 6)


def test_5_towers_are_the_same_ones_whoever_tunes_them():
    "LoRA moves weights behind a parametrisation: the towers' fingerprint does not change."
    for towers in ("tiny", "tinydino"): assert len({towers_hash(build_model(tiny(f"{m}-{towers}"))) for m in ("frozen", "lora", "snf", "dcris")}) == 1


# ---------------------------------------------------------------- 6: precisions and devices

def learnt(model, x):
    "Logits in evaluation mode, and the gradient of the loss as one row."
    model.zero_grad()
    logits = model(*x[:3])
    text_to_pixel_loss(logits.double(), x[3].double()).backward()
    return logits.detach().cpu().double(), torch.cat([p.grad.flatten().cpu().double() for p in model.parameters() if p.requires_grad])


def off(a, b):
    "Relative distance of two answers, and of two gradients."
    assert all(t.isfinite().all() for t in b)
    return [((s - t).norm() / s.norm()).item() for s, t in zip(a, b)]


@every
def test_6_precision(name):
    "32 bits follow 64; bf16, of all numbers or by autocast, follows loosely. Forward and backward."
    model = shaken(name)
    plain = learnt(model, batch())
    with torch.autocast("cpu", torch.bfloat16): mixed = learnt(model, batch())
    truth, whole = learnt(exact(name), batch(dtype=torch.float64)), learnt(model.bfloat16(), batch(dtype=torch.bfloat16))
    assert max(off(truth, plain)) < 1e-4 and max(off(truth, mixed) + off(truth, whole)) < .15


@every
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CPU and CUDA agree: no CUDA device here")
def test_6_devices(name):
    "The same numbers on CUDA: as far as 64 bits go, and in 32 as far as its fast convolutions do."
    there = lambda x: [t.cuda() for t in x]
    truth = learnt(exact(name), batch(dtype=torch.float64))
    assert max(off(truth, learnt(exact(name).cuda(), there(batch(dtype=torch.float64))))) < 1e-8
    assert max(off(truth, learnt(shaken(name).cuda(), there(batch())))) < .02


# ---------------------------------------------------------------- 7: stored traces

def trace(data, name):
    "Losses of five steps of three sentences, random towers, seed 0."
    loop = Loop(tiny(name, epochs=1, batch=3, lr=1e-4), data.split("train"))
    return [loss.item() for (_, loss, _), _ in zip(loop.epoch(0), range(5))]


@every
def test_7_trace(name, data):
    "Five steps give the stored losses to a thousandth. The same in double precision differs by a hundred-thousandth: rounding cannot be the reason."
    stored = json.loads(TRACES.read_text())
    assert name in stored, f"no stored trace for {name}: run `python tests/test_contracts.py`"
    assert trace(data, name) == pytest.approx(stored[name], rel=1e-3)


# ---------------------------------------------------------------- at full size

@pytest.mark.full
@pytest.mark.parametrize("name,grid", [("barleria-b16", 26), ("barleria-l14", 30), ("barleria-eva02-b16", 26), ("dcris-b14", 32), pytest.param("dcris-l14", 32, marks=pytest.mark.long),
    pytest.param("lora-b14", 32, marks=pytest.mark.long), pytest.param("snf+etris-b16", 26, marks=pytest.mark.long), pytest.param("detris-b14", 32, marks=pytest.mark.long)])
def test_full_size_step(name, grid):
    "One picture, forward and backward, with the side door open: every declared tensor gets a finite gradient that is not zero, no other gets any."
    model = build_model(config(name))
    with torch.no_grad():
        if model.head.side: model.head.side.weight.normal_(0, .02, generator=torch.Generator().manual_seed(0))
        for n, p in parameters(model).items():
            if n.endswith(".B"): p.normal_(0, .02, generator=torch.Generator().manual_seed(0))
    image, ids, words, mask = batch(model.config.size, said=SAID[1:2])
    logits = model(image, ids, words)
    assert logits.shape == (1, 1, 4 * grid, 4 * grid) and logits.isfinite().all() and logits.std() > 0
    text_to_pixel_loss(logits, mask).backward()
    for n, p in parameters(model).items():
        assert (p.grad is not None) == p.requires_grad == (not n.startswith(("encoder.visual.", "encoder.text."))), n
        if p.requires_grad: assert p.grad.isfinite().all() and (p.grad.abs().max() > 0 or n in silent_tensors(model)), n
    l = ledger(model.config)
    assert count(model)[0] == l["backbone"] + l["head"]


@pytest.mark.long
@every
def test_fifty_steps_lower_the_loss(name, data):
    "On eight objects over and over, with the towers that ship: the loss of the last five steps is well below that of the first five."
    loop = Loop(config(name, epochs=50, batch=8, lr=5e-4), first_refs(data.split("train"), 8))
    losses = [loss.item() for epoch in range(50) for _, loss, _ in loop.epoch(epoch)]
    assert len(losses) == 50 and sum(losses[-5:]) < .8 * sum(losses[:5]), losses


# ---------------------------------------------------------------- bad input to the global network

SMALL = config("barleria-tiny").gst


def built(**gst): return build_model(tiny("barleria-tiny", gst=gst))


@pytest.mark.parametrize("blocks,modules", [(3, 4), (6, 7), (1, 2)])
def test_too_few_blocks(monkeypatch, blocks, modules):
    def shallow(backbone, **_):
        source = build_tiny_clip(range(40), dict(TINY, layers=blocks))
        return DualEncoder(visual_tower(source.visual), TextTower(source), name=backbone)
    monkeypatch.setattr(assembly, "build_encoder", shallow)
    line(lambda: built(**SMALL | dict(modules=modules)), f"{modules} modules", f"{blocks} blocks")


@pytest.mark.parametrize("modules", [1, 3, 5])
def test_modules_that_do_not_match_the_taps(modules):
    "The encoder gives four depths; another M is refused when the model is built, or at the latest when it is first asked."
    line(lambda: ask(built(**SMALL | dict(modules=modules)), batch()), str(modules))


@pytest.mark.parametrize("side", [(60, 60), (64, 60), (72, 72), (7, 7), (0, 0)])
def test_picture_that_does_not_divide_into_patches(side):
    "Or that divides into other patches than the tower has positions for."
    _, ids, words, _ = batch()
    line(lambda: ask(build_model(tiny("barleria-tiny")), (torch.zeros(3, 3, *side), ids, words)), str((3, *side)), "letterbox")


def test_text_tower_without_a_projection():
    source = build_tiny_clip(range(40))
    source.text_projection = None
    line(lambda: TextTower(source), "projection")


@pytest.mark.parametrize("gst", [
    {}, [], "x", 1, True, {k: v for k, v in SMALL.items() if k != "dim"}, SMALL | dict(more=1), SMALL | dict(dim=[48]), SMALL | dict(heads=5), SMALL | dict(dim=50),
    *(SMALL | {k: v} for k in SMALL for v in (0, -3, 1.5, float("nan"), "48", None, True) if (k, v) != ("queries", 0)),
], ids=lambda g: " ".join(f"{k}={v}" for k, v in g.items() if SMALL.get(k) is not v) or "no dim" if isinstance(g, dict) and g else repr(g))
def test_nonsense_settings(gst):
    "Refused by the configuration, or when the model is built."
    line(lambda: build_model(tiny("barleria-tiny", gst=gst)))


if __name__ == "__main__":
    import tempfile
    with tempfile.TemporaryDirectory() as top:
        drawn = RefSet.read(make_refshapes(Path(top) / "set", scenes=dict(train=6, val=2, testA=1, testB=1), workers=1, progress=False))
        stored, now = json.loads(TRACES.read_text()), {name: [round(v, 6) for v in trace(drawn, name)] for name in NAMES}
        kept = {name: stored[name] for name in NAMES if now[name] == pytest.approx(stored.get(name, []), rel=1e-3)}  # other machines round otherwise
        TRACES.write_text(json.dumps(now | kept, indent=1) + "\n")
