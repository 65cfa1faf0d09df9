"""Data sets by name, from TFDS without TensorFlow, from original files, or bundled."""
