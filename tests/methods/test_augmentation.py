"""Images flipped, shifted and cut."""

import torch
from fedcompress_toys import begun
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedlib.methods.fedcompress import augmentation


def test_augmentation_by_hand() -> None:
    """Of 8 x 8 pixels the border is one wide, and what is cut reaches two from its centre."""
    x = torch.arange(64.0).view(1, 1, 8, 8) + 1
    labels = torch.tensor([3])

    def made(kind: str, *u: float) -> Tensor:
        images, same = augmentation.augmented((x, labels), torch.tensor([u, [0.0] * 5]), kind)
        assert same is labels and images.shape == x.shape
        return images[0, 0]

    plain = x[0, 0].clone()
    plain[:2, :2] = 0
    assert torch.equal(made("corner", 0.5, 0.4, 0.4, 0.9, 0.9), plain), "no flip, no shift, and the corner"
    flipped = x[0, 0].flip(1)
    flipped[:2, :2] = 0
    assert torch.equal(made("corner", 0.49, 0.4, 0.4, 0.9, 0.9), flipped), "the cut stays where it is"
    moved = torch.zeros(8, 8)
    moved[:7, 1:] = x[0, 0, 1:, :7]
    moved[2:6, 3:7] = 0
    assert torch.equal(made("random", 0.5, 0.99, 0.0, 0.5, 0.63), moved), "a row down, a column left, a cut at (4, 5)"
    assert augmentation.augmented((x, labels), None, "none") == (x, labels)


@settings(deadline=None)
@given(st.integers(4, 40), st.integers(0, 2**32 - 1))
def test_augmentation_keeps_values_and_cuts_what_it_should(side: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(3, 2, side, side, generator=generator) + 1
    u = torch.rand(5, 5, generator=generator)
    for kind in ("corner", "random"):
        made, _ = augmentation.augmented((x, torch.zeros(3)), u, kind)
        for image, own in zip(made, x, strict=True):
            assert set(image.flatten().tolist()) <= {0.0, *own.flatten().tolist()}
            lost = float((image[0] == 0).float().mean())
            assert lost <= 1 - (1 - 2 * (side // 4) / side) ** 2 + 2 * (side // 8) / side + 1e-6
            assert torch.equal(image[0] == 0, image[1] == 0), "all channels alike"
    with_grad = torch.func.vmap(lambda a, b: augmentation.augmented((a, a), b, "random")[0])(x[:, None], u[:3, None])
    alone = [augmentation.augmented((x[i : i + 1], x), u[i : i + 1], "random")[0] for i in range(3)]
    assert torch.equal(with_grad, torch.stack(alone))


def test_augmentation_changes_what_is_learned_and_nothing_else() -> None:
    for method in ("fedcompress", "fedzip"):
        plain, other = (begun({"augment": kind}, method) for kind in ("none", "random"))
        assert len(plain.message) == len(other.message)
        assert plain.upload() != other.upload() and other.upload() == other.upload()
