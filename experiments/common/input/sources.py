"""Labelled image files with random access, undecoded: a TFDS data set or a folder tree."""

import os
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

_SUFFIXES = (".jpeg", ".jpg", ".png")
_LAYOUT = (
    "expected ROOT/train/<class>/*.JPEG and ROOT/val/<class>/*.JPEG, the same classes in both "
    "(ImageNet: n01440764, ...)"
)


class Example(NamedTuple):
    """One record."""

    image: bytes  # the undecoded file: JPEG or PNG
    label: int
    name: str  # for messages


class Source(Protocol):
    """What the pipeline reads from; pickled into every worker process, so keep it small.

    `source[i]` raises OSError if only this record cannot be read; the pipeline counts and skips it.
    """

    num_classes: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


class TfdsSource:
    """A split of a TFDS image data set prepared as ArrayRecord, read without TensorFlow."""

    def __init__(self, name: str, split: str, data_dir: str | None = None) -> None:
        """Opens the split.

        Args:
          name: of the TFDS builder, with features `image` and `label`, such as `imagenet2012`.
          split: such as `train` or `validation`.
          data_dir: the TFDS folder; None: `TFDS_DATA_DIR`, or TFDS's default.

        Raises:
          FileNotFoundError: if the data set is not there as ArrayRecord; it says how to prepare it.
        """
        import tensorflow_datasets as tfds

        decoders = {"image": tfds.decode.SkipDecoding()}
        self._records = open_tfds(name, split, data_dir, decoders=decoders)
        self._split = split
        self.num_classes: int = self._records.dataset_info.features["label"].num_classes

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        name = f"{self._split}[{index}]"
        try:
            record = self._records[index]
        except RuntimeError as error:  # what ArrayRecord raises for a damaged chunk
            raise OSError(f"{name}: {error}") from error
        if "file_name" in record:
            name += " " + record["file_name"].decode()
        return Example(record["image"], int(record["label"]), name)


def open_tfds(name: str, split: str, data_dir: str | None, **options: Any) -> Any:
    """Opens a data set prepared as ArrayRecord by `tfds.data_source`; downloads nothing.

    Args:
      name: of the TFDS builder.
      split: one of its splits.
      data_dir: the TFDS folder; None: `TFDS_DATA_DIR`, or TFDS's default.
      **options: passed to `tfds.data_source`.

    Raises:
      FileNotFoundError: if the data set is not there as ArrayRecord; it says how to prepare it.
    """
    import tensorflow_datasets as tfds

    absent = KeyError, NotImplementedError, FileNotFoundError, AssertionError
    try:
        return tfds.data_source(name, split=split, data_dir=data_dir, download=False, **options)
    except (*absent, tfds.core.DatasetNotFoundError) as error:
        where = data_dir or tfds.core.constants.DATA_DIR
        download = otherwise = ""
        if name == "imagenet2012":
            manual = os.path.join(where, "downloads", "manual")  # where TFDS looks
            download = (
                "TFDS cannot download it: register at https://image-net.org, and put "
                f"ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar into {manual}. "
            )
            otherwise = (
                "\nOr unpack the photos to DIR/train/<class>/*.JPEG and DIR/val/<class>/*.JPEG, "
                "and give --config.data=folder --config.data_dir=DIR."
            )
        raise FileNotFoundError(
            f"no {name!r} as ArrayRecord in {where}. {download}Prepare it once, with network "
            "access (only this needs TensorFlow):\n"
            '  pip install tensorflow && python -c "import tensorflow_datasets as tfds; '
            f"tfds.builder('{name}', data_dir='{where}', file_format='array_record')"
            '.download_and_prepare()"\n'
            "and give its folder by --config.data_dir=DIR or the environment variable "
            f"TFDS_DATA_DIR.{otherwise}"
        ) from error


class FolderSource:
    """The folder tree `root/split/<class>/*.JPEG`, or .jpg or .png, in lower or upper case.

    As in torchvision, labels are positions among the sorted class folders of `root/train`, in every
    split.
    """

    def __init__(self, root: str, split: str) -> None:
        """Lists the files, sorted by class, then by name.

        Args:
          root: the folder that holds `train` and `val`.
          split: `train` or `val`.

        Warns:
          UserWarning: if a class has no images in this split; it keeps its label.

        Raises:
          FileNotFoundError: if a folder is missing or holds no images; it describes the layout.
          ValueError: if the split has a class that `train` lacks.
        """
        self._folder = os.path.join(root, split)
        self.classes = _subfolders(os.path.join(root, "train"))
        self.num_classes = len(self.classes)
        unknown = sorted(set(_subfolders(self._folder)) - set(self.classes))
        if unknown:
            raise ValueError(
                f"{self._folder} has {_few(unknown)} not in {os.path.join(root, 'train')}; "
                f"{_LAYOUT}"
            )
        files = [_image_files(self._folder, name) for name in self.classes]
        counts = [len(names) for names in files]
        if not sum(counts):
            raise FileNotFoundError(f"no images in {self._folder}; {_LAYOUT}")
        empty = [name for name, count in zip(self.classes, counts, strict=True) if not count]
        if empty:
            warnings.warn(
                f"no images in {_few(empty)} of {self._folder}: never seen, labels unchanged",
                stacklevel=2,
            )
        # Arrays, because a list of 1.28 million strings would cost each worker process 100 MB.
        self._files = np.array([name for names in files for name in names], np.bytes_)
        self._labels = np.repeat(np.arange(len(counts), dtype=np.int32), counts)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Example:
        label = int(self._labels[index])
        name = os.path.join(self.classes[label], os.fsdecode(self._files[index]))
        with open(os.path.join(self._folder, name), "rb") as file:
            return Example(file.read(), label, os.path.join(os.path.basename(self._folder), name))


def _subfolders(folder: str) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            # isdir, because is_dir raises an error for a link to itself.
            names = sorted(entry.name for entry in entries if os.path.isdir(entry))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(f"no folder {folder}; {_LAYOUT}") from error
    if not names:
        raise FileNotFoundError(f"no class folders in {folder}; {_LAYOUT}")
    return names


def _image_files(folder: str, name: str) -> list[bytes]:
    """The sorted names of a class's images; empty if the class has no folder."""
    path = os.path.join(folder, name)
    if not os.path.isdir(path):
        return []
    with os.scandir(path) as entries:
        return sorted(os.fsencode(entry.name) for entry in entries if _is_image(entry))


def _is_image(entry: os.DirEntry[str]) -> bool:
    if not entry.name.lower().endswith(_SUFFIXES):
        return False
    try:
        return entry.is_file()
    except OSError:  # a link to itself, say: listed, so that it is counted as unreadable
        return True


def _few(names: Sequence[str]) -> str:
    """The first few names, for a message."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ("class folder " if len(names) == 1 else "class folders ") + ", ".join(names[:5]) + more
