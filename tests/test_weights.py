"Real weights: where they are looked for, what is refused, and that they give open_clip's own numbers. Nothing here touches a network."
import hashlib
import inspect
import io
import os
import pickle
import re
import struct
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from huggingface_hub import constants
from huggingface_hub.errors import RevisionNotFoundError
from safetensors.torch import save, save_file
from timm.layers import resample_abs_pos_embed

import barleria_nb.backbones as module
from timm.models.vision_transformer import checkpoint_filter_fn

from barleria_nb.backbones import CLIPS, DINOS, WEIGHTS, build_encoder, clip_encoder, dino_encoder, find_weights, fingerprint, hub_place, read_weights, tiny_clip, tiny_dino, weights_folder, weights_sum
from common import line

STAND_IN = dict(embed_dim=16, quick_gelu=True, vision_cfg=dict(image_size=32, layers=3, width=16, head_width=8, patch_size=8),
    text_cfg=dict(context_length=77, vocab_size=49408, width=16, heads=2, layers=3)) # b16's place, at 1/200 of its size


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    "Neither a network nor anybody's files: whoever asks the hub fails the test."
    def never(*args, **kw): pytest.fail("the hub was asked")
    monkeypatch.setattr(module, "get_hf_file_metadata", never)
    monkeypatch.setattr(module, "hf_hub_download", never)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path/"hub"))
    monkeypatch.setenv("BARLERIA_WEIGHTS", str(tmp_path/"weights"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    (tmp_path/"weights").mkdir()


@pytest.fixture
def stand_in(monkeypatch):
    "A small CLIP in b16's place; its random numbers by name."
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "stand-in", STAND_IN)
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "stand-in", {"openai": {"hf_hub": "some/where/"}})
    monkeypatch.setitem(CLIPS, "b16", ("stand-in", 48))
    torch.manual_seed(0)
    return {k: t.clone() + .02 * torch.randn_like(t) for k, t in module._clip("stand-in").state_dict().items()}


@pytest.fixture
def small_dino(monkeypatch, stand_in):
    "A small DINOv2 in dino-b14's place, beside that CLIP's text tower; its random numbers by name."
    make = module.timm.create_model
    def small(name, img_size=70, **kw): return make(name, img_size=img_size, embed_dim=32, depth=3, num_heads=2, **kw)
    monkeypatch.setattr(module.timm, "create_model", small)
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-B-16-quickgelu", STAND_IN)
    monkeypatch.setitem(CLIPS, "b16", ("ViT-B-16-quickgelu", 48))
    monkeypatch.setitem(DINOS, "dino-b14", (DINOS["dino-b14"][0], 42))
    save_file(stand_in, weights_folder()/"b16.safetensors")
    torch.manual_seed(2)
    return {k: t + .02 * torch.randn_like(t) for k, t in small(DINOS["dino-b14"][0], num_classes=0).state_dict().items()}


def numbers(encoder, size):
    "What a picture and a sentence become in the joint space."
    torch.manual_seed(1)
    image, ids, words = torch.randn(1, 3, size, size), torch.zeros(1, 77, dtype=torch.long), torch.arange(77)[None] < 9
    ids[:, 1:8], ids[:, 0], ids[:, 8] = torch.randint(300, 40000, (1, 7)), 49406, 49407
    with torch.no_grad():
        if isinstance(encoder, module.DualEncoder): out = encoder(image, ids, words); return out.pooled, out.sentence
        return encoder.encode_image(image), encoder.encode_text(ids)


# --------------------------------------------------------------------------------------------------- the table and the folder
def test_every_clip_is_pinned_and_open_clip_knows_it():
    assert set(WEIGHTS) == {*CLIPS, *DINOS}
    for name, pin in ((n, WEIGHTS[n]) for n in CLIPS):
        assert re.fullmatch("[0-9a-f]{40}", pin["revision"]) and re.fullmatch("[0-9a-f]{64}", pin["sha256"])
        assert (CLIPS[name][0], pin["tag"]) in open_clip.list_pretrained()
    assert hub_place("b16") == ("timm/vit_base_patch16_clip_224.openai", "open_clip_model.safetensors")
    assert len({WEIGHTS[n]["sha256"] for n in CLIPS}) == 3


def test_where_the_dinos_are():
    "timm knows them; no sum of theirs is known, so the newest revision is asked for and nothing is compared."
    for name, (model, _) in DINOS.items():
        assert hub_place(name) == (f"timm/{model}.lvd142m", "model.safetensors") and WEIGHTS[name] == dict(tag="lvd142m", revision="main", sha256=None)


def test_folder(monkeypatch, tmp_path):
    assert weights_folder() == tmp_path/"weights"
    monkeypatch.setenv("BARLERIA_WEIGHTS", "~/mine")
    assert weights_folder() == Path.home()/"mine"
    for unset in ("", None):
        monkeypatch.setenv("BARLERIA_WEIGHTS", unset) if unset is not None else monkeypatch.delenv("BARLERIA_WEIGHTS")
        assert weights_folder() == Path.home()/".cache"/"barleria_nb"/"weights"


def test_own_file_comes_first(stand_in, monkeypatch):
    for ending in (".bin", ".pt", ".safetensors"):
        path = weights_folder()/f"b16{ending}"
        save_file(stand_in, path) if ending == ".safetensors" else torch.save(stand_in, path)
        with pytest.warns(UserWarning, match="not the published file"): assert find_weights("b16") == path
        with pytest.warns(UserWarning, match=fingerprint(path)): assert find_weights("b16", revision="main") == path
    with pytest.warns(UserWarning): encoder = build_encoder("b16", pretrained=True)
    assert encoder.name == "b16" and torch.equal(encoder.visual.conv.weight, stand_in["visual.conv1.weight"])
    monkeypatch.setitem(WEIGHTS, "b16", WEIGHTS["b16"] | {"sha256": fingerprint(path)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find_weights("b16") == path


def test_which_file_it_was(stand_in, monkeypatch, tmp_path):
    "The fingerprint of the file that would be read; without one the published sum, which DINOv2 lacks."
    assert (weights_sum("b16"), weights_sum("dino-b14")) == (WEIGHTS["b16"]["sha256"], None)
    there = cached(stand_in, WEIGHTS["b16"]["revision"])
    monkeypatch.setattr(module, "hub_place", lambda name: ("some/where", "open_clip_model.safetensors"))
    assert weights_sum("b16") == hashlib.sha256(there.read_bytes()).hexdigest()
    save_file({"a": torch.ones(2)}, weights_folder()/"b16.safetensors")
    assert weights_sum("b16") == fingerprint(weights_folder()/"b16.safetensors") != fingerprint(there)
    (weights_folder()/"dino-b14.bin").write_bytes(b"abc")
    assert weights_sum("dino-b14") == hashlib.sha256(b"abc").hexdigest()
    line(lambda: weights_sum("b61"), "Did you mean b16")


def test_a_configuration_asks_for_them(stand_in):
    from barleria_nb.model import build_model, config
    save_file(stand_in, weights_folder()/"b16.safetensors")
    with pytest.warns(UserWarning): model = build_model(config("snf-b16", pretrained=True))
    assert torch.equal(model.encoder.text.positions, stand_in["positional_embedding"])
    assert not any(p.requires_grad for n, p in model.encoder.named_parameters() if not n.startswith("tuners."))


def test_who_has_none():
    for name in ("tiny", "tiny-dino", "dino-b14", "detris-l14"): line(lambda: build_encoder(name, pretrained="some.safetensors"), "b16", f"'{name}'")
    for make in (dino_encoder, tiny_clip, tiny_dino):
        for given in ("some.safetensors", Path("some.safetensors"), 1, None): line(lambda: make(pretrained=given), "one file of weights", "pretrained=False")
    line(lambda: find_weights("b61"), "Did you mean b16")
    line(lambda: read_weights("x.safetensors", "tiny"), "b16")


# -------------------------------------------------------------------------------------------------------------------- reading
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("ending", module.ENDINGS)
def test_formats_and_types(stand_in, tmp_path, ending, dtype):
    state, path = {k: t.to(dtype) for k, t in stand_in.items()}, tmp_path/f"any{ending}"
    save_file(state, path) if ending == ".safetensors" else torch.save(state, path)
    got = read_weights(path, "b16")
    assert got.keys() == state.keys() and all(t.dtype == torch.float32 and torch.equal(t, state[k].float()) for k, t in got.items())
    for where in (path, str(path)):
        encoder = build_encoder("b16", pretrained=where)
        assert all(p.dtype == torch.float32 for p in encoder.parameters()) and encoder.visual.grid == (6, 6)


def test_openai_names_are_the_same(stand_in, tmp_path):
    sizes = dict(input_resolution=torch.tensor(32), context_length=torch.tensor(77), vocab_size=torch.tensor(49408))
    torch.save(stand_in | sizes, tmp_path/"openai.pt")
    assert read_weights(tmp_path/"openai.pt", "b16").keys() == stand_in.keys()


def library(path, size):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return open_clip.create_model("stand-in", str(path), force_image_size=size).eval()


@pytest.mark.parametrize("size", [32, 48, 104, 24])
def test_same_numbers_as_open_clip(stand_in, tmp_path, size):
    save_file(stand_in, tmp_path/"w.safetensors")
    ours, theirs = clip_encoder("stand-in", size, tmp_path/"w.safetensors"), library(tmp_path/"w.safetensors", size)
    for a, b in zip(numbers(ours, size), numbers(theirs, size)): assert (a - b).abs().max() < 1e-5
    a, b = ours.visual.positions, theirs.visual.positional_embedding
    assert torch.equal(a, b) if size == 32 else (a - b).abs().max() < 1e-6


RESAMPLED = """
import hashlib, numpy as np
table = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 197, 48)).astype("f4")).double()
of = lambda t: hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest()
library = F.interpolate(table[:, 1:].mT.reshape(1, 48, 14, 14).contiguous(), size=(26, 26), mode="bicubic", antialias=True)
sums = of(library), of(_resampled(table, (26, 26), 1)), of(_resampled(table, (9, 13), 1)), of(_released_positions(table[:, 1:], (26, 12)))
"""


def test_resampled_tables_are_the_same_on_every_processor():
    "To the last bit of float64, where PyTorch's own differ between instruction sets: towers are known by the bytes of their tables."
    exec(RESAMPLED, here := dict(vars(module)))
    parts = (module._cubic, module._weigh, module._resampled, module._released_positions)
    program = "import math, torch, torch.nn.functional as F\nfrom einops import rearrange\n" + "".join(map(inspect.getsource, parts))
    there = subprocess.run([sys.executable, "-c", program + RESAMPLED + "print(*sums)"], env=os.environ | dict(ATEN_CPU_CAPABILITY="default"), capture_output=True, text=True, check=True)
    library, *ours = there.stdout.split()
    assert tuple(ours) == here["sums"][1:]
    if library == here["sums"][0]: pytest.skip("ours are the same, but so are PyTorch's own: this machine cannot show the difference")


@pytest.mark.parametrize("prefix, grid", [(0, (6, 6)), (1, (6, 6)), (5, (3, 12)), (1, (4, 4)), (1, (9, 5))])
def test_tables_are_resampled_as_timm_does_it(prefix, grid):
    table = torch.randn(1, prefix + 36, 8)
    new, theirs = module._resampled(table, grid, prefix), resample_abs_pos_embed(table, list(grid), num_prefix_tokens=prefix)
    assert new.dtype == torch.float32 and new.shape == theirs.shape and (new - theirs).abs().max() < 2e-6
    assert new is table if grid == (6, 6) else torch.equal(new[:, :prefix], table[:, :prefix])
    assert module._resampled(table.half(), grid, prefix).dtype == torch.float16


def test_a_grid_of_another_form_with_as_many_patches(stand_in, tmp_path):
    save_file(stand_in, tmp_path/"w.safetensors")
    table = clip_encoder("stand-in", (16, 64), tmp_path/"w.safetensors").visual.positions
    old = rearrange(stand_in["visual.positional_embedding"][1:], "(h w) c -> 1 c h w", h=4)
    new = rearrange(F.interpolate(old, (2, 8), mode="bicubic", antialias=True), "1 c h w -> (h w) c")
    assert torch.equal(table[0], stand_in["visual.positional_embedding"][0]) and torch.allclose(table[1:], new, atol=1e-6)


# -------------------------------------------------------------------------------------------------------------- hostile files
RAN = Path(os.environ.get("TMPDIR", "/tmp"))/f"barleria-ran-{os.getpid()}"

class Evil:
    "Unpickled, it makes a file."
    def __reduce__(self): return Path.touch, (RAN,)


class AllOfTheMemory:
    "Unpickled, it asks for a terabyte."
    def __reduce__(self): return bytearray, (2**40,)


def header(text): return struct.pack("<Q", len(text)) + text


def packed(parts, compression=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as z:
        for name, data in parts.items(): z.writestr(name, data)
    return file.getvalue()


def torch_bytes(obj, **kw):
    file = io.BytesIO()
    torch.save(obj, file, **kw)
    return file.getvalue()


def with_nan(state): return state | {"ln_final.bias": state["ln_final.bias"] / 0}


HOSTILE = { # name -> (ending, bytes from the good tensors, what the line says)
    "empty": (".safetensors", lambda s: b"", ""),
    "text": (".safetensors", lambda s: b"<!doctype html><title>not found</title>", "header is too long"),
    "absurd header": (".safetensors", lambda s: struct.pack("<Q", 2**60) + b"{}", "header is too long"),
    "header past the end": (".safetensors", lambda s: struct.pack("<Q", 2**20) + b"{}", ""),
    "header is no JSON": (".safetensors", lambda s: header(b"[" * 99), ""),
    "nested header": (".safetensors", lambda s: header(b"[" * 10**6), ""),
    "offsets past the end": (".safetensors", lambda s: header(b'{"logit_scale":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}'), ""),
    "a shape larger than the bytes": (".safetensors", lambda s: header(b'{"logit_scale":{"dtype":"F32","shape":[4000000000],"data_offsets":[0,4]}}') + bytes(4), ""),
    "cut short": (".safetensors", lambda s: save(s)[:-9], ""),
    "longer": (".safetensors", lambda s: save(s) + bytes(9), ""),
    "no tensors": (".safetensors", lambda s: save({}), "is missing"),
    "one tensor missing": (".safetensors", lambda s: save({k: t for k, t in s.items() if k != "visual.proj"}), "'visual.proj' is missing, expected (16, 16)"),
    "one too many": (".safetensors", lambda s: save(s | {"more": torch.zeros(1)}), "'more' is (1,) of type F32, expected none of that name"),
    "a name of a megabyte": (".safetensors", lambda s: save(s | {"!" * 10**6: torch.zeros(1)}), "expected none of that name"),
    "another shape": (".safetensors", lambda s: save(s | {"visual.proj": torch.zeros(16, 17)}), "'visual.proj' is (16, 17) of type F32, expected (16, 16)"),
    "whole numbers": (".safetensors", lambda s: save(s | {"visual.proj": s["visual.proj"].to(torch.int8)}), "'visual.proj' is (16, 16) of type I8"),
    "not finite": (".safetensors", lambda s: save(with_nan(s)), "'ln_final.bias' holds numbers that are not finite"),
    "not finite in halves": (".safetensors", lambda s: save({k: t.half() for k, t in (s | {"logit_scale": torch.tensor(1e6)}).items()}), "'logit_scale' holds"),
    "a pickle called safetensors": (".safetensors", lambda s: pickle.dumps(Evil()), ""),
    "torch called safetensors": (".safetensors", lambda s: torch_bytes(s), ""),
    "safetensors called torch": (".pt", lambda s: save(s), "not a zip file"),
    "a pickle": (".pt", lambda s: pickle.dumps(Evil()), "not a zip file"),
    "a pickle in torch's archive": (".pt", lambda s: torch_bytes(s | {"more": Evil()}), "nothing in it was run"),
    "a pickle as .bin": (".bin", lambda s: torch_bytes(Evil()), "nothing in it was run"),
    "torch's oldest format": (".pt", lambda s: torch_bytes(s, _use_new_zipfile_serialization=False), "not a zip file"),
    "a program": (".pt", lambda s: packed({"m/data.pkl": b"", "m/constants.pkl": b"", "m/version": b"3"}), "TorchScript"),
    "compressed": (".pt", lambda s: packed({"m/data.pkl": bytes(10**6)}, zipfile.ZIP_DEFLATED), "compressed"),
    "an empty archive": (".pt", lambda s: packed({}), ""),
    "torch cut short": (".pt", lambda s: torch_bytes(s)[:-99], ""),
    "torch with a hole": (".pt", lambda s: (b := torch_bytes(s))[:5000] + bytes(90) + b[5090:], ""),
    "a list": (".pt", lambda s: torch_bytes(list(s.values())), "no plain list of named tensors"),
    "a training checkpoint": (".pt", lambda s: torch_bytes(dict(epoch=1, state_dict=s)), "no plain list of named tensors"),
    "numbers for names": (".pt", lambda s: torch_bytes({k: t for k, t in enumerate(s.values())}), "no plain list of named tensors"),
    "torch, another shape": (".pt", lambda s: torch_bytes(s | {"visual.proj": torch.zeros(3)}), "'visual.proj' is (3,) of type torch.float32"),
    "torch, complex": (".pt", lambda s: torch_bytes(s | {"visual.proj": s["visual.proj"].to(torch.complex64)}), "asks for torch.ComplexFloatStorage"),
    "torch, what its own reader allows": (".pt", lambda s: torch_bytes(s | {"more": AllOfTheMemory()}), "asks for __builtin__.bytearray, and nothing in it was run"),
    "torch, whole numbers": (".pt", lambda s: torch_bytes(s | {"visual.proj": s["visual.proj"].to(torch.int8)}), "'visual.proj' is (16, 16) of type torch.int8"),
    "a newer pickle": (".pt", lambda s: torch_bytes({"more": Evil()}, pickle_protocol=4), "asks for STACK_GLOBAL"),
    "a long description": (".pt", lambda s: packed({"m/data.pkl": bytes(2**24 + 1), "m/version": b"3"}), "description of its tensors is too long"),
    "two programs": (".pt", lambda s: packed({"a/data.pkl": pickle.dumps({}, 2), "b/data.pkl": pickle.dumps(Evil(), 2)}), "not one archive"),
    "torch, sparse": (".pt", lambda s: torch_bytes(s | {"visual.proj": s["visual.proj"].to_sparse()}), ""),
    "torch, without numbers": (".pt", lambda s: torch_bytes(s | {"visual.proj": s["visual.proj"].to("meta")}), ""),
    "torch, not finite": (".pt", lambda s: torch_bytes(with_nan(s)), "not finite"),
    "another ending": (".npz", lambda s: save(s), "ends in none of .safetensors, .pt, .bin"),
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.filterwarnings("ignore")
def test_hostile(stand_in, tmp_path, case):
    ending, make, says = HOSTILE[case]
    path = tmp_path/f"file{ending}"
    path.write_bytes(make(stand_in))
    text = line(lambda: build_encoder("b16", pretrained=path), str(path), "does not hold the weights of 'b16'", "open_clip_model.safetensors of some/where", says)
    assert "torch.load" not in text and not RAN.exists(), "nothing was run"


def test_evil_would_run():
    pickle.loads(pickle.dumps(Evil()))
    assert RAN.exists()
    RAN.unlink()


def test_no_file(stand_in, tmp_path):
    line(lambda: build_encoder("b16", pretrained=tmp_path/"none.safetensors"), "none.safetensors", "No such file")
    (tmp_path/"folder.safetensors").mkdir()
    line(lambda: build_encoder("b16", pretrained=tmp_path/"folder.safetensors"), "folder.safetensors")
    line(lambda: build_encoder("b16", pretrained=""), "b16")
    (weights_folder()/"b16.safetensors").write_bytes(b"junk")
    with pytest.warns(UserWarning): line(lambda: build_encoder("b16", pretrained=True), str(weights_folder()/"b16.safetensors"))


# -------------------------------------------------------------------------------------------------------------------- the hub
WHERE = "fetch open_clip_model.safetensors from some/where (revision 977e3dd0ec55ab8da155f2fbeb6b5f54948b6e3d) and put it at "

def fails(error):
    def call(*args, **kw): raise error
    return call


def test_offline(stand_in, monkeypatch):
    for value in ("1", "true", "ON", "yes"):
        monkeypatch.setenv("HF_HUB_OFFLINE", value)
        text = line(lambda: build_encoder("b16", pretrained=True), "no weights for 'b16': the hub cannot be reached; ", WHERE, str(weights_folder()/"b16.safetensors"))
        assert "http" not in text
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(module, "get_hf_file_metadata", fails(RuntimeError("https://a.host is unknown\nRetry")))
    assert line(lambda: find_weights("b16")) == text, "the client that tries again for half a minute was not called"


def test_offline_by_the_hub_itself(stand_in, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    import huggingface_hub
    monkeypatch.setattr(module, "get_hf_file_metadata", huggingface_hub.get_hf_file_metadata)
    line(lambda: find_weights("b16"), "the hub cannot be reached; ", WHERE)


def test_refused_and_broken_off(stand_in, monkeypatch):
    refusal = RevisionNotFoundError.__new__(RevisionNotFoundError)
    monkeypatch.setattr(module, "get_hf_file_metadata", fails(refusal))
    line(lambda: find_weights("b16", revision="gone"), "the hub refused them (RevisionNotFoundError); ", "(revision gone)")
    monkeypatch.setattr(module, "get_hf_file_metadata", lambda *a, **k: None)
    monkeypatch.setattr(module, "hf_hub_download", fails(OSError(28, "No space left on device")))
    line(lambda: find_weights("b16"), "the download broke off (No space left on device); ", WHERE)
    monkeypatch.setattr(module, "hf_hub_download", fails(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt): find_weights("b16")


def cached(state, revision, name="some--where"):
    "Lay a file where the hub's client keeps it."
    path = Path(constants.HF_HUB_CACHE)/f"models--{name}"/"snapshots"/revision/"open_clip_model.safetensors"
    path.parent.mkdir(parents=True)
    save_file(state, path)
    return path


def test_from_the_hub(stand_in, monkeypatch):
    asked, pin = [], WEIGHTS["b16"]
    def metadata(url, timeout): asked.append((url.split("/resolve/")[1], timeout <= 10))
    def download(repository, file, revision, cache_dir): asked.append((repository, file, revision)); return str(cached(stand_in, revision))
    monkeypatch.setattr(module, "get_hf_file_metadata", metadata)
    monkeypatch.setattr(module, "hf_hub_download", download)
    monkeypatch.setitem(WEIGHTS, "b16", pin | {"sha256": hashlib.sha256(save(stand_in)).hexdigest()})
    encoder = build_encoder("b16", pretrained=True)
    assert asked == [(f"{pin['revision']}/open_clip_model.safetensors", True), ("some/where", "open_clip_model.safetensors", pin["revision"])]
    assert torch.equal(encoder.text.positions, stand_in["positional_embedding"])
    asked.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find_weights("b16").parent.name == pin["revision"] and not asked, "the second time from the cache, network or not"


def test_another_file_at_the_pinned_revision_is_refused(stand_in):
    path = cached(stand_in, WEIGHTS["b16"]["revision"])
    line(lambda: build_encoder("b16", pretrained=True), fingerprint(path), WEIGHTS["b16"]["sha256"], f"delete {path.parents[2]} and")
    assert path.parents[2].name == "models--some--where"
    other = cached(stand_in, "0" * 40)
    with pytest.warns(UserWarning, match="not the published file"): assert find_weights("b16", revision="0" * 40) == other


def test_the_published_file_under_another_revision(stand_in, monkeypatch, tmp_path):
    "Where the pinned revision is not cached: `main`'s first, then any other; each is known by its sum, and a file with another sum is told and left."
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    main, older = cached(stand_in, "b" * 40), cached(stand_in, "a" * 40)
    (main.parents[2]/"refs").mkdir()
    (main.parents[2]/"refs"/"main").write_text(main.parent.name)
    with pytest.warns(UserWarning) as told: line(lambda: find_weights("b16"), "no weights for 'b16'", WEIGHTS["b16"]["revision"])
    assert [str(w.message).split(" is not ")[0] for w in told] == [str(main), str(older)] and "it is not read" in str(told[0].message)
    monkeypatch.setitem(WEIGHTS, "b16", WEIGHTS["b16"] | {"sha256": fingerprint(main)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find_weights("b16") == main == find_weights("b16", cache=constants.HF_HUB_CACHE) and weights_sum("b16") == fingerprint(main)
        line(lambda: find_weights("b16", revision="c" * 40), "no weights") # a revision that was asked for is that revision
        line(lambda: find_weights("b16", cache=tmp_path/"none"), "no weights")
    main.write_bytes(b"another")
    with pytest.warns(UserWarning, match="not read"): assert find_weights("b16") == older
    pinned = cached(stand_in, WEIGHTS["b16"]["revision"])
    pinned.write_bytes(b"damaged")
    line(lambda: find_weights("b16"), "is damaged", pinned)


def test_without_a_published_sum_no_other_revision_is_taken(monkeypatch):
    monkeypatch.setattr(module, "hub_place", lambda name: ("some/where", "open_clip_model.safetensors"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    cached({"a": torch.ones(2)}, "a" * 40)
    line(lambda: find_weights("dino-b14"), "no weights for 'dino-b14'")


def test_another_cache(stand_in, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "get_hf_file_metadata", lambda *a, **k: None)
    monkeypatch.setattr(module, "hf_hub_download", lambda *a, cache_dir, **k: pytest.fail("asked") if cache_dir != tmp_path/"else" else fails(OSError(1, "no"))())
    line(lambda: find_weights("b16", cache=tmp_path/"else"), "broke off")


# ------------------------------------------------------------------------------------------------------------------- DINOv2
@pytest.mark.parametrize("size", [70, 42, 98, (42, 70)])
@pytest.mark.filterwarnings("ignore")
def test_dino_with_the_numbers_of_its_file(small_dino, size):
    save_file({k: t.half() for k, t in small_dino.items()}, weights_folder()/"dino-b14.safetensors")
    encoder = dino_encoder(size=size, pretrained=True)
    theirs = module.timm.create_model(DINOS["dino-b14"][0], num_classes=0, img_size=size).eval()
    half = {k: t.half().float() for k, t in small_dino.items()}
    theirs.load_state_dict(checkpoint_filter_fn(dict(half), theirs))
    assert (encoder.visual.positions - theirs.pos_embed).abs().max() < 1e-6 and encoder.text.depth == 3
    image, ids, words = torch.randn(1, 3, *theirs.patch_embed.img_size), torch.tensor([[49406, 320, 49407]]), torch.ones(1, 3, dtype=torch.bool)
    with torch.no_grad(): assert (encoder(image, ids, words).pooled - theirs.forward_features(image)[:, 0]).abs().max() < 1e-5


@pytest.mark.filterwarnings("ignore")
def test_dino_as_detris_reads_it(small_dino, monkeypatch):
    save_file(small_dino, weights_folder()/"dino-b14.safetensors")
    monkeypatch.setitem(module.DETRIS, "detris-b14", ("dino-b14", (0, 1)))
    plain, released = build_encoder("dino-b14", pretrained=True), build_encoder("detris-b14", pretrained=True)
    assert (plain.taps, released.taps) == ((0, 1), (0, 1)) and not torch.allclose(plain.visual.positions, released.visual.positions, atol=1e-4)
    monkeypatch.setitem(module.DETRIS, "detris-b14", ("dino-b14", (1, 2)))
    assert build_encoder("detris-b14", pretrained=True).taps == (1, 2)


@pytest.mark.parametrize("change,says", [(lambda s: {k: t for k, t in s.items() if k != "reg_token"}, "'reg_token' is missing"), (lambda s: s | {"mask_token": torch.zeros(1, 32)}, "expected none of that name"),
    (lambda s: s | {"pos_embed": s["pos_embed"][:, :9]}, "'pos_embed' is (1, 9, 32)"), (lambda s: s | {"norm.bias": s["norm.bias"] / 0}, "not finite")])
def test_dino_file_that_does_not_fit(small_dino, change, says):
    save_file(change(small_dino), weights_folder()/"dino-b14.safetensors")
    line(lambda: build_encoder("dino-b14", pretrained=True), "does not hold the weights of 'dino-b14'", "model.safetensors of timm/", says)


def test_dino_offline(small_dino, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    line(lambda: build_encoder("dino-b14", pretrained=True), "no weights for 'dino-b14'", "fetch model.safetensors from timm/", str(weights_folder()/"dino-b14.safetensors"))


# ------------------------------------------------------------------------------------------------------------------ full size
@pytest.mark.full
def test_b16_at_416(tmp_path):
    torch.manual_seed(0)
    half = {k: t.half() for k, t in module._clip("ViT-B-16-quickgelu").state_dict().items()}
    full = {k: t.float() for k, t in half.items()}
    ours, same = tmp_path/"half.safetensors", tmp_path/"float.safetensors" # open_clip cannot resample a table in half precision
    save_file(half, ours), save_file(full, same)
    assert same.stat().st_size == 598_516_980, "as many bytes as the published file: the same names, shapes and types"
    encoder = build_encoder("b16", pretrained=ours)
    theirs = open_clip.create_model("ViT-B-16-quickgelu", str(same), force_image_size=416).eval()
    assert (encoder.visual.positions - theirs.visual.positional_embedding).abs().max() < 1e-6 and encoder.visual.grid == (26, 26) # ours is resampled in 64 bits
    assert torch.equal(encoder.text.embedding.weight, full["token_embedding.weight"])
    for a, b in zip(numbers(encoder, 416), numbers(theirs, 416)): assert (a - b).abs().max() < 1e-5 * b.abs().max()
    line(lambda: build_encoder("l14", pretrained=ours), "'ln_final.bias' is (512,) of type F16, expected (768,)")
    line(lambda: build_encoder("eva02-b16", pretrained=ours), "'ln_final.bias' is (512,)", "expected none of that name")
