"""Features of images, kept in the cache beside the decoded pixels: one entry is a folder with one ``.npz`` in it."""

from __future__ import annotations

import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ddpmctl.data.entry import FEATURES, decoder_version, short_digest
from ddpmctl.files import replacing

Features = npt.NDArray[np.float32]
"""(N, D)."""

About = dict[str, Any]
"""What features are of: plain scalars and lists. ``root``, where the images were, is for people: it identifies nothing."""


def name_of_features(about: About) -> str:
    """The name of the entry's folder: the data by its fingerprint, then everything else on which features depend."""
    rest = {key: value for key, value in about.items() if key not in ("root", "fingerprint")}
    return f"features-{short_digest(about['fingerprint'])}-{short_digest(json.dumps([decoder_version(), rest], sort_keys=True))}"


def write_features(folder: Path, about: About, features: Features) -> None:
    """Make or replace the entry ``folder`` in one step; raises ``OSError``."""
    with replacing(folder / FEATURES) as file:
        np.savez(file, about=np.array(json.dumps({**about, "decoder": decoder_version()})), features=features)


def read_features(folder: Path, about: About) -> Features:
    """The features of an entry that is for ``about``, read as data; raises ``OSError`` or ``ValueError`` for another."""
    head, features = _read(folder, with_features=True)
    expected = json.loads(json.dumps({**about, "decoder": decoder_version()}))
    if {**head, "root": None} != {**expected, "root": None}:
        raise ValueError("an entry for something else")
    if features is None or features.dtype != np.float32 or features.ndim != 2 or len(features) != head["shape"][0]:
        raise ValueError("not features")
    return features


def read_features_head(folder: Path) -> About:
    """What an entry says that it is for; raises ``OSError`` or ``ValueError``."""
    return _read(folder)[0]


def _read(folder: Path, *, with_features: bool = False) -> tuple[About, Features | None]:
    try:
        with np.load(folder / FEATURES, allow_pickle=False) as content:
            head = json.loads(str(content["about"]))
            features = content["features"] if with_features else None
    except (zipfile.BadZipFile, zlib.error, EOFError, LookupError, TypeError, AttributeError) as error:
        raise ValueError("damaged features") from error
    shape = head.get("shape") if isinstance(head, dict) and isinstance(head.get("root"), str) else None
    if not isinstance(shape, list) or len(shape) != 4 or not all(isinstance(side, int) for side in shape):
        raise ValueError("not features")
    return head, features
