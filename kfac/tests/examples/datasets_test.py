"""Where the examples get images from."""

import gzip
import itertools
import struct

import numpy as np
import pytest

from kfac.examples import datasets

LONG_NAMES = ("x_train", "y_train", "x_test", "y_test")
SHORT_NAMES = ("x", "y", "xt", "yt")


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return {
        "x_train": rng.integers(0, 256, (7, 28, 28), np.uint8),
        "y_train": rng.integers(0, 10, 7, np.uint8),
        "x_test": rng.integers(0, 256, (3, 28, 28), np.uint8),
        "y_test": rng.integers(0, 10, 3, np.uint8),
    }


def write_idx(path, array, opener=open, kind=8):
    with opener(path, "wb") as file:
        file.write(struct.pack(">HBB", 0, kind, array.ndim))
        file.write(struct.pack(f">{array.ndim}I", *array.shape))
        file.write(array.tobytes())


def write_idx_folder(folder, arrays, suffix=""):
    for key, array in arrays.items():
        path = folder / (datasets._IDX_STEMS[key] + suffix)
        write_idx(path, array, gzip.open if suffix else open)


def check_read(data, arrays):
    np.testing.assert_array_equal(data.x_train * 255, arrays["x_train"])
    np.testing.assert_array_equal(data.x_test * 255, arrays["x_test"])
    np.testing.assert_array_equal(data.y_train, arrays["y_train"])
    np.testing.assert_array_equal(data.y_test, arrays["y_test"])
    assert data.x_train.dtype == np.float32
    assert data.y_train.dtype == np.int32


def test_the_embedded_sample_is_balanced_and_of_the_stated_size():
    data = datasets.load()
    assert data.x_train.shape == (6000, 28, 28)
    assert data.x_test.shape == (1000, 28, 28)
    np.testing.assert_array_equal(np.bincount(data.y_train), [600] * 10)
    np.testing.assert_array_equal(np.bincount(data.y_test), [100] * 10)
    assert "6,000 + 1,000 images" in data.description


def test_pixels_fill_the_unit_interval():
    images = datasets.load().x_train
    assert images.dtype == np.float32
    assert (images.min(), images.max()) == (0.0, 1.0)


def test_digits_look_like_their_labels():
    # Ones are thin and zeros are hollow: a mix-up of rows or labels would show.
    data = datasets.load()
    ink = [data.x_train[data.y_train == d].mean() for d in range(10)]
    assert np.argmin(ink) == 1
    centre = [data.x_train[data.y_train == d][:, 13:15, 13:15].mean() for d in (0, 1)]
    assert centre[0] < 0.2 < 0.6 < centre[1]


def test_flat_images_hold_the_same_pixels_in_order():
    data = datasets.load()
    flat = data.flat()
    assert flat.x_test.shape == (1000, 784)
    np.testing.assert_array_equal(flat.x_test[5].reshape(28, 28), data.x_test[5])
    np.testing.assert_array_equal(flat.y_train, data.y_train)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files_are_read(tmp_path, arrays, suffix):
    write_idx_folder(tmp_path, arrays, suffix)
    check_read(datasets.load(data_dir=str(tmp_path)), arrays)


@pytest.mark.parametrize("names", [LONG_NAMES, SHORT_NAMES])
def test_npz_files_are_read_with_either_kind_of_names(tmp_path, arrays, names):
    named = dict(zip(names, arrays.values(), strict=True))
    np.savez(tmp_path / "fashion_mnist.npz", **named)
    data = datasets.load("fashion_mnist", data_dir=str(tmp_path))
    check_read(data, arrays)
    assert "fashion_mnist" in data.description


def test_download_takes_the_data_of_keras(monkeypatch, arrays):
    import keras

    loaded = (
        (arrays["x_train"], arrays["y_train"]),
        (arrays["x_test"], arrays["y_test"]),
    )
    monkeypatch.setattr(keras.datasets.fashion_mnist, "load_data", lambda: loaded)
    check_read(datasets.load("fashion_mnist", download=True), arrays)


def test_unknown_data_sets_are_refused_by_name():
    with pytest.raises(ValueError, match="'cifar'"):
        datasets.load("cifar")


def test_fashion_mnist_needs_a_source():
    with pytest.raises(ValueError, match="--data_dir"):
        datasets.load("fashion_mnist")


def test_an_empty_folder_says_what_was_expected(tmp_path):
    with pytest.raises(FileNotFoundError, match="mnist.npz nor train-images"):
        datasets.load(data_dir=str(tmp_path))


def test_one_missing_idx_file_is_named(tmp_path, arrays):
    write_idx_folder(tmp_path, arrays)
    (tmp_path / datasets._IDX_STEMS["y_test"]).unlink()
    with pytest.raises(FileNotFoundError, match="t10k-labels"):
        datasets.load(data_dir=str(tmp_path))


def test_idx_files_of_other_numbers_are_refused(tmp_path, arrays):
    write_idx_folder(tmp_path, arrays)
    path = tmp_path / datasets._IDX_STEMS["x_train"]
    write_idx(path, arrays["x_train"], kind=13)
    with pytest.raises(ValueError, match="unsigned bytes"):
        datasets.load(data_dir=str(tmp_path))


def test_npz_files_with_other_arrays_are_refused(tmp_path, arrays):
    np.savez(tmp_path / "mnist.npz", images=arrays["x_train"])
    with pytest.raises(ValueError, match="images.*expected"):
        datasets.load(data_dir=str(tmp_path))


def test_an_epoch_of_batches_is_a_permutation_without_the_remainder():
    stream = datasets.batches(count=10, batch_size=3, seed=1)
    for _ in range(4):
        epoch = np.concatenate(list(itertools.islice(stream, 3)))
        assert len(set(epoch)) == 9
        assert set(epoch) <= set(range(10))


def test_epochs_differ_and_seeds_repeat():
    def epochs(seed):
        stream = datasets.batches(count=50, batch_size=50, seed=seed)
        return next(stream).tolist(), next(stream).tolist()

    first, second = epochs(0)
    assert first != second
    assert epochs(0) == (first, second)
    assert epochs(1) != (first, second)


@pytest.mark.parametrize("size", [0, 11])
def test_batches_must_fit_into_the_data(size):
    with pytest.raises(ValueError, match=f"1..10, got {size}"):
        next(datasets.batches(count=10, batch_size=size))
