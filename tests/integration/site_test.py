"""The documentation site: every public name has its place, links lead somewhere, cells are run."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zlib

import pytest
from pages import ROOT

import cbp_jax

DOCS = ROOT / "docs"
NOTEBOOK = """---
jupytext: {text_representation: {extension: .md, format_name: myst}}
kernelspec: {display_name: Python 3, language: python, name: python3}
---
# A notebook
```{code-cell} ipython3
CELL
```
"""


@pytest.fixture(scope="module")
def conf():
    pytest.importorskip("sphinx", reason='needs the extra: pip install -e ".[docs]"')
    spec = importlib.util.spec_from_file_location("conf", DOCS / "conf.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(docs, out, environment, notebooks="quick"):
    """Builds a site as the one command does."""
    pytest.importorskip("myst_nb", reason='needs the extra: pip install -e ".[docs]"')
    return subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "-q", docs, out],
        env={**environment, "DOCS_NOTEBOOKS": notebooks},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def small(tmp_path):
    """A repository with our configuration and one page."""
    docs = tmp_path / "docs"
    shutil.copytree(DOCS / "_static", docs / "_static")
    shutil.copy(DOCS / "conf.py", docs)
    shutil.copy(ROOT / "setup.cfg", tmp_path)
    (tmp_path / "README.md").write_text("# A\n")
    (tmp_path / "CONTRIBUTING.md").write_text("# How\n[read](README.md#a), [page](docs/index.md)\n")
    (docs / "contributing.md").write_text("```{include} ../CONTRIBUTING.md\n```\n")
    (docs / "index.md").write_text(
        "# A page\n<!-- hidden -->\n[a](../README.md#a) [b](../docs/) [c](../CONTRIBUTING.md#how)\n"
        "[d](#a-page)\n```{toctree}\ncontributing\n```\n"
    )
    return docs


def groups(text):
    """The names in `__all__`, between one comment and the next."""
    body = text.partition("__all__ = [")[2].partition("]")[0]
    names = [
        re.findall(r'"(\w+)"', part) for part in re.split(r"^ +#.*$", body, flags=re.MULTILINE)
    ]
    return [part for part in names if part]


def test_every_public_name_is_documented_once():
    order = re.findall(r"^api/\w+$", (DOCS / "index.md").read_text(), re.MULTILINE)
    pages = [
        re.findall(
            r"^\.\. auto\w+:: cbp_jax\.(\w+)$", (DOCS / f"{page}.md").read_text(), re.MULTILINE
        )
        for page in order
    ]
    assert pages == groups((ROOT / "cbp_jax/__init__.py").read_text())
    assert sorted(name for page in pages for name in page) == sorted(cbp_jax.__all__)
    assert sorted(order) == sorted(f"api/{path.stem}" for path in (DOCS / "api").iterdir())


def test_every_page_is_in_the_table_of_contents():
    listed = re.findall(r"^[\w/]+$", (DOCS / "index.md").read_text(), re.MULTILINE)
    pages = {str(path.relative_to(DOCS))[: -len(".md")] for path in DOCS.rglob("*.md")}
    assert sorted(listed) == sorted(pages - {"index"})


def test_which_notebooks_are_executed(conf):
    assert conf.not_executed("quick") == ["tutorials/*"]
    assert conf.not_executed("all") == []
    with pytest.raises(ValueError, match="'quick', 'all', 'none', got 'fast'"):
        conf.not_executed("fast")


def test_where_links_lead(conf):
    assert conf.repository_path("tutorials/equinox", "../../README.md") == "README.md"
    assert conf.repository_path("changelog", "docs/study.md") == "docs/study.md"
    assert conf.page_of("docs/study.md") == "study"
    assert conf.page_of("CHANGELOG.md") == "changelog"
    assert conf.page_of("README.md") is None
    assert conf.address("README.md", "a") == f"{conf.REPOSITORY}/blob/main/README.md#a"
    assert conf.address("experiments") == f"{conf.REPOSITORY}/tree/main/experiments"
    with pytest.raises(ValueError, match="subpath"):
        conf.repository_path("study", "../../elsewhere")


def test_docstrings_become_restructured_text(conf):
    docstring = """The `Param`s of
    `a b`, `c d`.

        x = `y`

    Returns:
      a `b`: c

          code
    """
    assert conf.restructured([line[4:] if line.startswith("    ") else line
                              for line in docstring.splitlines()]) == [
        "The `Param`\\ s of", "`a b`, `c d`.", "", ".. code-block:: none", "", "    x = `y`", "",
        "Returns:", "  : a `b`: c", "", "  .. code-block:: none", "", "      code", "",
    ]  # fmt: skip


def test_signatures_are_those_of_the_source(conf):
    arguments, returned = conf.written_signature(cbp_jax.cbp)
    assert "*, steps_per_epoch: int = 1000, " in arguments
    assert "multiplier_learning_rate: ArrayLike = 1e-4, " in arguments
    assert returned == "optax.GradientTransformationExtraArgs"
    assert conf.written_signature(cbp_jax.Constraint.quantize) == (
        "(w: ArrayLike, scale: ArrayLike)",
        "jax.Array",
    )


def test_links_of_a_small_site(small, tmp_path, environment):
    built = build(small, tmp_path / "html", environment)
    assert (built.returncode, built.stderr) == (0, "")
    page = (tmp_path / "html/index.html").read_text()
    text = page[page.index("<article") : page.index("</article")]
    repository = "https://github.com/cbp-jax/cbp_jax"
    for link in (
        f"{repository}/blob/main/README.md#a", f"{repository}/tree/main/docs",
        "contributing.html#how", "#a-page",
    ):  # fmt: skip
        assert f'href="{link}"' in text
    included = (tmp_path / "html/contributing.html").read_text()
    assert f'href="{repository}/blob/main/README.md#a"' in included
    assert '<a class="reference internal" href="index.html"' in included


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("[a](../gone.py)", "no such file: ../gone.py"),
        ("[a](contributing.md#gone)", "gone"),
        ("[a](gone.md)", "gone"),
    ],
)
def test_a_broken_link_fails_the_build(small, tmp_path, environment, line, error):
    index = small / "index.md"
    index.write_text(index.read_text() + line)
    built = build(small, tmp_path / "html", environment)
    assert built.returncode == 1
    assert error in built.stderr


def test_a_failing_cell_fails_the_build(small, tmp_path, environment):
    index = small / "index.md"
    index.write_text(index.read_text().replace("contributing", "contributing\nnotebook"))
    (small / "notebook.md").write_text(NOTEBOOK.replace("CELL", "print(6 * 7)"))
    built = build(small, tmp_path / "html", environment)
    assert built.returncode == 0, built.stderr
    assert ">42\n" in (tmp_path / "html/notebook.html").read_text()

    (small / "notebook.md").write_text(NOTEBOOK.replace("CELL", "assert 6 * 9 == 42"))
    built = build(small, tmp_path / "html", environment)
    assert built.returncode != 0
    assert "AssertionError" in built.stderr
    built = build(small, tmp_path / "html", environment, "none")
    assert built.returncode == 0, built.stderr


@pytest.mark.slow
def test_the_whole_site(tmp_path, environment):
    """All notebooks run, each public name is in the index of names, nothing needs the network."""
    built = build(DOCS, tmp_path, environment, "all")
    assert built.returncode == 0, built.stderr

    inventory = zlib.decompress((tmp_path / "objects.inv").read_bytes().split(b"\n", 4)[4])
    names = {line.split()[0] for line in inventory.decode().splitlines()}
    assert {f"cbp_jax.{name}" for name in cbp_jax.__all__} <= names
    assert '"window":' in (tmp_path / "searchindex.js").read_text()  # a term that search knows
    for page in tmp_path.rglob("*.html"):
        text = page.read_text()
        assert not re.findall(r'<(?:script|img|iframe)[^>]* src="(?:https?:)?//[^"]*"', text), page
        assert not re.findall(r'<link[^>]* href="(?:https?:)?//[^"]*"', text), page
        for link in re.findall(r'<(?:a|img)[^>]* (?:href|src)="(?![a-z]+:|#)([^"#?]+)', text):
            assert os.path.exists(page.parent / link), f"{page}: {link}"
