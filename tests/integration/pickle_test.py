"""No file is unpickled but by torch's restricted unpickler, which runs no code of it."""

import ast

import pytest
from pages import ROOT

PICKLES = ("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")
SOURCES = sorted([*(ROOT / "cbp_jax").rglob("*.py"), *(ROOT / "experiments").rglob("*.py")])


def faults_of(code):
    """The lines that could run code out of a file."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else names
            if any(name.partition(".")[0] in PICKLES for name in modules):
                yield ast.unparse(node)
        if isinstance(node, ast.Call):
            call, options = ast.unparse(node.func), {k.arg: k.value for k in node.keywords}
            unsafe = ast.unparse(options.get("allow_pickle", ast.Constant(False))) != "False"
            restricted = ast.unparse(options.get("weights_only", ast.Constant(False))) == "True"
            if unsafe or (call == "torch.load" and not restricted):
                yield ast.unparse(node)
            if call in ("exec", "eval", "__import__") or call.endswith("read_pickle"):
                yield ast.unparse(node)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_unpickled(path):
    assert list(faults_of(path.read_text())) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "np.load(path, allow_pickle=True)",
        "numpy.load(path, allow_pickle=flag)",
        "exec(text)",
    ],
)
def test_what_could_run_code_is_found(code):
    assert list(faults_of(code)) == [code]


def test_what_runs_none_is_left_alone():
    code = "torch.load(path, weights_only=True)\nnp.load(path)\nimport pickletools\njson.load(file)"
    assert list(faults_of(code)) == []
