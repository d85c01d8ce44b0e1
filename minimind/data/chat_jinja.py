"""Jinja as transformers sets it up for chat templates, sandboxed, with `{% generation %}` blocks that can be found."""

import json
from datetime import datetime
from functools import cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

MARK = "_mark_answer"
"""Variable of a template: a function that marks the text of a `{% generation %}` block."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`: what the assistant wrote."""

    tags = {"generation"}  # noqa: RUF012 - as the base class has it

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.FilterBlock(
            body, jinja2.nodes.Filter(None, MARK, [jinja2.nodes.Name(MARK, "load")], [], None, None), lineno=line
        )


@cache
def chat_environment() -> jinja2.Environment:
    """Jinja as transformers sets it up for chat templates."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.filters[MARK] = lambda answer, mark: mark(answer)
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
