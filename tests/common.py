"What several test files need: the one line of a refusal, two small random towers, three sentences for them."
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
