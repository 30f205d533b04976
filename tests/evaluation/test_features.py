"""Feature networks: deterministic, whatever the batch; their weights are read as data."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from ddpmctl.errors import ConfigError, DataError
from ddpmctl.evaluation import features
from ddpmctl.evaluation.features import FEATURES, extract, load_features, to_rgb

pytest.importorskip("torch_fidelity")
pytest.importorskip("efficientnet_lite_pytorch")
CPU = torch.device("cpu")


def images(n: int, channels: int = 3, size: tuple[int, int] = (16, 24)) -> torch.Tensor:
    return torch.randint(0, 256, (n, channels, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_efficientnet_is_the_same_again_and_in_any_batch():
    net, data, told = load_features("efficientnet-lite0", CPU), images(5), []
    found = extract(data, net, CPU, batch_size=5)
    assert found.shape == (5, FEATURES["efficientnet-lite0"].dimension) and found.dtype == torch.float32
    assert torch.equal(extract(data, net, CPU, batch_size=5), found)
    again = extract(data, load_features("efficientnet-lite0", CPU), CPU, batch_size=2, progress=lambda *at: told.append(at))
    torch.testing.assert_close(again, found, rtol=0, atol=1e-5)
    assert told == [(2, 5), (4, 5), (5, 5)]
    assert (found[0] - found[1]).abs().max() > 0.1
    grey = images(2, 1)
    assert torch.equal(extract(grey, net, CPU), extract(grey.repeat(1, 3, 1, 1), net, CPU))


def test_logits_are_those_of_the_whole_network():
    net, data = load_features("efficientnet-lite0-logits", CPU), images(2, size=(224, 224))
    found = extract(data, net, CPU)
    assert found.shape == (2, FEATURES["efficientnet-lite0-logits"].dimension)
    with torch.no_grad():
        theirs = net.net((data.float() - 127) / 128)
    torch.testing.assert_close(found, theirs, rtol=0, atol=1e-4)


def test_transparency_is_laid_on_white():
    data = images(3, 4)
    data[0, 3], data[1, 3] = 255, 0
    assert torch.equal(to_rgb(data)[0], data[0, :3]) and bool((to_rgb(data)[1] == 255).all())


class Spy:
    def __reduce__(self):
        return Path.touch, (Path("ran"),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("content", [Spy(), [1, 2], {"a": 1}, {"a": torch.zeros(2)}, None])
def test_other_files_of_weights_are_refused_and_run_nothing(content):
    file = Path("weights.pth")
    if content is None:
        file.write_bytes(b"no weights")
    elif isinstance(content, Spy):
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file)
    with pytest.raises(ConfigError, match=r"weights\.pth"):
        load_features("efficientnet-lite0", CPU, file)
    assert not Path("ran").exists()


def test_inception_tells_where_its_weights_belong(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", pytest.fail)
    with pytest.raises(ConfigError) as found:
        load_features("inception", CPU)
    assert str(tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth") in found.value.problem
    assert features.INCEPTION_URL in found.value.advice and "--feature-weights" in found.value.advice
    Path("other.pth").write_bytes(b"other")
    with pytest.raises(ConfigError, match="not the weights of published FIDs"):
        load_features("inception", CPU, Path("other.pth"))
    with pytest.raises(ConfigError, match="no such file"):
        load_features("inception", CPU, Path("missing.pth"))


def test_inception_computes_with_the_weights_of_a_file(monkeypatch):
    """Random ones, of the right shapes: the published file is not at hand."""
    from torch_fidelity import feature_extractor_inceptionv3 as library

    kind = library.FeatureExtractorInceptionV3
    with monkeypatch.context() as patch:
        patch.setattr(library, "load_state_dict_from_url", lambda *args, **options: {})
        patch.setattr(kind, "load_state_dict", lambda *args: None)
        random = kind("random", ["2048"])
    torch.save(random.state_dict(), "random.pth")
    monkeypatch.setattr(features, "INCEPTION_DIGEST", "")
    monkeypatch.setattr(library.torch, "load", with_weights_only := _Checked(library.torch.load))
    net = load_features("inception", CPU, Path("random.pth"))
    assert [isinstance(file, Path) for file in with_weights_only.loose] == [False]
    found = extract(images(2), net, CPU)
    assert found.shape == (2, FEATURES["inception"].dimension)
    torch.testing.assert_close(found, random(images(2))[0], rtol=1e-4, atol=1e-5)


class _Checked:
    """``torch.load`` that remembers which files it was to unpickle without restraint."""

    def __init__(self, load):
        self.load, self.loose = load, []

    def __call__(self, file, *args, **options):
        if not options.get("weights_only"):
            self.loose.append(file)
        return self.load(file, *args, **options)


def test_features_that_are_no_numbers_are_an_error():
    with pytest.raises(DataError, match="not finite"):
        extract(images(2), lambda batch: batch.float().fill_(torch.nan), CPU)


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(features.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="torch_fidelity is not installed") as found:
        features.require("inception")
    assert found.value.advice == "pip install 'ddpmctl[metrics]'"
