"""The harness: from a config to a run folder with its report. Needs the extra [train]."""

from bilevel_flax.distribution import extras

extras.require("train")
