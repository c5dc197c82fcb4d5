"""MkDocs hooks: the site from what the repository holds, without a copy of anything in docs/.

README, results, data card, exercises and notebooks become pages; a page per room of the package
shows its docstrings; every flag stands in a table. Links between files become links between pages,
and a link to any other file leads to a copy of it. Formulas become MathML, which browsers draw
themselves. Called by mkdocs (mkdocs.yml); needs no module of the package but its settings.
"""

import dataclasses
import html
import json
import posixpath
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File

from gemma_cot.config import PRESETS, TrainConfig

ROOT = Path(__file__).parents[2]
PAGES = {  # page of the site -> file of the repository
    "readme.md": "README.md",
    "exercises.md": "exercises/README.md",
    "data.md": "data/README.md",
    "results.md": "benchmarks/RESULTS.md",
    "grpo_from_scratch.md": "examples/grpo_from_scratch.ipynb",
    "kaggle_v5e8.md": "examples/kaggle_v5e8.ipynb",
}
# The package in reading order: page, title, modules. tests/test_docs.py: none is left out.
API = (
    ("settings", "Settings and axes", "hosts axes hf_config config settings"),
    ("data", "Tokens and rows", "tokenizer data"),
    ("model", "The model", "model.params model.load model.layers model.gemma model.logprob "
     "model.cache model.sample"),
    ("kernels", "Kernels", "model.kernels.reference model.kernels.gradients model.kernels.layout "
     "model.kernels.tiles model.kernels.logprob model.kernels.prefill model.kernels.decode"),
    ("lora", "LoRA", "lora.lora lora.peft"),
    ("optim", "Optimiser and SFT", "optim sft"),
    ("grpo", "GRPO", "grpo.answer grpo.reward grpo.loss grpo.rollout grpo.step grpo.reserve"),
    ("guard", "Rewards kept honest", "guard.user guard.corpus guard.lint guard.canaries "
     "guard.jail guard.sandbox guard.symbolic"),
    ("train", "The run", "rewards checkpoint resume session run turn train finished"),
    ("evaluation", "Evaluation", "stats scores results evaluation policy evaluate"),
    ("seeing", "What is logged", "metrics alarms progress curves environment profiling traces "
     "replay"),
    ("report", "The report", "report.gather report.diagnosis report.panels report.microscope "
     "report.sections report.page report.__main__"),
    ("commands", "Small commands", "cli generate export doctor"),
    ("prepare", "Datasets", "prepare.convert prepare.spool prepare.filters prepare.rates "
     "prepare.card prepare.pipeline prepare.__main__"),
    ("distill", "A teacher", "distill.settings distill.template distill.answer distill.journal "
     "distill.teacher distill.collect distill.pipeline distill.command distill.__main__"),
    ("serve", "The server", "serve.request serve.engine serve.app serve.__main__"),
    ("plan", "The planner", "plan.chips plan.programs plan.accounts plan.cost plan.clock plan.fit "
     "plan.__main__"),
    ("testing", "Benches", "testing.outcome testing.kernels testing.losses"),
    ("tasks", "The embedded problems", "tasks.arithmetic tasks.families tasks.dataset "
     "tasks.pretrain"),
)  # fmt: skip
LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)\s]*)?\))")
MATH = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_config(config):
    """Put the reference at the end of the navigation."""
    pages = [{title: f"api/{page}.md"} for page, title, _ in API]
    config.nav.append({"Reference": [{"Every flag": "flags.md"}, *pages]})
    return config


def on_files(files, config):
    """Add the pages that are not in docs/."""
    texts = {page: read_page(ROOT / source) for page, source in PAGES.items()}
    texts["flags.md"] = flags_page()
    for page, title, modules in API:
        blocks = [f"::: gemma_cot.{module}\n" for module in modules.split()]
        texts[f"api/{page}.md"] = "\n".join([f"# {title}\n", *blocks])
    for page, text in texts.items():
        files.append(File.generated(config, page, content=text))
    return files


def read_page(source: Path) -> str:
    """Return the Markdown of a document or a notebook."""
    text = source.read_text(encoding="utf-8")
    return notebook_page(json.loads(text)) if source.suffix == ".ipynb" else text


def notebook_page(notebook: dict) -> str:
    """Return a notebook as Markdown: its text, its code, what the code gave."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            rich = data.get("image/svg+xml") or data.get("text/html")
            plain = output.get("text") or data.get("text/plain", "")
            if rich:
                parts.append(f'<div class="output">{"".join(rich)}</div>')
            else:
                parts.append(f"```{{ .text .output }}\n{''.join(plain).rstrip()}\n```")
    return "\n\n".join(parts)


def flags_page() -> str:
    """Return the table of every flag of train, from the settings and the presets."""
    lines = ["# Every flag of `gemma_cot.train`", "", "Each is a field of `TrainConfig`, its text "
             "the field's own; an empty cell of a preset leaves the default.", "",
             "| flag | default | " + " | ".join(PRESETS) + " | meaning |",
             "|---" * (3 + len(PRESETS)) + "|"]  # fmt: skip
    for item in dataclasses.fields(TrainConfig):
        presets = [f"`{p[item.name]}`" if item.name in p else "" for p in PRESETS.values()]
        default = f"`{item.default}`" if item.default not in ("", ()) else ""
        meaning = html.escape(item.metadata["help"].replace("|", "\\|"))
        cells = [f"`--{item.name}`", default, *presets, meaning]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def on_page_markdown(markdown, page, config, files):
    """Turn links between files of the repository into links of the site, outside of code."""
    source = PAGES.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    parts = re.split(r"(^```.*?^```)", markdown, flags=re.DOTALL | re.MULTILINE)
    for i in range(0, len(parts), 2):
        parts[i] = LINK.sub(lambda match: link(match, page.file, source, config, files), parts[i])
    return "".join(parts)


def link(match, page: File, source: str, config, files) -> str:
    """Return a Markdown link as it must be on `page`, whose file in the repository is `source`."""
    opening, target, rest = match.groups()
    if "://" in target or target.startswith("mailto:"):
        return match[0]
    place = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    if (ROOT / place).is_dir():
        place = f"{place}/README.md"
    uri = place.removeprefix("docs/")
    module = place.removeprefix("gemma_cot/").removesuffix(".py").replace("/", ".")
    pages = {origin: uri for uri, origin in PAGES.items()}
    modules = {name: f"api/{page}.md" for page, _, names in API for name in names.split()}
    if place in pages:
        uri = pages[place]
    elif place.startswith("gemma_cot/") and module in modules:
        uri, rest = modules[module], f"#gemma_cot.{module})"
    elif not place.startswith("docs/") and (ROOT / place).is_file():
        uri = f"repository/{place}"
        if uri not in files.src_uris:
            content = (ROOT / place).read_bytes()
            files.append(File.generated(config, uri, content=content))
    return opening + posixpath.relpath(uri, posixpath.dirname(page.src_uri) or ".") + rest


def on_page_content(content, page, config, files):
    """Draw the formulas: LaTeX to MathML."""

    def drawn(match):
        display = "block" if match[1] == "div" else "inline"
        drawing = convert(html.unescape(match[2]).strip(), display=display)
        return f'<div class="formula">{drawing}</div>' if display == "block" else drawing

    return MATH.sub(drawn, content)
