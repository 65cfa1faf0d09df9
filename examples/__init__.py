"""Complete tasks: model, losses, data, evaluation and what they add to a run's report."""

import pkgutil

# A folder of one's own holds copies of some examples (`bilevel-flax new`); the others are found
# where they came with the package.
__path__ = pkgutil.extend_path(__path__, __name__)
