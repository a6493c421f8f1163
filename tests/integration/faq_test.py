"""docs/faq.md: every message in its headings is one of the code's."""

import ast
import re

import pytest
from pages import ROOT

ANYTHING = "…"
MESSAGES = re.findall(r"^### `(.+)`$", (ROOT / "docs" / "faq.md").read_text(), re.MULTILINE)


def strings(tree):
    """The strings of a module, f-strings with `ANYTHING` for what they format."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(
                part.value if isinstance(part, ast.Constant) else ANYTHING for part in node.values
            )


@pytest.fixture(scope="module")
def texts():
    files = [*(ROOT / "cbp_jax").rglob("*.py"), *(ROOT / "experiments" / "common").rglob("*.py")]
    return [text for file in files for text in strings(ast.parse(file.read_text()))]


def occurs(message, texts):
    """Whether a line of a string has the message, whatever stands for `ANYTHING`."""
    pattern = re.compile(".*".join(map(re.escape, message.split(ANYTHING))))
    return any(pattern.search(text) for text in texts)


@pytest.mark.parametrize("message", MESSAGES)
def test_messages_are_those_of_the_code(message, texts):
    assert len(message.replace(ANYTHING, "").split()) >= 3
    assert occurs(message, texts)


def test_another_message_is_not_found(texts):
    assert len(MESSAGES) > 20
    assert not occurs("the link needs the weights", texts)
    assert not occurs("the run in this folder has another config", texts)
