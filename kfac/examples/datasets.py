"""Image data for the examples: an embedded MNIST sample, or full files on disk."""

from __future__ import annotations

import dataclasses
import gzip
import pathlib
import struct
from collections.abc import Iterator
from importlib import resources

import numpy as np

DATASETS = ("mnist", "fashion_mnist")

# File stems of the original idx distribution, with and without ".gz".
_IDX_STEMS = {
    "x_train": "train-images-idx3-ubyte",
    "y_train": "train-labels-idx1-ubyte",
    "x_test": "t10k-images-idx3-ubyte",
    "y_test": "t10k-labels-idx1-ubyte",
}
# Short names also found in npz files.
_SHORT_NAMES = {"x_train": "x", "y_train": "y", "x_test": "xt", "y_test": "yt"}


@dataclasses.dataclass(frozen=True)
class ImageData:
    """Images in `[0, 1]`, float32 `[n, 28, 28]`, and labels int32 `[n]`."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    description: str

    def flat(self) -> ImageData:
        """The same with images `[n, 784]`."""
        return dataclasses.replace(
            self,
            x_train=self.x_train.reshape(len(self.x_train), -1),
            x_test=self.x_test.reshape(len(self.x_test), -1),
        )


def load(
    dataset: str = "mnist", data_dir: str | None = None, download: bool = False
) -> ImageData:
    """Loads MNIST or Fashion-MNIST.

    Args:
      dataset: "mnist" or "fashion_mnist".
      data_dir: folder with `<dataset>.npz` or the four idx files (`.gz` or not); by
        default the sample of 6,000 + 1,000 MNIST images shipped with the package.
      download: fetch the full data set with `keras.datasets` instead.

    Raises:
      ValueError: unknown data set, Fashion-MNIST without a source, or a file of
        another kind.
      FileNotFoundError: `data_dir` holds neither form.
    """
    if dataset not in DATASETS:
        raise ValueError(f"dataset must be one of {DATASETS}, got {dataset!r}.")
    if download:
        import keras  # Imported late: only this path needs it.

        (x, y), (xt, yt) = getattr(keras.datasets, dataset).load_data()
        arrays = {"x_train": x, "y_train": y, "x_test": xt, "y_test": yt}
        return _prepare(arrays, f"{dataset}, full, downloaded")
    if data_dir is not None:
        return _prepare(_read_folder(dataset, data_dir), f"{dataset} from {data_dir}")
    if dataset != "mnist":
        raise ValueError(
            "Only a sample of MNIST is shipped. For Fashion-MNIST pass --data_dir with "
            "fashion_mnist.npz or the four idx files, or --download."
        )
    sample = resources.files("kfac.examples") / "data" / "mnist_sample.npz"
    with sample.open("rb") as file, np.load(file) as arrays:
        return _prepare(dict(arrays), "embedded MNIST sample")


def batches(count: int, batch_size: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Endless shuffled index batches; every epoch is a new permutation.

    Batches never straddle epochs: a remainder smaller than `batch_size` is dropped.
    """
    if not 0 < batch_size <= count:
        raise ValueError(f"batch_size must be in 1..{count}, got {batch_size}.")
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(count)
        for start in range(0, count - batch_size + 1, batch_size):
            yield order[start : start + batch_size]


def _read_folder(dataset: str, data_dir: str) -> dict[str, np.ndarray]:
    folder = pathlib.Path(data_dir).expanduser()
    npz = folder / f"{dataset}.npz"
    if npz.exists():
        with np.load(npz) as file:
            names = {k: k if k in file else _SHORT_NAMES[k] for k in _IDX_STEMS}
            if not set(names.values()) <= set(file):
                raise ValueError(
                    f"{npz} holds the arrays {sorted(file)}; expected "
                    f"{sorted(_IDX_STEMS)} or {sorted(_SHORT_NAMES.values())}."
                )
            return {key: file[name] for key, name in names.items()}
    arrays = {}
    for key, stem in _IDX_STEMS.items():
        path = next(
            (p for p in (folder / stem, folder / f"{stem}.gz") if p.exists()), None
        )
        if path is None:
            raise FileNotFoundError(
                f"{folder} holds neither {npz.name} nor {stem}[.gz]; expected the four "
                "idx files of the data set, or one npz file."
            )
        arrays[key] = _read_idx(path)
    return arrays


def _read_idx(path: pathlib.Path) -> np.ndarray:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as file:
        _, kind, rank = struct.unpack(">HBB", file.read(4))
        if kind != 8:
            raise ValueError(f"{path} is not an idx file of unsigned bytes.")
        shape = struct.unpack(f">{rank}I", file.read(4 * rank))
        return np.frombuffer(file.read(), np.uint8).reshape(shape)


def _prepare(arrays: dict[str, np.ndarray], source: str) -> ImageData:
    data = {
        key: value.reshape(-1, 28, 28).astype(np.float32) / 255.0
        if key.startswith("x")
        else value.astype(np.int32)
        for key, value in arrays.items()
    }
    counts = f"{len(data['x_train']):,} + {len(data['x_test']):,} images"
    return ImageData(**data, description=f"{source} ({counts})")
