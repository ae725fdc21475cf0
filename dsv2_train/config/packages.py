"""Optional packages by the choice that asks for them: what is imported, and where to get it."""

from dataclasses import dataclass
from importlib.util import find_spec


@dataclass(frozen=True)
class Package:
    """Something that the default install does not bring.

    Attributes:
        module: its import name.
        remedy: how to get it.
    """

    module: str
    remedy: str

    def why_missing(self) -> str | None:
        """Why it cannot be imported here; None if it is installed. Imports nothing."""
        if find_spec(self.module) is not None:
            return None
        return f"{self.module} is not installed ({self.remedy})"


PACKAGES = {
    "te": Package("transformer_engine", "install the extra gpu"),
    "apex": Package("apex", "it comes with NVIDIA's PyTorch image"),
    "deepspeed_cpu": Package("deepspeed", "install the extra offload"),
    "deepep": Package("deep_ep", "build DeepEP from its repository"),
    "kernel": Package("dsv2_kernels", "`make kernels` builds it"),
}
