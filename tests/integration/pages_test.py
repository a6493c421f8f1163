"""README.md and docs/: code run as it is written, tables, links, lengths."""

import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from pages import PAGES, ROOT, block, broken_links, prose_words

import cbp_jax

OTHER_PAGES = ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "experiments/README.md")
EXAMPLE, DEPLOY, LIGHT, NNX, LINEN, CLOSING = map(
    block, ("example", "deploy", "light", "nnx", "linen", "closing")
)


def test_example(capsys):
    """A network of one's own: three layers, of which the middle one is ternary."""
    keys = jax.random.split(jax.random.key(0), 4)
    sizes = {"conv1": (8, 16), "middle": (16, 16), "head": (16, 3)}
    params = {
        name: {"kernel": jax.random.normal(key, size) / 4, "bias": jnp.zeros(size[1])}
        for (name, size), key in zip(sizes.items(), keys, strict=False)
    }
    images = jax.random.normal(keys[3], (64, 8))
    labels = jnp.argmax(images[:, :3], axis=1)

    def loss_fn(params, batch):
        x = batch[0]
        for name in sizes:
            x = x @ params[name]["kernel"] + params[name]["bias"]
            x = x if name == "head" else jax.nn.relu(x)
        return optax.softmax_cross_entropy_with_integer_labels(x, batch[1]).mean()

    namespace = {"params": params, "loss_fn": loss_fn, "batches": [(images, labels)] * 3000}
    exec(EXAMPLE, namespace)

    scale = np.mean(np.abs(params["middle"]["kernel"]))
    levels = np.unique(namespace["weights"]["middle"]["kernel"])
    np.testing.assert_allclose(levels, [-scale, 0, scale], rtol=1e-6)
    assert len(np.unique(namespace["weights"]["head"]["kernel"])) == 48  # left in full precision
    printed = capsys.readouterr().out
    assert "middle/kernel  ternary" in printed
    assert "60 multiplier updates in 3,000 steps" in printed
    assert namespace["loss"] < loss_fn(params, (images, labels))
    # With the schedule that the example states, the constraint is met at the end.
    trained = namespace["params"], namespace["state"]
    assert cbp_jax.constraint_failure_score(*trained, relative=True) < 0.01


def test_deployment(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    params = {"kernel": jax.random.normal(jax.random.key(0), (8, 16)), "bias": jnp.ones(16)}
    state = cbp_jax.cbp("two_bit_shift").init(params)

    def model_fn(params, images):
        return images @ params["kernel"] + params["bias"]

    namespace = {
        "cbp_jax": cbp_jax,
        "jax": jax,
        "params": params,
        "state": state,
        "model_fn": model_fn,
        "images": jnp.ones((3, 8)),
    }
    exec(DEPLOY, namespace)
    quantized = cbp_jax.quantize(params, state)
    np.testing.assert_array_equal(namespace["weights"]["kernel"], quantized["kernel"])
    np.testing.assert_allclose(
        namespace["logits"], model_fn(quantized, namespace["images"]), rtol=1e-5
    )
    assert "two_bit_shift" in capsys.readouterr().out
    assert (tmp_path / "weights.safetensors").exists()


def test_closing_by_the_number_of_steps():
    params = {"kernel": jnp.array([[0.5, -0.301], [0.3, 0.9]])}

    def loss_fn(weights, batch):
        return jnp.mean((batch @ weights["kernel"] - 1) ** 2)

    namespace = {"cbp_jax": cbp_jax, "optax": optax, "jax": jax, "params": params}
    exec(CLOSING, namespace | {"loss_fn": loss_fn, "batch": jnp.eye(2)})
    assert "total_steps=1000" in CLOSING


def test_the_light_setting():
    namespace = {"cbp_jax": cbp_jax, "optax": optax}
    exec(LIGHT, namespace)
    params = {"kernel": jnp.array([[0.5, -0.301], [0.3, 0.9]])}
    optimizer = namespace["optimizer"]
    state = optimizer.init(params)
    kept = [
        leaf
        for leaf in jax.tree.leaves((state.cbp.multipliers, state.cbp.multiplier_opt_state))
        if leaf.ndim
    ]
    assert [leaf.nbytes for leaf in kept] == [2 * 4]
    _, state = optimizer.update(params, state, params, value=jnp.float32(1))
    # At g = 1 only what is outside the levels counts: 0.9.
    assert jnp.mean(jnp.abs(params["kernel"])) < 0.9
    np.testing.assert_allclose(
        np.float32(state.cbp.multipliers["kernel"]), [[0, 0], [0, 1e-4]], rtol=1e-2
    )


def test_nnx_example():
    """Batch statistics and the dropout counter move in the user's module."""

    class Network(nnx.Module):
        def __init__(self, rngs):
            self.first, self.norm = nnx.Linear(8, 16, rngs=rngs), nnx.BatchNorm(16, rngs=rngs)
            self.dropout, self.middle = nnx.Dropout(0.1, rngs=rngs), nnx.Linear(16, 16, rngs=rngs)

        def __call__(self, x):
            return self.middle(self.dropout(nnx.relu(self.norm(self.first(x)))))

    def loss_fn(model, batch):
        return jnp.mean((model(batch) - 1) ** 2)

    model = Network(nnx.Rngs(0))
    link = cbp_jax.cbp(
        "ternary", steps_per_epoch=2, patience=1, mask=cbp_jax.select(include="middle/kernel")
    )
    namespace = {
        "nnx": nnx,
        "optax": optax,
        "cbp_jax": cbp_jax,
        "model": model,
        "link": link,
        "loss_fn": loss_fn,
    }
    exec(NNX, namespace)
    losses = [
        namespace["train_step"](
            model, namespace["optimizer"], jax.random.normal(jax.random.key(0), (32, 8))
        )
        for _ in range(20)
    ]
    assert losses[-1] < losses[0]
    assert model.dropout.rngs.count[...] == 20
    assert float(jnp.max(jnp.abs(model.norm.mean[...]))) > 0.01
    assert cbp_jax.window(namespace["optimizer"].opt_state) == 10


def test_example_is_ten_lines_or_so():
    code = [line for line in EXAMPLE.splitlines() if line.strip()]
    assert len(code) <= 15


@pytest.fixture(scope="module")
def update_pages():
    pytest.importorskip("ml_collections", reason='needs the extra: pip install -e ".[test]"')
    return importlib.import_module("update_pages")


def test_tables_match_the_runs(update_pages):
    texts = [page.read_text() for page in PAGES]
    filled = update_pages.filled(texts, update_pages.tables())
    for page, text, expected in zip(PAGES, texts, filled, strict=True):
        assert text == expected, f"{page}: run python experiments/update_pages.py"


def test_costs_in_the_readme_are_those_measured(update_pages):
    readme, rows = PAGES[0].read_text(), update_pages.tables()["cost"].splitlines()
    for row, claim in (
        ("without the sum", r"takes about ([\d.]+) times"),
        ("with the sum", r"about\s+([\d.]+) times with"),
    ):
        (line,) = [line for line in rows if f", {row} " in line]
        low, high = map(float, re.search(r"([\d.]+) to ([\d.]+)", line).groups())
        assert low <= float(re.search(claim, readme)[1]) <= high


def test_markers_without_a_table_and_tables_without_markers(update_pages):
    pair = "<!-- a:begin -->\nold\n<!-- a:end -->\n"
    assert update_pages.filled([pair, "text"], {"a": "new"}) == [pair.replace("old", "new"), "text"]
    for texts, contents in (
        ([pair], {}),
        ([pair], {"a": "new", "b": "new"}),
        ([pair, pair], {"a": "new"}),
        ([pair + "<!-- b:begin -->"], {"a": "new"}),
        (["<!-- a:end -->\n<!-- a:begin -->\n"], {"a": "new"}),
        (["<!-- a:begin -->\n", "<!-- a:end -->\n"], {"a": "new"}),
    ):
        with pytest.raises(ValueError, match=r"tables and markers differ in [ab]:"):
            update_pages.filled(texts, contents)


@pytest.mark.parametrize(
    "page",
    [*PAGES, *(ROOT / name for name in OTHER_PAGES)],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_relative_links_resolve(page):
    assert broken_links(page) == []


def test_a_broken_link_is_found(tmp_path):
    (tmp_path / "there.md").write_text("# A `b`, c\n```sh\n# d\n```\n## Twice\n## Twice\n")
    good = "[a](there.md) [b](there.md#a-b-c) [c](there.md#twice-1) [d](#e) [f](https://g.h)\n# E\n"
    bad = "[a](gone.md) ![b](gone.png) [c](there.md#d) [d](#f) [e](there.md#twice-2)\n"
    page = tmp_path / "page.md"
    page.write_text(good + bad + "`[a](code.md)`\n```\n[a](code.md)\n```\n")
    assert broken_links(page) == ["gone.md", "gone.png", "there.md#d", "#f", "there.md#twice-2"]


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: str(page.relative_to(ROOT))
)
def test_pages_are_short(page):
    assert prose_words(page) <= 900


def test_the_continuous_integration_finds_the_test_command():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert [line for line in lines if 'pip install -e ".[test]"' in line] == [
        'pip install -e ".[test]" && pytest -n 2'
    ]
