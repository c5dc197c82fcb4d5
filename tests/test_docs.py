"""The pages of docs/: what they compute is computed again, and their links lead somewhere."""

import ast
import doctest
import re
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / folder / "README.md" for folder in ("exercises", "data")),
    ROOT / "benchmarks/RESULTS.md",
]
WITH_CODE = [page.name for page in PAGES[1:] if page.parent.name == "docs"
             and ">>> " in page.read_text()]  # fmt: skip


def test_every_module_has_its_page_in_the_reference():
    tree = ast.parse((ROOT / "docs/theme/hooks.py").read_text())
    (pages,) = [ast.literal_eval(node.value) for node in tree.body
                if isinstance(node, ast.Assign) and node.targets[0].id == "API"]  # fmt: skip
    shown = [module for _, _, modules in pages for module in modules.split()]
    package = ROOT / "gemma_cot"
    there = [".".join(path.relative_to(package).with_suffix("").parts)
             for path in package.rglob("*.py") if path.name != "__init__.py"]  # fmt: skip
    assert sorted(shown) == sorted(there)


@pytest.mark.parametrize("name", WITH_CODE)
def test_a_page_prints_what_it_says(name):
    text = (ROOT / "docs" / name).read_text()
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        tests = doctest.DocTestParser().get_doctest(text, {}, name, name, 0)
        runner = doctest.DocTestRunner(verbose=False)
        said = []
        runner.run(tests, out=said.append)
    assert runner.tries > 5 and runner.failures == 0, "".join(said)


def without_code(page: Path) -> str:
    """Return a page's text without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings: lower case, hyphens for spaces, no punctuation."""
    headings = re.findall(r"^#+ (.+)$", without_code(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for place, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", without_code(page)):
        if place.startswith(("http://", "https://")):
            continue
        target = page.parent / place if place else page
        assert target.exists(), f"{page.name}: {place}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {place}#{anchor}"


def test_the_readme_prints_the_glossary_of_metrics():
    from gemma_cot.metrics import METRICS

    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    shown = {name: text for name, text in rows if name in METRICS}
    assert shown == METRICS
