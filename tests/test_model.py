"Configurations, and files of tuned numbers, hostile ones too; what every method must keep is in test_contracts.py."
import json
import struct
import warnings
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load as load_bytes
from safetensors.torch import save

from barleria_nb.model import (BACKBONES, TYPES, Config, build_model, config, configurations, ledger, load_tuned, put_tuned, read_about,
                               save_tuned, scaled, share_name, sizes, towers_hash, tuned_state)
from common import line

TINY = [n for n in configurations() if n.endswith("-tiny")]


def tiny(name, **changes): return config(name, **{"pretrained": False, **changes})


def batch(size=config("snf-tiny").size, lengths=(5, 9), length=17, seed=0):
    "Random pictures, sentences of the given lengths, masks."
    g = torch.Generator().manual_seed(seed)
    n = len(lengths)
    words = torch.arange(length) < torch.tensor(lengths)[:, None]
    ids = torch.randint(300, 49000, (n, length), generator=g) * words
    ids[:, 0], ids[torch.arange(n), words.sum(1) - 1] = 49406, 49407
    return torch.randn(n, 3, size, size, generator=g), ids, words, (torch.rand(n, 1, size, size, generator=g) > .8).float()


def shaken(name, seed=1):
    "A model none of whose tuned numbers, running statistics included, is where it was built."
    model = build_model(tiny(name), seed)
    for _ in range(2): model(*batch(seed=_)[:3])  # moves the running statistics
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad: p += .02 * torch.randn(p.shape, generator=g)
    return model.eval()


# ---------------------------------------------------------------- configurations and counts

def test_configurations_are_json_and_come_back():
    for name in configurations():
        for positions in (False, True):
            c = config(name, positions, words=22, lr=3e-4)
            stored = json.loads(json.dumps(asdict(c)))
            assert stored["words"] == 22 and stored["name"] == name and c.backbone in BACKBONES
            assert any(kind == "positions" for kind, _ in stored["tuners"]) is positions


def test_rows_share_nothing_that_can_be_changed():
    "Who changes the dictionaries of one configuration changes no other, and not the table."
    for name in ("barleria-b16", "barleria-tiny", "detris-b14"):
        before, other = json.dumps(asdict(config(name))), config("barleria-b16")
        c = config(name)
        for part in (c.head, c.gst, *(arguments for _, arguments in c.tuners)):
            if part is not None: part["width"] = part["dim"] = 7
        assert json.dumps(asdict(config(name))) == before and config("barleria-b16") == other


@pytest.mark.parametrize("changes", [dict(epochs=0), dict(batch=True), dict(words=2), dict(size=1.5), dict(lr=0), dict(lr=float("inf")), dict(lr="1"), dict(drop=-1), dict(drop=2), dict(pretrained=1)])
def test_settings_are_checked(changes): line(lambda: config("snf-tiny", **changes), *changes)


@pytest.mark.parametrize("tuners, words", [
    (None, ["list of pairs"]), ("snf", ["list of pairs"]), ([("snf",)], ["list of pairs"]), ({"snf": {}}, ["list of pairs"]), ([("sfn", {})], ["Did you mean snf"]), ([(None, {})], ["no tuner None"]), ([(["snf"], {})], ["no tuner"]),
    ([("snf", None)], ["dictionary"]), ([("snf", dict(tower=("text",)))], ["Did you mean towers"]), ([("snf", {1: 2})], ["no argument 1"]), ([("snf", dict(self=1))], ["no argument"]), ([("full", dict(x=1))], ["it has none"]),
    ([("snf", dict(towers=5))], ["towers of snf is 5"]), ([("snf", dict(length="4"))], ["give int, such as 4"]), ([("snf", dict(length=0))], ["length"]), ([("intertwine", dict(width=2.5))], ["2.5"]), ([("bridger", dict(heads=True))], ["True"]),
    ([("lora", dict(alpha=float("nan")))], ["alpha"]), ([("densecross", dict(positions="ab"))], ["block numbers"]), ([("densecross", dict(positions=range(3)))], ["block numbers"]), ([("densecross", dict(branches=3))], ["branches"]),
    ([("densecross", dict(dropout=7))], ["below 1"]), ([("textadapter", dict(scale=None))], ["scale"]), ([("snf", dict(length="x" * 9000 + "\n"))], ["length"])])
def test_tuners_are_checked_by_signature(tuners, words): line(lambda: config("snf-tiny", tuners=tuners), *words)


@pytest.mark.parametrize("head", [None, 3, "wide", [], dict(wide=1), dict(width="96"), dict(width=0), dict(width=96.), dict(heads=-1), dict(ffn=True), dict(layers=0), dict(width=10**30), dict(dropout=2), dict(dropout="x"),
    dict(prior=0), dict(prior=1.5), dict(prior=float("nan")), dict(residual="no"), dict(side=48), dict(dims=(1, 2, 3)), {3: 4}])
def test_head_is_checked_by_signature(head): line(lambda: config("snf-tiny", head=head))


def test_what_signatures_allow_is_built():
    "Arguments that no row uses, one name alone, and lists as JSON makes them."
    for tuners in ([["snf", {"towers": ["text"], "length": 2, "form": "hadamard"}]], [("adapter", dict(width=8, parts="attn", at=2))], [("lora", dict(rank=2, visual="q", alpha=4))], [("textadapter", dict(positions=[0, 5], normed=True))]):
        assert build_model(tiny("snf-tiny", tuners=tuners, head=dict(width=32, heads=2, ffn=16, layers=1, dropout=0, prior=None))).head.decoder.norm.weight.numel() == 32


@pytest.mark.parametrize("wrong", [dict(name=3), dict(backbone="tinny"), dict(backbone=["tiny"]), dict(backbone=None)])
def test_a_configuration_of_ones_own_is_checked(wrong): line(lambda: Config(**{**dict(name="mine", backbone="tiny"), **wrong}), *wrong)


@pytest.mark.parametrize("make", [build_model, ledger])
@pytest.mark.parametrize("wrong", ["snf-tiny", None, 3, {}, Config])
def test_a_name_is_no_configuration(make, wrong): line(lambda: make(wrong), "no configuration")


@pytest.mark.parametrize("seed", [-1, 1.5, "0", None, 2**70, True])
def test_seeds_are_checked(seed): line(lambda: build_model(tiny("snf-tiny"), seed), "seed")


def test_positions_are_a_switch(): line(lambda: config("snf-tiny", 22), "train_positions")


def test_which_towers_a_name_means():
    "-l14 is CLIP's for BarLeRIa and its rivals, DINOv2's for DCRIS."
    found = {n: config(n).backbone for n in configurations()}
    assert [found[n] for n in ("snf-l14", "full-l14", "dcris-l14", "dcris-da-l14", "detris-l14")] == ["l14", "l14", "dino-l14", "dino-l14", "detris-l14"]
    assert [found[n] for n in ("barleria-b14", "lora-b14", "dcris-3-b14", "detris-b14", "dcris-tinydino")] == ["dino-b14", "dino-b14", "dino-b14", "detris-b14", "tiny-dino"]
    assert "dcris-b16" not in found and "dcris-7-tiny" not in found and len(found) == len(configurations())


def test_unknown_names():
    line(lambda: config("barleria-noglobal-b61"), "Did you mean", "barleria-noglobal-b16")
    line(lambda: config("x" * 5000 + "\n"), "no configuration")
    line(lambda: config(None), "no configuration")
    line(lambda: config("snf-tiny", epoch=2), "Did you mean epochs")


def test_ledger_does_not_touch_random_numbers_or_memory():
    before = torch.get_rng_state()
    ledger(config("snf-l14"))
    assert torch.equal(torch.get_rng_state(), before)


def test_building_leaves_all_generators_alone(monkeypatch):
    "Those of GPUs too, which `torch.manual_seed` would seed."
    def seeded(seed): raise AssertionError("the caller's GPU generators were seeded")
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded)
    before = torch.random.get_rng_state()
    build_model(config("snf-tiny"), 3)
    assert torch.equal(torch.random.get_rng_state(), before)


# ---------------------------------------------------------------- equal shares

@pytest.mark.parametrize("method, kind, knob, step, most", [("adapter", "adapter", "width", 1, 14), ("lora", "lora", "rank", 1, 6), ("etris", "bridger", "width", 4, 24), ("snf", "snf", "length", 1, 13), ("dcris-ta", "textadapter", "down", 1, 26)])
def test_a_share_is_the_nearest_of_all_sizes(method, kind, knob, step, most):
    "Against all sizes tried one after another, for rows with one size."
    row = config(f"{method}-tiny")
    tried = {n: ledger(replace(row, tuners=tuple((k, a | {knob: n}) for k, a in row.tuners)))["share"] for n in range(step, most, step)}
    for percent in (.5, 1, 2):
        best = min(tried, key=lambda n: abs(tried[n] - percent / 100))
        assert sizes(scaled(row.name, percent)) == {(kind, knob): (best, step)} and abs(tried[best] - percent / 100) <= percent / 500


@pytest.mark.parametrize("name", ["compacter-tiny@0.5%", "snf+etris-tiny@2%", "barleria-noglobal-tinydino@1%", "barleria-tiny@1%", "dcris-tinydino@2%", "dcris-1-tiny@1%", "detris-tiny@4%", "etris-64-tiny@0.5%"])
def test_rows_of_several_sizes_keep_all_else_and_run(name):
    "Only sizes change, each a multiple of its step, all by about one factor; the model is built and learns."
    plain, c = config(name.split("@")[0]), config(name)
    assert replace(c, name=plain.name, tuners=plain.tuners, gst=plain.gst) == plain and [k for k, _ in c.tuners] == [k for k, _ in plain.tuners]
    wanted = float(name.split("@")[1][:-1]) / 100
    assert abs(ledger(c)["share"] - wanted) <= wanted / 5
    old, new = sizes(plain), sizes(c)
    assert old.keys() == new.keys() and all(v % step == 0 and v >= step for v, step in new.values())
    low, high = max([(v - step / 2) / old[k][0] for k, (v, step) in new.items() if v > step], default=0), min((v + step / 2) / old[k][0] for k, (v, step) in new.items())
    assert low <= high # there is a factor that rounds to all of them
    model = build_model(replace(c, pretrained=False))
    image, ids, words, mask = batch()
    model(image, ids, words).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert sum(p.numel() for p in model.encoder.parameters() if p.requires_grad) + sum(p.numel() for p in (model.gst.parameters() if model.gst else ())) == ledger(c)["backbone"]


@pytest.mark.parametrize("name, words", [
    ("frozen-tiny@1%", ["no sizes"]), ("full-b16@1%", ["no sizes"]), ("dcris-tiny@0.5%", ["no nearer to 0.5 %", "densecross down 16", "another share"]), ("lora-tiny@0.2%", ["no nearer"]), ("lora-tyni@1%", ["no configuration 'lora-tyni'"]),
    ("lora-tiny@25%", ["0.01 to 20"]), ("lora-tiny@0%", ["0.01 to 20"]),
    *((n, ["no configuration", "lora-tiny@1%"]) for n in ("@", "@1%", "lora-tiny@", "lora-tiny@1", "lora-tiny@-1%", "lora-tiny@1e9%", "lora-tiny@1.0%", "lora-tiny@01%", "lora-tiny@1.234%", "lora-tiny@nan%", "lora-tiny@1%@1%", "lora-tiny@1%\n", " lora-tiny@%", "lora-tiny@\u0661%", "@" * 10**6,
        "lora-tiny@" + "9" * 5000 + "%"))])
def test_names_with_a_share_that_are_none(name, words): line(lambda: config(name), *words)


def test_what_a_share_is_asked_of():
    line(lambda: scaled(None, 1), "no configuration")
    line(lambda: scaled(["lora-tiny"], 1), "no configuration")
    line(lambda: scaled("lora-tiny@1%", 1), "no configuration")
    for percent in (0, -1, 20.01, float("nan"), float("inf"), 1.234, "1", True, None): line(lambda: share_name("lora-tiny", percent), "0.01 to 20")
    assert [share_name("lora-tiny", p) for p in (.5, 1, 2., 12.34)] == [f"lora-tiny@{p}%" for p in ("0.5", "1", "2", "12.34")]


def test_a_share_of_large_towers_makes_no_weights():
    before = torch.get_rng_state()
    c = config("lora-b16@1%", words=22)
    assert abs(ledger(c)["share"] - .01) < 5e-4 and c.words == 22 and torch.equal(torch.get_rng_state(), before)
    assert ledger(config("lora-tiny@1%", True))["positions"] > 0 and ledger(config("lora-tiny@1%", True))["backbone"] == ledger(config("lora-tiny@1%"))["backbone"]
    assert not any("@" in n for n in configurations())


def test_a_file_of_a_configuration_at_a_share(tmp_path):
    "It goes there and back by its name; sizes in a file that are not what its name means are refused."
    model, file = shaken("lora-tiny@1%"), tmp_path / "t.safetensors"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_tuned(model, file)
    back = load_tuned(file)
    assert back.config == model.config and all(torch.equal(t, tuned_state(back)[n]) for n, t in tuned_state(model).items())
    about = read_about(file)
    for changes, word in ((dict(name="lora-tiny@2%"), "another configuration"), (dict(name="lora-tiny@1.0%"), "no configuration"), (dict(name="lora-tiny@1e9%"), "no configuration"), (dict(name="full-tiny@1%"), "no sizes"),
                          (dict(tuners=[["lora", dict(rank=10**6)]]), "another configuration"), (dict(json.loads(json.dumps(asdict(tiny("lora-tiny@2%"))))), "tensor")):
        (tmp_path / "bad.safetensors").write_bytes(save(load_bytes(file.read_bytes()), {"barleria": json.dumps(about | dict(config=about["config"] | changes))}))
        line(lambda: load_tuned(tmp_path / "bad.safetensors"), word, "bad.safetensors")


# ---------------------------------------------------------------- the model

def test_seed_moves_what_trains_and_nothing_else():
    a, b, c = (build_model(tiny("barleria-noglobal-tiny"), s) for s in (0, 0, 1))
    assert towers_hash(a) == towers_hash(b) == towers_hash(c)
    for n, t in tuned_state(a).items():
        assert torch.equal(t, tuned_state(b)[n])
    assert not torch.equal(a.head.neck.text.weight, c.head.neck.text.weight)


# ---------------------------------------------------------------- files

def test_forgotten_statistics_would_show():
    "The running statistics matter: without them the answers differ."
    model = shaken("frozen-tiny")
    other = build_model(model.config).eval()
    other.load_state_dict({n: t for n, t in tuned_state(model).items() if "running" not in n}, strict=False)
    with torch.no_grad(): assert (model(*batch()[:3]) - other(*batch()[:3])).abs().max() > 1e-3


@pytest.mark.parametrize("own", [dict(name="mine"), dict(head=dict(width=48, heads=3, ffn=48)), dict(tuners=(("snf", dict(towers=("text",))),))])
def test_a_configuration_of_ones_own_warns_and_comes_back(own, tmp_path):
    "Saved with a warning, refused by name, and read into a model that was built from it."
    file, model = tmp_path / "own.safetensors", build_model(replace(tiny("snf-tiny"), **own), 3)
    with pytest.warns(UserWarning, match="put_tuned"): save_tuned(model, file)
    line(lambda: load_tuned(file), str(file))
    other = build_model(model.config, 4)
    put_tuned(other, file)
    for n, t in model.state_dict().items(): assert torch.equal(other.state_dict()[n], t), n


def test_a_configuration_of_ours_does_not_warn(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_tuned(build_model(config("snf-tiny", True, pretrained=False, words=22, lr=1e-2)), tmp_path / "ours.safetensors")
        load_tuned(tmp_path / "ours.safetensors")


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    "A saved model: its bytes, its note and its tensors."
    file = tmp_path_factory.mktemp("stored") / "tuned.safetensors"
    save_tuned(shaken("snf-tiny"), file)
    return file.read_bytes(), read_about(file), load_bytes(file.read_bytes())


def raw(header, body=b""):
    "A safetensors file with this header, whatever it says."
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def spoiled(stored, kind):
    whole, about, tensors = stored
    note = lambda **changes: {"barleria": json.dumps({**about, **changes})}
    settings = lambda **changes: save(tensors, note(config={**about["config"], **changes}))
    first = next(n for n in tensors if n.startswith("encoder.tuners") and n.endswith(".w"))
    same = {"barleria": json.dumps(about)}
    return {
        "empty": b"", "seven bytes": whole[:7], "cut header": whole[:200], "cut body": whole[:-100], "longer": whole + b"\0" * 100,
        "random": bytes(torch.randint(0, 256, (5000,), generator=torch.Generator().manual_seed(3), dtype=torch.uint8).tolist()),
        "pickle": b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
        "huge header": struct.pack("<Q", 2**63 - 1) + whole[8:], "large header": struct.pack("<Q", 2**25) + b" " * 2**25,
        "huge tensor": raw({"x": dict(dtype="F32", shape=[2**40], data_offsets=[0, 2**42])}),
        "overflow": raw({"x": dict(dtype="F32", shape=[2**33, 2**33], data_offsets=[0, 4])}, b"\0" * 4),
        "header is a list": raw([1, 2]), "header is not utf-8": raw(b"\xff\xfe{}"), "unknown type": raw({"x": dict(dtype="Q9", shape=[1], data_offsets=[0, 1])}, b"\0"),
        "no note": save(tensors), "note is no JSON": save(tensors, {"barleria": "{"}), "note is nested": save(tensors, {"barleria": "[" * 100_000}),
        "note is a list": save(tensors, {"barleria": "[]"}), "note is short": save(tensors, {"barleria": "{}"}),
        "old format": save(tensors, note(format="version 0")), "more in the note": save(tensors, note(more=1)),
        "config is text": save(tensors, note(config="snf-tiny")), "config is a list": save(tensors, note(config=[])), "config is empty": save(tensors, note(config={})),
        "config is none": save(tensors, note(config=None)), "no such name": settings(name="snf-huge"), "name with a newline": settings(name="a\nb"), "name is a list": settings(name=["snf-tiny"]),
        "other method": settings(name="frozen-tiny"), "other tuners": settings(tuners=[["snf", dict(towers=["text"])]]), "odd tuners": settings(tuners=[1]), "tuners is a number": settings(tuners=3),
        "wide head": settings(head=dict(width=10**6, heads=3, ffn=96)), "words": settings(words=10**9), "words is text": settings(words="many"), "epochs": settings(epochs=-1),
        "lr": settings(lr="fast"), "lr is nan": settings(lr=float("nan")), "one more setting": settings(evil=1), "size": settings(size=10**6), "pretrained is text": settings(pretrained="yes"),
        "other configuration": save(tensors, note(config=json.loads(json.dumps(asdict(tiny("frozen-tiny")))))),
        "other towers": save(tensors, note(towers="0" * 64)), "towers is none": save(tensors, note(towers=None)),
        "one more tensor": save({**tensors, "encoder.visual.positions": torch.zeros(65, 96)}, same), "name with newline": save({**tensors, "a\nb" * 300: torch.zeros(1)}, same),
        "one tensor less": save({n: t for n, t in tensors.items() if n != first}, same),
        "other shape": save({**tensors, first: tensors[first].T.contiguous()}, same), "other type": save({**tensors, first: tensors[first].half()}, same),
        "whole numbers": save({**tensors, first: tensors[first].long()}, same), "not a number": save({**tensors, first: tensors[first] * float("nan")}, same),
    }[kind]


CUT = "empty", "seven bytes", "cut header", "cut body", "longer", "random", "pickle", "huge header", "large header", "huge tensor", "overflow", "header is a list", "header is not utf-8", "unknown type"
NOTE = "no note", "note is no JSON", "note is nested", "note is a list", "note is short", "old format", "more in the note"
CONFIG = ("config is text", "config is a list", "config is empty", "config is none", "no such name", "name with a newline", "name is a list", "other method", "other tuners", "odd tuners",
          "tuners is a number", "wide head", "words", "words is text", "epochs", "lr", "lr is nan", "one more setting", "size", "pretrained is text")
OTHER = "other towers", "towers is none", "other configuration"
TENSORS = "one more tensor", "name with newline", "one tensor less", "other shape", "other type", "whole numbers", "not a number"


@pytest.mark.parametrize("kind", CUT + NOTE + CONFIG + OTHER + TENSORS)
def test_hostile_file(stored, kind, tmp_path):
    "One line that names the file."
    file = tmp_path / "hostile.safetensors"
    file.write_bytes(spoiled(stored, kind))
    line(lambda: load_tuned(file), str(file))


@pytest.fixture(scope="module")
def standing(): return build_model(tiny("snf-tiny"))


@pytest.mark.parametrize("kind", CUT + TENSORS)
def test_hostile_file_leaves_the_model_alone(stored, standing, kind, tmp_path):
    file = tmp_path / "hostile.safetensors"
    file.write_bytes(spoiled(stored, kind))
    before = {n: t.clone() for n, t in standing.state_dict().items()}
    line(lambda: put_tuned(standing, file), str(file))
    for n, t in standing.state_dict().items(): assert torch.equal(t, before[n]), n


def test_missing_and_folder(tmp_path):
    line(lambda: load_tuned(tmp_path / "none.safetensors"), "is missing")
    line(lambda: load_tuned(tmp_path), "is missing")


def test_fingerprint_sees_weights_and_tables_but_not_what_trains():
    model = build_model(tiny("snf-tiny"))
    first = towers_hash(model)
    with torch.no_grad(): model.encoder.tuners[0].flows["visual"][0]["attn"].mu += 1
    assert towers_hash(model) == first
    with torch.no_grad(): model.encoder.visual.blocks[3].attn.out.weight[0, 0] += 1e-6
    second = towers_hash(model)
    model.encoder.text.embedding.index[320] += 1
    assert len({first, second, towers_hash(model)}) == 3


@pytest.mark.filterwarnings("ignore:no tiny-clip")
def test_types_cover_what_models_hold():
    for name in TINY: assert {t.dtype for t in tuned_state(build_model(tiny(name))).values()} <= TYPES.keys()
