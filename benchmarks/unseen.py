"""Zero tuning on image sets that no default was chosen on: the configs' task, other pictures.

    python benchmarks/unseen.py --name digits --model mlp --seed 0 --workdir runs/digits
    python benchmarks/unseen.py --name cifar10 --data DIR --model cnn --workdir runs/cifar10

`digits` comes with scikit-learn (1,797 of 8 x 8: 1,000 train, 400 validation); `cifar10` is a tar
of JPEGs, train|test/CLASS/NNNN.jpg (5,000 train, of which 1,000 validation); `omniglot` a zip of
PNGs, one class for each alphabet (2,720: 1,800 train, 450 validation). Prints the headline: learned
weights, none, the validation data alone, the true labels, and the AUC of finding wrong labels.
"""

from __future__ import annotations

import argparse
import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from benchmarks.rows import Rows, add_argument
from bilevel_flax import data
from bilevel_flax.train import config as configs
from bilevel_flax.train.experiment import train_and_evaluate
from examples.mnist_hypercleaning import task

CONFIG = Path(__file__).parent.parent / "configs" / "mnist_hypercleaning.py"


def read_digits(folder: Path | None):
    """(images uint8 [n, 8, 8, 1], labels, names, (train, validation))."""
    del folder
    digits = load_digits()
    images = (digits.images * 15.9375).astype(np.uint8)[..., None]
    return images, digits.target, tuple("0123456789"), (1000, 400)


def read_cifar10(folder: Path):
    """The JPEGs, the training part first."""
    images, labels, names = [], [], []
    with tarfile.open(folder / "cifar10_jpg_subset.tar") as tar:
        members = [member for member in tar.getmembers() if member.name.endswith(".jpg")]
        members.sort(key=lambda member: (Path(member.name).parts[-3] != "train", member.name))
        for member in members:
            file = tar.extractfile(member)
            assert file is not None
            images.append(np.asarray(Image.open(io.BytesIO(file.read())).convert("RGB")))
            labels.append(Path(member.name).parts[-2])
    names = sorted(set(labels))
    return np.stack(images), np.array([names.index(x) for x in labels]), tuple(names), (4000, 1000)


def read_omniglot(folder: Path):
    """Drawings at 28 x 28, labelled by their alphabet."""
    images, labels = [], []
    with zipfile.ZipFile(folder / "omniglot" / "images_background_small1.zip") as archive:
        for name in sorted(archive.namelist()):
            if name.endswith(".png"):
                picture = Image.open(io.BytesIO(archive.read(name))).convert("L")
                images.append(255 - np.asarray(picture.resize((28, 28), Image.Resampling.BOX)))
                labels.append(Path(name).parts[-3])
    names = sorted(set(labels))
    targets = np.array([names.index(x) for x in labels])
    return np.stack(images)[..., None], targets, tuple(names), (1800, 450)


READERS = {"digits": read_digits, "cifar10": read_cifar10, "omniglot": read_omniglot}


def make_task(config):
    """The hypercleaning task on `config.data.name`, read from `config.data.manual_dir`."""
    images, labels, names, (train, held) = READERS[config.data.name](Path(config.data.manual_dir))
    order = np.random.default_rng(config.seed).permutation(len(labels))
    if config.data.name == "cifar10":  # its test set stays apart
        order = np.concatenate([order[order < 5000], np.arange(5000, len(labels))])
    parts = order[:train], order[train : train + held], order[train + held :]
    labels = labels.astype(np.int32)
    given, wrong = data.corrupt_labels(
        labels[parts[0]], config.corruption, len(names), config.seed, config.noise
    )
    standardized = data.standardize(*(images[part] for part in parts))
    examples = task.Examples(
        train_images=standardized[0],
        given_labels=given,
        true_labels=labels[parts[0]],
        is_wrong=wrong,
        validation_images=standardized[1],
        validation_labels=labels[parts[1]],
        test_images=standardized[2],
        test_labels=labels[parts[2]],
        raw_train_images=images[parts[0]],
        num_classes=len(names),
        class_names=names,
    )
    return task.make_task(config, examples)


def main() -> None:
    """Reads the command line, trains, prints one row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", choices=sorted(READERS), required=True)
    parser.add_argument("--data", type=Path, default=Path())
    parser.add_argument("--model", default="mlp")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--corruption", type=float, default=0.5)
    parser.add_argument("--workdir", type=Path, required=True)
    add_argument(parser)
    options = parser.parse_args()
    config = configs.load(
        str(CONFIG),
        [
            f"model={options.model}",
            f"seed={options.seed}",
            f"corruption={options.corruption}",
            f"data.name={options.name}",
            f"data.manual_dir={options.data}",
            "health.summary=False",
        ],
    )
    with config.unlocked():
        config.task = {"call": "benchmarks.unseen:make_task"}
    summary = train_and_evaluate(config, options.workdir)
    row = {"images": options.name, "model": options.model, "seed": options.seed}
    with Rows(options.markdown) as rows:
        rows.add({**row, **{name: round(summary[name], 4) for name in task.HEADLINE}})


if __name__ == "__main__":
    main()
