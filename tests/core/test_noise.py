from __future__ import annotations

import itertools

import pytest
import torch

from ddpmctl.core.noise import ImageNoise, derive_seed, derived_generator

SHAPE = (3, 4, 5)


@pytest.mark.parametrize(
    ("parts", "seed"), [((0,), 2631537505891389924), ((0, "image", 3), 7334296137779939750)]
)  # fmt: skip
def test_seed_is_the_same_on_every_machine_and_in_every_version(parts, seed):
    assert derive_seed(*parts) == seed


def test_different_parts_give_different_seeds():
    parts = [
        (),
        (0,),
        (1,),
        ("0",),
        (0, 0),
        (0, 1),
        (1, 0),
        (10,),
        (1, 0, 0),
        ("a", "b"),
        ("ab",),
        ("a,b",),
        (-1,),
    ]
    seeds = [derive_seed(*part) for part in parts]
    assert len(set(seeds)) == len(parts)


def test_seeds_suit_a_generator():
    for i in range(200):
        assert 0 <= derive_seed(i) < 2**63
        derived_generator(i)


def test_derived_generator_repeats_itself():
    a, b, c = (torch.randn(8, generator=derived_generator(*parts)) for parts in ((1, "t"), (1, "t"), (2, "t")))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@pytest.mark.parametrize("batches", [[[0], [1], [2], [3]], [[0, 1, 2, 3]], [[3, 1], [0], [2]]])
def test_an_image_does_not_depend_on_its_batch(batches):
    found = {}
    for batch in batches:
        noise = ImageNoise(42, batch, SHAPE)
        for draw in range(3):
            for index, image in zip(batch, noise(), strict=True):
                found[index, draw] = image
    for index in range(4):
        alone = ImageNoise(42, [index], SHAPE)
        for draw in range(3):
            assert torch.equal(found[index, draw], alone()[0])


def test_streams_of_images_draws_and_seeds_differ():
    drawn = []
    for seed in (0, 1):
        noise = ImageNoise(seed, [0, 1, 7], SHAPE)
        drawn += [image for _ in range(2) for image in noise()]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(drawn, 2))


def test_global_random_state_is_neither_used_nor_changed():
    torch.manual_seed(1)
    first, state = ImageNoise(0, [0], SHAPE)(), torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(first, ImageNoise(0, [0], SHAPE)())
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shape_and_dtype(dtype):
    noise = ImageNoise(0, range(2, 7), SHAPE, dtype=dtype)()
    assert noise.shape == (5, *SHAPE)
    assert noise.dtype == dtype


def test_noise_is_standard_normal_within_and_across_images():
    noise = ImageNoise(5, range(100), (1, 32, 32))().flatten(1)
    count = noise.numel()
    assert noise.mean().item() == pytest.approx(0, abs=4 / count**0.5)
    assert noise.var().item() == pytest.approx(1, abs=4 * (2 / count) ** 0.5)
    assert noise.pow(4).mean().item() == pytest.approx(3, abs=4 * (96 / count) ** 0.5)
    correlation = torch.corrcoef(noise) - torch.eye(100)
    assert correlation.abs().max().item() < 6 / 32
