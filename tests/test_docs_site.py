"""The pages as a site: built without a warning, complete in both languages, and loading nothing from elsewhere."""

import json
import re
import subprocess
import sys

import pytest
from docs_pages import LANGUAGES, PAGES, ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs", reason="mkdocs-material needs Python 3.11")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def test_every_page_is_in_the_site_and_its_search(site):
    found = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))["docs"]
    texts = {entry["location"]: entry["text"] for entry in found}
    for language in LANGUAGES:
        for page in PAGES:
            name = f"{language}/{'index' if page == 'README.md' else page.removesuffix('.md')}.html"
            assert (site / name).exists() and name in texts
            assert "<!-- " not in texts[name]


def test_the_site_loads_nothing_from_elsewhere(site):
    pattern = r'<(?:script|img)[^>]*src="?([^\s">]+)|<link[^>]*rel="?stylesheet"?[^>]*href="?([^\s">]+)'
    for page in site.rglob("*/*.html"):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(pattern, text)
        assert loaded
        for pair in loaded:
            target = "".join(pair)
            assert not target.startswith(("http", "//")), f"{page.name}: {target}"
            assert (page.parent / target.split("?")[0]).resolve().exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("language", LANGUAGES)
def test_lists_tables_and_formulas_are_what_they_are_on_github(site, language):
    text = (site / language / "minimind_architecture.html").read_text(encoding="utf-8")
    assert text.count("arithmatex") > 150 and "$$" not in text
    body = re.sub(r"<pre.*?</pre>|<code.*?</code>", "", text, flags=re.S)
    assert not re.search(r"<p>[^<]*\n- ", body) and not re.search(r"<p>\|", body)
    assert 'id="rope-code"' in text and f'src="../pictures/{language}/rope.svg"' in text
