"""Run files: YAML in and out, and layers of settings merged into one checked :class:`RunConfig`.

Defaults < run file < flags. An error names where the value came from: file and line, or the flag.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from ddpmctl.config import RunConfig, Section, known_keys
from ddpmctl.errors import ConfigError
from ddpmctl.parsing import check_name, written
from ddpmctl.rows import nearest
from ddpmctl.rules import check_together

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

_LARGEST = 1 << 20
_TAG = "tag:yaml.org,2002:"
_NULL = _TAG + "null"
_NOT_YAML = (yaml.YAMLError, RecursionError, ValueError, OverflowError)
_NAMES = ("data.path", "train.init_from")
_VALUES = "a value is a word, a number or a flat list"
_ADVICE = "`ddpmctl inspect --defaults` prints every key with its meaning"


@dataclass(frozen=True)
class Layer:
    """One source of settings: dotted key -> value, and dotted key -> where that value was given."""

    values: dict[str, Any]
    origins: dict[str, str] = field(default_factory=dict)


def read_run_file(path: Path) -> Layer:
    """Read a YAML run file, remembering the line of each key.

    Raises :class:`ConfigError` naming file and line when it is missing, not YAML, or not sections of keys.
    """
    try:
        if path.stat().st_size > _LARGEST:
            raise ConfigError(f"{path}: too large for a run file", "give a YAML file of settings")
        root = yaml.compose(path.read_text("utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text in UTF-8"
        raise ConfigError(f"{path}: cannot be read: {reason}", "give a YAML run file, as in examples/") from error
    except _NOT_YAML as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = f"{place}: not YAML: {_reason(error)}"
        raise ConfigError(problem, "mind the indentation and `key: value`") from error
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for key, node, line in _flatten(path, root):
        place = f"{path}:{line}: {key}"
        if key in values:
            raise ConfigError(f"{place} is given twice", "keep one of the two lines")
        values[key], origins[key] = _plain(place, node, key), place
    return Layer(values, origins)


def _reason(error: Exception) -> str:
    """One line of a YAML error, whose own text spans several."""
    if isinstance(error, RecursionError):
        return "nested too deep"
    return getattr(error, "problem", None) or getattr(error, "reason", None) or str(error).partition("\n")[0]


def _flatten(path: Path, root: yaml.Node | None) -> Iterator[tuple[str, yaml.Node, int]]:
    """Yield (dotted key, value, line); sections nest one level."""
    if root is None or root.tag == _NULL:
        return
    for key, node, line in _pairs(path, root, "the run file"):
        if key not in _sections():
            if key not in known_keys():
                raise _unknown(f"{path}:{line}: {key}", key)
            yield key, node, line
        elif isinstance(node, yaml.MappingNode):
            for sub, leaf, at in _pairs(path, node, key):
                yield f"{key}.{sub}", leaf, at
        elif node.tag != _NULL:
            raise ConfigError(f"{path}:{line}: {key} is a section of keys", f"write {key}: {{key: value}}")


def _pairs(path: Path, node: yaml.Node, what: str) -> Iterator[tuple[str, yaml.Node, int]]:
    line = node.start_mark.line + 1
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{path}:{line}: {what} holds no keys", "write `key: value` lines, as in examples/")
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode) or not key.value.isprintable() or len(key.value) > 100:
            raise ConfigError(f"{path}:{key.start_mark.line + 1}: a key of {what} is not a word", _ADVICE)
        yield str(key.value), value, key.start_mark.line + 1


def _plain(place: str, node: yaml.Node, key: str) -> Any:
    """The value of a scalar or of a flat list; anything deeper is no setting of ours."""
    if isinstance(node, yaml.SequenceNode) and all(isinstance(n, yaml.ScalarNode) for n in node.value):
        return [_scalar(place, n) for n in node.value]
    if isinstance(node, yaml.ScalarNode) and key in _NAMES:
        return _name(place, node)
    if isinstance(node, yaml.ScalarNode):
        return _scalar(place, node)
    raise ConfigError(f"{place}: nested too deep", _VALUES)


def _name(place: str, node: yaml.ScalarNode) -> Any:
    """The name of a folder or file as it is written, for it may be 007 or on; checked at once, as it is soon looked for."""
    if node.tag.removeprefix(_TAG) not in ("str", "bool", "int", "float"):
        return _scalar(place, node)
    try:
        return check_name(node.value)
    except ValueError as error:
        raise ConfigError(f"{place}: {error}", "give the name of a folder or a .zip") from error


def _scalar(place: str, node: yaml.ScalarNode) -> Any:
    """None, a truth value, a number or a word; dates stay the words that they were written as."""
    kind = node.tag.removeprefix(_TAG)
    if kind in ("str", "timestamp", "value", "merge"):
        return node.value
    if kind not in ("null", "bool", "int", "float"):
        raise ConfigError(f"{place}: of no known kind {_cut(node.tag)}", _VALUES)
    loader = yaml.SafeLoader("")
    try:
        return loader.construct_object(node)
    except (yaml.YAMLError, ValueError, LookupError, OverflowError) as error:
        raise ConfigError(f"{place}: {_cut(repr(node.value))} cannot be read as {kind}", _ADVICE) from error
    finally:
        loader.dispose()


def flag_layer(flags: Mapping[str, Any], assignments: Sequence[str] = ()) -> Layer:
    """Settings from the command line: dotted key -> value (None: not given), and ``section.key=value`` words."""
    values = {key: value for key, value in flags.items() if value is not None}
    origins = {key: "--" + key.rpartition(".")[2].replace("_", "-") for key in values}
    for word in assignments:
        key, equals, text = word.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ConfigError(f"--set {word}: not of the form section.key=value", "write e.g. --set model.dropout=0")
        origins[key] = f"--set {key}"
        try:
            node = yaml.compose(text, Loader=yaml.SafeLoader)
        except _NOT_YAML as error:
            raise ConfigError(
                f"{origins[key]}: the value is not YAML: {_reason(error)}", "quote it, or write a plain word"
            ) from error
        values[key] = None if node is None else _plain(origins[key], node, key)
    return Layer(values, origins)


def resolve(*layers: Layer) -> RunConfig:
    """Merge layers, later ones first in rank, and validate.

    Raises :class:`ConfigError` for the first faulty key, naming its origin, its fault and how many more there are.
    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for layer in layers:
        values.update(layer.values)
        origins.update({key: layer.origins.get(key, key) for key in layer.values})
    nested: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known_keys():
            raise _unknown(origins[key], key)
        section, _, name = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[name] = value
    try:
        config = RunConfig.model_validate(nested)
    except ValidationError as error:
        raise _invalid(error, origins) from error
    check_together(config, origins)
    return config


def config_layer(settings: Mapping[str, Any], origin: str) -> Layer:
    """A layer out of a nested dict, such as the config that a checkpoint carries."""
    values: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            values.update({f"{key}.{sub}": leaf for sub, leaf in value.items()})
        else:
            values[key] = value
    return Layer(values, {key: f"{origin}: {key}" for key in values})


def keyword_layer(settings: Mapping[str, Any]) -> Layer:
    """A layer out of keyword arguments: ``lr=1e-4``, ``model={"base_channels": 32}``, or a dotted key; None: not given.

    Raises :class:`ConfigError` for a key that is not there.
    """
    values: dict[str, Any] = {}
    whole = {key.rpartition(".")[2]: key for key in known_keys()}
    for name, value in settings.items():
        if name in _sections():
            if not isinstance(value, Mapping):
                raise ConfigError(f"{name}: a section of keys, not {written(value)}", f"write {name}={{'key': value}}")
            values.update({f"{name}.{key}": leaf for key, leaf in value.items()})
        elif value is not None:
            values[whole.get(name, name)] = value
    values = {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}
    for key in values:
        if key not in known_keys():
            raise _unknown(key, key) if "." in key else ConfigError(f"{key}: no such key{nearest(key, whole)}", _ADVICE)
    return Layer(values)


def _unknown(place: str, key: str) -> ConfigError:
    known = known_keys()
    same_name = [k for k in known if k.rpartition(".")[2] == key.rpartition(".")[2]]
    hint = f"; did you mean '{same_name[0]}'?" if same_name else nearest(key, [*known, *_sections()])
    return ConfigError(f"{place}: no such key{hint}", _ADVICE)


def _invalid(error: ValidationError, origins: Mapping[str, str]) -> ConfigError:
    problems: dict[str, str] = {}
    for item in error.errors(include_url=False):
        loc = [str(part) for part in item["loc"]]
        key = ".".join(loc[:2]) if loc and loc[0] in _sections() else (loc[0] if loc else "")
        text = item["msg"].removeprefix("Value error, ")
        if item["type"] != "value_error":
            text = f"{_in_words(item)}, not {written(item['input'])}"
        problems.setdefault(key, f"{origins.get(key, key)}: {_cut(text)}")
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return ConfigError(next(iter(problems.values())) + more, _ADVICE)


_WORDS = {
    "greater_than_equal": "must be at least {ge:,}",
    "less_than_equal": "must be at most {le:,}",
    "greater_than": "must be more than {gt:,}",
    "less_than": "must be less than {lt:,}",
    "finite_number": "must be a finite number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be a word",
    "list_type": "must be a list: {example}",
    "too_short": "must be a list of {min_length} or more",
    "too_long": "must be a list of {max_length} or fewer",
    "literal_error": "must be {expected}",
}
"""Pydantic's kinds of error in plain words; others keep its own."""


def _in_words(item: ErrorDetails) -> str:
    """What a value must be: ``must be at least 1``."""
    words = _WORDS.get(item["type"])
    if words is None:
        return item["msg"][:1].lower() + item["msg"][1:]
    numbers = re.findall(r"\d{1,9}", written(item["input"])[:100])[:8]  # of `1,2` or `1 2`, which are meant as a list
    return words.format(**item.get("ctx", {}), example=f"[{', '.join(numbers or ['1', '2'])}]")


def _cut(text: str) -> str:
    """At most a line or two of ``text``: its start and its end."""
    return text if len(text) <= 300 else f"{text[:150]} ... {text[-140:]}"


def _sections() -> dict[str, type[Section]]:
    return {
        n: f.annotation
        for n, f in RunConfig.model_fields.items()
        if isinstance(f.annotation, type) and issubclass(f.annotation, Section)
    }


def to_yaml(config: RunConfig, *, comments: bool = False) -> str:
    """The whole configuration as a run file; with ``comments`` each key carries its meaning."""
    lines = []
    for name, field_info in RunConfig.model_fields.items():
        value = getattr(config, name)
        if not isinstance(value, Section):
            lines.append(_entry("", name, value, field_info.description if comments else None))
            continue
        lines.append(f"{name}:" + (f"  # {field_info.description}" if comments else ""))
        plain = value.model_dump(mode="python")
        for sub, info in type(value).model_fields.items():
            lines.append(_entry("  ", sub, plain[sub], info.description if comments else None))
    return "\n".join(lines) + "\n"


def _entry(indent: str, key: str, value: Any, comment: str | None) -> str:
    # Dumped in a list, a value of any kind stays on one line.
    plain = yaml.safe_dump([value], default_flow_style=True, width=float("inf"), allow_unicode=True).strip()
    text = f"{indent}{key}: {plain[1:-1]}"
    return f"{text:<34}  # {comment}" if comment else text
