"""The notebooks of docs/, MyST Markdown: headers, cells, what they change, and that they run."""

import ast
import importlib.util
import re
import resource
import subprocess
import sys

import pytest
import yaml
from pages import PAGES, ROOT

import cbp_jax

NOTEBOOKS = [page for page in PAGES if page.read_text().startswith("---\njupytext:")]
# They start from what a user has, show what changes, report, and deploy.
TUTORIALS = [ROOT / "docs/getting_started.md", *sorted((ROOT / "docs/tutorials").glob("*.md"))]
# Seconds of computing, which do not depend on what else the machine does; two idle cores need
# between half as many and as many to pass.
LIMITS = {"docs/getting_started.md": 40}
LIMIT = 120

_STEPS = {"report": r"\blayer_report\(", "deploy": r"\b(save_packed|export_\w+)\("}
_FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_OPTIONS = re.compile(r"\A(---\n.*?\n---\n|(:[^\n]*\n)+)\n?", re.DOTALL)

each_notebook = pytest.mark.parametrize("page", NOTEBOOKS, ids=lambda page: page.stem)
each_tutorial = pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)


def blocks(text):
    """The fenced blocks of a page in order, as (language, text), cells without their options."""
    return [(language, _OPTIONS.sub("", body)) for language, body in _FENCE.findall(text)]


def cells(text):
    return [body for language, body in blocks(text) if language.startswith("{code-cell}")]


def unexplained(text):
    """The lines of a page's diffs that are not in its cells: old ones before, new ones after."""
    wrong = []
    for diff in re.finditer(r"^```diff\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        before, after = (
            {line.strip() for cell in cells(part) for line in cell.splitlines()}
            for part in (text[: diff.start()], text[diff.end() :])
        )
        for line in filter(str.strip, diff[1].splitlines()):
            if line[1:].strip() not in (before if line[0] == "-" else after):
                wrong.append(line)
    return wrong


def steps_of(code):
    """What of a tutorial's end a cell does."""
    return {kind for kind, pattern in _STEPS.items() if re.search(pattern, code)}


def test_all_tutorials_are_notebooks():
    assert set(TUTORIALS) <= set(NOTEBOOKS)
    names = {page.stem for page in TUTORIALS}
    assert names >= {"getting_started", "flax_nnx", "flax_linen", "equinox", "transformer"}


@each_notebook
def test_header(page):
    header = yaml.safe_load(page.read_text().split("---\n")[1])
    assert header["jupytext"]["text_representation"]["format_name"] == "myst"
    assert header["kernelspec"]["name"] == "python3"
    assert header["kernelspec"]["display_name"]


@each_notebook
def test_cells_are_python_with_imports_and_names_that_exist(page):
    codes = cells(page.read_text())
    assert codes
    assert page.read_text().count("```{code-cell} ipython3\n") == len(codes)
    for code in codes:
        for node in ast.walk(ast.parse(code)):
            modules = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            for module in modules:
                assert importlib.util.find_spec(module.partition(".")[0]), module
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "cbp_jax":
                assert node.attr in cbp_jax.__all__


def ruff(code, *arguments):
    """What the linter says against a code, if anything."""
    command = [sys.executable, "-m", "ruff", *arguments, "--line-length=100", "--isolated", "-"]
    done = subprocess.run(command, input=code, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr if done.returncode else ""


@each_notebook
def test_cells_pass_the_linter(page):
    code = "\n\n".join(cells(page.read_text()))
    assert ruff(code, "check", "--select=E,F,I,W", "--ignore=E402") == ""


@each_tutorial
def test_cells_are_formatted(page):
    assert "".join(ruff(code, "format", "--diff") for code in cells(page.read_text())) == ""


def test_the_linter_finds_what_is_wrong():
    assert "F821" in ruff("print(undefined)\n", "check", "--select=F")
    assert ruff("a=1\n", "format", "--diff") != ""


@each_tutorial
def test_changes_are_those_of_the_cells(page):
    assert page.read_text().count("```diff\n") >= 1
    assert unexplained(page.read_text()) == []


def test_a_change_that_no_cell_makes_is_found():
    cell = "```{{code-cell}} ipython3\n:tags: [a]\n\n{}\n```\n"
    page = cell.format("a = 1\nb = 2") + "```diff\n-a = 1\n+a = 3\n\n b = 2\n```\n"
    assert unexplained(page + cell.format("a = 3\nb = 2")) == []
    assert unexplained(page + cell.format("a = 4\nb = 2")) == ["+a = 3"]
    assert unexplained(page.replace("-a = 1", "-a = 5") + cell.format("a = 3\nb = 2")) == ["-a = 5"]


@each_tutorial
def test_a_tutorial_ends_with_a_report_and_what_is_deployed(page):
    done = [steps_of(code) for code in cells(page.read_text())]
    last = {kind: max(i for i, kinds in enumerate(done) if kind in kinds) for kind in _STEPS}
    assert last["report"] < last["deploy"]


def test_steps_of_a_cell():
    assert steps_of("print(cbp_jax.layer_report(params, state))") == {"report"}
    assert steps_of('cbp_jax.export_gguf("a", params)') == {"deploy"}
    assert steps_of("layer_report = packed") == set()


@pytest.mark.slow
@each_notebook
def test_runs_in_time(page, tmp_path):
    nbformat, nbclient, _ = (
        pytest.importorskip(module, reason='needs the extra: pip install -e ".[docs]"')
        for module in ("nbformat", "nbclient", "ipykernel")
    )

    def computing():
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    before = computing()
    new = nbformat.v4
    notebook = new.new_notebook(cells=[*map(new.new_code_cell, cells(page.read_text()))])
    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=600, resources=where).execute()
    texts = [output.get("name") for cell in notebook.cells for output in cell.get("outputs", ())]
    assert "stderr" not in texts  # no warning
    assert computing() - before < LIMITS.get(str(page.relative_to(ROOT)), LIMIT)
