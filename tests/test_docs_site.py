"""The site that `make docs` builds: without a warning, complete, and nothing fetched to show it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import cla_kernels
import pytest

import cla_jax

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict",
         "--config-file", str(ROOT / "docs" / "site" / "mkdocs.yml"), "--site-dir", str(folder)],
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "https_proxy": "http://127.0.0.1:9"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_has_every_page_and_every_public_name(site: Path):
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert pages | {"index"} <= {path.stem for path in site.glob("*.html")}
    for package in (cla_jax, cla_kernels):
        page = (site / "api" / f"{package.__name__}.html").read_text("utf-8")
        headings = re.findall(r'<h\d id="([^"]+)" class="doc doc-heading"', page)
        assert set(package.__all__) <= {name.rpartition(".")[2] for name in headings}


@pytest.mark.slow
def test_fetches_nothing(site: Path):
    for page in site.rglob("*.html"):
        text = page.read_text("utf-8")
        fetched = re.findall(r'<(?:script|img|link|iframe)\b[^>]*(?:src|href)="([^"]+)"', text)
        assert fetched
        assert [one for one in fetched if one.startswith(("http", "//"))] == [], page


@pytest.mark.slow
def test_links_lead_somewhere(site: Path):
    for page in site.rglob("*.html"):
        for target in re.findall(r'(?:href|src)="([^"#]+)', page.read_text("utf-8")):
            if "://" not in target and not target.startswith(("/", "mailto:")):
                assert (page.parent / target).exists(), f"{page.name}: {target}"
