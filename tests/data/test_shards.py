"""Tar shards: what is in them, and that they are streamed in an order that is known, whoever asks for which part of it."""

from __future__ import annotations

import gzip
import io
import pickle
import sys
import tarfile
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ddpmctl.core.noise import derived_generator
from ddpmctl.data import shards, stream
from ddpmctl.data.named import whole
from ddpmctl.data.names import name_of_shards, read_shards
from ddpmctl.data.shards import index_of, places_of, samples_of
from ddpmctl.data.stream import Stream, spread
from ddpmctl.data.streamed import StreamedBatches
from ddpmctl.errors import ConfigError, DataError
from tars import BAD, COUNTS, batches, numbers, opened, png, seen, streamed, write_shards, write_tar


def test_samples_are_those_of_webdataset(tmp_path: Path) -> None:
    """Odd names, folders, notes, other files, an image without a class, a class without an image: as the package reads them."""
    from webdataset.tariterators import tarfile_samples

    path = write_tar(tmp_path / "odd.tar", [
        ("./a/1.png", png(1)), ("./a/1.cls", b" 7 \n"), ("a/1.txt", b"x"), ("__notes__/n.png", png(9)), ("__x__", b""),
        ("a.b/2.PNG", png(2)), ("a.b/2.json", b"{}"), ("3.mask.png", png(8)), ("3.png", png(3)), ("4.cls", b"0"), ("README", b""),
        ("5.seg.png", png(5)),
    ])  # fmt: skip
    with tarfile.open(path, "a") as tar:
        tar.add(tmp_path, "6.png", recursive=False)  # a folder
    theirs = [sample for sample in tarfile_samples([{"url": str(path)}]) if any(key.endswith("png") for key in sample)]
    (shard,) = index_of(str(path), 1, None)
    ours = [(sample.name, sample.label, sample.read()) for sample in samples_of(shard)]
    assert [name for name, _, _ in ours] == [f"odd.tar/{name}" for name in ("./a/1.png", "a.b/2.png", "3.png", "5.seg.png")]
    assert [sample["__key__"] for sample in theirs] == ["./a/1", "a.b/2", "3", "5"]
    assert [raw for _, _, raw in ours] == [sample.get("png", sample.get("seg.png")) for sample in theirs]
    assert [label for _, label, _ in ours] == ["7", "", "", ""] and shard.classes == {"7": 1, "": 3}


def expected(found: Stream, seed: int, epochs: int) -> list[int]:
    """The order of ``epochs``, by the words of the documentation."""
    starts = [sum(shard.count for shard in found.shards[:i]) for i in range(len(found.shards))]
    order = []
    for epoch in range(epochs):
        line = []
        for i in torch.randperm(len(found.shards), generator=derived_generator(seed, "shards", epoch)).tolist():
            line += range(starts[i] + found.held[i], starts[i] + found.shards[i].count)
        for number, start in enumerate(range(0, len(line), found.block)):
            block = line[start : start + found.block]
            mixed = torch.randperm(len(block), generator=derived_generator(seed, "block", epoch, number)).tolist()
            order += [block[place] for place in mixed]
    return order


@pytest.mark.parametrize(("shuffle", "batch_size"), [(1, 4), (8, 4), (8, 7), (5, 11), (1000, 4), (8, 70)])
def test_the_order_follows_from_seed_epoch_and_block(tmp_path: Path, shuffle: int, batch_size: int) -> None:
    found = streamed(write_shards(tmp_path / "s", COUNTS), shuffle=shuffle, holdout=0.1)
    assert len(found) == 27 and found.total == 30
    with batches(found, batch_size, seed=3) as made:
        steps = 4 * 27 // batch_size + 1
        order = seen(made, range(1, steps + 1))
        assert order == expected(found, 3, 20)[: steps * batch_size]
        assert made.epoch_of(27) == batch_size
    held = set(range(30)) - set(order)
    assert len(held) == 3 and all(Counter(order[epoch * 27 : epoch * 27 + 27]) == Counter(set(range(30)) - held) for epoch in range(4))
    assert numbers(opened(tmp_path / "s", holdout=0.1).images) == sorted(held)


def test_another_seed_is_another_order(tmp_path: Path) -> None:
    found = streamed(write_shards(tmp_path / "s", COUNTS))
    with batches(found, 30, 1) as one, batches(found, 30, 2) as two:
        assert seen(one, range(1, 2)) != seen(two, range(1, 2))


def test_a_batch_is_the_same_after_a_jump(tmp_path: Path) -> None:
    found = streamed(write_shards(tmp_path / "s", COUNTS, label=lambda n: str(n % 3)), shuffle=8, conditional=True)
    with batches(found, 4, hflip=True) as made:
        straight = [made(step) for step in range(1, 30)]
        for step in (29, 3, 4, 17, 1, 2):
            again = made(step)
            assert torch.equal(again.x0, straight[step - 1].x0) and torch.equal(again.label, straight[step - 1].label)
    for step in (5, 23):
        with batches(found, 4, hflip=True) as fresh:
            assert torch.equal(fresh(step).x0, straight[step - 1].x0)
    with batches(found, 4) as plain, pytest.raises(ValueError, match="count from 1"):
        plain(0)


@pytest.mark.parametrize("bad", [(), (0, 5, 6, 7, 8, 29)])
def test_parts_of_several_processes_are_the_whole(tmp_path: Path, bad: tuple[int, ...]) -> None:
    """Each decodes its own rows alone, and what takes the place of a bad image, whoever has that."""
    folder = write_shards(tmp_path / "s", COUNTS, label=str, bad=bad)
    found = streamed(folder, shuffle=9, conditional=True, holdout=0, max_bad=1)
    parts = (slice(0, 3), slice(3, 5), slice(5, 7))
    with batches(found, 7, hflip=True) as one:
        wholes = [one(step) for step in range(1, 14)]
    decoded = Counter[str]()
    plain = Stream.decoded

    def counted(self: Stream, samples: Any) -> Any:
        for sample in plain(self, samples):
            decoded[sample.name] += 1
            yield sample

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stream, "decoded", counted)
        others = []
        for part in parts:
            with batches(found, 7, hflip=True) as made:
                others.append([made(step, part) for step in range(1, 14)])
    for step, batch in enumerate(wholes):
        assert torch.equal(torch.cat([other[step].x0 for other in others]), batch.x0)
        assert torch.equal(torch.cat([other[step].label for other in others]), batch.label)
    if not bad:
        assert max(decoded.values()) <= 5  # three epochs, and what was read ahead: not once in each process


@pytest.mark.parametrize("shuffle", [4, 9, 100])
@pytest.mark.parametrize("max_bad", [0.15, 1])
def test_bad_images_of_several_processes_are_those_of_one(tmp_path: Path, shuffle: int, max_bad: float) -> None:
    """At every step the same list in the same order, and too many at the same step for the same reason."""
    bad = (0, 6, 8, 14, 17, 20, 25, 29)
    found = streamed(write_shards(tmp_path / "s", COUNTS, bad=bad), shuffle=shuffle, holdout=0, max_bad=max_bad)
    with ExitStack() as stack:
        one, *several = (stack.enter_context(batches(found, 7)) for _ in range(4))
        for step in range(1, 14):
            expected = fault_of(lambda step=step: one(step))
            for made, part in zip(several, (slice(0, 3), slice(3, 5), slice(5, 7)), strict=True):
                made(step, part)
            news = pickle.dumps([told for made in several if (told := made.news())])
            for made in several:
                assert fault_of(lambda made=made, news=news: made.take(pickle.loads(news))) == expected
                assert list(made.bad.items()) == list(one.bad.items()) and (made._seen, made._failed) == (one._seen, one._failed)
                assert made.news() is None
            if expected:
                break
    assert (expected is None) == (max_bad == 1) and (expected or len(one.bad) == len(bad))


def fault_of(work: Callable[[], object]) -> tuple[str, str] | None:
    """Problem and advice of the error that it raises."""
    try:
        work()
    except DataError as error:
        return error.problem, error.advice
    return None


def test_in_place_of_a_bad_image_comes_the_next_of_its_block(tmp_path: Path) -> None:
    found = streamed(write_shards(tmp_path / "s", (10,), bad=(2, 3, 9)), shuffle=5, holdout=0)
    with batches(found, 10) as made:
        assert sorted(seen(made, range(1, 2))) == [0, 1, 4, 4, 4, 5, 5, 6, 7, 8]
        assert sorted(made.bad) == [f"train-000.tar/{n:06d}.png" for n in (2, 3, 9)] and set(made.bad.values()) == {BAD}
        assert sorted(seen(made, range(2, 3))) == [0, 1, 4, 4, 4, 5, 5, 6, 7, 8] and len(made.bad) == 3


@pytest.mark.parametrize(
    ("settings", "bad", "words"),
    [
        ({"on_bad": "error"}, (7,), f"000007.png: {BAD}"),
        ({"max_bad": 0.2}, (4, 7, 8), "3 of 10 images that were come to are unreadable"),
        ({"max_bad": 1, "shuffle": 2}, (4, 5), "none of the 2 images of its block can be read"),
    ],
)
def test_bad_images_stop_the_run_where_they_are_to(tmp_path: Path, settings: dict[str, Any], bad: tuple[int, ...], words: str) -> None:
    found = streamed(write_shards(tmp_path / "s", (10,), bad=bad), holdout=0, **settings)
    with batches(found, 2) as made, pytest.raises(DataError, match=words):
        seen(made, range(1, 6))


def test_bad_images_are_judged_once_though_the_first_step_is_tried_before(tmp_path: Path) -> None:
    """Its blocks are more than are kept: they are read again."""
    found = streamed(write_shards(tmp_path / "s", (40,), bad=(0, 10, 20)), shuffle=4, holdout=0, max_bad=0.1)
    with batches(found, 40) as made:
        made(1)
        assert (made._failed, made._seen) == (3, 40)
        made(1)  # two times three would be too many of 40
        assert (made._failed, made._seen) == (3, 40) and len(made.bad) == 3
        made(2)
        assert (made._failed, made._seen) == (6, 80)


def test_held_out_images_are_the_first_of_every_shard(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "s", (10, 20, 30), label=lambda n: "b" if n % 2 else "a", bad=(10,))
    data = opened(folder, holdout=0.1, conditional=True)
    assert data.held is not None and data.stream and data.stream.held == [1, 2, 3] and data.total == 60
    assert numbers(data.images) == [0, 11, 30, 31, 32] and data.held.tolist() == [0, 1, 2, 3, 4]
    assert data.class_names == ["a", "b"] and data.labels is not None and data.labels.tolist() == [0, 1, 0, 1, 0]
    assert data.report.bad == [("train-001.tar/000010.png", BAD)] and data.report.classes == {"a": 30, "b": 30}
    more = opened(folder, most=12, holdout=0.1)
    assert numbers(more.images) == [0, 1, 11, 12, 13, *range(30, 36)]
    assert more.held is not None and numbers(more.images[more.held]) == numbers(data.images)
    assert len(opened(folder, most=1000).images) == 59 and len(opened(folder, holdout=0).images) == 0


@pytest.mark.parametrize("n", [0, 1, 2, 13, 40])
def test_what_is_spread_is_shared_evenly(n: int) -> None:
    counts = [7, 0, 12, 1, 20]
    parts = spread(n, counts)
    assert sum(parts) == n and all(abs(part - n * count / 40) < 1 for part, count in zip(parts, counts, strict=True))
    assert spread(3, []) == []


def test_little_memory_makes_small_blocks_and_few_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "BLOCK_BYTES", 10 * 3 * 4 * 4 + 5)
    found = streamed(write_shards(tmp_path / "s", (100,)), holdout=0.5)
    assert found.block == 10 and found.held == [10]


def test_classes_are_by_number_or_by_the_alphabet(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "numbers", (12,), label=lambda n: f"{n}\n")
    assert opened(folder, conditional=True).class_names == [str(n) for n in range(12)]
    assert opened(folder).class_names == [] and opened(folder).labels is None
    assert opened(write_shards(tmp_path / "names", (3,), label=lambda n: f"x{12 - n}"), conditional=True).class_names == ["x10", "x11", "x12"]
    with pytest.raises(DataError, match=r"3 of 3 images have no class, the first in train-000\.tar"):
        opened(write_shards(tmp_path / "none", (3,)), conditional=True)


def test_auto_is_settled_by_the_first_images(tmp_path: Path) -> None:
    data = opened(write_shards(tmp_path / "s", (5, 5), size=(6, 8)), size="auto")
    assert data.size == (6, 8) and data.channels == 3 and data.report.looked_at == 10 and data.report.shards == 2
    write_tar(tmp_path / "grey" / "0.tar", [(f"{n}.png", png(n, mode="L")) for n in range(3)])
    assert opened(tmp_path / "grey", size="auto", most=3).images.shape == (3, 1, 4, 4)
    write_tar(tmp_path / "s" / "train-002.tar", [("1.png", png(1))])
    with pytest.raises(DataError, match="2 sizes: 6x8"):
        opened(tmp_path / "s", size="auto")


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def garbage(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[5 * 1024 + 100 : 5 * 1024 + 200] = b"x" * 100  # in the header of the sixth
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("harm", "left"),
    [(lambda path: cut(path, 9 * 1024 + 550), 9), (garbage, 4), (lambda path: cut(path, 20 * 1024), 19), (lambda path: cut(path, 100), 0), (lambda path: path.write_bytes(b""), 0),
     (lambda path: path.write_bytes(b"no tar at all" * 100), 0)],
)  # fmt: skip
def test_of_a_damaged_shard_what_is_before_is_used_and_it_is_named(tmp_path: Path, harm: Callable[[Path], None], left: int) -> None:
    folder = write_shards(tmp_path / "s", (4, 20, 4))
    harm(folder / "train-001.tar")
    data = opened(folder, holdout=0)
    assert [shard.count for shard in data.stream.shards] == [4, left, 4]  # type: ignore[union-attr]
    ((name, reason),) = data.report.bad
    assert name == "train-001.tar" and f"; {left} images of it are used" in reason
    with batches(data.stream, left + 8) as made:  # type: ignore[arg-type]
        assert sorted(seen(made, range(1, 2))) == [*range(4 + left), *range(24, 28)]
    for settings in ({"on_bad": "error"}, {"max_bad": 0.1}):
        with pytest.raises(DataError, match=r"1 of 3 shards are damaged, the first: train-001\.tar"):
            opened(folder, **settings)


def test_a_shard_twice_under_a_name_is_damaged(tmp_path: Path) -> None:
    write_tar(tmp_path / "s" / "0.tar", [("1.png", png(1)), ("1.png", png(2))])
    with pytest.raises(DataError, match="duplicate"):
        opened(tmp_path / "s")


def test_no_images_and_nothing_there_are_told(tmp_path: Path) -> None:
    write_tar(tmp_path / "s" / "0.tar", [("1.txt", b"x")])
    for path, words in (("s", "no image in 1 shards"), ("s/*.tgz", "no shards there"), ("s/{0..2}.tar", r"1\.tar: no such shard, nor 1 more of 3")):
        with pytest.raises(DataError, match=words):
            opened(Path(path))


def test_a_shard_that_changes_or_goes_is_named_where_it_is_come_to(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "s", (10, 10))
    found = streamed(folder, shuffle=4, holdout=0)
    (folder / "train-001.tar").unlink()
    with batches(found, 4) as made, pytest.raises(DataError, match=r"train-001\.tar: changed, or gone"):
        seen(made, range(1, 6))
    write_shards(folder, (9, 10))
    with batches(found, 4) as made, pytest.raises(DataError, match=r"train-00.\.tar: changed, or gone"):
        seen(made, range(1, 6))


def test_an_index_is_kept_and_only_what_changed_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "TICK_NS", 0)  # what was written just now is as good as old
    monkeypatch.setenv("DDPMCTL_CACHE", str(tmp_path / "cache"))
    folder = write_shards(tmp_path / "s", (4, 5, 6), label=str)
    read, plain = [], shards._read_through
    monkeypatch.setattr(shards, "_read_through", lambda place, *how: read.append(Path(place).name) or plain(place, *how))
    first = opened(folder)
    assert opened(folder).fingerprint == first.fingerprint and len(read) == 3
    write_tar(folder / "train-001.tar", [("a.png", png(1)), ("a.cls", b"0")])
    assert opened(folder).fingerprint != first.fingerprint and read[3:] == ["train-001.tar"]
    assert len(list((tmp_path / "cache").iterdir())) == 1
    for file in (tmp_path / "cache").rglob("index"):
        file.write_bytes(file.read_bytes()[:-1])
    assert opened(folder).total == 11 and len(read) == 7


def test_the_fingerprint_is_of_names_sizes_and_classes_not_of_the_place(tmp_path: Path) -> None:
    one = opened(write_shards(tmp_path / "one", (4, 5), label=str)).fingerprint
    assert opened(write_shards(tmp_path / "two", (4, 5), label=str)).fingerprint == one
    assert opened(Path("two/train-{000..001}.tar")).fingerprint == opened(Path("two/train-*.tar")).fingerprint == one
    assert opened(write_shards(tmp_path / "two", (4, 5), label=lambda n: str(n + 1))).fingerprint != one
    assert opened(write_shards(tmp_path / "two", (5, 4), label=str)).fingerprint != one


@pytest.mark.parametrize(
    ("text", "pattern", "name"),
    [
        ("x/train-{000..099}.tar", "x/train-{000..099}.tar", "train"), ("x/*.tar", "x/*.tar", "x"), ("shards:x.tgz", "x.tgz", "x"),
        ("http://host/a/b-{0..3}.tar", "http:/host/a/b-{0..3}.tar", "b"), ("https://host/a.tar", "https:/host/a.tar", "a"),
        ("pipe:ls", "pipe:ls", "pipe:ls"), ("missing.tar", "missing.tar", "missing"), ("folder", "folder", "folder"),
        ("photos", None, ""), ("mixed", None, ""), ("model.pth.tar", None, ""), ("a.zip", None, ""), ("hf:x.tar", None, ""),
    ],
)  # fmt: skip
def test_what_means_shards(tmp_path: Path, text: str, pattern: str | None, name: str) -> None:
    write_shards(tmp_path / "folder", (1,))
    for other in ("photos", "mixed"):
        (tmp_path / other).mkdir()
        (tmp_path / other / "1.png").write_bytes(png(1))
    write_shards(tmp_path / "mixed", (1,))
    torch.save({}, tmp_path / "model.pth.tar")
    assert read_shards(Path(text)) == pattern
    if pattern:
        assert name_of_shards(pattern) == name
        assert whole(whole(Path(text))) == whole(Path(text))


def test_several_patterns_make_one_line(tmp_path: Path) -> None:
    write_shards(tmp_path / "s", (1, 1, 1))
    assert [Path(place).name for place in places_of("s/train-{002..001}.tar::s/*0.tar")] == ["train-002.tar", "train-001.tar", "train-000.tar"]
    assert whole(Path("a.tar::b.tar")) == Path(f"shards:{tmp_path}/a.tar::{tmp_path}/b.tar")


@pytest.mark.parametrize("text", ["pipe:touch made", "shards:pipe:touch made", "shards:s3://bucket/a.tar", "x{0..1}.tar::pipe:touch made"])
def test_what_would_start_a_program_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not read"):
        opened(Path(text) if text.startswith(("pipe", "shards")) else Path(f"shards:{text}"))
    assert not Path("made").exists()


def test_the_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "webdataset.shardlists", None)
    with pytest.raises(DataError, match="needs the package webdataset") as told:
        opened(write_shards(tmp_path / "s", (1,)))
    assert told.value.advice == "pip install 'ddpmctl[shards]'"


def test_packed_shards_are_read_too(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        for number in range(5):
            info = tarfile.TarInfo(f"{number}.png")
            info.size = len(png(number))
            tar.addfile(info, io.BytesIO(png(number)))
    assert numbers(opened(Path("a.tar.gz"), most=5).images) == [0, 1, 2, 3, 4]


def test_the_thread_ends_with_the_batches(tmp_path: Path) -> None:
    found = streamed(write_shards(tmp_path / "s", (200,)), shuffle=50)
    before = {thread.name for thread in threading.enumerate()}
    made = StreamedBatches(found, 4, 0)
    made(1)
    assert {thread.name for thread in threading.enumerate()} > before
    made.close()
    assert {thread.name for thread in threading.enumerate()} <= before
    made.close()


def _tar_with(place: Path, **fields: object) -> None:
    """A tar of an image, and then a header of ``fields`` with nothing behind it."""
    raw = io.BytesIO()
    Image.effect_noise((8, 8), 90).save(raw, "PNG")
    image, odd = tarfile.TarInfo("a.png"), tarfile.TarInfo("odd")
    image.size = len(raw.getvalue())
    for name, value in fields.items():
        setattr(odd, name, value)
    content = image.tobuf(tarfile.GNU_FORMAT) + raw.getvalue() + bytes(-image.size % 512)
    place.write_bytes(content + odd.tobuf(tarfile.GNU_FORMAT) + bytes(1024))


@pytest.mark.parametrize("fields", [{"size": -512}, {"size": 2**62}, {"size": 2**50, "type": tarfile.XHDTYPE}, {"size": 2**50, "type": tarfile.GNUTYPE_LONGNAME}])
@pytest.mark.parametrize("ending", [".tar", ".tar.gz"])
def test_sizes_that_no_file_has_are_damage(tmp_path: Path, fields: dict[str, object], ending: str) -> None:
    _tar_with(tmp_path / "x.tar", **fields)
    place = tmp_path / f"odd{ending}"
    raw = (tmp_path / "x.tar").read_bytes()
    place.write_bytes(gzip.compress(raw) if ending.endswith("gz") else raw)
    [shard] = index_of(str(place), 1, None)
    assert "damaged" in shard.fault and shard.count <= 1


def test_headers_in_front_of_headers_are_damage(tmp_path: Path) -> None:
    link = tarfile.TarInfo("x")
    link.type, link.size = tarfile.XHDTYPE, 0
    (tmp_path / "chain.tar").write_bytes(link.tobuf(tarfile.USTAR_FORMAT) * 3000 + bytes(1024))
    [shard] = index_of(str(tmp_path / "chain.tar"), 1, None)
    assert "damaged" in shard.fault
