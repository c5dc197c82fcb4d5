"""A Griffe extension: our docstrings are plain text, so what Markdown would take for markup is
escaped, and an indented picture gets the empty line before it that makes it a code block."""

import re

import griffe

MARKUP = re.compile(r"(`[^`]*`)|([<>*_~^$\[\]|\\])")


def as_markdown(text: str) -> str:
    """Return a docstring as Markdown that shows it as it is written."""
    lines, before = [], ""
    for line in text.splitlines():
        if line.startswith("    "):
            if before.strip() and not before.startswith("    "):
                lines.append("")
            lines.append(line)
        else:
            if before.startswith("    ") and line.strip():
                lines.append("")
            lines.append(line)
        before = line
    blocks = re.split(r"((?:^    .*\n?)+)", "\n".join(lines), flags=re.MULTILINE)
    for i in range(0, len(blocks), 2):
        blocks[i] = MARKUP.sub(lambda m: m[1] or f"&#{ord(m[2])};", blocks[i])
    return "".join(blocks)


class PlainDocstrings(griffe.Extension):
    """Rewrites every docstring once it is read."""

    def on_object(self, *, obj: griffe.Object, **_) -> None:
        """Escape the docstring of a module, class, function or attribute."""
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)
