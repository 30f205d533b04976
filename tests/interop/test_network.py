"""Our network and diffusers' give the same numbers, block by block, in each of the structures that are published."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers.models.attention_processor import Attention as TheirAttention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from pipelines import CHURCH, CIFAR10, EXAMPLE, NETWORKS, SMALL, DDPMPipeline, UNet2DModel, saved
from torch import Tensor, nn

from ddpmctl.build import build_net
from ddpmctl.config import RunConfig
from ddpmctl.core.unet import Downsample, ResidualBlock, UNet, Upsample
from ddpmctl.interop import diffusers, formats, unet2d
from ddpmctl.interop.imported import Settings
from ddpmctl.runfile import Layer, flag_layer, resolve
from ddpmctl.sampling import load_model

OURS, THEIRS = (ResidualBlock, Downsample, Upsample), (ResnetBlock2D, TheirAttention, Downsample2D, Upsample2D)
STEPS = torch.tensor([0, 999])


def inputs(net: UNet2DModel) -> Tensor:
    size = net.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(2, net.config.in_channels, height, width, generator=torch.Generator().manual_seed(1))


def outputs(net: nn.Module, x: Tensor, kinds: tuple[type[nn.Module], ...], steps: Tensor) -> list[Tensor]:
    """Of each block in turn, an attention as part of the block before it, and at the end of the network."""
    found: list[Tensor] = []

    def note(module: nn.Module, args: object, output: Tensor) -> None:
        if isinstance(module, TheirAttention):
            found.pop()
        found.append(output)

    hooks = [module.register_forward_hook(note) for module in net.modules() if isinstance(module, kinds)]
    with torch.no_grad():
        out = net(x, steps)
    for hook in hooks:
        hook.remove()
    return [*found, out if isinstance(out, Tensor) else out.sample]


def assert_equal_by_block(
    ours: nn.Module, theirs: UNet2DModel, x: Tensor, *, tolerance: float = 1e-5, steps: Tensor = STEPS
) -> None:
    left, right = outputs(ours, x, OURS, steps), outputs(theirs, x, THEIRS, steps)
    assert len(left) == len(right) > 5
    assert right[-1].std() > 0.01
    for one, other in zip(left, right, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_of_diffusers_gives_here_what_it_gives_there(tmp_path: Path, name: str) -> None:
    theirs = saved(tmp_path / "pipe", name)
    ours = load_model(tmp_path / "pipe", "cpu").denoiser.net
    assert_equal_by_block(ours, theirs, inputs(theirs))


@pytest.mark.parametrize("name", ["google", "example"])
def test_in_float64_they_are_the_same_function(tmp_path: Path, name: str) -> None:
    """At index 0: the sinusoids of others are float32 in both, and round differently."""
    theirs = saved(tmp_path / "pipe", name).double()
    ours = load_model(tmp_path / "pipe", "cpu").denoiser.net.double()
    assert_equal_by_block(ours, theirs, inputs(theirs).double(), tolerance=1e-12, steps=torch.zeros(2))


MODELS = {
    "defaults": {},
    "all that differs": {
        "time_order": "cos_sin", "time_shift": 1.0, "down_padding": "right_bottom", "norm_eps": 1e-6, "head_channels": 8,
        "middle_attention": False, "time_embedding": 24, "attention_levels": [0],
    },
    "three levels": {"channel_mults": [1, 2, 2], "num_res_blocks": [2, 2, 2], "attention_levels": [0, 2]},
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("learned", [False, True])
def test_a_network_of_ours_gives_there_what_it_gives_here(tmp_path: Path, name: str, learned: bool) -> None:
    model = {"base_channels": 16, "channel_mults": [1, 2], "num_res_blocks": 1, "norm_groups": 8, "dropout": 0.0, **MODELS[name]}
    config = RunConfig.model_validate(
        {"data": {"size": 16, "channels": 3}, "diffusion": {"learn_variance": learned}, "model": model}
    )
    torch.manual_seed(3)
    ours = build_net(config, 3, 0).eval()
    for parameter in ours.parameters():
        nn.init.normal_(parameter, 0.1 if parameter.ndim == 1 else 0.0, 0.1)
    weights = ours.state_dict()
    content = {"config": config.to_dict(), "image_shape": [3, 16, 16], "class_names": [], "net": weights,
               "ema": {"net": weights, "steps": 0}}  # fmt: skip
    diffusers.write(tmp_path / "pipe", content)
    theirs = DDPMPipeline.from_pretrained(tmp_path / "pipe").unet.eval()
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    assert_equal_by_block(ours, theirs, x)
    back = formats.load(tmp_path / "pipe").content
    assert all(torch.equal(back["net"][key], value) for key, value in weights.items())
    assert back["net"].keys() == weights.keys()


@pytest.mark.parametrize("option", ["flip_sin_to_cos", "freq_shift", "downsample_padding", "norm_eps", "attention_head_dim"])
def test_each_option_tells(tmp_path: Path, option: str) -> None:
    """A network read with one option wrong gives other numbers: the comparisons above would see it."""
    theirs = saved(tmp_path / "pipe", "google")
    file = tmp_path / "pipe" / "unet" / "config.json"
    other = {"flip_sin_to_cos": True, "freq_shift": 0, "downsample_padding": 1, "norm_eps": 1e-2, "attention_head_dim": 8}
    file.write_text(json.dumps({**json.loads(file.read_text()), option: other[option]}))
    ours = load_model(tmp_path / "pipe", "cpu").denoiser.net
    with torch.no_grad():
        gap = (ours(inputs(theirs), STEPS) - theirs(inputs(theirs), STEPS).sample).abs().max()
    assert gap > 3e-5


@pytest.mark.parametrize(
    ("unet", "count"), [(CIFAR10, 35_746_307), (CHURCH, 113_673_219), (EXAMPLE, 113_673_219)], ids=["cifar10", "church", "example"]
)
def test_the_published_networks_at_full_size(unet: dict[str, object], count: int) -> None:
    """Names and shapes, without the memory."""
    settings = Settings()
    unet2d.settings_of(Path("config.json"), unet, settings)
    config = settings.settle(Layer({}), Path("pipe"))
    with torch.device("meta"):
        theirs = UNet2DModel(**unet).state_dict()
        ours = build_net(config, 3, 0).state_dict()
    names = diffusers.diffusers_names(config.model, ours)
    assert sum(value.numel() for value in ours.values()) == count == sum(value.numel() for value in theirs.values())
    assert sorted(name for each in names.values() for name in each) == sorted(theirs)


def test_the_defaults_of_the_network_are_what_they_were() -> None:
    config = RunConfig()
    assert (config.model.time_order, config.model.time_shift, config.model.down_padding) == ("sin_cos", 0.0, "symmetric")
    assert (config.model.norm_eps, config.model.head_channels, config.model.middle_attention) == (1e-5, "all", True)
    with torch.device("meta"):
        assert sum(p.numel() for p in build_net(config, 3, 0).parameters()) == 35_746_307


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        (["head_channels=3"], "model.head_channels: 3 does not divide the 256 channels of level 1"),
        (["time_shift=1", "base_channels=2", "norm=none"], "model.time_shift: 1 leaves no frequency"),
        (["time_shift=2"], "model.time_shift: must be at most 1"),
        (["norm_eps=0"], "model.norm_eps: must be more than 0"),
        (["head_channels=0"], "model.head_channels: 0 is not all"),
        (["time_order=cos"], "model.time_order: must be 'sin_cos' or 'cos_sin'"),
    ],
)
def test_options_that_cannot_be(model: list[str], problem: str) -> None:
    with pytest.raises(Exception, match=problem):
        resolve(flag_layer({}, [f"model.{word}" for word in model]))


def test_heads_work_on_runs_of_channels() -> None:
    """Two heads are two single ones, each on its half of the channels."""
    torch.manual_seed(0)
    net = UNet(1, base_channels=8, channel_mults=(1,), num_res_blocks=1, norm_groups=4, attention_levels=(0,), head_channels=4)
    attention = net.down[0].attention
    nn.init.normal_(attention.out.weight)
    x = torch.randn(1, 8, 3, 3)
    q, k, v = attention.qkv(attention.norm(x)).flatten(2).chunk(3, dim=1)
    mixed = []
    for half in (slice(0, 4), slice(4, 8)):
        scores = torch.softmax(q[:, half].transpose(1, 2) @ k[:, half] / 2, dim=-1)
        mixed.append((scores @ v[:, half].transpose(1, 2)).transpose(1, 2))
    expected = x + attention.out(torch.cat(mixed, dim=1).reshape(1, 8, 3, 3))
    torch.testing.assert_close(attention(x), expected, rtol=1e-5, atol=1e-5)


def test_small_is_of_the_structure_of_the_published() -> None:
    assert {*SMALL, *NETWORKS["google"]} <= set(CIFAR10)
