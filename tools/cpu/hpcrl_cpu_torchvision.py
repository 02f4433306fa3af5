"""Let the published torchvision import beside a CPU build of torch (CPU set-up only).

PyPI's torchvision holds CUDA operators in a shared library that a CPU torch cannot load; without it
`import torchvision` fails at the first registration of a fake kernel (`operator torchvision::nms does
not exist`), and Transformers and vLLM fail after it. Defining the schemas of the operators that
torchvision registers fakes for is enough for its pure-torch parts, which is all that image processors use.

`hpcrl_cpu_torchvision.pth` imports this module at interpreter start; it must therefore cost nothing: it
only puts a finder in front of the import system that acts when `torchvision` is first asked for.
"""

import sys

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class _DefineSchemasFirst:
    """A meta-path finder that finds nothing: it defines the schemas once, then steps aside."""

    library = None

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name == "torchvision" and cls.library is None:
            import torch

            if torch.version.cuda is None:
                cls.library = torch.library.Library("torchvision", "DEF")
                for schema in SCHEMAS:
                    cls.library.define(schema)
        return None


sys.meta_path.insert(0, _DefineSchemasFirst)
