"""Settings that stand in one place: a field of a dataclass is its option, help, default and bounds too.

``num_layers: int | None = option(None, "Draft layers. Default: 5.", bound=count(1, 512))`` is a field that
:func:`check` checks, that :func:`takes` gives to a command as ``--num-layers``, and that :func:`build` fills.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass
from typing import Annotated, Any, Literal, TypeVar, get_origin, get_type_hints

from vllm_dflash.bounds import Bound, check_bounds, check_choice, option_of

T = TypeVar("T")


@dataclass(frozen=True)
class _Option:
    help: str | None
    flags: tuple[str, ...]
    panel: str | None
    bound: Bound | None
    choices: tuple[str, ...]
    parse: Callable[[str, Any], Any] | None
    given_as: Any


def option(
    default: Any = MISSING,
    help: str | None = None,
    *flags: str,
    panel: str | None = None,
    bound: Bound | None = None,
    choices: tuple[str, ...] = (),
    parse: Callable[[str, Any], Any] | None = None,
    given_as: Any = str,
) -> Any:
    """A field of a dataclass of settings.

    Args:
        help: what ``--help`` says; None for a field that no command takes as it is.
        flags: its names there; by default ``--`` and the field's.
        panel: heading in ``--help``.
        bound, choices: what the value may be.
        parse: makes the value of the option's longest flag and what was given.
        given_as: type of what is given to ``parse``.
    """
    about = _Option(help, flags, panel, bound, choices, parse, given_as)
    return dataclasses.field(default=default, metadata={"option": about})


def _options(cls: Any) -> Iterator[tuple[dataclasses.Field[Any], _Option, str]]:
    """Fields made by :func:`option`, and what errors call them."""
    for field in dataclasses.fields(cls):
        about = field.metadata.get("option")
        if about is not None:
            flag = max(about.flags, key=len, default=option_of(field.name))
            yield field, about, flag if about.flags or about.help else field.name


def check(settings: Any) -> None:
    """Checks the choices, then the bounds of a settings object; None is a number not given.

    Raises:
        ValueError: names the option, the value, and what it may be.
    """
    bounds, names = {}, {}
    for field, about, name in _options(settings):
        if about.choices:
            check_choice(field.name, getattr(settings, field.name), about.choices)
        if about.bound is not None:
            bounds[field.name], names[field.name] = about.bound, name
    check_bounds(settings, bounds, names)


def takes(*sources: Any) -> Callable[[T], T]:
    """Gives a Typer command the options of dataclasses in place of its ``**options``.

    Args:
        sources: dataclasses, or tuples of one and the names of those of its fields to take.
    """

    def decorate(command: Any) -> Any:
        own = inspect.signature(command, eval_str=True)
        given = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
        parameters = [p for p in given if p.default is p.empty]
        for source in sources:
            cls, *names = source if isinstance(source, tuple) else (source,)
            hints = get_type_hints(cls)
            known = {f.name: (f, about) for f, about, _ in _options(cls) if about.help}
            parameters += [_parameter(*known[n], hints[n]) for n in names or known]
        last = [p for p in given if p.default is not p.empty]
        parameters += [p.replace(kind=p.KEYWORD_ONLY) for p in last]
        command.__signature__ = own.replace(parameters=parameters)
        return command

    return decorate


def _parameter(field: dataclasses.Field[Any], about: _Option, hint: Any) -> inspect.Parameter:
    import typer

    default, flags = field.default, about.flags
    if about.parse is not None:
        hint = about.given_as if default is not None else about.given_as | None
        default = ",".join(map(str, default)) if isinstance(default, tuple) else default
    elif get_origin(hint) is Literal:
        hint = str  # which `check` looks at, for one wording of all errors
    elif hint is bool and not flags:
        flags = (option_of(field.name),)  # without --no-...
    made = typer.Option(*flags, help=about.help, rich_help_panel=about.panel)
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if default is MISSING else default,
        annotation=Annotated[hint, made],
    )


def parsed(cls: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """Values of the fields that a command took from a dataclass.

    Raises:
        ValueError: text that cannot be read, with its option.
    """
    values = {}
    for field, about, name in _options(cls):
        if field.name in options:
            value = options[field.name]
            unread = about.parse is None or value is None
            values[field.name] = value if unread else about.parse(name, value)  # type: ignore[misc]
    return values


def build(cls: type[T], options: Mapping[str, Any], **more: Any) -> T:
    """The dataclass of what a command was given, and of what only the command knows."""
    return cls(**parsed(cls, options) | more)
