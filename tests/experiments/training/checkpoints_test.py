"""Checkpoints: what is restored, what is rejected, and how damage is handled."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("orbax.checkpoint", reason='needs the extra: pip install -e ".[test]"')

from common.training import checkpoints, mesh

import cbp_jax


def make_tree(constraint="ternary", value=0.0):
    params = {
        "kernel": jnp.linspace(-1, 1, 70_000).reshape(700, 100) + value,
        "bias": jnp.full(3, value, jnp.bfloat16),
    }
    state = cbp_jax.cbp(constraint).init(params)
    return {"params": params, "opt_state": state, "key": jnp.array([1, 2**32 - 1], jnp.uint32)}


def assert_equal(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, tree, other)


@pytest.fixture
def three(tmp_path):
    """A run's folder with checkpoints of steps 1, 2 and 3."""
    writer = checkpoints.Checkpoints(tmp_path, keep=3)
    for step in (1, 2, 3):
        writer.save(step, {"tree": make_tree(value=step)}, {"step": step})
    writer.close()
    return tmp_path


def files_of(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def test_restores_the_newest_bit_for_bit(three):
    reader = checkpoints.Checkpoints(three)
    step, trees, notes = reader.restore_newest({"tree": make_tree()})
    assert (step, notes, reader.newest()) == (3, {"step": 3}, 3)
    assert_equal(trees["tree"], make_tree(value=3))


def test_keeps_only_the_newest_few(tmp_path):
    writer = checkpoints.Checkpoints(tmp_path, keep=2)
    for step in range(5):
        writer.save(step, {"tree": make_tree(value=step)}, {})
        writer.save(step, {"tree": make_tree(value=-step)}, {})  # saved already
    writer.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "4"]
    step, trees, _ = checkpoints.Checkpoints(tmp_path).restore_newest({"tree": make_tree()})
    assert step == 4
    assert_equal(trees["tree"], make_tree(value=4))


def test_empty_folder_has_none(tmp_path):
    reader = checkpoints.Checkpoints(tmp_path)
    assert reader.restore_newest({"tree": make_tree()}) is None
    assert reader.newest() is None


def flip_a_bit(folder):
    """Changes the middle of the largest file, where the weights are; Orbax does not notice."""
    largest = max(files_of(folder), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)


def cut_off(folder):
    for path in files_of(folder):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(folder):
    for path in files_of(folder):
        path.unlink()


@pytest.mark.parametrize("damage", [flip_a_bit, cut_off, empty])
def test_skips_damaged_checkpoint(three, damage):
    damage(three / "3")
    reader = checkpoints.Checkpoints(three)
    with pytest.warns(UserWarning, match="step 3 in .* cannot be read"):
        step, trees, notes = reader.restore_newest({"tree": make_tree()})
    assert (step, notes) == (2, {"step": 2})
    assert_equal(trees["tree"], make_tree(value=2))
    assert (three / "3").is_dir()  # reading moves nothing


def test_one_changed_bit_of_what_a_checkpoint_says_of_itself(three):
    """It is read as it was, or the one before is; what it says is never another."""
    (file,) = (path for path in (three / "3" / "about").rglob("*") if path.stat().st_size > 100)
    content = file.read_bytes()
    found = set()
    for position in np.linspace(0, len(content) - 1, 40).astype(int):
        changed = bytearray(content)
        changed[position] ^= 1 << (position % 7)
        file.write_bytes(changed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            step, trees, notes = checkpoints.Checkpoints(three).restore_newest(
                {"tree": make_tree()}
            )
        assert notes == {"step": step}
        assert_equal(trees["tree"], make_tree(value=step))
        found.add(step)
    assert 2 in found


def test_put_aside_renames_damaged_checkpoints(three):
    (three / "damaged_3").mkdir()  # not for the first time
    cut_off(three / "3")
    reader = checkpoints.Checkpoints(three)
    with pytest.warns(UserWarning, match="step 3 in .* cannot be read"):
        step, _, _ = reader.restore_newest({"tree": make_tree()}, put_aside=True)
    assert step == 2
    assert (three / "damaged_3_2").is_dir()
    reader.save(3, {"tree": make_tree(value=30)}, {"step": 30})
    reader.close()
    step, trees, notes = checkpoints.Checkpoints(three).restore_newest({"tree": make_tree()})
    assert (step, notes) == (3, {"step": 30})
    assert_equal(trees["tree"], make_tree(value=30))


def test_raises_if_all_are_damaged(three):
    for step in "123":
        cut_off(three / step)
    for _ in range(2):  # the second try raises the same
        with (
            pytest.warns(UserWarning, match="cannot be read"),
            pytest.raises(ValueError, match="none of the checkpoints"),
        ):
            checkpoints.Checkpoints(three).restore_newest({"tree": make_tree()})


def test_another_tree_is_an_error_not_damage(three):
    with pytest.raises(checkpoints.AnotherTreeError, match=r"ternary(.|\n)*binary"):
        checkpoints.Checkpoints(three).restore_newest({"tree": make_tree("binary")})
    other = make_tree()
    other["params"]["kernel"] = jnp.zeros((700, 101))
    with pytest.raises(checkpoints.AnotherTreeError, match=r"700, 100(.|\n)*700, 101"):
        checkpoints.Checkpoints(three).restore_newest({"tree": other})
    with pytest.raises(checkpoints.AnotherTreeError, match=r"holds another extra"):
        checkpoints.Checkpoints(three).restore_newest({"extra": make_tree()})
    assert sorted(path.name for path in three.iterdir()) == ["1", "2", "3"]


def test_another_dtype_is_an_error_that_names_it(three):
    other = make_tree()
    other["params"]["bias"] = other["params"]["bias"].astype(jnp.float32)
    with pytest.raises(checkpoints.AnotherTreeError, match=r"(?s)bfloat16.*asked: .*float32"):
        checkpoints.Checkpoints(three).restore_newest({"tree": other})


def test_checkpoints_of_before_they_named_dtypes(tmp_path, monkeypatch):
    structure = checkpoints._structure
    writer = checkpoints.Checkpoints(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(
            checkpoints, "_structure", lambda tree: structure(tree).split(" and dtypes ")[0]
        )
        writer.save(1, {"tree": make_tree(value=1)}, {})
    writer.close()
    step, trees, _ = checkpoints.Checkpoints(tmp_path).restore_newest({"tree": make_tree()})
    assert step == 1
    assert_equal(trees["tree"], make_tree(value=1))


@pytest.mark.parametrize("partly", [False, True])
def test_a_run_that_goes_on_removes_what_is_being_read(tmp_path, monkeypatch, partly):
    """As `evaluate.py` beside a fast run: what it has listed is gone, or going."""
    writer = checkpoints.Checkpoints(tmp_path, keep=1)
    writer.save(1, {"tree": make_tree(value=1)}, {})
    writer.wait()
    reader, restore = checkpoints.Checkpoints(tmp_path), checkpoints._restore
    written = iter((2, 3))

    def restore_late(path, *arguments):
        if (step := next(written, None)) is not None:
            writer.save(step, {"tree": make_tree(value=step)}, {})
            writer.wait()
            if partly:
                path.mkdir()
        return restore(path, *arguments)

    monkeypatch.setattr(checkpoints, "_restore", restore_late)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if partly else "error", UserWarning)
        step, trees, _ = reader.restore_newest({"tree": make_tree()})
    assert step == 3
    assert_equal(trees["tree"], make_tree(value=3))


def test_donated_arrays_are_saved_as_they_were(tmp_path):
    """Writing continues in the background while the next step overwrites the memory."""
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)
    writer = checkpoints.Checkpoints(tmp_path, keep=9)
    tree = {"w": jnp.zeros((2000, 1000))}
    for step in range(4):
        writer.save(step, {"tree": tree}, {})
        for _ in range(3):
            tree = overwrite(tree)
    writer.close()
    for step in (3, 2, 1, 0):
        found, trees, _ = checkpoints.Checkpoints(tmp_path).restore_newest({"tree": tree})
        assert found == step
        np.testing.assert_array_equal(trees["tree"]["w"], np.full((2000, 1000), 3.0 * step))
        empty(tmp_path / str(step))
        (tmp_path / str(step)).rename(tmp_path / f"gone_{step}")


def test_reads_sharded_arrays_as_numpy(tmp_path):
    """As needed on a machine with other devices."""
    params = {"kernel": jnp.linspace(-1, 1, 2**17).reshape(512, 256)}
    state = mesh.put_state(params, mesh.state_shardings(mesh.make_mesh(8), params, params))
    writer = checkpoints.Checkpoints(tmp_path)
    writer.save(1, {"tree": state}, {})
    writer.close()
    _, trees, _ = checkpoints.Checkpoints(tmp_path).restore_newest(
        {"tree": {"kernel": np.empty((512, 256), np.float32)}}
    )
    assert isinstance(trees["tree"]["kernel"], np.ndarray)
    assert_equal(trees["tree"], params)


def test_shardings_may_change_between_save_and_restore(tmp_path):
    """Saved from one device, read on eight; check sums do not depend on the layout."""
    params = {"kernel": jnp.linspace(-1, 1, 2**17).reshape(512, 256)}
    state = {"params": params, "opt_state": cbp_jax.cbp("binary").init(params)}
    writer = checkpoints.Checkpoints(tmp_path)
    writer.save(1, {"tree": state}, {})
    writer.close()
    on = mesh.make_mesh(8)
    like = mesh.put_state(
        jax.tree.map(jnp.zeros_like, state), mesh.state_shardings(on, state, params)
    )
    _, trees, _ = checkpoints.Checkpoints(tmp_path).restore_newest({"tree": like})
    assert_equal(trees["tree"], state)
    for tree in (trees["tree"]["params"], trees["tree"]["opt_state"].multipliers):
        assert tree["kernel"].addressable_shards[0].data.size == 2**17 // 8


def test_check_sums():
    """Against Python's integers of any length."""
    array = np.array([[1.5, -2.0], [0.0, 3.25]], np.float32)
    weights = [(row * 2654435761 + column) % 2**32 for row in (0, 1) for column in (0, 1)]
    expected = sum(
        int(bits) * (2 * weight + 1)
        for bits, weight in zip(array.view(np.uint32).ravel(), weights, strict=True)
    )
    assert checkpoints._sums({"a": jnp.asarray(array)}) == [expected % 2**32]
    swapped = jnp.asarray(array[::-1])
    assert checkpoints._sums({"a": swapped}) != [expected % 2**32]
    for dtype in (jnp.bool_, jnp.int8, jnp.bfloat16, jnp.uint32, jnp.float32):
        zeros = jnp.zeros((3, 4), dtype)
        assert checkpoints._sums([zeros]) == [0]
        assert checkpoints._sums([zeros.at[1, 2].set(jnp.ones((), dtype))]) != [0]


def test_run_is_json(three):
    notes = checkpoints.Checkpoints(three).restore_newest({"tree": make_tree()})[2]
    assert json.loads(json.dumps(notes)) == notes
