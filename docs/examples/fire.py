"""A pattern of one's own. In the pyproject.toml of the package that holds it:

[project.entry-points."hantc.patterns"]
fire = "my_package.fire:fire"
"""

from hantc.dialect.pattern import pattern


@pattern("fire", kind="residual")
def fire(op, x):
    """SqueezeNet's module (arXiv 1602.07360): a 1×1 convolution, then a 1×1 and a 3×3 one side by side."""
    squeezed = op.Relu(op.Conv(x, kernel=1))
    return op.Concat(op.Relu(op.Conv(squeezed, kernel=1)), op.Relu(op.Conv(squeezed, kernel=3)))
