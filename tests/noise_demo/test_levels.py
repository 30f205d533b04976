"""Numbers of the noise demo against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from ddpmctl.core.schedule import NoiseSchedule
from ddpmctl.errors import ConfigError
from ddpmctl.images import to_uint8
from ddpmctl.noise_demo.levels import (
    Level,
    decibels,
    even_levels,
    level,
    noised,
    parse_levels,
    psnr_db,
    share,
)


@pytest.mark.parametrize("t", [1, 7, 250, 500, 999])
def test_cosine_levels_have_the_numbers_of_the_paper(t: int) -> None:
    def f(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    found = level(NoiseSchedule.named("cosine", 1000), t)
    abar = f(t / 1000) / f(0)
    assert found.t == t
    assert found.alpha_bar == pytest.approx(abar, rel=1e-9)
    assert found.snr_db == pytest.approx(10 * math.log10(abar / (1 - abar)), abs=1e-6)


def test_linear_levels_are_products() -> None:
    abar = 1.0
    for i in range(3):
        abar *= 1 - (1e-4 + i * (0.02 - 1e-4) / 999)
    found = level(NoiseSchedule.named("linear", 1000), 3)
    assert found.alpha_bar == pytest.approx(abar, rel=1e-12)
    assert found.snr_db == pytest.approx(10 * math.log10(abar / (1 - abar)), rel=1e-9)


def test_level_0_is_clean() -> None:
    found = level(NoiseSchedule.named("linear", 10), 0)
    assert found == Level(0, 1.0, math.inf)
    assert found.lines() == ("ᾱ = 1", "SNR ∞")


def test_lines() -> None:
    assert Level(5, 0.5244, 0.42).lines() == ("ᾱ = 0.524", "SNR 0.4 dB")
    assert Level(5, 4.04e-5, -43.94).lines() == ("ᾱ = 4.0e−5", "SNR −43.9 dB")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.0, "1"), (0.0, "0"), (0.5, "0.500"), (0.99, "0.990"), (0.9995, "0.9995"),
        (0.9999, "0.9999"), (1 - 2.4e-7, "0.9999998"),
        (0.0034, "0.0034"), (0.001, "0.0010"), (0.00099, "9.9e−4"), (2.43e-9, "2.4e−9"),
    ],
)  # fmt: skip
def test_share_keeps_the_digits_that_matter(value: float, text: str) -> None:
    assert share(value) == text


def test_decibels_have_no_negative_zero() -> None:
    assert [decibels(v) for v in (-0.04, 0.04, -0.06, math.inf)] == ["0.0 dB", "0.0 dB", "−0.1 dB", "∞"]
    assert decibels(-math.inf) == "−∞"


@pytest.mark.parametrize(
    ("timesteps", "count", "levels"),
    [(1000, 5, [0, 250, 500, 750, 1000]), (10, 1, [10]), (10, 2, [0, 10]), (3, 4, [0, 1, 2, 3])],
)
def test_even_levels(timesteps: int, count: int, levels: list[int]) -> None:
    assert even_levels(timesteps, count) == levels


@pytest.mark.parametrize("timesteps", [2, 7, 100])
def test_as_many_levels_as_there_are_can_be_shown(timesteps: int) -> None:
    assert even_levels(timesteps, timesteps + 1) == list(range(timesteps + 1))
    for count in (0, timesteps + 2):
        with pytest.raises(ConfigError, match="--frames"):
            even_levels(timesteps, count)


def test_parse_levels() -> None:
    assert parse_levels("0, 50,1k", 1000) == [0, 50, 1000]
    for text in ("", "a", "1,,2", "1.5", "-1", "1001", "0;5", "nan"):
        with pytest.raises(ConfigError, match="--at"):
            parse_levels(text, 1000)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_level_0_is_the_picture_bit_for_bit(channels: int) -> None:
    picture = torch.randint(0, 256, (channels, 8, 12), dtype=torch.uint8)
    eps = torch.randn(1, channels, 8, 12)
    for name in ("linear", "cosine", "sigmoid"):
        schedule = NoiseSchedule.named(name, 50)
        assert torch.equal(to_uint8(noised(picture, eps, schedule, 0)[0]), picture)
        signal, sigma = schedule.alpha_bar[20].sqrt(), (1 - schedule.alpha_bar[20]).sqrt()
        expected = signal * (picture.double() / 127.5 - 1) + sigma * eps[0].double()
        torch.testing.assert_close(noised(picture, eps, schedule, 20)[0].double(), expected, atol=1e-5, rtol=0)


def test_psnr() -> None:
    black, grey = torch.zeros(3, 4, 4, dtype=torch.uint8), torch.full((3, 4, 4), 51, dtype=torch.uint8)
    assert psnr_db(black, grey) == pytest.approx(20 * math.log10(5))
    assert math.isinf(psnr_db(grey, grey))
