"""The pages of docs/: what they compute is computed again, and their links lead somewhere."""

import doctest
import re
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "exercises/README.md"]


@pytest.mark.parametrize("name", ["grpo_by_hand.md", "from_a_line_to_a_gradient.md"])
def test_a_page_prints_what_it_says(name):
    text = (ROOT / "docs" / name).read_text()
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        tests = doctest.DocTestParser().get_doctest(text, {}, name, name, 0)
        runner = doctest.DocTestRunner(verbose=False)
        said = []
        runner.run(tests, out=said.append)
    assert runner.tries > 10 and runner.failures == 0, "".join(said)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = page.read_text()
    places = re.findall(r"\]\(([^)#\s]+)(#[^)]*)?\)", text)
    for place, _ in places:
        if not place.startswith(("http://", "https://")):
            assert (page.parent / place).exists(), f"{page.name}: {place}"
