"""Checks a file of settings before values are made of it: what it holds, what it may ask for."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from trm_fast._json import check_depth
from trm_fast.cli import suggest
from trm_fast.cli._settings_numbers import check_number, is_numeric

# Flags that decide what happens to a run; a file that somebody else may have written does not.
FLAGS = ("overwrite", "resume", "dry_run", "dry-run", "config", "set")
# The parser of YAML takes 150 bytes of memory for each; all settings of a recipe need a thousand.
MAX_CHARACTERS = 1 << 16
_ALSO = ("preset",)  # what a file may hold beside settings


def check_file(text: str, subject: str, settings: Mapping[str, Any]) -> None:
    """Checks that YAML or JSON has settings only, each once, sections that hold some, and decimal
    numbers.

    Args:
        text: contents of the file.
        subject: begins the messages, as "train sudoku: my.yaml:".
        settings: the types of all settings by their dotted names.

    Raises:
        ValueError: it does not, is no YAML, is nested too deeply, or has aliases, which nest
            without brackets.
    """
    import yaml

    check_yaml(text, subject)
    with _one_line(subject):
        root = yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    # What is no mapping at all is refused by the parser of values.
    if isinstance(root, yaml.MappingNode):
        _check_section(root, "", subject, settings, set())


def check_yaml(text: str, subject: str) -> None:
    """Counts the nesting of YAML by its events, before values are made of it: that takes recursion.

    Raises:
        ValueError: it is longer than ``MAX_CHARACTERS``, no YAML of one document, nested too
            deeply, or has aliases, which nest without brackets, or tags, by which a text becomes
            something else.
    """
    import yaml

    if len(text) > MAX_CHARACTERS:
        raise ValueError(
            f"{subject} must have at most {MAX_CHARACTERS} characters; got {len(text)}"
        )
    depth = documents = 0
    with _one_line(subject):
        for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            tag = getattr(event, "tag", None)
            if tag is not None:
                raise ValueError(f"{subject} must have no tags; got {tag}")
            if isinstance(event, yaml.AliasEvent):
                raise ValueError(f"{subject} must have no aliases; got *{event.anchor}")
            documents += isinstance(event, yaml.DocumentStartEvent)
            if documents > 1:
                line = event.start_mark.line + 1
                raise ValueError(
                    f"{subject} must be YAML of one document; got another in line {line}"
                )
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            check_depth(depth, subject)


@contextmanager
def _one_line(subject: str) -> Iterator[None]:
    """Says in one line what is no YAML."""
    import yaml

    try:
        yield
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        # What is composed wrongly is told by the context, as an anchor that is there twice.
        composed = isinstance(error, yaml.composer.ComposerError) and error.context
        problem = f"{error.context}, {error.problem}" if composed else error.problem
        reason = f"an error in line {line}: {problem}"
        raise ValueError(f"{subject} must be YAML; got {reason}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{subject} must be YAML; got {' '.join(str(error).split())}") from None


def _check_section(
    section: Any, prefix: str, subject: str, settings: Mapping[str, Any], seen: set[str]
) -> None:
    for key, value in section.value:
        line = key.start_mark.line + 1
        if not isinstance(key.value, str):
            raise ValueError(f"{subject} names must be words; got something else in line {line}")
        name = prefix + key.value
        if name in FLAGS:
            flag = name.replace("_", "-")
            raise ValueError(
                f"{subject} must hold settings only; got {name!r} in line {line}, which is asked "
                f"for on the command line, as --{flag}"
            )
        if name in seen:
            raise ValueError(f"{subject} must have each setting once; got {name!r} in line {line}")
        inner = any(known.startswith(f"{name}.") for known in settings)
        if name not in settings and name not in _ALSO and not inner:
            sections = {known.rpartition(".")[0] for known in settings} - {""}
            near = suggest(name, [*sorted(sections), *settings])
            raise ValueError(f"{subject} unknown setting {name!r}{near}")
        if inner:
            _check_is_section(value, name, subject)
            _check_section(value, f"{name}.", subject, settings, seen)
        elif is_numeric(settings.get(name)):
            _check_numbers(value, f"{subject} {name}")
        seen.add(name)


def _check_numbers(node: Any, subject: str) -> None:
    if isinstance(node.value, str):
        check_number(node.value, bool(node.style), subject)
        return
    for item in node.value if isinstance(node.value, list) else ():
        if not isinstance(item, tuple):  # of a mapping, which the parser of values refuses
            _check_numbers(item, subject)


def _check_is_section(value: Any, name: str, subject: str) -> None:
    if isinstance(value.value, list) and value.value and isinstance(value.value[0], tuple):
        return
    found = "nothing" if value.value in ("", [], "null", "~") else "something else"
    if isinstance(value.value, str) and found != "nothing":
        found = repr(value.value)
    line = value.start_mark.line + 1
    raise ValueError(
        f"{subject} {name} must hold settings, as '{name}: {{...}}'; got {found} in line {line}"
    )
