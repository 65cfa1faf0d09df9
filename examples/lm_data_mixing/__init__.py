"""Which text a language model should read for a target: `README.md`."""
