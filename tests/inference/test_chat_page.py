"""The chat page in a browser: a conversation, Markdown and formulas, and nothing of what a model says is run."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from repository import ROOT

pytest.importorskip("minimind.inference.http_api")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

SERVER_OF_THE_PAGE = """
import asyncio
import contextlib
from pathlib import Path
from minimind import serve
from minimind.inference import http_api

http_api.PAGE = Path(__file__).with_name("page")
build_app = http_api.build_app

def build_with_wait(*args, **options):
    app, done = build_app(*args, **options), asyncio.Event()
    async def say_done():
        done.set()
    async def wait():
        await done.wait()
    app.get("/done")(say_done)
    app.get("/wait")(wait)
    app.router.routes[:0] = [app.router.routes.pop() for _ in range(2)]
    return app

serve.build_app = build_with_wait
serve.main()
"""

MARKDOWN = """
# 标题 title
**bold**, `code`, $e^{i\\pi}$, 5$ and 10$, \\(x_1\\)

$$\\frac{1}{2}$$

```python title="<script>run()</script>"
if a < b: print("<b>")
```

| a | b |
|---|---|
| 1 | $x^2$ |
"""
HOSTILE = """
<img src=x onerror="run()"> <script>run()</script> <svg onload=run()> <a href="javascript:run()">x</a>
[a](javascript:run() "<img src=x onerror=run()>") [b](https://example.org "\\" onmouseover=run() \\"")
![c](x "<script>")
`<script>run()</script>` $<img src=x onerror=run()>$ $\\href{javascript:run()}{y}$ <style>body{display:none}</style>
```<img src=x onerror=run()>
<iframe src=javascript:run()></iframe>
```
"""


class Page(HTMLParser):
    """What a page has: (tag, attributes) of its elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs) -> None:
        self.elements.append((tag, dict(attrs)))

    def count(self, **wanted: str) -> int:
        """Elements with this tag, or with this class among theirs."""
        tag, name = wanted.get("tag"), wanted.get("name")
        return sum(
            (tag is None or tag == found) and (name is None or name in (attributes.get("class") or "").split())
            for found, attributes in self.elements
        )


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium in PATH (Debian: apt-get install chromium)")
def test_the_page_holds_a_conversation_in_a_browser(exported, expected_answer, tmp_path):
    """The page and lines that show and ask; an image keeps it loading until the answer is there."""
    shutil.copytree(ROOT / "minimind/inference/chat_page", tmp_path / "page")
    calls = [{"function": {"name": HOSTILE, "arguments": text}} for text in ('{"x": "<b>"}', "<script>run()</script>")]
    answers = [{"content": MARKDOWN}, {"content": HOSTILE}, {"reasoning": "so *it* is\n" + HOSTILE, "calls": calls}]
    shown = "".join(f"update(addTurn('assistant'), {json.dumps(answer)}, true);\n" for answer in answers)
    asked = 'at("temperature").value = "0"; at("limit").value = "12"; ask("<b>fox</b>").then(() => {'
    asked += "document.body.dataset.said = messages.at(-1).content;"
    asked += 'messages.at(-1).tool_calls = ["add", "<sub>"].map(name => ({id: name, function: {name}}));'
    asked += 'ask("<b>1</b>"); document.body.dataset.results = JSON.stringify(results); fetch("done"); });'
    hacked = 'function run() { document.title = "hacked"; }\n'
    with open(tmp_path / "page/chat.js", "a", encoding="utf-8") as script:
        script.write(hacked + shown + asked)
    index = (tmp_path / "page/index.html").read_text(encoding="utf-8")
    (tmp_path / "page/index.html").write_text(index.replace("</body>", "<img src=wait></body>"), encoding="utf-8")
    (tmp_path / "server.py").write_text(SERVER_OF_THE_PAGE, encoding="utf-8")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import server"
    command = [sys.executable, "-c", code, "--checkpoint", str(exported), "--port", "0", "--name", "<img src=x>"]
    process = subprocess.Popen([*command, "--device", "cpu"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        url = re.search(r"http://\S+:\d+/", process.stdout.readline())[0]
        browser = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
        done = subprocess.run([*browser, "--dump-dom", url], capture_output=True, text=True, timeout=120)
    finally:
        process.terminate()
        process.wait(20)
    turns = re.findall(r'<div class="turn (\w+)">(.*?)(?=<div class="turn|</main>)', done.stdout, re.S)
    roles = ["assistant", "assistant", "assistant", "user", "assistant", "tool"]
    assert [role for role, _ in turns] == roles, done.stdout + done.stderr
    markdown, hostile, thought, question, answer, result = (text for _, text in turns)
    page = Page(markdown)
    tags = ("h1", "strong", "code", "pre", "table")
    assert [page.count(tag=tag) for tag in tags] == [1, 1, 2, 1, 1] and page.count(name="copy") == 2
    assert (page.count(name="katex"), page.count(name="katex-display"), page.count(name="katex-error")) == (4, 1, 0)
    assert 'lang="zh-CN"' in markdown and "5$ and 10$" in markdown and "if a &lt; b:" in markdown

    for tag, attributes in Page(done.stdout).elements:
        assert tag not in ("svg", "iframe", "object", "style") and not any(name.startswith("on") for name in attributes)
        assert tag != "img" or attributes.get("src") == "wait"
        assert tag != "script" or attributes.get("src", "").endswith(".js")
        assert not (attributes.get("href") or "").startswith("javascript:")
    assert '&lt;img src=x onerror="run()"&gt; &lt;script&gt;run()&lt;/script&gt; &lt;svg onload=run()&gt;' in hostile
    for place in ("title", 'h1 id="name"'):
        assert f"<{place}>&lt;img src=x&gt;</" in done.stdout
    assert "&lt;b&gt;fox&lt;/b&gt;" in question
    assert "<details><summary>Thought</summary>" in thought and "so <em>it</em> is" in thought  # folded
    page = Page(thought)
    assert page.count(name="call") == 2 and page.count(tag="img") == page.count(tag="script") == 0
    assert '"x": "&lt;b&gt;"' in thought and "&lt;script&gt;run()&lt;/script&gt;</pre>" in thought
    assert "&lt;b&gt;1&lt;/b&gt;" in result and 'placeholder="Result of <sub>"' in done.stdout.replace(
        "&lt;", "<"
    ).replace("&gt;", ">")
    (body,) = [attributes for tag, attributes in Page(done.stdout).elements if tag == "body"]
    assert json.loads(body["data-results"]) == [{"role": "tool", "tool_call_id": "add", "content": "<b>1</b>"}]
    assert body["data-said"] == expected_answer("<b>fox</b>", 12) and "…" not in answer
