"""YAML and JSON text that people wrote, read so that nothing is lost silently: configs, search spaces, `--set`.

Refused are repeated keys, which every YAML and JSON library settles in favour of the last one, tags, and text whose
aliases stand for more than any config has. Plain scalars are those of YAML 1.2: `no` and `2024-01-01` are text, and
1e-5 is a number.
"""

import contextlib
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

import yaml
from yaml.reader import Reader

# Far above any real config, and little enough that a file from a stranger cannot fill the memory: with aliases, a few
# lines can stand for billions of values.
_MAX_CHARACTERS = 1 << 22
_FOLDED = re.compile("[\x85\u2028\u2029]")  # line ends in YAML, and letters of a text in JSON
_TAG = "tag:yaml.org,2002:"
# (pattern, possible first characters) of each type; "" stands for an empty value.
_SCALARS: dict[str, tuple[str, Iterable[str]]] = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "null": (r"~|null|Null|NULL|", ("~", "n", "N", "")),
    "int": (r"[-+]?(0|[1-9][0-9]*)|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    "merge": (r"<<", "<"),
}
_KNOWN_TAGS = {_TAG + name for name in (*_SCALARS, "str", "seq", "map")}


class Unreadable(Exception):
    """Text that cannot be read; the message says why, without the name of the file."""


class _Loader(yaml.SafeLoader):
    pass


_Loader.yaml_implicit_resolvers = {}  # without those of YAML 1.1
for _name, (_pattern, _first) in _SCALARS.items():
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(f"(?:{_pattern})$"), list(_first))


def parse_yaml(text: str) -> tuple[Any, bool]:
    """The value of YAML or JSON text, and whether a comment follows it. Raises Unreadable."""
    with contextlib.suppress(ValueError, RecursionError):
        return _json_mapping(text), False
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, bool(text.strip())
        # On the nodes: the constructed mapping has already lost its repeated keys.
        _Check().size_of(node, "")
        return loader.construct_document(node), bool(text[node.end_mark.index :].strip())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise Unreadable(f"not YAML{place}: {problem}") from None
    except RecursionError:
        raise Unreadable("nested too deeply, expected groups of keys a few levels deep") from None
    except ValueError as error:  # such as a number of more digits than Python reads
        raise Unreadable(f"not YAML: {error}") from None


def _json_mapping(text: str) -> dict[str, Any]:
    """The value of JSON text that is a mapping, as YAML has it. Raises ValueError for any other text, sound or not.

    Every finished trial and artifact has its config as JSON, which Python's own reader takes a hundredth of the time
    for. What it would read otherwise than YAML, or should be refused in a line, is left to YAML.
    """
    if not text.startswith("{") or len(text) > _MAX_CHARACTERS:
        raise ValueError
    if Reader.NON_PRINTABLE.search(text) or _FOLDED.search(text):
        raise ValueError
    found: dict[str, Any] = json.loads(text, object_pairs_hook=_once_each, parse_constant=_refuse)
    return found


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    # A key that is repeated, also as `a.b` beside a `b` under `a`.
    names = list(_dotted_names(found, "")) if any("." in key for key in found) else found
    if len(found) < len(pairs) or len(set(names)) < len(names):
        raise ValueError
    return found


def _dotted_names(mapping: dict[str, Any], path: str) -> Iterator[str]:
    for key, value in mapping.items():
        yield path + key
        if isinstance(value, dict):
            yield from _dotted_names(value, f"{path}{key}.")


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)  # NaN or Infinity, which is text in YAML


class _Check:
    """One pass over the nodes of a document, each once, however many aliases name it."""

    def __init__(self) -> None:
        self._sizes: dict[int, int] = {}
        self._open: set[int] = set()

    def size_of(self, node: yaml.Node, path: str) -> int:
        """The characters of a node with its aliases written out; `path` is its dotted key. Raises Unreadable."""
        place = f"line {node.start_mark.line + 1}"
        if id(node) in self._open:
            raise Unreadable(f"{path} in {place} contains itself by an alias")
        # Each node is measured once: aliases in aliases would otherwise take as long as the text they stand for.
        if id(node) in self._sizes:
            return self._sizes[id(node)]
        if node.tag not in _KNOWN_TAGS:
            raise Unreadable(f"the tag {node.tag} in {place} is not supported, expected a plain value")
        self._open.add(id(node))
        if isinstance(node, yaml.ScalarNode):
            size = 1 + len(node.value)
        elif isinstance(node, yaml.SequenceNode):
            size = 1 + sum(self.size_of(item, path) for item in node.value)
        else:
            size = 1 + sum(
                self.size_of(key, path) + self.size_of(value, _joined(path, key)) for key, value in node.value
            )
        if size > _MAX_CHARACTERS:
            raise Unreadable(f"more than {_MAX_CHARACTERS:,} characters with all aliases written out")
        if isinstance(node, yaml.MappingNode):
            _refuse_repeated(node, path)
        self._open.remove(id(node))
        self._sizes[id(node)] = size
        return size


def _refuse_repeated(mapping: yaml.MappingNode, path: str) -> None:
    # Keys inside groups count where dotted keys stand beside the groups: a search space takes `a.b` and `b` under `a`.
    has_dots = any("." in str(key.value) for key, _ in mapping.value)
    first: dict[str, yaml.Node] = {}
    for name, key in _names(mapping, path, into_groups=has_dots):
        other = first.setdefault(name, key)
        if other is not key:
            one, two = sorted(node.start_mark.line + 1 for node in (key, other))
            place = f"line {one}" if one == two else f"line {one} and in line {two}"
            raise Unreadable(f"the key {name} is there twice, in {place}; keep one of them")


def _names(mapping: yaml.MappingNode, path: str, *, into_groups: bool) -> Iterator[tuple[str, yaml.Node]]:
    """(dotted name, node) of the keys of a mapping, and of the groups in it."""
    for key, value in mapping.value:
        name = _joined(path, key)
        yield name, key
        if into_groups and isinstance(value, yaml.MappingNode):
            yield from _names(value, name, into_groups=True)


def _joined(path: str, key: yaml.Node) -> str:
    return f"{path}.{key.value}" if path else str(key.value)
