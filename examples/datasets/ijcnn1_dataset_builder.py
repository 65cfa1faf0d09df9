"""TFDS builder of ijcnn1; the name of the file and of the class are TFDS's convention.

    tfds build examples/datasets/ijcnn1_dataset_builder.py --file_format=array_record

It needs no TensorFlow. `ijcnn1.load` prepares the set by itself.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from examples.datasets import ijcnn1

_CITATION = """\
@inproceedings{prokhorov2001ijcnn,
  title={IJCNN 2001 neural network competition},
  author={Prokhorov, Danil},
  booktitle={Slide presentation in IJCNN},
  year={2001}
}"""


class Builder(tfds.core.GeneratorBasedBuilder):
    """ijcnn1 in the winner's transformation: 22 features, two classes."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "As on LIBSVM's page."}
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Not needed where there is a network: ijcnn1.bz2 and ijcnn1.t.bz2, or copies of them named "
        f"ijcnn1.trn.bz2 and ijcnn1.tst.bz2, from {ijcnn1.PAGE}"
    )

    def _info(self) -> Any:
        return tfds.core.DatasetInfo(
            builder=self,
            description="IJCNN 2001 challenge, problem 1: consecutive steps of a time series.",
            features=tfds.features.FeaturesDict(
                {
                    "input": tfds.features.Tensor(shape=(ijcnn1.NUM_FEATURES,), dtype=np.float32),
                    "label": tfds.features.ClassLabel(names=["-1", "1"]),
                }
            ),
            supervised_keys=("input", "label"),
            homepage=ijcnn1.PAGE,
            citation=_CITATION,
            disable_shuffling=True,  # the numbers' checksum depends on their order
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        try:
            paths = ijcnn1.manual_files(pathlib.Path(dl_manager.manual_dir))
        except AssertionError:  # there is no manual_dir
            paths = None
        fetched = paths is None
        if paths is None:
            urls = {name: part.url for name, part in ijcnn1.PARTS.items()}
            paths = {name: pathlib.Path(p) for name, p in dl_manager.download(urls).items()}
        return {
            name: self._generate_examples(path, ijcnn1.PARTS[name], fetched)
            for name, path in paths.items()
        }

    def _generate_examples(
        self, path: pathlib.Path, part: ijcnn1.Part, fetched: bool
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        try:
            inputs, labels = ijcnn1.parse(path, part)
        except ValueError:
            if fetched:
                path.unlink()  # TFDS would take it for the original from now on
            raise
        rows = inputs.astype(np.float32)
        for i in range(len(labels)):
            yield i, {"input": rows[i], "label": int(labels[i] > 0)}
