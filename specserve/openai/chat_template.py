"""Messages to one prompt: the tokenizer's own chat template, a given one, or a plain one.

Templates come with checkpoints, so they run in Jinja's sandbox.
"""

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from specserve.openai.errors import bad_request
from specserve.openai.schema import Message

# For a base model: a transcript that ends where the assistant speaks.
PLAIN = """\
{% for message in messages %}
{{ message.role }}: {{ message.content }}
{% endfor %}
assistant:"""

# What a template that somebody else wrote may raise.
_FAILURES = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
)


class ChatTemplate:
    """A compiled template with the special tokens it may name."""

    def __init__(self, source: str, special_tokens: dict[str, str] | None = None) -> None:
        """Compile.

        Raises:
            ValueError: if it is no Jinja template.
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals.update(raise_exception=_refuse, strftime_now=_now)
        self._special_tokens = special_tokens or {}
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"the chat template is not valid Jinja: {error}") from error

    def render(self, messages: Sequence[Message]) -> str:
        """Return the prompt that the assistant's answer continues.

        Raises:
            ApiError: if the template does not take these messages.
        """
        turns = [
            {"role": message.role, "content": message.text}
            | ({} if message.name is None else {"name": message.name})
            for message in messages
        ]
        try:
            return self._template.render(
                messages=turns, add_generation_prompt=True, tools=None, **self._special_tokens
            )
        except _FAILURES as error:
            raise bad_request(
                f"messages do not fit the model's chat template: {error}", "messages"
            ) from error


def load_chat_template(engine_dir: Path, override: str = "") -> ChatTemplate:
    """Find the template: `override`, else beside the tokenizer, else the plain one.

    Raises:
        ValueError: if it cannot be read.
    """
    path = engine_dir / "tokenizer_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        source = _read(override) if override else _find(engine_dir, config)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the chat template: {error}") from error
    return ChatTemplate(source or PLAIN, _special_tokens(config))


def _find(engine_dir: Path, config: dict[str, Any]) -> str | None:
    path = engine_dir / "chat_template.jinja"
    if path.is_file():
        return _read(path)
    found = config.get("chat_template")
    if isinstance(found, list):  # named ones; the others are for tools and retrieval
        found = next((one["template"] for one in found if one["name"] == "default"), None)
    return found


def _read(path: str | Path) -> str:
    return Path(path).read_text(encoding="utf-8")


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Return bos_token and the like, which are texts or objects around one."""
    tokens = {name: value for name, value in config.items() if name.endswith("_token")}
    texts = {
        name: value.get("content") if isinstance(value, dict) else value
        for name, value in tokens.items()
    }
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(value: Any, indent: int | None = None) -> str:
    # Jinja's own escapes HTML, which a prompt is not.
    return json.dumps(value, ensure_ascii=False, indent=indent)
