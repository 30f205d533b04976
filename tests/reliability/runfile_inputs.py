"""Random run files, right and wrong, and what a YAML reader of another make says that they mean."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import NamedTuple

import yaml
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from ddpmctl.config import RunConfig, Section

LARGEST = 2**63 - 1


class Given(NamedTuple):
    """A value as it is spelled in YAML, and what that means."""

    text: str
    value: object


class Kind:
    """What the values of a key can be."""

    def good(self) -> SearchStrategy[Given]:
        """Values that are right by themselves and with all other good ones."""
        raise NotImplementedError

    def meaning(self, raw: object) -> object:
        """What a value as YAML has it means; ``ValueError`` for one that is wrong."""
        raise NotImplementedError


def refuse_unless(right: bool) -> None:
    if not right:
        raise ValueError


def spelled(words: Sequence[str]) -> SearchStrategy[Given]:
    """Words plain and in quotes."""
    return st.sampled_from([Given(form, word) for word in words for form in (word, f"'{word}'", f'"{word}"')])


@dataclass(frozen=True)
class Whole(Kind):
    """A whole number from ``low`` to ``high``, or one of ``words``. ``of``: those that go with all others."""

    low: int = 0
    high: int = LARGEST
    words: tuple[str, ...] = ()
    of: tuple[int, ...] = ()

    def good(self) -> SearchStrategy[Given]:
        few = st.sampled_from(self.of or (self.low, self.high))
        number = few if self.of else st.integers(self.low, min(self.high, self.low + 2000)) | few
        numbers = number.flatmap(lambda n: st.sampled_from([Given(text, n) for text in self._spellings(n)]))
        return numbers | spelled(self.words) if self.words else numbers

    @staticmethod
    def _spellings(n: int) -> list[str]:
        texts = [str(n), f"+{n}", f"{n:_}", hex(n), bin(n), f"'{n}'", f'" {n} "', f"{n}e0", f"!!int {n}", f"!!str {n}"]
        texts += [f"{n}.0", f"{float(n):.1e}"] if n < 10**15 and float(f"{float(n):.1e}") == n else []
        texts += [f"{Decimal(n) / 1000}k", f"{Decimal(n) / 10**6:f}M"] if 1000 <= n < 10**15 else []
        return [*texts, f"{n // 10}e1"] if n % 10 == 0 else texts

    def meaning(self, raw: object) -> object:
        if raw in self.words:
            return raw
        refuse_unless(isinstance(raw, int | float | str) and not isinstance(raw, bool))
        text = str(raw).strip().replace("_", "").lower()
        factor = {"k": 10**3, "m": 10**6, "b": 10**9}.get(text[-1:], 1)
        refuse_unless(len(text) < 5000 and not re.search(r"e\+?\d{4}", text))
        whole, _, exponent = (text[:-1] if factor > 1 else text).partition("e")
        front, _, back = whole.partition(".")
        shift = int(exponent or 0) - len(back)
        digits = int(front + back) * factor
        number, rest = divmod(digits, 10**-shift) if shift < 0 else (digits * 10**shift, 0)
        refuse_unless(rest == 0 and self.low <= number <= self.high)
        return number


@dataclass(frozen=True)
class Real(Kind):
    """A number between ``low`` and ``high``; the ends in ``without`` are not among them."""

    low: float = 0
    high: float = 1e300
    without: tuple[float, ...] = ()

    def good(self) -> SearchStrategy[Given]:
        numbers = st.floats(self.low, self.high, allow_nan=False).filter(lambda x: x not in self.without)
        texts = lambda x: [repr(x), f"{x:.17e}", f"{x:.17E}", f"'{x!r}'", f"!!float {x!r}"] + (
            [str(int(x))] if x == int(x) and x < 1e15 else []
        )
        return numbers.flatmap(lambda x: st.sampled_from([Given(text, float(x)) for text in texts(x)]))

    def meaning(self, raw: object) -> object:
        refuse_unless(isinstance(raw, int | float | str) and not isinstance(raw, bool))
        number = float(raw)  # type: ignore[arg-type]
        refuse_unless(self.low <= number <= self.high and number not in self.without)
        return number


@dataclass(frozen=True)
class Choice(Kind):
    """One of ``words``."""

    words: tuple[str, ...]

    def good(self) -> SearchStrategy[Given]:
        return spelled(self.words)

    def meaning(self, raw: object) -> object:
        refuse_unless(raw in self.words)
        return raw


class Truth(Kind):
    """Yes or no."""

    def __init__(self) -> None:
        self.words = {True: ("yes", "on", "true", "y", "t", "1"), False: ("no", "off", "false", "n", "f", "0")}

    def good(self) -> SearchStrategy[Given]:
        forms = [(word, value) for value, words in self.words.items() for word in words[:3]]
        return st.sampled_from(
            [Given(text, value) for word, value in forms for text in (word, word.upper(), word.title(), f"'{word}'")]
        )

    def meaning(self, raw: object) -> object:
        text = f"{raw:g}" if isinstance(raw, float) else str(raw).lower()
        return next(value for value, words in self.words.items() if raw is value or text in words)


class Word(Kind):
    """Any text."""

    def good(self) -> SearchStrategy[Given]:
        texts = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")) | st.just(" "), min_size=1)
        double = texts.map(lambda text: Given(json.dumps(text, ensure_ascii=False), text))
        single = texts.map(lambda text: Given("'" + text.replace("'", "''") + "'", text))
        return double | single | spelled(["photos", "Äpfel und Birnen", "2024-05-01", "white"])

    def meaning(self, raw: object) -> object:
        refuse_unless(isinstance(raw, str))
        return raw


class Place(Word):
    """The name of a folder or file, which may look like a number; None where there is none."""

    def good(self) -> SearchStrategy[Given]:
        numbers = st.sampled_from(["2024", "007", "1_000", "1.50", "0x10", "12:30", "1e5"])
        return super().good() | numbers.map(lambda text: Given(text, text))

    def meaning(self, raw: object) -> object:
        return None if raw is None else super().meaning(raw)


class Digest(Kind):
    """64 hexadecimal digits; None where there is none."""

    def good(self) -> SearchStrategy[Given]:
        # With a letter in front: digits alone are a number to YAML, and one digest of 10^13 is such.
        return st.binary(min_size=32, max_size=32).flatmap(lambda data: spelled(["f" + data.hex()[1:]]))

    def meaning(self, raw: object) -> object:
        refuse_unless(raw is None or bool(re.fullmatch(r"[0-9a-f]{64}", str(raw))))
        return None if raw is None else str(raw)


class Size(Kind):
    """A side, both, or auto."""

    def good(self) -> SearchStrategy[Given]:
        side = st.integers(1, 4096)
        both = st.tuples(side, side, st.sampled_from("xX×")).map(
            lambda s: [Given(f"{s[0]}{s[2]}{s[1]}", s[:2]), Given(f"[{s[0]}, {s[1]}]", s[:2]), Given(str(s[0]), (s[0],) * 2)]
        )
        return both.flatmap(st.sampled_from) | spelled(["auto"])

    def meaning(self, raw: object) -> object:
        if raw == "auto":
            return raw
        sides = re.split("[xX×]", raw.strip()) if isinstance(raw, str) else raw if isinstance(raw, list) else [raw]
        refuse_unless(len(sides) in (1, 2) and all(type(side) is int or isinstance(raw, str) for side in sides))
        height, width = int(sides[0]), int(sides[-1])
        refuse_unless(1 <= height <= 4096 and 1 <= width <= 4096)
        return height, width


class Channels(Kind):
    """How many, or what they are."""

    def __init__(self) -> None:
        self.names = {"grey": 1, "gray": 1, "rgb": 3, "rgba": 4, "1": 1, "3": 3, "4": 4, "auto": "auto"}

    def good(self) -> SearchStrategy[Given]:
        return st.sampled_from([Given(text, value) for text, value in self.names.items()])

    def meaning(self, raw: object) -> object:
        refuse_unless(not isinstance(raw, bool))
        return self.names[repr(int(raw)) if isinstance(raw, float) and raw in (1, 3, 4) else str(raw).lower()]


class Device(Kind):
    """Where to compute."""

    def good(self) -> SearchStrategy[Given]:
        return spelled(["auto", "cpu", "cuda", "cuda:0", "cuda:1", "cuda:15", "mps"])

    def meaning(self, raw: object) -> object:
        refuse_unless(isinstance(raw, str) and bool(re.fullmatch(r"auto|cpu|mps|cuda(:(0|[1-9][0-9]?|1[0-2][0-9]))?", raw)))
        return raw


class Embedding(Kind):
    """Width of the time embedding."""

    def good(self) -> SearchStrategy[Given]:
        even = st.integers(1, 500).map(lambda n: Given(str(2 * n), 2 * n))
        return even | spelled(["auto", "none"]) | st.sampled_from([Given("null", "none"), Given("~", "none")])

    def meaning(self, raw: object) -> object:
        if raw is None or raw in ("auto", "none"):
            return raw or "none"
        number = Whole(2, 32_768).meaning(raw)
        refuse_unless(isinstance(number, int) and number % 2 == 0)
        return number


@dataclass(frozen=True)
class ListOf(Kind):
    """A list of whole numbers."""

    each: Whole
    least: int = 0
    most: int = 10**6
    good_least: int = 0
    good_most: int = 8

    def good(self) -> SearchStrategy[Given]:
        lists = st.lists(self.each.good(), min_size=self.good_least, max_size=self.good_most)
        return lists.map(lambda items: Given(f"[{', '.join(i.text for i in items)}]", [i.value for i in items]))

    def meaning(self, raw: object) -> object:
        refuse_unless(isinstance(raw, list) and self.least <= len(raw) <= self.most)
        assert isinstance(raw, list)
        return [self.each.meaning(item) for item in raw]


class Boards(Kind):
    """A list of names, or one, or none."""

    words = ("tensorboard", "wandb", "mlflow")

    def good(self) -> SearchStrategy[Given]:
        lists = st.lists(st.sampled_from(self.words), max_size=3)
        return lists.map(lambda items: Given(f"[{', '.join(items)}]", items)) | st.just(Given("none", []))

    def meaning(self, raw: object) -> object:
        found = [raw] if isinstance(raw, str) else raw
        refuse_unless(isinstance(found, list) and len(found) <= 8)
        assert isinstance(found, list)
        refuse_unless(found == ["none"] or all(word in self.words for word in found))
        return [] if found == ["none"] else found


class Blocks(Whole):
    """A number for all levels, or a list with one for each, which may be 0."""

    def meaning(self, raw: object) -> object:
        if isinstance(raw, list):
            refuse_unless(bool(raw))
            return [Whole(0, 64).meaning(item) for item in raw]
        return super().meaning(raw)


KINDS: dict[str, Kind] = {
    "device": Device(),
    "precision": Choice(("auto", "fp32", "bf16", "fp16")),
    "seed": Whole(),
    "data.path": Place(),
    "data.size": Size(),
    "data.channels": Channels(),
    "data.fit": Choice(("crop", "pad", "stretch")),
    "data.hflip": Truth(),
    "data.conditional": Truth(),
    "data.background": Word(),
    "data.on_bad": Choice(("skip", "error")),
    "data.max_bad": Real(0, 1),
    "data.workers": Whole(1, 1024, words=("auto",)),
    "data.cache": Truth(),
    "data.shuffle": Whole(1),
    "data.holdout": Real(0, 1, without=(1,)),
    "diffusion.timesteps": Whole(2, 100_000),
    "diffusion.schedule": Choice(("linear", "cosine", "sigmoid")),
    "diffusion.shift": Real(0.1, 100),
    "diffusion.zero_terminal_snr": Truth(),
    "diffusion.prediction": Choice(("eps", "x0", "v")),
    "diffusion.loss": Choice(("l2", "l1", "huber")),
    "diffusion.weighting": Choice(("uniform", "min_snr", "p2")),
    "diffusion.t_sampling": Choice(("uniform", "stratified", "importance")),
    "diffusion.learn_variance": Truth(),
    "diffusion.offset_noise": Real(0, 1),
    "model.base_channels": Whole(1, 8192, of=(32, 64, 96, 128, 8192)),
    "model.channel_mults": ListOf(Whole(1, 64), least=1, most=8, good_least=2),
    "model.num_res_blocks": Blocks(1, 64),
    "model.attention_levels": ListOf(Whole(of=(0, 1)), good_most=3),
    "model.middle_attention": Truth(),
    "model.head_channels": Whole(1, 8192, words=("all",), of=(1, 2, 4, 8, 16, 32)),
    "model.qk_norm": Truth(),
    "model.dropout": Real(0, 1, without=(1,)),
    "model.label_dropout": Real(0, 1, without=(1,)),
    "model.norm": Choice(("group", "batch", "instance", "none")),
    "model.norm_groups": Whole(1, 8192, of=(1, 2, 4, 8, 16, 32)),
    "model.norm_eps": Real(0, 1, without=(0,)),
    "model.activation": Choice(("silu", "relu", "gelu", "mish")),
    "model.time_embedding": Embedding(),
    "model.time_scale": Real(0, without=(0,)),
    "model.time_order": Choice(("sin_cos", "cos_sin")),
    "model.time_shift": Real(0, 1),
    "model.down_padding": Choice(("symmetric", "right_bottom")),
    "model.padding": Whole(0, 64),
    "model.patch": Whole(1, 16, of=(1,)),
    "train.steps": Whole(1),
    "train.batch_size": Whole(1, 1_000_000, of=(16, 100, 128, 1_000_000)),
    "train.grad_accum": Whole(1, of=(1, 2, 15, 16)),
    "train.optimizer": Choice(("adam", "adamw")),
    "train.lr": Real(0, without=(0,)),
    "train.beta1": Real(0, 1, without=(1,)),
    "train.beta2": Real(0, 1, without=(1,)),
    "train.weight_decay": Real(0),
    "train.compile": Choice(("none", "default", "reduce-overhead", "max-autotune")),
    "train.init_from": Place(),
    "train.init_digest": Digest(),
    "train.lr_schedule": Choice(("constant", "linear", "cosine", "cosine_flat", "geometric")),
    "train.lr_warmup": Whole(),
    "train.grad_clip": Real(0),
    "train.ema_decay": Real(0, 1, without=(1,)),
    "train.ema_warmup": Choice(("gradual", "copy", "none")),
    "train.ema_start": Whole(),
    "train.ema_every": Whole(1),
    "train.ema_snapshot_every": Whole(),
    "train.save_every": Whole(1),
    "train.keep": Whole(1),
    "train.sample_every": Whole(),
    "train.samples": Whole(1, 1024),
    "train.sampler": Choice(("ddim", "ddpm", "dpm++", "dpm++sde", "unipc", "heun")),
    "train.sample_steps": Whole(1),
    "train.log_every": Whole(1),
    "train.log": Boards(),
    "train.val_every": Whole(),
    "train.evaluate_every": Whole(of=(0,)),
    "train.evaluate_samples": Whole(20, 100_000),
    "train.bad_steps": Whole(1),
    "train.max_rollbacks": Whole(),
}
"""Every key, as the printed defaults describe it; a new one takes a line here."""


def flat(config: RunConfig) -> dict[str, object]:
    """Dotted key -> value."""
    found: dict[str, object] = {}
    for name, value in config:
        found.update({f"{name}.{key}": leaf for key, leaf in value} if isinstance(value, Section) else {name: value})
    return found


class _Words(yaml.SafeLoader):
    """PyYAML's own reader of values, with dates left as the words that they are."""


_Words.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rows if not tag.endswith((":timestamp", ":value", ":merge"))]
    for first, rows in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag in ("timestamp", "value", "merge"):
    _Words.add_constructor(f"tag:yaml.org,2002:{_tag}", lambda loader, node: node.value)


def reading(text: str) -> dict[str, object]:
    """What the run file ``text`` says of each key that it names; ``ValueError`` where that is wrong, or said twice."""
    found: dict[str, object] = {}
    root = yaml.compose(text)
    for name, node in root.value if isinstance(root, yaml.MappingNode) else []:
        below = node.value if isinstance(node, yaml.MappingNode) else []
        leaves = [(name.value, node)] if name.value in KINDS else [(f"{name.value}.{sub.value}", leaf) for sub, leaf in below]
        for key, leaf in leaves:
            refuse_unless(key not in found)
            raw = _Words("").construct_document(leaf)
            found[key] = KINDS[key].meaning(leaf.value if key in ("data.path", "train.init_from") and raw is not None else raw)
    return found


WRONG = [
    "-1", "-0", "0", "1", "2", "3", "7", "64", "0.5", "1.5", "-1.5", "1e400", "-1e400", "1e-400", "1.0e+18", ".inf", "-.inf", ".nan", "nan",
    "inf", "Infinity", "0x10", "0o17", "010", "0b1", "1_000", "1__0", "_1", "1_", "1k", "1.5M", "1.0005k", "2b", "1kb", "1e5", "1e5k", "1e+2",
    "9" * 18, "9" * 19, "9" * 30, "9" * 5000, "9223372036854775807", "9223372036854775808", "1." + "0" * 40 + "1", "1." + "0" * 40,
    "1:30", "1,000", "１２", "٣", "½", "²", "1 000", "1e999999999", "1e0001", "--1", "1.", ".5", "+.5", "e5", "0.", "0e0", "0.1k",
    "true", "yes", "off", "y", "~", "null", "Null", "", "''", "[]", "[1]", "[1, 2]", "[0]", "[-1]", "[1, x]", "[1.5]", "['2']", "[~]", "[[1]]",
    "{}", "{a: 1}", "[1, 2, 3, 4, 5, 6, 7, 8, 9]", "!!int 5", "!!str 5", "!!float 1", "!!int ''", "!!float x", "!!bool 1", "!!null x",
    "!!timestamp 2001-01-01", "!!binary aGk=", "!x 5", "!!python/name:os.system", "!!python/object/apply:os.system ['true']", "!!set {1}",
    "&a 5", "*a", "&b [1]", "*b", "'5'", '" 5 "', '"5\\n"', '"\\0"', '"\\e[31m"', '"\\ud800"', '"\\udcff"', "2001-01-01", "<<", "=", "|", ">-",
    "auto", "none", "cpu", "cuda:01", "cuda:999", "cuda:١", "cuda:-1", "CUDA", "gpu", "48x64", "64x", "x64", "4096x4097", "4x4x4", "٤x٤",
    "RGB", "Gray", "crop ", "'crop '", "linear", "Linear", "lineár", "adam", "hubris", "rgb(300,0,0)", "#12345", "a b", "a: b", "- a", "? a", "@", "%", "`", "#",
]  # fmt: skip
"""Values that are wrong for most keys, and right for some."""

_NAMES = [*KINDS, *(key.rpartition(".")[2] for key in KINDS)]
_ODD_NAMES = ["", "~", "<<", "yes", "1", "data.", ".size", "Data.size", "data.size.x", "'a b'", '"\\0"', '"x\\ny"', "? x", "*a", "[a]", "x" * 200, "sizé"]


class Entry(NamedTuple):
    """A line of a run file: section ("" at the top), name and value, all as they are spelled."""

    section: str
    name: str
    text: str


@st.composite
def right_files(draw: DrawFn) -> tuple[str, dict[str, object]]:
    """A run file without a fault, and what it says."""
    keys = draw(st.lists(st.sampled_from(list(KINDS)), unique=True, max_size=12))
    given = {key: draw(KINDS[key].good()) for key in keys}
    if "data.conditional" not in given or not given["data.conditional"].value:
        keys = [key for key in keys if key != "model.label_dropout"]  # which hides what there must be
        given.pop("model.label_dropout", None)
    target, weighting = (given.get(f"diffusion.{name}") for name in ("prediction", "weighting"))
    if not target or target.value == "eps" or (weighting and weighting.value != "uniform"):
        keys = [key for key in keys if key != "diffusion.zero_terminal_snr"]  # of which those know nothing at T
        given.pop("diffusion.zero_terminal_snr", None)
    entries = [Entry(key.rpartition(".")[0], key.rpartition(".")[2], given[key].text) for key in keys]
    return draw(rendered(entries)), {key: value for key, (_, value) in given.items()}


@st.composite
def some_entries(draw: DrawFn, most: int = 6) -> list[Entry]:
    """Settings of which some are wrong."""
    entries = []
    for _ in range(draw(st.integers(1, most))):
        key = draw(st.sampled_from(list(KINDS)))
        section, _, name = key.rpartition(".")
        if draw(st.integers(0, 9)) == 9:
            section = draw(st.sampled_from(["data", "train", "model", "trian", "device", ""]))
            name = draw(st.sampled_from([*_NAMES, *_ODD_NAMES]))
        text = draw(st.sampled_from(WRONG) | KINDS[key].good().map(lambda given: given.text) | st.text(max_size=8))
        entries.append(Entry(section, name, text))
    return entries


@st.composite
def rendered(draw: DrawFn, entries: Sequence[Entry]) -> str:
    """The entries as YAML in one of many styles, sections in the order in which they come first."""
    out = [*draw(st.lists(st.sampled_from(["# x: y", "", "---", "%YAML 1.1\n---"]), max_size=1))]
    dots, indent = draw(st.integers(0, 9)) == 9, " " * draw(st.integers(1, 4))
    for section in dict.fromkeys(entry.section for entry in entries):
        lines = [f"{entry.name}: {entry.text}" for entry in entries if entry.section == section]
        comment = draw(st.sampled_from(["", "", "  # why not", "\n\n# more"]))
        if not section:
            out += [line + comment for line in lines]
        elif dots:  # the way that keys are named on the command line
            out += [f"{section}.{line}" for line in lines]
        elif draw(st.booleans()):
            out += [f"{section}:{comment}", *(f"{indent}{line}{comment}" for line in lines)]
        else:
            out.append(f"{section}: {{{', '.join(lines)}}}{comment}")
    end = draw(st.sampled_from(["\n", "\n", "\r\n", "\n\n"]))
    close = ["", end, f"{end}...{end}"] if entries else [""]  # PyYAML wants something before the dots
    return draw(st.sampled_from(["", "", "", "\ufeff"])) + end.join(out) + draw(st.sampled_from(close))


@st.composite
def junk(draw: DrawFn) -> bytes:
    """Bytes that hardly look like a run file."""
    brackets = st.lists(st.sampled_from(list("[]{}:,-?&*!|>'\"%@`#\n\t ~") + ["a", "data", "1"]), max_size=60).map("".join)
    deep = st.tuples(st.sampled_from(["[", "{a: ", "- ", "? ", "a:\n ", "&x [*x, "]), st.integers(1, 600)).map(lambda p: p[0] * p[1])
    words = st.text(max_size=60) | brackets | deep
    return draw(st.binary(max_size=60) | words.map(lambda text: text.encode("utf-8", "surrogatepass")))
