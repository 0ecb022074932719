"""A candidate family of one's own. In the pyproject.toml of the package that holds it:

[project.entry-points."hantc.candidates"]
separable = "my_package.separable:Separable"
"""

from types import MappingProxyType

from hantc.ops.layers import Frame, LayeredFamily


class Separable(LayeredFamily):
    """Depthwise k×k convolution (the stride is here), norm, ReLU; 1×1 convolution to C_out, norm."""

    name = "separable"
    source = "MobileNet, arXiv 1704.04861"
    params = MappingProxyType({"k": (3, 5, 7)})  # the grid that is proposed

    def plan(self, spec, signature):
        k, f = self.values(spec)["k"], Frame(signature)
        depthwise = f.resize(f.c_in, f.c_in, k, act="relu", groups=f.c_in)
        return [("depthwise", depthwise), ("pointwise", f.after(f.c_in, f.c_out))]
