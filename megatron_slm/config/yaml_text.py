"""Reads YAML from untrusted sources: plain values only, each key once, and a bounded number of
values.

PyYAML's safe loader makes no objects of foreign classes. But it silently takes the last of two
equal keys, and expands a few hundred bytes of aliases into gigabytes. Its other failures (dates
that do not exist, numbers of thousands of digits, brackets nested by the thousand) come as errors
of Python's own; here they are all YAMLErrors.
"""

from typing import Any

import yaml

VALUES_AT_MOST = 100_000
_MERGE_TAG = "tag:yaml.org,2002:merge"


class RefusedYaml(yaml.YAMLError):
    """Readable YAML that no settings are taken from."""


def read_yaml(text: str) -> Any:
    """The values in a YAML document.

    YAMLError with the reason, and the line where it is known.
    """
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _ValueCounter().count(node, "")
        return loader.construct_document(node)
    except RecursionError:
        raise RefusedYaml("it is nested too deeply") from None
    except (ValueError, OverflowError) as error:  # 2024-02-30, say
        raise RefusedYaml(str(error)) from None
    finally:
        loader.dispose()


class _ValueCounter:
    """Counts the values that a node stands for once its aliases are expanded.

    RefusedYaml when there are too many, when a key comes twice, or when a value contains itself.
    """

    def __init__(self) -> None:
        # By identity: an alias is the very node that it repeats.
        self._counts: dict[int, int] = {}
        self._begun: set[int] = set()

    def count(self, node: yaml.Node, where: str) -> int:
        if id(node) in self._counts:
            return self._counts[id(node)]
        if id(node) in self._begun:
            raise RefusedYaml(f"line {_line(node)}: {where or 'the document'} contains itself")
        self._begun.add(id(node))
        count = 1
        if isinstance(node, yaml.SequenceNode):
            for position, item in enumerate(node.value):
                count += self.count(item, f"{where}[{position}]")
        elif isinstance(node, yaml.MappingNode):
            _refuse_repeated_keys(node, where)
            for key, value in node.value:
                inside = f"{where}.{key.value}" if where else str(key.value)
                count += self.count(key, inside) + self.count(value, inside)
        if count > VALUES_AT_MOST:
            raise RefusedYaml(
                f"line {_line(node)}: {where or 'the document'} stands for more than "
                f"{VALUES_AT_MOST:,} values, most of them repeated by aliases (*name); write out "
                "what is meant"
            )
        self._counts[id(node)] = count
        return count


def _refuse_repeated_keys(node: yaml.MappingNode, where: str) -> None:
    seen: dict[tuple[str, str], yaml.Node] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE_TAG:
            continue
        first = seen.setdefault((key.tag, key.value), key)
        if first is not key:
            name = f"{where}.{key.value}" if where else key.value
            raise RefusedYaml(
                f"{name} is given twice, on lines {_line(first)} and {_line(key)}; keep the one "
                "that is meant"
            )


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1
