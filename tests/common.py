"What several test files need: the one line of a refusal, two small random towers, three sentences for them, and how published modules are compared with ours."
import pytest
import torch

from barleria_nb.backbones import TINY, DualEncoder, TextTower, build_tiny_clip, visual_tower
from barleria_nb.core import BarleriaError

SIZES = dict(TINY, image_size=64, width=32, heads=2, embed_dim=24, layers=3)


def line(call, *words):
    "The message of the `BarleriaError` that `call` raises: one line, of at most 500 characters, holding all `words`."
    with pytest.raises(BarleriaError) as e: call()
    text = str(e.value)
    assert "\n" not in text and len(text) <= 500, text
    for w in words: assert str(w) in text, f"{w!r} not in {text!r}"
    return text


def towers(tuners=(), visual=3, text=3, dtype=torch.float64, seed=0):
    "Two random towers, the same for the same seed, with tuners on them."
    torch.manual_seed(seed)
    a, b = (build_tiny_clip(range(40), dict(SIZES, layers=n)).to(dtype) for n in (visual, text))
    torch.manual_seed(seed + 1)
    return DualEncoder(visual_tower(a.visual), TextTower(b), tuners).to(dtype)


def batch(dtype=torch.float64, length=9):
    "Three images and sentences of 3, 9 and 6 tokens, padded with zeros."
    g = torch.Generator().manual_seed(5)
    image, ids = torch.randn(3, 3, 64, 64, generator=g, dtype=torch.float64), torch.randint(2, 50, (3, length), generator=g)
    words = torch.arange(length) < torch.tensor([3, 9, 6])[:, None]
    return image.to(dtype), ids * words, words


def weighed(tensors):
    "A scalar in which every number counts with its own random weight."
    g = torch.Generator().manual_seed(9)
    return sum((x * torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.dtype)).sum() for x in tensors)


def load(module, state):
    "All our parameters and buffers must come from `state`, and all of `state` must be used (BatchNorm's step counters aside)."
    missing, unexpected = module.load_state_dict(state, strict=False)
    assert not unexpected and all(m.endswith("num_batches_tracked") for m in missing), (missing, unexpected)
    return module.eval()


def close(ours, theirs):
    "Our output is the stored one, but for rounding."
    torch.testing.assert_close(ours.detach(), theirs, atol=1e-5, rtol=1e-5)
