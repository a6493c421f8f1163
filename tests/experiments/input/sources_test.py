"""Sources of labelled image files: a tiny folder tree and the ImageNet sample."""

import io
import os
import pickle

import numpy as np
import pytest
from common.input import sources
from PIL import Image


def write_image(path, colour=(200, 100, 50), image_format="JPEG"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), colour).save(path, image_format)


@pytest.fixture
def tree(tmp_path):
    """Three classes; names in upper and lower case, and files that are not images."""
    for name in ("n01/b.JPEG", "n01/a.jpg", "n02/c.jpeg", "n03/d.PNG", "n03/e.JPG"):
        write_image(
            tmp_path / "train" / name, image_format="PNG" if name.endswith("PNG") else "JPEG"
        )
    for name in ("n01/v1.JPEG", "n02/v2.JPEG", "n03/v3.JPEG"):
        write_image(tmp_path / "val" / name)
    (tmp_path / "train" / "n01" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / "n01" / "folder.jpg").mkdir()
    (tmp_path / "train" / "README").write_text("not a class")
    return tmp_path


class TestFolderSource:
    def test_files_and_labels_follow_sorted_train_classes(self, tree):
        source = sources.FolderSource(str(tree), "train")
        assert [(e.name, e.label) for e in (source[i] for i in range(len(source)))] == [
            (os.path.join("train", "n01", "a.jpg"), 0),
            (os.path.join("train", "n01", "b.JPEG"), 0),
            (os.path.join("train", "n02", "c.jpeg"), 1),
            (os.path.join("train", "n03", "d.PNG"), 2),
            (os.path.join("train", "n03", "e.JPG"), 2),
        ]
        assert source.num_classes == 3
        assert source[2].image == (tree / "train" / "n02" / "c.jpeg").read_bytes()

    def test_index_past_the_end_raises(self, tree):
        with pytest.raises(IndexError):
            sources.FolderSource(str(tree), "train")[5]

    def test_survives_pickling(self, tree):
        source = sources.FolderSource(str(tree), "train")
        assert pickle.loads(pickle.dumps(source))[3] == source[3]

    def test_many_names_pickle_compactly(self, tree):
        for i in range(2000):
            (tree / "train" / "n02" / f"n02_{i:05d}.JPEG").touch()
        source = sources.FolderSource(str(tree), "train")
        assert len(source) == 2005
        # Per image 14 bytes of name and 4 of label; a list of str takes 70.
        assert len(pickle.dumps(source)) < 25 * len(source)

    def test_names_need_not_be_ascii(self, tree):
        write_image(tree / "train" / "n02" / "œuf.jpg")
        source = sources.FolderSource(str(tree), "train")
        names = [source[i].name for i in range(len(source))]
        assert os.path.join("train", "n02", "œuf.jpg") in names

    def test_empty_class_keeps_its_label_and_is_reported(self, tree):
        os.remove(tree / "train" / "n02" / "c.jpeg")
        with pytest.warns(UserWarning, match="n02"):
            source = sources.FolderSource(str(tree), "train")
        assert [source[i].label for i in range(len(source))] == [0, 0, 2, 2]
        assert source.num_classes == 3

    def test_class_missing_in_validation_keeps_its_label(self, tree):
        os.remove(tree / "val" / "n01" / "v1.JPEG")
        os.rmdir(tree / "val" / "n01")
        with pytest.warns(UserWarning, match="n01"):
            source = sources.FolderSource(str(tree), "val")
        assert [source[i].label for i in range(len(source))] == [1, 2]

    def test_rejects_class_missing_in_train(self, tree):
        write_image(tree / "val" / "n99" / "x.JPEG")
        with pytest.raises(ValueError, match="n99"):
            sources.FolderSource(str(tree), "val")

    @pytest.mark.parametrize("split", ["train", "val"])
    def test_missing_folder_error_describes_the_layout(self, tmp_path, split):
        with pytest.raises(FileNotFoundError, match=r"ROOT/train/<class>/\*\.JPEG"):
            sources.FolderSource(str(tmp_path / "nowhere"), split)

    def test_flat_validation_folder_error_describes_the_layout(self, tree, tmp_path_factory):
        flat = tmp_path_factory.mktemp("flat")
        (flat / "train").symlink_to(tree / "train")
        write_image(flat / "val" / "ILSVRC2012_val_00000001.JPEG")
        with pytest.raises(FileNotFoundError, match="no class folders"):
            sources.FolderSource(str(flat), "val")

    def test_rejects_tree_without_images(self, tmp_path):
        (tmp_path / "train" / "n01").mkdir(parents=True)
        with pytest.raises(FileNotFoundError, match="no images"):
            sources.FolderSource(str(tmp_path), "train")

    def test_a_link_to_itself_is_an_unreadable_image(self, tree):
        for link in (tree / "train" / "n02" / "loop.jpg", tree / "train" / "loop"):
            link.symlink_to(link)
        source = sources.FolderSource(str(tree), "train")
        assert source.classes == ["n01", "n02", "n03"]
        assert len(source) == 6
        with pytest.raises(OSError, match=r"loop\.jpg"):
            source[3]

    def test_vanished_file_raises_os_error(self, tree):
        source = sources.FolderSource(str(tree), "train")
        os.remove(tree / "train" / "n02" / "c.jpeg")
        with pytest.raises(OSError, match=r"c\.jpeg"):
            source[2]


class TestTfdsSource:
    def test_missing_data_error_says_how_to_prepare_them(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="download_and_prepare"):
            sources.TfdsSource("imagenet2012", "train", str(tmp_path))

    def test_sample_has_complete_jpegs(self):
        source = _sample("validation")
        example = source[7]
        assert example.image[:2] == b"\xff\xd8"
        assert Image.open(io.BytesIO(example.image)).format == "JPEG"
        assert 0 <= example.label < source.num_classes == 1000
        assert example.name.startswith("validation[7]")
        assert pickle.loads(pickle.dumps(source))[7] == example

    def test_damaged_record_raises_os_error(self, monkeypatch):
        source = _sample("validation")

        class Damaged:
            def __getitem__(self, index):
                raise RuntimeError("chunk data hash mismatch")

        monkeypatch.setattr(source, "_records", Damaged())
        with pytest.raises(OSError, match=r"validation\[7\]: chunk data"):
            source[7]

    def test_sample_has_one_photo_per_class(self):
        source = _sample("train")
        labels = np.array([source[i].label for i in range(0, len(source), 10)])
        assert len(np.unique(labels)) == len(labels)


def _sample(split):
    try:
        return sources.TfdsSource("imagenet2012", split, None)
    except FileNotFoundError:
        pytest.skip("no ImageNet sample: set TFDS_DATA_DIR")


def test_small_data_set_error_says_the_same(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"cifar10.*download_and_prepare") as error:
        sources.open_tfds("cifar10", "train", str(tmp_path))
    assert "manual" not in str(error.value)


def test_missing_imagenet_error_explains_the_manual_download(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        sources.open_tfds("imagenet2012", "train", str(tmp_path))
    message = str(error.value)
    assert f"ILSVRC2012_img_val.tar into {tmp_path / 'downloads' / 'manual'}" in message
    assert "--config.data=folder" in message
    assert "download_and_prepare" in message
